//! The master's state against a naive model, with fake nodes that keep what they were told: random puts, upserts, removals,
//! evictions, node losses and returns. After every step the index equals the model, and at the end an index rebuilt from
//! the nodes equals the live one.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use proptest::prelude::*;

use super::arenas::Least;
use super::config::MasterConfig;
use super::copies::{Copied, Copy};
use super::events::{Change, Filter};
use super::eviction::{Access, PolicyKind};
use super::object::Attributes;
use super::puts::{PutOptions, Written};
use super::rebuild::Reported;
use super::segments::Offer;
use super::state::{MasterState, Presence};
use crate::base::clock::Millis;
use crate::base::id::Id128;
use crate::store::model::error::StoreError;
use crate::store::model::header::footprint;
use crate::store::model::key;

const SEGMENT: u64 = 64 << 10;

/// What a node would hold: entries by offset.
#[derive(Clone, Default)]
struct FakeNode {
    entries: BTreeMap<u64, (Box<[u8]>, u64, u64)>,
}

struct World {
    state: MasterState,
    nodes: Vec<(Id128, u64, FakeNode)>,
    now: u64,
    /// key → (version, size)
    model: HashMap<Vec<u8>, (u64, u64)>,
    /// What a subscriber knows, and its position: key → version.
    followed: (u64, HashMap<Vec<u8>, u64>),
    /// Copies under way, each with the number of its message.
    copying: Vec<(Arc<Copy>, u64)>,
}

fn config(policy: PolicyKind) -> MasterConfig {
    MasterConfig {
        recovery_grace: std::time::Duration::ZERO,
        lease_ttl: std::time::Duration::from_millis(100),
        policy,
        ..MasterConfig::default()
    }
}

fn qualified(n: u8) -> Vec<u8> {
    let mut out = Vec::new();
    key::qualify("", format!("key-{n}").as_bytes(), &mut out).unwrap();
    out
}

fn register(state: &MasterState, id: Id128, incarnation: u64, node: &FakeNode, now: Millis) {
    let offer = Offer {
        incarnation,
        name: format!("s{incarnation}"),
        size: SEGMENT,
        page_kind: String::new(),
    };
    let address = format!("host:{incarnation}");
    let mut registration = state.register(id, "n", &address, "h", "", 0, &[offer], now);
    for (offset, (key, version, size)) in &node.entries {
        let entry = Reported {
            key: key.clone(),
            node_segment: 0,
            offset: *offset,
            size: *size,
            written: Written {
                version: *version,
                checksum: None,
            },
            attributes: Attributes::default(),
            pending: None,
            arena_versions: 0,
        };
        state.adopt(&mut registration, entry, now);
    }
    state.registered(registration);
}

impl World {
    fn new(policy: PolicyKind) -> Self {
        let state = MasterState::new(config(policy), Millis(1000));
        let mut nodes = Vec::new();
        for n in 1..=3 {
            let id = Id128 { high: n, low: n };
            register(&state, id, n, &FakeNode::default(), Millis(1000));
            nodes.push((id, n, FakeNode::default()));
        }
        Self {
            state,
            nodes,
            now: 1000,
            model: HashMap::new(),
            followed: (1, HashMap::new()),
            copying: Vec::new(),
        }
    }

    /// Nodes carry out their drops, at once or later.
    fn deliver(&mut self) {
        for (id, _, fake) in &mut self.nodes {
            let Some(node) = self.state.segments.node(*id) else {
                continue;
            };
            while let Some((sequence, drops)) = { node.drops.lock().take(4096) } {
                for drop in drops {
                    if fake
                        .entries
                        .get(&drop.offset)
                        .is_some_and(|e| e.1 == drop.version)
                    {
                        fake.entries.remove(&drop.offset);
                    }
                }
                self.state.drops_acked(&node, sequence);
            }
        }
    }

