//! The last changes of the index, numbered: what subscribers follow and replay.
//!
//! Owns a ring bounded by count and bytes, and the order of what is in it: whoever changes the index records the change
//! under the lock of the shard, so the events of one key come in the order in which they happened. Knows no subscribers:
//! nobody is woken, readers come and look. A record is two copies into memory that is already there.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::object::Object;
use crate::base::clock::unix_ms;
use crate::store::model::key;

/// Bytes of keys and groups kept per event of the capacity, on average.
const BYTES_PER_EVENT: usize = 256;
/// Longer names of groups are left out.
const GROUP_BYTES_MAX: usize = 1024;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Readable from now on; a key that was there before is replaced.
    Stored,
    /// No longer there.
    Removed(Reason),
    /// Everything of a tenant is about to be removed.
    Cleared,
}

/// Why an object left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// Somebody removed it.
    Removed,
    /// For space.
    Evicted,
    /// It was committed, and its bytes never arrived.
    Incomplete,
    /// Its last node was unmounted.
    NodeLost,
}

impl Reason {
    /// For texts.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Removed => "removed",
            Self::Evicted => "evicted",
            Self::Incomplete => "incomplete",
            Self::NodeLost => "node_lost",
        }
    }
}

/// One change, with copies of its texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    /// Its number; the first is 1.
    pub(crate) seq: u64,
    pub(crate) change: Change,
    pub(crate) unix_ms: u64,
    pub(crate) version: u64,
    pub(crate) size: u64,
    pub(crate) replicas: u8,
    pub(crate) tenant: String,
    /// Empty for a tenant that was cleared.
    pub(crate) key: Vec<u8>,
    pub(crate) group: String,
}

impl Event {
    /// The object as it is now, as if it had just been stored; `seq` 0. `None` when its key is malformed.
    pub(crate) fn of(object: &Object) -> Option<Self> {
        let (tenant, bytes) = key::split(&object.key)?;
        Some(Self {
            seq: 0,
            change: Change::Stored,
            unix_ms: 0,
            version: object.version,
            size: object.size,
            replicas: replica_count(object),
            tenant: tenant_name(tenant),
            key: bytes.to_vec(),
            group: group_name(group_of(object)),
        })
    }
}

/// Which events a reader wants.
#[derive(Clone, Debug, Default)]
pub(crate) struct Filter {
    /// `None` = all tenants.
    pub(crate) tenant: Option<String>,
    /// Of the key, without its tenant.
    pub(crate) prefix: Vec<u8>,
}

impl Filter {
    /// Whether an event is wanted. A cleared tenant concerns every prefix.
    pub(crate) fn wants(&self, event: &Event) -> bool {
        self.tenant.as_ref().is_none_or(|t| *t == event.tenant)
            && (event.change == Change::Cleared || event.key.starts_with(&self.prefix))
    }
}

/// What was asked for is no longer there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gap {
    /// The oldest that is.
    pub(crate) oldest: u64,
}

#[derive(Clone, Copy)]
struct Record {
    /// Position of its texts in the stream of all texts.
    at: u64,
    key_length: u16,
    group_length: u16,
    change: Change,
    replicas: u8,
    unix_ms: u64,
    version: u64,
    size: u64,
}

impl Record {
    fn bytes(&self) -> usize {
        usize::from(self.key_length) + usize::from(self.group_length)
    }
}

#[derive(Default)]
struct Kept {
    records: VecDeque<Record>,
    texts: VecDeque<u8>,
    /// Stream position of the first byte of `texts`.
    start: u64,
}

/// See the module header.
pub(crate) struct EventRing {
    epoch: u64,
    events_max: usize,
    bytes_max: usize,
    /// The number of the next event. Written under the lock.
    next: AtomicU64,
    kept: Mutex<Kept>,
}

impl EventRing {
    /// Keeps `events_max` events; 0 records nothing.
    pub(crate) fn new(events_max: usize) -> Self {
        Self {
            epoch: unix_ms(),
            events_max,
            bytes_max: events_max.saturating_mul(BYTES_PER_EVENT).max(64 << 10),
            next: AtomicU64::new(1),
            kept: Mutex::default(),
        }
    }

