//! Moving ranges between this process and a peer: at once, in the background, and by way of a device's buffers.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Instant;

use mooncake::engine::batch::{LocalSlice, Opcode};
use mooncake::engine::peer::{Move, Notify};
use pyo3::prelude::*;

use super::{
    BATCHES_MAX, Engine, INVALID_ARGUMENT, METADATA, Running, TransferNotify, code, opcode,
};
use crate::args::{List, Word, Words};
use crate::buffers;
use crate::device::{self, WINDOW};
use crate::staging::{self, Gathered, Slices};

impl Running {
    /// The ranges of a call, or the code it is refused with.
    fn moves(
        opcode: Opcode,
        local: &[usize],
        remote: &[usize],
        lengths: &[usize],
    ) -> Result<Moves, i64> {
        if local.len() != remote.len() || local.len() != lengths.len() {
            return Err(INVALID_ARGUMENT);
        }
        let mut moves = Moves::default();
        for ((local, remote), length) in local.iter().zip(remote).zip(lengths) {
            let write = opcode == Opcode::Read;
            let device = if *length == 0 {
                None
            } else {
                buffers::owner(*local, *length, write).ok_or(INVALID_ARGUMENT)?
            };
            // A device's range goes through buffers of limited size.
            let step = if device.is_some() { WINDOW } else { usize::MAX };
            let mut done = 0;
            while done < *length {
                let n = (length - done).min(step);
                // SAFETY: memory of this process, or a device's; that it stays so during the transfer is the caller's
                // promise.
                let slice = unsafe { LocalSlice::new((local + done) as *mut u8, n) };
                let remote_address = remote.checked_add(done).ok_or(INVALID_ARGUMENT)?;
                moves.list.push(Move {
                    opcode,
                    local: slice,
                    remote_address: remote_address as u64,
                });
                moves
                    .memory
                    .push(Gathered::new([(slice, device)].into_iter()));
                done += n;
            }
        }
        Ok(moves)
    }

    pub(super) fn address(&self, name: &str) -> Result<String, i64> {
        match self.metadata.lookup(name) {
            Ok(Some(address)) => Ok(address),
            Ok(None) => Err(INVALID_ARGUMENT),
            Err(error) => {
                tracing::warn!(%error, "transfer");
                Err(METADATA)
            }
        }
    }

    fn transfer(&self, name: &str, moves: &Moves, notify: Option<&Notify>) -> i64 {
        let address = match self.address(name) {
            Ok(address) => address,
            Err(code) => return code,
        };
        let run = |list: &[Move], notify: Option<&Notify>| {
            let outcome = self.engine.transfer(&address, list, notify);
            outcome.map_err(|error| {
                tracing::debug!(%error, "transfer");
                code(&error)
            })
        };
        let memory: Vec<&Gathered> = moves.memory.iter().collect();
        let outcome = if staging::any_on_device(&memory) {
            moves.through_buffers(&memory, run, notify)
        } else {
            run(&moves.list, notify)
        };
        outcome.err().unwrap_or(0)
    }
}

/// The ranges of a call; those of a device are cut so that each fits a staging buffer.
#[derive(Default)]
struct Moves {
    list: Vec<Move>,
    memory: Vec<Gathered>,
}

impl Moves {
    /// Window by window; the notify goes after the last.
    fn through_buffers(
        &self,
        memory: &[&Gathered],
        run: impl Fn(&[Move], Option<&Notify>) -> Result<(), i64>,
        notify: Option<&Notify>,
    ) -> Result<(), i64> {
        let mut outcome = Ok(());
        let mut window = |range: Range<usize>, slices: &[Slices]| {
            if outcome.is_err() {
                return false;
            }
            let staged: Vec<Move> = self.list[range]
                .iter()
                .zip(slices)
                .map(|(m, slices)| Move {
                    local: slices[0],
                    ..*m
                })
                .collect();
            outcome = run(&staged, None);
            outcome.is_ok()
        };
        let failed = |error: &dyn std::fmt::Display| {
            tracing::warn!(%error, "device memory");
            INVALID_ARGUMENT
        };
        let staged = if self.list.first().is_some_and(|m| m.opcode == Opcode::Write) {
            let mut lost = Ok(());
            staging::download(memory, |range, slices| match slices {
                Ok(slices) => {
                    window(range, slices);
                }
                Err(error) => lost = Err(failed(&error)),
            });
            lost
        } else {
            let lost = staging::upload(memory, |range, slices| {
                let good = window(range, slices);
                let bytes = slices.iter().map(|s| good.then(|| s[0].len() as u64));
                bytes.collect()
            });
            lost.first().map_or(Ok(()), |(_, error)| Err(failed(error)))
        };
        outcome.and(staged)?;
        match notify {
            Some(notify) => run(&[], Some(notify)),
            None => Ok(()),
        }
    }
}

