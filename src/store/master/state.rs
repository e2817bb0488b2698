//! The master's state: the index of objects, and every decision about them.
//!
//! Plain synchronous code: time is an argument, nothing here does I/O or waits. The service drives it, and so do the
//! property tests. Operations live beside it by subject: `puts` (puts and arenas), `removal` (eviction, removal),
//! `rebuild` (nodes coming and going).
//!
//! Lock order: a shard, then a group, then a segment's allocator or a node's queue. Never two shards at once.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use foldhash::fast::FixedState;
use parking_lot::{Condvar, Mutex, MutexGuard, ReentrantMutex};

use super::arenas::Arena;
use super::config::MasterConfig;
use super::copies::Copies;
use super::drain::Drains;
use super::events::EventRing;
use super::eviction::Access;
use super::eviction::order::EvictionOrder;
use super::history::History;
use super::object::{Group, Object};
use super::puts::PendingPut;
use super::quotas::Quotas;
use super::rebuild::Departed;
use super::reconcile::ReconcileJob;
use super::segments::{SegmentTable, SegmentsView};
use super::shard::Shard;
use crate::base::clock::{Millis, unix_ms};
use crate::base::histogram::Histogram;
use crate::base::id::Id128;
use crate::base::prefetch::prefetch;
use crate::store::model::error::StoreError;

/// Shards of the index; a power of two. Many, so that whatever holds one lock is short.
const SHARDS: usize = 1024;
/// Shards of the table of unfinished puts.
pub(crate) const PENDING_SHARDS: usize = 64;

/// Why puts got no place, as metrics name it.
pub(crate) const PUT_FAILURES: [&str; 5] =
    ["no_space", "too_large", "no_node", "rebuilding", "other"];

/// Counters, for metrics and the overview.
#[derive(Debug)]
pub(crate) struct Counters {
    pub(crate) hits: AtomicU64,
    pub(crate) misses: AtomicU64,
    pub(crate) puts: AtomicU64,
    pub(crate) put_failures: AtomicU64,
    /// The same by reason, in the order of [`PUT_FAILURES`].
    pub(crate) put_failures_by: [AtomicU64; PUT_FAILURES.len()],
    pub(crate) removed: AtomicU64,
    /// Objects that went with the last node they lay on.
    pub(crate) lost_objects: AtomicU64,
    pub(crate) evicted_objects: AtomicU64,
    pub(crate) evicted_bytes: AtomicU64,
    pub(crate) eviction_rounds: AtomicU64,
    pub(crate) eviction_hold_max_ns: AtomicU64,
    /// Rounds that evicted something.
    pub(crate) evictions_useful: AtomicU64,
    /// Evicted objects that nobody had read.
    pub(crate) evicted_unread: AtomicU64,
    /// Objects with a soft pin, also one that has run out.
    pub(crate) soft_pinned: AtomicU64,
    /// Puts that got fewer replicas than they asked for.
    pub(crate) partial_puts: AtomicU64,
    /// Unfinished puts that were reclaimed.
    pub(crate) released_puts: AtomicU64,
    pub(crate) mounts: AtomicU64,
    pub(crate) remounts: AtomicU64,
    pub(crate) unmounts: AtomicU64,
    /// Heartbeats of nodes.
    pub(crate) pings: AtomicU64,
    /// Sizes of completed objects.
    pub(crate) value_bytes: Histogram,
    /// Time since the last read of what is read again.
    pub(crate) lease_age_ms: Histogram,
    /// Time since the last read (or the store) of what is evicted.
    pub(crate) eviction_age_ms: Histogram,
}

/// Upstream's bounds.
static VALUE_BYTES: &[u64] = &[
    4096, 65_536, 262_144, 1_048_576, 4_194_304, 16_777_216, 67_108_864,
];
/// 10 ms to a day.
static AGES_MS: &[u64] = &[
    10, 100, 1_000, 5_000, 10_000, 30_000, 60_000, 300_000, 900_000, 3_600_000, 14_400_000,
    86_400_000,
];

