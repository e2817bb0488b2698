//! Asking a peer what it has registered, and whether it is there at all.

use std::io::Read;
use std::time::Instant;

use super::frame::{self, Description, HEADER_BYTES, Operation, Status};
use super::lane::{Identity, Lane, LanePool};
use super::socket::{Timed, Until};
use super::tcp::connect;
use crate::engine::error::TransferError;

/// Lanes for questions.
pub(crate) struct Inquirer {
    lanes: LanePool,
}

impl Inquirer {
    pub(crate) fn new(identity: Identity) -> Self {
        Self {
            lanes: LanePool::new(identity, connect),
        }
    }

    fn ask(
        &self,
        address: &str,
        operation: Operation,
        deadline: Instant,
    ) -> Result<Vec<u8>, TransferError> {
        let mut lane = self.lanes.take(address, deadline, false)?;
        match exchange(&mut lane, operation, deadline) {
            // An idle lane whose peer was restarted: once more on a new one.
            Err(e) if lane.reused && e.is_path_failure() => {
                drop(lane);
                let mut lane = self.lanes.take(address, deadline, true)?;
                let answer = exchange(&mut lane, operation, deadline)?;
                lane.done();
                Ok(answer)
            }
            Ok(answer) => {
                lane.done();
                Ok(answer)
            }
            Err(e) => Err(e),
        }
    }

    /// Whether somebody answers.
    pub(crate) fn ping(&self, address: &str, deadline: Instant) -> Result<(), TransferError> {
        self.ask(address, Operation::Ping, deadline).map(|_| ())
    }

    /// Who is there, and its regions.
    pub(crate) fn describe(
        &self,
        address: &str,
        deadline: Instant,
    ) -> Result<Description, TransferError> {
        let answer = self.ask(address, Operation::Describe, deadline)?;
        frame::decode_description(&answer).map_err(|what| TransferError::Protocol {
            peer: address.to_owned(),
            what,
        })
    }
}

fn exchange(
    lane: &mut Lane,
    operation: Operation,
    deadline: Instant,
) -> Result<Vec<u8>, TransferError> {
    let peer = lane.peer.clone();
    let io = |e: std::io::Error| TransferError::from_io(&peer, &e);
    let wrong = |what| TransferError::Protocol {
        peer: peer.to_string(),
        what,
    };
    let mut request = Vec::with_capacity(HEADER_BYTES);
    frame::encode_header(&mut request, operation, 0, 0, 0, 1);
    let socket = lane.socket()?;
    socket
        .write_all_from(&request, &[], Until::Deadline(deadline))
        .map_err(io)?;
    let mut timed = Timed { socket, deadline };
    let mut head = [0; HEADER_BYTES];
    timed.read_exact(&mut head).map_err(io)?;
    let reply = frame::decode_reply(&head).map_err(wrong)?;
    if reply.status != Status::Ok as u8 || reply.items != 0 {
        return Err(wrong("answer to a question"));
    }
    if reply.payload_bytes > frame::DESCRIPTION_BYTES_MAX {
        return Err(wrong("length of the description"));
    }
    let mut answer = vec![0; reply.payload_bytes as usize];
    timed.read_exact(&mut answer).map_err(io)?;
    Ok(answer)
}
