//! Control lanes: a client's batches over a plain stream, a thread per lane. A blocking thread answers a small batch in
//! the time of a bare echo, which is what lets a put and its commit share one round trip.

use std::io;
use std::net::{IpAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use prost::Message;

use super::{Master, operations};
use crate::base::handshake::{self, HandshakeError, LaneKind};
use crate::base::id::Id128;
use crate::engine::transport::control::ControlSocket;
use crate::store::wire::{BATCH_BYTES_MAX, OperationBatch};

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
const FRAME_TIMEOUT: Duration = Duration::from_secs(30);
/// Replies gathered before they are sent in any case.
const REPLY_BUFFER: usize = 64 << 10;

/// The open control lanes of a master.
pub(crate) struct ControlLanes {
    master: Arc<Master>,
    open: AtomicUsize,
    most: usize,
}

impl ControlLanes {
    pub(crate) fn new(master: Arc<Master>, most: usize) -> Arc<Self> {
        Arc::new(Self {
            master,
            open: AtomicUsize::new(0),
            most,
        })
    }

    /// Serves a connection whose first bytes announced a lane.
    pub(crate) fn serve(self: &Arc<Self>, stream: TcpStream) {
        let peer = stream.peer_addr().ok().map(|a| a.ip());
        self.spawn(peer, move || ControlSocket::new(stream));
    }

    /// Serves a connection of this host.
    pub(crate) fn serve_unix(self: &Arc<Self>, stream: UnixStream) {
        self.spawn(None, move || ControlSocket::from_unix(stream));
    }

    fn spawn(
        self: &Arc<Self>,
        peer: Option<IpAddr>,
        socket: impl FnOnce() -> io::Result<ControlSocket> + Send + 'static,
    ) {
        let lanes = self.clone();
        let spawned = std::thread::Builder::new()
            .name("control-lane".into())
            .stack_size(512 << 10)
            .spawn(move || {
                let busy = lanes.open.fetch_add(1, Ordering::AcqRel) >= lanes.most;
                let _counted = Counted(&lanes.open);
                if let Err(error) = socket().and_then(|socket| lanes.run(socket, peer, busy)) {
                    tracing::debug!(%error, "a control lane ended");
                }
            });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread for a control lane");
        }
    }

    /// `peer`: `None` for one of this host over a Unix socket.
    fn run(&self, mut socket: ControlSocket, peer: Option<IpAddr>, busy: bool) -> io::Result<()> {
        let greeting = handshake::accept(
            &mut socket.timed(Instant::now() + HANDSHAKE_TIMEOUT),
            LaneKind::Control,
            Id128::NONE,
            &self.master.keys,
            busy,
        )
        .map_err(|error| {
            tracing::info!(%error, "control lane refused");
            if matches!(error, HandshakeError::Token) {
                self.master.refused.note(peer);
            }
            io::Error::other(error)
        })?;
        let _client = ClientLane::new(&self.master, greeting.peer);
        self.batches(&mut socket)
    }

    /// Answers batches in order. Replies to batches that lay ready together leave together: a pipelining client costs
    /// one write per wake-up, not one per batch.
    fn batches(&self, socket: &mut ControlSocket) -> io::Result<()> {
        let mut out = Vec::new();
        loop {
            let Some(frame) = socket.receive_idle(BATCH_BYTES_MAX, FRAME_TIMEOUT)? else {
                return Ok(());
            };
            let batch = OperationBatch::decode(frame).map_err(io::Error::other)?;
            let reply = operations::execute(&self.master, batch);
            let length = reply.encoded_len() as u32;
            out.extend_from_slice(&length.to_le_bytes());
            reply.encode_raw(&mut out);
            if out.len() < REPLY_BUFFER && socket.has_message() {
                continue;
            }
            socket.send(&out, Instant::now() + FRAME_TIMEOUT)?;
            out.clear();
            out.shrink_to(REPLY_BUFFER);
        }
    }
}

/// Counts a lane, however its thread ends.
struct Counted<'a>(&'a AtomicUsize);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Counts a client's lane, however its thread ends.
struct ClientLane<'a>(&'a Master, Id128);

impl<'a> ClientLane<'a> {
    fn new(master: &'a Master, client: Id128) -> Self {
        master.client_lane_opened(client);
        Self(master, client)
    }
}

impl Drop for ClientLane<'_> {
    fn drop(&mut self) {
        self.0.client_lane_closed(self.1);
    }
}
