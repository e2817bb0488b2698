//! A request's way from arrival to the first byte of its answer: choose, prefill, hand over, decode, and what is tried again.
//!
//! Owns the hand-off. Where a connector pins KV at prefill, the future of [`run`] belongs to the proxy and not to the
//! client's connection: when the client leaves it is told so ([`Owner`]) and goes on until the KV is released. Where nothing
//! is pinned, dropping the future is enough: connections close, workers stop, the legs leave the counters.

mod answers;
mod at_once;
mod barrier;
mod batch;
pub(crate) mod early;
mod leg;
mod one_after_the_other;
mod paired;
mod pick;
pub(crate) mod places;
mod release;
pub(crate) mod resume;
mod tokens;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use bytes::Bytes;
use smallvec::SmallVec;
use tokio::sync::Notify;

use super::App;
use super::admission::{Claim, Place, Refusal};
use super::config::{ConnectorKind, PrefillDown, Role};
use super::connector::{self, Way, store};
use super::http::head::ReplyHead;
use super::http::upstream::UpstreamConn;
use super::kv::text::Known;
use super::list::elements;
use super::mask::Mask;
use super::merge::PromptPart;
use super::openai::{self, Facts, PROMPTS_MAX};
use super::registry::{Instance, Leg};
use super::reply::LocalReply;
use super::splice::{Edit, Members, Pieces};
use super::usage::Cached;
use early::{Early, First, Wish};
use leg::Failure;
use resume::Resume;

/// A request ready to be sent.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) method: String,
    pub(crate) target: String,
    /// Header lines for workers, without the request line, `Host`, request id and length.
    pub(crate) lines: Vec<u8>,
    pub(crate) request_id: String,
    pub(crate) body: Bytes,
    pub(crate) members: Option<Members>,
    pub(crate) facts: Facts,
    /// The field that bounds the output; `None`: one leg only.
    pub(crate) limit: Option<&'static str>,
    pub(crate) session: Option<u64>,
    pub(crate) claim: Claim,
    /// Asks for a WebSocket.
    pub(crate) upgrades: bool,
    pub(crate) arrived: Instant,
}

/// Tells the hand-off that its client has gone, and the connection whether the hand-off must outlive it.
#[derive(Debug, Default)]
pub(crate) struct Owner {
    gone: AtomicBool,
    news: Notify,
    pins: AtomicBool,
}

impl Owner {
    /// The client has gone. Says whether the hand-off must go on.
    pub(crate) fn leave(&self) -> bool {
        self.gone.store(true, Ordering::Release);
        self.news.notify_waiters();
        self.pins.load(Ordering::Acquire)
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    async fn left(&self) {
        loop {
            let news = self.news.notified();
            if self.is_gone() {
                return;
            }
            news.await;
        }
    }

    /// From here on KV may be pinned somewhere.
    fn pin(&self) {
        self.pins.store(true, Ordering::Release);
    }
}

/// A worker's answer, its body still to come.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) conn: UpstreamConn,
    pub(crate) head: ReplyHead,
    pub(crate) leg: Leg,
    pub(crate) route: Route,
    pub(crate) _place: Option<Place>,
    /// Prompt tokens that prefill had cached, where decode's count would be misleading.
    pub(crate) cached: Option<Cached>,
    /// What clients must not see of it.
    pub(crate) mask: Option<Mask>,
    /// How it can be gone on with when its worker dies.
    pub(crate) resume: Option<Box<Resume>>,
}

/// Which way a request went, for the log and debug headers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Route {
    pub(crate) prefill: Option<Arc<Instance>>,
    pub(crate) decode: Option<Arc<Instance>>,
    pub(crate) reason: &'static str,
    pub(crate) retries: u32,
}

/// How a request ended before its body.
#[derive(Debug)]
pub(crate) enum Served {
    /// The proxy answers itself.
    Local(LocalReply),
    /// A worker answers.
    Answer(Box<Answer>),
    /// Prefill's token is to be passed on, and decode has yet to be asked.
    Early(Box<Early>),
    /// The client has gone and everything is released.
    Gone,
}

impl Served {
    /// A worker's answer that is no success: it has not fetched anything.
    fn is_refusal(&self) -> bool {
        match self {
            Self::Answer(answer) => answer.head.status >= 300,
            Self::Local(_) => true,
            Self::Early(_) | Self::Gone => false,
        }
    }

