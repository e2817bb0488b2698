//! What lies in this node's segments: the truth that masters are rebuilt from.
//!
//! Every object written here leaves an entry before it is published: its own message, or a record in the table of an arena
//! that its writer fills through shared memory, which is gathered when somebody asks. An entry counts as complete while
//! the object's header in memory carries its version. Knows nothing of masters; `session` tells them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::{Mutex, RwLock};
use prost::Message;

use crate::base::id::Id128;
use crate::engine::host::{NotifyOrigin, NotifySink, Reach, Segment};
use crate::store::arena_table::ArenaTable;
use crate::store::model::header::{ALIGNMENT, footprint, pending};
use crate::store::model::key;
use crate::store::wire::{self, DirectoryEntry, NodeNotify, node_notify};

/// One object.
#[derive(Clone, Debug)]
struct Entry {
    key: Box<[u8]>,
    size: u64,
    version: u64,
    checksum: Option<u32>,
    hard_pin: bool,
    soft_pin_ttl_ms: u64,
    group: Box<str>,
    data_type: u8,
    client: Id128,
}

/// Entries of one segment, by offset: at most one object lies at a place.
type Entries = BTreeMap<u64, Entry>;

/// An arena that its writer fills through shared memory. Nothing else is placed in its range while it is listed: a master
/// gives parts of it to nobody before the whole of it has been settled here.
#[derive(Debug)]
struct SharedArena {
    client: Id128,
    reach: Reach,
    length: u64,
    /// Term of its grant.
    term: u64,
    versions: (u64, u32),
    table: ArenaTable,
    /// Bytes of the table that are in the entries already.
    gathered: u64,
    /// A later master was told of it: its writer acknowledges nothing there any more, and its table is read no more.
    sealed: bool,
}

/// What one segment holds.
#[derive(Debug, Default)]
struct Contents {
    entries: Entries,
    /// By offset; they do not overlap.
    arenas: BTreeMap<u64, SharedArena>,
}

/// Arenas of one segment at most; beyond that writers send their records.
const ARENAS_MAX: usize = 8192;

/// See the module header.
#[derive(Default)]
pub struct NodeDirectory {
    segments: RwLock<Vec<(Arc<Segment>, Mutex<Contents>)>>,
    /// Same-host lanes open, by client.
    shared_writers: Mutex<HashMap<Id128, i32>>,
}

