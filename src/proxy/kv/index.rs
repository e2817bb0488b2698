//! Who holds which blocks: from engines' own hashes to hashes of tokens, which a request can compute for itself.
//!
//! Engines hash as they like (algorithm, seed, tokenizer details). An event that stores a block names its tokens too, so the
//! engine's hash is learnt as the name of a chain of tokens, and from there on events that name only hashes are understood.
//! Owns that table and its bounds; what is not known for sure is left out. Knows no sockets and no policy.

use foldhash::{HashMap, HashMapExt};
use parking_lot::Mutex;
use smallvec::SmallVec;
use tokio::sync::Notify;

use super::event::{Event, Stored, Tier};
use super::generations::Generations;
use super::worth::{Slower, Weights};

/// Most blocks of one holder.
const HELD_MAX: usize = 1 << 20;
/// Most blocks of all holders.
const HELD_ALL_MAX: usize = 1 << 22;
/// Engine hashes remembered per generation after their blocks have gone.
const LEARNED_MAX: usize = 1 << 19;
/// Block sizes told apart: prefill and decode may differ.
const SIZES_MAX: usize = 4;
/// Longest chain of a request, in blocks.
const CHAIN_MAX: usize = 1 << 16;
/// The shared pool as a holder: what is there, every instance can read.
pub(crate) const POOL: u64 = u64::MAX;

#[derive(Clone, Copy, Debug)]
struct Held {
    own: u64,
    tiers: u8,
}

type Holders = SmallVec<[(u64, u8); 2]>;

#[derive(Debug)]
struct Tables {
    sizes: SmallVec<[u32; SIZES_MAX]>,
    /// Engine hash → own hash.
    learned: Generations<u64, u64>,
    /// Holder → engine hash → block.
    held: HashMap<u64, HashMap<u64, Held>>,
    held_all: usize,
    /// Blocks in the pool by engine hash, whether or not their tokens are known yet: how many of their parts.
    pooled: HashMap<u64, u32>,
    /// Parts a block has: one per rank of the engines that store it.
    parts: u32,
    /// Own hash → holders.
    holders: HashMap<u64, Holders>,
    /// Blocks left out because a bound was reached, or their beginning is not known.
    left_out: u64,
}

/// The table.
#[derive(Debug)]
pub(crate) struct KvIndex {
    tables: Mutex<Tables>,
    /// Something came into the pool.
    pub(crate) pooled: Notify,
}

impl Default for KvIndex {
    fn default() -> Self {
        Self {
            tables: Mutex::new(Tables {
                sizes: SmallVec::new(),
                learned: Generations::new(LEARNED_MAX),
                held: HashMap::new(),
                held_all: 0,
                pooled: HashMap::new(),
                parts: 1,
                holders: HashMap::new(),
                left_out: 0,
            }),
            pooled: Notify::new(),
        }
    }
}

/// Own hashes of a prompt's whole blocks, per block size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Chain {
    sizes: SmallVec<[(u32, Vec<u64>); 1]>,
}

impl Chain {
    /// Blocks it holds, for bounds on memory.
    pub(crate) fn len(&self) -> usize {
        self.sizes.iter().map(|(_, hashes)| hashes.len()).sum()
    }
}

fn root(block_size: u32, lora: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64_with_seed(lora, u64::from(block_size))
}

fn extend(parent: u64, tokens: &[u32], extra: u64) -> u64 {
    let mut bytes: SmallVec<[u8; 512]> = SmallVec::new();
    for token in tokens {
        bytes.extend_from_slice(&token.to_le_bytes());
    }
    xxhash_rust::xxh3::xxh3_64_with_seed(&bytes, parent) ^ extra
}

impl Tables {
    fn own_of(&self, holder: u64, engine: u64) -> Option<u64> {
        let held = self.held.get(&holder).and_then(|h| h.get(&engine));
        held.map(|h| h.own)
            .or_else(|| self.learned.get(&engine).copied())
    }

