//! Processes that read and write each other's memory by address, without a pool: the `TransferEngine` of upstream.
//!
//! Every process registers memory of its own and listens; a peer is named by `host:port`, or by a name that a metadata
//! service translates. Owns the tables of addresses; the bytes move as for the pool. Whoever holds the cluster token may
//! read and write everything that is registered.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{SocketAddr, TcpListener};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, RwLock};

use super::batch::{LocalSlice, Opcode, Peer, TransferRequest};
use super::error::TransferError;
use super::grant::Grant;
use super::host::{Noted, NotifyOrigin, NotifySink, Segment, SegmentHost};
use super::memory::{DeviceCopies, Memory};
use super::transport::TransportKind;
use super::transport::describe::Inquirer;
use super::transport::frame::Region;
use super::transport::lane::Identity;
use super::transport::rdma::Fabric;
use super::transport::server::{DEVICE_LANE_STACK, DataServer, Serving};
use super::{EngineConfig, TransferEngine};
use crate::base::clock::unix_ms;
use crate::base::handshake::Service;
use crate::base::id::{Id128, random_u64};
use crate::base::trust::{ClusterKeys, MAC_BYTES};

/// Notifies kept until they are fetched; the oldest go first.
const INBOX_MAX: usize = 65_536;
/// How long a grant made for one transfer is good: the transfer and the clock's skew.
const GRANT_MS: u64 = 120_000;
/// How long a region that is taken away is waited for.
const REMOVAL: Duration = Duration::from_secs(10);
const LANES_MAX: usize = 4096;
/// Peers whose regions are remembered.
const TABLES_MAX: usize = 4096;

/// What a peer sent beside data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notify {
    /// Its sender's or topic's name.
    pub name: String,
    /// The message.
    pub message: String,
}

/// One range of a transfer.
#[derive(Clone, Copy, Debug)]
pub struct Move {
    /// Direction.
    pub opcode: Opcode,
    /// Here.
    pub local: LocalSlice,
    /// There, in the peer's address space.
    pub remote_address: u64,
}

/// Why a peer operation did not succeed.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum PeerError {
    /// The range overlaps a registered one.
    #[error("the range overlaps memory that is registered already")]
    Overlaps,
    /// No such registration.
    #[error("nothing is registered at this address")]
    NotRegistered,
    /// The range is not inside one registered region of the peer.
    #[error("{peer} has not registered this range")]
    OutsidePeer {
        /// Its name.
        peer: String,
    },
    /// The name means nothing.
    #[error("unknown peer `{peer}`")]
    UnknownPeer {
        /// The name.
        peer: String,
    },
    /// A transfer that is still using the memory did not end in time; it is no longer reachable for new ones.
    #[error("a transfer or its registration is still using the memory")]
    Busy,
    /// From the transfer.
    #[error(transparent)]
    Transfer(#[from] TransferError),
}

#[derive(Default)]
struct Inbox(Mutex<VecDeque<Notify>>);

impl NotifySink for Inbox {
    fn notify(&self, _origin: NotifyOrigin, payload: &[u8]) -> Noted {
        let Some(notify) = decode_notify(payload) else {
            return Noted::Refused;
        };
        let mut inbox = self.0.lock();
        if inbox.len() >= INBOX_MAX {
            inbox.pop_front();
        }
        inbox.push_back(notify);
        Noted::Taken
    }
    fn shared_writer(&self, _client: Id128, _change: i32) {}
}

/// `name length u32 LE | name | message`.
fn encode_notify(notify: &Notify) -> Vec<u8> {
    let mut out = (notify.name.len() as u32).to_le_bytes().to_vec();
    out.extend_from_slice(notify.name.as_bytes());
    out.extend_from_slice(notify.message.as_bytes());
    out
}

fn decode_notify(payload: &[u8]) -> Option<Notify> {
    let (length, rest) = payload.split_first_chunk::<4>()?;
    let (name, message) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    Some(Notify {
        name: std::str::from_utf8(name).ok()?.to_owned(),
        message: std::str::from_utf8(message).ok()?.to_owned(),
    })
}

