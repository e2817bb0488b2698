//! The transfer engine: moves bytes between registered memory of processes. Knows no keys, replicas or leases.
//!
//! ```text
//! TransferEngine ── batch of TransferRequest ──► Transport (loopback │ shm │ rdma │ tcp) ──► SegmentHost gate ──► Memory
//! ```
//! A request names a peer, a granted range of one of its segments, local memory, and optionally a word that decides
//! whether the transfer counts. The caller sees one result per request; a path that fails is replaced by the next one.

pub mod batch;
pub mod copy;
pub mod counters;
pub mod error;
mod gate;
pub mod grant;
pub mod host;
pub mod memory;
pub mod metadata;
pub mod peer;
pub mod pending;
pub mod topology;
pub mod transport;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use batch::{LocalSlice, Opcode, Peer, TransferRequest, TransferResult};
use counters::TransferCounters;
use error::TransferError;
use host::SegmentHost;
use memory::Memory;
use transport::lane::Identity;
use transport::loopback::LoopbackTransport;
use transport::rdma::{Fabric, RdmaError, RdmaTransport};
use transport::shm::ShmTransport;
use transport::tcp::TcpTransport;
use transport::{InFlight, Transport, TransportKind};

use crate::base::handshake::Service;
use crate::base::id::Id128;
use crate::base::net::host_id;
use crate::base::trust::ClusterKeys;

/// How an engine behaves.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Our identity towards nodes.
    pub client: Id128,
    /// The cluster's keys.
    pub keys: ClusterKeys,
    /// What its peers are, where their port serves both.
    pub service: Service,
    /// Transports that may be used.
    pub transports: Vec<TransportKind>,
    /// The RDMA devices; without, `TransportKind::Rdma` is left out.
    pub fabric: Option<Arc<Fabric>>,
    /// Bound of one connection attempt with its handshake.
    pub connect_timeout: Duration,
    /// Lanes a large transfer is spread over, 1..=16, each with a thread at either end. More than one pays where one thread
    /// that copies to or from the kernel cannot fill the network, which loopback and fast networks are.
    pub lanes_per_transfer: usize,
    /// Transfers of at least this many bytes to one peer are cut in slices for several lanes.
    pub slice_threshold: u64,
}

impl EngineConfig {
    /// Defaults: all transports, lanes by the number of cores.
    pub fn new(client: Id128, keys: ClusterKeys) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            client,
            keys,
            service: Service::Node,
            transports: vec![
                TransportKind::Loopback,
                TransportKind::Shm,
                TransportKind::Rdma,
                TransportKind::Tcp,
            ],
            fabric: None,
            connect_timeout: Duration::from_secs(1),
            lanes_per_transfer: if cores == 1 {
                1
            } else {
                (cores / 4).clamp(2, 4)
            },
            // About a millisecond, of which a thread that is started takes a twentieth.
            slice_threshold: 4 << 20,
        }
    }
}

/// Moves bytes. Cheap to share; every method may be called from any number of threads.
pub struct TransferEngine {
    config: EngineConfig,
    transports: Vec<Arc<dyn Transport>>,
    loopback: Arc<LoopbackTransport>,
    counters: TransferCounters,
    rdma: Option<Arc<RdmaTransport>>,
}

impl TransferEngine {
    /// Opens an engine.
    pub fn open(config: EngineConfig) -> Arc<Self> {
        let identity = Identity {
            client: config.client,
            keys: config.keys.clone(),
            service: config.service,
            connect_timeout: config.connect_timeout,
        };
        let loopback = Arc::new(LoopbackTransport::new(config.client));
        let mut kinds = config.transports.clone();
        kinds.sort_unstable();
        kinds.dedup();
        let rdma = config
            .fabric
            .clone()
            .filter(|_| kinds.contains(&TransportKind::Rdma))
            .map(|fabric| Arc::new(RdmaTransport::new(identity.clone(), fabric)));
        let transports = kinds
            .into_iter()
            .filter_map(|kind| -> Option<Arc<dyn Transport>> {
                Some(match kind {
                    TransportKind::Loopback => loopback.clone(),
                    TransportKind::Shm => Arc::new(ShmTransport::new(identity.clone(), host_id())),
                    TransportKind::Rdma => rdma.clone()?,
                    TransportKind::Tcp => Arc::new(TcpTransport::new(identity.clone())),
                })
            })
            .collect();
        let counters = TransferCounters::new(&config.transports);
        Arc::new(Self {
            config,
            transports,
            loopback,
            counters,
            rdma,
        })
    }

