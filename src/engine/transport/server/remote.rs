//! Frames whose bytes go by RDMA: the same gate, order and answer as over TCP, with this node's NIC in the place of the
//! socket. Owns that order; how the bytes move is `rdma::served`'s business.

use std::io::{self, Read};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::counters::RDMA;
use super::lane::{ServedLane, malformed, time_for};
use crate::engine::batch::Opcode;
use crate::engine::error::TransferError;
use crate::engine::host::{Segment, SegmentHost, WritePass};
use crate::engine::memory::Memory;
use crate::engine::transport::frame::{self, Item, RequestHeader, Status};
use crate::engine::transport::rdma::wire::{NOT_SERVED, Piece, decode_pieces, encode_join};
use crate::engine::transport::rdma::{Moved, ServedRails};
use crate::engine::transport::socket::{Timed, Until};

/// How long a join waits for memory that is being registered.
const REGISTRATION: Duration = Duration::from_millis(500);
/// How long the rest of a frame may take.
const REST: Duration = Duration::from_secs(10);

/// An item that has passed the gate.
struct Passed {
    segment: Arc<Segment>,
    pointer: *mut u8,
}

/// Asks the gate for every item of a write. Fences wait for the pass.
fn enter<'h>(
    host: &'h SegmentHost,
    items: &[Item],
) -> (WritePass<'h>, Vec<Result<Passed, TransferError>>) {
    let check = |item: &Item| -> Result<Passed, TransferError> {
        let (offset, length) = (item.offset, item.length);
        let segment = host.check(Opcode::Write, &item.grant, offset, length, item.word)?;
        let pointer = segment.memory.range(offset, length);
        let pointer = pointer.ok_or(TransferError::OutOfBounds)?;
        Ok(Passed { segment, pointer })
    };
    let mut outcomes: Vec<Result<Passed, TransferError>> = items.iter().map(check).collect();
    let checked = items.iter().zip(&outcomes).filter(|(_, o)| o.is_ok());
    let ranges: Vec<_> = checked
        .map(|(item, _)| (item.grant, item.offset, item.length))
        .collect();
    let (pass, entered) = host.enter_fetched_write(&ranges);
    let mut entered = entered.into_iter();
    for outcome in outcomes.iter_mut().filter(|o| o.is_ok()) {
        if let Some(Err(error)) = entered.next() {
            *outcome = Err(error);
        }
    }
    (pass, outcomes)
}

