//! The node's side of data lanes: accepts TCP and Unix connections, one thread each, and serves frames from a
//! [`SegmentHost`]. A blocking thread per lane is what gives a small read the round trip of a bare echo; their number
//! is bounded and lanes beyond it are turned away in the handshake.

mod counters;
mod lane;
mod remote;

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

pub use counters::{ServerCounters, WAYS};
use lane::ServedLane;

use super::rdma::Fabric;
use super::socket::{Socket, Timed, Until};
use crate::base::handshake::{self, HandshakeError, LaneKind, Service};
use crate::base::id::{Id128, random_u64};
use crate::base::trust::{ClusterKeys, PROOF_BYTES};
use crate::engine::grant::Grant;
use crate::engine::host::SegmentHost;

/// How long a caller may take over its handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Stack of a lane that copies memory of the host.
pub const LANE_STACK: usize = 256 << 10;
/// Stack of a lane that may call a device's driver, which takes what it likes. Only what is touched becomes memory.
pub const DEVICE_LANE_STACK: usize = 2 << 20;

/// One of the things served on a port: memory with its gate, and what was done with it.
pub struct Served {
    service: Service,
    host: Arc<SegmentHost>,
    counters: ServerCounters,
}

impl Served {
    fn new(service: Service, host: Arc<SegmentHost>) -> Arc<Self> {
        Arc::new(Self {
            service,
            host,
            counters: ServerCounters::default(),
        })
    }

    /// What was done with it so far.
    pub fn counters(&self) -> &ServerCounters {
        &self.counters
    }

    fn has(&self, grant: &Grant) -> bool {
        self.host.segment(grant.segment, grant.incarnation).is_ok()
    }
}

/// Something that is served on a port of others'; no longer once this is dropped.
pub struct Serving {
    server: Arc<DataServer>,
    served: Arc<Served>,
}

impl Serving {
    /// The server.
    pub fn server(&self) -> &Arc<DataServer> {
        &self.server
    }
    /// What was done with it so far.
    pub fn counters(&self) -> &ServerCounters {
        &self.served.counters
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.server.shared.withdraw(&self.served);
    }
}

/// A running data server; stops and closes its lanes on drop.
pub struct DataServer {
    shared: Arc<Shared>,
    first: Arc<Served>,
    /// Random.
    id: u64,
    /// Things served so far.
    number: AtomicU64,
    address: SocketAddr,
    socket_name: String,
}

struct Shared {
    /// The identity and the keys of the first; it greets.
    node: Id128,
    keys: ClusterKeys,
    services: RwLock<Vec<Arc<Served>>>,
    /// Whether there was ever a second one: then frames look for theirs.
    several: AtomicBool,
    lanes_max: usize,
    lane_stack: usize,
    stopping: AtomicBool,
    lanes: Mutex<HashMap<u64, OpenLane>>,
    next: AtomicU64,
    fabric: Option<Arc<Fabric>>,
}

struct OpenLane {
    fd: OwnedFd,
    /// Whose memory it has been to, by identity.
    been_to: Vec<Id128>,
}

