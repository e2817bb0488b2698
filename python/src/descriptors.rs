//! What `get_replica_desc` answers.

use mooncake::store::client::PoolClient;
use mooncake::store::wire;
use pyo3::prelude::*;

/// Where the bytes of a memory replica lie.
#[pyclass(module = "mooncake.store", frozen, get_all)]
pub(crate) struct BufferDescriptor {
    size: u64,
    /// Offset within the segment: segments are reached by name here, not by address.
    buffer_address: u64,
    /// Name of the segment; `host:port` of its node unless it was given another.
    transport_endpoint: String,
    protocol: String,
}

#[pyclass(module = "mooncake.store", frozen, get_all)]
pub(crate) struct MemoryDescriptor {
    buffer_descriptor: Py<BufferDescriptor>,
}

#[pyclass(module = "mooncake.store", frozen, get_all)]
pub(crate) struct DiskDescriptor {
    file_path: String,
    object_size: u64,
}

/// One replica of an object.
#[pyclass(module = "mooncake.store", frozen)]
pub(crate) struct ReplicaDescriptor {
    state: String,
    memory: Py<MemoryDescriptor>,
}

#[pymethods]
impl ReplicaDescriptor {
    /// `ReplicaStatus`: COMPLETE (3), else PROCESSING (2).
    #[getter]
    fn status(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let kinds = py.import("mooncake._enums")?.getattr("ReplicaStatus")?;
        let number = if self.state == "ok" || self.state == "complete" {
            3
        } else {
            2
        };
        Ok(kinds.call1((number,))?.unbind())
    }
    fn is_memory_replica(&self) -> bool {
        true
    }
    fn is_disk_replica(&self) -> bool {
        false
    }
    fn is_local_disk_replica(&self) -> bool {
        false
    }
    fn get_memory_descriptor(&self, py: Python<'_>) -> Py<MemoryDescriptor> {
        self.memory.clone_ref(py)
    }
    fn get_disk_descriptor(&self) -> PyResult<Py<DiskDescriptor>> {
        Err(pyo3::exceptions::PyRuntimeError::new_err(
            "this replica is in memory",
        ))
    }
    fn __repr__(&self) -> String {
        format!("ReplicaDescriptor(memory, {})", self.state)
    }
}

/// The replicas of a key; `None` when there is no such object.
pub(crate) fn replicas(
    py: Python<'_>,
    description: wire::Description,
) -> PyResult<Vec<ReplicaDescriptor>> {
    let size = description.size_bytes;
    let mut out = Vec::with_capacity(description.replicas.len());
    for r in description.replicas {
        let buffer = BufferDescriptor {
            size,
            buffer_address: r.offset,
            transport_endpoint: r.segment_name,
            protocol: "tcp".to_owned(),
        };
        let memory = MemoryDescriptor {
            buffer_descriptor: Py::new(py, buffer)?,
        };
        out.push(ReplicaDescriptor {
            state: r.state,
            memory: Py::new(py, memory)?,
        });
    }
    Ok(out)
}

/// Descriptions of keys, without those that are missing.
pub(crate) fn describe(client: &PoolClient, keys: &[&[u8]]) -> Vec<Option<wire::Description>> {
    keys.iter().map(|key| client.stat(key).ok()).collect()
}
