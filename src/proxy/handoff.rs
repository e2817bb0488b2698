//! A request's way from arrival to the first byte of its answer: choose, prefill, hand over, decode, and what is tried again.
//!
//! Owns the hand-off. Where a connector pins KV at prefill, the future of [`run`] belongs to the proxy and not to the
//! client's connection: when the client leaves it is told so ([`Owner`]) and goes on until the KV is released. Where nothing
//! is pinned, dropping the future is enough: connections close, workers stop, the legs leave the counters.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use smallvec::SmallVec;
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::time::timeout;

use super::App;
use super::admission::Refusal;
use super::config::{ConnectorKind, PrefillDown, Role};
use super::connector::{self, mooncake, nixl, store};
use super::http::head::ReplyHead;
use super::http::upstream::{LegError, UpstreamConn};
use super::openai::Facts;
use super::policy::Ask;
use super::registry::{Instance, Leg};
use super::reply::LocalReply;
use super::splice::{Edit, Members, Pieces};

/// How long the release of a hand-off may take once its client has gone.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest prefill reply that is kept to be read.
const PREFILL_REPLY_MAX: usize = 16 << 20;

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
    pub(crate) _place: Option<OwnedSemaphorePermit>,
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
}

/// What one try of a leg came to.
enum Tried {
    Answer(Box<Answer>),
    /// Worth trying elsewhere; what the client gets if that is not possible.
    Again(Served, Failure),
    Final(Served),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    /// The worker never had the request.
    NotSent,
    /// It had it, and refused or broke off.
    Sent,
}

/// Carries a request out up to the first byte of its answer.
pub(crate) async fn run(app: Arc<App>, job: Arc<Job>, owner: Arc<Owner>) -> Served {
    app.budget.earn();
    let waited = Instant::now();
    let place = match app.gate.enter().await {
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
    };
    let mut served = handoff.carry_out().await;
    if let Served::Answer(answer) = &mut served {
        answer._place = Some(place);
        answer.route = handoff.route;
    }
    served
}

