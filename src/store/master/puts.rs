//! Puts in two phases: start, end.
//!
//! An unfinished put is not in the index: it blocks nobody, and of several writers of one key the first to end wins.

use std::sync::Arc;

use parking_lot::Mutex;

use super::object::{Attributes, Replica, Replicas};
use super::placement::candidates;
use super::quotas::Reserved;
use super::segments::{Drop, FreeRange};
use super::state::{MasterState, PENDING_SHARDS, add};
use crate::base::clock::Millis;
use crate::base::id::Id128;
use crate::store::model::error::StoreError;
use crate::store::model::header::footprint;
use crate::store::model::key;

/// What a put asks for.
#[derive(Clone, Debug, Default)]
pub(crate) struct PutOptions {
    pub(crate) replica_num: usize,
    pub(crate) attributes: Attributes,
    pub(crate) preferred: Vec<String>,
    pub(crate) host_id: String,
    /// With an upsert: only this version is replaced; 0 = whatever is there.
    pub(crate) if_version: u64,
}

/// What a put may take the place of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Replaces {
    /// Only what no reader could have.
    Nothing,
    /// Whatever is there.
    Anything,
    /// Just this version, and only as long as it is there.
    Version(u64),
}

impl Replaces {
    pub(crate) fn allows(self, version: u64, readable: bool) -> bool {
        match self {
            Self::Nothing => !readable,
            Self::Anything => true,
            Self::Version(wanted) => wanted == version,
        }
    }
}

/// A put between start and end.
#[derive(Clone, Debug)]
pub(crate) struct PendingPut {
    pub(crate) key: Box<[u8]>,
    pub(crate) size: u64,
    pub(crate) replicas: Replicas,
    pub(crate) attributes: Attributes,
    pub(crate) replaces: Replaces,
    pub(crate) client: Id128,
    pub(crate) started: Millis,
    /// Its end is being carried out; it stays here until it is in the index.
    pub(crate) ending: bool,
    /// What its tenant is charged for it meanwhile.
    #[expect(dead_code, reason = "given back when it is dropped")]
    pub(crate) reserved: Arc<Reserved>,
}

/// What the master says of an object that was put.
#[derive(Clone, Debug)]
pub(crate) struct Written {
    pub(crate) version: u64,
    pub(crate) checksum: Option<u32>,
}

impl MasterState {
    pub(crate) fn pending_shard(
        &self,
        version: u64,
    ) -> &Mutex<std::collections::HashMap<u64, PendingPut, foldhash::fast::FixedState>> {
        &self.pending[version as usize % PENDING_SHARDS]
    }

    /// Phase one: ranges on up to `replica_num` nodes. `partial` accepts fewer than could be had with more space.
    #[expect(clippy::too_many_arguments, reason = "the fields of a put, once")]
    pub(crate) fn put_start(
        &self,
        qualified: &[u8],
        size: u64,
        options: &PutOptions,
        upsert: bool,
        partial: bool,
        client: Id128,
        now: Millis,
    ) -> Result<(u64, Replicas), StoreError> {
        let invalid = |what: &str| StoreError::InvalidParams {
            what: what.to_owned(),
        };
        if size == 0 {
            return Err(invalid("an object has at least 1 byte"));
        }
        if options.replica_num == 0 || options.replica_num > 64 {
            return Err(invalid("replica_num is 1 to 64"));
        }
        let hash = key::hash(qualified);
        let view = self.segments.view();
        // What lies on lost nodes only is no reason to refuse: the reader could not have it.
        if !upsert && self.peek(hash, qualified, |o| Self::readable(&view, o)) == Some(true) {
            return Err(StoreError::Exists);
        }
        let largest_bytes = self.largest_segment();
        let wanted_bytes = footprint(size).unwrap_or(u64::MAX);
        if wanted_bytes > largest_bytes {
            if self.recovering(now) {
                return Err(StoreError::Rebuilding);
            }
            return Err(StoreError::TooLarge {
                wanted_bytes,
                largest_bytes,
            });
        }
        let wished = wanted_bytes.saturating_mul(options.replica_num as u64);
        let mut reserved = self.admit(qualified, wished, now)?;
        let (replicas, nodes) = self.place(wanted_bytes, options, now);
        if nodes == 0 {
            // Evicting would not help: no node in service takes anything.
            return Err(StoreError::SegmentNotFound);
        }
        let enough = options.replica_num.min(nodes);
        if replicas.is_empty() || (replicas.len() < enough && !partial) {
            self.release_now(&replicas, wanted_bytes);
            return Err(StoreError::NoSpace { wanted_bytes });
        }
        if replicas.len() < options.replica_num {
            add(&self.counters.partial_puts, 1);
        }
        reserved.shrink(wanted_bytes.saturating_mul(replicas.len() as u64));
        let version = self.take_versions(1);
        let put = PendingPut {
            key: qualified.into(),
            size,
            replicas: replicas.clone(),
            attributes: Attributes {
                replicas: options.replica_num.min(usize::from(u8::MAX)) as u8,
                ..options.attributes.clone()
            },
            replaces: match (upsert, options.if_version) {
                (false, _) => Replaces::Nothing,
                (true, 0) => Replaces::Anything,
                (true, version) => Replaces::Version(version),
            },
            client,
            started: now,
            ending: false,
            reserved: Arc::new(reserved),
        };
        self.pending_shard(version).lock().insert(version, put);
        Ok((version, replicas))
    }

