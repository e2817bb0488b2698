//! How long a prompt's KV takes from a prefill instance to each decode instance: from prefill's reply to decode's first byte,
//! as `fixed + per_token * tokens`, over the last few dozen hand-offs of the pair.
//!
//! Owns these fits for one prefill instance. What waits at decode is part of what is seen, and of what is foretold. Knows no
//! instance but by its number.

use std::time::Duration;

use foldhash::{HashMap, HashMapExt};
use parking_lot::Mutex;

/// Decode instances remembered of a prefill instance.
const LINKS_MAX: usize = 256;
/// Hand-offs after which one counts half.
const HALF_LIFE: f64 = 32.0;
/// Nothing longer is foretold.
const SECONDS_MAX: f64 = 60.0;

#[derive(Clone, Copy, Debug, Default)]
struct Link {
    seen: f64,
    tokens: f64,
    tokens2: f64,
    time: f64,
    both: f64,
    /// Number of its last hand-off.
    last: u64,
}

impl Link {
    fn seconds(&self, tokens: u64) -> f64 {
        let mean = self.time / self.seen;
        let center = self.tokens / self.seen;
        let spread = self.tokens2 / self.seen - center * center;
        // Prompts of one length tell no slope.
        let slope = if spread > 1e-3 * center * center {
            (self.both / self.seen - center * mean) / spread
        } else {
            0.0
        };
        // Longer prompts take no less.
        (mean + slope.max(0.0) * (tokens as f64 - center)).clamp(0.0, SECONDS_MAX)
    }
}

/// What the hand-offs of a prefill instance have told.
#[derive(Debug)]
pub(crate) struct Links(Mutex<(HashMap<u64, Link>, u64)>);

impl Default for Links {
    fn default() -> Self {
        Self(Mutex::new((HashMap::new(), 0)))
    }
}

impl Links {
    /// A prompt of so many tokens was handed to a decode instance.
    pub(crate) fn learn(&self, decode: u64, tokens: u64, elapsed: Duration) {
        let mut all = self.0.lock();
        let (links, count) = &mut *all;
        *count += 1;
        if links.len() >= LINKS_MAX && !links.contains_key(&decode) {
            let oldest = links.iter().min_by_key(|(_, l)| l.last).map(|(n, _)| *n);
            oldest.and_then(|number| links.remove(&number));
        }
        let link = links.entry(decode).or_default();
        let keep = 0.5f64.powf(1.0 / HALF_LIFE);
        let (x, y) = (tokens as f64, elapsed.as_secs_f64());
        for (sum, value) in [
            (&mut link.seen, 1.0),
            (&mut link.tokens, x),
            (&mut link.tokens2, x * x),
            (&mut link.time, y),
            (&mut link.both, x * y),
        ] {
            *sum = *sum * keep + value;
        }
        link.last = *count;
    }

    /// Seconds until a decode instance would have a prompt; `None`: it has had none from here.
    pub(crate) fn to(&self, decode: u64, tokens: u64) -> Option<f64> {
        self.0.lock().0.get(&decode).map(|l| l.seconds(tokens))
    }

    /// The same to whichever decode instance is the quickest.
    pub(crate) fn quickest(&self, tokens: u64) -> Option<f64> {
        let all = self.0.lock();
        let each = all.0.values().map(|l| l.seconds(tokens));
        each.reduce(f64::min)
    }

    /// What was learnt is about a process that is gone.
    pub(crate) fn forget(&self) {
        self.0.lock().0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_foretold_by_length() {
        let links = Links::default();
        assert_eq!((links.to(1, 100), links.quickest(100)), (None, None));
        for n in 0..100u64 {
            let tokens = 1000 + 37 * (n % 50);
            links.learn(1, tokens, Duration::from_micros(2000 + 3 * tokens));
            links.learn(2, 1000, Duration::from_millis(50));
        }
        let near = |a: Option<f64>, b: f64| (a.unwrap() - b).abs() < 1e-4;
        assert!(
            near(links.to(1, 10_000), 0.032),
            "{:?}",
            links.to(1, 10_000)
        );
        assert!(
            near(links.to(2, 10_000), 0.050),
            "one length tells no slope"
        );
        assert!(near(links.quickest(10_000), 0.032));
        links.forget();
        assert_eq!(links.to(1, 100), None);
    }

    #[test]
    fn links_are_bounded_and_so_is_what_they_say() {
        let links = Links::default();
        for n in 0..1000 {
            links.learn(n, 100 + n, Duration::from_secs(1000));
        }
        assert_eq!(links.0.lock().0.len(), LINKS_MAX);
        assert_eq!(links.to(999, u64::MAX), Some(SECONDS_MAX));
        assert_eq!(links.to(0, 100), None);
    }
}
