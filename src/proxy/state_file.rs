//! Instances that were added at run time, kept across restarts.
//!
//! Owns one small JSON file, replaced as a whole (written beside, synced, renamed). Knows nothing of the instances that
//! flags and files name: those come from there again.

use std::io::{self, Write};
use std::path::Path;

use serde_json::{Value, json};

use super::admin::read_events;
use super::config::{ConnectorKind, InstanceAddress, Role};
use super::registry::{Instance, NewInstance, Origin};

/// Largest file.
const BYTES_MAX: u64 = 16 << 20;

/// Why a state file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateFileError {
    /// Reading or writing.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Not what this program writes.
    #[error("it is not a state file of this proxy")]
    Malformed,
}

pub(crate) fn entry(instance: &Instance) -> Value {
    let link = instance.link.read();
    json!({
        "instance": instance.name,
        "role": instance.role().name(),
        "bootstrap_port": instance.address.bootstrap,
        "weight": instance.weight,
        "group": instance.group,
        "kv_events": instance.events.as_ref().map(|e| json!({
            "endpoint": e.to_string(),
            "replay_endpoint": e.replay.as_ref().map(|(host, port)| crate::base::net::join_host_port(host, *port)),
            "topic": e.topic,
        })),
        "connector": link.kind.filter(|_| link.told).map(ConnectorKind::name),
    })
}

fn read_entry(entry: &Value) -> Option<NewInstance> {
    let mut address = InstanceAddress::parse(entry.get("instance")?.as_str()?).ok()?;
    let bootstrap = entry.get("bootstrap_port").and_then(Value::as_u64);
    address.bootstrap = bootstrap.and_then(|p| u16::try_from(p).ok());
    let host = address.host.clone();
    let text = |name: &str| entry.get(name).and_then(Value::as_str).unwrap_or_default();
    let weight = entry.get("weight").and_then(Value::as_f64);
    Some(NewInstance {
        address,
        role: Role::parse(text("role"))?,
        weight: weight.filter(|w| *w > 0.0).unwrap_or(1.0),
        group: text("group").to_owned(),
        connector: ConnectorKind::parse(text("connector")),
        origin: Origin::Added,
        events: read_events(entry.get("kv_events"), &host),
    })
}

/// What a file remembers; nothing when there is none.
pub(crate) fn load(path: &Path) -> Result<Vec<NewInstance>, StateFileError> {
    // Looked at before it is opened: a pipe would hold up the start, a device never ends.
    match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Ok(found) if !found.is_file() || found.len() > BYTES_MAX => {
            return Err(StateFileError::Malformed);
        }
        other => {
            other?;
        }
    }
    let text = std::fs::read(path)?;
    let value: Value = serde_json::from_slice(&text).map_err(|_| StateFileError::Malformed)?;
    let list = value.get("instances").and_then(Value::as_array);
    list.ok_or(StateFileError::Malformed)?
        .iter()
        .map(|e| read_entry(e).ok_or(StateFileError::Malformed))
        .collect()
}

/// Replaces the file.
pub(crate) fn save(path: &Path, instances: &[Value]) -> Result<(), StateFileError> {
    let text =
        serde_json::to_vec_pretty(&json!({"instances": instances})).map_err(io::Error::from)?;
    let beside = path.with_extension("tmp");
    let mut file = std::fs::File::create(&beside)?;
    file.write_all(&text)?;
    file.sync_all()?;
    std::fs::rename(&beside, path)?;
    Ok(())
}
