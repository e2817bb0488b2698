//! The node's side of data lanes: accepts TCP and Unix connections, one thread each, and serves frames from a
//! [`SegmentHost`]. A blocking thread per lane is what gives a small read the round trip of a bare echo; their number
//! is bounded and lanes beyond it are turned away in the handshake.

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
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::frame::{self, HEADER_BYTES, Item, Operation, RequestHeader, Status};
use super::rdma::{Fabric, ServedRails};
use super::socket::{Socket, Timed, Until};
use crate::base::handshake::{self, HandshakeError, LaneKind, Service};
use crate::base::histogram::{Histogram, NANOSECONDS};
use crate::base::id::{Id128, random_u64};
use crate::base::trust::{ClusterKeys, PROOF_BYTES};
use crate::engine::batch::{LocalSlice, Opcode};
use crate::engine::error::TransferError;
use crate::engine::grant::Grant;
use crate::engine::host::{NotifyOrigin, Reach, Segment, SegmentHost};
use crate::engine::memory::DeviceCopies;

/// How long a caller may take over its handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a frame may take from its first byte to its last, per 64 MiB of payload.
const FRAME_TIMEOUT: Duration = Duration::from_secs(10);

/// Most bytes of a refused write that are read and forgotten to keep the lane in step.
const SKIP_MAX: u64 = 64 << 20;

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
const RDMA: usize = 2;

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

impl ServerCounters {
    fn read(&self, way: usize, bytes: u64) {
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.way_read_bytes[way].fetch_add(bytes, Ordering::Relaxed);
    }

