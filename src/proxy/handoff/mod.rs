//! A request's way from arrival to the first byte of its answer: choose, prefill, hand over, decode, and what is tried again.
//!
//! Owns the hand-off. Where a connector pins KV at prefill, the future of [`run`] belongs to the proxy and not to the
//! client's connection: when the client leaves it is told so ([`Owner`]) and goes on until the KV is released. Where nothing
//! is pinned, dropping the future is enough: connections close, workers stop, the legs leave the counters.

mod at_once;
mod barrier;
mod leg;
mod one_after_the_other;
pub(crate) mod places;
mod release;
mod tokens;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use bytes::Bytes;
use smallvec::SmallVec;
use tokio::sync::Notify;

use super::App;
use super::admission::{Claim, Place, Refusal};
use super::config::{ConnectorKind, PrefillDown, Role};
use super::connector::{self, store};
use super::http::head::ReplyHead;
use super::http::upstream::UpstreamConn;
use super::kv::text::Known;
use super::openai::Facts;
use super::policy::Ask;
use super::registry::{Instance, Leg};
use super::reply::LocalReply;
use super::splice::{Edit, Members, Pieces};

/// A request ready to be sent.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) method: String,
    pub(crate) target: String,
    /// Header lines for workers, without the request line, `Host` and length.
    pub(crate) lines: Vec<u8>,
    pub(crate) body: Bytes,
    pub(crate) members: Option<Members>,
    pub(crate) facts: Facts,
    /// The field that bounds the output; `None`: one leg only.
    pub(crate) limit: Option<&'static str>,
    pub(crate) session: Option<u64>,
    pub(crate) claim: Claim,
    /// Asks for a WebSocket.
    pub(crate) upgrades: bool,
    /// The prompt's tokens, as far as they were known when somebody asked first.
    pub(crate) known: OnceLock<Option<Known>>,
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
        self.news.notify_one();
        self.pins.load(Ordering::Acquire)
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    async fn left(&self) {
        while !self.is_gone() {
            self.news.notified().await;
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
    pub(crate) cached: Option<u64>,
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
    /// The client has gone and everything is released.
    Gone,
}

impl Served {
    /// A worker's answer that is no success: it has not fetched anything.
    fn is_refusal(&self) -> bool {
        match self {
            Self::Answer(answer) => answer.head.status >= 300,
            Self::Local(_) => true,
            Self::Gone => false,
        }
    }

    fn local(reply: LocalReply) -> Self {
        Self::Local(reply)
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
    cached: Option<u64>,
    place: Option<places::Place>,
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
    let mut handoff = HandOff {
        app,
        job,
        owner,
        route: Route::default(),
        cached: None,
        place: None,
    };
    let mut served = handoff.carry_out().await;
    if let Served::Answer(answer) = &mut served {
        answer._place = Some(place);
        answer.route = handoff.route;
        answer.cached = handoff.cached;
    }
    served
}

impl HandOff {
    fn ask(&self, role: Role) -> Ask<'_> {
        Ask {
            role,
            prompt: self.job.prompt(),
            tokens: self.job.facts.tokens,
            session: self.job.session,
            known: self.known(),
        }
    }

    /// Tokens that an instance will have to compute: the load it takes on, as far as the policy knows.
    fn uncached(&self, ask: &Ask<'_>, instance: &Arc<Instance>) -> u64 {
        if ask.role != Role::Prefill {
            return 0;
        }
        let cached = self.app.policy(ask.role).cached_tokens(ask, instance);
        ask.tokens.saturating_sub(cached)
    }

    /// Takes a place at an instance, waiting for one that is only busy. `Ok(None)`: all were tried.
    ///
    /// `with`: who it must suit, for a decode leg its prefill instance.
    async fn pick(
        &self,
        role: Role,
        tried: &[u64],
        with: Option<&Instance>,
    ) -> Result<Option<Leg>, LocalReply> {
        let app = &self.app;
        let deadline = tokio::time::Instant::now() + app.config.queue_timeout;
        loop {
            let changed = app.registry.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let mut free =
                app.registry
                    .candidates(role, app.config.instance_max, with.and_then(group_of));
            free.retain(|i| !tried.contains(&i.number) && self.has_room(role, i, with));
            let ask = self.ask(role);
            while !free.is_empty() {
                let chosen = app.policy(role).choose(&ask, &free).min(free.len() - 1);
                let tokens = self.uncached(&ask, &free[chosen]);
                if let Some(leg) = app.registry.enter(&free[chosen], role, tokens) {
                    app.policy(role).routed(&ask, &leg.instance);
                    let computes = role == Role::Prefill || self.app.config.aggregated;
                    if computes && !leg.instance.tells_cached.load(Ordering::Relaxed) {
                        self.learn_tokens(&leg.instance);
                    }
                    return Ok(Some(leg));
                }
                // Its breaker has let another probe in meanwhile.
                free.remove(chosen);
            }
            if !tried.is_empty() {
                return Ok(None);
            }
            if !app.registry.serves(role) && !app.registry.expects(role) {
                app.metrics.refused_none.add();
                let text = format!("no {} instance is available", role.name());
                return Err(LocalReply::later(503, &text, 2));
            }
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                app.metrics.refused_busy.add();
                let text = format!("all {} instances are busy", role.name());
                return Err(LocalReply::later(503, &text, 1));
            }
        }
    }

    /// Whether one more hand-off may begin there.
    fn has_room(&self, role: Role, instance: &Instance, with: Option<&Instance>) -> bool {
        let (config, handoffs) = (&self.app.config, &self.app.handoffs);
        let below = |max: usize, count: usize| max == 0 || count < max;
        match (role, with) {
            (Role::Prefill, _) => below(config.handoffs_max, handoffs.of(instance.number)),
            (_, Some(prefill)) => {
                let count = || handoffs.of_pair(prefill.number, instance.number);
                config.pair_handoffs_max == 0 || below(config.pair_handoffs_max, count())
            }
            _ => true,
        }
    }

    /// Counts this request's hand-off from here until decode's first byte.
    fn hold(&mut self, prefill: &Instance, decode: Option<&Instance>) {
        let decode = decode.map(|d| d.number);
        let freed = &self.app.registry.changed;
        self.place = Some(self.app.handoffs.begin(prefill.number, decode, freed));
    }

    async fn carry_out(&mut self) -> Served {
        let Some(limit) = self.prefill_limit() else {
            return self.decode_alone().await;
        };
        let prefill = match self.pick(Role::Prefill, &[], None).await {
            Ok(Some(leg)) => leg,
            Err(reply) if self.app.config.prefill_down == PrefillDown::Refuse => {
                return Served::local(reply);
            }
            _ => {
                self.route.reason = "prefill down";
                return self.decode_alone().await;
            }
        };
        if self.is_short(&prefill) {
            drop(prefill);
            self.route.reason = "short prompt";
            return self.decode_alone().await;
        }
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
        let kind = prefill.instance.link.read().kind;
        if kind == Some(ConnectorKind::Mooncake) {
            return self.at_once(prefill, decode, limit).await;
        }
        self.one_after_the_other(prefill, decode, limit).await
    }

    /// The name of the output bound, when this request takes two legs.
    fn prefill_limit(&mut self) -> Option<&'static str> {
        let limit = self.job.limit?;
        let reason = if self.app.config.aggregated {
            "aggregated"
        } else if self.app.config.connector == Some(ConnectorKind::None) {
            "no connector"
        } else if let Some(alone) = self.job.facts.alone {
            alone
        } else {
            self.route.reason = "prefill and decode";
            return Some(limit);
        };
        self.app.metrics.alone.add();
        self.route.reason = reason;
        None
    }

    /// Whether computing the prompt is not worth a leg. By what was uncached when the leg was taken: routing it has
    /// entered the prompt into the policy's index since.
    fn is_short(&self, prefill: &Leg) -> bool {
        let short = prefill.tokens() < self.app.config.prefill_min_tokens;
        if short {
            self.app.metrics.alone.add();
        }
        short
    }

    /// Whether another try is allowed.
    fn may_retry(&mut self, attempts: &mut Attempts, leg: &str) -> bool {
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
        let body = store::decode_body(&self.job.body);
        self.decode(leg, &body, false).await.0
    }

    fn with_params(&self, edit: Edit, limit: &'static str) -> Pieces {
        let mut edits = if self.owner.is_gone() {
            connector::release_edits(limit)
        } else {
            Vec::new()
        };
        edits.push(edit);
        self.splice(&edits)
    }

    fn splice(&self, edits: &[Edit]) -> Pieces {
        match &self.job.members {
            Some(members) => members.apply(&self.job.body, edits),
            None => store::decode_body(&self.job.body),
        }
    }
}

fn group_of(instance: &Instance) -> Option<&str> {
    Some(instance.group.as_str()).filter(|g| !g.is_empty())
}