    fn hold(&mut self, holder: u64, engine: u64, own: u64, tier: Tier) {
        let all = self.held.entry(holder).or_default();
        if let Some(held) = all.get_mut(&engine) {
            held.tiers |= tier as u8;
        } else if all.len() >= HELD_MAX || self.held_all >= HELD_ALL_MAX {
            self.left_out += 1;
            return;
        } else {
            let tiers = tier as u8;
            all.insert(engine, Held { own, tiers });
            self.held_all += 1;
        }
        let holders = self.holders.entry(own).or_default();
        match holders.iter_mut().find(|(h, _)| *h == holder) {
            Some((_, tiers)) => *tiers |= tier as u8,
            None => holders.push((holder, tier as u8)),
        }
    }

    fn release(&mut self, holder: u64, engine: u64, tier: Tier) {
        let Some(all) = self.held.get_mut(&holder) else {
            return;
        };
        let Some(held) = all.get_mut(&engine) else {
            return;
        };
        held.tiers &= !(tier as u8);
        let left = *held;
        if left.tiers == 0 {
            all.remove(&engine);
            self.held_all -= 1;
        }
        self.forget_holder(holder, left.own, left.tiers);
    }

    fn has_all_parts(&self, engine: u64) -> bool {
        self.pooled.get(&engine).is_some_and(|p| *p >= self.parts)
    }

    fn forget_holder(&mut self, holder: u64, own: u64, tiers: u8) {
        let Some(holders) = self.holders.get_mut(&own) else {
            return;
        };
        match holders.iter().position(|(h, _)| *h == holder) {
            Some(at) if tiers == 0 => {
                holders.swap_remove(at);
            }
            Some(at) => holders[at].1 = tiers,
            None => {}
        }
        if holders.is_empty() {
            self.holders.remove(&own);
        }
    }

    fn stored(&mut self, number: u64, stored: &Stored) {
        let tier = stored.tier.unwrap_or(Tier::Gpu);
        let holder = if tier == Tier::Store { POOL } else { number };
        let size = stored.block_size as usize;
        if size == 0 || stored.tokens.is_empty() {
            for engine in &stored.hashes {
                match self.own_of(holder, *engine) {
                    Some(own) => self.hold(holder, *engine, own, tier),
                    None => self.left_out += 1,
                }
            }
            return;
        }
        if !self.sizes.contains(&stored.block_size) && self.sizes.len() < SIZES_MAX {
            self.sizes.push(stored.block_size);
        }
        let mut own = match stored.parent {
            None => root(
                stored.block_size,
                stored.lora.as_deref().unwrap_or_default(),
            ),
            Some(parent) => match self.own_of(number, parent) {
                Some(own) => own,
                None => {
                    self.left_out += stored.hashes.len() as u64;
                    return;
                }
            },
        };
        let blocks = stored.tokens.chunks_exact(size);
        for (at, (engine, tokens)) in stored.hashes.iter().zip(blocks).enumerate() {
            // An adapter's name is among the extra keys too, and is in the root already.
            let extra = match stored.lora {
                None => stored.extra.get(at).copied().unwrap_or(0),
                Some(_) => 0,
            };
            own = extend(own, tokens, extra);
            self.learned.insert(*engine, own);
            self.hold(holder, *engine, own, tier);
            if self.has_all_parts(*engine) {
                self.hold(POOL, *engine, own, Tier::Store);
            }
        }
    }

    fn pool(&mut self, engine: u64, parts: u32, is_there: bool) {
        self.parts = self.parts.max(parts);
        if is_there {
            if self.pooled.len() >= HELD_MAX && !self.pooled.contains_key(&engine) {
                self.left_out += 1;
                return;
            }
            *self.pooled.entry(engine).or_default() += 1;
        } else if let Some(left) = self.pooled.get_mut(&engine) {
            *left -= 1;
            if *left == 0 {
                self.pooled.remove(&engine);
            }
        }
        if !self.has_all_parts(engine) {
            self.release(POOL, engine, Tier::Store);
        } else if let Some(own) = self.own_of(POOL, engine) {
            self.hold(POOL, engine, own, Tier::Store);
        }
    }
}

