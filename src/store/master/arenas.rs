//! Arenas: ranges granted ahead, which one client fills with small objects.
//!
//! Owns what lies where in an arena and when its parts are free: nobody else is given any of it while its writer may
//! still be writing.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;

use super::object::{Attributes, Object, Replica, Replicas};
use super::puts::{Replaces, Written};
use super::state::MasterState;
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
/// There is no such arena, or it is not this client's, or it takes nothing more.
const UNKNOWN: StoreError = StoreError::InvalidWrite { what: "this arena" };

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

    /// Whether this client may still commit to it.
    fn is_open_for(&self, client: Id128) -> bool {
        !self.closed && self.client == client
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

/// How much of what an arena may have is worth taking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Least {
    /// Half of it; more may be on its way.
    Half,
    /// Whatever is there.
    Anything,
}

impl MasterState {
    fn arena(&self, id: u64) -> Result<Arc<Mutex<Arena>>, StoreError> {
        self.arenas.lock().get(&id).cloned().ok_or(UNKNOWN)
    }

    /// The arena that a version was issued for, while it is open or being settled.
    pub(crate) fn arena_of(&self, version: u64) -> Option<Arc<Mutex<Arena>>> {
        let arenas = self.arenas.lock();
        let (_, arena) = arenas.range(..=version).next_back()?;
        let contains = arena.lock().versions.contains(&version);
        contains.then(|| arena.clone())
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
        let shared = self.arena(arena_id)?;
        let bytes = footprint(size)
            .filter(|_| size > 0)
            .ok_or(StoreError::InvalidParams {
                what: "size of an arena item".to_owned(),
            })?;
        // A repeated commit asks as well: it is let in or refused as if it were new, and changes nothing.
        let _reserved = self.admit(qualified, bytes, now)?;
        let segment = {
            let mut arena = shared.lock();
            if !arena.is_open_for(client) || !arena.versions.contains(&written.version) {
                return Err(UNKNOWN);
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
        let shared = self.arena(arena_id)?;
        let mut arena = shared.lock();
        if !arena.is_open_for(client) || !arena.versions.contains(&version) {
            return Err(UNKNOWN);
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
                if let Some(object) = self.take_version(qualified, version, |_| true) {
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
        let shared = self.arena(arena_id)?;
        {
            let mut arena = shared.lock();
            if !arena.is_open_for(client) {
                return Err(UNKNOWN);
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

    /// Closes the arenas of segments that take nothing new; each is settled with its node. Their clients put elsewhere.
    pub(crate) fn close_arenas(&self, slots: &[u32], now: Millis) {
        let mut closed = Vec::new();
        for (id, arena) in self.arenas.lock().iter() {
            let mut arena = arena.lock();
            if slots.contains(&arena.segment) && !arena.closed {
                arena.closed = true;
                closed.push(*id);
            }
        }
        for id in closed {
            self.settle_arena(id, now);
        }
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
