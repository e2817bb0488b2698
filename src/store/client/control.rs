//! The client's link to the master: control lanes, batches, and patience with a master that restarts.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use prost::Message;

use super::moved::MovedReports;
use crate::base::clock::time_left;
use crate::base::handshake::{self, HandshakeError, LaneKind};
use crate::base::id::Id128;
use crate::base::net::{join_host_port, resolve_one, split_host_port};
use crate::base::trace;
use crate::base::trust::ClusterKeys;
use crate::engine::transport::control::ControlSocket;
use crate::store::model::error::StoreError;
use crate::store::wire::{
    self, BATCH_BYTES_MAX, Operation, OperationBatch, Reply, ReplyBatch, reply,
};

/// Idle lanes kept.
const IDLE_MAX: usize = 32;
/// Pause before trying a master again.
const RETRY: Duration = Duration::from_millis(30);

/// Connects to one master.
pub(crate) struct ControlLink {
    master: String,
    me: Id128,
    keys: ClusterKeys,
    connect_timeout: Duration,
    /// How long an unreachable master is waited for, counted from when it was first missed: callers that come later do
    /// not each wait anew.
    patience: Duration,
    missed_since: Mutex<Option<Instant>>,
    idle: Mutex<Vec<ControlSocket>>,
    local: Mutex<LocalSocket>,
    next: AtomicU64,
    pub(crate) term: AtomicU64,
    pub(crate) epoch: AtomicU64,
    moved: Option<MovedReports>,
}

/// The master's abstract Unix socket on this host.
#[derive(Debug, Default)]
struct LocalSocket {
    /// As the master told, once a lane was opened there.
    name: Option<String>,
    /// Where nobody answered: another network namespace, or a master that is gone.
    failed: Option<String>,
}

/// A batch as it goes over a lane.
fn framed(batch: &OperationBatch) -> Vec<u8> {
    let length = batch.encoded_len();
    let mut framed = Vec::with_capacity(4 + length);
    framed.extend_from_slice(&(length as u32).to_le_bytes());
    batch.encode_raw(&mut framed);
    framed
}

/// A batch that has been sent.
pub(crate) struct Sent {
    lane: ControlSocket,
    reused: bool,
    framed: Vec<u8>,
    deadline: Instant,
}

impl ControlLink {
    pub(crate) fn new(
        master: &str,
        me: Id128,
        keys: ClusterKeys,
        connect_timeout: Duration,
        patience: Duration,
    ) -> Result<Self, StoreError> {
        let (host, port) =
            split_host_port(master, 50051).map_err(|what| StoreError::InvalidParams { what })?;
        Ok(Self {
            master: join_host_port(&host, port),
            me,
            keys,
            connect_timeout,
            patience,
            missed_since: Mutex::default(),
            idle: Mutex::default(),
            local: Mutex::default(),
            next: AtomicU64::new(1),
            term: AtomicU64::new(0),
            epoch: AtomicU64::new(0),
            moved: None,
        })
    }

    /// Tells the master beside its batches what was moved.
    pub(super) fn reporting(mut self, moved: MovedReports) -> Self {
        self.moved = Some(moved);
        self
    }

    /// The last word before the client goes: what it has moved and not told yet. Best effort, over a lane that is open.
    pub(super) fn farewell(&self, deadline: Instant) {
        let transfers = self.moved.as_ref().map(MovedReports::rest);
        let transfers = transfers.unwrap_or_default();
        if transfers.is_empty() || self.idle.lock().is_empty() {
            return;
        }
        let batch = OperationBatch {
            transfers,
            ..self.batch(Vec::new(), deadline)
        };
        let sent = self.send_framed(framed(&batch), deadline, false);
        if let Err(error) = sent.and_then(|sent| self.receive(sent)) {
            tracing::debug!(%error, "the last transfers were not told");
        }
    }

    fn batch(&self, operations: Vec<Operation>, deadline: Instant) -> OperationBatch {
        OperationBatch {
            id: self.next.fetch_add(1, Ordering::Relaxed),
            client_high: self.me.high,
            client_low: self.me.low,
            deadline_ms: time_left(deadline).as_millis().clamp(1, 60_000) as u32,
            operations,
            transfers: Vec::new(),
            traceparent: trace::traceparent(),
        }
    }

    pub(crate) fn master(&self) -> &str {
        &self.master
    }

    fn unreachable(&self, reason: impl ToString) -> StoreError {
        StoreError::MasterUnreachable {
            master: self.master.clone(),
            reason: reason.to_string(),
        }
    }

