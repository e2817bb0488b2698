//! One lane of a data server, from its first frame on: reads and writes of the memory that is served, each through its gate.
//!
//! Owns the order of things within a frame. Frames whose bytes go by RDMA are `remote`'s; who listens, and what is served, is
//! `server`'s.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::counters::RDMA;
use super::{Served, Shared};
use crate::base::handshake::Service;
use crate::base::id::Id128;
use crate::engine::batch::{LocalSlice, Opcode};
use crate::engine::error::TransferError;
use crate::engine::host::{NotifyOrigin, Reach, Segment, SegmentHost};
use crate::engine::memory::DeviceCopies;
use crate::engine::transport::frame::{self, HEADER_BYTES, Item, Operation, RequestHeader, Status};
use crate::engine::transport::rdma::ServedRails;
use crate::engine::transport::socket::{Socket, Until, WATCHED_BYTES_MAX};

/// How long a frame may take from its first byte to its last, per 64 MiB of payload.
const FRAME_TIMEOUT: Duration = Duration::from_secs(10);
/// Most bytes of a refused write that are read and forgotten to keep the lane in step.
const SKIP_MAX: u64 = 64 << 20;

/// Counts a same-host client as long as its lane lives.
pub(super) struct SharedWriter(Arc<SegmentHost>, Id128);

impl SharedWriter {
    fn new(host: &Arc<SegmentHost>, client: Id128) -> Self {
        host.shared_writer(client, 1);
        Self(host.clone(), client)
    }
}

impl Drop for SharedWriter {
    fn drop(&mut self) {
        self.0.shared_writer(self.1, -1);
    }
}

/// Buffer between a socket and a device.
const DEVICE_BYTES: usize = 4 << 20;

pub(super) struct ServedLane<'a> {
    pub(super) shared: &'a Shared,
    pub(super) socket: Socket,
    pub(super) client: Id128,
    /// What the caller has named.
    pub(super) wanted: Service,
    /// Whose memory it is at.
    pub(super) served: Arc<Served>,
    /// Where it counts as a same-host writer.
    pub(super) writers: Vec<SharedWriter>,
    pub(super) same_host: bool,
    pub(super) items: Vec<Item>,
    pub(super) reply: Vec<u8>,
    /// Of this lane among all there were.
    pub(super) number: u64,
    /// Once the caller has joined.
    pub(super) rails: Option<ServedRails>,
}

/// The bound for moving `bytes` that the gate has let through.
pub(super) fn time_for(bytes: u64) -> Until {
    let scale = 1 + (bytes >> 26).min(10_000) as u32;
    Until::Deadline(Instant::now() + FRAME_TIMEOUT * scale)
}

