//! What lies in this node's segments: the truth that masters are rebuilt from.
//!
//! Every object written here leaves an entry before it is published; an entry counts as complete while the object's
//! header in memory carries its version. Knows nothing of masters; `session` tells them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::{Mutex, RwLock};
use prost::Message;

use crate::base::id::Id128;
use crate::engine::host::{NotifyOrigin, NotifySink, Segment};
use crate::store::model::header::{ALIGNMENT, footprint};
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

/// See the module header.
#[derive(Default)]
pub struct NodeDirectory {
    segments: RwLock<Vec<(Arc<Segment>, Mutex<Entries>)>>,
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
            .map(|(_, e)| e.lock().len())
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
        let Some((_, entries)) = segments.get(e.segment as usize) else {
            return false;
        };
        let mut entries = entries.lock();
        // Whatever lay there has been freed by the master and is being overwritten.
        let from = entries
            .range(..e.offset)
            .next_back()
            .filter(|(at, old)| **at + footprint(old.size).unwrap_or(0) > e.offset)
            .map_or(e.offset, |(at, _)| *at);
        let displaced: Vec<u64> = entries
            .range(from..e.offset + bytes)
            .map(|(at, _)| *at)
            .collect();
        for at in displaced {
            entries.remove(&at);
        }
        entries.insert(
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
                client: origin.client,
            },
        );
        true
    }

    /// Forgets an object and makes it unreadable, if it is (still) this version.
    pub fn drop_object(&self, segment: u32, offset: u64, version: u64) {
        let segments = self.segments.read();
        let Some((segment, entries)) = segments.get(segment as usize) else {
            return;
        };
        let mut entries = entries.lock();
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
        let Some((memory, entries)) = segments.get(segment as usize) else {
            return (Vec::new(), None);
        };
        let entries = entries.lock();
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
        let Some((memory, entries)) = segments.get(r.segment as usize) else {
            return r.keep.clone();
        };
        let mut entries = entries.lock();
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

    /// Whether a client has our memory mapped.
    pub fn is_shared_writer(&self, client: Id128) -> bool {
        self.shared_writers.lock().contains_key(&client)
    }
}

/// Takes the version out of the header, so that no reader accepts it any more.
fn erase(segment: &Segment, offset: u64, version: u64) {
    if let Some(word) = segment.memory.word(offset) {
        let _ = word.compare_exchange(version, 0, Ordering::AcqRel, Ordering::Relaxed);
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
            in_place: true,
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
            in_place: true,
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
}
