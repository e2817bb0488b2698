//! The load of `tools/multi-turn` in simulated time: four instances with prefix caches that forget what was used least
//! recently, conversations that come back with everything said so far. What is held: no bad rounds, whatever the seed.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::atomic::Ordering;

use foldhash::{HashMap, HashMapExt};

use super::super::config::Role;
use super::super::registry::Leg;
use super::tests::{ask, registry};
use super::*;

const INSTANCES: usize = 4;
/// Bytes of a cache block: 16 tokens.
const BLOCK: usize = 64;
const CONVERSATIONS: usize = 64;
const TURNS: usize = 6;
const AT_ONCE: usize = 8;
/// Microseconds to compute a block.
const COMPUTE: u64 = 16 * 20;

/// A prefix cache, by block and when it was used.
#[derive(Default)]
struct Cache {
    used: HashMap<u64, u64>,
    clock: u64,
    max: usize,
}

impl Cache {
    /// Computes a prompt; gives the blocks that were there.
    fn compute(&mut self, prompt: &[u8]) -> u64 {
        let (mut hits, mut whole, mut hash) = (0, true, 0);
        for block in prompt.chunks_exact(BLOCK) {
            hash = xxhash_rust::xxh3::xxh3_64_with_seed(block, hash);
            self.clock += 1;
            whole &= self.used.insert(hash, self.clock).is_some();
            hits += u64::from(whole);
        }
        if self.used.len() > self.max {
            let mut ages: Vec<u64> = self.used.values().copied().collect();
            ages.sort_unstable();
            let oldest = ages[self.used.len() - self.max];
            self.used.retain(|_, used| *used >= oldest);
        }
        hits
    }
}

/// Numbers that are the same in every run.
struct Roll(u64);

impl Roll {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    fn words(&mut self, count: usize) -> Vec<u8> {
        (0..count / 8)
            .flat_map(|_| self.next().to_le_bytes())
            .collect()
    }
}

/// One round: the share of blocks that were cached.
fn hit_rate(policy: &dyn Policy, blocks: usize, seed: u64) -> f64 {
    let registry = registry(INSTANCES);
    let all = registry.candidates(Role::Prefill, 0, None);
    let mut caches: Vec<Cache> = Vec::new();
    for instance in &all {
        let tokens = (blocks * 16) as u64;
        instance.cache_tokens.store(tokens, Ordering::Relaxed);
        caches.push(Cache {
            max: blocks,
            ..Cache::default()
        });
    }
    let mut roll = Roll(seed);
    let shared: Vec<Vec<u8>> = (0..8).map(|_| roll.words(4096)).collect();
    let mut ready: VecDeque<(Vec<u8>, usize)> = (0..CONVERSATIONS)
        .map(|n| (shared[n % 8].clone(), 0))
        .collect();
    // Ends of requests under way: when, and whose.
    let mut ends: BinaryHeap<Reverse<(u64, usize)>> = BinaryHeap::new();
    let mut running: HashMap<usize, (Leg, Vec<u8>, usize)> = HashMap::new();
    let (mut now, mut number, mut asked, mut hit) = (0u64, 0, 0, 0);
    loop {
        while running.len() < AT_ONCE
            && let Some((mut text, turn)) = ready.pop_front()
        {
            text.extend(roll.words(2048));
            let ask = ask(&text, None);
            let chosen = policy.choose(&ask, &all);
            let uncached = ask.tokens - policy.cached_tokens(&ask, &all[chosen]).min(ask.tokens);
            let leg = registry
                .enter(&all[chosen], Role::Prefill, uncached)
                .unwrap();
            policy.routed(&ask, &all[chosen]);
            let blocks = (text.len() / BLOCK) as u64;
            let hits = caches[chosen].compute(&text);
            asked += blocks;
            hit += hits;
            let noise = 500 + roll.next() % 8500;
            ends.push(Reverse((now + (blocks - hits) * COMPUTE + noise, number)));
            running.insert(number, (leg, text, turn));
            number += 1;
        }
        let Some(Reverse((end, whose))) = ends.pop() else {
            return hit as f64 / asked as f64;
        };
        now = end;
        let (_leg, mut text, turn) = running.remove(&whose).unwrap();
        if turn + 1 < TURNS {
            text.extend(roll.words(64));
            ready.push_back((text, turn + 1));
        }
    }
}

fn rounds(name: &str, blocks: usize) -> (f64, f64) {
    let all: Vec<f64> = (1..=5)
        .map(|seed| hit_rate(build(name, &Arc::default()).as_ref(), blocks, seed))
        .collect();
    let worst = all.iter().copied().fold(1.0, f64::min);
    (all.iter().sum::<f64>() / all.len() as f64, worst)
}

/// 81 % is what an endless cache would give.
#[test]
fn conversations_keep_their_caches() {
    for name in ["prefix", "kv"] {
        let (mean, worst) = rounds(name, 1 << 20);
        assert!(
            mean > 0.80 && worst > 0.79,
            "{name}: {mean:.3}, worst {worst:.3}"
        );
        let (mean, worst) = rounds(name, 3200);
        assert!(
            mean > 0.77 && worst > 0.74,
            "{name}, all just fits: {mean:.3}, worst {worst:.3}"
        );
        let (mean, worst) = rounds(name, 1600);
        assert!(
            mean > 0.40 && worst > 0.38,
            "{name}, half fits: {mean:.3}, worst {worst:.3}"
        );
    }
}
