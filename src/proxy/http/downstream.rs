//! The client's connection: one request after the other, and the news that the client has gone.
//!
//! Owns reading heads and bodies under deadlines, and writing. A client that closes its side, or only its sending side,
//! has gone: nobody will read the answer, so the workers should stop. Knows no worker.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::time::timeout;

use super::bodies::{Bodies, LONG_BYTES, LONG_BYTES_MAX};
use super::chunked::BodyScanner;
use super::head::{self, HeadError, RequestHead};

/// Most bytes a client may send ahead while its request is under way.
const AHEAD_BYTES_MAX: usize = 64 << 10;
/// How long a refused client may take to read why.
const LINGER: Duration = Duration::from_millis(500);

/// Bounds of a client's connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClientLimits {
    /// Between two requests.
    pub(crate) keep_alive: Duration,
    /// From the first byte of a head to its last.
    pub(crate) head: Duration,
    /// Without progress while a body is read or an answer written.
    pub(crate) stall: Duration,
    /// Largest body.
    pub(crate) body_bytes_max: usize,
}

/// Why no request came.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReceiveError {
    #[error("the client has gone")]
    Gone,
    #[error("the client is too slow")]
    Slow,
    #[error(transparent)]
    Head(#[from] HeadError),
    #[error("malformed chunk framing")]
    Chunk,
    #[error("the request body is too large")]
    TooLarge,
}

/// A client.
pub(crate) struct Downstream {
    stream: TcpStream,
    inbox: BytesMut,
    limits: ClientLimits,
    bodies: Arc<Bodies>,
}

/// Slowest pace of a body, in bytes per second, beyond what may come late. A byte now and then is no progress.
const PACE: u64 = 1024;

/// How long a body may still take.
struct Pace {
    begun: Instant,
    stall: Duration,
}

impl Pace {
    /// Bounds the next read after so many bytes.
    fn next(&self, received: usize) -> Duration {
        let earned = Duration::from_millis(received as u64 * 1000 / PACE);
        let end = self.stall.saturating_add(earned);
        self.stall.min(end.saturating_sub(self.begun.elapsed()))
    }
}

impl Downstream {
    fn pace(&self) -> Pace {
        Pace {
            begun: Instant::now(),
            stall: self.limits.stall,
        }
    }

    pub(crate) fn new(stream: TcpStream, limits: ClientLimits, bodies: Arc<Bodies>) -> Self {
        let _ = stream.set_nodelay(true);
        Self {
            stream,
            inbox: BytesMut::new(),
            limits,
            bodies,
        }
    }

    async fn more(&mut self) -> Result<(), ReceiveError> {
        self.inbox.reserve(4096);
        match self.stream.read_buf(&mut self.inbox).await {
            Ok(0) | Err(_) => Err(ReceiveError::Gone),
            Ok(_) => Ok(()),
        }
    }

    /// The next head; waits for it as long as connections are kept alive.
    pub(crate) async fn next_head(&mut self) -> Result<RequestHead, ReceiveError> {
        // Empty lines before a request are allowed and skipped.
        loop {
            while self.inbox.starts_with(b"\r\n") {
                self.inbox.advance(2);
            }
            if !self.inbox.is_empty() && self.inbox.as_ref() != b"\r" {
                break;
            }
            timeout(self.limits.keep_alive, self.more())
                .await
                .map_err(|_| ReceiveError::Gone)??;
        }
        if let Some(head) = self.buffered_head(0)? {
            return Ok(head);
        }
        let limit = self.limits.head;
        timeout(limit, async {
            loop {
                let searched = self.inbox.len();
                self.more().await?;
                if let Some(head) = self.buffered_head(searched)? {
                    return Ok(head);
                }
            }
        })
        .await
        .map_err(|_| ReceiveError::Slow)?
    }

    fn buffered_head(&mut self, searched: usize) -> Result<Option<RequestHead>, ReceiveError> {
        let Some(length) = head::head_length(&self.inbox, searched)? else {
            return Ok(None);
        };
        Ok(Some(head::request(self.inbox.split_to(length).freeze())?))
    }

    /// The body that belongs to a head.
    pub(crate) async fn body(&mut self, head: &mut RequestHead) -> Result<Bytes, ReceiveError> {
        let max = self.limits.body_bytes_max;
        match &mut head.body {
            BodyScanner::Length(0) | BodyScanner::UntilClose => Ok(Bytes::new()),
            BodyScanner::Length(length) => {
                let wanted = usize::try_from(*length).unwrap_or(usize::MAX);
                if wanted > max {
                    return Err(ReceiveError::TooLarge);
                }
                self.allow(head.expects_continue).await?;
                if (LONG_BYTES..=LONG_BYTES_MAX).contains(&wanted) {
                    return self.long(wanted).await;
                }
                self.fill(wanted).await?;
                Ok(self.inbox.split_to(wanted).freeze())
            }
            BodyScanner::Chunked(_) => {
                self.allow(head.expects_continue).await?;
                self.chunked(&mut head.body, max).await
            }
        }
    }

    async fn allow(&mut self, expected: bool) -> Result<(), ReceiveError> {
        if expected && self.inbox.is_empty() {
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                .await
                .map_err(|_| ReceiveError::Gone)?;
        }
        Ok(())
    }

