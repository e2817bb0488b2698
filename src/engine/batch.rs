//! What is asked of the engine: transfer requests, and the peers and ranges they name.

use std::sync::Arc;

use smallvec::SmallVec;

use super::grant::{Access, Grant};
use crate::base::id::Id128;

/// Direction, seen from the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opcode {
    /// Segment → local memory.
    Read,
    /// Local memory → segment.
    Write,
}

impl Opcode {
    /// The access a grant must allow.
    pub fn access(self) -> Access {
        match self {
            Self::Read => Access::Read,
            Self::Write => Access::Write,
        }
    }
}

/// Where a node is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The node's identity.
    pub node: Id128,
    /// Name for messages.
    pub name: String,
    /// `host:port` of its data listener.
    pub address: String,
    /// Names its host; equal to ours = same host.
    pub host_id: String,
    /// Its abstract Unix socket for same-host peers; empty = none.
    pub shm_socket: String,
}

/// A piece of the caller's memory.
#[derive(Clone, Copy, Debug)]
pub struct LocalSlice {
    pub(crate) pointer: *mut u8,
    pub(crate) length: usize,
}

// SAFETY: the promise of `LocalSlice::new` holds whatever thread uses the slice.
unsafe impl Send for LocalSlice {}
// SAFETY: as above.
unsafe impl Sync for LocalSlice {}

impl LocalSlice {
    /// Names `length` bytes at `pointer`.
    ///
    /// # Safety
    /// The memory must be valid for the transfer's direction (writable for a read) and stay so, untouched by others,
    /// until the transfer has returned or its batch is done.
    pub unsafe fn new(pointer: *mut u8, length: usize) -> Self {
        Self { pointer, length }
    }

    /// First byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.pointer
    }
    /// Bytes.
    pub fn len(&self) -> usize {
        self.length
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
}

/// A word of the segment that decides about a transfer: a read is good only if it had `value` before and after; a write
/// stores it once the data is in place and the notify was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word {
    /// Within the segment; a multiple of 8, inside the granted range.
    pub offset: u64,
    /// Expected or stored value.
    pub value: u64,
}

/// One request of a batch.
#[derive(Clone, Debug)]
pub struct TransferRequest {
    /// Direction.
    pub opcode: Opcode,
    /// The node.
    pub peer: Arc<Peer>,
    /// Permission; also names the segment.
    pub grant: Grant,
    /// First byte within the segment.
    pub offset: u64,
    /// Bytes of the range. The local slices add up to it, or are none: a write without data only notifies and publishes.
    pub length: u64,
    /// Local memory, in order.
    pub local: SmallVec<[LocalSlice; 2]>,
    /// The word that decides.
    pub word: Option<Word>,
    /// Handed to the node after the data is in place; empty = none. Writes only.
    pub notify: Vec<u8>,
}

/// One result per request, in order.
pub type TransferResult = Result<(), super::error::TransferError>;

impl TransferRequest {
    /// Whether it moves bytes (rather than only notifying).
    pub fn has_data(&self) -> bool {
        !self.local.is_empty()
    }

    /// Checks what the caller got to choose.
    ///
    /// # Errors
    /// [`super::error::TransferError::Invalid`] or `OutOfBounds`.
    pub fn check(&self) -> TransferResult {
        use super::error::TransferError as E;
        let local: u64 = self.local.iter().map(|s| s.length as u64).sum();
        if self.has_data() && local != self.length {
            return Err(E::Invalid {
                what: "local slices and range differ in length",
            });
        }
        if self.opcode == Opcode::Read && (!self.has_data() || !self.notify.is_empty()) {
            return Err(E::Invalid {
                what: "a read needs local memory and takes no notify",
            });
        }
        if !self.grant.covers(self.offset, self.length) {
            return Err(E::OutOfBounds);
        }
        match self.word {
            Some(w) if !self.grant.covers(w.offset, 8) || !w.offset.is_multiple_of(8) => {
                Err(E::OutOfBounds)
            }
            _ => Ok(()),
        }
    }
}
