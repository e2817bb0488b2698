//! `mooncake.engine`: processes that read and write each other's memory by address.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::{Deref, Range};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use mooncake::base::net::{join_host_port, resolve_one, split_host_port};
use mooncake::base::trust::{ClusterKeys, Token};
use mooncake::engine::batch::{LocalSlice, Opcode};
use mooncake::engine::error::TransferError;
use mooncake::engine::metadata::Metadata;
use mooncake::engine::peer::{Move, Notify, PeerEngine, PeerError};
use parking_lot::{Condvar, Mutex, RwLock};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::args::{List, Value, Word, Words};
use crate::buffers::{self, HostMemoryAllocator, Registered};
use crate::device::{self, DeviceRange, WINDOW};
use crate::process;
use crate::staging::{self, Gathered, Slices};

// Codes of upstream's transfer engine: another space than the store's.
const INVALID_ARGUMENT: i64 = -1;
const ADDRESS_NOT_REGISTERED: i64 = -3;
const ADDRESS_OVERLAPPED: i64 = -7;
const DNS: i64 = -101;
const SOCKET: i64 = -102;
const METADATA: i64 = -200;
/// Batches submitted and not asked for; more are refused.
const BATCHES_MAX: usize = 4096;
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);
/// Seconds; a day.
const TIMEOUT_MAX: u64 = 86_400;

fn code(error: &PeerError) -> i64 {
    match error {
        PeerError::Overlaps => ADDRESS_OVERLAPPED,
        PeerError::NotRegistered => ADDRESS_NOT_REGISTERED,
        _ => INVALID_ARGUMENT,
    }
}

/// A message that goes with a transfer.
#[pyclass(module = "mooncake.engine", get_all, set_all, from_py_object)]
#[derive(Clone)]
pub(crate) struct TransferNotify {
    name: String,
    msg: String,
}

#[pymethods]
impl TransferNotify {
    #[new]
    #[pyo3(signature = (name="", msg=""))]
    fn new(name: &str, msg: &str) -> Self {
        Self {
            name: name.to_owned(),
            msg: msg.to_owned(),
        }
    }
    fn __repr__(&self) -> String {
        format!("TransferNotify(name={:?}, msg={:?})", self.name, self.msg)
    }
}

/// What `initialize` opened.
struct Running {
    engine: PeerEngine,
    metadata: Metadata,
    name: String,
    generation: u32,
    /// Bound of one transfer.
    timeout: Duration,
    /// 0 under way, 1 done, -1 failed.
    batches: Mutex<HashMap<i64, i32>>,
    ended: Condvar,
}

/// What stores that were given the engine share with it.
#[derive(Default)]
pub(crate) struct Shared {
    running: RwLock<Option<Arc<Running>>>,
    /// What is open to peers.
    known: Registered,
}

/// Memory of this process and of its peers.
#[pyclass(module = "mooncake._native", subclass, frozen, name = "TransferEngine")]
#[derive(Default)]
pub(crate) struct Engine {
    shared: Arc<Shared>,
    managed: HostMemoryAllocator,
    next_batch: AtomicI64,
}

