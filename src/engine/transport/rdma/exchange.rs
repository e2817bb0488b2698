//! One lane's worth of a transfer by RDMA: frames that name pieces of the caller's memory, and their answers.
//!
//! Owns what must live until an answer is there, and the order in which it goes: queue pairs before memory. Refuses to know
//! which peers are worth trying.

use std::io::Read;
use std::sync::Arc;
use std::time::Instant;

use super::client::{Joined, RdmaTransport, STAGING, Staging};
use super::registration::{Access, Registration};
use super::wire::{self, Piece};
use crate::engine::batch::{LocalSlice, Opcode, TransferRequest, TransferResult};
use crate::engine::error::TransferError;
use crate::engine::memory::Memory;
use crate::engine::transport::frame::{self, HEADER_BYTES, Operation, Status};
use crate::engine::transport::lane::{Lane, next_id};
use crate::engine::transport::socket::{Timed, Until};

/// Slices of unregistered memory from this size on are registered for one transfer instead of copied.
const REGISTERED_ONCE: usize = 256 << 10;

/// Sends a join and takes its answer.
pub(super) fn exchange_join(
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
        return Err(refused(wire::NOT_SERVED));
    }
    let mut answer = vec![0; reply.payload_bytes as usize];
    timed.read_exact(&mut answer).map_err(io)?;
    Ok(answer)
}

/// A frame that has been sent: requests `first..end`.
#[derive(Default)]
pub(super) struct Frame {
    pub(super) id: u64,
    pub(super) first: usize,
    pub(super) end: usize,
    /// Requests of it that could not be named, and go elsewhere, in order.
    pub(super) unnamed: Vec<usize>,
    /// Registrations that must live until the answer.
    pub(super) held: Vec<Arc<Registration>>,
    /// What came into the lane's buffer and where it belongs: request, offset, slice.
    pub(super) copies: Vec<(usize, usize, LocalSlice)>,
}

/// A lane in use. The queue pairs go before anything they may reach.
pub(super) struct Exchange<'t> {
    pub(super) transport: &'t RdmaTransport,
    pub(super) joined: Box<Joined>,
    pub(super) lane: Lane,
    pub(super) frame: Frame,
    pub(super) deadline: Instant,
}

impl Exchange<'_> {
    /// Sends a frame with as many requests from `first` on as fit.
    pub(super) fn send(
        &mut self,
        requests: &[TransferRequest],
        first: usize,
    ) -> Result<(), TransferError> {
        self.frame = Frame {
            first,
            end: first,
            ..Frame::default()
        };
        let mut pieces = Vec::new();
        let mut staged = 0;
        let mut named: Vec<&TransferRequest> = Vec::new();
        for (at, r) in requests.iter().enumerate().skip(first) {
            let (copies, held) = (self.frame.copies.len(), self.frame.held.len());
            let mine = match self.name(at, r, staged)? {
                Named::Pieces(mine, to) => {
                    staged = to;
                    mine
                }
                // Memory that no NIC reaches: it goes elsewhere, and nothing is said of the peer.
                Named::Unreachable => {
                    self.frame.copies.truncate(copies);
                    self.frame.held.truncate(held);
                    self.frame.unnamed.push(at);
                    self.frame.end = at + 1;
                    continue;
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
                self.frame.copies.truncate(copies);
                self.frame.held.truncate(held);
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
        self.frame.id = next_id();
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
                let Ok(registration) = self.register_once(r.opcode, slice) else {
                    return Ok(Named::Unreachable);
                };
                let registration = Arc::new(registration);
                self.push(&mut pieces, &registration, address, length);
                self.frame.held.push(registration);
            } else {
                if staged + slice.length > STAGING {
                    self.frame.copies.truncate(copies);
                    self.frame.held.truncate(held);
                    return Ok(Named::NoRoom);
                }
                let Ok(staging) = self.staging() else {
                    return Ok(Named::Unreachable);
                };
                let target = staging.memory.as_ptr().wrapping_add(staged);
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
    pub(super) fn receive(
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
            let since = Instant::now();
            socket.watch(since);
            socket.need(HEADER_BYTES, until).map_err(io)?;
            socket.heard(since);
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
        let mine = requests.iter().enumerate();
        for (at, r) in mine.take(frame.end).skip(frame.first) {
            results.push(if frame.unnamed.binary_search(&at).is_ok() {
                Err(TransferError::NoPath {
                    peer: r.peer.name.clone(),
                })
            } else {
                Status::result(statuses.next().unwrap_or(Status::Malformed as u8), &peer)
            });
        }
        if let Some(staging) = &self.joined.staging {
            for (at, offset, slice) in &frame.copies {
                if results.get(at - frame.first).is_some_and(Result::is_ok) {
                    let source = staging.memory.as_ptr().wrapping_add(*offset);
                    // SAFETY: inside the buffer; the slice is valid for writing until the transfer returns.
                    unsafe { std::ptr::copy_nonoverlapping(source, slice.pointer, slice.length) };
                }
            }
        }
        Ok((results, lost))
    }

    /// Gives the lane back, unless rails of it were lost: then the next one joins anew.
    pub(super) fn end(mut self, lost: u64) {
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
    /// A slice of it cannot be registered.
    Unreachable,
}
