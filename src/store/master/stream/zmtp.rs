//! The server's side of ZMTP: greets whoever connects and takes what it sends (`base::zmtp` has the bytes).
//!
//! Knows frames and socket types, not what is published. Everything a peer sends is bounded.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::base::zmtp::{self as wire, COMMAND, FLAGS, GREETING_BYTES, LONG, MORE};
pub(super) use crate::base::zmtp::{command, message};

/// Largest frame taken from a peer: they send subscriptions and numbers.
const FRAME_MAX: u64 = 4096;
/// Frames of one message of a peer.
const PARTS_MAX: usize = 8;
const HANDSHAKE: Duration = Duration::from_secs(5);

/// What a peer sent.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Incoming {
    /// The frames of a message.
    Message(Vec<Vec<u8>>),
    /// A command's name and data.
    Command(Vec<u8>, Vec<u8>),
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// Greets a peer and returns its socket type; `answer` says which one this side is to such a peer.
///
/// # Errors
/// When the peer speaks something else, has no counterpart here, or takes longer than five seconds.
pub(super) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    answer: fn(&[u8]) -> Option<&'static str>,
) -> io::Result<Vec<u8>> {
    let greeted = tokio::time::timeout(HANDSHAKE, handshake(stream, answer)).await;
    greeted.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    answer: fn(&[u8]) -> Option<&'static str>,
) -> io::Result<Vec<u8>> {
    stream.write_all(&wire::greeting()).await?;
    let mut theirs = [0; GREETING_BYTES];
    stream.read_exact(&mut theirs).await?;
    wire::check_greeting(&theirs).map_err(|e| bad(&e.to_string()))?;
    let Incoming::Command(name, data) = receive(stream).await? else {
        return Err(bad("a message before READY"));
    };
    if name != b"READY" {
        return Err(bad("another command before READY"));
    }
    let kind = property(&data, b"Socket-Type").ok_or_else(|| bad("READY without Socket-Type"))?;
    let mine = answer(&kind).ok_or_else(|| bad("a socket type that has no counterpart here"))?;
    stream.write_all(&wire::ready(mine)).await?;
    Ok(kind)
}

/// The value of a property of READY.
fn property(mut data: &[u8], wanted: &[u8]) -> Option<Vec<u8>> {
    loop {
        let (length, rest) = data.split_first()?;
        let (name, rest) = rest.split_at_checked(usize::from(*length))?;
        let (size, rest) = rest.split_at_checked(4)?;
        let size = u32::from_be_bytes(size.try_into().ok()?);
        let (value, rest) = rest.split_at_checked(size as usize)?;
        if name.eq_ignore_ascii_case(wanted) {
            return Some(value.to_vec());
        }
        data = rest;
    }
}

/// Receives one message or command. Not cancel-safe.
///
/// # Errors
/// When the peer is gone or sends what is too large or no frame.
pub(super) async fn receive<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<Incoming> {
    let mut parts = Vec::new();
    loop {
        let flags = stream.read_u8().await?;
        let length = if flags & LONG != 0 {
            stream.read_u64().await?
        } else {
            u64::from(stream.read_u8().await?)
        };
        if length > FRAME_MAX || flags & !FLAGS != 0 || parts.len() >= PARTS_MAX {
            return Err(bad("a frame that is too large or malformed"));
        }
        let mut body = vec![0; length as usize];
        stream.read_exact(&mut body).await?;
        if flags & COMMAND != 0 {
            let (name_length, rest) = body.split_first().ok_or_else(|| bad("an empty command"))?;
            let (name, data) = rest
                .split_at_checked(usize::from(*name_length))
                .ok_or_else(|| bad("a command that is cut short"))?;
            return Ok(Incoming::Command(name.to_vec(), data.to_vec()));
        }
        parts.push(body);
        if flags & MORE == 0 {
            return Ok(Incoming::Message(parts));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(future)
    }

    #[test]
    fn what_is_sent_can_be_received() {
        let long = vec![7; 300];
        let bytes = message(&[b"", b"ab", &long]);
        let got = block_on(receive(&mut bytes.as_slice())).unwrap();
        assert_eq!(
            got,
            Incoming::Message(vec![vec![], b"ab".to_vec(), long.clone()])
        );
        let bytes = command(b"PING", b"\0\x0actx");
        let got = block_on(receive(&mut bytes.as_slice())).unwrap();
        assert_eq!(
            got,
            Incoming::Command(b"PING".to_vec(), b"\0\x0actx".to_vec())
        );
    }

    #[test]
    fn malformed_input_is_an_error() {
        for bytes in [
            &[2, 0, 0, 0, 0, 0, 1, 0, 0][..],
            &[9, 0],
            &[4, 0],
            &[4, 2, 9, 9],
            &[0, 5, 1],
            &[1, 0].repeat(20),
        ] {
            assert!(block_on(receive(&mut &bytes[..])).is_err(), "{bytes:?}");
        }
        assert_eq!(
            property(b"\x0bSocket-Type\0\0\0\xffXX", b"socket-type"),
            None
        );
        assert_eq!(
            property(b"\x01a\0\0\0\0\x0bSocket-Type\0\0\0\x03SUB", b"socket-type"),
            Some(b"SUB".to_vec())
        );
    }
}
