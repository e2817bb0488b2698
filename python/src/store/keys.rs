//! Asking about keys and removing them.

use mooncake::store::client::PoolClient;
use mooncake::store::model::error::StoreError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::{INVALID_PARAMS, Store};
use crate::args::{Key, Keys, code};
use crate::descriptors::{self, ReplicaDescriptor};

impl Store {
    fn exist_all(&self, py: Python<'_>, keys: &[&[u8]]) -> Vec<i32> {
        let pool = match self.pool() {
            Ok(pool) => pool,
            Err(code) => return vec![code; keys.len()],
        };
        match py.detach(|| pool.client.exist(keys)) {
            Ok(found) => found.into_iter().map(i32::from).collect(),
            // One bad key refuses the batch: ask for each, so that the others get their answer.
            Err(StoreError::InvalidKey { .. } | StoreError::Refused { .. }) if keys.len() > 1 => {
                keys.iter()
                    .flat_map(|key| self.exist_all(py, &[key]))
                    .collect()
            }
            Err(error) => vec![code(&error); keys.len()],
        }
    }

    fn remove_all_of(&self, py: Python<'_>, keys: &[&[u8]], force: bool) -> Vec<i32> {
        let pool = match self.pool() {
            Ok(pool) => pool,
            Err(code) => return vec![code; keys.len()],
        };
        match py.detach(|| pool.client.remove(keys, force)) {
            Ok(results) => results
                .into_iter()
                .map(|r| r.err().as_ref().map_or(0, code))
                .collect(),
            Err(error) => vec![code(&error); keys.len()],
        }
    }

    fn remove_matching(&self, py: Python<'_>, regex: &str, force: bool) -> i64 {
        let pool = match self.pool() {
            Ok(pool) => pool,
            Err(code) => return i64::from(code),
        };
        match py.detach(|| pool.client.remove_matching(regex, force)) {
            Ok((removed, _)) => removed as i64,
            Err(error) => i64::from(code(&error)),
        }
    }
}

impl Store {
    fn with_replicas(
        &self,
        py: Python<'_>,
        run: impl FnOnce(&PoolClient) -> Result<(), StoreError> + Send,
    ) -> i32 {
        let pool = match self.pool() {
            Ok(pool) => pool,
            Err(code) => return code,
        };
        let outcome = py.detach(|| run(&pool.client));
        outcome.map_or_else(|e| code(&e), |()| 0)
    }
}

#[pymethods]
impl Store {
    /// Puts further replicas on segments: 0, or a negative code.
    fn _copy_replicas(&self, py: Python<'_>, key: Key<'_>, targets: Vec<String>) -> i32 {
        let key = key.bytes();
        self.with_replicas(py, |client| client.copy_replicas(key, &targets))
    }

    /// Moves a replica from one segment to another: 0, or a negative code.
    fn _move_replica(&self, py: Python<'_>, key: Key<'_>, source: &str, target: &str) -> i32 {
        let key = key.bytes();
        self.with_replicas(py, |client| client.move_replica(key, source, target))
    }

    /// Gives up the replica on a segment: 0, or a negative code.
    fn _clear_replica(&self, py: Python<'_>, key: Key<'_>, segment: &str) -> i32 {
        let key = key.bytes();
        self.with_replicas(py, |client| client.clear_replica(key, segment))
    }

    /// 1 there, 0 not there, negative: unknown.
    fn is_exist(&self, py: Python<'_>, key: Key<'_>) -> i32 {
        self.exist_all(py, &[key.bytes()])
            .pop()
            .unwrap_or(INVALID_PARAMS)
    }

    /// `is_exist` for each key, in one exchange.
    fn batch_is_exist(&self, py: Python<'_>, keys: Keys<'_>) -> Vec<i32> {
        self.exist_all(py, &keys.bytes())
    }

    /// Bytes of an object, or a negative code.
    fn get_size(&self, py: Python<'_>, key: Key<'_>) -> i64 {
        let pool = match self.pool() {
            Ok(pool) => pool,
            Err(code) => return i64::from(code),
        };
        let names = [key.bytes()];
        let size = py.detach(|| pool.client.sizes(&names)).pop();
        match size {
            Some(Ok(bytes)) => bytes as i64,
            Some(Err(error)) => i64::from(code(&error)),
            None => i64::from(INVALID_PARAMS),
        }
    }

    /// Removes an object: 0, -704 missing, -706 leased by a reader (unless `force`).
    #[pyo3(signature = (key, force=false))]
    fn remove(&self, py: Python<'_>, key: Key<'_>, force: bool) -> i32 {
        self.remove_all_of(py, &[key.bytes()], force)
            .pop()
            .unwrap_or(INVALID_PARAMS)
    }

    /// A code per key.
    #[pyo3(signature = (keys, force=false))]
    fn batch_remove(&self, py: Python<'_>, keys: Keys<'_>, force: bool) -> Vec<i32> {
        self.remove_all_of(py, &keys.bytes(), force)
    }

    /// Removes every key that the expression matches: how many, or a negative code.
    #[pyo3(signature = (regex_pattern, force=false))]
    fn remove_by_regex(&self, py: Python<'_>, regex_pattern: &str, force: bool) -> i64 {
        if regex_pattern.is_empty() {
            return i64::from(INVALID_PARAMS);
        }
        self.remove_matching(py, regex_pattern, force)
    }

    /// Removes every key of this tenant: how many, or a negative code.
    #[pyo3(signature = (force=false))]
    fn remove_all(&self, py: Python<'_>, force: bool) -> i64 {
        self.remove_matching(py, "", force)
    }

    /// The replicas of a key; empty when there is no such object.
    fn get_replica_desc(&self, py: Python<'_>, key: Key<'_>) -> PyResult<Vec<ReplicaDescriptor>> {
        let Ok(pool) = self.pool() else {
            return Ok(Vec::new());
        };
        let names = [key.bytes()];
        let found = py.detach(|| descriptors::describe(&pool.client, &names));
        match found.into_iter().next().flatten() {
            Some(description) => descriptors::replicas(py, description),
            None => Ok(Vec::new()),
        }
    }

    /// The replicas of each key that is there.
    fn batch_get_replica_desc<'py>(
        &self,
        py: Python<'py>,
        keys: Keys<'_>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let answer = PyDict::new(py);
        let Ok(pool) = self.pool() else {
            return Ok(answer);
        };
        let names = keys.bytes();
        let found = py.detach(|| descriptors::describe(&pool.client, &names));
        for (name, description) in names.iter().zip(found) {
            if let Some(description) = description {
                let replicas = descriptors::replicas(py, description)?;
                answer.set_item(String::from_utf8_lossy(name), replicas)?;
            }
        }
        Ok(answer)
    }

    /// Reads of offloaded objects answered by this process.
    fn get_offload_rpc_read_count(&self) -> u64 {
        0
    }
}
