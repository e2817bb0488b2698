//! Memory on the Python side: buffers the caller has registered, memory allocated for callers, and objects handed out
//! whole.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::{Mutex, RwLock};
use pyo3::exceptions::PyValueError;
use pyo3::ffi;
use pyo3::prelude::*;

use mooncake::engine::batch::LocalSlice;
use smallvec::SmallVec;

use crate::args::Word;
use crate::device::Device;
use crate::memory_map;
use crate::staging::Gathered;

/// Address ranges the caller has vouched for: length, and the device when it is one's.
#[derive(Default)]
pub(crate) struct Registered {
    ranges: RwLock<BTreeMap<usize, (usize, Option<Device>)>>,
}

/// Whether a range may be touched, and whose memory it is: the host's (`Some(None)`) or a device's.
pub(crate) fn owner(address: usize, length: usize, write: bool) -> Option<Option<Device>> {
    if address == 0 {
        None
    } else if memory_map::usable(address, length, write) {
        Some(None)
    } else {
        Device::of(address, length).map(Some)
    }
}

impl Registered {
    /// Takes a range; false when it is null, empty, not memory of this process, or overlaps a registered one.
    pub(crate) fn add(&self, address: usize, length: usize) -> bool {
        if length == 0 || address.checked_add(length).is_none() {
            return false;
        }
        let Some(owner) = owner(address, length, true) else {
            return false;
        };
        let mut ranges = self.ranges.write();
        let before = ranges.range(..address + length).next_back();
        if before.is_some_and(|(start, (size, _))| start + size > address) {
            return false;
        }
        ranges.insert(address, (length, owner));
        true
    }

    /// Whose memory a range is, when it lies in a registered one: the host's or a device's.
    fn find(&self, address: usize, end: usize) -> Option<(Range<usize>, Option<Device>)> {
        let ranges = self.ranges.read();
        let (start, (size, device)) = ranges.range(..=address).next_back()?;
        (end <= start + size).then(|| (*start..start + size, *device))
    }

    /// Whether a range begins in a registered one and goes on where nothing is registered: a mistake, whatever lies there.
    fn overruns(&self, address: usize, end: usize) -> bool {
        let ranges = self.ranges.read();
        let mut at = address;
        while at < end {
            let before = ranges.range(..=at).next_back();
            match before.map(|(start, (size, _))| start + size) {
                Some(beyond) if beyond > at => at = beyond,
                _ => return at > address,
            }
        }
        false
    }

    /// Whether a range lies in a registered one.
    pub(crate) fn covers(&self, address: usize, length: usize) -> bool {
        let end = address.checked_add(length);
        end.is_some_and(|end| self.find(address, end).is_some())
    }

    /// Whose memory the range is that begins there: the host's (`Some(None)`) or a device's.
    pub(crate) fn whose(&self, address: usize) -> Option<Option<Device>> {
        Some(self.ranges.read().get(&address)?.1)
    }

    /// Gives a range back; false when it is not registered.
    pub(crate) fn remove(&self, address: usize) -> bool {
        self.take(address).is_some()
    }

    /// Gives a range back: its length.
    pub(crate) fn take(&self, address: usize) -> Option<usize> {
        let (length, _) = self.ranges.write().remove(&address)?;
        Some(length)
    }

    /// The caller's ranges, in order, registered here or with `others`; `None` when one of them is neither registered nor memory at all.
    pub(crate) fn gather(
        &self,
        ranges: impl Iterator<Item = (usize, usize)>,
        others: Option<&Registered>,
        write: bool,
    ) -> Option<Gathered> {
        let mut last = (0..0, None);
        let mut parts: SmallVec<[(LocalSlice, Option<Device>); 2]> = SmallVec::new();
        for (address, length) in ranges {
            let end = address.checked_add(length)?;
            if length > 0 && !(last.0.start <= address && end <= last.0.end) {
                let known = self.find(address, end);
                let known = known.or_else(|| others?.find(address, end));
                last = match known {
                    Some(known) => known,
                    None if self.overruns(address, end) => return None,
                    None => (address..end, owner(address, length, write)?),
                };
            }
            // SAFETY: mapped memory of this process, or a device's; that it stays so, and is not used otherwise during the
            // call, is the caller's promise, as with upstream.
            let slice = unsafe { LocalSlice::new(address as *mut u8, length) };
            parts.push((slice, last.1.filter(|_| length > 0)));
        }
        Some(Gathered::new(parts.into_iter()))
    }
}

/// An object's bytes, owned by Python.
#[pyclass(module = "mooncake.store", frozen)]
pub(crate) struct BufferHandle {
    bytes: Box<[u8]>,
}

impl BufferHandle {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes: bytes.into_boxed_slice(),
        }
    }
}