/// A peer's regions, sorted by address.
struct Table {
    peer: Arc<Peer>,
    regions: Vec<Region>,
}

impl Table {
    fn region(&self, address: u64, length: u64) -> Option<&Region> {
        let at = self.regions.partition_point(|r| r.address <= address);
        let region = self.regions.get(at.checked_sub(1)?)?;
        let end = address.checked_add(length)?;
        (end <= region.address.checked_add(region.length)?).then_some(region)
    }
}

/// A range of addresses that is taken.
enum Registered {
    /// Being made known to devices, which takes long for much memory: the others do not wait for it.
    UnderWay(usize),
    Done(Arc<Segment>),
}

impl Registered {
    fn len(&self) -> usize {
        match self {
            Self::UnderWay(length) => *length,
            Self::Done(segment) => segment.memory.len(),
        }
    }
}

/// See the module header. Every method may be called from any number of threads.
pub struct PeerEngine {
    keys: ClusterKeys,
    host: Arc<SegmentHost>,
    serving: Serving,
    engine: Arc<TransferEngine>,
    inquirer: Inquirer,
    inbox: Arc<Inbox>,
    registered: Mutex<BTreeMap<usize, Registered>>,
    /// A registration is no longer under way.
    ended: Condvar,
    tables: RwLock<HashMap<String, Arc<Table>>>,
    transfer_timeout: Duration,
}

