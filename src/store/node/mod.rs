//! A node: memory segments of this host, lent to the pool.
//!
//! It holds the truth about what lies in them (`directory`) and tells every master it registers with (`session`). The
//! bytes themselves are served by the engine's data server; the node never looks at them.

mod directory;
mod mover;
mod probe;
mod session;
mod shared_arenas;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;

pub use directory::{Commit, NodeDirectory};

use crate::base::handshake::Service;
use crate::base::id::{Id128, random_u64};
use crate::base::net::{advertised, host_id, resolve_one};
use crate::base::trust::{ClusterKeys, Token};
use crate::base::units::ByteSize;
use crate::engine::host::SegmentHost;
use crate::engine::memory::Memory;
use crate::engine::transport::rdma::Fabric;
use crate::engine::transport::server::{DataServer, LANE_STACK, ServerCounters, Serving};
use crate::store::wire;

/// How a node is set up.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// `host:port` of the master.
    pub master: String,
    /// The cluster's secret.
    pub token: Option<Token>,
    /// Shown to people; the default is the advertised address.
    pub name: Option<String>,
    /// Where to listen for data.
    pub listen: SocketAddr,
    /// What others connect to, when it is not `listen`.
    pub advertise: Option<String>,
    /// One segment per entry.
    pub segments: Vec<ByteSize>,
    /// Memory that is lent besides, a segment each. With any of it nothing of this node is mapped by others.
    pub memories: Vec<Arc<Memory>>,
    /// Whether to touch all memory after the start, in the background.
    pub populate: bool,
    /// Data lanes open at once.
    pub lanes_max: usize,
    /// A port to serve on that is open already, instead of one of its own: then `listen` and `lanes_max` are not looked at.
    pub port: Option<Arc<DataServer>>,
    /// RDMA devices; with them callers may have their bytes moved by RDMA.
    pub fabric: Option<Arc<Fabric>>,
    /// The master, when it lives in this process: small puts then need one exchange, with this node alone.
    pub commit: Option<Commit>,
}

/// What a node is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum NodePhase {
    /// No session with the master.
    Connecting = 0,
    /// Registered: objects are placed here.
    InService = 1,
    /// Asked to leave.
    Draining = 2,
    /// Left.
    Unmounted = 3,
}

struct Shared {
    config: NodeConfig,
    id: Id128,
    address: String,
    name: String,
    host: Arc<SegmentHost>,
    directory: Arc<NodeDirectory>,
    serving: Serving,
    term: AtomicU64,
    phase: AtomicU8,
    phase_changed: Notify,
    drain: Notify,
    /// Once it leaves: until when objects are moved.
    moves_until: Mutex<Option<Instant>>,
    /// When there was a session last.
    last_session: Mutex<Option<Instant>>,
    /// What was moved when it left.
    farewell: Mutex<Option<wire::Unmounted>>,
    mover: mover::Mover,
    /// Policies of tenants, kept for the next master.
    quotas: Mutex<Option<wire::QuotaTable>>,
    /// Drain jobs, likewise.
    drains: Mutex<Option<wire::DrainTable>>,
    /// Tests of the way to other nodes under way.
    probes: std::sync::atomic::AtomicUsize,
}

/// What became of the objects of a node that has left.
#[derive(Clone, Copy, Debug, Default)]
pub struct Farewell {
    /// The master has unmounted it.
    pub confirmed: bool,
    /// Objects that lay nowhere else and were moved to other nodes.
    pub moved_objects: u64,
    /// Their payload.
    pub moved_bytes: u64,
    /// Objects that lay nowhere else and are gone with the node.
    pub left_objects: u64,
}

/// A running node.
pub struct Node {
    shared: Arc<Shared>,
}

impl Shared {
    fn phase(&self) -> NodePhase {
        match self.phase.load(Ordering::Acquire) {
            0 => NodePhase::Connecting,
            1 => NodePhase::InService,
            2 => NodePhase::Draining,
            _ => NodePhase::Unmounted,
        }
    }

    fn set_phase(&self, phase: NodePhase) {
        // A drain is not forgotten over a reconnect.
        if self.phase() != NodePhase::Draining || phase == NodePhase::Unmounted {
            self.phase.store(phase as u8, Ordering::Release);
        }
        self.phase_changed.notify_waiters();
    }

