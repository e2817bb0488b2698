//! The instances: role, health, load, and who may be sent a request.
//!
//! Owns the table and the counters. A request in flight holds a [`Leg`], and whatever becomes of it, dropping the leg takes
//! it out of the counters: there is no other way in or out. Knows no HTTP beyond a pool of connections and no policy.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use parking_lot::{Mutex, RwLock};
use smallvec::SmallVec;
use tokio::sync::Notify;

use super::breaker::{Breaker, Pass};
use super::config::{ConnectorKind, EventsAddress, InstanceAddress, Role};
use super::http::upstream::ConnPool;
use super::kv::Feed;
use super::kv::worth::{Slower, Worth};
use super::links::Links;
use super::pace::Pace;
use crate::base::clock::Millis;

/// Most instances of a proxy.
pub(crate) const INSTANCES_MAX: usize = 4096;

/// Shorter prompts say more about the way than about the machine.
const RATE_TOKENS_MIN: u64 = 64;

/// What the health checks say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Health {
    /// Not asked yet.
    Unknown = 0,
    Up = 1,
    Down = 2,
    /// It serves another model, or is no OpenAI server.
    Wrong = 3,
    /// It says that it is for something else.
    WrongRole = 4,
}

impl Health {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Up => "up",
            Self::Down => "down",
            Self::Wrong => "wrong_model",
            Self::WrongRole => "wrong_role",
        }
    }
}

/// How an instance came, and so what may take it away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Flags and files.
    Named,
    /// A request; it belongs in the state file.
    Added,
    /// A source of `--discover`.
    Discovered,
    /// It has registered itself.
    Registered,
}

impl Origin {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Named => "named",
            Self::Added => "added",
            Self::Discovered => "discovered",
            Self::Registered => "registered",
        }
    }
}

/// A rank of a bootstrap server's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Engine {
    pub(crate) rank: u32,
    pub(crate) id: String,
}

/// What is known about how an instance hands KV over.
#[derive(Clone, Debug, Default)]
pub(crate) struct Link {
    /// `None`: not found out yet.
    pub(crate) kind: Option<ConnectorKind>,
    /// What it was before the instance was down.
    pub(crate) before: Option<ConnectorKind>,
    /// The engines behind a bootstrap server.
    pub(crate) engines: Arc<[Engine]>,
    pub(crate) bootstrap_port: u16,
    /// Data-parallel ranks behind a bootstrap server (SGLang).
    pub(crate) ranks: u32,
    /// The kind was told, so it is not found out anew.
    pub(crate) told: bool,
    /// Whether it is an SGLang server has been answered.
    pub(crate) is_asked: bool,
    /// Questions for that in a row that had no answer.
    pub(crate) unanswered: u32,
    /// Counts its starts: what was learnt of an earlier one is not entered.
    pub(crate) generation: u64,
}

/// Why an instance is set aside: it gets no requests, and is not taken out either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Aside {
    No = 0,
    /// What became of a change of its role is not known: it is asked what it is.
    Unsure = 1,
    /// It said that it must be restarted; then it is asked.
    Broken = 2,
}

impl Aside {
    /// For `/instances`.
    pub(crate) fn text(self) -> Option<&'static str> {
        match self {
            Self::No => None,
            Self::Unsure => Some("its role is not known"),
            Self::Broken => Some("its role could not be changed; it waits for a restart"),
        }
    }
}

/// One instance.
#[derive(Debug)]
pub(crate) struct Instance {
    /// Never used twice in a process.
    pub(crate) number: u64,
    pub(crate) address: InstanceAddress,
    /// For connecting.
    pub(crate) target: (String, u16),
    /// As people and clients are told.
    pub(crate) name: String,
    /// `Host` of requests to it.
    pub(crate) authority: String,
    pub(crate) weight: f64,
    pub(crate) group: String,
    pub(crate) origin: Origin,
    /// Where it tells of its KV cache.
    pub(crate) events: Option<EventsAddress>,
    pub(crate) feed: Feed,
    /// It has no `/tokenize`.
    pub(crate) is_mute: AtomicBool,
    role: AtomicU8,
    health: AtomicU8,
    draining: AtomicBool,
    /// When a drain that is under way gives up waiting.
    pub(crate) drained_by: Mutex<Option<tokio::time::Instant>>,
    /// Its role is being changed: no new requests until that is done.
    pub(crate) switching: AtomicBool,
    aside: AtomicU8,
    /// The role that it was told to take, and when it was set aside as it did not say what came of that.
    pub(crate) told: Mutex<Option<(Role, tokio::time::Instant)>>,
    pub(crate) breaker: Breaker,
    pub(crate) pool: ConnPool,
    pub(crate) link: RwLock<Link>,
    pub(crate) models: RwLock<Vec<String>>,
    /// Where it has our model's weights from.
    pub(crate) root: RwLock<Option<String>>,
    pub(crate) last_error: Mutex<String>,
    /// Requests under way, as prefill and as decode.
    inflight: [AtomicUsize; 2],
    /// Prompt tokens under way as prefill.
    tokens: AtomicU64,
    pub(crate) served: AtomicU64,
    pub(crate) failed: AtomicU64,
    /// Prefill tokens per second, learnt; 0 = not yet.
    pub(crate) rate: AtomicU64,
    /// How its prefills get on.
    pub(crate) pace: Pace,
    /// How its KV gets to decode instances.
    pub(crate) links: Links,
    pub(crate) turn: AtomicU32,
    /// Longest prompt and answer it takes, in tokens; 0 = not told.
    pub(crate) model_len: AtomicU64,
    /// Requests it runs that are not this proxy's, as far as it says.
    pub(crate) others: AtomicU64,
    /// Its KV cache in use, in thousandths.
    pub(crate) kv_usage: AtomicU64,
    /// Tokens its KV cache has room for; 0 = not told.
    pub(crate) cache_tokens: AtomicU64,
    /// Its replies tell how much of a prompt was cached.
    pub(crate) tells_cached: AtomicBool,
    /// It has no such gauges.
    pub(crate) has_no_gauges: AtomicBool,
}

