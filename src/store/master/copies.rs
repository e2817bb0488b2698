//! Replicas on their way from one node to another: who copies what where, and what happens when the object, a node or the
//! copier goes meanwhile.
//!
//! The node that has the bytes writes them to the other one, as a client would, under the same version. As long as that
//! is under way nothing of the object is dropped at its nodes: what leaves the index is *parked* here and dropped when the
//! copy is over. So the copier never sends bytes of something else, and a removal is complete only when no copy can bring
//! its object back (D2). A copy whose end nobody knows is settled with the target like a put of a vanished client.
//!
//! Lock order: a shard, then the copies, then a node's queue.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::index::mounted;
use super::object::{Object, Replica, Replicas};
use super::quotas::bytes_of;
use super::reconcile::Settles;
use super::segments::{DropQueue, NodePhase, NodeState, SegmentState};
use super::state::MasterState;
use crate::base::clock::Millis;
use crate::base::id::Id128;
use crate::store::model::error::StoreError;
use crate::store::model::header::footprint;

/// Copies of one node under way at most: its queue stays short, and others have their turn.
pub(crate) const COPIES_MAX: usize = 65_536;

/// What became of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copied {
    /// The replica is in place at the target.
    Done,
    /// The source has no such object, or not all of it yet. Nothing was published.
    NotThere,
    /// The target did not take it. All writes have ended.
    Refused,
    /// The source had too much to do. Nothing was written.
    Busy,
    /// Nobody knows what the target has.
    Unsure,
}

/// A copy that is over, for whoever asked for it.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    pub(crate) asker: Id128,
    pub(crate) version: u64,
    pub(crate) key: Box<[u8]>,
    pub(crate) size: u64,
    pub(crate) outcome: Copied,
}

/// One copy under way.
pub(crate) struct Copy {
    pub(crate) key: Box<[u8]>,
    pub(crate) hash: u64,
    pub(crate) version: u64,
    pub(crate) size: u64,
    pub(crate) from: Replica,
    pub(crate) to: Replica,
    pub(crate) source: Arc<NodeState>,
    target: Arc<SegmentState>,
    asker: Id128,
    pub(crate) expires: Millis,
    state: Mutex<CopyState>,
}

#[derive(Default)]
struct CopyState {
    /// What the object had when it left the index.
    parked: Replicas,
    departed: bool,
    /// The target is being asked what it has.
    settling: bool,
    /// Over: what the nodes are to acknowledge before nothing of a departed object is left.
    over: Option<Vec<(Arc<NodeState>, u64)>>,
}

impl Copy {
    /// Whether nothing of its object can come back any more.
    pub(crate) fn is_forgotten(&self) -> bool {
        let state = self.state.lock();
        state.over.as_ref().is_some_and(|drops| {
            drops
                .iter()
                .all(|(n, count)| n.phase() == NodePhase::Gone || n.drops.lock().reached(*count))
        })
    }

    /// The node it goes to.
    pub(crate) fn target(&self) -> &Arc<SegmentState> {
        &self.target
    }
}

/// All copies under way.
#[derive(Default)]
pub(crate) struct Copies {
    /// Spares everybody else the lock.
    count: AtomicUsize,
    /// An object has one copy under way at most.
    by_version: Mutex<HashMap<u64, Arc<Copy>>>,
    /// What was handed to a node in one message.
    batches: Mutex<HashMap<u64, Vec<Arc<Copy>>>>,
    ended: Mutex<Vec<Ended>>,
    next_batch: AtomicU64,
    /// Since the start.
    pub(crate) done: AtomicU64,
    pub(crate) done_bytes: AtomicU64,
    pub(crate) failed: AtomicU64,
}