    /// Allocates on distinct nodes; also returns how many nodes there were to choose from.
    fn place(&self, bytes: u64, options: &PutOptions, now: Millis) -> (Replicas, usize) {
        let view = self.segments.view();
        let strategy = self.config.placement;
        let all = candidates(&view, strategy, &options.preferred, &options.host_id, now);
        let mut nodes: Vec<Id128> = all.iter().map(|s| s.node.id).collect();
        nodes.sort_unstable();
        nodes.dedup();
        let mut replicas = Replicas::new();
        let mut used = Vec::new();
        for segment in &all {
            if replicas.len() == options.replica_num {
                break;
            }
            if used.contains(&segment.node.id) {
                continue;
            }
            if let Some(offset) = segment.allocator.lock().allocate(bytes) {
                used.push(segment.node.id);
                replicas.push(Replica {
                    segment: segment.slot,
                    offset,
                });
            }
        }
        (replicas, nodes.len())
    }

    /// Frees ranges nobody was told of yet.
    fn release_now(&self, replicas: &Replicas, bytes: u64) {
        for r in replicas {
            if let Some(segment) = self.segments.get(r.segment) {
                segment.release(r.offset, bytes);
            }
        }
    }

    /// Has the nodes forget the ranges of an object that was in the index, and frees them afterwards; those in an arena
    /// only once the arena is given up: its commit says nothing about whether the bytes have arrived.
    /// While the object is being copied, only after that.
    pub(crate) fn dismiss_replicas(&self, replicas: &[Replica], size: u64, version: u64) {
        if !self.copies.park(version, replicas) {
            self.dismiss_unparked(replicas, size, version);
        }
    }

    /// The same, of an object that is not being copied.
    pub(crate) fn dismiss_unparked(&self, replicas: &[Replica], size: u64, version: u64) {
        let parked = self.arena_of(version).is_some_and(|arena| {
            let mut arena = arena.lock();
            if !arena.dissolved {
                arena
                    .dead
                    .extend(replicas.iter().map(|r| (*r, size, version)));
            }
            !arena.dissolved
        });
        self.drop_ranges(replicas, size, version, !parked);
    }

    /// Has the nodes forget ranges of an object, and frees them afterwards.
    pub(crate) fn drop_replicas(&self, replicas: &[Replica], size: u64, version: u64) {
        self.drop_ranges(replicas, size, version, true);
    }

    pub(crate) fn drop_ranges(&self, replicas: &[Replica], size: u64, version: u64, free: bool) {
        let length = footprint(size).unwrap_or(0);
        for r in replicas {
            if let Some(segment) = self.segments.get(r.segment) {
                let drop = Drop {
                    node_segment: segment.node_segment,
                    offset: r.offset,
                    version,
                    frees: free.then_some(FreeRange {
                        segment: r.segment,
                        offset: r.offset,
                        length,
                    }),
                };
                segment.node.drops.lock().push(drop);
                segment.node.wake();
            }
        }
    }

    /// Phase two: the replicas in `written` (bit per replica) are in place; the object becomes readable. Those in
    /// `unsettled` may still be written to by a request that got lost on its way. Returns whether another object was
    /// replaced: then the end is complete once [`MasterState::barrier`] is reached.
    pub(crate) fn put_end(
        &self,
        version: u64,
        checksum: Option<u32>,
        written: u64,
        unsettled: u64,
        now: Millis,
    ) -> Result<bool, StoreError> {
        let put = {
            let mut pending = self.pending_shard(version).lock();
            let put = pending.get_mut(&version).filter(|p| !p.ending);
            let put = put.ok_or(StoreError::InvalidWrite {
                what: "an unfinished put of this version",
            })?;
            put.ending = true;
            put.clone()
        };
        let done = self.end(put, version, checksum, written, unsettled, now);
        self.pending_shard(version).lock().remove(&version);
        done
    }

    fn end(
        &self,
        put: PendingPut,
        version: u64,
        checksum: Option<u32>,
        written: u64,
        unsettled: u64,
        now: Millis,
    ) -> Result<bool, StoreError> {
        let mut good = Replicas::new();
        for (i, replica) in put.replicas.iter().enumerate() {
            let bit = 1u64.checked_shl(i as u32).unwrap_or(0);
            if written & bit != 0 {
                good.push(*replica);
            } else {
                let settled = unsettled & bit == 0;
                self.discard(&[*replica], put.size, version, put.client, settled, now);
            }
        }
        if good.is_empty() {
            return Err(StoreError::InvalidWrite {
                what: "a put without any written replica",
            });
        }
        let written = Written { version, checksum };
        let replicas = good.clone();
        let done = self.complete(
            put.key,
            put.size,
            good,
            &put.attributes,
            &written,
            put.replaces,
            now,
        );
        if matches!(done, Err(StoreError::Exists | StoreError::NotFound)) {
            self.drop_replicas(&replicas, put.size, version);
        }
        done
    }

    /// Gives up ranges of an object that is not in the index: at once when the write to them is known to have ended,
    /// else once the node vouches that the writer can no longer reach them.
    pub(crate) fn discard(
        &self,
        replicas: &[Replica],
        size: u64,
        version: u64,
        client: Id128,
        settled: bool,
        now: Millis,
    ) {
        if settled {
            self.drop_replicas(replicas, size, version);
        } else {
            for r in replicas {
                self.quarantine(*r, footprint(size).unwrap_or(0), client, now);
            }
        }
    }

    /// Gives up a put; see [`MasterState::discard`].
    pub(crate) fn put_revoke(
        &self,
        version: u64,
        settled: bool,
        now: Millis,
    ) -> Result<(), StoreError> {
        let put = {
            let mut pending = self.pending_shard(version).lock();
            let ending = pending.get(&version).is_none_or(|p| p.ending);
            if ending {
                None
            } else {
                pending.remove(&version)
            }
        };
        let put = put.ok_or(StoreError::InvalidWrite {
            what: "an unfinished put of this version",
        })?;
        self.discard(&put.replicas, put.size, version, put.client, settled, now);
        Ok(())
    }
}
