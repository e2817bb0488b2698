//! Puts: in two phases (start, end), or into an arena granted ahead.
//!
//! An unfinished put is not in the index: it blocks nobody, and of several writers of one key the first to end wins.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;

use super::eviction::Access;
use super::object::{Attributes, Group, Object, PutWith, Replica, Replicas};
use super::placement::candidates;
use super::segments::{Drop, FreeRange, SegmentState, SegmentsView};
use super::state::{MasterState, PENDING_SHARDS, add};
use crate::base::clock::Millis;
use crate::base::id::Id128;
use crate::store::model::error::StoreError;
use crate::store::model::header::{ALIGNMENT, footprint};
use crate::store::model::key;

/// Largest share of a segment that one arena may take, as a divisor.
const ARENA_SHARE: u64 = 32;
/// Largest arena.
const ARENA_BYTES_MAX: u64 = 64 << 20;
/// All arenas of a segment together leave this share of it alone, as a divisor.
const ARENAS_SHARE: u64 = 8;

/// What a put asks for.
#[derive(Clone, Debug, Default)]
pub(crate) struct PutOptions {
    pub(crate) replica_num: usize,
    pub(crate) attributes: Attributes,
    pub(crate) preferred: Vec<String>,
    pub(crate) host_id: String,
    /// With an upsert: only this version is replaced; 0 = whatever is there.
    pub(crate) if_version: u64,
}

/// What a put may take the place of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Replaces {
    /// Only what no reader could have.
    Nothing,
    /// Whatever is there.
    Anything,
    /// Just this version, and only as long as it is there.
    Version(u64),
}

impl Replaces {
    fn allows(self, version: u64, readable: bool) -> bool {
        match self {
            Self::Nothing => !readable,
            Self::Anything => true,
            Self::Version(wanted) => wanted == version,
        }
    }
}

/// A put between start and end.
#[derive(Clone, Debug)]
pub(crate) struct PendingPut {
    pub(crate) key: Box<[u8]>,
    pub(crate) size: u64,
    pub(crate) replicas: Replicas,
    pub(crate) attributes: Attributes,
    pub(crate) replaces: Replaces,
    pub(crate) client: Id128,
    pub(crate) started: Millis,
    /// Its end is being carried out; it stays here until it is in the index.
    pub(crate) ending: bool,
}

/// A range that one client fills with small objects.
#[derive(Debug)]
pub(crate) struct Arena {
    pub(crate) client: Id128,
    pub(crate) segment: u32,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) versions: std::ops::Range<u64>,
    /// Parts that are no longer the arena's to free: start → length.
    pub(crate) filled: BTreeMap<u64, u64>,
    /// Of those, parts whose commit was refused: version → replica and size. The writer says when its write has ended.
    pub(crate) refused: HashMap<u64, (Replica, u64)>,
    /// Of those, objects removed or evicted since: their writer may still be writing, so their ranges are free only with
    /// the arena.
    pub(crate) dead: Vec<(Replica, u64, u64)>,
    /// Being settled: takes no more commits.
    pub(crate) closed: bool,
    /// Its ranges have been given up.
    pub(crate) dissolved: bool,
    /// Commits under way: the index does not have their objects yet.
    pub(crate) committing: u32,
}

impl Arena {
    /// One that a node reports of an earlier term: closed from the start.
    pub(crate) fn of_earlier_term(
        client: Id128,
        at: Replica,
        length: u64,
        versions: std::ops::Range<u64>,
    ) -> Self {
        Self {
            client,
            segment: at.segment,
            offset: at.offset,
            length,
            versions,
            filled: BTreeMap::new(),
            refused: HashMap::new(),
            dead: Vec::new(),
            closed: true,
            dissolved: false,
            committing: 0,
        }
    }

    /// Whether a range lies within, aligned, and nothing was put there yet.
    fn is_free(&self, offset: u64, bytes: u64) -> bool {
        let Some(end) = offset.checked_add(bytes) else {
            return false;
        };
        let before = self.filled.range(..=offset).next_back();
        let after = self.filled.range(offset..).next();
        offset >= self.offset
            && end <= self.offset + self.length
            && offset.is_multiple_of(ALIGNMENT)
            && before.is_none_or(|(s, l)| s + l <= offset)
            && after.is_none_or(|(s, _)| end <= *s)
    }
}

