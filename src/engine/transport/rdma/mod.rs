//! RDMA by verbs: reliable connections between the NICs of caller and node, made over the data lane.
//!
//! ```text
//! caller ── lane: join (its ends) ──► node      both bring a queue pair per rail up
//! caller ── lane: pull/push, pieces with keys ──► node passes its gate, and its NIC reads (put) or writes (get)
//!                                                 the caller's memory; notify, word and answer as over TCP
//! ```
//! Only the node's own requests touch the node's memory: no key of it ever leaves, so grants, fences and versions mean
//! what they mean over TCP. A caller names the pieces of its own memory for as long as a transfer lasts; what fails here
//! goes by TCP. Without the feature `rdma` there is the configuration, the wire format, and nothing that opens.

mod config;
pub mod gid;
pub mod wire;

#[cfg(feature = "rdma")]
mod check;
#[cfg(feature = "rdma")]
mod client;
#[cfg(feature = "rdma")]
mod device;
#[cfg(feature = "rdma")]
mod endpoint;
#[cfg(feature = "rdma")]
mod exchange;
#[cfg(feature = "rdma")]
mod fabric;
#[cfg(feature = "rdma")]
mod post;
#[cfg(feature = "rdma")]
mod rail;
#[cfg(feature = "rdma")]
mod registration;
#[cfg(feature = "rdma")]
mod served;
#[cfg(feature = "rdma")]
mod verbs;

#[cfg(not(feature = "rdma"))]
mod absent;
#[cfg(all(test, feature = "rdma"))]
mod guest_test;
#[cfg(all(test, feature = "rdma"))]
mod post_test;
#[cfg(all(test, feature = "rdma"))]
mod pretended;

use std::sync::Arc;

pub use config::RdmaConfig;

#[cfg(feature = "rdma")]
pub(crate) use served::{Moved, ServedRails};
#[cfg(feature = "rdma")]
pub use {
    check::{check_device, device_names},
    client::RdmaTransport,
    fabric::Fabric,
};

#[cfg(not(feature = "rdma"))]
pub use absent::{Fabric, RdmaTransport, check_device, device_names};
#[cfg(not(feature = "rdma"))]
pub(crate) use absent::{Moved, ServedRails};

/// What trying a device by itself has shown.
#[derive(Clone, Debug)]
pub struct DeviceCheck {
    /// Its name and address.
    pub summary: String,
    /// Whether it can register memory of a GPU (dma-buf).
    pub gpu_memory: bool,
    /// How long registering 1 MiB took.
    pub registration: Result<std::time::Duration, RdmaError>,
    /// How long 1 MiB took to this device itself, there by READ and back by WRITE.
    pub loopback: Result<std::time::Duration, RdmaError>,
}

/// Whether this build has RDMA.
pub const BUILT: bool = cfg!(feature = "rdma");

/// The devices as a configuration asks for them: `protocol` rdma (said when it cannot be had), empty or auto (used where
/// there is one), anything else not at all, nor with upstream's `MC_FORCE_TCP`. `devices` is a comma list, empty for all.
pub fn select(protocol: &str, devices: &str) -> Option<Arc<Fabric>> {
    let asked = match protocol.to_ascii_lowercase().as_str() {
        "rdma" => true,
        "" | "auto" => false,
        _ => return None,
    };
    let forced = std::env::var("MC_FORCE_TCP").unwrap_or_default();
    if !matches!(forced.as_str(), "" | "0") {
        return None;
    }
    let mut config = RdmaConfig::from_env(|name| std::env::var(name).ok()).with_devices(devices);
    config.at_once = asked;
    match Fabric::open(&config) {
        Ok(fabric) => {
            tracing::info!("rdma: {}", fabric.summary());
            Some(fabric)
        }
        Err(error) if asked => {
            tracing::warn!("protocol rdma: {error}; using shared memory and TCP");
            None
        }
        Err(error) => {
            tracing::debug!("rdma is not used: {error}");
            None
        }
    }
}

/// Why RDMA cannot be used.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum RdmaError {
    /// Built without the feature.
    #[error("this build has no RDMA (cargo feature `rdma`)")]
    NotBuilt,
    /// No libibverbs on this host.
    #[error("libibverbs.so.1 not found: install libibverbs1 and ibverbs-providers")]
    NoLibrary,
    /// One that lacks what is needed.
    #[error("libibverbs.so.1 is too old: it has no {function}")]
    OldLibrary {
        /// The first function it lacks.
        function: &'static str,
    },
    /// No device.
    #[error("this host has no RDMA device")]
    NoDevice,
    /// None of those asked for.
    #[error("no such RDMA device: {wanted}; this host has {there}")]
    NotThere {
        /// As asked for.
        wanted: String,
        /// What there is.
        there: String,
    },
    /// A device or its port refused something.
    #[error("{device}: {reason}")]
    Device {
        /// Its name.
        device: String,
        /// One line.
        reason: String,
        /// The errno, or 0.
        code: i32,
    },
}
