//! How every lane (control and data, TCP and Unix) begins: protocol version and proof of the cluster token.
//!
//! ```text
//! client → server  magic[8] kind u8, min u8, max u8, service u8, 0[4], client id[16], nonce[32] 64 bytes
//! server → client  magic[8] status u8, version u8, 0[6], server id[16], nonce[32]              64 bytes
//! client → server  proof[32]
//! server → client  status u8, 0[7], proof[32]                                                  40 bytes
//! ```
//! Both sides prove that they know the token without sending it; a server that cannot is refused like a client.

use std::io::{self, Read, Write};

use super::id::{Id128, random_bytes};
use super::trust::{ClusterKeys, PROOF_BYTES};

/// First bytes of every lane; no HTTP method and no HTTP/2 preface begins so.
pub const MAGIC: [u8; 8] = *b"MKLANE\r\n";
/// Oldest lane protocol understood.
pub const VERSION_MIN: u8 = 1;
/// Newest lane protocol understood. History: 1 = first.
pub const VERSION_MAX: u8 = 1;
/// Length of both hellos.
pub const HELLO_BYTES: usize = 64;

const STATUS_OK: u8 = 0;
const STATUS_VERSION: u8 = 1;
const STATUS_KIND: u8 = 2;
const STATUS_TOKEN: u8 = 3;
const STATUS_BUSY: u8 = 4;

/// What a lane is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaneKind {
    /// Operations for the master.
    Control = 1,
    /// Reads and writes of a node's segments.
    Data = 2,
}

/// Which of the services of a data port a lane is for: one port may serve both. Callers that do not say, and those of before
/// there was a choice, mean whichever has the memory that they name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Service {
    /// Not said.
    #[default]
    Any = 0,
    /// Memory of a process by address.
    Peer = 1,
    /// Segments of a node of a pool.
    Node = 2,
}

impl Service {
    /// What a later version may name counts as not said.
    fn from_u8(byte: u8) -> Self {
        match byte {
            1 => Self::Peer,
            2 => Self::Node,
            _ => Self::Any,
        }
    }
}

/// Why a lane did not come up.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The connection broke or timed out.
    #[error("connection failed during the handshake: {0}")]
    Io(#[from] io::Error),
    /// Something else is listening (or calling).
    #[error("the peer does not speak the mooncake lane protocol: it sent {saw}")]
    NotMooncake {
        /// Its first bytes, printable.
        saw: String,
    },
    /// No common protocol version.
    #[error(
        "protocol versions do not meet: the peer has {peer}, this build {VERSION_MIN}..={VERSION_MAX}"
    )]
    Version {
        /// What the peer offered.
        peer: String,
    },
    /// The port serves another kind of lane.
    #[error("wrong port: {}", if *.0 == LaneKind::Control { "this is a node's data port, give the master's" } else { "this is a master's port, data goes to nodes" })]
    Kind(LaneKind),
    /// The token is missing or wrong.
    #[error(
        "the cluster token was refused: set the same token on both sides (--token-file or MOONCAKE_TOKEN)"
    )]
    Token,
    /// The server has too many lanes open.
    #[error("the peer has no free lane: raise its --max-lanes or close clients")]
    Busy,
}

/// What both sides know after the handshake.
#[derive(Clone, Copy, Debug)]
pub struct Greeting {
    /// The other side's identity.
    pub peer: Id128,
    /// The version both will speak.
    pub version: u8,
    /// What the caller wants.
    pub service: Service,
}

fn printable(bytes: &[u8]) -> String {
    let text: String = bytes
        .iter()
        .take(24)
        .flat_map(|b| std::ascii::escape_default(*b))
        .map(char::from)
        .collect();
    format!("`{text}`")
}

fn put_id(bytes: &mut [u8], id: Id128) {
    bytes[..8].copy_from_slice(&id.high.to_le_bytes());
    bytes[8..16].copy_from_slice(&id.low.to_le_bytes());
}

fn get_id(bytes: &[u8]) -> Id128 {
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default());
    Id128 {
        high: word(0),
        low: word(8),
    }
}

fn nonce_of(hello: &[u8; HELLO_BYTES]) -> [u8; PROOF_BYTES] {
    let mut nonce = [0; PROOF_BYTES];
    nonce.copy_from_slice(&hello[32..]);
    nonce
}

