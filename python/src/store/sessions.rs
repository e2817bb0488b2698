//! Layer-wise reading and writing: parts of objects under one lease, objects written piece by piece.

use mooncake::engine::batch::LocalSlice;
use mooncake::store::client::{Piece, PutOptions, RangesRequest};
use mooncake::store::model::error::StoreError;
use pyo3::prelude::*;

use super::get::TRANSFER_FAIL;
use super::{INVALID_PARAMS, Store};
use crate::args::{Keys, WordLists, Words, code};
use crate::config::ReplicateConfig;
use crate::device::DeviceError;
use crate::staging::{self, Gathered};

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

#[pymethods]
impl Store {
    /// Reads pieces of objects into buffers: for each buffer, each of its keys and each range of that key the number of
    /// bytes read or a negative code. Offsets count from the start of the buffer and of the object.
    fn get_into_ranges(
        &self,
        py: Python<'_>,
        buffer_ptrs: Words,
        all_keys: Vec<Keys<'_>>,
        all_dst_offsets: Vec<WordLists>,
        all_src_offsets: Vec<WordLists>,
        all_sizes: Vec<WordLists>,
    ) -> Vec<Vec<Vec<i64>>> {
        let refused = i64::from(INVALID_PARAMS);
        let buffers = buffer_ptrs.0.len();
        let same = [
            all_keys.len(),
            all_dst_offsets.len(),
            all_src_offsets.len(),
            all_sizes.len(),
        ];
        let pool = self.pool();
        if same.iter().any(|n| *n != buffers) || pool.is_err() {
            return all_sizes
                .iter()
                .map(|s| s.0.iter().map(|s| vec![refused; s.0.len()]).collect())
                .collect();
        }
        let Ok(pool) = pool else { return Vec::new() };
        let mut answers = Vec::with_capacity(buffers);
        for (index, keys) in all_keys.iter().enumerate() {
            let base = buffer_ptrs.0[index];
            let (to, from, sizes) = (
                &all_dst_offsets[index].0,
                &all_src_offsets[index].0,
                &all_sizes[index].0,
            );
            let mut per_key = Vec::with_capacity(keys.len());
            for (at, key) in keys.bytes().into_iter().enumerate() {
                let (Some(to), Some(from), Some(sizes)) = (to.get(at), from.get(at), sizes.get(at))
                else {
                    per_key.push(vec![refused]);
                    continue;
                };
                let addresses: Vec<usize> = to.0.iter().map(|o| base.saturating_add(*o)).collect();
                let ranges = match self.scattered(&addresses, &sizes.0, &from.0, true) {
                    Ok(scattered) => py.detach(|| {
                        let read = staging::at_once(&[&scattered.memory], true, |slices| {
                            let pieces = scattered.pieces(&slices[0]);
                            let each = pieces.iter().map(|piece| RangesRequest {
                                key,
                                pieces: std::slice::from_ref(piece),
                                version: None,
                            });
                            let requests: Vec<RangesRequest<'_>> = each.collect();
                            let read = pool.client.get_ranges(&requests);
                            read.into_iter().map(answer).collect()
                        });
                        read.unwrap_or_else(|e| vec![device_failed(e); sizes.0.len()])
                    }),
                    Err(code) => vec![i64::from(code); sizes.0.len()],
                };
                per_key.push(ranges);
            }
            answers.push(per_key);
        }
        answers
    }

    /// Begins to read objects in pieces: 0, or a negative code, per key.
    fn batch_get_session_start(&self, py: Python<'_>, keys: Keys<'_>) -> Vec<i32> {
        let pool = match self.pool() {
            Ok(pool) => pool,
            Err(code) => return vec![code; keys.len()],
        };
        let names = keys.bytes();
        let found = py.detach(|| pool.client.versions(&names));
        let mut readers = pool.readers.lock();
        let each = names.iter().zip(found).map(|(name, found)| match found {
            Ok((version, _)) => {
                readers.insert((*name).into(), version);
                0
            }
            Err(error) => code(&error),
        });
        each.collect()
    }

    /// Reads pieces of objects of a session: bytes read, or a negative code, per key.
    fn batch_get_into_multi_buffer_ranges(
        &self,
        py: Python<'_>,
        keys: Keys<'_>,
        all_buffer_ptrs: WordLists,
        all_sizes: WordLists,
        all_src_offsets: WordLists,
    ) -> Vec<i64> {
        let count = keys.len();
        let same = [
            all_buffer_ptrs.0.len(),
            all_sizes.0.len(),
            all_src_offsets.0.len(),
        ];
        let pool = match self.pool() {
            Ok(pool) if same.iter().all(|n| *n == count) => pool,
            _ => return vec![i64::from(INVALID_PARAMS); count],
        };
        let names = keys.bytes();
        let pieces: Vec<Result<Scattered, i32>> = (0..count)
            .map(|i| {
                self.scattered(
                    &all_buffer_ptrs.0[i].0,
                    &all_sizes.0[i].0,
                    &all_src_offsets.0[i].0,
                    true,
                )
            })
            .collect();
        let readers = pool.readers.lock();
        let versions: Vec<Option<u64>> = names.iter().map(|n| readers.get(*n).copied()).collect();
        drop(readers);
        let mut answers: Vec<i64> = vec![i64::from(INVALID_PARAMS); count];
        let mut owners: Vec<(usize, u64, &Scattered)> = Vec::with_capacity(count);
        for index in 0..count {
            match (&pieces[index], versions[index]) {
                (Ok(scattered), Some(version)) => owners.push((index, version, scattered)),
                (Err(code), _) => answers[index] = i64::from(*code),
                (Ok(_), None) => {}
            }
        }
        let memory: Vec<&Gathered> = owners.iter().map(|(_, _, s)| &s.memory).collect();
        let outcomes = py.detach(|| {
            staging::at_once(&memory, true, |slices| {
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
                let read = pool.client.get_ranges(&requests);
                read.into_iter().map(answer).collect::<Vec<i64>>()
            })
        });
        let outcomes = outcomes.unwrap_or_else(|e| vec![device_failed(e); owners.len()]);
        for ((index, ..), outcome) in owners.into_iter().zip(outcomes) {
            answers[index] = outcome;
        }
        answers
    }

