//! Objects leaving: removal on request, eviction for space.
//!
//! An object leaves the index first, so that nobody new finds it; its nodes forget it next; its range is free last.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::copies::Copy;
use super::events::Reason;
use super::history::Cause;
use super::index::mounted;
use super::object::{Object, Replica};
use super::segments::{DropQueue, NodeState};
use super::state::{MasterState, add};
use crate::base::clock::Millis;
use crate::store::model::error::StoreError;
use crate::store::model::header::footprint;
use crate::store::model::key;

/// Most objects taken from one shard under one lock, and the share of its objects that this may be, as a divisor.
const VICTIMS_PER_LOCK: usize = 16;
const VICTIMS_SHARE: usize = 64;
/// Most slots examined under one lock: keeps the hold far below a millisecond.
const EXAMINED_PER_LOCK: u32 = 512;

/// Rounds over all shards that may find nothing before eviction gives up: ageing a full shard takes several steps.
const IDLE_ROUNDS: usize = 32;

/// What removals wait for: every node that had drops outstanding acknowledges them.
pub(crate) struct Barrier {
    drops: Vec<(std::sync::Arc<NodeState>, u64)>,
    /// Of objects that are gone: one may still arrive.
    copies: Vec<std::sync::Arc<Copy>>,
}

impl Barrier {
    /// Whether all nodes are done (an unmounted node holds nothing any more).
    pub(crate) fn reached(&self) -> bool {
        self.drops.iter().all(|(node, sequence)| {
            node.phase() == super::segments::NodePhase::Gone || node.drops.lock().reached(*sequence)
        }) && self.copies.iter().all(|copy| copy.is_forgotten())
    }

    /// Names of the nodes still awaited.
    pub(crate) fn awaited(&self) -> String {
        let drops = self.drops.iter();
        let drops = drops.filter(|(n, s)| !n.drops.lock().reached(*s));
        let copies = self.copies.iter().filter(|c| !c.is_forgotten());
        let names = drops.map(|(n, _)| n.name.as_str());
        let mut names: Vec<&str> = names
            .chain(copies.map(|c| c.target().node.name.as_str()))
            .collect();
        names.dedup();
        names.join(", ")
    }
}

impl MasterState {
    /// Removes a key. The removal is durable (D2) once [`MasterState::barrier`] is reached.
    pub(crate) fn remove(
        &self,
        qualified: &[u8],
        force: bool,
        now: Millis,
    ) -> Result<(), StoreError> {
        let hash = key::hash(qualified);
        // A node that has not reported yet may hold another replica, which would come back with it.
        if self.recovering(now) {
            return Err(StoreError::Rebuilding);
        }
        let object = {
            let mut shard = self.shard(hash);
            let Some(object) = shard.get(hash, qualified) else {
                return Err(StoreError::NotFound);
            };
            if !force && object.leased_until() > now {
                return Err(StoreError::Leased);
            }
            let object = shard.remove(hash, qualified);
            if let Some(object) = &object {
                self.events.removed(object, Reason::Removed);
            }
            object
        };
        if let Some(object) = object {
            // In this order: a node that is unmounted in between takes note of the one or the other.
            self.dismiss(&object);
            self.note_gone(object.hash);
            add(&self.counters.removed, 1);
        }
        Ok(())
    }

    /// Removes what the predicate names; returns `(removed, kept because leased)`.
    pub(crate) fn remove_where(
        &self,
        force: bool,
        now: Millis,
        which: impl Fn(&Object) -> bool,
    ) -> (u64, u64) {
        let (mut removed, mut kept) = (0, 0);
        for shard in self.shards() {
            let mut shard = shard.lock();
            let gone = shard.remove_where(|object| {
                if !which(object) {
                    return false;
                }
                let leased = !force && object.leased_until() > now;
                kept += u64::from(leased);
                !leased
            });
            for object in &gone {
                self.events.removed(object, Reason::Removed);
            }
            drop(shard);
            removed += gone.len() as u64;
            for object in gone {
                self.dismiss(&object);
                self.note_gone(object.hash);
            }
        }
        add(&self.counters.removed, removed);
        (removed, kept)
    }

    /// Takes this very version, whose bytes did not arrive, out of the index; its ranges become the caller's business.
    pub(crate) fn take_version(
        &self,
        qualified: &[u8],
        version: u64,
        which: impl Fn(&Object) -> bool,
    ) -> Option<Object> {
        let hash = key::hash(qualified);
        let object = {
            let mut shard = self.shard(hash);
            shard
                .get(hash, qualified)
                .filter(|o| o.version == version && which(o))?;
            let object = shard.remove(hash, qualified)?;
            self.events.removed(&object, Reason::Incomplete);
            object
        };
        self.gone(&self.segments.view(), &object);
        Some(object)
    }

