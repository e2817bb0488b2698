//! Where a peer's name is turned into an address: the metadata services upstream knows, with its key and value, so that
//! both can share one (`mooncake/rpc_meta/<name>` → `{"ip_or_host_name", "rpc_port"}`).

use std::time::Duration;

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
    /// etcd: its endpoints.
    Etcd {
        /// As given, for messages.
        server: String,
        /// `host:port` each.
        endpoints: Vec<String>,
    },
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
        if let Some(addresses) = server.strip_prefix("etcd://") {
            let each = addresses.split([';', ',']).map(str::trim);
            let endpoints: Vec<String> =
                each.filter(|a| !a.is_empty()).map(str::to_owned).collect();
            if endpoints.is_empty() {
                return Err(unknown());
            }
            return Ok(Self::Etcd {
                server: server.to_owned(),
                endpoints,
            });
        }
        if server.starts_with("redis://") {
            let url = with_login(server, |name| std::env::var(name).ok());
            let client = redis::Client::open(url).map_err(|_| unknown())?;
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
            Self::Etcd { server, endpoints } => etcd(server, endpoints, async |client| {
                client.put(key(name), value.clone(), None).await?;
                Ok(())
            }),
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
            Self::Etcd { server, endpoints } => etcd(server, endpoints, async |client| {
                client.delete(key(name), None).await?;
                Ok(())
            }),
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
            Self::Etcd { server, endpoints } => etcd(server, endpoints, async |client| {
                let answer = client.get(key(name), None).await?;
                let first = answer.kvs().first();
                Ok(first.and_then(|kv| String::from_utf8(kv.value().to_vec()).ok()))
            })?,
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

/// One exchange with etcd, in a thread of its own: its client is asynchronous, and names are looked up rarely.
fn etcd<T: Send>(
    server: &str,
    endpoints: &[String],
    exchange: impl AsyncFn(&mut etcd_client::Client) -> Result<T, etcd_client::Error> + Sync,
) -> Result<T, MetadataError> {
    let wrong = |e: &dyn std::fmt::Display| failed(server, e);
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| wrong(&e))?;
        let bounded = async {
            let options = etcd_client::ConnectOptions::new()
                .with_connect_timeout(TIMEOUT)
                .with_timeout(TIMEOUT);
            let mut client = etcd_client::Client::connect(endpoints, Some(options)).await?;
            exchange(&mut client).await
        };
        match runtime.block_on(async { tokio::time::timeout(TIMEOUT, bounded).await }) {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(wrong(&error)),
            Err(_) => Err(wrong(&"no answer in time")),
        }
    };
    std::thread::scope(|scope| {
        let joined = scope.spawn(run).join();
        joined.unwrap_or_else(|_| Err(wrong(&"its client failed")))
    })
}

/// Upstream's variables for a login and a database, where the URL has none.
fn with_login(server: &str, variable: impl Fn(&str) -> Option<String>) -> String {
    let address = server.strip_prefix("redis://").unwrap_or(server);
    if address.contains('@') {
        return server.to_owned();
    }
    let login = variable("MC_REDIS_PASSWORD")
        .filter(|p| !p.is_empty())
        .map(|password| {
            let user = variable("MC_REDIS_USERNAME").unwrap_or_default();
            format!("{}:{}@", encoded(&user), encoded(&password))
        });
    let database = variable("MC_REDIS_DB_INDEX")
        .filter(|d| d.parse::<u32>().is_ok() && !address.contains('/'))
        .map(|d| format!("/{d}"));
    let (login, database) = (login.unwrap_or_default(), database.unwrap_or_default());
    format!("redis://{login}{address}{database}")
}

/// Percent-encodes what could be taken for a part of the URL.
fn encoded(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, b| {
        if b.is_ascii_alphanumeric() {
            out.push(char::from(b));
        } else {
            out.push_str(&format!("%{b:02X}"));
        }
        out
    })
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        // A proxy that the environment names is for the world outside the cluster.
        .proxy(None)
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
        assert!(Metadata::open("etcd://;").is_err());
        let login = |name: &str| match name {
            "MC_REDIS_PASSWORD" => Some("p@ss".to_owned()),
            "MC_REDIS_DB_INDEX" => Some("3".to_owned()),
            _ => None,
        };
        assert_eq!(with_login("redis://h:1", login), "redis://:p%40ss@h:1/3");
        assert_eq!(with_login("redis://u:x@h:1", login), "redis://u:x@h:1");
        assert_eq!(with_login("redis://h:1", |_| None), "redis://h:1");
        let value = r#"{"ip_or_host_name":"::1","rpc_port":9,"more":1}"#;
        assert_eq!(address_of(value), Some("[::1]:9".to_owned()));
        for bad in ["", "{}", r#"{"ip_or_host_name":"h","rpc_port":70000}"#] {
            assert_eq!(address_of(bad), None);
        }
    }
}