    /// Gives up the place at the instance that has answered; what it said can still be read.
    fn leave(&mut self) {
        if let Self::Answer(answer) = self {
            answer.leg.leave();
        }
    }

    fn local(reply: LocalReply) -> Self {
        Self::Local(reply)
    }
}

/// Why something is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// It cannot be connected to.
    Connect,
    /// It broke off, or what it said is no answer.
    Lost,
    /// 429.
    Busy,
    /// 5xx.
    Status,
}

impl Cause {
    /// For metrics, in their order.
    pub(crate) const NAMES: [&'static str; 4] = ["connect", "lost", "busy", "status"];

    fn of(served: &Served, failure: Failure) -> Self {
        match served {
            Served::Answer(answer) if answer.head.status == 429 => Self::Busy,
            Served::Answer(_) => Self::Status,
            _ if failure == Failure::NotSent => Self::Connect,
            _ => Self::Lost,
        }
    }
}

/// The connector of the prefill instance that was picked first; `None`: not found out yet, which nixl's and the store's way suits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Alike(Option<ConnectorKind>);

impl Alike {
    /// Whether an instance with this connector can take over.
    fn suits(self, kind: Option<ConnectorKind>, facts: &Facts) -> bool {
        let unknown = |kind: ConnectorKind| connector::way(kind) == Way::OneAfterTheOther;
        let is_alike = match (self.0, kind) {
            (_, Some(ConnectorKind::None)) => false,
            (Some(first), Some(kind)) => first == kind,
            (None, None) => true,
            (Some(kind), None) | (None, Some(kind)) => unknown(kind),
        };
        is_alike && connector::takes(kind, facts)
    }
}

/// What was tried so far.
#[derive(Default)]
struct Attempts {
    retries: u32,
    tried: SmallVec<[u64; 4]>,
}

struct HandOff {
    app: Arc<App>,
    job: Arc<Job>,
    owner: Arc<Owner>,
    route: Route,
    cached: Option<Cached>,
    place: Option<places::Place>,
    /// The request id that workers see, where a connector needs its own.
    wire_id: Option<String>,
    /// What prefill has told about the prompt, to go into decode's answer.
    told: Option<PromptPart>,
    /// The prompt this is about, of a request with several.
    part: Option<Range<usize>>,
    /// Runs beside a hand-off that is counted: it takes no place of its own, and giving up is no refusal.
    is_beside: bool,
    /// Who is picked after the first prefill instance must hand over as that one did: decode is chosen by then, and the way.
    alike: Option<Alike>,
    /// The prompt's tokens, as far as they were known when somebody asked first.
    known: OnceLock<Option<Known>>,
    /// Any decode instance could go on with the answer.
    resumable: bool,
    /// The client has its first token.
    is_begun: bool,
    /// What prefill's token must serve for, where it is to be shown; and the token.
    wish: Option<Wish>,
    first: Option<Box<First>>,
}

/// Carries a request out up to the first byte of its answer.
pub(crate) async fn run(app: Arc<App>, job: Arc<Job>, owner: Arc<Owner>) -> Served {
    app.budget.earn();
    let waited = Instant::now();
    let place = match app.gate.enter(job.claim).await {
        Ok(place) => place,
        Err(refusal) => {
            app.metrics.refused_busy.add();
            let status = if refusal == Refusal::QueueFull {
                429
            } else {
                503
            };
            return Served::local(LocalReply::later(
                status,
                &format!("{refusal}; try again later"),
                1,
            ));
        }
    };
    app.metrics.queue.record(waited.elapsed());
    let mut handoff = HandOff::new(app, job, owner);
    let mut served = handoff.carry_out().await;
    if let Served::Early(early) = &mut served {
        early.place = Some(place);
    } else if let Served::Answer(answer) = &mut served {
        answer._place = Some(place);
        if handoff.resumable {
            answer.resume = Resume::of(&handoff);
        }
        answer.route = handoff.route;
        answer.cached = handoff.cached;
        answer.mask = handoff
            .wire_id
            .map(|wire| Mask::new(&wire, &handoff.job.request_id));
    }
    served
}

impl HandOff {
    fn new(app: Arc<App>, job: Arc<Job>, owner: Arc<Owner>) -> Self {
        Self {
            app,
            job,
            owner,
            route: Route::default(),
            cached: None,
            place: None,
            wire_id: None,
            told: None,
            part: None,
            is_beside: false,
            alike: None,
            known: OnceLock::new(),
            resumable: false,
            is_begun: false,
            wish: None,
            first: None,
        }
    }

