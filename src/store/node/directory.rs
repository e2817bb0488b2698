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

use super::shared_arenas::SharedArena;
use crate::base::id::Id128;
use crate::base::trace::{Kind, Span};
use crate::engine::host::{Noted, NotifyOrigin, NotifySink, Reach, Segment};
use crate::store::model::error::StoreError;
use crate::store::model::header::{ALIGNMENT, footprint, pending};
use crate::store::model::key;
use crate::store::wire::{self, DirectoryEntry, NodeNotify, node_notify};

/// One object.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    key: Box<[u8]>,
    size: u64,
    pub(super) version: u64,
    checksum: Option<u32>,
    hard_pin: bool,
    soft_pin_ttl_ms: u64,
    group: Box<str>,
    data_type: u8,
    /// Replicas its put asked for; 0 = not said.
    replicas: u8,
    client: Id128,
}

impl Entry {
    /// As it goes to others.
    fn told(&self, segment: u32, offset: u64, pending: bool) -> DirectoryEntry {
        DirectoryEntry {
            key: bytes::Bytes::copy_from_slice(&self.key),
            segment,
            offset,
            size_bytes: self.size,
            version: self.version,
            checksum: self.checksum.unwrap_or(0),
            has_checksum: self.checksum.is_some(),
            hard_pin: self.hard_pin,
            soft_pin_ttl_ms: self.soft_pin_ttl_ms,
            group: self.group.to_string(),
            data_type: u32::from(self.data_type),
            replicas_wanted: u32::from(self.replicas),
            arena_versions: 0,
            pending,
            client_high: self.client.high,
            client_low: self.client.low,
        }
    }
}

/// Entries of one segment, by offset: at most one object lies at a place.
pub(super) type Entries = BTreeMap<u64, Entry>;

/// What one segment holds.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub(super) entries: Entries,
    /// By offset; they do not overlap.
    pub(super) arenas: BTreeMap<u64, SharedArena>,
}

type CommitFn = dyn Fn(Id128, u64, &DirectoryEntry) -> Result<(), StoreError> + Send + Sync;

/// The way to the master of this process.
#[derive(Clone)]
pub struct Commit(Arc<CommitFn>);

impl Commit {
    /// `commit(client, arena, entry)` commits what a client has written here to an arena of that client's, and answers as
    /// the master would answer the client; on `Exists` it has taken the item back already. It must not wait.
    pub fn new(
        commit: impl Fn(Id128, u64, &DirectoryEntry) -> Result<(), StoreError> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(commit))
    }
}

impl std::fmt::Debug for Commit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Commit")
    }
}

/// See the module header.
#[derive(Default)]
pub struct NodeDirectory {
    /// When its master lives in this process.
    commit: Option<Commit>,
    pub(super) segments: RwLock<Vec<(Arc<Segment>, Mutex<Contents>)>>,
    /// Same-host lanes open, by client.
    shared_writers: Mutex<HashMap<Id128, i32>>,
}