    /// A long body, into memory that may have served before: what has come of it with the head is copied, the rest is not.
    async fn long(&mut self, wanted: usize) -> Result<Bytes, ReceiveError> {
        let mut body = self.bodies.take(wanted);
        let pace = self.pace();
        let here = self.inbox.len().min(wanted);
        body.extend_from_slice(&self.inbox.split_to(here));
        while body.len() < wanted {
            let missing = wanted - body.len();
            let mut room = (&mut body).limit(missing);
            let within = pace.next(wanted - missing);
            let read = timeout(within, self.stream.read_buf(&mut room))
                .await
                .map_err(|_| ReceiveError::Slow)?;
            if !matches!(read, Ok(n) if n > 0) {
                return Err(ReceiveError::Gone);
            }
        }
        let whole = body.split_to(wanted).freeze();
        self.bodies.give(body);
        Ok(whole)
    }

    async fn fill(&mut self, wanted: usize) -> Result<(), ReceiveError> {
        // Room for all of it at once where that is little: untouched memory costs nothing, and nothing is copied again. Beyond
        // that it grows with what has come, not with what was announced.
        self.inbox
            .reserve(wanted.saturating_sub(self.inbox.len()).min(LONG_BYTES_MAX));
        let pace = self.pace();
        while self.inbox.len() < wanted {
            let missing = wanted - self.inbox.len();
            self.inbox
                .reserve(missing.min(self.inbox.len().max(64 << 10)));
            let within = pace.next(self.inbox.len());
            let read = timeout(within, self.stream.read_buf(&mut self.inbox))
                .await
                .map_err(|_| ReceiveError::Slow)?;
            if !matches!(read, Ok(n) if n > 0) {
                return Err(ReceiveError::Gone);
            }
        }
        Ok(())
    }

    async fn chunked(&mut self, body: &mut BodyScanner, max: usize) -> Result<Bytes, ReceiveError> {
        let mut payload = BytesMut::new();
        // Framing is paid for too: a body of one-byte chunks is no way around the limit.
        let mut wire = 0;
        let pace = self.pace();
        loop {
            let progress = body
                .advance(&self.inbox, |data| payload.extend_from_slice(data))
                .map_err(|_| ReceiveError::Chunk)?;
            self.inbox.advance(progress.consumed);
            wire += progress.consumed;
            if payload.len() > max || wire > max.saturating_mul(8).saturating_add(1 << 20) {
                return Err(ReceiveError::TooLarge);
            }
            if progress.done {
                return Ok(payload.freeze());
            }
            timeout(pace.next(payload.len()), self.more())
                .await
                .map_err(|_| ReceiveError::Slow)??;
        }
    }

    /// Ends when the client has gone. Cancel-safe: what it sends ahead is kept.
    pub(crate) async fn gone(&mut self) {
        let (reader, _) = self.stream.split();
        watch(&reader, &mut self.inbox).await;
    }

    /// The two directions: one to watch, one to write.
    pub(crate) fn halves(&mut self) -> (ClientWatch<'_>, ClientWriter<'_>) {
        let (reader, writer) = self.stream.split();
        let watch = ClientWatch {
            reader,
            inbox: &mut self.inbox,
        };
        (
            watch,
            ClientWriter {
                writer,
                stall: self.limits.stall,
            },
        )
    }

    /// The connection itself, and what has come on it already.
    pub(crate) fn raw(&mut self) -> (&mut TcpStream, BytesMut) {
        (&mut self.stream, self.inbox.split())
    }

    /// Writes all of `bytes`, each step within the stall limit.
    pub(crate) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let (_, mut writer) = self.halves();
        writer.write(bytes).await
    }

    /// Closes after a refusal: reads what the client still sends for a moment, so that a reset does not destroy the answer.
    pub(crate) async fn linger(mut self) {
        let _ = self.stream.shutdown().await;
        let mut sink = vec![0; 16 << 10];
        let _ = timeout(LINGER, async {
            for _ in 0..4096 {
                if !matches!(self.stream.read(&mut sink).await, Ok(n) if n > 0) {
                    break;
                }
            }
        })
        .await;
    }

    /// Ends the sending side.
    pub(crate) async fn finish(mut self) {
        let _ = timeout(LINGER, self.stream.shutdown()).await;
    }
}

async fn watch(reader: &ReadHalf<'_>, inbox: &mut BytesMut) {
    loop {
        if inbox.len() >= AHEAD_BYTES_MAX {
            // Bounded: a client that sends this much ahead is found out by the next write to it.
            return std::future::pending().await;
        }
        if reader.readable().await.is_err() {
            return;
        }
        inbox.reserve(1024);
        match reader.try_read_buf(inbox) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
}

/// The receiving side while an answer is written.
pub(crate) struct ClientWatch<'a> {
    reader: ReadHalf<'a>,
    inbox: &'a mut BytesMut,
}

impl ClientWatch<'_> {
    /// Ends when the client has gone. Cancel-safe.
    pub(crate) async fn gone(&mut self) {
        watch(&self.reader, self.inbox).await;
    }
}

/// The sending side.
pub(crate) struct ClientWriter<'a> {
    writer: WriteHalf<'a>,
    stall: Duration,
}

impl ClientWriter<'_> {
    /// Writes all of `bytes`, each step within the stall limit.
    pub(crate) async fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.writer.try_write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    timeout(self.stall, self.writer.writable())
                        .await
                        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
