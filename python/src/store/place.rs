//! Where a process that lends memory listens, and what others call it.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::ops::Range;

use mooncake::base::net::{join_host_port, resolve_one, split_host_port};

/// Ports that upstream's clients listen on when they are not told one.
const PORTS: Range<u16> = 12300..14300;
const PORT_TRIES: u64 = 16;

/// Where to listen for data, and the host that others connect to when it was given by name.
pub(super) fn listen(local_hostname: &str) -> Result<(SocketAddr, Option<String>), String> {
    let name = if local_hostname.is_empty() {
        "127.0.0.1"
    } else {
        local_hostname
    };
    let (host, port) = split_host_port(name, 0)?;
    let address = resolve_one(&join_host_port(&host, port)).map_err(|e| e.to_string())?;
    let advertise = host.parse::<IpAddr>().is_err().then_some(host);
    let is_ours = TcpListener::bind(SocketAddr::new(address.ip(), 0)).is_ok();
    if !is_ours {
        // Not an address of this host (a container's name, say): it was asked for, so others get to use it.
        let any: IpAddr = Ipv4Addr::UNSPECIFIED.into();
        let host = advertise.unwrap_or_else(|| address.ip().to_string());
        return Ok((SocketAddr::new(any, port), Some(host)));
    }
    Ok((SocketAddr::new(address.ip(), free_port(address)), advertise))
}

/// The port that a name asks for; 0 = any.
pub(super) fn port_asked(local_hostname: &str) -> u16 {
    split_host_port(local_hostname, 0).map_or(0, |(_, port)| port)
}

/// The port asked for, if it is free, or one of those that upstream chooses from, so that its users' rules let it through;
/// else 0.
fn free_port(wanted: SocketAddr) -> u16 {
    let is_free = |port: &u16| TcpListener::bind(SocketAddr::new(wanted.ip(), *port)).is_ok();
    if wanted.port() != 0 {
        return Some(wanted.port()).filter(is_free).unwrap_or(0);
    }
    let span = u64::from(PORTS.end - PORTS.start);
    let chance = |n: u64| PORTS.start + (RandomState::new().hash_one(n) % span) as u16;
    (0..PORT_TRIES).map(chance).find(is_free).unwrap_or(0)
}
