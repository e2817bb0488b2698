//! `usage.prompt_tokens_details.cached_tokens`: decode counts what prefill has just computed for it as cached, so clients are
//! told prefill's count instead.
//!
//! Owns finding the number in a reply and writing another in its place without changing the length of anything: a shorter
//! number is followed by blanks, which JSON allows; a longer one is not written. Every other byte stays.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;

use super::splice::scan;

/// How long an answer waits for a count that prefill has not told yet.
const LATE_MAX: Duration = Duration::from_millis(100);

const NAME: &[u8] = b"\"cached_tokens\":";

/// Prefill's count, as far as it is known when decode's answer begins.
#[derive(Debug)]
pub(crate) enum Cached {
    Known(u64),
    /// Legs that run at once: prefill's reply may follow.
    Late(oneshot::Receiver<u64>),
}

impl Cached {
    /// The count, if it is known now.
    pub(crate) fn known(&self) -> Option<u64> {
        match self {
            Self::Known(count) => Some(*count),
            Self::Late(_) => None,
        }
    }

    /// The count; waits a moment for one that is on its way. Cancel-safe.
    pub(crate) async fn count(&mut self) -> Option<u64> {
        if let Self::Late(told) = self {
            *self = Self::Known(timeout(LATE_MAX, told).await.ok()?.ok()?);
        }
        self.known()
    }
}

/// Whether a piece of a reply holds a usage object with the number.
pub(crate) fn tells(piece: &[u8]) -> bool {
    let usage = memchr::memmem::rfind(piece, b"\"usage\":");
    usage.is_some_and(|at| memchr::memmem::find(&piece[at..], NAME).is_some())
}

/// Counts in a complete reply of prefill.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) cached: Option<u64>,
    pub(crate) prompt: Option<u64>,
}

/// Reads them.
pub(crate) fn told(reply: &[u8]) -> Told {
    let read = || {
        let usage = scan(reply).ok()?.get(reply, "usage")?;
        let members = scan(usage).ok()?;
        let prompt = members.get(usage, "prompt_tokens");
        let cached = || {
            let details = members.get(usage, "prompt_tokens_details")?;
            let number = scan(details).ok()?.get(details, "cached_tokens")?;
            serde_json::from_slice(number).ok()
        };
        Some(Told {
            cached: cached(),
            prompt: prompt.and_then(|n| serde_json::from_slice(n).ok()),
        })
    };
    read().unwrap_or_default()
}

/// Samples of fewer tokens say more about templates than about texts.
const SAMPLE_TOKENS_MIN: u64 = 64;

/// How many bytes of a prompt, as it is written, make a token: learnt from what engines count.
#[derive(Debug)]
pub(crate) struct BytesPerToken(AtomicU64);

impl Default for BytesPerToken {
    fn default() -> Self {
        Self(AtomicU64::new(4000))
    }
}

impl BytesPerToken {
    pub(crate) fn get(&self) -> f64 {
        self.0.load(Ordering::Relaxed) as f64 / 1000.0
    }

    /// A prompt of so many bytes had so many tokens. What no tokenizer does is not believed.
    pub(crate) fn learn(&self, bytes: usize, tokens: Option<u64>) {
        let Some(tokens) = tokens.filter(|t| *t >= SAMPLE_TOKENS_MIN) else {
            return;
        };
        let seen = bytes as f64 / tokens as f64;
        if (1.0..=16.0).contains(&seen) {
            let next = self.get() * 15.0 / 16.0 + seen / 16.0;
            self.0.store((next * 1000.0) as u64, Ordering::Relaxed);
        }
    }
}

/// Replaces the number in a piece of a reply that holds the whole usage object. Says whether it did.
pub(crate) fn patch(piece: &mut [u8], cached: u64) -> bool {
    let Some(usage) = memchr::memmem::rfind(piece, b"\"usage\":") else {
        return false;
    };
    // Within a text of the answer the quotes would be escaped.
    let Some(found) = memchr::memmem::find(&piece[usage..], NAME) else {
        return false;
    };
    let mut start = usage + found + NAME.len();
    while piece.get(start) == Some(&b' ') {
        start += 1;
    }
    let digits = piece[start..]
        .iter()
        .take_while(|b| b.is_ascii_digit())
        .count();
    let is_whole = piece
        .get(start + digits)
        .is_some_and(|b| matches!(b, b'}' | b',' | b' '));
    let number = cached.to_string();
    if digits == 0 || !is_whole || number.len() > digits {
        return false;
    }
    let room = &mut piece[start..start + digits];
    room.fill(b' ');
    room[..number.len()].copy_from_slice(number.as_bytes());
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patched(text: &str, cached: u64) -> String {
        let mut bytes = text.as_bytes().to_vec();
        patch(&mut bytes, cached);
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn only_the_number_changes_and_no_length() {
        let reply = r#"{"choices":[{"text":"say \"usage\": {\"cached_tokens\": 9}"}],"usage":{"prompt_tokens":5,"prompt_tokens_details":{"cached_tokens":1024}}}"#;
        let counts = Told {
            cached: Some(1024),
            prompt: Some(5),
        };
        assert_eq!(told(reply.as_bytes()), counts);
        assert_eq!(told(b"no json"), Told::default());
        let wanted = reply.replace("1024", "16  ");
        assert_eq!(patched(reply, 16), wanted);
        assert_eq!(told(wanted.as_bytes()).cached, Some(16));
        assert_eq!(patched(reply, 99_999), reply, "no room");
        for other in [
            "{}",
            r#"{"usage":null}"#,
            r#"{"usage":{"prompt_tokens_details":null}}"#,
            r#"{"usage":{"prompt_tokens_details":{"cached_tokens":null}}}"#,
            r#"{"usage":{"prompt_tokens_details":{"cached_tokens":12"#,
            r#"{"choices":[{"text":"\"cached_tokens\": 12"}]}"#,
        ] {
            assert_eq!(patched(other, 1), other);
        }
    }

    #[test]
    fn bytes_per_token_are_learnt() {
        let factor = BytesPerToken::default();
        factor.learn(10_000, None);
        factor.learn(100, Some(10));
        factor.learn(10_000, Some(100));
        factor.learn(100, Some(1000));
        assert!((factor.get() - 4.0).abs() < 1e-9, "too few, or implausible");
        (0..200).for_each(|_| factor.learn(3000, Some(1000)));
        assert!((2.99..3.02).contains(&factor.get()), "{}", factor.get());
    }
}
