//! Arenas that writers of this host fill through shared memory: their tables are gathered into the directory when somebody
//! asks, and sealed before a new master hears of them.

use std::sync::atomic::Ordering;

use prost::Message;

use super::directory::{Contents, NodeDirectory};
use crate::base::id::Id128;
use crate::engine::host::{NotifyOrigin, Reach, Segment};
use crate::store::arena_table::ArenaTable;
use crate::store::model::header::{ALIGNMENT, footprint, pending};
use crate::store::model::key;
use crate::store::wire::{self, DirectoryEntry};

/// An arena that its writer fills through shared memory. Nothing else is placed in its range while it is listed: a master
/// gives parts of it to nobody before the whole of it has been settled here.
#[derive(Debug)]
pub(super) struct SharedArena {
    pub(super) client: Id128,
    pub(super) reach: Reach,
    pub(super) length: u64,
    /// Term of its grant.
    term: u64,
    versions: (u64, u32),
    pub(super) table: ArenaTable,
    /// Bytes of the table that are in the entries already.
    gathered: u64,
    /// A later master was told of it: its writer acknowledges nothing there any more, and its table is read no more.
    sealed: bool,
}

/// Arenas of one segment at most; beyond that writers send their records.
const ARENAS_MAX: usize = 8192;

impl NodeDirectory {
    /// Takes note of an arena and opens its table.
    pub(super) fn begin_arena(&self, origin: &NotifyOrigin, begin: wire::ArenaBegin) -> bool {
        let segments = self.segments.read();
        let Some((memory, contents)) = segments.get(origin.segment as usize) else {
            return false;
        };
        let table = ArenaTable::new(memory.memory.clone(), origin.offset, origin.length);
        let Some(table) = table.filter(|_| origin.reach != Reach::Network) else {
            return false;
        };
        let mut contents = contents.lock();
        let overlapping = contents.arenas_in(origin.offset, origin.length).next();
        if let Some(other) = overlapping {
            tracing::warn!(
                offset = origin.offset,
                other,
                "an arena was granted over another: refused"
            );
            return false;
        }
        if contents.arenas.len() >= ARENAS_MAX || begin.first_version == 0 {
            return false;
        }
        // Whatever lay there has been freed by the master.
        contents.displace(origin.offset, origin.length);
        table.open();
        let arena = SharedArena {
            client: origin.client,
            reach: origin.reach,
            length: origin.length,
            term: origin.term,
            versions: (begin.first_version, begin.version_count),
            table,
            gathered: 0,
            sealed: false,
        };
        contents.arenas.insert(origin.offset, arena);
        true
    }

    /// Its writer has left an arena: what its table says goes into the entries.
    pub(super) fn end_arena(&self, origin: &NotifyOrigin) -> bool {
        let segments = self.segments.read();
        let Some((memory, contents)) = segments.get(origin.segment as usize) else {
            return false;
        };
        let mut contents = contents.lock();
        let own = |a: &SharedArena| a.client == origin.client && a.length == origin.length;
        match contents.arenas.get(&origin.offset) {
            Some(arena) if own(arena) => {}
            Some(_) => return false,
            // Ended already: the first answer was lost on its way.
            None => {
                let mut others = contents.arenas_in(origin.offset, origin.length);
                return others.next().is_none();
            }
        }
        contents.gather(memory, origin.offset, false);
        contents.arenas.remove(&origin.offset);
        true
    }

    /// Ends the writers' right to acknowledge in arenas of terms before `term`, before the directory is read for a new
    /// master: what is complete then is in the entries, and what is not can no longer become so.
    pub fn seal_before(&self, term: u64) {
        for (memory, contents) in self.segments.read().iter() {
            let mut contents = contents.lock();
            let old = contents.arenas.iter();
            let old = old.filter(|(_, a)| a.term < term && !a.sealed);
            let old: Vec<u64> = old.map(|(at, _)| *at).collect();
            for at in old {
                if let Some(arena) = contents.arenas.get(&at) {
                    arena.table.seal();
                }
                contents.gather(memory, at, true);
                if let Some(arena) = contents.arenas.get_mut(&at) {
                    arena.sealed = true;
                }
            }
        }
    }

