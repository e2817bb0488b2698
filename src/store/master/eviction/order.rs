//! Which shard gives up an object next: the one whose next candidate is the oldest. With few large objects a shard holds
//! a handful of them, and walking the shards in turn would evict young objects while old ones stay elsewhere; and objects
//! that were written together are evicted together, so that what they leave behind is one range.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use parking_lot::Mutex;

/// Shards by the version of their next candidate. A rank may be too low (the candidate has left since): whoever takes a
/// shard compares, and lists it again.
#[derive(Default)]
pub(crate) struct EvictionOrder(Mutex<Listed>);

#[derive(Default)]
struct Listed {
    heap: BinaryHeap<Reverse<(u64, u16)>>,
    /// One place per shard.
    is_listed: Vec<bool>,
}

impl EvictionOrder {
    /// Lists a shard, unless it is.
    pub(crate) fn list(&self, shard: u16, version: u64) {
        let mut listed = self.0.lock();
        let index = usize::from(shard);
        if listed.is_listed.len() <= index {
            listed.is_listed.resize(index + 1, false);
        }
        if !listed.is_listed[index] {
            listed.is_listed[index] = true;
            listed.heap.push(Reverse((version, shard)));
        }
    }

    /// Takes the first shard off the list, with the rank it had.
    pub(crate) fn take(&self) -> Option<(u16, u64)> {
        let mut listed = self.0.lock();
        let Reverse((version, shard)) = listed.heap.pop()?;
        listed.is_listed[usize::from(shard)] = false;
        Some((shard, version))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oldest_first_and_once_each() {
        let order = EvictionOrder::default();
        for (shard, version) in [(3, 30), (1, 10), (2, 20), (1, 5)] {
            order.list(shard, version);
        }
        assert_eq!(
            order.take(),
            Some((1, 10)),
            "listed already: the first rank stays"
        );
        order.list(1, 40);
        let rest: Vec<_> = std::iter::from_fn(|| order.take()).collect();
        assert_eq!(rest, [(2, 20), (3, 30), (1, 40)]);
    }
}
