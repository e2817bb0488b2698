//! How long an instance takes over prompts: by what it has to compute of them, and by what waits there before them.
//!
//! Owns that fit, `elapsed = a * computed + b * ahead` in tokens, over the last few dozen prefills. `b` near `a`: one token
//! after the other, as a device that is busy does. `b` near 0: what is under way there delays nobody. Knows no instance.

use std::time::Duration;

use parking_lot::Mutex;

/// Prefills after which one counts half.
const HALF_LIFE: f64 = 32.0;
/// Prefills before anything is said.
const SEEN_MIN: f64 = 6.0;
/// Below this share of what they could be, the two counts rise and fall together and tell nothing apart.
const APART_MIN: f64 = 1e-3;

/// Sums of the fit, later prefills weighing more.
#[derive(Debug, Default)]
struct Sums {
    seen: f64,
    computed2: f64,
    ahead2: f64,
    both: f64,
    computed_time: f64,
    ahead_time: f64,
}

/// What the prefills of an instance have told.
#[derive(Debug, Default)]
pub(crate) struct Pace(Mutex<Sums>);

/// The fit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Fit {
    /// Seconds for a token to be computed.
    pub(crate) per_token: f64,
    /// What a token ahead delays, as a share of that: 0 to 1.
    pub(crate) waiting: f64,
}

impl Pace {
    /// A prompt was computed: tokens of it that were not cached, tokens under way there when it came.
    pub(crate) fn learn(&self, computed: u64, ahead: u64, elapsed: Duration) {
        let (computed, ahead, time) = (computed as f64, ahead as f64, elapsed.as_secs_f64());
        let keep = 0.5f64.powf(1.0 / HALF_LIFE);
        let mut sums = self.0.lock();
        let mut add = |sum: fn(&mut Sums) -> &mut f64, value: f64| {
            let sum = sum(&mut sums);
            *sum = *sum * keep + value;
        };
        add(|s| &mut s.seen, 1.0);
        add(|s| &mut s.computed2, computed * computed);
        add(|s| &mut s.ahead2, ahead * ahead);
        add(|s| &mut s.both, computed * ahead);
        add(|s| &mut s.computed_time, computed * time);
        add(|s| &mut s.ahead_time, ahead * time);
    }

    /// `None`: not enough was seen to tell.
    pub(crate) fn fit(&self) -> Option<Fit> {
        let s = self.0.lock();
        if s.seen < SEEN_MIN || s.computed2 <= 0.0 {
            return None;
        }
        let apart = s.computed2 * s.ahead2 - s.both * s.both;
        if apart <= APART_MIN * s.computed2 * s.ahead2 {
            // Nobody has waited yet, or all have alike: one after the other is the safe guess.
            let whole = s.computed2 + 2.0 * s.both + s.ahead2;
            let per_token = (s.computed_time + s.ahead_time) / whole;
            return (per_token > 0.0).then_some(Fit {
                per_token,
                waiting: 1.0,
            });
        }
        let per_token = (s.computed_time * s.ahead2 - s.ahead_time * s.both) / apart;
        let ahead = (s.ahead_time * s.computed2 - s.computed_time * s.both) / apart;
        (per_token > 0.0).then(|| Fit {
            per_token,
            waiting: (ahead / per_token).clamp(0.0, 1.0),
        })
    }

    /// What was learnt is about a process that is gone.
    pub(crate) fn forget(&self) {
        *self.0.lock() = Sums::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learnt(waiting: f64) -> Fit {
        let pace = Pace::default();
        assert_eq!(pace.fit(), None);
        let mut roll = 7u64;
        for _ in 0..100 {
            roll = roll.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (computed, ahead) = (64 + (roll >> 40) % 4000, (roll >> 20) % 9000);
            let noise = ((roll >> 50) % 4000) as f64 * 1e-6;
            let time = 20e-6 * (computed as f64 + waiting * ahead as f64) + noise;
            pace.learn(computed, ahead, Duration::from_secs_f64(time));
        }
        pace.fit().unwrap()
    }

    #[test]
    fn computing_and_waiting_are_told_apart() {
        for waiting in [0.0, 0.5, 1.0] {
            let fit = learnt(waiting);
            assert!((fit.waiting - waiting).abs() < 0.1, "{waiting}: {fit:?}");
            assert!(
                (fit.per_token * 1e6 - 20.0).abs() < 3.0,
                "{waiting}: {fit:?}"
            );
        }
    }

    #[test]
    fn an_instance_that_was_always_idle_is_not_taken_for_one_without_waiting() {
        let pace = Pace::default();
        for n in 1..50 {
            pace.learn(n * 100, 0, Duration::from_millis(n));
        }
        let fit = pace.fit().unwrap();
        assert_eq!(fit.waiting, 1.0);
        assert!((fit.per_token * 1e6 - 10.0).abs() < 0.1);
        pace.forget();
        assert_eq!(pace.fit(), None);
    }
}