impl KvIndex {
    /// Takes an event of an instance in.
    pub(crate) fn apply(&self, number: u64, event: &Event) {
        let mut tables = self.tables.lock();
        match event {
            // Further groups of a hybrid model hold other layers of the same tokens.
            Event::Stored(stored) if stored.group == 0 => tables.stored(number, stored),
            Event::Removed {
                hashes,
                tier,
                group: 0,
            } => {
                let tier = tier.unwrap_or(Tier::Gpu);
                let holder = if tier == Tier::Store { POOL } else { number };
                for engine in hashes {
                    tables.release(holder, *engine, tier);
                }
            }
            Event::Cleared => {
                drop(tables);
                self.forget(number);
                return;
            }
            _ => {}
        }
        drop(tables);
        if matches!(event, Event::Stored(s) if s.tier == Some(Tier::Store)) {
            self.pooled.notify_waiters();
        }
    }

    /// A part of a block came into the pool, or left it. `parts`: how many a block has at least.
    pub(crate) fn pool(&self, engine: u64, parts: u32, is_there: bool) {
        self.tables.lock().pool(engine, parts, is_there);
        self.pooled.notify_waiters();
    }

    /// Everything a holder had is gone, or not sure any more.
    pub(crate) fn forget(&self, number: u64) {
        let mut tables = self.tables.lock();
        if number == POOL {
            tables.pooled.clear();
            tables.parts = 1;
        }
        let Some(all) = tables.held.remove(&number) else {
            return;
        };
        tables.held_all -= all.len();
        for held in all.values() {
            tables.forget_holder(number, held.own, 0);
        }
    }

    /// The chain of a prompt; empty as long as no engine has told its block size.
    pub(crate) fn chain(&self, tokens: &[u32], lora: &[u8]) -> Chain {
        let sizes = self.tables.lock().sizes.clone();
        let of = |size: u32| {
            let mut own = root(size, lora);
            let blocks = tokens.chunks_exact(size as usize).take(CHAIN_MAX);
            let hashes = blocks.map(|block| {
                own = extend(own, block, 0);
                own
            });
            (size, hashes.collect())
        };
        Chain {
            sizes: sizes.into_iter().map(of).collect(),
        }
    }

    /// Tokens of a chain's beginning that each of `numbers` need not compute, weighted by where they lie. `tokens`: how
    /// far the chain may be believed.
    pub(crate) fn saved(
        &self,
        chain: &Chain,
        tokens: usize,
        numbers: &[u64],
        weights: &Weights,
    ) -> SmallVec<[f64; 8]> {
        let mut best: SmallVec<[f64; 8]> = SmallVec::from_elem(0.0, numbers.len());
        let tables = self.tables.lock();
        for (size, hashes) in &chain.sizes {
            let mut saved: SmallVec<[Option<f64>; 8]> =
                SmallVec::from_elem(Some(0.0), numbers.len());
            for own in hashes.iter().take(tokens / *size as usize) {
                let Some(holders) = tables.holders.get(own) else {
                    break;
                };
                let of = |number: u64| {
                    holders
                        .iter()
                        .find(|(h, _)| *h == number)
                        .map_or(0, |h| h.1)
                };
                let pool = of(POOL);
                let mut any = false;
                for (at, number) in numbers.iter().enumerate() {
                    let Some(sum) = saved[at] else { continue };
                    let tiers = of(*number) | pool;
                    if tiers == 0 {
                        best[at] = best[at].max(sum);
                        saved[at] = None;
                    } else {
                        saved[at] = Some(sum + weights.of(tiers) * f64::from(*size));
                        any = true;
                    }
                }
                if !any {
                    break;
                }
            }
            for (best, saved) in best.iter_mut().zip(saved) {
                *best = best.max(saved.unwrap_or(0.0));
            }
        }
        best
    }

