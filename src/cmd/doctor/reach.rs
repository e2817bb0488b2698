//! Can this host talk to the others: connect, shake hands, and when that fails say why.
//!
//! Owns telling faults of a connection apart. Every exchange has a deadline, and nothing is changed at the other side.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::address::{self, NoAddress};
use super::report::Finding;
use super::stranger::stranger;
use crate::base::handshake::{self, HandshakeError, LaneKind};
use crate::base::id::Id128;
use crate::base::net::{join_host_port, split_host_port};
use crate::base::trust::ClusterKeys;

/// Bound of a connection: three seconds are what the kernel takes to learn that nobody has an address on this network.
const CONNECT: Duration = Duration::from_millis(3_300);
/// Bound of an exchange on a connection.
pub(super) const ANSWER: Duration = Duration::from_millis(2_000);

/// Why somebody could not be reached.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    pub(super) cause: &'static str,
    pub(super) reason: String,
    pub(super) remedy: String,
    pub(super) command: String,
}

impl Fault {
    pub(super) fn new(
        cause: &'static str,
        reason: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            cause,
            reason: reason.into(),
            remedy: remedy.into(),
            command: String::new(),
        }
    }

    fn command(mut self, text: impl Into<String>) -> Self {
        self.command = text.into();
        self
    }

    pub(super) fn finding(self, check: impl Into<String>, value: impl Into<String>) -> Finding {
        Finding::fail(check, self.cause, value, self.reason)
            .remedy(self.remedy)
            .command(self.command)
    }
}

/// A connection that came up.
pub(super) struct Met {
    pub(super) stream: TcpStream,
    pub(super) address: SocketAddr,
    /// Time of the connection: one round trip.
    pub(super) rtt: Duration,
}

/// Connects to the first address of a name, as clients do.
pub(super) fn connect(target: &str) -> Result<Met, Fault> {
    let all = address::resolve(target).map_err(|why| match why {
        NoAddress::Unknown => Fault::new(
            "name_unknown",
            "the resolver knows no such name",
            "correct the name, or add it to DNS or /etc/hosts",
        ),
        NoAddress::Timeout => Fault::new(
            "resolver_silent",
            "no name server answered",
            "correct the name servers in /etc/resolv.conf, or use the address itself",
        ),
    })?;
    let Some(address) = all.first().copied() else {
        return Err(Fault::new(
            "name_unknown",
            "the name has no address",
            "correct the name",
        ));
    };
    let start = Instant::now();
    let stream = TcpStream::connect_timeout(&address, CONNECT)
        .map_err(|e| not_connected(&e, address, start.elapsed()))?;
    let rtt = start.elapsed();
    if stream.local_addr().ok() == stream.peer_addr().ok() {
        // A port from the range for outgoing connections, met by itself.
        return Err(refused(address));
    }
    let bounded = stream
        .set_nodelay(true)
        .and(stream.set_read_timeout(Some(ANSWER)))
        .and(stream.set_write_timeout(Some(ANSWER)));
    bounded.map_err(|e| Fault::new("system", e.to_string(), "look at this host's kernel log"))?;
    Ok(Met {
        stream,
        address,
        rtt,
    })
}

fn refused(address: SocketAddr) -> Fault {
    if address::is_local(address.ip())
        && let Some(fault) = refused_here(address)
    {
        return fault;
    }
    Fault::new(
        "refused",
        "refused: the host answers, and nothing listens on that port",
        "start the program there, or correct the port",
    )
    .command(format!(
        "ss -ltnp 'sport = :{}'    # on {}",
        address.port(),
        address.ip()
    ))
}

/// What this host's own sockets say about it.
fn refused_here(address: SocketAddr) -> Option<Fault> {
    let here = super::sockets::listeners_on(address.port());
    if let Some(l) = here
        .iter()
        .find(|l| l.ip.is_unspecified() || l.ip == address.ip())
    {
        let reason = format!(
            "{} listens there, and the connection is refused all the same: a firewall of this host does that",
            l.holder
        );
        return Some(Fault::new(
            "refused",
            reason,
            "let the port pass in this host's firewall",
        ));
    }
    if let Some(l) = here.first() {
        let reason = format!(
            "{} listens on {}:{} only, not on {}",
            l.holder,
            l.ip,
            address.port(),
            address.ip()
        );
        let remedy = format!("start it with --bind {}", address.ip());
        return Some(Fault::new("refused_other_address", reason, remedy));
    }
    let holder = super::sockets::source_of(address.port())?;
    let of = if holder.is_empty() {
        String::new()
    } else {
        format!(" of {holder}")
    };
    let reason = format!(
        "nothing listens there, and nothing can: the port is the source of an outgoing connection{of}"
    );
    let remedy = "keep the port out of the range that the kernel takes such ports from, end that program, and start the server again";
    let fault = Fault::new("port_taken", reason, remedy);
    Some(fault.command(format!(
        "sysctl -w net.ipv4.ip_local_reserved_ports={}",
        address.port()
    )))
}