impl Copies {
    pub(crate) fn under_way(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Whether this replica is (perhaps) being written by a copy.
    pub(crate) fn writes(&self, version: u64, replica: Replica) -> bool {
        self.under_way() > 0
            && self
                .by_version
                .lock()
                .get(&version)
                .is_some_and(|c| c.to == replica)
    }

    /// Takes the replicas of an object that has left the index, if it is being copied; else they are the caller's to drop.
    pub(crate) fn park(&self, version: u64, replicas: &[Replica]) -> bool {
        if self.under_way() == 0 {
            return false;
        }
        let copies = self.by_version.lock();
        let Some(copy) = copies.get(&version) else {
            return false;
        };
        let mut state = copy.state.lock();
        state.departed = true;
        state.parked.extend_from_slice(replicas);
        true
    }

    /// Copies of objects that have left the index: they must be over before those are forgotten.
    pub(crate) fn departed(&self) -> Vec<Arc<Copy>> {
        if self.under_way() == 0 {
            return Vec::new();
        }
        let copies = self.by_version.lock();
        let departed = copies.values().filter(|c| c.state.lock().departed);
        departed.cloned().collect()
    }

    /// The copies of a message.
    pub(crate) fn batch(&self, sequence: u64) -> Vec<Arc<Copy>> {
        self.batches
            .lock()
            .get(&sequence)
            .cloned()
            .unwrap_or_default()
    }

    /// What has ended since the last call, of one asker.
    pub(crate) fn take_ended(&self, asker: Id128) -> Vec<Ended> {
        let mut ended = self.ended.lock();
        let (own, others) = std::mem::take(&mut *ended)
            .into_iter()
            .partition(|e| e.asker == asker);
        *ended = others;
        own
    }

    /// Keeps what has ended for these askers only.
    pub(crate) fn keep_ended(&self, askers: &[Id128]) {
        self.ended.lock().retain(|e| askers.contains(&e.asker));
    }
}

impl MasterState {
    /// Has `from`, a replica of the object of this key and version, moved to a range of `target`. Part of a batch from
    /// [`MasterState::send_copies`] on.
    ///
    /// # Errors
    /// `NoSpace` in that segment; `NotFound` when the object, or its replica there, is gone or already on its way.
    #[expect(clippy::too_many_arguments, reason = "the parts of a copy, once")]
    pub(crate) fn begin_copy(
        &self,
        key: &[u8],
        hash: u64,
        version: u64,
        from: Replica,
        target: &Arc<SegmentState>,
        asker: Id128,
        expires: Millis,
    ) -> Result<Arc<Copy>, StoreError> {
        let source = self
            .segments
            .get(from.segment)
            .ok_or(StoreError::SegmentNotFound)?;
        // Under the shard's lock: whoever takes the object out afterwards finds the copy.
        let shard = self.shard(hash);
        let object = shard.get(hash, key).ok_or(StoreError::NotFound)?;
        let is_it = object.version == version && object.replicas.contains(&from);
        let mut copies = self.copies.by_version.lock();
        if !is_it || copies.contains_key(&version) || copies.len() >= COPIES_MAX {
            return Err(StoreError::NotFound);
        }
        let wanted_bytes = footprint(object.size).unwrap_or(u64::MAX);
        let offset = target.allocator.lock().allocate(wanted_bytes);
        let offset = offset.ok_or(StoreError::NoSpace { wanted_bytes })?;
        let copy = Arc::new(Copy {
            key: object.key.clone(),
            hash,
            version,
            size: object.size,
            from,
            to: Replica {
                segment: target.slot,
                offset,
            },
            source: source.node.clone(),
            target: target.clone(),
            asker,
            expires,
            state: Mutex::default(),
        });
        copies.insert(version, copy.clone());
        self.copies.count.store(copies.len(), Ordering::Release);
        Ok(copy)
    }

    /// Hands copies from one node to another to the source's session, as one message.
    pub(crate) fn send_copies(&self, batch: Vec<Arc<Copy>>) {
        let Some(first) = batch.first() else { return };
        let source = first.source.clone();
        let sequence = self.copies.next_batch.fetch_add(1, Ordering::Relaxed) + 1;
        self.copies.batches.lock().insert(sequence, batch);
        source.copies.lock().push(sequence);
        source.wake();
    }

