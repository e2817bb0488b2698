//! Tells the master what this client has moved: beside a batch that goes there anyway, at most once a second, only what is
//! new. Through shared memory nobody else sees it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::engine::TransferEngine;
use crate::engine::batch::Opcode;
use crate::engine::counters::Moved;
use crate::store::wire;

/// Between two reports.
const PAUSE: Duration = Duration::from_secs(1);

/// What was told already.
pub(super) struct MovedReports {
    engine: Arc<TransferEngine>,
    told: Mutex<(Instant, Vec<Moved>)>,
}

impl MovedReports {
    pub(super) fn new(engine: Arc<TransferEngine>) -> Self {
        Self {
            engine,
            told: Mutex::new((Instant::now(), Vec::new())),
        }
    }

    /// What is to be told with a batch that leaves now.
    pub(super) fn due(&self) -> Vec<wire::ClientTransfers> {
        // Whoever is a moment later leaves it to the other.
        let Some(mut told) = self.told.try_lock() else {
            return Vec::new();
        };
        let now = Instant::now();
        if now.duration_since(told.0) < PAUSE {
            return Vec::new();
        }
        told.0 = now;
        self.news(&mut told.1)
    }

    /// What nobody has been told yet, whenever the last report was.
    pub(super) fn rest(&self) -> Vec<wire::ClientTransfers> {
        self.news(&mut self.told.lock().1)
    }

    fn news(&self, told: &mut Vec<Moved>) -> Vec<wire::ClientTransfers> {
        let now = self.engine.counters().now();
        let since = |m: &Moved| {
            let before = told
                .iter()
                .find(|t| t.transport == m.transport && t.opcode == m.opcode);
            let less = |now: u64, before: Option<u64>| now.saturating_sub(before.unwrap_or(0));
            let counts = m.times.counts.iter().enumerate();
            wire::ClientTransfers {
                transport: m.transport.name().to_owned(),
                operation: name(m.opcode).to_owned(),
                bytes: less(m.bytes, before.map(|b| b.bytes)),
                counts: counts
                    .map(|(at, n)| less(*n, before.map(|b| b.times.counts[at])))
                    .collect(),
                sum_ns: less(m.times.sum, before.map(|b| b.times.sum)),
            }
        };
        let news = now.iter().map(since).filter(|t| t.bytes > 0).collect();
        *told = now;
        news
    }
}

fn name(opcode: Opcode) -> &'static str {
    match opcode {
        Opcode::Read => "read",
        Opcode::Write => "write",
    }
}
