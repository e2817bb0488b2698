//! What one registered publisher holds, by the standard hashes of the Conductor's API: XXH3-64 with seed 0 over a block's tokens (little-endian
//! `u32`), chained as `XXH3(previous ‖ local)`.
//!
//! Owns the way from an engine's own hashes to these, who of several that publish together holds a block, and the bounds. Blocks
//! under another adapter or salt than registered are left out, since the standard hash of their tokens is the same. Knows no
//! socket and no request.

use foldhash::{HashMap, HashMapExt};

use super::event::{Event, Stored, Tier, extra_of};
use super::generations::Generations;

/// Most blocks of a publisher.
const BLOCKS_MAX: usize = 1 << 20;
/// Engine hashes remembered per generation after their blocks have gone.
const LEARNED_MAX: usize = 1 << 18;
/// Media there are.
const TIERS: [Tier; 4] = [Tier::Gpu, Tier::Host, Tier::Store, Tier::Disk];

/// What a publisher was registered for: blocks of anything else are not its.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Subject {
    pub(super) block_size: usize,
    /// Adapter; empty: the model itself.
    pub(super) lora: String,
    pub(super) salt: String,
}

impl Subject {
    /// Whether blocks under this adapter are meant. Where none is told, not even that there is none, the registration says it.
    fn has_adapter(&self, stored: &Stored) -> bool {
        !stored.names_lora || stored.lora.as_deref().unwrap_or_default() == self.lora.as_bytes()
    }

    /// Whether what decides about a block beside its tokens is what was registered: the adapter's name in each, the salt in the
    /// first, as vLLM writes them. Images are never.
    fn has_extra(&self, extra: u64, is_first: bool) -> bool {
        let lora = Some(self.lora.as_str()).filter(|l| !l.is_empty());
        let salt = Some(self.salt.as_str()).filter(|s| is_first && !s.is_empty());
        let keys = |with: [Option<&str>; 2]| {
            let keys: Vec<&str> = with.into_iter().flatten().collect();
            extra_of(&keys)
        };
        extra == 0 || extra == keys([lora, salt]) || extra == keys([None, salt])
    }
}

/// A block as its holder knows it.
#[derive(Clone, Copy, Debug)]
struct Entry {
    own: u64,
    tiers: u8,
}

/// The blocks of a publisher.
#[derive(Debug)]
pub(super) struct Blocks {
    subject: Subject,
    /// Engine hash → standard hash, of blocks that have gone too.
    learned: Generations<u64, u64>,
    /// Holder (an engine or rank of several that publish together) and engine hash → what that is and where it lies.
    entries: HashMap<(u64, u64), Entry>,
    /// Standard hash → how many hold it, by medium.
    held: HashMap<u64, [u32; TIERS.len()]>,
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
    pub(super) fn new(subject: Subject) -> Self {
        Self {
            subject,
            learned: Generations::new(LEARNED_MAX),
            entries: HashMap::new(),
            held: HashMap::new(),
        }
    }

    /// Takes in an event of one of those who publish together.
    pub(super) fn apply(&mut self, event: &Event, holder: u64) {
        match event {
            // Further groups of a hybrid model hold other layers of the same tokens.
            Event::Stored(stored) if stored.group == 0 && self.subject.has_adapter(stored) => {
                self.stored(stored, holder);
            }
            Event::Removed {
                hashes,
                tier,
                group: 0,
            } => {
                for engine in hashes {
                    self.let_go((holder, *engine), tier.unwrap_or(Tier::Gpu) as u8);
                }
            }
            Event::Cleared => {
                // Who names no holder means all of them.
                let gone = self.entries.keys();
                let gone = gone.filter(|(of, _)| holder == 0 || *of == holder);
                let gone: Vec<(u64, u64)> = gone.copied().collect();
                for key in gone {
                    self.let_go(key, u8::MAX);
                }
            }
            _ => {}
        }
    }

    /// The standard hash of a block, where it is known.
    fn known(&self, holder: u64, engine: u64) -> Option<u64> {
        let entry = self.entries.get(&(holder, engine)).map(|e| e.own);
        entry.or_else(|| self.learned.get(&engine).copied())
    }

