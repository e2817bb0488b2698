//! Least recently used: a hit moves to the front, candidates come from the back. The reference others are measured by.

use super::{Access, EvictionPolicy, Links};

#[derive(Default)]
pub(super) struct Lru {
    links: Links,
}

impl EvictionPolicy for Lru {
    fn inserted(&mut self, slot: u32, _access: &Access) {
        self.links.push_front(slot);
    }

    fn accessed(&mut self, slot: u32, _access: &Access) {
        if self.links.head != Some(slot) {
            self.links.unlink(slot);
            self.links.push_front(slot);
        }
    }

    fn removed(&mut self, slot: u32) {
        self.links.unlink(slot);
    }

    fn next(&self) -> Option<u32> {
        self.links.tail
    }

    fn candidate(&mut self, budget: &mut u32) -> Option<u32> {
        if *budget == 0 {
            return None;
        }
        *budget -= 1;
        let slot = self.links.tail?;
        // To the front at once: if it is spared, the others have their turn first.
        self.links.unlink(slot);
        self.links.push_front(slot);
        Some(slot)
    }

    fn heap_bytes(&self) -> usize {
        self.links.heap_bytes()
    }
}
