//! What a client may tell the engines behind the proxy about KV, and what is the proxy's own to say.
//!
//! A name that makes an engine connect somewhere, fetch another's KV or keep its own for somebody (`do_remote_prefill`,
//! `remote_host`, `bootstrap_host`, LMCache's `disagg_spec`, a request id of p2p, …) is refused: whoever may ask for a
//! completion may not name machines. Everything else (`lmcache.skip_save`, `lmcache.tag.*`, salts) is passed on. Refused and not left
//! out, since a client that sends such a name counts on its effect, and OpenAI's clients expect a wrong field to be named.
//! Owns the names and the places in a body where engines read them. Refuses to know connectors' protocols (`connector`).

use super::http::head::RequestHead;
use super::list::elements;
use super::reply::LocalReply;
use super::splice::{Members, SpliceError, scan};

/// Deepest nesting of what is looked into.
const DEPTH_MAX: u32 = 8;
/// Most requests or objects of a list.
const LIST_MAX: usize = 65_536;

/// Objects for the connectors: of KV, and of images already encoded.
const PARAMS: &[&str] = &["kv_transfer_params", "ec_transfer_params"];
/// Beginnings of fields of a request that engines read by themselves (SGLang, TensorRT-LLM).
const FIELDS: &[&str] = &["bootstrap_", "disagg", "do_remote_"];
/// Fields whose value may hold more fields of a request, or a list of requests.
const WITHIN: &[&str] = &[
    "vllm_xargs",
    "extra_args",
    "extra_body",
    "sampling_params",
    "custom_params",
    "nvext",
    "requests",
    "body",
];
/// Fields that name a request.
const IDS: &[&str] = &["request_id", "rid"];
/// Words of a name that say where KV is or goes.
const WORDS: &[&str] = &[
    "remote",
    "bootstrap",
    "transfer",
    "disagg",
    "host",
    "hosts",
    "ip",
    "port",
    "ports",
    "addr",
    "addrs",
    "address",
    "addresses",
    "url",
    "urls",
    "uri",
    "endpoint",
    "endpoints",
    "peer",
    "peers",
    "socket",
    "engine",
    "block",
    "blocks",
    "receiver",
    "sender",
    "path",
    "paths",
    "file",
    "dir",
];
/// What a request id must not hold: the addresses of a pair (vLLM's P2pNcclConnector).
const PAIR: [&str; 2] = ["___prefill_addr_", "___decode_addr_"];
/// Headers by which a router in front of an engine (llm-d) is told where to go.
const HEADERS: &[&str] = &["x-prefiller-", "x-data-parallel-host", "x-encoder-host"];

/// A field that is not a client's to set, by its path, or a body that cannot be looked through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Not a client's.
    Field(String),
    /// Engines might read it otherwise.
    Body(SpliceError),
}

impl Refused {
    /// What the client gets.
    pub(crate) fn reply(&self) -> LocalReply {
        match self {
            Self::Body(error) => LocalReply::error(400, &error.to_string()),
            Self::Field(name) => {
                let name: String = name.chars().take(256).collect();
                let text = format!(
                    "`{name}` is not a client's to set: it says where KV is or goes, which the proxy does (unless it runs with --trust-kv-params)"
                );
                LocalReply::of_field(400, &text, &name)
            }
        }
    }
}

/// Looks through a request's headers.
pub(crate) fn check_head(head: &RequestHead) -> Result<(), Refused> {
    for (name, value) in head.headers.iter() {
        let begins = |with: &&str| {
            let start = name.get(..with.len()).unwrap_or_default();
            start.eq_ignore_ascii_case(with.as_bytes())
        };
        let names_pair = || PAIR.iter().any(|p| holds(value, p));
        let is_id = name.eq_ignore_ascii_case(b"x-request-id");
        if HEADERS.iter().any(begins) || is_id && names_pair() {
            let name = String::from_utf8_lossy(name).to_ascii_lowercase();
            return Err(Refused::Field(name));
        }
    }
    Ok(())
}

/// Looks through a body that is one JSON object.
pub(crate) fn check(body: &[u8], members: &Members) -> Result<(), Refused> {
    fields(body, members, "", 0)
}

