//! `--continue`: a decode instance has died in the middle of a streamed completion, and another goes on where it stopped: it
//! gets the prompt and what the client has already, with as many tokens less. With the store the beginning is in the pool.
//!
//! Owns what has been passed on, as text, and which requests this is right for. What a client would notice: `usage` counts the
//! passed text as prompt, and the text is cut into tokens anew at that place. Refuses to know how pieces are passed on (`relay`).

use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;

use super::super::App;
use super::super::config::Role;
use super::super::http::chunked::{BodyScanner, ChunkScanner};
use super::super::list::elements;
use super::super::registry::Instance;
use super::super::splice::{Edit, scan};
use super::leg::Tried;
use super::{Answer, Attempts, Cause, HandOff, Job};

/// Longest text that is kept.
const TEXT_BYTES_MAX: usize = 1 << 20;
/// Longest event.
const EVENT_BYTES_MAX: usize = 64 << 10;
/// vLLM's bound where a completion names none.
pub(super) const TOKENS_DEFAULT: u64 = 16;
/// Fields under which the second half is what the first would have been: nothing that looks at the output's beginning.
const FIELDS: &[&str] = &[
    "model",
    "prompt",
    "max_tokens",
    "min_tokens",
    "stream",
    "stream_options",
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "priority",
    "cache_salt",
    "user",
    "session_id",
    "conversation_id",
    "prompt_cache_key",
];

/// What is needed to go on elsewhere.
#[derive(Debug)]
pub(crate) struct Resume {
    job: Arc<Job>,
    /// For the group a decode instance must be of.
    prefill: Option<Arc<Instance>>,
    scanner: ChunkScanner,
    /// The beginning of an event.
    event: Vec<u8>,
    /// What the client has, as JSON without quotes.
    text: Vec<u8>,
    tokens: u64,
    tried: SmallVec<[u64; 4]>,
    /// It has come to its end, or cannot be followed.
    over: bool,
}

/// Whether a request can be gone on with.
fn suits(job: &Job) -> bool {
    let path = job.target.split('?').next().unwrap_or_default();
    let prompt = job.body.get(job.facts.prompt.clone()).unwrap_or_default();
    path == "/v1/completions"
        && job.facts.stream
        && job.facts.special.name().is_none()
        && prompt.starts_with(b"\"")
        && job
            .members
            .as_ref()
            .is_some_and(|m| m.has_only(&job.body, FIELDS))
}

impl Resume {
    pub(super) fn of(handoff: &HandOff) -> Option<Box<Self>> {
        let is_asked = handoff.app.config.resume && suits(&handoff.job);
        is_asked.then(|| {
            Box::new(Self {
                job: handoff.job.clone(),
                prefill: handoff.route.prefill.clone(),
                scanner: ChunkScanner::new(),
                event: Vec::new(),
                text: Vec::new(),
                tokens: 0,
                tried: SmallVec::new(),
                over: false,
            })
        })
    }

    /// The client has these bytes of the answer now, chunk framing included.
    pub(crate) fn passed(&mut self, piece: &[u8]) {
        if self.over {
            return;
        }
        let event = &mut self.event;
        let scanned = self.scanner.advance(piece, |d| event.extend_from_slice(d));
        self.over = scanned.is_err();
        self.follow();
    }

    /// The same without framing.
    pub(crate) fn passed_events(&mut self, events: &[u8]) {
        if !self.over {
            self.event.extend_from_slice(events);
            self.follow();
        }
    }

    /// Tokens the client has.
    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }

    fn follow(&mut self) {
        while let Some(end) = memchr::memmem::find(&self.event, b"\n\n") {
            let event: Vec<u8> = self.event.drain(..end + 2).collect();
            self.said(&event);
        }
        let too_long = self.event.len() > EVENT_BYTES_MAX || self.text.len() > TEXT_BYTES_MAX;
        self.over = self.over || too_long;
    }

    /// One event. Each with a choice counts as a token.
    fn said(&mut self, event: &[u8]) {
        let Some(data) = event.strip_prefix(b"data: ") else {
            return;
        };
        let data = data.trim_ascii();
        let Ok(members) = scan(data) else {
            // `[DONE]`, or nothing that can be followed.
            self.over = true;
            return;
        };
        let choices = members.get(data, "choices").unwrap_or_default();
        let first = elements(choices, 1)
            .ok()
            .and_then(|all| all.first().cloned());
        let Some(first) = first else { return };
        let choice = &choices[first];
        let Ok(inner) = scan(choice) else {
            self.over = true;
            return;
        };
        let ended = inner.get(choice, "finish_reason");
        self.over |= ended.is_some_and(|reason| reason != b"null");
        let text = inner.get(choice, "text").unwrap_or_default();
        let text = text.strip_prefix(b"\"").and_then(|t| t.strip_suffix(b"\""));
        self.text.extend_from_slice(text.unwrap_or_default());
        self.tokens += 1;
    }

    /// The body that asks for the rest; `None` when nothing is left to ask for.
    fn rest(&self) -> Option<SmallVec<[Bytes; 8]>> {
        let (job, members) = (&self.job, self.job.members.as_ref()?);
        let number = |name: &str| {
            let value = members.get(&job.body, name)?;
            serde_json::from_slice::<u64>(value).ok()
        };
        let left = number("max_tokens")
            .unwrap_or(TOKENS_DEFAULT)
            .checked_sub(self.tokens)
            .filter(|left| *left > 0)?;
        let prompt = job.body.get(job.facts.prompt.clone())?;
        let prompt = [prompt.strip_suffix(b"\"")?, &self.text, b"\""].concat();
        let mut edits = vec![
            Edit::Set("prompt", prompt.into()),
            Edit::Set("max_tokens", left.to_string().into()),
        ];
        if let Some(least) = number("min_tokens") {
            let least = least.saturating_sub(self.tokens);
            edits.push(Edit::Replace("min_tokens", least.to_string().into()));
        }
        Some(members.apply(&job.body, &edits))
    }

    /// The rest of the answer from another instance than `dead`, if there is one. Its head is not for the client.
    pub(crate) async fn next(
        mut self: Box<Self>,
        app: &Arc<App>,
        dead: u64,
    ) -> Option<Box<Answer>> {
        self.tried.push(dead);
        // Of an event that came in part the rest is missing: nothing can follow it.
        if self.over || !self.event.is_empty() {
            return None;
        }
        let body = self.rest()?;
        let mut handoff = HandOff::new(app.clone(), self.job.clone(), Arc::default());
        handoff.is_begun = true;
        let mut attempts = Attempts::default();
        while handoff.may_retry(&mut attempts, "decode", Cause::Lost) {
            let with = self.prefill.as_deref();
            let leg = handoff.pick(Role::Decode, &self.tried, with).await.ok()??;
            self.tried.push(leg.instance.number);
            let tried = handoff.decode_once(leg, &body).await;
            let Tried::Answer(mut answer) = tried else {
                continue;
            };
            let is_stream = matches!(answer.head.body, BodyScanner::Chunked(_));
            if answer.head.status >= 300 || !is_stream {
                return None;
            }
            app.metrics.continued.add();
            self.scanner = ChunkScanner::new();
            self.event.clear();
            answer.resume = Some(self);
            return Some(answer);
        }
        None
    }
}
