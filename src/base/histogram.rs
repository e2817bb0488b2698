//! Counts by range, without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

/// 1 µs to 64 s, in nanoseconds: for times of operations.
pub static NANOSECONDS: &[u64] = &[
    1_000,
    4_000,
    16_000,
    64_000,
    256_000,
    1_000_000,
    4_000_000,
    16_000_000,
    64_000_000,
    256_000_000,
    1_000_000_000,
    4_000_000_000,
    16_000_000_000,
    64_000_000_000,
];

/// Values counted in ranges with fixed upper bounds. Observing is two relaxed additions.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [u64],
    /// One per bound, and one for what is above.
    counts: Box<[AtomicU64]>,
    sum: AtomicU64,
}

/// A histogram at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Upper bounds, ascending.
    pub bounds: &'static [u64],
    /// One per bound, and one for what is above. Not cumulative.
    pub counts: Vec<u64>,
    /// Of all values.
    pub sum: u64,
}

impl Histogram {
    /// `bounds` ascend and belong to the range below them.
    pub fn new(bounds: &'static [u64]) -> Self {
        debug_assert!(bounds.is_sorted());
        Self {
            bounds,
            counts: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(),
            sum: AtomicU64::new(0),
        }
    }

    /// Counts a value.
    pub fn observe(&self, value: u64) {
        let at = self.bounds.partition_point(|b| *b < value);
        self.counts[at].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(value, Ordering::Relaxed);
    }

    /// The counts of this moment.
    pub fn now(&self) -> Counted {
        let load = |c: &AtomicU64| c.load(Ordering::Relaxed);
        Counted {
            bounds: self.bounds,
            counts: self.counts.iter().map(load).collect(),
            sum: load(&self.sum),
        }
    }
}

impl Counted {
    /// How many values there were.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The bound below which this share (0..=1) of the values lies; `None` when there are none, or it lies above all bounds.
    pub fn quantile(&self, share: f64) -> Option<u64> {
        let wanted = (self.count() as f64 * share).ceil() as u64;
        if wanted == 0 {
            return None;
        }
        let mut seen = 0;
        for (bound, count) in self.bounds.iter().zip(&self.counts) {
            seen += count;
            if seen >= wanted {
                return Some(*bound);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_fall_below_their_bound() {
        let histogram = Histogram::new(&[10, 100]);
        for value in [0, 10, 11, 100, 101] {
            histogram.observe(value);
        }
        let now = histogram.now();
        assert_eq!(now.counts, [2, 2, 1]);
        assert_eq!((now.sum, now.count()), (222, 5));
        assert_eq!(now.quantile(0.4), Some(10));
        assert_eq!(now.quantile(0.5), Some(100));
        assert_eq!(now.quantile(1.0), None);
        assert_eq!(Histogram::new(&[1]).now().quantile(0.5), None);
    }
}
