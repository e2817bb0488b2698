//! Reading: into the caller's memory, or into memory of Python's that is allocated once the sizes are known.

use mooncake::engine::batch::LocalSlice;
use mooncake::store::client::{GetRequest, PoolClient};
use mooncake::store::model::error::StoreError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::{INVALID_PARAMS, Store, ready};
use crate::args::{Key, Keys, Word, WordLists, Words, code};
use crate::buffers::BufferHandle;
use crate::staging::{self, Gathered};

pub(super) const TRANSFER_FAIL: i64 = -800;
/// How often a read into fresh memory is repeated when the object is replaced by one of another size meanwhile.
const ATTEMPTS: usize = 4;

fn read_code(outcome: Result<u64, StoreError>) -> i64 {
    outcome.map_or_else(
        |error| {
            tracing::debug!(%error, "get");
            i64::from(code(&error))
        },
        |read| read as i64,
    )
}

/// A bytes object whose content is still to be written, and where that goes.
fn fresh_bytes(py: Python<'_>, length: usize) -> PyResult<(Py<PyBytes>, LocalSlice)> {
    // SAFETY: makes an object of this length, not yet seen by anybody; writing to it until it is handed out is the
    // documented use of a null source.
    unsafe {
        let length_there = ffi::Py_ssize_t::try_from(length)?;
        let object = ffi::PyBytes_FromStringAndSize(std::ptr::null(), length_there);
        let object: Bound<'_, PyBytes> =
            Bound::from_owned_ptr_or_err(py, object)?.cast_into_unchecked();
        let pointer = ffi::PyBytes_AsString(object.as_ptr()).cast::<u8>();
        Ok((object.unbind(), LocalSlice::new(pointer, length)))
    }
}

/// Memory for an object that is being read.
enum Fresh {
    /// To become Python's with the answer.
    Small(Vec<u8>),
    /// Python's already: it is not copied again.
    Object(Py<PyBytes>),
}

impl Fresh {
    fn into_bytes(self, py: Python<'_>) -> Py<PyBytes> {
        match self {
            Self::Small(bytes) => PyBytes::new(py, &bytes).unbind(),
            Self::Object(object) => object,
        }
    }
}

/// Memory for objects of these sizes. Up to `small` bytes it is not Python's, so that the interpreter lock is not needed.
fn allocate(sizes: &[u64], small: u64) -> Vec<Option<(Fresh, LocalSlice)>> {
    let own = |size: u64| {
        let mut bytes = vec![0; size as usize];
        // SAFETY: a vector's memory does not move with it; it is not touched before the read has ended.
        let slice = unsafe { LocalSlice::new(bytes.as_mut_ptr(), bytes.len()) };
        Some((Fresh::Small(bytes), slice))
    };
    if sizes.iter().all(|s| *s <= small) {
        return sizes.iter().map(|s| own(*s)).collect();
    }
    let pythons = |py: Python<'_>, size: u64| {
        let (object, slice) = fresh_bytes(py, usize::try_from(size).ok()?).ok()?;
        Some((Fresh::Object(object), slice))
    };
    let allocated =
        Python::try_attach(|py| sizes.iter().map(|s| pythons(py, *s)).collect::<Vec<_>>());
    allocated.unwrap_or_else(|| sizes.iter().map(|_| None).collect())
}

/// The objects' content in new memory; `None` for those that could not be read.
fn read_fresh(client: &PoolClient, keys: &[&[u8]], small: u64) -> Vec<Option<Fresh>> {
    let mut found: Vec<Option<Fresh>> = keys.iter().map(|_| None).collect();
    let mut open: Vec<usize> = (0..keys.len()).collect();
    for _ in 0..ATTEMPTS {
        let wanted: Vec<&[u8]> = open.iter().map(|i| keys[*i]).collect();
        let sized: Vec<(usize, u64)> = open
            .iter()
            .zip(client.sizes(&wanted))
            .filter_map(|(index, size)| Some((*index, size.ok()?)))
            .collect();
        let sizes: Vec<u64> = sized.iter().map(|(_, size)| *size).collect();
        let objects: Vec<(usize, u64, Fresh, LocalSlice)> = sized
            .into_iter()
            .zip(allocate(&sizes, small))
            .filter_map(|((index, size), memory)| {
                let (memory, slice) = memory?;
                Some((index, size, memory, slice))
            })
            .collect();
        let wanted: Vec<&[u8]> = objects.iter().map(|(i, ..)| keys[*i]).collect();
        let targets: Vec<LocalSlice> = objects.iter().map(|(.., slice)| *slice).collect();
        let outcomes = read_into(client, &wanted, &targets);
        open.clear();
        for ((index, size, memory, _), outcome) in objects.into_iter().zip(outcomes) {
            match outcome {
                Ok(read) if read == size => found[index] = Some(memory),
                // Replaced by one of another size in between.
                Ok(_) | Err(StoreError::BufferTooSmall { .. }) => open.push(index),
                Err(error) => tracing::debug!(%error, "get"),
            }
        }
        if open.is_empty() {
            break;
        }
    }
    found
}

