//! Memory of CUDA devices: found out by address, copied through pinned buffers on streams of our own.
//!
//! `libcuda.so.1` is loaded when the first address comes that is not memory of the host; without it every such address is
//! refused. Owns the driver's functions and the lanes (two pinned buffers each, with a stream per device); knows nothing of pools and
//! peers. Streams are ordinary ones: like `cudaMemcpy`, a copy waits for what the caller has begun on the default stream.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use mooncake::engine::memory::DeviceCopies;
use parking_lot::{Condvar, Mutex};

use crate::process;

/// Bytes of one pinned buffer; larger objects get a larger one for as long as they take.
pub(crate) const WINDOW: usize = 32 << 20;
/// Largest pinned buffer: an object with more bytes on a device is refused.
pub(crate) const WINDOW_MAX: usize = 4 << 30;
/// Lanes open at once; further callers wait for one.
const LANES_MAX: usize = 8;
/// How long a caller waits for a lane.
const LANE_PATIENCE: Duration = Duration::from_secs(60);

type Code = c_int;
type Context = *mut c_void;
type Stream = *mut c_void;

const SUCCESS: Code = 0;
const ATTRIBUTE_CONTEXT: c_int = 1;
const ATTRIBUTE_MEMORY_TYPE: c_int = 2;
const ATTRIBUTE_ORDINAL: c_int = 9;
const ATTRIBUTE_RANGE_START: c_int = 11;
const ATTRIBUTE_RANGE_SIZE: c_int = 12;
const MEMORY_TYPE_DEVICE: c_uint = 2;
const HOST_ALLOC_PORTABLE: c_uint = 1;
/// `CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD`.
const HANDLE_DMA_BUF: c_int = 1;
const HOST_PAGE: usize = 4096;

/// The driver's functions, by the names that its header gives them.
struct Driver {
    init: unsafe extern "C" fn(c_uint) -> Code,
    attribute: unsafe extern "C" fn(*mut c_void, c_int, u64) -> Code,
    device_get: unsafe extern "C" fn(*mut c_int, c_int) -> Code,
    primary: unsafe extern "C" fn(*mut Context, c_int) -> Code,
    push: unsafe extern "C" fn(Context) -> Code,
    pop: unsafe extern "C" fn(*mut Context) -> Code,
    host_alloc: unsafe extern "C" fn(*mut *mut c_void, usize, c_uint) -> Code,
    host_free: unsafe extern "C" fn(*mut c_void) -> Code,
    current: unsafe extern "C" fn(*mut Context) -> Code,
    stream_create: unsafe extern "C" fn(*mut Stream, c_uint) -> Code,
    stream_wait: unsafe extern "C" fn(Stream) -> Code,
    download: unsafe extern "C" fn(*mut c_void, u64, usize, Stream) -> Code,
    upload: unsafe extern "C" fn(u64, *const c_void, usize, Stream) -> Code,
    /// Absent before CUDA 11.7.
    export: Option<unsafe extern "C" fn(*mut c_void, u64, usize, c_int, u64) -> Code>,
}

/// Why a copy was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DeviceError {
    /// From the driver.
    #[error("CUDA error {0}")]
    Driver(Code),
    /// All lanes are taken.
    #[error("no staging buffer became free in time")]
    Busy,
    /// More bytes than a staging buffer may have.
    #[error("more than 4 GiB of device memory in one object")]
    TooLarge,
}

fn check(code: Code) -> Result<(), DeviceError> {
    if code == SUCCESS {
        Ok(())
    } else {
        Err(DeviceError::Driver(code))
    }
}

