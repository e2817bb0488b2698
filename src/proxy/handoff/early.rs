//! `--early-first-token`, with the store: prefill computes a token in any case, so the client gets it at once, and decode goes on
//! behind it with the prompt's tokens and this one.
//!
//! Owns which requests this is right for, what prefill is asked for it, the first event as vLLM writes it, and decode's
//! request. Where prefill's reply lacks something, or the token is no text by itself, nothing is shown and the request goes the
//! ordinary way. Refuses to know how events get to the client (`behind`) and what changes in decode's (`seam`).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;
use serde::Deserialize;

use super::super::admission::Place;
use super::super::config::ConnectorKind;
use super::super::list::elements;
use super::super::registry::{Instance, Leg};
use super::super::seam::Seam;
use super::super::splice::{Edit, Members, scan};
use super::resume::{Resume, TOKENS_DEFAULT};
use super::{HandOff, Job, Route, Served};

/// Fields under which a token depends on the tokens before it and on nothing else, be they prompt or answer.
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
    "stop_token_ids",
    "ignore_eos",
    "logit_bias",
    "allowed_token_ids",
    "add_special_tokens",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "priority",
    "cache_salt",
    "user",
    "session_id",
    "conversation_id",
    "prompt_cache_key",
];

/// What a request asks for, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wish {
    most: u64,
    least: u64,
    /// `usage` at the end.
    usage: bool,
    /// And in every event.
    usage_always: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

/// Whether a field says what it would say if it were not there.
fn is_neutral(name: &str, value: &[u8]) -> bool {
    match name {
        _ if value == b"null" => true,
        "echo" | "use_beam_search" | "return_token_ids" => value == b"false",
        "frequency_penalty" | "presence_penalty" => is_number(value, 0.0),
        "repetition_penalty" => is_number(value, 1.0),
        "stop" | "bad_words" => elements(value, 1).is_ok_and(|all| all.is_empty()),
        _ => false,
    }
}

fn is_number(value: &[u8], wanted: f64) -> bool {
    serde_json::from_slice::<f64>(value).is_ok_and(|n| (n - wanted).abs() < f64::EPSILON)
}

impl Wish {
    /// `None`: this request goes the ordinary way.
    fn of(job: &Job) -> Option<Self> {
        let members = job.members.as_ref()?;
        let get = |name| members.get(&job.body, name);
        let said = |name| get(name).filter(|v| *v != b"null");
        let path = job.target.split('?').next().unwrap_or_default();
        let prompt = job.body.get(job.facts.prompt.clone()).unwrap_or_default();
        let is_plain = path == "/v1/completions"
            && job.facts.stream
            && job.facts.special.name().is_none()
            && matches!(prompt.first(), Some(b'"' | b'['))
            && get("n").is_none_or(|n| n == b"1")
            && members
                .entries(&job.body)
                .all(|(name, value)| FIELDS.contains(&name.as_ref()) || is_neutral(&name, value));
        // Decode would begin with the same random numbers that prefill has used.
        let is_seeded =
            said("seed").is_some() && !get("temperature").is_some_and(|t| is_number(t, 0.0));
        if !is_plain || is_seeded {
            return None;
        }
        let options: Option<StreamOptions> = match get("stream_options") {
            Some(options) => serde_json::from_slice(options).ok()?,
            None => None,
        };
        let asks = |is: fn(&StreamOptions) -> Option<bool>| options.as_ref().and_then(is);
        let usage = asks(|o| o.include_usage).unwrap_or(false);
        let whole = |value: Option<&[u8]>, default: u64| match value {
            Some(value) => serde_json::from_slice::<u64>(value).ok(),
            None => Some(default),
        };
        let wish = Self {
            most: whole(said("max_tokens"), TOKENS_DEFAULT)?,
            least: whole(get("min_tokens"), 0)?,
            usage,
            usage_always: usage && asks(|o| o.continuous_usage_stats).unwrap_or(false),
        };
        // Of one token prefill's reply would be the whole answer, which is decode's to give.
        (wish.most > 1 && wish.least <= wish.most).then_some(wish)
    }
}