    fn written(&self, way: usize, bytes: u64) {
        self.written_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.way_written_bytes[way].fetch_add(bytes, Ordering::Relaxed);
    }
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

/// Counts a same-host client as long as its lane lives.
struct SharedWriter(Arc<SegmentHost>, Id128);

impl SharedWriter {
    fn new(host: &Arc<SegmentHost>, client: Id128) -> Self {
        host.shared_writer(client, 1);
        Self(host.clone(), client)
    }
}

impl Drop for SharedWriter {
    fn drop(&mut self) {
        self.0.shared_writer(self.1, -1);
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

/// Buffer between a socket and a device.
const DEVICE_BYTES: usize = 4 << 20;

struct ServedLane<'a> {
    shared: &'a Shared,
    socket: Socket,
    client: Id128,
    /// What the caller has named.
    wanted: Service,
    /// Whose memory it is at.
    served: Arc<Served>,
    /// Where it counts as a same-host writer.
    writers: Vec<SharedWriter>,
    same_host: bool,
    items: Vec<Item>,
    reply: Vec<u8>,
    /// Of this lane among all there were.
    number: u64,
    /// Once the caller has joined.
    rails: Option<ServedRails>,
}

/// The bound for moving `bytes` that the gate has let through.
fn time_for(bytes: u64) -> Until {
    let scale = 1 + (bytes >> 26).min(10_000) as u32;
    Until::Deadline(Instant::now() + FRAME_TIMEOUT * scale)
}

fn malformed(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl ServedLane<'_> {
    /// Before the first frame.
    fn begin(&mut self) -> io::Result<()> {
        let served = self.served.clone();
        self.turn_to(served)
    }

    /// From here on the lane is at this one's memory.
    fn turn_to(&mut self, served: Arc<Served>) -> io::Result<()> {
        if !self.shared.turned(self.number, &served) {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let is_known = self.writers.iter().any(|w| w.0.node == served.host.node);
        if self.same_host && !is_known {
            self.writers
                .push(SharedWriter::new(&served.host, self.client));
        }
        self.served = served;
        Ok(())
    }

    /// Turns to whoever has the memory that a frame names: a port may serve several. A frame is for one of them.
    fn find(&mut self) -> io::Result<()> {
        let Some(item) = self.items.first() else {
            return Ok(());
        };
        if !self.shared.several.load(Ordering::Acquire) || self.served.has(&item.grant) {
            return Ok(());
        }
        match self.shared.owner(self.wanted, &item.grant) {
            Some(served) => self.turn_to(served),
            // The gate says what is wrong with it.
            None => Ok(()),
        }
    }

    /// Serves frames until the peer closes. A malformed frame is answered and ends the lane: the stream can no longer
    /// be trusted to be in step.
    fn serve(&mut self) -> io::Result<()> {
        loop {
            let idle = Instant::now();
            self.socket.watch(idle);
            if !self.socket.need_or_end(1, Until::Idle)? {
                return Ok(());
            }
            self.socket.heard(idle);
            let start = Instant::now();
            let until = Until::Deadline(start + FRAME_TIMEOUT);
            self.socket.need(HEADER_BYTES, until)?;
            let mut head = [0; HEADER_BYTES];
            head.copy_from_slice(self.socket.take(HEADER_BYTES));
            let header = match frame::decode_request(&head) {
                Ok(header) => header,
                Err(what) => return self.refuse(0, what),
            };
            self.socket.need(header.meta_bytes, until)?;
            let meta = self.socket.take(header.meta_bytes);
            if let Err(what) = frame::decode_items(&header, meta, &mut self.items) {
                return self.refuse(header.id, what);
            }
            let notifies = match header.operation {
                Operation::Write | Operation::Fetch => {
                    meta[header.items * frame::ITEM_BYTES..].to_vec()
                }
                _ => Vec::new(),
            };
            self.find()?;
            match header.operation {
                Operation::Read => {
                    self.read(&header)?;
                    let times = &self.served.counters.reads[usize::from(self.same_host)];
                    times.observe(start.elapsed().as_nanos() as u64);
                }
                Operation::Write => {
                    self.write(&header, &notifies)?;
                    let times = &self.served.counters.writes[usize::from(self.same_host)];
                    times.observe(start.elapsed().as_nanos() as u64);
                }
                Operation::Ping => {
                    self.socket.skip(header.payload_bytes, until)?;
                    self.answer(Status::Ok, 0, 0, header.id, until)?;
                }
                Operation::Attach => self.attach(&header, until)?,
                Operation::Describe => self.describe(&header, until)?,
                Operation::Join => self.join(&header)?,
                Operation::Fetch => {
                    self.fetch(&header, &notifies, until)?;
                    let times = &self.served.counters.writes[RDMA];
                    times.observe(start.elapsed().as_nanos() as u64);
                }
                Operation::Bring => {
                    self.bring(&header, until)?;
                    let times = &self.served.counters.reads[RDMA];
                    times.observe(start.elapsed().as_nanos() as u64);
                }
            }
            self.socket.shrink();
        }
    }

    fn refuse(&mut self, id: u64, what: &'static str) -> io::Result<()> {
        self.served.counters.refused.fetch_add(1, Ordering::Relaxed);
        let until = Until::Deadline(Instant::now() + Duration::from_secs(1));
        self.answer(Status::Malformed, 0, 0, id, until)?;
        Err(malformed(what))
    }

    fn answer(
        &mut self,
        status: Status,
        items: usize,
        payload: u64,
        id: u64,
        until: Until,
    ) -> io::Result<()> {
        self.reply.clear();
        frame::encode_reply(&mut self.reply, status, items, payload, id);
        self.socket.write_all_from(&self.reply, &[], until)
    }

    fn refused(&self, error: &TransferError) -> u8 {
        self.served.counters.refused.fetch_add(1, Ordering::Relaxed);
        Status::from_error(error) as u8
    }

    /// Header and statuses, the granted bytes straight from the segments, then whether they were still the same.
    fn read(&mut self, header: &RequestHeader) -> io::Result<()> {
        let served = self.served.clone();
        let host = &served.host;
        let mut sources: smallvec::SmallVec<[LocalSlice; 8]> = smallvec::SmallVec::new();
        let mut segments: smallvec::SmallVec<[Option<Arc<Segment>>; 4]> = smallvec::SmallVec::new();
        let mut statuses: smallvec::SmallVec<[u8; 32]> = smallvec::SmallVec::new();
        let mut payload = 0;
        for item in &self.items {
            let checked = host
                .check(
                    Opcode::Read,
                    &item.grant,
                    item.offset,
                    item.length,
                    item.word,
                )
                .and_then(|segment| {
                    match item.word {
                        Some(w) if !segment.memory.word_is(w.offset, w.value) => {
                            return Err(TransferError::Changed);
                        }
                        _ => {}
                    }
                    let pointer = segment
                        .memory
                        .range(item.offset, item.length)
                        .ok_or(TransferError::OutOfBounds)?;
                    // SAFETY: in bounds of a mapping that `segment` keeps alive until the end of this function; the
                    // slice is only handed to the kernel.
                    let slice = unsafe { LocalSlice::new(pointer, item.length as usize) };
                    Ok((segment, slice))
                });
            match checked {
                Ok((segment, slice)) => {
                    payload += item.length;
                    sources.push(slice);
                    segments.push(Some(segment));
                    statuses.push(Status::Ok as u8);
                }
                Err(error) => {
                    segments.push(None);
                    let status = if error == TransferError::Changed {
                        Status::Changed as u8
                    } else {
                        self.refused(&error)
                    };
                    statuses.push(status);
                }
            }
        }
        let until = time_for(payload);
        self.reply.clear();
        frame::encode_reply(
            &mut self.reply,
            Status::Ok,
            header.items,
            payload,
            header.id,
        );
        self.reply.extend_from_slice(&statuses);
        // Small replies leave in one piece: copied, re-checked, sent with the verdict.
        // Borrowed memory may have been unmapped by its owner: the kernel finds out without a signal.
        let owned = |s: &Option<Arc<Segment>>| s.as_ref().is_none_or(|s| s.memory.fd().is_some());
        if payload <= 32 << 10 && segments.iter().all(owned) {
            for source in &sources {
                let at = self.reply.len();
                self.reply.reserve(source.length);
                // SAFETY: `reserve` made room; the source is in bounds.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        source.pointer,
                        self.reply.as_mut_ptr().add(at),
                        source.length,
                    );
                    self.reply.set_len(at + source.length);
                }
            }
            self.push_verdicts(&segments);
            self.socket.write_all_from(&self.reply, &[], until)?;
        } else {
            self.send_ranges(&sources, &segments, until)?;
            self.reply.clear();
            self.push_verdicts(&segments);
            self.socket.write_all_from(&self.reply, &[], until)?;
        }
        let way = usize::from(self.same_host);
        self.served.counters.read(way, payload);
        Ok(())
    }