    /// Another hand-off of the same request, for what runs beside this one.
    fn beside(&self) -> Self {
        Self {
            wire_id: self.wire_id.clone(),
            part: self.part.clone(),
            is_beside: true,
            alike: self.alike,
            known: self.known.clone(),
            ..Self::new(self.app.clone(), self.job.clone(), self.owner.clone())
        }
    }

    /// From here on it is about all prompts of the request.
    fn about_all(&mut self) {
        self.part = None;
        self.known = OnceLock::new();
    }

    /// Counts this request's hand-off from here until decode's first byte.
    fn hold(&mut self, prefill: &Instance, decode: Option<&Instance>) {
        let decode = decode.map(|d| d.number);
        let freed = &self.app.registry.changed;
        self.place = Some(self.app.handoffs.begin(prefill.number, decode, freed));
    }

    async fn carry_out(&mut self) -> Served {
        let Some(limit) = self.prefill_limit() else {
            if self.generates_alone() && self.needs_prefill() {
                let text = "these engines cannot compute a list of chats: send them one by one";
                return Served::local(LocalReply::error(501, text));
            }
            return self.decode_alone().await;
        };
        let special = self.job.facts.special;
        if special.batch {
            self.part = parts(&self.job).first().cloned();
        }
        let prefill = match self.pick(Role::Prefill, &[], None).await {
            Ok(Some(leg)) => leg,
            Err(reply)
                if self.app.config.prefill_down == PrefillDown::Refuse || self.needs_prefill() =>
            {
                return Served::local(reply);
            }
            _ => {
                self.about_all();
                self.route.reason = "prefill down";
                return self.decode_alone().await;
            }
        };
        let kind = prefill.instance.link.read().kind;
        let way = kind.map(connector::way);
        if let Some(reason) = self.alone_at(kind, &prefill) {
            drop(prefill);
            self.about_all();
            self.app.metrics.alone.add();
            self.route.reason = reason;
            return self.decode_alone().await;
        }
        if way != Some(Way::OneAfterTheOther) {
            self.about_all();
        }
        self.alike = Some(Alike(kind));
        self.hold(&prefill.instance, None);
        // Decode's place is taken before prefill begins: what is being prefilled is decode's future load.
        let decode = match self.pick(Role::Decode, &[], Some(&prefill.instance)).await {
            Ok(Some(leg)) => leg,
            Ok(None) => {
                return Served::local(LocalReply::later(503, "no decode instance is available", 2));
            }
            Err(reply) => return Served::local(reply),
        };
        self.hold(&prefill.instance, Some(&decode.instance));
        match way {
            Some(Way::AtOnce) => self.at_once(prefill, decode, limit).await,
            Some(Way::Paired) => self.paired(prefill, decode, limit).await,
            Some(Way::OneAfterTheOther) if special.batch => {
                self.batch(prefill, decode, limit).await
            }
            _ => self.one_after_the_other(prefill, decode, limit).await,
        }
    }

    /// The name of the output bound, when this request takes two legs.
    fn prefill_limit(&mut self) -> Option<&'static str> {
        let limit = self.job.limit?;
        let special = self.job.facts.special;
        let reason = if self.app.config.aggregated {
            "aggregated"
        } else if self.app.config.connector == Some(ConnectorKind::None) {
            "no connector"
        } else if let Some(name) = special.name().filter(|_| !self.anybody_takes()) {
            name
        } else {
            self.route.reason = "prefill and decode";
            return Some(limit);
        };
        self.app.metrics.alone.add();
        self.route.reason = reason;
        None
    }

    /// Whether some prefill instance hands over what is special about this request.
    fn anybody_takes(&self) -> bool {
        let all = self.app.registry.all();
        let mut kinds = all
            .iter()
            .filter(|i| i.role().does(Role::Prefill))
            .map(|i| i.link.read().kind);
        kinds.any(|kind| connector::takes(kind, &self.job.facts))
    }

