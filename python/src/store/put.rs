//! Writing: every call is one batch of the library. Existing keys count as success, as upstream.

use mooncake::engine::batch::LocalSlice;
use mooncake::store::client::{PoolClient, PutOptions, PutOutcome, PutRequest};
use mooncake::store::model::error::StoreError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::{INVALID_PARAMS, Store};
use crate::args::{Key, Keys, Value, Values, Word, WordLists, Words, code};
use crate::config::ReplicateConfig;
use crate::device::Device;
use crate::staging::{self, Gathered, Slices};

fn options(config: Option<&ReplicateConfig>, upsert: bool) -> PutOptions {
    config.map_or_else(
        || PutOptions {
            upsert,
            ..PutOptions::default()
        },
        |c| c.options(upsert),
    )
}

fn value_slice(value: &Value) -> LocalSlice {
    // SAFETY: the export keeps the memory alive for as long as `value`, which outlives the put.
    unsafe { LocalSlice::new(value.pointer, value.length) }
}

/// Puts whose bytes lie (in part) on a device.
fn put_from_device(
    client: &PoolClient,
    device: Device,
    requests: &[PutRequest<'_>],
    sources: &[&Gathered],
    options: &PutOptions,
) -> Vec<Result<PutOutcome, StoreError>> {
    let mut outcomes = Vec::with_capacity(requests.len());
    staging::download(device, sources, |window, slices| match slices {
        Ok(slices) => {
            let staged: Vec<PutRequest<'_>> = window
                .zip(slices)
                .map(|(at, source)| PutRequest {
                    key: requests[at].key,
                    source,
                    group: requests[at].group,
                })
                .collect();
            outcomes.extend(client.put(&staged, options));
        }
        Err(error) => {
            tracing::warn!(%error, "device memory was not read");
            outcomes.extend(window.map(|_| {
                Err(StoreError::TransferFailed {
                    attempts: error.to_string(),
                })
            }));
        }
    });
    outcomes
}

impl Store {
    /// One code per key. `sources` may hold refusals, which are passed on.
    fn put_all(
        &self,
        py: Python<'_>,
        keys: &[&[u8]],
        sources: &[Result<Gathered, i32>],
        config: Option<&ReplicateConfig>,
        upsert: bool,
    ) -> Vec<i32> {
        let pool = match self.pool() {
            Ok(pool) => pool,
            Err(code) => return vec![code; keys.len()],
        };
        let options = options(config, upsert);
        let groups = config.and_then(|c| c.group_ids.as_ref());
        let mut codes: Vec<i32> = Vec::with_capacity(keys.len());
        let mut requests = Vec::with_capacity(keys.len());
        for (index, (key, source)) in keys.iter().zip(sources).enumerate() {
            match source {
                Ok(source) => {
                    let mut request = PutRequest::new(key, source);
                    request.group = groups.and_then(|g| g.get(index)).map_or("", String::as_str);
                    requests.push(request);
                    codes.push(0);
                }
                Err(refused) => codes.push(*refused),
            }
        }
        let accepted: Vec<&Gathered> = sources.iter().flatten().collect();
        let outcomes = py.detach(|| match staging::device_of(accepted.iter().copied()) {
            None => pool.client.put(&requests, &options),
            Some(device) => put_from_device(&pool.client, device, &requests, &accepted, &options),
        });
        let accepted = codes.iter_mut().zip(sources).filter(|(_, s)| s.is_ok());
        for ((code_of, _), outcome) in accepted.zip(outcomes) {
            *code_of = match outcome {
                Ok(_) | Err(StoreError::Exists) => 0,
                Err(error) => {
                    tracing::debug!(%error, "put");
                    code(&error)
                }
            };
        }
        codes
    }

    fn put_one(
        &self,
        py: Python<'_>,
        key: &Key<'_>,
        source: Result<Gathered, i32>,
        config: Option<&ReplicateConfig>,
        upsert: bool,
    ) -> i32 {
        self.put_all(py, &[key.bytes()], &[source], config, upsert)
            .pop()
            .unwrap_or(INVALID_PARAMS)
    }

    fn put_values(
        &self,
        py: Python<'_>,
        keys: &Keys<'_>,
        values: &Values,
        config: Option<&ReplicateConfig>,
        upsert: bool,
    ) -> i32 {
        if keys.len() != values.0.len() {
            return INVALID_PARAMS;
        }
        let sources: Vec<Result<Gathered, i32>> = values
            .0
            .iter()
            .map(|v| Ok(Gathered::host([value_slice(v)].into_iter().collect())))
            .collect();
        let codes = self.put_all(py, &keys.bytes(), &sources, config, upsert);
        codes.into_iter().find(|c| *c != 0).unwrap_or(0)
    }

    fn put_value_parts(
        &self,
        py: Python<'_>,
        key: &Key<'_>,
        parts: &Bound<'_, PyTuple>,
        config: Option<&ReplicateConfig>,
        upsert: bool,
    ) -> PyResult<i32> {
        let parts: Vec<Value> = parts.iter().map(|p| p.extract()).collect::<PyResult<_>>()?;
        let source: Slices = parts
            .iter()
            .filter(|p| p.length > 0)
            .map(value_slice)
            .collect();
        if source.is_empty() {
            tracing::warn!("put_parts: nothing to store");
            return Ok(if self.pool().is_ok() {
                0
            } else {
                INVALID_PARAMS
            });
        }
        Ok(self.put_one(py, key, Ok(Gathered::host(source)), config, upsert))
    }

    fn put_buffers(
        &self,
        py: Python<'_>,
        keys: &Keys<'_>,
        addresses: &[usize],
        sizes: &[usize],
        config: Option<&ReplicateConfig>,
        upsert: bool,
    ) -> Vec<i32> {
        if keys.len() != addresses.len() || keys.len() != sizes.len() {
            return vec![INVALID_PARAMS; keys.len()];
        }
        let pairs = addresses.iter().zip(sizes);
        let sources: Vec<Result<Gathered, i32>> =
            pairs.map(|(a, n)| self.slice(*a, *n, false)).collect();
        self.put_all(py, &keys.bytes(), &sources, config, upsert)
    }
}

#[pymethods]
impl Store {
    /// Stores a bytes-like value: 0 (also when the key is there already, which keeps its value) or a negative code.
    #[pyo3(signature = (key, value, config=None))]
    fn put(
        &self,
        py: Python<'_>,
        key: Key<'_>,
        value: Value,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> i32 {
        let source = Gathered::host([value_slice(&value)].into_iter().collect());
        self.put_one(py, &key, Ok(source), config.as_deref(), false)
    }

    /// Stores the concatenation of bytes-like parts.
    #[pyo3(signature = (key, *parts, config=None))]
    fn put_parts(
        &self,
        py: Python<'_>,
        key: Key<'_>,
        parts: &Bound<'_, PyTuple>,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> PyResult<i32> {
        self.put_value_parts(py, &key, parts, config.as_deref(), false)
    }

    /// Stores values under keys: 0 or the first negative code.
    #[pyo3(signature = (keys, values, config=None))]
    fn put_batch(
        &self,
        py: Python<'_>,
        keys: Keys<'_>,
        values: Values,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> i32 {
        self.put_values(py, &keys, &values, config.as_deref(), false)
    }

    /// Stores `size` bytes at an address.
    #[pyo3(signature = (key, buffer_ptr, size, config=None))]
    fn put_from(
        &self,
        py: Python<'_>,
        key: Key<'_>,
        buffer_ptr: Word,
        size: Word,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> i32 {
        let source = self.slice(buffer_ptr.0, size.0, false);
        self.put_one(py, &key, source, config.as_deref(), false)
    }

    /// Stores metadata and payload from two addresses as one object, metadata first.
    #[pyo3(signature = (key, buffer_ptr, metadata_buffer_ptr, size, metadata_size, config=None))]
    #[expect(clippy::too_many_arguments, reason = "upstream's signature")]
    fn put_from_with_metadata(
        &self,
        py: Python<'_>,
        key: Key<'_>,
        buffer_ptr: Word,
        metadata_buffer_ptr: Word,
        size: Word,
        metadata_size: Word,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> i32 {
        let addresses = [metadata_buffer_ptr.0, buffer_ptr.0];
        let source = self.gather(&addresses, &[metadata_size.0, size.0], false);
        self.put_one(py, &key, source, config.as_deref(), false)
    }

    /// Stores buffers under keys: a code per key.
    #[pyo3(signature = (keys, buffer_ptrs, sizes, config=None))]
    fn batch_put_from(
        &self,
        py: Python<'_>,
        keys: Keys<'_>,
        buffer_ptrs: Words,
        sizes: Words,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> Vec<i32> {
        self.put_buffers(
            py,
            &keys,
            &buffer_ptrs.0,
            &sizes.0,
            config.as_deref(),
            false,
        )
    }

    /// Stores objects gathered from several buffers each: a code per key.
    #[pyo3(signature = (keys, all_buffer_ptrs, all_sizes, config=None))]
    fn batch_put_from_multi_buffers(
        &self,
        py: Python<'_>,
        keys: Keys<'_>,
        all_buffer_ptrs: WordLists,
        all_sizes: WordLists,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> Vec<i32> {
        if keys.len() != all_buffer_ptrs.0.len() || keys.len() != all_sizes.0.len() {
            return vec![INVALID_PARAMS; keys.len()];
        }
        let pairs = all_buffer_ptrs.0.iter().zip(&all_sizes.0);
        let sources: Vec<Result<Gathered, i32>> =
            pairs.map(|(a, n)| self.gather(&a.0, &n.0, false)).collect();
        self.put_all(py, &keys.bytes(), &sources, config.as_deref(), false)
    }

    /// Like `put`, and replaces an existing object.
    #[pyo3(signature = (key, value, config=None))]
    fn upsert(
        &self,
        py: Python<'_>,
        key: Key<'_>,
        value: Value,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> i32 {
        let source = Gathered::host([value_slice(&value)].into_iter().collect());
        self.put_one(py, &key, Ok(source), config.as_deref(), true)
    }

    /// Like `put_parts`, and replaces an existing object.
    #[pyo3(signature = (key, *parts, config=None))]
    fn upsert_parts(
        &self,
        py: Python<'_>,
        key: Key<'_>,
        parts: &Bound<'_, PyTuple>,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> PyResult<i32> {
        self.put_value_parts(py, &key, parts, config.as_deref(), true)
    }

    /// Like `put_batch`, and replaces existing objects.
    #[pyo3(signature = (keys, values, config=None))]
    fn upsert_batch(
        &self,
        py: Python<'_>,
        keys: Keys<'_>,
        values: Values,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> i32 {
        self.put_values(py, &keys, &values, config.as_deref(), true)
    }

    /// Like `put_from`, and replaces an existing object.
    #[pyo3(signature = (key, buffer_ptr, size, config=None))]
    fn upsert_from(
        &self,
        py: Python<'_>,
        key: Key<'_>,
        buffer_ptr: Word,
        size: Word,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> i32 {
        let source = self.slice(buffer_ptr.0, size.0, false);
        self.put_one(py, &key, source, config.as_deref(), true)
    }

    /// Like `batch_put_from`, and replaces existing objects.
    #[pyo3(signature = (keys, buffer_ptrs, sizes, config=None))]
    fn batch_upsert_from(
        &self,
        py: Python<'_>,
        keys: Keys<'_>,
        buffer_ptrs: Words,
        sizes: Words,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> Vec<i32> {
        self.put_buffers(py, &keys, &buffer_ptrs.0, &sizes.0, config.as_deref(), true)
    }

    /// Vouches for memory that later calls name by address: 0, or -600 when it overlaps a registered buffer or is not
    /// memory of this process.
    fn register_buffer(&self, buffer_ptr: Word, size: Word) -> i32 {
        if self.pool().is_ok() && self.buffers.add(buffer_ptr.0, size.0) {
            0
        } else {
            INVALID_PARAMS
        }
    }

    /// Takes `register_buffer` back: 0, or -600 for an address that is not registered. The memory is not touched.
    fn unregister_buffer(&self, buffer_ptr: Word) -> i32 {
        if self.buffers.remove(buffer_ptr.0) {
            0
        } else {
            INVALID_PARAMS
        }
    }

    /// Address of memory that lives as long as this store; 0 when there is none.
    fn alloc_from_mem_pool(&self, size: Word) -> usize {
        self.memory.allocate(size.0).unwrap_or(0)
    }
}
