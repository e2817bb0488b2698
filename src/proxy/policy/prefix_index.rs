//! What instances were sent, and how much of it can still be there.
//!
//! Owns the index: a hash per block of a prompt, chained from the beginning, with the instances it was sent to and when. Blocks
//! grow with their position, so that a long prompt costs few of them. Two bounds: two generations of blocks, of which the
//! older one goes as a whole; and per instance the size of its cache, where it is known, as an engine forgets too: what was
//! used least recently. An instance's time is counted in parts of its cache filled anew, not in seconds. Knows from that, too, how much
//! of what is about to be forgotten is asked for again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use foldhash::{HashMap, HashMapExt};
use parking_lot::{Mutex, MutexGuard};
use smallvec::SmallVec;

use super::super::kv::text_blocks;
use super::super::registry::{INSTANCES_MAX, Instance};
use super::Ask;
use crate::base::clock::Millis;

/// Blocks per generation.
const GENERATION_MAX: usize = 1 << 18;
/// Instances remembered per block.
const HOLDERS_MAX: usize = 8;
/// A cache this full pushes something out for what is new.
const FULL: f64 = 0.95;
/// Bytes that follow a prompt's last block at most.
const REST_MAX: usize = 4096;
/// Parts of a cache that are told apart by their age.
const STEPS: f64 = 256.0;

#[derive(Clone, Copy, Debug)]
struct Holder {
    number: u64,
    /// When it was sent the block last: the instance's step, and how full that was.
    at: f64,
    /// Its tokens then; of a prompt's last block with those that follow it.
    tokens: f32,
}

type Holders = SmallVec<[Holder; 2]>;

/// Tokens an instance was sent, by the step in which each was sent last.
#[derive(Debug, Default)]
struct Ages {
    /// Tokens by the first of their steps; a bounded number of entries.
    tokens: BTreeMap<u64, f64>,
    /// Their sum.
    held: f64,
    /// The present step, and what was sent in it.
    step: u64,
    sent: f64,
    /// Tokens that were asked for again when they had not been for half of the cache, and those that were forgotten instead;
    /// halved with each filling of the cache.
    again: f64,
    forgotten: f64,
}

impl Ages {
    /// Moves a block's tokens from where it was sent last to the present; gives that. `whole`: everything before the block is
    /// there too, so that it serves.
    fn touch(&mut self, before: Option<Holder>, tokens: f64, capacity: f64, whole: bool) -> f64 {
        let gone = self.gone(capacity);
        if let Some(before) = before.filter(|before| before.at >= gone) {
            let held = f64::from(before.tokens);
            self.leave(before.at as u64, held);
            if whole && self.step.saturating_sub(before.at as u64) as f64 >= STEPS / 2.0 {
                self.again += held;
            }
        }
        if self.sent * STEPS >= capacity && capacity > 0.0 {
            self.step += 1;
            self.sent = 0.0;
            let keep = 0.5f64.powf(1.0 / STEPS);
            self.again *= keep;
            self.forgotten *= keep;
            self.compact(capacity);
        }
        *self.tokens.entry(self.step).or_default() += tokens;
        self.held += tokens;
        // The oldest step is gone when the later ones fill the cache alone.
        while capacity > 0.0
            && self.tokens.len() > 1
            && let Some(oldest) = self.tokens.first_entry()
            && self.held - oldest.get() >= capacity
        {
            let oldest = oldest.remove();
            self.held -= oldest;
            self.forgotten += oldest;
        }
        let at = self.step as f64 + self.sent * STEPS / capacity.max(1.0 + self.sent * STEPS);
        self.sent += tokens;
        at
    }

    /// Takes tokens out of a step.
    fn leave(&mut self, step: u64, tokens: f64) {
        if let Some((first, held)) = self.tokens.range_mut(..=step).next_back() {
            let first = *first;
            let left = tokens.min(*held);
            *held -= left;
            let is_empty = *held < 1e-6;
            self.held -= left;
            if is_empty {
                self.tokens.remove(&first);
            }
        }
    }