impl DataServer {
    /// Serves `host` on a bound TCP listener, and on an abstract Unix socket for same-host peers, each lane by a thread with
    /// `lane_stack` bytes of stack. With a `fabric` callers may have their bytes moved by RDMA.
    ///
    /// # Errors
    /// When a listener cannot be set up.
    pub fn start(
        service: Service,
        host: Arc<SegmentHost>,
        listener: TcpListener,
        lanes_max: usize,
        lane_stack: usize,
        fabric: Option<Arc<Fabric>>,
    ) -> io::Result<Self> {
        use std::os::linux::net::SocketAddrExt;
        let address = listener.local_addr()?;
        let socket_name = format!("mooncake-{}-{:08x}", host.node, random_u64() as u32);
        let name = std::os::unix::net::SocketAddr::from_abstract_name(&socket_name)?;
        let unix = UnixListener::bind_addr(&name)?;
        let first = Served::new(service, host);
        let shared = Arc::new(Shared {
            node: first.host.node,
            keys: first.host.keys.clone(),
            services: RwLock::new(vec![first.clone()]),
            several: AtomicBool::new(false),
            lanes_max,
            lane_stack,
            stopping: AtomicBool::new(false),
            lanes: Mutex::default(),
            next: AtomicU64::new(0),
            fabric,
        });
        let (tcp_side, unix_side) = (shared.clone(), shared.clone());
        std::thread::Builder::new()
            .name("data-accept".into())
            .spawn(move || {
                tcp_side.accept_loop(|| {
                    let (stream, _) = listener.accept()?;
                    Ok((Socket::from_tcp(stream)?, false))
                });
            })?;
        std::thread::Builder::new()
            .name("shm-accept".into())
            .spawn(move || {
                unix_side.accept_loop(|| {
                    let (stream, _) = unix.accept()?;
                    // The whole segment becomes writable for this peer: it must be us or root.
                    let peer = rustix::net::sockopt::socket_peercred(&stream)?;
                    let me = rustix::process::geteuid();
                    if peer.uid != me && !peer.uid.is_root() {
                        return Err(io::ErrorKind::PermissionDenied.into());
                    }
                    Ok((Socket::from_unix(stream)?, true))
                });
            })?;
        Ok(Self {
            shared,
            first,
            id: random_u64() | 1,
            number: AtomicU64::new(0),
            address,
            socket_name,
        })
    }

    /// Serves something else on the same port, too, for as long as the answer lives. `None`: it has another token.
    pub fn serve(self: &Arc<Self>, service: Service, host: Arc<SegmentHost>) -> Option<Serving> {
        let nonces = [&[0; PROOF_BYTES], &[0; PROOF_BYTES]];
        let (mine, theirs) = (&self.shared.keys, &host.keys);
        let same = ClusterKeys::proof_matches(
            &mine.proof(b"same", nonces),
            &theirs.proof(b"same", nonces),
        );
        if !same {
            return None;
        }
        let served = Served::new(service, host);
        self.shared.services.write().push(served.clone());
        self.shared.several.store(true, Ordering::Release);
        Some(Serving {
            server: self.clone(),
            served,
        })
    }

    /// The same for what was served from the start.
    pub fn into_serving(self) -> Serving {
        Serving {
            served: self.first.clone(),
            server: Arc::new(self),
        }
    }

    /// Counts up from 0: to tell things on one port apart.
    pub fn next_number(&self) -> u64 {
        self.number.fetch_add(1, Ordering::Relaxed)
    }

    /// Random, never 0: what is served on one port has it in common.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
    /// Name of the abstract Unix socket.
    pub fn socket_name(&self) -> &str {
        &self.socket_name
    }
    /// Lanes open now.
    pub fn lanes(&self) -> usize {
        self.shared.lanes.lock().len()
    }
    /// What it did so far with what was served from the start.
    pub fn counters(&self) -> &ServerCounters {
        &self.first.counters
    }
}

impl std::fmt::Debug for DataServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("DataServer").field(&self.address).finish()
    }
}

impl Drop for DataServer {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        for lane in self.shared.lanes.lock().values() {
            let _ = rustix::net::shutdown(&lane.fd, rustix::net::Shutdown::Both);
        }
        // Wake the accept threads.
        let mut address = self.address;
        if address.ip().is_unspecified() {
            let local: std::net::IpAddr = if address.is_ipv4() {
                std::net::Ipv4Addr::LOCALHOST.into()
            } else {
                std::net::Ipv6Addr::LOCALHOST.into()
            };
            address.set_ip(local);
        }
        let _ = std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200));
        let _ = Socket::connect_unix(&self.socket_name);
    }
}

impl Shared {
    /// What a caller wants: of the service it names, else the first there is.
    fn service(&self, wanted: Service) -> Option<Arc<Served>> {
        let services = self.services.read();
        let named = services.iter().find(|s| s.service == wanted);
        named.or_else(|| services.first()).cloned()
    }

    /// Who has the memory of a grant, among those that a caller may mean.
    fn owner(&self, wanted: Service, grant: &Grant) -> Option<Arc<Served>> {
        let services = self.services.read();
        let meant = |s: &&Arc<Served>| wanted == Service::Any || s.service == wanted;
        let mut meant = services.iter().filter(meant);
        meant.find(|s| s.has(grant)).cloned()
    }