fn not_connected(error: &io::Error, address: SocketAddr, took: Duration) -> Fault {
    use rustix::io::Errno;
    let ip = address.ip();
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::CONNREFUSED) => refused(address),
        Some(Errno::NETUNREACH) => Fault::new("no_route", "this host has no route there", "bring the interface up, or add a route").command(format!("ip route get {ip}")),
        Some(Errno::HOSTUNREACH) if took > Duration::from_millis(900) => {
            Fault::new("host_unreachable", "no host has that address on its network (no answer to ARP)", "correct the address, or start the host").command(format!("ip neigh show {ip}"))
        }
        Some(Errno::HOSTUNREACH | Errno::ACCESS) => Fault::new(
            "rejected",
            "a router or firewall on the way said no (ICMP unreachable)",
            format!("allow TCP port {} in the firewall on the way, or correct the route", address.port()),
        ),
        Some(Errno::PERM) => Fault::new("forbidden_here", "this host's own firewall forbids it", format!("allow outgoing TCP to port {}", address.port())),
        Some(Errno::CONNRESET) => Fault::new("reset", "the connection was reset while it was made", "look for a load balancer or firewall on the way"),
        _ if matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => Fault::new(
            "timeout",
            format!("no answer within {:.1} s: a firewall drops the packets, or the address is wrong", took.as_secs_f64()),
            format!("allow TCP port {} on {ip}, or correct the address", address.port()),
        )
        .command(format!("nft list ruleset | grep -n -e drop -e {}    # on {ip}", address.port())),
        _ => Fault::new("system", error.to_string(), "look at this host's kernel log"),
    }
}

/// What was learned of a lane's other side.
pub(super) struct Lane {
    pub(super) address: SocketAddr,
    pub(super) rtt: Duration,
    pub(super) version: u8,
    pub(super) local: Option<SocketAddr>,
    /// Path MTU as the kernel knows it.
    pub(super) mtu: Option<u32>,
}

/// Opens a lane: the whole handshake, as a client does it.
pub(super) fn lane(target: &str, kind: LaneKind, keys: &ClusterKeys) -> Result<Lane, Fault> {
    let mut met = connect(target)?;
    let local = met.stream.local_addr().ok();
    let start = Instant::now();
    let greeting = handshake::connect(&mut met.stream, kind, Id128::random(), keys);
    // A lost packet costs the connection a second: the handshake, at least one exchange, says so.
    let rtt = met.rtt.min(start.elapsed());
    let mtu = rustix::net::sockopt::ip_mtu(&met.stream).ok();
    match greeting {
        Ok(g) => Ok(Lane {
            address: met.address,
            rtt,
            version: g.version,
            local,
            mtu,
        }),
        Err(HandshakeError::Version { peer }) => Err(Fault::new(
            "version",
            format!("speaks lane protocol {peer}, this build {}", versions()),
            "run the same release of mooncake on all hosts",
        )),
        Err(HandshakeError::Token) => Err(if keys.secured() {
            Fault::new(
                "token",
                "refused our token: it has another one, or none",
                "give the same --token-file or MOONCAKE_TOKEN on both sides",
            )
        } else {
            Fault::new(
                "token",
                "wants a token, and none was given",
                "give the cluster's token with --token-file or MOONCAKE_TOKEN",
            )
        }),
        Err(HandshakeError::Kind(LaneKind::Control)) => Err(Fault::new(
            "wrong_kind",
            "is a node's data port, not a master",
            "give the master's port (50051 unless set)",
        )),
        Err(HandshakeError::Kind(LaneKind::Data)) => Err(Fault::new(
            "wrong_kind",
            "is a master's port, not a node's data port",
            "give the node's data port: `mooncake inspect nodes`",
        )),
        Err(HandshakeError::Busy) => Err(Fault::new(
            "no_free_lane",
            "has no free lane left",
            "raise its --max-lanes, or close clients",
        )),
        Err(HandshakeError::NotMooncake { saw }) => Err(stranger(met.address, &saw, "")),
        Err(HandshakeError::Io(e)) => {
            let how = match e.kind() {
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => "silent",
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => "reset",
                _ => "closed",
            };
            Err(stranger(met.address, "", how))
        }
    }
}

fn versions() -> String {
    let (min, max) = (handshake::VERSION_MIN, handshake::VERSION_MAX);
    if min == max {
        max.to_string()
    } else {
        format!("{min} to {max}")
    }
}

/// `address` with a port when it names none.
pub(super) fn with_port(address: &str, port: u16) -> String {
    split_host_port(address, port)
        .map_or_else(|_| address.to_owned(), |(h, p)| join_host_port(&h, p))
}

/// A time as a person reads it.
pub(super) fn ms(time: Duration) -> String {
    if time < Duration::from_millis(10) {
        format!("{} us", time.as_micros())
    } else {
        format!("{} ms", time.as_millis())
    }
}