    /// An object is to go from where it lies to another node.
    fn begin_copy(&mut self, n: u8, to: usize) {
        let key = qualified(n);
        let hash = key::hash(&key);
        let found = |o: &super::object::Object| (o.version, o.replicas.clone());
        let Some((version, replicas)) = self.state.peek(hash, &key, found) else {
            return;
        };
        let node = self.state.segments.node(self.nodes[to].0).unwrap();
        let target = self.state.segments.get(node.slots[0]).unwrap();
        if replicas.iter().any(|r| r.segment == target.slot) {
            return;
        }
        let (asker, expires) = (Id128::NONE, Millis(self.now + 10_000));
        let begun =
            self.state
                .begin_copy(&key, hash, version, replicas[0], &target, asker, expires);
        if let Ok(copy) = begun {
            let source = copy.source.clone();
            self.state.send_copies(vec![copy.clone()]);
            let sequence = *source.copies.lock().last().unwrap();
            self.copying.push((copy, sequence));
        }
    }

    /// The oldest copy ends.
    fn end_copy(&mut self, outcome: Copied) {
        if self.copying.is_empty() {
            return;
        }
        let (copy, sequence) = self.copying.remove(0);
        let now = Millis(self.now);
        // Given up meanwhile: its range is somebody else's.
        if !self.state.copies.writes(copy.version, copy.to)
            || self.state.copies.batch(sequence).is_empty()
        {
            return self.state.copies_reported(sequence, &[outcome], now);
        }
        if matches!(outcome, Copied::Done | Copied::Unsure) {
            let source = self.nodes.iter().find(|n| n.0 == copy.source.id).unwrap();
            let there = source.2.entries.get(&copy.from.offset);
            let is_it = there.is_some_and(|e| e.1 == copy.version);
            assert!(is_it, "what is being copied was dropped at its source");
            let target = copy.target().node.id;
            let (_, _, fake) = self.nodes.iter_mut().find(|n| n.0 == target).unwrap();
            let end = copy.to.offset + footprint(copy.size).unwrap();
            let clash = fake.entries.range(..end).next_back();
            if let Some((at, (_, _, other))) = clash {
                let before = at + footprint(*other).unwrap() <= copy.to.offset;
                assert!(before, "A1/D2: copied over an object");
            }
            let entry = (copy.key.clone(), copy.version, copy.size);
            fake.entries.insert(copy.to.offset, entry);
        }
        self.state.copies_reported(sequence, &[outcome], now);
    }

    /// Nodes settle what they are asked to.
    fn settle(&mut self) {
        let jobs: Vec<_> = {
            let jobs = self.state.reconciles.lock();
            jobs.iter().map(|(id, job)| (*id, job.clone())).collect()
        };
        for (id, job) in jobs {
            let (_, _, fake) = self.nodes.iter_mut().find(|n| n.0 == job.node).unwrap();
            let range = job.offset..job.offset + job.length;
            fake.entries
                .retain(|at, e| !range.contains(at) || e.1 >= job.versions_end);
            self.state.reconciled(id, false, &[], Millis(self.now));
        }
    }

    fn put(&mut self, n: u8, size: u64, replicas: usize, upsert: bool, written: u64) {
        let key = qualified(n);
        let options = PutOptions {
            replica_num: replicas,
            ..PutOptions::default()
        };
        let now = Millis(self.now);
        let started = self
            .state
            .put_start(&key, size, &options, upsert, true, Id128::NONE, now);
        let (version, places) = match started {
            Ok(started) => started,
            Err(StoreError::Exists) => {
                assert!(!upsert && self.model.contains_key(&key));
                return;
            }
            Err(StoreError::NoSpace { .. } | StoreError::SegmentNotFound) => {
                self.state.make_room(size, now);
                return;
            }
            Err(other) => panic!("{other}"),
        };
        let mut kept = 0;
        for (i, place) in places.iter().enumerate() {
            if written & (1 << i) == 0 {
                continue;
            }
            kept += 1;
            let incarnation = self.state.segments.get(place.segment).unwrap().incarnation;
            let (_, _, fake) = self.nodes.iter_mut().find(|n| n.1 == incarnation).unwrap();
            let end = place.offset + footprint(size).unwrap();
            let clash = fake.entries.range(..end).next_back();
            if let Some((at, (_, _, other))) = clash {
                assert!(
                    at + footprint(*other).unwrap() <= place.offset,
                    "A1/D2: placed over an object"
                );
            }
            fake.entries
                .insert(place.offset, (key.clone().into(), version, size));
        }
        let ended = self.state.put_end(version, None, written, 0, now);
        if kept == 0 {
            assert!(ended.is_err());
        } else {
            ended.unwrap();
            self.model.insert(key, (version, size));
        }
    }

