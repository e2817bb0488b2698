//! SIEVE (Zhang et al., NSDI 2024): insertion-ordered list, a visited bit, a hand from the oldest to the newest.

use super::{Access, EvictionPolicy, Links};

#[derive(Default)]
pub(super) struct Sieve {
    links: Links,
    visited: Vec<bool>,
    hand: Option<u32>,
}

impl EvictionPolicy for Sieve {
    fn inserted(&mut self, slot: u32, _access: &Access) {
        let index = slot as usize;
        if index >= self.visited.len() {
            self.visited.resize(index + 1, false);
        }
        self.visited[index] = false;
        self.links.push_front(slot);
    }

    fn accessed(&mut self, slot: u32, _access: &Access) {
        self.visited[slot as usize] = true;
    }

    fn removed(&mut self, slot: u32) {
        if self.hand == Some(slot) {
            self.hand = self.links.newer(slot);
        }
        self.links.unlink(slot);
    }

    fn next(&self) -> Option<u32> {
        self.hand.or(self.links.tail)
    }

    fn candidate(&mut self, budget: &mut u32) -> Option<u32> {
        while *budget > 0 {
            *budget -= 1;
            let slot = self.next()?;
            self.hand = self.links.newer(slot);
            let visited = &mut self.visited[slot as usize];
            if !*visited {
                return Some(slot);
            }
            *visited = false;
        }
        None
    }

    fn heap_bytes(&self) -> usize {
        self.links.heap_bytes() + self.visited.capacity()
    }
}
