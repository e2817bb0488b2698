//! `ReplicateConfig`, with upstream's attributes and defaults.

use mooncake::store::client::PutOptions;
use pyo3::prelude::*;
use pyo3::types::PyAny;

use crate::args::{List, Word};

/// Half an hour, upstream's soft-pin time when a pin is switched on without one.
const SOFT_PIN_DEFAULT_MS: u64 = 30 * 60 * 1000;

/// How an object is stored. Attributes of replica kinds this pool does not have (`nof_*`, `dfs_*`) are kept and ignored.
#[pyclass(module = "mooncake.store", from_py_object)]
#[derive(Clone, Default)]
pub(crate) struct ReplicateConfig {
    /// Copies in memory, on distinct nodes, best effort.
    #[pyo3(get, set)]
    pub(crate) replica_num: u32,
    #[pyo3(get, set)]
    nof_replica_num: u32,
    #[pyo3(get, set)]
    dfs_replica_num: u32,
    /// 0 PRESERVE, 1 ENABLE, 2 DISABLE (`SoftPinAction`).
    soft_pin_action: i32,
    /// Milliseconds; None = 30 minutes when enabled. Only an enabled pin may have one.
    #[pyo3(get)]
    soft_pin_ttl_ms: Option<u64>,
    #[pyo3(get, set)]
    with_hard_pin: bool,
    #[pyo3(get)]
    preferred_segments: Vec<String>,
    /// Deprecated singular of `preferred_segments`; what vLLM sets.
    #[pyo3(get, set)]
    preferred_segment: String,
    #[pyo3(get)]
    preferred_nof_segments: Vec<String>,
    /// All keys of a batch on the node of the first.
    #[pyo3(get, set)]
    pub(crate) prefer_alloc_in_same_node: bool,
    data_type: i32,
    /// A group per key of the batch.
    #[pyo3(get)]
    pub(crate) group_ids: Option<Vec<String>>,
    /// Kept for callers that set it; sessions need no id here.
    #[pyo3(get)]
    session_ids: Option<Vec<String>>,
    #[pyo3(get, set)]
    host_id: String,
}

/// An enum member, an int, or something with a `value`.
fn number(value: &Bound<'_, PyAny>) -> PyResult<i32> {
    value
        .extract::<i32>()
        .or_else(|_| value.getattr("value")?.extract::<i32>())
}

#[pymethods]
impl ReplicateConfig {
    #[new]
    fn new() -> Self {
        Self {
            replica_num: 1,
            ..Self::default()
        }
    }

    #[setter]
    fn set_soft_pin_ttl_ms(&mut self, value: Option<Word>) {
        self.soft_pin_ttl_ms = value.map(|w| w.0 as u64);
    }
    #[setter]
    fn set_preferred_segments(&mut self, value: List<String>) {
        self.preferred_segments = value.0;
    }
    #[setter]
    fn set_preferred_nof_segments(&mut self, value: List<String>) {
        self.preferred_nof_segments = value.0;
    }
    #[setter]
    fn set_group_ids(&mut self, value: Option<List<String>>) {
        self.group_ids = value.map(|v| v.0);
    }
    #[setter]
    fn set_session_ids(&mut self, value: Option<List<String>>) {
        self.session_ids = value.map(|v| v.0);
    }
    #[getter]
    fn soft_pin_action(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let kinds = py.import("mooncake._enums")?.getattr("SoftPinAction")?;
        Ok(kinds.call1((self.soft_pin_action,))?.unbind())
    }
    #[setter]
    fn set_soft_pin_action(&mut self, value: &Bound<'_, PyAny>) -> PyResult<()> {
        self.soft_pin_action = number(value)?;
        Ok(())
    }
    /// Older spelling of a soft pin.
    #[getter]
    fn with_soft_pin(&self) -> bool {
        self.soft_pin_action == 1
    }
    #[setter]
    fn set_with_soft_pin(&mut self, value: bool) {
        self.soft_pin_action = i32::from(value);
    }
    #[getter]
    fn data_type(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let kinds = py.import("mooncake._enums")?.getattr("ObjectDataType")?;
        Ok(kinds.call1((self.data_type,))?.unbind())
    }
    #[setter]
    fn set_data_type(&mut self, value: &Bound<'_, PyAny>) -> PyResult<()> {
        self.data_type = number(value)?;
        Ok(())
    }
    fn __str__(&self) -> String {
        format!(
            "ReplicateConfig: {{ replica_num: {}, soft_pin_action: {}, with_hard_pin: {}, preferred_segments: {:?}, \
             prefer_alloc_in_same_node: {} }}",
            self.replica_num,
            self.soft_pin_action,
            self.with_hard_pin,
            self.preferred(),
            self.prefer_alloc_in_same_node,
        )
    }
    fn __repr__(&self) -> String {
        self.__str__()
    }
}

impl ReplicateConfig {
    fn preferred(&self) -> Vec<String> {
        let mut preferred = self.preferred_segments.clone();
        if !self.preferred_segment.is_empty() {
            preferred.push(self.preferred_segment.clone());
        }
        preferred
    }

    /// Whether the pool is asked for something that means something: upstream refuses a time without an enabled pin.
    pub(crate) fn is_valid(&self) -> bool {
        self.soft_pin_action == 1 || self.soft_pin_ttl_ms.is_none()
    }

    pub(crate) fn options(&self, upsert: bool) -> PutOptions {
        let pinned = self.soft_pin_action == 1;
        PutOptions {
            replicas: self.replica_num,
            soft_pin_ttl_ms: if pinned {
                self.soft_pin_ttl_ms.unwrap_or(SOFT_PIN_DEFAULT_MS)
            } else {
                0
            },
            hard_pin: self.with_hard_pin,
            preferred_segments: self.preferred(),
            group: String::new(),
            data_type: self.data_type.clamp(0, 255) as u8,
            upsert,
            if_version: 0,
        }
    }
}