impl Default for Counters {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            hits: zero(),
            misses: zero(),
            puts: zero(),
            put_failures: zero(),
            put_failures_by: PUT_FAILURES.map(|_| zero()),
            removed: zero(),
            lost_objects: zero(),
            evicted_objects: zero(),
            evicted_bytes: zero(),
            eviction_rounds: zero(),
            eviction_hold_max_ns: zero(),
            evictions_useful: zero(),
            evicted_unread: zero(),
            soft_pinned: zero(),
            partial_puts: zero(),
            released_puts: zero(),
            mounts: zero(),
            remounts: zero(),
            unmounts: zero(),
            pings: zero(),
            value_bytes: Histogram::new(VALUE_BYTES),
            lease_age_ms: Histogram::new(AGES_MS),
            eviction_age_ms: Histogram::new(AGES_MS),
        }
    }
}

impl Counters {
    /// A put got no place.
    pub(crate) fn put_failed(&self, error: &StoreError) {
        let reason = match error {
            StoreError::NoSpace { .. } => 0,
            StoreError::TooLarge { .. } => 1,
            StoreError::SegmentNotFound => 2,
            StoreError::Rebuilding => 3,
            _ => 4,
        };
        add(&self.put_failures, 1);
        add(&self.put_failures_by[reason], 1);
    }
}

pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// The answer to "is it there".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    Absent = 0,
    Readable = 1,
    /// Not found, but the index is still being rebuilt.
    Unknown = 2,
}

/// Woken whenever nodes have acknowledged drops: space was freed, removals are complete.
#[derive(Default)]
pub(crate) struct Progress {
    pub(crate) count: Mutex<u64>,
    pub(crate) changed: Condvar,
}

impl Progress {
    pub(crate) fn advance(&self) {
        *self.count.lock() += 1;
        self.changed.notify_all();
    }
}

/// Tells the sweeper that there is something to do before its next round.
#[derive(Debug, Default)]
pub(crate) struct Nudge {
    given: Mutex<bool>,
    came: Condvar,
}

impl Nudge {
    pub(crate) fn give(&self) {
        *self.given.lock() = true;
        self.came.notify_one();
    }

    /// Waits for one, until `deadline`; whether one came.
    pub(crate) fn wait_until(&self, deadline: Instant) -> bool {
        let mut given = self.given.lock();
        while !*given {
            if self.came.wait_until(&mut given, deadline).timed_out() {
                break;
            }
        }
        std::mem::take(&mut *given)
    }
}

/// See the module header.
pub(crate) struct MasterState {
    pub(crate) config: MasterConfig,
    shards: Box<[Mutex<Shard>]>,
    pub(crate) segments: SegmentTable,
    pub(crate) pending: Box<[Mutex<HashMap<u64, PendingPut, FixedState>>]>,
    /// By id, which is the first of its versions.
    pub(crate) arenas: Mutex<BTreeMap<u64, Arc<Mutex<Arena>>>>,
    pub(crate) groups: Mutex<HashMap<Box<[u8]>, Arc<Group>>>,
    pub(crate) reconciles: Mutex<HashMap<u64, ReconcileJob>>,
    /// Nodes unmounted by this master that may return.
    pub(crate) departed: Mutex<HashMap<Id128, Departed>>,
    pub(crate) any_departed: AtomicBool,
    /// Held while a node joins, is lost or leaves: its phase and what hangs on it change together.
    pub(crate) lifecycle: ReentrantMutex<()>,
    pub(crate) next_id: AtomicU64,
    versions: AtomicU64,
    term: AtomicU64,
    pub(crate) objects: AtomicU64,
    pub(crate) rebuilding: AtomicUsize,
    pub(crate) recovery_until: Millis,
    pub(crate) copies: Copies,
    pub(crate) drains: Drains,
    pub(crate) quotas: Quotas,
    pub(crate) history: History,
    pub(crate) eviction_order: EvictionOrder,
    pub(crate) counters: Counters,
    pub(crate) events: EventRing,
    pub(crate) progress: Progress,
    pub(crate) nudge: Arc<Nudge>,
}

