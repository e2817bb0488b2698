//! What one side did in one round, and medians over rounds.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

/// One side's work in one round.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    pub(super) items: u64,
    pub(super) bytes: u64,
    pub(super) seconds: f64,
    /// Nanoseconds per call.
    pub(super) calls: Histogram<u64>,
}

impl Sample {
    /// Repeats `call` (which returns items and bytes) for about `time`.
    pub(super) fn take(
        time: Duration,
        mut call: impl FnMut() -> anyhow::Result<(u64, u64)>,
    ) -> anyhow::Result<Self> {
        let mut calls = Histogram::new_with_bounds(1, 60_000_000_000, 3)?;
        let (mut items, mut bytes) = (0, 0);
        let start = Instant::now();
        let mut last = start;
        loop {
            let (i, b) = call()?;
            items += i;
            bytes += b;
            let now = Instant::now();
            calls.saturating_record((now - last).as_nanos() as u64);
            last = now;
            if now - start >= time {
                break;
            }
        }
        Ok(Self {
            items,
            bytes,
            seconds: (last - start).as_secs_f64(),
            calls,
        })
    }

    pub(super) fn items_per_second(&self) -> f64 {
        self.items as f64 / self.seconds
    }
    pub(super) fn gigabytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.seconds / 1e9
    }
    pub(super) fn microseconds(&self, quantile: f64) -> f64 {
        self.calls.value_at_quantile(quantile) as f64 / 1000.0
    }
}

/// Median with minimum and maximum.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Spread {
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        match values.len() {
            0 => Self::default(),
            n => Self {
                median: f64::midpoint(values[(n - 1) / 2], values[n / 2]),
                min: values[0],
                max: values[n - 1],
            },
        }
    }

    pub(super) fn text(&self, digits: usize) -> String {
        format!(
            "{:.digits$} [{:.digits$}-{:.digits$}]",
            self.median, self.min, self.max
        )
    }
}
