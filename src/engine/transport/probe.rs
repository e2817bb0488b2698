//! Tests the way to a peer's data port: connection, handshake, round trips, bytes that the peer forgets.
//!
//! Owns what can be learned of a path without a grant. Touches no segment, and uses a connection of its own, so that what
//! it measures is the path and not the state of a pool of lanes.

use std::io;
use std::time::{Duration, Instant};

use super::frame::{self, HEADER_BYTES, Operation, PING_BYTES_MAX};
use super::socket::{Socket, Timed, Until};
use crate::base::handshake::{self, HandshakeError, LaneKind};
use crate::base::id::Id128;
use crate::base::net::resolve_one;
use crate::base::trust::ClusterKeys;

/// Empty requests of one probe; the shortest round trip counts.
const PINGS: usize = 8;
/// Full requests under way at once, so that the round trip does not count as bandwidth.
const DEPTH: u64 = 4;
/// No new bytes are sent after this long.
const TRANSFER: Duration = Duration::from_millis(400);
/// Bound of the connection.
const CONNECT: Duration = Duration::from_millis(1500);
/// Bound of the handshake and the empty requests, and of the first large request.
const ANSWER: Duration = Duration::from_millis(2000);
/// Larger than any packet, and small enough for the slowest link.
const LARGE: u64 = 64 << 10;
/// Bound of one request of 1 MiB.
const MEBIBYTE: Duration = Duration::from_millis(3000);

/// A path that works.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Path {
    /// Time of the TCP handshake.
    pub connect: Duration,
    /// Shortest round trip of an empty request.
    pub round_trip: Duration,
    /// Bytes moved; 0 when none were asked for.
    pub moved: u64,
    /// Their rate.
    pub bytes_per_second: u64,
}

/// Why a path does not work: a word for programs, a sentence part for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct PathFault {
    /// `name`, `refused`, `rejected`, `no_route`, `timeout`, `forbidden`, `token`, `version`, `stranger`, `busy`, `silent`,
    /// `black_hole` (small requests pass, large ones do not), `crawls`, `broken`.
    pub cause: &'static str,
    /// What was seen.
    pub reason: String,
}

fn fault(cause: &'static str, reason: impl Into<String>) -> PathFault {
    PathFault {
        cause,
        reason: reason.into(),
    }
}

fn timed_out(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
    )
}

fn not_connected(error: &io::Error) -> PathFault {
    use rustix::io::Errno;
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::CONNREFUSED) => fault("refused", "refused: nothing listens there"),
        Some(Errno::NETUNREACH) => fault("no_route", "no route there"),
        Some(Errno::HOSTUNREACH | Errno::ACCESS) => fault(
            "rejected",
            "unreachable: a router or firewall said no, or no host has that address",
        ),
        Some(Errno::PERM) => fault("forbidden", "its own firewall forbids it"),
        _ if timed_out(error) => fault("timeout", "no answer: the packets are dropped"),
        _ => fault("broken", error.to_string()),
    }
}

/// Tests the way to the data port at `address`, moving up to `bytes` (at least 1 MiB unless 0). Takes about ten seconds at most.
///
/// # Errors
/// See [`PathFault`].
pub fn probe(address: &str, me: Id128, keys: &ClusterKeys, bytes: u64) -> Result<Path, PathFault> {
    let target = resolve_one(address).map_err(|e| fault("name", e.to_string()))?;
    let start = Instant::now();
    let mut socket = Socket::connect_tcp(target, CONNECT).map_err(|e| not_connected(&e))?;
    let connect = start.elapsed();
    let until = Instant::now() + ANSWER;
    let mut timed = Timed {
        socket: &mut socket,
        deadline: until,
    };
    handshake::connect(&mut timed, LaneKind::Data, me, keys).map_err(|e| not_greeted(&e))?;
    let mut round_trip = Duration::MAX;
    for id in 0..PINGS as u64 {
        let start = Instant::now();
        send(&mut socket, id, 0, until)
            .and_then(|()| answer(&mut socket, until))
            .map_err(|e| broken(&e, "silent", "takes the connection and does not answer"))?;
        round_trip = round_trip.min(start.elapsed());
    }
    let (mut moved, mut took) = (0, Duration::ZERO);
    if bytes > 0 {
        let until = Instant::now() + ANSWER;
        send(&mut socket, 0, LARGE, until)
            .and_then(|()| answer(&mut socket, until))
            .map_err(|e| {
                broken(
                    &e,
                    "black_hole",
                    "small requests are answered, large ones vanish",
                )
            })?;
        (moved, took) = transfer(&mut socket, bytes)
            .map_err(|e| broken(&e, "crawls", "1 MiB takes more than three seconds"))?;
    }
    socket.shutdown();
    Ok(Path {
        connect,
        round_trip,
        moved,
        bytes_per_second: (moved as f64 / took.as_secs_f64().max(1e-6)) as u64,
    })
}

fn not_greeted(error: &HandshakeError) -> PathFault {
    let cause = match error {
        HandshakeError::Token => "token",
        HandshakeError::Version { .. } => "version",
        HandshakeError::Busy => "busy",
        HandshakeError::Io(e) => {
            return broken(e, "silent", "takes the connection and says nothing");
        }
        HandshakeError::Kind(_) | HandshakeError::NotMooncake { .. } => "stranger",
    };
    fault(cause, error.to_string())
}

fn broken(error: &io::Error, silent: &'static str, words: &str) -> PathFault {
    if timed_out(error) {
        fault(silent, words)
    } else {
        fault("broken", format!("the connection broke: {error}"))
    }
}

fn send(socket: &mut Socket, id: u64, payload: u64, until: Instant) -> io::Result<()> {
    let mut framed = Vec::with_capacity(HEADER_BYTES + payload as usize);
    frame::encode_header(&mut framed, Operation::Ping, 0, 0, payload, id);
    framed.resize(HEADER_BYTES + payload as usize, 0x5A);
    socket.write_all_from(&framed, &[], Until::Deadline(until))
}

fn answer(socket: &mut Socket, until: Instant) -> io::Result<()> {
    socket.need(HEADER_BYTES, Until::Deadline(until))?;
    let mut head = [0; HEADER_BYTES];
    head.copy_from_slice(socket.take(HEADER_BYTES));
    match frame::decode_reply(&head) {
        Ok(reply) if reply.status == 0 => Ok(()),
        _ => Err(io::Error::other("the answer is none of this protocol")),
    }
}

/// Bytes moved and the time from the first sent to the last answered.
fn transfer(socket: &mut Socket, bytes: u64) -> io::Result<(u64, Duration)> {
    let wanted = bytes.div_ceil(PING_BYTES_MAX);
    let start = Instant::now();
    let (mut sent, mut answered) = (0, 0);
    loop {
        // One deadline per request: a slow path moves less, and is not called broken.
        let until = Instant::now() + MEBIBYTE;
        let goes_on = sent == 0 || start.elapsed() < TRANSFER;
        if goes_on && sent < wanted && sent - answered < DEPTH {
            send(socket, sent, PING_BYTES_MAX, until)?;
            sent += 1;
        } else if answered < sent {
            answer(socket, until)?;
            answered += 1;
        } else {
            return Ok((answered * PING_BYTES_MAX, start.elapsed()));
        }
    }
}
