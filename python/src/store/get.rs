//! Reading into the caller's memory, and whole objects.

use std::sync::Arc;

use mooncake::engine::batch::LocalSlice;
use mooncake::store::client::{GetRequest, PoolClient};
use mooncake::store::model::error::StoreError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::fresh::{self, SmallGet, bytes_of, read_fresh};
use super::{AT_ONCE_MAX, INVALID_PARAMS, Pool, Store, ready};
use crate::args::{Key, Keys, Word, WordLists, Words, code};
use crate::batches::{Done, KEYS_MAX, Small};
use crate::buffers::BufferHandle;
use crate::mailbox::Answer;
use crate::staging::{self, Gathered};

pub(super) const TRANSFER_FAIL: i64 = -800;
fn read_code(outcome: Result<u64, StoreError>) -> i64 {
    outcome.map_or_else(
        |error| {
            tracing::debug!(%error, "get");
            i64::from(code(&error))
        },
        |read| read as i64,
    )
}

/// Gets whose bytes go (in part) to a device.
fn get_into_device(
    pool: &Pool,
    requests: &[GetRequest<'_>],
    targets: &[&Gathered],
) -> Vec<Result<u64, StoreError>> {
    let direct = pool.direct.as_ref();
    if let Some(read) = direct.and_then(|d| d.run(targets, |client| client.get_into(requests))) {
        return read;
    }
    let client = &pool.client;
    let failed = |reason: String| StoreError::TransferFailed { attempts: reason };
    let mut outcomes: Vec<Result<u64, StoreError>> = requests
        .iter()
        .map(|_| Err(failed("no staging buffer".to_owned())))
        .collect();
    let lost = staging::upload(targets, |window, slices| {
        let staged: Vec<GetRequest<'_>> = window
            .clone()
            .zip(slices)
            .map(|(at, target)| GetRequest {
                key: requests[at].key,
                target,
            })
            .collect();
        let read = client.get_into(&staged);
        let bytes = read.iter().map(|r| r.as_ref().ok().copied()).collect();
        for (at, outcome) in window.zip(read) {
            outcomes[at] = outcome;
        }
        bytes
    });
    for (window, error) in lost {
        tracing::warn!(%error, "device memory was not written");
        for at in window {
            outcomes[at] = Err(failed(error.to_string()));
        }
    }
    outcomes
}

/// Bytes read per key; `exact` refuses objects smaller than their buffers.
fn read_all(
    pool: &Pool,
    keys: &[&[u8]],
    targets: &[Result<Gathered, i32>],
    exact: bool,
) -> Vec<i64> {
    let pairs = keys.iter().zip(targets);
    let accepted = pairs.filter_map(|(key, target)| Some((key, target.as_ref().ok()?)));
    let (requests, reached): (Vec<GetRequest<'_>>, Vec<&Gathered>) = accepted
        .map(|(key, target)| (GetRequest { key, target }, target))
        .unzip();
    let outcomes = if staging::any_on_device(&reached) {
        get_into_device(pool, &requests, &reached)
    } else {
        pool.client.get_into(&requests)
    };
    let mut outcomes = outcomes.into_iter();
    let mut result = |target: &Result<Gathered, i32>| match target {
        Ok(target) => outcomes.next().map(|o| read_result(o, target, exact)),
        Err(refused) => Some(i64::from(*refused)),
    };
    targets.iter().map_while(&mut result).collect()
}

/// Bytes read, or why none were.
fn read_result(outcome: Result<u64, StoreError>, target: &[LocalSlice], exact: bool) -> i64 {
    let read = read_code(outcome);
    if exact && read >= 0 && read as usize != room(target) {
        return TRANSFER_FAIL;
    }
    read
}

fn room(target: &[LocalSlice]) -> usize {
    target.iter().map(LocalSlice::len).sum()
}

/// Whether targets take few bytes, all of them the host's.
fn are_small(targets: &[Result<Gathered, i32>]) -> bool {
    let accepted: Vec<&Gathered> = targets.iter().flatten().collect();
    let bytes: usize = accepted.iter().map(|t| room(t)).sum();
    accepted.len() == targets.len()
        && bytes as u64 <= AT_ONCE_MAX
        && !staging::any_on_device(&accepted)
}

fn requests<'a>(keys: &[&'a [u8]], targets: &[&'a Gathered]) -> Vec<GetRequest<'a>> {
    let pairs = keys.iter().zip(targets);
    pairs
        .map(|(key, target)| GetRequest { key, target })
        .collect()
}

/// Reads of few bytes ([`are_small`]) that need nothing but a copy; `None` when any of them needs more.
fn read_at_once(
    client: &PoolClient,
    keys: &[&[u8]],
    targets: &[Result<Gathered, i32>],
    exact: bool,
) -> Option<Vec<i64>> {
    let targets: Vec<&Gathered> = targets.iter().flatten().collect();
    let requests = requests(keys, &targets);
    let read = client.get_all_nearby(&requests)?;
    let results = read.into_iter().zip(&targets);
    Some(
        results
            .map(|(read, target)| read_result(Ok(read), target, exact))
            .collect(),
    )
}

/// A buffer per key that could be read.
type Handles = Vec<Option<Py<BufferHandle>>>;

/// How bytes read become the call's answer.
type Finish = fn(Python<'_>, Vec<i64>) -> PyResult<Py<PyAny>>;

fn only(py: Python<'_>, read: Vec<i64>) -> PyResult<Py<PyAny>> {
    let refused = i64::from(INVALID_PARAMS);
    ready(py, read.first().copied().unwrap_or(refused))
}

fn each(py: Python<'_>, read: Vec<i64>) -> PyResult<Py<PyAny>> {
    ready(py, read)
}

/// A read of few bytes into the caller's memory.
pub(super) struct SmallRead {
    pool: Arc<Pool>,
    keys: Keys,
    targets: Vec<Gathered>,
    exact: bool,
    finish: Finish,
}

impl Small for SmallRead {
    fn keys(&self) -> usize {
        self.keys.len()
    }

    fn together(several: Vec<Self>) -> Vec<Done> {
        let keys: Vec<&[u8]> = several.iter().flat_map(|s| s.keys.bytes()).collect();
        let targets: Vec<&Gathered> = several.iter().flat_map(|s| &s.targets).collect();
        let outcomes = match several.first() {
            Some(first) => first.pool.client.get_into(&requests(&keys, &targets)),
            None => Vec::new(),
        };
        let mut outcomes = outcomes.into_iter();
        let mut answers = Vec::with_capacity(several.len());
        for read in several {
            let each = read.targets.iter().zip(outcomes.by_ref());
            let results = each.map(|(target, outcome)| read_result(outcome, target, read.exact));
            let results: Vec<i64> = results.collect();
            answers.push(Done::Answer(Box::new(move |py| (read.finish)(py, results))));
        }
        answers
    }

    fn refused(self, why: StoreError) -> Answer {
        Box::new(move |py| (self.finish)(py, vec![i64::from(code(&why)); self.keys.len()]))
    }
}

impl Store {
    /// New bytes objects with the objects' content.
    fn get_fresh(
        &self,
        py: Python<'_>,
        keys: Keys,
        finish: impl FnOnce(Python<'_>, Vec<Py<PyBytes>>) -> PyResult<Py<PyAny>> + Send + 'static,
    ) -> PyResult<Py<PyAny>> {
        let Ok(pool) = self.pool() else {
            let nothing = (0..keys.len()).map(|_| bytes_of(py, None)).collect();
            return finish(py, nothing);
        };
        if let Some(apart) = &self.apart {
            if let Some(read) = fresh::read_at_once(py, &pool.client, &keys.bytes()) {
                return finish(py, read);
            }
            if keys.len() <= KEYS_MAX && !fresh::is_known_to_be_large(&pool.client, &keys.bytes()) {
                let kind = pool.small.gets.clone();
                let get = SmallGet::new(pool, keys, Box::new(finish));
                return Self::run_small(py, apart, &kind, get);
            }
        }
        // A thread would have to wait for the interpreter lock to get at Python's memory: not for small objects.
        let small = if self.apart.is_some() { AT_ONCE_MAX } else { 0 };
        let count = keys.len();
        self.run(
            py,
            move || read_fresh(&pool.client, &keys.bytes(), small),
            move |_| (0..count).map(|_| None).collect(),
            move |py, found| finish(py, found.into_iter().map(|f| bytes_of(py, f)).collect()),
        )
    }

    fn get_all(
        &self,
        py: Python<'_>,
        keys: Keys,
        targets: Vec<Result<Gathered, i32>>,
        exact: bool,
        finish: Finish,
    ) -> PyResult<Py<PyAny>> {
        let count = keys.len();
        let pool = match self.pool() {
            Ok(pool) => pool,
            Err(code) => return finish(py, vec![i64::from(code); count]),
        };
        if let Some(apart) = &self.apart
            && are_small(&targets)
        {
            if let Some(read) = read_at_once(&pool.client, &keys.bytes(), &targets, exact) {
                return finish(py, read);
            }
            if count <= KEYS_MAX {
                let kind = pool.small.reads.clone();
                let read = SmallRead {
                    pool,
                    keys,
                    targets: targets.into_iter().flatten().collect(),
                    exact,
                    finish,
                };
                return Self::run_small(py, apart, &kind, read);
            }
        }
        self.run(
            py,
            move || read_all(&pool, &keys.bytes(), &targets, exact),
            move |error| vec![i64::from(code(&error)); count],
            finish,
        )
    }

    fn handles(
        &self,
        py: Python<'_>,
        keys: Keys,
        finish: impl FnOnce(Python<'_>, Handles) -> PyResult<Py<PyAny>> + Send + 'static,
    ) -> PyResult<Py<PyAny>> {
        let Ok(pool) = self.pool() else {
            return finish(py, keys.bytes().iter().map(|_| None).collect());
        };
        self.run_each(
            py,
            keys.len(),
            move || pool.client.get_batch(&keys.bytes()),
            move |py, read| {
                let handle = |bytes| Py::new(py, BufferHandle::new(bytes));
                let handles = read.into_iter().map(|r| r.ok().map(handle).transpose());
                finish(py, handles.collect::<PyResult<_>>()?)
            },
        )
    }
}

#[pymethods]
impl Store {
    /// The object's bytes; `b""` when it is missing or could not be read.
    fn get(&self, py: Python<'_>, key: Key) -> PyResult<Py<PyAny>> {
        self.get_fresh(py, Keys::one(key), |py, found| {
            ready(py, found.into_iter().next())
        })
    }

    /// Bytes per key; `b""` for those that are missing.
    fn get_batch(&self, py: Python<'_>, keys: Keys) -> PyResult<Py<PyAny>> {
        self.get_fresh(py, keys, ready)
    }

    /// The object in a buffer of its own, or `None`.
    fn get_buffer(&self, py: Python<'_>, key: Key) -> PyResult<Py<PyAny>> {
        self.handles(py, Keys::one(key), |py, found| {
            ready(py, found.into_iter().next().flatten())
        })
    }

    /// A buffer per key, or `None`.
    fn batch_get_buffer(&self, py: Python<'_>, keys: Keys) -> PyResult<Py<PyAny>> {
        self.handles(py, keys, ready)
    }

    /// Reads into `size` bytes at an address: bytes read, or a negative code.
    fn get_into(
        &self,
        py: Python<'_>,
        key: Key,
        buffer_ptr: Word,
        size: Word,
    ) -> PyResult<Py<PyAny>> {
        let target = self.slice(buffer_ptr.0, size.0, true);
        self.get_all(py, Keys::one(key), vec![target], false, only)
    }

    /// Reads objects into buffers: bytes read or a negative code per key.
    fn batch_get_into(
        &self,
        py: Python<'_>,
        keys: Keys,
        buffer_ptrs: Words,
        sizes: Words,
    ) -> PyResult<Py<PyAny>> {
        if keys.len() != buffer_ptrs.0.len() || keys.len() != sizes.0.len() {
            return each(py, vec![i64::from(INVALID_PARAMS); keys.len()]);
        }
        let pairs = buffer_ptrs.0.iter().zip(&sizes.0);
        let targets: Vec<Result<Gathered, i32>> =
            pairs.map(|(a, n)| self.slice(*a, *n, true)).collect();
        self.get_all(py, keys, targets, false, each)
    }

    /// Scatters each object over several buffers, whose sizes add up to the object's: bytes read or a negative code per
    /// key.
    #[pyo3(signature = (keys, all_buffer_ptrs, all_sizes, prefer_alloc_in_same_node=false))]
    fn batch_get_into_multi_buffers(
        &self,
        py: Python<'_>,
        keys: Keys,
        all_buffer_ptrs: WordLists,
        all_sizes: WordLists,
        prefer_alloc_in_same_node: bool,
    ) -> PyResult<Py<PyAny>> {
        let _ = prefer_alloc_in_same_node;
        if keys.len() != all_buffer_ptrs.0.len() || keys.len() != all_sizes.0.len() {
            return each(py, vec![i64::from(INVALID_PARAMS); keys.len()]);
        }
        let pairs = all_buffer_ptrs.0.iter().zip(&all_sizes.0);
        let targets: Vec<Result<Gathered, i32>> =
            pairs.map(|(a, n)| self.gather(&a.0, &n.0, true)).collect();
        self.get_all(py, keys, targets, true, each)
    }
}
