//! What the index holds of one object, and groups of objects.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use parking_lot::Mutex;
use smallvec::SmallVec;

use crate::base::clock::Millis;

/// A complete replica: a range of a mounted segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Replica {
    /// Slot in the segment table; never reused for another segment.
    pub(crate) segment: u32,
    /// Start within the segment.
    pub(crate) offset: u64,
}

pub(crate) type Replicas = SmallVec<[Replica; 1]>;

/// Attributes given at put that live as long as the object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) hard_pin: bool,
    /// 0 = none.
    pub(crate) soft_pin_ttl_ms: u64,
    pub(crate) group: String,
    pub(crate) data_type: u8,
    /// Replicas asked for; 0 = not known: only a put in two phases says it.
    pub(crate) replicas: u8,
}

/// What its put asked for, in one byte.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PutWith(u8);

impl PutWith {
    const CHECKSUM: u8 = 0x80;

    /// `replicas`: 0 = not known, as of one that was put through an arena.
    pub(crate) fn new(replicas: u8, checksum: bool) -> Self {
        let flag = if checksum { Self::CHECKSUM } else { 0 };
        Self(replicas.min(Self::CHECKSUM - 1) | flag)
    }

    /// Replicas asked for; 0 = not known.
    pub(crate) fn replicas(self) -> u8 {
        self.0 & !Self::CHECKSUM
    }

    /// Whether a checksum was recorded.
    pub(crate) fn has_checksum(self) -> bool {
        self.0 & Self::CHECKSUM != 0
    }
}

/// One complete object. Kept small: a pool holds millions.
#[derive(Debug)]
pub(crate) struct Object {
    pub(crate) key: Box<[u8]>,
    pub(crate) hash: u64,
    pub(crate) size: u64,
    pub(crate) version: u64,
    /// When it was stored, until somebody reads it.
    pub(crate) lease_until: Millis,
    pub(crate) soft_pin_until: Millis,
    pub(crate) group: Option<Arc<Group>>,
    pub(crate) replicas: Replicas,
    pub(crate) checksum: u32,
    pub(crate) put_with: PutWith,
    pub(crate) hard_pin: bool,
    /// Somebody has read it.
    pub(crate) read: bool,
    pub(crate) data_type: u8,
}

impl Object {
    /// Checksum, if one was recorded.
    pub(crate) fn checksum(&self) -> Option<u32> {
        self.put_with.has_checksum().then_some(self.checksum)
    }

    /// End of the lease, the group's included.
    pub(crate) fn leased_until(&self) -> Millis {
        let group = self
            .group
            .as_ref()
            .map_or(0, |g| g.lease_until.load(Ordering::Relaxed));
        self.lease_until.max(Millis(group))
    }

    /// Invariant L1: what is leased or pinned is not evicted.
    pub(crate) fn evictable(&self, now: Millis, soft_pinned_too: bool) -> bool {
        let group_pins = self
            .group
            .as_ref()
            .map_or(0, |g| g.hard_pins.load(Ordering::Relaxed));
        !self.hard_pin
            && group_pins == 0
            && self.leased_until() <= now
            && (soft_pinned_too || self.soft_pin_until <= now)
    }
}

/// Objects that are leased and evicted together.
#[derive(Debug, Default)]
pub(crate) struct Group {
    /// Tenant-qualified name.
    pub(crate) name: Box<[u8]>,
    pub(crate) lease_until: AtomicU64,
    pub(crate) hard_pins: AtomicU32,
    /// Hashes of the members' keys, with how many objects (one in the index, others on their way in or out) have each. Lock
    /// order: shard, then group.
    pub(crate) members: Mutex<HashMap<u64, u32, foldhash::fast::FixedState>>,
}
