//! Reading into new memory of Python's, which is allocated once the sizes are known.

use std::sync::Arc;

use mooncake::engine::batch::LocalSlice;
use mooncake::store::client::{GetRequest, PoolClient};
use mooncake::store::model::error::StoreError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::{AT_ONCE_MAX, Pool};
use crate::args::Keys;
use crate::batches::{Done, Small};
use crate::mailbox::Answer;

/// How often a read into fresh memory is repeated when the object is replaced by one of another size meanwhile.
const ATTEMPTS: usize = 4;

const HUGE_PAGE: usize = 2 << 20;
/// From here on an allocation is a mapping of its own (the largest `M_MMAP_THRESHOLD` that glibc adapts to).
const MAPPED_MIN: usize = 32 << 20;

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

/// An event loop that drops a large object gives back its pages, and is held up for as long as that takes: less for huge ones.
/// Where the kernel must first make room for those, the thread that reads waits for it, and not the loop.
fn advise_huge_pages(address: usize, length: usize) {
    let start = address.next_multiple_of(HUGE_PAGE);
    let end = (address + length) & !(HUGE_PAGE - 1);
    if length >= MAPPED_MIN && start < end {
        // SAFETY: advice on memory just allocated, which changes no contents.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
    }
}

/// Memory for an object that is being read.
pub(super) enum Fresh {
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

/// Memory for objects of these sizes. Up to `small` bytes it is not Python's, so that the interpreter lock is not needed; 0:
/// the caller is no event loop.
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
        if small > 0 {
            advise_huge_pages(slice.as_ptr() as usize, slice.len());
        }
        Some((Fresh::Object(object), slice))
    };
    let allocated =
        Python::try_attach(|py| sizes.iter().map(|s| pythons(py, *s)).collect::<Vec<_>>());
    allocated.unwrap_or_else(|| sizes.iter().map(|_| None).collect())
}

/// The objects' content in new memory; `None` for those that could not be read.
pub(super) fn read_fresh(client: &PoolClient, keys: &[&[u8]], small: u64) -> Vec<Option<Fresh>> {
    read_sized(client, keys, client.sizes(keys), small)
}

/// [`read_fresh`] with the sizes there were a moment ago.
fn read_sized(
    client: &PoolClient,
    keys: &[&[u8]],
    mut sizes: Vec<Result<u64, StoreError>>,
    small: u64,
) -> Vec<Option<Fresh>> {
    let mut found: Vec<Option<Fresh>> = keys.iter().map(|_| None).collect();
    let mut open: Vec<usize> = (0..keys.len()).collect();
    for _ in 0..ATTEMPTS {
        let sized: Vec<(usize, u64)> = open
            .iter()
            .zip(sizes)
            .filter_map(|(index, size)| Some((*index, size.ok()?)))
            .collect();
        let lengths: Vec<u64> = sized.iter().map(|(_, size)| *size).collect();
        let objects: Vec<(usize, u64, Fresh, LocalSlice)> = sized
            .into_iter()
            .zip(allocate(&lengths, small))
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
        let again: Vec<&[u8]> = open.iter().map(|i| keys[*i]).collect();
        sizes = client.sizes(&again);
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

/// `b""` for what could not be read.
pub(super) fn bytes_of(py: Python<'_>, fresh: Option<Fresh>) -> Py<PyBytes> {
    fresh.map_or_else(|| PyBytes::new(py, b"").unbind(), |f| f.into_bytes(py))
}

/// Objects of few bytes that need nothing but a copy; `None` when any of them needs more.
pub(super) fn read_at_once(
    py: Python<'_>,
    client: &PoolClient,
    keys: &[&[u8]],
) -> Option<Vec<Py<PyBytes>>> {
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

/// Whether more than a few bytes are to be read, as far as is remembered. Asks nobody.
pub(super) fn is_known_to_be_large(client: &PoolClient, keys: &[&[u8]]) -> bool {
    let sizes = keys.iter().filter_map(|key| client.remembered_size(key));
    sizes.sum::<u64>() > AT_ONCE_MAX
}

/// How bytes objects become the call's answer.
type Finish = Box<dyn FnOnce(Python<'_>, Vec<Py<PyBytes>>) -> PyResult<Py<PyAny>> + Send>;

/// A get of objects that are small, unless it turns out otherwise.
pub(super) struct SmallGet {
    pool: Arc<Pool>,
    keys: Keys,
    finish: Finish,
}

impl SmallGet {
    pub(super) fn new(pool: Arc<Pool>, keys: Keys, finish: Finish) -> Self {
        Self { pool, keys, finish }
    }

    fn answer(self, found: Vec<Option<Fresh>>) -> Answer {
        Box::new(move |py| {
            let each = found.into_iter().map(|f| bytes_of(py, f));
            (self.finish)(py, each.collect())
        })
    }

    fn alone(self) -> Done {
        Done::Alone(Box::new(move |turn| {
            if let Some(why) = turn.refusal() {
                return self.refused(why);
            }
            let found = read_fresh(&self.pool.client, &self.keys.bytes(), AT_ONCE_MAX);
            self.answer(found)
        }))
    }
}

impl Small for SmallGet {
    fn keys(&self) -> usize {
        self.keys.len()
    }

    fn together(several: Vec<Self>) -> Vec<Done> {
        let keys: Vec<&[u8]> = several.iter().flat_map(|s| s.keys.bytes()).collect();
        let Some(first) = several.first() else {
            return Vec::new();
        };
        let client = &first.pool.client;
        let sizes = client.sizes(&keys);
        let mut left = keys.iter().zip(sizes);
        let mut is_small = Vec::with_capacity(several.len());
        let (mut small_keys, mut small_sizes): (Vec<&[u8]>, Vec<_>) = (Vec::new(), Vec::new());
        for get in &several {
            let each: Vec<(&&[u8], Result<u64, StoreError>)> =
                left.by_ref().take(get.keys.len()).collect();
            let total: u64 = each.iter().filter_map(|(_, size)| size.as_ref().ok()).sum();
            is_small.push(total <= AT_ONCE_MAX);
            if total <= AT_ONCE_MAX {
                for (key, size) in each {
                    small_keys.push(*key);
                    small_sizes.push(size);
                }
            }
        }
        let mut found = read_sized(client, &small_keys, small_sizes, AT_ONCE_MAX).into_iter();
        let each = several.into_iter().zip(is_small);
        let done = each.map(|(get, is_small)| {
            if !is_small {
                return get.alone();
            }
            let found = found.by_ref().take(get.keys.len()).collect();
            Done::Answer(get.answer(found))
        });
        done.collect()
    }

    fn refused(self, _: StoreError) -> Answer {
        let nothing = (0..self.keys.len()).map(|_| None).collect();
        self.answer(nothing)
    }
}
