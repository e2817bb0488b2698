//! What a data server counts. Owns the numbers; who shows them is others' business.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::base::histogram::{Histogram, NANOSECONDS};

/// Counters of a data server.
#[derive(Debug)]
pub struct ServerCounters {
    /// Bytes copied out.
    pub read_bytes: AtomicU64,
    /// Bytes copied in.
    pub written_bytes: AtomicU64,
    /// Requests (items) refused by the gate.
    pub refused: AtomicU64,
    /// Lanes turned away.
    pub lanes_refused: AtomicU64,
    /// Nanoseconds from the first byte of a read to the last of its answer, by way ([`WAYS`]).
    pub reads: [Histogram; 3],
    /// The same of writes.
    pub writes: [Histogram; 3],
    /// Bytes of reads, by way. They add up to `read_bytes`.
    pub way_read_bytes: [AtomicU64; 3],
    /// Bytes of writes, likewise.
    pub way_written_bytes: [AtomicU64; 3],
}

/// The ways a server is reached: tcp, the Unix socket beside shared memory, RDMA.
pub const WAYS: [&str; 3] = ["tcp", "unix", "rdma"];
pub(super) const RDMA: usize = 2;

impl Default for ServerCounters {
    fn default() -> Self {
        let times = || std::array::from_fn(|_| Histogram::new(NANOSECONDS));
        let bytes = || std::array::from_fn(|_| AtomicU64::new(0));
        Self {
            read_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            lanes_refused: AtomicU64::new(0),
            reads: times(),
            writes: times(),
            way_read_bytes: bytes(),
            way_written_bytes: bytes(),
        }
    }
}

impl ServerCounters {
    pub(super) fn read(&self, way: usize, bytes: u64) {
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.way_read_bytes[way].fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn written(&self, way: usize, bytes: u64) {
        self.written_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.way_written_bytes[way].fetch_add(bytes, Ordering::Relaxed);
    }
}