impl NodeDirectory {
    /// Takes note of a segment; in the order of their indices.
    pub fn add(&self, segment: Arc<Segment>) {
        self.segments.write().push((segment, Mutex::default()));
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.segments
            .read()
            .iter()
            .map(|(_, c)| c.lock().entries.len())
            .sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn record(&self, origin: &NotifyOrigin, e: DirectoryEntry) -> bool {
        let Some(bytes) = footprint(e.size_bytes) else {
            return false;
        };
        let end = e.offset.checked_add(bytes);
        // The data covers header and payload; the footprint may reach up to one alignment further, which is granted.
        let inside = e.segment == origin.segment
            && e.offset == origin.offset
            && e.offset.is_multiple_of(ALIGNMENT)
            && end.is_some_and(|end| end < origin.offset + origin.length + ALIGNMENT);
        if !inside || e.size_bytes == 0 || e.version == 0 || key::split(&e.key).is_none() {
            return false;
        }
        let segments = self.segments.read();
        let Some((memory, contents)) = segments.get(e.segment as usize) else {
            return false;
        };
        let mut contents = contents.lock();
        // In step with what an arena there says, if a master ever placed this into one.
        contents.gather_around(memory, e.offset, bytes);
        contents.insert(e, bytes, origin.client);
        true
    }

    /// Takes note of an arena and opens its table.
    fn begin_arena(&self, origin: &NotifyOrigin, begin: wire::ArenaBegin) -> bool {
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
    fn end_arena(&self, origin: &NotifyOrigin) -> bool {
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

    /// Forgets an object and makes it unreadable, if it is (still) this version.
    pub fn drop_object(&self, segment: u32, offset: u64, version: u64) {
        if version == 0 {
            return;
        }
        let segments = self.segments.read();
        let Some((segment, contents)) = segments.get(segment as usize) else {
            return;
        };
        let entries = &mut contents.lock().entries;
        if entries.get(&offset).is_some_and(|e| e.version == version) {
            entries.remove(&offset);
        }
        erase(segment, offset, version);
    }

    /// A page of entries of one segment from `from` on, as they go to a master, and the next offset. Entries that are not
    /// complete are reported as pending: the master settles them.
    pub fn page(
        &self,
        segment: u32,
        from: u64,
        count: usize,
    ) -> (Vec<DirectoryEntry>, Option<u64>) {
        let segments = self.segments.read();
        let Some((memory, contents)) = segments.get(segment as usize) else {
            return (Vec::new(), None);
        };
        let entries = &contents.lock().entries;
        let page: Vec<(u64, Entry)> = entries
            .range(from..)
            .take(count)
            .map(|(at, e)| (*at, e.clone()))
            .collect();
        let next = (page.len() == count).then(|| page.last().map_or(0, |(at, _)| at + 1));
        let mut out = Vec::with_capacity(page.len());
        for (offset, e) in page {
            let pending = !memory.memory.word_is(offset, e.version);
            out.push(DirectoryEntry {
                key: bytes::Bytes::copy_from_slice(&e.key),
                segment,
                offset,
                size_bytes: e.size,
                version: e.version,
                checksum: e.checksum.unwrap_or(0),
                has_checksum: e.checksum.is_some(),
                hard_pin: e.hard_pin,
                soft_pin_ttl_ms: e.soft_pin_ttl_ms,
                group: e.group.into(),
                data_type: u32::from(e.data_type),
                arena_versions: 0,
                pending,
                client_high: e.client.high,
                client_low: e.client.low,
            });
        }
        (out, next)
    }

    /// Settles a range whose writer is gone: of the versions concerned, keeps the complete entries of `keep`, drops the
    /// others, and returns the versions of `keep` that are not complete here.
    pub fn settle(&self, r: &wire::Reconcile) -> Vec<u64> {
        let keep: HashSet<u64> = r.keep.iter().copied().collect();
        let all = r.version_to == 0;
        let concerned = |v: u64| all || (r.version_from..r.version_to).contains(&v);
        let segments = self.segments.read();
        let Some((memory, contents)) = segments.get(r.segment as usize) else {
            return r.keep.clone();
        };
        let mut contents = contents.lock();
        contents.end_arenas_within(memory, r.offset, r.length_bytes);
        let entries = &mut contents.entries;
        let end = r.offset.saturating_add(r.length_bytes);
        let found: Vec<(u64, u64)> = entries
            .range(r.offset..end)
            .map(|(at, e)| (*at, e.version))
            .filter(|(_, version)| concerned(*version))
            .collect();
        let mut kept = HashSet::new();
        for (at, version) in found {
            if keep.contains(&version) && memory.memory.word_is(at, version) {
                kept.insert(version);
            } else {
                entries.remove(&at);
                erase(memory, at, version);
            }
        }
        keep.difference(&kept).copied().collect()
    }

    /// Whether a client may still write into a range: it has our memory mapped and has not left the arena there.
    pub fn may_write(&self, client: Id128, segment: u32, offset: u64, length: u64) -> bool {
        let mapped = self.shared_writers.lock().contains_key(&client);
        let segments = self.segments.read();
        let Some((_, contents)) = segments.get(segment as usize) else {
            return mapped;
        };
        let contents = contents.lock();
        let around = contents.arenas.range(..=offset).next_back();
        match around {
            Some((at, a)) if a.client == client && offset + length <= at + a.length => {
                !a.table.is_left() && (mapped || a.reach == Reach::Process)
            }
            _ => mapped,
        }
    }
}

impl Contents {
    fn displace(&mut self, offset: u64, bytes: u64) {
        let from = self
            .entries
            .range(..offset)
            .next_back()
            .filter(|(at, old)| **at + footprint(old.size).unwrap_or(0) > offset)
            .map_or(offset, |(at, _)| *at);
        let displaced: Vec<u64> = self
            .entries
            .range(from..offset + bytes)
            .map(|(at, _)| *at)
            .collect();
        for at in displaced {
            self.entries.remove(&at);
        }
    }

    /// Whatever lay there has been freed by the master and is being overwritten.
    fn insert(&mut self, e: DirectoryEntry, bytes: u64, client: Id128) {
        self.displace(e.offset, bytes);
        self.entries.insert(
            e.offset,
            Entry {
                key: e.key.as_ref().into(),
                size: e.size_bytes,
                version: e.version,
                checksum: e.has_checksum.then_some(e.checksum),
                hard_pin: e.hard_pin,
                soft_pin_ttl_ms: e.soft_pin_ttl_ms,
                group: e.group.into(),
                data_type: e.data_type as u8,
                client,
            },
        );
    }

    /// Offsets of the arenas that a range touches.
    fn arenas_in(&self, offset: u64, length: u64) -> impl Iterator<Item = u64> + '_ {
        let end = offset.saturating_add(length);
        self.arenas
            .range(..end)
            .rev()
            .take_while(move |(at, a)| **at + a.length > offset)
            .map(|(at, _)| *at)
    }

    fn gather_around(&mut self, memory: &Segment, offset: u64, length: u64) {
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
    fn end_arenas_within(&mut self, memory: &Segment, offset: u64, length: u64) {
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

/// Takes the version out of the header, so that no reader accepts it any more.
fn erase(segment: &Segment, offset: u64, version: u64) {
    if let Some(word) = segment.memory.word(offset) {
        // In this order: a writer may publish in between, and never takes that back.
        for told in [pending(version), version] {
            let _ = word.compare_exchange(told, 0, Ordering::SeqCst, Ordering::Relaxed);
        }
    }
}

impl NotifySink for NodeDirectory {
    fn notify(&self, origin: NotifyOrigin, payload: &[u8]) -> bool {
        match NodeNotify::decode(payload) {
            Ok(NodeNotify {
                kind: Some(node_notify::Kind::Record(entry)),
            }) => self.record(&origin, entry),
            Ok(NodeNotify {
                kind:
                    Some(node_notify::Kind::Discard(wire::DropItem {
                        offset, version, ..
                    })),
            }) => {
                if offset != origin.offset {
                    return false;
                }
                self.drop_object(origin.segment, offset, version);
                true
            }
            Ok(NodeNotify {
                kind: Some(node_notify::Kind::ArenaBegin(begin)),
            }) => self.begin_arena(&origin, begin),
            Ok(NodeNotify {
                kind: Some(node_notify::Kind::ArenaEnd(_)),
            }) => self.end_arena(&origin),
            _ => false,
        }
    }

    fn shared_writer(&self, client: Id128, change: i32) {
        let mut writers = self.shared_writers.lock();
        let lanes = writers.entry(client).or_default();
        *lanes += change;
        if *lanes <= 0 {
            writers.remove(&client);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::memory::Memory;

    fn directory() -> (NodeDirectory, Arc<Segment>) {
        let directory = NodeDirectory::default();
        let segment = Arc::new(Segment {
            index: 0,
            incarnation: 1,
            name: "s".into(),
            memory: Arc::new(Memory::create("t", 1 << 20).unwrap()),
        });
        directory.add(segment.clone());
        (directory, segment)
    }

    fn record(d: &NodeDirectory, key: &[u8], offset: u64, size: u64, version: u64) -> bool {
        let mut qualified = Vec::new();
        key::qualify("", key, &mut qualified).unwrap();
        let entry = DirectoryEntry {
            key: qualified.into(),
            offset,
            size_bytes: size,
            version,
            ..DirectoryEntry::default()
        };
        let notify = NodeNotify {
            kind: Some(node_notify::Kind::Record(entry)),
        };
        let origin = NotifyOrigin {
            client: Id128 { high: 1, low: 1 },
            segment: 0,
            offset,
            length: 64 + size,
            term: 1,
            reach: Reach::Network,
        };
        d.notify(origin, &notify.encode_to_vec())
    }

    #[test]
    fn records_displaces_drops_and_settles() {
        let (d, s) = directory();
        assert!(record(&d, b"a", 0, 100, 5));
        s.memory.publish(0, 5);
        assert!(record(&d, b"b", 192, 10, 6));
        assert_eq!(d.len(), 2);
        let (page, next) = d.page(0, 0, 10);
        assert_eq!((page.len(), next), (2, None));
        assert_eq!((page[0].version, page[0].pending), (5, false));
        assert_eq!(
            (page[1].version, page[1].pending),
            (6, true),
            "never published"
        );
        // Overwritten: the old entry goes.
        assert!(record(&d, b"c", 64, 500, 7));
        assert_eq!(d.len(), 1);
        s.memory.publish(64, 7);
        d.drop_object(0, 64, 8);
        assert_eq!(d.len(), 1, "another version");
        d.drop_object(0, 64, 7);
        assert!(d.is_empty() && s.memory.word_is(64, 0));
        assert!(record(&d, b"d", 4096, 10, 9) && record(&d, b"e", 4224, 10, 10));
        s.memory.publish(4096, 9);
        assert!(record(&d, b"f", 4352, 10, 99), "of another writer");
        let range = wire::Reconcile {
            offset: 4096,
            length_bytes: 4096,
            keep: vec![9, 10],
            version_from: 8,
            version_to: 20,
            ..wire::Reconcile::default()
        };
        assert_eq!(d.settle(&range), [10]);
        assert_eq!(d.len(), 2);
        assert!(s.memory.word_is(4096, 9));
    }

    #[test]
    fn refuses_what_does_not_fit_the_grant() {
        let (d, _) = directory();
        let origin = NotifyOrigin {
            client: Id128::NONE,
            segment: 0,
            offset: 64,
            length: 128,
            term: 1,
            reach: Reach::Network,
        };
        assert!(!d.notify(origin, b"\xff\xff"));
        let entry = DirectoryEntry {
            key: vec![0, b'k'].into(),
            offset: 64,
            size_bytes: 1000,
            version: 1,
            ..DirectoryEntry::default()
        };
        let too_large = NodeNotify {
            kind: Some(node_notify::Kind::Record(entry)),
        };
        assert!(!d.notify(origin, &too_large.encode_to_vec()));
    }

    const ARENA: u64 = 8192;
    const LENGTH: u64 = 16384;

    fn tell(d: &NodeDirectory, client: u64, kind: node_notify::Kind, reach: Reach) -> bool {
        let origin = NotifyOrigin {
            client: Id128 {
                high: 7,
                low: client,
            },
            segment: 0,
            offset: ARENA,
            length: LENGTH,
            term: 5,
            reach,
        };
        let notify = NodeNotify { kind: Some(kind) };
        d.notify(origin, &notify.encode_to_vec())
    }

    fn begun() -> node_notify::Kind {
        node_notify::Kind::ArenaBegin(wire::ArenaBegin {
            first_version: 50,
            version_count: 10,
        })
    }

    fn begin(d: &NodeDirectory) -> bool {
        tell(d, 1, begun(), Reach::Host)
    }

    fn end(d: &NodeDirectory, client: u64) -> bool {
        let kind = node_notify::Kind::ArenaEnd(wire::ArenaEnd {});
        tell(d, client, kind, Reach::Host)
    }

    /// As the writer does it: word, record, and (for `published`) the word again.
    fn enter(t: &ArenaTable, key: &[u8], offset: u64, version: u64, published: bool) {
        let mut qualified = Vec::new();
        key::qualify("", key, &mut qualified).unwrap();
        let entry = DirectoryEntry {
            key: qualified.into(),
            offset,
            size_bytes: 1000,
            version,
            ..DirectoryEntry::default()
        };
        t.memory().publish(offset, pending(version));
        assert!(t.append(&entry.encode_to_vec(), offset + 1088));
        if published {
            t.memory().publish(offset, version);
        }
    }

    #[test]
    fn an_arena_is_gathered_when_it_ends() {
        let (d, s) = directory();
        assert!(
            !tell(&d, 1, begun(), Reach::Network),
            "it cannot write there"
        );
        assert!(begin(&d));
        let table = ArenaTable::new(s.memory.clone(), ARENA, LENGTH).unwrap();
        assert!(table.is_open());
        enter(&table, b"a", ARENA, 50, true);
        enter(&table, b"b", ARENA + 1088, 51, true);
        enter(&table, b"removed", ARENA + 2176, 52, true);
        d.drop_object(0, ARENA + 2176, 52);
        enter(&table, b"removed on its way", ARENA + 3264, 53, false);
        d.drop_object(0, ARENA + 3264, 53);
        assert!(
            s.memory.word_is(ARENA + 3264, 0),
            "its writer cannot publish it"
        );
        // Outside of the arena, and into the table: not taken.
        let outside = DirectoryEntry {
            key: vec![0, b'x'].into(),
            offset: 64,
            size_bytes: 10,
            version: 54,
            ..DirectoryEntry::default()
        };
        s.memory.publish(64, 54);
        assert!(table.append(&outside.encode_to_vec(), ARENA));
        assert_eq!(d.len(), 0, "nothing until somebody asks");
        assert!(!end(&d, 2), "another's");
        assert!(end(&d, 1));
        let (page, _) = d.page(0, 0, 10);
        let found: Vec<_> = page.iter().map(|e| (e.version, e.pending)).collect();
        assert_eq!(found, [(50, false), (51, false)]);
        assert!(
            end(&d, 1),
            "said again: the first answer may have been lost"
        );
    }

    #[test]
    fn a_new_master_hears_of_everything_a_writer_may_still_touch() {
        let (d, s) = directory();
        assert!(begin(&d));
        let table = ArenaTable::new(s.memory.clone(), ARENA, LENGTH).unwrap();
        enter(&table, b"a", ARENA, 50, true);
        enter(&table, b"on its way", ARENA + 1088, 51, false);
        assert!(d.gather(0).is_empty(), "its master knows the arena");
        d.seal_before(5);
        assert!(table.is_open(), "the same term");
        d.seal_before(6);
        assert!(!table.is_open());
        let reported = d.gather(0);
        assert_eq!(reported.len(), 1, "whole");
        let arena = &reported[0];
        assert_eq!((arena.offset, arena.size_bytes), (ARENA, LENGTH));
        assert_eq!((arena.version, arena.arena_versions), (50, 10));
        let (page, _) = d.page(0, 0, 10);
        let found: Vec<_> = page.iter().map(|e| (e.version, e.pending)).collect();
        assert_eq!(found, [(50, false)]);
        assert!(
            s.memory.word_is(ARENA + 1088, 0),
            "what was on its way cannot be published any more"
        );
        // Entered and even published after that: nobody acknowledged it, and no later master finds it.
        enter(&table, b"too late", ARENA + 2176, 52, true);
        d.seal_before(7);
        assert_eq!((d.gather(0).len(), d.len()), (1, 1));
        assert!(!begin(&d), "nobody else is given any of it");
        let writer = Id128 { high: 7, low: 1 };
        d.shared_writer(writer, 1);
        assert!(d.may_write(writer, 0, ARENA, LENGTH));
        table.leave();
        assert!(!d.may_write(writer, 0, ARENA, LENGTH));
        assert!(
            d.may_write(writer, 0, 0, 64),
            "it still has the segment mapped"
        );
        let whole = wire::Reconcile {
            offset: ARENA,
            length_bytes: LENGTH,
            keep: vec![50],
            version_from: 50,
            version_to: 60,
            ..wire::Reconcile::default()
        };
        assert!(d.settle(&whole).is_empty());
        assert_eq!(d.gather(0).len(), 0);
        assert!(s.memory.word_is(ARENA, 50));
        assert!(begin(&d), "given to the next");
        assert!(d.is_empty());
    }

    #[test]
    fn a_drop_wins_over_a_writer_that_publishes_meanwhile() {
        let (d, s) = directory();
        assert!(begin(&d));
        for published in [false, true] {
            s.memory
                .publish(ARENA, if published { 50 } else { pending(50) });
            d.drop_object(0, ARENA, 50);
            assert!(s.memory.word_is(ARENA, 0));
        }
    }

    #[test]
    fn settling_a_whole_arena_keeps_what_was_committed() {
        let (d, s) = directory();
        assert!(begin(&d));
        let table = ArenaTable::new(s.memory.clone(), ARENA, LENGTH).unwrap();
        enter(&table, b"a", ARENA, 50, true);
        enter(&table, b"b", ARENA + 1088, 51, true);
        enter(&table, b"never arrived", ARENA + 2176, 52, false);
        let all = wire::Reconcile {
            offset: ARENA,
            length_bytes: LENGTH,
            keep: vec![50, 52],
            version_from: 50,
            version_to: 60,
            ..wire::Reconcile::default()
        };
        assert_eq!(d.settle(&all), [52]);
        assert_eq!(d.len(), 1);
        assert!(s.memory.word_is(ARENA, 50) && s.memory.word_is(ARENA + 1088, 0));
    }
}
