//! The segments this process lends to others, and the gate every access passes (S1).
//!
//! Owns the decision "may this request touch this memory"; transports only carry it out. Knows no keys: what a notify
//! means is the [`NotifySink`]'s business.

use std::sync::Arc;

use parking_lot::{RwLock, RwLockReadGuard};

use super::batch::{Opcode, Word};
use super::error::TransferError;
use super::grant::Grant;
use super::memory::Memory;
use crate::base::id::Id128;
use crate::base::trust::ClusterKeys;

/// Registered memory that others may reach under grants.
#[derive(Debug)]
pub struct Segment {
    /// Index within this host.
    pub index: u32,
    /// Random per mapped memory.
    pub incarnation: u64,
    /// Name for people.
    pub name: String,
    /// The bytes.
    pub memory: Arc<Memory>,
}

/// Who wrote what range, as verified by the gate.
#[derive(Clone, Copy, Debug)]
pub struct NotifyOrigin {
    /// The writer's identity from its handshake.
    pub client: Id128,
    /// Segment index.
    pub segment: u32,
    /// Start of the request's range (verified against the grant).
    pub offset: u64,
    /// Its length.
    pub length: u64,
    /// Whether the bytes are in place; false on shared memory, where the writer copies while this is recorded.
    pub in_place: bool,
}

/// Takes the notifies that come with writes.
pub trait NotifySink: Send + Sync {
    /// Accepts or refuses; called after the data is in place and before its word is published. Must not block long.
    fn notify(&self, origin: NotifyOrigin, payload: &[u8]) -> bool;

    /// A same-host writer came (`+1`) or went (`-1`): while it is there it may still write memory it has mapped.
    fn shared_writer(&self, client: Id128, change: i32);
}

/// Segments of one node with their gate.
pub struct SegmentHost {
    /// The node's identity.
    pub node: Id128,
    /// The cluster's keys.
    pub keys: ClusterKeys,
    segments: RwLock<Vec<Arc<Segment>>>,
    sink: Arc<dyn NotifySink>,
    /// Writes under grants of older terms are refused. Held for reading while a write is under way, so that raising it
    /// waits for the writes of the old term to end.
    write_term: RwLock<u64>,
}

/// A write that has passed the gate; the term cannot be raised while it lives.
pub struct WritePass<'a>(#[expect(dead_code, reason = "held, not read")] RwLockReadGuard<'a, u64>);

impl SegmentHost {
    /// A host without segments.
    pub fn new(node: Id128, keys: ClusterKeys, sink: Arc<dyn NotifySink>) -> Self {
        Self {
            node,
            keys,
            segments: RwLock::default(),
            sink,
            write_term: RwLock::new(0),
        }
    }

    /// Adds memory as the next segment.
    pub fn add(&self, name: String, incarnation: u64, memory: Arc<Memory>) -> Arc<Segment> {
        let mut segments = self.segments.write();
        let segment = Arc::new(Segment {
            index: segments.len() as u32,
            incarnation,
            name,
            memory,
        });
        segments.push(segment.clone());
        segment
    }

    /// All segments.
    pub fn segments(&self) -> Vec<Arc<Segment>> {
        self.segments.read().clone()
    }

    /// One segment, if it is still the incarnation asked for.
    ///
    /// # Errors
    /// `Stale`.
    pub fn segment(&self, index: u32, incarnation: u64) -> Result<Arc<Segment>, TransferError> {
        match self.segments.read().get(index as usize) {
            Some(s) if s.incarnation == incarnation => Ok(s.clone()),
            _ => Err(TransferError::Stale),
        }
    }

    /// The gate: a genuine, live grant for this access that covers range and word, inside a live segment.
    ///
    /// # Errors
    /// `Stale`, `GrantRefused`, `OutOfBounds`.
    pub fn check(
        &self,
        opcode: Opcode,
        grant: &Grant,
        offset: u64,
        length: u64,
        word: Option<Word>,
    ) -> Result<Arc<Segment>, TransferError> {
        let segment = self.segment(grant.segment, grant.incarnation)?;
        if !grant.allows(opcode.access(), &self.keys) {
            return Err(TransferError::GrantRefused);
        }
        let word_fits =
            word.is_none_or(|w| w.offset.is_multiple_of(8) && grant.covers(w.offset, 8));
        if !grant.covers(offset, length)
            || !word_fits
            || segment.memory.range(grant.offset, grant.length).is_none()
        {
            return Err(TransferError::OutOfBounds);
        }
        Ok(segment)
    }

    /// Enters the write gate; the pass is held until the bytes are in place.
    ///
    /// # Errors
    /// `GrantRefused` when a newer master has fenced this grant's term off.
    pub fn enter_write(&self, term: u64) -> Result<WritePass<'_>, TransferError> {
        let guard = self.write_term.read();
        if term < *guard {
            return Err(TransferError::GrantRefused);
        }
        Ok(WritePass(guard))
    }

    /// Refuses writes of terms before `term` from now on, after those under way have ended.
    pub fn fence_writes(&self, term: u64) {
        let mut gate = self.write_term.write();
        *gate = (*gate).max(term);
    }

    /// Hands a notify to the owner.
    ///
    /// # Errors
    /// `NotifyRefused`.
    pub fn notify(&self, origin: NotifyOrigin, payload: &[u8]) -> Result<(), TransferError> {
        if payload.is_empty() || self.sink.notify(origin, payload) {
            Ok(())
        } else {
            Err(TransferError::NotifyRefused)
        }
    }

    /// See [`NotifySink::shared_writer`].
    pub fn shared_writer(&self, client: Id128, change: i32) {
        self.sink.shared_writer(client, change);
    }
}