    fn registration(&self) -> wire::Register {
        let offer = |s: &Arc<crate::engine::host::Segment>| wire::SegmentOffer {
            incarnation: s.incarnation,
            size_bytes: s.memory.len() as u64,
            name: s.name.clone(),
            page_kind: s.memory.pages().name().to_owned(),
        };
        wire::Register {
            node_high: self.id.high,
            node_low: self.id.low,
            name: self.name.clone(),
            address: self.address.clone(),
            host_id: host_id(),
            // What others cannot map they reach by TCP.
            shm_socket: if self.config.memories.is_empty() {
                self.serving.server().socket_name().to_owned()
            } else {
                String::new()
            },
            protocol_version: wire::SESSION_VERSION,
            segments: self.host.segments().iter().map(offer).collect(),
            last_term: self.term.load(Ordering::Acquire),
            build: env!("CARGO_PKG_VERSION").to_owned(),
            copies: true,
            quotas: self.quotas.lock().clone(),
            commits: self.config.commit.is_some(),
            drains: self.drains.lock().clone(),
            port: self.config.port.as_ref().map_or(0, |server| server.id()),
        }
    }
}

/// Physical memory of this machine, or of its control group when that is less.
pub fn memory_limit() -> u64 {
    let page = rustix::param::page_size() as u64;
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = info
        .lines()
        .find_map(|l| l.strip_prefix("MemTotal:"))
        .and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok())
        .map_or(u64::MAX, |kib| kib << 10);
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max")
        .ok()
        .and_then(|t| t.trim().parse::<u64>().ok())
        .unwrap_or(u64::MAX);
    total.min(group) / page * page
}

