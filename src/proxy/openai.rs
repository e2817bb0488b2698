//! What the proxy must know of an OpenAI request: which paths take two legs, and the few fields that decide the way.
//!
//! Reads top-level fields only, through [`super::splice`]; refuses to know what a prompt says.

use std::borrow::Cow;

use super::list::elements;
use super::splice::Members;

/// Most prompts that are counted in a list; one more means too many, or a broken list.
pub(crate) const PROMPTS_MAX: usize = 4096;

/// Where a path goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Api {
    /// Prefill, then decode. Names the field that bounds the output.
    Generate { limit: &'static str },
    /// One leg to a decode instance.
    Single,
}

/// Loading and unloading adapters.
const LORA: [&str; 2] = ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"];

/// A path as workers read it, `%XX` undone; `None`: they would read it in several ways.
pub(crate) fn plain(path: &str) -> Option<Cow<'_, str>> {
    if !path.contains('%') {
        return Some(Cow::Borrowed(path));
    }
    let mut bytes = path.bytes();
    let mut out = Vec::with_capacity(path.len());
    while let Some(byte) = bytes.next() {
        let mut digit = || char::from(bytes.next()?).to_digit(16);
        out.push(match byte {
            b'%' => (digit()? * 16 + digit()?) as u8,
            other => other,
        });
    }
    let text = String::from_utf8(out).ok()?;
    // Encoded twice, or with what ends a path.
    let is_clear = |c: char| !c.is_control() && !matches!(c, '%' | '?' | '#');
    text.chars().all(is_clear).then_some(Cow::Owned(text))
}

/// The kind of an API path; `None`: not relayed. Workers' control paths (sleep, LoRA loading, profiling) never are, however
/// they are written.
pub(crate) fn api_of(path: &str) -> Option<Api> {
    let generate = |limit| Some(Api::Generate { limit });
    let path = plain(path)?;
    let path = path.as_ref();
    let goes_elsewhere = ["..", "//", "/./", "\\"];
    match path {
        "/v1/completions" | "/v1/chat/completions" | "/v1/messages" => generate("max_tokens"),
        "/v1/responses" => generate("max_output_tokens"),
        _ if LORA.contains(&path.trim_end_matches('/')) => None,
        "/tokenize" | "/detokenize" | "/rerank" | "/v2/rerank" | "/score" | "/pooling"
        | "/classify" | "/version" => Some(Api::Single),
        _ if path.starts_with("/v1/") && !goes_elsewhere.iter().any(|e| path.contains(e)) => {
            Some(Api::Single)
        }
        _ => None,
    }
}

/// What is special about a request: each of them decides whether a prefill leg is possible.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Special {
    /// `n` or `best_of` above 1.
    pub(crate) choices: bool,
    pub(crate) echo: bool,
    pub(crate) prompt_logprobs: bool,
    pub(crate) beam: bool,
    /// An output bound of 0.
    pub(crate) no_output: bool,
    /// More than one prompt.
    pub(crate) batch: bool,
    /// It goes on with a response that only the decode instance that made it knows.
    pub(crate) stateful: bool,
}

impl Special {
    /// The first there is, for the log; `None`: an ordinary request.
    pub(crate) fn name(self) -> Option<&'static str> {
        let all = [
            (self.choices, "several choices"),
            (self.echo, "echo"),
            (self.prompt_logprobs, "prompt_logprobs"),
            (self.beam, "beam search"),
            (self.no_output, "no output"),
            (self.batch, "batch of prompts"),
            (self.stateful, "goes on with a response"),
        ];
        all.into_iter().find_map(|(is, name)| is.then_some(name))
    }
}

/// Facts about a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Facts {
    pub(crate) model: Option<String>,
    pub(crate) stream: bool,
    pub(crate) special: Special,
    /// Prompts or choices, where the request is a list of them.
    pub(crate) count: Option<usize>,
    /// The prompt's bytes within the body.
    pub(crate) prompt: std::ops::Range<usize>,
    /// Prompt tokens, estimated from its bytes.
    pub(crate) tokens: u64,
    /// vLLM's `priority`: smaller comes first.
    pub(crate) priority: i64,
    /// Hash of what else decides the prompt's tokens: model, tools, template.
    pub(crate) seed: u64,
    /// Hash of the body's own name for a session.
    pub(crate) session: Option<u64>,
}

fn number(value: &[u8]) -> Option<f64> {
    serde_json::from_slice(value).ok()
}

fn text(value: &[u8]) -> Option<String> {
    serde_json::from_slice(value).ok()
}

/// Prompts of a list of prompts. Token ids (`[1, 2]`) are one prompt.
fn prompts(prompt: &[u8]) -> Option<usize> {
    let inner = prompt.strip_prefix(b"[")?;
    let first = inner.trim_ascii_start().first()?;
    if !matches!(first, b'[' | b'"') {
        return None;
    }
    Some(elements(prompt, PROMPTS_MAX).map_or(PROMPTS_MAX + 1, |all| all.len()))
}

/// Tokens of a prompt as it is written; `is_plain`: a list is one of token ids, not of messages.
pub(crate) fn estimate(prompt: &[u8], is_plain: bool, bytes_per_token: f64) -> u64 {
    if is_plain && prompt.first() == Some(&b'[') {
        memchr::memchr_iter(b',', prompt).count() as u64 + 1
    } else {
        (prompt.len() as f64 / bytes_per_token) as u64
    }
}

