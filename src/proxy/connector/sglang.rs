//! `sglang`: both legs at once with the same body and the same *room*, a number under which prefill's bootstrap server brings
//! them together. A batch has a room per prompt; `bootstrap_host` and `_port` are lists then as well.
//!
//! Prefill is told by its own start that it is one, so its body bounds no output. Neither side can do the other's work.

use bytes::Bytes;

use super::super::config::Role;
use super::super::splice::Edit;

/// SGLang's `--disaggregation-bootstrap-port`.
pub(crate) const BOOTSTRAP_PORT: u16 = 8998;

/// What a prefill server says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Server {
    pub(crate) bootstrap_port: u16,
    /// Data-parallel ranks.
    pub(crate) ranks: u32,
}

/// Reads `/server_info`. `None`: it is no SGLang server that prefills.
pub(crate) fn server(answer: &[u8]) -> Option<Server> {
    let info: serde_json::Value = serde_json::from_slice(answer).ok()?;
    let number = |name: &str| info.get(name).and_then(serde_json::Value::as_u64);
    let port = u16::try_from(number("disaggregation_bootstrap_port")?).ok()?;
    if mode(&info)? != "prefill" || port == 0 {
        return None;
    }
    let ranks = number("dp_size").and_then(|n| u32::try_from(n).ok());
    Some(Server {
        bootstrap_port: port,
        ranks: ranks.unwrap_or(1).max(1),
    })
}

/// The role in `/server_info`: the scheduler's own word where it has one, since a role may change while it runs.
fn mode(info: &serde_json::Value) -> Option<&str> {
    let live = info
        .get("internal_states")
        .and_then(|s| s.get(0))
        .and_then(|s| s.get("disaggregation_mode"));
    live.or_else(|| info.get("disaggregation_mode"))?.as_str()
}

/// The role of a server by its `/server_info`.
pub(crate) fn role(answer: &[u8]) -> Option<Role> {
    let info: serde_json::Value = serde_json::from_slice(answer).ok()?;
    match mode(&info)? {
        // It was started without roles, and does both.
        "null" => Some(Role::Both),
        mode => Role::parse(mode),
    }
}

fn room(rank: Option<u32>, ranks: u32) -> u64 {
    let room = rand::random::<u64>() >> 1;
    // A server with ranks gives a room to the rank that is its remainder.
    match rank {
        Some(rank) if rank < ranks => room - room % u64::from(ranks) + u64::from(rank),
        _ => room,
    }
}

/// Added to both bodies. `prompts`: how many rooms, where the request is a list of prompts.
pub(crate) fn edits(
    host: &str,
    port: u16,
    prompts: Option<usize>,
    rank: Option<u32>,
    ranks: u32,
) -> [Edit; 3] {
    let host = serde_json::Value::from(host).to_string();
    let port = port.to_string();
    let list = |of: &mut dyn FnMut() -> String| match prompts {
        None => of(),
        Some(count) => {
            let all: Vec<String> = (0..count).map(|_| of()).collect();
            format!("[{}]", all.join(","))
        }
    };
    [
        Edit::Set("bootstrap_host", Bytes::from(list(&mut || host.clone()))),
        Edit::Set("bootstrap_port", Bytes::from(list(&mut || port.clone()))),
        Edit::Set(
            "bootstrap_room",
            Bytes::from(list(&mut || room(rank, ranks).to_string())),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers() {
        let of = |text: &str| server(text.as_bytes());
        let plain =
            r#"{"disaggregation_mode":"prefill","disaggregation_bootstrap_port":8998,"dp_size":4}"#;
        let wanted = Server {
            bootstrap_port: 8998,
            ranks: 4,
        };
        assert_eq!(of(plain), Some(wanted));
        let switched = r#"{"disaggregation_mode":"prefill","disaggregation_bootstrap_port":8998,"internal_states":[{"disaggregation_mode":"decode"}]}"#;
        assert_eq!(of(switched), None);
        for other in ["", "[]", "{}", r#"{"disaggregation_mode":"prefill"}"#] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn rooms_of_a_batch_and_of_a_rank() {
        let value = |edit: &Edit| match edit {
            Edit::Set(_, value) => serde_json::from_slice::<serde_json::Value>(value).unwrap(),
            _ => unreachable!(),
        };
        let [host, port, rooms] = edits("::1", 9, Some(2), Some(3), 4);
        assert_eq!(value(&host), serde_json::json!(["::1", "::1"]));
        assert_eq!(value(&port), serde_json::json!([9, 9]));
        let rooms = value(&rooms);
        assert_ne!(rooms[0], rooms[1]);
        for room in rooms.as_array().unwrap() {
            let room = room.as_u64().unwrap();
            assert!(room % 4 == 3 && room <= i64::MAX as u64);
        }
        let [host, _, room] = edits("h", 9, None, None, 1);
        assert!(value(&host) == "h" && value(&room).is_u64());
    }
}