    /// What the index has, as the model would hold it.
    fn index(state: &MasterState) -> HashMap<Vec<u8>, (u64, u64)> {
        let mut all = HashMap::new();
        state.walk(0, usize::MAX, |o| {
            assert!(!o.replicas.is_empty());
            all.insert(o.key.to_vec(), (o.version, o.size));
            true
        });
        all
    }

    /// Whoever follows the events knows what is in the index.
    fn follow(&mut self) {
        let (from, known) = &mut self.followed;
        let (events, next) = self
            .state
            .events
            .read(*from, usize::MAX, &Filter::default())
            .unwrap();
        for event in events {
            match event.change {
                Change::Stored => {
                    known.insert(event.key, event.version);
                }
                Change::Removed(_) => {
                    let was = known.remove(&event.key);
                    assert_eq!(was, Some(event.version), "removed and not there before");
                }
                Change::Cleared => {}
            }
        }
        *from = next;
        let plain = |k: &Vec<u8>| key::split(k).unwrap().1.to_vec();
        let index: HashMap<_, _> = self.model.iter().map(|(k, v)| (plain(k), v.0)).collect();
        assert_eq!(*known, index, "events and index agree");
    }

    fn check(&mut self) {
        let index = Self::index(&self.state);
        // Eviction may have taken objects; nothing else may differ.
        for (key, value) in &index {
            assert_eq!(
                self.model.get(key),
                Some(value),
                "the index has what nobody put"
            );
        }
        let missing = self.model.len() - index.len();
        let evicted = self
            .state
            .counters
            .evicted_objects
            .load(std::sync::atomic::Ordering::Relaxed);
        assert!(missing as u64 <= evicted, "an object left without eviction");
        self.model = index;
        self.follow();
        let mut bytes = 0;
        self.state.walk(0, usize::MAX, |o| {
            bytes += footprint(o.size).unwrap() * o.replicas.len() as u64;
            true
        });
        let told = self.state.tenant_snapshot(key::DEFAULT_TENANT);
        assert_eq!(told.map_or(0, |t| t.charged), bytes, "charged and held");
        assert_eq!(
            self.state
                .objects
                .load(std::sync::atomic::Ordering::Relaxed) as usize,
            self.model.len()
        );
    }
}

