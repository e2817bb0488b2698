//! Hand-offs under way: from prefill's start until decode has its first byte, KV lies at the prefill instance.
//!
//! Owns their count per prefill instance and per pair, so that a decode instance that is slow does not fill a prefill
//! instance with KV nobody fetches. A count is held by a [`Place`] and ends with it.

use std::sync::Arc;

use foldhash::HashMap;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// The counts: by prefill instance, and by prefill and decode instance.
#[derive(Debug, Default)]
pub(crate) struct Handoffs {
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    prefill: HashMap<u64, usize>,
    pairs: HashMap<(u64, u64), usize>,
}

/// A hand-off under way.
#[derive(Debug)]
pub(crate) struct Place {
    handoffs: Arc<Handoffs>,
    prefill: u64,
    decode: Option<u64>,
    freed: Arc<Notify>,
}

fn take<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, usize>, key: K) {
    if let Some(count) = counts.get_mut(&key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&key);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.handoffs.counts.lock();
        take(&mut counts.prefill, self.prefill);
        if let Some(decode) = self.decode {
            take(&mut counts.pairs, (self.prefill, decode));
        }
        drop(counts);
        self.freed.notify_waiters();
    }
}

impl Handoffs {
    /// Counts a hand-off, of a pair once decode is chosen. `freed` is told when it ends.
    pub(crate) fn begin(
        self: &Arc<Self>,
        prefill: u64,
        decode: Option<u64>,
        freed: &Arc<Notify>,
    ) -> Place {
        let mut counts = self.counts.lock();
        *counts.prefill.entry(prefill).or_default() += 1;
        if let Some(decode) = decode {
            *counts.pairs.entry((prefill, decode)).or_default() += 1;
        }
        Place {
            handoffs: self.clone(),
            prefill,
            decode,
            freed: freed.clone(),
        }
    }

    /// Hand-offs of a prefill instance.
    pub(crate) fn of(&self, prefill: u64) -> usize {
        self.counts
            .lock()
            .prefill
            .get(&prefill)
            .copied()
            .unwrap_or(0)
    }

    /// Hand-offs of a pair.
    pub(crate) fn of_pair(&self, prefill: u64, decode: u64) -> usize {
        let counts = self.counts.lock();
        counts.pairs.get(&(prefill, decode)).copied().unwrap_or(0)
    }
}