impl Driver {
    fn load() -> Option<Self> {
        // SAFETY: runs the library's constructors; it is the system's driver (or what the caller put in its place).
        let library =
            unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        if library.is_null() {
            return None;
        }
        macro_rules! function {
            ($($name:literal)|+) => {{
                let names: &[&std::ffi::CStr] = &[$($name),+];
                let find = |name: &&std::ffi::CStr| {
                    // SAFETY: a handle of dlopen and a terminated name.
                    let found = unsafe { libc::dlsym(library, name.as_ptr().cast::<c_char>()) };
                    (!found.is_null()).then_some(found)
                };
                let found = names.iter().find_map(find)?;
                // SAFETY: the driver's header gives the function under this name this type.
                unsafe { std::mem::transmute_copy(&found) }
            }};
        }
        // SAFETY: a handle of dlopen and a terminated name.
        let export =
            unsafe { libc::dlsym(library, c"cuMemGetHandleForAddressRange".as_ptr().cast()) };
        let driver = Self {
            // SAFETY: the driver's header gives the function under this name this type; null is none.
            export: unsafe { std::mem::transmute_copy(&export) },
            init: function!(c"cuInit"),
            attribute: function!(c"cuPointerGetAttribute"),
            device_get: function!(c"cuDeviceGet"),
            primary: function!(c"cuDevicePrimaryCtxRetain"),
            push: function!(c"cuCtxPushCurrent_v2" | c"cuCtxPushCurrent"),
            pop: function!(c"cuCtxPopCurrent_v2" | c"cuCtxPopCurrent"),
            host_alloc: function!(c"cuMemHostAlloc"),
            host_free: function!(c"cuMemFreeHost"),
            current: function!(c"cuCtxGetCurrent"),
            stream_create: function!(c"cuStreamCreate"),
            stream_wait: function!(c"cuStreamSynchronize"),
            download: function!(c"cuMemcpyDtoHAsync_v2"),
            upload: function!(c"cuMemcpyHtoDAsync_v2"),
        };
        // SAFETY: no precondition.
        let started = unsafe { (driver.init)(0) };
        if started != SUCCESS {
            tracing::warn!(code = started, "libcuda was found, and does not start");
            return None;
        }
        Some(driver)
    }

    fn get() -> Option<&'static Self> {
        static DRIVER: OnceLock<(u32, Option<Driver>)> = OnceLock::new();
        let (generation, driver) = DRIVER.get_or_init(|| (process::generation(), Self::load()));
        // A driver does not survive a fork.
        driver
            .as_ref()
            .filter(|_| *generation == process::generation())
    }

    fn read_attribute<T: Default>(&self, attribute: c_int, address: u64) -> Option<T> {
        let mut value = T::default();
        // SAFETY: the attribute's value has the size of `T`.
        let code = unsafe { (self.attribute)((&raw mut value).cast(), attribute, address) };
        (code == SUCCESS).then_some(value)
    }
}

/// A device, by the context its memory belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    context: usize,
}

impl Device {
    /// The device whose memory these addresses are; `None` when any of them is not.
    pub(crate) fn of(address: usize, length: usize) -> Option<Self> {
        let driver = Driver::get()?;
        let end = (address as u64).checked_add(length as u64)?;
        let mut at = address as u64;
        // A tensor may lie in several allocations that were mapped one behind the other.
        while at < end {
            let kind: c_uint = driver.read_attribute(ATTRIBUTE_MEMORY_TYPE, at)?;
            if kind != MEMORY_TYPE_DEVICE {
                return None;
            }
            let start: u64 = driver.read_attribute(ATTRIBUTE_RANGE_START, at)?;
            let size: usize = driver.read_attribute(ATTRIBUTE_RANGE_SIZE, at)?;
            let next = start.checked_add(size as u64)?;
            if next <= at {
                return None;
            }
            at = next;
        }
        let context = match driver.read_attribute::<usize>(ATTRIBUTE_CONTEXT, address as u64) {
            Some(context) if context != 0 => context,
            _ => Self::primary(driver, address as u64)?,
        };
        Some(Self { context })
    }

