//! Settling with a node what a vanished or unsure writer left behind: a range of it, an arena, the target of a copy.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::arenas::Arena;
use super::object::{Object, Replica};
use super::state::{MasterState, add};
use crate::base::clock::Millis;
use crate::base::id::Id128;
use crate::store::model::header::footprint;

/// How long a busy reconciliation rests.
const RECONCILE_RETRY: Duration = Duration::from_secs(1);

/// A range whose writer is gone or unsure, to be settled with its node.
#[derive(Clone, Debug)]
pub(crate) struct ReconcileJob {
    pub(crate) node: Id128,
    pub(crate) segment: u32,
    pub(crate) node_segment: u32,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) client: Id128,
    pub(crate) what: Settles,
    /// The next version when the job was made: later ones in the range are not its business.
    pub(crate) versions_end: u64,
    pub(crate) not_before: Millis,
    pub(crate) sent: bool,
}

/// What a reconciliation settles.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Settles {
    /// A single range, freed afterwards.
    Range,
    /// An arena, dissolved afterwards.
    Arena(u64),
    /// The target of a copy of this version, freed afterwards.
    Copy(u64),
}

impl MasterState {
    /// Has the node settle a closed arena, which is dissolved afterwards.
    pub(crate) fn settle_arena(&self, id: u64, now: Millis) {
        let Some(arena) = self.arenas.lock().get(&id).cloned() else {
            return;
        };
        let (segment, offset, length, client) = {
            let arena = arena.lock();
            (arena.segment, arena.offset, arena.length, arena.client)
        };
        self.reconcile(segment, offset, length, client, Settles::Arena(id), now);
    }

    /// Keeps a range unused until its node vouches that `client` can no longer write there.
    pub(crate) fn quarantine(&self, replica: Replica, length: u64, client: Id128, now: Millis) {
        self.reconcile(
            replica.segment,
            replica.offset,
            length,
            client,
            Settles::Range,
            now,
        );
    }

    pub(crate) fn reconcile(
        &self,
        slot: u32,
        offset: u64,
        length: u64,
        client: Id128,
        what: Settles,
        now: Millis,
    ) {
        let Some(segment) = self.segments.get(slot) else {
            return;
        };
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let job = ReconcileJob {
            node: segment.node.id,
            segment: slot,
            node_segment: segment.node_segment,
            offset,
            length,
            client,
            what,
            versions_end: self.next_version(),
            not_before: now,
            sent: false,
        };
        self.reconciles.lock().insert(id, job);
        self.send_reconciles(now);
    }

    /// Hands due jobs to their nodes' sessions.
    pub(crate) fn send_reconciles(&self, now: Millis) {
        let mut jobs = self.reconciles.lock();
        for (id, job) in jobs
            .iter_mut()
            .filter(|(_, j)| !j.sent && j.not_before <= now)
        {
            if let Some(node) = self.segments.node(job.node) {
                job.sent = true;
                node.reconciles.lock().push(*id);
                node.wake();
            }
        }
    }

    /// Whether a replica lies in the range of a job.
    fn concerns(job: &ReconcileJob, object: &Object) -> bool {
        let range = job.offset..job.offset.saturating_add(job.length);
        let there = |r: &Replica| r.segment == job.segment && range.contains(&r.offset);
        object.replicas.iter().any(there)
    }

    /// Which versions a job concerns, and those of them that are objects: the node keeps them. `None`: not known yet.
    pub(crate) fn kept(&self, job: &ReconcileJob) -> Option<(std::ops::Range<u64>, Vec<u64>)> {
        let Settles::Arena(id) = &job.what else {
            return Some((0..job.versions_end, Vec::new()));
        };
        let Some(arena) = self.arenas.lock().get(id).cloned() else {
            // Given up already: nothing in its range is ours to settle.
            return Some((1..1, Vec::new()));
        };
        // A commit that was let in before the arena was closed is about to enter the index: ask again.
        let versions = {
            let arena = arena.lock();
            if arena.committing > 0 {
                return None;
            }
            arena.versions.clone()
        };
        let mut kept = Vec::new();
        self.walk(0, usize::MAX, |o| {
            // One that was moved elsewhere is no business of this node any more.
            if versions.contains(&o.version) && Self::concerns(job, o) {
                kept.push(o.version);
            }
            false
        });
        Some((versions, kept))
    }

    /// The node's answer to a reconciliation.
    pub(crate) fn reconciled(&self, id: u64, busy: bool, missing: &[u64], now: Millis) {
        let job = {
            let mut jobs = self.reconciles.lock();
            if busy {
                if let Some(job) = jobs.get_mut(&id) {
                    job.sent = false;
                    job.not_before = now.plus(RECONCILE_RETRY);
                }
                return;
            }
            jobs.remove(&id)
        };
        let Some(job) = job else { return };
        match job.what {
            Settles::Range | Settles::Copy(_) => {
                if let Some(segment) = self.segments.get(job.segment) {
                    segment.release(job.offset, job.length);
                }
                if let Settles::Copy(version) = job.what {
                    self.copy_settled(version);
                }
                self.progress.advance();
            }
            Settles::Arena(arena) => {
                self.remove_missing(missing, &job);
                self.arena_dissolve(arena);
            }
        }
    }

    /// Objects that were committed and never arrived in the range of `job`.
    fn remove_missing(&self, missing: &[u64], job: &ReconcileJob) {
        if missing.is_empty() {
            return;
        }
        let missing: HashSet<u64> = missing.iter().copied().collect();
        let mut found = Vec::new();
        self.walk(0, usize::MAX, |o| {
            if missing.contains(&o.version) {
                found.push((o.key.clone(), o.version));
            }
            false
        });
        for (key, version) in found {
            // Moved elsewhere meanwhile, it has arrived.
            let here = |o: &Object| Self::concerns(job, o);
            if let Some(object) = self.take_version(&key, version, here) {
                self.drop_replicas(&object.replicas, object.size, version);
            }
        }
    }

    /// A client is gone: what it had not finished is settled with the nodes.
    pub(crate) fn client_gone(&self, client: Id128, now: Millis) {
        let mine: Vec<u64> = {
            let arenas = self.arenas.lock();
            arenas
                .iter()
                .filter_map(|(id, arena)| {
                    let mut arena: parking_lot::MutexGuard<'_, Arena> = arena.lock();
                    if arena.client != client || arena.closed {
                        return None;
                    }
                    arena.closed = true;
                    Some(*id)
                })
                .collect()
        };
        for id in mine {
            self.settle_arena(id, now);
        }
        self.abandon(now, |put| put.client == client);
    }

    /// Reclaims the unfinished puts the predicate names.
    pub(crate) fn abandon(&self, now: Millis, which: impl Fn(&super::puts::PendingPut) -> bool) {
        for pending in &self.pending {
            let mut gone = Vec::new();
            pending.lock().retain(|_, put| {
                let leaves = !put.ending && which(put);
                if leaves {
                    gone.push((put.replicas.clone(), put.size, put.client));
                }
                !leaves
            });
            add(&self.counters.released_puts, gone.len() as u64);
            for (replicas, size, client) in gone {
                for replica in replicas {
                    self.quarantine(replica, footprint(size).unwrap_or(0), client, now);
                }
            }
        }
    }
}
