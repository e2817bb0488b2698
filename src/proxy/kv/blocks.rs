//! What one registered publisher holds, by the standard hashes of the Conductor's API: XXH3-64 with seed 0 over a block's tokens (little-endian
//! `u32`), chained as `XXH3(previous ‖ local)`.
//!
//! Owns the way from an engine's own hashes to these, and the bounds. Knows no socket and no request.

use foldhash::{HashMap, HashMapExt};

use super::event::{Event, Stored, Tier};
use super::generations::Generations;

/// Most blocks of a publisher.
const BLOCKS_MAX: usize = 1 << 20;
/// Engine hashes remembered per generation after their blocks have gone.
const LEARNED_MAX: usize = 1 << 18;

/// The blocks of a publisher.
#[derive(Debug)]
pub(super) struct Blocks {
    block_size: usize,
    /// Engine hash → standard hash.
    learned: Generations<u64, u64>,
    /// Standard hash → where it lies.
    held: HashMap<u64, u8>,
}

/// Standard hash of the block after `before` (`None`: the first).
fn extend(before: Option<u64>, tokens: &[u32]) -> u64 {
    let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
    let local = xxhash_rust::xxh3::xxh3_64(&bytes);
    match before {
        None => local,
        Some(before) => {
            let pair = [before.to_le_bytes(), local.to_le_bytes()].concat();
            xxhash_rust::xxh3::xxh3_64(&pair)
        }
    }
}

/// Standard hashes of a prompt's whole blocks.
pub(super) fn chain(tokens: &[u32], block_size: usize) -> Vec<u64> {
    let mut before = None;
    let blocks = tokens.chunks_exact(block_size.max(1));
    blocks
        .map(|block| {
            let hash = extend(before, block);
            before = Some(hash);
            hash
        })
        .collect()
}

impl Blocks {
    pub(super) fn new(block_size: usize) -> Self {
        Self {
            block_size,
            learned: Generations::new(LEARNED_MAX),
            held: HashMap::new(),
        }
    }

    /// Takes an event in.
    pub(super) fn apply(&mut self, event: &Event) {
        match event {
            // Further groups of a hybrid model hold other layers of the same tokens.
            Event::Stored(stored) if stored.group == 0 => self.stored(stored),
            Event::Removed {
                hashes,
                tier,
                group: 0,
            } => {
                for engine in hashes {
                    let own = self.own(*engine);
                    let tier = tier.unwrap_or(Tier::Gpu) as u8;
                    if let Some(tiers) = self.held.get_mut(&own) {
                        *tiers &= !tier;
                        if *tiers == 0 {
                            self.held.remove(&own);
                        }
                    }
                }
            }
            Event::Cleared => self.held.clear(),
            _ => {}
        }
    }

    /// A publisher that names no tokens uses the standard hashes itself.
    fn own(&self, engine: u64) -> u64 {
        self.learned.get(&engine).copied().unwrap_or(engine)
    }

    fn stored(&mut self, stored: &Stored) {
        let tier = stored.tier.unwrap_or(Tier::Gpu);
        if stored.tokens.is_empty() {
            for engine in &stored.hashes {
                self.hold(self.own(*engine), tier);
            }
            return;
        }
        let mut before = match stored.parent {
            None => None,
            Some(parent) => match self.learned.get(&parent) {
                Some(own) => Some(*own),
                // Its beginning was not heard.
                None => return,
            },
        };
        let size = match stored.block_size {
            0 => self.block_size,
            size => size as usize,
        };
        if size != self.block_size {
            return;
        }
        for (engine, tokens) in stored.hashes.iter().zip(stored.tokens.chunks_exact(size)) {
            let own = extend(before, tokens);
            self.learned.insert(*engine, own);
            self.hold(own, tier);
            before = Some(own);
        }
    }

    fn hold(&mut self, own: u64, tier: Tier) {
        if self.held.len() < BLOCKS_MAX || self.held.contains_key(&own) {
            *self.held.entry(own).or_default() |= tier as u8;
        }
    }

    /// Where a block lies; 0 = it is not there.
    pub(super) fn tiers(&self, own: u64) -> u8 {
        self.held.get(&own).copied().unwrap_or(0)
    }

    /// Everything is gone, or not sure any more.
    pub(super) fn forget(&mut self) {
        self.held.clear();
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.held.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn the_standard_hashes() {
        let local = xxhash_rust::xxh3::xxh3_64(&[1, 0, 0, 0, 2, 0, 0, 0]);
        let second = xxhash_rust::xxh3::xxh3_64(&[3, 0, 0, 0, 4, 0, 0, 0]);
        let pair = [local.to_le_bytes(), second.to_le_bytes()].concat();
        let wanted = [local, xxhash_rust::xxh3::xxh3_64(&pair)];
        assert_eq!(chain(&[1, 2, 3, 4, 5], 2), wanted);
        assert!(chain(&[1], 2).is_empty());
    }

    #[test]
    fn engines_hashes_are_learnt_and_standard_ones_taken_as_they_are() {
        let mut blocks = Blocks::new(2);
        let chain = chain(&[1, 2, 3, 4], 2);
        blocks.apply(&stored(&[71], None, &[1, 2], Tier::Gpu));
        blocks.apply(&stored(&[72], Some(71), &[3, 4], Tier::Gpu));
        blocks.apply(&stored(&[72], None, &[], Tier::Host));
        let tiers = |b: &Blocks| [b.tiers(chain[0]), b.tiers(chain[1])];
        assert_eq!(tiers(&blocks), [1, 3]);
        let removed = |hashes: &[u64], tier| Event::Removed {
            hashes: hashes.to_vec(),
            tier: Some(tier),
            group: 0,
        };
        blocks.apply(&removed(&[72], Tier::Gpu));
        assert_eq!(tiers(&blocks), [1, 2]);
        blocks.apply(&removed(&[71, 72], Tier::Host));
        assert_eq!((tiers(&blocks), blocks.len()), ([1, 0], 1));
        // A store's publisher knows no tokens.
        blocks.apply(&stored(&[chain[1]], None, &[], Tier::Disk));
        assert_eq!(tiers(&blocks), [1, 8]);
        blocks.apply(&stored(&[9], Some(1234), &[5, 6], Tier::Gpu));
        assert_eq!(blocks.len(), 2, "its beginning is not known");
        blocks.apply(&Event::Cleared);
        assert_eq!(blocks.len(), 0);
    }
}