    /// An engine over given transports, in order of preference.
    pub fn with_transports(config: EngineConfig, transports: Vec<Arc<dyn Transport>>) -> Arc<Self> {
        let loopback = Arc::new(LoopbackTransport::new(config.client));
        let kinds: Vec<TransportKind> = transports.iter().map(|t| t.kind()).collect();
        Arc::new(Self {
            config,
            transports,
            loopback,
            counters: TransferCounters::new(&kinds),
            rdma: None,
        })
    }

    /// What it has moved.
    pub fn counters(&self) -> &TransferCounters {
        &self.counters
    }

    fn counted(
        &self,
        at: usize,
        requests: &[TransferRequest],
        results: &[TransferResult],
        begun: Instant,
    ) {
        let moved = requests.iter().zip(results);
        let moved = moved.filter(|(r, result)| result.is_ok() && r.has_data());
        let bytes = moved.map(|(r, _)| r.length).sum();
        if let (Some(first), Some(transport)) = (requests.first(), self.transports.get(at)) {
            let took = begun.elapsed();
            self.counters
                .count(transport.kind(), first.opcode, bytes, took);
        }
    }

    /// Makes memory known that many transfers will name pieces of, so that it need not be prepared for each of them.
    /// Does nothing where no transport gains by it.
    ///
    /// # Safety
    /// The range stays mapped until [`TransferEngine::unregister`].
    pub unsafe fn register(&self, base: *mut u8, length: usize) {
        if let Some(rdma) = &self.rdma {
            // SAFETY: the caller's promise. Memory that cannot be registered is prepared per transfer.
            unsafe { rdma.register(base, length) };
        }
    }

    /// [`TransferEngine::register`] of memory of a GPU. Only an engine that has RDMA and nothing else may be given such memory:
    /// the other transports copy it as if it were the host's.
    ///
    /// # Errors
    /// `NoDevice` without RDMA; why NICs cannot reach it.
    ///
    /// # Safety
    /// As [`TransferEngine::register`]; the addresses are that device's.
    pub unsafe fn register_device(
        &self,
        base: usize,
        length: usize,
        device: &dyn memory::DeviceCopies,
    ) -> Result<(), RdmaError> {
        let only = self.config.transports == [TransportKind::Rdma];
        let rdma = self.rdma.as_ref().filter(|_| only);
        let rdma = rdma.ok_or(RdmaError::NoDevice)?;
        // SAFETY: the caller's promise.
        unsafe { rdma.register_device(base, length, device) }
    }

    /// [`TransferEngine::register`] of memory that this process serves, too.
    pub fn register_memory(&self, memory: &Arc<Memory>) {
        if let Some(rdma) = &self.rdma {
            rdma.register_memory(memory);
        }
    }

    /// Takes [`TransferEngine::register`] back. Transfers under way are not disturbed.
    pub fn unregister(&self, base: *mut u8) {
        if let Some(rdma) = &self.rdma {
            rdma.unregister(base);
        }
    }

    /// Makes segments of this process reachable without leaving it.
    pub fn add_local(&self, host: &Arc<SegmentHost>) {
        self.loopback.add(host);
    }

    /// Carries out a batch in the caller's thread: one result per request, in order. Returns by `deadline` plus one tick
    /// (250 ms).
    pub fn transfer(&self, requests: &[TransferRequest], deadline: Instant) -> Vec<TransferResult> {
        self.begin(requests, deadline).finish()
    }

