//! What the fuzzer drives: any bytes from a client, a worker or an engine's event stream. None panics, and nothing reads otherwise
//! in pieces than at once.

use bytes::{Bytes, BytesMut};

use super::http::chunked::ChunkScanner;
use super::http::head;
use super::seam::Seam;
use super::{handoff, kv, list, load, merge, openai, splice, usage};

/// Bound of a frame.
const FRAME_BYTES_MAX: usize = 64 << 20;

/// A request's body, a reply's body.
pub fn body(input: &[u8]) {
    splice::fuzz(input);
    if let Ok(members) = splice::scan(input) {
        let facts = openai::facts(input, &members, "max_tokens", 4.0);
        debug_assert!(input.get(facts.prompt.clone()).is_some(), "{facts:?}");
    }
    let _ = kv::text::ids(input);
    let _ = usage::told(input);
    let _ = list::elements(input, 64);
    let bytes = Bytes::copy_from_slice(input);
    if let Some(part) = merge::PromptPart::of(&bytes, true, true) {
        let _ = part.merged_with(&bytes);
    }
    handoff::early::fuzz(input);
    let seam = Seam {
        id: Bytes::from_static(b"\"x\""),
        created: Bytes::from_static(b"1"),
        prompt: u64::MAX,
        before: 1,
        cached: Some(7),
    };
    let mut joined = Vec::new();
    seam.join(input, &mut joined);
    let mut again = Vec::new();
    let before = Seam { before: 0, ..seam };
    before.join(&joined, &mut again);
    debug_assert_eq!(joined, again, "what is right stays as it is");
    let mut patched = input.to_vec();
    if usage::patch(&mut patched, 7) {
        let changed = |(a, b): &(&u8, &u8)| a != b;
        let mut places = input.iter().zip(&patched).enumerate();
        let first = places
            .find(|(_, pair)| changed(pair))
            .map_or(0, |(at, _)| at);
        let same = patched.len() == input.len() && patched[..first] == input[..first];
        debug_assert!(same, "{patched:?}");
    }
}

/// Heads and chunk framing; a worker's metrics page.
pub fn http(input: &[u8]) {
    let bytes = Bytes::copy_from_slice(input);
    let whole = head::head_length(&bytes, 0);
    if let Ok(Some(length)) = whole {
        // Found as well when the head came in pieces.
        let searched = length.saturating_sub(3);
        debug_assert_eq!(head::head_length(&bytes, searched).ok(), Some(Some(length)));
    }
    let _ = head::request(bytes.clone());
    let _ = head::reply(bytes, false);
    let _ = load::gauges(&String::from_utf8_lossy(input), None);
    let at_once = chunks(input, input.len());
    for step in [1, 7] {
        debug_assert_eq!(at_once, chunks(input, step));
    }
}

/// An engine's events and the frames they come in.
pub fn events(input: &[u8]) {
    kv::fuzz(input);
    let at_once = frames(input, input.len());
    for step in [1, 7] {
        debug_assert_eq!(at_once, frames(input, step));
    }
}

/// Payload and bytes consumed of a chunked body that comes in pieces of `step`.
fn chunks(input: &[u8], step: usize) -> Option<(Vec<u8>, usize)> {
    let mut scanner = ChunkScanner::new();
    let (mut payload, mut consumed) = (Vec::new(), 0);
    for piece in input.chunks(step.max(1)) {
        let progress = scanner
            .advance(piece, |d| payload.extend_from_slice(d))
            .ok()?;
        consumed += progress.consumed;
        if progress.done {
            break;
        }
    }
    Some((payload, consumed))
}

/// Frames that come in pieces of `step`, and whether they end with one that is malformed.
fn frames(input: &[u8], step: usize) -> (Vec<(u8, Bytes)>, bool) {
    let (mut inbox, mut found) = (BytesMut::new(), Vec::new());
    for piece in input.chunks(step.max(1)) {
        inbox.extend_from_slice(piece);
        loop {
            match kv::zmtp::next_frame(&mut inbox, FRAME_BYTES_MAX) {
                Ok(Some(frame)) => found.push(frame),
                Ok(None) => break,
                Err(_) => return (found, true),
            }
        }
    }
    (found, false)
}
