//! One port for memory by address and for segments of nodes, as a process has that lends to a pool and is an engine.

use std::net::TcpListener;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use smallvec::smallvec;

use super::TransportKind;
use super::describe::Inquirer;
use super::lane::Identity;
use super::server::{DataServer, LANE_STACK, Serving};
use crate::base::clock::unix_ms;
use crate::base::handshake::Service;
use crate::base::id::{Id128, random_u64};
use crate::base::net::host_id;
use crate::base::trust::{ClusterKeys, Token};
use crate::engine::batch::{LocalSlice, Opcode, Peer, TransferRequest, TransferResult};
use crate::engine::error::TransferError;
use crate::engine::grant::Grant;
use crate::engine::host::{Noted, NotifyOrigin, NotifySink, SegmentHost};
use crate::engine::memory::Memory;
use crate::engine::peer::{Move, PeerEngine};
use crate::engine::{EngineConfig, TransferEngine};

const SIZE: usize = 1 << 20;

#[derive(Default)]
struct Writers(Mutex<i32>);
impl NotifySink for Writers {
    fn notify(&self, _: NotifyOrigin, _: &[u8]) -> Noted {
        Noted::Taken
    }
    fn shared_writer(&self, _: Id128, change: i32) {
        *self.0.lock() += change;
    }
}

fn keys() -> ClusterKeys {
    ClusterKeys::derive(Token::new("one port").as_ref())
}

/// A node on the port of a peer engine.
struct Node {
    serving: Option<Serving>,
    sink: Arc<Writers>,
    peer: Arc<Peer>,
    incarnation: u64,
    memory: Arc<Memory>,
}

impl Node {
    fn on(server: &Arc<DataServer>) -> Self {
        let sink = Arc::new(Writers::default());
        let node = Id128::random();
        let host = Arc::new(SegmentHost::new(node, keys(), sink.clone()));
        host.set_about("the master");
        let memory = Arc::new(Memory::create("node", SIZE).unwrap());
        let incarnation = random_u64();
        host.add("segment".into(), incarnation, memory.clone());
        let peer = Arc::new(Peer {
            node,
            name: "node".into(),
            address: server.address().to_string(),
            host_id: host_id(),
            shm_socket: server.socket_name().to_owned(),
        });
        Self {
            serving: server.serve(Service::Node, host),
            sink,
            peer,
            incarnation,
            memory,
        }
    }

