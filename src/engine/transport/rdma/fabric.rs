//! The opened devices of a process, and what is registered with them.
//!
//! Owns the devices and the registrations of long-lived memory; refuses to know lanes.

use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::device::Device;
use super::endpoint::Endpoint;
use super::registration::{Access, Dmabuf, Registration};
use super::wire::NOT_YET;
use super::{RdmaConfig, RdmaError};
use crate::base::units::ByteSize;
use crate::engine::memory::Memory;

/// The devices in use. Cheap to share.
pub struct Fabric {
    pub(super) config: RdmaConfig,
    pub(super) devices: Vec<Arc<Device>>,
    /// Devices do not survive a fork: a child opens its own.
    process: u32,
    /// What flushes read into: bytes that nobody looks at. Before its memory, which is a mapping of its own: should a queue
    /// pair outlive it, no page of the heap is written to.
    scratch: Arc<Registration>,
    scratch_memory: Memory,
}

/// Of each rail's place in it.
const SCRATCH_BYTES: usize = 8;

impl std::fmt::Debug for Fabric {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Fabric").field(&self.devices).finish()
    }
}

/// What a memory keeps about its registration with one fabric.
struct Kept {
    fabric: Weak<Fabric>,
    state: Mutex<State>,
    ended: Condvar,
}

enum State {
    UnderWay,
    Done(Arc<Registration>),
    Failed(RdmaError),
}

impl Fabric {
    /// Opens the devices asked for; the same ones for everybody in this process who asks for the same.
    ///
    /// # Errors
    /// See [`RdmaError`].
    pub fn open(config: &RdmaConfig) -> Result<Arc<Self>, RdmaError> {
        static OPEN: OnceLock<Mutex<Vec<Weak<Fabric>>>> = OnceLock::new();
        let mut open = OPEN.get_or_init(Mutex::default).lock();
        open.retain(|f| f.strong_count() > 0);
        let known = open.iter().filter_map(Weak::upgrade);
        let process = std::process::id();
        let same = |f: &Arc<Self>| f.config == *config && f.process == process;
        if let Some(found) = known.into_iter().find(same) {
            return Ok(found);
        }
        let devices = Device::open_all(config)?;
        let devices = devices.into_iter().map(Arc::new).collect();
        let fabric = Self::of(config, devices)?;
        open.push(Arc::downgrade(&fabric));
        Ok(fabric)
    }

    /// Of opened devices.
    pub(super) fn of(
        config: &RdmaConfig,
        devices: Vec<Arc<Device>>,
    ) -> Result<Arc<Self>, RdmaError> {
        let bytes = SCRATCH_BYTES * super::wire::RAILS_MAX;
        let scratch_memory =
            Memory::create("mooncake-rdma-scratch", bytes).map_err(|error| RdmaError::Device {
                device: "memory".to_owned(),
                reason: error.to_string(),
                code: error.raw_os_error().unwrap_or(0),
            })?;
        let scratch = Registration::host(&devices, scratch_memory.as_ptr(), bytes, Access::Own)?;
        Ok(Arc::new(Self {
            config: config.clone(),
            devices,
            process: std::process::id(),
            scratch: Arc::new(scratch),
            scratch_memory,
        }))
    }

    /// One line for people: the devices with their addresses.
    pub fn summary(&self) -> String {
        let each = self.devices.iter().map(|d| {
            let gid = d.gid();
            let address = std::net::Ipv6Addr::from(gid.bytes);
            let address = address
                .to_ipv4_mapped()
                .map_or_else(|| address.to_string(), |v4| v4.to_string());
            format!("{} (GID {} {address})", d.name, gid.index)
        });
        each.collect::<Vec<_>>().join(", ")
    }

    /// Whether any port is up.
    pub fn is_up(&self) -> bool {
        self.devices.iter().any(|d| d.is_up())
    }

    /// Where the flush of a rail reads to.
    pub(super) fn scratch(&self, rail: usize) -> (u64, &Arc<Registration>) {
        let slot = SCRATCH_BYTES * (rail % super::wire::RAILS_MAX);
        (
            self.scratch_memory.as_ptr() as u64 + slot as u64,
            &self.scratch,
        )
    }

    /// Registers a caller's memory that nodes are to read and write.
    pub(super) fn register(
        &self,
        base: *mut u8,
        length: usize,
        access: Access,
    ) -> Result<Registration, RdmaError> {
        Registration::host(&self.devices, base, length, access)
    }

