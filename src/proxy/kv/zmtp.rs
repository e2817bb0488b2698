//! The client's side of ZMTP 3.x over TCP, as far as an event stream needs it: SUB and DEALER, mechanism NULL.
//!
//! Owns greeting, handshake and framing. A connection that breaks is an error and stays broken; whoever uses it connects
//! anew. Knows nothing of what messages mean.

use std::io;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use smallvec::SmallVec;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::base::zmtp::{self as wire, BadGreeting, COMMAND, FLAGS, GREETING_BYTES, LONG, MORE};

/// Connecting and the handshake together.
const OPEN_TIMEOUT: Duration = Duration::from_secs(3);
/// Sending a few bytes.
const SEND_TIMEOUT: Duration = Duration::from_secs(3);
/// Largest message. A step of an engine that stores 100,000 blocks of 16 tokens takes about 10 MiB.
const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// Most frames of a message.
const FRAMES_MAX: usize = 8;
const READ_BYTES: usize = 64 << 10;

/// Why a connection cannot be used (any more).
#[derive(Debug, thiserror::Error)]
pub(crate) enum ZmtpError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("no answer in time")]
    Timeout,
    #[error("{0}")]
    Greeting(#[from] BadGreeting),
    #[error("a message is malformed or too large")]
    Malformed,
}

/// What this end is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Sub,
    Dealer,
    Router,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Sub => "SUB",
            Self::Dealer => "DEALER",
            Self::Router => "ROUTER",
        }
    }
}

/// The frames of a message.
pub(crate) type Message = SmallVec<[Bytes; 4]>;

/// A connection.
#[derive(Debug)]
pub(crate) struct Socket {
    stream: TcpStream,
    inbox: BytesMut,
    /// Frames of a message that is not complete yet.
    frames: Message,
    bytes: usize,
    bytes_max: usize,
}

/// A whole frame of at most `bytes_max` from what has come, taken off it.
pub(crate) fn next_frame(
    inbox: &mut BytesMut,
    bytes_max: usize,
) -> Result<Option<(u8, Bytes)>, ZmtpError> {
    let Some(&flags) = inbox.first() else {
        return Ok(None);
    };
    if flags & !FLAGS != 0 {
        return Err(ZmtpError::Malformed);
    }
    let (head, length) = if flags & LONG == 0 {
        let Some(&length) = inbox.get(1) else {
            return Ok(None);
        };
        (2, usize::from(length))
    } else {
        let Some(length) = inbox.get(1..9).and_then(|l| l.try_into().ok()) else {
            return Ok(None);
        };
        let length = usize::try_from(u64::from_be_bytes(length));
        (9, length.map_err(|_| ZmtpError::Malformed)?)
    };
    if length > bytes_max {
        return Err(ZmtpError::Malformed);
    }
    if inbox.len() < head + length {
        return Ok(None);
    }
    inbox.advance(head);
    Ok(Some((flags, inbox.split_to(length).freeze())))
}

impl Socket {
    /// Connects and shakes hands.
    ///
    /// # Errors
    /// See [`ZmtpError`]; at the latest after 3 s.
    pub(crate) async fn connect(target: &(String, u16), kind: Kind) -> Result<Self, ZmtpError> {
        let opening = async {
            let stream = TcpStream::connect((target.0.as_str(), target.1)).await?;
            let _ = stream.set_nodelay(true);
            // A publisher is silent when it has nothing to say: only the kernel can find out that its host has gone.
            let alive = socket2::TcpKeepalive::new()
                .with_time(Duration::from_secs(10))
                .with_interval(Duration::from_secs(5))
                .with_retries(3);
            let _ = socket2::SockRef::from(&stream).set_tcp_keepalive(&alive);
            Self::open(stream, kind, MESSAGE_BYTES_MAX).await
        };
        timeout(OPEN_TIMEOUT, opening)
            .await
            .unwrap_or(Err(ZmtpError::Timeout))
    }

    /// Shakes hands with a peer that has connected; its messages may have `bytes_max`.
    ///
    /// # Errors
    /// See [`ZmtpError`]; at the latest after 3 s.
    pub(crate) async fn accept(stream: TcpStream, bytes_max: usize) -> Result<Self, ZmtpError> {
        timeout(OPEN_TIMEOUT, Self::open(stream, Kind::Router, bytes_max))
            .await
            .unwrap_or(Err(ZmtpError::Timeout))
    }

    async fn open(stream: TcpStream, kind: Kind, bytes_max: usize) -> Result<Self, ZmtpError> {
        let mut socket = Self {
            stream,
            inbox: BytesMut::new(),
            frames: Message::new(),
            bytes: 0,
            bytes_max,
        };
        socket.shake_hands(kind).await?;
        Ok(socket)
    }

    async fn shake_hands(&mut self, kind: Kind) -> Result<(), ZmtpError> {
        self.stream.write_all(&wire::greeting()).await?;
        while self.inbox.len() < GREETING_BYTES {
            self.read().await?;
        }
        let mut theirs = [0; GREETING_BYTES];
        self.inbox.copy_to_slice(&mut theirs);
        wire::check_greeting(&theirs)?;
        self.stream.write_all(&wire::ready(kind.name())).await?;
        loop {
            if let Some((flags, body)) = next_frame(&mut self.inbox, self.bytes_max)? {
                return if flags & COMMAND != 0 && body.starts_with(b"\x05READY") {
                    Ok(())
                } else {
                    Err(BadGreeting::NotZmtp.into())
                };
            }
            self.read().await?;
        }
    }

