//! The caller's side: joins lanes, names the pieces of its memory, and lets the node's NIC do the rest.
//!
//! Memory that was registered once is named as it is. Of other memory large slices are registered for one transfer, and
//! small ones go through a registered buffer of the lane. Before a transfer returns, the node has answered or the queue
//! pairs are gone: nobody touches the caller's memory afterwards.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use super::endpoint::Endpoint;
use super::fabric::Fabric;
use super::registration::{Access, Registration};
use super::wire::{self, End, Piece};
use crate::base::clock::time_left;
use crate::engine::batch::{LocalSlice, Opcode, Peer, TransferRequest, TransferResult};
use crate::engine::error::TransferError;
use crate::engine::memory::Memory;
use crate::engine::transport::frame::{self, HEADER_BYTES, Operation, Status};
use crate::engine::transport::lane::{Identity, Lane, LanePool};
use crate::engine::transport::socket::{Timed, Until};
use crate::engine::transport::tcp::connect;
use crate::engine::transport::{InFlight, Transport, TransportKind};

/// Slices of unregistered memory from this size on are registered for one transfer instead of copied.
const REGISTERED_ONCE: usize = 256 << 10;
/// The lane's buffer for smaller ones.
const STAGING: usize = 4 << 20;
/// How long bringing the queue pairs up may take.
const JOIN: Duration = Duration::from_secs(3);
/// How long a peer that is still registering its memory is left alone.
const SOON: Duration = Duration::from_secs(2);
/// Peers and rails remembered as resting.
const RESTING_MAX: usize = 4096;

/// The client side of RDMA.
pub struct RdmaTransport {
    lanes: LanePool,
    fabric: Arc<Fabric>,
    registered: RwLock<BTreeMap<u64, Arc<Registration>>>,
    /// Peers, and until when they are left to TCP.
    resting: Mutex<HashMap<String, Instant>>,
    /// Devices towards a peer, likewise.
    paused: Mutex<HashMap<(String, usize), Instant>>,
}

/// What travels with a lane: its queue pairs and its buffer.
struct Joined {
    /// By rail; none where the node has no end for it.
    ends: Vec<Option<Endpoint>>,
    staging: Option<Staging>,
}

struct Staging {
    /// Before the memory.
    registration: Arc<Registration>,
    memory: Memory,
}

impl RdmaTransport {
    pub(crate) fn new(identity: Identity, fabric: Arc<Fabric>) -> Self {
        Self {
            lanes: LanePool::new(identity, connect),
            fabric,
            registered: RwLock::default(),
            resting: Mutex::default(),
            paused: Mutex::default(),
        }
    }

    /// Registers memory that later transfers name pieces of. Whether it was: what was not is registered per transfer.
    ///
    /// # Safety
    /// The range stays mapped until [`RdmaTransport::unregister`].
    pub unsafe fn register(&self, base: *mut u8, length: usize) -> bool {
        match self.fabric.register(base, length, Access::Both) {
            Ok(registration) => {
                let mut registered = self.registered.write();
                registered.insert(base as u64, Arc::new(registration));
                true
            }
            Err(error) => {
                tracing::warn!(%error, bytes = length, "rdma: a buffer was not registered");
                false
            }
        }
    }

    /// Takes a registration back. Transfers under way keep theirs.
    pub fn unregister(&self, base: *mut u8) {
        self.registered.write().remove(&(base as u64));
    }

    fn registration(&self, address: u64, length: u64) -> Option<Arc<Registration>> {
        let registered = self.registered.read();
        let (_, found) = registered.range(..=address).next_back()?;
        found.covers(address, length).then(|| found.clone())
    }

    /// A lane with rails, and its queue pairs.
    fn lane(
        &self,
        address: &str,
        deadline: Instant,
        fresh: bool,
    ) -> Result<(Lane, Box<Joined>), TransferError> {
        let mut lane = self.lanes.take(address, deadline, fresh)?;
        let rider = lane.rider.take().and_then(|r| r.downcast::<Joined>().ok());
        let joined = match rider {
            Some(joined) => joined,
            None => Box::new(self.join(&mut lane, deadline)?),
        };
        Ok((lane, joined))
    }

