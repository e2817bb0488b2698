//! Nodes coming and going: registration with their directory (how the index survives the master), loss, unmounting.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::arenas::Arena;
use super::events::Reason;
use super::index::mounted;
use super::object::{Attributes, PutWith, Replica, Replicas};
use super::puts::Written;
use super::quotas::bytes_of;
use super::segments::{Drop, NodePhase, NodeState, Offer, SegmentState};
use super::state::{MasterState, add};
use crate::base::clock::{Millis, unix_ms};
use crate::base::id::Id128;
use crate::store::model::header::footprint;
use crate::store::model::key;

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
/// Most such nodes; of older ones nothing is taken back.
const DEPARTED_NODES_MAX: usize = 64;
/// Most nodes of which nothing is taken back.
const FORGOTTEN_NODES_MAX: usize = 65_536;

/// What a node that was unmounted has missed (D2): if it returns, these objects of its must not.
#[derive(Clone, Debug, Default)]
pub(crate) struct Departed {
    /// Hashes of keys removed or replaced since.
    keys: HashSet<u64>,
    /// Versions it had been asked to drop.
    versions: HashSet<u64>,
    /// More than can be remembered: nothing of it is taken back.
    all: bool,
    /// When it left, as a number that grows.
    left: u64,
}

impl Departed {
    /// From now on nothing of this node is taken back.
    fn forget(&mut self) {
        self.all = true;
        self.keys = HashSet::new();
        self.versions = HashSet::new();
    }

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
            if departed.all {
                continue;
            }
            departed.keys.insert(hash);
            if departed.keys.len() > DEPARTED_KEYS_MAX {
                departed.forget();
            }
        }
    }

    fn depart(&self, node: &NodeState) {
        let mut departed = self.departed.lock();
        let oldest = |all: &HashMap<Id128, Departed>, which: &dyn Fn(&Departed) -> bool| {
            let some = all.iter().filter(|(_, d)| which(d));
            some.min_by_key(|(_, d)| d.left).map(|(id, _)| *id)
        };
        let remembered = departed.values().filter(|d| !d.all).count();
        if remembered >= DEPARTED_NODES_MAX
            && let Some(id) = oldest(&departed, &|d| !d.all)
            && let Some(first) = departed.get_mut(&id)
        {
            first.forget();
        }
        if departed.len() >= FORGOTTEN_NODES_MAX
            && let Some(id) = oldest(&departed, &|_| true)
        {
            departed.remove(&id);
        }
        let entry = departed.entry(node.id).or_default();
        entry.left = self.next_id.fetch_add(1, Ordering::Relaxed);
        entry.versions.extend(node.drops.lock().versions());
        self.any_departed.store(true, Ordering::Release);
    }

    /// Whose names a registration would take: nodes are told apart by name (drain jobs, preferred segments, views). One that
    /// has lost its session may be the same node before it was started anew, and one at the same address is replaced.
    pub(crate) fn name_taken(
        &self,
        id: Id128,
        name: &str,
        address: &str,
        offers: &[Offer],
    ) -> Option<String> {
        let view = self.segments.view();
        let same = |s: &&Arc<SegmentState>| {
            let names = |o: &Offer| o.name == s.name;
            s.node.id != id
                && s.node.address != address
                && s.node.phase() != NodePhase::Lost
                && (s.node.name == name || offers.iter().any(names))
        };
        let other = view.iter().flatten().find(same)?;
        Some(format!(
            "a node called {} is in service at {}: give each node a --name of its own",
            other.node.name, other.node.address
        ))
    }

    /// A node registers. A returning one keeps its segments; one that listens where another did replaces it,
    /// unless both say that they share the `port` (0: they do not).
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
        port: u64,
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
            self.node_copies_lost(&node, now);
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
            if old.address == address && (port == 0 || old.port != port) {
                tracing::info!(node = %old.name, %address, "replaced by a new node at its address");
                self.unmount(&old, now);
            }
        }
        self.rebuilding.fetch_add(1, Ordering::AcqRel);
        let node = self
            .segments
            .mount(id, name, address, host_id, shm_socket, port, offers, now);
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
                if object.put_with.replicas() == 0 {
                    let has_checksum = object.put_with.has_checksum();
                    object.put_with = PutWith::new(entry.attributes.replicas, has_checksum);
                }
                if !object.replicas.contains(&replica) {
                    object.replicas.push(replica);
                    self.quotas.charge(&object.key, bytes_of(object.size, 1));
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
            || self.copies.writes(version, replica)
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
    pub(crate) fn lost(&self, node: &Arc<NodeState>, now: Millis) {
        let _one = self.lifecycle.lock();
        match node.phase() {
            NodePhase::Gone => {}
            NodePhase::Rebuilding => self.registration_failed(node),
            _ => {
                node.set_phase(NodePhase::Lost);
                self.segments.changed();
                self.node_copies_lost(node, now);
            }
        }
    }

    /// Takes a node out with everything that lay only there.
    pub(crate) fn unmount(&self, node: &Arc<NodeState>, now: Millis) {
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
        self.node_copies_lost(node, now);
        self.progress.advance();
    }

    /// Removes replicas on segments that have left the view.
    fn purge(&self, gone: impl Fn(&Replica) -> bool) {
        for shard in self.shards() {
            let mut shard = shard.lock();
            let objects = shard.remove_where(|object| {
                let had = object.replicas.len();
                object.replicas.retain(|r| !gone(r));
                let less = had - object.replicas.len();
                self.quotas.refund(&object.key, bytes_of(object.size, less));
                object.replicas.is_empty()
            });
            for object in &objects {
                self.events.removed(object, Reason::NodeLost);
            }
            drop(shard);
            add(&self.counters.lost_objects, objects.len() as u64);
            let view = self.segments.view();
            for object in objects {
                self.gone(&view, &object);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::MasterConfig;
    use super::*;

    #[test]
    fn nodes_of_one_port_stay_and_one_that_has_the_address_anew_replaces_them() {
        let state = MasterState::new(MasterConfig::default(), Millis(0));
        let register = |low: u64, port: u64| {
            let offer = Offer {
                incarnation: low,
                name: format!("s{low}"),
                size: 1 << 20,
                page_kind: String::new(),
            };
            let id = Id128 { high: 0, low };
            let (name, address) = (format!("n{low}"), "10.0.0.1:7000");
            let registration =
                state.register(id, &name, address, "", "", port, &[offer], Millis(1));
            assert!(state.registered(registration));
            let mut there: Vec<u64> = state.segments.nodes().iter().map(|n| n.id.low).collect();
            there.sort_unstable();
            there
        };
        assert_eq!(register(1, 77), [1]);
        assert_eq!(register(2, 77), [1, 2], "of one process");
        assert_eq!(register(3, 78), [3], "the process was restarted");
        assert_eq!(register(4, 0), [4]);
        assert_eq!(register(5, 0), [5], "as nodes have always done");
    }
}
