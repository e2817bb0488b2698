//! `prefix`: who probably has the beginning of the prompt cached, weighed against what it has to do (approximate: from what
//! was routed, not from what the instances say).
//!
//! Owns the index: a hash per block of the prompt, chained from the beginning, with the instances it was sent to. Blocks
//! grow with their position, so that a long prompt costs few of them. Two generations bound it: what is not asked for in
//! the time of half the capacity is forgotten.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use foldhash::{HashMap, HashMapExt};
use parking_lot::{Mutex, MutexGuard};
use smallvec::SmallVec;

use super::super::config::Role;
use super::super::kv::text_blocks;
use super::super::registry::Instance;
use super::{Ask, Policy, least, streams, tokens};
use crate::base::clock::Millis;

/// Blocks per generation.
const GENERATION_MAX: usize = 1 << 18;
/// Instances remembered per block.
const HOLDERS_MAX: usize = 8;
/// What a stream under way is worth in prompt tokens when decode instances are compared.
const TOKENS_PER_STREAM: f64 = 128.0;

type Holders = SmallVec<[u64; 2]>;

/// Which instances were sent which beginnings.
#[derive(Debug, Default)]
pub(super) struct PrefixIndex {
    generations: Mutex<[HashMap<u64, Holders>; 2]>,
    /// Half of what an entry lasts at most, and when the current half began (in ms).
    half: Option<(Duration, AtomicU64)>,
}

impl PrefixIndex {
    /// One that forgets what was not entered again for `time`, at the latest.
    pub(super) fn lasting(time: Duration) -> Self {
        Self {
            half: Some((time / 2, AtomicU64::new(Millis::now().0))),
            ..Self::default()
        }
    }