    /// Begins to register memory that will be served, where that is wanted at once.
    pub fn prepare(self: &Arc<Self>, memory: &Arc<Memory>) {
        if self.config.at_once {
            let _ = self.served(memory, Access::Own, Instant::now());
        }
    }

    /// Memory that is served: registered on first use, in a thread of its own, and for as long as the memory lives.
    /// Waits for it until `until`.
    ///
    /// # Errors
    /// Why it could not be registered; that it is not yet.
    pub(super) fn served(
        self: &Arc<Self>,
        memory: &Arc<Memory>,
        access: Access,
        until: Instant,
    ) -> Result<Arc<Registration>, RdmaError> {
        let kept = memory.keep(
            |kept: &Kept| std::ptr::eq(kept.fabric.as_ptr(), Arc::as_ptr(self)),
            || {
                let kept = Arc::new(Kept {
                    fabric: Arc::downgrade(self),
                    state: Mutex::new(State::UnderWay),
                    ended: Condvar::new(),
                });
                self.begin(memory, &kept, access);
                kept
            },
        );
        let mut state = kept.state.lock();
        if matches!(*state, State::UnderWay) {
            kept.ended.wait_until(&mut state, until);
        }
        match &*state {
            State::Done(registration) => Ok(registration.clone()),
            State::Failed(error) => Err(error.clone()),
            State::UnderWay => Err(RdmaError::Device {
                device: "memory".to_owned(),
                reason: NOT_YET.to_owned(),
                code: 0,
            }),
        }
    }

    fn begin(self: &Arc<Self>, memory: &Arc<Memory>, kept: &Arc<Kept>, access: Access) {
        let there = kept;
        let (fabric, kept, alive) = (self.clone(), there.clone(), Arc::downgrade(memory));
        let (base, length) = (memory.as_ptr() as usize, memory.len());
        let device = memory.device().cloned();
        let run = move || {
            let start = Instant::now();
            // The memory must not go while it is being registered, and is not held any longer.
            let outcome = match alive.upgrade() {
                None => Err(RdmaError::NoDevice),
                Some(_memory) => match &device {
                    Some(device) => fabric.on_device(device.as_ref(), base, length),
                    None => fabric.register(base as *mut u8, length, access),
                },
            };
            let mut state = kept.state.lock();
            *state = match outcome {
                Ok(registration) => {
                    let size = ByteSize(length as u64);
                    tracing::info!("rdma: {size} registered in {:.0?}", start.elapsed());
                    State::Done(Arc::new(registration))
                }
                Err(error) => {
                    tracing::warn!(%error, bytes = length, "rdma: memory was not registered: TCP is used for it");
                    State::Failed(error)
                }
            };
            kept.ended.notify_all();
        };
        let spawned = std::thread::Builder::new()
            .name("rdma-register".into())
            .spawn(run);
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread to register memory");
            *there.state.lock() = State::Failed(RdmaError::NoDevice);
            there.ended.notify_all();
        }
    }

    /// Memory of a GPU: by dma-buf where NIC and driver can, else not at all, and it is staged through the host.
    fn on_device(
        &self,
        device: &dyn crate::engine::memory::DeviceCopies,
        base: usize,
        length: usize,
    ) -> Result<Registration, RdmaError> {
        let refused = |reason: String| RdmaError::Device {
            device: "GPU memory".to_owned(),
            reason,
            code: 0,
        };
        if !self.can_dmabuf() {
            return Err(refused("these NICs cannot reach it (no dma-buf)".into()));
        }
        let exported = device.export(base, length);
        let (fd, offset) = exported.map_err(|e| refused(format!("not exported: {e}")))?;
        let of = Dmabuf {
            fd: std::os::fd::AsFd::as_fd(&fd),
            offset,
        };
        Registration::dmabuf(&self.devices, base as u64, length as u64, &of, Access::Own)
    }

    /// Whether every device can register memory of a GPU.
    pub fn can_dmabuf(&self) -> bool {
        self.devices.iter().all(|d| d.dmabuf)
    }

    /// Ends for the caller's side, one per port that is up and not `resting`.
    pub(super) fn passive_ends(&self, resting: impl Fn(usize) -> bool) -> Vec<Endpoint> {
        let up = self.devices.iter().enumerate();
        let up = up.filter(|(at, d)| d.is_up() && !resting(*at));
        up.filter_map(|(at, device)| {
            let made = Endpoint::passive(device, at);
            made.inspect_err(|error| tracing::warn!(%error, "rdma: no queue pair"))
                .ok()
        })
        .collect()
    }
}
