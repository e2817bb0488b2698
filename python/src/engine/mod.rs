//! `mooncake.engine`: processes that read and write each other's memory by address. What an engine is, and its life.

mod memory;
mod transfers;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::Deref;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use mooncake::base::net::{join_host_port, resolve_one, split_host_port};
use mooncake::base::trust::{ClusterKeys, Token};
use mooncake::engine::batch::Opcode;
use mooncake::engine::error::TransferError;
use mooncake::engine::metadata::Metadata;
use mooncake::engine::peer::{PeerEngine, PeerError};
use mooncake::engine::topology;
use mooncake::engine::transport::rdma;
use mooncake::engine::transport::server::DataServer;
use parking_lot::{Condvar, Mutex, RwLock};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::buffers::{self, HostMemoryAllocator, Registered};
use crate::device::DeviceRange;
use crate::process;

// Codes of upstream's transfer engine: another space than the store's.
const INVALID_ARGUMENT: i64 = -1;
const ADDRESS_NOT_REGISTERED: i64 = -3;
const ADDRESS_OVERLAPPED: i64 = -7;
const DNS: i64 = -101;
const SOCKET: i64 = -102;
const METADATA: i64 = -200;
/// Batches submitted and not asked for; more are refused.
const BATCHES_MAX: usize = 4096;
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);
/// Seconds; a day.
const TIMEOUT_MAX: u64 = 86_400;

fn code(error: &PeerError) -> i64 {
    match error {
        PeerError::Overlaps => ADDRESS_OVERLAPPED,
        PeerError::NotRegistered => ADDRESS_NOT_REGISTERED,
        _ => INVALID_ARGUMENT,
    }
}

/// A message that goes with a transfer.
#[pyclass(module = "mooncake.engine", get_all, set_all, from_py_object)]
#[derive(Clone)]
pub(crate) struct TransferNotify {
    name: String,
    msg: String,
}

#[pymethods]
impl TransferNotify {
    #[new]
    #[pyo3(signature = (name="", msg=""))]
    fn new(name: &str, msg: &str) -> Self {
        Self {
            name: name.to_owned(),
            msg: msg.to_owned(),
        }
    }
    fn __repr__(&self) -> String {
        format!("TransferNotify(name={:?}, msg={:?})", self.name, self.msg)
    }
}

/// What `initialize` opened.
struct Running {
    engine: PeerEngine,
    metadata: Metadata,
    name: String,
    generation: u32,
    /// Bound of one transfer.
    timeout: Duration,
    /// 0 under way, 1 done, -1 failed.
    batches: Mutex<HashMap<i64, i32>>,
    ended: Condvar,
}

/// What stores that were given the engine share with it.
#[derive(Default)]
pub(crate) struct Shared {
    running: RwLock<Option<Arc<Running>>>,
    /// What is open to peers.
    known: Registered,
}

/// Memory of this process and of its peers.
#[pyclass(module = "mooncake._native", subclass, frozen, name = "TransferEngine")]
#[derive(Default)]
pub(crate) struct Engine {
    shared: Arc<Shared>,
    managed: HostMemoryAllocator,
    next_batch: AtomicI64,
}

fn opcode(value: &Bound<'_, PyAny>) -> PyResult<Opcode> {
    let number = value
        .extract::<i64>()
        .or_else(|_| value.getattr("value")?.extract::<i64>())?;
    match number {
        0 => Ok(Opcode::Read),
        1 => Ok(Opcode::Write),
        _ => Err(pyo3::exceptions::PyValueError::new_err(
            "opcode must be TransferOpcode.Read or TransferOpcode.Write",
        )),
    }
}

impl Deref for Engine {
    type Target = Shared;
    fn deref(&self) -> &Shared {
        &self.shared
    }
}

impl Shared {
    fn running(&self) -> Result<Arc<Running>, i64> {
        let running = self.running.read();
        let running = running.as_ref().ok_or(INVALID_ARGUMENT)?;
        if running.generation == process::generation() {
            Ok(running.clone())
        } else {
            Err(INVALID_ARGUMENT)
        }
    }

    /// What peers may reach, for those who must know whether an address is memory.
    pub(crate) fn known(&self) -> &Registered {
        &self.known
    }