#[derive(Clone, Debug)]
enum Step {
    Put(u8, u64, usize, bool, u64),
    Remove(u8),
    Exist(u8),
    Evict(u64),
    Deliver,
    Wait(u64),
    Return(usize),
    Copy(u8, usize),
    Copied(Copied),
    Settle,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0u8..30, 1u64..9000, 1usize..4, any::<bool>(), 0u64..8)
            .prop_map(|(k, s, r, u, w)| Step::Put(k, s, r, u, w)),
        2 => (0u8..30).prop_map(Step::Remove),
        2 => (0u8..30).prop_map(Step::Exist),
        1 => (1u64..40_000).prop_map(Step::Evict),
        2 => Just(Step::Deliver),
        1 => (0u64..200).prop_map(Step::Wait),
        1 => (0usize..3).prop_map(Step::Return),
        3 => (0u8..30, 0usize..3).prop_map(|(k, n)| Step::Copy(k, n)),
        2 => prop_oneof![
            3 => Just(Copied::Done),
            1 => Just(Copied::NotThere),
            1 => Just(Copied::Refused),
            1 => Just(Copied::Busy),
            1 => Just(Copied::Unsure),
        ]
        .prop_map(Step::Copied),
        1 => Just(Step::Settle),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]
    #[test]
    fn index_equals_model_and_rebuild_equals_live(
        steps in proptest::collection::vec(step(), 1..120),
        lru in any::<bool>(),
    ) {
        let mut world = World::new(if lru { PolicyKind::Lru } else { PolicyKind::Sieve });
        for step in steps {
            let now = Millis(world.now);
            match step {
                Step::Put(k, size, replicas, upsert, written) => world.put(k, size, replicas, upsert, written),
                Step::Remove(k) => {
                    let key = qualified(k);
                    let removed = world.state.remove(&key, true, now);
                    prop_assert_eq!(removed.is_ok(), world.model.remove(&key).is_some());
                }
                Step::Exist(k) => {
                    let key = qualified(k);
                    let view = world.state.segments.view();
                    let access = Access { now, ..Access::default() };
                    let found = world.state.exist(&view, key::hash(&key), &key, &access);
                    prop_assert_eq!(found == Presence::Readable, world.model.contains_key(&key));
                }
                Step::Evict(bytes) => {
                    let leased: Vec<Vec<u8>> = world
                        .model
                        .keys()
                        .filter(|k| {
                            world.state.peek(key::hash(k), k, |o| o.leased_until() > now) == Some(true)
                        })
                        .cloned()
                        .collect();
                    world.state.evict(bytes, now);
                    for key in leased {
                        let there = world.state.peek(key::hash(&key), &key, |_| ()).is_some();
                        prop_assert!(there, "L1: a leased object was evicted");
                    }
                }
                Step::Deliver => world.deliver(),
                Step::Wait(ms) => world.now += ms,
                // The node's session broke and it registers again at the same master, drops still queued.
                Step::Return(n) => {
                    let (id, incarnation, fake) = world.nodes[n].clone();
                    let node = world.state.segments.node(id).unwrap();
                    world.state.lost(&node, now);
                    register(&world.state, id, incarnation, &fake, now);
                }
                Step::Copy(k, to) => world.begin_copy(k, to),
                Step::Copied(outcome) => world.end_copy(outcome),
                Step::Settle => world.settle(),
            }
            world.check();
        }
        while !world.copying.is_empty() {
            world.end_copy(Copied::Refused);
        }
        world.settle();
        prop_assert_eq!(world.state.copies.under_way(), 0, "every copy ends");
        world.deliver();
        // A new master, from what the nodes report alone.
        let rebuilt = MasterState::new(config(PolicyKind::Sieve), Millis(0));
        for (id, incarnation, fake) in &world.nodes {
            register(&rebuilt, *id, *incarnation, fake, Millis(0));
        }
        prop_assert_eq!(World::index(&rebuilt), World::index(&world.state), "rebuild = live");
        let used = |s: &MasterState| s.capacity().1;
        prop_assert_eq!(used(&rebuilt), used(&world.state), "no range is lost or counted twice");
        // And everything can go again.
        rebuilt.remove_where(true, Millis(0), |_| true);
        for node in rebuilt.segments.nodes() {
            while let Some((sequence, _)) = { node.drops.lock().take(4096) } {
                rebuilt.drops_acked(&node, sequence);
            }
        }
        prop_assert_eq!(used(&rebuilt), 0);
    }
}

/// One node of `SEGMENT` bytes with an arena of which one object was committed and removed again.
fn removed_from_an_arena() -> (World, u64, u64, u64) {
    let mut world = World::new(PolicyKind::Sieve);
    for (id, ..) in world.nodes.split_off(1) {
        let node = world.state.segments.node(id).unwrap();
        world.state.unmount(&node, Millis(1000));
    }
    let node = world.state.segments.node(world.nodes[0].0).unwrap();
    let client = Id128 { high: 9, low: 9 };
    let (slot, now) = (node.slots[0], Millis(1000));
    let (arena, range, length, versions) = world
        .state
        .arena_open(slot, 1, 4096, Least::Anything, client)
        .unwrap();
    let written = Written {
        version: versions.start,
        checksum: None,
    };
    let key = qualified(1);
    let state = &world.state;
    let attributes = Attributes::default();
    state
        .arena_commit(
            arena,
            client,
            &key,
            range.offset,
            100,
            &attributes,
            &written,
            now,
        )
        .unwrap();
    state.remove(&key, true, now).unwrap();
    world.deliver();
    (world, arena, range.offset, length)
}

/// Ranges handed out until the segment is full.
fn fill(state: &MasterState) -> Vec<(u64, u64)> {
    let segment = state.segments.nodes()[0].slots[0];
    let segment = state.segments.get(segment).unwrap();
    let mut allocator = segment.allocator.lock();
    let mut taken = Vec::new();
    while let Some(offset) = allocator.allocate(192) {
        taken.push((offset, 192));
    }
    taken
}

#[test]
fn a_range_is_not_reused_while_its_writer_may_still_write() {
    let (world, arena, offset, length) = removed_from_an_arena();
    let overlaps = |(at, n): &(u64, u64)| *at < offset + length && offset < at + n;
    assert!(
        !fill(&world.state).iter().any(overlaps),
        "the commit says nothing about whether the bytes have arrived"
    );
    let client = Id128 { high: 9, low: 9 };
    world
        .state
        .arena_close(arena, client, false, Millis(0))
        .unwrap();
    let mut world = world;
    world.deliver();
    assert!(
        fill(&world.state).iter().any(overlaps),
        "free with the arena"
    );
}

