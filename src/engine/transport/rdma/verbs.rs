//! libibverbs, opened at run time: the control functions in a table of our own with the types of `rdma-sys`, whose inline
//! data path (post, poll) needs no library. So the binary names no RDMA library and starts without one.
//!
//! Owns the table and what an errno of verbs means; refuses to know devices and queue pairs.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::io;
use std::sync::OnceLock;

use rdma_sys::{
    ibv_comp_channel, ibv_context, ibv_cq, ibv_device, ibv_device_attr, ibv_mr, ibv_pd,
    ibv_port_attr, ibv_qp, ibv_qp_attr, ibv_qp_init_attr, ibv_wc_status,
};

use super::RdmaError;

/// An asynchronous event as it lies in memory; its kind is read as a number, since newer libraries know more kinds.
#[repr(C)]
pub(super) struct AsyncEvent {
    pub(super) element: u64,
    pub(super) kind: c_uint,
    _rest: [u64; 2],
}

impl AsyncEvent {
    pub(super) fn empty() -> Self {
        Self {
            element: 0,
            kind: 0,
            _rest: [0; 2],
        }
    }
}

macro_rules! table {
    ($($name:ident: fn($($arg:ty),*) -> $ret:ty;)*) => {
        /// The control functions, by the names of the library's header.
        #[derive(Debug)]
        pub(super) struct Verbs {
            $(pub(super) $name: unsafe extern "C" fn($($arg),*) -> $ret,)*
            /// Absent before rdma-core 34.
            pub(super) ibv_reg_dmabuf_mr: Option<RegisterDmabuf>,
            /// Absent before rdma-core 25; then relaxed ordering is not asked for.
            pub(super) ibv_reg_mr_iova2: Option<RegisterIova>,
        }

        impl Verbs {
            fn load() -> Result<Self, RdmaError> {
                let library = Library::open()?;
                Ok(Self {
                    $($name: {
                        let found = library.find(concat!(stringify!($name), "\0"))?;
                        // SAFETY: the library's header gives the function of this name this type.
                        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($arg),*) -> $ret>(found) }
                    },)*
                    ibv_reg_dmabuf_mr: library.find("ibv_reg_dmabuf_mr\0").ok().map(|found| {
                        // SAFETY: as above.
                        unsafe { std::mem::transmute::<*mut c_void, RegisterDmabuf>(found) }
                    }),
                    ibv_reg_mr_iova2: library.find("ibv_reg_mr_iova2\0").ok().map(|found| {
                        // SAFETY: as above.
                        unsafe { std::mem::transmute::<*mut c_void, RegisterIova>(found) }
                    }),
                })
            }
        }
    };
}

pub(super) type RegisterDmabuf =
    unsafe extern "C" fn(*mut ibv_pd, u64, usize, u64, c_int, c_int) -> *mut ibv_mr;
pub(super) type RegisterIova =
    unsafe extern "C" fn(*mut ibv_pd, *mut c_void, usize, u64, c_uint) -> *mut ibv_mr;

table! {
    ibv_get_device_list: fn(*mut c_int) -> *mut *mut ibv_device;
    ibv_free_device_list: fn(*mut *mut ibv_device) -> ();
    ibv_get_device_name: fn(*mut ibv_device) -> *const c_char;
    ibv_open_device: fn(*mut ibv_device) -> *mut ibv_context;
    ibv_close_device: fn(*mut ibv_context) -> c_int;
    ibv_query_device: fn(*mut ibv_context, *mut ibv_device_attr) -> c_int;
    ibv_query_port: fn(*mut ibv_context, u8, *mut ibv_port_attr) -> c_int;
    ibv_alloc_pd: fn(*mut ibv_context) -> *mut ibv_pd;
    ibv_dealloc_pd: fn(*mut ibv_pd) -> c_int;
    ibv_reg_mr: fn(*mut ibv_pd, *mut c_void, usize, c_int) -> *mut ibv_mr;
    ibv_dereg_mr: fn(*mut ibv_mr) -> c_int;
    ibv_create_comp_channel: fn(*mut ibv_context) -> *mut ibv_comp_channel;
    ibv_destroy_comp_channel: fn(*mut ibv_comp_channel) -> c_int;
    ibv_create_cq: fn(*mut ibv_context, c_int, *mut c_void, *mut ibv_comp_channel, c_int) -> *mut ibv_cq;
    ibv_destroy_cq: fn(*mut ibv_cq) -> c_int;
    ibv_get_cq_event: fn(*mut ibv_comp_channel, *mut *mut ibv_cq, *mut *mut c_void) -> c_int;
    ibv_ack_cq_events: fn(*mut ibv_cq, c_uint) -> ();
    ibv_create_qp: fn(*mut ibv_pd, *mut ibv_qp_init_attr) -> *mut ibv_qp;
    ibv_modify_qp: fn(*mut ibv_qp, *mut ibv_qp_attr, c_int) -> c_int;
    ibv_destroy_qp: fn(*mut ibv_qp) -> c_int;
    ibv_get_async_event: fn(*mut ibv_context, *mut AsyncEvent) -> c_int;
    ibv_ack_async_event: fn(*mut AsyncEvent) -> ();
    ibv_fork_init: fn() -> c_int;
    ibv_wc_status_str: fn(ibv_wc_status::Type) -> *const c_char;
}

