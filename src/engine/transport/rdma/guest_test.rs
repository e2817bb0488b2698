//! What needs devices: run by `tests/e2e/rdma/run` in a guest with two Soft-RoCE devices, rxe0 and rxe1.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::endpoint::Endpoint;
use super::fabric::Fabric;
use super::registration::{Access, Registration};
use super::served::{Moved, MovedOutcome, ServedRails};
use super::wire::{Piece, decode_join, encode_join};
use super::{RdmaConfig, RdmaError};
use crate::engine::memory::Memory;

const BYTES: usize = 8 << 20;

/// A caller and a node without a lane between them.
struct Pair {
    caller: Arc<Fabric>,
    ends: Vec<Option<Endpoint>>,
    rails: ServedRails,
    buffer: Vec<u8>,
    registration: Arc<Registration>,
    memory: Arc<Memory>,
    lane: (UnixStream, UnixStream),
}

fn pattern(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 7 + (i >> 9)) as u8).collect()
}

impl Pair {
    fn new() -> Self {
        Self::with(RdmaConfig {
            slice_timeout: Duration::from_secs(5),
            retries: 3,
            ..RdmaConfig::default()
        })
    }

    fn with(config: RdmaConfig) -> Self {
        let caller = Fabric::open(&config).unwrap();
        assert_eq!(caller.devices.len(), 2, "{}", caller.summary());
        let node = caller.clone();
        let ends = caller.passive_ends(|_| false);
        let mine: Vec<_> = ends.iter().map(|e| e.describe(&config).unwrap()).collect();
        let memory = Arc::new(Memory::create("test", BYTES).unwrap());
        let until = Instant::now() + Duration::from_secs(5);
        let request = encode_join(&mine, "");
        let (rails, answer) =
            ServedRails::join(&node, std::slice::from_ref(&memory), &request, 0, until);
        let (theirs, reason) = decode_join(&answer).unwrap();
        let rails = rails.unwrap_or_else(|| panic!("{reason}"));
        for (end, their) in ends.iter().zip(&theirs) {
            end.accept(their, &config).unwrap();
        }
        let mut buffer = pattern(BYTES);
        let registration = caller
            .register(buffer.as_mut_ptr(), BYTES, Access::Both)
            .unwrap();
        Self {
            caller,
            ends: ends.into_iter().map(Some).collect(),
            rails,
            buffer,
            registration: Arc::new(registration),
            memory,
            lane: UnixStream::pair().unwrap(),
        }
    }

    fn pieces(&self) -> Vec<Piece> {
        let start = self.buffer.as_ptr() as u64;
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < BYTES as u64 {
            let address = start + done;
            let length = self.registration.run(address);
            let key = |at| self.registration.rkey(at, address).unwrap();
            pieces.push(Piece {
                address,
                length,
                keys: (0..self.ends.len()).map(key).collect(),
            });
            done += length;
        }
        pieces
    }

    fn carry(&mut self, into_ours: bool, pieces: &[Piece]) -> MovedOutcome {
        let ready = self.rails.ready(&self.memory).unwrap();
        let moved = Moved {
            item: 0,
            pointer: self.memory.as_ptr(),
            memory: &ready,
            addressable: true,
            pieces,
        };
        self.rails.carry(into_ours, &[moved], self.lane.0.as_fd())
    }

    fn there(&self) -> Vec<u8> {
        // SAFETY: BYTES mapped bytes; nothing is under way.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), BYTES) }.to_vec()
    }
}

#[test]
#[ignore = "needs RDMA devices: tests/e2e/rdma/run"]
fn fetches_and_brings_over_both_rails() {
    let mut pair = Pair::new();
    let pieces = pair.pieces();
    let outcome = pair.carry(true, &pieces);
    assert_eq!((outcome.lost, outcome.failed), (0, vec![]));
    assert!(pair.there() == pattern(BYTES), "fetched");
    pair.buffer.fill(0);
    let outcome = pair.carry(false, &pieces);
    assert_eq!((outcome.lost, outcome.failed), (0, vec![]));
    assert!(pair.buffer == pattern(BYTES), "brought");
}