/// Looks through a body of any kind. What an engine could take for JSON must be JSON as it is read here: in UTF-8, without a
/// byte order mark.
pub(crate) fn check_any(head: &RequestHead, body: &[u8]) -> Result<(), Refused> {
    let kind = head.headers.text("content-type");
    let kind = kind.map(|k| {
        k.split(';')
            .next()
            .unwrap_or_default()
            .trim()
            .to_ascii_lowercase()
    });
    let is_json =
        kind.is_none_or(|k| k.is_empty() || k == "application/json" || k.ends_with("+json"));
    if !is_json || body.is_empty() {
        return Ok(());
    }
    let marked = [&b"\xef\xbb\xbf"[..], b"\xfe\xff", b"\xff\xfe"];
    if marked.iter().any(|m| body.starts_with(m)) || memchr::memchr(0, body).is_some() {
        return Err(Refused::Body(SpliceError::Malformed(0)));
    }
    within(body.trim_ascii(), "", 0)
}

fn holds(text: &[u8], part: &str) -> bool {
    memchr::memmem::find(text, part.as_bytes()).is_some()
}

fn is_nothing(value: &[u8]) -> bool {
    matches!(value, b"null" | b"false")
}

fn joined(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_owned()
    } else {
        format!("{path}.{name}")
    }
}

/// A request, or a list of them; anything else has no fields.
fn within(value: &[u8], path: &str, depth: u32) -> Result<(), Refused> {
    match value.first() {
        Some(b'{') => request(value, path, depth),
        Some(b'[') => {
            let all = elements(value, LIST_MAX).map_err(Refused::Body)?;
            let mut objects = all
                .into_iter()
                .filter(|r| matches!(value[r.start], b'{' | b'['));
            let deeper = depth + 1;
            if depth >= DEPTH_MAX {
                return objects
                    .next()
                    .map_or(Ok(()), |_| Err(Refused::Body(SpliceError::TooMuch)));
            }
            objects.try_for_each(|r| within(&value[r], path, deeper))
        }
        _ => Ok(()),
    }
}

fn request(object: &[u8], path: &str, depth: u32) -> Result<(), Refused> {
    if depth > DEPTH_MAX {
        return Err(Refused::Body(SpliceError::TooMuch));
    }
    let members = scan(object).map_err(Refused::Body)?;
    fields(object, &members, path, depth)
}

fn fields(object: &[u8], members: &Members, path: &str, depth: u32) -> Result<(), Refused> {
    for (name, value) in members.entries(object) {
        if is_nothing(value) {
            continue;
        }
        if FIELDS.iter().any(|f| name.starts_with(f)) {
            return Err(Refused::Field(joined(path, &name)));
        }
        if PARAMS.contains(&name.as_ref()) {
            params(value, &joined(path, &name), 0)?;
        } else if IDS.contains(&name.as_ref()) {
            // What cannot be read here may be read elsewhere.
            let id = serde_json::from_slice::<serde_json::Value>(value);
            let id = id.map(|id| id.to_string());
            let names_pair = |id: &String| PAIR.iter().any(|p| holds(id.as_bytes(), p));
            if id.as_ref().map_or(true, names_pair) {
                return Err(Refused::Field(joined(path, &name)));
            }
        } else if WITHIN.contains(&name.as_ref()) {
            within(value, &joined(path, &name), depth + 1)?;
        }
    }
    Ok(())
}

/// Whether a name among a connector's parameters says where KV is or goes.
fn is_place(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    let mut words = lower.split(|c: char| !c.is_ascii_alphabetic());
    words.any(|word| WORDS.contains(&word))
}

