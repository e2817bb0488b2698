//! Asking about keys and removing them.

use std::sync::Arc;

use mooncake::store::client::PoolClient;
use mooncake::store::model::error::StoreError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::{INVALID_PARAMS, Pool, Store, ready};
use crate::args::{Key, Keys, List, code};
use crate::batches::{Done, KEYS_MAX, Small};
use crate::descriptors::{self, ReplicaDescriptor};
use crate::mailbox::Answer;

/// 1, 0 or a negative code per key.
fn exist_each(client: &PoolClient, keys: &[&[u8]]) -> Vec<i32> {
    match client.exist(keys) {
        Ok(found) => found.into_iter().map(i32::from).collect(),
        // One bad key refuses the batch: ask for each, so that the others get their answer.
        Err(StoreError::InvalidKey { .. } | StoreError::Refused { .. }) if keys.len() > 1 => keys
            .iter()
            .flat_map(|key| exist_each(client, &[key]))
            .collect(),
        Err(error) => vec![code(&error); keys.len()],
    }
}

fn remove_each(client: &PoolClient, keys: &[&[u8]], force: bool) -> Vec<i32> {
    match client.remove(keys, force) {
        Ok(results) => results
            .into_iter()
            .map(|r| r.err().as_ref().map_or(0, code))
            .collect(),
        Err(error) => vec![code(&error); keys.len()],
    }
}

/// The only one.
fn only(py: Python<'_>, codes: Vec<i32>) -> PyResult<Py<PyAny>> {
    ready(py, codes.first().copied().unwrap_or(INVALID_PARAMS))
}

