//! What stands in for RDMA in a build without the feature: nothing of it can be made.

#![allow(dead_code, reason = "nothing here is ever made")]

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use super::wire::Piece;
use super::{DeviceCheck, RdmaConfig, RdmaError};
use crate::engine::batch::{Peer, TransferRequest};
use crate::engine::error::TransferError;
use crate::engine::memory::{DeviceCopies, Memory};
use crate::engine::transport::lane::Identity;
use crate::engine::transport::{InFlight, Transport, TransportKind};

/// Says so.
///
/// # Errors
/// `NotBuilt`, always.
pub fn device_names() -> Result<Vec<String>, RdmaError> {
    Err(RdmaError::NotBuilt)
}

/// Says so.
///
/// # Errors
/// `NotBuilt`, always.
pub fn check_device(_device: &str, _config: &RdmaConfig) -> Result<DeviceCheck, RdmaError> {
    Err(RdmaError::NotBuilt)
}

/// Never made.
#[derive(Debug)]
pub enum Fabric {}

impl Fabric {
    /// Says so.
    ///
    /// # Errors
    /// `NotBuilt`, always.
    pub fn open(_config: &RdmaConfig) -> Result<Arc<Self>, RdmaError> {
        Err(RdmaError::NotBuilt)
    }

    /// One line for people.
    pub fn summary(&self) -> String {
        match *self {}
    }

    /// Whether any port is up.
    pub fn is_up(&self) -> bool {
        match *self {}
    }

    /// Registers memory that will be served.
    pub fn prepare(self: &Arc<Self>, _memory: &Arc<Memory>) {
        match **self {}
    }

    /// Whether every device can register memory of a GPU.
    pub fn can_dmabuf(&self) -> bool {
        match *self {}
    }
}

/// Never made.
pub struct RdmaTransport {
    fabric: Arc<Fabric>,
}

impl RdmaTransport {
    pub(crate) fn new(_identity: Identity, fabric: Arc<Fabric>) -> Self {
        match *fabric {}
    }

    /// Never called.
    ///
    /// # Safety
    /// None needed.
    pub unsafe fn register(&self, _base: *mut u8, _length: usize) -> bool {
        match *self.fabric {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    ///
    /// # Safety
    /// None needed.
    pub unsafe fn register_device(
        &self,
        _base: usize,
        _length: usize,
        _device: &dyn DeviceCopies,
    ) -> Result<(), RdmaError> {
        match *self.fabric {}
    }

    pub(crate) fn register_memory(&self, _memory: &Arc<Memory>) {
        match *self.fabric {}
    }

    /// Never called.
    pub fn unregister(&self, _base: *mut u8) {
        match *self.fabric {}
    }
}

impl Transport for RdmaTransport {
    fn kind(&self) -> TransportKind {
        match *self.fabric {}
    }

    fn reaches(&self, _peer: &Peer) -> bool {
        match *self.fabric {}
    }

    fn start<'a>(
        &'a self,
        _requests: &'a [TransferRequest],
        _deadline: Instant,
    ) -> Result<Box<dyn InFlight + 'a>, TransferError> {
        match *self.fabric {}
    }
}

/// Never made.
pub(crate) struct ServedRails {
    fabric: Arc<Fabric>,
}

pub(crate) struct Ready {
    fabric: Arc<Fabric>,
}

pub(crate) struct Moved<'a> {
    pub(crate) item: usize,
    pub(crate) pointer: *mut u8,
    pub(crate) memory: &'a Ready,
    pub(crate) addressable: bool,
    pub(crate) pieces: &'a [Piece],
}

pub(crate) struct MovedOutcome {
    pub(crate) lost: u64,
    pub(crate) failed: Vec<usize>,
    pub(crate) reason: Option<String>,
}

impl ServedRails {
    pub(crate) fn join(
        fabric: &Arc<Fabric>,
        _memories: &[Arc<Memory>],
        _request: &[u8],
        _number: u64,
        _until: Instant,
    ) -> (Option<Self>, Vec<u8>) {
        match **fabric {}
    }

    pub(crate) fn count(&self) -> usize {
        match *self.fabric {}
    }

    pub(crate) fn ready(&self, _memory: &Arc<Memory>) -> Result<Ready, RdmaError> {
        match *self.fabric {}
    }

    pub(crate) fn carry(
        &mut self,
        _into_ours: bool,
        _moved: &[Moved<'_>],
        _watch: BorrowedFd<'_>,
    ) -> MovedOutcome {
        match *self.fabric {}
    }
}