    async fn read(&mut self) -> Result<(), ZmtpError> {
        self.inbox.reserve(READ_BYTES);
        match self.stream.read_buf(&mut self.inbox).await? {
            0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            _ => Ok(()),
        }
    }

    /// Subscribes to messages whose first frame begins with `topic`.
    ///
    /// # Errors
    /// When the connection is broken.
    pub(crate) async fn subscribe(&mut self, topic: &[u8]) -> Result<(), ZmtpError> {
        self.send(&[&[b"\x01", topic].concat()]).await
    }

    /// Sends a message.
    ///
    /// # Errors
    /// When the connection is broken. Not cancel-safe: half a message may be on its way.
    pub(crate) async fn send(&mut self, frames: &[&[u8]]) -> Result<(), ZmtpError> {
        self.write(&wire::message(frames)).await
    }

    async fn write(&mut self, out: &[u8]) -> Result<(), ZmtpError> {
        timeout(SEND_TIMEOUT, self.stream.write_all(out))
            .await
            .map_err(|_| ZmtpError::Timeout)??;
        Ok(())
    }

    /// The next message. Cancel-safe but for the answer to a ping.
    ///
    /// # Errors
    /// When the connection is broken or a message is malformed.
    pub(crate) async fn receive(&mut self) -> Result<Message, ZmtpError> {
        loop {
            while let Some((flags, body)) = next_frame(&mut self.inbox, self.bytes_max)? {
                if flags & COMMAND != 0 {
                    self.command(&body).await?;
                    continue;
                }
                self.bytes += body.len();
                self.frames.push(body);
                if self.frames.len() > FRAMES_MAX || self.bytes > self.bytes_max {
                    return Err(ZmtpError::Malformed);
                }
                if flags & MORE == 0 {
                    self.bytes = 0;
                    return Ok(std::mem::take(&mut self.frames));
                }
            }
            self.read().await?;
        }
    }

    /// `PING`, two bytes of time to live, context: answered with the context. Other commands are passed over.
    async fn command(&mut self, body: &[u8]) -> Result<(), ZmtpError> {
        let Some(context) = body.strip_prefix(b"\x04PING").and_then(|b| b.get(2..)) else {
            return Ok(());
        };
        let context = context.get(..16).unwrap_or(context);
        self.write(&wire::command(b"PONG", context)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    /// What a publisher sends after the handshake, in pieces of `step` bytes, and what was received of it.
    async fn received(bytes: Vec<u8>, step: usize) -> Vec<Result<Message, ZmtpError>> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut out = wire::greeting().to_vec();
            out.extend(wire::ready("PUB"));
            out.extend(bytes);
            for piece in out.chunks(step) {
                stream.write_all(piece).await.unwrap();
            }
            let mut sink = Vec::new();
            let _ = timeout(Duration::from_millis(50), stream.read_to_end(&mut sink)).await;
        });
        let target = ("127.0.0.1".to_owned(), port);
        let mut socket = Socket::connect(&target, Kind::Sub).await.unwrap();
        socket.subscribe(b"").await.unwrap();
        let mut all = Vec::new();
        loop {
            all.push(socket.receive().await);
            if matches!(all.last(), Some(Err(_))) {
                return all;
            }
        }
    }

    #[tokio::test]
    async fn messages_whole_and_in_pieces() {
        let mut out = Vec::new();
        wire::frame(&mut out, MORE, b"topic");
        wire::frame(&mut out, COMMAND, b"\x04PING\0\x0acontext");
        wire::frame(&mut out, 0, &[7; 300]);
        wire::frame(&mut out, 0, b"");
        for step in [1, 13, 100_000] {
            let all = received(out.clone(), step).await;
            let first: Vec<usize> = all[0].as_ref().unwrap().iter().map(Bytes::len).collect();
            assert_eq!(first, [5, 300]);
            assert_eq!(all[1].as_ref().unwrap().len(), 1);
            assert!(matches!(all[2], Err(ZmtpError::Io(_))));
        }
    }

    #[tokio::test]
    async fn strangers_and_excess_are_refused() {
        let long = [&[LONG][..], &u64::MAX.to_be_bytes()].concat();
        for bad in [vec![0x80, 0], long, [MORE, 1, 0].repeat(FRAMES_MAX + 2)] {
            let all = received(bad, 7).await;
            assert!(matches!(all[0], Err(ZmtpError::Malformed)), "{all:?}");
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = (
            "127.0.0.1".to_owned(),
            listener.local_addr().unwrap().port(),
        );
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.write_all(&[b'H'; 64]).await;
            let mut sink = Vec::new();
            let _ = stream.read_to_end(&mut sink).await;
        });
        let error = Socket::connect(&target, Kind::Sub).await.unwrap_err();
        assert!(matches!(error, ZmtpError::Greeting(BadGreeting::NotZmtp)));
    }
}
