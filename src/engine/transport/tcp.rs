//! TCP: a few persistent lanes per peer, blocking in the caller's thread, vectored I/O straight into its memory, every
//! write acknowledged. A batch for one peer is one frame each way.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::frame::Operation;
use super::lane::{self, Identity, Lane, LanePool};
use super::socket::Socket;
use super::{InFlight, Transport, TransportKind};
use crate::base::net::resolve_one;
use crate::engine::batch::{Opcode, Peer, TransferRequest, TransferResult};
use crate::engine::error::TransferError;

/// The client side of TCP.
pub struct TcpTransport {
    lanes: LanePool,
}

pub(super) fn connect(address: &str, timeout: Duration) -> std::io::Result<Socket> {
    Socket::connect_tcp(resolve_one(address)?, timeout)
}

impl TcpTransport {
    pub(crate) fn new(identity: Identity) -> Self {
        Self {
            lanes: LanePool::new(identity, connect),
        }
    }

    fn send(
        &self,
        requests: &[TransferRequest],
        deadline: Instant,
        fresh: bool,
    ) -> Result<(Lane, u64), TransferError> {
        let mut lane = self
            .lanes
            .take(&requests[0].peer.address, deadline, fresh)?;
        let operation = match requests[0].opcode {
            Opcode::Read => Operation::Read,
            Opcode::Write => Operation::Write,
        };
        match lane::send(&mut lane, operation, requests, true, true, deadline) {
            Ok(id) => Ok((lane, id)),
            // An idle lane whose peer was restarted: once more on a new one.
            Err(e) if lane.reused && e.is_path_failure() && !fresh => {
                drop(lane);
                self.send(requests, deadline, true)
            }
            Err(e) => Err(e),
        }
    }
}

impl Transport for TcpTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }

    fn reaches(&self, peer: &Peer) -> bool {
        !peer.address.is_empty()
    }

    fn start<'a>(
        &'a self,
        requests: &'a [TransferRequest],
        deadline: Instant,
    ) -> Result<Box<dyn InFlight + 'a>, TransferError> {
        let (lane, id) = self.send(requests, deadline, false)?;
        Ok(Box::new(Exchange {
            transport: self,
            requests,
            deadline,
            lane,
            id,
        }))
    }

    fn keep_only(&self, peers: &[Arc<Peer>]) {
        self.lanes
            .keep_only(|address| peers.iter().any(|p| p.address == address));
    }
}

struct Exchange<'a> {
    transport: &'a TcpTransport,
    requests: &'a [TransferRequest],
    deadline: Instant,
    lane: Lane,
    id: u64,
}

impl InFlight for Exchange<'_> {
    fn finish(mut self: Box<Self>, results: &mut Vec<TransferResult>) {
        let mut outcome = lane::receive(&mut self.lane, self.id, self.requests, self.deadline);
        // Requests are idempotent (same range, same bytes, same version): an idle lane that turns out dead is no reason
        // to fail. A timeout is: it has cost the caller its patience already.
        if let Err(TransferError::Broken { .. }) = outcome
            && self.lane.reused
            && Instant::now() < self.deadline
        {
            outcome = self
                .transport
                .send(self.requests, self.deadline, true)
                .and_then(|(lane, id)| {
                    self.lane = lane;
                    self.id = id;
                    lane::receive(&mut self.lane, self.id, self.requests, self.deadline)
                });
        }
        match outcome {
            Ok(outcomes) => {
                self.lane.done();
                results.extend(outcomes);
            }
            Err(error) => results.extend(self.requests.iter().map(|_| Err(error.clone()))),
        }
    }
}