    /// Tokens of that beginning that `number` has to fetch from slower tiers.
    pub(crate) fn slower(
        &self,
        chain: &Chain,
        tokens: usize,
        number: u64,
        weights: &Weights,
    ) -> Slower {
        let tables = self.tables.lock();
        let mut most = (0, Slower::default());
        for (size, hashes) in &chain.sizes {
            let (mut whole, mut slower) = (0, Slower::default());
            for own in hashes.iter().take(tokens / *size as usize) {
                let Some(holders) = tables.holders.get(own) else {
                    break;
                };
                let its = holders.iter().filter(|(h, _)| *h == number || *h == POOL);
                let tiers = its.fold(0, |all, (_, tiers)| all | tiers);
                if tiers == 0 {
                    break;
                }
                whole += *size;
                if let Some(at) = weights.source(tiers) {
                    slower[at] += *size;
                }
            }
            if whole > most.0 {
                most = (whole, slower);
            }
        }
        most.1
    }

    /// Whether the pool has the last whole block of a chain's first `tokens`.
    pub(crate) fn is_pooled(&self, chain: &Chain, tokens: usize) -> bool {
        let tables = self.tables.lock();
        chain.sizes.iter().any(|(size, hashes)| {
            let whole = (tokens / *size as usize).min(hashes.len());
            let last = whole.checked_sub(1).and_then(|at| hashes.get(at));
            let holders = last.and_then(|own| tables.holders.get(own));
            holders.is_some_and(|h| h.iter().any(|(h, _)| *h == POOL))
        })
    }

    /// Whether the pool has all of these blocks, named by their engine hashes.
    pub(crate) fn are_pooled(&self, engines: &[u64]) -> bool {
        let tables = self.tables.lock();
        let pool = tables.held.get(&POOL);
        let holds = |e: &u64| pool.is_some_and(|p| p.contains_key(e));
        engines.iter().all(|e| holds(e) || tables.has_all_parts(*e))
    }

    /// Blocks of a holder.
    pub(crate) fn count(&self, number: u64) -> usize {
        self.tables.lock().held.get(&number).map_or(0, HashMap::len)
    }

    /// Blocks that were left out so far.
    pub(crate) fn left_out(&self) -> u64 {
        self.tables.lock().left_out
    }