    /// The head and the granted ranges: from memory straight to the socket, from a device through a buffer.
    fn send_ranges(
        &mut self,
        sources: &[LocalSlice],
        segments: &[Option<Arc<Segment>>],
        until: Until,
    ) -> io::Result<()> {
        let segments: Vec<&Arc<Segment>> = segments.iter().flatten().collect();
        if segments.iter().all(|s| s.memory.device().is_none()) {
            return self.socket.write_all_from(&self.reply, sources, until);
        }
        self.socket.write_all_from(&self.reply, &[], until)?;
        let mut buffer = vec![0; DEVICE_BYTES];
        for (source, segment) in sources.iter().zip(segments) {
            let Some(device) = segment.memory.device() else {
                self.socket.write_all_from(&[], &[*source], until)?;
                continue;
            };
            let mut done = 0;
            while done < source.length {
                let n = (source.length - done).min(buffer.len());
                // SAFETY: inside the granted range; the buffer has `n` bytes.
                unsafe { device.read(source.pointer as usize + done, buffer.as_mut_ptr(), n)? };
                self.socket.write_all_from(&buffer[..n], &[], until)?;
                done += n;
            }
        }
        Ok(())
    }

    /// Receives a payload for memory of a device, through a buffer. Inner error: received and not stored.
    fn receive_for_device(
        &mut self,
        device: &dyn DeviceCopies,
        address: usize,
        length: u64,
    ) -> io::Result<io::Result<()>> {
        let mut buffer = vec![0u8; DEVICE_BYTES.min(length as usize)];
        let mut stored = Ok(());
        let mut done = 0;
        while done < length as usize {
            let n = (length as usize - done).min(buffer.len());
            // SAFETY: our own buffer, alive during the call.
            let target = unsafe { LocalSlice::new(buffer.as_mut_ptr(), n) };
            self.socket.read_into(&[target], time_for(length))?;
            if stored.is_ok() {
                // SAFETY: inside the granted range; the buffer has `n` bytes.
                stored = unsafe { device.write(address + done, buffer.as_ptr(), n) };
            }
            done += n;
        }
        Ok(stored)
    }

    fn push_verdicts(&mut self, segments: &[Option<Arc<Segment>>]) {
        for (item, segment) in self.items.iter().zip(segments) {
            let same = match (segment, item.word) {
                (Some(segment), Some(w)) => segment.memory.word_is(w.offset, w.value),
                _ => true,
            };
            self.reply
                .push(if same { Status::Ok } else { Status::Changed } as u8);
        }
    }

    fn write(&mut self, header: &RequestHeader, notifies: &[u8]) -> io::Result<()> {
        let mut statuses: smallvec::SmallVec<[u8; 32]> = smallvec::SmallVec::new();
        let mut rest = notifies;
        for at in 0..self.items.len() {
            let item = self.items[at];
            let (notify, after) = rest.split_at(item.notify_bytes);
            rest = after;
            let status = match self.write_one(&item, notify)? {
                Ok(()) => Status::Ok as u8,
                Err(error) => self.refused(&error),
            };
            statuses.push(status);
        }
        self.reply.clear();
        frame::encode_reply(&mut self.reply, Status::Ok, header.items, 0, header.id);
        self.reply.extend_from_slice(&statuses);
        self.socket.write_all_from(&self.reply, &[], time_for(0))
    }

