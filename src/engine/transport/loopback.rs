//! The segment is in this process: the gate is asked, then memory is copied.

use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::RwLock;

use super::{InFlight, Transport, TransportKind};
use crate::base::id::Id128;
use crate::engine::batch::{Opcode, Peer, TransferRequest, TransferResult};
use crate::engine::copy;
use crate::engine::error::TransferError;
use crate::engine::host::{NotifyOrigin, Reach, SegmentHost};
use crate::engine::memory::{DeviceCopies, Memory};

/// Reaches the hosts of this process.
#[derive(Default)]
pub struct LoopbackTransport {
    client: Id128,
    hosts: RwLock<Vec<Weak<SegmentHost>>>,
}

impl LoopbackTransport {
    /// Without hosts yet.
    pub fn new(client: Id128) -> Self {
        Self {
            client,
            hosts: RwLock::default(),
        }
    }

    /// Makes a host of this process reachable.
    pub fn add(&self, host: &Arc<SegmentHost>) {
        self.hosts.write().push(Arc::downgrade(host));
    }

    fn host(&self, peer: &Peer) -> Option<Arc<SegmentHost>> {
        let hosts = self.hosts.read();
        hosts
            .iter()
            .filter_map(Weak::upgrade)
            .find(|h| h.node == peer.node)
    }
}

impl Transport for LoopbackTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Loopback
    }

    fn reaches(&self, peer: &Peer) -> bool {
        self.host(peer).is_some()
    }

    fn start<'a>(
        &'a self,
        requests: &'a [TransferRequest],
        _deadline: Instant,
    ) -> Result<Box<dyn InFlight + 'a>, TransferError> {
        let peer = &requests[0].peer;
        let host = self.host(peer).ok_or_else(|| TransferError::NoPath {
            peer: peer.name.clone(),
        })?;
        Ok(Box::new(Copying {
            client: self.client,
            host,
            requests,
        }))
    }

    fn map(&self, peer: &Peer, segment: u32, incarnation: u64) -> Option<Arc<Memory>> {
        let host = self.host(peer)?;
        Some(host.segment(segment, incarnation).ok()?.memory.clone())
    }

    fn mapped(&self, peer: &Peer, segment: u32, incarnation: u64) -> Option<Arc<Memory>> {
        self.map(peer, segment, incarnation)
    }

    fn lives(&self, peer: &Peer, segment: u32, incarnation: u64) -> bool {
        let host = self.host(peer);
        host.is_some_and(|h| h.segment(segment, incarnation).is_ok())
    }
}

struct Copying<'a> {
    client: Id128,
    host: Arc<SegmentHost>,
    requests: &'a [TransferRequest],
}

impl InFlight for Copying<'_> {
    fn finish(self: Box<Self>, results: &mut Vec<TransferResult>) {
        results.extend(
            self.requests
                .iter()
                .map(|r| one(&self.host, self.client, r)),
        );
    }
}

fn one(host: &SegmentHost, client: Id128, r: &TransferRequest) -> TransferResult {
    let segment = host.check(r.opcode, &r.grant, r.offset, r.length, r.word)?;
    match r.opcode {
        Opcode::Read => copy_out(&segment.memory, r),
        Opcode::Write => {
            let _pass = host.enter_write(&r.grant, r.offset, r.length)?;
            copy_in(&segment.memory, r)?;
            let origin = NotifyOrigin {
                client,
                segment: r.grant.segment,
                offset: r.offset,
                length: r.length,
                term: r.grant.term,
                reach: Reach::Process,
            };
            let publish = host.notify(origin, &r.notify)?;
            if let Some(word) = r.word {
                if publish {
                    segment.memory.publish(word.offset, word.value);
                }
                if segment.memory.is_lost() {
                    return Err(TransferError::Stale);
                }
            }
            Ok(())
        }
    }
}

/// Copies a range into the local slices, with the word checked before and after.
pub(in crate::engine) fn copy_out(memory: &Memory, r: &TransferRequest) -> TransferResult {
    let unchanged = || r.word.is_none_or(|w| memory.word_is(w.offset, w.value));
    if !unchanged() {
        return Err(TransferError::Changed);
    }
    let mut source = memory
        .range(r.offset, r.length)
        .ok_or(TransferError::OutOfBounds)?;
    if let Some(device) = memory.device() {
        return copy_device(device.as_ref(), source, r);
    }
    let streamed = r.length >= copy::STREAMED_READ;
    for target in &r.local {
        // SAFETY: source: in bounds, lengths add up (`check`); target: promise of LocalSlice::new. The bytes may change
        // under the copy; then the word differs afterwards and they are not used.
        unsafe {
            if streamed {
                copy::stream(source, target.pointer, target.length);
            } else {
                std::ptr::copy_nonoverlapping(source, target.pointer, target.length);
            }
            source = source.add(target.length);
        }
    }
    if unchanged() {
        Ok(())
    } else {
        Err(TransferError::Changed)
    }
}

/// Copies the local slices into a range; nothing for a request without data.
pub(super) fn copy_in(memory: &Memory, r: &TransferRequest) -> TransferResult {
    let mut target = memory
        .range(r.offset, r.length)
        .ok_or(TransferError::OutOfBounds)?;
    if let Some(device) = memory.device() {
        return copy_device(device.as_ref(), target, r);
    }
    for source in &r.local {
        // SAFETY: target: in bounds, granted for writing to this caller alone; source: promise of LocalSlice::new.
        unsafe {
            copy::stream(source.pointer, target, source.length);
            target = target.add(source.length);
        }
    }
    Ok(())
}

/// Between a device's range and the local slices.
fn copy_device(device: &dyn DeviceCopies, start: *mut u8, r: &TransferRequest) -> TransferResult {
    let mut at = start as usize;
    for local in &r.local {
        // SAFETY: the range is in bounds of what is registered, the slice is as LocalSlice::new promises.
        let copied = unsafe {
            match r.opcode {
                Opcode::Read => device.read(at, local.pointer, local.length),
                Opcode::Write => device.write(at, local.pointer, local.length),
            }
        };
        copied.map_err(|e| TransferError::from_io(&r.peer.name, &e))?;
        at += local.length;
    }
    Ok(())
}
