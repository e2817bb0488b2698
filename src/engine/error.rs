//! What can go wrong with one transfer.

use crate::base::handshake::HandshakeError;

/// The outcome of one transfer request that did not succeed.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TransferError {
    /// No connection: refused, no route, name not found.
    #[error("{peer} cannot be reached: {reason}")]
    Unreachable {
        /// Address tried.
        peer: String,
        /// The system's words.
        reason: String,
    },
    /// The deadline passed.
    #[error("{peer} did not answer in time")]
    Timeout {
        /// Address used.
        peer: String,
    },
    /// The connection broke in the middle.
    #[error("the connection to {peer} broke: {reason}")]
    Broken {
        /// Address used.
        peer: String,
        /// The system's words.
        reason: String,
    },
    /// The peer answered something this protocol does not have.
    #[error("{peer} answered with a malformed frame: {what}")]
    Protocol {
        /// Address used.
        peer: String,
        /// What was wrong.
        what: &'static str,
    },
    /// The peer turned the lane away (token, version, wrong port, too many lanes).
    #[error("{peer} refused the connection: {reason}")]
    Refused {
        /// Address used.
        peer: String,
        /// Why.
        reason: String,
    },
    /// The segment was restarted since: what lay there is gone.
    #[error("the segment was restarted since it was looked up")]
    Stale,
    /// The grant is forged, expired, of another operation or does not cover the range.
    #[error("the grant does not allow this access")]
    GrantRefused,
    /// Outside the segment, or misaligned.
    #[error("the range lies outside of the segment")]
    OutOfBounds,
    /// The guarded word did not have the expected value before and after: other bytes lie there now.
    #[error("the object was replaced or removed while it was read")]
    Changed,
    /// The target's owner did not accept what was written.
    #[error("the node did not accept the write")]
    NotifyRefused,
    /// The target's owner has what was written from another write, and did not keep it.
    #[error("what was written is there already")]
    Existed,
    /// No transport of this engine reaches the peer.
    #[error("no enabled transport reaches {peer}")]
    NoPath {
        /// Name of the peer.
        peer: String,
    },
    /// Local and granted lengths differ, or the batch is larger than a frame may be.
    #[error("the request is malformed: {what}")]
    Invalid {
        /// What is wrong with it.
        what: &'static str,
    },
}

impl TransferError {
    /// Whether another path to the same peer might work: the failure says nothing about the data.
    pub fn is_path_failure(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. }
                | Self::Timeout { .. }
                | Self::Broken { .. }
                | Self::Protocol { .. }
                | Self::Refused { .. }
                | Self::NoPath { .. }
        )
    }

    /// From a failed socket call.
    pub(crate) fn from_io(peer: &str, error: &std::io::Error) -> Self {
        use std::io::ErrorKind as K;
        let peer = peer.to_owned();
        match error.kind() {
            K::TimedOut | K::WouldBlock => Self::Timeout { peer },
            K::ConnectionRefused
            | K::HostUnreachable
            | K::NetworkUnreachable
            | K::NotFound
            | K::AddrNotAvailable
            | K::PermissionDenied => Self::Unreachable {
                peer,
                reason: error.to_string(),
            },
            _ => Self::Broken {
                peer,
                reason: error.to_string(),
            },
        }
    }

    /// From a handshake.
    pub(crate) fn from_handshake(peer: &str, error: &HandshakeError) -> Self {
        match error {
            HandshakeError::Io(e) => Self::from_io(peer, e),
            other => Self::Refused {
                peer: peer.to_owned(),
                reason: other.to_string(),
            },
        }
    }
}
