//! Pools of connected lanes and the client's half of a frame exchange. Shared by tcp, shm (Unix sockets) and rdma.

use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::frame::{self, HEADER_BYTES, Operation, Status};
use super::socket::{Socket, Timed, Until};
use crate::base::clock::time_left;
use crate::base::handshake::{self, LaneKind};
use crate::base::id::Id128;
use crate::base::trust::ClusterKeys;
use crate::engine::batch::{LocalSlice, Opcode, TransferRequest, TransferResult};
use crate::engine::error::TransferError;

/// Most lanes to one peer; callers beyond wait for one to come back.
const LANES_PER_PEER_MAX: usize = 64;
/// How long a peer that could not be reached is not tried again.
const REST_AFTER_FAILURE: Duration = Duration::from_millis(300);

/// Who we are towards peers.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) client: Id128,
    pub(crate) keys: ClusterKeys,
    pub(crate) connect_timeout: Duration,
}

/// Lanes of all peers of one transport, by address.
pub(crate) struct LanePool {
    identity: Identity,
    connect: fn(&str, Duration) -> std::io::Result<Socket>,
    peers: Mutex<HashMap<String, Arc<PeerLanes>>>,
}

#[derive(Default)]
struct PeerLanes {
    state: Mutex<PeerState>,
    returned: Condvar,
}

#[derive(Default)]
struct PeerState {
    idle: Vec<(Socket, Option<Rider>)>,
    open: usize,
    failed: Option<(Instant, TransferError)>,
}

/// What a transport keeps with a lane; it goes before the lane does.
pub(crate) type Rider = Box<dyn Any + Send + Sync>;

/// A lane in use; goes back to the pool by [`Lane::done`], closes when dropped.
pub(crate) struct Lane {
    pub(crate) socket: Option<Socket>,
    home: Arc<PeerLanes>,
    pub(crate) peer: Arc<str>,
    /// Taken from the pool rather than newly connected: it may have died meanwhile.
    pub(crate) reused: bool,
    pub(crate) rider: Option<Rider>,
    /// Whether the pool has it back.
    returned: bool,
}

impl LanePool {
    pub(crate) fn new(
        identity: Identity,
        connect: fn(&str, Duration) -> std::io::Result<Socket>,
    ) -> Self {
        Self {
            identity,
            connect,
            peers: Mutex::default(),
        }
    }

