//! Memory that peers reach, and bytes at addresses of this process.

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::{Engine, INVALID_ARGUMENT};
use crate::args::{Value, Word, Words};
use crate::buffers;
use crate::device::DeviceRange;

#[pymethods]
impl Engine {
    /// Opens memory to peers: 0, -7 when it overlaps, -1 when it is not memory of this process.
    #[pyo3(signature = (buffer_addr, capacity, location="*"))]
    fn register_memory(
        &self,
        py: Python<'_>,
        buffer_addr: Word,
        capacity: Word,
        location: &str,
    ) -> i64 {
        let _ = location;
        py.detach(|| self.register(buffer_addr.0, capacity.0))
    }

    /// Closes memory to peers once transfers under way have ended: 0, -3 when nothing is registered there.
    fn unregister_memory(&self, py: Python<'_>, buffer_addr: Word) -> i64 {
        py.detach(|| self.unregister(buffer_addr.0))
    }

    /// All or none.
    #[pyo3(signature = (buffer_addresses, capacities, location="*"))]
    fn batch_register_memory(
        &self,
        py: Python<'_>,
        buffer_addresses: Words,
        capacities: Words,
        location: &str,
    ) -> i64 {
        let _ = location;
        if buffer_addresses.0.len() != capacities.0.len() {
            return INVALID_ARGUMENT;
        }
        py.detach(|| {
            for (at, (address, length)) in buffer_addresses.0.iter().zip(&capacities.0).enumerate()
            {
                let code = self.register(*address, *length);
                if code != 0 {
                    for done in &buffer_addresses.0[..at] {
                        self.unregister(*done);
                    }
                    return code;
                }
            }
            0
        })
    }

    /// 0, or the first negative code; the others are closed all the same.
    fn batch_unregister_memory(&self, py: Python<'_>, buffer_addresses: Words) -> i64 {
        py.detach(|| {
            let codes = buffer_addresses.0.iter().map(|a| self.unregister(*a));
            codes.fold(0, |first, code| if first == 0 { code } else { first })
        })
    }

    /// Address of `length` bytes open to peers; 0 when there are none.
    fn allocate_managed_buffer(&self, length: Word) -> usize {
        match self.managed.allocate(length.0) {
            Some(address) if self.register(address, length.0) == 0 => address,
            Some(address) => {
                self.managed.release(address);
                0
            }
            None => 0,
        }
    }

    /// Gives it back: 0, or a negative code.
    fn free_managed_buffer(&self, py: Python<'_>, address: Word, length: Word) -> i64 {
        let _ = length;
        if !self.managed.owns(address.0) {
            return INVALID_ARGUMENT;
        }
        let code = py.detach(|| self.unregister(address.0));
        // Memory that a transfer may still touch is kept.
        if code == 0 {
            self.managed.release(address.0);
        }
        code
    }

    /// Copies bytes to an address of this process: 0, or -1.
    fn write_bytes_to_buffer(
        &self,
        py: Python<'_>,
        dest_address: Word,
        src: Value,
        length: Word,
    ) -> i64 {
        if length.0 > src.length {
            return INVALID_ARGUMENT;
        }
        match buffers::owner(dest_address.0, length.0, true) {
            None => INVALID_ARGUMENT,
            Some(None) => {
                // SAFETY: both mapped and long enough; may overlap.
                unsafe { std::ptr::copy(src.pointer, dest_address.0 as *mut u8, length.0) };
                0
            }
            Some(Some(device)) => {
                let source = src.pointer as usize;
                let copied = py.detach(|| {
                    let range = DeviceRange(device);
                    range.copy(dest_address.0, source as *mut u8, length.0, true)
                });
                copied.map_or(INVALID_ARGUMENT, |()| 0)
            }
        }
    }

    /// Bytes at an address of this process.
    fn read_bytes_from_buffer<'py>(
        &self,
        py: Python<'py>,
        source_address: Word,
        length: Word,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let wrong = || pyo3::exceptions::PyValueError::new_err("not memory of this process");
        match buffers::owner(source_address.0, length.0, false).ok_or_else(wrong)? {
            None => {
                let start = source_address.0 as *const u8;
                // SAFETY: mapped and readable for this length.
                let bytes = unsafe { std::slice::from_raw_parts(start, length.0) };
                Ok(PyBytes::new(py, bytes))
            }
            Some(device) => PyBytes::new_with(py, length.0, |bytes| {
                let (target, length) = (bytes.as_mut_ptr() as usize, bytes.len());
                let copied = py.detach(|| {
                    let range = DeviceRange(device);
                    range.copy(source_address.0, target as *mut u8, length, false)
                });
                copied.map_err(|e| pyo3::exceptions::PyOSError::new_err(e.to_string()))
            }),
        }
    }
}