    fn failed(&self, error: &io::Error) -> StoreError {
        match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => StoreError::Timeout {
                what: format!("master {}", self.master),
            },
            _ => self.unreachable(error),
        }
    }

    /// Changes over to this abstract Unix socket if it can be reached. There is a lane at any time: the master gives up what
    /// a client without lanes has begun.
    pub(crate) fn prefer_local(&self, socket: &str, deadline: Instant) {
        {
            let local = self.local.lock();
            let known = [&local.name, &local.failed];
            if known.into_iter().any(|n| n.as_deref() == Some(socket)) {
                return;
            }
        }
        let lane = self.open_local(socket, deadline);
        let mut local = self.local.lock();
        let Some(lane) = lane else {
            local.failed = Some(socket.to_owned());
            return;
        };
        local.name = Some(socket.to_owned());
        let mut idle = self.idle.lock();
        idle.clear();
        idle.push(lane);
    }

    fn open(&self, deadline: Instant) -> Result<ControlSocket, (bool, StoreError)> {
        let name = self.local.lock().name.clone();
        if let Some(name) = name {
            if let Some(lane) = self.open_local(&name, deadline) {
                return Ok(lane);
            }
            // Another master, or none: the next view tells where it listens.
            let mut local = self.local.lock();
            if local.name.as_ref() == Some(&name) {
                local.failed = local.name.take();
            }
        }
        self.open_tcp(deadline)
    }

    fn open_local(&self, name: &str, deadline: Instant) -> Option<ControlSocket> {
        let mut lane = ControlSocket::connect_unix(name).ok()?;
        let end = Instant::now() + self.connect_timeout.min(time_left(deadline));
        let kind = LaneKind::Control;
        handshake::connect(&mut lane.timed(end), kind, self.me, &self.keys).ok()?;
        Some(lane)
    }

    fn open_tcp(&self, deadline: Instant) -> Result<ControlSocket, (bool, StoreError)> {
        let retry = |e: io::Error| (true, self.failed(&e));
        let address = resolve_one(&self.master).map_err(retry)?;
        let timeout = self.connect_timeout.min(time_left(deadline));
        let mut lane = ControlSocket::connect(address, timeout).map_err(retry)?;
        let end = Instant::now() + timeout;
        let greeted =
            handshake::connect(&mut lane.timed(end), LaneKind::Control, self.me, &self.keys);
        match greeted {
            Ok(_) => Ok(lane),
            Err(HandshakeError::Io(e)) => Err(retry(e)),
            // Waiting does not change a token, a version or what listens there.
            Err(other) => Err((false, self.unreachable(other))),
        }
    }

    fn take(&self, deadline: Instant, fresh: bool) -> Result<(ControlSocket, bool), StoreError> {
        if fresh {
            self.idle.lock().clear();
        } else if let Some(lane) = self.idle.lock().pop() {
            return Ok((lane, true));
        }
        loop {
            match self.open(deadline) {
                Ok(lane) => {
                    *self.missed_since.lock() = None;
                    return Ok((lane, false));
                }
                Err((true, error)) => {
                    let now = Instant::now();
                    let missed = *self.missed_since.lock().get_or_insert(now);
                    if now + RETRY >= deadline.min(missed + self.patience) {
                        return Err(error);
                    }
                    std::thread::sleep(RETRY);
                }
                Err((_, error)) => return Err(error),
            }
        }
    }

    fn give_back(&self, lane: ControlSocket) {
        let mut idle = self.idle.lock();
        // Lanes of before the change-over to the local socket end with their calls, but never the last one.
        let outdated = !lane.is_local() && idle.iter().any(ControlSocket::is_local);
        if idle.len() < IDLE_MAX && !outdated {
            idle.push(lane);
        }
    }

    /// Sends a batch; [`ControlLink::receive`] gets its replies. In between the caller's thread is free.
    pub(crate) fn send(
        &self,
        operations: Vec<Operation>,
        deadline: Instant,
    ) -> Result<Sent, StoreError> {
        let moved = self.moved.as_ref().map(MovedReports::due);
        let batch = OperationBatch {
            transfers: moved.unwrap_or_default(),
            ..self.batch(operations, deadline)
        };
        if batch.encoded_len() > BATCH_BYTES_MAX {
            return Err(StoreError::InvalidParams {
                what: "the batch is too large: split it".to_owned(),
            });
        }
        self.send_framed(framed(&batch), deadline, false)
    }

    fn send_framed(
        &self,
        framed: Vec<u8>,
        deadline: Instant,
        fresh: bool,
    ) -> Result<Sent, StoreError> {
        let (mut lane, reused) = self.take(deadline, fresh)?;
        match lane.send(&framed, deadline) {
            Ok(()) => Ok(Sent {
                lane,
                reused,
                framed,
                deadline,
            }),
            Err(_) if !fresh => self.send_framed(framed, deadline, true),
            Err(error) => Err(self.failed(&error)),
        }
    }

    /// The replies of a batch. A lane that broke is replaced and the batch sent again: every operation of the contract
    /// may be repeated (an end or commit that is repeated says so by its code, and the caller looks).
    pub(crate) fn receive(&self, sent: Sent) -> Result<ReplyBatch, StoreError> {
        let mut sent = sent;
        // The master waits up to the deadline itself: leave its answer the time to arrive.
        let grace = sent.deadline + Duration::from_millis(500);
        loop {
            match sent.lane.receive(BATCH_BYTES_MAX, grace) {
                Ok(message) => {
                    let batch = ReplyBatch::decode(message).map_err(|_| {
                        self.unreachable("it answered something that is no reply of this protocol")
                    })?;
                    *self.missed_since.lock() = None;
                    self.give_back(sent.lane);
                    self.term.store(batch.term, Ordering::Release);
                    self.epoch.store(batch.view_epoch, Ordering::Release);
                    return Ok(batch);
                }
                Err(e) if e.kind() == io::ErrorKind::TimedOut => return Err(self.failed(&e)),
                Err(_) if sent.reused || Instant::now() < sent.deadline => {
                    let deadline = sent.deadline;
                    sent = self.send_framed(sent.framed, deadline, true)?;
                    sent.reused = false;
                    if Instant::now() >= deadline {
                        return Err(self.unreachable("the connection broke"));
                    }
                }
                Err(e) => return Err(self.failed(&e)),
            }
        }
    }

    /// One batch, there and back.
    pub(crate) fn call(
        &self,
        operations: Vec<Operation>,
        deadline: Instant,
    ) -> Result<Vec<Reply>, StoreError> {
        let wanted = operations.len();
        let batch = self.receive(self.send(operations, deadline)?)?;
        if batch.replies.len() != wanted {
            return Err(self.unreachable("it answered another number of operations"));
        }
        Ok(batch.replies)
    }

    /// One operation, there and back; a refusal is an error.
    pub(crate) fn ask(
        &self,
        operation: wire::operation::Kind,
        deadline: Instant,
    ) -> Result<reply::Kind, StoreError> {
        let reply = self.call(vec![operation.into()], deadline)?.pop();
        self.kind(reply)
    }

    pub(crate) fn kind(&self, reply: Option<Reply>) -> Result<reply::Kind, StoreError> {
        match reply.and_then(|r| r.kind) {
            Some(reply::Kind::Refused(refusal)) => Err(match StoreError::from_code(refusal.code) {
                StoreError::Refused { code, .. } => StoreError::Refused {
                    code,
                    reason: refusal.reason,
                },
                known => known,
            }),
            Some(kind) => Ok(kind),
            None => Err(self.surprise()),
        }
    }

    /// An answer to another question.
    pub(crate) fn surprise(&self) -> StoreError {
        self.unreachable(
            "it answered something else than was asked: use the same release on both sides",
        )
    }
}

impl ControlLink {
    /// Sends all batches on one lane, then receives all replies; returns the number of operations answered.
    pub(crate) fn pipeline(
        &self,
        batches: Vec<Vec<Operation>>,
        deadline: Instant,
    ) -> Result<u64, StoreError> {
        let (mut lane, _) = self.take(deadline, false)?;
        let mut framed = Vec::new();
        let count = batches.len();
        for operations in batches {
            let batch = OperationBatch {
                deadline_ms: 0,
                ..self.batch(operations, deadline)
            };
            framed.extend_from_slice(&self::framed(&batch));
        }
        lane.send(&framed, deadline).map_err(|e| self.failed(&e))?;
        let mut answered = 0;
        for _ in 0..count {
            let message = lane
                .receive(BATCH_BYTES_MAX, deadline)
                .map_err(|e| self.failed(&e))?;
            let batch = ReplyBatch::decode(message).map_err(|_| self.surprise())?;
            answered += batch.replies.len() as u64;
        }
        self.give_back(lane);
        Ok(answered)
    }
}