fn slot(role: Role) -> usize {
    usize::from(role == Role::Decode)
}

impl Instance {
    pub(crate) fn role(&self) -> Role {
        match self.role.load(Ordering::Relaxed) {
            0 => Role::Prefill,
            1 => Role::Decode,
            _ => Role::Both,
        }
    }

    pub(crate) fn set_role(&self, role: Role) {
        self.role.store(role as u8, Ordering::Relaxed);
    }

    pub(crate) fn health(&self) -> Health {
        match self.health.load(Ordering::Relaxed) {
            0 => Health::Unknown,
            1 => Health::Up,
            2 => Health::Down,
            3 => Health::Wrong,
            _ => Health::WrongRole,
        }
    }

    pub(crate) fn set_health(&self, health: Health) {
        self.health.store(health as u8, Ordering::Relaxed);
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    pub(crate) fn set_draining(&self, draining: bool) {
        self.draining.store(draining, Ordering::Relaxed);
    }

    pub(crate) fn aside(&self) -> Aside {
        match self.aside.load(Ordering::SeqCst) {
            0 => Aside::No,
            1 => Aside::Unsure,
            _ => Aside::Broken,
        }
    }

    pub(crate) fn set_aside(&self, aside: Aside) {
        self.aside.store(aside as u8, Ordering::SeqCst);
    }

    /// The process behind it has ended: whatever was broken is another's.
    pub(crate) fn has_ended(&self) {
        if self.aside() == Aside::Broken {
            self.set_aside(Aside::Unsure);
        }
        *self.told.lock() = None;
    }

    /// Whether it is being emptied, or kept out of use.
    fn is_left(&self) -> bool {
        self.is_draining() || self.switching.load(Ordering::SeqCst) || self.aside() != Aside::No
    }

    /// Requests under way in a role.
    pub(crate) fn inflight(&self, role: Role) -> usize {
        self.inflight[slot(role)].load(Ordering::Relaxed)
    }

    /// Requests under way.
    pub(crate) fn inflight_all(&self) -> usize {
        self.inflight(Role::Prefill) + self.inflight(Role::Decode)
    }

    /// Prompt tokens under way as prefill.
    pub(crate) fn tokens(&self) -> u64 {
        self.tokens.load(Ordering::Relaxed)
    }

    /// Whether a new request may go there.
    pub(crate) fn usable(&self, role: Role, now: Millis) -> bool {
        self.role().does(role)
            && self.health() == Health::Up
            && !self.is_left()
            && self.breaker.admits(now)
    }

    /// Remembers what went wrong, for `/instances`.
    pub(crate) fn note(&self, error: &dyn std::fmt::Display) {
        *self.last_error.lock() = error.to_string().chars().take(200).collect();
    }

    /// Learns how fast prompts are computed.
    fn learn_rate(&self, tokens: u64, elapsed: std::time::Duration) {
        let seen = tokens as f64 / elapsed.as_secs_f64().max(1e-4);
        let old = self.rate.load(Ordering::Relaxed) as f64;
        let new = if old == 0.0 {
            seen
        } else {
            old * 0.9 + seen * 0.1
        };
        self.rate.store(new.max(1.0) as u64, Ordering::Relaxed);
    }
}

/// One request under way at an instance.
#[derive(Debug)]
pub(crate) struct Leg {
    pub(crate) instance: Arc<Instance>,
    role: Role,
    tokens: u64,
    /// Prompt tokens that were under way there before it.
    ahead: u64,
    /// Tokens that it has to fetch from slower tiers.
    pub(crate) slower: Slower,
    pass: Option<Pass>,
    /// It has left the counters already.
    is_out: bool,
    freed: Arc<Notify>,
}

impl Leg {
    /// The instance answered.
    pub(crate) fn succeeded(&mut self) {
        if let Some(pass) = self.pass.take() {
            self.instance.breaker.succeeded(pass, Millis::now());
            self.instance.served.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// It did not, or with a 5xx.
    pub(crate) fn failed(&mut self, error: &dyn std::fmt::Display) {
        self.instance.failed.fetch_add(1, Ordering::Relaxed);
        self.instance.note(error);
        if let Some(pass) = self.pass.take()
            && self.instance.breaker.failed(pass, Millis::now())
        {
            tracing::warn!(instance = %self.instance.name, error = %error, "breaker opened");
        }
    }

    /// The prompt is computed; learns how fast that was.
    pub(crate) fn computed(&self, elapsed: std::time::Duration, worth: &Worth) {
        let (tokens, pace) = (self.tokens, &self.instance.pace);
        let fetched: u32 = self.slower.iter().sum();
        if u64::from(fetched) > tokens / 8 {
            // What was fetched says nothing about computing, but that says something about fetching.
            if let Some(fit) = pace.fit() {
                worth.learn(self.slower, tokens, self.ahead, fit, elapsed);
            }
        } else if tokens >= RATE_TOKENS_MIN {
            self.instance.learn_rate(tokens, elapsed);
            pace.learn(tokens, self.ahead, elapsed);
        }
    }

    /// Prompt tokens it brought.
    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Whether this is decode's leg.
    pub(crate) fn is_decode(&self) -> bool {
        self.role == Role::Decode
    }

    /// The prompt is computed: what is left is no prefill load.
    pub(crate) fn forget_tokens(&mut self) {
        let tokens = std::mem::take(&mut self.tokens);
        self.instance.tokens.fetch_sub(tokens, Ordering::Relaxed);
    }

    /// Leaves the counters ahead of its end: all that is left of it is an answer to be read.
    pub(crate) fn leave(&mut self) {
        if std::mem::replace(&mut self.is_out, true) {
            return;
        }
        self.forget_tokens();
        self.instance.inflight[slot(self.role)].fetch_sub(1, Ordering::Relaxed);
        if let Some(pass) = self.pass.take() {
            self.instance.breaker.unknown(pass);
        }
        self.freed.notify_waiters();
    }
}

impl Drop for Leg {
    fn drop(&mut self) {
        self.leave();
    }
}

/// What an added instance is.
#[derive(Clone, Debug)]
pub(crate) struct NewInstance {
    pub(crate) address: InstanceAddress,
    pub(crate) role: Role,
    pub(crate) weight: f64,
    pub(crate) group: String,
    pub(crate) connector: Option<ConnectorKind>,
    pub(crate) origin: Origin,
    pub(crate) events: Option<EventsAddress>,
}

impl NewInstance {
    pub(crate) fn plain(address: InstanceAddress, role: Role) -> Self {
        Self {
            address,
            role,
            weight: 1.0,
            group: String::new(),
            connector: None,
            origin: Origin::Named,
            events: None,
        }
    }
}

/// Why an instance was not added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AddError {
    #[error("Instance already exists.")]
    Exists,
    #[error("Too many instances.")]
    Full,
}

/// All instances.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    all: RwLock<Arc<Vec<Arc<Instance>>>>,
    next: AtomicU64,
    /// Somebody waiting for a usable instance should look again.
    pub(crate) changed: Arc<Notify>,
}

/// The instances a request may go to.
pub(crate) type Candidates = SmallVec<[Arc<Instance>; 8]>;

impl Registry {
    pub(crate) fn all(&self) -> Arc<Vec<Arc<Instance>>> {
        self.all.read().clone()
    }

