//! Layer-wise reading and writing: parts of objects under one lease, objects written piece by piece.

use mooncake::engine::batch::LocalSlice;
use mooncake::store::client::{Piece, PoolClient, PutOptions, PutSession, RangesRequest};
use mooncake::store::model::error::StoreError;
use pyo3::prelude::*;

use super::get::TRANSFER_FAIL;
use super::{INVALID_PARAMS, Pool, Store, ready};
use crate::args::{Keys, List, WordLists, Words, code};
use crate::config::ReplicateConfig;
use crate::device::DeviceError;
use crate::staging::{self, Gathered};

const RPC_TIMEOUT: i32 = -901;

/// The caller's memory with the places in the object it belongs to.
struct Scattered {
    memory: Gathered,
    offsets: Vec<u64>,
}

impl Scattered {
    fn pieces(&self, slices: &[LocalSlice]) -> Vec<Piece> {
        let pairs = slices.iter().zip(&self.offsets);
        pairs
            .map(|(target, offset)| Piece {
                offset: *offset,
                target: *target,
            })
            .collect()
    }
}

impl Store {
    fn scattered(
        &self,
        addresses: &[usize],
        sizes: &[usize],
        offsets: &[usize],
        write: bool,
    ) -> Result<Scattered, i32> {
        if offsets.len() != sizes.len() {
            return Err(INVALID_PARAMS);
        }
        Ok(Scattered {
            memory: self.gather(addresses, sizes, write)?,
            offsets: offsets.iter().map(|o| *o as u64).collect(),
        })
    }
}

fn device_failed(error: DeviceError) -> i64 {
    tracing::warn!(%error, "device memory");
    TRANSFER_FAIL
}

fn answer(outcome: Result<u64, StoreError>) -> i64 {
    outcome.map_or_else(|e| i64::from(code(&e)), |read| read as i64)
}

/// Reads the pieces of one object, each with an answer of its own.
fn read_pieces(client: &PoolClient, key: &[u8], scattered: &Scattered) -> Vec<i64> {
    let read = staging::at_once(&[&scattered.memory], true, |slices| {
        let pieces = scattered.pieces(&slices[0]);
        let each = pieces.iter().map(|piece| RangesRequest {
            key,
            pieces: std::slice::from_ref(piece),
            version: None,
        });
        let requests: Vec<RangesRequest<'_>> = each.collect();
        let read = client.get_ranges(&requests);
        read.into_iter().map(answer).collect()
    });
    read.unwrap_or_else(|e| vec![device_failed(e); scattered.offsets.len()])
}

/// Reads pieces of objects of the given versions: bytes read, or a negative code, per object.
fn read_versions(
    client: &PoolClient,
    names: &[&[u8]],
    pieces: &[Result<Scattered, i32>],
    versions: &[Option<u64>],
) -> Vec<i64> {
    let mut answers: Vec<i64> = vec![i64::from(INVALID_PARAMS); names.len()];
    let mut owners: Vec<(usize, u64, &Scattered)> = Vec::with_capacity(names.len());
    for (index, (pieces, version)) in pieces.iter().zip(versions).enumerate() {
        match (pieces, version) {
            (Ok(scattered), Some(version)) => owners.push((index, *version, scattered)),
            (Err(code), _) => answers[index] = i64::from(*code),
            (Ok(_), None) => {}
        }
    }
    let memory: Vec<&Gathered> = owners.iter().map(|(_, _, s)| &s.memory).collect();
    let outcomes = staging::at_once(&memory, true, |slices| {
        let pieces: Vec<Vec<Piece>> = owners
            .iter()
            .zip(slices)
            .map(|((_, _, scattered), slices)| scattered.pieces(slices))
            .collect();
        let each = owners.iter().zip(&pieces);
        let requests: Vec<RangesRequest<'_>> = each
            .map(|((index, version, _), pieces)| RangesRequest {
                key: names[*index],
                pieces,
                version: Some(*version),
            })
            .collect();
        let read = client.get_ranges(&requests);
        read.into_iter().map(answer).collect::<Vec<i64>>()
    });
    let outcomes = outcomes.unwrap_or_else(|e| vec![device_failed(e); owners.len()]);
    for ((index, ..), outcome) in owners.into_iter().zip(outcomes) {
        answers[index] = outcome;
    }
    answers
}

