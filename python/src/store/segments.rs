//! Lending and taking back memory while the process runs.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use mooncake::store::node::FileRange;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::lifecycle::{Lent, start_node, stop_node};
use super::{INVALID_PARAMS, Store};
use crate::args::List;

const FILE_OPEN_FAIL: i32 = -1101;
const SEGMENT_NOT_FOUND: i32 = -101;

impl Store {
    fn mount(&self, py: Python<'_>, lent: Lent) -> Result<String, i32> {
        let pool = self.pool()?;
        py.detach(|| {
            let (host, _) = mooncake::base::net::split_host_port(&pool.hostname, 0)
                .map_err(|_| INVALID_PARAMS)?;
            let address = mooncake::base::net::join_host_port(&host, 0);
            let listen = mooncake::base::net::resolve_one(&address).map_err(|_| INVALID_PARAMS)?;
            let token = super::lifecycle::token();
            let node = start_node(
                pool.client.master(),
                token,
                listen,
                None,
                lent,
                pool.fabric.clone(),
            )?;
            pool.client.add_local(node.host());
            let id = node.name().to_owned();
            pool.nodes.lock().push((id.clone(), node));
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
                let at = nodes.iter().position(|(name, _)| name == id);
                at.map(|at| nodes.remove(at))
            };
            match found {
                Some((_, node)) => {
                    let timeout = Duration::from_secs(grace_seconds.clamp(3, 3600));
                    py.detach(|| stop_node(&node, timeout));
                }
                None => answer = SEGMENT_NOT_FOUND,
            }
        }
        answer
    }
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
        let outcome = self.mount(py, Lent::Fresh(size));
        mounted(py, outcome, rounded)
    }

    /// Lends part of a file, of shared memory for one: `{"ret", "segment_ids", "allocated_size"}`. Offset and size are
    /// multiples of 4096. The file's content is lost; whoever cuts it while it is lent kills this process, as with
    /// upstream. Peers of this host reach it by TCP.
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
        let opened = py.detach(|| open_regular(path));
        let outcome = match opened {
            Ok(file) => self.mount(
                py,
                Lent::File(FileRange {
                    file: Arc::new(file),
                    offset,
                    length: size,
                }),
            ),
            Err(error) => {
                tracing::warn!("mount_segment: {path}: {error}");
                Err(FILE_OPEN_FAIL)
            }
        };
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