    /// Whether anything is recorded.
    pub(crate) fn enabled(&self) -> bool {
        self.events_max > 0
    }

    /// Differs between runs of a master: numbers of another epoch mean nothing.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The number the next event will have.
    pub(crate) fn next(&self) -> u64 {
        self.next.load(Ordering::Acquire)
    }

    /// The number of the oldest event kept; `next` when there is none.
    pub(crate) fn oldest(&self) -> u64 {
        let kept = self.kept.lock();
        self.next() - kept.records.len() as u64
    }

    /// Records that an object became readable. Under the lock of its shard.
    pub(crate) fn stored(&self, object: &Object) {
        self.record(Change::Stored, object);
    }

    /// Records that an object left the index. Under the lock of its shard.
    pub(crate) fn removed(&self, object: &Object, reason: Reason) {
        self.record(Change::Removed(reason), object);
    }

    /// Records that all objects of a tenant are about to be removed, each of which is recorded as well.
    pub(crate) fn cleared(&self, tenant: &str) {
        let Ok(length) = u8::try_from(tenant.len()) else {
            return;
        };
        let mut qualified = vec![length];
        qualified.extend_from_slice(tenant.as_bytes());
        self.push(Change::Cleared, &qualified, &[], 0, 0, 0);
    }

    fn record(&self, change: Change, object: &Object) {
        if self.enabled() {
            let group = group_of(object);
            let copies = replica_count(object);
            self.push(
                change,
                &object.key,
                group,
                object.version,
                object.size,
                copies,
            );
        }
    }

    fn push(
        &self,
        change: Change,
        qualified: &[u8],
        group: &[u8],
        version: u64,
        size: u64,
        replicas: u8,
    ) {
        let group = if group.len() > GROUP_BYTES_MAX {
            &[]
        } else {
            group
        };
        let Ok(key_length) = u16::try_from(qualified.len()) else {
            return;
        };
        if !self.enabled() {
            return;
        }
        let mut record = Record {
            at: 0,
            key_length,
            group_length: group.len() as u16,
            change,
            replicas,
            unix_ms: unix_ms(),
            version,
            size,
        };
        let mut kept = self.kept.lock();
        while kept.records.len() >= self.events_max
            || (kept.texts.len() + record.bytes() > self.bytes_max && !kept.records.is_empty())
        {
            kept.forget_oldest();
        }
        record.at = kept.start + kept.texts.len() as u64;
        kept.texts.extend(qualified);
        kept.texts.extend(group);
        kept.records.push_back(record);
        self.next.fetch_add(1, Ordering::Release);
    }

    /// The wanted ones among the up to `examined` events from number `from` on, and the number to go on from.
    ///
    /// # Errors
    /// `Gap` when event `from` is no longer (or, of another epoch, not yet) there.
    pub(crate) fn read(
        &self,
        from: u64,
        examined: usize,
        filter: &Filter,
    ) -> Result<(Vec<Event>, u64), Gap> {
        // Copied as they lie, and taken apart outside the lock.
        let (records, texts) = {
            let kept = self.kept.lock();
            let next = self.next();
            let oldest = next - kept.records.len() as u64;
            if from < oldest || from > next {
                return Err(Gap { oldest });
            }
            kept.copy((from - oldest) as usize, examined)
        };
        let mut events = Vec::new();
        let mut at = 0;
        for (i, record) in records.iter().enumerate() {
            let end = at + record.bytes();
            let event = decode(from + i as u64, record, &texts[at..end]);
            events.extend(event.filter(|e| filter.wants(e)));
            at = end;
        }
        Ok((events, from + records.len() as u64))
    }
}

impl Kept {
    fn forget_oldest(&mut self) {
        if let Some(record) = self.records.pop_front() {
            self.texts.drain(..record.bytes());
            self.start += record.bytes() as u64;
        }
    }

    fn copy(&self, skip: usize, most: usize) -> (Vec<Record>, Vec<u8>) {
        let end = skip.saturating_add(most).min(self.records.len());
        let records: Vec<Record> = self.records.range(skip..end).copied().collect();
        let texts = match (records.first(), records.last()) {
            (Some(first), Some(last)) => {
                let from = (first.at - self.start) as usize;
                let to = (last.at - self.start) as usize + last.bytes();
                self.texts.range(from..to).copied().collect()
            }
            _ => Vec::new(),
        };
        (records, texts)
    }
}