/// Any bytes for a prefill's reply: what is shown of it is whole events.
pub(crate) fn fuzz(input: &[u8]) {
    let wish = Wish {
        most: 2,
        least: 0,
        usage: true,
        usage_always: true,
    };
    if let Some(first) = First::of(input, wish) {
        let event = first.event.strip_prefix(b"data: ").unwrap_or_default();
        let breaks = memchr::memchr_iter(b'\n', event).count();
        debug_assert!(scan(event).is_ok() && breaks == 2);
    }
}

/// Prefill's token, ready to be shown.
#[derive(Debug)]
pub(super) struct First {
    wish: Wish,
    event: Vec<u8>,
    /// What follows when the token has ended the text.
    ending: Option<Vec<u8>>,
    /// The prompt's tokens and this one.
    prompt: Bytes,
    /// How many the prompt's are.
    tokens: u64,
    id: Bytes,
    created: Bytes,
}

/// The inside of a list of token ids, and how many they are.
fn ids(list: &[u8]) -> Option<(&[u8], u64)> {
    let inner = list.strip_prefix(b"[")?.strip_suffix(b"]")?.trim_ascii();
    let is_plain = |b: &u8| b.is_ascii_digit() || matches!(b, b',' | b' ');
    if inner.is_empty() || !inner.iter().all(is_plain) {
        return None;
    }
    Some((inner, memchr::memchr_iter(b',', inner).count() as u64 + 1))
}

/// A value as it is written; `null`, and what would break an event's line, count as nothing.
fn text<'a>(object: &'a [u8], members: &Members, name: &str) -> Option<&'a str> {
    let value = members.get(object, name).filter(|v| *v != b"null")?;
    let value = std::str::from_utf8(value).ok()?;
    (!value.contains(['\n', '\r'])).then_some(value)
}

/// Prefill's reply, as far as the client may see it.
struct Told<'a> {
    id: &'a str,
    created: &'a str,
    model: &'a str,
    text: &'a str,
    is_last: bool,
    stop: &'a str,
    print: Option<&'a str>,
    details: Option<&'a str>,
    prompt: &'a [u8],
    tokens: u64,
    token: &'a [u8],
}

impl<'a> Told<'a> {
    /// `None`: it has no token that can be shown.
    fn of(reply: &'a [u8]) -> Option<Self> {
        let members = scan(reply).ok()?;
        let choices = members.get(reply, "choices")?;
        let choice = choices.get(elements(choices, 1).ok()?.first()?.clone())?;
        let inner = scan(choice).ok()?;
        let usage = members.get(reply, "usage").unwrap_or_default();
        let counts = scan(usage).ok();
        let of_reply = |name| text(reply, &members, name);
        let of_choice = |name| text(choice, &inner, name);
        let said = of_choice("text")?;
        let plain: String = serde_json::from_str(said).ok()?;
        let is_last = match of_choice("finish_reason")? {
            "\"length\"" => false,
            "\"stop\"" => true,
            _ => return None,
        };
        // A part of a character, or a token that is not shown: what follows would be read otherwise behind a prompt that
        // ends so.
        if !is_last && (plain.is_empty() || plain.ends_with('\u{fffd}')) {
            return None;
        }
        let (prompt, tokens) = ids(of_choice("prompt_token_ids")?.as_bytes())?;
        let (token, 1) = ids(of_choice("token_ids")?.as_bytes())? else {
            return None;
        };
        Some(Self {
            id: of_reply("id")?,
            created: of_reply("created")?,
            model: of_reply("model")?,
            text: said,
            is_last,
            stop: of_choice("stop_reason").unwrap_or("null"),
            print: of_reply("system_fingerprint"),
            details: counts.and_then(|c| text(usage, &c, "prompt_tokens_details")),
            prompt,
            tokens,
            token,
        })
    }