    /// Ends sessions: 0, or -600 for a key without one.
    fn batch_get_session_end(&self, keys: Keys<'_>) -> Vec<i32> {
        let Ok(pool) = self.pool() else {
            return vec![INVALID_PARAMS; keys.len()];
        };
        let mut readers = pool.readers.lock();
        let mut end = |name: &[u8]| {
            if readers.remove(name).is_some() {
                0
            } else {
                INVALID_PARAMS
            }
        };
        keys.bytes().into_iter().map(&mut end).collect()
    }

    /// Takes places for objects of the given sizes: 0 (also for a key that is there already, whose pieces are then
    /// dropped), or a negative code, per key.
    #[pyo3(signature = (keys, sizes, config=None))]
    fn batch_put_session_start(
        &self,
        py: Python<'_>,
        keys: Keys<'_>,
        sizes: Words,
        config: Option<PyRef<'_, ReplicateConfig>>,
    ) -> Vec<i32> {
        let pool = match self.pool() {
            Ok(pool) if sizes.0.len() == keys.len() => pool,
            _ => return vec![INVALID_PARAMS; keys.len()],
        };
        let options = config.map_or_else(PutOptions::default, |c| c.options(false));
        let names = keys.bytes();
        let items: Vec<(&[u8], u64)> = names
            .iter()
            .copied()
            .zip(sizes.0.iter().map(|n| *n as u64))
            .collect();
        let started = py.detach(|| pool.client.put_sessions(&items, &options));
        let mut writers = pool.writers.lock();
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
            && let Err(error) = py.detach(|| pool.client.revoke_sessions(&replaced))
        {
            tracing::debug!(%error, "replaced sessions were not taken back");
        }
        codes
    }

    /// Writes pieces of objects of a session: 0, or a negative code, per key.
    fn batch_put_from_multi_buffer_ranges(
        &self,
        py: Python<'_>,
        keys: Keys<'_>,
        all_buffer_ptrs: WordLists,
        all_sizes: WordLists,
        all_dst_offsets: WordLists,
    ) -> Vec<i64> {
        let count = keys.len();
        let same = [
            all_buffer_ptrs.0.len(),
            all_sizes.0.len(),
            all_dst_offsets.0.len(),
        ];
        let pool = match self.pool() {
            Ok(pool) if same.iter().all(|n| *n == count) => pool,
            _ => return vec![i64::from(INVALID_PARAMS); count],
        };
        let mut answers = Vec::with_capacity(count);
        for (index, name) in keys.bytes().into_iter().enumerate() {
            let pieces = self.scattered(
                &all_buffer_ptrs.0[index].0,
                &all_sizes.0[index].0,
                &all_dst_offsets.0[index].0,
                false,
            );
            // Taken out while it is written to: other keys' sessions go on meanwhile.
            let session = pool.writers.lock().remove(name);
            answers.push(match (pieces, session) {
                (Ok(scattered), Some(mut session)) => {
                    let outcome = py.detach(|| {
                        staging::at_once(&[&scattered.memory], false, |slices| {
                            let pieces = scattered.pieces(&slices[0]);
                            let written = pool.client.put_pieces(&mut session, &pieces);
                            written.map_or_else(|e| i64::from(code(&e)), |_| 0)
                        })
                    });
                    pool.writers.lock().insert(name.into(), session);
                    outcome.unwrap_or_else(device_failed)
                }
                (Err(code), session) => {
                    if let Some(session) = session {
                        pool.writers.lock().insert(name.into(), session);
                    }
                    i64::from(code)
                }
                (Ok(_), None) => i64::from(INVALID_PARAMS),
            });
        }
        answers
    }

    /// Publishes the objects of sessions: 0, or a negative code, per key.
    fn batch_put_session_end(&self, py: Python<'_>, keys: Keys<'_>) -> Vec<i32> {
        let Ok(pool) = self.pool() else {
            return vec![INVALID_PARAMS; keys.len()];
        };
        let mut codes = Vec::with_capacity(keys.len());
        for name in keys.bytes() {
            let session = pool.writers.lock().remove(name);
            codes.push(match session {
                Some(session) => {
                    let outcome = py.detach(|| pool.client.end_sessions(vec![session])).pop();
                    outcome.and_then(Result::err).as_ref().map_or(0, code)
                }
                None => INVALID_PARAMS,
            });
        }
        codes
    }

    /// Gives the places of sessions back: 0, or a negative code, per key.
    fn batch_put_session_revoke(&self, py: Python<'_>, keys: Keys<'_>) -> Vec<i32> {
        let Ok(pool) = self.pool() else {
            return vec![INVALID_PARAMS; keys.len()];
        };
        let mut codes = Vec::with_capacity(keys.len());
        for name in keys.bytes() {
            let session = pool.writers.lock().remove(name);
            codes.push(match session {
                Some(session) => {
                    let outcome = py.detach(|| pool.client.revoke_sessions(&[session]));
                    outcome.err().as_ref().map_or(0, code)
                }
                None => INVALID_PARAMS,
            });
        }
        codes
    }
}
