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

fn text<'a>(object: &'a [u8], members: &Members, name: &str) -> Option<&'a str> {
    let value = members.get(object, name).filter(|v| *v != b"null")?;
    std::str::from_utf8(value).ok()
}

impl First {
    /// Reads prefill's reply; `None` when it has no token that can be shown.
    fn of(reply: &[u8], wish: Wish) -> Option<Self> {
        let members = scan(reply).ok()?;
        let of_reply = |name| text(reply, &members, name);
        let choices = members.get(reply, "choices")?;
        let choice = choices.get(elements(choices, 1).ok()?.first()?.clone())?;
        let inner = scan(choice).ok()?;
        let of_choice = |name| text(choice, &inner, name);

        let said = of_choice("text")?;
        let plain: String = serde_json::from_str(said).ok()?;
        let reason = of_choice("finish_reason")?;
        let is_last = match reason {
            "\"length\"" => false,
            "\"stop\"" => true,
            _ => return None,
        };
        // A part of a character, or a token that is not shown: what follows would be read otherwise as a prompt's end.
        if !is_last && (plain.is_empty() || plain.ends_with('\u{fffd}')) {
            return None;
        }
        let (before, tokens) = ids(of_choice("prompt_token_ids")?.as_bytes())?;
        let (token, 1) = ids(of_choice("token_ids")?.as_bytes())? else {
            return None;
        };
        let (id, created) = (of_reply("id")?, of_reply("created")?);
        let model = of_reply("model")?;
        let head = format!(
            "data: {{\"id\":{id},\"object\":\"text_completion\",\"created\":{created},\"model\":{model},\"choices\":["
        );
        let counts = format!(
            "{{\"prompt_tokens\":{tokens},\"total_tokens\":{},\"completion_tokens\":1",
            tokens + 1
        );
        // vLLM's last event has it.
        let print = of_reply("system_fingerprint").filter(|_| is_last);
        let print = print.map_or(String::new(), |p| format!(",\"system_fingerprint\":{p}"));
        let shown_reason = if is_last { reason } else { "null" };
        let stop = of_choice("stop_reason").unwrap_or("null");
        let mut event = format!(
            "{head}{{\"index\":0,\"text\":{said},\"logprobs\":null,\"finish_reason\":{shown_reason},\"stop_reason\":{stop},\"prompt_token_ids\":null,\"token_ids\":null}}]"
        );
        if wish.usage_always {
            event += &format!(",\"usage\":{counts}}}");
        }
        if !wish.usage {
            event += &print;
        }
        event += "}\n\n";
        let ending = is_last.then(|| {
            let usage = members.get(reply, "usage").unwrap_or_default();
            let details = scan(usage).ok();
            let details = details.and_then(|u| text(usage, &u, "prompt_tokens_details"));
            let details =
                details.map_or(String::new(), |d| format!(",\"prompt_tokens_details\":{d}"));
            let usage = if wish.usage {
                format!("{head}],\"usage\":{counts}{details}}}{print}}}\n\n")
            } else {
                String::new()
            };
            (usage + "data: [DONE]\n\n").into_bytes()
        });
        Some(Self {
            wish,
            event: event.into_bytes(),
            ending,
            prompt: [b"[", before, b",", token, b"]"].concat().into(),
            tokens,
            id: Bytes::copy_from_slice(id.as_bytes()),
            created: Bytes::copy_from_slice(created.as_bytes()),
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