impl HandOff {
    fn ask(&self, role: Role) -> Ask<'_> {
        Ask {
            role,
            prompt: self
                .job
                .body
                .get(self.job.facts.prompt.clone())
                .unwrap_or_default(),
            tokens: self.job.facts.tokens,
            session: self.job.session,
        }
    }

    /// Tokens that an instance will have to compute: the load it takes on, as far as the policy knows.
    fn uncached(&self, ask: &Ask<'_>, instance: &Instance) -> u64 {
        if ask.role != Role::Prefill {
            return 0;
        }
        let cached = self.app.policy(ask.role).cached_tokens(ask, instance);
        ask.tokens.saturating_sub(cached)
    }

    /// Takes a place at an instance, waiting for one that is only busy. `Ok(None)`: all were tried.
    async fn pick(
        &self,
        role: Role,
        tried: &[u64],
        group: Option<&str>,
    ) -> Result<Option<Leg>, LocalReply> {
        let app = &self.app;
        let deadline = tokio::time::Instant::now() + app.config.queue_timeout;
        loop {
            let changed = app.registry.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let mut free = app
                .registry
                .candidates(role, app.config.instance_max, group);
            free.retain(|i| !tried.contains(&i.number));
            let ask = self.ask(role);
            while !free.is_empty() {
                let chosen = app.policy(role).choose(&ask, &free).min(free.len() - 1);
                let tokens = self.uncached(&ask, &free[chosen]);
                if let Some(leg) = app.registry.enter(&free[chosen], role, tokens) {
                    app.policy(role).routed(&ask, &leg.instance);
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
        // Decode's place is taken before prefill begins: what is being prefilled is decode's future load.
        let decode = match self
            .pick(Role::Decode, &[], group_of(&prefill.instance))
            .await
        {
            Ok(Some(leg)) => leg,
            Ok(None) => {
                return Served::local(LocalReply::later(503, "no decode instance is available", 2));
            }
            Err(reply) => return Served::local(reply),
        };
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

    async fn decode_alone(&mut self) -> Served {
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

    /// Prefill, then decode: store and nixl, and instances of which neither is known yet.
    async fn one_after_the_other(
        &mut self,
        mut prefill: Leg,
        mut decode: Leg,
        limit: &'static str,
    ) -> Served {
        // Once more from the beginning when decode refused parameters that serve only once.
        for _ in 0..2 {
            let started = Instant::now();
            let (params, from) = match self.prefill(prefill, limit).await {
                Ok(done) => done,
                Err(served) => return served,
            };
            self.app.metrics.prefill.record(started.elapsed());
            self.route.prefill = Some(from.clone());
            if params.is_none() && self.owner.is_gone() {
                return Served::Gone;
            }
            let Some(params) = params else {
                decode = match self.still_usable(decode, &from).await {
                    Ok(leg) => leg,
                    Err(served) => return served,
                };
                let body = store::decode_body(&self.job.body);
                return self.decode(decode, &body, false).await.0;
            };
            self.app.metrics.handoffs.add();
            decode = match self.still_usable(decode, &from).await {
                Ok(leg) => leg,
                Err(served) => {
                    self.app.metrics.orphans.add();
                    return served;
                }
            };
            let body = self.with_params(nixl::decode_edit(params), limit);
            let (served, failure) = self.decode(decode, &body, true).await;
            let Some(failure) = failure else {
                return served;
            };
            // The parameters may have been used up: the prompt is computed again, once.
            let again =
                failure == Failure::Sent && self.may_retry(&mut Attempts::default(), "prefill");
            self.app.metrics.orphans.add();
            if !again {
                return served;
            }
            prefill = match self.pick(Role::Prefill, &[], None).await {
                Ok(Some(leg)) => leg,
                _ => return served,
            };
            let group = group_of(&prefill.instance).map(str::to_owned);
            decode = match self.pick(Role::Decode, &[], group.as_deref()).await {
                Ok(Some(leg)) => leg,
                _ => return served,
            };
        }
        Served::local(LocalReply::error(502, "the hand-off to decode failed"))
    }

    /// The decode instance chosen before prefill, or another when that one has left meanwhile.
    async fn still_usable(&self, leg: Leg, prefill: &Instance) -> Result<Leg, Served> {
        let i = &leg.instance;
        let registered = self
            .app
            .registry
            .find(&i.address)
            .is_some_and(|r| Arc::ptr_eq(&r, i));
        if registered && i.health() == super::registry::Health::Up {
            return Ok(leg);
        }
        drop(leg);
        match self.pick(Role::Decode, &[], group_of(prefill)).await {
            Ok(Some(leg)) => Ok(leg),
            Ok(None) => Err(Served::local(LocalReply::later(
                503,
                "no decode instance is available",
                2,
            ))),
            Err(reply) => Err(Served::local(reply)),
        }
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

    /// The prefill leg with its retries: the parameters it gave, if any, and who computed it.
    async fn prefill(
        &mut self,
        mut leg: Leg,
        limit: &'static str,
    ) -> Result<(Option<Bytes>, Arc<Instance>), Served> {
        let mut attempts = Attempts::default();
        loop {
            let instance = leg.instance.clone();
            attempts.tried.push(instance.number);
            let kind = instance.link.read().kind;
            let mut edits = connector::prefill_edits(limit);
            // Of an instance that is not known yet the reply tells: with parameters it is nixl, without store.
            let pins = kind != Some(ConnectorKind::Store);
            if pins {
                self.owner.pin();
                edits.push(nixl::prefill_edit());
            }
            let body = self.splice(&edits);
            let group = group_of(&instance).map(str::to_owned);
            let (last, _) = match self.prefill_once(leg, &body, pins, None).await {
                Ok(reply) => {
                    let params = pins.then(|| nixl::params(&reply)).flatten();
                    if kind.is_none() && !self.owner.is_gone() {
                        let found = if params.is_some() {
                            ConnectorKind::Nixl
                        } else {
                            ConnectorKind::Store
                        };
                        instance.link.write().kind = Some(found);
                        tracing::info!(instance = %instance.name, connector = found.name(), "connector found out");
                    }
                    return Ok((params, instance));
                }
                Err(Tried::Again(served, failure)) => (served, failure),
                Err(Tried::Final(served)) => return Err(served),
                Err(Tried::Answer(answer)) => return Err(Served::Answer(answer)),
            };
            if !self.may_retry(&mut attempts, "prefill") {
                return Err(last);
            }
            leg = match self
                .pick(Role::Prefill, &attempts.tried, group.as_deref())
                .await
            {
                Ok(Some(leg)) => leg,
                _ => return Err(last),
            };
        }
    }

    /// One prefill leg: its reply's body. With `pins` a client that leaves is passed on as a half-close.
    async fn prefill_once(
        &self,
        mut leg: Leg,
        body: &[Bytes],
        pins: bool,
        rank: Option<u32>,
    ) -> Result<Vec<u8>, Tried> {
        let started = Instant::now();
        let instance = leg.instance.clone();
        let within = self.app.config.prefill_timeout;
        let exchange = async {
            let head = self.head(&instance, body, rank);
            let (mut conn, mut reply) = if pins {
                let mut conn = instance.pool.send(&instance.target, &head, body).await?;
                let reply = tokio::select! {
                    reply = conn.reply(false) => reply?,
                    () = self.owner.left() => {
                        conn.half_close().await;
                        timeout(RELEASE_TIMEOUT, conn.reply(false)).await.map_err(|_| LegError::Timeout)??
                    }
                };
                (conn, reply)
            } else {
                instance
                    .pool
                    .ask(&instance.target, &head, body, false)
                    .await?
            };
            if reply.status >= 300 {
                return Ok((conn, reply, Vec::new()));
            }
            let mut kept = Vec::new();
            let kept_max = if pins { PREFILL_REPLY_MAX } else { 0 };
            tokio::select! {
                done = conn.read_body(&mut reply.body, &mut kept, kept_max) => done?,
                () = self.owner.left(), if pins => {
                    conn.half_close().await;
                    timeout(RELEASE_TIMEOUT, conn.read_body(&mut reply.body, &mut kept, kept_max))
                        .await
                        .map_err(|_| LegError::Timeout)??;
                }
            }
            Ok((conn, reply, kept))
        };
        let result = timeout(within, exchange)
            .await
            .unwrap_or(Err(LegError::Timeout));
        match result {
            Err(_) if self.owner.is_gone() => Err(Tried::Final(Served::Gone)),
            Ok((conn, reply, kept)) if reply.status < 300 => {
                leg.succeeded();
                leg.instance.learn_rate(leg.tokens(), started.elapsed());
                if reply.keep_alive && !self.owner.is_gone() {
                    instance.pool.give(conn);
                }
                Ok(kept)
            }
            Ok((conn, head, _)) => Err(self.judge(leg, conn, head)),
            Err(error) => Err(self.failed(leg, &error)),
        }
    }

    /// What an answer that is no success means.
    fn judge(&self, mut leg: Leg, conn: UpstreamConn, head: ReplyHead) -> Tried {
        let status = head.status;
        match status {
            500.. => leg.failed(&format!("HTTP {status}")),
            429 => {}
            _ => leg.succeeded(),
        }
        let decode = leg.is_decode();
        let answer = Box::new(Answer {
            conn,
            head,
            leg,
            route: Route::default(),
            _place: None,
        });
        match status {
            429 | 502..=504 => Tried::Again(Served::Answer(answer), Failure::Sent),
            500.. if decode => Tried::Again(Served::Answer(answer), Failure::Sent),
            _ => Tried::Answer(answer),
        }
    }

    fn failed(&self, mut leg: Leg, error: &LegError) -> Tried {
        leg.failed(error);
        let role = if leg.is_decode() { "decode" } else { "prefill" };
        let served = |status, what: &str| {
            Served::local(LocalReply::error(
                status,
                &format!("the {role} instance {what}"),
            ))
        };
        match error {
            LegError::Connect(_) => {
                leg.instance.pool.clear();
                Tried::Again(served(502, "cannot be reached"), Failure::NotSent)
            }
            LegError::Lost(_) => {
                leg.instance.pool.clear();
                Tried::Again(served(502, "broke off before it answered"), Failure::Sent)
            }
            LegError::Malformed => {
                Tried::Again(served(502, "gave no valid HTTP answer"), Failure::Sent)
            }
            // It may still be computing: trying elsewhere would only add load.
            LegError::Timeout => Tried::Final(served(504, "did not answer in time")),
        }
    }

    /// The decode leg with its retries up to the first byte of its body. `pinned`: parameters serve only once.
    async fn decode(
        &mut self,
        mut leg: Leg,
        body: &[Bytes],
        pinned: bool,
    ) -> (Served, Option<Failure>) {
        let mut attempts = Attempts::default();
        loop {
            let instance = leg.instance.clone();
            attempts.tried.push(instance.number);
            self.route.decode = Some(instance.clone());
            let (last, failure) = match self.decode_once(leg, body).await {
                Tried::Answer(_) if self.owner.is_gone() => {
                    // The first byte is here, so the KV has been fetched: closing is all that is left to do.
                    self.app.metrics.released.add();
                    return (Served::Gone, None);
                }
                Tried::Answer(answer) => return (Served::Answer(answer), None),
                Tried::Final(served) => return (served, None),
                Tried::Again(served, failure) => (served, failure),
            };
            let elsewhere = !pinned || failure == Failure::NotSent;
            // A hand-off whose client has gone is still tried elsewhere: it is the KV that must be released.
            let releasing = pinned && self.owner.is_gone() && attempts.tried.len() <= 2;
            if !elsewhere || !(releasing || self.may_retry(&mut attempts, "decode")) {
                return (last, Some(failure));
            }
            let group = group_of(&instance).map(str::to_owned);
            leg = match self
                .pick(Role::Decode, &attempts.tried, group.as_deref())
                .await
            {
                Ok(Some(leg)) => leg,
                _ => return (last, Some(failure)),
            };
        }
    }

    async fn decode_once(&self, leg: Leg, body: &[Bytes]) -> Tried {
        let instance = leg.instance.clone();
        let exchange = async {
            let head = self.head(&instance, body, None);
            let bodiless = self.job.method == "HEAD";
            let (mut conn, reply) = instance
                .pool
                .ask(&instance.target, &head, body, bodiless)
                .await?;
            if reply.status < 300 {
                conn.first_byte(&reply.body).await?;
            }
            Ok((conn, reply))
        };
        let result = timeout(self.app.config.first_token_timeout, exchange)
            .await
            .unwrap_or(Err(LegError::Timeout));
        match result {
            Ok((conn, head)) if head.status < 300 => {
                let mut leg = leg;
                leg.forget_tokens();
                self.app.metrics.ttft.record(self.job.arrived.elapsed());
                Tried::Answer(Box::new(Answer {
                    conn,
                    head,
                    leg,
                    route: Route::default(),
                    _place: None,
                }))
            }
            Ok((conn, head)) => self.judge(leg, conn, head),
            Err(error) => self.failed(leg, &error),
        }
    }

    /// Both legs at once: mooncake's push.
    async fn at_once(&mut self, mut prefill: Leg, mut decode: Leg, limit: &'static str) -> Served {
        let mut attempts = Attempts::default();
        self.owner.pin();
        loop {
            attempts.tried.push(decode.instance.number);
            let group = group_of(&prefill.instance).map(str::to_owned);
            self.route.prefill = Some(prefill.instance.clone());
            self.route.decode = Some(decode.instance.clone());
            let (last, again) = match self.push(prefill, decode, limit).await {
                Pushed::Done(served) => return served,
                Pushed::Again(served) => (served, true),
                Pushed::Final(served) => (served, false),
            };
            if !again || !self.may_retry(&mut attempts, "decode") {
                return last;
            }
            prefill = match self.pick(Role::Prefill, &[], group.as_deref()).await {
                Ok(Some(leg)) => leg,
                _ => return last,
            };
            // Another decode instance if there is one; else the same may have been only briefly busy.
            decode = match self
                .pick(Role::Decode, &attempts.tried, group.as_deref())
                .await
            {
                Ok(Some(leg)) => leg,
                _ => return last,
            };
        }
    }

    async fn push(&self, prefill: Leg, decode: Leg, limit: &'static str) -> Pushed {
        let link = prefill.instance.link.read().clone();
        let turn = prefill.instance.turn.fetch_add(1, Ordering::Relaxed) as usize;
        let Some(engine) = link.engines.get(turn % link.engines.len().max(1)).cloned() else {
            return Pushed::Final(Served::local(LocalReply::later(
                503,
                "the prefill engine is not known yet",
                1,
            )));
        };
        let transfer = format!(
            "xfer-{:016x}{:016x}",
            rand::random::<u64>(),
            rand::random::<u64>()
        );
        let mut edits = connector::prefill_edits(limit);
        edits.push(mooncake::prefill_edit(&transfer));
        let prefill_body = self.splice(&edits);
        let host = prefill.instance.address.host.clone();
        let edit = mooncake::decode_edit(&transfer, &host, link.bootstrap_port, &engine.id);
        let decode_body = self.splice(&[edit]);
        let other = Self {
            app: self.app.clone(),
            job: self.job.clone(),
            owner: self.owner.clone(),
            route: Route::default(),
        };
        let rank = (link.engines.len() > 1).then_some(engine.rank);
        let started = Instant::now();
        let app = self.app.clone();
        let mut prefilling = Box::pin(async move {
            let result = other.prefill_once(prefill, &prefill_body, true, rank).await;
            app.metrics.prefill.record(started.elapsed());
            result
        });
        let decoding = self.decode_once(decode, &decode_body);
        tokio::pin!(decoding);
        tokio::select! {
            prefilled = &mut prefilling => match prefilled {
                Ok(_) => {
                    self.app.metrics.handoffs.add();
                    self.decoded(decoding.await, true)
                }
                // Decode waits for KV that will not come: dropping it tells it so.
                Err(Tried::Again(served, _)) => Pushed::Again(served),
                Err(Tried::Final(served)) => Pushed::Final(served),
                Err(Tried::Answer(answer)) => Pushed::Done(Served::Answer(answer)),
            },
            decoded = &mut decoding => {
                let fine = matches!(&decoded, Tried::Answer(a) if a.head.status < 300);
                if fine {
                    // The push is done; prefill's reply follows and is read by the proxy, whatever the client does.
                    self.app.metrics.handoffs.add();
                    tokio::spawn(prefilling);
                }
                self.decoded(decoded, false)
            }
        }
    }

    fn decoded(&self, tried: Tried, prefilled: bool) -> Pushed {
        match tried {
            Tried::Answer(_) if self.owner.is_gone() => {
                self.app.metrics.released.add();
                Pushed::Done(Served::Gone)
            }
            Tried::Answer(answer) => Pushed::Done(Served::Answer(answer)),
            Tried::Again(served, _) => {
                if prefilled {
                    self.app.metrics.orphans.add();
                }
                Pushed::Again(served)
            }
            Tried::Final(served) => {
                if prefilled {
                    self.app.metrics.orphans.add();
                }
                Pushed::Final(served)
            }
        }
    }

    /// The head for a worker.
    fn head(&self, instance: &Instance, body: &[Bytes], rank: Option<u32>) -> Vec<u8> {
        let job = &self.job;
        let length: usize = body.iter().map(Bytes::len).sum();
        let mut head = Vec::with_capacity(job.lines.len() + job.target.len() + 128);
        for part in [
            job.method.as_str(),
            " ",
            &job.target,
            " HTTP/1.1\r\nhost: ",
            &instance.name,
            "\r\n",
        ] {
            head.extend_from_slice(part.as_bytes());
        }
        head.extend_from_slice(&job.lines);
        if let Some(rank) = rank {
            head.extend_from_slice(format!("x-data-parallel-rank: {rank}\r\n").as_bytes());
        }
        if length > 0 || job.method == "POST" {
            head.extend_from_slice(b"content-length: ");
            head.extend_from_slice(length.to_string().as_bytes());
            head.extend_from_slice(b"\r\n");
        }
        head.extend_from_slice(b"\r\n");
        head
    }
}

enum Pushed {
    Done(Served),
    Again(Served),
    Final(Served),
}

fn group_of(instance: &Instance) -> Option<&str> {
    Some(instance.group.as_str()).filter(|g| !g.is_empty())
}
