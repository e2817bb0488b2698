//! Time as the rooms use it: monotonic milliseconds for decisions, unix milliseconds where hosts compare.

use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Monotonic milliseconds since the process started. Passed as an argument into the master's state, never read there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Millis(pub u64);

impl Millis {
    /// Reads the clock.
    pub fn now() -> Self {
        static START: OnceLock<Instant> = OnceLock::new();
        // One hour of head start: a lease that ended before the process began is representable.
        Self(3_600_000 + START.get_or_init(Instant::now).elapsed().as_millis() as u64)
    }

    /// This moment plus `duration`.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration.as_millis() as u64))
    }

    /// Milliseconds from `earlier` to this moment, 0 when it lies ahead.
    pub fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// Milliseconds since 1970, for values that two hosts compare (grant expiry).
pub fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as u64)
}

/// What is left until `deadline`, never zero (a zero timeout means "for ever" to sockets).
pub fn time_left(deadline: Instant) -> Duration {
    deadline
        .saturating_duration_since(Instant::now())
        .max(Duration::from_micros(100))
}
