//! Two replies made one: prefill has computed the prompt, so what a client asked about the prompt (`echo`, `prompt_logprobs`)
//! is in its reply, and goes into decode's.
//!
//! Owns which fields these are. Everything else of decode's reply stays byte for byte, and numbers are copied as they are
//! written. Refuses to know how replies come.

use bytes::Bytes;

use super::list::elements;
use super::splice::{Edit, Members, Pieces, scan};

/// Most choices of a reply.
const CHOICES_MAX: usize = 128;

/// What a prefill reply says about the prompt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PromptPart {
    /// The prompt as text, JSON without its quotes.
    text: Option<Bytes>,
    /// `logprobs` of the prompt.
    logprobs: Option<Bytes>,
    prompt_logprobs: Option<Bytes>,
    /// They are beside the choices, as a chat's are.
    is_beside: bool,
}

fn value<'a>(object: &'a [u8], members: &Members, name: &str) -> Option<&'a [u8]> {
    members.get(object, name).filter(|v| *v != b"null")
}

/// The first choice of a reply.
fn choice(reply: &[u8], members: &Members) -> Option<std::ops::Range<usize>> {
    let list = members.range(reply, "choices")?;
    let all = elements(&reply[list.clone()], CHOICES_MAX).ok()?;
    let first = all.first()?;
    Some(list.start + first.start..list.start + first.end)
}

impl PromptPart {
    /// Reads a prefill reply; `None` when it lacks what was asked for.
    pub(crate) fn of(reply: &Bytes, echo: bool, prompt_logprobs: bool) -> Option<Self> {
        let members = scan(reply).ok()?;
        let first = reply.slice(choice(reply, &members)?);
        let inner = scan(&first).ok()?;
        let copy = |found: &[u8]| Bytes::copy_from_slice(found);
        let within = value(&first, &inner, "prompt_logprobs");
        let part = Self {
            text: value(&first, &inner, "text")
                .filter(|_| echo)
                .and_then(unquoted)
                .map(copy),
            logprobs: value(&first, &inner, "logprobs").filter(|_| echo).map(copy),
            // Chat's is beside the choices.
            is_beside: within.is_none(),
            prompt_logprobs: within
                .or_else(|| value(reply, &members, "prompt_logprobs"))
                .filter(|_| prompt_logprobs)
                .map(copy),
        };
        let complete =
            (!echo || part.text.is_some()) && (!prompt_logprobs || part.prompt_logprobs.is_some());
        complete.then_some(part)
    }

    /// Puts it into a decode reply, or into the first event of a streamed one.
    pub(crate) fn merged_with(&self, reply: &Bytes) -> Option<Vec<u8>> {
        let members = scan(reply).ok()?;
        let place = choice(reply, &members)?;
        let first = reply.slice(place.clone());
        let inner = scan(&first).ok()?;
        let mut edits = Vec::new();
        if let Some(text) = &self.text {
            let own = inner.get(&first, "text").and_then(unquoted)?;
            let joined = [b"\"", text.as_ref(), own, b"\""].concat();
            edits.push(Edit::Replace("text", joined.into()));
        }
        let own = value(&first, &inner, "logprobs");
        if let (Some(prompt), Some(own)) = (&self.logprobs, own) {
            edits.push(Edit::Replace("logprobs", logprobs(prompt, own)?.into()));
        }
        let mut outer = Vec::new();
        if let Some(told) = &self.prompt_logprobs {
            // Events of a stream have no such member yet.
            let is_there = members.get(reply, "prompt_logprobs").is_some();
            let edits = if is_there || self.is_beside {
                &mut outer
            } else {
                &mut edits
            };
            edits.push(Edit::Set("prompt_logprobs", told.clone()));
        }
        let choice = joined(&inner.apply(&first, &edits));
        let whole = [&reply[..place.start], &choice, &reply[place.end..]].concat();
        if outer.is_empty() {
            return Some(whole);
        }
        let whole = Bytes::from(whole);
        let members = scan(&whole).ok()?;
        Some(joined(&members.apply(&whole, &outer)))
    }
}

fn joined(pieces: &Pieces) -> Vec<u8> {
    pieces.concat()
}

fn unquoted(text: &[u8]) -> Option<&[u8]> {
    text.strip_prefix(b"\"")?.strip_suffix(b"\"")
}

/// `[a]` and `[b]` are `[a,b]`.
fn both(one: &[u8], other: &[u8]) -> Option<Vec<u8>> {
    let inner = |list: &'_ [u8]| -> Option<Vec<u8>> {
        let inner = list.trim_ascii().strip_prefix(b"[")?.strip_suffix(b"]")?;
        Some(inner.trim_ascii().to_vec())
    };
    let (one, other) = (inner(one)?, inner(other)?);
    let comma: &[u8] = if one.is_empty() || other.is_empty() {
        b""
    } else {
        b","
    };
    Some([b"[", one.as_slice(), comma, other.as_slice(), b"]"].concat())
}