    /// Outer error: the lane is broken. Inner: the item was refused, its payload skipped.
    fn write_one(&mut self, item: &Item, notify: &[u8]) -> io::Result<Result<(), TransferError>> {
        let served = self.served.clone();
        let host = &served.host;
        let length = if item.has_data { item.length } else { 0 };
        let checked = host
            .check(
                Opcode::Write,
                &item.grant,
                item.offset,
                item.length,
                item.word,
            )
            .and_then(|segment| {
                let pass = host.enter_write(&item.grant, item.offset, item.length)?;
                Ok((segment, pass))
            })
            .and_then(|(segment, pass)| {
                let pointer = segment
                    .memory
                    .range(item.offset, item.length)
                    .ok_or(TransferError::OutOfBounds)?;
                Ok((segment, pass, pointer))
            });
        let (segment, _pass, pointer) = match checked {
            Ok(good) => good,
            Err(error) => {
                // What was not granted is not worth waiting for: a large remainder ends the lane.
                if length > SKIP_MAX {
                    return Err(malformed("a large write was refused"));
                }
                self.socket.skip(length, time_for(length))?;
                return Ok(Err(error));
            }
        };
        if let (Some(device), true) = (segment.memory.device(), length > 0) {
            let stored = self.receive_for_device(device.as_ref(), pointer as usize, length)?;
            if let Err(error) = stored {
                return Ok(Err(TransferError::from_io("the device", &error)));
            }
        } else if length > 0 {
            // SAFETY: in bounds, granted to this writer alone, kept mapped by `segment`.
            let target = unsafe { LocalSlice::new(pointer, length as usize) };
            self.socket.read_into(&[target], time_for(length))?;
        }
        let told = self.tell_and_publish(&segment, item, notify);
        if told.is_ok() {
            let way = usize::from(self.same_host);
            self.served.counters.written(way, length);
        }
        Ok(told)
    }

    /// The data of an item is in place: its notify, then its word.
    fn tell_and_publish(
        &self,
        segment: &Segment,
        item: &Item,
        notify: &[u8],
    ) -> Result<(), TransferError> {
        let origin = NotifyOrigin {
            client: self.client,
            segment: item.grant.segment,
            offset: item.offset,
            length: item.length,
            term: item.grant.term,
            reach: if self.same_host {
                Reach::Host
            } else {
                Reach::Network
            },
        };
        let publish = self.served.host.notify(origin, notify)?;
        if let Some(word) = item.word {
            if publish {
                segment.memory.publish(word.offset, word.value);
            }
            if segment.memory.is_lost() {
                return Err(TransferError::Stale);
            }
        }
        Ok(())
    }

    /// Sends what is registered here: who we are, then the regions.
    fn describe(&mut self, header: &RequestHeader, until: Until) -> io::Result<()> {
        let host = &self.served.host;
        let payload = frame::encode_description(host.node, &host.about(), &host.segments());
        self.reply.clear();
        let length = payload.len() as u64;
        frame::encode_reply(&mut self.reply, Status::Ok, 0, length, header.id);
        self.reply.extend_from_slice(&payload);
        self.socket.write_all_from(&self.reply, &[], until)
    }

    /// Sends a segment's descriptor along the Unix socket, in the reply's first byte.
    fn attach(&mut self, header: &RequestHeader, until: Until) -> io::Result<()> {
        let wanted = self.items.first().copied();
        let segment = match wanted {
            Some(item) if self.same_host => self
                .served
                .host
                .segment(item.grant.segment, item.grant.incarnation),
            _ => Err(TransferError::Invalid {
                what: "attach needs a Unix socket and an item",
            }),
        };
        let segment = segment.and_then(|s| match s.memory.fd() {
            Some(_) => Ok(s),
            None => Err(TransferError::Stale),
        });
        let segment = match segment {
            Ok(segment) => segment,
            Err(error) => {
                let status = Status::from_error(&error);
                return self.answer(status, 0, 0, header.id, until);
            }
        };
        let Some(fd) = segment.memory.fd() else {
            return self.answer(Status::Stale, 0, 0, header.id, until);
        };
        self.reply.clear();
        let size = segment.memory.len() as u64;
        frame::encode_reply(&mut self.reply, Status::Ok, 0, size, header.id);
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        let vectors = [io::IoSlice::new(&self.reply)];
        let sent = rustix::net::sendmsg(
            self.socket.fd(),
            &vectors,
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        if sent != self.reply.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(())
    }
}
