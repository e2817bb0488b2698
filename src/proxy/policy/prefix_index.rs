//! What instances were sent, and how much of it can still be there.
//!
//! Owns the index: a hash per block of a prompt, chained from the beginning, with the instances it was sent to and when. Blocks
//! grow with their position, so that a long prompt costs few of them. Two bounds: two generations of blocks, of which the
//! older one goes as a whole; and per instance the size of its cache, where it is known, as an engine forgets too: what was
//! used least recently. An instance's time is counted in sixteenths of its cache filled anew, not in seconds.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use foldhash::{HashMap, HashMapExt};
use parking_lot::{Mutex, MutexGuard};
use smallvec::SmallVec;

use super::super::kv::text_blocks;
use super::super::registry::Instance;
use super::Ask;
use crate::base::clock::Millis;

/// Blocks per generation.
const GENERATION_MAX: usize = 1 << 18;
/// Instances remembered per block.
const HOLDERS_MAX: usize = 8;
/// Parts of a cache that are told apart by their age.
const STEPS: f64 = 16.0;

#[derive(Clone, Copy, Debug)]
struct Holder {
    number: u64,
    /// The instance's step in which it was sent the block last.
    step: u64,
}

type Holders = SmallVec<[Holder; 2]>;

/// Tokens an instance was sent, by the step in which each was sent last.
#[derive(Debug, Default)]
struct Ages {
    /// Number of the oldest step that can still be in its cache.
    first: u64,
    /// Tokens of that step and of those after it.
    tokens: VecDeque<f64>,
}

impl Ages {
    /// Moves a block's tokens from the step it was sent in last to the present one; gives that.
    fn touch(&mut self, before: Option<u64>, tokens: f64, capacity: f64) -> u64 {
        if let Some(old) = before.and_then(|b| b.checked_sub(self.first))
            && let Some(held) = usize::try_from(old)
                .ok()
                .and_then(|o| self.tokens.get_mut(o))
        {
            *held = (*held - tokens).max(0.0);
        }
        let full = self.tokens.back().is_none_or(|t| *t * STEPS >= capacity);
        if self.tokens.is_empty() || (full && capacity > 0.0) {
            self.tokens.push_back(0.0);
        }
        if let Some(last) = self.tokens.back_mut() {
            *last += tokens;
        }
        // The oldest step is gone when the later ones fill the cache alone.
        while capacity > 0.0
            && self.tokens.len() > 1
            && self.tokens.iter().skip(1).sum::<f64>() >= capacity
        {
            self.tokens.pop_front();
            self.first += 1;
        }
        self.first + self.tokens.len() as u64 - 1
    }
}

#[derive(Debug, Default)]
struct Tables {
    generations: [HashMap<u64, Holders>; 2],
    ages: HashMap<u64, Ages>,
    /// When the current generation began, where they end with time.
    began: Millis,
}

impl Tables {
    fn rotate(&mut self) {
        self.generations.swap(0, 1);
        self.generations[0] = HashMap::new();
    }

    /// Whether an instance was sent a block, and can still have it.
    fn has(&self, hash: u64, number: u64, first: u64) -> bool {
        let of = |g: &HashMap<u64, Holders>| {
            g.get(&hash)
                .is_some_and(|h| h.iter().any(|h| h.number == number && h.step >= first))
        };
        self.generations.iter().any(of)
    }

    fn first(&self, number: u64) -> u64 {
        self.ages.get(&number).map_or(0, |a| a.first)
    }
}

/// Which instances were sent which beginnings.
#[derive(Debug, Default)]
pub(super) struct PrefixIndex {
    tables: Mutex<Tables>,
    /// Half of what an entry lasts at most.
    half: Option<Duration>,
}

impl PrefixIndex {
    /// One that forgets what was not entered again for `time`, at the latest.
    pub(super) fn lasting(time: Duration) -> Self {
        let tables = Tables {
            began: Millis::now(),
            ..Tables::default()
        };
        Self {
            tables: Mutex::new(tables),
            half: Some(time / 2),
        }
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        let mut tables = self.tables.lock();
        if let Some(half) = self.half {
            let now = Millis::now();
            let (age, half) = (now.since(tables.began), half.as_millis() as u64);
            if age >= half {
                tables.began = now;
                tables.rotate();
                if age >= 2 * half {
                    tables.rotate();
                }
            }
        }
        tables
    }

