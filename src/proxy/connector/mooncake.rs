//! `mooncake` (MooncakeConnector): prefill pushes to decode. Both legs run at once under a new transfer id; decode learns
//! prefill's bootstrap address and engine id, which the bootstrap server tells.

use bytes::Bytes;
use serde_json::{Value, json};

use super::super::registry::Engine;
use crate::base::net::join_host_port;

/// vLLM's `VLLM_MOONCAKE_BOOTSTRAP_PORT`.
pub(crate) const BOOTSTRAP_PORT: u16 = 8998;
/// Most ranks of an instance.
const ENGINES_MAX: usize = 1024;

/// `kv_transfer_params` of the prefill body.
pub(crate) fn prefill_params(transfer_id: &str) -> Bytes {
    let params =
        json!({"do_remote_decode": true, "do_remote_prefill": false, "transfer_id": transfer_id});
    Bytes::from(params.to_string())
}

/// `kv_transfer_params` of the decode body.
pub(crate) fn decode_params(transfer_id: &str, host: &str, port: u16, engine_id: &str) -> Bytes {
    let address = format!("http://{}", join_host_port(host, port));
    let params = json!({
        "do_remote_decode": false, "do_remote_prefill": true, "remote_bootstrap_addr": address,
        "remote_engine_id": engine_id, "transfer_id": transfer_id,
    });
    Bytes::from(params.to_string())
}

/// The engines in a bootstrap server's answer: `{"<rank>": {"engine_id": "…", …}}`. `None`: it is no bootstrap server.
pub(crate) fn engines(answer: &[u8]) -> Option<Vec<Engine>> {
    let Value::Object(ranks) = serde_json::from_slice(answer).ok()? else {
        return None;
    };
    let mut found = Vec::new();
    for (rank, entry) in ranks.into_iter().take(ENGINES_MAX) {
        let id = entry.get("engine_id")?.as_str()?.to_owned();
        found.push(Engine {
            rank: rank.parse().ok()?,
            id,
        });
    }
    found.sort_by_key(|e| e.rank);
    (!found.is_empty()).then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bootstrap_answers() {
        let two =
            br#"{"1":{"engine_id":"b"},"0":{"engine_id":"a","worker_addr":{"0":{"0":"h:1"}}}}"#;
        let ids: Vec<_> = engines(two)
            .unwrap()
            .into_iter()
            .map(|e| (e.rank, e.id))
            .collect();
        assert_eq!(ids, [(0, "a".to_owned()), (1, "b".to_owned())]);
        for bad in [
            &b"{}"[..],
            b"[]",
            b"{\"detail\":\"Not Found\"}",
            b"{\"0\":{}}",
            b"x",
        ] {
            assert_eq!(engines(bad), None);
        }
    }
}
