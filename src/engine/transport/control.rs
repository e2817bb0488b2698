//! Length-prefixed messages over a stream, blocking, in the caller's thread: what control lanes are made of. Knows
//! nothing of what the messages say.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::socket::{Socket, Timed, Until};

/// A stream of messages, each behind its length (u32, little-endian).
#[derive(Debug)]
pub struct ControlSocket {
    socket: Socket,
    local: bool,
}

impl ControlSocket {
    /// Takes a connected stream.
    ///
    /// # Errors
    /// When its options cannot be set.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        Ok(Self {
            socket: Socket::from_tcp(stream)?,
            local: false,
        })
    }

    /// Takes a connected Unix stream.
    ///
    /// # Errors
    /// When its options cannot be set.
    pub fn from_unix(stream: UnixStream) -> io::Result<Self> {
        Ok(Self {
            socket: Socket::from_unix(stream)?,
            local: true,
        })
    }

    /// Connects to an abstract Unix socket of this user or of root.
    ///
    /// # Errors
    /// From the system; `PermissionDenied` when another user listens there.
    pub fn connect_unix(name: &str) -> io::Result<Self> {
        let socket = Socket::connect_unix(name)?;
        let peer = rustix::net::sockopt::socket_peercred(socket.fd())?;
        if peer.uid != rustix::process::geteuid() && !peer.uid.is_root() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Ok(Self {
            socket,
            local: true,
        })
    }

    /// Whether the peer is on this host and spoken to without a network.
    pub fn is_local(&self) -> bool {
        self.local
    }

    /// Connects.
    ///
    /// # Errors
    /// From the system.
    pub fn connect(address: SocketAddr, timeout: Duration) -> io::Result<Self> {
        Ok(Self {
            socket: Socket::connect_tcp(address, timeout)?,
            local: false,
        })
    }

    /// The stream for a handshake that ends by `deadline`.
    pub fn timed(&mut self, deadline: Instant) -> impl io::Read + io::Write + '_ {
        Timed {
            socket: &mut self.socket,
            deadline,
        }
    }

    /// Whether the peer has closed the lane.
    pub fn is_spent(&self) -> bool {
        self.socket.is_spent()
    }

    /// Whether the next message has arrived whole already.
    pub fn has_message(&self) -> bool {
        self.socket
            .peek_u32()
            .is_some_and(|length| self.socket.buffered() >= 4 + length as usize)
    }

    /// Sends bytes that begin with their length.
    ///
    /// # Errors
    /// From the system, `TimedOut` at the deadline.
    pub fn send(&mut self, framed: &[u8], deadline: Instant) -> io::Result<()> {
        self.socket
            .write_all_from(framed, &[], Until::Deadline(deadline))
    }

    /// The next message.
    ///
    /// # Errors
    /// `UnexpectedEof` when the peer closed, `InvalidData` for a length beyond `most`, `TimedOut`.
    pub fn receive(&mut self, most: usize, deadline: Instant) -> io::Result<Bytes> {
        let since = Instant::now();
        self.socket.watch(since);
        let message = self.message(most, Until::Deadline(deadline), deadline)?;
        self.socket.heard(since);
        message.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    /// The next message, waiting without end for its first byte; `None` when the peer closed.
    ///
    /// # Errors
    /// As [`ControlSocket::receive`].
    pub fn receive_idle(&mut self, most: usize, stall: Duration) -> io::Result<Option<Bytes>> {
        let since = Instant::now();
        self.socket.watch(since);
        if !self.socket.need_or_end(1, Until::Idle)? {
            return Ok(None);
        }
        self.socket.heard(since);
        let deadline = Instant::now() + stall;
        self.message(most, Until::Deadline(deadline), deadline)
    }

    fn message(
        &mut self,
        most: usize,
        until: Until,
        deadline: Instant,
    ) -> io::Result<Option<Bytes>> {
        if !self.socket.need_or_end(4, until)? {
            return Ok(None);
        }
        let mut length = [0; 4];
        length.copy_from_slice(self.socket.take(4));
        let length = u32::from_le_bytes(length) as usize;
        if length > most {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a message of {length} bytes is larger than the {most} allowed"),
            ));
        }
        self.socket.need(length, Until::Deadline(deadline))?;
        let message = Bytes::copy_from_slice(self.socket.take(length));
        self.socket.shrink();
        Ok(Some(message))
    }
}