    fn dismiss(&self, object: &Object) {
        self.gone(&self.segments.view(), object);
        self.dismiss_replicas(&object.replicas, object.size, object.version);
    }

    /// What must be acknowledged before everything removed or evicted so far cannot come back.
    pub(crate) fn barrier(&self) -> Barrier {
        let outstanding = |node: std::sync::Arc<NodeState>| {
            let sequence = DropQueue::barrier(&node.drops.lock())?;
            Some((node, sequence))
        };
        // In this order: a copy that ends in between has left its drops in the queues.
        let copies = self.copies.departed();
        let nodes = self.segments.nodes().into_iter();
        Barrier {
            drops: nodes.filter_map(outstanding).collect(),
            copies,
        }
    }

    /// Evicts until `bytes` are on their way to being free or nothing more may go. Returns the bytes.
    ///
    /// Takes the shards in the order of their oldest candidates, a bounded step under each lock.
    pub(crate) fn evict(&self, bytes: u64, now: Millis) -> u64 {
        let passes: &[bool] = if self.config.evict_soft_pinned {
            &[false, true]
        } else {
            &[false]
        };
        self.evict_in_passes(passes, bytes, now)
    }

    /// As [`MasterState::evict`], without what is soft pinned: for room that would only be convenient.
    fn evict_unpinned(&self, bytes: u64, now: Millis) -> u64 {
        self.evict_in_passes(&[false], bytes, now)
    }

    fn evict_in_passes(&self, passes: &[bool], bytes: u64, now: Millis) -> u64 {
        add(&self.counters.eviction_rounds, 1);
        let before = self.counters.evicted_objects.load(Ordering::Relaxed);
        let mut wanted = bytes;
        for soft_pinned_too in passes {
            // A policy may need several passes over a full shard to age it and one to choose.
            for _ in 0..IDLE_ROUNDS {
                if wanted == 0 || self.evict_round(*soft_pinned_too, now, &mut wanted) == 0 {
                    break;
                }
            }
        }
        let after = self.counters.evicted_objects.load(Ordering::Relaxed);
        add(&self.counters.evictions_useful, u64::from(after > before));
        bytes - wanted
    }

    /// One round over the shards; those that gave nothing are left alone until its end. Returns how many were looked at.
    fn evict_round(&self, soft_pinned_too: bool, now: Millis, wanted: &mut u64) -> usize {
        let mut idle = Vec::new();
        let mut looked_at = 0;
        while *wanted > 0 {
            let Some((number, rank)) = self.eviction_order.take() else {
                break;
            };
            let start = Instant::now();
            let mut shard = self.shard_at(usize::from(number));
            let outdated = shard.rank().is_some_and(|r| r > rank);
            let victims = if outdated {
                Vec::new()
            } else {
                looked_at += 1;
                let most = (shard.len() / VICTIMS_SHARE).clamp(1, VICTIMS_PER_LOCK);
                shard.evict(now, soft_pinned_too, most, EXAMINED_PER_LOCK, wanted)
            };
            for victim in &victims {
                self.events.removed(victim, Reason::Evicted);
            }
            let rank = shard.rank();
            drop(shard);
            let held = start.elapsed().as_nanos() as u64;
            self.counters
                .eviction_hold_max_ns
                .fetch_max(held, Ordering::Relaxed);
            match rank {
                Some(rank) if outdated || !victims.is_empty() => {
                    self.eviction_order.list(number, rank);
                }
                Some(rank) => idle.push((number, rank)),
                // An empty shard is listed by the next insertion.
                None => {}
            }
            for victim in victims {
                *wanted = wanted.saturating_sub(self.evict_one(
                    &victim,
                    soft_pinned_too,
                    Cause::Space,
                    now,
                ));
            }
        }
        for (number, rank) in idle {
            self.eviction_order.list(number, rank);
        }
        looked_at
    }