    /// Bytes of the prompt's beginning that each candidate was sent before and can still have.
    pub(super) fn matched(
        &self,
        prompt: &[u8],
        candidates: &[Arc<Instance>],
    ) -> SmallVec<[usize; 8]> {
        let mut matched: SmallVec<[usize; 8]> = SmallVec::from_elem(0, candidates.len());
        let tables = self.tables();
        let mut alive: SmallVec<[Option<u64>; 8]> = candidates
            .iter()
            .map(|c| Some(tables.first(c.number)))
            .collect();
        for (end, hash) in text_blocks(prompt, 0) {
            let mut any = false;
            for (index, candidate) in candidates.iter().enumerate() {
                alive[index] =
                    alive[index].filter(|first| tables.has(hash, candidate.number, *first));
                if alive[index].is_some() {
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

    /// Enters a prompt that an instance is sent.
    pub(super) fn insert(&self, ask: &Ask<'_>, instance: &Instance) {
        let per_byte = ask.tokens_per_byte();
        let capacity = instance.cache_tokens.load(Ordering::Relaxed) as f64;
        let number = instance.number;
        let mut tables = self.tables();
        let mut start = 0;
        for (end, hash) in text_blocks(ask.prompt, 0) {
            let tokens = (end - start) as f64 * per_byte;
            start = end;
            if tables.generations[0].len() >= GENERATION_MAX
                && !tables.generations[0].contains_key(&hash)
            {
                tables.rotate();
            }
            let Tables {
                generations: [young, old],
                ages,
                ..
            } = &mut *tables;
            let older = old.remove(&hash);
            let holders = young.entry(hash).or_default();
            holders.extend(older.into_iter().flatten());
            let before = holders.iter().position(|h| h.number == number);
            let before = before.map(|at| holders.remove(at).step);
            let step = ages
                .entry(number)
                .or_default()
                .touch(before, tokens, capacity);
            holders.insert(0, Holder { number, step });
            holders.truncate(HOLDERS_MAX);
        }
    }

    pub(super) fn forget(&self, number: u64) {
        let mut tables = self.tables.lock();
        tables.ages.remove(&number);
        for generation in &mut tables.generations {
            generation.retain(|_, holders| {
                holders.retain(|h| h.number != number);
                !holders.is_empty()
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{ask, registry};
    use super::*;
    use crate::proxy::config::Role;

    fn held(index: &PrefixIndex, text: &[u8], all: &[Arc<Instance>]) -> Vec<usize> {
        index.matched(text, all).to_vec()
    }

    #[test]
    fn what_lasts_for_a_time_is_forgotten_after_it() {
        let all = registry(1).candidates(Role::Prefill, 0, None);
        let index = PrefixIndex::lasting(Duration::from_millis(40));
        let text = b"x".repeat(1024);
        index.insert(&ask(&text, None), &all[0]);
        assert_eq!(held(&index, &text, &all), [1024]);
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(held(&index, &text, &all), [0]);
    }

    #[test]
    fn the_index_is_bounded() {
        let all = registry(7).candidates(Role::Prefill, 0, None);
        let index = PrefixIndex::default();
        for n in 0..20_000usize {
            let text = (n as u64).to_le_bytes().repeat(2048);
            index.insert(&ask(&text, None), &all[n % 7]);
        }
        let tables = index.tables.lock();
        assert!(tables.generations.iter().all(|g| g.len() <= GENERATION_MAX));
        assert!(tables.ages.values().all(|a| a.tokens.len() == 1));
    }

    /// Beside a cache that forgets the least recently used block, one by one.
    #[test]
    fn a_cache_is_believed_to_hold_what_it_can() {
        let all = registry(2).candidates(Role::Prefill, 0, None);
        let index = PrefixIndex::default();
        // 64 prompts of 1,024 bytes fit; 256 tokens each.
        all[0].cache_tokens.store(64 * 256, Ordering::Relaxed);
        let text = |n: u64| n.to_le_bytes().repeat(128);
        let mut real: Vec<u64> = Vec::new();
        let (mut wrong, mut roll) = (0, 1u64);
        for _ in 0..4000 {
            roll = super::super::mix(roll);
            // A few are asked often, many seldom.
            let n = if roll.is_multiple_of(2) {
                roll % 16
            } else {
                roll % 1000
            };
            let believed = index.matched(&text(n), &all)[0] == 1024;
            wrong += usize::from(believed != real.contains(&n));
            real.retain(|r| *r != n);
            real.push(n);
            if real.len() > 64 {
                real.remove(0);
            }
            index.insert(&ask(&text(n), None), &all[0]);
        }
        assert!(wrong < 40, "{wrong} of 4000 judged wrongly");
        let tables = index.tables.lock();
        assert!(tables.ages[&all[0].number].tokens.len() <= 2 * STEPS as usize + 2);
        drop(tables);
        index.forget(all[0].number);
        assert_eq!(held(&index, &text(1), &all), [0, 0]);
    }
}
