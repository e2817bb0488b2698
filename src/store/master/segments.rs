//! Nodes, their segments, and what still has to be told to them.
//!
//! Owns the table of mounted segments (slots are never reused), each node's phase, and its queue of drops. A range is
//! given back to its allocator only after its node has acknowledged the drop, so that nothing is ever placed where a
//! node still holds another object (D2, R1).

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock};

use crate::base::clock::Millis;
use crate::base::id::Id128;
use crate::store::alloc::offset::OffsetAllocator;

/// What may be done with a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum NodePhase {
    /// Its directory is being read: readable as far as known, nothing is placed there yet.
    Rebuilding = 0,
    /// In service.
    Ok = 1,
    /// Its session broke; unmounted if it stays away.
    Lost = 2,
    /// It wants to leave: readable, nothing new is placed.
    Draining = 3,
    /// Unmounted.
    Gone = 4,
}

impl NodePhase {
    fn from_u8(byte: u8) -> Self {
        match byte {
            0 => Self::Rebuilding,
            1 => Self::Ok,
            2 => Self::Lost,
            3 => Self::Draining,
            _ => Self::Gone,
        }
    }
}

/// A range to be freed once a drop is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FreeRange {
    pub(crate) segment: u32,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// One drop: what the node forgets, what is freed afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Drop {
    pub(crate) node_segment: u32,
    pub(crate) offset: u64,
    pub(crate) version: u64,
    pub(crate) frees: Option<FreeRange>,
}

/// Drops of one node, in order, until acknowledged.
#[derive(Debug, Default)]
pub(crate) struct DropQueue {
    /// Number of the last message.
    assigned: u64,
    /// Drops queued and drops acknowledged since the beginning; the order never changes.
    queued: u64,
    done: u64,
    pending: Vec<Drop>,
    in_flight: VecDeque<(u64, Vec<Drop>)>,
}

impl DropQueue {
    pub(crate) fn push(&mut self, drop: Drop) {
        self.pending.push(drop);
        self.queued += 1;
    }

    /// The next message: its sequence and drops.
    pub(crate) fn take(&mut self, most: usize) -> Option<(u64, Vec<Drop>)> {
        if self.pending.is_empty() {
            return None;
        }
        let rest = self.pending.split_off(most.min(self.pending.len()));
        let batch = std::mem::replace(&mut self.pending, rest);
        self.assigned += 1;
        self.in_flight.push_back((self.assigned, batch.clone()));
        Some((self.assigned, batch))
    }

    /// All up to `sequence` are done: the ranges to free.
    pub(crate) fn ack(&mut self, sequence: u64) -> Vec<FreeRange> {
        let mut freed = Vec::new();
        while self.in_flight.front().is_some_and(|(s, _)| *s <= sequence) {
            if let Some((_, batch)) = self.in_flight.pop_front() {
                self.done += batch.len() as u64;
                freed.extend(batch.into_iter().filter_map(|d| d.frees));
            }
        }
        freed
    }

    /// The session broke: what was not acknowledged will be sent again, under the sequence it had or a later one.
    pub(crate) fn requeue(&mut self) {
        let mut again: Vec<Drop> = self.in_flight.drain(..).flat_map(|(_, d)| d).collect();
        again.append(&mut self.pending);
        self.pending = again;
    }

    /// The count that is reached when everything queued so far is done; `None` when it is.
    pub(crate) fn barrier(&self) -> Option<u64> {
        (self.done < self.queued).then_some(self.queued)
    }

    pub(crate) fn reached(&self, count: u64) -> bool {
        self.done >= count
    }