    /// Sends what can be sent without waiting; the caller does something else and then calls [`Begun::finish`].
    pub fn begin<'a>(&'a self, requests: &'a [TransferRequest], deadline: Instant) -> Begun<'a> {
        let mut begun = Begun {
            engine: self,
            deadline,
            groups: VecDeque::new(),
            done: Vec::new(),
        };
        let mut start = 0;
        while start < requests.len() {
            let first = &requests[start];
            let same = |r: &TransferRequest| {
                r.opcode == first.opcode
                    && (Arc::ptr_eq(&r.peer, &first.peer) || r.peer.node == first.peer.node)
            };
            let most = transport::frame::ITEMS_MAX;
            let count = requests[start..]
                .iter()
                .take(most)
                .take_while(|r| same(r))
                .count();
            // Each group holds a lane until it is finished: a huge batch must not wait for lanes it holds itself.
            if begun.groups.len() == GROUPS_MAX {
                begun.finish_oldest();
            }
            begun
                .groups
                .push_back(self.start_group(&requests[start..start + count], deadline));
            start += count;
        }
        begun
    }

    fn start_group<'a>(&'a self, requests: &'a [TransferRequest], deadline: Instant) -> Group<'a> {
        if requests.iter().any(|r| r.check().is_err()) {
            // Rare and the caller's mistake: one by one, so that the good ones go through.
            return Group::OneByOne(requests);
        }
        let total: u64 = requests.iter().map(|r| r.length).sum();
        // Only a network has several streams to fill; and on shared memory a range is recorded whole before it is written.
        let over_network = self.path(&requests[0].peer) == Some(TransportKind::Tcp);
        if over_network
            && self.config.lanes_per_transfer > 1
            && total >= self.config.slice_threshold
        {
            return Group::Sliced(requests);
        }
        let mut failure = TransferError::NoPath {
            peer: requests[0].peer.name.clone(),
        };
        for (at, transport) in self.transports.iter().enumerate() {
            if !transport.reaches(&requests[0].peer) {
                continue;
            }
            let begun = Instant::now();
            match transport.start(requests, deadline) {
                Ok(in_flight) => return Group::InFlight(requests, at, begun, in_flight),
                Err(error) if error.is_path_failure() => failure = error,
                Err(error) => return Group::Failed(requests, error),
            }
        }
        Group::Failed(requests, failure)
    }

    /// Runs requests over the transports from number `from` on; those that meet path failures move on to the next.
    fn run(
        &self,
        requests: &[TransferRequest],
        from: usize,
        deadline: Instant,
        last: TransferError,
    ) -> Vec<TransferResult> {
        let mut results: Vec<TransferResult> = requests.iter().map(|_| Err(last.clone())).collect();
        let mut open: Vec<usize> = (0..requests.len()).collect();
        for (at, transport) in self.transports.iter().enumerate().skip(from) {
            if open.is_empty() || Instant::now() >= deadline {
                break;
            }
            if !transport.reaches(&requests[0].peer) {
                continue;
            }
            let subset: Vec<TransferRequest> = open.iter().map(|i| requests[*i].clone()).collect();
            let mut outcomes = Vec::with_capacity(subset.len());
            let begun = Instant::now();
            match transport.start(&subset, deadline) {
                Ok(in_flight) => in_flight.finish(&mut outcomes),
                Err(error) => outcomes.extend(subset.iter().map(|_| Err(error.clone()))),
            }
            self.counted(at, &subset, &outcomes, begun);
            let mut still = Vec::new();
            for (index, outcome) in open.iter().zip(outcomes) {
                if outcome.as_ref().is_err_and(TransferError::is_path_failure) {
                    still.push(*index);
                }
                results[*index] = outcome;
            }
            open = still;
        }
        results
    }