    /// Whether any engine has told a block size.
    pub(crate) fn knows_sizes(&self) -> bool {
        !self.tables.lock().sizes.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::super::worth::Worth;
    use super::*;

    fn weights() -> Weights {
        Worth::default().weights()
    }

    fn stored(hashes: &[u64], parent: Option<u64>, tokens: &[u32], tier: Tier) -> Event {
        Event::Stored(Stored {
            hashes: hashes.to_vec(),
            parent,
            tokens: tokens.to_vec(),
            block_size: 2,
            tier: Some(tier),
            ..Stored::default()
        })
    }

    fn removed(hashes: &[u64], tier: Tier) -> Event {
        Event::Removed {
            hashes: hashes.to_vec(),
            tier: Some(tier),
            group: 0,
        }
    }

    #[test]
    fn tokens_decide_whatever_an_engine_calls_its_blocks() {
        let index = KvIndex::default();
        assert_eq!(index.chain(&[1, 2], b"").len(), 0);
        index.apply(1, &stored(&[11, 12], None, &[1, 2, 3, 4], Tier::Gpu));
        index.apply(1, &stored(&[13], Some(12), &[5, 6], Tier::Gpu));
        index.apply(2, &stored(&[91], None, &[1, 2], Tier::Gpu));
        let chain = index.chain(&[1, 2, 3, 4, 5, 6, 7], b"");
        let saved = |tokens| index.saved(&chain, tokens, &[1, 2, 3], &weights()).to_vec();
        assert_eq!(saved(7), [6.0, 2.0, 0.0]);
        assert_eq!(saved(5), [4.0, 2.0, 0.0]);
        // Another beginning or another adapter is another chain.
        let other = index.chain(&[9, 2, 3, 4], b"");
        assert_eq!(index.saved(&other, 4, &[1], &weights()).to_vec(), [0.0]);
        let adapter = index.chain(&[1, 2, 3, 4], b"lora");
        assert_eq!(index.saved(&adapter, 4, &[1], &weights()).to_vec(), [0.0]);
        // A block that goes from GPU to host is named by its hash alone, and is worth less.
        index.apply(1, &stored(&[13], None, &[], Tier::Host));
        index.apply(1, &removed(&[13], Tier::Gpu));
        assert_eq!(saved(7)[0], 4.0 + 0.8 * 2.0);
        index.apply(1, &removed(&[11], Tier::Gpu));
        assert_eq!(saved(7)[0], 0.0, "a gap ends the run");
        index.apply(2, &Event::Cleared);
        assert_eq!(saved(7)[1], 0.0);
    }

    #[test]
    fn the_pool_serves_everybody() {
        let index = KvIndex::default();
        index.apply(1, &stored(&[11, 12], None, &[1, 2, 3, 4], Tier::Gpu));
        let chain = index.chain(&[1, 2, 3, 4], b"");
        assert!(!index.is_pooled(&chain, 4));
        index.apply(1, &stored(&[11], None, &[], Tier::Store));
        index.apply(2, &stored(&[12], None, &[], Tier::Store));
        assert!(index.is_pooled(&chain, 4));
        assert_eq!(
            index.saved(&chain, 4, &[1, 2], &weights()).to_vec(),
            [4.0, 2.4]
        );
        let slower = |number| index.slower(&chain, 4, number, &weights());
        assert_eq!((slower(1), slower(2)), ([0, 0, 0], [0, 4, 0]));
        // Its tokens are still known after the worker has forgotten the block.
        index.apply(1, &removed(&[11, 12], Tier::Gpu));
        index.apply(1, &removed(&[12], Tier::Store));
        assert!(!index.is_pooled(&chain, 4));
        index.apply(1, &stored(&[12], None, &[], Tier::Store));
        assert_eq!(index.saved(&chain, 4, &[2], &weights()).to_vec(), [2.4]);
        index.forget(POOL);
        assert!(!index.is_pooled(&chain, 4));
        assert_eq!((index.count(1), index.count(POOL)), (0, 0));
    }

    #[test]
    fn a_block_is_in_the_pool_when_all_its_parts_are() {
        let index = KvIndex::default();
        // The master may tell of a block before its engine names its tokens.
        index.pool(11, 2, true);
        index.apply(1, &stored(&[11, 12], None, &[1, 2, 3, 4], Tier::Gpu));
        let chain = index.chain(&[1, 2, 3, 4], b"");
        assert!(!index.is_pooled(&chain, 2) && !index.are_pooled(&[11]));
        index.pool(11, 1, true);
        assert!(
            index.is_pooled(&chain, 2) && index.are_pooled(&[11]) && !index.are_pooled(&[11, 12])
        );
        index.pool(11, 1, false);
        assert!(!index.is_pooled(&chain, 2));
        index.pool(11, 1, true);
        index.pool(13, 1, true);
        index.pool(13, 2, true);
        assert!(index.are_pooled(&[13]));
        index.apply(2, &stored(&[13], None, &[9, 9], Tier::Gpu));
        assert_eq!(
            index
                .saved(&index.chain(&[9, 9], b""), 2, &[7], &weights())
                .to_vec(),
            [1.2]
        );
        index.forget(POOL);
        assert!(!index.are_pooled(&[11]) && !index.is_pooled(&chain, 2));
    }

    #[test]
    fn nothing_is_left_behind_and_nothing_grows_without_a_bound() {
        let index = KvIndex::default();
        for n in 0..50_000u64 {
            index.apply(n % 3, &stored(&[n], None, &[n as u32, 1], Tier::Gpu));
        }
        index.apply(0, &stored(&[7], Some(1 << 60), &[1, 2], Tier::Gpu));
        assert_eq!(index.left_out(), 1, "its beginning is not known");
        (0..3).for_each(|n| index.forget(n));
        let mut tables = index.tables.lock();
        assert!(tables.holders.is_empty() && tables.held.is_empty() && tables.held_all == 0);
        for n in 0..3 * LEARNED_MAX as u64 {
            tables.learned.insert(n, n);
        }
        assert!(tables.learned.len() <= 2 * LEARNED_MAX);
    }
}
