//! The ways bytes move between this process and a node: loopback, shm, rdma, tcp. One trait, one file or folder each.
//!
//! A transport carries out requests for one peer; it decides nothing. The gate is `engine::host`, the order in which
//! transports are tried is the engine's.

pub mod control;
pub(crate) mod describe;
pub mod faulty;
pub(crate) mod frame;
pub(crate) mod lane;
pub mod loopback;
pub mod probe;
pub mod rdma;
pub mod server;
pub mod shm;
pub(crate) mod socket;
pub mod tcp;

use std::sync::Arc;
use std::time::Instant;

use super::batch::{Peer, TransferRequest, TransferResult};
use super::error::TransferError;
use super::memory::Memory;

#[doc(hidden)]
pub use frame::fuzz as fuzz_frame;

/// Names of the transports, in order of preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TransportKind {
    /// The segment is in this process.
    Loopback,
    /// Shared memory of a process on this host.
    Shm,
    /// RDMA by verbs.
    Rdma,
    /// TCP.
    Tcp,
}

impl TransportKind {
    /// As written in flags and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Loopback => "loopback",
            Self::Shm => "shm",
            Self::Rdma => "rdma",
            Self::Tcp => "tcp",
        }
    }
}

/// A way to reach peers.
///
/// `start` sends what can be sent without waiting for an answer, `finish` of what it returns does the rest: between the
/// two the caller can start work with other peers. All requests of one call name the same peer and direction and have
/// passed [`TransferRequest::check`].
pub trait Transport: Send + Sync {
    /// Which one.
    fn kind(&self) -> TransportKind;

    /// Whether it may be tried for this peer. Cheap; sends nothing.
    fn reaches(&self, peer: &Peer) -> bool;

    /// Begins the requests.
    ///
    /// # Errors
    /// A path failure: nothing is known about any request, all may be tried elsewhere.
    fn start<'a>(
        &'a self,
        requests: &'a [TransferRequest],
        deadline: Instant,
    ) -> Result<Box<dyn InFlight + 'a>, TransferError>;

    /// The peer's segment mapped into this process, where that is possible.
    fn map(&self, _peer: &Peer, _segment: u32, _incarnation: u64) -> Option<Arc<Memory>> {
        None
    }

    /// The same, if it is mapped already: asks nobody and does not wait.
    fn mapped(&self, _peer: &Peer, _segment: u32, _incarnation: u64) -> Option<Arc<Memory>> {
        None
    }

    /// Whether the process behind a mapping of [`Transport::map`] still lives. Cheap.
    fn lives(&self, _peer: &Peer, _segment: u32, _incarnation: u64) -> bool {
        false
    }

    /// There are only these peers now: what is kept for others goes. Sends nothing.
    fn keep_only(&self, _peers: &[Arc<Peer>]) {}
}

/// Requests under way.
pub trait InFlight {
    /// Waits for the end and pushes one result per request. Dropping instead abandons them: the local memory is no
    /// longer touched, the remote outcome is unknown.
    fn finish(self: Box<Self>, results: &mut Vec<TransferResult>);
}

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod one_port_test;
