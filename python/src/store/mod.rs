//! `MooncakeDistributedStore`: set-up and close, and what all its calls have in common. The tensor family is Python
//! (`mooncake/_tensors.py`) over these.

mod direct;
mod fresh;
mod get;
mod keys;
mod lifecycle;
mod memory;
mod place;
mod put;
mod segments;
mod sessions;

use std::collections::{HashMap, HashSet};
use std::mem::ManuallyDrop;
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::Arc;

use mooncake::engine::transport::rdma::Fabric;
use mooncake::store::client::{PoolClient, PutSession};
use mooncake::store::master::MasterServer;
use mooncake::store::model::error::StoreError;
use mooncake::store::node::Node;
use parking_lot::{Mutex, RwLock};
use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;

use crate::batches::{Batches, Small};
use crate::buffers::{HostMemoryAllocator, Registered};
use crate::bus_guard::Watch;
use crate::engine;
use crate::mailbox::{Answer, Mailbox, Slot};
use crate::process;
use crate::staging::Gathered;
use crate::workers::{Begun, Threads, Turn, Workers};
use direct::Direct;

/// Upstream's answer for a call before `setup` or after `close`, and for anything it does not accept.
pub(crate) const INVALID_PARAMS: i32 = -600;

/// What is copied on an event loop's own thread rather than handed over: less than the hand-over costs. What is not nearby is
/// carried out with its like up to here.
const AT_ONCE_MAX: u64 = 64 << 10;

/// A pool's client in this process.
#[pyclass(module = "mooncake._native", subclass, frozen)]
pub(crate) struct Store {
    shared: Arc<Shared>,
    /// Set for the one that an event loop calls: what waits for anybody else is done by threads.
    apart: Option<Apart>,
}

/// What a store and those made from it have in common.
#[derive(Default)]
pub(crate) struct Shared {
    pool: RwLock<Option<Arc<Pool>>>,
    buffers: Registered,
    memory: HostMemoryAllocator,
    /// The engine that `setup` was given: what is registered with one is known to the other.
    engine: RwLock<Option<Arc<engine::Shared>>>,
    /// Buffers (address, length) that were registered with the engine from here.
    lent: Mutex<HashSet<(usize, usize)>>,
}

/// Where calls are carried out, and where their answers go.
struct Apart {
    threads: Arc<Threads>,
    to: Arc<Slot>,
}

impl Deref for Store {
    type Target = Shared;
    fn deref(&self) -> &Shared {
        &self.shared
    }
}

/// Memory that is lent.
pub(crate) struct Lending {
    id: String,
    node: Node,
    /// Memory of a file is watched: it may be cut.
    watch: Option<Watch>,
}

/// What `setup` opened.
pub(crate) struct Pool {
    /// Dropped only by the process that opened it: its arenas and sockets are the parent's otherwise.
    client: ManuallyDrop<PoolClient>,
    /// Device memory that NICs reach by themselves, where they can. Before the client: what it names goes first.
    direct: Option<Direct>,
    /// Memory this process contributes; the first is the one of `setup`.
    nodes: Mutex<Vec<Lending>>,
    /// The master of an embedded pool.
    embedded: Option<Arc<MasterServer>>,
    /// RDMA devices, for memory that is lent later.
    fabric: Option<Arc<Fabric>>,
    hostname: String,
    /// Where further segments are lent from: the address to listen on, and the name others use for it.
    place: (IpAddr, Option<String>),
    generation: u32,
    /// Versions that `batch_get_session_start` promised.
    readers: Mutex<HashMap<Box<[u8]>, u64>>,
    writers: Mutex<HashMap<Box<[u8]>, PutSession>>,
    small: SmallOperations,
}

/// Small operations of event loops, each kind with its like.
#[derive(Default)]
struct SmallOperations {
    gets: Arc<Batches<fresh::SmallGet>>,
    reads: Arc<Batches<get::SmallRead>>,
    puts: Arc<Batches<put::SmallPut>>,
    exists: Arc<Batches<keys::SmallExist>>,
}

impl Store {
    /// The part of a call that may wait: here with the interpreter lock released, or by a thread that leaves the answer in
    /// the mailbox; then this returns its number. `refuse` says what comes of it when it did not get its turn.
    fn run<R: Send + 'static>(
        &self,
        py: Python<'_>,
        job: impl FnOnce() -> R + Send + 'static,
        refuse: impl FnOnce(StoreError) -> R + Send + 'static,
        finish: impl FnOnce(Python<'_>, R) -> PyResult<Py<PyAny>> + Send + 'static,
    ) -> PyResult<Py<PyAny>> {
        let Some(apart) = &self.apart else {
            let result = py.detach(job);
            return finish(py, result);
        };
        let job = Box::new(move |turn: Turn| -> Answer {
            let result = match turn.refusal() {
                None => job(),
                Some(error) => refuse(error),
            };
            Box::new(move |py| finish(py, result))
        });
        let token = apart.threads.begin(&apart.to, job);
        ready(py, Begun { token })
    }

    /// Leaves an operation to be carried out with others of its kind: the number of its answer.
    fn run_small<T: Small>(
        py: Python<'_>,
        apart: &Apart,
        kind: &Arc<Batches<T>>,
        what: T,
    ) -> PyResult<Py<PyAny>> {
        let token = kind.add(&apart.threads, &apart.to, what);
        ready(py, Begun { token })
    }

    /// For results per key.
    fn run_each<T: Send + 'static>(
        &self,
        py: Python<'_>,
        count: usize,
        job: impl FnOnce() -> Each<T> + Send + 'static,
        finish: impl FnOnce(Python<'_>, Each<T>) -> PyResult<Py<PyAny>> + Send + 'static,
    ) -> PyResult<Py<PyAny>> {
        let refuse = move |error: StoreError| (0..count).map(|_| Err(error.clone())).collect();
        self.run(py, job, refuse, finish)
    }
}

/// A result per key.
type Each<T> = Vec<Result<T, StoreError>>;

/// An answer that is there already.
fn ready<T: for<'py> IntoPyObject<'py>>(py: Python<'_>, value: T) -> PyResult<Py<PyAny>> {
    value.into_py_any(py)
}

#[pymethods]
impl Store {
    /// The same store for an event loop: calls that must wait return a number, and their answers come to the mailbox.
    fn _apart(&self, workers: &Workers, mailbox: &Mailbox) -> Self {
        Self {
            shared: self.shared.clone(),
            apart: Some(Apart {
                threads: workers.0.clone(),
                to: mailbox.0.clone(),
            }),
        }
    }
}

impl Shared {
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
        let engine = self.engine.read();
        let others = engine.as_ref().map(|e| e.known());
        let gathered = self.buffers.gather(ranges, others, write);
        gathered.ok_or(INVALID_PARAMS)
    }
}

impl Pool {
    /// Takes registrations of memory back.
    fn forget(&self, address: usize) {
        self.client.unregister(address as *mut u8);
        if let Some(direct) = &self.direct {
            direct.unregister(address);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.generation != process::generation() {
            // The sockets and threads are the parent's.
            for lent in self.nodes.lock().drain(..) {
                std::mem::forget(lent);
            }
            if let Some(server) = self.embedded.take() {
                std::mem::forget(server);
            }
            if let Some(direct) = self.direct.take() {
                std::mem::forget(direct);
            }
            return;
        }
        // SAFETY: this is the end of `self`; the client is not used again.
        unsafe { ManuallyDrop::drop(&mut self.client) };
    }
}
