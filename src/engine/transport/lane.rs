//! Pools of connected lanes and the client's half of a frame exchange. Shared by tcp, shm (Unix sockets) and rdma.

use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::frame::{self, HEADER_BYTES, Operation, Status};
use super::socket::{self, Socket, Timed, Until};
use crate::base::clock::time_left;
use crate::base::handshake::{self, LaneKind, Service};
use crate::base::id::Id128;
use crate::base::trust::ClusterKeys;
use crate::engine::batch::{LocalSlice, Opcode, TransferRequest, TransferResult};
use crate::engine::error::TransferError;

/// Most lanes to one peer; callers beyond wait for one to come back.
const LANES_PER_PEER_MAX: usize = 64;
/// Idle lanes are closed after this time, but for the one that was used last.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// The last one goes, too, after this time: what travels with it may have pinned memory.
const LAST_IDLE_MAX: Duration = Duration::from_secs(600);
/// How often whoever takes a lane looks for idle ones.
const SWEEP_EVERY: Duration = Duration::from_secs(10);
/// How long a peer that could not be reached is not tried again.
const REST_AFTER_FAILURE: Duration = Duration::from_millis(300);

/// Who we are towards peers.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) client: Id128,
    pub(crate) keys: ClusterKeys,
    pub(crate) service: Service,
    pub(crate) connect_timeout: Duration,
}

/// Lanes of all peers of one transport, by address. It keeps what is in use and what was used lately: idle lanes go with
/// their age, those of peers that have left the pool at once ([`LanePool::keep_only`]). Nobody sweeps while nobody takes a
/// lane: there is no thread for it.
pub(crate) struct LanePool {
    identity: Identity,
    connect: fn(&str, Duration) -> std::io::Result<Socket>,
    peers: Mutex<Peers>,
}

struct Peers {
    by_address: HashMap<String, Arc<PeerLanes>>,
    swept: Instant,
}

#[derive(Default)]
struct PeerLanes {
    state: Mutex<PeerState>,
    returned: Condvar,
}

#[derive(Default)]
struct PeerState {
    /// The one that came back last is last, and is taken first.
    idle: Vec<Idle>,
    open: usize,
    failed: Option<(Instant, TransferError)>,
}

/// A lane that nobody uses. The rider goes before the lane does.
struct Idle {
    rider: Option<Rider>,
    socket: Socket,
    since: Instant,
}

impl PeerState {
    /// Takes out what has been idle for too long.
    fn outdated(&mut self, now: Instant) -> Vec<Idle> {
        let age = |idle: &Idle| now.saturating_duration_since(idle.since);
        let mut count = self.idle.partition_point(|idle| age(idle) >= IDLE_MAX);
        if count == self.idle.len() && self.idle.last().is_some_and(|i| age(i) < LAST_IDLE_MAX) {
            count -= 1;
        }
        self.open -= count;
        self.idle.drain(..count).collect()
    }

    fn take_idle(&mut self) -> Vec<Idle> {
        self.open -= self.idle.len();
        std::mem::take(&mut self.idle)
    }

