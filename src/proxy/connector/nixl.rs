//! `nixl`: prefill is told that decode is remote, its reply carries `kv_transfer_params`, and they go into decode's body as
//! they are. Prefill keeps the blocks until decode has fetched them: from its reply on the hand-off must be finished.

use bytes::Bytes;

use super::super::splice::scan;

const ASK: &str = r#"{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}"#;

/// `kv_transfer_params` of the prefill body.
pub(crate) fn prefill_params() -> Bytes {
    Bytes::from_static(ASK.as_bytes())
}

/// The parameters in a prefill reply, if there are any.
pub(crate) fn params(reply: &[u8]) -> Option<Bytes> {
    let members = scan(reply).ok()?;
    let value = members.get(reply, "kv_transfer_params")?;
    value
        .starts_with(b"{")
        .then(|| Bytes::copy_from_slice(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_params() {
        let reply = br#"{"id":"x","kv_transfer_params":{"a":[1]}}"#;
        assert_eq!(params(reply).as_deref(), Some(&br#"{"a":[1]}"#[..]));
        assert_eq!(params(br#"{"kv_transfer_params":null}"#), None);
        assert_eq!(params(b"no json"), None);
    }
}