    fn join(&self, lane: &mut Lane, deadline: Instant) -> Result<Joined, TransferError> {
        let peer = lane.peer.to_string();
        let refused = |reason: String| TransferError::Refused {
            peer: peer.clone(),
            reason,
        };
        let deadline = deadline.min(Instant::now() + JOIN);
        let now = Instant::now();
        let ends = {
            let paused = self.paused.lock();
            let resting = |at: usize| {
                paused
                    .get(&(peer.clone(), at))
                    .is_some_and(|until| *until > now)
            };
            self.fabric.passive_ends(resting)
        };
        let config = &self.fabric.config;
        let described = ends.into_iter().filter_map(|end| {
            let mine = end.describe(config).ok()?;
            Some((end, mine))
        });
        let (ends, mine): (Vec<Endpoint>, Vec<End>) = described.unzip();
        if ends.is_empty() {
            return Err(refused("no RDMA port of this host is up".to_owned()));
        }
        let answer = exchange_join(lane, &wire::encode_join(&mine, ""), deadline)?;
        let (theirs, reason) = wire::decode_join(&answer).map_err(|what| refused(what.into()))?;
        if theirs.len() != ends.len() {
            return Err(refused(if reason.is_empty() {
                "another number of rails".to_owned()
            } else {
                reason
            }));
        }
        let mut failed = String::new();
        let connected = ends.into_iter().zip(&theirs).map(|(end, their)| {
            if their.qp == 0 {
                return None;
            }
            match end.accept(their, config) {
                Ok(()) => Some(end),
                Err(error) => {
                    failed = error.to_string();
                    None
                }
            }
        });
        let ends: Vec<Option<Endpoint>> = connected.collect();
        if ends.iter().all(Option::is_none) {
            return Err(refused(failed));
        }
        Ok(Joined {
            ends,
            staging: None,
        })
    }

    /// Leaves a peer to TCP for a while, and says so once.
    fn rest(&self, peer: &str, error: &dyn std::fmt::Display) {
        let text = error.to_string();
        let pause = if text.contains("still being registered") {
            SOON
        } else {
            self.fabric.config.pause
        };
        let now = Instant::now();
        let mut resting = self.resting.lock();
        if resting.len() >= RESTING_MAX {
            resting.retain(|_, until| *until > now);
        }
        let before = resting.insert(peer.to_owned(), now + pause);
        drop(resting);
        if before.is_none_or(|until| until <= now) {
            tracing::warn!(
                "rdma to {peer} is not used for {} s, TCP is: {text}",
                pause.as_secs()
            );
        }
    }

    fn pause_rails(&self, peer: &str, joined: &Joined, lost: u64) {
        let until = Instant::now() + self.fabric.config.pause;
        let mut paused = self.paused.lock();
        if paused.len() >= RESTING_MAX {
            paused.retain(|_, until| *until > Instant::now());
        }
        for (rail, end) in joined.ends.iter().enumerate() {
            let Some(end) = end.as_ref().filter(|_| lost & (1 << rail) != 0) else {
                continue;
            };
            tracing::warn!(
                "rdma: the rail from {} to {peer} failed, and is left out for {} s",
                end.device.name,
                self.fabric.config.pause.as_secs()
            );
            paused.insert((peer.to_owned(), end.index), until);
        }
    }

    fn send_first(
        &self,
        requests: &[TransferRequest],
        deadline: Instant,
        fresh: bool,
    ) -> Result<Exchange<'_>, TransferError> {
        let (lane, joined) = self.lane(&requests[0].peer.address, deadline, fresh)?;
        let reused = lane.reused;
        let mut exchange = Exchange {
            transport: self,
            joined,
            lane,
            frame: Frame::default(),
            deadline,
        };
        match exchange.send(requests, 0) {
            Ok(()) => Ok(exchange),
            // An idle lane whose peer was restarted: once more on a new one.
            Err(e) if reused && e.is_path_failure() && !fresh => {
                drop(exchange);
                self.send_first(requests, deadline, true)
            }
            Err(e) => Err(e),
        }
    }
}