    /// Whether it makes decode compute prompts, though its path takes one leg (vLLM's list of chats).
    fn generates_alone(&self) -> bool {
        let path = self.job.target.split(['?', '#']).next().unwrap_or_default();
        let path = openai::plain(path).unwrap_or_default();
        path.trim_end_matches('/') == "/v1/chat/completions/batch"
    }

    /// Whether decode instances cannot compute a prompt: their connector says so.
    fn needs_prefill(&self) -> bool {
        let all = self.app.registry.all();
        let mut kinds = all
            .iter()
            .filter(|i| i.role().does(Role::Prefill))
            .filter_map(|i| {
                let link = i.link.read();
                link.kind.or(link.before)
            });
        kinds.any(|kind| !connector::is_optional(kind))
            || self
                .app
                .config
                .connector
                .is_some_and(|kind| !connector::is_optional(kind))
    }

    /// Why a request does not take a leg to a prefill instance that has been chosen.
    fn alone_at(&self, kind: Option<ConnectorKind>, prefill: &Leg) -> Option<&'static str> {
        if kind == Some(ConnectorKind::None) {
            return Some("no connector");
        }
        if !connector::takes(kind, &self.job.facts) {
            return self.job.facts.special.name();
        }
        let optional = kind.is_none_or(connector::is_optional);
        (optional && self.is_short(prefill)).then_some("short prompt")
    }

    /// Whether computing the prompt is not worth a leg. By what was uncached when the leg was taken: routing it has
    /// entered the prompt into the policy's index since.
    fn is_short(&self, prefill: &Leg) -> bool {
        let tokens = match self.part {
            Some(_) => self.job.facts.tokens,
            None => prefill.tokens(),
        };
        tokens < self.app.config.prefill_min_tokens
    }

    /// Whether another try is allowed.
    fn may_retry(&mut self, attempts: &mut Attempts, leg: &str, cause: Cause) -> bool {
        if attempts.retries >= self.app.config.retries || self.owner.is_gone() {
            return false;
        }
        if !self.app.budget.take() {
            self.app.metrics.retries_refused.add();
            return false;
        }
        attempts.retries += 1;
        self.route.retries += 1;
        match leg {
            "prefill" => self.app.metrics.retries_prefill.add(),
            _ => self.app.metrics.retries_decode.add(),
        }
        self.app.metrics.causes[cause as usize].add();
        true
    }

    pub(super) async fn decode_alone(&mut self) -> Served {
        let leg = match self.pick(Role::Decode, &[], None).await {
            Ok(Some(leg)) => leg,
            Ok(None) => {
                return Served::local(LocalReply::later(503, "no decode instance is available", 2));
            }
            Err(reply) => return Served::local(reply),
        };
        self.resumable = true;
        let body = store::decode_body(&self.job.body);
        self.decode(leg, &body, false).await.0
    }

    /// Puts a connector's parameters beside what the client may say of its own.
    fn params_edit(&self, ours: Bytes) -> Edit {
        let name = "kv_transfer_params";
        let members = self.job.members.as_ref();
        let client = members.and_then(|m| m.get(&self.job.body, name));
        Edit::Set(name, connector::beside_client(client, ours))
    }

    fn with_params(&self, params: Bytes, limit: &'static str) -> Pieces {
        let mut edits = if self.owner.is_gone() {
            connector::release_edits(limit)
        } else {
            Vec::new()
        };
        edits.extend(self.untold_edits());
        edits.push(self.params_edit(params));
        self.splice(&edits)
    }

    fn splice(&self, edits: &[Edit]) -> Pieces {
        match &self.job.members {
            Some(members) if !edits.is_empty() => members.apply(&self.job.body, edits),
            _ => store::decode_body(&self.job.body),
        }
    }
}

/// Where the prompts of a list lie in the body.
fn parts(job: &Job) -> Vec<Range<usize>> {
    let prompt = job.facts.prompt.clone();
    let list = job.body.get(prompt.clone()).unwrap_or_default();
    let all = elements(list, PROMPTS_MAX).unwrap_or_default();
    all.into_iter()
        .map(|r| prompt.start + r.start..prompt.start + r.end)
        .collect()
}
