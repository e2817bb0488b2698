//! A circuit breaker per instance: after failures in a row, or when every other request fails, nobody is sent there; then one
//! request finds out.
//!
//! Owns the three states as atomics; takes the time as an argument. Never removes anything: an instance that works again
//! is used again.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::base::clock::Millis;

/// Failures in a row that open it.
pub(crate) const FAILURES_MAX: u32 = 5;
/// Requests of a window from which on their share of failures counts.
const RATE_REQUESTS_MIN: u32 = 20;
/// Length of a window.
const WINDOW_MS: u64 = 10_000;
/// First time it stays open.
const OPEN_MS: u64 = 2_000;
/// Longest time it stays open.
const OPEN_MS_MAX: u64 = 30_000;

/// State of one instance's breaker.
#[derive(Debug, Default)]
pub(crate) struct Breaker {
    failures: AtomicU32,
    /// Requests and failures of the current window, and when it began.
    window: [AtomicU32; 2],
    window_began: AtomicU64,
    /// 0 = closed.
    open_until: AtomicU64,
    openings: AtomicU32,
    probing: AtomicBool,
}

/// Permission to send one request; tells the breaker how it went, or that nothing was learnt.
#[derive(Debug)]
pub(crate) struct Pass {
    probe: bool,
}

impl Breaker {
    /// Whether a request may be sent now. Takes nothing.
    pub(crate) fn admits(&self, now: Millis) -> bool {
        match self.open_until.load(Ordering::Relaxed) {
            0 => true,
            until => now.0 >= until && !self.probing.load(Ordering::Relaxed),
        }
    }

    /// Takes a permission. When it is half-open only one request gets one.
    pub(crate) fn pass(&self, now: Millis) -> Option<Pass> {
        match self.open_until.load(Ordering::Relaxed) {
            0 => Some(Pass { probe: false }),
            until if now.0 < until => None,
            _ if self.probing.swap(true, Ordering::Relaxed) => None,
            _ => Some(Pass { probe: true }),
        }
    }

    /// Counts a request; whether most of a window's have failed.
    fn counted(&self, failed: bool, now: Millis) -> bool {
        let began = self.window_began.load(Ordering::Relaxed);
        if now.0.saturating_sub(began) > WINDOW_MS {
            self.window_began.store(now.0, Ordering::Relaxed);
            self.window
                .iter()
                .for_each(|n| n.store(0, Ordering::Relaxed));
        }
        let [all, bad] = &self.window;
        let all = all.fetch_add(1, Ordering::Relaxed) + 1;
        let bad = bad.fetch_add(u32::from(failed), Ordering::Relaxed) + u32::from(failed);
        failed && all >= RATE_REQUESTS_MIN && 2 * bad >= all
    }

    /// It answered.
    pub(crate) fn succeeded(&self, pass: Pass, now: Millis) {
        self.counted(false, now);
        self.failures.store(0, Ordering::Relaxed);
        if pass.probe {
            self.open_until.store(0, Ordering::Relaxed);
            self.openings.store(0, Ordering::Relaxed);
            self.probing.store(false, Ordering::Relaxed);
        }
    }

    /// It did not, or with a 5xx. Returns whether the breaker opened by this.
    pub(crate) fn failed(&self, pass: Pass, now: Millis) -> bool {
        let failures = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
        let too_many = self.counted(true, now) || failures >= FAILURES_MAX;
        let closed = self.open_until.load(Ordering::Relaxed) == 0;
        if !(pass.probe || closed && too_many) {
            return false;
        }
        let openings = self.openings.fetch_add(1, Ordering::Relaxed).min(16);
        let pause = (OPEN_MS << openings).min(OPEN_MS_MAX);
        self.open_until.store(now.0 + pause, Ordering::Relaxed);
        if pass.probe {
            self.probing.store(false, Ordering::Relaxed);
        }
        true
    }

    /// Nothing was learnt: the client went away.
    pub(crate) fn unknown(&self, pass: Pass) {
        if pass.probe {
            self.probing.store(false, Ordering::Relaxed);
        }
    }

    /// Everything is forgotten: the instance passed its health checks anew.
    pub(crate) fn reset(&self) {
        self.window_began.store(0, Ordering::Relaxed);
        self.failures.store(0, Ordering::Relaxed);
        self.open_until.store(0, Ordering::Relaxed);
        self.openings.store(0, Ordering::Relaxed);
    }

    /// For people.
    pub(crate) fn state(&self, now: Millis) -> &'static str {
        match self.open_until.load(Ordering::Relaxed) {
            0 => "closed",
            until if now.0 < until => "open",
            _ => "half_open",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_half_opens_and_closes() {
        let breaker = Breaker::default();
        let at = |ms: u64| Millis(1_000_000 + ms);
        for n in 1..=FAILURES_MAX {
            let pass = breaker.pass(at(0)).unwrap();
            assert_eq!(breaker.failed(pass, at(0)), n == FAILURES_MAX);
        }
        assert!(!breaker.admits(at(1)) && breaker.pass(at(1)).is_none());
        // One probe at a time; one that learns nothing leaves the place to the next.
        let probe = breaker.pass(at(2_000)).unwrap();
        assert!(breaker.pass(at(2_000)).is_none());
        breaker.unknown(probe);
        let probe = breaker.pass(at(2_000)).unwrap();
        assert!(breaker.failed(probe, at(2_000)));
        assert!(
            breaker.pass(at(5_999)).is_none(),
            "the second pause is longer"
        );
        let probe = breaker.pass(at(6_000)).unwrap();
        breaker.succeeded(probe, at(6_000));
        assert_eq!(breaker.state(at(6_000)), "closed");
        assert!(breaker.pass(at(6_000)).is_some());
    }

    #[test]
    fn opens_when_every_other_request_fails() {
        let breaker = Breaker::default();
        let at = |ms: u64| Millis(1_000_000 + ms);
        let one = |failed, ms| {
            let pass = breaker.pass(at(ms)).unwrap();
            match failed {
                true => breaker.failed(pass, at(ms)),
                false => {
                    breaker.succeeded(pass, at(ms));
                    false
                }
            }
        };
        for n in 0..RATE_REQUESTS_MIN - 1 {
            assert!(!one(n % 2 == 0, 0));
        }
        assert!(one(true, 0), "11 of 20");
        breaker.reset();
        // One in three is borne, and an old window is forgotten.
        for n in 0..60 {
            assert!(!one(n % 3 == 0, 1));
        }
        for n in 0..10u64 {
            assert!(!one(n % 2 == 0, WINDOW_MS * (n + 2)));
        }
    }
}