    pub(crate) fn find(&self, address: &InstanceAddress) -> Option<Arc<Instance>> {
        let all = self.all.read();
        all.iter().find(|i| i.address.is_same(address)).cloned()
    }

    /// The instances an address names: one, or all ranks of a server.
    pub(crate) fn named(&self, address: &InstanceAddress) -> Candidates {
        let all = self.all.read();
        all.iter()
            .filter(|i| address.covers(&i.address))
            .cloned()
            .collect()
    }

    /// Adds an instance. One address may be there once per role, and a second role makes it `both`.
    pub(crate) fn add(&self, new: NewInstance) -> Result<Arc<Instance>, AddError> {
        let mut all = self.all.write();
        if let Some(old) = all.iter().find(|i| i.address.is_same(&new.address)) {
            if old.role().does(new.role) {
                return Err(AddError::Exists);
            }
            // What is discovered again and again does not undo a role that was changed, nor does whoever registers.
            if matches!(new.origin, Origin::Discovered | Origin::Registered) {
                return Err(AddError::Exists);
            }
            old.set_role(Role::Both);
            return Ok(old.clone());
        }
        // A server is there as a whole or by its ranks.
        let overlaps = |i: &InstanceAddress| i.covers(&new.address) || new.address.covers(i);
        if all.iter().any(|i| overlaps(&i.address)) {
            return Err(AddError::Exists);
        }
        if all.len() >= INSTANCES_MAX {
            return Err(AddError::Full);
        }
        let instance = Arc::new(Instance {
            number: self.next.fetch_add(1, Ordering::Relaxed),
            target: (new.address.host.clone(), new.address.port),
            name: new.address.to_string(),
            authority: new.address.authority(),
            address: new.address,
            weight: new.weight,
            group: new.group,
            origin: new.origin,
            events: new.events,
            feed: Feed::default(),
            is_mute: AtomicBool::new(false),
            role: AtomicU8::new(new.role as u8),
            health: AtomicU8::new(Health::Unknown as u8),
            draining: AtomicBool::new(false),
            drained_by: Mutex::default(),
            switching: AtomicBool::new(false),
            aside: AtomicU8::new(Aside::No as u8),
            told: Mutex::default(),
            breaker: Breaker::default(),
            pool: ConnPool::default(),
            link: RwLock::new(Link {
                kind: new.connector,
                told: new.connector.is_some(),
                ..Link::default()
            }),
            models: RwLock::default(),
            root: RwLock::default(),
            last_error: Mutex::default(),
            inflight: Default::default(),
            tokens: AtomicU64::new(0),
            served: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            rate: AtomicU64::new(0),
            pace: Pace::default(),
            links: Links::default(),
            turn: AtomicU32::new(0),
            model_len: AtomicU64::new(0),
            others: AtomicU64::new(0),
            kv_usage: AtomicU64::new(0),
            cache_tokens: AtomicU64::new(0),
            tells_cached: AtomicBool::new(false),
            has_no_gauges: AtomicBool::new(false),
        });
        let mut next = all.as_ref().clone();
        next.push(instance.clone());
        *all = Arc::new(next);
        Ok(instance)
    }