    /// Versions that were to be dropped and perhaps were not.
    pub(crate) fn versions(&self) -> impl Iterator<Item = u64> + '_ {
        self.pending
            .iter()
            .chain(self.in_flight.iter().flat_map(|(_, b)| b))
            .map(|d| d.version)
    }

    /// Bytes that will be free once all is acknowledged.
    pub(crate) fn bytes(&self) -> u64 {
        self.frees().map(|f| f.length).sum()
    }

    /// Of those, the ones of one segment.
    pub(crate) fn bytes_in(&self, slot: u32) -> u64 {
        let there = self.frees().filter(|f| f.segment == slot);
        there.map(|f| f.length).sum()
    }

    fn frees(&self) -> impl Iterator<Item = FreeRange> + '_ {
        let in_flight = self.in_flight.iter().flat_map(|(_, b)| b);
        self.pending.iter().chain(in_flight).filter_map(|d| d.frees)
    }
}

/// Most drops of one message.
pub(crate) const DROPS_PER_MESSAGE: usize = 4096;

type Waker = Box<dyn Fn() + Send + Sync>;

/// One node.
pub(crate) struct NodeState {
    pub(crate) id: Id128,
    pub(crate) name: String,
    pub(crate) address: String,
    pub(crate) host_id: String,
    pub(crate) shm_socket: String,
    /// The listener that it shares with others of its address; 0: none.
    pub(crate) port: u64,
    /// Its release, once it has said so.
    pub(crate) build: OnceLock<String>,
    phase: AtomicU8,
    pub(crate) last_seen: AtomicU64,
    pub(crate) suspect_until: AtomicU64,
    /// Its whole directory has been indexed once.
    pub(crate) indexed: AtomicBool,
    /// Slots of its segments, by the index within the node.
    pub(crate) slots: Vec<u32>,
    pub(crate) drops: Mutex<DropQueue>,
    /// What its data lanes have done, as it last told.
    pub(crate) served: Mutex<crate::store::wire::Heartbeat>,
    /// Sequences of reconcile jobs to be sent.
    pub(crate) reconciles: Mutex<Vec<u64>>,
    /// The trace of what the next drops are for; empty = none.
    pub(crate) drops_for: Mutex<String>,
    /// Messages of copies to be sent.
    pub(crate) copies: Mutex<Vec<u64>>,
    /// The version of the policies it was sent, and that it keeps.
    pub(crate) quotas_sent: AtomicU64,
    pub(crate) quotas_kept: AtomicU64,
    /// The same of drain jobs.
    pub(crate) drains_sent: AtomicU64,
    pub(crate) drains_kept: AtomicU64,
    /// It said that it can copy to other nodes.
    pub(crate) copier: AtomicBool,
    /// It shares this process and commits what writers ask it to.
    pub(crate) commits: AtomicBool,
    waker: Mutex<Option<(u64, Waker)>>,
}

