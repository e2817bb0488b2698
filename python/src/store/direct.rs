//! Device memory that a NIC reaches by itself: puts and gets that do not pass through the host's memory.
//!
//! Owns a client of its own that has RDMA and nothing else, so that nothing in this process ever touches a device's address.
//! What it cannot do, or fails at, goes through pinned memory (`staging`). It has seen no hardware.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mooncake::engine::transport::TransportKind;
use mooncake::engine::transport::rdma::Fabric;
use mooncake::store::client::{ClientConfig, PoolClient};
use mooncake::store::model::error::StoreError;
use parking_lot::{Mutex, RwLock};

use crate::device::{Device, DeviceRange};
use crate::staging::Gathered;

/// How long everything goes through the host after a transfer failed.
const PAUSE: Duration = Duration::from_secs(30);
/// What a transfer may take: enough is left of a call for the other way.
const PATIENCE: Duration = Duration::from_secs(4);

/// See the module header.
pub(super) struct Direct {
    client: PoolClient,
    /// What is registered: length by address. Locked for reading while transfers name it.
    ranges: RwLock<BTreeMap<usize, usize>>,
    paused_until: Mutex<Option<Instant>>,
}

impl Direct {
    /// Where there are NICs that can, and nobody forbids it (`MOONCAKE_GPU_DIRECT=0`).
    pub(super) fn open(config: ClientConfig, fabric: Option<&Arc<Fabric>>) -> Option<Self> {
        let forbidden = std::env::var("MOONCAKE_GPU_DIRECT").is_ok_and(|v| v == "0");
        if forbidden || !fabric?.can_dmabuf() {
            return None;
        }
        let client = PoolClient::open(ClientConfig {
            transports: vec![TransportKind::Rdma],
            timeout: config.timeout.min(PATIENCE),
            transfer_timeout: config.transfer_timeout.min(PATIENCE / 2),
            checksum: false,
            verify: false,
            arenas: false,
            tells_failures: false,
            ..config
        });
        Some(Self {
            client: client.ok()?,
            ranges: RwLock::default(),
            paused_until: Mutex::default(),
        })
    }

    /// Registers a device's memory with the NICs; what cannot be goes through the host.
    pub(super) fn register(&self, address: usize, length: usize, device: Device) {
        let range = DeviceRange(device);
        // SAFETY: the device's, as its driver has said; that it stays so until it is unregistered is the caller's promise.
        match unsafe { self.client.register_device(address, length, &range) } {
            Ok(()) => {
                self.ranges.write().insert(address, length);
            }
            Err(error) => {
                tracing::info!(%error, bytes = length, "device memory goes through the host");
            }
        }
    }

    /// Takes [`Direct::register`] back, once no transfer names the memory any more.
    pub(super) fn unregister(&self, address: usize) {
        let mut ranges = self.ranges.write();
        if ranges.remove(&address).is_some() {
            self.client.unregister(address as *mut u8);
        }
    }

    /// Carries a transfer out where all device memory of it is registered; nothing when it has to go through the host, or
    /// failed: it may then be repeated.
    pub(super) fn run<T>(
        &self,
        memory: &[&Gathered],
        transfer: impl FnOnce(&PoolClient) -> Vec<Result<T, StoreError>>,
    ) -> Option<Vec<Result<T, StoreError>>> {
        let paused = *self.paused_until.lock();
        if paused.is_some_and(|until| Instant::now() < until) {
            return None;
        }
        let ranges = self.ranges.read();
        let covered = |address: usize, length: usize| {
            let before = ranges.range(..=address).next_back();
            before.is_some_and(|(start, bytes)| address + length <= start + bytes)
        };
        let mut named = memory.iter().flat_map(|g| g.on_devices());
        if !named.all(|slice| covered(slice.as_ptr() as usize, slice.len())) {
            return None;
        }
        let outcomes = transfer(&self.client);
        let is_failure = |error: &&StoreError| {
            matches!(
                error,
                StoreError::TransferFailed { .. } | StoreError::Timeout { .. }
            )
        };
        let mut failed = outcomes.iter().filter_map(|o| o.as_ref().err());
        let Some(error) = failed.find(is_failure) else {
            return Some(outcomes);
        };
        tracing::warn!(%error, "device memory goes through the host for {} s", PAUSE.as_secs());
        *self.paused_until.lock() = Some(Instant::now() + PAUSE);
        None
    }
}
