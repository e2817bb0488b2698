//! Ranges granted ahead, one per segment, from which puts take their place without asking the master.
//!
//! Owns the bump allocation and the rule when an arena may be given back: nobody writes into it any more. An arena in
//! memory that is mapped here is filled without its node: objects are entered in its table (`store::arena_table`).

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::base::id::Id128;
use crate::engine::grant::Grant;
use crate::store::arena_table::{ArenaTable, CONTROL_BYTES};
use crate::store::client::view::SegmentRef;
use crate::store::model::header::{footprint, pending};

/// Room for a record and the table's end in an arena for a single object.
const TABLE_BYTES: u64 = 20 << 10;
/// An arena is replaced after this, well before its grant ends.
const LIFETIME: Duration = Duration::from_secs(300);
/// What is asked for first; doubled each time one was used up.
const FIRST_BYTES: u64 = 1 << 20;

/// The most that is asked for, and the largest share of it that one object may take; a larger one goes in two phases.
#[derive(Clone, Copy, Debug)]
struct Limits {
    most_bytes: u64,
    object_share: u64,
}

/// Mapped memory is filled at memory speed, and opening an arena costs two exchanges.
const NEAR: Limits = Limits {
    most_bytes: 64 << 20,
    object_share: 3,
};
/// Over the network large objects gain nothing from an arena.
const FAR: Limits = Limits {
    most_bytes: 16 << 20,
    object_share: 8,
};
/// After the master granted none, it is left alone for this long.
const REST: Duration = Duration::from_millis(500);

/// An arena being filled.
#[derive(Debug)]
pub(crate) struct Arena {
    pub(crate) id: u64,
    pub(crate) segment: Arc<SegmentRef>,
    pub(crate) grant: Grant,
    cursor: u64,
    next_version: u64,
    versions_end: u64,
    opened: Instant,
    /// Puts into it under way.
    writers: Arc<AtomicUsize>,
    /// Its table, when its memory is mapped here.
    pub(crate) table: Option<Arc<ArenaTable>>,
}

/// A place for one object. Counts as a writer until dropped.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) arena: u64,
    pub(crate) segment: Arc<SegmentRef>,
    pub(crate) grant: Grant,
    pub(crate) offset: u64,
    pub(crate) version: u64,
    /// Set when the object is entered there already and only its bytes are missing.
    pub(crate) table: Option<Arc<ArenaTable>>,
    writers: Arc<AtomicUsize>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.writers.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Arenas of one client.
#[derive(Default)]
pub(crate) struct Arenas {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    open: HashMap<u32, Arena>,
    /// Used up or too old; given back once nobody writes into them.
    retired: Vec<Arena>,
    /// Given up: left once nobody writes into them, so that their node can settle them.
    lost: Vec<Arena>,
    /// Of those, the ones that are left: the master is still to be told.
    left: Vec<u64>,
    /// Ended at their nodes, or not (true: unsettled); the master is told with the next batch.
    ended: Vec<(u64, bool)>,
    wanted: HashMap<u32, u64>,
    /// What the master granted, and when, where that was less than asked for.
    caps: HashMap<u32, (u64, Instant)>,
    resting: HashMap<u32, Instant>,
}

/// What became of a wish for a place.
pub(crate) enum Wish {
    Granted(Place),
    /// An arena of this many bytes has to be opened first.
    Open(u64),
    /// Not by arena: too large, or the master grants none.
    No,
}

/// What is to be stored: how its place is entered in a table.
pub(crate) struct Wanted<'a> {
    /// Payload bytes.
    pub(crate) size: u64,
    /// The header without its word.
    pub(crate) header: &'a [u8],
    /// The directory entry for a place.
    pub(crate) entry: &'a dyn Fn(u64, u64) -> Vec<u8>,
    /// Whether the segment's memory can be mapped here.
    pub(crate) near: bool,
}