#[pymethods]
impl BufferHandle {
    /// Address of the first byte; valid as long as this object lives.
    fn ptr(&self) -> usize {
        self.bytes.as_ptr() as usize
    }
    /// Bytes.
    fn size(&self) -> usize {
        self.bytes.len()
    }
    fn __len__(&self) -> usize {
        self.bytes.len()
    }
    // SAFETY: `FillInfo` takes a reference to `slf`, which owns the bytes and never moves or changes them.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        if view.is_null() {
            return Err(PyValueError::new_err("no view"));
        }
        let bytes = &slf.get().bytes;
        // SAFETY: see above; upstream's handle is writable, so this one is: the bytes are the caller's own copy.
        let code = unsafe {
            ffi::PyBuffer_FillInfo(
                view,
                slf.as_ptr(),
                bytes.as_ptr().cast_mut().cast(),
                bytes.len() as ffi::Py_ssize_t,
                0,
                flags,
            )
        };
        if code == 0 {
            Ok(())
        } else {
            Err(PyErr::fetch(slf.py()))
        }
    }
}

/// Memory that a Python object has lent out, and the views of it.
#[pyclass(module = "mooncake._native", frozen)]
pub(crate) struct LentMemory {
    address: usize,
    length: usize,
    views: Arc<AtomicUsize>,
}

#[pymethods]
impl LentMemory {
    /// The owner of the memory must keep it for as long as there are views.
    #[new]
    fn new(address: Word, length: Word) -> Self {
        Self {
            address: address.0,
            length: length.0,
            views: Arc::default(),
        }
    }

    /// Something to make a `memoryview` of, which keeps `owner`.
    fn view(&self, owner: Py<PyAny>) -> LentView {
        LentView {
            address: self.address,
            length: self.length,
            views: self.views.clone(),
            _owner: owner,
        }
    }

    /// Views there are.
    fn views(&self) -> usize {
        self.views.load(Ordering::Acquire)
    }
}

/// A view of lent memory.
#[pyclass(module = "mooncake._native", frozen)]
pub(crate) struct LentView {
    address: usize,
    length: usize,
    views: Arc<AtomicUsize>,
    _owner: Py<PyAny>,
}

#[pymethods]
impl LentView {
    // SAFETY: `FillInfo` takes a reference to `slf`, which keeps the owner of the memory.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        if view.is_null() {
            return Err(PyValueError::new_err("no view"));
        }
        let this = slf.get();
        // SAFETY: as above.
        let code = unsafe {
            ffi::PyBuffer_FillInfo(
                view,
                slf.as_ptr(),
                this.address as *mut std::ffi::c_void,
                ffi::Py_ssize_t::try_from(this.length)?,
                0,
                flags,
            )
        };
        if code != 0 {
            return Err(PyErr::fetch(slf.py()));
        }
        this.views.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    // SAFETY: called once for each view that was filled in.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.views.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Page-aligned memory for callers. Freed on `free` or with the allocator.
#[pyclass(module = "mooncake.store", frozen, name = "MooncakeHostMemAllocator")]
#[derive(Default)]
pub(crate) struct HostMemoryAllocator {
    blocks: Mutex<BTreeMap<usize, usize>>,
}

impl HostMemoryAllocator {
    pub(crate) fn allocate(&self, length: usize) -> Option<usize> {
        const HUGE: usize = 2 << 20;
        let length = length.checked_next_multiple_of(if length >= HUGE { HUGE } else { 4096 })?;
        if length == 0 {
            return None;
        }
        // SAFETY: a fresh anonymous mapping overlaps nothing.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return None;
        }
        // SAFETY: advice on our own mapping.
        unsafe { libc::madvise(address, length, libc::MADV_HUGEPAGE) };
        self.blocks.lock().insert(address as usize, length);
        Some(address as usize)
    }

    /// Whether an address is from here.
    pub(crate) fn owns(&self, address: usize) -> bool {
        self.blocks.lock().contains_key(&address)
    }

    pub(crate) fn release(&self, address: usize) -> bool {
        let Some(length) = self.blocks.lock().remove(&address) else {
            return false;
        };
        // SAFETY: mapped by `allocate` with this length, and taken off the list once.
        unsafe { libc::munmap(address as *mut libc::c_void, length) };
        true
    }
}

impl Drop for HostMemoryAllocator {
    fn drop(&mut self) {
        let left: Vec<usize> = self.blocks.lock().keys().copied().collect();
        for address in left {
            self.release(address);
        }
    }
}

#[pymethods]
impl HostMemoryAllocator {
    #[new]
    fn new() -> Self {
        Self::default()
    }
    /// Address of `size` bytes of zeroed memory; 0 when there is none.
    fn alloc(&self, size: Word) -> usize {
        self.allocate(size.0).unwrap_or(0)
    }
    /// Gives memory back; 0, or -600 for an address that is not from here.
    fn free(&self, address: Word) -> i32 {
        if self.release(address.0) { 0 } else { -600 }
    }
}

/// Binds this thread's memory to a NUMA node; 0, or -300 where the kernel refuses.
#[pyfunction]
pub(crate) fn bind_to_numa_node(node: i32) -> i32 {
    const MPOL_BIND: c_int = 2;
    let Some(mask) = u32::try_from(node).ok().and_then(|n| 1u64.checked_shl(n)) else {
        return -300;
    };
    // SAFETY: one word of mask, read by the kernel during the call.
    let code =
        unsafe { libc::syscall(libc::SYS_set_mempolicy, MPOL_BIND, &raw const mask, 65usize) };
    if code == 0 { 0 } else { -300 }
}