    /// Serves something no longer: no lane finds it, and those that have been there are closed.
    fn withdraw(&self, served: &Arc<Served>) {
        self.services.write().retain(|s| !Arc::ptr_eq(s, served));
        for lane in self.lanes.lock().values() {
            if lane.been_to.contains(&served.host.node) {
                let _ = rustix::net::shutdown(&lane.fd, rustix::net::Shutdown::Both);
            }
        }
    }

    /// Notes that a lane has turned to somebody's memory. `false`: it is not served any more.
    fn turned(&self, lane: u64, served: &Arc<Served>) -> bool {
        if let Some(open) = self.lanes.lock().get_mut(&lane)
            && !open.been_to.contains(&served.host.node)
        {
            open.been_to.push(served.host.node);
        }
        // In this order: whoever withdraws it finds the lane, or the lane finds it gone.
        let services = self.services.read();
        services.iter().any(|s| Arc::ptr_eq(s, served))
    }

    fn accept_loop(self: Arc<Self>, mut accept: impl FnMut() -> io::Result<(Socket, bool)>) {
        loop {
            let accepted = accept();
            if self.stopping.load(Ordering::Acquire) {
                return;
            }
            match accepted {
                Ok((socket, same_host)) => {
                    let shared = self.clone();
                    let spawned = std::thread::Builder::new()
                        .name("data-lane".into())
                        .stack_size(self.lane_stack)
                        .spawn(move || shared.lane(socket, same_host));
                    if let Err(error) = spawned {
                        tracing::warn!(%error, "no thread for a data lane");
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "a connection was not accepted");
                    // Out of descriptors: do not spin.
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
    }

    fn lane(self: Arc<Self>, mut socket: Socket, same_host: bool) {
        let slot = self.next.fetch_add(1, Ordering::Relaxed);
        let busy = {
            let mut lanes = self.lanes.lock();
            let busy = lanes.len() >= self.lanes_max;
            if let Ok(fd) = socket.fd().try_clone_to_owned() {
                let been_to = Vec::new();
                lanes.insert(slot, OpenLane { fd, been_to });
            }
            busy
        };
        let _listed = Listed(&self, slot);
        let greeting = handshake::accept(
            &mut Timed {
                socket: &mut socket,
                deadline: Instant::now() + HANDSHAKE_TIMEOUT,
            },
            LaneKind::Data,
            self.node,
            &self.keys,
            busy,
        );
        let Some(first) = self.service(Service::Any) else {
            socket.shutdown();
            return;
        };
        match greeting {
            Ok(greeting) => {
                let wanted = greeting.service;
                let served = self.service(wanted).unwrap_or(first);
                let mut lane = ServedLane {
                    shared: &self,
                    socket,
                    client: greeting.peer,
                    wanted,
                    served,
                    writers: Vec::new(),
                    same_host,
                    items: Vec::new(),
                    reply: Vec::new(),
                    number: slot,
                    rails: None,
                };
                if let Err(error) = lane.begin().and_then(|()| lane.serve()) {
                    tracing::debug!(%error, client = %greeting.peer, "a data lane ended");
                }
                drop(lane.rails.take());
                lane.socket.shutdown();
            }
            Err(error) => {
                let refused = &first.counters.lanes_refused;
                refused.fetch_add(1, Ordering::Relaxed);
                match &error {
                    HandshakeError::Io(_) => tracing::debug!(%error, "data lane refused"),
                    HandshakeError::NotMooncake { .. } => {
                        answer_stranger(&mut socket, &error);
                        tracing::info!(%error, "data lane refused");
                    }
                    _ => tracing::info!(%error, "data lane refused"),
                }
                socket.shutdown();
            }
        }
    }
}

/// Takes a lane off the list, however its thread ends.
struct Listed<'a>(&'a Shared, u64);

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        self.0.lanes.lock().remove(&self.1);
    }
}

/// Tells a stray HTTP client where it is.
fn answer_stranger(socket: &mut Socket, error: &HandshakeError) {
    let text = format!("this is the data port of a mooncake node: {error}\n");
    let answer = format!(
        "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}",
        text.len()
    );
    let until = Until::Deadline(Instant::now() + Duration::from_secs(1));
    let _ = socket.write_all_from(answer.as_bytes(), &[], until);
}