impl MasterState {
    pub(crate) fn new(config: MasterConfig, now: Millis) -> Self {
        let policy = config.policy;
        let recovery_until = now.plus(config.recovery_grace);
        Self {
            shards: (0..SHARDS)
                .map(|_| Mutex::new(Shard::new(policy)))
                .collect(),
            segments: SegmentTable::new(unix_ms() * 1000),
            pending: (0..PENDING_SHARDS).map(|_| Mutex::default()).collect(),
            arenas: Mutex::default(),
            groups: Mutex::default(),
            reconciles: Mutex::default(),
            departed: Mutex::default(),
            any_departed: AtomicBool::new(false),
            lifecycle: ReentrantMutex::new(()),
            next_id: AtomicU64::new(1),
            // Later masters issue larger versions and terms: both begin at the wall clock, and what nodes report
            // corrects a clock that went back. 1024 versions a microsecond cannot be outrun.
            versions: AtomicU64::new((unix_ms() * 1000) << 10),
            term: AtomicU64::new(unix_ms()),
            objects: AtomicU64::new(0),
            rebuilding: AtomicUsize::new(0),
            recovery_until,
            copies: Copies::default(),
            drains: Drains::default(),
            quotas: Quotas::default(),
            history: History::default(),
            eviction_order: EvictionOrder::default(),
            counters: Counters::default(),
            events: EventRing::new(config.events_max),
            progress: Progress::default(),
            nudge: Arc::default(),
            config,
        }
    }

