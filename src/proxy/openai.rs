//! What the proxy must know of an OpenAI request: which paths take two legs, and the few fields that decide the way.
//!
//! Reads top-level fields only, through [`super::splice`]; refuses to know what a prompt says.

use super::splice::Members;

/// Where a path goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Api {
    /// Prefill, then decode. Names the field that bounds the output.
    Generate { limit: &'static str },
    /// One leg to a decode instance.
    Single,
}

/// The kind of an API path; `None`: not relayed. Workers' control paths (sleep, LoRA loading, profiling) never are.
pub(crate) fn api_of(path: &str) -> Option<Api> {
    let generate = |limit| Some(Api::Generate { limit });
    match path {
        "/v1/completions" | "/v1/chat/completions" | "/v1/messages" => generate("max_tokens"),
        "/v1/responses" => generate("max_output_tokens"),
        "/v1/load_lora_adapter" | "/v1/unload_lora_adapter" => None,
        "/tokenize" | "/detokenize" | "/rerank" | "/v2/rerank" | "/score" | "/pooling"
        | "/classify" | "/version" => Some(Api::Single),
        _ if path.starts_with("/v1/") && !path.contains("..") && !path.contains("//") => {
            Some(Api::Single)
        }
        _ => None,
    }
}

/// Facts about a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Facts {
    pub(crate) model: Option<String>,
    pub(crate) stream: bool,
    /// Why it goes to decode alone.
    pub(crate) alone: Option<&'static str>,
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

/// A batch: several prompts in one request. Token ids (`[1, 2]`) are one prompt.
fn is_batch(prompt: &[u8]) -> bool {
    let Some(inner) = prompt.strip_prefix(b"[") else {
        return false;
    };
    match inner.trim_ascii_start().first() {
        Some(b'[') => true,
        // A list with one text is one prompt, yet its KV is the same; told apart by a comma after the first text.
        Some(b'"') => serde_json::from_slice::<Vec<serde::de::IgnoredAny>>(prompt)
            .map_or(true, |p| p.len() > 1),
        _ => false,
    }
}

/// Reads the facts.
pub(crate) fn facts(body: &[u8], members: &Members, limit: &str) -> Facts {
    let get = |name| members.get(body, name);
    let truthy = |name| get(name).is_some_and(|v| v == b"true");
    let above_one = |name| get(name).and_then(number).is_some_and(|n| n > 1.0);
    let is_set = |name| get(name).is_some_and(|v| v != b"null" && v != b"false");
    let prompt = ["messages", "prompt", "input"]
        .into_iter()
        .find_map(|name| members.range(body, name))
        .unwrap_or(0..0);
    let alone = if above_one("n") || above_one("best_of") {
        Some("several choices")
    } else if truthy("echo") {
        Some("echo")
    } else if is_set("prompt_logprobs") {
        Some("prompt_logprobs")
    } else if truthy("use_beam_search") {
        Some("beam search")
    } else if get(limit).and_then(number).is_some_and(|n| n < 1.0) {
        Some("no output")
    } else if get("prompt").is_some_and(is_batch) {
        Some("batch of prompts")
    } else {
        None
    };
    let bytes = &body[prompt.clone()];
    let tokens = if bytes.first() == Some(&b'[') && get("prompt").is_some() {
        memchr::memchr_iter(b',', bytes).count() as u64 + 1
    } else {
        bytes.len() as u64 / 4
    };
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
        alone,
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
        )
    }

    #[test]
    fn what_goes_to_decode_alone() {
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
            (r#"{"messages":[{"role":"user","content":"a"}]}"#, false),
        ] {
            assert_eq!(of(body).alone.is_some(), alone, "{body}");
        }
        assert_eq!(of(r#"{"prompt":[1,2,3]}"#).tokens, 3);
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
        ] {
            assert_eq!(api_of(path), None, "{path}");
        }
        assert_eq!(api_of("/v1/embeddings"), Some(Api::Single));
    }
}