fn decode(seq: u64, record: &Record, texts: &[u8]) -> Option<Event> {
    let (qualified, group) = texts.split_at(usize::from(record.key_length));
    let (length, rest) = qualified.split_first()?;
    let (tenant, bytes) = rest.split_at_checked(usize::from(*length))?;
    Some(Event {
        seq,
        change: record.change,
        unix_ms: record.unix_ms,
        version: record.version,
        size: record.size,
        replicas: record.replicas,
        tenant: tenant_name(std::str::from_utf8(tenant).ok()?),
        key: bytes.to_vec(),
        group: group_name(group),
    })
}

fn tenant_name(tenant: &str) -> String {
    if tenant.is_empty() {
        key::DEFAULT_TENANT.to_owned()
    } else {
        tenant.to_owned()
    }
}

fn replica_count(object: &Object) -> u8 {
    u8::try_from(object.replicas.len()).unwrap_or(u8::MAX)
}

/// The qualified name of its group.
fn group_of(object: &Object) -> &[u8] {
    object.group.as_ref().map_or(&[], |g| &g.name)
}

fn group_name(qualified: &[u8]) -> String {
    let name = qualified
        .split_first()
        .and_then(|(length, rest)| rest.get(usize::from(*length)..))
        .unwrap_or_default();
    String::from_utf8_lossy(name).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::clock::Millis;

    fn object(name: &str) -> Object {
        let mut qualified = Vec::new();
        key::qualify("t", name.as_bytes(), &mut qualified).unwrap();
        Object {
            hash: key::hash(&qualified),
            key: qualified.into(),
            size: 5,
            version: 7,
            lease_until: Millis(0),
            soft_pin_until: Millis(0),
            group: None,
            replicas: smallvec::smallvec![],
            checksum: 0,
            put_with: super::super::object::PutWith::default(),
            hard_pin: false,
            read: false,
            data_type: 0,
        }
    }

    fn keys(events: &[Event]) -> Vec<String> {
        let name = |e: &Event| String::from_utf8(e.key.clone()).unwrap();
        events.iter().map(name).collect()
    }

    #[test]
    fn the_oldest_go_and_leave_a_gap() {
        let ring = EventRing::new(3);
        for n in 0..5 {
            ring.stored(&object(&format!("k{n}")));
        }
        assert_eq!((ring.oldest(), ring.next()), (3, 6));
        let all = Filter::default();
        assert_eq!(ring.read(2, 10, &all), Err(Gap { oldest: 3 }));
        let (events, next) = ring.read(3, 2, &all).unwrap();
        assert_eq!((keys(&events), next), (vec!["k2".into(), "k3".into()], 5));
        let (events, next) = ring.read(5, 2, &all).unwrap();
        assert_eq!((keys(&events), next), (vec!["k4".into()], 6));
        assert_eq!(ring.read(6, 2, &all), Ok((vec![], 6)));
        assert_eq!(ring.read(7, 2, &all), Err(Gap { oldest: 3 }));
    }

    #[test]
    fn bytes_are_bounded_too() {
        let ring = EventRing::new(100);
        for _ in 0..100 {
            ring.stored(&object(&"x".repeat(4000)));
        }
        let kept = ring.kept.lock();
        assert!(kept.texts.len() <= ring.bytes_max);
        assert_eq!(kept.records.len(), ring.bytes_max / 4002);
    }

    #[test]
    fn filters() {
        let ring = EventRing::new(10);
        ring.stored(&object("ab"));
        ring.removed(&object("b"), Reason::Evicted);
        ring.cleared("t");
        let a = Filter {
            tenant: Some("t".into()),
            prefix: b"a".to_vec(),
        };
        let (events, next) = ring.read(1, 10, &a).unwrap();
        assert_eq!((keys(&events), next), (vec!["ab".into(), String::new()], 4));
        let other = Filter {
            tenant: Some("u".into()),
            prefix: Vec::new(),
        };
        assert_eq!(ring.read(1, 10, &other), Ok((vec![], 4)));
        assert!(!EventRing::new(0).enabled());
    }
}