    /// Cuts the requests into slices over several lanes; each request's word and notify go in a last step, after all of
    /// its slices are in place.
    fn sliced(&self, requests: &[TransferRequest], deadline: Instant) -> Vec<TransferResult> {
        let lanes = self.config.lanes_per_transfer;
        let total: u64 = requests.iter().map(|r| r.length).sum();
        let slice = total.div_ceil(lanes as u64).next_multiple_of(4096);
        let mut pieces: Vec<(usize, TransferRequest)> = Vec::new();
        // Pieces of each request that have not been heard of.
        let mut open = Vec::with_capacity(requests.len());
        for (index, r) in requests.iter().enumerate() {
            let cut = cut(r, slice);
            open.push(cut.len());
            pieces.extend(cut.into_iter().map(|piece| (index, piece)));
        }
        let mut loads: Vec<(u64, Vec<(usize, TransferRequest)>)> = vec![(0, Vec::new()); lanes];
        for piece in pieces {
            if let Some(lightest) = loads.iter_mut().min_by_key(|l| l.0) {
                lightest.0 += piece.1.length;
                lightest.1.push(piece);
            }
        }
        let mut results: Vec<TransferResult> = requests.iter().map(|_| Ok(())).collect();
        let no_path = || TransferError::NoPath {
            peer: requests[0].peer.name.clone(),
        };
        let run = |load: Vec<(usize, TransferRequest)>| -> Vec<(usize, TransferResult)> {
            let (owners, pieces): (Vec<usize>, Vec<TransferRequest>) = load.into_iter().unzip();
            let outcomes = if pieces.is_empty() {
                Vec::new()
            } else {
                self.run(&pieces, 0, deadline, no_path())
            };
            owners.into_iter().zip(outcomes).collect()
        };
        let loads = Mutex::new(loads);
        let work = || {
            let mut outcomes = Vec::new();
            // Not in the loop's head: the lock would be held while the load is carried out.
            loop {
                let load = loads.lock().pop();
                let Some((_, load)) = load else {
                    return outcomes;
                };
                outcomes.extend(run(load));
            }
        };
        let outcomes = std::thread::scope(|scope| {
            // Without a thread for each, the others carry out more than one.
            let start = |_| std::thread::Builder::new().spawn_scoped(scope, work).ok();
            let others: Vec<_> = (1..lanes).filter_map(start).collect();
            let mut outcomes = work();
            for other in others {
                outcomes.extend(other.join().unwrap_or_default());
            }
            outcomes
        });
        for (index, outcome) in outcomes {
            open[index] -= 1;
            if results[index].is_ok() {
                results[index] = outcome;
            }
        }
        for (result, open) in results.iter_mut().zip(open) {
            if open > 0 && result.is_ok() {
                *result = Err(no_path());
            }
        }
        let finishing: Vec<(usize, TransferRequest)> = requests
            .iter()
            .enumerate()
            .filter(|(i, r)| {
                results[*i].is_ok()
                    && r.opcode == Opcode::Write
                    && (r.word.is_some() || !r.notify.is_empty())
            })
            .map(|(i, r)| {
                let local = smallvec::SmallVec::new();
                (i, TransferRequest { local, ..r.clone() })
            })
            .collect();
        for (index, outcome) in run(finishing) {
            results[index] = outcome;
        }
        results
    }

    /// The peer's segment as mapped memory, where it is in this process or on this host: for reading without a copy.
    pub fn map(&self, peer: &Peer, segment: u32, incarnation: u64) -> Option<Arc<Memory>> {
        self.transports
            .iter()
            .filter(|t| t.reaches(peer))
            .find_map(|t| t.map(peer, segment, incarnation))
    }

    /// Carries out a read if the peer's segment is mapped here already: a copy, and nothing that waits. `None` when it is
    /// not, or is not memory of the host.
    pub fn read_mapped(&self, request: &TransferRequest) -> Option<TransferResult> {
        let (segment, incarnation) = (request.grant.segment, request.grant.incarnation);
        let find = |t: &Arc<dyn Transport>| {
            let memory = t.mapped(&request.peer, segment, incarnation)?;
            Some((t.kind(), memory))
        };
        let (kind, memory) = self.transports.iter().find_map(find)?;
        if request.opcode != Opcode::Read || memory.device().is_some() {
            return None;
        }
        let begun = Instant::now();
        let read = request.check().and_then(|()| {
            memory.touch(request.offset, request.length);
            transport::loopback::copy_out(&memory, request)
        });
        if read.is_ok() {
            let (bytes, took) = (request.length, begun.elapsed());
            self.counters.count(kind, Opcode::Read, bytes, took);
        }
        Some(read)
    }

    /// Whether the process behind memory from [`TransferEngine::map`] still lives.
    pub fn lives(&self, peer: &Peer, segment: u32, incarnation: u64) -> bool {
        // Whether a transport may be tried right now says nothing about a mapping that is there.
        self.transports
            .iter()
            .any(|t| t.lives(peer, segment, incarnation))
    }

    /// The pool has only these peers now: lanes to others are closed, with what is pinned for them.
    pub fn keep_only(&self, peers: &[Arc<Peer>]) {
        for transport in &self.transports {
            transport.keep_only(peers);
        }
    }