#[test]
fn a_reconcile_job_goes_out_once_and_leaves_later_versions_alone() {
    let (world, ..) = removed_from_an_arena();
    let (state, now) = (&world.state, Millis(2000));
    let (id, incarnation, fake) = &world.nodes[0];
    let node = state.segments.node(*id).unwrap();
    state.lost(&node, Millis(0));
    // An unfinished put of a client that has left.
    let gone = Id128 { high: 8, low: 8 };
    let replica = super::object::Replica {
        segment: node.slots[0],
        offset: 0,
    };
    state.quarantine(replica, 192, gone, now);
    state.send_reconciles(now);
    register(state, *id, *incarnation, fake, now);
    state.send_reconciles(now);
    let due = std::mem::take(&mut *node.reconciles.lock());
    assert_eq!(due.len(), 1, "once");
    let job = state.reconciles.lock().get(&due[0]).cloned().unwrap();
    let (versions, keep) = state.kept(&job).unwrap();
    let next = state.take_versions(1);
    assert!(keep.is_empty() && versions.end != 0 && !versions.contains(&next));
}

#[test]
fn a_refused_item_of_an_open_arena_is_not_given_to_others() {
    let mut world = World::new(PolicyKind::Sieve);
    for (id, ..) in world.nodes.split_off(1) {
        let node = world.state.segments.node(id).unwrap();
        world.state.unmount(&node, Millis(1000));
    }
    let state = &world.state;
    let node = state.segments.node(world.nodes[0].0).unwrap();
    let (client, now) = (Id128 { high: 9, low: 9 }, Millis(1000));
    let (arena, range, length, versions) = state
        .arena_open(node.slots[0], 1, 4096, Least::Anything, client)
        .unwrap();
    let attributes = Attributes::default();
    let key = qualified(1);
    let commit = |offset, version| {
        let written = Written {
            version,
            checksum: None,
        };
        state.arena_commit(arena, client, &key, offset, 100, &attributes, &written, now)
    };
    commit(range.offset, versions.start).unwrap();
    let (second, version) = (range.offset + 192, versions.start + 1);
    assert_eq!(commit(second, version), Err(StoreError::Exists));
    state
        .arena_revoke(arena, client, &key, second, 100, version, true, now)
        .unwrap();
    world.deliver();
    let overlaps = |(at, n): &(u64, u64)| *at < range.offset + length && range.offset < at + n;
    assert!(
        !fill(&world.state).iter().any(overlaps),
        "the arena is being filled"
    );
}

/// A commit that travels with its bytes may come twice, and after its writer has given up.
#[test]
fn a_commit_that_comes_again_changes_nothing_and_one_that_comes_late_is_refused() {
    let world = World::new(PolicyKind::Sieve);
    let state = &world.state;
    let node = state.segments.node(world.nodes[0].0).unwrap();
    let (client, now) = (Id128 { high: 9, low: 9 }, Millis(1000));
    let (arena, range, _, versions) = state
        .arena_open(node.slots[0], 1, 4096, Least::Anything, client)
        .unwrap();
    let attributes = Attributes::default();
    let commit = |key: &[u8], offset, version| {
        let written = Written {
            version,
            checksum: None,
        };
        state.arena_commit(arena, client, key, offset, 100, &attributes, &written, now)
    };
    let (first, second) = (qualified(1), qualified(2));
    commit(&first, range.offset, versions.start).unwrap();
    assert_eq!(commit(&first, range.offset, versions.start), Ok(()));
    let (late, version) = (range.offset + 192, versions.start + 1);
    state
        .arena_revoke(arena, client, &second, late, 100, version, false, now)
        .unwrap();
    assert!(
        commit(&second, late, version).is_err(),
        "taken back already"
    );
    let version_of = |key: &[u8]| state.peek(key::hash(key), key, |o| o.version);
    assert_eq!(version_of(&first), Some(versions.start));
    assert_eq!(version_of(&second), None);
}

