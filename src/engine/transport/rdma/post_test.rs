//! Batches over pretended devices: slices, choice of rails, time-outs, and what happens when a device does not let go.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::RdmaConfig;
use super::endpoint::Endpoint;
use super::fabric::Fabric;
use super::post::{Outcome, Rails};
use super::pretended::{Happened, Manner, Pretended};
use super::rail::{Direction, Job};
use super::registration::{Access, Registration};
use super::wire::Piece;
use crate::engine::memory::Memory;

const AT_ONCE: Manner = Manner::Takes(Duration::ZERO);
const STALL: Duration = Duration::from_millis(300);

/// A node with a rail per device, and the caller's memory.
struct Rig {
    devices: Vec<&'static Pretended>,
    rails: Rails,
    ours: (Memory, Arc<Registration>),
    theirs: (Memory, Arc<Registration>),
    lane: (UnixStream, UnixStream),
}

fn pattern(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 7 + (i >> 9)) as u8).collect()
}

fn bytes(memory: &Memory) -> Vec<u8> {
    // SAFETY: as many mapped bytes; nothing is under way.
    unsafe { std::slice::from_raw_parts(memory.as_ptr(), memory.len()) }.to_vec()
}

fn fill(memory: &Memory, with: &[u8]) {
    // SAFETY: as many mapped bytes; nothing is under way.
    unsafe { std::ptr::copy_nonoverlapping(with.as_ptr(), memory.as_ptr(), with.len()) };
}

impl Rig {
    fn new(length: usize, manners: &[Manner]) -> Self {
        let config = RdmaConfig {
            slice_timeout: STALL,
            ..RdmaConfig::default()
        };
        let devices: Vec<&'static Pretended> = manners.iter().map(|m| Pretended::new(*m)).collect();
        let opened = devices.iter().enumerate();
        let opened = opened.map(|(at, d)| d.device(&format!("dev{at}")));
        let fabric = Fabric::of(&config, opened.collect()).unwrap();
        let ends = fabric.devices.iter().enumerate();
        let ends = ends.map(|(at, d)| Some(Endpoint::active(d, at, config.depth).unwrap()));
        let rails = Rails::new(ends.collect(), &fabric);
        let memory = || {
            let memory = Memory::create("test", length).unwrap();
            let base = memory.as_ptr();
            let made = Registration::host(&fabric.devices, base, length, Access::Both).unwrap();
            (memory, Arc::new(made))
        };
        let (ours, theirs) = (memory(), memory());
        fill(&theirs.0, &pattern(length));
        Self {
            devices,
            rails,
            ours,
            theirs,
            lane: UnixStream::pair().unwrap(),
        }
    }

    fn run(&mut self, direction: Direction) -> Outcome {
        self.run_with(direction, 0)
    }

    fn run_with(&mut self, direction: Direction, flip: u32) -> Outcome {
        let start = self.theirs.0.as_ptr() as u64;
        let key = |at| self.theirs.1.rkey(at, start).unwrap() ^ flip;
        let pieces = [Piece {
            address: start,
            length: self.theirs.0.len() as u64,
            keys: (0..self.devices.len()).map(key).collect(),
        }];
        let job = Job {
            item: 5,
            local: self.ours.0.as_ptr() as u64,
            memory: &self.ours.1,
            remote: &pieces,
            addressable: true,
        };
        self.rails.run(direction, &[job], self.lane.0.as_fd())
    }

    fn failed(outcome: &Outcome) -> Vec<usize> {
        outcome.failed.iter().copied().collect()
    }
}

#[test]
fn slices_cover_everything_once_over_all_rails() {
    const LENGTH: usize = (5 << 20) + 12_345;
    let mut rig = Rig::new(LENGTH, &[AT_ONCE, AT_ONCE]);
    let outcome = rig.run(Direction::Fetch);
    assert_eq!((outcome.lost, Rig::failed(&outcome)), (0, vec![]));
    assert!(bytes(&rig.ours.0) == pattern(LENGTH));
    let each: Vec<u64> = rig
        .devices
        .iter()
        .map(|d| d.posted().iter().map(|(n, _)| u64::from(*n)).sum())
        .collect();
    assert_eq!(each.iter().sum::<u64>(), LENGTH as u64, "each byte once");
    assert!(each.iter().all(|n| *n > LENGTH as u64 / 4), "{each:?}");
    for device in &rig.devices {
        for h in device.happened() {
            let Happened::Posted(list) = h else { continue };
            assert!(list.len() <= 16 && list.last().unwrap().1, "{list:?}");
            assert!(list.iter().all(|(n, _)| *n <= 1 << 20));
        }
    }
    // Back: the same, and a byte read from each rail in the end.
    fill(&rig.theirs.0, &vec![0; LENGTH]);
    let outcome = rig.run(Direction::Bring);
    assert_eq!((outcome.lost, Rig::failed(&outcome)), (0, vec![]));
    assert!(bytes(&rig.theirs.0) == pattern(LENGTH));
    for device in &rig.devices {
        let last = device.happened().pop().unwrap();
        assert_eq!(last, Happened::Posted(vec![(1, true)]));
    }
}