    /// Joins steps of which little is left, so that there are never more than twice as many as the cache has parts.
    fn compact(&mut self, capacity: f64) {
        if self.tokens.len() <= 2 * STEPS as usize {
            return;
        }
        let mut joined: BTreeMap<u64, f64> = BTreeMap::new();
        for (step, tokens) in std::mem::take(&mut self.tokens) {
            match joined.last_entry() {
                Some(mut last) if last.get() + tokens <= capacity / STEPS => {
                    *last.get_mut() += tokens
                }
                _ => {
                    joined.insert(step, tokens);
                }
            }
        }
        self.tokens = joined;
    }

    /// What was sent before this is gone. Of the oldest step as much as the cache has no room for.
    fn gone(&self, capacity: f64) -> f64 {
        let Some((first, oldest)) = self.tokens.first_key_value() else {
            return 0.0;
        };
        let over = if capacity > 0.0 {
            self.held - capacity
        } else {
            0.0
        };
        *first as f64 + (over.max(0.0) / oldest.max(1e-6)).min(1.0)
    }

    /// Of what has not been asked for during half of a full cache, the part that still is. 0: the cache has room.
    fn wanted(&self, capacity: f64) -> f64 {
        let all = self.again + self.forgotten;
        if capacity <= 0.0 || self.held < FULL * capacity || all <= 0.0 {
            return 0.0;
        }
        self.again / all
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

    /// An instance may be sent something just as it is taken out and forgotten: the oldest goes when there are too many.
    fn make_room_for(&mut self, number: u64) {
        if self.ages.len() >= 2 * INSTANCES_MAX
            && !self.ages.contains_key(&number)
            && let Some(oldest) = self.ages.keys().min().copied()
        {
            self.ages.remove(&oldest);
        }
    }

    /// Whether an instance was sent a block, and can still have it.
    fn has(&self, hash: u64, number: u64, gone: f64) -> bool {
        let of = |g: &HashMap<u64, Holders>| {
            g.get(&hash)
                .is_some_and(|h| h.iter().any(|h| h.number == number && h.at >= gone))
        };
        self.generations.iter().any(of)
    }

    /// What an instance was sent before this it cannot have any more.
    fn gone(&self, instance: &Instance) -> f64 {
        let capacity = instance.cache_tokens.load(Ordering::Relaxed) as f64;
        let ages = self.ages.get(&instance.number);
        ages.map_or(0.0, |a| a.gone(capacity))
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
        let mut alive: SmallVec<[Option<f64>; 8]> =
            candidates.iter().map(|c| Some(tables.gone(c))).collect();
        for (end, hash) in text_blocks(prompt, 0) {
            let mut any = false;
            for (index, candidate) in candidates.iter().enumerate() {
                alive[index] =
                    alive[index].filter(|gone| tables.has(hash, candidate.number, *gone));
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
        tables.make_room_for(number);
        let (mut start, mut whole) = (0, true);
        let blocks = text_blocks(ask.prompt, 0);
        // What is too short for a block takes room all the same; beyond the last one that is looked at, nothing is known.
        let whole_end = blocks.last().map_or(0, |(end, _)| *end);
        let rest = (ask.prompt.len() - whole_end).min(REST_MAX);
        for (end, hash) in blocks {
            let following = if end == whole_end { rest } else { 0 };
            let tokens = (end + following - start) as f64 * per_byte;
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
            let before = before.map(|at| holders.remove(at));
            let ages = ages.entry(number).or_default();
            whole &= before.is_some_and(|before| before.at >= ages.gone(capacity));
            let at = ages.touch(before, tokens, capacity, whole);
            holders.insert(
                0,
                Holder {
                    number,
                    at,
                    tokens: tokens as f32,
                },
            );
            holders.truncate(HOLDERS_MAX);
        }
    }

    /// How much each candidate's cache is worth at its end: of what is about to be pushed out, the part that would be asked for
    /// again. 0 where there is room, or the size is not known.
    pub(super) fn wanted(&self, candidates: &[Arc<Instance>]) -> SmallVec<[f64; 8]> {
        let tables = self.tables.lock();
        let of = |c: &Arc<Instance>| {
            let capacity = c.cache_tokens.load(Ordering::Relaxed) as f64;
            tables
                .ages
                .get(&c.number)
                .map_or(0.0, |a| a.wanted(capacity))
        };
        candidates.iter().map(of).collect()
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