    /// Whether it was initialized, in this process.
    pub(crate) fn is_running(&self) -> bool {
        self.running().is_ok()
    }

    /// Its port, for a store to serve its part of the pool on; only where that is the address wanted, and port 0 is any.
    pub(crate) fn port(&self, wanted: SocketAddr) -> Option<Arc<DataServer>> {
        let running = self.running().ok()?;
        let server = running.engine.server();
        let address = server.address();
        let same_host = address.ip() == wanted.ip() || address.ip().is_unspecified();
        let same_port = wanted.port() == 0 || wanted.port() == address.port();
        (same_host && same_port).then(|| server.clone())
    }

    /// Opens memory to peers: 0, or a negative code.
    pub(crate) fn register(&self, address: usize, length: usize) -> i64 {
        let running = match self.running() {
            Ok(running) => running,
            Err(code) => return code,
        };
        let Some(pointer) = NonNull::new(address as *mut u8) else {
            return INVALID_ARGUMENT;
        };
        let outcome = match buffers::owner(address, length, true) {
            None => return INVALID_ARGUMENT,
            Some(Some(device)) => {
                let copies = Arc::new(DeviceRange(device));
                running.engine.register_device(pointer, length, copies)
            }
            // SAFETY: mapped now; that it stays so until it is unregistered is the caller's promise, as with upstream.
            Some(None) => unsafe { running.engine.register(pointer, length) },
        };
        if outcome.is_ok() {
            self.known.add(address, length);
        }
        outcome.err().as_ref().map_or(0, code)
    }

    /// Closes it: 0, or a negative code.
    pub(crate) fn unregister(&self, address: usize) -> i64 {
        match self.running() {
            Ok(running) => {
                self.known.remove(address);
                let outcome = running.engine.unregister(address);
                outcome.err().as_ref().map_or(0, code)
            }
            Err(code) => code,
        }
    }
}

