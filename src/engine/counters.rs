//! What an engine has moved, by transport and direction: bytes, and how long it took. Counting a transfer is a few relaxed
//! additions.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::batch::Opcode;
use super::transport::TransportKind;
use crate::base::histogram::{Counted, Histogram, NANOSECONDS};

/// One transport in one direction.
#[derive(Debug)]
struct Way {
    bytes: AtomicU64,
    nanoseconds: Histogram,
}

/// By transport and direction.
#[derive(Debug)]
pub struct TransferCounters {
    ways: Vec<(TransportKind, Opcode, Way)>,
}

/// What was moved one way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moved {
    /// The transport.
    pub transport: TransportKind,
    /// The direction.
    pub opcode: Opcode,
    /// Bytes of transfers that succeeded, headers included.
    pub bytes: u64,
    /// Times of transfers: each is what one call moved to or from one peer.
    pub times: Counted,
}

impl TransferCounters {
    pub(crate) fn new(kinds: &[TransportKind]) -> Self {
        let way = |kind: &TransportKind, opcode| {
            let nothing = Way {
                bytes: AtomicU64::new(0),
                nanoseconds: Histogram::new(NANOSECONDS),
            };
            (*kind, opcode, nothing)
        };
        let both = |kind| [way(kind, Opcode::Read), way(kind, Opcode::Write)];
        Self {
            ways: kinds.iter().flat_map(both).collect(),
        }
    }

    /// A transfer has succeeded, at least in part.
    pub fn count(&self, transport: TransportKind, opcode: Opcode, bytes: u64, took: Duration) {
        let way = self
            .ways
            .iter()
            .find(|(k, o, _)| *k == transport && *o == opcode);
        if let Some((_, _, way)) = way.filter(|_| bytes > 0) {
            way.bytes.fetch_add(bytes, Ordering::Relaxed);
            way.nanoseconds.observe(took.as_nanos() as u64);
        }
    }

    /// The counts of this moment, of ways that were used.
    pub fn now(&self) -> Vec<Moved> {
        let moved = self.ways.iter().map(|(transport, opcode, way)| Moved {
            transport: *transport,
            opcode: *opcode,
            bytes: way.bytes.load(Ordering::Relaxed),
            times: way.nanoseconds.now(),
        });
        moved.filter(|m| m.bytes > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_are_counted_apart() {
        let counters = TransferCounters::new(&[TransportKind::Shm, TransportKind::Tcp]);
        let took = Duration::from_micros(3);
        counters.count(TransportKind::Shm, Opcode::Read, 10, took);
        counters.count(TransportKind::Shm, Opcode::Read, 5, took);
        counters.count(TransportKind::Tcp, Opcode::Write, 7, took);
        counters.count(TransportKind::Tcp, Opcode::Read, 0, took);
        counters.count(TransportKind::Loopback, Opcode::Read, 9, took);
        let now = counters.now();
        assert_eq!(now.len(), 2, "unused and unknown ways are not told");
        assert_eq!((now[0].bytes, now[0].times.count()), (15, 2));
        assert_eq!((now[1].bytes, now[1].times.sum), (7, 3000));
    }
}