    /// Finishes the eviction of an object that has left its shard, with its group. Returns the bytes of the others.
    pub(crate) fn evict_one(
        &self,
        victim: &Object,
        soft_pinned_too: bool,
        cause: Cause,
        now: Millis,
    ) -> u64 {
        let mut bytes = 0;
        if let Some(group) = &victim.group {
            let members: Vec<u64> = group.members.lock().keys().copied().collect();
            for hash in members.into_iter().filter(|h| *h != victim.hash) {
                let of_group = |o: &Object| {
                    o.group
                        .as_ref()
                        .is_some_and(|g| std::sync::Arc::ptr_eq(g, group))
                        && o.evictable(now, soft_pinned_too)
                };
                let mut shard = self.shard(hash);
                if let Some(member) = shard.remove_by_hash(hash, of_group) {
                    self.events.removed(&member, Reason::Evicted);
                    drop(shard);
                    bytes += self.evicted(&member, cause, now);
                }
            }
        }
        self.evicted(victim, cause, now);
        bytes
    }

    fn evicted(&self, object: &Object, cause: Cause, now: Millis) -> u64 {
        let bytes = object.size * object.replicas.len() as u64;
        add(&self.counters.evicted_objects, 1);
        add(&self.counters.evicted_bytes, bytes);
        add(&self.counters.evicted_unread, u64::from(!object.read));
        let last_read = self.last_read(object);
        self.counters.eviction_age_ms.observe(now.since(last_read));
        self.history.evicted(object, last_read, cause, now);
        self.dismiss(object);
        bytes
    }

    /// A node has carried out its drops up to `sequence`: the ranges are free.
    pub(crate) fn drops_acked(&self, node: &NodeState, sequence: u64) {
        let freed = node.drops.lock().ack(sequence);
        let view = self.segments.view();
        for range in freed {
            let replica = Replica {
                segment: range.segment,
                offset: range.offset,
            };
            if let Some(segment) = mounted(&view, replica) {
                segment.release(range.offset, range.length);
            }
        }
        self.progress.advance();
    }

    /// Bytes to evict now so that usage falls below the watermark; 0 when it is below. What is already on its way to
    /// being free counts as free.
    pub(crate) fn eviction_need(&self) -> u64 {
        let (used, watermark) = (self.used_with(0), self.watermark());
        if used <= watermark {
            return 0;
        }
        let (capacity, _) = self.capacity();
        used - watermark + (capacity as f64 * self.config.eviction_ratio) as u64
    }

    /// Bytes in use once `more` are and what is leaving is gone.
    fn used_with(&self, more: u64) -> u64 {
        let (_, used) = self.capacity();
        let nodes = self.segments.nodes();
        let leaving: u64 = nodes.iter().map(|n| n.drops.lock().bytes()).sum();
        used.saturating_sub(leaving).saturating_add(more)
    }

    fn watermark(&self) -> u64 {
        let (capacity, _) = self.capacity();
        (capacity as f64 * self.config.high_watermark) as u64
    }

    /// Bytes that will be free in a segment as soon as its node has carried out its drops; 0 when it is not in service.
    pub(crate) fn leaving_bytes(&self, slot: u32) -> u64 {
        let segment = self.segments.get(slot);
        segment
            .filter(|s| s.node.phase() == super::segments::NodePhase::Ok)
            .map_or(0, |s| s.node.drops.lock().bytes_in(slot))
    }

    /// Evicts for an allocation of `payload_bytes` that found no room. What is already on its way to being free counts.
    pub(crate) fn make_room(&self, payload_bytes: u64, now: Millis) -> u64 {
        let wanted = footprint(payload_bytes).unwrap_or(payload_bytes);
        let (capacity, _) = self.capacity();
        let nodes = self.segments.nodes();
        let leaving: u64 = nodes
            .iter()
            .filter(|n| n.phase() == super::segments::NodePhase::Ok)
            .map(|n| n.drops.lock().bytes())
            .sum();
        // A little more than asked: the next ones are coming.
        let wanted = wanted.max(capacity / 512);
        match wanted.saturating_sub(leaving) {
            0 => 0,
            missing => self.evict(missing, now),
        }
    }

    /// Whether room for an arena of `bytes` is on its way in a segment: what is leaving there already, else what is evicted
    /// now, once, and only from a pool that is full as a whole. Nothing that is pinned goes for an arena.
    pub(crate) fn make_room_for_arena(&self, slot: u32, bytes: u64, now: Millis) -> bool {
        let leaving = self.leaving_bytes(slot);
        if leaving < bytes && self.used_with(bytes) > self.watermark() {
            self.evict_unpinned(bytes - leaving, now);
        }
        self.leaving_bytes(slot) > 0
    }

    /// Has the sweeper evict now if the watermark asks for it.
    pub(crate) fn keep_below_watermark(&self) {
        if self.eviction_need() > 0 {
            self.nudge.give();
        }
    }
}
