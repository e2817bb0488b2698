//! The client's picture of the pool's segments, by slot; refreshed when the master's epoch has moved.

use std::collections::HashMap;
use std::sync::Arc;

use crate::base::id::Id128;
use crate::engine::batch::Peer;
use crate::store::wire::SegmentView;

/// A segment as a client reaches it.
#[derive(Debug)]
pub(crate) struct SegmentRef {
    pub(crate) slot: u32,
    pub(crate) node_segment: u32,
    pub(crate) incarnation: u64,
    pub(crate) name: String,
    pub(crate) peer: Arc<Peer>,
    pub(crate) in_service: bool,
    /// Its node commits what comes with that wish, since the master lives in its process.
    pub(crate) commits: bool,
}

/// All segments at one epoch.
#[derive(Debug, Default)]
pub(crate) struct PoolView {
    pub(crate) epoch: u64,
    by_slot: HashMap<u32, Arc<SegmentRef>>,
}

impl PoolView {
    pub(crate) fn new(epoch: u64, segments: &[SegmentView]) -> Self {
        let mut peers: HashMap<Id128, Arc<Peer>> = HashMap::new();
        let by_slot = segments
            .iter()
            .map(|s| {
                let node = Id128 {
                    high: s.node_high,
                    low: s.node_low,
                };
                let peer = peers.entry(node).or_insert_with(|| {
                    Arc::new(Peer {
                        node,
                        name: s.node.clone(),
                        address: s.address.clone(),
                        host_id: s.host_id.clone(),
                        shm_socket: s.shm_socket.clone(),
                    })
                });
                let segment = SegmentRef {
                    slot: s.segment,
                    node_segment: s.node_segment,
                    incarnation: s.incarnation,
                    name: s.name.clone(),
                    peer: peer.clone(),
                    in_service: s.state == "ok",
                    commits: s.commits,
                };
                (s.segment, Arc::new(segment))
            })
            .collect();
        Self { epoch, by_slot }
    }

    /// The nodes behind the segments, each at least once.
    pub(crate) fn peers(&self) -> Vec<Arc<Peer>> {
        self.by_slot.values().map(|s| s.peer.clone()).collect()
    }

    /// The segment of a slot, if it is the incarnation meant.
    pub(crate) fn get(&self, slot: u32, incarnation: u64) -> Option<&Arc<SegmentRef>> {
        self.by_slot
            .get(&slot)
            .filter(|s| s.incarnation == incarnation)
    }

    /// The segment where a small object with this key hash goes: rendezvous hashing over those in service, so that every
    /// client names the same one.
    pub(crate) fn home(&self, key_hash: u64) -> Option<&Arc<SegmentRef>> {
        self.by_slot
            .values()
            .filter(|s| s.in_service)
            .max_by_key(|s| mix(key_hash ^ s.incarnation))
    }
}

/// Finalizer of SplitMix64.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}
