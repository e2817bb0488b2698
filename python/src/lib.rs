//! The Python module `mooncake._native`: the pool's client and the transfer engine as Python classes.
//!
//! Owns the conversion between Python's arguments and the library's, upstream's return values, and what a Python process
//! does to a library (forks, exits, wild pointers). Refuses to know how the pool works. The interpreter lock is released
//! around everything that can block; calls run in the caller's thread, those of an event loop on native threads.

mod args;
mod batches;
mod buffers;
mod bus_guard;
mod config;
mod descriptors;
mod device;
mod engine;
mod mailbox;
mod memory_map;
mod process;
mod staging;
mod store;
mod workers;

use pyo3::prelude::*;

#[pymodule]
fn _native(m: &Bound<'_, PyModule>) -> PyResult<()> {
    process::init();
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    m.add_class::<store::Store>()?;
    m.add_class::<mailbox::Mailbox>()?;
    m.add_class::<workers::Workers>()?;
    m.add_class::<workers::Begun>()?;
    m.add_class::<engine::Engine>()?;
    m.add_class::<engine::TransferNotify>()?;
    m.add_class::<buffers::BufferHandle>()?;
    m.add_class::<buffers::LentMemory>()?;
    m.add_class::<buffers::HostMemoryAllocator>()?;
    m.add_class::<config::ReplicateConfig>()?;
    m.add_class::<descriptors::ReplicaDescriptor>()?;
    m.add_class::<descriptors::MemoryDescriptor>()?;
    m.add_class::<descriptors::DiskDescriptor>()?;
    m.add_class::<descriptors::BufferDescriptor>()?;
    m.add_function(wrap_pyfunction!(buffers::bind_to_numa_node, m)?)?;
    Ok(())
}