impl Pool {
    fn start_reading(&self, names: &[&[u8]]) -> Vec<i32> {
        let found = self.client.versions(names);
        let mut readers = self.readers.lock();
        let each = names.iter().zip(found).map(|(name, found)| match found {
            Ok((version, _)) => {
                readers.insert((*name).into(), version);
                0
            }
            Err(error) => code(&error),
        });
        each.collect()
    }

    fn start_writing(&self, names: &[&[u8]], sizes: &[usize], options: &PutOptions) -> Vec<i32> {
        let sizes = sizes.iter().map(|n| *n as u64);
        let items: Vec<(&[u8], u64)> = names.iter().copied().zip(sizes).collect();
        let started = self.client.put_sessions(&items, options);
        let mut writers = self.writers.lock();
        let mut replaced = Vec::new();
        let mut codes = Vec::with_capacity(names.len());
        for (name, outcome) in names.iter().zip(started) {
            codes.push(match outcome {
                Ok(session) => {
                    replaced.extend(writers.insert((*name).into(), session));
                    0
                }
                Err(error) => code(&error),
            });
        }
        drop(writers);
        if !replaced.is_empty()
            && let Err(error) = self.client.revoke_sessions(&replaced)
        {
            tracing::debug!(%error, "replaced sessions were not taken back");
        }
        codes
    }

    fn write_pieces(&self, name: &[u8], pieces: &Result<Scattered, i32>) -> i64 {
        let scattered = match pieces {
            Ok(scattered) => scattered,
            Err(code) => return i64::from(*code),
        };
        // Taken out while it is written to: other keys' sessions go on meanwhile.
        let Some(mut session) = self.writers.lock().remove(name) else {
            return i64::from(INVALID_PARAMS);
        };
        let outcome = staging::at_once(&[&scattered.memory], false, |slices| {
            let pieces = scattered.pieces(&slices[0]);
            let bytes: usize = slices[0].iter().map(LocalSlice::len).sum();
            let written = self.client.put_pieces(&mut session, &pieces);
            written.map_or_else(|e| i64::from(code(&e)), |_| bytes as i64)
        });
        self.writers.lock().insert(name.into(), session);
        outcome.unwrap_or_else(device_failed)
    }

    fn end_writing(
        &self,
        names: &[&[u8]],
        end: impl Fn(&PoolClient, PutSession) -> Result<(), StoreError>,
    ) -> Vec<i32> {
        let end_one = |name: &&[u8]| {
            let session = self.writers.lock().remove(*name);
            session.map_or(INVALID_PARAMS, |session| {
                end(&self.client, session).err().as_ref().map_or(0, code)
            })
        };
        names.iter().map(end_one).collect()
    }
}

impl Store {
    /// The pieces of each key, unless the lists are of different lengths.
    fn scattered_each(
        &self,
        count: usize,
        addresses: &WordLists,
        sizes: &WordLists,
        offsets: &WordLists,
        write: bool,
    ) -> Result<Vec<Result<Scattered, i32>>, i32> {
        let same = [addresses.0.len(), sizes.0.len(), offsets.0.len()];
        if same.iter().any(|n| *n != count) {
            return Err(INVALID_PARAMS);
        }
        let triples = addresses.0.iter().zip(&sizes.0).zip(&offsets.0);
        Ok(triples
            .map(|((a, n), o)| self.scattered(&a.0, &n.0, &o.0, write))
            .collect())
    }

