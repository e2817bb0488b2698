//! Devices without hardware, for tests of what posts to them: the functions of verbs over plain memory of this process.
//!
//! A request moves its bytes when it is posted, if its keys are right, and is completed after the device's delay, or never.
//! Owns what a test may ask afterwards: what was posted, in what order, and what was given back.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rdma_sys::{
    ibv_comp_channel, ibv_context, ibv_cq, ibv_device, ibv_device_attr, ibv_mr, ibv_pd,
    ibv_port_attr, ibv_port_state, ibv_qp, ibv_qp_attr, ibv_qp_init_attr, ibv_send_flags,
    ibv_send_wr, ibv_wc, ibv_wc_status, ibv_wr_opcode,
};

use super::device::Device;
use super::verbs::{AsyncEvent, Verbs};

/// What a device does with requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manner {
    /// Each takes so long, one after the other.
    Takes(Duration),
    /// None is ever completed, nor carried out.
    Hangs,
    /// As the first; the queue pair cannot be destroyed.
    Stays,
}

/// Something that happened, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Happened {
    /// A list of requests: lengths, and which of them are signalled.
    Posted(Vec<(u32, bool)>),
    Destroyed,
    GivenBack,
    Closed,
}

#[derive(Default)]
struct State {
    manner: Option<Manner>,
    happened: Vec<Happened>,
    /// By key.
    regions: Vec<(u32, u64, u64)>,
}

/// One device; [`Pretended::device`] opens it.
pub(super) struct Pretended {
    state: Mutex<State>,
    next_key: AtomicU32,
    context: *mut ibv_context,
    pd: *mut ibv_pd,
}

// SAFETY: the pointers name what is never freed.
unsafe impl Send for Pretended {}
// SAFETY: as above.
unsafe impl Sync for Pretended {}

#[repr(C)]
struct Context {
    first: ibv_context,
    device: &'static Pretended,
}

#[repr(C)]
struct QueuePair {
    first: ibv_qp,
}

#[repr(C)]
struct Queue {
    first: ibv_cq,
    done: Mutex<Vec<(Instant, u64, ibv_wc_status::Type)>>,
}

/// # Safety
/// A context of ours.
unsafe fn of(context: *mut ibv_context) -> &'static Pretended {
    // SAFETY: the caller's promise.
    unsafe { (*context.cast::<Context>()).device }
}

fn zeroed<T>() -> T {
    // SAFETY: structures of numbers and pointers, for which zero is a value; C code does the same.
    unsafe { std::mem::zeroed() }
}

impl Pretended {
    /// A device that works like this.
    pub(super) fn new(manner: Manner) -> &'static Self {
        let context: *mut Context = Box::into_raw(Box::<Context>::new_uninit()).cast();
        let pd = Box::into_raw(Box::new(zeroed::<ibv_pd>()));
        let device: &'static Self = Box::leak(Box::new(Self {
            state: Mutex::default(),
            next_key: AtomicU32::new(1),
            context: context.cast(),
            pd,
        }));
        device.state.lock().manner = Some(manner);
        let mut first: ibv_context = zeroed();
        first.ops.post_send = Some(post_send);
        first.ops.poll_cq = Some(poll_cq);
        first.ops.req_notify_cq = Some(req_notify_cq);
        // SAFETY: memory of this size, ours; and so is the domain.
        unsafe {
            context.write(Context { first, device });
            (*pd).context = context.cast();
        }
        device
    }

    pub(super) fn device(&'static self, name: &str) -> Arc<Device> {
        Arc::new(Device::pretended(&VERBS, name, self.context, self.pd))
    }

    /// What has happened so far.
    pub(super) fn happened(&self) -> Vec<Happened> {
        self.state.lock().happened.clone()
    }

    /// Requests posted so far.
    pub(super) fn posted(&self) -> Vec<(u32, bool)> {
        let lists = self.happened().into_iter();
        let lists = lists.filter_map(|h| match h {
            Happened::Posted(list) => Some(list),
            _ => None,
        });
        lists.flatten().collect()
    }

    fn note(&self, what: Happened) {
        self.state.lock().happened.push(what);
    }

    fn has(&self, key: u32, address: u64, length: u64) -> bool {
        let state = self.state.lock();
        let inside = |(k, start, bytes): &(u32, u64, u64)| {
            *k == key && address >= *start && address + length <= start + bytes
        };
        state.regions.iter().any(inside)
    }
}