    /// The source's report on a message, an outcome per copy.
    pub(crate) fn copies_reported(&self, sequence: u64, outcomes: &[Copied], now: Millis) {
        let Some(batch) = self.copies.batches.lock().remove(&sequence) else {
            return;
        };
        for (at, copy) in batch.iter().enumerate() {
            let outcome = outcomes.get(at).copied().unwrap_or(Copied::Unsure);
            if !copy.state.lock().settling {
                self.copy_ended(copy, outcome, now);
            }
        }
        self.progress.advance();
        self.nudge.give();
    }

    /// Takes away a replica of an object that has another one which is as good (`enough`); whether it did.
    pub(crate) fn drop_spare_replica(
        &self,
        key: &[u8],
        hash: u64,
        version: u64,
        spare: Replica,
        enough: impl Fn(&Replica) -> bool,
    ) -> bool {
        let mut shard = self.shard(hash);
        let object = shard.get_mut(hash, key).filter(|o| o.version == version);
        let Some(object) = object.filter(|o| o.replicas.contains(&spare)) else {
            return false;
        };
        let others = object.replicas.iter().any(|r| *r != spare && enough(r));
        // One that is being copied from here ends first.
        if !others || self.copies.by_version.lock().contains_key(&version) {
            return false;
        }
        object.replicas.retain(|r| *r != spare);
        let size = object.size;
        self.quotas.refund(&object.key, bytes_of(size, 1));
        if let Some(segment) = mounted(&self.segments.view(), spare) {
            segment.objects.fetch_sub(1, Ordering::Relaxed);
        }
        drop(shard);
        self.dismiss_replicas(&[spare], size, version);
        true
    }

    fn copy_ended(&self, copy: &Arc<Copy>, outcome: Copied, now: Millis) {
        match outcome {
            Copied::Done => self.copy_arrived(copy),
            Copied::Unsure => self.settle_copy(copy, now),
            // What the source did not write is as free as what the target did not take; it forgets it in any case.
            Copied::NotThere | Copied::Refused | Copied::Busy => {
                self.copy_over(copy, outcome, true)
            }
        }
    }

    /// Enters the new replica into the index in place of the old one; if the object has gone meanwhile, drops it.
    fn copy_arrived(&self, copy: &Arc<Copy>) {
        let mut shard = self.shard(copy.hash);
        let view = self.segments.view();
        let object: Option<&mut Object> = shard.get_mut(copy.hash, &copy.key);
        let there = mounted(&view, copy.to);
        let (Some(object), Some(there)) = (object.filter(|o| o.version == copy.version), there)
        else {
            drop(shard);
            return self.copy_over(copy, Copied::Refused, true);
        };
        if !object.replicas.contains(&copy.to) {
            object.replicas.push(copy.to);
            self.quotas.charge(&object.key, bytes_of(object.size, 1));
            there.objects.fetch_add(1, Ordering::Relaxed);
        }
        let had = object.replicas.len();
        object.replicas.retain(|r| *r != copy.from);
        let less = had - object.replicas.len();
        self.quotas.refund(&object.key, bytes_of(object.size, less));
        if object.replicas.len() < had
            && let Some(source) = mounted(&view, copy.from)
        {
            source.objects.fetch_sub(1, Ordering::Relaxed);
        }
        // Still under the shard's lock: whoever takes the object out now drops what it has now.
        self.leave_copies(copy);
        copy.state.lock().over = Some(Vec::new());
        drop(shard);
        self.dismiss_replicas(&[copy.from], copy.size, copy.version);
        self.note_end(copy, Copied::Done);
    }