impl ServedLane<'_> {
    fn payload(&mut self, header: &RequestHeader) -> io::Result<Vec<u8>> {
        let mut payload = vec![0; header.payload_bytes as usize];
        let mut timed = Timed {
            socket: &mut self.socket,
            deadline: Instant::now() + REST,
        };
        timed.read_exact(&mut payload)?;
        Ok(payload)
    }

    /// Brings queue pairs up for this lane, or says why not.
    pub(super) fn join(&mut self, header: &RequestHeader) -> io::Result<()> {
        let request = self.payload(header)?;
        // Earlier ones are of no further use.
        self.rails = None;
        let (rails, answer) = match &self.shared.fabric {
            None => (None, encode_join(&[], NOT_SERVED)),
            Some(fabric) => {
                let segments = self.served.host.segments();
                let memories: Vec<Arc<Memory>> = segments
                    .iter()
                    .filter(|s| !s.memory.is_empty())
                    .map(|s| s.memory.clone())
                    .collect();
                let until = Instant::now() + REGISTRATION;
                ServedRails::join(fabric, &memories, &request, self.number, until)
            }
        };
        self.rails = rails;
        self.reply.clear();
        let length = answer.len() as u64;
        frame::encode_reply(&mut self.reply, Status::Ok, 0, length, header.id);
        self.reply.extend_from_slice(&answer);
        self.socket
            .write_all_from(&self.reply, &[], Until::Deadline(Instant::now() + REST))
    }

    /// The caller's pieces, by item.
    fn pieces(&mut self, header: &RequestHeader) -> io::Result<Vec<Vec<Piece>>> {
        let payload = self.payload(header)?;
        let Some(rails) = &self.rails else {
            self.refuse(header.id, "the lane was not joined")?;
            return Err(malformed("the lane was not joined"));
        };
        let lengths: Vec<u64> = self.items.iter().map(|i| i.length).collect();
        match decode_pieces(&payload, &lengths, rails.count()) {
            Ok(pieces) => Ok(pieces),
            Err(what) => {
                self.refuse(header.id, what)?;
                Err(malformed(what))
            }
        }
    }

    /// A read: checked, brought, and checked again once the bytes have left.
    pub(super) fn bring(&mut self, header: &RequestHeader, _until: Until) -> io::Result<()> {
        let pieces = self.pieces(header)?;
        let served = self.served.clone();
        let pass = |item: &Item| -> Result<Passed, TransferError> {
            let host = &served.host;
            let (offset, length) = (item.offset, item.length);
            let segment = host.check(Opcode::Read, &item.grant, offset, length, item.word)?;
            let changed =
                |w: crate::engine::batch::Word| !segment.memory.word_is(w.offset, w.value);
            if item.word.is_some_and(changed) {
                return Err(TransferError::Changed);
            }
            let pointer = segment.memory.range(offset, length);
            let pointer = pointer.ok_or(TransferError::OutOfBounds)?;
            Ok(Passed { segment, pointer })
        };
        let mut outcomes: Vec<Result<Passed, TransferError>> =
            self.items.iter().map(pass).collect();
        let lost = self.carry(false, &mut outcomes, &pieces);
        let mut statuses = Vec::with_capacity(outcomes.len());
        let mut bytes = 0;
        for (item, outcome) in self.items.iter().zip(&outcomes) {
            let outcome = match outcome {
                Ok(passed) => match item.word {
                    Some(w) if !passed.segment.memory.word_is(w.offset, w.value) => {
                        Err(&TransferError::Changed)
                    }
                    _ => Ok(()),
                },
                Err(error) => Err(error),
            };
            statuses.push(match outcome {
                Ok(()) => {
                    bytes += item.length;
                    Status::Ok as u8
                }
                Err(TransferError::Changed) => Status::Changed as u8,
                Err(error) => self.refused(error),
            });
        }
        served.counters.read(RDMA, bytes);
        drop(outcomes);
        self.answer_remote(header, &statuses, lost)
    }

    /// A write: through the gate, fetched, told, published; the passes are held until then.
    pub(super) fn fetch(
        &mut self,
        header: &RequestHeader,
        notifies: &[u8],
        _until: Until,
    ) -> io::Result<()> {
        let pieces = self.pieces(header)?;
        let served = self.served.clone();
        let (pass, mut outcomes) = enter(&served.host, &self.items);
        let lost = self.carry(true, &mut outcomes, &pieces);
        let mut statuses = Vec::with_capacity(outcomes.len());
        let mut rest = notifies;
        for ((item, outcome), mine) in self.items.iter().zip(outcomes).zip(&pieces) {
            let (notify, after) = rest.split_at(item.notify_bytes);
            rest = after;
            let told = outcome.and_then(|passed| {
                self.tell_and_publish(&passed.segment, item, notify)?;
                let bytes = mine.iter().map(|p| p.length).sum();
                served.counters.written(RDMA, bytes);
                Ok(())
            });
            statuses.push(match told {
                Ok(()) => Status::Ok as u8,
                Err(error) => self.refused(&error),
            });
        }
        drop(pass);
        self.answer_remote(header, &statuses, lost)
    }

    /// Moves the bytes of what has passed; what does not arrive becomes an error. The rails that were lost, a bit each.
    fn carry(
        &mut self,
        into_ours: bool,
        outcomes: &mut [Result<Passed, TransferError>],
        pieces: &[Vec<Piece>],
    ) -> u64 {
        let Some(rails) = &mut self.rails else {
            return 0;
        };
        let broken = |reason: String| TransferError::Broken {
            peer: "rdma".to_owned(),
            reason,
        };
        let mut memories = Vec::with_capacity(outcomes.len());
        for (outcome, mine) in outcomes.iter_mut().zip(pieces) {
            let ready = match outcome {
                Ok(passed) if !mine.is_empty() => match rails.ready(&passed.segment.memory) {
                    Ok(ready) => Some(ready),
                    Err(error) => {
                        tracing::debug!(%error, "rdma: an item goes another way");
                        *outcome = Err(broken(error.to_string()));
                        None
                    }
                },
                _ => None,
            };
            memories.push(ready);
        }
        let moved: Vec<Moved<'_>> = outcomes
            .iter()
            .zip(&memories)
            .zip(pieces)
            .enumerate()
            .filter_map(|(item, ((outcome, memory), mine))| {
                let (Ok(passed), Some(memory)) = (outcome, memory) else {
                    return None;
                };
                Some(Moved {
                    item,
                    pointer: passed.pointer,
                    memory,
                    addressable: passed.segment.memory.device().is_none(),
                    pieces: mine,
                })
            })
            .collect();
        if moved.is_empty() {
            return 0;
        }
        let outcome = rails.carry(into_ours, &moved, self.socket.fd());
        drop(moved);
        if let Some(reason) = &outcome.reason {
            tracing::warn!(client = %self.client, "rdma: a rail failed: {reason}");
        }
        for item in outcome.failed {
            let reason = outcome.reason.clone().unwrap_or_default();
            outcomes[item] = Err(broken(reason));
        }
        outcome.lost
    }

    fn answer_remote(
        &mut self,
        header: &RequestHeader,
        statuses: &[u8],
        lost: u64,
    ) -> io::Result<()> {
        self.reply.clear();
        frame::encode_reply(&mut self.reply, Status::Ok, header.items, lost, header.id);
        self.reply.extend_from_slice(statuses);
        self.socket.write_all_from(&self.reply, &[], time_for(0))
    }
}