/// How codes become the call's answer.
type Finish = fn(Python<'_>, Vec<i32>) -> PyResult<Py<PyAny>>;

/// Asking about a few keys.
pub(super) struct SmallExist {
    pool: Arc<Pool>,
    keys: Keys,
    finish: Finish,
}

impl Small for SmallExist {
    fn keys(&self) -> usize {
        self.keys.len()
    }

    fn together(several: Vec<Self>) -> Vec<Done> {
        let keys: Vec<&[u8]> = several.iter().flat_map(|s| s.keys.bytes()).collect();
        let mut codes = match several.first() {
            Some(first) => exist_each(&first.pool.client, &keys),
            None => Vec::new(),
        }
        .into_iter();
        let mut take = |s: &Self| -> Vec<i32> { codes.by_ref().take(s.keys.len()).collect() };
        let each: Vec<Vec<i32>> = several.iter().map(&mut take).collect();
        let answers = several.into_iter().zip(each);
        answers
            .map(|(s, codes)| Done::Answer(Box::new(move |py| (s.finish)(py, codes))))
            .collect()
    }

    fn refused(self, why: StoreError) -> Answer {
        Box::new(move |py| (self.finish)(py, vec![code(&why); self.keys.len()]))
    }
}

fn each(py: Python<'_>, codes: Vec<i32>) -> PyResult<Py<PyAny>> {
    ready(py, codes)
}

impl Store {
    fn exist(&self, py: Python<'_>, keys: Keys, finish: Finish) -> PyResult<Py<PyAny>> {
        if let (Some(apart), Ok(pool)) = (&self.apart, self.pool())
            && keys.len() <= KEYS_MAX
        {
            let kind = pool.small.exists.clone();
            return Self::run_small(py, apart, &kind, SmallExist { pool, keys, finish });
        }
        self.codes(py, keys, exist_each, finish)
    }

    /// A code per key.
    fn codes(
        &self,
        py: Python<'_>,
        keys: Keys,
        ask: impl FnOnce(&PoolClient, &[&[u8]]) -> Vec<i32> + Send + 'static,
        finish: impl FnOnce(Python<'_>, Vec<i32>) -> PyResult<Py<PyAny>> + Send + 'static,
    ) -> PyResult<Py<PyAny>> {
        let count = keys.len();
        let pool = match self.pool() {
            Ok(pool) => pool,
            Err(code) => return finish(py, vec![code; count]),
        };
        self.run(
            py,
            move || ask(&pool.client, &keys.bytes()),
            move |error| vec![code(&error); count],
            finish,
        )
    }

    fn remove_matching(&self, py: Python<'_>, regex: &str, force: bool) -> PyResult<Py<PyAny>> {
        let pool = match self.pool() {
            Ok(pool) => pool,
            Err(code) => return ready(py, code),
        };
        let regex = regex.to_owned();
        self.run(
            py,
            move || match pool.client.remove_matching(&regex, force) {
                Ok((removed, _)) => removed as i64,
                Err(error) => i64::from(code(&error)),
            },
            |error| i64::from(code(&error)),
            ready,
        )
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
    /// Names of the segments there are; `None` when the master does not tell.
    fn _segment_names(&self, py: Python<'_>) -> Option<Vec<String>> {
        let pool = self.pool().ok()?;
        let segments = py.detach(|| pool.client.segments()).ok()?;
        Some(segments.into_iter().map(|s| s.name).collect())
    }

    /// A page of the tenant's keys that begin with `prefix`: `([(key, bytes)], cursor of the next page or 0)`, or a negative
    /// code. Keys that are no UTF-8 are left out.
    fn _page(&self, py: Python<'_>, prefix: &str, cursor: u64, limit: u32) -> PyResult<Py<PyAny>> {
        let pool = match self.pool() {
            Ok(pool) => pool,
            Err(code) => return ready(py, code),
        };
        let prefix = prefix.to_owned();
        self.run(
            py,
            move || pool.client.list(&prefix, "", cursor, limit),
            Err,
            |py, page| match page {
                Ok(page) => {
                    let keys = page.objects.into_iter();
                    let keys: Vec<(String, u64)> = keys
                        .filter_map(|o| {
                            Some((String::from_utf8(o.key.to_vec()).ok()?, o.size_bytes))
                        })
                        .collect();
                    ready(py, (keys, page.next_cursor))
                }
                Err(error) => ready(py, code(&error)),
            },
        )
    }

    /// Puts further replicas on segments: 0, or a negative code.
    fn _copy_replicas(&self, py: Python<'_>, key: Key, targets: List<String>) -> i32 {
        let key = key.bytes();
        self.with_replicas(py, |client| client.copy_replicas(key, &targets.0))
    }

    /// Moves a replica from one segment to another: 0, or a negative code.
    fn _move_replica(&self, py: Python<'_>, key: Key, source: &str, target: &str) -> i32 {
        let key = key.bytes();
        self.with_replicas(py, |client| client.move_replica(key, source, target))
    }

    /// Gives up the replica on a segment: 0, or a negative code.
    fn _clear_replica(&self, py: Python<'_>, key: Key, segment: &str) -> i32 {
        let key = key.bytes();
        self.with_replicas(py, |client| client.clear_replica(key, segment))
    }

    /// 1 there, 0 not there, negative: unknown.
    fn is_exist(&self, py: Python<'_>, key: Key) -> PyResult<Py<PyAny>> {
        self.exist(py, Keys::one(key), only)
    }

    /// `is_exist` for each key, in one exchange.
    fn batch_is_exist(&self, py: Python<'_>, keys: Keys) -> PyResult<Py<PyAny>> {
        self.exist(py, keys, each)
    }

    /// Bytes of an object, or a negative code.
    fn get_size(&self, py: Python<'_>, key: Key) -> PyResult<Py<PyAny>> {
        let pool = match self.pool() {
            Ok(pool) => pool,
            Err(code) => return ready(py, code),
        };
        self.run_each(
            py,
            1,
            move || pool.client.sizes(&[key.bytes()]),
            |py, sizes| match sizes.first() {
                Some(Ok(bytes)) => ready(py, *bytes),
                Some(Err(error)) => ready(py, code(error)),
                None => ready(py, INVALID_PARAMS),
            },
        )
    }

    /// Removes an object: 0, -704 missing, -706 leased by a reader (unless `force`).
    #[pyo3(signature = (key, force=false))]
    fn remove(&self, py: Python<'_>, key: Key, force: bool) -> PyResult<Py<PyAny>> {
        let remove = move |client: &PoolClient, keys: &[&[u8]]| remove_each(client, keys, force);
        self.codes(py, Keys::one(key), remove, only)
    }

    /// A code per key.
    #[pyo3(signature = (keys, force=false))]
    fn batch_remove(&self, py: Python<'_>, keys: Keys, force: bool) -> PyResult<Py<PyAny>> {
        let remove = move |client: &PoolClient, keys: &[&[u8]]| remove_each(client, keys, force);
        self.codes(py, keys, remove, ready)
    }

    /// Removes every key that the expression matches: how many, or a negative code.
    #[pyo3(signature = (regex_pattern, force=false))]
    fn remove_by_regex(
        &self,
        py: Python<'_>,
        regex_pattern: &str,
        force: bool,
    ) -> PyResult<Py<PyAny>> {
        if regex_pattern.is_empty() {
            return ready(py, INVALID_PARAMS);
        }
        self.remove_matching(py, regex_pattern, force)
    }

    /// Removes every key of this tenant: how many, or a negative code.
    #[pyo3(signature = (force=false))]
    fn remove_all(&self, py: Python<'_>, force: bool) -> PyResult<Py<PyAny>> {
        self.remove_matching(py, "", force)
    }

    /// The replicas of a key; empty when there is no such object.
    fn get_replica_desc(&self, py: Python<'_>, key: Key) -> PyResult<Py<PyAny>> {
        let Ok(pool) = self.pool() else {
            return ready(py, Vec::<ReplicaDescriptor>::new());
        };
        self.run(
            py,
            move || descriptors::describe(&pool.client, &[key.bytes()]),
            |_| Vec::new(),
            |py, found| match found.into_iter().next().flatten() {
                Some(description) => ready(py, descriptors::replicas(py, description)?),
                None => ready(py, Vec::<ReplicaDescriptor>::new()),
            },
        )
    }

    /// The replicas of each key that is there.
    fn batch_get_replica_desc(&self, py: Python<'_>, keys: Keys) -> PyResult<Py<PyAny>> {
        let Ok(pool) = self.pool() else {
            return Ok(PyDict::new(py).into_any().unbind());
        };
        self.run(
            py,
            move || {
                let found = descriptors::describe(&pool.client, &keys.bytes());
                (keys, found)
            },
            |_| (Keys::none(), Vec::new()),
            |py, (keys, found)| {
                let answer = PyDict::new(py);
                for (name, description) in keys.bytes().iter().zip(found) {
                    if let Some(description) = description {
                        let replicas = descriptors::replicas(py, description)?;
                        answer.set_item(String::from_utf8_lossy(name), replicas)?;
                    }
                }
                Ok(answer.into_any().unbind())
            },
        )
    }

    /// Reads of offloaded objects answered by this process.
    fn get_offload_rpc_read_count(&self) -> u64 {
        0
    }
}