fn exchange_join(
    lane: &mut Lane,
    request: &[u8],
    deadline: Instant,
) -> Result<Vec<u8>, TransferError> {
    let peer = lane.peer.clone();
    let io = |e: std::io::Error| TransferError::from_io(&peer, &e);
    let refused = |reason: &str| TransferError::Refused {
        peer: peer.to_string(),
        reason: reason.to_owned(),
    };
    let mut head = Vec::with_capacity(HEADER_BYTES + request.len());
    frame::encode_header(&mut head, Operation::Join, 0, 0, request.len() as u64, 1);
    head.extend_from_slice(request);
    let socket = lane.socket()?;
    socket
        .write_all_from(&head, &[], Until::Deadline(deadline))
        .map_err(io)?;
    let mut timed = Timed { socket, deadline };
    let mut head = [0; HEADER_BYTES];
    timed.read_exact(&mut head).map_err(io)?;
    let reply = frame::decode_reply(&head).map_err(refused)?;
    if reply.status != Status::Ok as u8 || reply.payload_bytes > wire::JOIN_BYTES_MAX {
        return Err(refused("it knows no RDMA"));
    }
    let mut answer = vec![0; reply.payload_bytes as usize];
    timed.read_exact(&mut answer).map_err(io)?;
    Ok(answer)
}

impl Transport for RdmaTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Rdma
    }

    fn reaches(&self, peer: &Peer) -> bool {
        let now = Instant::now();
        let rests = |until: &Instant| *until > now;
        !peer.address.is_empty()
            && !self.resting.lock().get(&peer.address).is_some_and(rests)
            && self.fabric.is_up()
    }

    fn start<'a>(
        &'a self,
        requests: &'a [TransferRequest],
        deadline: Instant,
    ) -> Result<Box<dyn InFlight + 'a>, TransferError> {
        // A part of the time is left to TCP.
        let own = Instant::now() + time_left(deadline) * 3 / 4;
        match self.send_first(requests, own, false) {
            Ok(exchange) => Ok(Box::new(Under { exchange, requests })),
            Err(error) => {
                if error.is_path_failure() {
                    self.rest(&requests[0].peer.address, &error);
                }
                Err(error)
            }
        }
    }
}

/// A frame that has been sent: requests `first..end`.
#[derive(Default)]
struct Frame {
    id: u64,
    first: usize,
    end: usize,
    /// Requests of it that could not be named, and go elsewhere.
    unnamed: Vec<usize>,
    /// Registrations that must live until the answer.
    held: Vec<Arc<Registration>>,
    /// What came into the lane's buffer and where it belongs: request, offset, slice.
    copies: Vec<(usize, usize, LocalSlice)>,
}

struct Exchange<'t> {
    transport: &'t RdmaTransport,
    /// The queue pairs go before anything they may reach.
    joined: Box<Joined>,
    lane: Lane,
    frame: Frame,
    deadline: Instant,
}

struct Under<'a> {
    exchange: Exchange<'a>,
    requests: &'a [TransferRequest],
}

