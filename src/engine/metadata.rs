//! Where a peer's name is turned into an address: the metadata services upstream knows, with its key and value, so that
//! both can share one (`mooncake/rpc_meta/<name>` → `{"ip_or_host_name", "rpc_port"}`).

use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::base::net::{join_host_port, split_host_port};

/// Bound of one exchange with the service.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Why a name was not published or found.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum MetadataError {
    /// Not an address of a service this build knows.
    #[error(
        "`{given}` is none of P2PHANDSHAKE, http://HOST:PORT/metadata, redis://HOST:PORT, etcd://HOST:PORT"
    )]
    Unknown {
        /// What was given.
        given: String,
    },
    /// The service did not answer as it should.
    #[error("metadata service {server}: {reason}")]
    Failed {
        /// Its address.
        server: String,
        /// Why.
        reason: String,
    },
}

/// A metadata service.
pub enum Metadata {
    /// None: names are `host:port`.
    PeerToPeer,
    /// `GET`, `PUT` and `DELETE` of `URL?key=…`.
    Http(String),
    /// etcd through its JSON gateway (on by default since 3.0): base URL.
    Etcd(String),
    /// Plain keys.
    Redis {
        /// Its address.
        server: String,
        /// The client.
        client: redis::Client,
    },
}

fn key(name: &str) -> String {
    format!("mooncake/rpc_meta/{name}")
}

impl Metadata {
    /// By upstream's spelling.
    ///
    /// # Errors
    /// `Unknown`.
    pub fn open(server: &str) -> Result<Self, MetadataError> {
        let unknown = || MetadataError::Unknown {
            given: server.to_owned(),
        };
        if server.is_empty() || server == "P2PHANDSHAKE" {
            return Ok(Self::PeerToPeer);
        }
        if server.starts_with("http://") {
            return Ok(Self::Http(server.to_owned()));
        }
        if let Some(address) = server.strip_prefix("etcd://") {
            return Ok(Self::Etcd(format!("http://{address}/v3/kv")));
        }
        if server.starts_with("redis://") {
            let client = redis::Client::open(server).map_err(|_| unknown())?;
            return Ok(Self::Redis {
                server: server.to_owned(),
                client,
            });
        }
        Err(unknown())
    }

    /// Makes a name known.
    ///
    /// # Errors
    /// `Failed`.
    pub fn publish(&self, name: &str, host: &str, port: u16) -> Result<(), MetadataError> {
        let value = json!({ "ip_or_host_name": host, "rpc_port": port }).to_string();
        match self {
            Self::PeerToPeer => Ok(()),
            Self::Http(url) => {
                let sent = agent().put(url).query("key", key(name)).send(&value);
                sent.map(|_| ()).map_err(|e| failed(url, &e))
            }
            Self::Etcd(url) => {
                let pair = json!({ "key": base64(&key(name)), "value": base64(&value) });
                etcd(url, "put", &pair).map(|_| ())
            }
            Self::Redis { server, client } => connection(server, client).and_then(|mut c| {
                redis::cmd("SET")
                    .arg(key(name))
                    .arg(value)
                    .exec(&mut c)
                    .map_err(|e| failed(server, &e))
            }),
        }
    }

    /// Takes a name back.
    ///
    /// # Errors
    /// `Failed`.
    pub fn withdraw(&self, name: &str) -> Result<(), MetadataError> {
        match self {
            Self::PeerToPeer => Ok(()),
            Self::Http(url) => {
                let sent = agent().delete(url).query("key", key(name)).call();
                sent.map(|_| ()).map_err(|e| failed(url, &e))
            }
            Self::Etcd(url) => {
                etcd(url, "deleterange", &json!({ "key": base64(&key(name)) })).map(|_| ())
            }
            Self::Redis { server, client } => connection(server, client).and_then(|mut c| {
                redis::cmd("DEL")
                    .arg(key(name))
                    .exec(&mut c)
                    .map_err(|e| failed(server, &e))
            }),
        }
    }

    /// `host:port` of a name; `None` when nobody has it.
    ///
    /// # Errors
    /// `Failed`.
    pub fn lookup(&self, name: &str) -> Result<Option<String>, MetadataError> {
        let found = match self {
            Self::PeerToPeer => {
                let address = split_host_port(name, 0).ok().filter(|(_, port)| *port != 0);
                return Ok(address.map(|(host, port)| join_host_port(&host, port)));
            }
            Self::Http(url) => match agent().get(url).query("key", key(name)).call() {
                Ok(mut answer) => {
                    let text = answer.body_mut().read_to_string();
                    Some(text.map_err(|e| failed(url, &e))?)
                }
                Err(ureq::Error::StatusCode(404)) => None,
                Err(error) => return Err(failed(url, &error)),
            },
            Self::Etcd(url) => {
                let answer = etcd(url, "range", &json!({ "key": base64(&key(name)) }))?;
                let value = answer.pointer("/kvs/0/value").and_then(Value::as_str);
                let bytes = value.and_then(|v| BASE64_STANDARD.decode(v).ok());
                bytes.and_then(|b| String::from_utf8(b).ok())
            }
            Self::Redis { server, client } => {
                let mut connection = connection(server, client)?;
                redis::cmd("GET")
                    .arg(key(name))
                    .query::<Option<String>>(&mut connection)
                    .map_err(|e| failed(server, &e))?
            }
        };
        Ok(found.as_deref().and_then(address_of))
    }
}

/// The address in a published value.
fn address_of(value: &str) -> Option<String> {
    let value: Value = serde_json::from_str(value).ok()?;
    let host = value.get("ip_or_host_name")?.as_str()?;
    let port = u16::try_from(value.get("rpc_port")?.as_u64()?).ok()?;
    Some(join_host_port(host, port))
}

fn failed(server: &str, reason: &dyn std::fmt::Display) -> MetadataError {
    MetadataError::Failed {
        server: server.to_owned(),
        reason: reason.to_string(),
    }
}

fn base64(text: &str) -> String {
    BASE64_STANDARD.encode(text)
}

/// One call of etcd's gateway.
fn etcd(url: &str, what: &str, request: &Value) -> Result<Value, MetadataError> {
    let place = format!("{url}/{what}");
    let answer = agent().post(&place).send(&request.to_string());
    let text = answer.and_then(|mut a| a.body_mut().read_to_string());
    let text = text.map_err(|e| failed(&place, &e))?;
    serde_json::from_str(&text).map_err(|e| failed(&place, &e))
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        .timeout_global(Some(TIMEOUT))
        .build()
        .into()
}

fn connection(server: &str, client: &redis::Client) -> Result<redis::Connection, MetadataError> {
    let opened = client.get_connection_with_timeout(TIMEOUT);
    let opened = opened.map_err(|e| failed(server, &e))?;
    let bounded = opened
        .set_read_timeout(Some(TIMEOUT))
        .and_then(|()| opened.set_write_timeout(Some(TIMEOUT)));
    bounded.map_err(|e| failed(server, &e))?;
    Ok(opened)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values() {
        let p2p = Metadata::open("P2PHANDSHAKE").unwrap();
        assert_eq!(p2p.lookup("h:7"), Ok(Some("h:7".to_owned())));
        assert_eq!(p2p.lookup("h"), Ok(None));
        assert!(Metadata::open("ftp://x").is_err());
        let value = r#"{"ip_or_host_name":"::1","rpc_port":9,"more":1}"#;
        assert_eq!(address_of(value), Some("[::1]:9".to_owned()));
        for bad in ["", "{}", r#"{"ip_or_host_name":"h","rpc_port":70000}"#] {
            assert_eq!(address_of(bad), None);
        }
    }
}
