//! Ranges granted ahead, one per segment, from which small puts take their place without asking the master.
//!
//! Owns the bump allocation and the rule when an arena may be closed: nobody writes into it any more.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::engine::grant::Grant;
use crate::store::client::view::SegmentRef;
use crate::store::model::header::footprint;

/// An arena is replaced after this, well before its grant ends.
const LIFETIME: Duration = Duration::from_secs(300);
/// What is asked for first, and the most that is asked for; doubled each time one was used up.
const FIRST_BYTES: u64 = 1 << 20;
const MOST_BYTES: u64 = 16 << 20;
/// An object larger than this share of its arena takes the two-phase path.
const OBJECT_SHARE: u64 = 8;
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
}

/// A place for one object. Counts as a writer until dropped.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) arena: u64,
    pub(crate) segment: Arc<SegmentRef>,
    pub(crate) grant: Grant,
    pub(crate) offset: u64,
    pub(crate) version: u64,
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
    /// Used up or too old; closed once nobody writes into them.
    retired: Vec<Arena>,
    wanted: HashMap<u32, u64>,
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

impl Arenas {
    /// A place for an object of `size` payload bytes in a segment.
    pub(crate) fn place(&self, segment: &SegmentRef, size: u64) -> Wish {
        let Some(bytes) = footprint(size) else {
            return Wish::No;
        };
        if bytes > MOST_BYTES / OBJECT_SHARE {
            return Wish::No;
        }
        let mut state = self.state.lock();
        let state = &mut *state;
        let slot = segment.slot;
        if let Some(arena) = state.open.get_mut(&slot) {
            let fresh =
                arena.opened.elapsed() < LIFETIME && arena.grant.incarnation == segment.incarnation;
            let end = arena.grant.offset + arena.grant.length;
            if fresh && arena.cursor + bytes <= end && arena.next_version < arena.versions_end {
                let place = Place {
                    arena: arena.id,
                    segment: arena.segment.clone(),
                    grant: arena.grant,
                    offset: arena.cursor,
                    version: arena.next_version,
                    writers: arena.writers.clone(),
                };
                arena.writers.fetch_add(1, Ordering::AcqRel);
                arena.cursor += bytes;
                arena.next_version += 1;
                return Wish::Granted(place);
            }
            // Too small for this object, though not used up: the larger path, and the arena stays.
            if fresh && bytes * OBJECT_SHARE > arena.grant.length && arena.cursor + bytes > end {
                return Wish::No;
            }
            state.retired.extend(state.open.remove(&slot));
            let wanted = state.wanted.entry(slot).or_insert(FIRST_BYTES);
            *wanted = (*wanted * 2).min(MOST_BYTES);
        }
        if state
            .resting
            .get(&slot)
            .is_some_and(|at| at.elapsed() < REST)
        {
            return Wish::No;
        }
        let wanted = *state.wanted.get(&slot).unwrap_or(&FIRST_BYTES);
        Wish::Open(wanted.max(bytes * OBJECT_SHARE))
    }

    /// Takes an arena into use.
    pub(crate) fn opened(
        &self,
        id: u64,
        segment: Arc<SegmentRef>,
        grant: Grant,
        versions: std::ops::Range<u64>,
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
        };
        let mut state = self.state.lock();
        let replaced = state.open.insert(arena.segment.slot, arena);
        state.retired.extend(replaced);
    }

    /// The master granted none for this segment.
    pub(crate) fn refused(&self, slot: u32) {
        self.state.lock().resting.insert(slot, Instant::now());
    }

    /// Arenas that may be closed now.
    pub(crate) fn closable(&self) -> Vec<u64> {
        let mut closable = Vec::new();
        self.state.lock().retired.retain(|arena| {
            let idle = arena.writers.load(Ordering::Acquire) == 0;
            if idle {
                closable.push(arena.id);
            }
            !idle
        });
        closable
    }

    /// Forgets an arena the master does not know (any more).
    pub(crate) fn lost(&self, id: u64) {
        let mut state = self.state.lock();
        state.open.retain(|_, a| a.id != id);
        state.retired.retain(|a| a.id != id);
    }

    /// Retires all: they are closed as soon as nobody writes.
    pub(crate) fn retire_all(&self) {
        let mut state = self.state.lock();
        let open: Vec<Arena> = state.open.drain().map(|(_, a)| a).collect();
        state.retired.extend(open);
    }
}
