//! Who was turned away for a missing or wrong token: how often, who last, how long ago. A node without the token never shows up
//! anywhere else.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Connections and requests turned away.
#[derive(Debug, Default)]
pub(crate) struct Refused {
    count: AtomicU64,
    last: Mutex<Option<(Instant, IpAddr)>>,
}

impl Refused {
    pub(crate) fn note(&self, who: Option<IpAddr>) {
        self.count.fetch_add(1, Ordering::Relaxed);
        if let Some(ip) = who {
            *self.last.lock() = Some((Instant::now(), ip.to_canonical()));
        }
    }

    /// Since the start.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Who was last, and how long ago.
    pub(crate) fn last(&self) -> Option<(Duration, IpAddr)> {
        self.last.lock().map(|(at, ip)| (at.elapsed(), ip))
    }
}
