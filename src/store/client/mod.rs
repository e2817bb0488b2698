//! The client library: put, get, exist, remove and the rest against a pool. Synchronous: small calls run in the
//! caller's thread from end to end.

mod arena_put;
mod arenas;
mod control;
mod get;
mod location_cache;
mod moved;
mod nearby;
mod put;
mod put_session;
mod ranges;
mod replicas;
pub mod stream;
mod view;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::RwLock;

pub use get::{Borrowed, GetRequest, ObjectReader};
pub use put::{PutOptions, PutOutcome, PutRequest};
pub use put_session::PutSession;
pub use ranges::{Piece, RangesRequest};

use crate::base::id::Id128;
use crate::base::net::host_id;
use crate::base::trace::{Kind, Span};
use crate::base::trust::{ClusterKeys, Token};
use crate::engine::batch::Peer;
use crate::engine::host::SegmentHost;
use crate::engine::transport::TransportKind;
use crate::engine::transport::rdma::Fabric;
use crate::engine::{EngineConfig, TransferEngine};
use crate::store::model::error::StoreError;
use crate::store::wire::{self, operation, reply};
use arenas::Arenas;
use control::ControlLink;
use location_cache::LocationCache;
use moved::MovedReports;
use view::{PoolView, SegmentRef};

/// How a client behaves.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// `host:port` of the master.
    pub master: String,
    /// The cluster's secret.
    pub token: Option<Token>,
    /// Namespace of all keys.
    pub tenant: String,
    /// Transports that may be used.
    pub transports: Vec<TransportKind>,
    /// RDMA devices; without, RDMA is left out.
    pub fabric: Option<Arc<Fabric>>,
    /// Bound of one operation, waits included.
    pub timeout: Duration,
    /// Bound of one attempt with one replica.
    pub transfer_timeout: Duration,
    /// Bound of one connection attempt.
    pub connect_timeout: Duration,
    /// How long an unreachable master is waited for.
    pub master_patience: Duration,
    /// Locations remembered while their leases run; 0 = none.
    pub location_cache: usize,
    /// Whether puts compute a CRC-32C that stays with the object.
    pub checksum: bool,
    /// Whether gets compare it.
    pub verify: bool,
    /// Whether small puts use arenas.
    pub arenas: bool,
}

impl ClientConfig {
    /// Defaults towards a master.
    pub fn new(master: &str) -> Self {
        Self {
            master: master.to_owned(),
            token: None,
            tenant: String::new(),
            transports: vec![
                TransportKind::Loopback,
                TransportKind::Shm,
                TransportKind::Rdma,
                TransportKind::Tcp,
            ],
            fabric: None,
            timeout: Duration::from_secs(10),
            transfer_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(1),
            master_patience: Duration::from_secs(5),
            location_cache: 65_536,
            checksum: false,
            verify: true,
            arenas: true,
        }
    }
}

/// Size, version and checksum of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Bytes of the payload.
    pub size: u64,
    /// Unique per put.
    pub version: u64,
    /// CRC-32C, if the writer computed one.
    pub checksum: Option<u32>,
}

/// A page of keys.
pub type ListPage = wire::Listing;

/// A client of one pool. Cheap to share; every method may be called from any number of threads.
pub struct PoolClient {
    config: ClientConfig,
    engine: Arc<TransferEngine>,
    control: ControlLink,
    view: RwLock<Arc<PoolView>>,
    locations: LocationCache,
    arenas: Arenas,
    host_id: String,
}

impl PoolClient {
    /// A client; connects on first use.
    ///
    /// # Errors
    /// `InvalidParams` for an address that is none.
    pub fn open(config: ClientConfig) -> Result<Self, StoreError> {
        let me = Id128::random();
        let keys = ClusterKeys::derive(config.token.as_ref());
        let mut engine = EngineConfig::new(me, keys.clone());
        engine.transports.clone_from(&config.transports);
        engine.fabric.clone_from(&config.fabric);
        engine.connect_timeout = config.connect_timeout;
        let control = ControlLink::new(
            &config.master,
            me,
            keys,
            config.connect_timeout,
            config.master_patience,
        )?;
        let engine = TransferEngine::open(engine);
        let control = control.reporting(MovedReports::new(engine.clone()));
        Ok(Self {
            engine,
            control,
            view: RwLock::default(),
            locations: LocationCache::new(config.location_cache),
            arenas: Arenas::default(),
            host_id: host_id(),
            config,
        })
    }