#[test]
fn an_arena_of_an_earlier_term_is_kept_whole_until_its_writer_has_left() {
    let mut world = World::new(PolicyKind::Sieve);
    for (id, ..) in world.nodes.split_off(1) {
        let node = world.state.segments.node(id).unwrap();
        world.state.unmount(&node, Millis(1000));
    }
    let (state, now) = (&world.state, Millis(1000));
    let (id, incarnation, _) = &world.nodes[0];
    let node = state.segments.node(*id).unwrap();
    state.unmount(&node, now);
    // It registers anew, as with a later master: an arena of 4096 bytes, one object complete in it, one on its way.
    let offer = super::segments::Offer {
        incarnation: *incarnation,
        name: "again".into(),
        size: SEGMENT,
        page_kind: String::new(),
    };
    let mut registration = state.register(
        Id128 { high: 5, low: 5 },
        "again",
        "other:1",
        "",
        "",
        0,
        &[offer],
        now,
    );
    let reported = |offset, size, version, pending, arena_versions| Reported {
        key: qualified(1).into(),
        node_segment: 0,
        offset,
        size,
        written: Written {
            version,
            checksum: None,
        },
        attributes: Attributes::default(),
        pending,
        arena_versions,
    };
    let client = Some(Id128 { high: 9, low: 9 });
    for entry in [
        reported(0, 4096, 500, client, 32),
        reported(0, 100, 500, None, 0),
        reported(192, 100, 501, client, 0),
    ] {
        state.adopt(&mut registration, entry, now);
    }
    assert!(state.registered(registration));
    let hash = crate::store::model::key::hash(&qualified(1));
    assert_eq!(state.peek(hash, &qualified(1), |o| o.version), Some(500));
    let again = state.segments.node(Id128 { high: 5, low: 5 }).unwrap();
    let segment = state.segments.get(again.slots[0]).unwrap();
    let take = || {
        let mut allocator = segment.allocator.lock();
        let mut taken = Vec::new();
        while let Some(offset) = allocator.allocate(192) {
            taken.push(offset);
        }
        for offset in &taken {
            allocator.free(*offset, 192).unwrap();
        }
        taken
    };
    assert!(take().iter().all(|at| *at >= 4096));
    let carried_out = || {
        let batch = again.drops.lock().take(1000);
        let (sequence, _) = batch.expect("a drop is due");
        state.drops_acked(&again, sequence);
    };
    // Removed: its range stays the arena's.
    state.remove(&qualified(1), true, now).unwrap();
    carried_out();
    assert!(
        take().iter().all(|at| *at >= 4096),
        "its writer has not left"
    );
    // The node says that it has: all of it is free.
    let jobs: Vec<u64> = state.reconciles.lock().keys().copied().collect();
    assert_eq!(jobs.len(), 1);
    state.reconciled(jobs[0], true, &[], now);
    assert!(take().iter().all(|at| *at >= 4096), "busy");
    state.reconciled(jobs[0], false, &[], now);
    carried_out();
    assert!(take().contains(&0));
    assert_eq!(
        segment
            .arena_bytes
            .load(std::sync::atomic::Ordering::Relaxed),
        0
    );
}

#[test]
fn an_arena_evicts_only_from_a_pool_that_is_full_as_a_whole() {
    let mut world = World::new(PolicyKind::Sieve);
    for n in 0..40 {
        world.put(n, 1000, 1, false, 1);
    }
    let state = &world.state;
    let (slot, later) = (state.segments.nodes()[0].slots[0], Millis(5000));
    let evicted = || {
        state
            .counters
            .evicted_objects
            .load(std::sync::atomic::Ordering::Relaxed)
    };
    fill(state);
    assert!(!state.make_room_for_arena(slot, 8192, later));
    assert_eq!(evicted(), 0, "there is room in other segments");
    for node in &state.segments.nodes()[1..] {
        let segment = state.segments.get(node.slots[0]).unwrap();
        while segment.allocator.lock().allocate(192).is_some() {}
    }
    state.make_room_for_arena(slot, 8192, later);
    let once = evicted();
    assert!(
        (1..40).contains(&once),
        "{once}: what is asked for, no more"
    );
    // What is leaving that segment already is counted.
    if state.leaving_bytes(slot) >= 8192 {
        assert!(state.make_room_for_arena(slot, 8192, later));
        assert_eq!(evicted(), once);
    }
}
