//! ZMTP 3.0 with the NULL mechanism as bytes: greeting, commands, frames. <https://rfc.zeromq.org/spec/23/>
//!
//! What both ends share. Owns no connection: how bytes come and go, and how many are taken from a peer, is the business of
//! the two that use it, the master's publisher and the proxy's subscriber.

/// Another frame of this message follows.
pub(crate) const MORE: u8 = 1;
/// The length has eight bytes.
pub(crate) const LONG: u8 = 2;
/// A command, not a message.
pub(crate) const COMMAND: u8 = 4;
/// All flags there are.
pub(crate) const FLAGS: u8 = MORE | LONG | COMMAND;
/// Bytes of a greeting.
pub(crate) const GREETING_BYTES: usize = 64;

/// What is wrong with a greeting.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadGreeting {
    /// Another protocol, or one before version 3.
    #[error("it does not speak ZMTP 3")]
    NotZmtp,
    /// CURVE, PLAIN or something else.
    #[error("it wants the security mechanism {0}; only NULL is spoken")]
    Mechanism(String),
}

/// This end's. Version 3.0: subscriptions come as messages, which every 3.x peer understands.
pub(crate) fn greeting() -> [u8; GREETING_BYTES] {
    let mut bytes = [0; GREETING_BYTES];
    bytes[0] = 0xff;
    bytes[8] = 1;
    bytes[9] = 0x7f;
    bytes[10] = 3;
    bytes[12..16].copy_from_slice(b"NULL");
    bytes
}

/// Whether a peer can be talked to.
///
/// # Errors
/// See [`BadGreeting`].
pub(crate) fn check_greeting(theirs: &[u8; GREETING_BYTES]) -> Result<(), BadGreeting> {
    if theirs[0] != 0xff || theirs[9] != 0x7f || theirs[10] < 3 {
        return Err(BadGreeting::NotZmtp);
    }
    let mechanism = theirs[12..32].split(|b| *b == 0).next().unwrap_or_default();
    if mechanism == b"NULL" {
        return Ok(());
    }
    let name = String::from_utf8_lossy(mechanism);
    Err(BadGreeting::Mechanism(name.escape_debug().to_string()))
}

/// Appends a frame.
pub(crate) fn frame(out: &mut Vec<u8>, flags: u8, body: &[u8]) {
    match u8::try_from(body.len()) {
        Ok(length) => out.extend_from_slice(&[flags, length]),
        Err(_) => {
            out.push(flags | LONG);
            out.extend_from_slice(&(body.len() as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(body);
}

/// A message of these frames.
pub(crate) fn message(parts: &[&[u8]]) -> Vec<u8> {
    let mut out = Vec::with_capacity(parts.iter().map(|p| p.len() + 9).sum());
    for (at, part) in parts.iter().enumerate() {
        let more = if at + 1 < parts.len() { MORE } else { 0 };
        frame(&mut out, more, part);
    }
    out
}

/// A command. Names are shorter than 256 bytes.
pub(crate) fn command(name: &[u8], data: &[u8]) -> Vec<u8> {
    let body = [&[name.len() as u8], name, data].concat();
    let mut out = Vec::with_capacity(body.len() + 9);
    frame(&mut out, COMMAND, &body);
    out
}

/// READY of a socket of this type.
pub(crate) fn ready(socket_type: &str) -> Vec<u8> {
    let length = (socket_type.len() as u32).to_be_bytes();
    let property = [b"\x0bSocket-Type", &length[..], socket_type.as_bytes()].concat();
    command(b"READY", &property)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_the_specification() {
        assert_eq!(check_greeting(&greeting()), Ok(()));
        let mut old = greeting();
        old[10] = 2;
        assert_eq!(check_greeting(&old), Err(BadGreeting::NotZmtp));
        let mut curve = greeting();
        curve[12..17].copy_from_slice(b"CURVE");
        let wanted = BadGreeting::Mechanism("CURVE".to_owned());
        assert_eq!(check_greeting(&curve), Err(wanted));
        assert_eq!(message(&[b"a", b""]), [MORE, 1, b'a', 0, 0]);
        let long = message(&[&[7; 256]]);
        assert_eq!(long[..10], [LONG, 0, 0, 0, 0, 0, 0, 1, 0, 7]);
        let ready = ready("PUB");
        assert_eq!(ready[..9], *b"\x04\x19\x05READY\x0b");
        assert_eq!(ready[20..], *b"\0\0\0\x03PUB");
    }
}
