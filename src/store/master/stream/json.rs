//! An event as JSON.

use serde_json::{Map, Value};

use super::super::events::{Change, Event};

/// The event's name, as in `event:` of a stream.
pub(super) fn name(change: Change) -> &'static str {
    match change {
        Change::Stored => "stored",
        Change::Removed(_) => "removed",
        Change::Cleared => "cleared",
    }
}

/// `{seq, event, reason?, tenant, key, key_hex?, group?, size_bytes, version, replicas, unix_ms}`; `key_hex` only when
/// the key is no text. The version is text, since it exceeds what JSON readers hold as a number.
pub(crate) fn event(event: &Event) -> Value {
    let mut map = Map::new();
    let mut set = |name: &str, value: Value| {
        map.insert(name.to_owned(), value);
    };
    set("seq", event.seq.into());
    set("event", name(event.change).into());
    if let Change::Removed(reason) = event.change {
        set("reason", reason.name().into());
    }
    set("tenant", event.tenant.as_str().into());
    if event.change != Change::Cleared {
        set("key", String::from_utf8_lossy(&event.key).into());
        if std::str::from_utf8(&event.key).is_err() {
            let hex: String = event.key.iter().map(|b| format!("{b:02x}")).collect();
            set("key_hex", hex.into());
        }
        set("size_bytes", event.size.into());
        set("version", event.version.to_string().into());
        set("replicas", event.replicas.into());
    }
    if !event.group.is_empty() {
        set("group", event.group.as_str().into());
    }
    set("unix_ms", event.unix_ms.into());
    Value::Object(map)
}
