//! A device with one port in use: opened, its limits read, one protection domain.
//!
//! Owns the context and what depends on it alone; refuses to know peers.

use std::ffi::CStr;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rdma_sys::{
    ibv_comp_channel, ibv_context, ibv_cq, ibv_device_attr, ibv_pd, ibv_port_attr, ibv_port_state,
};

use super::gid::{self, Gid};
use super::verbs::{AsyncEvent, Verbs, last_error, returned, verbs};
use super::{RdmaConfig, RdmaError};

/// `IBV_LINK_LAYER_ETHERNET`.
const ETHERNET: u8 = 2;
/// How often events are looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Numbers of `ibv_event_type`.
const EVENT_DEVICE_FATAL: u32 = 8;
const EVENT_PORT_ACTIVE: u32 = 9;
const EVENT_PORT_ERROR: u32 = 10;
const EVENT_GID_CHANGE: u32 = 18;

/// An opened device. Everything made from it holds it.
pub(super) struct Device {
    pub(super) verbs: &'static Verbs,
    pub(super) name: String,
    pub(super) context: *mut ibv_context,
    pub(super) pd: *mut ibv_pd,
    pub(super) port: u8,
    pub(super) pkey_index: u16,
    pub(super) ethernet: bool,
    pub(super) attributes: ibv_device_attr,
    /// Largest registration.
    pub(super) mr_max: u64,
    /// Whether device memory can be registered by dma-buf.
    pub(super) dmabuf: bool,
    /// Where completions of queue pairs go that never post: none ever come.
    pub(super) silent: *mut ibv_cq,
    gid: Mutex<Gid>,
    gid_wanted: Option<u8>,
    up: AtomicBool,
    /// A queue pair of it could not be destroyed.
    stuck: AtomicBool,
    /// When events were looked for last.
    events: Mutex<Option<Instant>>,
}

// SAFETY: verbs may be called from any thread; what changes lies behind locks or atomics.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("name", &self.name).finish()
    }
}

/// What a port says of itself now.
pub(super) struct PortState {
    pub(super) active: bool,
    pub(super) mtu: u8,
    pub(super) lid: u16,
}

impl Device {
    /// Opens the devices asked for (all, when none are), of which one at least has its port up.
    pub(super) fn open_all(config: &RdmaConfig) -> Result<Vec<Self>, RdmaError> {
        let verbs = verbs()?;
        // Before the first registration: where the kernel does not copy pinned pages for a child, a fork would leave the
        // devices with pages that are no longer this process's. It does nothing on kernels that do.
        // SAFETY: no precondition.
        unsafe { (verbs.ibv_fork_init)() };
        let mut count = 0;
        // SAFETY: writes the count; the list is freed below, after the last use of its entries.
        let list = unsafe { (verbs.ibv_get_device_list)(&raw mut count) };
        if list.is_null() {
            return Err(last_error("libibverbs", "list devices"));
        }
        let (mut opened, mut refused, mut seen) = (Vec::new(), None, Vec::new());
        for at in 0..count.max(0) as usize {
            // SAFETY: `count` entries.
            let device = unsafe { *list.add(at) };
            // SAFETY: a terminated name that lives as long as the list.
            let name = unsafe { CStr::from_ptr((verbs.ibv_get_device_name)(device)) };
            let name = name.to_string_lossy().into_owned();
            seen.push(name.clone());
            if !config.wants(&name) {
                continue;
            }
            // SAFETY: an entry of the list.
            let context = unsafe { (verbs.ibv_open_device)(device) };
            if context.is_null() {
                refused = Some(last_error(&name, "open"));
                continue;
            }
            match Self::prepare(verbs, name, context, config) {
                Ok(device) => opened.push(device),
                Err(error) => refused = Some(error),
            }
        }
        // SAFETY: opened contexts stay valid without the list.
        unsafe { (verbs.ibv_free_device_list)(list) };
        if let Some(first) = opened.first() {
            if opened.iter().any(|d| d.up.load(Ordering::Acquire)) {
                opened.truncate(super::wire::RAILS_MAX);
                return Ok(opened);
            }
            refused = Some(RdmaError::Device {
                device: first.name.clone(),
                reason: format!("port {} is not active", first.port),
                code: 0,
            });
        }
        Err(match refused {
            Some(error) => error,
            None if seen.is_empty() => RdmaError::NoDevice,
            None => RdmaError::NotThere {
                wanted: config.devices.join(","),
                there: seen.join(", "),
            },
        })
    }