#[test]
fn large_slices_are_each_signalled() {
    let mut rig = Rig::new(32 << 20, &[AT_ONCE]);
    assert_eq!(rig.run(Direction::Fetch).lost, 0);
    let posted = rig.devices[0].posted();
    assert!(posted.iter().all(|s| *s == (1 << 20, true)), "{posted:?}");
}

#[test]
fn a_rail_that_hangs_is_destroyed_before_its_slices_go_by_another() {
    for direction in [Direction::Fetch, Direction::Bring] {
        let mut rig = Rig::new(4 << 20, &[Manner::Hangs, AT_ONCE]);
        if direction == Direction::Bring {
            fill(&rig.ours.0, &pattern(4 << 20));
            fill(&rig.theirs.0, &vec![0; 4 << 20]);
        }
        let start = Instant::now();
        let outcome = rig.run(direction);
        assert_eq!((outcome.lost, Rig::failed(&outcome)), (1, vec![]));
        assert!(start.elapsed() < 10 * STALL, "{:?}", start.elapsed());
        let reason = outcome.reason.unwrap();
        assert_eq!(reason, "dev0: nothing moved in time");
        assert!(bytes(&rig.ours.0) == pattern(4 << 20));
        assert!(bytes(&rig.theirs.0) == pattern(4 << 20));
        assert!(rig.devices[0].happened().contains(&Happened::Destroyed));
        // The next batch knows of one rail only.
        let before = rig.devices[0].posted().len();
        assert_eq!(rig.run(direction).lost, 0);
        assert_eq!(rig.devices[0].posted().len(), before);
    }
}

#[test]
fn a_rail_that_hangs_is_found_beside_one_that_is_slow() {
    // The second completes something every few milliseconds, so that nobody ever sleeps for long.
    let slow = Manner::Takes(Duration::from_millis(25));
    let mut rig = Rig::new(64 << 20, &[Manner::Hangs, slow]);
    let start = Instant::now();
    let outcome = rig.run(Direction::Fetch);
    assert_eq!((outcome.lost, Rig::failed(&outcome)), (1, vec![]));
    assert!(bytes(&rig.ours.0) == pattern(64 << 20));
    // 64 slices at 25 ms; the hanging one's part goes as soon as it is given up.
    assert!(start.elapsed() < Duration::from_secs(8));
}

#[test]
fn what_moves_slowly_is_not_given_up() {
    // Each slice takes most of the time a rail may stand still; together they take several times of it.
    let slow = Manner::Takes(STALL * 2 / 3);
    let mut rig = Rig::new(8 << 20, &[slow]);
    let start = Instant::now();
    let outcome = rig.run(Direction::Fetch);
    assert_eq!((outcome.lost, Rig::failed(&outcome)), (0, vec![]));
    assert!(start.elapsed() > 4 * STALL, "{:?}", start.elapsed());
    assert!(bytes(&rig.ours.0) == pattern(8 << 20));
}

#[test]
fn with_no_rail_left_the_items_fail_in_bounded_time() {
    let mut rig = Rig::new(1 << 20, &[Manner::Hangs, Manner::Hangs]);
    let start = Instant::now();
    let outcome = rig.run(Direction::Bring);
    assert_eq!((outcome.lost, Rig::failed(&outcome)), (3, vec![5]));
    assert!(start.elapsed() < 10 * STALL);
    assert!(
        rig.devices
            .iter()
            .all(|d| d.happened().contains(&Happened::Destroyed))
    );
}

#[test]
fn a_wrong_key_fails_on_every_rail_and_moves_nothing() {
    let mut rig = Rig::new(1 << 20, &[AT_ONCE, AT_ONCE]);
    let outcome = rig.run_with(Direction::Fetch, 0x5A00);
    assert_eq!((outcome.lost, Rig::failed(&outcome)), (3, vec![5]));
    assert!(outcome.reason.unwrap().contains("remote access"));
    assert!(bytes(&rig.ours.0).iter().all(|b| *b == 0));
}

#[test]
fn a_caller_that_hangs_up_ends_it_at_once() {
    let mut rig = Rig::new(1 << 20, &[Manner::Hangs]);
    rig.lane.1 = UnixStream::pair().unwrap().0;
    let start = Instant::now();
    let outcome = rig.run(Direction::Fetch);
    assert_eq!(Rig::failed(&outcome), [5]);
    assert_eq!(outcome.reason.unwrap(), "dev0: the caller hung up");
    assert!(start.elapsed() < STALL, "{:?}", start.elapsed());
}

#[test]
fn what_a_device_does_not_let_go_of_stays_registered() {
    let mut rig = Rig::new(1 << 20, &[Manner::Stays, AT_ONCE]);
    assert_eq!(rig.run(Direction::Fetch).lost, 0);
    let Rig {
        devices,
        rails,
        ours,
        theirs,
        ..
    } = rig;
    drop(rails);
    drop((ours.1, theirs.1));
    // Scratch, ours, theirs.
    let given_back = |d: &Pretended| {
        let happened = d.happened().into_iter();
        happened.filter(|h| *h == Happened::GivenBack).count()
    };
    assert_eq!(given_back(devices[0]), 0, "{:?}", devices[0].happened());
    assert!(!devices[0].happened().contains(&Happened::Closed));
    assert_eq!(given_back(devices[1]), 3);
    assert!(devices[1].happened().contains(&Happened::Closed));
}
