//! What clients say they have moved, by transport and direction. Bounded: only transports there are, only what a report can
//! hold.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::exposition::Writer;
use crate::base::histogram::{Counted, NANOSECONDS};
use crate::store::wire::ClientTransfers;

/// Transports a client may name.
const TRANSPORTS: [&str; 4] = ["loopback", "shm", "tcp", "rdma"];
const OPERATIONS: [&str; 2] = ["read", "write"];
/// Ways told in one batch.
const WAYS_MAX: usize = 16;
/// Bytes of one report that are believed.
const BYTES_MAX: u64 = 1 << 50;

/// One transport in one direction, all clients together.
#[derive(Debug)]
struct Way {
    transport: &'static str,
    operation: &'static str,
    bytes: AtomicU64,
    times: Mutex<Counted>,
}

/// All of them.
#[derive(Debug)]
pub(crate) struct ClientMoves(Vec<Way>);

/// What was moved one way so far.
pub(crate) struct MovedTotal {
    pub(crate) transport: &'static str,
    pub(crate) operation: &'static str,
    pub(crate) bytes: u64,
    pub(crate) times: Counted,
}

impl Default for ClientMoves {
    fn default() -> Self {
        let way = |transport, operation| Way {
            transport,
            operation,
            bytes: AtomicU64::new(0),
            times: Mutex::new(Counted {
                bounds: NANOSECONDS,
                counts: vec![0; NANOSECONDS.len() + 1],
                sum: 0,
            }),
        };
        let both = |t| OPERATIONS.map(|o| way(t, o));
        Self(TRANSPORTS.into_iter().flat_map(both).collect())
    }
}

impl ClientMoves {
    /// What came with a batch.
    pub(crate) fn told(&self, reports: &[ClientTransfers]) {
        for report in reports.iter().take(WAYS_MAX) {
            let of = |w: &&Way| w.transport == report.transport && w.operation == report.operation;
            let Some(way) = self.0.iter().find(of) else {
                continue;
            };
            let mut times = way.times.lock();
            if report.counts.len() != times.counts.len() || report.bytes > BYTES_MAX {
                continue;
            }
            way.bytes.fetch_add(report.bytes, Ordering::Relaxed);
            for (count, more) in times.counts.iter_mut().zip(&report.counts) {
                *count = count.saturating_add(*more);
            }
            times.sum = times.sum.saturating_add(report.sum_ns);
        }
    }

    /// Bytes read and written, over all transports.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        let of = |operation: &str| {
            let ways = self.0.iter().filter(|w| w.operation == operation);
            ways.map(|w| w.bytes.load(Ordering::Relaxed)).sum()
        };
        (of("read"), of("write"))
    }

    /// By transport and direction.
    pub(crate) fn all(&self) -> Vec<MovedTotal> {
        let total = |w: &Way| MovedTotal {
            transport: w.transport,
            operation: w.operation,
            bytes: w.bytes.load(Ordering::Relaxed),
            times: w.times.lock().clone(),
        };
        self.0.iter().map(total).collect()
    }

    pub(super) fn render(&self, w: &mut Writer) {
        let all = self.all();
        let name = "mooncake_client_transferred_bytes_total";
        let help = "Bytes clients have moved to and from nodes, as they told; headers included";
        w.head(name, "counter", help);
        for m in &all {
            let labels = [("transport", m.transport), ("operation", m.operation)];
            w.series(name, &labels, m.bytes);
        }
        let name = "mooncake_client_transfer_seconds";
        let help = "Time of a transfer at a client: what one call moved to or from one node";
        w.head(name, "histogram", help);
        for m in &all {
            let labels = [("transport", m.transport), ("operation", m.operation)];
            w.histogram(name, &labels, &m.times, 1e9);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_client_can_mean_is_counted() {
        let moves = ClientMoves::default();
        let report = |transport: &str, operation: &str, bytes, counts| ClientTransfers {
            transport: transport.to_owned(),
            operation: operation.to_owned(),
            bytes,
            counts: vec![1; counts],
            sum_ns: 5,
        };
        let right = NANOSECONDS.len() + 1;
        moves.told(&[
            report("shm", "read", 100, right),
            report("shm", "read", 11, right),
            report("shm", "write", 7, right),
            report("carrier pigeon", "read", 1, right),
            report("tcp", "erase", 1, right),
            report("tcp", "read", 1, right - 1),
            report("tcp", "read", u64::MAX, right),
        ]);
        assert_eq!(moves.bytes(), (111, 7));
        moves.told(&vec![report("tcp", "read", 1, right); 1000]);
        assert_eq!(moves.bytes(), (111 + WAYS_MAX as u64, 7));
        let shm = &moves.all()[2];
        assert_eq!(
            (shm.transport, shm.times.count(), shm.times.sum),
            ("shm", 2 * right as u64, 10)
        );
    }
}