    fn prepare(
        verbs: &'static Verbs,
        name: String,
        context: *mut ibv_context,
        config: &RdmaConfig,
    ) -> Result<Self, RdmaError> {
        // From here on the drop closes what was opened.
        let mut device = Self {
            verbs,
            name,
            context,
            pd: std::ptr::null_mut(),
            port: config.port,
            pkey_index: config.pkey_index,
            ethernet: true,
            // SAFETY: plain numbers, for which zero is a value.
            attributes: unsafe { std::mem::zeroed() },
            mr_max: 0,
            dmabuf: false,
            silent: std::ptr::null_mut(),
            gid: Mutex::new(Gid {
                index: 0,
                bytes: [0; 16],
                v1: false,
                interface: None,
            }),
            gid_wanted: config.gid_index,
            up: AtomicBool::new(true),
            stuck: AtomicBool::new(false),
            events: Mutex::new(None),
        };
        // SAFETY: an open context; writes the struct.
        let code = unsafe { (verbs.ibv_query_device)(context, &raw mut device.attributes) };
        returned(&device.name, "query device", code)?;
        device.mr_max = device.attributes.max_mr_size.min(config.registration);
        device.mr_max = device.mr_max.max(4096) / 4096 * 4096;
        let (state, layer) = device.query_port()?;
        device.ethernet = layer == ETHERNET;
        let addressed = device.choose_gid();
        if state.active {
            addressed?;
        }
        // It may come up later, beside others that are up now.
        device.up.store(state.active, Ordering::Release);
        // SAFETY: an open context.
        device.pd = unsafe { (verbs.ibv_alloc_pd)(context) };
        if device.pd.is_null() {
            return Err(last_error(&device.name, "allocate a domain"));
        }
        let null = std::ptr::null_mut();
        // SAFETY: an open context; no channel.
        device.silent = unsafe { (verbs.ibv_create_cq)(context, 1, null, std::ptr::null_mut(), 0) };
        if device.silent.is_null() {
            return Err(last_error(&device.name, "create a completion queue"));
        }
        // Events are looked at now and then, never waited for.
        // SAFETY: the descriptor belongs to the context, which outlives the borrow.
        let fd = unsafe { BorrowedFd::borrow_raw((*context).async_fd) };
        let _ = rustix::io::ioctl_fionbio(fd, true);
        device.dmabuf = device.probe_dmabuf();
        Ok(device)
    }

    fn query_port(&self) -> Result<(PortState, u8), RdmaError> {
        // SAFETY: plain numbers, for which zero is a value.
        let mut port: ibv_port_attr = unsafe { std::mem::zeroed() };
        // SAFETY: an open context; writes the struct, of which an old library fills the part it knows.
        let code = unsafe { (self.verbs.ibv_query_port)(self.context, self.port, &raw mut port) };
        returned(&self.name, "query port", code)?;
        let state = PortState {
            active: port.state == ibv_port_state::IBV_PORT_ACTIVE,
            mtu: port.active_mtu as u8,
            lid: port.lid,
        };
        Ok((state, port.link_layer))
    }

    /// The port now.
    pub(super) fn port_state(&self) -> Result<PortState, RdmaError> {
        Ok(self.query_port()?.0)
    }

