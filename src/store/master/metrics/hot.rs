//! Which prefixes are asked for most: the first keys of what clients locate together, since the keys of a batch are a chain
//! of blocks. Space-Saving over a bounded table; halved every minute, so that it tells of the last few.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::base::clock::Millis;
use crate::store::model::key::DEFAULT_TENANT;

/// Heads counted at once.
const HEADS_MAX: usize = 256;
/// After this many requests only one in [`STRIDE`] is looked at, and counts for all of them.
const EXACT: u64 = 4096;
const STRIDE: u64 = 16;
const HALVED_EVERY_MS: u64 = 60_000;

/// One head and what was asked for with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) tenant: String,
    pub(crate) key: Bytes,
    /// Requests that began with it; too high by at most `error`.
    pub(crate) requests: u64,
    pub(crate) error: u64,
    /// Keys found by them.
    pub(crate) found: u64,
}

#[derive(Default)]
struct Counted {
    heads: HashMap<(String, Bytes), (u64, u64, u64)>,
    halved: Millis,
}

/// See the module header.
#[derive(Default)]
pub(crate) struct Hot {
    asked: AtomicU64,
    counted: Mutex<Counted>,
}

impl Hot {
    /// A request for a chain that begins with `key`, of which `found` keys were there. Skipped when somebody else is at it.
    pub(crate) fn asked(&self, tenant: &str, key: &Bytes, found: u64, now: Millis) {
        let n = self.asked.fetch_add(1, Ordering::Relaxed);
        let weight = if n < EXACT { 1 } else { STRIDE };
        if !n.is_multiple_of(weight) {
            return;
        }
        let Some(mut counted) = self.counted.try_lock() else {
            return;
        };
        counted.age(now);
        // The unnamed tenant has a name too.
        let tenant = if tenant == DEFAULT_TENANT { "" } else { tenant };
        let name = (tenant.to_owned(), key.clone());
        let heads = &mut counted.heads;
        let mut error = 0;
        if heads.len() >= HEADS_MAX && !heads.contains_key(&name) {
            let least = heads.iter().min_by_key(|(_, (requests, ..))| *requests);
            let least = least.map(|(name, (requests, ..))| (name.clone(), *requests));
            if let Some((name, requests)) = least {
                heads.remove(&name);
                error = requests;
            }
        }
        // A copy of its own: the batch it is a part of may be large.
        let name = (name.0, Bytes::copy_from_slice(&name.1));
        let head = heads.entry(name).or_insert((error, error, 0));
        head.0 += weight;
        head.2 += weight * found;
    }

    /// The hottest, most requests first.
    pub(crate) fn top(&self, most: usize, now: Millis) -> Vec<Head> {
        let mut counted = self.counted.lock();
        counted.age(now);
        let mut all: Vec<Head> = counted
            .heads
            .iter()
            .map(|((tenant, key), (requests, error, found))| Head {
                tenant: tenant.clone(),
                key: key.clone(),
                requests: *requests,
                error: *error,
                found: *found,
            })
            .collect();
        all.sort_by(|a, b| b.requests.cmp(&a.requests).then(a.key.cmp(&b.key)));
        all.truncate(most);
        all
    }
}

impl Counted {
    fn age(&mut self, now: Millis) {
        let rounds = now.since(self.halved) / HALVED_EVERY_MS;
        if rounds == 0 {
            return;
        }
        self.halved = now;
        let rounds = rounds.min(63);
        self.heads.retain(|_, (requests, error, found)| {
            *requests >>= rounds;
            *error >>= rounds;
            *found >>= rounds;
            *requests > 0
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hottest_survive_the_crowd() {
        let hot = Hot::default();
        let now = Millis(HALVED_EVERY_MS);
        for n in 0..3000u32 {
            hot.asked("", &Bytes::from(n.to_string()), 0, now);
            if n % 10 == 0 {
                hot.asked("", &Bytes::from_static(b"hot"), 4, now);
            }
        }
        let top = hot.top(1, now);
        assert_eq!(top[0].key, "hot");
        assert!(top[0].requests - top[0].error <= 300 && top[0].requests >= 300);
        assert!(hot.top(1000, now).len() <= HEADS_MAX);
        let later = Millis(now.0 + HALVED_EVERY_MS);
        assert_eq!(hot.top(1, later)[0].requests, top[0].requests / 2);
        assert!(hot.top(1, Millis(now.0 + 70 * HALVED_EVERY_MS)).is_empty());
        let hot = Hot::default();
        for tenant in ["", DEFAULT_TENANT] {
            hot.asked(tenant, &Bytes::from_static(b"k"), 1, now);
        }
        assert_eq!(hot.top(9, now).len(), 1, "one tenant");
    }
}