    pub(crate) fn shard(&self, hash: u64) -> MutexGuard<'_, Shard> {
        // The table uses the upper half of the hash.
        self.shards[hash as usize % SHARDS].lock()
    }

    /// Asks for everything that looking up these hashes will touch. Each step touches what the one before it asked for,
    /// so that a batch waits for memory a few times instead of once per key and line.
    pub(crate) fn prefetch(&self, hashes: &[u64]) {
        for hash in hashes {
            prefetch(&raw const self.shards[*hash as usize % SHARDS]);
        }
        for hash in hashes {
            self.shard(*hash).prefetch_entry(*hash);
        }
        for hash in hashes {
            self.shard(*hash).prefetch_object(*hash);
        }
        for hash in hashes {
            self.shard(*hash).prefetch_key(*hash);
        }
    }

    pub(crate) fn shards(&self) -> impl Iterator<Item = &Mutex<Shard>> {
        self.shards.iter()
    }

    pub(crate) fn shard_at(&self, index: usize) -> MutexGuard<'_, Shard> {
        self.shards[index % SHARDS].lock()
    }

    /// Which shard a hash belongs to.
    pub(crate) fn shard_number(hash: u64) -> u16 {
        (hash as usize % SHARDS) as u16
    }

    /// A block of fresh versions; the first of `count`.
    pub(crate) fn take_versions(&self, count: u64) -> u64 {
        self.versions.fetch_add(count, Ordering::Relaxed)
    }

    /// The version that would be issued next.
    pub(crate) fn next_version(&self) -> u64 {
        self.versions.load(Ordering::Relaxed)
    }

    /// Versions issued from now on are larger than `version`.
    pub(crate) fn raise_versions(&self, version: u64) {
        self.versions
            .fetch_max(version.saturating_add(1), Ordering::Relaxed);
    }

    pub(crate) fn term(&self) -> u64 {
        self.term.load(Ordering::Acquire)
    }

    pub(crate) fn raise_term(&self, above: u64) {
        self.term
            .fetch_max(above.saturating_add(1), Ordering::AcqRel);
    }

    /// Whether absence cannot be told yet.
    pub(crate) fn recovering(&self, now: Millis) -> bool {
        now < self.recovery_until || self.rebuilding.load(Ordering::Acquire) > 0
    }

    pub(crate) fn absence(&self, now: Millis) -> Presence {
        if self.recovering(now) {
            Presence::Unknown
        } else {
            Presence::Absent
        }
    }

    pub(crate) fn readable(view: &SegmentsView, object: &Object) -> bool {
        object.replicas.iter().any(|r| {
            view.get(r.segment as usize)
                .and_then(Option::as_ref)
                .is_some_and(|s| s.node.readable())
        })
    }

    fn lease(object: &mut Object, until: Millis) {
        object.lease_until = object.lease_until.max(until);
        object.read = true;
        if let Some(group) = &object.group {
            group.lease_until.fetch_max(until.0, Ordering::Relaxed);
        }
    }

    /// When an object was last read; when it was stored, if nobody has read it.
    pub(crate) fn last_read(&self, object: &Object) -> Millis {
        let ttl = if object.read {
            self.config.lease_ttl.as_millis() as u64
        } else {
            0
        };
        Millis(object.lease_until.0.saturating_sub(ttl))
    }

    /// Whether a readable replica exists; grants a lease.
    pub(crate) fn exist(
        &self,
        view: &SegmentsView,
        hash: u64,
        key: &[u8],
        access: &Access,
    ) -> Presence {
        let until = access.now.plus(self.config.lease_ttl);
        let mut shard = self.shard(hash);
        match shard.hit(hash, key, access) {
            Some(object) if Self::readable(view, object) => {
                Self::lease(object, until);
                Presence::Readable
            }
            _ => self.absence(access.now),
        }
    }

    /// Calls `found` with the object, leased; `None` when there is no readable replica.
    pub(crate) fn locate<T>(
        &self,
        view: &SegmentsView,
        hash: u64,
        key: &[u8],
        access: &Access,
        found: impl FnOnce(&Object) -> T,
    ) -> Option<T> {
        let until = access.now.plus(self.config.lease_ttl);
        let mut shard = self.shard(hash);
        let object = shard.hit(hash, key, access)?;
        if !Self::readable(view, object) {
            return None;
        }
        if object.read {
            let age = access.now.since(self.last_read(object));
            self.counters.lease_age_ms.observe(age);
        }
        Self::lease(object, until);
        Some(found(object))
    }

    /// Calls `found` with the object without any effect on it.
    pub(crate) fn peek<T>(
        &self,
        hash: u64,
        key: &[u8],
        found: impl FnOnce(&Object) -> T,
    ) -> Option<T> {
        self.shard(hash).get(hash, key).map(found)
    }

    /// `(capacity, used)` bytes of all mounted segments.
    pub(crate) fn capacity(&self) -> (u64, u64) {
        let view = self.segments.view();
        view.iter().flatten().fold((0, 0), |(capacity, used), s| {
            let allocator = s.allocator.lock();
            (capacity + allocator.size(), used + allocator.used())
        })
    }

    /// Bytes of ranges that are settled with their nodes before they are free.
    pub(crate) fn unsettled_bytes(&self) -> u64 {
        self.reconciles.lock().values().map(|j| j.length).sum()
    }

    /// Bytes of the largest mounted segment.
    pub(crate) fn largest_segment(&self) -> u64 {
        let view = self.segments.view();
        view.iter().flatten().map(|s| s.size).max().unwrap_or(0)
    }

    /// Heap bytes of the index, counted by walking it.
    pub(crate) fn metadata_bytes(&self) -> u64 {
        self.shards
            .iter()
            .map(|s| s.lock().heap_bytes() as u64)
            .sum()
    }

    /// A page of objects in no particular order: everything that stays in the index during the walk is seen. Returns
    /// the next cursor, 0 at the end.
    pub(crate) fn walk(
        &self,
        cursor: u64,
        limit: usize,
        mut visit: impl FnMut(&Object) -> bool,
    ) -> u64 {
        const STEP: usize = 512;
        let (mut shard, mut slot) = ((cursor >> 32) as usize, (cursor & 0xFFFF_FFFF) as usize);
        let mut taken = 0;
        while shard < SHARDS {
            let locked = self.shards[shard].lock();
            let (objects, next) = locked.page(slot, STEP);
            for object in objects {
                if visit(object) {
                    taken += 1;
                }
            }
            match next {
                Some(next) => slot = next,
                None => {
                    shard += 1;
                    slot = 0;
                }
            }
            if taken >= limit && shard < SHARDS {
                return (shard as u64) << 32 | slot as u64;
            }
        }
        0
    }

    /// The bound on how long an operation may wait: the caller's wish within reason, else the default.
    pub(crate) fn patience(&self, deadline_ms: u32) -> Duration {
        match deadline_ms {
            0 => self.config.put_wait,
            ms => Duration::from_millis(u64::from(ms)).min(Duration::from_secs(60)),
        }
    }
}
