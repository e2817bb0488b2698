//! From the text of a prompt to its tokens, learnt beside the requests' way.
//!
//! A prompt of token ids is its own answer. A text that is new is sent to a worker's `/tokenize` once it has been routed;
//! the next request that begins alike finds the tokens of what both share by the share of the text they have in common.
//! Owns that memory. No request ever waits for it.

use std::sync::Arc;

use parking_lot::Mutex;

use super::generations::Generations;
use super::index::{Chain, KvIndex};
use super::text_blocks as blocks;

/// Texts shorter than this are not worth a question.
const TEXT_BYTES_MIN: usize = 1024;
/// Boundaries remembered per generation.
const BOUNDARIES_MAX: usize = 1 << 16;
/// Blocks of tokens remembered per generation.
const BLOCKS_MAX: usize = 1 << 20;

/// What is known of a prompt's tokens.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub(crate) chain: Arc<Chain>,
    /// How many tokens of the chain are the prompt's.
    pub(crate) tokens: usize,
    /// Bytes of the prompt they stand for.
    pub(crate) bytes: usize,
}

#[derive(Clone, Debug)]
struct Text {
    chain: Arc<Chain>,
    bytes: usize,
    tokens: usize,
}

#[derive(Debug)]
struct Memory {
    boundaries: Generations<u64, Text>,
    /// Blocks in chains since the generation began.
    blocks: usize,
}

/// Texts whose tokens are known.
#[derive(Debug)]
pub(crate) struct Texts(Mutex<Memory>);

impl Default for Texts {
    fn default() -> Self {
        Self(Mutex::new(Memory {
            boundaries: Generations::new(BOUNDARIES_MAX),
            blocks: 0,
        }))
    }
}

/// Whether a prompt is a list of token ids, by its beginning.
pub(crate) fn is_ids(prompt: &[u8]) -> bool {
    let inner = prompt.strip_prefix(b"[").unwrap_or_default();
    matches!(inner.trim_ascii_start().first(), Some(b'0'..=b'9'))
}

/// Token ids as they are written in a body: `[1, 2, 3]`.
pub(crate) fn ids(prompt: &[u8]) -> Option<Vec<u32>> {
    let inner = prompt.strip_prefix(b"[")?.strip_suffix(b"]")?;
    let mut found = Vec::with_capacity(inner.len() / 5 + 1);
    let (mut number, mut digits) = (0u32, 0);
    for byte in inner {
        match byte {
            b'0'..=b'9' => {
                number = number
                    .checked_mul(10)?
                    .checked_add(u32::from(byte - b'0'))?;
                digits += 1;
            }
            b',' if digits > 0 => {
                found.push(number);
                (number, digits) = (0, 0);
            }
            b' ' | b'\n' | b'\r' | b'\t' => {}
            _ => return None,
        }
    }
    if digits > 0 {
        found.push(number);
    }
    (!found.is_empty()).then_some(found)
}

impl Texts {
    /// What is known of a prompt. `seed` tells apart what the same text means otherwise (model, tools).
    pub(crate) fn known(
        &self,
        index: &KvIndex,
        prompt: &[u8],
        seed: u64,
        lora: &[u8],
    ) -> Option<Known> {
        if !index.knows_sizes() {
            return None;
        }
        if let Some(ids) = ids(prompt) {
            return Some(Known {
                chain: Arc::new(index.chain(&ids, lora)),
                tokens: ids.len(),
                bytes: prompt.len(),
            });
        }
        let memory = self.0.lock();
        let mut found = None;
        for (end, hash) in blocks(prompt, seed) {
            match memory.boundaries.get(&hash) {
                Some(text) => found = Some((end, text)),
                None => break,
            }
        }
        let (end, text) = found?;
        Some(Known {
            chain: text.chain.clone(),
            tokens: text.tokens * end / text.bytes.max(1),
            bytes: end,
        })
    }

    /// Whether a worker should be asked for the tokens of a prompt.
    pub(crate) fn wants(&self, prompt: &[u8], known: Option<&Known>) -> bool {
        let covered = known.map_or(0, |k| k.bytes);
        prompt.len() >= TEXT_BYTES_MIN
            && covered < prompt.len() - prompt.len() / 8
            && ids(prompt).is_none()
    }

    /// Learns a text's tokens.
    pub(crate) fn learn(
        &self,
        index: &KvIndex,
        prompt: &[u8],
        seed: u64,
        lora: &[u8],
        tokens: &[u32],
    ) {
        let chain = Arc::new(index.chain(tokens, lora));
        let mut memory = self.0.lock();
        if memory.blocks + chain.len() > BLOCKS_MAX {
            memory.boundaries.rotate();
            memory.blocks = 0;
        }
        memory.blocks += chain.len();
        let text = Text {
            chain,
            bytes: prompt.len(),
            tokens: tokens.len(),
        };
        for (_, hash) in blocks(prompt, seed) {
            memory.boundaries.insert(hash, text.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::event::{Event, Stored, Tier};
    use super::*;

    #[test]
    fn token_ids() {
        assert_eq!(ids(b"[1, 22,\n333]"), Some(vec![1, 22, 333]));
        for other in [
            &b"[]"[..],
            b"[[1],[2]]",
            b"[\"a\"]",
            b"\"a\"",
            b"[1.5]",
            b"[-1]",
            b"[99999999999]",
            b"[,1]",
        ] {
            assert_eq!(ids(other), None, "{other:?}");
        }
    }

    #[test]
    fn a_text_that_begins_alike_has_the_tokens_of_its_beginning() {
        let index = KvIndex::default();
        let texts = Texts::default();
        let tokens: Vec<u32> = (0..1000).collect();
        assert!(
            texts.known(&index, b"[1,2]", 0, b"").is_none(),
            "no block size is known yet"
        );
        index.apply(
            1,
            &Event::Stored(Stored {
                hashes: (0..250).collect(),
                tokens: tokens.clone(),
                block_size: 4,
                tier: Some(Tier::Gpu),
                ..Stored::default()
            }),
        );
        let text = "four".repeat(1000);
        assert!(texts.wants(text.as_bytes(), None));
        texts.learn(&index, text.as_bytes(), 7, b"", &tokens);
        let known = texts.known(&index, text.as_bytes(), 7, b"").unwrap();
        assert!(!texts.wants(text.as_bytes(), Some(&known)));
        let weights = super::super::worth::Worth::default().weights();
        let saved = index.saved(&known.chain, known.tokens, &[1], &weights)[0];
        assert!((900.0..=1000.0).contains(&saved), "{saved}");
        let longer = text.clone() + &"other".repeat(1000);
        let known = texts.known(&index, longer.as_bytes(), 7, b"").unwrap();
        assert!(
            known.tokens <= 1000
                && known.tokens > 900
                && texts.wants(longer.as_bytes(), Some(&known))
        );
        assert!(
            texts.known(&index, text.as_bytes(), 8, b"").is_none(),
            "another model or other tools"
        );
        assert_eq!(
            texts.known(&index, b"[0,1,2,3,4]", 0, b"").unwrap().tokens,
            5
        );
    }
}