impl Engine {
    #[expect(clippy::too_many_arguments, reason = "the parts of a call, once")]
    fn run(
        &self,
        py: Python<'_>,
        target: &str,
        local: &[usize],
        remote: &[usize],
        lengths: &[usize],
        opcode: Opcode,
        notify: Option<TransferNotify>,
    ) -> i64 {
        let notify = notify.map(|n| Notify {
            name: n.name,
            message: n.msg,
        });
        py.detach(|| {
            let running = match self.running() {
                Ok(running) => running,
                Err(code) => return code,
            };
            match Running::moves(opcode, local, remote, lengths) {
                Ok(moves) => running.transfer(target, &moves, notify.as_ref()),
                Err(code) => code,
            }
        })
    }

    /// Id of a batch that goes on in a thread of its own; 0 when it was refused.
    fn submit(
        &self,
        target: &str,
        local: &[usize],
        remote: &[usize],
        lengths: &[usize],
        opcode: Opcode,
    ) -> i64 {
        let Ok(running) = self.running() else {
            return 0;
        };
        let Ok(moves) = Running::moves(opcode, local, remote, lengths) else {
            return 0;
        };
        let id = self.next_batch.fetch_add(1, Ordering::Relaxed) + 1;
        {
            let mut batches = running.batches.lock();
            if batches.len() >= BATCHES_MAX {
                return 0;
            }
            batches.insert(id, 0);
        }
        let target = target.to_owned();
        let worker = running.clone();
        let spawned = std::thread::Builder::new()
            .name("transfer".into())
            .spawn(move || {
                let done = worker.transfer(&target, &moves, None);
                worker
                    .batches
                    .lock()
                    .insert(id, if done == 0 { 1 } else { -1 });
                worker.ended.notify_all();
            });
        if spawned.is_err() {
            running.batches.lock().remove(&id);
            return 0;
        }
        id
    }
}

#[pymethods]
impl Engine {
    /// Copies `length` bytes from here to a peer; 0 when they are there.
    #[pyo3(signature = (target_hostname, buffer, peer_buffer_address, length, transport_hint=""))]
    fn transfer_sync_write(
        &self,
        py: Python<'_>,
        target_hostname: &str,
        buffer: Word,
        peer_buffer_address: Word,
        length: Word,
        transport_hint: &str,
    ) -> i64 {
        let _ = transport_hint;
        self.run(
            py,
            target_hostname,
            &[buffer.0],
            &[peer_buffer_address.0],
            &[length.0],
            Opcode::Write,
            None,
        )
    }

    /// Copies `length` bytes from a peer to here; 0 when they are here.
    #[pyo3(signature = (target_hostname, buffer, peer_buffer_address, length, transport_hint=""))]
    fn transfer_sync_read(
        &self,
        py: Python<'_>,
        target_hostname: &str,
        buffer: Word,
        peer_buffer_address: Word,
        length: Word,
        transport_hint: &str,
    ) -> i64 {
        let _ = transport_hint;
        self.run(
            py,
            target_hostname,
            &[buffer.0],
            &[peer_buffer_address.0],
            &[length.0],
            Opcode::Read,
            None,
        )
    }

    /// Either direction; the notify is delivered after the data.
    #[pyo3(name = "transfer_sync", signature = (target_hostname, buffer, peer_buffer_address, length, opcode, notify=None, transport_hint=""))]
    #[expect(clippy::too_many_arguments, reason = "upstream's signature")]
    fn transfer_sync(
        &self,
        py: Python<'_>,
        target_hostname: &str,
        buffer: Word,
        peer_buffer_address: Word,
        length: Word,
        opcode: &Bound<'_, PyAny>,
        notify: Option<TransferNotify>,
        transport_hint: &str,
    ) -> PyResult<i64> {
        let _ = transport_hint;
        let opcode = self::opcode(opcode)?;
        Ok(self.run(
            py,
            target_hostname,
            &[buffer.0],
            &[peer_buffer_address.0],
            &[length.0],
            opcode,
            notify,
        ))
    }

    /// Several ranges to one peer.
    #[pyo3(signature = (target_hostname, buffers, peer_buffer_addresses, lengths, transport_hint=""))]
    fn batch_transfer_sync_write(
        &self,
        py: Python<'_>,
        target_hostname: &str,
        buffers: Words,
        peer_buffer_addresses: Words,
        lengths: Words,
        transport_hint: &str,
    ) -> i64 {
        let _ = transport_hint;
        self.run(
            py,
            target_hostname,
            &buffers.0,
            &peer_buffer_addresses.0,
            &lengths.0,
            Opcode::Write,
            None,
        )
    }

    /// Several ranges from one peer.
    #[pyo3(signature = (target_hostname, buffers, peer_buffer_addresses, lengths, transport_hint=""))]
    fn batch_transfer_sync_read(
        &self,
        py: Python<'_>,
        target_hostname: &str,
        buffers: Words,
        peer_buffer_addresses: Words,
        lengths: Words,
        transport_hint: &str,
    ) -> i64 {
        let _ = transport_hint;
        self.run(
            py,
            target_hostname,
            &buffers.0,
            &peer_buffer_addresses.0,
            &lengths.0,
            Opcode::Read,
            None,
        )
    }