struct Library(*mut c_void);

impl Library {
    fn open() -> Result<Self, RdmaError> {
        // SAFETY: runs the constructors of the system's library. It is never closed: functions of it live in the table.
        let handle = unsafe {
            libc::dlopen(
                c"libibverbs.so.1".as_ptr(),
                libc::RTLD_NOW | libc::RTLD_LOCAL,
            )
        };
        if handle.is_null() {
            return Err(RdmaError::NoLibrary);
        }
        Ok(Self(handle))
    }

    fn find(&self, name: &'static str) -> Result<*mut c_void, RdmaError> {
        let terminated = CStr::from_bytes_with_nul(name.as_bytes()).unwrap_or_default();
        // SAFETY: a handle of dlopen and a terminated name.
        let found = unsafe { libc::dlsym(self.0, terminated.as_ptr()) };
        if found.is_null() {
            return Err(RdmaError::OldLibrary {
                function: name.trim_end_matches('\0'),
            });
        }
        Ok(found)
    }
}

/// The library, opened once.
pub(super) fn verbs() -> Result<&'static Verbs, RdmaError> {
    static VERBS: OnceLock<Result<Verbs, RdmaError>> = OnceLock::new();
    VERBS
        .get_or_init(Verbs::load)
        .as_ref()
        .map_err(Clone::clone)
}

/// What the errno of a failed call says, with what to do where something can be done.
pub(super) fn errno_meaning(call: &str, code: i32) -> String {
    let what = match (call, code) {
        ("register", libc::ENOMEM) => {
            "more memory than may be locked: raise memlock (LimitMEMLOCK=infinity, container --ulimit memlock=-1)"
        }
        ("register", libc::EIO | libc::EINVAL) => {
            "beyond the device's max_mr_size or max_mr, or memory that cannot be registered"
        }
        ("register", libc::EAGAIN) => "the device has no free memory keys: end other programs",
        ("register", libc::EFAULT) => "the range is not mapped, or not writable",
        ("open", libc::EACCES | libc::EPERM) => {
            "/dev/infiniband/uverbs* may not be opened: container --device=/dev/infiniband"
        }
        ("connect", libc::ETIMEDOUT | libc::EHOSTUNREACH | libc::ENETUNREACH) => {
            "the peer's GID is not reachable from this port: routes, VLANs, MC_GID_INDEX"
        }
        ("connect", libc::EINVAL) => "the port refused the parameters (GID index, MTU, LID)",
        _ => "",
    };
    let system = io::Error::from_raw_os_error(code);
    if what.is_empty() {
        format!("{call}: {system}")
    } else {
        format!("{call}: {system}: {what}")
    }
}

/// The error of a call that returned a null pointer and set errno.
pub(super) fn last_error(device: &str, call: &'static str) -> RdmaError {
    let code = io::Error::last_os_error().raw_os_error().unwrap_or(0);
    RdmaError::Device {
        device: device.to_owned(),
        reason: errno_meaning(call, code),
        code,
    }
}

/// The error of a call that returned an errno; 0 is none.
pub(super) fn returned(device: &str, call: &'static str, code: c_int) -> Result<(), RdmaError> {
    if code == 0 {
        return Ok(());
    }
    let code = if code < 0 {
        io::Error::last_os_error().raw_os_error().unwrap_or(-code)
    } else {
        code
    };
    Err(RdmaError::Device {
        device: device.to_owned(),
        reason: errno_meaning(call, code),
        code,
    })
}

/// A completion's status in the library's words.
pub(super) fn status_name(verbs: &Verbs, status: ibv_wc_status::Type) -> String {
    // SAFETY: returns a static string for every number.
    let text = unsafe { (verbs.ibv_wc_status_str)(status) };
    if text.is_null() {
        return format!("status {status}");
    }
    // SAFETY: terminated, static.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned()
}
