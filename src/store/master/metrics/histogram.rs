//! Counts by range, without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

/// Values counted in ranges with fixed upper bounds. Observing is two relaxed additions.
#[derive(Debug)]
pub(crate) struct Histogram {
    bounds: &'static [u64],
    /// One per bound, and one for what is above.
    counts: Box<[AtomicU64]>,
    sum: AtomicU64,
}

/// A histogram at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Counted {
    pub(crate) bounds: &'static [u64],
    /// Not cumulative.
    pub(crate) counts: Vec<u64>,
    pub(crate) sum: u64,
}

impl Histogram {
    /// `bounds` ascend and belong to the range below them.
    pub(crate) fn new(bounds: &'static [u64]) -> Self {
        debug_assert!(bounds.is_sorted());
        Self {
            bounds,
            counts: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(),
            sum: AtomicU64::new(0),
        }
    }

    pub(crate) fn observe(&self, value: u64) {
        let at = self.bounds.partition_point(|b| *b < value);
        self.counts[at].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(value, Ordering::Relaxed);
    }

    pub(crate) fn now(&self) -> Counted {
        let load = |c: &AtomicU64| c.load(Ordering::Relaxed);
        Counted {
            bounds: self.bounds,
            counts: self.counts.iter().map(load).collect(),
            sum: load(&self.sum),
        }
    }
}

impl Counted {
    pub(crate) fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The bound below which this share (0..=1) of the values lies; `None` when there are none, or it lies above all bounds.
    pub(crate) fn quantile(&self, share: f64) -> Option<u64> {
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