    /// Several ranges, either direction.
    #[pyo3(name = "batch_transfer_sync", signature = (target_hostname, buffers, peer_buffer_addresses, lengths, opcode, notify=None, transport_hint=""))]
    #[expect(clippy::too_many_arguments, reason = "upstream's signature")]
    fn batch_transfer_sync(
        &self,
        py: Python<'_>,
        target_hostname: &str,
        buffers: Words,
        peer_buffer_addresses: Words,
        lengths: Words,
        opcode: &Bound<'_, PyAny>,
        notify: Option<TransferNotify>,
        transport_hint: &str,
    ) -> PyResult<i64> {
        let _ = transport_hint;
        let opcode = self::opcode(opcode)?;
        Ok(self.run(
            py,
            target_hostname,
            &buffers.0,
            &peer_buffer_addresses.0,
            &lengths.0,
            opcode,
            notify,
        ))
    }

    /// Begins to write: the batch's id, 0 when it was refused.
    fn batch_transfer_async_write(
        &self,
        target_hostname: &str,
        buffers: Words,
        peer_buffer_addresses: Words,
        lengths: Words,
    ) -> i64 {
        self.submit(
            target_hostname,
            &buffers.0,
            &peer_buffer_addresses.0,
            &lengths.0,
            Opcode::Write,
        )
    }

    /// Begins to read: the batch's id, 0 when it was refused.
    fn batch_transfer_async_read(
        &self,
        target_hostname: &str,
        buffers: Words,
        peer_buffer_addresses: Words,
        lengths: Words,
    ) -> i64 {
        self.submit(
            target_hostname,
            &buffers.0,
            &peer_buffer_addresses.0,
            &lengths.0,
            Opcode::Read,
        )
    }

    /// Begins either: the batch's id, 0 when it was refused.
    fn batch_transfer_async(
        &self,
        target_hostname: &str,
        buffers: Words,
        peer_buffer_addresses: Words,
        lengths: Words,
        opcode: &Bound<'_, PyAny>,
    ) -> PyResult<i64> {
        let opcode = self::opcode(opcode)?;
        Ok(self.submit(
            target_hostname,
            &buffers.0,
            &peer_buffer_addresses.0,
            &lengths.0,
            opcode,
        ))
    }

    /// Begins to write one range: the batch's id, 0 when it was refused.
    fn transfer_submit_write(
        &self,
        target_hostname: &str,
        buffer: Word,
        peer_buffer_address: Word,
        length: Word,
    ) -> i64 {
        self.submit(
            target_hostname,
            &[buffer.0],
            &[peer_buffer_address.0],
            &[length.0],
            Opcode::Write,
        )
    }

    /// 0 under way, 1 done, -1 failed (or no such batch). A batch that has ended is forgotten by this call.
    fn transfer_check_status(&self, batch_id: i64) -> i32 {
        let Ok(running) = self.running() else {
            return -1;
        };
        let mut batches = running.batches.lock();
        match batches.get(&batch_id).copied() {
            Some(0) => 0,
            Some(state) => {
                batches.remove(&batch_id);
                state
            }
            None => -1,
        }
    }

    /// Waits for batches, for at most twice as long as one transfer may take: 0 when all have arrived, else -1. Those that
    /// have ended are forgotten.
    fn get_batch_transfer_status(&self, py: Python<'_>, batch_ids: List<i64>) -> i32 {
        let Ok(running) = self.running() else {
            return -1;
        };
        py.detach(|| {
            let mut answer = 0;
            let deadline = Instant::now() + running.timeout * 2;
            let mut batches = running.batches.lock();
            for id in batch_ids.0 {
                while batches.get(&id) == Some(&0) {
                    if running.ended.wait_until(&mut batches, deadline).timed_out() {
                        break;
                    }
                }
                match batches.get(&id) {
                    // Its thread is still at it and will say so: it stays known.
                    Some(0) => answer = -1,
                    Some(1) => {
                        batches.remove(&id);
                    }
                    _ => {
                        batches.remove(&id);
                        answer = -1;
                    }
                }
            }
            answer
        })
    }

    /// Waits for what was begun on a CUDA stream; the first address of a device names it. With memory of the host alone the
    /// stream's own context is asked for.
    fn _await_stream(&self, py: Python<'_>, addresses: Words, stream_ptr: Word) -> i64 {
        let waited = py.detach(|| device::await_stream(&addresses.0, stream_ptr.0));
        waited.map_or_else(
            |error| {
                tracing::warn!(%error, "the stream was not waited for");
                INVALID_ARGUMENT
            },
            |()| 0,
        )
    }
}