    fn stored(&mut self, stored: &Stored, holder: u64) {
        let tier = stored.tier.unwrap_or(Tier::Gpu);
        if stored.tokens.is_empty() {
            for engine in &stored.hashes {
                // A publisher that names no tokens uses the standard hashes itself.
                let own = self.known(holder, *engine).unwrap_or(*engine);
                self.hold((holder, *engine), own, tier);
            }
            return;
        }
        let mut before = match stored.parent {
            None => None,
            Some(parent) => match self.known(holder, parent) {
                Some(own) => Some(own),
                // Its beginning was not heard, or is none of this publisher's.
                None => return,
            },
        };
        let size = match stored.block_size {
            0 => self.subject.block_size,
            size => size as usize,
        };
        if size != self.subject.block_size {
            return;
        }
        let blocks = stored.hashes.iter().zip(stored.tokens.chunks_exact(size));
        for (at, (engine, tokens)) in blocks.enumerate() {
            let extra = stored.extra.get(at).copied().unwrap_or(0);
            if !self.subject.has_extra(extra, before.is_none()) {
                // Nor is what follows: it is computed from another beginning.
                return;
            }
            let own = extend(before, tokens);
            self.learned.insert(*engine, own);
            self.hold((holder, *engine), own, tier);
            before = Some(own);
        }
    }

    fn hold(&mut self, key: (u64, u64), own: u64, tier: Tier) {
        let known = self.entries.get(&key).copied();
        if known.is_some_and(|entry| entry.own != own) {
            self.let_go(key, u8::MAX);
        }
        if self.entries.len() >= BLOCKS_MAX && !self.entries.contains_key(&key) {
            return;
        }
        let entry = self.entries.entry(key).or_insert(Entry { own, tiers: 0 });
        if entry.tiers & tier as u8 == 0 {
            entry.tiers |= tier as u8;
            let counts = self.held.entry(own).or_default();
            let all = counts.iter_mut().zip(TIERS);
            all.filter(|(_, t)| *t == tier).for_each(|(n, _)| *n += 1);
        }
    }

    /// A holder has it no longer in these media.
    fn let_go(&mut self, key: (u64, u64), tiers: u8) {
        let Some(entry) = self.entries.get_mut(&key) else {
            return;
        };
        let (own, gone) = (entry.own, entry.tiers & tiers);
        entry.tiers &= !gone;
        if entry.tiers == 0 {
            self.entries.remove(&key);
        }
        if let Some(counts) = self.held.get_mut(&own) {
            let all = counts.iter_mut().zip(TIERS);
            all.filter(|(_, t)| gone & *t as u8 != 0)
                .for_each(|(n, _)| *n = n.saturating_sub(1));
            if counts.iter().all(|n| *n == 0) {
                self.held.remove(&own);
            }
        }
    }

    /// Where a block lies; 0 = it is not there.
    pub(super) fn tiers(&self, own: u64) -> u8 {
        let counts = self.held.get(&own).copied().unwrap_or_default();
        let there = counts.into_iter().zip(TIERS).filter(|(n, _)| *n > 0);
        there.fold(0, |tiers, (_, tier)| tiers | tier as u8)
    }