impl Node {
    /// Maps the segments, listens, and begins to register. Returns before the master has answered.
    ///
    /// Must be called within a multi-threaded tokio runtime, which runs the session.
    ///
    /// # Errors
    /// Segments larger than the machine's memory, an address that cannot be used, a token that is not printable.
    pub fn start(config: NodeConfig) -> io::Result<Self> {
        let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidInput, text);
        let total: u64 = config
            .segments
            .iter()
            .map(|s| s.0)
            .fold(0, u64::saturating_add);
        let limit = memory_limit();
        if total > limit {
            return Err(invalid(format!(
                "segments of {} are larger than this machine's memory of {}: give less --memory",
                ByteSize(total),
                ByteSize(limit)
            )));
        }
        let keys = ClusterKeys::derive(config.token.as_ref());
        let directory = Arc::new(NodeDirectory::committing(config.commit.clone()));
        let id = Id128::random();
        let host = Arc::new(SegmentHost::new(id, keys, directory.clone()));
        host.set_about(&config.master);
        let own = match &config.port {
            Some(_) => None,
            None => Some(TcpListener::bind(config.listen).map_err(|e| {
                io::Error::new(e.kind(), format!("cannot listen on {}: {e}", config.listen))
            })?),
        };
        let bound = match (&own, &config.port) {
            (Some(listener), _) => listener.local_addr()?,
            (None, Some(server)) => server.address(),
            (None, None) => config.listen,
        };
        let toward = resolve_one(&config.master).ok();
        let address = match &config.advertise {
            Some(given) if given.contains(':') => given.clone(),
            Some(given) => format!("{given}:{}", bound.port()),
            None => advertised(bound, toward).to_string(),
        };
        // The first on a shared port is named as if it were alone.
        let number = config
            .port
            .as_ref()
            .map_or(0, |server| server.next_number());
        let name = config.name.clone().unwrap_or_else(|| match number {
            0 => address.clone(),
            n => format!("{address}/{n}"),
        });
        let mut memories = Vec::new();
        let fresh = config.segments.iter().map(|size| {
            let bytes = usize::try_from(size.0).map_err(|_| invalid("segment size".to_owned()))?;
            let memory = Memory::create("mooncake-segment", bytes);
            memory.map(Arc::new).map_err(|e| {
                io::Error::new(e.kind(), format!("cannot map a segment of {size}: {e}"))
            })
        });
        let given = config.memories.iter().cloned().map(Ok);
        let count = config.segments.len() + config.memories.len();
        for (index, memory) in fresh.chain(given).enumerate() {
            let memory: Arc<Memory> = memory?;
            let segment_name = if count == 1 {
                name.clone()
            } else {
                format!("{name}#{index}")
            };
            directory.add(host.add(segment_name, random_u64(), memory.clone()));
            if let Some(fabric) = &config.fabric {
                fabric.prepare(&memory);
            }
            memories.push(memory);
        }
        if config.populate {
            populate(memories);
        }
        let serving = match (own, &config.port) {
            (Some(listener), _) => {
                let (lanes, fabric) = (config.lanes_max, config.fabric.clone());
                DataServer::start(
                    Service::Node,
                    host.clone(),
                    listener,
                    lanes,
                    LANE_STACK,
                    fabric,
                )?
                .into_serving()
            }
            (None, Some(server)) => server
                .serve(Service::Node, host.clone())
                .ok_or_else(|| invalid("the port to share has another token".to_owned()))?,
            (None, None) => return Err(invalid("no port".to_owned())),
        };
        let mover = mover::Mover::new(id, &host.keys);
        let shared = Arc::new(Shared {
            id,
            address,
            name,
            host,
            directory,
            serving,
            term: AtomicU64::new(0),
            phase: AtomicU8::new(NodePhase::Connecting as u8),
            phase_changed: Notify::new(),
            drain: Notify::new(),
            moves_until: Mutex::default(),
            last_session: Mutex::default(),
            farewell: Mutex::default(),
            mover,
            quotas: Mutex::default(),
            drains: Mutex::default(),
            probes: std::sync::atomic::AtomicUsize::new(0),
            config,
        });
        tokio::spawn(session::run(shared.clone()));
        Ok(Self { shared })
    }

    /// What others connect to.
    pub fn address(&self) -> &str {
        &self.shared.address
    }
    /// Its name.
    pub fn name(&self) -> &str {
        &self.shared.name
    }
    /// What it is doing.
    pub fn phase(&self) -> NodePhase {
        self.shared.phase()
    }
    /// Its segments, for clients of the same process.
    pub fn host(&self) -> &Arc<SegmentHost> {
        &self.shared.host
    }
    /// Objects it holds.
    pub fn objects(&self) -> usize {
        self.shared.directory.len()
    }
    /// What its data server did.
    pub fn counters(&self) -> &ServerCounters {
        self.shared.serving.counters()
    }

    /// Waits until the node is in `phase`, or `timeout`. Cancel-safe.
    pub async fn wait_for(&self, phase: NodePhase, timeout: Duration) -> bool {
        let reached = async {
            loop {
                let changed = self.shared.phase_changed.notified();
                if self.shared.phase() == phase {
                    return;
                }
                let _ = tokio::time::timeout(Duration::from_millis(100), changed).await;
            }
        };
        tokio::time::timeout(timeout, reached).await.is_ok()
    }

    /// Takes leave without moving anything. Returns whether the master confirmed within `timeout`.
    pub async fn drain(&self, timeout: Duration) -> bool {
        self.leave(Duration::ZERO, timeout).await.confirmed
    }

    /// Takes leave of the master: no more objects are placed here, those that lie nowhere else are moved to other nodes for
    /// at most `moves` (zero: not at all), puts under way end within `rest`, the segments are unmounted.
    ///
    /// Cancel-safe: what has not been moved stays until the process ends or the master unmounts the node.
    pub async fn leave(&self, moves: Duration, rest: Duration) -> Farewell {
        *self.shared.moves_until.lock() = Some(Instant::now() + moves);
        self.shared.set_phase(NodePhase::Draining);
        self.shared.drain.notify_one();
        let confirmed = self.wait_for(NodePhase::Unmounted, moves + rest).await;
        let told = *self.shared.farewell.lock();
        let told = told.unwrap_or_default();
        Farewell {
            confirmed,
            moved_objects: told.moved_objects,
            moved_bytes: told.moved_bytes,
            left_objects: told.left_objects,
        }
    }
}

/// Touches memory in the background, in small steps, so that first writes do not pay for page faults.
fn populate(memories: Vec<Arc<Memory>>) {
    const STEP: usize = 16 << 20;
    let run = move || {
        for memory in memories {
            let weak = Arc::downgrade(&memory);
            let length = memory.len();
            drop(memory);
            for offset in (0..length).step_by(STEP) {
                let Some(memory) = weak.upgrade() else { return };
                if let Err(error) = memory.populate(offset, STEP) {
                    tracing::warn!(%error, "memory could not be touched ahead; it will be on first use");
                    return;
                }
            }
        }
    };
    let spawned = std::thread::Builder::new()
        .name("populate".into())
        .spawn(run);
    if let Err(error) = spawned {
        tracing::warn!(%error, "no thread to touch memory ahead");
    }
}
