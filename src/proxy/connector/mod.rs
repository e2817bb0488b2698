//! What the legs of a hand-off say about KV: one file per connector, and how a connector is found out.
//!
//! Owns the fields that go into prefill's and decode's bodies. Refuses to know sockets, retries and order of the legs
//! beyond whether they run at once (`handoff`).

pub(crate) mod mooncake;
pub(crate) mod nixl;
pub(crate) mod store;

use bytes::Bytes;

use super::splice::Edit;

/// What every prefill body gets: one token, no stream, nothing that asks for more.
pub(crate) fn prefill_edits(limit: &'static str) -> Vec<Edit> {
    let one = Bytes::from_static(b"1");
    let mut edits = vec![
        Edit::Set(limit, one.clone()),
        Edit::Replace("stream", Bytes::from_static(b"false")),
        Edit::Remove("stream_options"),
        Edit::Remove("min_tokens"),
        Edit::Remove("min_completion_tokens"),
    ];
    if limit == "max_tokens" {
        edits.push(Edit::Replace("max_completion_tokens", one));
    }
    edits
}

/// What a decode body gets when its client has gone: the KV is fetched and thus released, and nothing more.
pub(crate) fn release_edits(limit: &'static str) -> Vec<Edit> {
    prefill_edits(limit)
}