/// The caller's side.
///
/// # Errors
/// See [`HandshakeError`]. The stream's own timeouts bound the wait.
pub fn connect(
    stream: &mut (impl Read + Write),
    kind: LaneKind,
    me: Id128,
    keys: &ClusterKeys,
) -> Result<Greeting, HandshakeError> {
    connect_to(stream, kind, Service::Any, me, keys)
}

/// [`connect`] to one of the services of a port.
///
/// # Errors
/// As there.
pub fn connect_to(
    stream: &mut (impl Read + Write),
    kind: LaneKind,
    service: Service,
    me: Id128,
    keys: &ClusterKeys,
) -> Result<Greeting, HandshakeError> {
    let mut hello = [0u8; HELLO_BYTES];
    hello[..8].copy_from_slice(&MAGIC);
    hello[8..12].copy_from_slice(&[kind as u8, VERSION_MIN, VERSION_MAX, service as u8]);
    put_id(&mut hello[16..32], me);
    random_bytes(&mut hello[32..]);
    stream.write_all(&hello)?;

    let mut answer = [0u8; HELLO_BYTES];
    read_hello(stream, &mut answer)?;
    match answer[8] {
        STATUS_OK => {}
        STATUS_VERSION => {
            let peer = format!("version {}", answer[9]);
            return Err(HandshakeError::Version { peer });
        }
        STATUS_KIND => return Err(HandshakeError::Kind(kind)),
        STATUS_BUSY => return Err(HandshakeError::Busy),
        _ => return Err(HandshakeError::Token),
    }
    let version = answer[9];
    if !(VERSION_MIN..=VERSION_MAX).contains(&version) {
        let peer = format!("version {version}");
        return Err(HandshakeError::Version { peer });
    }
    let (mine, theirs) = (nonce_of(&hello), nonce_of(&answer));
    stream.write_all(&keys.proof(b"client", [&mine, &theirs]))?;
    let mut end = [0u8; 8 + PROOF_BYTES];
    stream.read_exact(&mut end)?;
    let mut proof = [0; PROOF_BYTES];
    proof.copy_from_slice(&end[8..]);
    let expected = keys.proof(b"server", [&mine, &theirs]);
    if end[0] != STATUS_OK || !ClusterKeys::proof_matches(&expected, &proof) {
        return Err(HandshakeError::Token);
    }
    Ok(Greeting {
        peer: get_id(&answer[16..32]),
        version,
        service,
    })
}

/// Reads a hello, and names what came instead when it is something else.
fn read_hello(stream: &mut impl Read, hello: &mut [u8; HELLO_BYTES]) -> Result<(), HandshakeError> {
    let mut have = 0;
    while have < HELLO_BYTES {
        let n = match stream.read(&mut hello[have..]) {
            Ok(0) if have == 0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e.into()),
        };
        have += n;
        let seen = have.min(MAGIC.len());
        if n == 0 || hello[..seen] != MAGIC[..seen] {
            let saw = printable(&hello[..have]);
            return Err(HandshakeError::NotMooncake { saw });
        }
    }
    Ok(())
}

