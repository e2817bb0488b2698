//! What the legs of a hand-off say about KV: one file per connector, and how a connector is found out.
//!
//! Owns the fields that go into prefill's and decode's bodies, the order of the legs a connector asks for, and which requests it
//! can hand over. Refuses to know sockets, retries and what is done between the legs (`handoff`).

pub(crate) mod mooncake;
pub(crate) mod nixl;
pub(crate) mod p2p;
pub(crate) mod sglang;
pub(crate) mod store;

use bytes::Bytes;

use super::config::ConnectorKind;
use super::openai::Facts;
use super::splice::Edit;

/// Most prompts of a request that are prefilled one by one.
const BATCH_MAX: usize = 256;

/// The order of the legs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Prefill to its end, then any decode instance.
    OneAfterTheOther,
    /// Both.
    AtOnce,
    /// Prefill to its end, then the decode instance it was told of.
    Paired,
}

/// The way of a connector.
pub(crate) fn way(kind: ConnectorKind) -> Way {
    match kind {
        ConnectorKind::Mooncake | ConnectorKind::Sglang => Way::AtOnce,
        ConnectorKind::P2p => Way::Paired,
        ConnectorKind::Store | ConnectorKind::Nixl | ConnectorKind::None => Way::OneAfterTheOther,
    }
}

/// Whether decode could do without prefill.
pub(crate) fn is_optional(kind: ConnectorKind) -> bool {
    !matches!(kind, ConnectorKind::P2p | ConnectorKind::Sglang)
}

/// Whether a connector hands this request over; else decode does all of it.
pub(crate) fn takes(kind: Option<ConnectorKind>, facts: &Facts) -> bool {
    let special = facts.special;
    if special.name().is_none() {
        return true;
    }
    let Some(kind) = kind else { return false };
    if !is_optional(kind) {
        return true;
    }
    // Prefill's own reply is needed for these, whole and of one prompt.
    let asks_of_prompt = special.echo || special.prompt_logprobs;
    let one = !special.batch && !special.choices;
    if special.beam || special.no_output || special.stateful || asks_of_prompt && !one {
        return false;
    }
    match kind {
        // Keys are made of content, so whoever computed a prompt computed it for every choice.
        ConnectorKind::Store => !special.batch || facts.count.is_some_and(|n| n <= BATCH_MAX),
        ConnectorKind::Nixl => one,
        _ => false,
    }
}

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
    } else {
        // The responses API: nothing to be kept or computed beside the answer.
        edits.push(Edit::Replace("store", Bytes::from_static(b"false")));
        edits.push(Edit::Replace("background", Bytes::from_static(b"false")));
    }
    edits
}

/// A connector's parameters behind the client's own, where it has any: of two with one name the connector's counts.
pub(crate) fn beside_client(client: Option<&[u8]>, ours: Bytes) -> Bytes {
    let inner = client
        .and_then(|c| c.strip_prefix(b"{")?.strip_suffix(b"}"))
        .map(<[u8]>::trim_ascii)
        .filter(|inner| !inner.is_empty());
    match (inner, ours.strip_prefix(b"{")) {
        (Some(inner), Some(rest)) => Bytes::from([b"{", inner, b",", rest].concat()),
        _ => ours,
    }
}

/// What a decode body gets when its client has gone: the KV is fetched and thus released, and nothing more.
pub(crate) fn release_edits(limit: &'static str) -> Vec<Edit> {
    prefill_edits(limit)
}

#[cfg(test)]
mod tests {
    use super::super::openai::Special;
    use super::*;

    #[test]
    fn a_clients_parameters_stay_before_the_connectors() {
        let ours = Bytes::from_static(br#"{"a":1}"#);
        let of = |client: Option<&str>| {
            let both = beside_client(client.map(str::as_bytes), ours.clone());
            String::from_utf8(both.to_vec()).unwrap()
        };
        assert_eq!(of(Some(r#"{ "b": [2] }"#)), r#"{"b": [2],"a":1}"#);
        for nothing in [None, Some("null"), Some("{}"), Some("{ }"), Some("\"{\"")] {
            assert_eq!(of(nothing), r#"{"a":1}"#);
        }
    }

    #[test]
    fn who_hands_over_what() {
        use ConnectorKind::{Mooncake, Nixl, P2p, Sglang, Store};
        let facts = |stream, special| Facts {
            stream,
            special,
            count: Some(2),
            ..Facts::default()
        };
        let takes = |kinds: &[ConnectorKind], stream, special: Special| {
            for kind in ConnectorKind::ALL {
                let wanted = kinds.contains(&kind);
                assert_eq!(
                    takes(Some(kind), &facts(stream, special)),
                    wanted,
                    "{kind:?} {special:?}"
                );
            }
            assert!(!super::takes(None, &facts(stream, special)));
        };
        let none = Special::default();
        assert!(super::takes(None, &facts(false, none)));
        takes(
            &[Store, P2p, Sglang],
            false,
            Special {
                choices: true,
                ..none
            },
        );
        takes(
            &[Store, P2p, Sglang],
            true,
            Special {
                batch: true,
                ..none
            },
        );
        takes(
            &[Store, Nixl, P2p, Sglang],
            true,
            Special { echo: true, ..none },
        );
        let logprobs = Special {
            prompt_logprobs: true,
            ..none
        };
        takes(&[Store, Nixl, P2p, Sglang], false, logprobs);
        takes(&[Store, Nixl, P2p, Sglang], true, logprobs);
        takes(
            &[P2p, Sglang],
            false,
            Special {
                echo: true,
                choices: true,
                ..none
            },
        );
        takes(
            &[P2p, Sglang],
            false,
            Special {
                no_output: true,
                ..none
            },
        );
        assert_eq!(way(Mooncake), Way::AtOnce);
        let many = Facts {
            count: Some(BATCH_MAX + 1),
            ..facts(
                false,
                Special {
                    batch: true,
                    ..none
                },
            )
        };
        assert!(!super::takes(Some(Store), &many));
    }
}
