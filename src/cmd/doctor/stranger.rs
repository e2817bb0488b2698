//! What listens where something of mooncake should.
//!
//! Asks in several languages. What a stranger says is only ever shown, never believed.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::address;
use super::http::header;
use super::reach::Fault;

/// Bound of one attempt to find out what is listening.
const IDENTIFY: Duration = Duration::from_millis(900);

/// Names what listens when it is not what it should be. `how` says how the handshake ended when nothing was said.
pub(super) fn stranger(address: SocketAddr, saw: &str, how: &str) -> Fault {
    let local =
        address::is_local(address.ip()).then(|| super::sockets::listeners_on(address.port()));
    let held = local
        .into_iter()
        .flatten()
        .map(|l| l.holder)
        .find(|h| !h.is_empty());
    let held = held.map_or_else(String::new, |h| format!("; the port is held by {h}"));
    let other = |what: String| {
        let reason = format!("another program listens there: {what}{held}");
        Fault::new(
            "something_else",
            reason,
            "correct the port, or stop that program",
        )
    };
    match identify(address) {
        Some(Seen::Tls) => Fault::new(
            "tls",
            format!("speaks TLS, and this build's lanes do not{held}"),
            "connect to the port behind the TLS proxy, or take the proxy out",
        ),
        Some(Seen::Named(what)) => other(what),
        None if !saw.is_empty() => other(format!("it sent {saw}")),
        None => match how {
            "silent" => Fault::new(
                "silent",
                format!("takes connections and says nothing{held}"),
                "restart what listens there: it hangs, or it is not mooncake",
            ),
            "reset" => Fault::new(
                "reset",
                format!("takes connections and resets them{held}"),
                "look for a load balancer without a backend, or a full accept queue",
            ),
            _ => Fault::new(
                "closed",
                format!("takes connections and closes them without a word{held}"),
                "look for a load balancer without a backend, or a limit of connections",
            ),
        },
    }
}

enum Seen {
    Tls,
    Named(String),
}

/// Asks in several languages, each on a connection of its own. TLS comes first and alone: some servers serve one connection
/// after the other, and would spend the time on the questions they do not understand.
fn identify(address: SocketAddr) -> Option<Seen> {
    let ask =
        move |question: &'static [u8]| std::thread::spawn(move || exchange(address, question));
    if matches!(
        exchange(address, TLS_HELLO).get(..2),
        Some([0x15 | 0x16, 3])
    ) {
        return Some(Seen::Tls);
    }
    let banner = ask(b"");
    let http = ask(b"GET / HTTP/1.1\r\nHost: doctor\r\nConnection: close\r\n\r\n");
    let redis = ask(b"PING\r\n");
    let text = |t: std::thread::JoinHandle<Vec<u8>>| t.join().unwrap_or_default();
    let (banner, http, redis) = (text(banner), text(http), text(redis));
    let show = |bytes: &[u8]| {
        let line = bytes
            .split(|b| matches!(b, b'\r' | b'\n'))
            .next()
            .unwrap_or_default();
        String::from_utf8_lossy(&line[..line.len().min(60)]).into_owned()
    };
    if banner.starts_with(b"SSH-") {
        return Some(Seen::Named(format!("an SSH server ({})", show(&banner))));
    }
    if banner.len() > 5 && banner.get(3) == Some(&0) && banner.get(4) == Some(&10) {
        return Some(Seen::Named("a MySQL server".to_owned()));
    }
    if redis.starts_with(b"+PONG") || redis.starts_with(b"-NOAUTH") || redis.starts_with(b"-DENIED")
    {
        return Some(Seen::Named(format!(
            "a Redis server (it said {})",
            show(&redis)
        )));
    }
    if http.starts_with(b"HTTP/") {
        let text = String::from_utf8_lossy(&http).into_owned();
        let server = header(&text, "server").map_or_else(String::new, |s| format!(" by {s}"));
        return Some(Seen::Named(format!(
            "an HTTP server{server} (it said {})",
            show(&http)
        )));
    }
    let said = [&banner, &http, &redis]
        .into_iter()
        .find(|b| !b.is_empty())?;
    Some(Seen::Named(format!("it said `{}`", show(said))))
}

/// A TLS 1.2/1.3 ClientHello without extensions that need keys: whatever speaks TLS answers with a record, if only an alert.
const TLS_HELLO: &[u8] = b"\x16\x03\x01\x00\x45\x01\x00\x00\x41\x03\x03\
    mooncake doctor asks who is here\
    \x00\x00\x06\x13\x01\xc0\x2f\x00\x2f\x01\x00\
    \x00\x12\x00\x0a\x00\x04\x00\x02\x00\x17\x00\x0d\x00\x06\x00\x04\x04\x01\x08\x04";

fn exchange(address: SocketAddr, question: &[u8]) -> Vec<u8> {
    let end = Instant::now() + IDENTIFY;
    let Ok(mut stream) = TcpStream::connect_timeout(&address, IDENTIFY) else {
        return Vec::new();
    };
    let _ = stream.set_write_timeout(Some(IDENTIFY));
    if stream.write_all(question).is_err() {
        return Vec::new();
    }
    let mut bytes = Vec::new();
    let mut piece = [0; 2048];
    while bytes.len() < 4096 {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || stream.set_read_timeout(Some(left)).is_err() {
            break;
        }
        match stream.read(&mut piece) {
            Ok(n) if n > 0 => bytes.extend_from_slice(&piece[..n]),
            _ => break,
        }
        if bytes.windows(4).any(|w| w == b"\r\n\r\n") || !question.starts_with(b"GET") {
            break;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hello_is_well_formed() {
        let record = usize::from(TLS_HELLO[3]) << 8 | usize::from(TLS_HELLO[4]);
        assert_eq!(record + 5, TLS_HELLO.len());
        let body = usize::from(TLS_HELLO[7]) << 8 | usize::from(TLS_HELLO[8]);
        assert_eq!(body + 9, TLS_HELLO.len());
    }
}