unsafe extern "C" fn post_send(
    qp: *mut ibv_qp,
    first: *mut ibv_send_wr,
    _bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: a queue pair of ours with its context and queue; a list of requests whose memory the caller vouches for.
    unsafe {
        let device = of((*qp).context);
        let queue = (*qp).send_cq.cast::<Queue>();
        let manner = device.state.lock().manner.unwrap_or(Manner::Hangs);
        let (mut list, mut at) = (Vec::new(), first);
        while let Some(wr) = at.as_ref() {
            let part = &*wr.sg_list;
            let signalled = wr.send_flags & ibv_send_flags::IBV_SEND_SIGNALED.0 != 0;
            list.push((part.length, signalled));
            let (here, there) = (part.addr, wr.wr.rdma.remote_addr);
            let length = u64::from(part.length);
            let good =
                device.has(part.lkey, here, length) && device.has(wr.wr.rdma.rkey, there, length);
            if let (Manner::Takes(_) | Manner::Stays, true) = (manner, good) {
                let (from, to) = match wr.opcode {
                    ibv_wr_opcode::IBV_WR_RDMA_READ => (there, here),
                    _ => (here, there),
                };
                std::ptr::copy(from as *const u8, to as *mut u8, length as usize);
            }
            let took = match manner {
                Manner::Takes(took) => Some(took),
                Manner::Stays => Some(Duration::ZERO),
                Manner::Hangs => None,
            };
            if let Some(took) = took.filter(|_| signalled || !good) {
                let mut done = (*queue).done.lock();
                let free = done.last().map_or_else(Instant::now, |(at, ..)| *at);
                let status = if good {
                    ibv_wc_status::IBV_WC_SUCCESS
                } else {
                    ibv_wc_status::IBV_WC_REM_ACCESS_ERR
                };
                done.push((free.max(Instant::now()) + took, wr.wr_id, status));
            }
            at = wr.next;
        }
        device.note(Happened::Posted(list));
        0
    }
}

unsafe extern "C" fn poll_cq(cq: *mut ibv_cq, room: c_int, found: *mut ibv_wc) -> c_int {
    // SAFETY: a queue of ours; room for so many entries.
    unsafe {
        let mut done = (*cq.cast::<Queue>()).done.lock();
        let now = Instant::now();
        let count = done.iter().take_while(|(at, ..)| *at <= now).count();
        let count = count.min(room as usize);
        for (at, (_, number, status)) in done.drain(..count).enumerate() {
            let mut wc: ibv_wc = zeroed();
            wc.wr_id = number;
            wc.status = status;
            found.add(at).write(wc);
        }
        count as c_int
    }
}

unsafe extern "C" fn req_notify_cq(_: *mut ibv_cq, _: c_int) -> c_int {
    0
}

unsafe extern "C" fn create_qp(pd: *mut ibv_pd, wanted: *mut ibv_qp_init_attr) -> *mut ibv_qp {
    let mut first: ibv_qp = zeroed();
    // SAFETY: a domain of ours and a structure of the caller's.
    unsafe {
        first.context = (*pd).context;
        first.send_cq = (*wanted).send_cq;
    }
    Box::into_raw(Box::new(QueuePair { first })).cast()
}

unsafe extern "C" fn destroy_qp(qp: *mut ibv_qp) -> c_int {
    // SAFETY: a queue pair of ours.
    let device = unsafe { of((*qp).context) };
    if device.state.lock().manner == Some(Manner::Stays) {
        return libc::EIO;
    }
    device.note(Happened::Destroyed);
    // SAFETY: made by `create_qp`, destroyed once.
    drop(unsafe { Box::from_raw(qp.cast::<QueuePair>()) });
    0
}

unsafe extern "C" fn reg_mr(pd: *mut ibv_pd, at: *mut c_void, n: usize, _: c_int) -> *mut ibv_mr {
    // SAFETY: a domain of ours.
    let (context, device) = unsafe { ((*pd).context, of((*pd).context)) };
    let key = device.next_key.fetch_add(1, Ordering::Relaxed);
    device.state.lock().regions.push((key, at as u64, n as u64));
    let mut mr: ibv_mr = zeroed();
    (mr.context, mr.lkey, mr.rkey) = (context, key, key);
    Box::into_raw(Box::new(mr))
}

unsafe extern "C" fn dereg_mr(mr: *mut ibv_mr) -> c_int {
    // SAFETY: made by `reg_mr`, given back once.
    let mr = unsafe { Box::from_raw(mr) };
    // SAFETY: a context of ours.
    let device = unsafe { of(mr.context) };
    let mut state = device.state.lock();
    state.regions.retain(|(key, ..)| *key != mr.lkey);
    state.happened.push(Happened::GivenBack);
    0
}