/// What the master says of an object that was put.
#[derive(Clone, Debug)]
pub(crate) struct Written {
    pub(crate) version: u64,
    pub(crate) checksum: Option<u32>,
}

/// How much of what an arena may have is worth taking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Least {
    /// Half of it; more may be on its way.
    Half,
    /// Whatever is there.
    Anything,
}

impl MasterState {
    pub(crate) fn pending_shard(
        &self,
        version: u64,
    ) -> &Mutex<std::collections::HashMap<u64, PendingPut, foldhash::fast::FixedState>> {
        &self.pending[version as usize % PENDING_SHARDS]
    }

    /// Phase one: ranges on up to `replica_num` nodes. `partial` accepts fewer than could be had with more space.
    #[expect(clippy::too_many_arguments, reason = "the fields of a put, once")]
    pub(crate) fn put_start(
        &self,
        qualified: &[u8],
        size: u64,
        options: &PutOptions,
        upsert: bool,
        partial: bool,
        client: Id128,
        now: Millis,
    ) -> Result<(u64, Replicas), StoreError> {
        let invalid = |what: &str| StoreError::InvalidParams {
            what: what.to_owned(),
        };
        if size == 0 {
            return Err(invalid("an object has at least 1 byte"));
        }
        if options.replica_num == 0 || options.replica_num > 64 {
            return Err(invalid("replica_num is 1 to 64"));
        }
        let hash = key::hash(qualified);
        let view = self.segments.view();
        // What lies on lost nodes only is no reason to refuse: the reader could not have it.
        if !upsert && self.peek(hash, qualified, |o| Self::readable(&view, o)) == Some(true) {
            return Err(StoreError::Exists);
        }
        let largest_bytes = self.largest_segment();
        let wanted_bytes = footprint(size).unwrap_or(u64::MAX);
        if wanted_bytes > largest_bytes {
            if self.recovering(now) {
                return Err(StoreError::Rebuilding);
            }
            return Err(StoreError::TooLarge {
                wanted_bytes,
                largest_bytes,
            });
        }
        let (replicas, nodes) = self.place(wanted_bytes, options, now);
        if nodes == 0 {
            // Evicting would not help: no node in service takes anything.
            return Err(StoreError::SegmentNotFound);
        }
        let enough = options.replica_num.min(nodes);
        if replicas.is_empty() || (replicas.len() < enough && !partial) {
            self.release_now(&replicas, wanted_bytes);
            return Err(StoreError::NoSpace { wanted_bytes });
        }
        if replicas.len() < options.replica_num {
            add(&self.counters.partial_puts, 1);
        }
        let version = self.take_versions(1);
        let put = PendingPut {
            key: qualified.into(),
            size,
            replicas: replicas.clone(),
            attributes: Attributes {
                replicas: options.replica_num.min(usize::from(u8::MAX)) as u8,
                ..options.attributes.clone()
            },
            replaces: match (upsert, options.if_version) {
                (false, _) => Replaces::Nothing,
                (true, 0) => Replaces::Anything,
                (true, version) => Replaces::Version(version),
            },
            client,
            started: now,
            ending: false,
        };
        self.pending_shard(version).lock().insert(version, put);
        Ok((version, replicas))
    }

    /// Allocates on distinct nodes; also returns how many nodes there were to choose from.
    fn place(&self, bytes: u64, options: &PutOptions, now: Millis) -> (Replicas, usize) {
        let view = self.segments.view();
        let strategy = self.config.placement;
        let all = candidates(&view, strategy, &options.preferred, &options.host_id, now);
        let mut nodes: Vec<Id128> = all.iter().map(|s| s.node.id).collect();
        nodes.sort_unstable();
        nodes.dedup();
        let mut replicas = Replicas::new();
        let mut used = Vec::new();
        for segment in &all {
            if replicas.len() == options.replica_num {
                break;
            }
            if used.contains(&segment.node.id) {
                continue;
            }
            if let Some(offset) = segment.allocator.lock().allocate(bytes) {
                used.push(segment.node.id);
                replicas.push(Replica {
                    segment: segment.slot,
                    offset,
                });
            }
        }
        (replicas, nodes.len())
    }

