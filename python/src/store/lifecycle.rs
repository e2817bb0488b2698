//! Opening and closing: a client, the memory this process lends, and for an embedded pool its master.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mooncake::base::net::join_host_port;
use mooncake::base::trust::{ClusterKeys, Token};
use mooncake::base::units::ByteSize;
use mooncake::engine::memory::Memory;
use mooncake::engine::peer::about;
use mooncake::engine::transport::TransportKind;
use mooncake::engine::transport::rdma::{self, Fabric};
use mooncake::engine::transport::server::DataServer;
use mooncake::store::client::{ClientConfig, PoolClient};
use mooncake::store::master::{Master, MasterConfig, MasterServer};
use mooncake::store::node::{Node, NodeConfig, NodePhase};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyAny, PyDict};

use super::direct::Direct;
use super::{INVALID_PARAMS, Lending, Pool, Store, place};
use crate::args::code;
use crate::engine;
use crate::process;

/// Upstream's default of the dict form.
const SIZE_DEFAULT: u64 = 16 << 20;
/// How long `setup` waits for its memory to be in service.
const IN_SERVICE: Duration = Duration::from_secs(5);
/// How long `close` waits for the master's confirmation.
const DRAIN: Duration = Duration::from_secs(3);
/// How long calls wait for a master that has gone: a restart fits in, a request is not held up for longer.
const PATIENCE: Duration = Duration::from_secs(2);
pub(super) const INTERNAL_ERROR: i32 = -1;
const RPC_FAIL: i32 = -900;

/// What `setup` was told.
struct Settings {
    local_hostname: String,
    master: String,
    segment_bytes: u64,
    protocol: String,
    devices: String,
    tenant: String,
    token: Option<Token>,
}

/// A size as int or text ("4GB").
fn size(value: &Bound<'_, PyAny>) -> PyResult<u64> {
    if let Ok(number) = value.extract::<u64>() {
        return Ok(number);
    }
    let text: String = value
        .extract()
        .map_err(|_| PyTypeError::new_err("sizes must be ints or texts like \"4GB\""))?;
    ByteSize::parse(&text)
        .map(|s| s.0)
        .map_err(|e| PyValueError::new_err(e.to_string()))
}

impl Settings {
    fn from_dict(dict: &Bound<'_, PyDict>) -> PyResult<Result<Self, i32>> {
        // Everything becomes text first, as upstream; LMCache and others spell some keys differently.
        let mut given: HashMap<String, String> = HashMap::new();
        for (key, value) in dict {
            if !value.is_none() {
                given.insert(key.str()?.to_string(), value.str()?.to_string());
            }
        }
        let text = |names: &[&str]| names.iter().find_map(|n| given.get(*n)).cloned();
        let (Some(local_hostname), Some(_)) =
            (text(&["local_hostname"]), text(&["metadata_server"]))
        else {
            tracing::warn!("setup: the dict needs local_hostname and metadata_server");
            return Ok(Err(INVALID_PARAMS));
        };
        let segment = match text(&["global_segment_size"]).map(|t| ByteSize::parse(&t)) {
            None => SIZE_DEFAULT,
            Some(Ok(bytes)) => bytes.0,
            Some(Err(error)) => {
                tracing::warn!("setup: global_segment_size: {error}");
                return Ok(Err(INVALID_PARAMS));
            }
        };
        Ok(Ok(Self {
            local_hostname,
            master: text(&["master_server_addr", "master_server_address"]).unwrap_or_default(),
            segment_bytes: segment,
            protocol: text(&["protocol"]).unwrap_or_else(|| "tcp".to_owned()),
            devices: text(&["rdma_devices", "device_name"]).unwrap_or_default(),
            tenant: text(&["tenant_id"]).unwrap_or_else(|| "default".to_owned()),
            token: token(),
        }))
    }
}

pub(super) fn token() -> Option<Token> {
    std::env::var("MOONCAKE_TOKEN")
        .ok()
        .and_then(|t| Token::new(&t))
}

fn client_config(settings: &Settings, master: &str, fabric: Option<&Arc<Fabric>>) -> ClientConfig {
    let mut config = ClientConfig::new(master);
    config.token = settings.token.clone();
    config.tenant.clone_from(&settings.tenant);
    config.master_patience = PATIENCE;
    config.fabric = fabric.cloned();
    match std::env::var("MOONCAKE_TRANSPORT").as_deref() {
        Ok("tcp") => config.transports = vec![TransportKind::Tcp],
        Ok("shm") => config.transports = vec![TransportKind::Shm],
        Ok("rdma") => config.transports = vec![TransportKind::Rdma, TransportKind::Tcp],
        _ => {}
    }
    config
}

