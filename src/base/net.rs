//! Addresses: what a host listens on and how others reach it. IPv4 and IPv6 alike.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};

/// Splits `host:port`, `[v6]:port`, or a bare host with `default_port`.
///
/// # Errors
/// One line that says what an address looks like.
pub fn split_host_port(text: &str, default_port: u16) -> Result<(String, u16), String> {
    let wrong = || format!("`{text}` is not an address: write HOST:PORT or [IPV6]:PORT");
    let text = text.trim();
    if text.is_empty() {
        return Err(wrong());
    }
    if let Some(rest) = text.strip_prefix('[') {
        let (host, after) = rest.split_once(']').ok_or_else(wrong)?;
        let port = match after.strip_prefix(':') {
            Some(port) => port.parse().map_err(|_| wrong())?,
            None if after.is_empty() => default_port,
            None => return Err(wrong()),
        };
        return Ok((host.to_owned(), port));
    }
    match text.rsplit_once(':') {
        // More than one colon without brackets: a bare IPv6 address.
        Some((head, _)) if head.contains(':') => Ok((text.to_owned(), default_port)),
        Some((host, port)) if !host.is_empty() => {
            Ok((host.to_owned(), port.parse().map_err(|_| wrong())?))
        }
        Some(_) => Err(wrong()),
        None => Ok((text.to_owned(), default_port)),
    }
}

/// `host:port`, with brackets where the host is an IPv6 address.
pub fn join_host_port(host: &str, port: u16) -> String {
    if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

/// Resolves a name to its first address.
///
/// # Errors
/// From the resolver, with the name in the message.
pub fn resolve_one(address: &str) -> io::Result<SocketAddr> {
    address
        .to_socket_addrs()
        .map_err(|e| io::Error::new(e.kind(), format!("cannot resolve `{address}`: {e}")))?
        .next()
        .ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("`{address}` has no address"),
            )
        })
}

/// The address others should use for a listener: a wildcard becomes this host's outgoing address.
pub fn advertised(listener: SocketAddr, toward: Option<SocketAddr>) -> SocketAddr {
    if !listener.ip().is_unspecified() {
        return listener;
    }
    // Toward a peer on this host the kernel would name loopback, which is no address for others: ask for the way out
    // instead (TEST-NET-1; nothing is sent).
    let elsewhere = "192.0.2.1:9".parse().ok();
    let source = toward
        .filter(|peer| !peer.ip().is_loopback())
        .or(elsewhere)
        .and_then(source_address)
        .unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    SocketAddr::new(source, listener.port())
}

/// Which local address the kernel would use to reach `peer`. Sends nothing.
fn source_address(peer: SocketAddr) -> Option<IpAddr> {
    let any = if peer.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    };
    let socket = std::net::UdpSocket::bind(any).ok()?;
    socket.connect(peer).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// Names this host for same-host detection: one boot of one kernel.
pub fn host_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_or_else(|_| "unknown".to_owned(), |s| s.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits() {
        assert_eq!(split_host_port("h:1", 9), Ok(("h".into(), 1)));
        assert_eq!(split_host_port("h", 9), Ok(("h".into(), 9)));
        assert_eq!(split_host_port("[::1]:5", 9), Ok(("::1".into(), 5)));
        assert_eq!(split_host_port("::1", 9), Ok(("::1".into(), 9)));
        assert_eq!(split_host_port("[::1]", 9), Ok(("::1".into(), 9)));
        for bad in ["", ":1", "h:x", "h:70000", "[::1", "[::1]x"] {
            assert!(split_host_port(bad, 9).is_err(), "{bad}");
        }
        assert_eq!(join_host_port("::1", 5), "[::1]:5");
    }

    #[test]
    fn wildcard_is_not_advertised() {
        let wild: SocketAddr = "0.0.0.0:7".parse().unwrap();
        let peer = "127.0.0.1:9".parse().unwrap();
        assert!(!advertised(wild, Some(peer)).ip().is_unspecified());
        let fixed: SocketAddr = "127.0.0.1:7".parse().unwrap();
        assert_eq!(advertised(fixed, None), fixed);
    }
}