impl NodeDirectory {
    /// An empty one that can commit.
    pub fn committing(commit: Option<Commit>) -> Self {
        Self {
            commit,
            ..Self::default()
        }
    }

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
        self.recorded(origin, e, false).is_some()
    }

    /// Records an object, makes it readable, and only then has the master commit it: whoever hears of it finds it, and what
    /// is removed at once is dropped after it was published.
    fn record_and_commit(&self, origin: &NotifyOrigin, arena: u64, e: DirectoryEntry) -> Noted {
        let Some(Commit(commit)) = self.commit.clone() else {
            return Noted::Refused;
        };
        let (offset, version) = (e.offset, e.version);
        if self.recorded(origin, e.clone(), true).is_none() {
            return Noted::Refused;
        }
        // No lock is held: the master takes its own.
        match commit(origin.client, arena, &e) {
            Ok(()) => Noted::Published,
            Err(error) => {
                self.drop_object(origin.segment, offset, version);
                match error {
                    StoreError::Exists => Noted::Existed,
                    _ => Noted::Refused,
                }
            }
        }
    }

    fn recorded(&self, origin: &NotifyOrigin, e: DirectoryEntry, publish: bool) -> Option<()> {
        let bytes = footprint(e.size_bytes)?;
        let end = e.offset.checked_add(bytes);
        // The data covers header and payload; the footprint may reach up to one alignment further, which is granted.
        let inside = e.segment == origin.segment
            && e.offset == origin.offset
            && e.offset.is_multiple_of(ALIGNMENT)
            && end.is_some_and(|end| end < origin.offset + origin.length + ALIGNMENT);
        if !inside || e.size_bytes == 0 || e.version == 0 || key::split(&e.key).is_none() {
            return None;
        }
        let segments = self.segments.read();
        let (memory, contents) = segments.get(e.segment as usize)?;
        let mut contents = contents.lock();
        // In step with what an arena there says, if a master ever placed this into one.
        contents.gather_around(memory, e.offset, bytes);
        let (offset, version) = (e.offset, e.version);
        contents.insert(e, bytes, origin.client);
        if publish {
            memory.memory.publish(offset, version);
        }
        Some(())
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

    /// An object that is complete here, in this version, with the memory it lies in.
    pub fn complete_object(
        &self,
        segment: u32,
        offset: u64,
        version: u64,
    ) -> Option<(Arc<Segment>, DirectoryEntry)> {
        let segments = self.segments.read();
        let (memory, contents) = segments.get(segment as usize)?;
        let mut contents = contents.lock();
        contents.gather_around(memory, offset, 1);
        let entry = contents.entries.get(&offset)?;
        let is_it = entry.version == version && memory.memory.word_is(offset, version);
        is_it.then(|| (memory.clone(), entry.told(segment, offset, false)))
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
            out.push(e.told(segment, offset, pending));
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
    pub(super) fn displace(&mut self, offset: u64, bytes: u64) {
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
    pub(super) fn insert(&mut self, e: DirectoryEntry, bytes: u64, client: Id128) {
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
                replicas: e.replicas_wanted.min(u32::from(u8::MAX)) as u8,
                client,
            },
        );
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

fn noted(taken: bool) -> Noted {
    if taken { Noted::Taken } else { Noted::Refused }
}

impl NotifySink for NodeDirectory {
    fn notify(&self, origin: NotifyOrigin, payload: &[u8]) -> Noted {
        let Ok(notify) = NodeNotify::decode(payload) else {
            return Noted::Refused;
        };
        let name = match &notify.kind {
            Some(node_notify::Kind::Record(_)) if notify.commit_arena > 0 => "record and commit",
            Some(node_notify::Kind::Record(_)) => "record",
            Some(node_notify::Kind::Discard(_)) => "discard",
            Some(node_notify::Kind::ArenaBegin(_)) => "arena begin",
            Some(node_notify::Kind::ArenaEnd(_)) => "arena end",
            None => return Noted::Refused,
        };
        let mut span = Span::of(name, Kind::Server, &notify.traceparent);
        span.note("bytes", origin.length);
        match notify.kind {
            Some(node_notify::Kind::Record(entry)) if notify.commit_arena > 0 => {
                self.record_and_commit(&origin, notify.commit_arena, entry)
            }
            Some(node_notify::Kind::Record(entry)) => noted(self.record(&origin, entry)),
            Some(node_notify::Kind::Discard(wire::DropItem {
                offset, version, ..
            })) => {
                if offset != origin.offset {
                    return Noted::Refused;
                }
                self.drop_object(origin.segment, offset, version);
                Noted::Taken
            }
            Some(node_notify::Kind::ArenaBegin(begin)) => noted(self.begin_arena(&origin, begin)),
            Some(node_notify::Kind::ArenaEnd(_)) => noted(self.end_arena(&origin)),
            None => Noted::Refused,
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
    use crate::store::arena_table::ArenaTable;

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
            ..NodeNotify::default()
        };
        let origin = NotifyOrigin {
            client: Id128 { high: 1, low: 1 },
            segment: 0,
            offset,
            length: 64 + size,
            term: 1,
            reach: Reach::Network,
        };
        d.notify(origin, &notify.encode_to_vec()) == Noted::Taken
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
        assert_eq!(d.notify(origin, b"\xff\xff"), Noted::Refused);
        let entry = DirectoryEntry {
            key: vec![0, b'k'].into(),
            offset: 64,
            size_bytes: 1000,
            version: 1,
            ..DirectoryEntry::default()
        };
        let too_large = NodeNotify {
            kind: Some(node_notify::Kind::Record(entry)),
            ..NodeNotify::default()
        };
        assert_eq!(d.notify(origin, &too_large.encode_to_vec()), Noted::Refused);
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
        let notify = NodeNotify {
            kind: Some(kind),
            ..NodeNotify::default()
        };
        d.notify(origin, &notify.encode_to_vec()) == Noted::Taken
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
