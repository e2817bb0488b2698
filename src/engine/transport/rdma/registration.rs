//! Registered memory: one memory region per (buffer, device), never one per request of a registered buffer.
//!
//! Owns the regions and their keys; refuses to know who uses them. A region is given back when the last transfer that
//! holds the registration has ended.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use rdma_sys::{ibv_access_flags, ibv_mr};

use super::RdmaError;
use super::device::Device;
use super::verbs::last_error;

/// What a registration is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Memory of a node or peer that only this process's own requests touch: no key of it ever leaves.
    Own,
    /// Source of bytes that a node fetches. May be memory that cannot be written.
    Fetched,
    /// Bytes that a node fetches or brings.
    Both,
}

impl Access {
    fn flags(self) -> u32 {
        let local = ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0;
        let read = ibv_access_flags::IBV_ACCESS_REMOTE_READ.0;
        let write = ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0;
        match self {
            Self::Own => local,
            Self::Fetched => read,
            Self::Both => local | read | write,
        }
    }
}

/// Memory from this size on is registered with all devices at once.
const PARALLEL: u64 = 1 << 30;

struct Region {
    mr: *mut ibv_mr,
    lkey: u32,
    rkey: u32,
}

// SAFETY: a handle, used by any thread.
unsafe impl Send for Region {}

/// A range of addresses that every device of the fabric may reach.
pub(crate) struct Registration {
    base: u64,
    length: u64,
    /// Bytes of each region but the last.
    chunk: u64,
    /// Per device, per chunk.
    regions: Vec<(Arc<Device>, Vec<Region>)>,
}

// SAFETY: regions are handles, used by any thread.
unsafe impl Send for Registration {}
// SAFETY: as above.
unsafe impl Sync for Registration {}

/// Memory of a GPU as a descriptor that NICs understand.
pub(super) struct Dmabuf<'a> {
    pub(super) fd: BorrowedFd<'a>,
    /// Where the range begins within it.
    pub(super) offset: u64,
}

impl Registration {
    /// Registers memory of the host with every device. What cannot be locked fails as a whole.
    pub(super) fn host(
        devices: &[Arc<Device>],
        base: *mut u8,
        length: usize,
        access: Access,
    ) -> Result<Self, RdmaError> {
        Self::each(devices, base as u64, length as u64, |device, at, n| {
            let (pd, flags) = (device.pd, access.flags());
            match device.verbs.ibv_reg_mr_iova2 {
                // SAFETY: a domain of ours. The kernel checks and pins the range; who touches it is the callers' promise.
                Some(register) => unsafe {
                    let relaxed = flags | ibv_access_flags::IBV_ACCESS_RELAXED_ORDERING.0;
                    register(pd, at as *mut _, n as usize, at, relaxed)
                },
                // SAFETY: as above.
                None => unsafe {
                    (device.verbs.ibv_reg_mr)(pd, at as *mut _, n as usize, flags as i32)
                },
            }
        })
    }

    /// Registers memory of a GPU, on devices that can.
    pub(super) fn dmabuf(
        devices: &[Arc<Device>],
        base: u64,
        length: u64,
        of: &Dmabuf<'_>,
        access: Access,
    ) -> Result<Self, RdmaError> {
        Self::each(devices, base, length, |device, at, n| {
            let Some(register) = device.verbs.ibv_reg_dmabuf_mr.filter(|_| device.dmabuf) else {
                return std::ptr::null_mut();
            };
            let offset = of.offset + (at - base);
            let fd = of.fd.as_raw_fd();
            // SAFETY: a domain of ours and an open descriptor; the driver checks the range against it.
            unsafe { register(device.pd, offset, n as usize, at, fd, access.flags() as i32) }
        })
    }

    fn each(
        devices: &[Arc<Device>],
        base: u64,
        length: u64,
        register: impl Fn(&Device, u64, u64) -> *mut ibv_mr + Sync,
    ) -> Result<Self, RdmaError> {
        let chunk = devices.iter().map(|d| d.mr_max).min().unwrap_or(u64::MAX);
        let on = |device: &Arc<Device>| Self::on_device(device, base, length, chunk, &register);
        // Pinning takes long for much memory, and devices do it side by side.
        let regions: Vec<(Vec<Region>, Option<RdmaError>)> = if length >= PARALLEL {
            std::thread::scope(|s| {
                let each: Vec<_> = devices.iter().map(|d| s.spawn(|| on(d))).collect();
                let ended = each.into_iter().map(|t| t.join().unwrap_or_default());
                ended.collect()
            })
        } else {
            devices.iter().map(on).collect()
        };
        let mut failed = None;
        let regions = devices.iter().zip(regions).map(|(device, (made, error))| {
            failed = failed.take().or(error);
            (device.clone(), made)
        });
        // What was registered goes with it, when something was not.
        let made = Self {
            base,
            length,
            chunk,
            regions: regions.collect(),
        };
        match failed {
            None => Ok(made),
            Some(error) => Err(error),
        }
    }

    /// The regions of one device, as far as they could be made.
    fn on_device(
        device: &Arc<Device>,
        base: u64,
        length: u64,
        chunk: u64,
        register: impl Fn(&Device, u64, u64) -> *mut ibv_mr,
    ) -> (Vec<Region>, Option<RdmaError>) {
        let mut regions = Vec::new();
        let mut at = 0;
        while at < length {
            let n = chunk.min(length - at);
            let mr = register(device.as_ref(), base + at, n);
            if mr.is_null() {
                return (regions, Some(last_error(&device.name, "register")));
            }
            // SAFETY: registered just now.
            let (lkey, rkey) = unsafe { ((*mr).lkey, (*mr).rkey) };
            regions.push(Region { mr, lkey, rkey });
            at += n;
        }
        (regions, None)
    }

    /// Whether the range lies inside.
    pub(super) fn covers(&self, address: u64, length: u64) -> bool {
        address >= self.base
            && address
                .checked_add(length)
                .is_some_and(|end| end <= self.base + self.length)
    }

    /// Bytes from `address` to the end of its chunk.
    pub(super) fn run(&self, address: u64) -> u64 {
        let within = (address - self.base) % self.chunk;
        (self.chunk - within).min(self.base + self.length - address)
    }

    fn region(&self, device: usize, address: u64) -> Option<&Region> {
        let chunk = (address.checked_sub(self.base)? / self.chunk) as usize;
        self.regions.get(device)?.1.get(chunk)
    }

    /// The key this process names the range by.
    pub(super) fn lkey(&self, device: usize, address: u64) -> Option<u32> {
        self.region(device, address).map(|r| r.lkey)
    }

    /// The key a peer names the range by.
    pub(super) fn rkey(&self, device: usize, address: u64) -> Option<u32> {
        self.region(device, address).map(|r| r.rkey)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        for (device, regions) in &self.regions {
            // A queue pair that could not be destroyed may still reach it: its pages stay this process's.
            if device.is_stuck() {
                continue;
            }
            for region in regions {
                // SAFETY: registered by us, once; no request of ours names it any more, and a peer's is refused.
                let code = unsafe { (device.verbs.ibv_dereg_mr)(region.mr) };
                if code != 0 {
                    let error = io::Error::from_raw_os_error(code);
                    tracing::warn!(device = %device.name, %error, "rdma: a registration was not given back");
                }
            }
        }
    }
}
