//! Lending and taking back memory while the process runs.

use std::fs::{File, OpenOptions};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use mooncake::engine::memory::Memory;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::lifecycle::{INTERNAL_ERROR, Lent, start_node, stop_node};
use super::{INVALID_PARAMS, Lending, Pool, Store};
use crate::args::List;
use crate::bus_guard::Watch;
use crate::process;

/// How often lent files are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long the master may take to let go of a lost segment.
const LOST_PATIENCE: Duration = Duration::from_secs(3);
const FILE_OPEN_FAIL: i32 = -1101;
const SEGMENT_NOT_FOUND: i32 = -101;

impl Store {
    fn mount(
        &self,
        py: Python<'_>,
        lend: impl FnOnce() -> Result<(Lent, Option<Watch>), i32> + Send,
    ) -> Result<String, i32> {
        let pool = self.pool()?;
        let engine = self.engine.read().clone();
        py.detach(|| {
            // Watched before anybody else hears of it.
            let (lent, watch) = lend()?;
            let (address, name) = pool.place.clone();
            let listen = SocketAddr::new(address, 0);
            let token = super::lifecycle::token();
            let fabric = pool.fabric.clone();
            let port = engine.and_then(|e| e.port(listen));
            let master = pool.client.master();
            let node = start_node(master, token, listen, name, lent, fabric, port)?;
            pool.client.add_local(node.host());
            let id = node.name().to_owned();
            let is_watched = watch.is_some();
            let lent = Lending {
                id: id.clone(),
                node,
                watch,
            };
            pool.nodes.lock().push(lent);
            if is_watched {
                leave_when_lost(&pool, id.clone());
            }
            Ok(id)
        })
    }

    fn unmount(&self, py: Python<'_>, ids: &[String], grace_seconds: u64) -> i32 {
        let pool = match self.pool() {
            Ok(pool) => pool,
            Err(code) => return code,
        };
        let mut answer = 0;
        for id in ids {
            let found = {
                let mut nodes = pool.nodes.lock();
                let at = nodes.iter().position(|lent| lent.id == *id);
                at.map(|at| nodes.remove(at))
            };
            match found {
                Some(lent) => {
                    let timeout = Duration::from_secs(grace_seconds.clamp(3, 3600));
                    py.detach(|| {
                        stop_node(&lent.node, timeout);
                        drop(lent);
                    });
                }
                None => answer = SEGMENT_NOT_FOUND,
            }
        }
        answer
    }
}

/// Part of a file as memory, which becomes empty when the file is cut.
fn map(path: &str, offset: u64, length: u64) -> Result<(Lent, Option<Watch>), i32> {
    let file = open_regular(path).map_err(|error| {
        tracing::warn!("mount_segment: {path}: {error}");
        FILE_OPEN_FAIL
    })?;
    let refused = |what: &dyn std::fmt::Display| {
        tracing::warn!("mount_segment: {path}: {what}");
        INVALID_PARAMS
    };
    let bytes = usize::try_from(length).map_err(|error| refused(&error))?;
    let memory = Memory::from_file(&file, offset, bytes).map_err(|error| {
        let code = refused(&error);
        if error.kind() == std::io::ErrorKind::InvalidInput {
            code
        } else {
            INTERNAL_ERROR
        }
    })?;
    let memory = Arc::new(memory);
    let watch = Watch::new(memory.clone(), file, offset)
        .ok_or_else(|| refused(&"too many files are lent by this process"))?;
    Ok((Lent::Mapped(memory), Some(watch)))
}