/// The server's side. `busy` turns the caller away politely.
///
/// # Errors
/// See [`HandshakeError`]; the caller has been told where the protocol allows.
pub fn accept(
    stream: &mut (impl Read + Write),
    kind: LaneKind,
    me: Id128,
    keys: &ClusterKeys,
    busy: bool,
) -> Result<Greeting, HandshakeError> {
    let mut hello = [0u8; HELLO_BYTES];
    read_hello(stream, &mut hello)?;
    let version = VERSION_MAX.min(hello[10]);
    let status = if hello[8] != kind as u8 {
        STATUS_KIND
    } else if version < VERSION_MIN.max(hello[9]) {
        STATUS_VERSION
    } else if busy {
        STATUS_BUSY
    } else {
        STATUS_OK
    };
    let mut answer = [0u8; HELLO_BYTES];
    answer[..8].copy_from_slice(&MAGIC);
    answer[8] = status;
    answer[9] = if status == STATUS_OK {
        version
    } else {
        VERSION_MAX
    };
    put_id(&mut answer[16..32], me);
    random_bytes(&mut answer[32..]);
    stream.write_all(&answer)?;
    match status {
        STATUS_OK => {}
        STATUS_VERSION => {
            let peer = format!("{}..={}", hello[9], hello[10]);
            return Err(HandshakeError::Version { peer });
        }
        STATUS_BUSY => return Err(HandshakeError::Busy),
        _ => return Err(HandshakeError::Kind(kind)),
    }
    let mut proof = [0u8; PROOF_BYTES];
    stream.read_exact(&mut proof)?;
    let (theirs, mine) = (nonce_of(&hello), nonce_of(&answer));
    let good = ClusterKeys::proof_matches(&keys.proof(b"client", [&theirs, &mine]), &proof);
    let mut end = [0u8; 8 + PROOF_BYTES];
    end[0] = if good { STATUS_OK } else { STATUS_TOKEN };
    if good {
        end[8..].copy_from_slice(&keys.proof(b"server", [&theirs, &mine]));
    }
    stream.write_all(&end)?;
    if !good {
        return Err(HandshakeError::Token);
    }
    Ok(Greeting {
        peer: get_id(&hello[16..32]),
        version,
        service: Service::from_u8(hello[11]),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::trust::Token;
    use std::os::unix::net::UnixStream;

    fn shake(
        client: Option<&str>,
        server: Option<&str>,
        kind: LaneKind,
    ) -> (
        Result<Greeting, HandshakeError>,
        Result<Greeting, HandshakeError>,
    ) {
        let (mut a, mut b) = UnixStream::pair().unwrap();
        let keys = |t: Option<&str>| ClusterKeys::derive(t.and_then(Token::new).as_ref());
        let (ck, sk) = (keys(client), keys(server));
        let id = Id128 { high: 1, low: 2 };
        let server = std::thread::spawn(move || {
            accept(
                &mut b,
                LaneKind::Data,
                Id128 { high: 3, low: 4 },
                &sk,
                false,
            )
        });
        let client = connect(&mut a, kind, id, &ck);
        drop(a);
        (client, server.join().unwrap())
    }

    #[test]
    fn both_sides_agree() {
        let (c, s) = shake(Some("t"), Some("t"), LaneKind::Data);
        assert_eq!(c.unwrap().peer, Id128 { high: 3, low: 4 });
        assert_eq!(s.unwrap().peer, Id128 { high: 1, low: 2 });
    }

    #[test]
    fn a_service_is_named_and_need_not_be() {
        let keys = ClusterKeys::derive(None);
        for service in [Service::Any, Service::Peer, Service::Node] {
            let (mut a, mut b) = UnixStream::pair().unwrap();
            let theirs = keys.clone();
            let server = std::thread::spawn(move || {
                accept(&mut b, LaneKind::Data, Id128::NONE, &theirs, false)
            });
            connect_to(&mut a, LaneKind::Data, service, Id128::NONE, &keys).unwrap();
            assert_eq!(server.join().unwrap().unwrap().service, service);
        }
        assert_eq!(Service::from_u8(77), Service::Any, "of a later version");
    }

    #[test]
    fn wrong_token_and_kind() {
        for (a, b) in [(Some("x"), Some("t")), (None, Some("t")), (Some("x"), None)] {
            let (c, s) = shake(a, b, LaneKind::Data);
            assert!(matches!(c, Err(HandshakeError::Token)));
            assert!(matches!(s, Err(HandshakeError::Token)));
        }
        let (c, _) = shake(None, None, LaneKind::Control);
        assert!(matches!(c, Err(HandshakeError::Kind(LaneKind::Control))));
    }

    #[test]
    fn another_program_is_named() {
        let (mut a, mut b) = UnixStream::pair().unwrap();
        a.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let keys = ClusterKeys::derive(None);
        let e = accept(&mut b, LaneKind::Data, Id128::NONE, &keys, false).unwrap_err();
        assert!(e.to_string().contains("GET / HTTP/1.1"), "{e}");
    }

    #[test]
    fn another_version_is_named() {
        let (mut a, mut b) = UnixStream::pair().unwrap();
        let mut hello = [0u8; HELLO_BYTES];
        hello[..8].copy_from_slice(&MAGIC);
        hello[8..11].copy_from_slice(&[2, 7, 9]);
        a.write_all(&hello).unwrap();
        let keys = ClusterKeys::derive(None);
        let e = accept(&mut b, LaneKind::Data, Id128::NONE, &keys, false).unwrap_err();
        assert!(e.to_string().contains("7..=9"), "{e}");
    }
}