/// Starts the master of an embedded pool on a free loopback port.
fn start_master(settings: &Settings) -> std::io::Result<(Arc<MasterServer>, String)> {
    let runtime = process::runtime()?;
    runtime.block_on(async {
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let listener = tokio::net::TcpListener::bind(loopback).await?;
        let address = listener.local_addr()?.to_string();
        let config = MasterConfig {
            // Nobody can be on the way from an earlier master.
            recovery_grace: Duration::ZERO,
            ..MasterConfig::default()
        };
        let keys = ClusterKeys::derive(settings.token.as_ref());
        let server = MasterServer::new(Master::new(config, keys), 4096)?;
        tokio::spawn(server.clone().serve(listener));
        Ok((server, address))
    })
}

/// What memory is lent.
pub(super) enum Lent {
    /// So many bytes of new memory.
    Fresh(u64),
    /// Memory that is mapped already.
    Mapped(Arc<Memory>),
}

/// Lends memory to the pool; the node, or why not.
pub(super) fn start_node(
    master: &str,
    token: Option<Token>,
    listen: SocketAddr,
    advertise: Option<String>,
    lent: Lent,
    fabric: Option<Arc<Fabric>>,
    port: Option<Arc<DataServer>>,
) -> Result<Node, i32> {
    let refused = |error: std::io::Error| {
        tracing::warn!("no memory lent to the pool: {error}");
        if error.kind() == std::io::ErrorKind::InvalidInput {
            INVALID_PARAMS
        } else {
            INTERNAL_ERROR
        }
    };
    let (segments, memories) = match lent {
        Lent::Fresh(bytes) => (vec![ByteSize(bytes.next_multiple_of(4096))], Vec::new()),
        Lent::Mapped(memory) => (Vec::new(), vec![memory]),
    };
    let runtime = process::runtime().map_err(refused)?;
    let _inside = runtime.enter();
    let node = Node::start(NodeConfig {
        master: master.to_owned(),
        token,
        name: None,
        listen,
        advertise,
        segments,
        memories,
        populate: true,
        lanes_max: 4096,
        port,
        fabric,
        commit: None,
    })
    .map_err(refused)?;
    if runtime.block_on(node.wait_for(NodePhase::InService, IN_SERVICE)) {
        return Ok(node);
    }
    tracing::warn!("the master {master} did not take this process's memory within {IN_SERVICE:?}");
    Err(RPC_FAIL)
}

/// Takes leave; whether the master confirmed.
pub(super) fn stop_node(node: &Node, timeout: Duration) -> bool {
    process::runtime().is_ok_and(|runtime| runtime.block_on(node.drain(timeout)))
}

/// A node says who its master is; any other address is taken for a master's.
fn master_of(address: &str, keys: &ClusterKeys) -> String {
    match about(address, keys, Duration::from_secs(1)) {
        Ok(master) if !master.is_empty() => master,
        _ => address.to_owned(),
    }
}

/// The engine behind a `TransferEngine`.
fn shared_engine(given: &Bound<'_, PyAny>) -> PyResult<Arc<engine::Shared>> {
    let Ok(engine) = given.cast::<engine::Engine>() else {
        return Err(PyTypeError::new_err(
            "setup(): engine must be a mooncake.engine.TransferEngine",
        ));
    };
    Ok(engine.get().share())
}