    /// An answer per key.
    fn per_key<T>(
        &self,
        py: Python<'_>,
        keys: Keys,
        run: impl FnOnce(&Pool, &[&[u8]]) -> Vec<T> + Send + 'static,
    ) -> PyResult<Py<PyAny>>
    where
        T: From<i32> + Clone + Send + 'static,
        for<'py> Vec<T>: IntoPyObject<'py>,
    {
        let count = keys.len();
        let pool = match self.pool() {
            Ok(pool) => pool,
            Err(code) => return ready(py, vec![T::from(code); count]),
        };
        self.run(
            py,
            move || run(&pool, &keys.bytes()),
            move |error| vec![T::from(code(&error)); count],
            ready,
        )
    }
}

#[pymethods]
impl Store {
    /// Reads pieces of objects into buffers: for each buffer, each of its keys and each range of that key the number of
    /// bytes read or a negative code. Offsets count from the start of the buffer and of the object.
    fn get_into_ranges(
        &self,
        py: Python<'_>,
        buffer_ptrs: Words,
        all_keys: List<Keys>,
        all_dst_offsets: List<WordLists>,
        all_src_offsets: List<WordLists>,
        all_sizes: List<WordLists>,
    ) -> PyResult<Py<PyAny>> {
        let buffers = buffer_ptrs.0.len();
        let (all_keys, all_sizes) = (all_keys.0, all_sizes.0);
        let (all_dst_offsets, all_src_offsets) = (all_dst_offsets.0, all_src_offsets.0);
        let same = [
            all_keys.len(),
            all_dst_offsets.len(),
            all_src_offsets.len(),
            all_sizes.len(),
        ];
        let pool = match self.pool() {
            Ok(pool) if same.iter().all(|n| *n == buffers) => pool,
            _ => {
                let of_key = |s: &Words| vec![i64::from(INVALID_PARAMS); s.0.len()];
                let of_buffer = |s: &WordLists| s.0.iter().map(of_key).collect();
                let refused: Vec<Vec<Vec<i64>>> = all_sizes.iter().map(of_buffer).collect();
                return ready(py, refused);
            }
        };
        // Per buffer and key: the key's place in its list, and its pieces.
        let mut wanted: Vec<Vec<Option<Scattered>>> = Vec::with_capacity(buffers);
        let mut answers: Vec<Vec<Vec<i64>>> = Vec::with_capacity(buffers);
        for (index, keys) in all_keys.iter().enumerate() {
            let base = buffer_ptrs.0[index];
            let (to, from) = (&all_dst_offsets[index].0, &all_src_offsets[index].0);
            let sizes = &all_sizes[index].0;
            let (mut pieces, mut codes) = (Vec::new(), Vec::new());
            for at in 0..keys.len() {
                let (Some(to), Some(from), Some(sizes)) = (to.get(at), from.get(at), sizes.get(at))
                else {
                    pieces.push(None);
                    codes.push(vec![i64::from(INVALID_PARAMS)]);
                    continue;
                };
                if to.0.len() != sizes.0.len() || from.0.len() != sizes.0.len() {
                    // Upstream's answer has a code for each range there might be.
                    let ranges = to.0.len().max(from.0.len()).max(sizes.0.len());
                    pieces.push(None);
                    codes.push(vec![i64::from(INVALID_PARAMS); ranges]);
                    continue;
                }
                let addresses: Vec<usize> = to.0.iter().map(|o| base.saturating_add(*o)).collect();
                let scattered = self.scattered(&addresses, &sizes.0, &from.0, true);
                let code = scattered.as_ref().err().copied().unwrap_or(RPC_TIMEOUT);
                codes.push(vec![i64::from(code); sizes.0.len()]);
                pieces.push(scattered.ok());
            }
            wanted.push(pieces);
            answers.push(codes);
        }
        let in_vain = answers.clone();
        self.run(
            py,
            move || {
                for ((keys, wanted), answers) in all_keys.iter().zip(&wanted).zip(&mut answers) {
                    let each = keys.bytes().into_iter().zip(wanted).zip(answers);
                    for ((key, scattered), answer) in each {
                        if let Some(scattered) = scattered {
                            *answer = read_pieces(&pool.client, key, scattered);
                        }
                    }
                }
                answers
            },
            move |_| in_vain,
            ready,
        )
    }