    fn generations(&self) -> MutexGuard<'_, [HashMap<u64, Holders>; 2]> {
        let mut generations = self.generations.lock();
        if let Some((half, began)) = &self.half {
            let now = Millis::now();
            let age = now.since(Millis(began.load(Ordering::Relaxed)));
            let half = half.as_millis() as u64;
            if age >= half {
                began.store(now.0, Ordering::Relaxed);
                generations.swap(0, 1);
                generations[0] = HashMap::new();
                if age >= 2 * half {
                    generations[1] = HashMap::new();
                }
            }
        }
        generations
    }

    /// Bytes of the prompt's beginning that each candidate was sent before.
    pub(super) fn matched(
        &self,
        prompt: &[u8],
        candidates: &[Arc<Instance>],
    ) -> SmallVec<[usize; 8]> {
        let mut matched: SmallVec<[usize; 8]> = SmallVec::from_elem(0, candidates.len());
        let mut alive: SmallVec<[bool; 8]> = SmallVec::from_elem(true, candidates.len());
        let generations = self.generations();
        for (end, hash) in text_blocks(prompt, 0) {
            let of = |g: usize| generations[g].get(&hash).into_iter().flatten();
            let mut any = false;
            for (index, candidate) in candidates.iter().enumerate() {
                let number = candidate.number;
                alive[index] = alive[index] && of(0).chain(of(1)).any(|h| *h == number);
                if alive[index] {
                    matched[index] = end;
                    any = true;
                }
            }
            if !any {
                break;
            }
        }
        matched
    }

    /// Tokens of the prompt's beginning that an instance was sent before.
    pub(super) fn cached_tokens(&self, prompt: &[u8], number: u64) -> u64 {
        let generations = self.generations();
        let holds = |hash: &u64| {
            let of = |g: usize| generations[g].get(hash).into_iter().flatten();
            of(0).chain(of(1)).any(|h| *h == number)
        };
        let all = text_blocks(prompt, 0);
        let held = all.iter().take_while(|(_, hash)| holds(hash)).last();
        held.map_or(0, |(end, _)| *end as u64 / 4)
    }

    pub(super) fn insert(&self, prompt: &[u8], number: u64) {
        let mut generations = self.generations();
        for (_, hash) in text_blocks(prompt, 0) {
            if generations[0].len() >= GENERATION_MAX && !generations[0].contains_key(&hash) {
                generations.swap(0, 1);
                generations[0] = HashMap::new();
            }
            let older = generations[1].remove(&hash);
            let holders = generations[0].entry(hash).or_default();
            holders.extend(older.into_iter().flatten());
            if let Some(at) = holders.iter().position(|h| *h == number) {
                holders.remove(at);
            }
            holders.insert(0, number);
            holders.truncate(HOLDERS_MAX);
        }
    }

    pub(super) fn forget(&self, number: u64) {
        for generation in self.generations.lock().iter_mut() {
            generation.retain(|_, holders| {
                holders.retain(|h| *h != number);
                !holders.is_empty()
            });
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Prefix {
    index: PrefixIndex,
    turn: AtomicUsize,
}

/// Tokens under way there.
pub(super) fn queued(ask: &Ask<'_>, instance: &Instance) -> f64 {
    match ask.role {
        Role::Decode => streams(instance) * TOKENS_PER_STREAM,
        _ => tokens(instance),
    }
}

/// Tokens that must be computed before the prompt is done there: those under way and those not cached.
pub(super) fn pending(ask: &Ask<'_>, instance: &Instance, matched_bytes: usize) -> f64 {
    let uncached = ask.tokens.saturating_sub(matched_bytes as u64 / 4) as f64;
    queued(ask, instance) + uncached
}

impl Policy for Prefix {
    fn choose(&self, ask: &Ask<'_>, candidates: &[Arc<Instance>]) -> usize {
        let matched = self.index.matched(ask.prompt, candidates);
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let costs = candidates.iter().zip(&matched);
        least(turn, costs.map(|(c, m)| pending(ask, c, *m) / c.weight))
    }

    fn routed(&self, ask: &Ask<'_>, instance: &Instance) {
        self.index.insert(ask.prompt, instance.number);
    }

    fn cached_tokens(&self, ask: &Ask<'_>, instance: &Arc<Instance>) -> u64 {
        self.index.cached_tokens(ask.prompt, instance.number)
    }

    fn forget(&self, number: u64) {
        self.index.forget(number);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{ask, registry};
    use super::*;

    #[test]
    fn a_conversation_stays_and_moves_away_from_a_busy_instance() {
        let registry = registry(3);
        let policy = Prefix::default();
        let all = registry.candidates(Role::Prefill, 0, None);
        let mut text = "system prompt ".repeat(400);
        let first = policy.choose(&ask(text.as_bytes(), None), &all);
        policy.routed(&ask(text.as_bytes(), None), &all[first]);
        for turn in 0..6 {
            text.push_str(&format!("turn {turn} says something. ").repeat(20));
            let ask = ask(text.as_bytes(), None);
            assert_eq!(policy.choose(&ask, &all), first);
            policy.routed(&ask, &all[first]);
            assert!(policy.cached_tokens(&ask, &all[first]) > 1000);
        }
        let _busy = registry.enter(&all[first], Role::Prefill, 1_000_000);
        assert_ne!(policy.choose(&ask(text.as_bytes(), None), &all), first);
        policy.forget(all[first].number);
        assert_eq!(
            policy.cached_tokens(&ask(text.as_bytes(), None), &all[first]),
            0
        );
    }

    #[test]
    fn what_lasts_for_a_time_is_forgotten_after_it() {
        let index = PrefixIndex::lasting(Duration::from_millis(40));
        let text = b"x".repeat(1024);
        index.insert(&text, 1);
        assert_eq!(index.cached_tokens(&text, 1), 256);
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(index.cached_tokens(&text, 1), 0);
    }

    #[test]
    fn the_index_is_bounded() {
        let index = PrefixIndex::default();
        for n in 0..20_000u64 {
            index.insert(&n.to_le_bytes().repeat(2048), n % 7);
        }
        let generations = index.generations.lock();
        assert!(generations.iter().all(|g| g.len() <= GENERATION_MAX));
    }
}