    /// A lane to `address`: an idle one, else a new one. `fresh` skips and closes the idle ones.
    pub(crate) fn take(
        &self,
        address: &str,
        deadline: Instant,
        fresh: bool,
    ) -> Result<Lane, TransferError> {
        let home = {
            let mut peers = self.peers.lock();
            match peers.get(address) {
                Some(home) => home.clone(),
                None => peers.entry(address.to_owned()).or_default().clone(),
            }
        };
        let timeout = || TransferError::Timeout {
            peer: address.to_owned(),
        };
        if fresh {
            let old = {
                let mut state = home.state.lock();
                state.open -= state.idle.len();
                std::mem::take(&mut state.idle)
            };
            for (socket, rider) in old {
                drop(rider);
                drop(socket);
            }
        }
        {
            let mut state = home.state.lock();
            loop {
                if let Some((socket, rider)) = state.idle.pop() {
                    return Ok(Lane {
                        socket: Some(socket),
                        home: home.clone(),
                        peer: address.into(),
                        reused: true,
                        rider,
                        returned: false,
                    });
                }
                if let Some((at, error)) = &state.failed {
                    if at.elapsed() < REST_AFTER_FAILURE {
                        return Err(error.clone());
                    }
                    state.failed = None;
                }
                if state.open < LANES_PER_PEER_MAX {
                    state.open += 1;
                    break;
                }
                if home.returned.wait_until(&mut state, deadline).timed_out() {
                    return Err(timeout());
                }
            }
        }
        let mut lane = Lane {
            socket: None,
            home,
            peer: address.into(),
            reused: false,
            rider: None,
            returned: false,
        };
        match self.open(address, deadline) {
            Ok(socket) => {
                lane.socket = Some(socket);
                Ok(lane)
            }
            Err(error) => {
                lane.home.state.lock().failed = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }

    fn open(&self, address: &str, deadline: Instant) -> Result<Socket, TransferError> {
        let timeout = self.identity.connect_timeout.min(time_left(deadline));
        let mut socket =
            (self.connect)(address, timeout).map_err(|e| TransferError::from_io(address, &e))?;
        let mut timed = Timed {
            socket: &mut socket,
            deadline: Instant::now() + timeout,
        };
        handshake::connect(
            &mut timed,
            LaneKind::Data,
            self.identity.client,
            &self.identity.keys,
        )
        .map_err(|e| TransferError::from_handshake(address, &e))?;
        Ok(socket)
    }
}

impl Lane {
    /// Returns the lane to its pool: every byte of the exchange has been read.
    pub(crate) fn done(mut self) {
        if let Some(mut socket) = self.socket.take() {
            self.returned = true;
            socket.shrink();
            let mut state = self.home.state.lock();
            state.idle.push((socket, self.rider.take()));
            self.home.returned.notify_one();
        }
    }

    pub(crate) fn socket(&mut self) -> Result<&mut Socket, TransferError> {
        self.socket.as_mut().ok_or(TransferError::Invalid {
            what: "the lane is closed",
        })
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if self.returned {
            return;
        }
        drop(self.rider.take());
        if let Some(socket) = self.socket.take() {
            socket.shutdown();
        }
        let mut state = self.home.state.lock();
        state.open = state.open.saturating_sub(1);
        self.home.returned.notify_one();
    }
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// A number for a request.
pub(crate) fn next_id() -> u64 {
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}

/// Sends a request frame; returns its id.
pub(crate) fn send(
    lane: &mut Lane,
    operation: Operation,
    requests: &[TransferRequest],
    with_data: bool,
    with_word: bool,
    deadline: Instant,
) -> Result<u64, TransferError> {
    let id = next_id();
    let mut head = Vec::with_capacity(HEADER_BYTES + requests.len() * (frame::ITEM_BYTES + 64));
    frame::encode_request(&mut head, operation, id, requests, with_data, with_word);
    if requests.len() > frame::ITEMS_MAX || head.len() > frame::META_BYTES_MAX {
        return Err(TransferError::Invalid {
            what: "more requests than one frame may carry",
        });
    }
    let sources: smallvec::SmallVec<[LocalSlice; 8]> = if operation == Operation::Write && with_data
    {
        requests
            .iter()
            .flat_map(|r| r.local.iter().copied())
            .collect()
    } else {
        smallvec::SmallVec::new()
    };
    let peer = lane.peer.clone();
    lane.socket()?
        .write_all_from(&head, &sources, Until::Deadline(deadline))
        .map_err(|e| TransferError::from_io(&peer, &e))?;
    Ok(id)
}

/// Receives the reply to frame `id`: statuses, the payload of a read straight into the local slices, statuses after.
pub(crate) fn receive(
    lane: &mut Lane,
    id: u64,
    requests: &[TransferRequest],
    deadline: Instant,
) -> Result<Vec<TransferResult>, TransferError> {
    let peer = lane.peer.clone();
    let until = Until::Deadline(deadline);
    let io = |e: std::io::Error| TransferError::from_io(&peer, &e);
    let wrong = |what| TransferError::Protocol {
        peer: peer.to_string(),
        what,
    };
    let socket = lane.socket()?;
    let since = Instant::now();
    socket.watch(since);
    socket.need(HEADER_BYTES, until).map_err(io)?;
    socket.heard(since);
    let mut head = [0; HEADER_BYTES];
    head.copy_from_slice(socket.take(HEADER_BYTES));
    let reply = frame::decode_reply(&head).map_err(wrong)?;
    if reply.id != id {
        return Err(wrong("reply to another request"));
    }
    if reply.status != Status::Ok as u8 {
        return Err(Status::result(reply.status, &peer)
            .err()
            .unwrap_or(wrong("status")));
    }
    if reply.items != requests.len() {
        return Err(wrong("number of items"));
    }
    socket.need(reply.items, until).map_err(io)?;
    let mut results: Vec<TransferResult> = socket
        .take(reply.items)
        .iter()
        .map(|s| Status::result(*s, &peer))
        .collect();
    let is_read = requests.first().is_some_and(|r| r.opcode == Opcode::Read);
    if !is_read {
        return Ok(results);
    }
    let targets: smallvec::SmallVec<[LocalSlice; 8]> = requests
        .iter()
        .zip(&results)
        .filter(|(_, result)| result.is_ok())
        .flat_map(|(r, _)| r.local.iter().copied())
        .collect();
    let expected: u64 = targets.iter().map(|t| t.length as u64).sum();
    if reply.payload_bytes != expected {
        return Err(wrong("length of the payload"));
    }
    socket.read_into(&targets, until).map_err(io)?;
    socket.need(reply.items, until).map_err(io)?;
    for (result, after) in results.iter_mut().zip(socket.take(reply.items)) {
        if result.is_ok() {
            *result = Status::result(*after, &peer);
        }
    }
    Ok(results)
}