impl NodeState {
    pub(crate) fn phase(&self) -> NodePhase {
        NodePhase::from_u8(self.phase.load(Ordering::Acquire))
    }
    pub(crate) fn set_phase(&self, phase: NodePhase) {
        self.phase.store(phase as u8, Ordering::Release);
    }
    pub(crate) fn readable(&self) -> bool {
        matches!(
            self.phase(),
            NodePhase::Ok | NodePhase::Draining | NodePhase::Rebuilding
        )
    }
    pub(crate) fn suspect(&self, now: Millis) -> bool {
        self.suspect_until.load(Ordering::Relaxed) > now.0
    }
    /// For people.
    pub(crate) fn state_name(&self, now: Millis) -> &'static str {
        match self.phase() {
            NodePhase::Ok if self.suspect(now) => "suspect",
            NodePhase::Ok => "ok",
            NodePhase::Rebuilding => "rebuilding",
            NodePhase::Lost => "lost",
            NodePhase::Draining => "draining",
            NodePhase::Gone => "gone",
        }
    }

    /// The session that now sends this node's messages; what an earlier one sent without an answer is sent again.
    pub(crate) fn attach(&self, session: u64, waker: Waker) {
        let mut current = self.waker.lock();
        self.drops.lock().requeue();
        *current = Some((session, waker));
    }
    /// Whether `session` is (still) the one that speaks for this node.
    pub(crate) fn is_current(&self, session: u64) -> bool {
        self.waker
            .lock()
            .as_ref()
            .is_some_and(|(s, _)| *s == session)
    }
    /// The next drops to send; `Err` when another session has taken over.
    pub(crate) fn take_drops(&self, session: u64) -> Result<Option<(u64, Vec<Drop>)>, ()> {
        let current = self.waker.lock();
        if current.as_ref().is_none_or(|(s, _)| *s != session) {
            return Err(());
        }
        Ok(self.drops.lock().take(DROPS_PER_MESSAGE))
    }
    /// Changes the phase if it is `from`; tells whether it was.
    pub(crate) fn advance_phase(&self, from: NodePhase, to: NodePhase) -> bool {
        let (from, to) = (from as u8, to as u8);
        self.phase
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }
    /// Whether `session` is the current one; then it is detached.
    pub(crate) fn detach(&self, session: u64) -> bool {
        let mut waker = self.waker.lock();
        let current = waker.as_ref().is_some_and(|(s, _)| *s == session);
        if current {
            *waker = None;
        }
        current
    }
    /// Something is to be sent.
    pub(crate) fn wake(&self) {
        if let Some((_, wake)) = &*self.waker.lock() {
            wake();
        }
    }
}

/// One mounted segment.
pub(crate) struct SegmentState {
    pub(crate) slot: u32,
    pub(crate) incarnation: u64,
    pub(crate) name: String,
    pub(crate) node: Arc<NodeState>,
    pub(crate) node_segment: u32,
    pub(crate) page_kind: String,
    pub(crate) size: u64,
    pub(crate) allocator: Mutex<OffsetAllocator>,
    pub(crate) objects: AtomicU64,
    /// Bytes granted to arenas and not yet filled.
    pub(crate) arena_bytes: AtomicU64,
    drain: AtomicU8,
}

/// Whether a segment is being emptied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum DrainState {
    /// No.
    None = 0,
    /// Readable, nothing new is placed there.
    Draining = 1,
    /// The same, and nothing lies there any more.
    Drained = 2,
}

impl SegmentState {
    /// Whether new objects may be placed here.
    pub(crate) fn placeable(&self) -> bool {
        self.node.phase() == NodePhase::Ok && self.drain() == DrainState::None
    }

    pub(crate) fn drain(&self) -> DrainState {
        match self.drain.load(Ordering::Acquire) {
            0 => DrainState::None,
            1 => DrainState::Draining,
            _ => DrainState::Drained,
        }
    }
    pub(crate) fn set_drain(&self, drain: DrainState) {
        self.drain.store(drain as u8, Ordering::Release);
    }

    /// For people.
    pub(crate) fn state_name(&self, now: Millis) -> &'static str {
        match (self.node.phase(), self.drain()) {
            (NodePhase::Ok, DrainState::Draining) => "draining",
            (NodePhase::Ok, DrainState::Drained) => "drained",
            _ => self.node.state_name(now),
        }
    }

    /// Frees a range; an inconsistency is reported, not hidden.
    pub(crate) fn release(&self, offset: u64, length: u64) {
        if let Err(error) = self.allocator.lock().free(offset, length) {
            tracing::error!(segment = %self.name, %error, "invariant A1: a range was freed twice");
            debug_assert!(false, "invariant A1: {error}");
        }
    }
}

/// A snapshot of all slots; gone segments are `None`.
pub(crate) type SegmentsView = Arc<Vec<Option<Arc<SegmentState>>>>;

/// All nodes and segments.
pub(crate) struct SegmentTable {
    view: RwLock<SegmentsView>,
    nodes: RwLock<HashMap<Id128, Arc<NodeState>>>,
    epoch: AtomicU64,
}

