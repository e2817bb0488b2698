//! Shared memory of a node on this host: its segments are mapped once, bytes are copied once, in the caller's thread.
//!
//! Over a Unix socket come the descriptors, and go small writes whole. A large write is *recorded* with the node first (so
//! that the node knows whose range it is), then copied here, then published by the node: both ends pass its gate, so that
//! a write that a new master has fenced off is never published.
//! A mapping gives access to the whole segment; the node hands it only to its own user or root holding the cluster token.

use std::collections::HashMap;
use std::io::{IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use super::frame::{self, HEADER_BYTES, Operation, Status};
use super::lane::{self, Identity, Lane, LanePool};
use super::loopback::{copy_in, copy_out};
use super::socket::{Socket, Timed};
use super::{InFlight, Transport, TransportKind};
use crate::engine::batch::{Opcode, Peer, TransferRequest, TransferResult};
use crate::engine::error::TransferError;
use crate::engine::grant::Grant;
use crate::engine::memory::Memory;

/// Writes up to this go through the socket: one exchange instead of two.
const INLINE_BYTES: u64 = 256 << 10;
/// How long a peer that could not be mapped is left to other transports.
const REST_AFTER_FAILURE: Duration = Duration::from_secs(5);

type SegmentName = (u32, u64);

/// Maps same-host segments.
pub struct ShmTransport {
    lanes: LanePool,
    host_id: String,
    mapped: RwLock<HashMap<SegmentName, Arc<Mapped>>>,
    resting: Mutex<HashMap<String, Instant>>,
}

/// A mapped segment. Its anchor lane stays open as long as the mapping: the node takes its closing as the proof that
/// this process can no longer write there.
struct Mapped {
    memory: Arc<Memory>,
    anchor: Lane,
}

fn connect(address: &str, _timeout: Duration) -> std::io::Result<Socket> {
    Socket::connect_unix(address)
}

impl ShmTransport {
    pub(crate) fn new(identity: Identity, host_id: String) -> Self {
        Self {
            lanes: LanePool::new(identity, connect),
            host_id,
            mapped: RwLock::default(),
            resting: Mutex::default(),
        }
    }

    fn mapping(
        &self,
        peer: &Peer,
        segment: u32,
        incarnation: u64,
        deadline: Instant,
    ) -> Result<Arc<Mapped>, TransferError> {
        if let Some(found) = self.mapped.read().get(&(segment, incarnation)) {
            return Ok(found.clone());
        }
        // Without the map's lock: a node that does not answer must not hold up the others.
        let attached = self.attach(peer, segment, incarnation, deadline);
        if let Err(error) = &attached
            && error.is_path_failure()
        {
            let mut resting = self.resting.lock();
            resting.insert(peer.shm_socket.clone(), Instant::now());
        }
        let attached = attached?;
        self.forget_dead();
        let mut mapped = self.mapped.write();
        // Two threads may have attached: the first stays.
        let found = mapped
            .entry((segment, incarnation))
            .or_insert_with(|| Arc::new(attached));
        Ok(found.clone())
    }

    /// Segments whose node has closed the anchor are gone. Others stay mapped whatever is known of their node: the anchor
    /// must not close while anybody may still write there.
    fn forget_dead(&self) {
        let lives = |m: &Mapped| m.anchor.socket.as_ref().is_some_and(|s| !s.is_spent());
        let mut dead = Vec::new();
        self.mapped.write().retain(|_, m| {
            let stays = lives(m);
            if !stays {
                dead.push(m.clone());
            }
            stays
        });
        // Unmapped without the lock.
        drop(dead);
    }

    fn attach(
        &self,
        peer: &Peer,
        segment: u32,
        incarnation: u64,
        deadline: Instant,
    ) -> Result<Mapped, TransferError> {
        let address = peer.shm_socket.as_str();
        let broken = |reason: String| TransferError::Broken {
            peer: address.to_owned(),
            reason,
        };
        let mut lane = self.lanes.take(address, deadline, true)?;
        let grant = Grant {
            segment,
            incarnation,
            offset: 0,
            length: 0,
            term: 0,
            expires_unix_ms: 0,
            mac: [0; 16],
        };
        let request = TransferRequest {
            opcode: Opcode::Read,
            peer: Arc::new(peer.clone()),
            grant,
            offset: 0,
            length: 0,
            local: smallvec::SmallVec::new(),
            word: None,
            notify: Vec::new(),
        };
        lane::send(
            &mut lane,
            Operation::Attach,
            &[request],
            false,
            false,
            deadline,
        )?;
        let (head, fd) = receive_fd(lane.socket()?, deadline)
            .map_err(|e| TransferError::from_io(address, &e))?;
        let reply = frame::decode_reply(&head).map_err(|what| TransferError::Protocol {
            peer: address.to_owned(),
            what,
        })?;
        if reply.status != Status::Ok as u8 {
            return Err(Status::result(reply.status, address)
                .err()
                .unwrap_or(TransferError::Stale));
        }
        let fd = fd.ok_or_else(|| broken("no descriptor came with the reply".to_owned()))?;
        let memory =
            Memory::from_fd(fd, reply.payload_bytes as usize).map_err(|e| broken(e.to_string()))?;
        Ok(Mapped {
            memory: Arc::new(memory),
            anchor: lane,
        })
    }
}

fn receive_fd(
    socket: &mut Socket,
    deadline: Instant,
) -> std::io::Result<([u8; HEADER_BYTES], Option<OwnedFd>)> {
    let mut head = [0; HEADER_BYTES];
    let mut received = None;
    let have = loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut vectors = [IoSliceMut::new(&mut head)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        match rustix::net::recvmsg(socket.fd(), &mut vectors, &mut ancillary, flags) {
            Ok(message) => {
                for part in ancillary.drain() {
                    if let RecvAncillaryMessage::ScmRights(fds) = part {
                        received = fds.into_iter().next().or(received);
                    }
                }
                break message.bytes;
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if Instant::now() < deadline => {}
            Err(Errno::AGAIN) => return Err(std::io::ErrorKind::TimedOut.into()),
            Err(e) => return Err(e.into()),
        }
    };
    Timed { socket, deadline }.read_exact(&mut head[have..])?;
    Ok((head, received))
}

impl Transport for ShmTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Shm
    }

    fn reaches(&self, peer: &Peer) -> bool {
        !peer.shm_socket.is_empty()
            && peer.host_id == self.host_id
            && self
                .resting
                .lock()
                .get(&peer.shm_socket)
                .is_none_or(|at| at.elapsed() >= REST_AFTER_FAILURE)
    }

    fn start<'a>(
        &'a self,
        requests: &'a [TransferRequest],
        deadline: Instant,
    ) -> Result<Box<dyn InFlight + 'a>, TransferError> {
        let peer = &requests[0].peer;
        let mut mappings: smallvec::SmallVec<[Arc<Mapped>; 2]> = smallvec::SmallVec::new();
        for r in requests {
            mappings.push(self.mapping(peer, r.grant.segment, r.grant.incarnation, deadline)?);
        }
        let recording = if requests[0].opcode == Opcode::Write {
            let total: u64 = requests
                .iter()
                .filter(|r| r.has_data())
                .map(|r| r.length)
                .sum();
            let inline = total <= INLINE_BYTES;
            let mut lane = self.lanes.take(&peer.shm_socket, deadline, false)?;
            let send = |lane: &mut Lane| {
                lane::send(lane, Operation::Write, requests, inline, inline, deadline)
            };
            let id = match send(&mut lane) {
                Err(e) if lane.reused && e.is_path_failure() => {
                    lane = self.lanes.take(&peer.shm_socket, deadline, true)?;
                    send(&mut lane)?
                }
                other => other?,
            };
            Some(Recording { lane, id, inline })
        } else {
            None
        };
        Ok(Box::new(Copying {
            requests,
            mappings,
            recording,
            deadline,
        }))
    }

    fn map(&self, peer: &Peer, segment: u32, incarnation: u64) -> Option<Arc<Memory>> {
        if !self.reaches(peer) {
            return None;
        }
        let deadline = Instant::now() + Duration::from_secs(2);
        let mapped = self.mapping(peer, segment, incarnation, deadline).ok()?;
        Some(mapped.memory.clone())
    }

    fn mapped(&self, peer: &Peer, segment: u32, incarnation: u64) -> Option<Arc<Memory>> {
        if peer.host_id != self.host_id {
            return None;
        }
        let mapped = self.mapped.read();
        Some(mapped.get(&(segment, incarnation))?.memory.clone())
    }

    fn lives(&self, _peer: &Peer, segment: u32, incarnation: u64) -> bool {
        let mapped = self.mapped.read();
        let mapped = mapped.get(&(segment, incarnation));
        let open = |m: &Arc<Mapped>| m.anchor.socket.as_ref().is_some_and(|s| !s.is_spent());
        mapped.is_some_and(open)
    }

    fn keep_only(&self, peers: &[Arc<Peer>]) {
        let lives = |socket: &str| peers.iter().any(|p| p.shm_socket == socket);
        self.lanes.keep_only(lives);
        self.resting.lock().retain(|socket, _| lives(socket));
        self.forget_dead();
    }
}