    /// Frees ranges nobody was told of yet.
    fn release_now(&self, replicas: &Replicas, bytes: u64) {
        for r in replicas {
            if let Some(segment) = self.segments.get(r.segment) {
                segment.release(r.offset, bytes);
            }
        }
    }

    /// Has the nodes forget the ranges of an object that was in the index, and frees them afterwards; those in an arena
    /// only once the arena is given up: its commit says nothing about whether the bytes have arrived.
    pub(crate) fn dismiss_replicas(&self, replicas: &[Replica], size: u64, version: u64) {
        let parked = self.arena_of(version).is_some_and(|arena| {
            let mut arena = arena.lock();
            if !arena.dissolved {
                arena
                    .dead
                    .extend(replicas.iter().map(|r| (*r, size, version)));
            }
            !arena.dissolved
        });
        self.drop_ranges(replicas, size, version, !parked);
    }

    /// The arena that a version was issued for, while it is open or being settled.
    fn arena_of(&self, version: u64) -> Option<Arc<Mutex<Arena>>> {
        let arenas = self.arenas.lock();
        let (_, arena) = arenas.range(..=version).next_back()?;
        let contains = arena.lock().versions.contains(&version);
        contains.then(|| arena.clone())
    }

    /// Has the nodes forget ranges of an object, and frees them afterwards.
    pub(crate) fn drop_replicas(&self, replicas: &[Replica], size: u64, version: u64) {
        self.drop_ranges(replicas, size, version, true);
    }

    fn drop_ranges(&self, replicas: &[Replica], size: u64, version: u64, free: bool) {
        let length = footprint(size).unwrap_or(0);
        for r in replicas {
            if let Some(segment) = self.segments.get(r.segment) {
                let drop = Drop {
                    node_segment: segment.node_segment,
                    offset: r.offset,
                    version,
                    frees: free.then_some(FreeRange {
                        segment: r.segment,
                        offset: r.offset,
                        length,
                    }),
                };
                segment.node.drops.lock().push(drop);
                segment.node.wake();
            }
        }
    }

    /// Phase two: the replicas in `written` (bit per replica) are in place; the object becomes readable. Those in
    /// `unsettled` may still be written to by a request that got lost on its way. Returns whether another object was
    /// replaced: then the end is complete once [`MasterState::barrier`] is reached.
    pub(crate) fn put_end(
        &self,
        version: u64,
        checksum: Option<u32>,
        written: u64,
        unsettled: u64,
        now: Millis,
    ) -> Result<bool, StoreError> {
        let put = {
            let mut pending = self.pending_shard(version).lock();
            let put = pending.get_mut(&version).filter(|p| !p.ending);
            let put = put.ok_or(StoreError::InvalidWrite {
                what: "an unfinished put of this version",
            })?;
            put.ending = true;
            put.clone()
        };
        let done = self.end(put, version, checksum, written, unsettled, now);
        self.pending_shard(version).lock().remove(&version);
        done
    }

    fn end(
        &self,
        put: PendingPut,
        version: u64,
        checksum: Option<u32>,
        written: u64,
        unsettled: u64,
        now: Millis,
    ) -> Result<bool, StoreError> {
        let mut good = Replicas::new();
        for (i, replica) in put.replicas.iter().enumerate() {
            let bit = 1u64.checked_shl(i as u32).unwrap_or(0);
            if written & bit != 0 {
                good.push(*replica);
            } else {
                let settled = unsettled & bit == 0;
                self.discard(&[*replica], put.size, version, put.client, settled, now);
            }
        }
        if good.is_empty() {
            return Err(StoreError::InvalidWrite {
                what: "a put without any written replica",
            });
        }
        let written = Written { version, checksum };
        let replicas = good.clone();
        let done = self.complete(
            put.key,
            put.size,
            good,
            &put.attributes,
            &written,
            put.replaces,
            now,
        );
        if matches!(done, Err(StoreError::Exists | StoreError::NotFound)) {
            self.drop_replicas(&replicas, put.size, version);
        }
        done
    }

    /// Gives up ranges of an object that is not in the index: at once when the write to them is known to have ended,
    /// else once the node vouches that the writer can no longer reach them.
    pub(crate) fn discard(
        &self,
        replicas: &[Replica],
        size: u64,
        version: u64,
        client: Id128,
        settled: bool,
        now: Millis,
    ) {
        if settled {
            self.drop_replicas(replicas, size, version);
        } else {
            for r in replicas {
                self.quarantine(*r, footprint(size).unwrap_or(0), client, now);
            }
        }
    }