    /// Reads the addresses anew and chooses.
    pub(super) fn choose_gid(&self) -> Result<(), RdmaError> {
        let gids = gid::all(Path::new("/"), &self.name, self.port);
        let chosen = gid::choose(&gids, self.ethernet, self.gid_wanted);
        let chosen = chosen.map_err(|reason| RdmaError::Device {
            device: self.name.clone(),
            reason,
            code: 0,
        })?;
        *self.gid.lock() = chosen;
        Ok(())
    }

    /// The address in use.
    pub(super) fn gid(&self) -> Gid {
        self.gid.lock().clone()
    }

    /// As NCCL asks: a descriptor that is none gives EBADF where the way exists.
    fn probe_dmabuf(&self) -> bool {
        let Some(register) = self.verbs.ibv_reg_dmabuf_mr else {
            return false;
        };
        // SAFETY: a domain of ours; there is no descriptor -1, so that nothing is registered.
        let mr = unsafe { register(self.pd, 0, 4096, 0, -1, 0) };
        if !mr.is_null() {
            // SAFETY: registered just now.
            unsafe { (self.verbs.ibv_dereg_mr)(mr) };
            return false;
        }
        std::io::Error::last_os_error().raw_os_error() == Some(libc::EBADF)
    }

    /// Whether the port is up, as far as the events tell that have come in.
    pub(super) fn is_up(&self) -> bool {
        self.drain_events();
        self.up.load(Ordering::Acquire) && !self.is_stuck()
    }

    /// Keeps the device open, and what is registered with it, until the process ends: a queue pair that is still there may
    /// reach that memory, whose pages stay with this process only for as long as they are registered.
    pub(super) fn keep_forever(self: &std::sync::Arc<Self>) {
        if !self.stuck.swap(true, Ordering::AcqRel) {
            std::mem::forget(self.clone());
        }
    }

    /// Whether nothing of it is to be given back any more.
    pub(super) fn is_stuck(&self) -> bool {
        self.stuck.load(Ordering::Acquire)
    }

    /// A device without a port of this host, for tests of what uses it.
    #[cfg(test)]
    pub(super) fn pretended(
        verbs: &'static Verbs,
        name: &str,
        context: *mut ibv_context,
        pd: *mut ibv_pd,
    ) -> Self {
        Self {
            verbs,
            name: name.to_owned(),
            context,
            pd,
            port: 1,
            pkey_index: 0,
            ethernet: true,
            // SAFETY: plain numbers, for which zero is a value.
            attributes: unsafe { std::mem::zeroed() },
            mr_max: 1 << 40,
            dmabuf: false,
            silent: std::ptr::null_mut(),
            gid: Mutex::new(Gid {
                index: 0,
                bytes: [0; 16],
                v1: false,
                interface: None,
            }),
            gid_wanted: None,
            up: AtomicBool::new(true),
            stuck: AtomicBool::new(false),
            events: Mutex::new(None),
        }
    }