fn opcode(value: &Bound<'_, PyAny>) -> PyResult<Opcode> {
    let number = value
        .extract::<i64>()
        .or_else(|_| value.getattr("value")?.extract::<i64>())?;
    match number {
        0 => Ok(Opcode::Read),
        1 => Ok(Opcode::Write),
        _ => Err(pyo3::exceptions::PyValueError::new_err(
            "opcode must be TransferOpcode.Read or TransferOpcode.Write",
        )),
    }
}

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

    fn address(&self, name: &str) -> Result<String, i64> {
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

impl Deref for Engine {
    type Target = Shared;
    fn deref(&self) -> &Shared {
        &self.shared
    }
}

impl Shared {
    fn running(&self) -> Result<Arc<Running>, i64> {
        let running = self.running.read();
        let running = running.as_ref().ok_or(INVALID_ARGUMENT)?;
        if running.generation == process::generation() {
            Ok(running.clone())
        } else {
            Err(INVALID_ARGUMENT)
        }
    }

    /// What peers may reach, for those who must know whether an address is memory.
    pub(crate) fn known(&self) -> &Registered {
        &self.known
    }

    /// Whether it was initialized, in this process.
    pub(crate) fn is_running(&self) -> bool {
        self.running().is_ok()
    }

    /// Opens memory to peers: 0, or a negative code.
    pub(crate) fn register(&self, address: usize, length: usize) -> i64 {
        let running = match self.running() {
            Ok(running) => running,
            Err(code) => return code,
        };
        let Some(pointer) = NonNull::new(address as *mut u8) else {
            return INVALID_ARGUMENT;
        };
        let outcome = match buffers::owner(address, length, true) {
            None => return INVALID_ARGUMENT,
            Some(Some(device)) => {
                let copies = Arc::new(DeviceRange(device));
                running.engine.register_device(pointer, length, copies)
            }
            // SAFETY: mapped now; that it stays so until it is unregistered is the caller's promise, as with upstream.
            Some(None) => unsafe { running.engine.register(pointer, length) },
        };
        if outcome.is_ok() {
            self.known.add(address, length);
        }
        outcome.err().as_ref().map_or(0, code)
    }

    /// Closes it: 0, or a negative code.
    pub(crate) fn unregister(&self, address: usize) -> i64 {
        match self.running() {
            Ok(running) => {
                self.known.remove(address);
                let outcome = running.engine.unregister(address);
                outcome.err().as_ref().map_or(0, code)
            }
            Err(code) => code,
        }
    }
}

impl Engine {
    /// For a store that shares it.
    pub(crate) fn share(&self) -> Arc<Shared> {
        self.shared.clone()
    }

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

    fn open(local_hostname: &str, metadata_server: &str) -> Result<Running, i64> {
        let metadata = Metadata::open(metadata_server).map_err(|error| {
            tracing::warn!("initialize: {error}");
            METADATA
        })?;
        let name = if local_hostname.is_empty() {
            "127.0.0.1"
        } else {
            local_hostname
        };
        let (host, port) = split_host_port(name, 0).map_err(|_| INVALID_ARGUMENT)?;
        let wanted = resolve_one(&join_host_port(&host, port)).map_err(|error| {
            tracing::warn!("initialize: {error}");
            DNS
        })?;
        let token = std::env::var("MOONCAKE_TOKEN")
            .ok()
            .and_then(|t| Token::new(&t));
        if token.is_none() && !wanted.ip().is_loopback() {
            tracing::warn!(
                "NO TOKEN: anybody who reaches {} can read and write what is registered here; set MOONCAKE_TOKEN",
                wanted.ip()
            );
        }
        let timeout = std::env::var("MC_TRANSFER_TIMEOUT")
            .ok()
            .and_then(|t| t.parse().ok())
            .map_or(TIMEOUT_DEFAULT, |seconds: u64| {
                Duration::from_secs(seconds.clamp(1, TIMEOUT_MAX))
            });
        let keys = ClusterKeys::derive(token.as_ref());
        let any = SocketAddr::new(wanted.ip(), 0);
        // The port in the name is the metadata name's; it is used when it is free, as upstream does.
        let engine = PeerEngine::open(wanted, keys.clone(), timeout)
            .or_else(|_| PeerEngine::open(any, keys, timeout))
            .map_err(|error| {
                tracing::warn!("initialize: cannot listen on {}: {error}", wanted.ip());
                SOCKET
            })?;
        let port = engine.address().port();
        metadata.publish(name, &host, port).map_err(|error| {
            tracing::warn!("initialize: {error}");
            METADATA
        })?;
        Ok(Running {
            engine,
            name: name.to_owned(),
            metadata,
            generation: process::generation(),
            timeout,
            batches: Mutex::default(),
            ended: Condvar::new(),
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.generation == process::generation()
            && let Err(error) = self.metadata.withdraw(&self.name)
        {
            tracing::debug!(%error, "the name was not taken back");
        }
    }
}

#[pymethods]
impl Engine {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// Listens and is ready: 0, or a negative code. `metadata_server`: P2PHANDSHAKE, http://…/metadata, redis://….
    fn initialize(
        &self,
        py: Python<'_>,
        local_hostname: &str,
        metadata_server: &str,
        protocol: &str,
        device_name: &str,
    ) -> i64 {
        let _ = device_name;
        if protocol != "tcp" && !protocol.is_empty() {
            tracing::warn!("initialize: protocol `{protocol}` is not in this build: using TCP");
        }
        if self.running().is_ok() {
            return INVALID_ARGUMENT;
        }
        match py.detach(|| Self::open(local_hostname, metadata_server)) {
            Ok(running) => {
                let old = self.running.write().replace(Arc::new(running));
                // Of the process this one was forked from.
                std::mem::forget(old);
                0
            }
            Err(code) => code,
        }
    }

    /// `initialize` with the kind of the metadata service beside its address.
    fn initialize_ext(
        &self,
        py: Python<'_>,
        local_hostname: &str,
        metadata_server: &str,
        protocol: &str,
        device_name: &str,
        metadata_type: &str,
    ) -> i64 {
        let server = match metadata_type {
            "" | "p2p" | "P2PHANDSHAKE" => metadata_server.to_owned(),
            kind if metadata_server.contains("://") || metadata_server == "P2PHANDSHAKE" => {
                let _ = kind;
                metadata_server.to_owned()
            }
            kind => format!("{kind}://{metadata_server}"),
        };
        self.initialize(py, local_hostname, &server, protocol, device_name)
    }

    /// Port that peers connect to.
    fn get_rpc_port(&self) -> i64 {
        self.running()
            .map_or_else(|code| code, |r| i64::from(r.engine.address().port()))
    }

    /// Opens memory to peers: 0, -7 when it overlaps, -1 when it is not memory of this process.
    #[pyo3(signature = (buffer_addr, capacity, location="*"))]
    fn register_memory(
        &self,
        py: Python<'_>,
        buffer_addr: Word,
        capacity: Word,
        location: &str,
    ) -> i64 {
        let _ = location;
        py.detach(|| self.register(buffer_addr.0, capacity.0))
    }

    /// Closes memory to peers once transfers under way have ended: 0, -3 when nothing is registered there.
    fn unregister_memory(&self, py: Python<'_>, buffer_addr: Word) -> i64 {
        py.detach(|| self.unregister(buffer_addr.0))
    }

    /// All or none.
    #[pyo3(signature = (buffer_addresses, capacities, location="*"))]
    fn batch_register_memory(
        &self,
        py: Python<'_>,
        buffer_addresses: Words,
        capacities: Words,
        location: &str,
    ) -> i64 {
        let _ = location;
        if buffer_addresses.0.len() != capacities.0.len() {
            return INVALID_ARGUMENT;
        }
        py.detach(|| {
            for (at, (address, length)) in buffer_addresses.0.iter().zip(&capacities.0).enumerate()
            {
                let code = self.register(*address, *length);
                if code != 0 {
                    for done in &buffer_addresses.0[..at] {
                        self.unregister(*done);
                    }
                    return code;
                }
            }
            0
        })
    }

    /// 0, or the first negative code; the others are closed all the same.
    fn batch_unregister_memory(&self, py: Python<'_>, buffer_addresses: Words) -> i64 {
        py.detach(|| {
            let codes = buffer_addresses.0.iter().map(|a| self.unregister(*a));
            codes.fold(0, |first, code| if first == 0 { code } else { first })
        })
    }

    /// Address of `length` bytes open to peers; 0 when there are none.
    fn allocate_managed_buffer(&self, length: Word) -> usize {
        match self.managed.allocate(length.0) {
            Some(address) if self.register(address, length.0) == 0 => address,
            Some(address) => {
                self.managed.release(address);
                0
            }
            None => 0,
        }
    }

    /// Gives it back: 0, or a negative code.
    fn free_managed_buffer(&self, py: Python<'_>, address: Word, length: Word) -> i64 {
        let _ = length;
        if !self.managed.owns(address.0) {
            return INVALID_ARGUMENT;
        }
        let code = py.detach(|| self.unregister(address.0));
        // Memory that a transfer may still touch is kept.
        if code == 0 {
            self.managed.release(address.0);
        }
        code
    }

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

    /// Copies bytes to an address of this process: 0, or -1.
    fn write_bytes_to_buffer(
        &self,
        py: Python<'_>,
        dest_address: Word,
        src: Value,
        length: Word,
    ) -> i64 {
        if length.0 > src.length {
            return INVALID_ARGUMENT;
        }
        match buffers::owner(dest_address.0, length.0, true) {
            None => INVALID_ARGUMENT,
            Some(None) => {
                // SAFETY: both mapped and long enough; may overlap.
                unsafe { std::ptr::copy(src.pointer, dest_address.0 as *mut u8, length.0) };
                0
            }
            Some(Some(device)) => {
                let source = src.pointer as usize;
                let copied = py.detach(|| {
                    let range = DeviceRange(device);
                    range.copy(dest_address.0, source as *mut u8, length.0, true)
                });
                copied.map_or(INVALID_ARGUMENT, |()| 0)
            }
        }
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

    /// Bytes at an address of this process.
    fn read_bytes_from_buffer<'py>(
        &self,
        py: Python<'py>,
        source_address: Word,
        length: Word,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let wrong = || pyo3::exceptions::PyValueError::new_err("not memory of this process");
        match buffers::owner(source_address.0, length.0, false).ok_or_else(wrong)? {
            None => {
                let start = source_address.0 as *const u8;
                // SAFETY: mapped and readable for this length.
                let bytes = unsafe { std::slice::from_raw_parts(start, length.0) };
                Ok(PyBytes::new(py, bytes))
            }
            Some(device) => PyBytes::new_with(py, length.0, |bytes| {
                let (target, length) = (bytes.as_mut_ptr() as usize, bytes.len());
                let copied = py.detach(|| {
                    let range = DeviceRange(device);
                    range.copy(source_address.0, target as *mut u8, length, false)
                });
                copied.map_err(|e| pyo3::exceptions::PyOSError::new_err(e.to_string()))
            }),
        }
    }

    /// First registered address of a peer; 0 when there is none.
    fn get_first_buffer_address(&self, py: Python<'_>, segment_name: &str) -> u64 {
        py.detach(|| {
            let running = self.running().ok()?;
            let address = running.address(segment_name).ok()?;
            running.engine.first_address(&address).ok()
        })
        .unwrap_or(0)
    }

    /// Notifies received since the last call.
    fn get_notifies(&self) -> Vec<TransferNotify> {
        let Ok(running) = self.running() else {
            return Vec::new();
        };
        let notifies = running.engine.take_notifies().into_iter();
        notifies
            .map(|n| TransferNotify {
                name: n.name,
                msg: n.message,
            })
            .collect()
    }

    /// 0 when the peer answers, -102 when not.
    fn send_probe(&self, py: Python<'_>, peer_server_name: &str) -> i64 {
        py.detach(|| {
            let running = match self.running() {
                Ok(running) => running,
                Err(code) => return code,
            };
            let address = match running.address(peer_server_name) {
                Ok(address) => address,
                Err(code) => return code,
            };
            match running.engine.probe(&address) {
                Ok(()) => 0,
                Err(PeerError::Transfer(TransferError::Refused { .. })) => -104,
                Err(_) => SOCKET,
            }
        })
    }

    /// The devices of this host as upstream's JSON: one location, no RDMA device in this build.
    #[pyo3(signature = (device_name=None))]
    fn get_local_topology(&self, device_name: Option<&str>) -> &'static str {
        let _ = device_name;
        r#"{"cpu:0": [[], []]}"#
    }

    /// This object: what `setup(engine=…)` takes.
    fn get_engine(slf: PyRef<'_, Self>) -> Py<Self> {
        slf.into()
    }

    /// A number that is not 0 while the engine runs; there is no C++ object to point to.
    fn get_engine_ptr(&self) -> usize {
        self.running().map_or(0, |r| Arc::as_ptr(&r) as usize)
    }

    /// Nothing to warm up here: 0.
    #[pyo3(signature = (segment_name, **_others))]
    fn warmup_efa_segment(&self, segment_name: &str, _others: Option<&Bound<'_, PyDict>>) -> i64 {
        let _ = segment_name;
        0
    }
}