unsafe extern "C" fn create_channel(context: *mut ibv_context) -> *mut ibv_comp_channel {
    let mut channel: ibv_comp_channel = zeroed();
    channel.context = context;
    // SAFETY: a descriptor that nobody ever writes to: whoever sleeps wakes with its tick.
    channel.fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
    Box::into_raw(Box::new(channel))
}

unsafe extern "C" fn destroy_channel(channel: *mut ibv_comp_channel) -> c_int {
    // SAFETY: made by `create_channel`, destroyed once.
    unsafe {
        let channel = Box::from_raw(channel);
        libc::close(channel.fd)
    }
}

unsafe extern "C" fn create_cq(
    context: *mut ibv_context,
    _: c_int,
    _: *mut c_void,
    _: *mut ibv_comp_channel,
    _: c_int,
) -> *mut ibv_cq {
    let mut first: ibv_cq = zeroed();
    first.context = context;
    let done = Mutex::default();
    Box::into_raw(Box::new(Queue { first, done })).cast()
}

unsafe extern "C" fn destroy_cq(cq: *mut ibv_cq) -> c_int {
    if !cq.is_null() {
        // SAFETY: made by `create_cq`, destroyed once.
        drop(unsafe { Box::from_raw(cq.cast::<Queue>()) });
    }
    0
}

unsafe extern "C" fn close_device(context: *mut ibv_context) -> c_int {
    // SAFETY: a context of ours.
    unsafe { of(context) }.note(Happened::Closed);
    0
}

unsafe extern "C" fn query_port(_: *mut ibv_context, _: u8, port: *mut ibv_port_attr) -> c_int {
    // SAFETY: a structure of the caller's.
    unsafe { (*port).state = ibv_port_state::IBV_PORT_ACTIVE };
    0
}

unsafe extern "C" fn no_devices(_: *mut c_int) -> *mut *mut ibv_device {
    std::ptr::null_mut()
}
unsafe extern "C" fn free_list(_: *mut *mut ibv_device) {}
unsafe extern "C" fn no_name(_: *mut ibv_device) -> *const std::ffi::c_char {
    c"pretended".as_ptr()
}
unsafe extern "C" fn no_context(_: *mut ibv_device) -> *mut ibv_context {
    std::ptr::null_mut()
}
unsafe extern "C" fn query_device(_: *mut ibv_context, _: *mut ibv_device_attr) -> c_int {
    0
}
unsafe extern "C" fn no_domain(_: *mut ibv_context) -> *mut ibv_pd {
    std::ptr::null_mut()
}
unsafe extern "C" fn dealloc_pd(_: *mut ibv_pd) -> c_int {
    0
}
unsafe extern "C" fn modify_qp(_: *mut ibv_qp, _: *mut ibv_qp_attr, _: c_int) -> c_int {
    0
}
unsafe extern "C" fn no_cq_event(
    _: *mut ibv_comp_channel,
    _: *mut *mut ibv_cq,
    _: *mut *mut c_void,
) -> c_int {
    -1
}
unsafe extern "C" fn ack_cq(_: *mut ibv_cq, _: c_uint) {}
unsafe extern "C" fn no_event(_: *mut ibv_context, _: *mut AsyncEvent) -> c_int {
    -1
}
unsafe extern "C" fn ack_event(_: *mut AsyncEvent) {}
unsafe extern "C" fn fork_init() -> c_int {
    0
}
unsafe extern "C" fn status_str(_: ibv_wc_status::Type) -> *const std::ffi::c_char {
    c"remote access error".as_ptr()
}

static VERBS: Verbs = Verbs {
    ibv_get_device_list: no_devices,
    ibv_free_device_list: free_list,
    ibv_get_device_name: no_name,
    ibv_open_device: no_context,
    ibv_close_device: close_device,
    ibv_query_device: query_device,
    ibv_query_port: query_port,
    ibv_alloc_pd: no_domain,
    ibv_dealloc_pd: dealloc_pd,
    ibv_reg_mr: reg_mr,
    ibv_dereg_mr: dereg_mr,
    ibv_create_comp_channel: create_channel,
    ibv_destroy_comp_channel: destroy_channel,
    ibv_create_cq: create_cq,
    ibv_destroy_cq: destroy_cq,
    ibv_get_cq_event: no_cq_event,
    ibv_ack_cq_events: ack_cq,
    ibv_create_qp: create_qp,
    ibv_modify_qp: modify_qp,
    ibv_destroy_qp: destroy_qp,
    ibv_get_async_event: no_event,
    ibv_ack_async_event: ack_event,
    ibv_fork_init: fork_init,
    ibv_wc_status_str: status_str,
    ibv_reg_dmabuf_mr: None,
    ibv_reg_mr_iova2: None,
};
