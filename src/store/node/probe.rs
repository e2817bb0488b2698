//! Tests the way to other nodes when the master asks (`mooncake doctor --mesh`), and reports each.
//!
//! Owns the bounds: addresses of one message, bytes, threads, messages under way. Knows nothing of what is concluded.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::mpsc;

use super::Shared;
use crate::engine::transport::probe::{PathFault, probe};
use crate::store::wire::{self, NodeMessage, node_message::Kind as Out};

/// Addresses tested at once.
const THREADS: usize = 16;
/// Addresses of one message.
const ADDRESSES_MAX: usize = 1024;
/// Bytes moved to one address.
const BYTES_MAX: u64 = 64 << 20;
/// Messages under way; more are answered `busy`.
const UNDER_WAY_MAX: usize = 4;

/// Begins a test in the background; its reports leave through `out`.
pub(super) fn start(shared: &Arc<Shared>, ask: wire::Probe, out: &mpsc::Sender<NodeMessage>) {
    let (shared, out) = (shared.clone(), out.clone());
    if shared.probes.fetch_add(1, Ordering::AcqRel) >= UNDER_WAY_MAX {
        shared.probes.fetch_sub(1, Ordering::AcqRel);
        tracing::warn!("too many tests of the way to other nodes at once: one was not begun");
        return;
    }
    tokio::task::spawn_blocking(move || {
        run(&shared, &ask, &out);
        shared.probes.fetch_sub(1, Ordering::AcqRel);
    });
}

fn run(shared: &Shared, ask: &wire::Probe, out: &mpsc::Sender<NodeMessage>) {
    let addresses = &ask.addresses[..ask.addresses.len().min(ADDRESSES_MAX)];
    let bytes = ask.transfer_bytes.min(BYTES_MAX);
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let target = next.fetch_add(1, Ordering::Relaxed);
            let Some(address) = addresses.get(target) else {
                return;
            };
            let report = wire::ProbeReport {
                sequence: ask.sequence,
                target: target as u32,
                result: Some(result(shared, address, bytes)),
            };
            let message = NodeMessage {
                kind: Some(Out::ProbeReport(report)),
            };
            if out.blocking_send(message).is_err() {
                return;
            }
        }
    };
    std::thread::scope(|s| {
        for _ in 1..THREADS.min(addresses.len()) {
            // Without further threads this one does it all.
            let _ = std::thread::Builder::new()
                .name("probe".into())
                .spawn_scoped(s, work);
        }
        work();
    });
}

fn result(shared: &Shared, address: &str, bytes: u64) -> wire::ProbeResult {
    let micros = |d: std::time::Duration| d.as_micros().max(1) as u64;
    match probe(address, shared.id, &shared.host.keys, bytes) {
        Ok(path) => wire::ProbeResult {
            connect_us: micros(path.connect),
            round_trip_us: micros(path.round_trip),
            moved_bytes: path.moved,
            bytes_per_second: path.bytes_per_second,
            ..wire::ProbeResult::default()
        },
        Err(PathFault { cause, reason }) => wire::ProbeResult {
            cause: cause.to_owned(),
            reason,
            ..wire::ProbeResult::default()
        },
    }
}