    /// Everything is gone, or not sure any more.
    pub(super) fn forget(&mut self) {
        self.entries.clear();
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

    fn of(size: usize) -> Blocks {
        Blocks::new(Subject {
            block_size: size,
            ..Subject::default()
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
    fn engines_hashes_are_learnt_and_standard_ones_taken_as_they_are() {
        let mut blocks = of(2);
        let chain = chain(&[1, 2, 3, 4], 2);
        blocks.apply(&stored(&[71], None, &[1, 2], Tier::Gpu), 0);
        blocks.apply(&stored(&[72], Some(71), &[3, 4], Tier::Gpu), 0);
        blocks.apply(&stored(&[72], None, &[], Tier::Host), 0);
        let tiers = |b: &Blocks| [b.tiers(chain[0]), b.tiers(chain[1])];
        assert_eq!(tiers(&blocks), [1, 3]);
        blocks.apply(&removed(&[72], Tier::Gpu), 0);
        assert_eq!(tiers(&blocks), [1, 2]);
        blocks.apply(&removed(&[71, 72], Tier::Host), 0);
        assert_eq!((tiers(&blocks), blocks.len()), ([1, 0], 1));
        // A store's publisher knows no tokens.
        blocks.apply(&stored(&[chain[1]], None, &[], Tier::Disk), 0);
        assert_eq!(tiers(&blocks), [1, 8]);
        blocks.apply(&stored(&[9], Some(1234), &[5, 6], Tier::Gpu), 0);
        assert_eq!(blocks.len(), 2, "its beginning is not known");
        blocks.apply(&Event::Cleared, 0);
        assert_eq!(blocks.len(), 0);
    }

    #[test]
    fn what_another_holds_is_still_there() {
        let mut blocks = of(2);
        let own = chain(&[1, 2], 2)[0];
        // Two ranks behind one publisher, and one of them under two hashes of its own.
        for (hash, holder) in [(71, 1), (71, 2), (72, 2)] {
            blocks.apply(&stored(&[hash], None, &[1, 2], Tier::Gpu), holder);
        }
        blocks.apply(&stored(&[71], None, &[1, 2], Tier::Gpu), 1);
        blocks.apply(&removed(&[71], Tier::Gpu), 1);
        assert_eq!(blocks.tiers(own), 1);
        blocks.apply(&removed(&[71], Tier::Gpu), 1);
        blocks.apply(&removed(&[71], Tier::Gpu), 2);
        assert_eq!(blocks.tiers(own), 1, "under the other hash");
        blocks.apply(&Event::Cleared, 1);
        assert_eq!(blocks.tiers(own), 1, "it was another that was cleared");
        blocks.apply(&Event::Cleared, 2);
        assert_eq!((blocks.tiers(own), blocks.len()), (0, 0));
    }

    #[test]
    fn blocks_of_another_adapter_or_salt_or_with_images_are_others() {
        let with = |lora: Option<&str>, extra: &[&[&str]]| {
            let mut event = stored(&[71, 72], None, &[1, 2, 3, 4], Tier::Gpu);
            if let Event::Stored(stored) = &mut event {
                stored.names_lora = true;
                stored.lora = lora.map(|l| l.as_bytes().to_vec());
                stored.extra = extra.iter().map(|keys| extra_of(keys)).collect();
            }
            event
        };
        let held = |subject: (&str, &str), event: &Event| {
            let mut blocks = Blocks::new(Subject {
                block_size: 2,
                lora: subject.0.to_owned(),
                salt: subject.1.to_owned(),
            });
            blocks.apply(event, 0);
            // What follows a block that is none of its is none either.
            blocks.apply(&stored(&[73], Some(72), &[5, 6], Tier::Gpu), 0);
            blocks.len()
        };
        let plain = with(None, &[&[], &[]]);
        assert_eq!(held(("", ""), &plain), 3);
        assert_eq!(held(("sql", ""), &plain), 0);
        assert_eq!(
            held(("", "w8a8"), &plain),
            3,
            "a salt of the deployment is in no event"
        );
        let adapter = with(Some("sql"), &[&["sql"], &["sql"]]);
        assert_eq!(held(("sql", ""), &adapter), 3);
        assert_eq!(held(("", ""), &adapter), 0);
        let salted = with(None, &[&["s"], &[]]);
        assert_eq!(held(("", "s"), &salted), 3);
        assert_eq!((held(("", ""), &salted), held(("", "t"), &salted)), (0, 0));
        let image = with(None, &[&[], &["image"]]);
        assert_eq!(held(("", ""), &image), 1, "up to the image");
        // Engines that tell nothing of adapters are what they were registered as.
        let silent = stored(&[71], None, &[1, 2], Tier::Gpu);
        assert_eq!(held(("sql", ""), &silent), 1);
    }

    #[test]
    fn what_is_held_can_be_removed_however_much_was_learnt_since() {
        let mut blocks = of(2);
        let own = chain(&[1, 2], 2)[0];
        blocks.apply(&stored(&[1], None, &[1, 2], Tier::Gpu), 0);
        for n in 0..2 * LEARNED_MAX as u64 + 2 {
            blocks.learned.insert(1000 + n, n);
        }
        assert_eq!(blocks.tiers(own), 1);
        blocks.apply(&removed(&[1], Tier::Gpu), 0);
        assert_eq!(blocks.tiers(own), 0);
    }
}
