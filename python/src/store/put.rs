//! Writing: every call is one batch of the library. Existing keys count as success, as upstream.

use mooncake::engine::batch::LocalSlice;
use mooncake::store::client::{PutOptions, PutOutcome, PutRequest};
use mooncake::store::model::error::StoreError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use std::sync::Arc;

use super::{AT_ONCE_MAX, INVALID_PARAMS, Pool, Store, ready};
use crate::args::{Key, Keys, Value, Values, Word, WordLists, Words, code};
use crate::batches::{Done, KEYS_MAX, Small};
use crate::config::ReplicateConfig;
use crate::mailbox::Answer;
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
    pool: &Pool,
    requests: &[PutRequest<'_>],
    sources: &[&Gathered],
    options: &PutOptions,
) -> Vec<Result<PutOutcome, StoreError>> {
    let direct = pool.direct.as_ref();
    if let Some(put) = direct.and_then(|d| d.run(sources, |client| client.put(requests, options))) {
        return put;
    }
    let client = &pool.client;
    let mut outcomes = Vec::with_capacity(requests.len());
    staging::download(sources, |window, slices| match slices {
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

/// What a put was called with; lives until it has ended, and the values with it.
struct Put {
    keys: Keys,
    /// May hold refusals, which are passed on.
    sources: Vec<Result<Gathered, i32>>,
    _values: Vec<Value>,
    options: PutOptions,
    groups: Vec<String>,
}

impl Put {
    /// One code per key.
    fn carry_out(&self, pool: &Pool) -> Vec<i32> {
        put_each(pool, &[self], &self.options)
    }

    /// Whether it is one of those that are carried out together: few bytes of the host, and nothing special asked for.
    fn is_small(&self) -> bool {
        let sources: Vec<&Gathered> = self.sources.iter().flatten().collect();
        let bytes: usize = sources
            .iter()
            .flat_map(|s| s.iter())
            .map(LocalSlice::len)
            .sum();
        self.keys.len() <= KEYS_MAX
            && bytes as u64 <= AT_ONCE_MAX
            && self.groups.is_empty()
            && self.options == PutOptions::default()
            && !staging::any_on_device(&sources)
    }
}

/// Carries out puts with the same options in one go: a code per key, in order.
fn put_each(pool: &Pool, puts: &[&Put], options: &PutOptions) -> Vec<i32> {
    let count = puts.iter().map(|p| p.keys.len()).sum();
    let mut codes: Vec<i32> = Vec::with_capacity(count);
    let mut requests = Vec::with_capacity(count);
    let keys: Vec<Vec<&[u8]>> = puts.iter().map(|p| p.keys.bytes()).collect();
    let sources = puts.iter().flat_map(|p| &p.sources);
    for (put, keys) in puts.iter().zip(&keys) {
        for (index, (key, source)) in keys.iter().zip(&put.sources).enumerate() {
            codes.push(*source.as_ref().err().unwrap_or(&0));
            if let Ok(source) = source {
                let mut request = PutRequest::new(key, source);
                request.group = put.groups.get(index).map_or("", String::as_str);
                requests.push(request);
            }
        }
    }
    let accepted: Vec<&Gathered> = sources.clone().flatten().collect();
    let outcomes = if staging::any_on_device(&accepted) {
        put_from_device(pool, &requests, &accepted, options)
    } else {
        pool.client.put(&requests, options)
    };
    let accepted = codes.iter_mut().zip(sources);
    let accepted = accepted.filter(|(_, source)| source.is_ok());
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

/// A put of few bytes.
pub(super) struct SmallPut {
    pool: Arc<Pool>,
    put: Put,
    finish: Finish,
}

impl Small for SmallPut {
    fn keys(&self) -> usize {
        self.put.keys.len()
    }

    fn together(several: Vec<Self>) -> Vec<Done> {
        let puts: Vec<&Put> = several.iter().map(|s| &s.put).collect();
        let mut codes = match several.first() {
            Some(first) => put_each(&first.pool, &puts, &first.put.options),
            None => Vec::new(),
        }
        .into_iter();
        let mut answers = Vec::with_capacity(several.len());
        for small in several {
            let codes: Vec<i32> = codes.by_ref().take(small.put.keys.len()).collect();
            // The values go back to Python with the answer: releasing them needs the interpreter lock.
            answers.push(Done::Answer(Box::new(move |py| {
                let _values = small.put;
                (small.finish)(py, codes)
            })));
        }
        answers
    }

    fn refused(self, why: StoreError) -> Answer {
        Box::new(move |py| {
            let put = self.put;
            (self.finish)(py, vec![code(&why); put.keys.len()])
        })
    }
}

/// The only code, or the first that is not 0.
fn worst(py: Python<'_>, codes: Vec<i32>) -> PyResult<Py<PyAny>> {
    ready(py, codes.into_iter().find(|c| *c != 0).unwrap_or(0))
}

fn each(py: Python<'_>, codes: Vec<i32>) -> PyResult<Py<PyAny>> {
    ready(py, codes)
}

/// How codes become the call's answer.
type Finish = fn(Python<'_>, Vec<i32>) -> PyResult<Py<PyAny>>;

impl Store {
    fn put_all(
        &self,
        py: Python<'_>,
        keys: Keys,
        sources: Vec<Result<Gathered, i32>>,
        values: Vec<Value>,
        how: (Option<&ReplicateConfig>, bool),
        finish: Finish,
    ) -> PyResult<Py<PyAny>> {
        let count = keys.len();
        let pool = match self.pool() {
            Ok(pool) => pool,
            Err(code) => return finish(py, vec![code; count]),
        };
        let (config, upsert) = how;
        if config.is_some_and(|c| !c.is_valid()) {
            return finish(py, vec![INVALID_PARAMS; count]);
        }
        let put = Put {
            keys,
            sources,
            _values: values,
            options: options(config, upsert),
            groups: config.and_then(|c| c.group_ids.clone()).unwrap_or_default(),
        };
        if let Some(apart) = &self.apart
            && put.is_small()
        {
            let kind = pool.small.puts.clone();
            return Self::run_small(py, apart, &kind, SmallPut { pool, put, finish });
        }
        // The values go back to Python with the answer: releasing them needs the interpreter lock.
        self.run(
            py,
            move || (put.carry_out(&pool), Some(put)),
            move |error| (vec![code(&error); count], None),
            move |py, (codes, _)| finish(py, codes),
        )
    }

    fn put_value(
        &self,
        py: Python<'_>,
        key: Key,
        value: Value,
        how: (Option<&ReplicateConfig>, bool),
    ) -> PyResult<Py<PyAny>> {
        let source = Gathered::host([value_slice(&value)].into_iter().collect());
        let keys = Keys::one(key);
        self.put_all(py, keys, vec![Ok(source)], vec![value], how, worst)
    }

    fn put_values(
        &self,
        py: Python<'_>,
        keys: Keys,
        values: Values,
        how: (Option<&ReplicateConfig>, bool),
    ) -> PyResult<Py<PyAny>> {
        if keys.len() != values.0.len() {
            return ready(py, INVALID_PARAMS);
        }
        let sources: Vec<Result<Gathered, i32>> = values
            .0
            .iter()
            .map(|v| Ok(Gathered::host([value_slice(v)].into_iter().collect())))
            .collect();
        self.put_all(py, keys, sources, values.0, how, worst)
    }

    fn put_value_parts(
        &self,
        py: Python<'_>,
        key: Key,
        parts: &Bound<'_, PyTuple>,
        how: (Option<&ReplicateConfig>, bool),
    ) -> PyResult<Py<PyAny>> {
        let parts: Vec<Value> = parts.iter().map(|p| p.extract()).collect::<PyResult<_>>()?;
        let source: Slices = parts
            .iter()
            .filter(|p| p.length > 0)
            .map(value_slice)
            .collect();
        if source.is_empty() {
            tracing::warn!("put_parts: nothing to store");
            let open = self.pool().is_ok();
            return ready(py, if open { 0 } else { INVALID_PARAMS });
        }
        let source = Gathered::host(source);
        self.put_all(py, Keys::one(key), vec![Ok(source)], parts, how, worst)
    }

    fn put_buffer(
        &self,
        py: Python<'_>,
        key: Key,
        source: Result<Gathered, i32>,
        how: (Option<&ReplicateConfig>, bool),
    ) -> PyResult<Py<PyAny>> {
        self.put_all(py, Keys::one(key), vec![source], Vec::new(), how, worst)
    }

    fn put_buffers(
        &self,
        py: Python<'_>,
        keys: Keys,
        addresses: &[usize],
        sizes: &[usize],
        how: (Option<&ReplicateConfig>, bool),
    ) -> PyResult<Py<PyAny>> {
        if keys.len() != addresses.len() || keys.len() != sizes.len() {
            return ready(py, vec![INVALID_PARAMS; keys.len()]);
        }
        let pairs = addresses.iter().zip(sizes);
        let sources: Vec<Result<Gathered, i32>> =
            pairs.map(|(a, n)| self.slice(*a, *n, false)).collect();
        self.put_all(py, keys, sources, Vec::new(), how, each)
    }
}

#[pymethods]
impl Store {
    /// Stores a bytes-like value: 0 (also when the key is there already, which keeps its value) or a negative code.
    #[pyo3(signature = (key, value, config=None))]
    fn put(
        &self,
        py: Python<'_>,
        key: Key,
        value: Value,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> PyResult<Py<PyAny>> {
        self.put_value(py, key, value, (config.as_deref(), false))
    }

    /// Stores the concatenation of bytes-like parts.
    #[pyo3(signature = (key, *parts, config=None))]
    fn put_parts(
        &self,
        py: Python<'_>,
        key: Key,
        parts: &Bound<'_, PyTuple>,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> PyResult<Py<PyAny>> {
        self.put_value_parts(py, key, parts, (config.as_deref(), false))
    }

    /// Stores values under keys: 0 or the first negative code.
    #[pyo3(signature = (keys, values, config=None))]
    fn put_batch(
        &self,
        py: Python<'_>,
        keys: Keys,
        values: Values,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> PyResult<Py<PyAny>> {
        self.put_values(py, keys, values, (config.as_deref(), false))
    }

    /// Stores `size` bytes at an address.
    #[pyo3(signature = (key, buffer_ptr, size, config=None))]
    fn put_from(
        &self,
        py: Python<'_>,
        key: Key,
        buffer_ptr: Word,
        size: Word,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> PyResult<Py<PyAny>> {
        let source = self.slice(buffer_ptr.0, size.0, false);
        self.put_buffer(py, key, source, (config.as_deref(), false))
    }

    /// Stores metadata and payload from two addresses as one object, metadata first.
    #[pyo3(signature = (key, buffer_ptr, metadata_buffer_ptr, size, metadata_size, config=None))]
    #[expect(clippy::too_many_arguments, reason = "upstream's signature")]
    fn put_from_with_metadata(
        &self,
        py: Python<'_>,
        key: Key,
        buffer_ptr: Word,
        metadata_buffer_ptr: Word,
        size: Word,
        metadata_size: Word,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> PyResult<Py<PyAny>> {
        let addresses = [metadata_buffer_ptr.0, buffer_ptr.0];
        let source = self.gather(&addresses, &[metadata_size.0, size.0], false);
        self.put_buffer(py, key, source, (config.as_deref(), false))
    }

    /// Stores buffers under keys: a code per key.
    #[pyo3(signature = (keys, buffer_ptrs, sizes, config=None))]
    fn batch_put_from(
        &self,
        py: Python<'_>,
        keys: Keys,
        buffer_ptrs: Words,
        sizes: Words,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> PyResult<Py<PyAny>> {
        let how = (config.as_deref(), false);
        self.put_buffers(py, keys, &buffer_ptrs.0, &sizes.0, how)
    }

    /// Stores objects gathered from several buffers each: a code per key.
    #[pyo3(signature = (keys, all_buffer_ptrs, all_sizes, config=None))]
    fn batch_put_from_multi_buffers(
        &self,
        py: Python<'_>,
        keys: Keys,
        all_buffer_ptrs: WordLists,
        all_sizes: WordLists,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> PyResult<Py<PyAny>> {
        if keys.len() != all_buffer_ptrs.0.len() || keys.len() != all_sizes.0.len() {
            return ready(py, vec![INVALID_PARAMS; keys.len()]);
        }
        let pairs = all_buffer_ptrs.0.iter().zip(&all_sizes.0);
        let sources: Vec<Result<Gathered, i32>> =
            pairs.map(|(a, n)| self.gather(&a.0, &n.0, false)).collect();
        let how = (config.as_deref(), false);
        self.put_all(py, keys, sources, Vec::new(), how, each)
    }

    /// Like `put`, and replaces an existing object.
    #[pyo3(signature = (key, value, config=None))]
    fn upsert(
        &self,
        py: Python<'_>,
        key: Key,
        value: Value,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> PyResult<Py<PyAny>> {
        self.put_value(py, key, value, (config.as_deref(), true))
    }

    /// Like `put_parts`, and replaces an existing object.
    #[pyo3(signature = (key, *parts, config=None))]
    fn upsert_parts(
        &self,
        py: Python<'_>,
        key: Key,
        parts: &Bound<'_, PyTuple>,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> PyResult<Py<PyAny>> {
        self.put_value_parts(py, key, parts, (config.as_deref(), true))
    }

    /// Like `put_batch`, and replaces existing objects.
    #[pyo3(signature = (keys, values, config=None))]
    fn upsert_batch(
        &self,
        py: Python<'_>,
        keys: Keys,
        values: Values,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> PyResult<Py<PyAny>> {
        self.put_values(py, keys, values, (config.as_deref(), true))
    }

    /// Like `put_from`, and replaces an existing object.
    #[pyo3(signature = (key, buffer_ptr, size, config=None))]
    fn upsert_from(
        &self,
        py: Python<'_>,
        key: Key,
        buffer_ptr: Word,
        size: Word,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> PyResult<Py<PyAny>> {
        let source = self.slice(buffer_ptr.0, size.0, false);
        self.put_buffer(py, key, source, (config.as_deref(), true))
    }

    /// Like `batch_put_from`, and replaces existing objects.
    #[pyo3(signature = (keys, buffer_ptrs, sizes, config=None))]
    fn batch_upsert_from(
        &self,
        py: Python<'_>,
        keys: Keys,
        buffer_ptrs: Words,
        sizes: Words,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> PyResult<Py<PyAny>> {
        let how = (config.as_deref(), true);
        self.put_buffers(py, keys, &buffer_ptrs.0, &sizes.0, how)
    }
}