impl Exchange<'_> {
    /// Sends a frame with as many requests from `first` on as fit.
    fn send(&mut self, requests: &[TransferRequest], first: usize) -> Result<(), TransferError> {
        self.frame = Frame {
            first,
            end: first,
            ..Frame::default()
        };
        let mut pieces = Vec::new();
        let mut staged = 0;
        let mut named: Vec<&TransferRequest> = Vec::new();
        for (at, r) in requests.iter().enumerate().skip(first) {
            let mine = match self.name(at, r, staged)? {
                Named::Pieces(mine, to) => {
                    staged = to;
                    mine
                }
                // A full buffer is sent; what does not fit into an empty one goes elsewhere.
                Named::NoRoom if named.is_empty() => {
                    self.frame.unnamed.push(at);
                    self.frame.end = at + 1;
                    continue;
                }
                Named::NoRoom => break,
            };
            let before = pieces.len();
            wire::encode_pieces(&mut pieces, &mine);
            if pieces.len() as u64 > wire::PIECES_BYTES_MAX {
                pieces.truncate(before);
                if named.is_empty() {
                    self.frame.unnamed.push(at);
                    self.frame.end = at + 1;
                    continue;
                }
                break;
            }
            named.push(r);
            self.frame.end = at + 1;
        }
        if named.is_empty() {
            return Ok(());
        }
        let operation = match requests[first].opcode {
            Opcode::Read => Operation::Bring,
            Opcode::Write => Operation::Fetch,
        };
        self.frame.id = crate::engine::transport::lane::next_id();
        let mut head = Vec::new();
        frame::encode_remote(&mut head, operation, self.frame.id, &named, &pieces);
        let peer = self.lane.peer.clone();
        self.lane
            .socket()?
            .write_all_from(&head, &[], Until::Deadline(self.deadline))
            .map_err(|e| TransferError::from_io(&peer, &e))
    }

    /// The pieces of one request, with the lane's buffer filled from `staged` on.
    fn name(
        &mut self,
        at: usize,
        r: &TransferRequest,
        mut staged: usize,
    ) -> Result<Named, TransferError> {
        let (copies, held) = (self.frame.copies.len(), self.frame.held.len());
        let mut pieces = Vec::with_capacity(r.local.len());
        for slice in r.local.iter().filter(|s| s.length > 0) {
            let (address, length) = (slice.pointer as u64, slice.length as u64);
            if let Some(registration) = self.transport.registration(address, length) {
                self.push(&mut pieces, &registration, address, length);
                self.frame.held.push(registration);
            } else if slice.length >= REGISTERED_ONCE {
                let registration = Arc::new(self.register_once(r.opcode, slice)?);
                self.push(&mut pieces, &registration, address, length);
                self.frame.held.push(registration);
            } else {
                if staged + slice.length > STAGING {
                    self.frame.copies.truncate(copies);
                    self.frame.held.truncate(held);
                    return Ok(Named::NoRoom);
                }
                let target = self.staging()?.memory.as_ptr().wrapping_add(staged);
                if r.opcode == Opcode::Write {
                    // SAFETY: inside the buffer; the slice is valid for reading until the transfer returns.
                    unsafe { std::ptr::copy_nonoverlapping(slice.pointer, target, slice.length) };
                } else {
                    self.frame.copies.push((at, staged, *slice));
                }
                let registration = self.staging()?.registration.clone();
                self.push(&mut pieces, &registration, target as u64, length);
                staged += slice.length;
            }
        }
        Ok(Named::Pieces(pieces, staged))
    }

    /// One piece per chunk of a registration; neighbours become one.
    fn push(&self, pieces: &mut Vec<Piece>, of: &Arc<Registration>, address: u64, length: u64) {
        let mut done = 0;
        while done < length {
            let at = address + done;
            let n = of.run(at).min(length - done);
            let keys = self
                .joined
                .ends
                .iter()
                .map(|end| end.as_ref().and_then(|e| of.rkey(e.index, at)).unwrap_or(0));
            let piece = Piece {
                address: at,
                length: n,
                keys: keys.collect(),
            };
            match pieces.last_mut() {
                Some(last) if last.address + last.length == at && last.keys == piece.keys => {
                    last.length += n;
                }
                _ => pieces.push(piece),
            }
            done += n;
        }
    }

    fn register_once(
        &self,
        opcode: Opcode,
        slice: &LocalSlice,
    ) -> Result<Registration, TransferError> {
        let access = match opcode {
            Opcode::Read => Access::Both,
            Opcode::Write => Access::Fetched,
        };
        let made = self
            .transport
            .fabric
            .register(slice.pointer, slice.length, access);
        made.map_err(|error| self.local(error.to_string()))
    }

    fn staging(&mut self) -> Result<&Staging, TransferError> {
        if self.joined.staging.is_none() {
            let memory = Memory::create("mooncake-rdma", STAGING)
                .map_err(|error| self.local(error.to_string()))?;
            let fabric = &self.transport.fabric;
            let registration = fabric
                .register(memory.as_ptr(), STAGING, Access::Both)
                .map_err(|error| self.local(error.to_string()))?;
            self.joined.staging = Some(Staging {
                registration: Arc::new(registration),
                memory,
            });
        }
        match &self.joined.staging {
            Some(staging) => Ok(staging),
            None => Err(self.local("no buffer".to_owned())),
        }
    }

    /// Something of this host stands in the way.
    fn local(&self, reason: String) -> TransferError {
        TransferError::Refused {
            peer: self.lane.peer.to_string(),
            reason,
        }
    }

    /// Takes the answer to the frame: a result for each of its requests, and the rails that were lost.
    fn receive(
        &mut self,
        requests: &[TransferRequest],
    ) -> Result<(Vec<TransferResult>, u64), TransferError> {
        let peer = self.lane.peer.clone();
        let until = Until::Deadline(self.deadline);
        let io = |e: std::io::Error| TransferError::from_io(&peer, &e);
        let wrong = |what| TransferError::Protocol {
            peer: peer.to_string(),
            what,
        };
        let frame = &self.frame;
        let count = frame.end - frame.first - frame.unnamed.len();
        let mut lost = 0;
        let mut statuses = Vec::new();
        if count > 0 {
            let socket = self.lane.socket()?;
            socket.need(HEADER_BYTES, until).map_err(io)?;
            let mut head = [0; HEADER_BYTES];
            head.copy_from_slice(socket.take(HEADER_BYTES));
            let reply = frame::decode_reply(&head).map_err(wrong)?;
            if reply.id != frame.id {
                return Err(wrong("reply to another request"));
            }
            if reply.status != Status::Ok as u8 {
                return Err(Status::result(reply.status, &peer)
                    .err()
                    .unwrap_or(wrong("status")));
            }
            if reply.items != count {
                return Err(wrong("number of items"));
            }
            lost = reply.payload_bytes;
            socket.need(count, until).map_err(io)?;
            statuses = socket.take(count).to_vec();
        }
        let mut statuses = statuses.into_iter();
        let mut results = Vec::with_capacity(frame.end - frame.first);
        for at in frame.first..frame.end {
            results.push(if frame.unnamed.contains(&at) {
                Err(TransferError::NoPath {
                    peer: requests[at].peer.name.clone(),
                })
            } else {
                Status::result(statuses.next().unwrap_or(Status::Malformed as u8), &peer)
            });
        }
        if let Some(staging) = &self.joined.staging {
            for (at, offset, slice) in &frame.copies {
                if results[at - frame.first].is_ok() {
                    let source = staging.memory.as_ptr().wrapping_add(*offset);
                    // SAFETY: inside the buffer; the slice is valid for writing until the transfer returns.
                    unsafe { std::ptr::copy_nonoverlapping(source, slice.pointer, slice.length) };
                }
            }
        }
        Ok((results, lost))
    }

    /// Gives the lane back, unless rails of it were lost: then the next one joins anew.
    fn end(mut self, lost: u64) {
        if lost != 0 {
            let peer = self.lane.peer.to_string();
            self.transport.pause_rails(&peer, &self.joined, lost);
            return;
        }
        self.lane.rider = Some(self.joined);
        self.lane.done();
    }
}