    fn transfer(
        &self,
        engine: &TransferEngine,
        opcode: Opcode,
        bytes: &mut [u8],
    ) -> TransferResult {
        let grant = Grant {
            segment: 0,
            incarnation: self.incarnation,
            offset: 0,
            length: SIZE as u64,
            term: 1,
            expires_unix_ms: unix_ms() + 60_000,
            mac: [0; 16],
        };
        // SAFETY: outlives the transfer.
        let local = unsafe { LocalSlice::new(bytes.as_mut_ptr(), bytes.len()) };
        let request = TransferRequest {
            opcode,
            peer: self.peer.clone(),
            grant: grant.signed(opcode.access(), &keys()),
            offset: 0,
            length: bytes.len() as u64,
            local: smallvec![local],
            word: None,
            notify: Vec::new(),
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        engine.transfer(&[request], deadline).pop().unwrap()
    }

    fn works(&self, engine: &TransferEngine, seed: u8) {
        let mut bytes = vec![seed; 300_000];
        self.transfer(engine, Opcode::Write, &mut bytes).unwrap();
        // SAFETY: mapped, and written by the transfer that has ended.
        assert_eq!(unsafe { *self.memory.as_ptr().add(299_999) }, seed);
        bytes.fill(0);
        self.transfer(engine, Opcode::Read, &mut bytes).unwrap();
        assert!(bytes.iter().all(|b| *b == seed));
    }
}

fn client(service: Service, kind: TransportKind) -> Arc<TransferEngine> {
    let mut config = EngineConfig::new(Id128::random(), keys());
    config.transports = vec![kind];
    config.service = service;
    TransferEngine::open(config)
}

fn peer_engine() -> PeerEngine {
    let listen = "127.0.0.1:0".parse().unwrap();
    PeerEngine::open(listen, keys(), Duration::from_secs(5), None).unwrap()
}

/// A peer reads what the engine has registered by address.
fn peer_works(from: &PeerEngine, to: &PeerEngine, base: u64) {
    let mut here = [0u8; 100];
    // SAFETY: outlives the transfer.
    let local = unsafe { LocalSlice::new(here.as_mut_ptr(), here.len()) };
    let range = Move {
        opcode: Opcode::Read,
        local,
        remote_address: base + 5,
    };
    from.transfer(&to.address().to_string(), &[range], None)
        .unwrap();
    assert_eq!(here, [7; 100]);
}

#[test]
fn peers_and_clients_of_a_pool_meet_theirs_on_one_port() {
    let (engine, other) = (peer_engine(), peer_engine());
    let mut registered = vec![7u8; 4096];
    let base = NonNull::from(&mut registered[..]).cast();
    // SAFETY: outlives the engine's use.
    unsafe { engine.register(base, registered.len()).unwrap() };
    let base = registered.as_ptr() as u64;
    let (mut one, two) = (Node::on(engine.server()), Node::on(engine.server()));
    // Callers that say what they want, and those of before there was a choice.
    for service in [Service::Node, Service::Any] {
        let tcp = client(service, TransportKind::Tcp);
        one.works(&tcp, 1);
        two.works(&tcp, 2);
        one.works(&tcp, 3);
        let shm = client(service, TransportKind::Shm);
        one.works(&shm, 4);
        assert!(*one.sink.0.lock() >= 1, "a writer of the host is counted");
        two.works(&shm, 5);
    }
    peer_works(&other, &engine, base);
    let described = |service| {
        let inquirer = Inquirer::new(Identity {
            client: Id128::random(),
            keys: keys(),
            service,
            connect_timeout: Duration::from_secs(5),
        });
        let deadline = Instant::now() + Duration::from_secs(5);
        let address = engine.address().to_string();
        inquirer.describe(&address, deadline).unwrap()
    };
    for service in [Service::Peer, Service::Any] {
        let regions = described(service).regions;
        assert_eq!(regions.len(), 1, "nothing of the nodes");
        assert_eq!(regions[0].address, base);
    }
    assert_eq!(described(Service::Node).about, "the master");
    // Who asks for memory by address does not get to the nodes' by a grant either.
    let stranger = client(Service::Peer, TransportKind::Tcp);
    let mut bytes = [0; 8];
    let refused = one.transfer(&stranger, Opcode::Read, &mut bytes);
    assert_eq!(refused, Err(TransferError::Stale));
    // A node goes: its writers with it, nobody else.
    let tcp = client(Service::Node, TransportKind::Tcp);
    let shm = client(Service::Node, TransportKind::Shm);
    one.works(&tcp, 6);
    one.works(&shm, 7);
    one.serving = None;
    assert!(one.transfer(&tcp, Opcode::Read, &mut bytes).is_err());
    let until = Instant::now() + Duration::from_secs(5);
    while *one.sink.0.lock() != 0 {
        assert!(Instant::now() < until, "its writers are gone");
        std::thread::sleep(Duration::from_millis(5));
    }
    two.works(&tcp, 8);
    two.works(&shm, 9);
    peer_works(&other, &engine, base);
}

#[test]
fn who_has_another_token_does_not_share_a_port() {
    let engine = peer_engine();
    let sink = Arc::new(Writers::default());
    let other = ClusterKeys::derive(Token::new("another").as_ref());
    let host = Arc::new(SegmentHost::new(Id128::random(), other, sink));
    assert!(engine.server().serve(Service::Node, host).is_none());
}

#[test]
fn a_port_of_one_service_serves_whoever_comes() {
    let sink = Arc::new(Writers::default());
    let host = Arc::new(SegmentHost::new(Id128::random(), keys(), sink));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let server = DataServer::start(Service::Node, host, listener, 8, LANE_STACK, None).unwrap();
    let other = peer_engine();
    assert!(other.probe(&server.address().to_string()).is_ok());
}
