//! Instances that come from a name or a file, looked at again and again.
//!
//! Owns the grammar (`[ROLE=]dns:NAME:PORT`, `file:PATH`, `zmq:IP:PORT`, which is `registrations`) and a task for the others. Every address behind a name is an
//! instance; a file holds JSON, `{"prefill": [...], "decode": [...], "both": [...]}`. A source that cannot be read changes nothing: what it named last
//! stays. Refuses to know health: who is named is asked by `health` before it gets a request.

use std::io::Read;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::App;
use super::config::{EventsRule, InstanceAddress, Role};
use super::named;
use super::registrations;
use super::registry::{NewInstance, Origin};

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(5);
/// Bound of a look.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest file.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Where instances are found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Discovery {
    /// Every address of a name.
    Dns {
        /// What the instances are for.
        role: Role,
        /// The name.
        name: String,
        /// Port of all of them.
        port: u16,
    },
    /// A JSON file.
    File(PathBuf),
    /// Instances that register themselves at this address (ZeroMQ).
    Zmq(SocketAddr),
}

impl Discovery {
    /// Reads `dns:NAME:PORT` (role `both`), `prefill=dns:NAME:PORT`, `decode=dns:NAME:PORT`, `file:PATH` and `zmq:IP:PORT`, separated
    /// by commas.
    ///
    /// # Errors
    /// The first part that is none.
    pub fn parse_list(text: &str) -> Result<Vec<Self>, String> {
        let one = |part: &str| {
            if let Some(path) = part.strip_prefix("file:").filter(|p| !p.is_empty()) {
                return Some(Self::File(PathBuf::from(path)));
            }
            if let Some(address) = part.strip_prefix("zmq:") {
                let address = address.strip_prefix("//").unwrap_or(address);
                return address.replace('*', "0.0.0.0").parse().ok().map(Self::Zmq);
            }
            let (role, rest) = match part.split_once('=') {
                Some((role, rest)) => (Role::parse(role)?, rest),
                None => (Role::Both, part),
            };
            let address = InstanceAddress::parse(rest.strip_prefix("dns:")?).ok()?;
            Some(Self::Dns {
                role,
                name: address.host,
                port: address.port,
            })
        };
        let parts = text.split([',', ' ']).filter(|p| !p.is_empty());
        parts
            .map(|p| {
                one(p).ok_or_else(|| {
                    format!("`{p}` is not [ROLE=]dns:NAME:PORT, file:PATH or zmq:IP:PORT")
                })
            })
            .collect()
    }

    async fn look(&self) -> Result<Vec<(InstanceAddress, Role)>, String> {
        match self {
            Self::Dns { role, name, port } => {
                let found = tokio::net::lookup_host((name.as_str(), *port)).await;
                let addresses = found.map_err(|e| e.to_string())?;
                let mut all: Vec<_> = addresses
                    .map(|a| {
                        let address = InstanceAddress {
                            host: a.ip().to_string(),
                            port: a.port(),
                            bootstrap: None,
                            rank: None,
                        };
                        (address, *role)
                    })
                    .collect();
                all.dedup();
                Ok(all)
            }
            Self::File(path) => read(path.clone()).await,
            Self::Zmq(_) => Ok(Vec::new()),
        }
    }
}

async fn read(path: PathBuf) -> Result<Vec<(InstanceAddress, Role)>, String> {
    let reading = move || {
        // Looked at before it is opened: a pipe would hold up the thread, a device never ends.
        if !std::fs::metadata(&path)
            .map_err(|e| e.to_string())?
            .is_file()
        {
            return Err("it is no regular file".to_owned());
        }
        let file = std::fs::File::open(&path).map_err(|e| e.to_string())?;
        let mut text = Vec::new();
        let read = file.take(FILE_BYTES_MAX + 1).read_to_end(&mut text);
        match read.map_err(|e| e.to_string())? as u64 {
            0..=FILE_BYTES_MAX => Ok(text),
            _ => Err("the file is too large".to_owned()),
        }
    };
    let text = tokio::task::spawn_blocking(reading).await;
    let text = text.map_err(|e| e.to_string())??;
    parse(&text)
}

fn parse(text: &[u8]) -> Result<Vec<(InstanceAddress, Role)>, String> {
    let value: serde_json::Value = serde_json::from_slice(text).map_err(|e| e.to_string())?;
    let lists = value.as_object().ok_or("it is no JSON object")?;
    let mut found = Vec::new();
    for (name, list) in lists {
        let role = Role::parse(name).ok_or_else(|| format!("`{name}` is no role"))?;
        for address in list.as_array().ok_or("a role's value is no list")? {
            let text = address.as_str().ok_or("an instance is no text")?;
            found.push((
                InstanceAddress::parse(text).map_err(|e| e.to_string())?,
                role,
            ));
        }
    }
    Ok(found)
}