    /// Memory from the driver's pools names a device and no context: its primary one serves.
    fn primary(driver: &Driver, address: u64) -> Option<usize> {
        let ordinal: c_int = driver.read_attribute(ATTRIBUTE_ORDINAL, address)?;
        let (mut device, mut context) = (0, std::ptr::null_mut());
        // SAFETY: both write one value. The retained context is kept for as long as the process lives.
        unsafe {
            check((driver.device_get)(&raw mut device, ordinal)).ok()?;
            check((driver.primary)(&raw mut context, device)).ok()?;
        }
        Some(context as usize)
    }
}

/// A part of a device's memory, and where in a pinned buffer its bytes lie.
#[derive(Clone, Copy)]
pub(crate) struct DevicePiece {
    pub(crate) device: Device,
    pub(crate) address: usize,
    pub(crate) offset: usize,
    pub(crate) length: usize,
}

/// A stream of one device; `busy` from the first copy on until it was waited for.
struct DeviceStream {
    device: Device,
    stream: Stream,
    busy: bool,
}

/// One pinned buffer, with a stream per device that has filled or emptied it. The buffer is pinned for all of them.
pub(crate) struct Half {
    driver: &'static Driver,
    buffer: *mut u8,
    size: usize,
    /// In whose context the buffer was allocated.
    home: Option<Device>,
    streams: Vec<DeviceStream>,
}

// SAFETY: the driver's handles may be used from any thread; a half has one user at a time.
unsafe impl Send for Half {}

impl Driver {
    /// Whether this thread has a context.
    fn has_context(&self) -> bool {
        let mut context = std::ptr::null_mut();
        // SAFETY: writes one handle.
        let code = unsafe { (self.current)(&raw mut context) };
        code == SUCCESS && !context.is_null()
    }

    /// With a device's context current.
    fn within<T>(
        &self,
        device: Device,
        run: impl FnOnce() -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        // SAFETY: a context the driver named; popped again below.
        check(unsafe { (self.push)(device.context as Context) })?;
        let outcome = run();
        let mut popped = std::ptr::null_mut();
        // SAFETY: writes one handle.
        unsafe { (self.pop)(&raw mut popped) };
        outcome
    }
}

impl Half {
    fn new(driver: &'static Driver) -> Self {
        Self {
            driver,
            buffer: std::ptr::null_mut(),
            size: 0,
            home: None,
            streams: Vec::new(),
        }
    }

    /// Room for `size` bytes, allocated by way of a device. Nothing may be under way.
    pub(crate) fn ensure(&mut self, device: Device, size: usize) -> Result<(), DeviceError> {
        if size <= self.size {
            return Ok(());
        }
        if size > WINDOW_MAX {
            return Err(DeviceError::TooLarge);
        }
        self.release();
        let driver = self.driver;
        let wanted = size.max(WINDOW);
        let buffer = driver.within(device, || {
            let mut buffer = std::ptr::null_mut();
            // SAFETY: writes one pointer.
            check(unsafe { (driver.host_alloc)(&raw mut buffer, wanted, HOST_ALLOC_PORTABLE) })?;
            Ok(buffer)
        })?;
        self.buffer = buffer.cast();
        self.size = wanted;
        self.home = Some(device);
        Ok(())
    }

    fn release(&mut self) {
        if let Some(home) = self.home.take() {
            let (driver, buffer) = (self.driver, self.buffer);
            let _ = driver.within(home, || {
                // SAFETY: allocated by `ensure`, and nothing uses it any more.
                check(unsafe { (driver.host_free)(buffer.cast()) })
            });
        }
        self.buffer = std::ptr::null_mut();
        self.size = 0;
    }