    /// The transport that would be tried first for a peer.
    pub fn path(&self, peer: &Peer) -> Option<TransportKind> {
        self.transports
            .iter()
            .find(|t| t.reaches(peer))
            .map(|t| t.kind())
    }
}

/// Slices of at most `most` bytes. A write's word and notify are left for the end.
fn cut(r: &TransferRequest, most: u64) -> Vec<TransferRequest> {
    if !r.has_data() {
        return Vec::new();
    }
    let is_write = r.opcode == Opcode::Write;
    let mut pieces = Vec::new();
    let mut done = 0;
    let mut local = r.local.iter().copied();
    let mut current = local.next();
    while done < r.length {
        let length = most.min(r.length - done);
        let mut slices: smallvec::SmallVec<[LocalSlice; 2]> = smallvec::SmallVec::new();
        let mut wanted = length as usize;
        while wanted > 0 {
            let Some(slice) = current.as_mut() else { break };
            let n = wanted.min(slice.length);
            // SAFETY: a part of a slice the caller vouched for.
            slices.push(unsafe { LocalSlice::new(slice.pointer, n) });
            // SAFETY: n <= its length.
            slice.pointer = unsafe { slice.pointer.add(n) };
            slice.length -= n;
            wanted -= n;
            if slice.length == 0 {
                current = local.next();
            }
        }
        pieces.push(TransferRequest {
            offset: r.offset + done,
            length,
            local: slices,
            word: r.word.filter(|_| !is_write),
            notify: Vec::new(),
            ..r.clone()
        });
        done += length;
    }
    pieces
}

enum Group<'a> {
    /// With the number of its transport, and when it was begun.
    InFlight(
        &'a [TransferRequest],
        usize,
        Instant,
        Box<dyn InFlight + 'a>,
    ),
    Failed(&'a [TransferRequest], TransferError),
    OneByOne(&'a [TransferRequest]),
    Sliced(&'a [TransferRequest]),
}

/// A batch that has been sent. Dropping it abandons the batch.
pub struct Begun<'a> {
    engine: &'a TransferEngine,
    deadline: Instant,
    groups: VecDeque<Group<'a>>,
    done: Vec<TransferResult>,
}

/// Groups of one batch under way at once.
const GROUPS_MAX: usize = 8;

impl Begun<'_> {
    /// Waits for all results.
    pub fn finish(mut self) -> Vec<TransferResult> {
        while !self.groups.is_empty() {
            self.finish_oldest();
        }
        self.done
    }

    fn finish_oldest(&mut self) {
        let results = &mut self.done;
        match self.groups.pop_front() {
            None => {}
            Some(Group::Failed(requests, error)) => {
                results.extend(requests.iter().map(|_| Err(error.clone())));
            }
            Some(Group::Sliced(requests)) => {
                results.extend(self.engine.sliced(requests, self.deadline));
            }
            Some(Group::OneByOne(requests)) => {
                for r in requests {
                    let result = r.check().and_then(|()| {
                        let one = std::slice::from_ref(r);
                        let mut one = self.engine.begin(one, self.deadline).finish();
                        one.pop().unwrap_or(Err(TransferError::Stale))
                    });
                    results.push(result);
                }
            }
            Some(Group::InFlight(requests, at, begun, in_flight)) => {
                let from = results.len();
                in_flight.finish(results);
                self.engine.counted(at, requests, &results[from..], begun);
                let is_open =
                    |r: &TransferResult| r.as_ref().is_err_and(TransferError::is_path_failure);
                let open: Vec<usize> = (from..results.len())
                    .filter(|i| is_open(&results[*i]))
                    .collect();
                let Some(first) = open.first().and_then(|i| results[*i].clone().err()) else {
                    return;
                };
                let left: Vec<TransferRequest> =
                    open.iter().map(|i| requests[i - from].clone()).collect();
                let again = self.engine.run(&left, at + 1, self.deadline, first.clone());
                for (index, outcome) in open.into_iter().zip(again) {
                    // Each keeps its own reason where there was no other way.
                    if outcome.as_ref().err() != Some(&first) {
                        results[index] = outcome;
                    }
                }
            }
        }
    }
}