/// Unmounts a file once it has been cut: its objects are gone, and nothing should be placed there.
fn leave_when_lost(pool: &Arc<Pool>, id: String) {
    let pool = Arc::downgrade(pool);
    let look = move || {
        let pool = pool.upgrade()?;
        let mut nodes = pool.nodes.lock();
        let at = nodes.iter().position(|lent| lent.id == id)?;
        let is_lost = nodes[at].watch.as_ref().is_some_and(Watch::look);
        Some(is_lost.then(|| nodes.remove(at)))
    };
    let Ok(runtime) = process::runtime() else {
        return;
    };
    runtime.spawn(async move {
        let mut every = tokio::time::interval(LOOK_EVERY);
        loop {
            every.tick().await;
            match look() {
                None => return,
                Some(None) => {}
                Some(Some(lent)) => {
                    tracing::warn!(
                        segment = lent.id,
                        "its file was cut while it was lent: unmounted"
                    );
                    lent.node.drain(LOST_PATIENCE).await;
                    let _ = tokio::task::spawn_blocking(move || drop(lent)).await;
                    return;
                }
            }
        }
    });
}

/// Opens without waiting for the other end of what is no file.
fn open_regular(path: &str) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true);
    options.custom_flags(libc::O_NONBLOCK).open(path)
}

fn mounted<'py>(
    py: Python<'py>,
    outcome: Result<String, i32>,
    bytes: u64,
) -> PyResult<Bound<'py, PyDict>> {
    let answer = PyDict::new(py);
    let (code, ids) = match outcome {
        Ok(id) => (0, vec![id]),
        Err(code) => (code, Vec::new()),
    };
    answer.set_item("ret", code)?;
    answer.set_item("allocated_size", if ids.is_empty() { 0 } else { bytes })?;
    answer.set_item("segment_ids", ids)?;
    Ok(answer)
}

#[pymethods]
impl Store {
    /// Lends `size` more bytes: `{"ret", "segment_ids", "allocated_size"}`.
    #[pyo3(signature = (size, protocol="tcp", location=""))]
    fn allocate_and_mount_segment<'py>(
        &self,
        py: Python<'py>,
        size: u64,
        protocol: &str,
        location: &str,
    ) -> PyResult<Bound<'py, PyDict>> {
        let _ = (protocol, location);
        let Some(rounded) = size.checked_next_multiple_of(4096).filter(|s| *s > 0) else {
            return mounted(py, Err(INVALID_PARAMS), 0);
        };
        let outcome = self.mount(py, || Ok((Lent::Fresh(size), None)));
        mounted(py, outcome, rounded)
    }

    /// Lends part of a file, of shared memory for one: `{"ret", "segment_ids", "allocated_size"}`. Offset and size are
    /// multiples of 4096. The file's content is lost; when it is cut while it is lent, the objects in it are lost and it
    /// is unmounted. Peers of this host reach it by TCP.
    #[pyo3(signature = (path, size, offset=0, protocol="tcp", location=""))]
    fn mount_segment<'py>(
        &self,
        py: Python<'py>,
        path: &str,
        size: u64,
        offset: u64,
        protocol: &str,
        location: &str,
    ) -> PyResult<Bound<'py, PyDict>> {
        let _ = (protocol, location);
        let outcome = self.mount(py, || map(path, offset, size));
        mounted(py, outcome, size)
    }

    /// Takes lent memory back: 0, or -101 for an id that is not mounted.
    #[pyo3(signature = (segment_ids, grace_period_seconds=0))]
    fn unmount_segment(
        &self,
        py: Python<'_>,
        segment_ids: List<String>,
        grace_period_seconds: u64,
    ) -> i32 {
        self.unmount(py, &segment_ids.0, grace_period_seconds)
    }

    /// The same: memory lent by `allocate_and_mount_segment` is always freed with its segment.
    #[pyo3(signature = (segment_ids, grace_period_seconds=0))]
    fn unmount_and_free_segment(
        &self,
        py: Python<'_>,
        segment_ids: List<String>,
        grace_period_seconds: u64,
    ) -> i32 {
        self.unmount(py, &segment_ids.0, grace_period_seconds)
    }

    /// There is no disk segment in this build: -101.
    #[pyo3(signature = (grace_period_seconds=0))]
    fn unmount_local_disk_segment(&self, grace_period_seconds: u64) -> i32 {
        let _ = grace_period_seconds;
        SEGMENT_NOT_FOUND
    }
}