fn open(settings: Settings, engine: Option<&engine::Shared>) -> Result<Pool, i32> {
    match settings.protocol.to_ascii_lowercase().as_str() {
        "tcp" | "" | "rdma" => {}
        other => tracing::warn!("protocol `{other}` is unknown: using shared memory and TCP"),
    }
    let fabric = rdma::select(&settings.protocol, &settings.devices);
    let embedded = matches!(settings.master.as_str(), "" | "embedded");
    let (server, master) = if embedded {
        let (server, address) = start_master(&settings).map_err(|error| {
            tracing::warn!("the embedded pool did not start: {error}");
            INTERNAL_ERROR
        })?;
        (Some(server), address)
    } else {
        (None, settings.master.clone())
    };
    // A first look with little patience: a master that is not there is said at once.
    let mut config = client_config(&settings, &master, None);
    config.master_patience = Duration::from_millis(200);
    config.timeout = Duration::from_secs(3);
    let looked = PoolClient::open(config).and_then(|client| client.overview());
    if let Err(error) = looked {
        tracing::warn!("setup: {error}");
        return Err(code(&error));
    }
    let (listen, advertise) = place::listen(&settings.local_hostname).map_err(|what| {
        tracing::warn!("setup: local_hostname: {what}");
        INVALID_PARAMS
    })?;
    let client = PoolClient::open(client_config(&settings, &master, fabric.as_ref()))
        .map_err(|e| code(&e))?;
    let direct = Direct::open(
        client_config(&settings, &master, fabric.as_ref()),
        fabric.as_ref(),
    );
    let mut nodes = Vec::new();
    let shown = advertise.clone().unwrap_or_else(|| listen.ip().to_string());
    let mut hostname = join_host_port(&shown, listen.port());
    let place = (listen.ip(), advertise.clone());
    if settings.segment_bytes > 0 {
        if settings.token.is_none() && !listen.ip().is_loopback() {
            tracing::warn!(
                "NO TOKEN: anybody who reaches {} can read and write this process's part of the pool; set MOONCAKE_TOKEN",
                listen.ip()
            );
        }
        let node = start_node(
            &master,
            settings.token.clone(),
            listen,
            advertise,
            Lent::Fresh(settings.segment_bytes),
            fabric.clone(),
            engine.and_then(|e| {
                let asked = place::port_asked(&settings.local_hostname);
                e.port(SocketAddr::new(listen.ip(), asked))
            }),
        )?;
        node.name().clone_into(&mut hostname);
        client.add_local(node.host());
        nodes.push(Lending {
            id: node.name().to_owned(),
            node,
            watch: None,
        });
    }
    Ok(Pool {
        client: std::mem::ManuallyDrop::new(client),
        direct,
        nodes: parking_lot::Mutex::new(nodes),
        embedded: server,
        fabric,
        hostname,
        place,
        generation: process::generation(),
        readers: parking_lot::Mutex::default(),
        writers: parking_lot::Mutex::default(),
        small: super::SmallOperations::default(),
    })
}

#[pymethods]
impl Store {
    #[new]
    #[pyo3(signature = (*_args, **_kwargs))]
    fn new(_args: &Bound<'_, pyo3::types::PyTuple>, _kwargs: Option<&Bound<'_, PyDict>>) -> Self {
        Self {
            shared: Arc::default(),
            apart: None,
        }
    }

