//! Memory of CUDA devices: found out by address, copied through pinned buffers on streams of our own.
//!
//! `libcuda.so.1` is loaded when the first address comes that is not memory of the host; without it every such address is
//! refused. Owns the driver's functions and the lanes (two pinned buffers with a stream each); knows nothing of pools and
//! peers. Streams are ordinary ones: like `cudaMemcpy`, a copy waits for what the caller has begun on the default stream.

use std::ffi::{c_char, c_int, c_uint, c_void};
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
    stream_create: unsafe extern "C" fn(*mut Stream, c_uint) -> Code,
    stream_destroy: unsafe extern "C" fn(Stream) -> Code,
    stream_wait: unsafe extern "C" fn(Stream) -> Code,
    download: unsafe extern "C" fn(*mut c_void, u64, usize, Stream) -> Code,
    upload: unsafe extern "C" fn(u64, *const c_void, usize, Stream) -> Code,
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
        let driver = Self {
            init: function!(c"cuInit"),
            attribute: function!(c"cuPointerGetAttribute"),
            device_get: function!(c"cuDeviceGet"),
            primary: function!(c"cuDevicePrimaryCtxRetain"),
            push: function!(c"cuCtxPushCurrent_v2" | c"cuCtxPushCurrent"),
            pop: function!(c"cuCtxPopCurrent_v2" | c"cuCtxPopCurrent"),
            host_alloc: function!(c"cuMemHostAlloc"),
            host_free: function!(c"cuMemFreeHost"),
            stream_create: function!(c"cuStreamCreate"),
            stream_destroy: function!(c"cuStreamDestroy_v2" | c"cuStreamDestroy"),
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

/// One pinned buffer with the stream that fills or empties it.
pub(crate) struct Half {
    driver: &'static Driver,
    context: usize,
    buffer: *mut u8,
    size: usize,
    stream: Stream,
}

// SAFETY: the driver's handles may be used from any thread; a half has one user at a time.
unsafe impl Send for Half {}

impl Half {
    fn open(driver: &'static Driver, device: Device) -> Result<Self, DeviceError> {
        let mut half = Self {
            driver,
            context: device.context,
            buffer: std::ptr::null_mut(),
            size: 0,
            stream: std::ptr::null_mut(),
        };
        half.within(|half| {
            // SAFETY: writes one handle.
            check(unsafe { (driver.stream_create)(&raw mut half.stream, 0) })
        })?;
        Ok(half)
    }

    /// With the device's context current.
    fn within<T>(
        &mut self,
        run: impl FnOnce(&mut Self) -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        // SAFETY: a context the driver named; popped again below.
        check(unsafe { (self.driver.push)(self.context as Context) })?;
        let outcome = run(self);
        let mut popped = std::ptr::null_mut();
        // SAFETY: writes one handle.
        unsafe { (self.driver.pop)(&raw mut popped) };
        outcome
    }

    /// Room for `size` bytes. Nothing may be under way.
    pub(crate) fn ensure(&mut self, size: usize) -> Result<(), DeviceError> {
        if size <= self.size {
            return Ok(());
        }
        if size > WINDOW_MAX {
            return Err(DeviceError::TooLarge);
        }
        self.within(|half| {
            half.release();
            let wanted = size.max(WINDOW);
            let mut buffer = std::ptr::null_mut();
            // SAFETY: writes one pointer.
            let code =
                unsafe { (half.driver.host_alloc)(&raw mut buffer, wanted, HOST_ALLOC_PORTABLE) };
            check(code)?;
            half.buffer = buffer.cast();
            half.size = wanted;
            Ok(())
        })
    }

    fn release(&mut self) {
        if !self.buffer.is_null() {
            // SAFETY: allocated by `ensure`, and nothing uses it any more.
            unsafe { (self.driver.host_free)(self.buffer.cast()) };
        }
        self.buffer = std::ptr::null_mut();
        self.size = 0;
    }

    /// Address of a byte of the buffer.
    pub(crate) fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset <= self.size);
        self.buffer.wrapping_add(offset)
    }

    /// Begins to copy device memory here; `pieces`: address, offset here, length.
    pub(crate) fn download(&mut self, pieces: &[(usize, usize, usize)]) -> Result<(), DeviceError> {
        self.within(|half| {
            for (address, offset, length) in pieces {
                if offset.saturating_add(*length) > half.size {
                    return Err(DeviceError::TooLarge);
                }
                let target = half.at(*offset).cast();
                // SAFETY: room was made; the source is the caller's, who vouched for it.
                check(unsafe {
                    (half.driver.download)(target, *address as u64, *length, half.stream)
                })?;
            }
            Ok(())
        })
    }

    /// Begins to copy from here to device memory; `pieces` as for [`Half::download`].
    pub(crate) fn upload(&mut self, pieces: &[(usize, usize, usize)]) -> Result<(), DeviceError> {
        self.within(|half| {
            for (address, offset, length) in pieces {
                if offset.saturating_add(*length) > half.size {
                    return Err(DeviceError::TooLarge);
                }
                let source = half.at(*offset).cast_const().cast();
                // SAFETY: inside the buffer; the target is the caller's, who vouched for it.
                check(unsafe {
                    (half.driver.upload)(*address as u64, source, *length, half.stream)
                })?;
            }
            Ok(())
        })
    }

    /// Waits for what was begun.
    pub(crate) fn wait(&mut self) -> Result<(), DeviceError> {
        self.within(|half| {
            // SAFETY: our stream.
            check(unsafe { (half.driver.stream_wait)(half.stream) })
        })
    }
}

