//! Connections to workers: a pool per instance, requests written without copying the prompt, replies read step by step.
//!
//! Dropping a connection in the middle of a reply closes it, which is how a worker learns that nobody waits any more. Knows
//! no roles and no retries.

use std::io::{self, IoSlice};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::chunked::BodyScanner;
use super::head::{self, ReplyHead};

/// Idle connections kept per instance.
const IDLE_MAX: usize = 256;
/// After this an idle connection is not used again: uvicorn closes them after 5 s.
const IDLE_AGE_MAX: Duration = Duration::from_secs(4);
/// How long a connection may take to open.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Room made for each read of a reply.
const READ_BYTES: usize = 16 << 10;

/// Where in a leg an error came up: decides what may be tried again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LegError {
    /// The worker never had the request.
    #[error("cannot connect: {0}")]
    Connect(#[source] io::Error),
    /// The worker may have begun.
    #[error("connection lost: {0}")]
    Lost(#[source] io::Error),
    /// No answer in time.
    #[error("no answer in time")]
    Timeout,
    /// What came is no HTTP.
    #[error("malformed reply")]
    Malformed,
}

/// One connection to a worker.
#[derive(Debug)]
pub(crate) struct UpstreamConn {
    stream: TcpStream,
    /// Bytes received and not yet used.
    pub(crate) inbox: BytesMut,
    reused: bool,
}

/// Idle connections to one worker.
#[derive(Default)]
pub(crate) struct ConnPool {
    idle: Mutex<Vec<(Instant, UpstreamConn)>>,
}

impl std::fmt::Debug for ConnPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ConnPool({} idle)", self.idle.lock().len())
    }
}

impl ConnPool {
    fn take(&self) -> Option<UpstreamConn> {
        let mut idle = self.idle.lock();
        // The newest first; when it is too old all others are.
        let (since, conn) = idle.pop()?;
        if since.elapsed() > IDLE_AGE_MAX {
            idle.clear();
            return None;
        }
        Some(conn)
    }

    /// Takes back a connection whose reply was read to its end.
    pub(crate) fn give(&self, mut conn: UpstreamConn) {
        if !conn.inbox.is_empty() {
            return;
        }
        conn.reused = true;
        if conn.inbox.capacity() > 4 * READ_BYTES {
            conn.inbox = BytesMut::new();
        }
        let mut idle = self.idle.lock();
        if idle.len() < IDLE_MAX {
            idle.push((Instant::now(), conn));
        }
    }

    /// Closes what has been idle for too long to be used again.
    pub(crate) fn prune(&self) {
        let old = |(since, _): &(Instant, UpstreamConn)| since.elapsed() > IDLE_AGE_MAX;
        // Given back one after the other: the oldest come first.
        let mut idle = self.idle.lock();
        let count = idle.iter().take_while(|c| old(c)).count();
        idle.drain(..count);
    }

    /// Closes all idle connections: the worker restarted or leaves.
    pub(crate) fn clear(&self) {
        self.idle.lock().clear();
    }

    /// Sends a request and waits for the head of the reply. A connection that went stale while idle is replaced by a
    /// fresh one, since the worker closed it before it saw the request.
    pub(crate) async fn ask(
        &self,
        address: &(String, u16),
        head: &[u8],
        body: &[Bytes],
        bodiless: bool,
    ) -> Result<(UpstreamConn, ReplyHead), LegError> {
        let mut conn = self.send(address, head, body).await?;
        match conn.reply(bodiless).await {
            Err(LegError::Lost(_)) if conn.reused && conn.inbox.is_empty() => {
                let mut fresh = open(address).await?;
                fresh.write(head, body).await.map_err(LegError::Lost)?;
                let reply = fresh.reply(bodiless).await?;
                Ok((fresh, reply))
            }
            Err(error) => Err(error),
            Ok(reply) => Ok((conn, reply)),
        }
    }

    /// Sends a request.
    pub(crate) async fn send(
        &self,
        address: &(String, u16),
        head: &[u8],
        body: &[Bytes],
    ) -> Result<UpstreamConn, LegError> {
        while let Some(mut conn) = self.take() {
            if conn.is_idle() && conn.write(head, body).await.is_ok() {
                return Ok(conn);
            }
        }
        let mut conn = open(address).await?;
        conn.write(head, body).await.map_err(LegError::Lost)?;
        Ok(conn)
    }
}