/// A segment as a node offers it.
#[derive(Clone, Debug)]
pub(crate) struct Offer {
    pub(crate) incarnation: u64,
    pub(crate) name: String,
    pub(crate) size: u64,
    pub(crate) page_kind: String,
}

impl SegmentTable {
    /// `first_epoch`: larger than any epoch of an earlier master, so that clients notice the change.
    pub(crate) fn new(first_epoch: u64) -> Self {
        Self {
            view: RwLock::default(),
            nodes: RwLock::default(),
            epoch: AtomicU64::new(first_epoch),
        }
    }

    pub(crate) fn view(&self) -> SegmentsView {
        self.view.read().clone()
    }
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }
    /// Something changed that clients should hear of.
    pub(crate) fn changed(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
    }
    pub(crate) fn get(&self, slot: u32) -> Option<Arc<SegmentState>> {
        self.view.read().get(slot as usize)?.clone()
    }
    pub(crate) fn node(&self, id: Id128) -> Option<Arc<NodeState>> {
        self.nodes.read().get(&id).cloned()
    }
    pub(crate) fn nodes(&self) -> Vec<Arc<NodeState>> {
        self.nodes.read().values().cloned().collect()
    }

    /// Adds a node with its segments, in phase `Rebuilding`.
    #[expect(
        clippy::too_many_arguments,
        reason = "the fields of a registration, once"
    )]
    pub(crate) fn mount(
        &self,
        id: Id128,
        name: &str,
        address: &str,
        host_id: &str,
        shm_socket: &str,
        port: u64,
        offers: &[Offer],
        now: Millis,
    ) -> Arc<NodeState> {
        let mut nodes = self.nodes.write();
        let mut view = self.view.write();
        let first = view.len() as u32;
        let node = Arc::new(NodeState {
            id,
            name: name.to_owned(),
            address: address.to_owned(),
            host_id: host_id.to_owned(),
            shm_socket: shm_socket.to_owned(),
            port,
            build: OnceLock::new(),
            phase: AtomicU8::new(NodePhase::Rebuilding as u8),
            last_seen: AtomicU64::new(now.0),
            suspect_until: AtomicU64::new(0),
            indexed: AtomicBool::new(false),
            slots: (first..first + offers.len() as u32).collect(),
            drops: Mutex::default(),
            served: Mutex::default(),
            reconciles: Mutex::default(),
            drops_for: Mutex::default(),
            copies: Mutex::default(),
            quotas_sent: AtomicU64::new(0),
            quotas_kept: AtomicU64::new(0),
            drains_sent: AtomicU64::new(0),
            drains_kept: AtomicU64::new(0),
            copier: AtomicBool::new(false),
            commits: AtomicBool::new(false),
            waker: Mutex::default(),
        });
        let mut slots = Vec::clone(&view);
        for (index, offer) in offers.iter().enumerate() {
            slots.push(Some(Arc::new(SegmentState {
                slot: first + index as u32,
                incarnation: offer.incarnation,
                name: offer.name.clone(),
                node: node.clone(),
                node_segment: index as u32,
                page_kind: offer.page_kind.clone(),
                size: offer.size,
                allocator: Mutex::new(OffsetAllocator::new(offer.size)),
                objects: AtomicU64::new(0),
                arena_bytes: AtomicU64::new(0),
                drain: AtomicU8::new(DrainState::None as u8),
            })));
        }
        *view = Arc::new(slots);
        nodes.insert(id, node.clone());
        self.changed();
        node
    }

    /// Takes a node and its segments out. What lay there must be purged by the caller afterwards.
    pub(crate) fn unmount(&self, node: &NodeState) {
        node.set_phase(NodePhase::Gone);
        let mut nodes = self.nodes.write();
        let mut view = self.view.write();
        let mut slots = Vec::clone(&view);
        for slot in &node.slots {
            slots[*slot as usize] = None;
        }
        *view = Arc::new(slots);
        nodes.remove(&node.id);
        self.changed();
    }
}