    /// Takes what the tables of a segment's arenas say into its entries, and returns the sealed arenas: their writers may
    /// still be writing there, so that nothing of them must be given to others yet.
    pub fn gather(&self, segment: u32) -> Vec<DirectoryEntry> {
        let segments = self.segments.read();
        let Some((memory, contents)) = segments.get(segment as usize) else {
            return Vec::new();
        };
        let mut contents = contents.lock();
        let all: Vec<u64> = contents.arenas.keys().copied().collect();
        for offset in all {
            contents.gather(memory, offset, false);
        }
        let sealed = contents.arenas.iter().filter(|(_, a)| a.sealed);
        let entry = |(offset, a): (&u64, &SharedArena)| DirectoryEntry {
            segment,
            offset: *offset,
            size_bytes: a.length,
            version: a.versions.0,
            arena_versions: a.versions.1,
            pending: true,
            client_high: a.client.high,
            client_low: a.client.low,
            ..DirectoryEntry::default()
        };
        sealed.map(entry).collect()
    }
}

impl Contents {
    /// Offsets of the arenas that a range touches.
    pub(super) fn arenas_in(&self, offset: u64, length: u64) -> impl Iterator<Item = u64> + '_ {
        let end = offset.saturating_add(length);
        self.arenas
            .range(..end)
            .rev()
            .take_while(move |(at, a)| **at + a.length > offset)
            .map(|(at, _)| *at)
    }

    pub(super) fn gather_around(&mut self, memory: &Segment, offset: u64, length: u64) {
        let around: Vec<u64> = self.arenas_in(offset, length).collect();
        for at in around {
            self.gather(memory, at, false);
        }
    }

    /// Takes new records of one arena into the entries. Objects whose word says neither that they are there nor that
    /// they are on their way were dropped. `last`: what is still on its way is not to arrive any more.
    fn gather(&mut self, memory: &Segment, offset: u64, last: bool) {
        let Some(arena) = self.arenas.get_mut(&offset).filter(|a| !a.sealed) else {
            return;
        };
        let (records, gathered) = arena.table.records(arena.gathered);
        arena.gathered = gathered;
        let (low, client) = (arena.table.low(), arena.client);
        for record in records {
            let Ok(e) = DirectoryEntry::decode(record.as_slice()) else {
                continue;
            };
            let Some(bytes) = footprint(e.size_bytes) else {
                continue;
            };
            let inside = e.offset >= offset
                && e.offset.is_multiple_of(ALIGNMENT)
                && e.offset.checked_add(bytes).is_some_and(|end| end <= low);
            if !inside || e.size_bytes == 0 || e.version == 0 || key::split(&e.key).is_none() {
                continue;
            }
            let on_its_way = memory.memory.word_is(e.offset, pending(e.version));
            if (on_its_way && !last) || memory.memory.word_is(e.offset, e.version) {
                self.insert(e, bytes, client);
            }
        }
        if last {
            self.stop_pending(memory, offset);
        }
    }

    /// Takes away the words of what an arena's writer has under way, so that it cannot publish it; what it published in
    /// the last moment is complete.
    fn stop_pending(&mut self, memory: &Segment, offset: u64) {
        let Some(arena) = self.arenas.get(&offset) else {
            return;
        };
        // All of the table once more: entries are found by what their words say now.
        let (records, _) = arena.table.records(0);
        let (low, client) = (arena.table.low(), arena.client);
        for record in records {
            let Ok(e) = DirectoryEntry::decode(record.as_slice()) else {
                continue;
            };
            let bytes = footprint(e.size_bytes).unwrap_or(u64::MAX);
            let end = e.offset.checked_add(bytes);
            if e.offset < offset || e.version == 0 || end.is_none_or(|end| end > low) {
                continue;
            }
            let Some(word) = memory.memory.word(e.offset) else {
                continue;
            };
            let told = pending(e.version);
            let stopped = word.compare_exchange(told, 0, Ordering::SeqCst, Ordering::SeqCst);
            let own = self.entries.get(&e.offset).map(|known| known.version);
            if stopped.is_ok() && own == Some(e.version) {
                self.entries.remove(&e.offset);
            } else if stopped == Err(e.version)
                && own != Some(e.version)
                && e.size_bytes > 0
                && key::split(&e.key).is_some()
            {
                self.insert(e, bytes, client);
            }
        }
    }

    /// Gathers and forgets arenas that lie within a range: it is being settled, and nobody writes there any more.
    pub(super) fn end_arenas_within(&mut self, memory: &Segment, offset: u64, length: u64) {
        let end = offset.saturating_add(length);
        let within: Vec<u64> = self
            .arenas
            .range(offset..end)
            .filter(|(at, a)| **at + a.length <= end)
            .map(|(at, _)| *at)
            .collect();
        for at in within {
            self.gather(memory, at, false);
            self.arenas.remove(&at);
        }
    }
}