struct Recording {
    lane: Lane,
    id: u64,
    /// The data went with it.
    inline: bool,
}

struct Copying<'a> {
    requests: &'a [TransferRequest],
    mappings: smallvec::SmallVec<[Arc<Mapped>; 2]>,
    recording: Option<Recording>,
    deadline: Instant,
}

impl InFlight for Copying<'_> {
    fn finish(mut self: Box<Self>, results: &mut Vec<TransferResult>) {
        let outcomes = match self.recording.take() {
            None => self.read(),
            Some(recording) => self
                .write(recording)
                .unwrap_or_else(|error| self.requests.iter().map(|_| Err(error.clone())).collect()),
        };
        results.extend(outcomes);
    }
}

impl Copying<'_> {
    fn read(&self) -> Vec<TransferResult> {
        let pairs = self.requests.iter().zip(&self.mappings);
        let copy = |(r, m): (&TransferRequest, &Arc<Mapped>)| {
            // A small read of a known object must stay a copy and nothing else.
            if r.length >= 32 << 10 {
                m.memory.touch(r.offset, r.length);
            }
            copy_out(&m.memory, r)
        };
        pairs.map(copy).collect()
    }

    fn write(&self, recording: Recording) -> Result<Vec<TransferResult>, TransferError> {
        let Recording {
            mut lane,
            id,
            inline,
        } = recording;
        let mut results = lane::receive(&mut lane, id, self.requests, self.deadline)?;
        if inline {
            lane.done();
            return Ok(results);
        }
        // Only what the node has recorded is copied: from then on it reports the range as ours to every master, so that
        // nobody else is given it however long the copy takes.
        let mut publish = Vec::new();
        for (index, (r, m)) in self.requests.iter().zip(&self.mappings).enumerate() {
            if results[index].is_ok() {
                m.memory.touch(r.offset, r.length);
                results[index] = copy_in(&m.memory, r);
            }
            if results[index].is_ok() && r.word.is_some() {
                publish.push(index);
            }
        }
        if !publish.is_empty() {
            let requests: Vec<TransferRequest> = publish
                .iter()
                .map(|index| TransferRequest {
                    local: smallvec::SmallVec::new(),
                    notify: Vec::new(),
                    ..self.requests[*index].clone()
                })
                .collect();
            let id = lane::send(
                &mut lane,
                Operation::Write,
                &requests,
                false,
                true,
                self.deadline,
            )?;
            let published = lane::receive(&mut lane, id, &requests, self.deadline)?;
            for (index, outcome) in publish.into_iter().zip(published) {
                results[index] = outcome;
            }
        }
        lane.done();
        Ok(results)
    }
}