/// A connector's parameters: an object, and whatever objects it holds.
fn params(value: &[u8], path: &str, depth: u32) -> Result<(), Refused> {
    if depth > DEPTH_MAX || !value.starts_with(b"{") {
        return Err(Refused::Field(path.to_owned()));
    }
    let members = scan(value).map_err(Refused::Body)?;
    for (name, value) in members.entries(value) {
        // LMCache reads these by their names and takes no address from them.
        if is_nothing(value) || name.starts_with("lmcache.") {
            continue;
        }
        let path = joined(path, &name);
        if is_place(&name) {
            return Err(Refused::Field(path));
        }
        match value.first() {
            Some(b'{') => params(value, &path, depth + 1)?,
            Some(b'[') => {
                let all = elements(value, LIST_MAX).map_err(Refused::Body)?;
                let mut deep = all.into_iter().map(|r| &value[r]);
                // Lists of lists are nobody's.
                deep.try_for_each(|v| match v.first() {
                    Some(b'{') => params(v, &path, depth + 1),
                    Some(b'[') => Err(Refused::Field(path.clone())),
                    _ => Ok(()),
                })?;
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refused(body: &str) -> Option<String> {
        match request(body.as_bytes(), "", 0) {
            Ok(()) => None,
            Err(Refused::Field(name)) => Some(name),
            Err(Refused::Body(error)) => panic!("{body}: {error}"),
        }
    }

    #[test]
    fn what_names_a_place_is_refused_by_its_name() {
        for (body, name) in [
            (
                r#"{"kv_transfer_params":{"do_remote_prefill":true}}"#,
                "kv_transfer_params.do_remote_prefill",
            ),
            (
                r#"{"kv_transfer_params":{"a":1,"remote_host":"h"}}"#,
                "kv_transfer_params.remote_host",
            ),
            (
                r#"{"kv_transfer_params":{"\u0072emote_port":1}}"#,
                "kv_transfer_params.remote_port",
            ),
            (
                r#"{"kv_transfer_params":{},"kv_transfer_params":{"transfer_id":"x"},"kv_transfer_params":{}}"#,
                "kv_transfer_params.transfer_id",
            ),
            (
                r#"{"kv_transfer_\u0070arams":{"disagg_spec":{"receiver_host":"h"}}}"#,
                "kv_transfer_params.disagg_spec",
            ),
            (
                r#"{"kv_transfer_params":{"nested":{"Peer_Host":"h"}}}"#,
                "kv_transfer_params.nested.Peer_Host",
            ),
            (
                r#"{"kv_transfer_params":{"all":[1,{"engine_id":"x"}]}}"#,
                "kv_transfer_params.all.engine_id",
            ),
            (
                r#"{"kv_transfer_params":"{\"remote_host\":\"h\"}"}"#,
                "kv_transfer_params",
            ),
            (
                r#"{"ec_transfer_params":{"peer_port":1}}"#,
                "ec_transfer_params.peer_port",
            ),
            (r#"{"bootstrap_host":"h"}"#, "bootstrap_host"),
            (r#"{"bootstrap_room":[1,2]}"#, "bootstrap_room"),
            (r#"{"disagg_prefill_dp_rank":1}"#, "disagg_prefill_dp_rank"),
            (r#"{"disaggregated_params":{}}"#, "disaggregated_params"),
            (
                r#"{"vllm_xargs":{"kv_transfer_params":{"remote_host":"h"}}}"#,
                "vllm_xargs.kv_transfer_params.remote_host",
            ),
            (
                r#"{"requests":[{},{"bootstrap_port":1}]}"#,
                "requests.bootstrap_port",
            ),
            (
                r#"{"requests":[{"body":{"kv_transfer_params":{"remote_host":"h"}}}]}"#,
                "requests.body.kv_transfer_params.remote_host",
            ),
            (
                r#"{"request_id":"___prefill\u005faddr_h:1___decode_addr_h:2_x"}"#,
                "request_id",
            ),
            (r#"{"rid":["a","___decode_addr_h:2"]}"#, "rid"),
            (r#"{"request_id":"\ud800___decode_addr_h:2"}"#, "request_id"),
        ] {
            assert_eq!(refused(body).as_deref(), Some(name), "{body}");
        }
    }

    #[test]
    fn what_names_none_is_passed_on() {
        for body in [
            r#"{}"#,
            r#"{"kv_transfer_params":null}"#,
            r#"{"kv_transfer_params":{}}"#,
            r#"{"kv_transfer_params":{"do_remote_prefill":false,"remote_host":null}}"#,
            r#"{"kv_transfer_params":{"lmcache.skip_save":true,"lmcache.tag.host":"h","lmcache.ttl":3,"lmcache.x":{"url":"u"}}}"#,
            r#"{"kv_transfer_params":{"priority":1,"tp_size":2,"support":{"report":[1,"remote"]}}}"#,
            r#"{"cache_salt":"remote_host","user":"___prefill_addr_"}"#,
            // A user's own words are no fields.
            r#"{"messages":[{"role":"user","content":"x","bootstrap_host":1}],"metadata":{"remote_host":"h"}}"#,
            r#"{"tools":[{"function":{"parameters":{"properties":{"bootstrap_host":{},"kv_transfer_params":{"remote_host":1}}}}}]}"#,
        ] {
            assert_eq!(refused(body), None, "{body}");
        }
    }

    #[test]
    fn what_is_nested_without_end_is_refused() {
        let deep = format!("{}1{}", r#"{"body":"#.repeat(20), "}".repeat(20));
        assert!(request(deep.as_bytes(), "", 0).is_err());
        let deep = format!(
            r#"{{"kv_transfer_params":{}1{}}}"#,
            r#"{"a":"#.repeat(20),
            "}".repeat(20)
        );
        assert!(request(deep.as_bytes(), "", 0).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(text in "[\\{\\}\\[\\]\",:\\\\ a1nul]{0,24}") {
            for place in ["kv_transfer_params", "requests", "rid"] {
                let _ = request(format!(r#"{{"{place}":{text}}}"#).as_bytes(), "", 0);
            }
        }
    }
}
