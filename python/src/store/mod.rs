//! `MooncakeDistributedStore`: set-up and close, and what all its calls have in common. The tensor family is Python
//! (`mooncake/_tensors.py`) over these.

mod get;
mod keys;
mod lifecycle;
mod put;
mod segments;
mod sessions;

use std::collections::HashMap;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use mooncake::store::client::{PoolClient, PutSession};
use mooncake::store::master::MasterServer;
use mooncake::store::node::Node;
use parking_lot::{Mutex, RwLock};
use pyo3::prelude::*;

use crate::buffers::{HostMemoryAllocator, Registered};
use crate::process;
use crate::staging::Gathered;

/// Upstream's answer for a call before `setup` or after `close`, and for anything it does not accept.
pub(crate) const INVALID_PARAMS: i32 = -600;

/// A pool's client in this process.
#[pyclass(module = "mooncake._native", subclass, frozen)]
pub(crate) struct Store {
    pool: RwLock<Option<Arc<Pool>>>,
    buffers: Registered,
    memory: HostMemoryAllocator,
}

/// What `setup` opened.
pub(crate) struct Pool {
    /// Dropped only by the process that opened it: its arenas and sockets are the parent's otherwise.
    client: ManuallyDrop<PoolClient>,
    /// Memory this process contributes; the first is the one of `setup`.
    nodes: Mutex<Vec<(String, Node)>>,
    /// The master of an embedded pool.
    embedded: Option<Arc<MasterServer>>,
    hostname: String,
    generation: u32,
    /// Versions that `batch_get_session_start` promised.
    readers: Mutex<HashMap<Box<[u8]>, u64>>,
    writers: Mutex<HashMap<Box<[u8]>, PutSession>>,
}

impl Store {
    /// The pool, unless there is none or it is the parent process's.
    fn pool(&self) -> Result<Arc<Pool>, i32> {
        let pool = self.pool.read();
        let pool = pool.as_ref().ok_or(INVALID_PARAMS)?;
        if pool.generation == process::generation() {
            return Ok(pool.clone());
        }
        tracing::warn!(
            "this store was set up before a fork: set up a new one in the child process"
        );
        Err(INVALID_PARAMS)
    }

    /// One range of the caller's memory.
    fn slice(&self, address: usize, length: usize, write: bool) -> Result<Gathered, i32> {
        self.gather(&[address], &[length], write)
    }

    /// Ranges of the caller's memory, in order.
    fn gather(&self, addresses: &[usize], lengths: &[usize], write: bool) -> Result<Gathered, i32> {
        if addresses.len() != lengths.len() {
            return Err(INVALID_PARAMS);
        }
        let ranges = addresses.iter().copied().zip(lengths.iter().copied());
        self.buffers.gather(ranges, write).ok_or(INVALID_PARAMS)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.generation != process::generation() {
            // The sockets and threads are the parent's.
            for (_, node) in self.nodes.lock().drain(..) {
                std::mem::forget(node);
            }
            if let Some(server) = self.embedded.take() {
                std::mem::forget(server);
            }
            return;
        }
        // SAFETY: this is the end of `self`; the client is not used again.
        unsafe { ManuallyDrop::drop(&mut self.client) };
    }
}