/// Completions' `logprobs`: lists of one entry per token, and where each begins in the text.
fn logprobs(prompt: &[u8], own: &[u8]) -> Option<Vec<u8>> {
    let (theirs, ours) = (scan(prompt).ok()?, scan(own).ok()?);
    let mut edits = Vec::new();
    for name in ["tokens", "token_logprobs", "top_logprobs"] {
        let both_told = value(prompt, &theirs, name).zip(value(own, &ours, name));
        if let Some((one, other)) = both_told {
            edits.push(Edit::Replace(name, both(one, other)?.into()));
        }
    }
    let offsets = value(prompt, &theirs, "text_offset").zip(value(own, &ours, "text_offset"));
    if let Some((one, other)) = offsets {
        let before: Vec<u64> = serde_json::from_slice(one).ok()?;
        let tokens: Vec<String> = serde_json::from_slice(value(prompt, &theirs, "tokens")?).ok()?;
        let last = tokens.last().map_or(0, |t| t.chars().count() as u64);
        let shift = before.last().map_or(0, |at| at + last);
        let after: Vec<u64> = serde_json::from_slice(other).ok()?;
        let after: Vec<u64> = after.into_iter().map(|at| at + shift).collect();
        let after = serde_json::to_vec(&after).ok()?;
        edits.push(Edit::Replace("text_offset", both(one, &after)?.into()));
    }
    let own = Bytes::copy_from_slice(own);
    Some(joined(&ours.apply(&own, &edits)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(text: &'static str) -> Bytes {
        Bytes::from_static(text.as_bytes())
    }

    #[test]
    fn echo_with_logprobs() {
        let prefill = bytes(
            r#"{"choices":[{"index":0,"text":"A \"cat","logprobs":{"text_offset":[0,1],"token_logprobs":[null,-1.5e-05],"tokens":["A"," \"cat"],"top_logprobs":[null,{" \"cat":-1.50}]}}]}"#,
        );
        let decode = bytes(
            r#"{"id":"x", "choices":[{"index":0,"text":" sat","logprobs":{"text_offset":[0],"token_logprobs":[-2.0],"tokens":[" sat"],"top_logprobs":[{" sat":-2.0}]},"stop_reason":null}],"usage":{"prompt_tokens":2}}"#,
        );
        let part = PromptPart::of(&prefill, true, false).unwrap();
        let merged = String::from_utf8(part.merged_with(&decode).unwrap()).unwrap();
        assert_eq!(
            merged,
            r#"{"id":"x", "choices":[{"index":0,"text":"A \"cat sat","logprobs":{"text_offset":[0,1,6],"token_logprobs":[null,-1.5e-05,-2.0],"tokens":["A"," \"cat"," sat"],"top_logprobs":[null,{" \"cat":-1.50},{" sat":-2.0}]},"stop_reason":null}],"usage":{"prompt_tokens":2}}"#
        );
    }

    #[test]
    fn prompt_logprobs_in_the_choice_and_beside_it() {
        let prefill =
            bytes(r#"{"choices":[{"text":"x","prompt_logprobs":[null,{"5":{"logprob":-0.1}}]}]}"#);
        let part = PromptPart::of(&prefill, false, true).unwrap();
        let decode = bytes(r#"{"choices":[{"text":"y","prompt_logprobs":null}]}"#);
        assert_eq!(
            part.merged_with(&decode).unwrap(),
            br#"{"choices":[{"text":"y","prompt_logprobs":[null,{"5":{"logprob":-0.1}}]}]}"#
        );
        let chat =
            bytes(r#"{"choices":[{"message":{}}],"prompt_logprobs":[null,{"7":{}}],"kv":1}"#);
        let part = PromptPart::of(&chat, false, true).unwrap();
        let decode = bytes(r#"{"choices":[{"message":{"content":"y"}}],"prompt_logprobs":null}"#);
        assert_eq!(
            part.merged_with(&decode).unwrap(),
            br#"{"choices":[{"message":{"content":"y"}}],"prompt_logprobs":[null,{"7":{}}]}"#
        );
    }

    #[test]
    fn an_event_of_a_stream_gets_them_where_a_whole_reply_has_them() {
        for (prefill, event, wanted) in [
            (
                r#"{"choices":[{"text":"x","prompt_logprobs":[null]}]}"#,
                r#"{"choices":[{"index":0,"text":" y"}]}"#,
                r#"{"choices":[{"index":0,"text":" y","prompt_logprobs":[null]}]}"#,
            ),
            (
                r#"{"choices":[{"message":{}}],"prompt_logprobs":[null]}"#,
                r#"{"choices":[{"delta":{"role":"assistant"}}],"usage":null}"#,
                r#"{"choices":[{"delta":{"role":"assistant"}}],"usage":null,"prompt_logprobs":[null]}"#,
            ),
        ] {
            let part = PromptPart::of(&bytes(prefill), false, true).unwrap();
            let merged = part.merged_with(&bytes(event)).unwrap();
            assert_eq!(String::from_utf8(merged).unwrap(), wanted);
        }
    }

    #[test]
    fn what_is_not_there_is_not_made_up() {
        for (reply, echo, logprobs) in [
            ("{}", true, false),
            (r#"{"choices":[]}"#, true, false),
            (r#"{"choices":[{"text":null}]}"#, true, false),
            (r#"{"choices":[{"text":"x"}]}"#, false, true),
            ("no json", true, true),
        ] {
            assert_eq!(
                PromptPart::of(&bytes(reply), echo, logprobs),
                None,
                "{reply}"
            );
        }
        let part = PromptPart::of(&bytes(r#"{"choices":[{"text":"x"}]}"#), true, false).unwrap();
        assert_eq!(part.merged_with(&bytes(r#"{"choices":[]}"#)), None);
        assert_eq!(part.merged_with(&bytes(r#"{"error":{}}"#)), None);
    }
}
