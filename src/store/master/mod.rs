//! The master: the index of the pool. It hands out ranges and grants and never touches a byte of data.
//!
//! ```text
//! port ─┬─ control lanes ─┐
//!       ├─ gRPC ──────────┼─► operations ─► state (index, segments, puts, removal, rebuild)
//!       ├─ HTTP ──────────┘                      ▲
//!       └─ node sessions ────────────────────────┘   sweeper: eviction, liveness, zombies
//! ```
//! Nodes hold the truth: this process keeps no file. Restarted, it rebuilds from what nodes report.

mod arenas;
pub mod config;
mod connections;
mod copies;
mod dashboard;
mod drain;
mod drain_record;
mod drain_steps;
mod events;
pub mod eviction;
mod history;
mod http;
mod index;
mod lanes;
mod listing;
mod mesh;
mod metrics;
mod names;
mod object;
mod operations;
pub mod placement;
mod put_operations;
mod puts;
mod quotas;
mod rebuild;
mod reconcile;
mod refused;
mod removal;
mod segments;
mod server;
mod service;
mod session;
mod shard;
mod slow;
mod state;
mod stream;
mod survey;
mod sweeper;
mod table;

#[cfg(test)]
mod model_test;

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::base::clock::Millis;
use crate::base::id::Id128;
use crate::base::net::host_id;
use crate::base::trust::ClusterKeys;
use crate::store::wire;

pub use config::MasterConfig;
pub use server::MasterServer;
pub use stream::{KvEventsConfig, PublisherStats};

/// Lanes of one client.
#[derive(Debug, Default)]
struct ClientLanes {
    open: usize,
    /// When the last one closed.
    left: Millis,
}

/// A master process's state and what its services share.
pub struct Master {
    pub(crate) state: state::MasterState,
    pub(crate) keys: ClusterKeys,
    pub(crate) metrics: metrics::Metrics,
    pub(crate) names: names::Names,
    pub(crate) host_id: String,
    /// The abstract Unix socket for control lanes of this host, when it is served.
    pub(crate) control_socket: OnceLock<String>,
    pub(crate) mesh: mesh::Mesh,
    pub(crate) dashboard: dashboard::Dashboard,
    pub(crate) surveyor: survey::Surveyor,
    pub(crate) refused: refused::Refused,
    pub(crate) slow_log: Duration,
    pub(crate) slow_lines: slow::SlowLog,
    pub(crate) subscribers: Arc<stream::Subscribers>,
    /// Set once events are published over ZeroMQ.
    pub(crate) kv_events: OnceLock<Arc<PublisherStats>>,
    clients: Mutex<HashMap<Id128, ClientLanes>>,
    started: Instant,
}

impl Master {
    /// A master with an empty index.
    pub fn new(config: MasterConfig, keys: ClusterKeys) -> Arc<Self> {
        let slow_log = config.slow_log;
        Arc::new(Self {
            state: state::MasterState::new(config, Millis::now()),
            keys,
            metrics: metrics::Metrics::new(),
            names: names::Names::default(),
            host_id: host_id(),
            control_socket: OnceLock::new(),
            mesh: mesh::Mesh::default(),
            dashboard: dashboard::Dashboard::default(),
            surveyor: survey::Surveyor::default(),
            refused: refused::Refused::default(),
            slow_log,
            slow_lines: slow::SlowLog::default(),
            subscribers: Arc::default(),
            kv_events: OnceLock::new(),
            clients: Mutex::default(),
            started: Instant::now(),
        })
    }

    fn client_lane_opened(&self, client: Id128) {
        if !client.is_none() {
            self.clients.lock().entry(client).or_default().open += 1;
        }
    }

    fn client_lane_closed(&self, client: Id128) {
        if let Some(lanes) = self.clients.lock().get_mut(&client) {
            lanes.open = lanes.open.saturating_sub(1);
            lanes.left = Millis::now();
        }
    }

    /// The pool in figures; cheap (`metadata_bytes` is left out).
    pub fn summary(&self) -> wire::OverviewReply {
        self.overview_values()
    }

    pub(crate) fn overview_values(&self) -> wire::OverviewReply {
        let state = &self.state;
        let (capacity_bytes, used_bytes) = state.capacity();
        let counters = &state.counters;
        let load = |c: &std::sync::atomic::AtomicU64| c.load(Ordering::Relaxed);
        let view = state.segments.view();
        wire::OverviewReply {
            build: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_ms: self.started.elapsed().as_millis() as u64,
            objects: load(&state.objects),
            capacity_bytes,
            used_bytes,
            clients: self.clients.lock().values().filter(|c| c.open > 0).count() as u64,
            pending_puts: state.pending.iter().map(|p| p.lock().len() as u64).sum(),
            arenas: state.arenas.lock().len() as u64,
            evicted_objects: load(&counters.evicted_objects),
            evicted_bytes: load(&counters.evicted_bytes),
            hits: load(&counters.hits),
            misses: load(&counters.misses),
            rebuilding: state.recovering(Millis::now()),
            arena_free_bytes: view.iter().flatten().map(|s| load(&s.arena_bytes)).sum(),
            eviction_hold_max_us: load(&counters.eviction_hold_max_ns) / 1000,
            metadata_bytes: 0,
            read_bytes: self.metrics.moved.bytes().0,
            written_bytes: self.metrics.moved.bytes().1,
        }
    }

    fn overview(&self) -> wire::reply::Kind {
        wire::reply::Kind::Overview(wire::OverviewReply {
            metadata_bytes: self.state.metadata_bytes(),
            ..self.overview_values()
        })
    }
}