/// Reads the facts.
pub(crate) fn facts(body: &[u8], members: &Members, limit: &str, bytes_per_token: f64) -> Facts {
    let get = |name| members.get(body, name);
    let truthy = |name| get(name).is_some_and(|v| v == b"true");
    let above_one = |name| get(name).and_then(number).is_some_and(|n| n > 1.0);
    let is_set = |name| get(name).is_some_and(|v| v != b"null" && v != b"false");
    let prompt = ["messages", "prompt", "input"]
        .into_iter()
        .find_map(|name| members.range(body, name))
        .unwrap_or(0..0);
    let listed = get("prompt").and_then(prompts);
    let special = Special {
        choices: above_one("n") || above_one("best_of"),
        // Chat has the field, too, and another meaning for it.
        echo: truthy("echo") && get("prompt").is_some() && get("messages").is_none(),
        prompt_logprobs: is_set("prompt_logprobs"),
        beam: truthy("use_beam_search"),
        no_output: get(limit).and_then(number).is_some_and(|n| n < 1.0),
        batch: listed.is_some_and(|count| count > 1),
        stateful: is_set("previous_response_id"),
    };
    let choices = || {
        let n = get("messages").and_then(|_| get("n")).and_then(number)?;
        (n > 1.0).then_some((n as usize).min(PROMPTS_MAX + 1))
    };
    let count = listed.or_else(choices);
    let is_plain = get("prompt").is_some();
    let tokens = estimate(&body[prompt.clone()], is_plain, bytes_per_token);
    let session = ["session_id", "conversation_id", "prompt_cache_key", "user"]
        .into_iter()
        .find_map(get)
        .filter(|v| v.starts_with(b"\""))
        .map(xxhash_rust::xxh3::xxh3_64);
    let seed = [
        "model",
        "tools",
        "chat_template",
        "chat_template_kwargs",
        "documents",
        "add_special_tokens",
    ]
    .into_iter()
    .fold(0, |seed, name| {
        xxhash_rust::xxh3::xxh3_64_with_seed(get(name).unwrap_or_default(), seed)
    });
    Facts {
        seed,
        priority: get("priority").and_then(number).map_or(0, |n| n as i64),
        model: get("model").and_then(text),
        stream: truthy("stream"),
        special,
        count,
        prompt,
        tokens,
        session,
    }
}

#[cfg(test)]
mod tests {
    use super::super::splice::scan;
    use super::*;

    fn of(text: &str) -> Facts {
        facts(
            text.as_bytes(),
            &scan(text.as_bytes()).unwrap(),
            "max_tokens",
            4.0,
        )
    }

    #[test]
    fn what_is_special() {
        for (body, alone) in [
            (r#"{"prompt":"a","n":1}"#, false),
            (r#"{"prompt":"a","n":2}"#, true),
            (r#"{"prompt":"a","best_of":3}"#, true),
            (r#"{"prompt":"a","echo":true}"#, true),
            (r#"{"prompt":"a","echo":false}"#, false),
            (r#"{"prompt":"a","prompt_logprobs":0}"#, true),
            (r#"{"prompt":"a","prompt_logprobs":null}"#, false),
            (r#"{"prompt":"a","max_tokens":0}"#, true),
            (r#"{"prompt":["a"]}"#, false),
            (r#"{"prompt":["a","b"]}"#, true),
            (r#"{"prompt":[1,2,3]}"#, false),
            (r#"{"prompt":[[1],[2]]}"#, true),
            (r#"{"input":"a","previous_response_id":"resp_1"}"#, true),
            (r#"{"input":"a","previous_response_id":null}"#, false),
            (r#"{"messages":[{"role":"user","content":"a"}]}"#, false),
        ] {
            assert_eq!(of(body).special.name().is_some(), alone, "{body}");
        }
        assert_eq!(of(r#"{"prompt":[1,2,3]}"#).tokens, 3);
        for (body, count) in [
            (r#"{"prompt":"a","n":3}"#, None),
            (r#"{"prompt":[1,2]}"#, None),
            (r#"{"prompt":["a"]}"#, Some(1)),
            (r#"{"prompt":[[1],[2]],"n":4}"#, Some(2)),
            (r#"{"messages":[],"n":3}"#, Some(3)),
            (r#"{"messages":[],"n":1}"#, None),
        ] {
            assert_eq!(of(body).count, count, "{body}");
        }
    }

    #[test]
    fn control_paths_of_workers_are_not_relayed() {
        for path in [
            "/",
            "/sleep",
            "/metrics",
            "/v1/load_lora_adapter",
            "/v1/../sleep",
            "/collective_rpc",
            "/v1//x",
            "/v1/load_lora_adapter/",
            "/v1/load_lora%5fadapter",
            "/v1/%6Coad_lora_adapter",
            "/v1/%2e%2e/sleep",
            "/v1/.%2E/sleep",
            "/v1/x%2f%2fy",
            "/v1/%5c..%5csleep",
            "/v1/%255f",
            "/v1/%",
            "/v1/%5",
            "/v1/%zz",
            "/v1/%ff",
            "/v1/a%00b",
            "/v1/a%3fb",
        ] {
            assert_eq!(api_of(path), None, "{path}");
        }
        assert_eq!(api_of("/v1/embeddings"), Some(Api::Single));
        assert_eq!(api_of("/v1/models/a%20b"), Some(Api::Single));
        // Both legs, however it is written.
        let limit = "max_tokens";
        assert_eq!(api_of("/v1/%63ompletions"), Some(Api::Generate { limit }));
    }
}