impl Engine {
    /// For a store that shares it.
    pub(crate) fn share(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    fn open(
        local_hostname: &str,
        metadata_server: &str,
        protocol: &str,
        devices: &str,
    ) -> Result<Running, i64> {
        let metadata = Metadata::open(metadata_server).map_err(|error| {
            tracing::warn!("initialize: {error}");
            METADATA
        })?;
        let name = if local_hostname.is_empty() {
            "127.0.0.1"
        } else {
            local_hostname
        };
        let (host, port) = split_host_port(name, 0).map_err(|_| INVALID_ARGUMENT)?;
        let wanted = resolve_one(&join_host_port(&host, port)).map_err(|error| {
            tracing::warn!("initialize: {error}");
            DNS
        })?;
        let token = std::env::var("MOONCAKE_TOKEN")
            .ok()
            .and_then(|t| Token::new(&t));
        if token.is_none() && !wanted.ip().is_loopback() {
            tracing::warn!(
                "NO TOKEN: anybody who reaches {} can read and write what is registered here; set MOONCAKE_TOKEN",
                wanted.ip()
            );
        }
        let timeout = std::env::var("MC_TRANSFER_TIMEOUT")
            .ok()
            .and_then(|t| t.parse().ok())
            .map_or(TIMEOUT_DEFAULT, |seconds: u64| {
                Duration::from_secs(seconds.clamp(1, TIMEOUT_MAX))
            });
        let keys = ClusterKeys::derive(token.as_ref());
        let any = SocketAddr::new(wanted.ip(), 0);
        // The port in the name is the metadata name's; it is used when it is free, as upstream does.
        let fabric = rdma::select(protocol, devices);
        let engine = PeerEngine::open(wanted, keys.clone(), timeout, fabric.clone())
            .or_else(|_| PeerEngine::open(any, keys, timeout, fabric))
            .map_err(|error| {
                tracing::warn!("initialize: cannot listen on {}: {error}", wanted.ip());
                SOCKET
            })?;
        let port = engine.address().port();
        metadata.publish(name, &host, port).map_err(|error| {
            tracing::warn!("initialize: {error}");
            METADATA
        })?;
        Ok(Running {
            engine,
            name: name.to_owned(),
            metadata,
            generation: process::generation(),
            timeout,
            batches: Mutex::default(),
            ended: Condvar::new(),
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.generation == process::generation()
            && let Err(error) = self.metadata.withdraw(&self.name)
        {
            tracing::debug!(%error, "the name was not taken back");
        }
    }
}

#[pymethods]
impl Engine {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// Listens and is ready: 0, or a negative code. `metadata_server`: P2PHANDSHAKE, http://…/metadata, redis://….
    fn initialize(
        &self,
        py: Python<'_>,
        local_hostname: &str,
        metadata_server: &str,
        protocol: &str,
        device_name: &str,
    ) -> i64 {
        if !matches!(protocol, "tcp" | "rdma" | "") {
            tracing::warn!("initialize: protocol `{protocol}` is not in this build: using TCP");
        }
        if self.running().is_ok() {
            return INVALID_ARGUMENT;
        }
        match py.detach(|| Self::open(local_hostname, metadata_server, protocol, device_name)) {
            Ok(running) => {
                let old = self.running.write().replace(Arc::new(running));
                // Of the process this one was forked from.
                std::mem::forget(old);
                0
            }
            Err(code) => code,
        }
    }

    /// `initialize` with the kind of the metadata service beside its address.
    fn initialize_ext(
        &self,
        py: Python<'_>,
        local_hostname: &str,
        metadata_server: &str,
        protocol: &str,
        device_name: &str,
        metadata_type: &str,
    ) -> i64 {
        let server = match metadata_type {
            "" | "p2p" | "P2PHANDSHAKE" => metadata_server.to_owned(),
            kind if metadata_server.contains("://") || metadata_server == "P2PHANDSHAKE" => {
                let _ = kind;
                metadata_server.to_owned()
            }
            kind => format!("{kind}://{metadata_server}"),
        };
        self.initialize(py, local_hostname, &server, protocol, device_name)
    }

    /// Port that peers connect to.
    fn get_rpc_port(&self) -> i64 {
        self.running()
            .map_or_else(|code| code, |r| i64::from(r.engine.address().port()))
    }

    /// First registered address of a peer; 0 when there is none.
    fn get_first_buffer_address(&self, py: Python<'_>, segment_name: &str) -> u64 {
        py.detach(|| {
            let running = self.running().ok()?;
            let address = running.address(segment_name).ok()?;
            running.engine.first_address(&address).ok()
        })
        .unwrap_or(0)
    }

    /// Notifies received since the last call.
    fn get_notifies(&self) -> Vec<TransferNotify> {
        let Ok(running) = self.running() else {
            return Vec::new();
        };
        let notifies = running.engine.take_notifies().into_iter();
        notifies
            .map(|n| TransferNotify {
                name: n.name,
                msg: n.message,
            })
            .collect()
    }

    /// 0 when the peer answers, -102 when not.
    fn send_probe(&self, py: Python<'_>, peer_server_name: &str) -> i64 {
        py.detach(|| {
            let running = match self.running() {
                Ok(running) => running,
                Err(code) => return code,
            };
            let address = match running.address(peer_server_name) {
                Ok(address) => address,
                Err(code) => return code,
            };
            match running.engine.probe(&address) {
                Ok(()) => 0,
                Err(PeerError::Transfer(TransferError::Refused { .. })) => -104,
                Err(_) => SOCKET,
            }
        })
    }

    /// Which NICs are near which memory of this host, as upstream's JSON: `{"cpu:0": [[preferred], [others]], …}`.
    /// `device_name`: a comma list of those that count.
    #[pyo3(signature = (device_name=None))]
    fn get_local_topology(&self, device_name: Option<&str>) -> String {
        let only = rdma::RdmaConfig::default().with_devices(device_name.unwrap_or_default());
        topology::matrix(Path::new("/"), |n| only.wants(n)).to_string()
    }

    /// This object: what `setup(engine=…)` takes.
    fn get_engine(slf: PyRef<'_, Self>) -> Py<Self> {
        slf.into()
    }

    /// A number that is not 0 while the engine runs; there is no C++ object to point to.
    fn get_engine_ptr(&self) -> usize {
        self.running().map_or(0, |r| Arc::as_ptr(&r) as usize)
    }

    /// Nothing to warm up here: 0.
    #[pyo3(signature = (segment_name, **_others))]
    fn warmup_efa_segment(&self, segment_name: &str, _others: Option<&Bound<'_, PyDict>>) -> i64 {
        let _ = segment_name;
        0
    }
}
