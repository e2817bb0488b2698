//! Nodes coming and going: registration with their directory (how the index survives the master), loss, unmounting,
//! and settling what a vanished writer left behind.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::events::Reason;
use super::object::{Attributes, Replica, Replicas};
use super::puts::{Arena, Written, mounted};
use super::segments::{Drop, NodePhase, NodeState, Offer};
use super::state::{MasterState, add};
use crate::base::clock::{Millis, unix_ms};
use crate::base::id::Id128;
use crate::store::model::header::footprint;
use crate::store::model::key;

/// How long a busy reconciliation rests.
const RECONCILE_RETRY: Duration = Duration::from_secs(1);

/// One entry of a node's directory.
#[derive(Clone, Debug)]
pub(crate) struct Reported {
    pub(crate) key: Box<[u8]>,
    pub(crate) node_segment: u32,
    pub(crate) offset: u64,
    pub(crate) size: u64,
    pub(crate) written: Written,
    pub(crate) attributes: Attributes,
    /// Its writer, when the bytes are not in place yet.
    pub(crate) pending: Option<Id128>,
    /// Not an object but a whole arena of an earlier term: the number of its versions.
    pub(crate) arena_versions: u32,
}

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
}

/// A registration under way at the same master: what the node still has.
pub(crate) struct Registration {
    pub(crate) node: Arc<NodeState>,
    /// The node was known and kept its memory. It forgets only what it was told to, so everything the index has there
    /// is still true; what it reports beyond that is dropped.
    returning: bool,
    /// It was unmounted by this master before: what happened to its objects since.
    forgotten: Option<Departed>,
    /// Arenas of earlier terms it reported: slot, start, end, name. Their ranges are taken as a whole.
    arenas: Vec<(u32, u64, u64, u64)>,
}

/// How far a node's versions may be ahead of this clock: another master's was.
const VERSION_AHEAD_MS: u64 = 10 * 365 * 86_400_000;
/// Most keys remembered for a node that was unmounted and may return.
const DEPARTED_KEYS_MAX: usize = 200_000;
/// Most such nodes.
const DEPARTED_NODES_MAX: usize = 64;

/// What a node that was unmounted has missed (D2): if it returns, these objects of its must not.
#[derive(Clone, Debug, Default)]
pub(crate) struct Departed {
    /// Hashes of keys removed or replaced since.
    keys: HashSet<u64>,
    /// Versions it had been asked to drop.
    versions: HashSet<u64>,
    /// More than can be remembered: nothing of it is taken back.
    all: bool,
}

impl Departed {
    fn forgets(&self, entry: &Reported) -> bool {
        self.all
            || self.versions.contains(&entry.written.version)
            || self.keys.contains(&key::hash(&entry.key))
    }
}

impl MasterState {
    /// A key was removed or replaced: nodes that are away hear of it when they return.
    pub(crate) fn note_gone(&self, hash: u64) {
        if !self.any_departed.load(Ordering::Acquire) {
            return;
        }
        for departed in self.departed.lock().values_mut() {
            if departed.keys.len() < DEPARTED_KEYS_MAX {
                departed.keys.insert(hash);
            } else {
                departed.all = true;
            }
        }
    }

    fn depart(&self, node: &NodeState) {
        let mut departed = self.departed.lock();
        if departed.len() >= DEPARTED_NODES_MAX {
            // Somebody has to be forgotten; that one is then taken for a stranger.
            let first = departed.keys().next().copied();
            first.map(|id| departed.remove(&id));
        }
        let entry = departed.entry(node.id).or_default();
        entry.versions.extend(node.drops.lock().versions());
        self.any_departed.store(true, Ordering::Release);
    }

