//! Memory of the caller's that later calls name by address, and memory for callers.

use pyo3::prelude::*;

use super::{INVALID_PARAMS, Store};
use crate::args::Word;

#[pymethods]
impl Store {
    /// Vouches for memory that later calls name by address: 0, or -600 when it overlaps a registered buffer or is not
    /// memory of this process. With a shared engine its peers reach it, too.
    fn register_buffer(&self, py: Python<'_>, buffer_ptr: Word, size: Word) -> i32 {
        let (address, length) = (buffer_ptr.0, size.0);
        if self.pool().is_err() || !self.buffers.add(address, length) {
            return INVALID_PARAMS;
        }
        if let (Ok(pool), Some(None)) = (self.pool(), self.buffers.whose(address)) {
            // SAFETY: memory of this process now; that it stays so until it is unregistered is the caller's promise.
            py.detach(|| unsafe { pool.client.register(address as *mut u8, length) });
        }
        if let (Ok(pool), Some(Some(device))) = (self.pool(), self.buffers.whose(address))
            && let Some(direct) = &pool.direct
        {
            py.detach(|| direct.register(address, length, device));
        }
        let Some(engine) = self.engine.read().clone() else {
            return 0;
        };
        if engine.known().covers(address, length) {
            return 0;
        }
        if py.detach(|| engine.register(address, length)) == 0 {
            self.lent.lock().insert((address, length));
            return 0;
        }
        self.buffers.remove(address);
        if let Ok(pool) = self.pool() {
            // Nothing may go on to name memory that its owner takes for unregistered.
            py.detach(|| pool.forget(address));
        }
        INVALID_PARAMS
    }

    /// Takes `register_buffer` back: 0, or -600 for an address that is not registered. The memory is not touched.
    fn unregister_buffer(&self, py: Python<'_>, buffer_ptr: Word) -> i32 {
        let Some(length) = self.buffers.take(buffer_ptr.0) else {
            return INVALID_PARAMS;
        };
        if let Ok(pool) = self.pool() {
            py.detach(|| pool.forget(buffer_ptr.0));
        }
        // What was registered with the engine by others, or is a part of that, is theirs.
        if let Some(engine) = self.engine.read().clone()
            && self.lent.lock().remove(&(buffer_ptr.0, length))
        {
            py.detach(|| engine.unregister(buffer_ptr.0));
        }
        0
    }

    /// Address of memory that lives as long as this store; 0 when there is none.
    fn alloc_from_mem_pool(&self, size: Word) -> usize {
        self.memory.allocate(size.0).unwrap_or(0)
    }
}