    /// How every event begins.
    fn head(&self) -> String {
        let Self {
            id, created, model, ..
        } = self;
        format!(
            "data: {{\"id\":{id},\"object\":\"text_completion\",\"created\":{created},\"model\":{model},\"choices\":["
        )
    }

    /// `usage` with its details.
    fn usage(&self, details: Option<&str>) -> String {
        let (prompt, all) = (self.tokens, self.tokens.saturating_add(1));
        let details = details.map_or(String::new(), |d| format!(",\"prompt_tokens_details\":{d}"));
        format!(
            ",\"usage\":{{\"prompt_tokens\":{prompt},\"total_tokens\":{all},\"completion_tokens\":1{details}}}"
        )
    }

    /// vLLM's last event has it.
    fn print(&self) -> String {
        let print = self.print.filter(|_| self.is_last);
        print.map_or(String::new(), |p| format!(",\"system_fingerprint\":{p}"))
    }

    fn event(&self, wish: Wish) -> String {
        let reason = if self.is_last { "\"stop\"" } else { "null" };
        let (head, text, stop) = (self.head(), self.text, self.stop);
        let usage = if wish.usage_always {
            self.usage(None)
        } else {
            String::new()
        };
        let print = if wish.usage {
            String::new()
        } else {
            self.print()
        };
        format!(
            "{head}{{\"index\":0,\"text\":{text},\"logprobs\":null,\"finish_reason\":{reason},\"stop_reason\":{stop},\"prompt_token_ids\":null,\"token_ids\":null}}]{usage}{print}}}\n\n"
        )
    }

    /// What follows when nothing is left to be decoded.
    fn ending(&self, wish: Wish) -> String {
        let done = "data: [DONE]\n\n";
        if !wish.usage {
            return done.to_owned();
        }
        let (head, usage, print) = (self.head(), self.usage(self.details), self.print());
        format!("{head}]{usage}{print}}}\n\n{done}")
    }
}

impl First {
    /// Reads prefill's reply.
    fn of(reply: &[u8], wish: Wish) -> Option<Self> {
        let told = Told::of(reply)?;
        Some(Self {
            wish,
            event: told.event(wish).into_bytes(),
            ending: told.is_last.then(|| told.ending(wish).into_bytes()),
            prompt: [b"[", told.prompt, b",", told.token, b"]"].concat().into(),
            tokens: told.tokens,
            id: Bytes::copy_from_slice(told.id.as_bytes()),
            created: Bytes::copy_from_slice(told.created.as_bytes()),
        })
    }

    /// Whether `decode` takes a prompt and an answer of these lengths: what it would refuse must be refused before anything
    /// is shown.
    fn fits(&self, decode: &Instance) -> bool {
        let longest = decode.model_len.load(Ordering::Relaxed);
        self.tokens.saturating_add(self.wish.most) <= longest
    }

    /// What changes in the client's body for decode.
    fn edits(&self) -> Vec<Edit> {
        let number = |n: u64| Bytes::from(n.to_string());
        let mut edits = vec![
            Edit::Set("prompt", self.prompt.clone()),
            Edit::Set("max_tokens", number(self.wish.most - 1)),
        ];
        let least = number(self.wish.least.saturating_sub(1));
        edits.push(Edit::Replace("min_tokens", least));
        edits
    }
}

impl HandOff {
    /// What else prefill is asked, so that its token can be shown.
    pub(super) fn token_edits(&mut self, kind: Option<ConnectorKind>, edits: &mut Vec<Edit>) {
        self.wish = None;
        let may_be = self.app.config.early && kind == Some(ConnectorKind::Store);
        if !may_be || self.part.is_some() {
            return;
        }
        self.wish = Wish::of(&self.job);
        let Some(wish) = self.wish else { return };
        edits.push(Edit::Set("return_token_ids", Bytes::from_static(b"true")));
        if wish.least > 0 {
            // The first token must not end the text then.
            edits.retain(|edit| !matches!(edit, Edit::Remove("min_tokens")));
            edits.push(Edit::Replace("min_tokens", Bytes::from_static(b"1")));
        }
    }