impl Drop for Half {
    fn drop(&mut self) {
        let _ = self.within(|half| {
            // SAFETY: our stream; copies under way end first.
            unsafe {
                (half.driver.stream_wait)(half.stream);
                (half.driver.stream_destroy)(half.stream);
            }
            half.release();
            Ok(())
        });
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
    /// A lane for a device's memory, waiting for one if all are taken.
    pub(crate) fn take(device: Device) -> Result<Self, DeviceError> {
        Self::take_from(&CALLS, device)
    }

    fn take_from(pool: &'static LanePool, device: Device) -> Result<Self, DeviceError> {
        let driver = Driver::get().ok_or(DeviceError::Driver(-1))?;
        let deadline = Instant::now() + LANE_PATIENCE;
        let mut idle = pool.idle.lock();
        let found = loop {
            let at = idle
                .lanes
                .iter()
                .position(|l| l[0].context == device.context);
            if let Some(at) = at {
                break Some(idle.lanes.swap_remove(at));
            }
            if idle.open < LANES_MAX {
                idle.open += 1;
                break None;
            }
            // Of another device: it makes room.
            if let Some(other) = idle.lanes.pop() {
                drop(other);
                break None;
            }
            if pool.returned.wait_until(&mut idle, deadline).timed_out() {
                return Err(DeviceError::Busy);
            }
        };
        drop(idle);
        if let Some(lane) = found {
            return Ok(Self(Some(lane), pool));
        }
        let opened =
            Half::open(driver, device).and_then(|first| Ok([first, Half::open(driver, device)?]));
        match opened {
            Ok(lane) => Ok(Self(Some(lane), pool)),
            Err(error) => {
                pool.idle.lock().open -= 1;
                pool.returned.notify_one();
                Err(error)
            }
        }
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
                let _ = half.within(|half| {
                    half.release();
                    Ok(())
                });
            }
        }
        self.1.idle.lock().lanes.push(lane);
        self.1.returned.notify_one();
    }
}

/// Waits for what was begun on a stream of the caller's, in the context of an address.
pub(crate) fn await_stream(address: usize, stream: usize) -> Result<(), DeviceError> {
    let driver = Driver::get().ok_or(DeviceError::Driver(-1))?;
    let device = Device::of(address, 1).ok_or(DeviceError::Driver(-1))?;
    // SAFETY: a context the driver named; the stream is the caller's, as with every call of the driver; popped again.
    unsafe {
        check((driver.push)(device.context as Context))?;
        let waited = check((driver.stream_wait)(stream as Stream));
        let mut popped = std::ptr::null_mut();
        (driver.pop)(&raw mut popped);
        waited
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
        let mut lane = Lane::take_from(&SERVED, self.0)?;
        let mut done = 0;
        while done < length {
            let n = (length - done).min(WINDOW);
            let Some(half) = lane.half(0) else { break };
            half.ensure(n)?;
            let piece = [(address + done, 0, n)];
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
}