    fn drain_events(&self) {
        // Whoever holds the lock does it for all.
        let Some(mut looked) = self.events.try_lock() else {
            return;
        };
        if looked.is_some_and(|at| at.elapsed() < LOOK_AGAIN) {
            return;
        }
        *looked = Some(Instant::now());
        loop {
            let mut event = AsyncEvent::empty();
            // SAFETY: an open context whose descriptor does not block; writes the struct.
            if unsafe { (self.verbs.ibv_get_async_event)(self.context, &raw mut event) } != 0 {
                return;
            }
            let (kind, element) = (event.kind, event.element);
            // SAFETY: of the call above; queue pairs cannot be destroyed before their events are acknowledged.
            unsafe { (self.verbs.ibv_ack_async_event)(&raw mut event) };
            let of_a_port = matches!(
                kind,
                EVENT_PORT_ERROR | EVENT_PORT_ACTIVE | EVENT_GID_CHANGE
            );
            // For events of ports the element is the port's number; the other port is not our business.
            if of_a_port && element as u32 != u32::from(self.port) {
                continue;
            }
            match kind {
                EVENT_PORT_ERROR | EVENT_DEVICE_FATAL => {
                    if self.up.swap(false, Ordering::AcqRel) {
                        tracing::warn!(device = %self.name, "rdma: the port went down");
                    }
                }
                EVENT_PORT_ACTIVE => {
                    let _ = self.choose_gid();
                    if !self.up.swap(true, Ordering::AcqRel) {
                        tracing::info!(device = %self.name, "rdma: the port is up again");
                    }
                }
                EVENT_GID_CHANGE => {
                    let _ = self.choose_gid();
                }
                other => tracing::debug!(device = %self.name, event = other, "rdma: event"),
            }
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: made in `prepare`, each once; all that was made from the device held it and is gone.
        unsafe {
            if !self.silent.is_null() {
                (self.verbs.ibv_destroy_cq)(self.silent);
            }
            if !self.pd.is_null() {
                (self.verbs.ibv_dealloc_pd)(self.pd);
            }
            (self.verbs.ibv_close_device)(self.context);
        }
    }
}

/// A completion queue with the channel that wakes its reader.
pub(super) struct Completions {
    pub(super) queue: *mut ibv_cq,
    pub(super) channel: *mut ibv_comp_channel,
    device: std::sync::Arc<Device>,
    /// Notifications taken from the channel and not acknowledged yet.
    taken: u32,
}

// SAFETY: handles that verbs may be called with from any thread.
unsafe impl Send for Completions {}
// SAFETY: as above; what polls has it by `&mut`.
unsafe impl Sync for Completions {}

impl Completions {
    pub(super) fn new(device: &std::sync::Arc<Device>, entries: u32) -> Result<Self, RdmaError> {
        let verbs = device.verbs;
        // SAFETY: an open context.
        let channel = unsafe { (verbs.ibv_create_comp_channel)(device.context) };
        if channel.is_null() {
            return Err(last_error(&device.name, "create a channel"));
        }
        // SAFETY: the channel just made; its descriptor lives as long as it.
        let fd = unsafe { BorrowedFd::borrow_raw((*channel).fd) };
        let _ = rustix::io::ioctl_fionbio(fd, true);
        let null = std::ptr::null_mut();
        // SAFETY: an open context and its channel.
        let queue =
            unsafe { (verbs.ibv_create_cq)(device.context, entries as i32, null, channel, 0) };
        if queue.is_null() {
            let error = last_error(&device.name, "create a completion queue");
            // SAFETY: made above, without users.
            unsafe { (verbs.ibv_destroy_comp_channel)(channel) };
            return Err(error);
        }
        Ok(Self {
            queue,
            channel,
            device: device.clone(),
            taken: 0,
        })
    }

    /// The descriptor that becomes readable when an armed queue gets a completion.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: lives as long as the channel, which `self` owns.
        unsafe { BorrowedFd::borrow_raw((*self.channel).fd) }
    }

    /// Asks to be woken by the next completion.
    pub(super) fn arm(&self) {
        // SAFETY: our queue.
        unsafe { rdma_sys::ibv_req_notify_cq(self.queue, 0) };
    }

    /// Takes the notifications that have come.
    pub(super) fn quiet(&mut self) {
        let verbs = self.device.verbs;
        let (mut queue, mut context) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: a channel that does not block; writes the two pointers.
        while unsafe { (verbs.ibv_get_cq_event)(self.channel, &raw mut queue, &raw mut context) }
            == 0
        {
            self.taken += 1;
        }
    }
}

impl Drop for Completions {
    fn drop(&mut self) {
        self.quiet();
        let verbs = self.device.verbs;
        // SAFETY: ours; the queue pair that used the queue is gone (field order of its owner), all events are acknowledged.
        unsafe {
            if self.taken > 0 {
                (verbs.ibv_ack_cq_events)(self.queue, self.taken);
            }
            (verbs.ibv_destroy_cq)(self.queue);
            (verbs.ibv_destroy_comp_channel)(self.channel);
        }
    }
}