impl PeerEngine {
    /// Listens on `listen` and is ready. With a `fabric` bytes go by RDMA where the peer has it too.
    ///
    /// # Errors
    /// When the address cannot be used.
    pub fn open(
        listen: SocketAddr,
        keys: ClusterKeys,
        transfer_timeout: Duration,
        fabric: Option<Arc<Fabric>>,
    ) -> std::io::Result<Self> {
        let me = Id128::random();
        let inbox = Arc::new(Inbox::default());
        let host = Arc::new(SegmentHost::new(me, keys.clone(), inbox.clone()));
        let server = DataServer::start(
            Service::Peer,
            host.clone(),
            TcpListener::bind(listen)?,
            LANES_MAX,
            DEVICE_LANE_STACK,
            fabric.clone(),
        )?;
        let mut config = EngineConfig::new(me, keys.clone());
        config.service = Service::Peer;
        config.transports = vec![
            TransportKind::Loopback,
            TransportKind::Rdma,
            TransportKind::Tcp,
        ];
        config.fabric = fabric;
        let inquirer = Inquirer::new(Identity {
            client: me,
            keys: keys.clone(),
            service: Service::Peer,
            connect_timeout: config.connect_timeout,
        });
        let engine = TransferEngine::open(config);
        engine.add_local(&host);
        Ok(Self {
            keys,
            host,
            serving: server.into_serving(),
            engine,
            inquirer,
            inbox,
            registered: Mutex::default(),
            ended: Condvar::new(),
            tables: RwLock::default(),
            transfer_timeout,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.serving.server().address()
    }

    /// Its port, for others to serve on.
    pub fn server(&self) -> &Arc<DataServer> {
        self.serving.server()
    }

    /// Opens memory to peers.
    ///
    /// # Errors
    /// `Overlaps`.
    ///
    /// # Safety
    /// Mapped readable and writable until [`PeerEngine::unregister`] has returned `Ok`, or the engine is dropped and
    /// its process has ended the transfers with it.
    pub unsafe fn register(&self, address: NonNull<u8>, length: usize) -> Result<(), PeerError> {
        // SAFETY: the caller's promise.
        self.add(unsafe { Memory::borrowed(address, length) })
    }

    /// Opens memory of a device to peers.
    ///
    /// # Errors
    /// `Overlaps`.
    pub fn register_device(
        &self,
        address: NonNull<u8>,
        length: usize,
        copies: Arc<dyn DeviceCopies>,
    ) -> Result<(), PeerError> {
        self.add(Memory::on_device(address, length, copies))
    }

    fn add(&self, memory: Memory) -> Result<(), PeerError> {
        self.add_with(memory, |memory| {
            if memory.device().is_none() {
                self.engine.register_memory(memory);
            }
        })
    }

    fn add_with(
        &self,
        memory: Memory,
        make_known: impl FnOnce(&Arc<Memory>),
    ) -> Result<(), PeerError> {
        let length = memory.len();
        let start = memory.as_ptr() as usize;
        let end = start.checked_add(length).ok_or(PeerError::Overlaps)?;
        {
            let mut registered = self.registered.lock();
            let before = registered.range(..end).next_back();
            if length == 0 || before.is_some_and(|(at, r)| at + r.len() > start) {
                return Err(PeerError::Overlaps);
            }
            registered.insert(start, Registered::UnderWay(length));
        }
        let memory = Arc::new(memory);
        make_known(&memory);
        let incarnation = random_u64() | 1;
        let segment = self.host.add(String::new(), incarnation, memory);
        let mut registered = self.registered.lock();
        registered.insert(start, Registered::Done(segment));
        self.ended.notify_all();
        Ok(())
    }

    /// Closes memory to peers; waits for transfers under way, and for its registration.
    ///
    /// # Errors
    /// `NotRegistered`; `Busy` when a transfer or the registration did not end in time.
    pub fn unregister(&self, address: usize) -> Result<(), PeerError> {
        let deadline = Instant::now() + REMOVAL;
        let segment = {
            let mut registered = self.registered.lock();
            while let Some(Registered::UnderWay(_)) = registered.get(&address) {
                if self.ended.wait_until(&mut registered, deadline).timed_out() {
                    return Err(PeerError::Busy);
                }
            }
            match registered.remove(&address) {
                Some(Registered::Done(segment)) => segment,
                _ => return Err(PeerError::NotRegistered),
            }
        };
        self.engine.unregister(segment.memory.as_ptr());
        if self.host.remove(segment, deadline) {
            Ok(())
        } else {
            Err(PeerError::Busy)
        }
    }

    /// Whether somebody answers there.
    ///
    /// # Errors
    /// From the connection.
    pub fn probe(&self, address: &str) -> Result<(), PeerError> {
        let deadline = Instant::now() + Duration::from_secs(2);
        Ok(self.inquirer.ping(address, deadline)?)
    }

    /// First registered address of a peer.
    ///
    /// # Errors
    /// `OutsidePeer` when it has registered nothing; from the connection.
    pub fn first_address(&self, address: &str) -> Result<u64, PeerError> {
        let table = self.table(address, true)?;
        let first = table.regions.first().map(|r| r.address);
        first.ok_or_else(|| PeerError::OutsidePeer {
            peer: address.to_owned(),
        })
    }

    /// Notifies received since the last call.
    pub fn take_notifies(&self) -> Vec<Notify> {
        self.inbox.0.lock().drain(..).collect()
    }

    fn table(&self, address: &str, fresh: bool) -> Result<Arc<Table>, PeerError> {
        if !fresh && let Some(table) = self.tables.read().get(address) {
            return Ok(table.clone());
        }
        let deadline = Instant::now() + Duration::from_secs(5);
        let described = self.inquirer.describe(address, deadline)?;
        let (node, mut regions) = (described.node, described.regions);
        regions.sort_unstable_by_key(|r| r.address);
        let peer = Arc::new(Peer {
            node,
            name: address.to_owned(),
            address: address.to_owned(),
            host_id: String::new(),
            shm_socket: String::new(),
        });
        let table = Arc::new(Table { peer, regions });
        let mut tables = self.tables.write();
        if tables.len() >= TABLES_MAX {
            // They are asked for again.
            tables.clear();
        }
        tables.insert(address.to_owned(), table.clone());
        Ok(table)
    }

    /// Moves ranges to or from one peer and returns when all are in place; `notify` is delivered after them.
    ///
    /// # Errors
    /// `OutsidePeer`; from the transfer. After an error some of the ranges may have moved.
    pub fn transfer(
        &self,
        address: &str,
        moves: &[Move],
        notify: Option<&Notify>,
    ) -> Result<(), PeerError> {
        let deadline = Instant::now() + self.transfer_timeout;
        // Twice: the peer may have registered more, or been restarted, since it was asked.
        match self.attempt(address, moves, notify, false, deadline) {
            Err(PeerError::OutsidePeer { .. } | PeerError::Transfer(TransferError::Stale)) => {
                self.attempt(address, moves, notify, true, deadline)
            }
            other => other,
        }
    }

    fn attempt(
        &self,
        address: &str,
        moves: &[Move],
        notify: Option<&Notify>,
        fresh: bool,
        deadline: Instant,
    ) -> Result<(), PeerError> {
        let table = self.table(address, fresh)?;
        let outside = || PeerError::OutsidePeer {
            peer: address.to_owned(),
        };
        let mut requests = Vec::with_capacity(moves.len());
        for m in moves.iter().filter(|m| !m.local.is_empty()) {
            let length = m.local.len() as u64;
            let region = table.region(m.remote_address, length).ok_or_else(outside)?;
            let offset = m.remote_address - region.address;
            let mut request = self.request(&table, region, m.opcode, offset, length);
            request.local.push(m.local);
            requests.push(request);
        }
        let results = self.engine.transfer(&requests, deadline);
        if let Some(error) = results.into_iter().find_map(Result::err) {
            return Err(error.into());
        }
        if let Some(notify) = notify {
            let region = table.regions.first().ok_or_else(outside)?;
            let mut request = self.request(&table, region, Opcode::Write, 0, 0);
            request.notify = encode_notify(notify);
            let results = self.engine.transfer(&[request], deadline);
            if let Some(error) = results.into_iter().find_map(Result::err) {
                return Err(error.into());
            }
        }
        Ok(())
    }

    fn request(
        &self,
        table: &Table,
        region: &Region,
        opcode: Opcode,
        offset: u64,
        length: u64,
    ) -> TransferRequest {
        let grant = Grant {
            segment: region.segment,
            incarnation: region.incarnation,
            offset: 0,
            length: region.length,
            term: 0,
            expires_unix_ms: unix_ms() + GRANT_MS,
            mac: [0; MAC_BYTES],
        };
        TransferRequest {
            opcode,
            peer: table.peer.clone(),
            grant: grant.signed(opcode.access(), &self.keys),
            offset,
            length,
            local: smallvec::SmallVec::new(),
            word: None,
            notify: Vec::new(),
        }
    }
}

/// What the process at `address` says of itself: for a node of a pool, `host:port` of its master.
///
/// # Errors
/// From the connection.
pub fn about(address: &str, keys: &ClusterKeys, timeout: Duration) -> Result<String, PeerError> {
    let inquirer = Inquirer::new(Identity {
        client: Id128::random(),
        keys: keys.clone(),
        service: Service::Node,
        connect_timeout: timeout,
    });
    Ok(inquirer.describe(address, Instant::now() + timeout)?.about)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::trust::Token;

    fn engine(token: &str) -> PeerEngine {
        let keys = ClusterKeys::derive(Token::new(token).as_ref());
        let listen = "127.0.0.1:0".parse().unwrap();
        PeerEngine::open(listen, keys, Duration::from_secs(5), None).unwrap()
    }

    fn register(engine: &PeerEngine, bytes: &mut [u8]) -> u64 {
        // SAFETY: outlives the engine's use in these tests.
        unsafe {
            engine
                .register(NonNull::from(&mut *bytes).cast(), bytes.len())
                .unwrap();
        }
        bytes.as_ptr() as u64
    }

    fn moves(opcode: Opcode, local: &mut [u8], remote_address: u64) -> Move {
        // SAFETY: outlives the transfer.
        let local = unsafe { LocalSlice::new(local.as_mut_ptr(), local.len()) };
        Move {
            opcode,
            local,
            remote_address,
        }
    }

    #[test]
    fn peers_exchange_memory_by_address() {
        let (a, b) = (engine("t"), engine("t"));
        let mut there = vec![7u8; 100_000];
        let base = register(&b, &mut there);
        let name = b.address().to_string();
        let mut here = vec![0u8; 50_000];
        a.transfer(&name, &[moves(Opcode::Read, &mut here, base + 10)], None)
            .unwrap();
        assert!(here.iter().all(|x| *x == 7));
        here.fill(9);
        let notify = Notify {
            name: "n".into(),
            message: "done".into(),
        };
        a.transfer(
            &name,
            &[moves(Opcode::Write, &mut here, base)],
            Some(&notify),
        )
        .unwrap();
        assert!(there[..50_000].iter().all(|x| *x == 9) && there[50_000] == 7);
        assert_eq!(b.take_notifies(), [notify]);
        assert!(b.take_notifies().is_empty());
        assert_eq!(a.first_address(&name), Ok(base));
        let beyond = a.transfer(
            &name,
            &[moves(Opcode::Read, &mut here, base + 60_000)],
            None,
        );
        assert!(matches!(beyond, Err(PeerError::OutsidePeer { .. })));
    }

    #[cfg(feature = "rdma")]
    #[test]
    #[ignore = "needs RDMA devices: tests/e2e/rdma/run"]
    fn rdma_moves_memory_of_peers() {
        use super::super::transport::rdma::RdmaConfig;
        use std::sync::atomic::Ordering;
        let open = |device: &str| {
            let keys = ClusterKeys::derive(Token::new("t").as_ref());
            let listen = "127.0.0.1:0".parse().unwrap();
            let fabric = Fabric::open(&RdmaConfig::default().with_devices(device)).unwrap();
            PeerEngine::open(listen, keys, Duration::from_secs(10), Some(fabric)).unwrap()
        };
        let (a, b) = (open("rxe0"), open("rxe1"));
        let mut there: Vec<u8> = (0..3_000_000_u32).map(|n| (n * 7 % 251) as u8).collect();
        let original = there.clone();
        let base = register(&b, &mut there);
        let name = b.address().to_string();
        // Registered here and not, large and small, several ranges at once.
        let mut large = vec![0u8; 2_000_000];
        register(&a, &mut large);
        let (mut small, mut unregistered) = (vec![0u8; 77], vec![0u8; 500_000]);
        let ranges = [
            moves(Opcode::Read, &mut large, base),
            moves(Opcode::Read, &mut small, base + 5),
            moves(Opcode::Read, &mut unregistered, base + 1_000_001),
        ];
        a.transfer(&name, &ranges, None).unwrap();
        assert!(large == original[..2_000_000] && small == original[5..82]);
        assert!(unregistered == original[1_000_001..1_500_001]);
        large.fill(9);
        let notify = Notify {
            name: "n".into(),
            message: "done".into(),
        };
        let ranges = [moves(Opcode::Write, &mut large, base + 1_000_000)];
        a.transfer(&name, &ranges, Some(&notify)).unwrap();
        assert!(there[..1_000_000] == original[..1_000_000]);
        assert!(there[1_000_000..].iter().all(|x| *x == 9));
        assert_eq!(b.take_notifies(), [notify]);
        let counters = b.serving.counters();
        let rdma = |ways: &[std::sync::atomic::AtomicU64; 3]| ways[2].load(Ordering::Relaxed);
        assert_eq!(rdma(&counters.way_read_bytes), 2_500_077);
        assert_eq!(rdma(&counters.way_written_bytes), 2_000_000);
        // Memory that is registered later, and memory that was taken back.
        let mut later = vec![3u8; 400_000];
        let at = register(&b, &mut later);
        a.transfer(&name, &[moves(Opcode::Read, &mut small, at)], None)
            .unwrap();
        assert!(small.iter().all(|x| *x == 3));
        b.unregister(base as usize).unwrap();
        let gone = a.transfer(&name, &[moves(Opcode::Read, &mut small, base)], None);
        assert!(gone.is_err());
        assert_eq!(rdma(&counters.way_read_bytes), 2_500_154);
    }

    #[test]
    fn registrations_end_and_do_not_overlap() {
        let (a, b) = (engine("t"), engine("t"));
        let mut there = vec![1u8; 4096];
        let base = register(&b, &mut there);
        let middle = NonNull::from(&mut there[100]);
        // SAFETY: refused.
        assert_eq!(unsafe { b.register(middle, 10) }, Err(PeerError::Overlaps));
        let name = b.address().to_string();
        let mut here = vec![0u8; 8];
        a.transfer(&name, &[moves(Opcode::Read, &mut here, base)], None)
            .unwrap();
        b.unregister(base as usize).unwrap();
        assert_eq!(b.unregister(base as usize), Err(PeerError::NotRegistered));
        let gone = a.transfer(&name, &[moves(Opcode::Read, &mut here, base)], None);
        assert!(gone.is_err());
        register(&b, &mut there);
        a.transfer(&name, &[moves(Opcode::Read, &mut here, base)], None)
            .unwrap();
        assert!(a.probe(&name).is_ok() && a.probe("127.0.0.1:9").is_err());
    }

    #[test]
    fn a_long_registration_holds_nobody_up() {
        let (a, b) = (engine("t"), engine("t"));
        let (mut slow, mut quick) = (vec![0u8; 4096], vec![7u8; 4096]);
        let (at, length) = (slow.as_mut_ptr() as usize, slow.len());
        let (begun, wait) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|s| {
            let engine = &b;
            let registering = s.spawn(move || {
                let base = NonNull::new(at as *mut u8).unwrap();
                // SAFETY: lives until the end of the test.
                let memory = unsafe { Memory::borrowed(base, length) };
                engine.add_with(memory, |_| {
                    begun.send(()).unwrap();
                    ended.recv().unwrap();
                })
            });
            wait.recv().unwrap();
            // Others register, read, and take back meanwhile; the range is taken already.
            let base = register(&b, &mut quick);
            let mut here = vec![0u8; 8];
            let name = b.address().to_string();
            a.transfer(&name, &[moves(Opcode::Read, &mut here, base)], None)
                .unwrap();
            assert_eq!(here, [7; 8]);
            b.unregister(base as usize).unwrap();
            let inside = NonNull::new((at + 100) as *mut u8).unwrap();
            // SAFETY: refused.
            assert_eq!(unsafe { b.register(inside, 10) }, Err(PeerError::Overlaps));
            let taken_back = s.spawn(|| b.unregister(at));
            std::thread::sleep(Duration::from_millis(50));
            assert!(!taken_back.is_finished());
            end.send(()).unwrap();
            assert_eq!(registering.join().unwrap(), Ok(()));
            assert_eq!(taken_back.join().unwrap(), Ok(()));
        });
        drop(slow);
    }

    #[test]
    fn another_token_is_refused() {
        let (a, b) = (engine("one"), engine("two"));
        let mut there = vec![1u8; 64];
        let base = register(&b, &mut there);
        let mut here = vec![0u8; 8];
        let name = b.address().to_string();
        let refused = a.transfer(&name, &[moves(Opcode::Read, &mut here, base)], None);
        assert!(refused.is_err() && here == [0; 8]);
    }

    #[test]
    fn notifies_survive_any_bytes() {
        assert_eq!(decode_notify(b""), None);
        assert_eq!(decode_notify(&[255, 255, 255, 255, 1]), None);
        assert_eq!(decode_notify(&[1, 0, 0, 0, 0xFF]), None);
    }
}
