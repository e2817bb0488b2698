//! The laws every transport keeps, run over each of them, and the engine's failover over `Faulty` ones.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use smallvec::SmallVec;

use super::faulty::{Fault, Faulty};
use super::rdma::Fabric;
use super::server::{DataServer, LANE_STACK};
use super::tcp::TcpTransport;
use super::{Transport, TransportKind};
use crate::base::clock::unix_ms;
use crate::base::handshake::Service;
use crate::base::id::{Id128, random_u64};
use crate::base::net::host_id;
use crate::base::trust::{ClusterKeys, Token};
use crate::engine::batch::{LocalSlice, Opcode, Peer, TransferRequest, TransferResult, Word};
use crate::engine::error::TransferError;
use crate::engine::grant::{Access, Grant};
use crate::engine::host::{Noted, NotifyOrigin, NotifySink, RangeFence, SegmentHost};
use crate::engine::memory::Memory;
use crate::engine::transport::lane::Identity;
use crate::engine::{EngineConfig, TransferEngine};

const SIZE: usize = 64 << 20;

#[derive(Default)]
struct Recorder {
    notes: Mutex<Vec<(NotifyOrigin, Vec<u8>)>>,
    writers: Mutex<i32>,
}

impl NotifySink for Recorder {
    fn notify(&self, origin: NotifyOrigin, payload: &[u8]) -> Noted {
        self.notes.lock().push((origin, payload.to_vec()));
        match payload {
            b"no" => Noted::Refused,
            b"there" => Noted::Existed,
            b"published" => Noted::Published,
            _ => Noted::Taken,
        }
    }
    fn shared_writer(&self, _client: Id128, change: i32) {
        *self.writers.lock() += change;
    }
}

struct World {
    keys: ClusterKeys,
    host: Arc<SegmentHost>,
    sink: Arc<Recorder>,
    peer: Arc<Peer>,
    incarnation: u64,
    memory: Arc<Memory>,
    server: DataServer,
    client: Id128,
}

impl World {
    fn new(listen: &str) -> Self {
        Self::with_fabric(listen, None)
    }

    fn with_fabric(listen: &str, fabric: Option<Arc<Fabric>>) -> Self {
        let keys = ClusterKeys::derive(Token::new("conformance").as_ref());
        let sink = Arc::new(Recorder::default());
        let node = Id128::random();
        let host = Arc::new(SegmentHost::new(node, keys.clone(), sink.clone()));
        let memory = Arc::new(Memory::create("conformance", SIZE).unwrap());
        let incarnation = random_u64();
        host.add("seg".into(), incarnation, memory.clone());
        let listener = std::net::TcpListener::bind(listen).unwrap();
        let server = DataServer::start(
            Service::Node,
            host.clone(),
            listener,
            16,
            LANE_STACK,
            fabric,
        )
        .unwrap();
        let peer = Arc::new(Peer {
            node,
            name: "node".into(),
            address: server.address().to_string(),
            host_id: host_id(),
            shm_socket: server.socket_name().to_owned(),
        });
        Self {
            keys,
            host,
            sink,
            peer,
            incarnation,
            memory,
            server,
            client: Id128::random(),
        }
    }

    fn engine(&self, kind: TransportKind) -> Arc<TransferEngine> {
        let mut config = EngineConfig::new(self.client, self.keys.clone());
        config.transports = vec![kind];
        let engine = TransferEngine::open(config);
        engine.add_local(&self.host);
        engine
    }

    fn grant(&self, access: Access, offset: u64, length: u64) -> Grant {
        Grant {
            segment: 0,
            incarnation: self.incarnation,
            offset,
            length,
            term: 5,
            expires_unix_ms: unix_ms() + 60_000,
            mac: [0; 16],
        }
        .signed(access, &self.keys)
    }