pub(super) fn malformed(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl ServedLane<'_> {
    /// Before the first frame.
    pub(super) fn begin(&mut self) -> io::Result<()> {
        let served = self.served.clone();
        self.turn_to(served)
    }

    /// From here on the lane is at this one's memory.
    fn turn_to(&mut self, served: Arc<Served>) -> io::Result<()> {
        if !self.shared.turned(self.number, &served) {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let is_known = self.writers.iter().any(|w| w.0.node == served.host.node);
        if self.same_host && !is_known {
            self.writers
                .push(SharedWriter::new(&served.host, self.client));
        }
        self.served = served;
        Ok(())
    }

    /// Turns to whoever has the memory that a frame names: a port may serve several. A frame is for one of them.
    fn find(&mut self) -> io::Result<()> {
        let Some(item) = self.items.first() else {
            return Ok(());
        };
        if !self.shared.several.load(Ordering::Acquire) || self.served.has(&item.grant) {
            return Ok(());
        }
        match self.shared.owner(self.wanted, &item.grant) {
            Some(served) => self.turn_to(served),
            // The gate says what is wrong with it.
            None => Ok(()),
        }
    }

    /// Serves frames until the peer closes. A malformed frame is answered and ends the lane: the stream can no longer
    /// be trusted to be in step.
    pub(super) fn serve(&mut self) -> io::Result<()> {
        let mut is_due = true;
        loop {
            let idle = Instant::now();
            if is_due {
                self.socket.watch(idle);
            }
            if !self.socket.need_or_end(1, Until::Idle)? {
                return Ok(());
            }
            self.socket.heard(idle);
            let start = Instant::now();
            let until = Until::Deadline(start + FRAME_TIMEOUT);
            self.socket.need(HEADER_BYTES, until)?;
            let mut head = [0; HEADER_BYTES];
            head.copy_from_slice(self.socket.take(HEADER_BYTES));
            let header = match frame::decode_request(&head) {
                Ok(header) => header,
                Err(what) => return self.refuse(0, what),
            };
            self.socket.need(header.meta_bytes, until)?;
            let meta = self.socket.take(header.meta_bytes);
            if let Err(what) = frame::decode_items(&header, meta, &mut self.items) {
                return self.refuse(header.id, what);
            }
            let notifies = match header.operation {
                Operation::Write | Operation::Fetch => {
                    meta[header.items * frame::ITEM_BYTES..].to_vec()
                }
                _ => Vec::new(),
            };
            self.find()?;
            is_due = true;
            match header.operation {
                Operation::Read => {
                    // Whoever gets that much has something to do first.
                    let lengths = self.items.iter().map(|i| i.length);
                    is_due = lengths.fold(0, u64::saturating_add) <= WATCHED_BYTES_MAX;
                    self.read(&header)?;
                    let times = &self.served.counters.reads[usize::from(self.same_host)];
                    times.observe(start.elapsed().as_nanos() as u64);
                }
                Operation::Write => {
                    self.write(&header, &notifies)?;
                    let times = &self.served.counters.writes[usize::from(self.same_host)];
                    times.observe(start.elapsed().as_nanos() as u64);
                }
                Operation::Ping => {
                    self.socket.skip(header.payload_bytes, until)?;
                    self.answer(Status::Ok, 0, 0, header.id, until)?;
                }
                Operation::Attach => self.attach(&header, until)?,
                Operation::Describe => self.describe(&header, until)?,
                Operation::Join => self.join(&header)?,
                Operation::Fetch => {
                    self.fetch(&header, &notifies, until)?;
                    let times = &self.served.counters.writes[RDMA];
                    times.observe(start.elapsed().as_nanos() as u64);
                }
                Operation::Bring => {
                    self.bring(&header, until)?;
                    let times = &self.served.counters.reads[RDMA];
                    times.observe(start.elapsed().as_nanos() as u64);
                }
            }
            self.socket.shrink();
        }
    }

    pub(super) fn refuse(&mut self, id: u64, what: &'static str) -> io::Result<()> {
        self.served.counters.refused.fetch_add(1, Ordering::Relaxed);
        let until = Until::Deadline(Instant::now() + Duration::from_secs(1));
        self.answer(Status::Malformed, 0, 0, id, until)?;
        Err(malformed(what))
    }

    fn answer(
        &mut self,
        status: Status,
        items: usize,
        payload: u64,
        id: u64,
        until: Until,
    ) -> io::Result<()> {
        self.reply.clear();
        frame::encode_reply(&mut self.reply, status, items, payload, id);
        self.socket.write_all_from(&self.reply, &[], until)
    }

    /// The status of what was not done. That something changed or is there already is no refusal of the gate's.
    pub(super) fn refused(&self, error: &TransferError) -> u8 {
        if !matches!(error, TransferError::Changed | TransferError::Existed) {
            self.served.counters.refused.fetch_add(1, Ordering::Relaxed);
        }
        Status::from_error(error) as u8
    }

    /// Header and statuses, the granted bytes straight from the segments, then whether they were still the same.
    fn read(&mut self, header: &RequestHeader) -> io::Result<()> {
        let served = self.served.clone();
        let host = &served.host;
        let mut sources: smallvec::SmallVec<[LocalSlice; 8]> = smallvec::SmallVec::new();
        let mut segments: smallvec::SmallVec<[Option<Arc<Segment>>; 4]> = smallvec::SmallVec::new();
        let mut statuses: smallvec::SmallVec<[u8; 32]> = smallvec::SmallVec::new();
        let mut payload = 0;
        for item in &self.items {
            let checked = host
                .check(
                    Opcode::Read,
                    &item.grant,
                    item.offset,
                    item.length,
                    item.word,
                )
                .and_then(|segment| {
                    match item.word {
                        Some(w) if !segment.memory.word_is(w.offset, w.value) => {
                            return Err(TransferError::Changed);
                        }
                        _ => {}
                    }
                    let pointer = segment
                        .memory
                        .range(item.offset, item.length)
                        .ok_or(TransferError::OutOfBounds)?;
                    // SAFETY: in bounds of a mapping that `segment` keeps alive until the end of this function; the
                    // slice is only handed to the kernel.
                    let slice = unsafe { LocalSlice::new(pointer, item.length as usize) };
                    Ok((segment, slice))
                });
            match checked {
                Ok((segment, slice)) => {
                    payload += item.length;
                    sources.push(slice);
                    segments.push(Some(segment));
                    statuses.push(Status::Ok as u8);
                }
                Err(error) => {
                    segments.push(None);
                    statuses.push(self.refused(&error));
                }
            }
        }
        let until = time_for(payload);
        self.reply.clear();
        frame::encode_reply(
            &mut self.reply,
            Status::Ok,
            header.items,
            payload,
            header.id,
        );
        self.reply.extend_from_slice(&statuses);
        // Small replies leave in one piece: copied, re-checked, sent with the verdict.
        // Borrowed memory may have been unmapped by its owner: the kernel finds out without a signal.
        let owned = |s: &Option<Arc<Segment>>| s.as_ref().is_none_or(|s| s.memory.fd().is_some());
        if payload <= 32 << 10 && segments.iter().all(owned) {
            for source in &sources {
                let at = self.reply.len();
                self.reply.reserve(source.length);
                // SAFETY: `reserve` made room; the source is in bounds.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        source.pointer,
                        self.reply.as_mut_ptr().add(at),
                        source.length,
                    );
                    self.reply.set_len(at + source.length);
                }
            }
            self.push_verdicts(&segments);
            self.socket.write_all_from(&self.reply, &[], until)?;
        } else {
            self.send_ranges(&sources, &segments, until)?;
            self.reply.clear();
            self.push_verdicts(&segments);
            self.socket.write_all_from(&self.reply, &[], until)?;
        }
        let way = usize::from(self.same_host);
        self.served.counters.read(way, payload);
        Ok(())
    }

    /// The head and the granted ranges: from memory straight to the socket, from a device through a buffer.
    fn send_ranges(
        &mut self,
        sources: &[LocalSlice],
        segments: &[Option<Arc<Segment>>],
        until: Until,
    ) -> io::Result<()> {
        let segments: Vec<&Arc<Segment>> = segments.iter().flatten().collect();
        if segments.iter().all(|s| s.memory.device().is_none()) {
            return self.socket.write_all_from(&self.reply, sources, until);
        }
        self.socket.write_all_from(&self.reply, &[], until)?;
        let mut buffer = vec![0; DEVICE_BYTES];
        for (source, segment) in sources.iter().zip(segments) {
            let Some(device) = segment.memory.device() else {
                self.socket.write_all_from(&[], &[*source], until)?;
                continue;
            };
            let mut done = 0;
            while done < source.length {
                let n = (source.length - done).min(buffer.len());
                // SAFETY: inside the granted range; the buffer has `n` bytes.
                unsafe { device.read(source.pointer as usize + done, buffer.as_mut_ptr(), n)? };
                self.socket.write_all_from(&buffer[..n], &[], until)?;
                done += n;
            }
        }
        Ok(())
    }

    /// Receives a payload for memory of a device, through a buffer. Inner error: received and not stored.
    fn receive_for_device(
        &mut self,
        device: &dyn DeviceCopies,
        address: usize,
        length: u64,
    ) -> io::Result<io::Result<()>> {
        let mut buffer = vec![0u8; DEVICE_BYTES.min(length as usize)];
        let mut stored = Ok(());
        let mut done = 0;
        while done < length as usize {
            let n = (length as usize - done).min(buffer.len());
            // SAFETY: our own buffer, alive during the call.
            let target = unsafe { LocalSlice::new(buffer.as_mut_ptr(), n) };
            self.socket.read_into(&[target], time_for(length))?;
            if stored.is_ok() {
                // SAFETY: inside the granted range; the buffer has `n` bytes.
                stored = unsafe { device.write(address + done, buffer.as_ptr(), n) };
            }
            done += n;
        }
        Ok(stored)
    }

    fn push_verdicts(&mut self, segments: &[Option<Arc<Segment>>]) {
        for (item, segment) in self.items.iter().zip(segments) {
            let same = match (segment, item.word) {
                (Some(segment), Some(w)) => segment.memory.word_is(w.offset, w.value),
                _ => true,
            };
            self.reply
                .push(if same { Status::Ok } else { Status::Changed } as u8);
        }
    }

    fn write(&mut self, header: &RequestHeader, notifies: &[u8]) -> io::Result<()> {
        let mut statuses: smallvec::SmallVec<[u8; 32]> = smallvec::SmallVec::new();
        let mut rest = notifies;
        for at in 0..self.items.len() {
            let item = self.items[at];
            let (notify, after) = rest.split_at(item.notify_bytes);
            rest = after;
            let status = match self.write_one(&item, notify)? {
                Ok(()) => Status::Ok as u8,
                Err(error) => self.refused(&error),
            };
            statuses.push(status);
        }
        self.reply.clear();
        frame::encode_reply(&mut self.reply, Status::Ok, header.items, 0, header.id);
        self.reply.extend_from_slice(&statuses);
        self.socket.write_all_from(&self.reply, &[], time_for(0))
    }

    /// Outer error: the lane is broken. Inner: the item was refused, its payload skipped.
    fn write_one(&mut self, item: &Item, notify: &[u8]) -> io::Result<Result<(), TransferError>> {
        let served = self.served.clone();
        let host = &served.host;
        let length = if item.has_data { item.length } else { 0 };
        let checked = host
            .check(
                Opcode::Write,
                &item.grant,
                item.offset,
                item.length,
                item.word,
            )
            .and_then(|segment| {
                let pass = host.enter_write(&item.grant, item.offset, item.length)?;
                Ok((segment, pass))
            })
            .and_then(|(segment, pass)| {
                let pointer = segment
                    .memory
                    .range(item.offset, item.length)
                    .ok_or(TransferError::OutOfBounds)?;
                Ok((segment, pass, pointer))
            });
        let (segment, _pass, pointer) = match checked {
            Ok(good) => good,
            Err(error) => {
                // What was not granted is not worth waiting for: a large remainder ends the lane.
                if length > SKIP_MAX {
                    return Err(malformed("a large write was refused"));
                }
                self.socket.skip(length, time_for(length))?;
                return Ok(Err(error));
            }
        };
        if let (Some(device), true) = (segment.memory.device(), length > 0) {
            let stored = self.receive_for_device(device.as_ref(), pointer as usize, length)?;
            if let Err(error) = stored {
                return Ok(Err(TransferError::from_io("the device", &error)));
            }
        } else if length > 0 {
            // SAFETY: in bounds, granted to this writer alone, kept mapped by `segment`.
            let target = unsafe { LocalSlice::new(pointer, length as usize) };
            self.socket.read_into(&[target], time_for(length))?;
        }
        let told = self.tell_and_publish(&segment, item, notify);
        if told.is_ok() {
            let way = usize::from(self.same_host);
            self.served.counters.written(way, length);
        }
        Ok(told)
    }

    /// The data of an item is in place: its notify, then its word.
    pub(super) fn tell_and_publish(
        &self,
        segment: &Segment,
        item: &Item,
        notify: &[u8],
    ) -> Result<(), TransferError> {
        let origin = NotifyOrigin {
            client: self.client,
            segment: item.grant.segment,
            offset: item.offset,
            length: item.length,
            term: item.grant.term,
            reach: if self.same_host {
                Reach::Host
            } else {
                Reach::Network
            },
        };
        let publish = self.served.host.notify(origin, notify)?;
        if let Some(word) = item.word {
            if publish {
                segment.memory.publish(word.offset, word.value);
            }
            if segment.memory.is_lost() {
                return Err(TransferError::Stale);
            }
        }
        Ok(())
    }

    /// Sends what is registered here: who we are, then the regions.
    fn describe(&mut self, header: &RequestHeader, until: Until) -> io::Result<()> {
        let host = &self.served.host;
        let payload = frame::encode_description(host.node, &host.about(), &host.segments());
        self.reply.clear();
        let length = payload.len() as u64;
        frame::encode_reply(&mut self.reply, Status::Ok, 0, length, header.id);
        self.reply.extend_from_slice(&payload);
        self.socket.write_all_from(&self.reply, &[], until)
    }

    /// Sends a segment's descriptor along the Unix socket, in the reply's first byte.
    fn attach(&mut self, header: &RequestHeader, until: Until) -> io::Result<()> {
        let wanted = self.items.first().copied();
        let segment = match wanted {
            Some(item) if self.same_host => self
                .served
                .host
                .segment(item.grant.segment, item.grant.incarnation),
            _ => Err(TransferError::Invalid {
                what: "attach needs a Unix socket and an item",
            }),
        };
        let segment = segment.and_then(|s| match s.memory.fd() {
            Some(_) => Ok(s),
            None => Err(TransferError::Stale),
        });
        let segment = match segment {
            Ok(segment) => segment,
            Err(error) => {
                let status = Status::from_error(&error);
                return self.answer(status, 0, 0, header.id, until);
            }
        };
        let Some(fd) = segment.memory.fd() else {
            return self.answer(Status::Stale, 0, 0, header.id, until);
        };
        self.reply.clear();
        let size = segment.memory.len() as u64;
        frame::encode_reply(&mut self.reply, Status::Ok, 0, size, header.id);
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        let vectors = [io::IoSlice::new(&self.reply)];
        let sent = rustix::net::sendmsg(
            self.socket.fd(),
            &vectors,
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        if sent != self.reply.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(())
    }
}