    /// A node registers. A returning one keeps its segments; one that listens where another did replaces it.
    #[expect(
        clippy::too_many_arguments,
        reason = "the fields of a registration, once"
    )]
    pub(crate) fn register(
        &self,
        id: Id128,
        name: &str,
        address: &str,
        host_id: &str,
        shm_socket: &str,
        offers: &[Offer],
        now: Millis,
    ) -> Registration {
        let _one = self.lifecycle.lock();
        let known = self.segments.node(id);
        // A registration that broke off half-way is begun anew: what it has indexed says nothing about the rest.
        if let Some(half) = known
            .as_ref()
            .filter(|n| !n.indexed.load(Ordering::Acquire))
        {
            self.unmount(half, now);
        }
        if let Some(node) = known.filter(|n| n.indexed.load(Ordering::Acquire)) {
            if node.phase() != NodePhase::Rebuilding {
                self.rebuilding.fetch_add(1, Ordering::AcqRel);
            }
            node.set_phase(NodePhase::Rebuilding);
            node.last_seen.store(now.0, Ordering::Relaxed);
            for job in self.reconciles.lock().values_mut().filter(|j| j.node == id) {
                job.sent = false;
            }
            // They are handed out again: a job that went out twice would settle what came after the first.
            node.reconciles.lock().clear();
            self.segments.changed();
            add(&self.counters.remounts, offers.len() as u64);
            return Registration {
                node,
                returning: true,
                forgotten: None,
                arenas: Vec::new(),
            };
        }
        for old in self.segments.nodes() {
            if old.address == address {
                tracing::info!(node = %old.name, %address, "replaced by a new node at its address");
                self.unmount(&old, now);
            }
        }
        self.rebuilding.fetch_add(1, Ordering::AcqRel);
        let node = self
            .segments
            .mount(id, name, address, host_id, shm_socket, offers, now);
        add(&self.counters.mounts, offers.len() as u64);
        Registration {
            node,
            returning: false,
            // Kept until the registration is complete: one that breaks off is begun anew.
            forgotten: self.departed.lock().get(&id).cloned(),
            arenas: Vec::new(),
        }
    }

    /// Takes over one reported entry. Highest version wins; what loses is dropped at its node.
    pub(crate) fn adopt(&self, registration: &mut Registration, entry: Reported, now: Millis) {
        let node = &registration.node;
        // A version from far ahead of the clock was never issued; taken over, it would use up all there are.
        if entry.written.version >> 10 > (unix_ms() + VERSION_AHEAD_MS) * 1000 {
            return self.tell_drop(node, &entry);
        }
        self.raise_versions(entry.written.version);
        let Some(slot) = node.slots.get(entry.node_segment as usize).copied() else {
            return;
        };
        let replica = Replica {
            segment: slot,
            offset: entry.offset,
        };
        if entry.arena_versions > 0 {
            return self.adopt_arena(registration, &entry, replica, now);
        }
        let node = &registration.node;
        if registration.returning {
            if !self.knows(&entry, replica) {
                self.tell_drop(node, &entry);
            }
            return;
        }
        if registration
            .forgotten
            .as_ref()
            .is_some_and(|d| d.forgets(&entry))
        {
            return self.tell_drop(node, &entry);
        }
        let Some(bytes) = footprint(entry.size).filter(|_| key::split(&entry.key).is_some()) else {
            return self.tell_drop(node, &entry);
        };
        let Some(segment) = self.segments.get(slot) else {
            return;
        };
        let end = entry.offset.saturating_add(bytes);
        let within = |(s, from, to, _): &&(u32, u64, u64, u64)| {
            *s == slot && *from <= entry.offset && end <= *to
        };
        if let Some((_, _, _, id)) = registration.arenas.iter().find(within) {
            // Its range is taken with the arena; what is on its way there is settled with it.
            let arena = self.arenas.lock().get(id).cloned();
            if let (Some(arena), None) = (arena, entry.pending) {
                arena.lock().filled.insert(entry.offset, bytes);
                segment.arena_bytes.fetch_sub(bytes, Ordering::Relaxed);
                self.adopt_complete(entry, replica, now);
            }
            return;
        }
        let allocated = segment.allocator.lock().allocate_at(entry.offset, bytes);
        if !allocated {
            tracing::warn!(node = %node.name, offset = entry.offset, "a reported object overlaps another");
            return self.tell_drop(node, &entry);
        }
        if let Some(client) = entry.pending {
            return self.quarantine(replica, bytes, client, now);
        }
        self.adopt_complete(entry, replica, now);
    }

    /// Takes over an arena that a client of an earlier term may still write into: nothing of its range is used before the
    /// node says that the client has left it.
    fn adopt_arena(
        &self,
        registration: &mut Registration,
        entry: &Reported,
        replica: Replica,
        now: Millis,
    ) {
        let (id, count) = (entry.written.version, u64::from(entry.arena_versions));
        self.raise_versions(id.saturating_add(count));
        let known = self.arenas.lock().get(&id).cloned();
        if let Some(arena) = known {
            // This master's own: its node was told of a later term meanwhile, and lets nobody acknowledge there.
            let closed = std::mem::replace(&mut arena.lock().closed, true);
            if !closed {
                self.settle_arena(id, now);
            }
            return;
        }
        let (Some(client), false) = (entry.pending, registration.returning) else {
            return;
        };
        let Some(segment) = self.segments.get(replica.segment) else {
            return;
        };
        let length = entry.size;
        let allocated = segment.allocator.lock().allocate_at(entry.offset, length);
        if !allocated {
            tracing::warn!(node = %registration.node.name, offset = entry.offset, "a reported arena overlaps something");
            return;
        }
        segment.arena_bytes.fetch_add(length, Ordering::Relaxed);
        let arena = Arena::of_earlier_term(client, replica, length, id..id + count);
        self.arenas
            .lock()
            .insert(id, Arc::new(parking_lot::Mutex::new(arena)));
        let end = entry.offset + length;
        registration
            .arenas
            .push((replica.segment, entry.offset, end, id));
        self.settle_arena(id, now);
    }

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

    fn adopt_complete(&self, entry: Reported, replica: Replica, now: Millis) {
        let hash = key::hash(&entry.key);
        let version = entry.written.version;
        let mut shard = self.shard(hash);
        // Under the shard's lock, as in `complete`: a node unmounted meanwhile leaves nothing behind.
        let view = self.segments.view();
        if mounted(&view, replica).is_none() {
            return;
        }
        let known = shard.get_mut(hash, &entry.key);
        match known {
            Some(object) if object.version == version => {
                if !object.replicas.contains(&replica) {
                    object.replicas.push(replica);
                    if let Some(segment) = mounted(&view, replica) {
                        segment.objects.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
            Some(object) if object.version > version => {
                drop(shard);
                self.dismiss_replicas(&[replica], entry.size, version);
            }
            known => {
                let replaces = known.is_some();
                let old = if replaces {
                    shard.remove(hash, &entry.key)
                } else {
                    None
                };
                let replicas: Replicas = [replica].into_iter().collect();
                let object = self.object(
                    entry.key,
                    hash,
                    entry.size,
                    replicas,
                    &entry.attributes,
                    &entry.written,
                    now,
                );
                self.insert(&mut shard, &view, object, now);
                drop(shard);
                if let Some(old) = old {
                    self.gone(&view, &old);
                    self.dismiss_replicas(&old.replicas, old.size, old.version);
                }
            }
        }
    }

    /// Whether the index, an unfinished put or an arena accounts for an entry of a returning node.
    fn knows(&self, entry: &Reported, replica: Replica) -> bool {
        let version = entry.written.version;
        let hash = key::hash(&entry.key);
        // In this order: a put leaves the unfinished ones only after it has entered the index.
        self.pending_shard(version).lock().contains_key(&version)
            || self.arenas.lock().values().any(|a| {
                let a = a.lock();
                a.segment == replica.segment
                    && (a.offset..a.offset + a.length).contains(&entry.offset)
            })
            || self.peek(hash, &entry.key, |o| {
                o.version == version && o.replicas.contains(&replica)
            }) == Some(true)
    }

    fn tell_drop(&self, node: &NodeState, entry: &Reported) {
        node.drops.lock().push(Drop {
            node_segment: entry.node_segment,
            offset: entry.offset,
            version: entry.written.version,
            frees: None,
        });
        node.wake();
    }

    /// The directory is complete: what the index has there and the node has not is gone; the node is in service.
    ///
    /// False when the node was unmounted meanwhile.
    pub(crate) fn registered(&self, registration: Registration) -> bool {
        let _one = self.lifecycle.lock();
        let node = registration.node;
        node.indexed.store(true, Ordering::Release);
        if !node.advance_phase(NodePhase::Rebuilding, NodePhase::Ok) {
            return false;
        }
        self.departed.lock().remove(&node.id);
        self.rebuilding.fetch_sub(1, Ordering::AcqRel);
        self.segments.changed();
        self.progress.advance();
        true
    }

    /// A node that has served another master, or this one before it was unmounted, is welcomed under a later term: what was
    /// granted there before must not be written any more.
    pub(crate) fn raise_term_for(&self, id: Id128, last_term: u64) {
        let indexed = self
            .segments
            .node(id)
            .is_some_and(|n| n.indexed.load(Ordering::Acquire));
        if last_term > self.term() || (last_term == self.term() && !indexed) {
            self.raise_term(last_term);
        }
    }

    /// Whether puts to a node are still under way.
    pub(crate) fn writing_to(&self, node: &NodeState) -> bool {
        let there = |slot: &u32| node.slots.contains(slot);
        self.pending.iter().any(|pending| {
            let pending = pending.lock();
            pending
                .values()
                .any(|put| put.replicas.iter().any(|r| there(&r.segment)))
        })
    }

    /// A registration that broke off: the node counts as lost until it tries again.
    pub(crate) fn registration_failed(&self, node: &Arc<NodeState>) {
        let _one = self.lifecycle.lock();
        if node.advance_phase(NodePhase::Rebuilding, NodePhase::Lost) {
            self.rebuilding.fetch_sub(1, Ordering::AcqRel);
            self.segments.changed();
        }
    }

    /// The node's session broke.
    pub(crate) fn lost(&self, node: &Arc<NodeState>) {
        let _one = self.lifecycle.lock();
        match node.phase() {
            NodePhase::Gone => {}
            NodePhase::Rebuilding => self.registration_failed(node),
            _ => {
                node.set_phase(NodePhase::Lost);
                self.segments.changed();
            }
        }
    }

    /// Takes a node out with everything that lay only there.
    pub(crate) fn unmount(&self, node: &Arc<NodeState>, _now: Millis) {
        let _one = self.lifecycle.lock();
        self.registration_failed(node);
        self.depart(node);
        self.segments.unmount(node);
        add(&self.counters.unmounts, node.slots.len() as u64);
        let of_node = |r: &Replica| node.slots.contains(&r.segment);
        self.purge(of_node);
        for pending in &self.pending {
            for put in pending.lock().values_mut() {
                // Keep positions: clients answer by index. A replica on no segment is simply not written.
                for r in put.replicas.iter_mut().filter(|r| of_node(r)) {
                    r.segment = u32::MAX;
                }
            }
        }
        self.arenas
            .lock()
            .retain(|_, a| !node.slots.contains(&a.lock().segment));
        self.reconciles.lock().retain(|_, job| job.node != node.id);
        self.progress.advance();
    }

    /// Removes replicas on segments that have left the view.
    fn purge(&self, gone: impl Fn(&Replica) -> bool) {
        for shard in self.shards() {
            let mut shard = shard.lock();
            let objects = shard.remove_where(|object| {
                object.replicas.retain(|r| !gone(r));
                object.replicas.is_empty()
            });
            for object in &objects {
                self.events.removed(object, Reason::NodeLost);
            }
            drop(shard);
            let view = self.segments.view();
            for object in objects {
                self.gone(&view, &object);
            }
        }
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
            if versions.contains(&o.version) {
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
            Settles::Range => {
                if let Some(segment) = self.segments.get(job.segment) {
                    segment.release(job.offset, job.length);
                }
                self.progress.advance();
            }
            Settles::Arena(arena) => {
                self.remove_missing(missing);
                self.arena_dissolve(arena);
            }
        }
    }

    /// Objects that were committed and never arrived.
    fn remove_missing(&self, missing: &[u64]) {
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
            if let Some(object) = self.take_version(&key, version) {
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