#[test]
#[ignore = "needs RDMA devices: tests/e2e/rdma/run"]
fn memory_larger_than_a_registration_is_registered_in_parts() {
    let mut pair = Pair::with(RdmaConfig {
        registration: 1 << 20,
        ..RdmaConfig::default()
    });
    let pieces = pair.pieces();
    assert_eq!(pieces.len(), BYTES >> 20);
    assert!(pair.carry(true, &pieces).failed.is_empty());
    assert!(pair.there() == pattern(BYTES), "fetched");
    pair.buffer.fill(0);
    assert!(pair.carry(false, &pieces).failed.is_empty());
    assert!(pair.buffer == pattern(BYTES), "brought");
}

#[test]
#[ignore = "needs RDMA devices: tests/e2e/rdma/run"]
fn a_rail_that_is_gone_is_replaced_by_the_other() {
    for into_ours in [true, false] {
        let mut pair = Pair::new();
        let pieces = pair.pieces();
        assert!(pair.carry(true, &pieces).failed.is_empty());
        if !into_ours {
            pair.buffer.fill(0);
        }
        pair.ends[0] = None;
        let outcome = pair.carry(into_ours, &pieces);
        assert_eq!(outcome.lost, 1, "{:?}", outcome.reason);
        assert!(outcome.failed.is_empty(), "it went by the other rail");
        if into_ours {
            assert!(pair.there() == pattern(BYTES));
        } else {
            assert!(pair.buffer == pattern(BYTES));
        }
    }
}

#[test]
#[ignore = "needs RDMA devices: tests/e2e/rdma/run"]
fn a_wrong_key_fails_and_reaches_nothing() {
    let mut pair = Pair::new();
    let mut pieces = pair.pieces();
    for key in pieces.iter_mut().flat_map(|p| &mut p.keys) {
        *key ^= 0x5A00;
    }
    pair.buffer.fill(9);
    let outcome = pair.carry(false, &pieces);
    assert_eq!(outcome.failed, [0]);
    let reason = outcome.reason.unwrap();
    assert!(reason.contains("remote access"), "{reason}");
    assert!(pair.buffer.iter().all(|b| *b == 9));
}

#[test]
#[ignore = "needs RDMA devices: tests/e2e/rdma/run"]
fn a_caller_that_hangs_up_ends_it() {
    let mut pair = Pair::new();
    let pieces = pair.pieces();
    pair.ends.clear();
    drop(std::mem::replace(
        &mut pair.lane.1,
        UnixStream::pair().unwrap().0,
    ));
    let start = Instant::now();
    let outcome = pair.carry(true, &pieces);
    assert_eq!(outcome.failed, [0]);
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
#[ignore = "needs RDMA devices: tests/e2e/rdma/run"]
fn soft_roce_has_no_dmabuf_and_says_so() {
    #[derive(Debug)]
    struct Card;
    impl crate::engine::memory::DeviceCopies for Card {
        unsafe fn read(&self, _: usize, _: *mut u8, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        unsafe fn write(&self, _: usize, _: *const u8, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn export(&self, _: usize, _: usize) -> std::io::Result<(std::os::fd::OwnedFd, u64)> {
            panic!("nothing is exported for NICs that cannot use it");
        }
    }
    let pair = Pair::new();
    assert!(!pair.caller.can_dmabuf());
    let base = std::ptr::NonNull::dangling();
    let memory = Arc::new(Memory::on_device(base, 4096, Arc::new(Card)));
    let until = Instant::now() + Duration::from_secs(5);
    let refused = pair
        .caller
        .served(&memory, Access::Own, until)
        .err()
        .unwrap();
    assert!(matches!(&refused, RdmaError::Device { reason, .. } if reason.contains("dma-buf")));
}
