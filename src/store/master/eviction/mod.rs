//! Which object of a shard goes first. One trait, a file per policy.
//!
//! A policy orders slots and knows nothing of leases, pins or bytes: the shard asks for candidates and spares the ones it
//! may not evict. To add one: a file, a line in [`PolicyKind`], a run of the tests below.

mod lru;
pub(crate) mod order;
mod sieve;

use crate::base::clock::Millis;

/// One access, as told to a policy.
#[derive(Clone, Copy, Debug, Default)]
pub struct Access {
    /// When.
    pub now: Millis,
    /// Position of the key in its batch: the keys of a batch are a prefix chain, heads first.
    pub depth: u32,
    /// Hash of the key before it in the batch, 0 for the first.
    pub parent: u64,
}

/// Order of eviction among the slots of one shard.
///
/// The caller guarantees: `inserted` once before anything else of a slot, `removed` once at its end, all under one lock.
/// The implementor MUST make `candidate` examine at most `budget` slots (reducing it for each), return a live slot or
/// `None`, and not return a slot again before its other live slots had their turn.
pub trait EvictionPolicy: Send {
    /// A new object.
    fn inserted(&mut self, slot: u32, access: &Access);
    /// A hit.
    fn accessed(&mut self, slot: u32, access: &Access);
    /// The object is gone.
    fn removed(&mut self, slot: u32);
    /// The slot that `candidate` would look at first.
    fn next(&self) -> Option<u32>;
    /// The next to evict. The caller removes it, or leaves it (leased, pinned) and asks again.
    fn candidate(&mut self, budget: &mut u32) -> Option<u32>;
    /// A key that was asked for and not there; part of what a policy may learn from.
    fn missed(&mut self, _key_hash: u64, _access: &Access) {}
    /// Heap bytes, for the accounting of metadata.
    fn heap_bytes(&self) -> usize;
}

/// The policies there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyKind {
    /// SIEVE: a hand over the insertion order spares what was hit since its last pass. Scan-resistant; a hit only sets
    /// a bit.
    Sieve,
    /// Least recently used.
    Lru,
}

impl PolicyKind {
    /// The names, for settings.
    pub const NAMES: &'static [&'static str] = &["sieve", "lru"];

    /// By name; an unknown one is SIEVE (settings have been checked).
    pub fn by_name(name: &str) -> Self {
        if name == "lru" {
            Self::Lru
        } else {
            Self::Sieve
        }
    }

    /// A new instance for one shard.
    pub fn build(self) -> Box<dyn EvictionPolicy> {
        match self {
            Self::Sieve => Box::new(sieve::Sieve::default()),
            Self::Lru => Box::new(lru::Lru::default()),
        }
    }
}

const NONE: u32 = u32::MAX;

/// A doubly linked list threaded through slot numbers: 8 bytes a slot.
#[derive(Default)]
struct Links {
    nodes: Vec<(u32, u32)>,
    head: Option<u32>,
    tail: Option<u32>,
}

impl Links {
    fn push_front(&mut self, slot: u32) {
        let index = slot as usize;
        if index >= self.nodes.len() {
            self.nodes.resize(index + 1, (NONE, NONE));
        }
        self.nodes[index] = (NONE, self.head.unwrap_or(NONE));
        if let Some(head) = self.head {
            self.nodes[head as usize].0 = slot;
        }
        self.head = Some(slot);
        self.tail.get_or_insert(slot);
    }

    fn unlink(&mut self, slot: u32) {
        let (before, after) = self.nodes[slot as usize];
        match before {
            NONE => self.head = (after != NONE).then_some(after),
            b => self.nodes[b as usize].1 = after,
        }
        match after {
            NONE => self.tail = (before != NONE).then_some(before),
            a => self.nodes[a as usize].0 = before,
        }
    }

    /// Towards the head (newer).
    fn newer(&self, slot: u32) -> Option<u32> {
        Some(self.nodes[slot as usize].0).filter(|s| *s != NONE)
    }

    fn heap_bytes(&self) -> usize {
        self.nodes.capacity() * 8
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn drain(policy: &mut dyn EvictionPolicy) -> Vec<u32> {
        let mut order = Vec::new();
        loop {
            let mut budget = 1000;
            let Some(slot) = policy.candidate(&mut budget) else {
                return order;
            };
            policy.removed(slot);
            order.push(slot);
        }
    }

    #[test]
    fn lru_evicts_the_least_recent() {
        let mut policy = PolicyKind::Lru.build();
        for slot in 0..4 {
            policy.inserted(slot, &Access::default());
        }
        policy.accessed(0, &Access::default());
        assert_eq!(drain(&mut *policy), [1, 2, 3, 0]);
    }

    #[test]
    fn sieve_spares_what_was_hit_once() {
        let mut policy = PolicyKind::Sieve.build();
        for slot in 0..4 {
            policy.inserted(slot, &Access::default());
        }
        policy.accessed(0, &Access::default());
        policy.accessed(2, &Access::default());
        assert_eq!(drain(&mut *policy), [1, 3, 0, 2]);
    }

    proptest! {
        /// Every policy returns live slots only, within budget, and everything is evicted in the end.
        #[test]
        fn contract(ops in proptest::collection::vec((0u8..4, 0u32..32), 1..300)) {
            for kind in [PolicyKind::Sieve, PolicyKind::Lru] {
                let mut policy = kind.build();
                let mut live = HashSet::new();
                for (op, slot) in &ops {
                    match op {
                        0 => if live.insert(*slot) { policy.inserted(*slot, &Access::default()); },
                        1 => if live.contains(slot) { policy.accessed(*slot, &Access::default()); },
                        2 => if live.remove(slot) { policy.removed(*slot); },
                        _ => {
                            let mut budget = *slot;
                            if let Some(found) = policy.candidate(&mut budget) {
                                prop_assert!(live.contains(&found));
                            }
                            prop_assert!(budget <= *slot);
                        }
                    }
                }
                let evicted: HashSet<u32> = drain(&mut *policy).into_iter().collect();
                prop_assert_eq!(evicted, live);
            }
        }
    }
}