impl Arena {
    fn is_fresh(&self, segment: &SegmentRef) -> bool {
        self.opened.elapsed() < LIFETIME
            && self.grant.incarnation == segment.incarnation
            && self.table.as_ref().is_none_or(|t| t.is_open())
    }

    /// Takes the next `bytes`; in a table's memory with header and record. None when it is used up.
    fn take(&mut self, bytes: u64, wanted: &Wanted<'_>) -> Option<Place> {
        let (offset, version) = (self.cursor, self.next_version);
        let end = offset + bytes;
        if end > self.grant.offset + self.grant.length || version >= self.versions_end {
            return None;
        }
        if let Some(table) = &self.table {
            let record = (wanted.entry)(offset, version);
            let memory = table.memory();
            let header = memory.range(offset, wanted.header.len() as u64)?;
            if end + ArenaTable::record_bytes(record.len()) > table.low() {
                return None;
            }
            // SAFETY: in bounds, granted to this client, and handed out to nobody else while the lock is held.
            unsafe {
                std::ptr::copy_nonoverlapping(wanted.header.as_ptr(), header, wanted.header.len());
            }
            // In this order: the node looks at the word of what the table names.
            memory.publish(offset, pending(version));
            if !table.append(&record, end) {
                return None;
            }
        }
        self.writers.fetch_add(1, Ordering::AcqRel);
        self.cursor = end;
        self.next_version += 1;
        Some(Place {
            arena: self.id,
            segment: self.segment.clone(),
            grant: self.grant,
            offset,
            version,
            table: self.table.clone(),
            writers: self.writers.clone(),
        })
    }

    fn is_idle(&self) -> bool {
        self.writers.load(Ordering::Acquire) == 0
    }
}

impl Arenas {
    /// A place for an object in a segment.
    pub(crate) fn place(&self, segment: &SegmentRef, wanted: &Wanted<'_>) -> Wish {
        let limits = if wanted.near { NEAR } else { FAR };
        let Some(bytes) = footprint(wanted.size) else {
            return Wish::No;
        };
        let mut state = self.state.lock();
        let state = &mut *state;
        let slot = segment.slot;
        let granted = match state.caps.get(&slot) {
            Some((granted, at)) if at.elapsed() < REST => *granted,
            _ => u64::MAX,
        };
        let fits = if wanted.near {
            bytes <= limits.most_bytes / limits.object_share && bytes + TABLE_BYTES <= granted
        } else {
            bytes <= limits.most_bytes.min(granted) / limits.object_share
        };
        if !fits {
            return Wish::No;
        }
        if let Some(arena) = state.open.get_mut(&slot) {
            let fresh = arena.is_fresh(segment);
            if let Some(place) = fresh.then(|| arena.take(bytes, wanted)).flatten() {
                return Wish::Granted(place);
            }
            // Too small for this object, though not used up: the larger path, and the arena stays.
            let limit = arena.grant.length / limits.object_share;
            if fresh && !wanted.near && bytes > limit {
                return Wish::No;
            }
            let sealed = arena.table.as_ref().is_some_and(|t| !t.is_open());
            let old = state.open.remove(&slot);
            if sealed {
                state.lost.extend(old);
            } else {
                state.retired.extend(old);
            }
            let grown = state.wanted.entry(slot).or_insert(FIRST_BYTES);
            *grown = (*grown * 2).min(limits.most_bytes);
        }
        if state
            .resting
            .get(&slot)
            .is_some_and(|at| at.elapsed() < REST)
        {
            return Wish::No;
        }
        let grown = *state.wanted.get(&slot).unwrap_or(&FIRST_BYTES);
        let needed = bytes * limits.object_share + CONTROL_BYTES;
        Wish::Open(grown.max(needed).min(limits.most_bytes))
    }