    /// Takes in prefill's reply.
    pub(super) fn first_token(&mut self, reply: &[u8]) {
        let first = self.wish.and_then(|wish| First::of(reply, wish));
        self.first = first.map(Box::new);
    }

    /// The answer that begins with prefill's token, if there is one to begin with; else decode's leg comes back.
    pub(super) fn begin(
        &mut self,
        decode: Leg,
        from: &Arc<Instance>,
        began: Instant,
    ) -> Result<Served, Leg> {
        let Some(first) = self.first.take().filter(|f| f.fits(&decode.instance)) else {
            return Err(decode);
        };
        let (app, job, owner) = (self.app.clone(), self.job.clone(), self.owner.clone());
        let mut handoff = std::mem::replace(self, Self::new(app, job, owner));
        handoff.app.metrics.early.add();
        handoff
            .app
            .metrics
            .ttft
            .record(handoff.job.arrived.elapsed());
        handoff.is_begun = true;
        handoff.route.reason = "early first token";
        // Where nothing is left to be decoded its place is given up at once.
        let decode = Some(decode).filter(|_| first.ending.is_none());
        handoff.route.decode = decode.as_ref().map(|leg| leg.instance.clone());
        if decode.is_none() {
            handoff.place = None;
        }
        Ok(Served::Early(Box::new(Early {
            handoff,
            first,
            decode,
            from: from.clone(),
            began,
            place: None,
        })))
    }
}

/// An answer that has begun with prefill's token.
pub(crate) struct Early {
    handoff: HandOff,
    first: Box<First>,
    decode: Option<Leg>,
    from: Arc<Instance>,
    /// When prefill did.
    began: Instant,
    pub(super) place: Option<Place>,
}

impl std::fmt::Debug for Early {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Early")
            .field("first", &self.first)
            .finish_non_exhaustive()
    }
}

impl Early {
    /// The first event.
    pub(crate) fn event(&self) -> &[u8] {
        &self.first.event
    }

    /// The rest of the answer, when there is nothing to go on with.
    pub(crate) fn ending(&self) -> Option<&[u8]> {
        self.first.ending.as_deref()
    }

    pub(crate) fn route(&self) -> &Route {
        &self.handoff.route
    }

    /// How decode's stream is joined to the token.
    pub(crate) fn seam(&self) -> Seam {
        let cached = self.handoff.cached.as_ref();
        Seam {
            id: self.first.id.clone(),
            created: self.first.created.clone(),
            prompt: self.first.tokens,
            before: 1,
            cached: cached.and_then(super::super::usage::Cached::known),
        }
    }

    /// Decode's answer from the second token on, and the way it went. Cancel-safe as any hand-off is: nothing is pinned.
    pub(crate) async fn go_on(mut self: Box<Self>) -> (Served, Route) {
        let mut served = self.decode().await;
        if let Served::Answer(answer) = &mut served {
            answer._place = self.place.take();
            answer.resume = Resume::of(&self.handoff);
            if let Some(resume) = &mut answer.resume {
                resume.passed_events(&self.first.event);
            }
        }
        (served, self.handoff.route)
    }

    async fn decode(&mut self) -> Served {
        let Some(leg) = self.decode.take() else {
            return Served::Gone;
        };
        let leg = match self.handoff.still_usable(leg, &self.from).await {
            Ok(leg) => leg,
            Err(served) => return served,
        };
        self.handoff.wait_for_pool(&self.from, self.began).await;
        let body = self.handoff.splice(&self.first.edits());
        self.handoff.decode(leg, &body, false).await.0
    }
}