    fn is_unused(&self) -> bool {
        let rests = |(at, _): &(Instant, TransferError)| at.elapsed() < REST_AFTER_FAILURE;
        self.open == 0 && !self.failed.as_ref().is_some_and(rests)
    }
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
            peers: Mutex::new(Peers {
                by_address: HashMap::new(),
                swept: Instant::now(),
            }),
        }
    }

    /// Closes what has been idle for too long, and forgets peers without a lane.
    fn sweep(&self, now: Instant) {
        let mut old = Vec::new();
        {
            let mut peers = self.peers.lock();
            peers.swept = now;
            peers.by_address.retain(|_, home| {
                let mut state = home.state.lock();
                old.extend(state.outdated(now));
                // Whoever is about to open a lane holds the home.
                !state.is_unused() || Arc::strong_count(home) > 1
            });
        }
        // Without the locks: to close one with queue pairs takes time.
        drop(old);
    }

    /// Closes the idle lanes of every address that does not live any more; those in use are closed when they come back.
    pub(crate) fn keep_only(&self, lives: impl Fn(&str) -> bool) {
        let mut gone = Vec::new();
        self.peers.lock().by_address.retain(|address, home| {
            let stays = lives(address);
            if !stays {
                gone.push(home.clone());
            }
            stays
        });
        for home in gone {
            let idle = home.state.lock().take_idle();
            drop(idle);
        }
    }

    /// A lane to `address`: an idle one, else a new one. `fresh` skips and closes the idle ones.
    pub(crate) fn take(
        &self,
        address: &str,
        deadline: Instant,
        fresh: bool,
    ) -> Result<Lane, TransferError> {
        let home = self.home(address, Instant::now());
        let timeout = || TransferError::Timeout {
            peer: address.to_owned(),
        };
        if fresh {
            let old = home.state.lock().take_idle();
            drop(old);
        }
        {
            let mut state = home.state.lock();
            loop {
                if let Some(idle) = state.idle.pop() {
                    return Ok(Lane {
                        socket: Some(idle.socket),
                        home: home.clone(),
                        peer: address.into(),
                        reused: true,
                        rider: idle.rider,
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

    fn home(&self, address: &str, now: Instant) -> Arc<PeerLanes> {
        let (home, due) = {
            let mut peers = self.peers.lock();
            let due = now.saturating_duration_since(peers.swept) >= SWEEP_EVERY;
            let home = match peers.by_address.get(address) {
                Some(home) => home.clone(),
                None => {
                    let home = Arc::<PeerLanes>::default();
                    peers.by_address.insert(address.to_owned(), home.clone());
                    home
                }
            };
            (home, due)
        };
        if due {
            self.sweep(now);
        }
        home
    }

    fn open(&self, address: &str, deadline: Instant) -> Result<Socket, TransferError> {
        let timeout = self.identity.connect_timeout.min(time_left(deadline));
        let mut socket =
            (self.connect)(address, timeout).map_err(|e| TransferError::from_io(address, &e))?;
        let mut timed = Timed {
            socket: &mut socket,
            deadline: Instant::now() + timeout,
        };
        handshake::connect_to(
            &mut timed,
            LaneKind::Data,
            self.identity.service,
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
            let idle = Idle {
                rider: self.rider.take(),
                socket,
                since: Instant::now(),
            };
            self.home.state.lock().idle.push(idle);
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
    let bytes: u64 = requests.iter().map(|r| r.length).sum();
    if bytes <= socket::WATCHED_BYTES_MAX {
        socket.watch(since);
    }
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

#[cfg(test)]
mod tests {
    use super::super::server::{DataServer, LANE_STACK};
    use super::super::tcp::connect;
    use super::*;
    use crate::engine::host::{Noted, NotifyOrigin, NotifySink, SegmentHost};

    struct Nobody;
    impl NotifySink for Nobody {
        fn notify(&self, _: NotifyOrigin, _: &[u8]) -> Noted {
            Noted::Taken
        }
        fn shared_writer(&self, _: Id128, _: i32) {}
    }

    fn server() -> DataServer {
        let keys = ClusterKeys::derive(None);
        let host = Arc::new(SegmentHost::new(Id128::random(), keys, Arc::new(Nobody)));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        DataServer::start(Service::Node, host, listener, 64, LANE_STACK, None).unwrap()
    }

    fn pool() -> LanePool {
        let identity = Identity {
            client: Id128::random(),
            keys: ClusterKeys::derive(None),
            service: Service::Any,
            connect_timeout: Duration::from_secs(5),
        };
        LanePool::new(identity, connect)
    }

    fn take(pool: &LanePool, server: &DataServer) -> Lane {
        let deadline = Instant::now() + Duration::from_secs(10);
        let address = server.address().to_string();
        pool.take(&address, deadline, false).unwrap()
    }

    /// The server hears of a closed lane a moment later.
    fn settles(server: &DataServer, lanes: usize) {
        let until = Instant::now() + Duration::from_secs(10);
        while server.lanes() != lanes {
            assert!(Instant::now() < until, "{} lanes", server.lanes());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn idle_lanes_go_with_their_age_and_the_last_of_a_peer_later() {
        let (pool, a, b) = (pool(), server(), server());
        let lanes: Vec<Lane> = (0..5).map(|_| take(&pool, &a)).collect();
        lanes.into_iter().for_each(Lane::done);
        take(&pool, &b).done();
        let busy = take(&pool, &b);
        let now = Instant::now();
        pool.sweep(now + IDLE_MAX / 2);
        assert_eq!((a.lanes(), b.lanes()), (5, 1));
        pool.sweep(now + IDLE_MAX * 2);
        settles(&a, 1);
        pool.sweep(now + LAST_IDLE_MAX * 2);
        settles(&a, 0);
        // What is in use stays, and so does its peer.
        assert_eq!(b.lanes(), 1);
        assert_eq!(pool.peers.lock().by_address.len(), 1);
        busy.done();
        assert!(take(&pool, &b).reused);
    }

    #[test]
    fn lanes_and_riders_of_peers_that_have_left_go_at_once() {
        let (pool, a, b) = (pool(), server(), server());
        let rider = Arc::new(());
        let mut lanes: Vec<Lane> = (0..4).map(|_| take(&pool, &a)).collect();
        for lane in &mut lanes {
            lane.rider = Some(Box::new(rider.clone()));
        }
        let in_use = lanes.pop().unwrap();
        lanes.into_iter().for_each(Lane::done);
        take(&pool, &b).done();
        let stays = b.address().to_string();
        pool.keep_only(|address| address == stays);
        settles(&a, 1);
        assert_eq!(Arc::strong_count(&rider), 2, "the one in use");
        in_use.done();
        settles(&a, 0);
        assert_eq!(Arc::strong_count(&rider), 1);
        assert_eq!(b.lanes(), 1);
        assert!(take(&pool, &b).reused);
        // It may come back.
        assert!(!take(&pool, &a).reused);
    }
}