    /// Address of a byte of the buffer.
    pub(crate) fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset <= self.size);
        self.buffer.wrapping_add(offset)
    }

    /// The device's own stream, from now on in use.
    fn stream(&mut self, device: Device) -> Result<Stream, DeviceError> {
        if let Some(known) = self.streams.iter_mut().find(|s| s.device == device) {
            known.busy = true;
            return Ok(known.stream);
        }
        let driver = self.driver;
        let stream = driver.within(device, || {
            let mut stream = std::ptr::null_mut();
            // SAFETY: writes one handle.
            check(unsafe { (driver.stream_create)(&raw mut stream, 0) })?;
            Ok(stream)
        })?;
        self.streams.push(DeviceStream {
            device,
            stream,
            busy: true,
        });
        Ok(stream)
    }

    /// Begins a copy for each piece, on its device's stream.
    fn copy(&mut self, pieces: &[DevicePiece], upload: bool) -> Result<(), DeviceError> {
        for of_one in pieces.chunk_by(|a, b| a.device == b.device) {
            let device = of_one[0].device;
            let stream = self.stream(device)?;
            let driver = self.driver;
            driver.within(device, || {
                for piece in of_one {
                    if piece.offset.saturating_add(piece.length) > self.size {
                        return Err(DeviceError::TooLarge);
                    }
                    let (host, there) = (self.at(piece.offset).cast(), piece.address as u64);
                    // SAFETY: inside the buffer; the device's range is the caller's, who vouched for it.
                    check(unsafe {
                        if upload {
                            (driver.upload)(there, host, piece.length, stream)
                        } else {
                            (driver.download)(host, there, piece.length, stream)
                        }
                    })?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Begins to copy device memory here.
    pub(crate) fn download(&mut self, pieces: &[DevicePiece]) -> Result<(), DeviceError> {
        self.copy(pieces, false)
    }

    /// Begins to copy from here to device memory.
    pub(crate) fn upload(&mut self, pieces: &[DevicePiece]) -> Result<(), DeviceError> {
        self.copy(pieces, true)
    }

    /// Waits for what was begun, on every device.
    pub(crate) fn wait(&mut self) -> Result<(), DeviceError> {
        let driver = self.driver;
        let mut outcome = Ok(());
        for used in self.streams.iter_mut().filter(|s| s.busy) {
            used.busy = false;
            let waited = driver.within(used.device, || {
                // SAFETY: our stream.
                check(unsafe { (driver.stream_wait)(used.stream) })
            });
            outcome = outcome.and(waited);
        }
        outcome
    }
}

struct Idle {
    lanes: Vec<[Half; 2]>,
    open: usize,
}

/// Lanes of one purpose.
struct LanePool {
    idle: Mutex<Idle>,
    returned: Condvar,
}

impl LanePool {
    const fn new() -> Self {
        Self {
            idle: Mutex::new(Idle {
                lanes: Vec::new(),
                open: 0,
            }),
            returned: Condvar::new(),
        }
    }
}

/// For calls of this process.
static CALLS: LanePool = LanePool::new();
/// For memory of this process that is read and written as a peer's: its copies are what calls wait for, here and in other
/// processes, so that they must not wait for lanes of calls.
static SERVED: LanePool = LanePool::new();

/// Two halves for one caller: one is filled while the other is used. Given back on drop.
pub(crate) struct Lane(Option<[Half; 2]>, &'static LanePool);

impl Lane {
    /// A lane for memory of any device, waiting for one if all are taken.
    pub(crate) fn take() -> Result<Self, DeviceError> {
        Self::take_from(&CALLS)
    }

    fn take_from(pool: &'static LanePool) -> Result<Self, DeviceError> {
        let driver = Driver::get().ok_or(DeviceError::Driver(-1))?;
        let deadline = Instant::now() + LANE_PATIENCE;
        let mut idle = pool.idle.lock();
        let lane = loop {
            if let Some(lane) = idle.lanes.pop() {
                break lane;
            }
            if idle.open < LANES_MAX {
                idle.open += 1;
                break [Half::new(driver), Half::new(driver)];
            }
            if pool.returned.wait_until(&mut idle, deadline).timed_out() {
                return Err(DeviceError::Busy);
            }
        };
        Ok(Self(Some(lane), pool))
    }

    /// Half number `n` modulo 2.
    pub(crate) fn half(&mut self, n: usize) -> Option<&mut Half> {
        self.0.as_mut().map(|lane| &mut lane[n % 2])
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        let Some(mut lane) = self.0.take() else {
            return;
        };
        for half in &mut lane {
            // Whatever went wrong before: nobody else gets a buffer that is still written to.
            let _ = half.wait();
            if half.size > WINDOW {
                half.release();
            }
        }
        self.1.idle.lock().lanes.push(lane);
        self.1.returned.notify_one();
    }
}

/// Waits for what was begun on a stream of the caller's, in the context of the first address of a device, else in the
/// stream's own. Without a device there is only the default stream, and nothing on it.
pub(crate) fn await_stream(addresses: &[usize], stream: usize) -> Result<(), DeviceError> {
    let Some(driver) = Driver::get() else {
        return if stream == 0 {
            Ok(())
        } else {
            Err(DeviceError::Driver(-1))
        };
    };
    let device = addresses.iter().find_map(|a| Device::of(*a, 1));
    let wait = || {
        // SAFETY: the stream is the caller's, as with every call of the driver.
        check(unsafe { (driver.stream_wait)(stream as Stream) })
    };
    match device {
        Some(device) => driver.within(device, wait),
        // A stream knows its context; the default one is that of the thread's, if it has any.
        None if stream == 0 && !driver.has_context() => Ok(()),
        None => wait(),
    }
}

/// For the engine's data server: memory of a device that peers reach.
#[derive(Debug)]
pub(crate) struct DeviceRange(pub(crate) Device);

impl DeviceRange {
    /// Between the device and `length` bytes at `host`.
    pub(crate) fn copy(
        &self,
        address: usize,
        host: *mut u8,
        length: usize,
        upload: bool,
    ) -> Result<(), DeviceError> {
        let mut lane = Lane::take_from(&SERVED)?;
        let mut done = 0;
        while done < length {
            let n = (length - done).min(WINDOW);
            let Some(half) = lane.half(0) else { break };
            half.ensure(self.0, n)?;
            let piece = [DevicePiece {
                device: self.0,
                address: address + done,
                offset: 0,
                length: n,
            }];
            // SAFETY: the caller's memory has `length` bytes, the half `n`.
            unsafe {
                if upload {
                    std::ptr::copy_nonoverlapping(host.add(done), half.at(0), n);
                    half.upload(&piece)?;
                    half.wait()?;
                } else {
                    half.download(&piece)?;
                    half.wait()?;
                    std::ptr::copy_nonoverlapping(half.at(0), host.add(done), n);
                }
            }
            done += n;
        }
        Ok(())
    }
}

impl DeviceCopies for DeviceRange {
    unsafe fn read(&self, address: usize, target: *mut u8, length: usize) -> std::io::Result<()> {
        self.copy(address, target, length, false)
            .map_err(std::io::Error::other)
    }

    unsafe fn write(
        &self,
        address: usize,
        source: *const u8,
        length: usize,
    ) -> std::io::Result<()> {
        self.copy(address, source.cast_mut(), length, true)
            .map_err(std::io::Error::other)
    }

    fn export(&self, address: usize, length: usize) -> std::io::Result<(OwnedFd, u64)> {
        let unsupported = || std::io::Error::from(std::io::ErrorKind::Unsupported);
        let driver = Driver::get().ok_or_else(unsupported)?;
        let export = driver.export.ok_or_else(unsupported)?;
        // The driver exports whole pages of the host's size.
        let page = HOST_PAGE;
        let start = address / page * page;
        let end = address.checked_add(length).ok_or_else(unsupported)?;
        let whole = end.next_multiple_of(page) - start;
        let mut fd: c_int = -1;
        let exported = driver.within(self.0, || {
            // SAFETY: writes one descriptor; the driver checks the range.
            check(unsafe { export((&raw mut fd).cast(), start as u64, whole, HANDLE_DMA_BUF, 0) })
        });
        exported.map_err(std::io::Error::other)?;
        if fd < 0 {
            return Err(unsupported());
        }
        // SAFETY: a descriptor the driver has just made for us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok((fd, (address - start) as u64))
    }
}