/// Looks at the sources until the proxy stops.
pub(crate) async fn watch(app: Arc<App>) {
    let mut sources = app.config.discover.clone();
    for source in &sources {
        if let Discovery::Zmq(address) = source {
            tokio::spawn(registrations::listen(app.clone(), *address));
        }
    }
    sources.retain(|s| !matches!(s, Discovery::Zmq(_)));
    let mut last: Vec<Vec<(InstanceAddress, Role)>> = vec![Vec::new(); sources.len()];
    let mut was_wrong = vec![false; sources.len()];
    let mut entered = Vec::new();
    loop {
        for (at, source) in sources.iter().enumerate() {
            let looked = timeout(LOOK_TIMEOUT, source.look()).await;
            match looked.unwrap_or(Err("no answer in time".to_owned())) {
                Ok(found) => {
                    last[at] = found;
                    was_wrong[at] = false;
                }
                Err(error) => {
                    if !std::mem::replace(&mut was_wrong[at], true) {
                        tracing::warn!(?source, error, "cannot be read; what it named last stays");
                    }
                }
            }
        }
        take(&app, &last.concat(), &mut entered);
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            () = app.stopping() => return,
        }
    }
}

/// Makes the discovered instances those that are named now. `entered`: who has been, and is not entered again while it is named;
/// an administrator may have taken it out since.
fn take(app: &Arc<App>, named: &[(InstanceAddress, Role)], entered: &mut Vec<InstanceAddress>) {
    let ranks = |(address, role): &(InstanceAddress, Role)| {
        let role = *role;
        address
            .ranks(app.config.ranks)
            .into_iter()
            .map(move |a| (a, role))
    };
    // An instance that is named for both roles has both.
    let mut merged: Vec<(InstanceAddress, Role)> = Vec::new();
    for (address, role) in named.iter().flat_map(ranks) {
        match merged.iter_mut().find(|(a, _)| a.is_same(&address)) {
            Some((_, known)) if !known.does(role) => *known = Role::Both,
            Some(_) => {}
            None => merged.push((address, role)),
        }
    }
    let named = merged;
    for instance in app.registry.all().iter() {
        let is_named = named.iter().any(|(a, _)| a.is_same(&instance.address));
        if instance.origin == Origin::Discovered && !is_named {
            tracing::info!(instance = %instance.name, "no longer discovered");
            app.remove(instance);
            named::come_back(app, &instance.address);
        }
    }
    entered.retain(|e| named.iter().any(|(a, _)| a.is_same(e)));
    for (address, role) in &named {
        if entered.iter().any(|e| e.is_same(address)) {
            continue;
        }
        let mut new = NewInstance::plain(address.clone(), *role);
        new.connector = app.config.connector;
        new.events = EventsRule::of(&app.config.kv_events, address);
        new.origin = Origin::Discovered;
        if app.add(new).is_ok() {
            entered.push(address.clone());
            tracing::info!(instance = %address, role = role.name(), "discovered");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_and_files() {
        let all = Discovery::parse_list("prefill=dns:p.svc:8100,file:/etc/x.json dns:h:1").unwrap();
        let dns = |role, name: &str, port| Discovery::Dns {
            role,
            name: name.to_owned(),
            port,
        };
        assert_eq!(all[0], dns(Role::Prefill, "p.svc", 8100));
        assert_eq!(all[1], Discovery::File("/etc/x.json".into()));
        assert_eq!(all[2], dns(Role::Both, "h", 1));
        let zmq = Discovery::parse_list("zmq:*:30001").unwrap();
        assert_eq!(zmq, [Discovery::Zmq("0.0.0.0:30001".parse().unwrap())]);
        for bad in [
            "h:1",
            "dns:h",
            "other=dns:h:1",
            "file:",
            "prefill=file:x",
            "zmq:h",
            "zmq:h:1",
        ] {
            assert!(Discovery::parse_list(bad).is_err(), "{bad}");
        }
        let found = parse(br#"{"prefill":["a:1:2"],"decode":["[::1]:3"]}"#).unwrap();
        assert_eq!((found.len(), found[0].0.bootstrap), (2, Some(2)));
        for bad in [
            "[]",
            "{\"x\":[]}",
            "{\"decode\":[1]}",
            "{\"decode\":[\"a\"]}",
            "{",
        ] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn what_never_ends_is_not_read() {
        for path in ["/dev/zero", "/tmp"] {
            let read = read(PathBuf::from(path)).await;
            assert_eq!(read, Err("it is no regular file".to_owned()), "{path}");
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(FILE_BYTES_MAX + 1).unwrap();
        let read = read(file.path().to_owned()).await;
        assert_eq!(read, Err("the file is too large".to_owned()));
    }
}
