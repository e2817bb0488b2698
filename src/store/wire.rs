//! The generated contract (`proto/mooncake/v1/pool.proto`) and the few conversions both sides share, and how batches are
//! framed on a control lane: `length u32 LE | protobuf`.

#[expect(missing_docs, clippy::pedantic, reason = "generated code")]
mod generated {
    tonic::include_proto!("mooncake.v1");
}
pub use generated::*;

use bytes::Bytes;

use crate::base::id::Id128;
use crate::engine::grant::Grant;

/// Most bytes of one batch on a control lane or a gRPC message.
pub const BATCH_BYTES_MAX: usize = 64 << 20;
/// Version of the node session.
pub const SESSION_VERSION: u32 = 1;

impl ReplicaLocation {
    /// From a signed grant over a table slot.
    pub fn from_grant(slot: u32, grant: &Grant) -> Self {
        Self {
            segment: slot,
            incarnation: grant.incarnation,
            offset: grant.offset,
            length_bytes: grant.length,
            expires_unix_ms: grant.expires_unix_ms,
            mac: Bytes::copy_from_slice(&grant.mac),
            term: grant.term,
        }
    }

    /// The grant, for the segment with this index within its node.
    pub fn grant(&self, node_segment: u32) -> Option<Grant> {
        Some(Grant {
            segment: node_segment,
            incarnation: self.incarnation,
            offset: self.offset,
            length: self.length_bytes,
            term: self.term,
            expires_unix_ms: self.expires_unix_ms,
            mac: self.mac.as_ref().try_into().ok()?,
        })
    }
}

/// The halves of an identity as the contract carries them.
pub fn id(high: u64, low: u64) -> Id128 {
    Id128 { high, low }
}

impl Reply {
    /// The whole operation was refused.
    pub fn refused(code: i32, reason: String) -> Self {
        Self {
            kind: Some(reply::Kind::Refused(Refusal { code, reason })),
        }
    }
}

impl From<reply::Kind> for Reply {
    fn from(kind: reply::Kind) -> Self {
        Self { kind: Some(kind) }
    }
}

impl From<operation::Kind> for Operation {
    fn from(kind: operation::Kind) -> Self {
        Self { kind: Some(kind) }
    }
}

/// Drives the decoders of control lanes and notifies with arbitrary bytes; for the fuzz target and its corpus test.
#[doc(hidden)]
pub fn fuzz(bytes: &[u8]) {
    use prost::Message;
    let _ = OperationBatch::decode(bytes);
    let _ = ReplyBatch::decode(bytes);
    let _ = NodeNotify::decode(bytes);
    let _ = NodeMessage::decode(bytes);
}