fn read_into(
    client: &PoolClient,
    keys: &[&[u8]],
    targets: &[LocalSlice],
) -> Vec<Result<u64, StoreError>> {
    let requests: Vec<GetRequest<'_>> = keys
        .iter()
        .zip(targets)
        .map(|(key, target)| GetRequest {
            key,
            target: std::slice::from_ref(target),
        })
        .collect();
    client.get_into(&requests)
}

/// Gets whose bytes go (in part) to a device.
fn get_into_device(
    client: &PoolClient,
    requests: &[GetRequest<'_>],
    targets: &[&Gathered],
) -> Vec<Result<u64, StoreError>> {
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
    client: &PoolClient,
    keys: &[&[u8]],
    targets: &[Result<Gathered, i32>],
    exact: bool,
) -> Vec<i64> {
    let mut results: Vec<i64> = Vec::with_capacity(keys.len());
    let mut requests = Vec::with_capacity(keys.len());
    for (key, target) in keys.iter().zip(targets) {
        match target {
            Ok(target) => {
                requests.push(GetRequest { key, target });
                results.push(0);
            }
            Err(refused) => results.push(i64::from(*refused)),
        }
    }
    let reached: Vec<&Gathered> = targets.iter().flatten().collect();
    let outcomes = if staging::any_on_device(&reached) {
        get_into_device(client, &requests, &reached)
    } else {
        client.get_into(&requests)
    };
    let accepted = results.iter_mut().zip(targets);
    let accepted = accepted.filter_map(|(r, t)| Some((r, t.as_ref().ok()?)));
    for ((result, target), outcome) in accepted.zip(outcomes) {
        *result = read_code(outcome);
        if exact && *result >= 0 && *result as usize != room(target) {
            *result = TRANSFER_FAIL;
        }
    }
    results
}

fn room(target: &[LocalSlice]) -> usize {
    target.iter().map(LocalSlice::len).sum()
}

/// What is copied on an event loop's own thread rather than handed over: less than the hand-over costs.
const AT_ONCE_MAX: u64 = 64 << 10;

/// Reads that need nothing but a copy of few bytes; `None` when any of them needs more.
fn read_at_once(
    client: &PoolClient,
    keys: &[&[u8]],
    targets: &[Result<Gathered, i32>],
    exact: bool,
) -> Option<Vec<i64>> {
    let targets: Vec<&Gathered> = targets.iter().flatten().collect();
    let total: usize = targets.iter().map(|t| room(t)).sum();
    if targets.len() != keys.len() || total as u64 > AT_ONCE_MAX || staging::any_on_device(&targets)
    {
        return None;
    }
    let pairs = keys.iter().zip(&targets);
    let requests: Vec<GetRequest<'_>> = pairs
        .map(|(key, target)| GetRequest { key, target })
        .collect();
    let read = client.get_all_nearby(&requests)?;
    let code = |(read, target): (u64, &&Gathered)| {
        if exact && read as usize != room(target) {
            TRANSFER_FAIL
        } else {
            read as i64
        }
    };
    Some(read.into_iter().zip(&targets).map(code).collect())
}

/// `b""` for what could not be read.
fn bytes_of(py: Python<'_>, fresh: Option<Fresh>) -> Py<PyBytes> {
    fresh.map_or_else(|| PyBytes::new(py, b"").unbind(), |f| f.into_bytes(py))
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
        if self.apart.is_some()
            && let Some(read) = fresh_at_once(py, &pool.client, &keys.bytes())
        {
            return finish(py, read);
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
        if self.apart.is_some()
            && let Some(read) = read_at_once(&pool.client, &keys.bytes(), &targets, exact)
        {
            return finish(py, read);
        }
        self.run(
            py,
            move || read_all(&pool.client, &keys.bytes(), &targets, exact),
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

/// [`read_at_once`] into new memory.
fn fresh_at_once(py: Python<'_>, client: &PoolClient, keys: &[&[u8]]) -> Option<Vec<Py<PyBytes>>> {
    let mut left = AT_ONCE_MAX;
    let read = |key: &&[u8]| {
        let size = client.remembered_size(key)?;
        left = left.checked_sub(size)?;
        let (object, slice) = fresh_bytes(py, size as usize).ok()?;
        let read = client.get_nearby(key, &[slice])?;
        (read == size).then_some(object)
    };
    keys.iter().map(read).collect()
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
