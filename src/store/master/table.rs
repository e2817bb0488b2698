//! A hash table of slot numbers with addresses one can prefetch: open addressing, linear probing, 8 bytes an entry.
//!
//! A general-purpose map hides where an entry will be; looking up a thousand keys of a batch then waits for memory a
//! thousand times in a row. Here a batch asks for all lines first. Knows hashes and slots; the keys are the caller's.

use crate::base::prefetch::prefetch;

/// `tag << 32 | slot + 1`; 0 = empty. The tag is the upper half of the hash and also gives the place.
type Entry = u64;

/// See the module header. Grows by doubling at three quarters full.
#[derive(Debug, Default)]
pub(crate) struct SlotTable {
    entries: Vec<Entry>,
    used: usize,
}

fn tag(hash: u64) -> u64 {
    hash >> 32
}

impl SlotTable {
    fn place(&self, tag: u64) -> usize {
        tag as usize & (self.entries.len() - 1)
    }

    /// Asks for the line where a lookup of `hash` begins.
    pub(crate) fn prefetch(&self, hash: u64) {
        if !self.entries.is_empty() {
            prefetch(&raw const self.entries[self.place(tag(hash))]);
        }
    }

    /// The first slot with this tag for which `is_it` says yes.
    #[inline]
    pub(crate) fn find(&self, hash: u64, mut is_it: impl FnMut(u32) -> bool) -> Option<u32> {
        if self.entries.is_empty() {
            return None;
        }
        let tag = tag(hash);
        let mut at = self.place(tag);
        loop {
            let entry = self.entries[at];
            if entry == 0 {
                return None;
            }
            if entry >> 32 == tag {
                let slot = (entry as u32) - 1;
                if is_it(slot) {
                    return Some(slot);
                }
            }
            at = (at + 1) & (self.entries.len() - 1);
        }
    }

    /// Adds a slot that is not there.
    pub(crate) fn insert(&mut self, hash: u64, slot: u32) {
        if (self.used + 1) * 4 > self.entries.len() * 3 {
            self.grow();
        }
        self.put(tag(hash) << 32 | (u64::from(slot) + 1));
        self.used += 1;
    }

    fn put(&mut self, entry: Entry) {
        let mut at = self.place(entry >> 32);
        while self.entries[at] != 0 {
            at = (at + 1) & (self.entries.len() - 1);
        }
        self.entries[at] = entry;
    }

    fn grow(&mut self) {
        let larger = (self.entries.len() * 2).max(8);
        let old = std::mem::replace(&mut self.entries, vec![0; larger]);
        for entry in old.into_iter().filter(|e| *e != 0) {
            self.put(entry);
        }
    }

    /// Takes a slot out and closes the gap, so that probing needs no tombstones.
    pub(crate) fn remove(&mut self, hash: u64, slot: u32) {
        if self.entries.is_empty() {
            return;
        }
        let mask = self.entries.len() - 1;
        let wanted = tag(hash) << 32 | (u64::from(slot) + 1);
        let mut at = self.place(wanted >> 32);
        while self.entries[at] != wanted {
            if self.entries[at] == 0 {
                return;
            }
            at = (at + 1) & mask;
        }
        self.used -= 1;
        let mut next = (at + 1) & mask;
        loop {
            let entry = self.entries[next];
            if entry == 0 {
                break;
            }
            // It may move back into the gap unless its own place lies behind the gap.
            let home = self.place(entry >> 32);
            if (next.wrapping_sub(home) & mask) >= (next.wrapping_sub(at) & mask) {
                self.entries[at] = entry;
                at = next;
            }
            next = (next + 1) & mask;
        }
        self.entries[at] = 0;
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        self.entries.capacity() * size_of::<Entry>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        /// Against a HashMap, with hashes that collide on purpose.
        #[test]
        fn against_a_hash_map(ops in proptest::collection::vec((any::<bool>(), 0u64..24, 0u64..4), 1..400)) {
            let mut table = SlotTable::default();
            let mut model: HashMap<u64, u32> = HashMap::new();
            for (insert, n, spread) in ops {
                let hash = (n % (4 + spread)) << 32 | n;
                let slot = n as u32;
                if insert && !model.contains_key(&hash) {
                    table.insert(hash, slot);
                    model.insert(hash, slot);
                } else if !insert {
                    if let Some(slot) = model.remove(&hash) {
                        table.remove(hash, slot);
                    } else {
                        table.remove(hash, 9999);
                    }
                }
                for (hash, slot) in &model {
                    prop_assert_eq!(table.find(*hash, |s| s == *slot), Some(*slot));
                }
                prop_assert_eq!(table.used, model.len());
                prop_assert_eq!(table.find(99 << 32, |_| true), None);
            }
        }
    }
}
