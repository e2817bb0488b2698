//! Where objects lie, remembered while their leases run, so that a second read needs no master. Bounded.

use std::sync::Arc;
use std::time::Instant;

use foldhash::fast::FixedState;
use parking_lot::Mutex;
use smallvec::SmallVec;

use super::view::SegmentRef;
use crate::engine::grant::Grant;

const SHARDS: usize = 64;

/// One replica a client may read.
#[derive(Clone, Debug)]
pub(crate) struct ReplicaRef {
    pub(crate) segment: Arc<SegmentRef>,
    pub(crate) grant: Grant,
}

/// What a client knows of one object.
#[derive(Clone, Debug)]
pub(crate) struct Location {
    pub(crate) size: u64,
    pub(crate) version: u64,
    pub(crate) checksum: Option<u32>,
    pub(crate) lease_until: Instant,
    pub(crate) replicas: SmallVec<[ReplicaRef; 1]>,
}

type Shard = std::collections::HashMap<Box<[u8]>, Arc<Location>, FixedState>;

/// See the module header.
pub(crate) struct LocationCache {
    shards: Box<[Mutex<Shard>]>,
    per_shard: usize,
}

impl LocationCache {
    /// Room for about `entries`.
    pub(crate) fn new(entries: usize) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            per_shard: entries.div_ceil(SHARDS),
        }
    }

    fn shard(&self, hash: u64) -> parking_lot::MutexGuard<'_, Shard> {
        self.shards[(hash >> 32) as usize % SHARDS].lock()
    }

    /// A location whose lease still runs.
    pub(crate) fn get(&self, hash: u64, key: &[u8], now: Instant) -> Option<Arc<Location>> {
        let shard = self.shard(hash);
        shard.get(key).filter(|l| l.lease_until > now).cloned()
    }

    pub(crate) fn put(&self, hash: u64, key: &[u8], location: Arc<Location>) {
        if self.per_shard == 0 {
            return;
        }
        let mut shard = self.shard(hash);
        if shard.len() >= self.per_shard {
            let now = Instant::now();
            shard.retain(|_, l| l.lease_until > now);
            if shard.len() >= self.per_shard {
                shard.clear();
            }
        }
        shard.insert(key.into(), location);
    }

    pub(crate) fn forget(&self, hash: u64, key: &[u8]) {
        self.shard(hash).remove(key);
    }

    pub(crate) fn clear(&self) {
        for shard in &self.shards {
            shard.lock().clear();
        }
    }
}
