//! The caller's side: joins lanes, names the pieces of its memory, and lets the node's NIC do the rest.
//!
//! Memory that was registered once is named as it is. Of other memory large slices are registered for one transfer, and
//! small ones go through a registered buffer of the lane. Before a transfer returns, the node has answered or the queue
//! pairs are gone: nobody touches the caller's memory afterwards.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use super::endpoint::Endpoint;
use super::exchange::{Exchange, Frame, exchange_join};
use super::fabric::Fabric;
use super::registration::{Access, Registration};
use super::wire::{self, End};
use crate::base::clock::time_left;
use crate::engine::batch::{Peer, TransferRequest, TransferResult};
use crate::engine::error::TransferError;
use crate::engine::memory::Memory;
use crate::engine::transport::lane::{Identity, Lane, LanePool};
use crate::engine::transport::tcp::connect;
use crate::engine::transport::{InFlight, Transport, TransportKind};

/// The lane's buffer for smaller ones.
pub(super) const STAGING: usize = 4 << 20;
/// How long bringing the queue pairs up may take.
const JOIN: Duration = Duration::from_secs(3);
/// How long a caller waits for memory it registers. It goes on in the background.
const REGISTRATION: Duration = Duration::from_secs(60);
/// How long a peer that is still registering its memory is left alone.
const SOON: Duration = Duration::from_secs(2);
/// How long a peer without RDMA is.
const LONG: Duration = Duration::from_secs(600);
/// Peers and rails remembered as resting.
const RESTING_MAX: usize = 4096;

/// The client side of RDMA.
pub struct RdmaTransport {
    lanes: LanePool,
    pub(super) fabric: Arc<Fabric>,
    registered: RwLock<BTreeMap<u64, Arc<Registration>>>,
    /// Peers, and until when they are left to TCP.
    resting: Mutex<HashMap<String, Instant>>,
    /// Devices towards a peer, likewise.
    paused: Mutex<HashMap<(String, usize), Instant>>,
}

/// What travels with a lane: its queue pairs and its buffer.
pub(super) struct Joined {
    /// By rail; none where the node has no end for it.
    pub(super) ends: Vec<Option<Endpoint>>,
    pub(super) staging: Option<Staging>,
}

pub(super) struct Staging {
    /// Before the memory.
    pub(super) registration: Arc<Registration>,
    pub(super) memory: Memory,
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

    /// [`RdmaTransport::register`] of memory that this process serves, too: registered once for both.
    pub(crate) fn register_memory(&self, memory: &Arc<Memory>) {
        let until = Instant::now() + REGISTRATION;
        // Why it was not, the fabric has said.
        if let Ok(registration) = self.fabric.served(memory, Access::Both, until) {
            let mut registered = self.registered.write();
            registered.insert(memory.as_ptr() as u64, registration);
        }
    }

    /// Takes a registration back. Transfers under way keep theirs.
    pub fn unregister(&self, base: *mut u8) {
        self.registered.write().remove(&(base as u64));
    }

    pub(super) fn registration(&self, address: u64, length: u64) -> Option<Arc<Registration>> {
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
        let pause = if text.contains(wire::NOT_YET) {
            SOON
        } else if text.contains(wire::NOT_SERVED) {
            LONG
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
            // What passes by itself is no fault.
            let passing = pause == SOON || pause == LONG;
            let line = format!(
                "rdma to {peer} is not used for {} s, TCP is: {text}",
                pause.as_secs()
            );
            if passing {
                tracing::info!("{line}");
            } else {
                tracing::warn!("{line}");
            }
        }
    }

    pub(super) fn pause_rails(&self, peer: &str, joined: &Joined, lost: u64) {
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

    fn keep_only(&self, peers: &[Arc<Peer>]) {
        let lives = |address: &str| peers.iter().any(|p| p.address == address);
        self.lanes.keep_only(lives);
        self.resting.lock().retain(|address, _| lives(address));
        self.paused.lock().retain(|(address, _), _| lives(address));
    }
}

struct Under<'a> {
    exchange: Exchange<'a>,
    requests: &'a [TransferRequest],
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
            {
                // The old queue pairs first: what is under way on them must not reach what the new ones have brought.
                drop(exchange);
                match transport.send_first(requests, deadline, true) {
                    Ok(again) => exchange = again,
                    Err(error) => {
                        if error.is_path_failure() {
                            transport.rest(address, &error);
                        }
                        results.extend(requests.iter().map(|_| Err(error.clone())));
                        return;
                    }
                }
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
            // A rail that was lost ends here: what is late on it must not reach what the next frame brings to the same place.
            transport.pause_rails(address, &exchange.joined, rails);
            for (rail, end) in exchange.joined.ends.iter_mut().enumerate() {
                if rails & (1 << rail) != 0 {
                    *end = None;
                }
            }
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
        let none_left = lost != 0 && exchange.joined.ends.iter().all(Option::is_none);
        exchange.end(lost);
        // What failed by itself (memory that no NIC reaches, say) goes by TCP, and nothing is said of the peer.
        if none_left {
            transport.rest(address, &"every rail failed");
        }
    }
}
