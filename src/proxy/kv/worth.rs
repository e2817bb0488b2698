//! What a cached token is worth by where it lies: the share of computing it that is saved. The GPU's own are there, 1; what has
//! to be fetched from the host's memory, the pool or a disk costs time, and how much is learnt from prefills.
//!
//! Owns these weights. They begin at what other routers take for granted. Refuses to know who holds what.

use std::time::Duration;

use parking_lot::Mutex;

use super::super::pace::Fit;
use super::event::Tier;

/// The tiers below the GPU.
pub(crate) const SLOWER: [Tier; 3] = [Tier::Host, Tier::Store, Tier::Disk];
const START: [f64; 3] = [0.8, 0.6, 0.3];
/// However slow a tier is, its tokens are no worse than none.
const MIN: f64 = 0.05;
/// What one prefill changes of a weight.
const STEP: f64 = 1.0 / 16.0;
/// Fewer tokens of a tier say nothing about it.
const TOKENS_MIN: u32 = 256;

/// Tokens of a prompt's beginning that lie in each of [`SLOWER`] and not on the GPU.
pub(crate) type Slower = [u32; 3];

/// Weights at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Weights([f64; 3]);

impl Weights {
    /// Of a block that lies in these tiers.
    pub(crate) fn of(&self, tiers: u8) -> f64 {
        if tiers & Tier::Gpu as u8 != 0 {
            return 1.0;
        }
        let best = |w: f64, (tier, weight): (Tier, f64)| {
            if tiers & tier as u8 == 0 {
                w
            } else {
                w.max(weight)
            }
        };
        SLOWER.into_iter().zip(self.0).fold(0.0, best)
    }

    /// Which of [`SLOWER`] a block that lies in these tiers comes from.
    pub(crate) fn source(&self, tiers: u8) -> Option<usize> {
        if tiers & Tier::Gpu as u8 != 0 {
            return None;
        }
        let there = (0..SLOWER.len()).filter(|at| tiers & SLOWER[*at] as u8 != 0);
        there.max_by(|a, b| self.0[*a].total_cmp(&self.0[*b]))
    }

    /// What a hit is worth at least.
    pub(crate) fn least(&self) -> f64 {
        self.0.into_iter().fold(1.0, f64::min)
    }

    /// By tier, as [`SLOWER`] names them.
    pub(crate) fn all(&self) -> [f64; 3] {
        self.0
    }
}

/// The weights, learning.
#[derive(Debug)]
pub(crate) struct Worth(Mutex<Weights>);

impl Default for Worth {
    fn default() -> Self {
        Self(Mutex::new(Weights(START)))
    }
}

impl Worth {
    pub(crate) fn weights(&self) -> Weights {
        *self.0.lock()
    }

    /// A prompt was computed with part of it from slower tiers. `left`: what the weights counted as left to compute; `ahead`:
    /// tokens before it; `pace`: what the instance needs for what it computes itself. Learns when one tier gave most.
    pub(crate) fn learn(
        &self,
        slower: Slower,
        left: u64,
        ahead: u64,
        pace: Fit,
        elapsed: Duration,
    ) {
        let all: u32 = slower.iter().sum();
        let Some(at) = (0..slower.len()).max_by_key(|at| slower[*at]) else {
            return;
        };
        let tokens = slower[at];
        if tokens < TOKENS_MIN || tokens < all - all / 8 {
            return;
        }
        let mut weights = self.0.lock();
        let counted: f64 = (0..slower.len())
            .map(|at| (1.0 - weights.0[at]) * f64::from(slower[at]))
            .sum();
        let computed = (left as f64 - counted).max(0.0);
        let own = pace.per_token * (computed + pace.waiting * ahead as f64);
        let fetched = (elapsed.as_secs_f64() - own) / f64::from(all);
        let seen = (1.0 - fetched / pace.per_token).clamp(MIN, 1.0);
        weights.0[at] += STEP * (seen - weights.0[at]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_follows_what_fetching_takes() {
        let pace = Fit {
            per_token: 20e-6,
            waiting: 1.0,
        };
        let worth = Worth::default();
        assert_eq!(worth.weights().of(Tier::Gpu as u8 | Tier::Disk as u8), 1.0);
        assert_eq!(worth.weights().of(Tier::Host as u8), 0.8);
        assert_eq!(worth.weights().of(0), 0.0);
        // 4,000 tokens from the pool at a tenth of what computing takes, 1,000 computed, 500 ahead.
        for _ in 0..200 {
            let weight = worth.weights().of(Tier::Store as u8);
            let left = 1000 + ((1.0 - weight) * 4000.0) as u64;
            let elapsed = Duration::from_secs_f64(20e-6 * (1000.0 + 500.0 + 400.0));
            worth.learn([0, 4000, 0], left, 500, pace, elapsed);
        }
        let [host, store, disk] = worth.weights().all();
        assert!((store - 0.9).abs() < 0.01, "{store}");
        assert_eq!((host, disk), (0.8, 0.3), "nothing was learnt of these");
        // Slower than computing: worth next to nothing, never less.
        for _ in 0..200 {
            worth.learn([0, 0, 4000], 4000, 0, pace, Duration::from_secs(2));
        }
        assert!((worth.weights().least() - MIN).abs() < 0.01);
        // Two tiers at once, or a few tokens, tell nothing.
        let before = worth.weights();
        worth.learn([2000, 2000, 0], 100, 0, pace, Duration::from_secs(1));
        worth.learn([100, 0, 0], 100, 0, pace, Duration::from_secs(1));
        assert_eq!(worth.weights(), before);
        let both = Tier::Host as u8 | Tier::Store as u8;
        assert_eq!(
            worth.weights().source(both),
            Some(1),
            "the better of the two"
        );
    }
}