    /// Ends a copy without a replica; `drops`: the target forgets what it may have, and its range is free then.
    fn copy_over(&self, copy: &Arc<Copy>, outcome: Copied, drops: bool) {
        {
            let mut copies = self.copies.by_version.lock();
            let mut state = copy.state.lock();
            if state.over.is_some() {
                return;
            }
            let mut nodes = vec![copy.target.node.clone()];
            if drops {
                self.drop_replicas(&[copy.to], copy.size, copy.version);
            }
            let parked = std::mem::take(&mut state.parked);
            let view = self.segments.view();
            let node_of = |r: &Replica| Some(mounted(&view, *r)?.node.clone());
            nodes.extend(parked.iter().filter_map(node_of));
            self.dismiss_unparked(&parked, copy.size, copy.version);
            let count = |n: Arc<NodeState>| {
                let barrier = DropQueue::barrier(&n.drops.lock())?;
                Some((n, barrier))
            };
            state.over = Some(nodes.into_iter().filter_map(count).collect());
            // Last: a barrier sees the copy, or the drops.
            copies.remove(&copy.version);
            self.copies.count.store(copies.len(), Ordering::Release);
        }
        self.note_end(copy, outcome);
    }

    fn leave_copies(&self, copy: &Copy) {
        let mut copies = self.copies.by_version.lock();
        copies.remove(&copy.version);
        self.copies.count.store(copies.len(), Ordering::Release);
    }

    fn note_end(&self, copy: &Copy, outcome: Copied) {
        if outcome == Copied::Done {
            self.copies.done.fetch_add(1, Ordering::Relaxed);
            self.copies
                .done_bytes
                .fetch_add(copy.size, Ordering::Relaxed);
        } else if outcome != Copied::Busy {
            self.copies.failed.fetch_add(1, Ordering::Relaxed);
        }
        self.copies.ended.lock().push(Ended {
            asker: copy.asker,
            version: copy.version,
            key: copy.key.clone(),
            size: copy.size,
            outcome,
        });
    }

    /// Nobody knows what the target has: it is asked to give up the range, and only then is the copy over.
    fn settle_copy(&self, copy: &Arc<Copy>, now: Millis) {
        {
            let mut state = copy.state.lock();
            if state.settling || state.over.is_some() {
                return;
            }
            state.settling = true;
        }
        if self.segments.get(copy.to.segment).is_none() {
            return self.copy_over(copy, Copied::Refused, false);
        }
        let length = footprint(copy.size).unwrap_or(0);
        let what = Settles::Copy(copy.version);
        self.reconcile(
            copy.to.segment,
            copy.to.offset,
            length,
            copy.source.id,
            what,
            now,
        );
    }

    /// The target of an unsure copy has given up its range, which is free.
    pub(crate) fn copy_settled(&self, version: u64) {
        let copy = self.copies.by_version.lock().get(&version).cloned();
        if let Some(copy) = copy.filter(|c| c.state.lock().settling) {
            self.copy_over(&copy, Copied::Refused, false);
        }
    }

    /// A node's session has ended: what it was copying is unsure, and what was going to it fails if it is unmounted.
    pub(crate) fn node_copies_lost(&self, node: &NodeState, now: Millis) {
        if self.copies.under_way() == 0 {
            return;
        }
        let all: Vec<Arc<Copy>> = self.copies.by_version.lock().values().cloned().collect();
        let gone = node.phase() == NodePhase::Gone;
        for copy in all {
            if gone && copy.target.node.id == node.id {
                self.copy_over(&copy, Copied::Refused, false);
            } else if copy.source.id == node.id {
                self.settle_copy(&copy, now);
            }
        }
        let mut batches = self.copies.batches.lock();
        batches.retain(|_, b| b.first().is_some_and(|c| c.source.id != node.id));
        drop(batches);
        node.copies.lock().clear();
        self.nudge.give();
    }

    /// Settles copies that nobody reported on in time.
    pub(crate) fn overdue_copies(&self, now: Millis) {
        if self.copies.under_way() == 0 {
            return;
        }
        let overdue: Vec<Arc<Copy>> = {
            let copies = self.copies.by_version.lock();
            let late = copies.values().filter(|c| c.expires <= now);
            late.cloned().collect()
        };
        for copy in &overdue {
            self.settle_copy(copy, now);
        }
        let lives = |c: &Arc<Copy>| c.state.lock().over.is_none();
        let mut batches = self.copies.batches.lock();
        batches.retain(|_, b| b.iter().any(lives));
    }
}