enum Named {
    /// And how far the lane's buffer is filled.
    Pieces(Vec<Piece>, usize),
    NoRoom,
}

impl InFlight for Under<'_> {
    fn finish(self: Box<Self>, results: &mut Vec<TransferResult>) {
        let Self {
            mut exchange,
            requests,
        } = *self;
        let transport = exchange.transport;
        let deadline = exchange.deadline;

        let address = &requests[0].peer.address;
        let from = results.len();
        let mut lost = 0;
        loop {
            let mut outcome = exchange.receive(requests);
            // As over TCP: an idle lane that turns out dead is no reason to fail.
            if let Err(TransferError::Broken { .. }) = outcome
                && exchange.lane.reused
                && exchange.frame.first == 0
                && Instant::now() < deadline
                && let Ok(again) = transport.send_first(requests, deadline, true)
            {
                exchange = again;
                outcome = exchange.receive(requests);
            }
            let (mut outcomes, rails) = match outcome {
                Ok(good) => good,
                Err(error) => {
                    // The queue pairs first: nothing may reach the caller's memory once this returns.
                    drop(exchange);
                    if error.is_path_failure() {
                        transport.rest(address, &error);
                    }
                    let open = requests.len() - (results.len() - from);
                    results.extend(std::iter::repeat_n(Err(error), open));
                    return;
                }
            };
            lost |= rails;
            results.append(&mut outcomes);
            let next = exchange.frame.end;
            if next >= requests.len() {
                break;
            }
            if let Err(error) = exchange.send(requests, next) {
                drop(exchange);
                let open = requests.len() - (results.len() - from);
                results.extend(std::iter::repeat_n(Err(error), open));
                return;
            }
        }
        let failed = results[from..].iter().find_map(|r| match r {
            Err(error @ TransferError::Broken { .. }) => Some(error.clone()),
            _ => None,
        });
        exchange.end(lost);
        if let Some(error) = failed {
            transport.rest(address, &error);
        }
    }
}