    /// Joins a pool: 0, or a negative code within seconds. Either upstream's positional arguments or one dict.
    /// An empty `master_server_addr` (or "embedded") starts a pool inside this process.
    #[pyo3(signature = (local_hostname=None, metadata_server=None, global_segment_size=None, local_buffer_size=None,
        protocol=None, rdma_devices=None, master_server_addr=None, engine=None, enable_ssd_offload=false,
        ssd_offload_path="", tenant_id="default", enable_client_http_server=false, client_http_port=9300, config=None))]
    #[expect(clippy::too_many_arguments, reason = "upstream's signature")]
    fn setup(
        &self,
        py: Python<'_>,
        local_hostname: Option<&Bound<'_, PyAny>>,
        metadata_server: Option<&str>,
        global_segment_size: Option<&Bound<'_, PyAny>>,
        local_buffer_size: Option<&Bound<'_, PyAny>>,
        protocol: Option<&str>,
        rdma_devices: Option<&str>,
        master_server_addr: Option<&str>,
        engine: Option<&Bound<'_, PyAny>>,
        enable_ssd_offload: bool,
        ssd_offload_path: &str,
        tenant_id: &str,
        enable_client_http_server: bool,
        client_http_port: i32,
        config: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<i32> {
        // Staging memory is not needed here: accepted as upstream's.
        let _ = (ssd_offload_path, client_http_port);
        let engine = match engine.filter(|e| !e.is_none()) {
            None => None,
            Some(given) => Some(shared_engine(given)?),
        };
        if engine.as_ref().is_some_and(|e| !e.is_running()) {
            tracing::warn!("setup: the engine was not initialized");
            return Ok(INVALID_PARAMS);
        }
        let dict = config.or_else(|| local_hostname.and_then(|d| d.cast::<PyDict>().ok()));
        let settings = if let Some(dict) = dict {
            match Settings::from_dict(dict)? {
                Ok(settings) => settings,
                Err(code) => return Ok(code),
            }
        } else {
            let Some(hostname) = local_hostname else {
                return Err(PyTypeError::new_err(
                    "setup() needs local_hostname, or one dict",
                ));
            };
            let hostname: String = hostname.extract().map_err(|_| {
                PyTypeError::new_err("setup(): local_hostname must be str or a dict")
            })?;
            let _ = metadata_server;
            if let Some(local) = local_buffer_size {
                size(local)?;
            }
            Settings {
                local_hostname: hostname,
                master: master_server_addr.unwrap_or_default().to_owned(),
                segment_bytes: global_segment_size.map_or(Ok(SIZE_DEFAULT), size)?,
                protocol: protocol.unwrap_or("tcp").to_owned(),
                devices: rdma_devices.unwrap_or_default().to_owned(),
                tenant: tenant_id.to_owned(),
                token: token(),
            }
        };
        if enable_ssd_offload {
            tracing::warn!("setup: SSD offload is not in this build: objects stay in memory");
        }
        if enable_client_http_server {
            tracing::warn!(
                "setup: the client's HTTP server is not in this build: ask the master's"
            );
        }
        let code = py.detach(|| self.install(|| open(settings, engine.as_deref())));
        if code == 0 {
            *self.engine.write() = engine;
        }
        Ok(code)
    }

    /// Upstream's test helper: a pool of this process alone, or with the master of `MC_STORE_MASTER`/`MOONCAKE_MASTER`.
    #[pyo3(signature = (protocol, device_name="", mount_segment_size=SIZE_DEFAULT))]
    fn init_all(
        &self,
        py: Python<'_>,
        protocol: &str,
        device_name: &str,
        mount_segment_size: u64,
    ) -> i32 {
        let settings = Settings {
            local_hostname: "127.0.0.1".to_owned(),
            master: std::env::var("MOONCAKE_MASTER").unwrap_or_default(),
            segment_bytes: mount_segment_size,
            protocol: protocol.to_owned(),
            devices: device_name.to_owned(),
            tenant: "default".to_owned(),
            token: token(),
        };
        py.detach(|| self.install(|| open(settings, None)))
    }

    /// Joins a pool without lending memory, by the address of a `mooncake_client` (any node of the pool) or of the master.
    /// Objects of nodes of this host are copied through shared memory, from and to any buffer.
    #[pyo3(signature = (mem_pool_size, local_buffer_size, server_address, **_others))]
    fn setup_dummy(
        &self,
        py: Python<'_>,
        mem_pool_size: u64,
        local_buffer_size: u64,
        server_address: &str,
        _others: Option<&Bound<'_, PyDict>>,
    ) -> i32 {
        let _ = (mem_pool_size, local_buffer_size);
        let token = token();
        let asked = server_address.to_owned();
        let keys = ClusterKeys::derive(token.as_ref());
        let master = py.detach(|| master_of(&asked, &keys));
        let settings = Settings {
            local_hostname: "127.0.0.1".to_owned(),
            master,
            segment_bytes: 0,
            protocol: "tcp".to_owned(),
            devices: String::new(),
            tenant: "default".to_owned(),
            token,
        };
        py.detach(|| self.install(|| open(settings, None)))
    }

    /// Leaves the pool; what this process lent is unmounted. 0, also when there is nothing to close.
    fn close(&self, py: Python<'_>) -> i32 {
        let pool = self.pool.write().take();
        let Some(pool) = pool else { return 0 };
        let engine = self.engine.write().take();
        let lent: Vec<(usize, usize)> = self.lent.lock().drain().collect();
        if pool.generation != process::generation() {
            std::mem::forget(pool);
            return 0;
        }
        py.detach(|| {
            for (address, _) in lent {
                if let Some(engine) = &engine {
                    engine.unregister(address);
                }
            }
            let nodes: Vec<Lending> = pool.nodes.lock().drain(..).collect();
            let deadline = Instant::now() + DRAIN;
            for Lending { node, .. } in &nodes {
                stop_node(node, deadline.saturating_duration_since(Instant::now()));
            }
            drop(pool);
        });
        0
    }

    /// Upstream's name for `close`.
    #[pyo3(name = "tearDownAll")]
    fn tear_down_all(&self, py: Python<'_>) -> i32 {
        self.close(py)
    }

    /// 0 healthy, 1 not set up, 2 the master does not answer.
    fn health_check(&self, py: Python<'_>) -> i32 {
        let Ok(pool) = self.pool() else { return 1 };
        py.detach(|| if pool.client.overview().is_ok() { 0 } else { 2 })
    }

    /// `host:port` of this process in the pool: the name of its segment, for `preferred_segment`.
    fn get_hostname(&self) -> String {
        self.pool()
            .map_or_else(|_| String::new(), |p| p.hostname.clone())
    }

    /// `host:port` of the master; not upstream's. Of an embedded pool: give it to other processes of this host.
    fn get_master_address(&self) -> String {
        self.pool()
            .map_or_else(|_| String::new(), |p| p.client.master().to_owned())
    }
}

impl Store {
    fn install(&self, open: impl FnOnce() -> Result<Pool, i32>) -> i32 {
        if self.pool().is_ok() {
            tracing::warn!("setup: this store is set up already: close it first");
            return INVALID_PARAMS;
        }
        let opened = match open() {
            Ok(pool) => pool,
            Err(code) => return code,
        };
        let mut pool = self.pool.write();
        if let Some(old) = pool.take() {
            if old.generation == process::generation() {
                // Another thread was faster.
                *pool = Some(old);
                return INVALID_PARAMS;
            }
            std::mem::forget(old);
        }
        *pool = Some(Arc::new(opened));
        0
    }
}