    /// Makes memory known that many puts and gets will name, so that a NIC can reach it without being told each time.
    /// Without RDMA it does nothing.
    ///
    /// # Safety
    /// The range stays mapped until [`PoolClient::unregister`].
    pub unsafe fn register(&self, base: *mut u8, length: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.engine.register(base, length) };
    }

    /// Takes [`PoolClient::register`] back.
    pub fn unregister(&self, base: *mut u8) {
        self.engine.unregister(base);
    }

    /// Lets the client reach a node of this process without leaving it.
    pub fn add_local(&self, host: &Arc<SegmentHost>) {
        self.engine.add_local(host);
    }

    /// The master's address.
    pub fn master(&self) -> &str {
        self.control.master()
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.config.timeout
    }

    fn view(&self) -> Arc<PoolView> {
        self.view.read().clone()
    }

    /// Brings the view up to the epoch that the master last mentioned.
    fn refresh_view(&self, deadline: Instant) -> Result<(), StoreError> {
        let known = self.view().epoch;
        if known != 0 && known == self.control.epoch.load(Ordering::Acquire) {
            return Ok(());
        }
        let reply = self.ask_view(known, deadline)?;
        let near = self
            .config
            .transports
            .iter()
            .any(|t| !matches!(t, TransportKind::Tcp | TransportKind::Rdma));
        if near && reply.host_id == self.host_id && !reply.control_socket.is_empty() {
            self.control.prefer_local(&reply.control_socket, deadline);
        }
        if reply.changed || known == 0 {
            let view = Arc::new(PoolView::new(reply.epoch, &reply.segments));
            *self.view.write() = view.clone();
            // A master that has just begun knows few nodes yet: to the others lanes are opened again.
            self.engine.keep_only(&view.peers());
        }
        Ok(())
    }

    fn ask_view(&self, known_epoch: u64, deadline: Instant) -> Result<wire::ViewReply, StoreError> {
        match self
            .control
            .ask(operation::Kind::View(wire::View { known_epoch }), deadline)?
        {
            reply::Kind::View(view) => Ok(view),
            _ => Err(self.control.surprise()),
        }
    }

    /// Tells the master that a segment could not be reached. Best effort.
    fn report(&self, segment: &SegmentRef, reason: &str) {
        let report = operation::Kind::ReportFailure(wire::ReportFailure {
            segment: segment.slot,
            incarnation: segment.incarnation,
            reason: reason.to_owned(),
        });
        let soon = Instant::now() + Duration::from_millis(500);
        if let Err(error) = self.control.ask(report, soon) {
            tracing::debug!(%error, "a failure was not reported");
        }
    }

    /// Whether each key has a readable replica. Grants leases.
    ///
    /// # Errors
    /// For the call as a whole: master unreachable, an invalid key.
    pub fn exist(&self, keys: &[&[u8]]) -> Result<Vec<bool>, StoreError> {
        let mut span = Span::begin("exist", Kind::Client);
        span.note("keys", keys.len() as u64);
        let deadline = self.deadline();
        loop {
            let exist = operation::Kind::Exist(wire::Exist {
                tenant: self.config.tenant.clone(),
                keys: keys
                    .iter()
                    .map(|k| bytes::Bytes::copy_from_slice(k))
                    .collect(),
            });
            let reply::Kind::Exist(found) = self.control.ask(exist, deadline)? else {
                return Err(self.control.surprise());
            };
            let unknown = found.results.contains(&2);
            if unknown && Instant::now() + Duration::from_millis(25) < deadline {
                std::thread::sleep(Duration::from_millis(25));
                continue;
            }
            if unknown {
                return Err(StoreError::Rebuilding);
            }
            return Ok(found.results.iter().map(|r| *r == 1).collect());
        }
    }

    /// Removes keys; a result per key, in order. Returns when the nodes have forgotten them.
    ///
    /// # Errors
    /// For the call as a whole.
    pub fn remove(
        &self,
        keys: &[&[u8]],
        force: bool,
    ) -> Result<Vec<Result<(), StoreError>>, StoreError> {
        let mut span = Span::begin("remove", Kind::Client);
        span.note("keys", keys.len() as u64);
        let deadline = self.deadline();
        self.locations.clear();
        loop {
            let remove = operation::Kind::Remove(wire::Remove {
                tenant: self.config.tenant.clone(),
                keys: keys
                    .iter()
                    .map(|k| bytes::Bytes::copy_from_slice(k))
                    .collect(),
                force,
            });
            let reply::Kind::Codes(codes) = self.control.ask(remove, deadline)? else {
                return Err(self.control.surprise());
            };
            let rebuilding = StoreError::Rebuilding.code();
            if codes.codes.iter().all(|c| *c == rebuilding)
                && Instant::now() + Duration::from_millis(25) < deadline
            {
                std::thread::sleep(Duration::from_millis(25));
                continue;
            }
            let results = codes.codes.iter();
            return Ok(results
                .map(|c| {
                    if *c == 0 {
                        Ok(())
                    } else {
                        Err(StoreError::from_code(*c))
                    }
                })
                .collect());
        }
    }

    /// Removes every key that matches (all, when `regex` is empty): `(removed, kept because leased)`.
    ///
    /// # Errors
    /// An invalid regex, a node that did not confirm, master unreachable.
    pub fn remove_matching(&self, regex: &str, force: bool) -> Result<(u64, u64), StoreError> {
        self.locations.clear();
        let deadline = self.deadline();
        loop {
            let remove = operation::Kind::RemoveMatching(wire::RemoveMatching {
                tenant: self.config.tenant.clone(),
                regex: regex.to_owned(),
                force,
            });
            match self.control.ask(remove, deadline) {
                Ok(reply::Kind::Removed(r)) if r.code == 0 => return Ok((r.count, r.kept)),
                Ok(reply::Kind::Removed(r)) => return Err(StoreError::from_code(r.code)),
                Ok(_) => return Err(self.control.surprise()),
                Err(StoreError::Rebuilding)
                    if Instant::now() + Duration::from_millis(25) < deadline =>
                {
                    std::thread::sleep(Duration::from_millis(25));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// A page of keys by prefix or regex, from `cursor` (0 = the beginning).
    ///
    /// # Errors
    /// An invalid regex, master unreachable.
    pub fn list(
        &self,
        prefix: &str,
        regex: &str,
        cursor: u64,
        limit: u32,
    ) -> Result<ListPage, StoreError> {
        let list = operation::Kind::List(wire::List {
            tenant: self.config.tenant.clone(),
            prefix: prefix.to_owned(),
            regex: regex.to_owned(),
            cursor,
            limit,
        });
        match self.control.ask(list, self.deadline())? {
            reply::Kind::Listing(listing) => Ok(listing),
            _ => Err(self.control.surprise()),
        }
    }

    /// Everything the master knows of a key. Grants no lease.
    ///
    /// # Errors
    /// `NotFound`, master unreachable.
    pub fn stat(&self, key: &[u8]) -> Result<wire::Description, StoreError> {
        let deadline = self.deadline();
        loop {
            let stat = operation::Kind::Stat(wire::Stat {
                tenant: self.config.tenant.clone(),
                key: bytes::Bytes::copy_from_slice(key),
            });
            match self.control.ask(stat, deadline) {
                Ok(reply::Kind::Description(description)) => return Ok(description),
                Ok(_) => return Err(self.control.surprise()),
                Err(StoreError::Rebuilding)
                    if Instant::now() + Duration::from_millis(25) < deadline =>
                {
                    std::thread::sleep(Duration::from_millis(25));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// All segments of the pool.
    ///
    /// # Errors
    /// Master unreachable.
    pub fn segments(&self) -> Result<Vec<wire::SegmentView>, StoreError> {
        self.segments_by(self.deadline())
    }

    fn segments_by(&self, deadline: Instant) -> Result<Vec<wire::SegmentView>, StoreError> {
        Ok(self.ask_view(0, deadline)?.segments)
    }

    /// The pool in figures.
    ///
    /// # Errors
    /// Master unreachable.
    pub fn overview(&self) -> Result<wire::OverviewReply, StoreError> {
        match self.control.ask(
            operation::Kind::Overview(wire::Overview {}),
            self.deadline(),
        )? {
            reply::Kind::Overview(overview) => Ok(overview),
            _ => Err(self.control.surprise()),
        }
    }

    /// The transport that would be tried first for a segment of a view.
    pub fn path(&self, segment: &wire::SegmentView) -> Option<TransportKind> {
        self.engine.path(&Peer {
            node: wire::id(segment.node_high, segment.node_low),
            name: segment.node.clone(),
            address: segment.address.clone(),
            host_id: segment.host_id.clone(),
            shm_socket: segment.shm_socket.clone(),
        })
    }

    /// Carries out raw operations, for tools and measurements.
    ///
    /// # Errors
    /// Master unreachable.
    pub fn execute(
        &self,
        operations: Vec<wire::Operation>,
    ) -> Result<Vec<wire::Reply>, StoreError> {
        self.control.call(operations, self.deadline())
    }

    /// Sends batches one after the other without waiting in between, then takes their replies: pipelining on one lane.
    ///
    /// # Errors
    /// Master unreachable.
    pub fn pipeline(&self, batches: Vec<Vec<wire::Operation>>) -> Result<u64, StoreError> {
        self.control.pipeline(batches, self.deadline())
    }

    /// Forgets all remembered locations.
    pub fn forget_locations(&self) {
        self.locations.clear();
    }
}

impl Drop for PoolClient {
    fn drop(&mut self) {
        self.arenas.retire_all();
        let deadline = Instant::now() + Duration::from_millis(500);
        self.give_back_arenas(deadline);
        self.control.farewell(deadline);
    }
}