    /// Makes an object readable; returns whether it replaced another. `Exists`: the key is taken, and the ranges are the
    /// caller's to give up.
    #[expect(clippy::too_many_arguments, reason = "the parts of an object, once")]
    pub(crate) fn complete(
        &self,
        qualified: Box<[u8]>,
        size: u64,
        replicas: Replicas,
        attributes: &Attributes,
        written: &Written,
        replaces: Replaces,
        now: Millis,
    ) -> Result<bool, StoreError> {
        self.counters.value_bytes.observe(size);
        let hash = key::hash(&qualified);
        let object = self.object(qualified, hash, size, replicas, attributes, written, now);
        let mut shard = self.shard(hash);
        let view = self.segments.view();
        let mut object = object;
        // A node unmounted meanwhile takes its replica along; checked under the shard's lock, which the purge takes
        // after the segment has left the view.
        object.replicas.retain(|r| is_mounted(&view, *r));
        if object.replicas.is_empty() {
            drop(shard);
            self.forget(&object);
            return Err(StoreError::SegmentNotFound);
        }
        let taken = shard
            .get(hash, &object.key)
            .map(|o| (o.version, Self::readable(&view, o)));
        match taken {
            // The same put again, over another lane or after a restart of the master that has it from the node.
            Some((version, _)) if version == written.version => {
                drop(shard);
                self.forget(&object);
                Ok(false)
            }
            Some((version, readable)) if !replaces.allows(version, readable) => {
                drop(shard);
                self.forget(&object);
                Err(StoreError::Exists)
            }
            Some(_) => {
                let old = shard.remove(hash, &object.key);
                self.insert(&mut shard, &view, object, now);
                drop(shard);
                if let Some(old) = old {
                    self.gone(&view, &old);
                    self.dismiss_replicas(&old.replicas, old.size, old.version);
                    self.note_gone(hash);
                }
                add(&self.counters.puts, 1);
                Ok(true)
            }
            // What was removed meanwhile must not come back (D2).
            None if matches!(replaces, Replaces::Version(_)) => {
                drop(shard);
                self.forget(&object);
                Err(StoreError::NotFound)
            }
            None => {
                self.insert(&mut shard, &view, object, now);
                // A node that is away may hold an older object of this key.
                self.note_gone(hash);
                add(&self.counters.puts, 1);
                Ok(false)
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of an object, once")]
    pub(crate) fn object(
        &self,
        qualified: Box<[u8]>,
        hash: u64,
        size: u64,
        replicas: Replicas,
        attributes: &Attributes,
        written: &Written,
        now: Millis,
    ) -> Object {
        let ttl = attributes
            .soft_pin_ttl_ms
            .min(self.config.soft_pin_ttl_max.as_millis() as u64);
        Object {
            group: self.join_group(&qualified, hash, attributes),
            key: qualified,
            hash,
            size,
            version: written.version,
            lease_until: now,
            soft_pin_until: if ttl == 0 {
                Millis(0)
            } else {
                Millis(now.0 + ttl)
            },
            replicas,
            checksum: written.checksum.unwrap_or(0),
            put_with: PutWith::new(attributes.replicas, written.checksum.is_some()),
            hard_pin: attributes.hard_pin,
            read: false,
            data_type: attributes.data_type,
        }
    }

    pub(crate) fn insert(
        &self,
        shard: &mut super::shard::Shard,
        view: &SegmentsView,
        object: Object,
        now: Millis,
    ) {
        for r in &object.replicas {
            if let Some(segment) = mounted(view, *r) {
                segment.objects.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.objects.fetch_add(1, Ordering::Relaxed);
        if object.soft_pin_until > Millis(0) {
            add(&self.counters.soft_pinned, 1);
        }
        let access = Access {
            now,
            ..Access::default()
        };
        let (hash, version) = (object.hash, object.version);
        self.events.stored(&object);
        shard.insert(object, &access);
        if shard.len() == 1 {
            self.eviction_order.list(Self::shard_number(hash), version);
        }
    }

    /// Bookkeeping for an object that has left the index; its ranges are the caller's business.
    pub(crate) fn gone(&self, view: &SegmentsView, object: &Object) {
        for r in &object.replicas {
            if let Some(segment) = mounted(view, *r) {
                segment.objects.fetch_sub(1, Ordering::Relaxed);
            }
        }
        self.objects.fetch_sub(1, Ordering::Relaxed);
        if object.soft_pin_until > Millis(0) {
            self.counters.soft_pinned.fetch_sub(1, Ordering::Relaxed);
        }
        self.forget(object);
    }

    /// Leaves the group of an object that is not (or no longer) in the index.
    pub(crate) fn forget(&self, object: &Object) {
        let Some(group) = &object.group else { return };
        if object.hard_pin {
            group.hard_pins.fetch_sub(1, Ordering::Relaxed);
        }
        let mut groups = self.groups.lock();
        let mut members = group.members.lock();
        if let Some(count) = members.get_mut(&object.hash) {
            *count -= 1;
            if *count == 0 {
                members.remove(&object.hash);
            }
        }
        if members.is_empty()
            && groups
                .get(&group.name)
                .is_some_and(|g| Arc::ptr_eq(g, group))
        {
            groups.remove(&group.name);
        }
    }

    fn join_group(
        &self,
        qualified: &[u8],
        hash: u64,
        attributes: &Attributes,
    ) -> Option<Arc<Group>> {
        if attributes.group.is_empty() {
            return None;
        }
        let tenant_length = usize::from(*qualified.first()?) + 1;
        let mut name = qualified.get(..tenant_length)?.to_vec();
        name.extend_from_slice(attributes.group.as_bytes());
        let mut groups = self.groups.lock();
        let group = match groups.entry(name.into_boxed_slice()) {
            Entry::Occupied(found) => found.get().clone(),
            Entry::Vacant(vacant) => {
                let group = Arc::new(Group {
                    name: vacant.key().clone(),
                    ..Group::default()
                });
                vacant.insert(group).clone()
            }
        };
        *group.members.lock().entry(hash).or_default() += 1;
        if attributes.hard_pin {
            group.hard_pins.fetch_add(1, Ordering::Relaxed);
        }
        Some(group)
    }

    /// Gives up a put; see [`MasterState::discard`].
    pub(crate) fn put_revoke(
        &self,
        version: u64,
        settled: bool,
        now: Millis,
    ) -> Result<(), StoreError> {
        let put = {
            let mut pending = self.pending_shard(version).lock();
            let ending = pending.get(&version).is_none_or(|p| p.ending);
            if ending {
                None
            } else {
                pending.remove(&version)
            }
        };
        let put = put.ok_or(StoreError::InvalidWrite {
            what: "an unfinished put of this version",
        })?;
        self.discard(&put.replicas, put.size, version, put.client, settled, now);
        Ok(())
    }

    /// Grants a client a range of one segment to fill without asking again: `wanted` bytes or as much as an arena may have,
    /// or what there is, when that is `least` or more.
    ///
    /// # Errors
    /// `NoSpace` when no free range is large enough; others when room would not help.
    pub(crate) fn arena_open(
        &self,
        slot: u32,
        incarnation: u64,
        wanted: u64,
        least: Least,
        client: Id128,
    ) -> Result<(u64, Replica, u64, std::ops::Range<u64>), StoreError> {
        let segment = self
            .segments
            .get(slot)
            .filter(|s| s.incarnation == incarnation && s.placeable())
            .ok_or(StoreError::SegmentNotFound)?;
        let length =
            wanted.min(ARENA_BYTES_MAX).min(segment.size / ARENA_SHARE) / ALIGNMENT * ALIGNMENT;
        // What may be asked for, not what was: it decides how much is evicted.
        let no_space = StoreError::NoSpace {
            wanted_bytes: length,
        };
        let mut allocator = segment.allocator.lock();
        let least = match least {
            Least::Half => length / 2,
            Least::Anything => 0,
        };
        let least = least.max(4 * ALIGNMENT);
        let length = length.min(allocator.largest_free());
        if length < least {
            return Err(no_space);
        }
        let granted = segment.arena_bytes.load(Ordering::Relaxed);
        if granted + length > segment.size / ARENAS_SHARE {
            let what = "the segment has as many arenas as it may".to_owned();
            return Err(StoreError::InvalidParams { what });
        }
        let offset = allocator.allocate(length).ok_or(no_space)?;
        drop(allocator);
        segment.arena_bytes.fetch_add(length, Ordering::Relaxed);
        let count = length / (2 * ALIGNMENT);
        let first = self.take_versions(count);
        // Named by its first version: no later master will give that name to another arena.
        let id = first;
        let arena = Arena {
            client,
            segment: slot,
            offset,
            length,
            versions: first..first + count,
            filled: BTreeMap::new(),
            refused: HashMap::new(),
            dead: Vec::new(),
            closed: false,
            dissolved: false,
            committing: 0,
        };
        self.arenas.lock().insert(id, Arc::new(Mutex::new(arena)));
        let replica = Replica {
            segment: slot,
            offset,
        };
        Ok((id, replica, length, first..first + count))
    }

    /// Makes a part of an arena an object.
    #[expect(
        clippy::too_many_arguments,
        reason = "the fields of an arena item, once"
    )]
    pub(crate) fn arena_commit(
        &self,
        arena_id: u64,
        client: Id128,
        qualified: &[u8],
        offset: u64,
        size: u64,
        attributes: &Attributes,
        written: &Written,
        now: Millis,
    ) -> Result<(), StoreError> {
        let unknown = StoreError::InvalidWrite { what: "this arena" };
        let arena = self
            .arenas
            .lock()
            .get(&arena_id)
            .cloned()
            .ok_or(unknown.clone())?;
        let bytes = footprint(size)
            .filter(|_| size > 0)
            .ok_or(StoreError::InvalidParams {
                what: "size of an arena item".to_owned(),
            })?;
        let shared = arena;
        let segment = {
            let mut arena = shared.lock();
            if arena.closed || arena.client != client || !arena.versions.contains(&written.version)
            {
                return Err(unknown);
            }
            if arena.filled.contains_key(&offset) {
                // The same commit again, over another lane.
                drop(arena);
                return self.committed_before(&shared, qualified, written.version);
            }
            if !arena.is_free(offset, bytes) {
                return Err(StoreError::InvalidParams {
                    what: "range of an arena item".to_owned(),
                });
            }
            arena.filled.insert(offset, bytes);
            arena.committing += 1;
            arena.segment
        };
        if let Some(state) = self.segments.get(segment) {
            state.arena_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
        let replica = Replica { segment, offset };
        let replicas: Replicas = [replica].into_iter().collect();
        let done = self.complete(
            qualified.into(),
            size,
            replicas,
            attributes,
            written,
            Replaces::Nothing,
            now,
        );
        let mut arena = shared.lock();
        arena.committing -= 1;
        if done == Err(StoreError::Exists) {
            // The writer may still be writing: it takes the item back when it has ended.
            arena.refused.insert(written.version, (replica, size));
        }
        done.map(|_| ())
    }

    /// What a commit that was carried out before came to.
    fn committed_before(
        &self,
        arena: &Mutex<Arena>,
        qualified: &[u8],
        version: u64,
    ) -> Result<(), StoreError> {
        if arena.lock().refused.contains_key(&version) {
            return Err(StoreError::Exists);
        }
        let is_it = |o: &Object| o.version == version;
        match self.peek(key::hash(qualified), qualified, is_it) {
            Some(true) => Ok(()),
            _ => Err(StoreError::InvalidWrite {
                what: "an item committed before, and gone since",
            }),
        }
    }

    /// Takes back an item: its commit was refused, or its data did not arrive. See [`MasterState::discard`].
    #[expect(
        clippy::too_many_arguments,
        reason = "the fields of an arena item, once"
    )]
    pub(crate) fn arena_revoke(
        &self,
        arena_id: u64,
        client: Id128,
        qualified: &[u8],
        offset: u64,
        size: u64,
        version: u64,
        settled: bool,
        now: Millis,
    ) -> Result<(), StoreError> {
        let unknown = StoreError::InvalidWrite { what: "this arena" };
        let shared = self
            .arenas
            .lock()
            .get(&arena_id)
            .cloned()
            .ok_or(unknown.clone())?;
        let mut arena = shared.lock();
        if arena.closed || arena.client != client || !arena.versions.contains(&version) {
            return Err(unknown);
        }
        if let Some((replica, size)) = arena.refused.remove(&version) {
            self.give_up(arena, &[replica], size, version, settled, now);
        } else if arena.filled.contains_key(&offset) {
            let dead = arena.dead.iter().position(|(_, _, v)| *v == version);
            let dead = dead.map(|at| arena.dead.swap_remove(at));
            if let Some((replica, size, _)) = dead {
                self.give_up(arena, &[replica], size, version, settled, now);
            } else {
                // Not under the arena's lock: the index comes first.
                drop(arena);
                if let Some(object) = self.take_version(qualified, version) {
                    let arena = shared.lock();
                    let replicas = &object.replicas;
                    self.give_up(arena, replicas, object.size, version, settled, now);
                }
            }
        } else if let Some(bytes) = footprint(size).filter(|b| arena.is_free(offset, *b)) {
            // The commit never came: keep the range from being freed with the arena's gaps.
            arena.filled.insert(offset, bytes);
            let replica = Replica {
                segment: arena.segment,
                offset,
            };
            if let Some(state) = self.segments.get(arena.segment) {
                state.arena_bytes.fetch_sub(bytes, Ordering::Relaxed);
            }
            self.give_up(arena, &[replica], size, version, settled, now);
        }
        Ok(())
    }

    /// Gives up ranges of an arena. Settled ones are free only with the arena: nobody else is given a part of one that is
    /// being filled.
    fn give_up(
        &self,
        mut arena: parking_lot::MutexGuard<'_, Arena>,
        replicas: &[Replica],
        size: u64,
        version: u64,
        settled: bool,
        now: Millis,
    ) {
        let client = arena.client;
        let parked = settled && !arena.dissolved;
        if parked {
            arena
                .dead
                .extend(replicas.iter().map(|r| (*r, size, version)));
        }
        drop(arena);
        if parked {
            self.drop_ranges(replicas, size, version, false);
        } else {
            self.discard(replicas, size, version, client, settled, now);
        }
    }

    /// The client promises to write no more: what it did not fill is freed, `unsettled` only once the node has settled it.
    pub(crate) fn arena_close(
        &self,
        arena_id: u64,
        client: Id128,
        unsettled: bool,
        now: Millis,
    ) -> Result<(), StoreError> {
        let unknown = StoreError::InvalidWrite { what: "this arena" };
        let arena = self
            .arenas
            .lock()
            .get(&arena_id)
            .cloned()
            .ok_or(unknown.clone())?;
        {
            let mut arena = arena.lock();
            if arena.client != client || arena.closed {
                return Err(unknown);
            }
            arena.closed = true;
        }
        if unsettled {
            self.settle_arena(arena_id, now);
        } else {
            self.arena_dissolve(arena_id);
        }
        Ok(())
    }

    /// Frees the gaps of a closed arena and forgets it.
    pub(crate) fn arena_dissolve(&self, arena_id: u64) {
        let Some(arena) = self.arenas.lock().remove(&arena_id) else {
            return;
        };
        let mut arena = arena.lock();
        arena.dissolved = true;
        let Some(segment) = self.segments.get(arena.segment) else {
            return;
        };
        // Asked for once more: a record that came after the first drop must not stay.
        for (replica, size, version) in std::mem::take(&mut arena.dead) {
            self.drop_replicas(&[replica], size, version);
        }
        let mut at = arena.offset;
        let mut gaps = Vec::new();
        for (start, length) in &arena.filled {
            gaps.push((at, start - at));
            at = start + length;
        }
        gaps.push((at, arena.offset + arena.length - at));
        let refused = arena.refused.values();
        let refused = refused.map(|(r, size)| (r.offset, footprint(*size).unwrap_or(0)));
        for (offset, length) in refused {
            segment.release(offset, length);
        }
        for (offset, length) in gaps.into_iter().filter(|(_, length)| *length > 0) {
            segment.release(offset, length);
            segment.arena_bytes.fetch_sub(length, Ordering::Relaxed);
        }
        self.progress.advance();
    }
}

pub(crate) fn mounted(view: &SegmentsView, replica: Replica) -> Option<&Arc<SegmentState>> {
    view.get(replica.segment as usize)?.as_ref()
}

fn is_mounted(view: &SegmentsView, replica: Replica) -> bool {
    mounted(view, replica).is_some()
}