async fn open(address: &(String, u16)) -> Result<UpstreamConn, LegError> {
    let connecting = TcpStream::connect((address.0.as_str(), address.1));
    let stream = timeout(CONNECT_TIMEOUT, connecting)
        .await
        .map_err(|_| LegError::Connect(io::ErrorKind::TimedOut.into()))?
        .map_err(LegError::Connect)?;
    let _ = stream.set_nodelay(true);
    Ok(UpstreamConn {
        stream,
        inbox: BytesMut::new(),
        reused: false,
    })
}

impl UpstreamConn {
    /// Whether the worker has neither closed this idle connection nor said anything on it.
    fn is_idle(&mut self) -> bool {
        let mut probe = [0; 1];
        matches!(self.stream.try_read(&mut probe), Err(e) if e.kind() == io::ErrorKind::WouldBlock)
    }

    async fn write(&mut self, head: &[u8], body: &[Bytes]) -> io::Result<()> {
        let mut slices: smallvec::SmallVec<[IoSlice<'_>; 12]> = std::iter::once(IoSlice::new(head))
            .chain(body.iter().map(|b| IoSlice::new(b)))
            .collect();
        let mut rest = slices.as_mut_slice();
        while !rest.is_empty() {
            // A worker that does not read for this long is as good as gone.
            let wrote = timeout(Duration::from_secs(30), self.stream.write_vectored(rest))
                .await
                .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
            if wrote == 0 && rest.iter().any(|s| !s.is_empty()) {
                return Err(io::ErrorKind::WriteZero.into());
            }
            IoSlice::advance_slices(&mut rest, wrote);
            while rest.first().is_some_and(|s| s.is_empty()) {
                rest = &mut rest[1..];
            }
        }
        Ok(())
    }

    /// Reads more of a reply; 0 is the end of the connection. Cancel-safe.
    pub(crate) async fn read(&mut self) -> io::Result<usize> {
        if self.inbox.capacity() - self.inbox.len() < 2048 {
            self.inbox.reserve(READ_BYTES);
        }
        self.stream.read_buf(&mut self.inbox).await
    }

    /// The head of a reply, interim replies skipped. Cancel-safe.
    pub(crate) async fn reply(&mut self, bodiless: bool) -> Result<ReplyHead, LegError> {
        let mut searched = 0;
        loop {
            let length =
                head::head_length(&self.inbox, searched).map_err(|_| LegError::Malformed)?;
            if let Some(length) = length {
                let bytes = self.inbox.split_to(length).freeze();
                let reply = head::reply(bytes, bodiless).map_err(|_| LegError::Malformed)?;
                // 101 is an answer too: whoever did not ask for it refuses it.
                if reply.status >= 200 || reply.status == 101 {
                    return Ok(reply);
                }
                searched = 0;
                continue;
            }
            searched = self.inbox.len();
            if self.read().await.map_err(LegError::Lost)? == 0 {
                return Err(LegError::Lost(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }

    /// Waits for the first byte of a body. Cancel-safe.
    pub(crate) async fn first_byte(&mut self, body: &BodyScanner) -> Result<(), LegError> {
        if body.is_empty() || !self.inbox.is_empty() {
            return Ok(());
        }
        match self.read().await.map_err(LegError::Lost)? {
            0 if matches!(body, BodyScanner::UntilClose) => Ok(()),
            0 => Err(LegError::Lost(io::ErrorKind::UnexpectedEof.into())),
            _ => Ok(()),
        }
    }

    /// Reads a body to its end, keeping its first `kept_max` bytes. Cancel-safe when called again with the same arguments.
    pub(crate) async fn read_body(
        &mut self,
        body: &mut BodyScanner,
        kept: &mut Vec<u8>,
        kept_max: usize,
    ) -> Result<(), LegError> {
        if body.is_empty() {
            return Ok(());
        }
        loop {
            let progress = body
                .advance(&self.inbox, |data| {
                    let room = kept_max.saturating_sub(kept.len());
                    kept.extend_from_slice(&data[..data.len().min(room)]);
                })
                .map_err(|_| LegError::Malformed)?;
            let _ = self.inbox.split_to(progress.consumed);
            if progress.done {
                return Ok(());
            }
            if self.read().await.map_err(LegError::Lost)? == 0 {
                return match body {
                    BodyScanner::UntilClose => Ok(()),
                    _ => Err(LegError::Lost(io::ErrorKind::UnexpectedEof.into())),
                };
            }
        }
    }

    /// The connection itself.
    pub(crate) fn raw(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    /// Tells the worker that nobody waits any more, and keeps listening: either it gives up and closes, or its complete
    /// answer was already on its way and says what must still be released.
    pub(crate) async fn half_close(&mut self) {
        let _ = self.stream.shutdown().await;
    }
}