    /// Begins to read objects in pieces: 0, or a negative code, per key.
    fn batch_get_session_start(&self, py: Python<'_>, keys: Keys) -> PyResult<Py<PyAny>> {
        self.per_key(py, keys, |pool, names| pool.start_reading(names))
    }

    /// Reads pieces of objects of a session: bytes read, or a negative code, per key.
    fn batch_get_into_multi_buffer_ranges(
        &self,
        py: Python<'_>,
        keys: Keys,
        all_buffer_ptrs: WordLists,
        all_sizes: WordLists,
        all_src_offsets: WordLists,
    ) -> PyResult<Py<PyAny>> {
        let count = keys.len();
        let (to, from) = (&all_buffer_ptrs, &all_src_offsets);
        let pieces = match self.scattered_each(count, to, &all_sizes, from, true) {
            Ok(pieces) => pieces,
            Err(code) => return ready(py, vec![i64::from(code); count]),
        };
        self.per_key(py, keys, move |pool, names| {
            let readers = pool.readers.lock();
            let versions: Vec<Option<u64>> =
                names.iter().map(|n| readers.get(*n).copied()).collect();
            drop(readers);
            read_versions(&pool.client, names, &pieces, &versions)
        })
    }

    /// Ends sessions; a key without one is passed over. 0, or -600.
    fn batch_get_session_end(&self, keys: Keys) -> i32 {
        let Ok(pool) = self.pool() else {
            return INVALID_PARAMS;
        };
        let mut readers = pool.readers.lock();
        for name in keys.bytes() {
            readers.remove(name);
        }
        0
    }

    /// Takes places for objects of the given sizes: 0 (also for a key that is there already, whose pieces are then
    /// dropped), or a negative code, per key.
    #[pyo3(signature = (keys, sizes, config=None))]
    fn batch_put_session_start(
        &self,
        py: Python<'_>,
        keys: Keys,
        sizes: Words,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> PyResult<Py<PyAny>> {
        if sizes.0.len() != keys.len() {
            return ready(py, vec![INVALID_PARAMS; keys.len()]);
        }
        let options = config.map_or_else(PutOptions::default, |c| c.options(false));
        self.per_key(py, keys, move |pool, names| {
            pool.start_writing(names, &sizes.0, &options)
        })
    }

    /// Writes pieces of objects of a session: bytes written, or a negative code, per key.
    fn batch_put_from_multi_buffer_ranges(
        &self,
        py: Python<'_>,
        keys: Keys,
        all_buffer_ptrs: WordLists,
        all_sizes: WordLists,
        all_dst_offsets: WordLists,
    ) -> PyResult<Py<PyAny>> {
        let count = keys.len();
        let (from, to) = (&all_buffer_ptrs, &all_dst_offsets);
        let pieces = match self.scattered_each(count, from, &all_sizes, to, false) {
            Ok(pieces) => pieces,
            Err(code) => return ready(py, vec![i64::from(code); count]),
        };
        self.per_key(py, keys, move |pool, names| {
            let each = names.iter().zip(&pieces);
            each.map(|(name, pieces)| pool.write_pieces(name, pieces))
                .collect::<Vec<i64>>()
        })
    }

    /// Publishes the objects of sessions: 0, or a negative code, per key.
    fn batch_put_session_end(&self, py: Python<'_>, keys: Keys) -> PyResult<Py<PyAny>> {
        self.per_key(py, keys, |pool, names| {
            pool.end_writing(names, |client, session| {
                client
                    .end_sessions(vec![session])
                    .pop()
                    .map_or(Ok(()), |r| r.map(|_| ()))
            })
        })
    }

    /// Gives the places of sessions back: 0, or a negative code, per key.
    fn batch_put_session_revoke(&self, py: Python<'_>, keys: Keys) -> PyResult<Py<PyAny>> {
        self.per_key(py, keys, |pool, names| {
            pool.end_writing(names, |client, session| client.revoke_sessions(&[session]))
        })
    }
}