    /// Takes an instance out; what is under way there ends by itself.
    pub(crate) fn remove(&self, address: &InstanceAddress) -> Option<Arc<Instance>> {
        let mut all = self.all.write();
        let found = all.iter().find(|i| i.address.is_same(address)).cloned()?;
        let left = all.iter().filter(|i| !Arc::ptr_eq(i, &found)).cloned();
        *all = Arc::new(left.collect());
        found.pool.clear();
        Some(found)
    }

    /// Who may be sent a request in a role. `limit`: most requests under way there, 0 = any number.
    pub(crate) fn candidates(&self, role: Role, limit: usize, group: Option<&str>) -> Candidates {
        let now = Millis::now();
        let all = self.all.read();
        all.iter()
            .filter(|i| i.usable(role, now))
            .filter(|i| limit == 0 || i.inflight(role) < limit)
            .filter(|i| group.is_none_or(|g| i.group == g))
            .cloned()
            .collect()
    }

    /// Whether anybody could serve a role now, busy or not.
    pub(crate) fn serves(&self, role: Role) -> bool {
        let now = Millis::now();
        self.all.read().iter().any(|i| i.usable(role, now))
    }

    /// Whether somebody of a role has not been asked yet how it is.
    pub(crate) fn expects(&self, role: Role) -> bool {
        let all = self.all.read();
        all.iter()
            .any(|i| i.role().does(role) && i.health() == Health::Unknown)
    }

    /// Enters a request into the counters of an instance; `None` when its breaker has just closed the door.
    pub(crate) fn enter(&self, instance: &Arc<Instance>, role: Role, tokens: u64) -> Option<Leg> {
        let pass = instance.breaker.pass(Millis::now())?;
        instance.inflight[slot(role)].fetch_add(1, Ordering::SeqCst);
        let ahead = instance.tokens.fetch_add(tokens, Ordering::Relaxed);
        let leg = Leg {
            instance: instance.clone(),
            role,
            tokens,
            ahead,
            slower: Slower::default(),
            pass: Some(pass),
            is_out: false,
            freed: self.changed.clone(),
        };
        // Counted first: who empties the instance sees it, or it is seen here that it is being emptied.
        std::sync::atomic::fence(Ordering::SeqCst);
        (!instance.is_left()).then_some(leg)
    }

    /// Whether any instance lists `model`.
    pub(crate) fn knows_model(&self, model: &str) -> bool {
        let all = self.all.read();
        all.iter()
            .any(|i| i.models.read().iter().any(|m| m == model))
    }

    /// Sum of all counters: 0 when nothing is under way.
    pub(crate) fn inflight(&self) -> usize {
        self.all.read().iter().map(|i| i.inflight_all()).sum()
    }
}