    fn request(&self, opcode: Opcode, offset: u64, buffers: &mut [Vec<u8>]) -> TransferRequest {
        let length = buffers.iter().map(|b| b.len() as u64).sum();
        let local: SmallVec<[LocalSlice; 2]> = buffers
            .iter_mut()
            // SAFETY: the tests keep the buffers until the transfer is over.
            .map(|b| unsafe { LocalSlice::new(b.as_mut_ptr(), b.len()) })
            .collect();
        TransferRequest {
            opcode,
            peer: self.peer.clone(),
            grant: self.grant(opcode.access(), offset, length),
            offset,
            length,
            local,
            word: None,
            notify: Vec::new(),
        }
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn pattern(n: usize, seed: u8) -> Vec<u8> {
    (0..n)
        .map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ seed)
        .collect()
}

fn one(engine: &TransferEngine, request: TransferRequest) -> TransferResult {
    engine.transfer(&[request], soon()).pop().unwrap()
}

fn laws(world: &World, engine: &TransferEngine) {
    round_trip(world, engine);
    words(world, engine);
    gate(world, engine);
    notifies(world, engine);
    batches(world, engine);
    fencing(world, engine);
}

fn round_trip(world: &World, engine: &TransferEngine) {
    for size in [1usize, 64, 4096, 40_000, 1 << 20, 20 << 20] {
        let mut source = [pattern(size, 1), pattern(3, 9)];
        one(engine, world.request(Opcode::Write, 128, &mut source)).unwrap();
        let mut target = [vec![0; 2], vec![0; size + 1]];
        one(engine, world.request(Opcode::Read, 128, &mut target)).unwrap();
        assert_eq!(target.concat(), source.concat(), "{size}");
    }
}

fn words(world: &World, engine: &TransferEngine) {
    let mut source = [vec![0u8; 8], pattern(100, 2)];
    let mut write = world.request(Opcode::Write, 1024, &mut source);
    write.word = Some(Word {
        offset: 1024,
        value: 77,
    });
    one(engine, write).unwrap();
    assert!(world.memory.word_is(1024, 77));
    let mut target = [vec![0u8; 108]];
    let mut read = world.request(Opcode::Read, 1024, &mut target);
    read.word = Some(Word {
        offset: 1024,
        value: 77,
    });
    one(engine, read.clone()).unwrap();
    read.word = Some(Word {
        offset: 1024,
        value: 78,
    });
    assert_eq!(one(engine, read.clone()), Err(TransferError::Changed));
    read.word = Some(Word {
        offset: 1028,
        value: 78,
    });
    assert_eq!(
        one(engine, read),
        Err(TransferError::OutOfBounds),
        "misaligned"
    );
}

fn gate(world: &World, engine: &TransferEngine) {
    let mut buffer = [vec![0u8; 64]];
    let good = world.request(Opcode::Read, 0, &mut buffer);
    let with = |grant: Grant| TransferRequest {
        grant,
        ..good.clone()
    };
    // Shared memory trusts the mapping for reads; its gate is the socket. The other transports ask for each request.
    if engine.path(&world.peer) != Some(TransportKind::Shm) {
        let mut forged = good.grant;
        forged.mac[3] ^= 1;
        assert_eq!(one(engine, with(forged)), Err(TransferError::GrantRefused));
        let write_only = world.grant(Access::Write, 0, 64);
        assert_eq!(
            one(engine, with(write_only)),
            Err(TransferError::GrantRefused)
        );
        let expired = Grant {
            expires_unix_ms: unix_ms() - 120_000,
            ..good.grant
        }
        .signed(Access::Read, &world.keys);
        assert_eq!(one(engine, with(expired)), Err(TransferError::GrantRefused));
    }
    let stale = Grant {
        incarnation: world.incarnation ^ 1,
        ..good.grant
    }
    .signed(Access::Read, &world.keys);
    assert_eq!(one(engine, with(stale)), Err(TransferError::Stale));
    let beyond = world.request(Opcode::Read, SIZE as u64 - 32, &mut buffer);
    assert_eq!(one(engine, beyond), Err(TransferError::OutOfBounds));
    let mut outside = good.clone();
    outside.offset = 64;
    assert_eq!(one(engine, outside), Err(TransferError::OutOfBounds));
    let mut short = good.clone();
    short.length = 32;
    assert!(matches!(
        one(engine, short),
        Err(TransferError::Invalid { .. })
    ));
    // A write under a forged grant is refused on every transport, and publishes nothing.
    let mut write = world.request(Opcode::Write, 4096, &mut buffer);
    write.grant.mac[0] ^= 1;
    write.word = Some(Word {
        offset: 4096,
        value: 4,
    });
    assert_eq!(one(engine, write), Err(TransferError::GrantRefused));
    assert!(!world.memory.word_is(4096, 4));
    one(engine, good).unwrap();
}

fn notifies(world: &World, engine: &TransferEngine) {
    world.sink.notes.lock().clear();
    let mut source = [vec![0; 8], pattern(56, 3)];
    let mut write = world.request(Opcode::Write, 8192, &mut source);
    write.notify = b"hello".to_vec();
    write.word = Some(Word {
        offset: 8192,
        value: 5,
    });
    one(engine, write.clone()).unwrap();
    {
        let notes = world.sink.notes.lock();
        assert_eq!(notes.len(), 1);
        assert_eq!((notes[0].0.offset, notes[0].0.length), (8192, 64));
        assert_eq!(notes[0].0.client, world.client);
        assert_eq!(notes[0].1, b"hello");
    }
    write.notify = b"no".to_vec();
    write.word = Some(Word {
        offset: 8192,
        value: 6,
    });
    assert_eq!(
        one(engine, write.clone()),
        Err(TransferError::NotifyRefused)
    );
    write.notify = b"there".to_vec();
    assert_eq!(one(engine, write.clone()), Err(TransferError::Existed));
    assert!(!world.memory.word_is(8192, 6), "refused, so not published");
    write.notify = b"published".to_vec();
    one(engine, write.clone()).unwrap();
    // Through shared memory the word goes in a message of its own.
    assert!(
        engine.path(&world.peer) == Some(TransportKind::Shm) || !world.memory.word_is(8192, 6),
        "the owner has published it: nobody does so again"
    );
    // Without data: notify and publish only.
    write.notify = b"later".to_vec();
    write.local = SmallVec::new();
    one(engine, write).unwrap();
    assert!(world.memory.word_is(8192, 6));
}

fn batches(world: &World, engine: &TransferEngine) {
    let mut sources: Vec<[Vec<u8>; 1]> = (0..64).map(|i| [pattern(5000, i)]).collect();
    let mut requests: Vec<TransferRequest> = sources
        .iter_mut()
        .enumerate()
        .map(|(i, s)| world.request(Opcode::Write, 1 << 20 | (i as u64) << 13, s))
        .collect();
    requests[10].grant.mac[0] ^= 1;
    let results = engine.transfer(&requests, soon());
    for (i, result) in results.iter().enumerate() {
        let expected = if i == 10 {
            Err(TransferError::GrantRefused)
        } else {
            Ok(())
        };
        assert_eq!(result, &expected, "{i}");
    }
    let mut targets: Vec<[Vec<u8>; 1]> = (0..64).map(|_| [vec![0; 5000]]).collect();
    let mut requests: Vec<TransferRequest> = targets
        .iter_mut()
        .enumerate()
        .map(|(i, t)| world.request(Opcode::Read, 1 << 20 | (i as u64) << 13, t))
        .collect();
    requests[20].word = Some(Word {
        offset: requests[20].offset,
        value: 1,
    });
    let results = engine.transfer(&requests, soon());
    for (i, result) in results.iter().enumerate() {
        let expected = if i == 20 {
            Err(TransferError::Changed)
        } else {
            Ok(())
        };
        assert_eq!(result, &expected, "{i}");
        if i != 10 && i != 20 {
            assert_eq!(targets[i][0], sources[i][0], "{i}");
        }
    }
}

fn fencing(world: &World, engine: &TransferEngine) {
    let mut source = [pattern(64, 3)];
    let write = world.request(Opcode::Write, 16384, &mut source);
    one(engine, write.clone()).unwrap();
    // A range taken from its writer: grants issued before are refused there, later ones and others are not.
    let mut elsewhere = [pattern(64, 4)];
    let other = world.request(Opcode::Write, 16384 + 64, &mut elsewhere);
    let fence = RangeFence {
        segment: 0,
        offset: 16000,
        length: 448,
        expires_before_unix_ms: write.grant.expires_unix_ms + 1,
    };
    assert!(world.host.fence_range(fence, soon()));
    assert_eq!(one(engine, write.clone()), Err(TransferError::GrantRefused));
    one(engine, other).unwrap();
    let mut later = write.clone();
    later.grant.expires_unix_ms += 1000;
    later.grant = later.grant.signed(Access::Write, &world.keys);
    one(engine, later.clone()).unwrap();
    assert!(world.host.fence_writes(6, soon()));
    assert_eq!(one(engine, later), Err(TransferError::GrantRefused));
}

#[test]
fn loopback() {
    let world = World::new("127.0.0.1:0");
    laws(&world, &world.engine(TransportKind::Loopback));
}

#[test]
fn tcp() {
    let world = World::new("127.0.0.1:0");
    let engine = world.engine(TransportKind::Tcp);
    laws(&world, &engine);
    assert!(world.server.lanes() >= 1);
}

#[test]
fn tcp_over_ipv6() {
    let world = World::new("[::1]:0");
    laws(&world, &world.engine(TransportKind::Tcp));
}

#[test]
fn shm() {
    let world = World::new("127.0.0.1:0");
    let engine = world.engine(TransportKind::Shm);
    laws(&world, &engine);
    assert!(*world.sink.writers.lock() > 0);
    drop(engine);
    let end = soon();
    while *world.sink.writers.lock() != 0 {
        assert!(
            Instant::now() < end,
            "the node learns that the writer is gone"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(feature = "rdma")]
#[test]
#[ignore = "needs RDMA devices: tests/e2e/rdma/run"]
fn rdma() {
    use super::rdma::RdmaConfig;
    let of = |device: &str| Fabric::open(&RdmaConfig::default().with_devices(device)).unwrap();
    let world = World::with_fabric("127.0.0.1:0", Some(of("rxe1")));
    let mut config = EngineConfig::new(world.client, world.keys.clone());
    config.transports = vec![TransportKind::Rdma];
    config.fabric = Some(of("rxe0"));
    let engine = TransferEngine::open(config);
    laws(&world, &engine);
    let counters = world.server.counters();
    let by_rdma = |ways: &[std::sync::atomic::AtomicU64; 3]| {
        ways.each_ref()
            .map(|n| n.load(std::sync::atomic::Ordering::Relaxed))
    };
    let (read, written) = (
        by_rdma(&counters.way_read_bytes),
        by_rdma(&counters.way_written_bytes),
    );
    assert_eq!((read[0], read[1], written[0], written[1]), (0, 0, 0, 0));
    assert!(read[2] > 20 << 20 && written[2] > 20 << 20);
    // Registered memory is named as it is.
    let mut buffer = [pattern(1 << 20, 7)];
    // SAFETY: the buffer outlives the registration.
    unsafe { engine.register(buffer[0].as_mut_ptr(), 1 << 20) };
    one(&engine, {
        let mut write = world.request(Opcode::Write, 2 << 20, &mut buffer);
        write.grant.term = 6;
        write.grant = write.grant.signed(Access::Write, &world.keys);
        write
    })
    .unwrap();
    buffer[0].fill(0);
    one(&engine, world.request(Opcode::Read, 2 << 20, &mut buffer)).unwrap();
    assert_eq!(buffer[0], pattern(1 << 20, 7));
    engine.unregister(buffer[0].as_mut_ptr());
}

#[cfg(feature = "rdma")]
#[test]
#[ignore = "needs RDMA devices: tests/e2e/rdma/run"]
fn rdma_to_a_node_without_it() {
    let world = World::new("127.0.0.1:0");
    let mut config = EngineConfig::new(world.client, world.keys.clone());
    config.transports = vec![TransportKind::Rdma, TransportKind::Tcp];
    config.fabric = Some(Fabric::open(&super::rdma::RdmaConfig::default()).unwrap());
    let engine = TransferEngine::open(config);
    assert_eq!(engine.path(&world.peer), Some(TransportKind::Rdma));
    laws(&world, &engine);
    assert_eq!(
        engine.path(&world.peer),
        Some(TransportKind::Tcp),
        "it is not asked for each transfer"
    );
}

#[test]
fn faulty_wrapper_without_faults() {
    let world = World::new("127.0.0.1:0");
    let inner = tcp_transport(&world);
    let engine = over(&world, vec![Arc::new(Faulty::new(inner, []))]);
    laws(&world, &engine);
}

fn tcp_transport(world: &World) -> Arc<dyn Transport> {
    Arc::new(TcpTransport::new(Identity {
        client: world.client,
        keys: world.keys.clone(),
        service: Service::Node,
        connect_timeout: Duration::from_secs(1),
    }))
}

fn over(world: &World, transports: Vec<Arc<dyn Transport>>) -> Arc<TransferEngine> {
    TransferEngine::with_transports(
        EngineConfig::new(world.client, world.keys.clone()),
        transports,
    )
}

#[test]
fn a_failing_path_is_replaced_by_the_next() {
    let world = World::new("127.0.0.1:0");
    for fault in [
        Fault::Refuse,
        Fault::Reset,
        Fault::Truncate(0),
        Fault::Truncate(3),
        Fault::Delay(Duration::from_millis(20)),
    ] {
        let first: Arc<dyn Transport> = Arc::new(Faulty::new(tcp_transport(&world), [fault]));
        let engine = over(&world, vec![first, tcp_transport(&world)]);
        let mut sources: Vec<[Vec<u8>; 1]> = (0..8).map(|i| [pattern(5000, i)]).collect();
        let requests: Vec<TransferRequest> = sources
            .iter_mut()
            .enumerate()
            .map(|(i, s)| world.request(Opcode::Write, (i as u64) << 13, s))
            .collect();
        let results = engine.transfer(&requests, soon());
        assert!(results.iter().all(Result::is_ok), "{fault:?}: {results:?}");
    }
}

#[test]
fn a_dropped_request_costs_one_deadline() {
    let world = World::new("127.0.0.1:0");
    let engine = over(
        &world,
        vec![Arc::new(Faulty::new(tcp_transport(&world), [Fault::Drop]))],
    );
    let mut target = [vec![0; 64]];
    let request = world.request(Opcode::Read, 0, &mut target);
    let start = Instant::now();
    let result = engine
        .transfer(&[request], start + Duration::from_millis(200))
        .pop()
        .unwrap();
    assert!(matches!(result, Err(TransferError::Timeout { .. })));
    assert!(start.elapsed() < Duration::from_secs(1));
}

#[test]
fn slices_over_lanes() {
    let world = World::new("127.0.0.1:0");
    let mut config = EngineConfig::new(world.client, world.keys.clone());
    config.transports = vec![TransportKind::Tcp];
    config.lanes_per_transfer = 4;
    config.slice_threshold = 1 << 20;
    let engine = TransferEngine::open(config);
    let mut source = [
        vec![0; 8],
        pattern(5 << 20, 1),
        pattern(777, 4),
        pattern(3 << 20, 2),
    ];
    let mut write = world.request(Opcode::Write, 4096, &mut source);
    write.word = Some(Word {
        offset: 4096,
        value: 42,
    });
    write.notify = b"sliced".to_vec();
    one(&engine, write).unwrap();
    assert_eq!(world.sink.notes.lock().len(), 1);
    let mut target = [vec![0; (8 << 20) + 777 + 8]];
    let mut read = world.request(Opcode::Read, 4096, &mut target);
    read.word = Some(Word {
        offset: 4096,
        value: 42,
    });
    one(&engine, read).unwrap();
    assert_eq!(target[0][8..], source[1..].concat());
}

#[test]
fn peers_that_are_not_there_and_wrong_tokens() {
    let world = World::new("127.0.0.1:0");
    let mut config = EngineConfig::new(world.client, ClusterKeys::derive(None));
    config.transports = vec![TransportKind::Shm, TransportKind::Tcp];
    let engine = TransferEngine::open(config.clone());
    let mut target = [vec![0; 64]];
    let mut request = world.request(Opcode::Read, 0, &mut target);
    let error = one(&engine, request.clone()).unwrap_err();
    assert!(error.to_string().contains("token"), "{error}");

    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = closed.local_addr().unwrap().to_string();
    drop(closed);
    let gone = Peer {
        address,
        shm_socket: "mooncake-nobody".into(),
        node: Id128::random(),
        ..(*world.peer).clone()
    };
    request.peer = Arc::new(gone);
    config.keys = world.keys.clone();
    let engine = TransferEngine::open(config);
    let start = Instant::now();
    let error = one(&engine, request).unwrap_err();
    assert!(
        matches!(error, TransferError::Unreachable { .. }),
        "{error}"
    );
    assert!(start.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_restarted_node_is_reached_again() {
    let world = World::new("127.0.0.1:0");
    let engine = world.engine(TransportKind::Tcp);
    let mut target = [vec![0; 64]];
    let request = world.request(Opcode::Read, 0, &mut target);
    one(&engine, request.clone()).unwrap();
    let address = world.server.address();
    let World { host, server, .. } = world;
    drop(server);
    let end = soon();
    let listener = loop {
        match std::net::TcpListener::bind(address) {
            Ok(listener) => break listener,
            Err(e) => assert!(Instant::now() < end, "{e}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let _server = DataServer::start(Service::Node, host, listener, 16, LANE_STACK, None).unwrap();
    one(&engine, request).unwrap();
}

#[test]
fn lanes_beyond_the_limit_are_turned_away() {
    let world = World::new("127.0.0.1:0");
    let engines: Vec<_> = (0..20).map(|_| world.engine(TransportKind::Tcp)).collect();
    let mut target = [vec![0; 64]];
    let request = world.request(Opcode::Read, 0, &mut target);
    let refused = engines
        .iter()
        .filter_map(|e| one(e, request.clone()).err())
        .inspect(|e| assert!(e.to_string().contains("max-lanes"), "{e}"))
        .count();
    assert_eq!(refused, 4);
}

#[test]
fn garbage_on_the_data_port_harms_nobody() {
    use std::io::{Read, Write};
    let world = World::new("127.0.0.1:0");
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0xFF; 200],
        b"MKLANE\r\n",
        b"",
    ] {
        let mut stream = std::net::TcpStream::connect(world.server.address()).unwrap();
        stream.write_all(garbage).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
    }
    let mut target = [vec![0; 64]];
    let request = world.request(Opcode::Read, 0, &mut target);
    one(&world.engine(TransportKind::Tcp), request).unwrap();
}

#[test]
fn submitted_batches() {
    use crate::engine::pending::{BatchError, Submitter};
    let world = World::new("127.0.0.1:0");
    let submitter = Submitter::new(world.engine(TransportKind::Tcp), 2, 4).unwrap();
    let mut source = [pattern(1000, 1)];
    let write = world.request(Opcode::Write, 0, &mut source);
    let ids: Vec<_> = (0..4)
        .map(|_| submitter.submit(vec![write.clone()], soon()).unwrap())
        .collect();
    assert_eq!(
        submitter.submit(vec![write.clone()], soon()),
        Err(BatchError::Full)
    );
    for id in &ids {
        assert_eq!(submitter.collect(*id, soon()), Ok(vec![Ok(())]));
        assert_eq!(submitter.collect(*id, soon()), Err(BatchError::Unknown));
    }
    let again = submitter.submit(vec![write], soon()).unwrap();
    assert_ne!(again, ids[0]);
    assert_eq!(submitter.collect(ids[0], soon()), Err(BatchError::Unknown));
    assert_eq!(submitter.collect(again, soon()), Ok(vec![Ok(())]));
}