    /// Takes an arena into use.
    pub(crate) fn opened(
        &self,
        id: u64,
        segment: Arc<SegmentRef>,
        grant: Grant,
        versions: std::ops::Range<u64>,
        table: Option<ArenaTable>,
        wanted_bytes: u64,
    ) {
        let arena = Arena {
            id,
            cursor: grant.offset,
            next_version: versions.start,
            versions_end: versions.end,
            opened: Instant::now(),
            writers: Arc::default(),
            segment,
            grant,
            table: table.map(Arc::new),
        };
        let mut state = self.state.lock();
        if arena.grant.length < wanted_bytes {
            let cap = (arena.grant.length, arena.opened);
            state.caps.insert(arena.segment.slot, cap);
        }
        let replaced = state.open.insert(arena.segment.slot, arena);
        state.retired.extend(replaced);
    }

    /// The master granted none for this segment.
    pub(crate) fn refused(&self, slot: u32) {
        self.state.lock().resting.insert(slot, Instant::now());
    }

    /// Arenas that may be given back now. Those whose node knows them have to be ended there first.
    pub(crate) fn closable(&self) -> Vec<Arena> {
        let mut state = self.state.lock();
        let state = &mut *state;
        // Also those of slots that no put comes to any more.
        let sealed = |a: &Arena| a.table.as_ref().is_some_and(|t| !t.is_open());
        let gone: Vec<u32> = state
            .open
            .iter()
            .filter(|(_, a)| sealed(a))
            .map(|(s, _)| *s)
            .collect();
        for slot in gone {
            state.lost.extend(state.open.remove(&slot));
        }
        state.leave_lost();
        let (idle, busy) = std::mem::take(&mut state.retired)
            .into_iter()
            .partition(Arena::is_idle);
        state.retired = busy;
        idle
    }

    /// As [`Arenas::closable`], those on one node only.
    pub(crate) fn closable_at(&self, node: Id128) -> Vec<Arena> {
        let (there, elsewhere) = self
            .closable()
            .into_iter()
            .partition(|a| a.segment.peer.node == node);
        self.state.lock().retired.extend::<Vec<Arena>>(elsewhere);
        there
    }

    /// Arenas that are over at their nodes: the master is told when it is spoken to next.
    pub(crate) fn ended(&self, arenas: impl IntoIterator<Item = (u64, bool)>) {
        self.state.lock().ended.extend(arenas);
    }

    /// Of whom the master is to be told now.
    pub(crate) fn take_ended(&self) -> Vec<(u64, bool)> {
        std::mem::take(&mut self.state.lock().ended)
    }

    /// Gives up an arena: the master does not know it (any more), or something about it is unsure.
    pub(crate) fn lost(&self, id: u64) {
        let mut state = self.state.lock();
        let state = &mut *state;
        let open = state.open.iter().find(|(_, a)| a.id == id);
        let open = open.map(|(slot, _)| *slot);
        state
            .lost
            .extend(open.and_then(|slot| state.open.remove(&slot)));
        let at = state.retired.iter().position(|a| a.id == id);
        state
            .lost
            .extend(at.map(|at| state.retired.swap_remove(at)));
    }

    /// Arenas that have been left and that the master is to settle with their nodes.
    pub(crate) fn left(&self) -> Vec<u64> {
        let mut state = self.state.lock();
        state.leave_lost();
        std::mem::take(&mut state.left)
    }

    /// The master is still to be told of these.
    pub(crate) fn still_left(&self, ids: impl IntoIterator<Item = u64>) {
        self.state.lock().left.extend(ids);
    }

    /// Retires all: they are closed as soon as nobody writes.
    pub(crate) fn retire_all(&self) {
        let mut state = self.state.lock();
        let open: Vec<Arena> = state.open.drain().map(|(_, a)| a).collect();
        state.retired.extend(open);
    }
}

impl State {
    fn leave_lost(&mut self) {
        let (idle, busy) = std::mem::take(&mut self.lost)
            .into_iter()
            .partition(Arena::is_idle);
        self.lost = busy;
        for arena in idle {
            if let Some(table) = &arena.table {
                table.leave();
            }
            self.left.push(arena.id);
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        // No put is under way: its caller would hold the client.
        self.leave_lost();
    }
}
