//! Reading: into the caller's memory, or into memory of Python's that is allocated once the sizes are known.

use mooncake::engine::batch::LocalSlice;
use mooncake::store::client::{GetRequest, PoolClient};
use mooncake::store::model::error::StoreError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::{INVALID_PARAMS, Store};
use crate::args::{Key, Keys, Word, WordLists, Words, code};
use crate::buffers::BufferHandle;
use crate::device::Device;
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
fn fresh_bytes(py: Python<'_>, length: u64) -> PyResult<(Bound<'_, PyBytes>, LocalSlice)> {
    let length = usize::try_from(length)?;
    // SAFETY: makes an object of this length, not yet seen by anybody; writing to it until it is handed out is the
    // documented use of a null source.
    unsafe {
        let object = ffi::PyBytes_FromStringAndSize(std::ptr::null(), length as ffi::Py_ssize_t);
        let object: Bound<'_, PyBytes> =
            Bound::from_owned_ptr_or_err(py, object)?.cast_into_unchecked();
        let pointer = ffi::PyBytes_AsString(object.as_ptr()).cast::<u8>();
        Ok((object, LocalSlice::new(pointer, length)))
    }
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
    device: Device,
    requests: &[GetRequest<'_>],
    targets: &[&Gathered],
) -> Vec<Result<u64, StoreError>> {
    let failed = |reason: String| StoreError::TransferFailed { attempts: reason };
    let mut outcomes: Vec<Result<u64, StoreError>> = requests
        .iter()
        .map(|_| Err(failed("no staging buffer".to_owned())))
        .collect();
    let lost = staging::upload(device, targets, |window, slices| {
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

impl Store {
    /// New bytes objects with the objects' content; `None` for those that could not be read.
    fn get_fresh<'py>(
        &self,
        py: Python<'py>,
        keys: &[&[u8]],
    ) -> PyResult<Vec<Option<Bound<'py, PyBytes>>>> {
        let mut found: Vec<Option<Bound<'py, PyBytes>>> = keys.iter().map(|_| None).collect();
        let Ok(pool) = self.pool() else {
            return Ok(found);
        };
        let mut open: Vec<usize> = (0..keys.len()).collect();
        for _ in 0..ATTEMPTS {
            let wanted: Vec<&[u8]> = open.iter().map(|i| keys[*i]).collect();
            let sizes = py.detach(|| pool.client.sizes(&wanted));
            let mut objects = Vec::new();
            for (index, size) in open.iter().zip(sizes) {
                if let Ok(size) = size {
                    let (object, slice) = fresh_bytes(py, size)?;
                    objects.push((*index, size, object, slice));
                }
            }
            let wanted: Vec<&[u8]> = objects.iter().map(|(i, ..)| keys[*i]).collect();
            let targets: Vec<LocalSlice> = objects.iter().map(|(.., slice)| *slice).collect();
            let outcomes = py.detach(|| read_into(&pool.client, &wanted, &targets));
            open.clear();
            for ((index, size, object, _), outcome) in objects.into_iter().zip(outcomes) {
                match outcome {
                    Ok(read) if read == size => found[index] = Some(object),
                    // Replaced by one of another size in between.
                    Ok(_) | Err(StoreError::BufferTooSmall { .. }) => open.push(index),
                    Err(error) => tracing::debug!(%error, "get"),
                }
            }
            if open.is_empty() {
                break;
            }
        }
        Ok(found)
    }

    /// Bytes read per key; `exact` refuses objects smaller than their buffers.
    fn get_all(
        &self,
        py: Python<'_>,
        keys: &[&[u8]],
        targets: &[Result<Gathered, i32>],
        exact: bool,
    ) -> Vec<i64> {
        let pool = match self.pool() {
            Ok(pool) => pool,
            Err(code) => return vec![i64::from(code); keys.len()],
        };
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
        let outcomes = py.detach(|| match staging::device_of(reached.iter().copied()) {
            None => pool.client.get_into(&requests),
            Some(device) => get_into_device(&pool.client, device, &requests, &reached),
        });
        let accepted = results.iter_mut().zip(targets);
        let accepted = accepted.filter_map(|(r, t)| Some((r, t.as_ref().ok()?)));
        for ((result, target), outcome) in accepted.zip(outcomes) {
            *result = read_code(outcome);
            let room: usize = target.iter().map(LocalSlice::len).sum();
            if exact && *result >= 0 && *result as usize != room {
                *result = TRANSFER_FAIL;
            }
        }
        results
    }

    fn handles(&self, py: Python<'_>, keys: &[&[u8]]) -> PyResult<Vec<Option<Py<BufferHandle>>>> {
        let Ok(pool) = self.pool() else {
            return Ok(keys.iter().map(|_| None).collect());
        };
        let read = py.detach(|| pool.client.get_batch(keys));
        let handle = |bytes| Py::new(py, BufferHandle::new(bytes));
        read.into_iter()
            .map(|r| r.ok().map(handle).transpose())
            .collect()
    }
}

#[pymethods]
impl Store {
    /// The object's bytes; `b""` when it is missing or could not be read.
    fn get<'py>(&self, py: Python<'py>, key: Key<'_>) -> PyResult<Bound<'py, PyBytes>> {
        let mut found = self.get_fresh(py, &[key.bytes()])?;
        Ok(found
            .pop()
            .flatten()
            .unwrap_or_else(|| PyBytes::new(py, b"")))
    }

    /// Bytes per key; `b""` for those that are missing.
    fn get_batch<'py>(
        &self,
        py: Python<'py>,
        keys: Keys<'_>,
    ) -> PyResult<Vec<Bound<'py, PyBytes>>> {
        let found = self.get_fresh(py, &keys.bytes())?.into_iter();
        Ok(found
            .map(|f| f.unwrap_or_else(|| PyBytes::new(py, b"")))
            .collect())
    }

    /// The object in a buffer of its own, or `None`.
    fn get_buffer(&self, py: Python<'_>, key: Key<'_>) -> PyResult<Option<Py<BufferHandle>>> {
        Ok(self.handles(py, &[key.bytes()])?.pop().flatten())
    }

    /// A buffer or `None` per key.
    fn batch_get_buffer(
        &self,
        py: Python<'_>,
        keys: Keys<'_>,
    ) -> PyResult<Vec<Option<Py<BufferHandle>>>> {
        self.handles(py, &keys.bytes())
    }

    /// Reads into `size` bytes at an address: bytes read, or a negative code.
    fn get_into(&self, py: Python<'_>, key: Key<'_>, buffer_ptr: Word, size: Word) -> i64 {
        let target = self.slice(buffer_ptr.0, size.0, true);
        let results = self.get_all(py, &[key.bytes()], &[target], false);
        results
            .first()
            .copied()
            .unwrap_or(i64::from(INVALID_PARAMS))
    }

    /// Reads objects into buffers: bytes read or a negative code per key.
    fn batch_get_into(
        &self,
        py: Python<'_>,
        keys: Keys<'_>,
        buffer_ptrs: Words,
        sizes: Words,
    ) -> Vec<i64> {
        if keys.len() != buffer_ptrs.0.len() || keys.len() != sizes.0.len() {
            return vec![i64::from(INVALID_PARAMS); keys.len()];
        }
        let pairs = buffer_ptrs.0.iter().zip(&sizes.0);
        let targets: Vec<Result<Gathered, i32>> =
            pairs.map(|(a, n)| self.slice(*a, *n, true)).collect();
        self.get_all(py, &keys.bytes(), &targets, false)
    }

    /// Scatters each object over several buffers, whose sizes add up to the object's: bytes read or a negative code per
    /// key.
    #[pyo3(signature = (keys, all_buffer_ptrs, all_sizes, prefer_alloc_in_same_node=false))]
    fn batch_get_into_multi_buffers(
        &self,
        py: Python<'_>,
        keys: Keys<'_>,
        all_buffer_ptrs: WordLists,
        all_sizes: WordLists,
        prefer_alloc_in_same_node: bool,
    ) -> Vec<i64> {
        let _ = prefer_alloc_in_same_node;
        if keys.len() != all_buffer_ptrs.0.len() || keys.len() != all_sizes.0.len() {
            return vec![i64::from(INVALID_PARAMS); keys.len()];
        }
        let pairs = all_buffer_ptrs.0.iter().zip(&all_sizes.0);
        let targets: Vec<Result<Gathered, i32>> =
            pairs.map(|(a, n)| self.gather(&a.0, &n.0, true)).collect();
        self.get_all(py, &keys.bytes(), &targets, true)
    }
}
