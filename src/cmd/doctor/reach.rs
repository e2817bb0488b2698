//! Can this host talk to the others: connect, shake hands, and when that fails say what is there instead.
//!
//! Owns telling faults of a connection apart. Every exchange has a deadline, nothing is changed at the other side, and what
//! a stranger says is only ever shown, never believed.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::address::{self, NoAddress};
use super::config::without_secret;
use super::instances;
use super::report::Finding;
use crate::base::handshake::{self, HandshakeError, LaneKind};
use crate::base::id::Id128;
use crate::base::net::{join_host_port, split_host_port};
use crate::base::trust::{ClusterKeys, Token};

/// Bound of a connection: three seconds are what the kernel takes to learn that nobody has an address on this network.
const CONNECT: Duration = Duration::from_millis(3_300);
/// Bound of an exchange on a connection.
const ANSWER: Duration = Duration::from_millis(2_000);
/// Bound of one attempt to find out what is listening.
const IDENTIFY: Duration = Duration::from_millis(900);
/// Most bytes read of an answer.
const ANSWER_MAX: u64 = 1 << 20;
/// Larger than any packet: a request of this size needs several full ones.
const PADDING: usize = 12_000;

/// Why somebody could not be reached.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    pub(super) cause: &'static str,
    pub(super) reason: String,
    pub(super) remedy: String,
    pub(super) command: String,
}

impl Fault {
    fn new(cause: &'static str, reason: impl Into<String>, remedy: impl Into<String>) -> Self {
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
    if address::is_local(address.ip()) {
        let here = super::firewall::listeners_on(address.port());
        let other = here
            .iter()
            .find(|l| !l.ip.is_unspecified() && l.ip != address.ip());
        if let Some(l) = other {
            let reason = format!(
                "{} listens on {}:{} only, not on {}",
                l.holder,
                l.ip,
                address.port(),
                address.ip()
            );
            return Fault::new(
                "refused_other_address",
                reason,
                format!("start it with --bind {}", address.ip()),
            );
        }
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
    let greeting = handshake::connect(&mut met.stream, kind, Id128::random(), keys);
    let mtu = rustix::net::sockopt::ip_mtu(&met.stream).ok();
    match greeting {
        Ok(g) => Ok(Lane {
            address: met.address,
            rtt: met.rtt,
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

/// Names what listens when it is not what it should be. `how` says how the handshake ended when nothing was said.
fn stranger(address: SocketAddr, saw: &str, how: &str) -> Fault {
    let local =
        address::is_local(address.ip()).then(|| super::firewall::listeners_on(address.port()));
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

/// An answer over HTTP.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) head: String,
    pub(super) body: String,
    pub(super) took: Duration,
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|l| {
        let (n, value) = l.split_once(':')?;
        n.trim().eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

impl Answer {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }
}

/// Why a request was not answered.
enum Unanswered {
    /// No connection.
    Fault(Fault),
    /// A connection, and then: what was said, how it ended.
    Connected(SocketAddr, String, &'static str),
}

/// One request, `Connection: close`. `more` are header lines, each with its line end.
pub(super) fn http(
    target: &str,
    method: &str,
    path: &str,
    more: &str,
    body: &str,
) -> Result<Answer, Fault> {
    request(target, method, path, more, body).map_err(|why| match why {
        Unanswered::Fault(fault) => fault,
        Unanswered::Connected(address, saw, how) => stranger(address, &saw, how),
    })
}

fn request(
    target: &str,
    method: &str,
    path: &str,
    more: &str,
    body: &str,
) -> Result<Answer, Unanswered> {
    let mut met = connect(target).map_err(Unanswered::Fault)?;
    let start = Instant::now();
    let length = if body.is_empty() {
        String::new()
    } else {
        format!("Content-Length: {}\r\n", body.len())
    };
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n{length}{more}\r\n{body}"
    );
    let mut bytes = Vec::new();
    let read = met.stream.write_all(request.as_bytes()).and_then(|()| {
        let mut piece = [0; 16_384];
        loop {
            let left = (start + ANSWER).saturating_duration_since(Instant::now());
            met.stream
                .set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            let n = met.stream.read(&mut piece)?;
            bytes.extend_from_slice(&piece[..n]);
            if n == 0 || bytes.len() as u64 > ANSWER_MAX {
                return Ok(());
            }
        }
    });
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.get(2..5)?.parse().ok());
    if let Some(status) = status {
        return Ok(Answer {
            status,
            head: head.to_owned(),
            body: body.to_owned(),
            took: start.elapsed(),
        });
    }
    let how = match &read {
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
            ) =>
        {
            "silent"
        }
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
            ) =>
        {
            "reset"
        }
        _ => "closed",
    };
    let saw = text.chars().take(40).collect::<String>();
    let saw = if saw.is_empty() {
        saw
    } else {
        format!("`{saw}`")
    };
    Err(Unanswered::Connected(met.address, saw, how))
}

fn ms(time: Duration) -> String {
    if time < Duration::from_millis(10) {
        format!("{} us", time.as_micros())
    } else {
        format!("{} ms", time.as_millis())
    }
}

/// What `reach` found out about the master, for the checks that build on it.
pub(super) struct MasterSeen {
    pub(super) findings: Vec<Finding>,
    pub(super) lane: Option<Lane>,
    /// Seconds this host's clock is ahead of the master's.
    pub(super) skew: Option<i64>,
}

/// The master: a control lane, then HTTP on the same port.
pub(super) fn master(target: &str, keys: &ClusterKeys, token: Option<&Token>) -> MasterSeen {
    let mut findings = Vec::new();
    let check = "master";
    let lane = match lane(target, LaneKind::Control, keys) {
        Ok(lane) => lane,
        Err(fault) => {
            findings.push(fault.finding(check, target));
            return MasterSeen {
                findings,
                lane: None,
                skew: None,
            };
        }
    };
    findings.push(Finding::ok(
        check,
        format!(
            "{target}: lane protocol {}, {} round trip",
            lane.version,
            ms(lane.rtt)
        ),
    ));
    let mut skew = None;
    match request(target, "GET", "/role", &bearer(token), "") {
        Ok(answer) => {
            let sent = std::time::SystemTime::now();
            skew = answer
                .header("date")
                .and_then(super::host::http_date)
                .map(|theirs| {
                    let now = sent
                        .duration_since(std::time::UNIX_EPOCH)
                        .map_or(0, |d| d.as_secs() as i64);
                    now - theirs
                });
            let role = answer.body.trim().trim_matches('"').to_ascii_lowercase();
            match answer.status {
                200 if role == "leader" => findings.push(Finding::ok("role", "leader")),
                200 => {
                    let shown: String = role.chars().take(30).collect();
                    findings.push(
                        Finding::fail(
                            "role",
                            "not_leader",
                            shown,
                            "this master does not lead: it takes no writes",
                        )
                        .remedy("give the leader's address, or all masters' addresses"),
                    );
                }
                401 | 403 => findings.push(
                    Finding::fail(
                        "role",
                        "token",
                        format!("HTTP {}", answer.status),
                        "HTTP on the master's port refuses our token",
                    )
                    .remedy("give the same --token-file or MOONCAKE_TOKEN on both sides"),
                ),
                _ => findings.push(Finding::skipped(
                    "role",
                    format!("the master answered HTTP {} to /role", answer.status),
                )),
            }
            if !lane.address.ip().is_loopback() {
                findings.push(large_packets(target));
            }
        }
        Err(Unanswered::Fault(fault)) => findings.push(fault.finding("HTTP of the master", target)),
        // The lane has shown that it is a master: what its HTTP does says nothing about who listens.
        Err(Unanswered::Connected(_, _, how)) => findings.push(
            Finding::fail(
                "HTTP of the master",
                "http_unanswered",
                target,
                format!("its lanes work, and a request over HTTP met a connection that was {how}"),
            )
            .remedy("look at the master's log and load, and at proxies between here and there"),
        ),
    }
    MasterSeen {
        findings,
        lane: Some(lane),
        skew,
    }
}

/// The header that proves the token; empty without one.
pub(super) fn bearer(token: Option<&Token>) -> String {
    token.map_or_else(String::new, |t| {
        format!("Authorization: {}\r\n", t.bearer())
    })
}

/// Small packets passed: do large ones?
fn large_packets(target: &str) -> Finding {
    let padding = format!("X-Padding: {}\r\n", "x".repeat(PADDING));
    // Small questions would be answered: what is there is not asked again.
    match request(target, "GET", "/health", &padding, "") {
        Ok(answer) => Finding::ok("large packets", format!("{PADDING} bytes answered in {}", ms(answer.took))),
        Err(Unanswered::Connected(_, _, "silent")) => Finding::fail(
            "large packets",
            "mtu_black_hole",
            format!("{PADDING} bytes"),
            "small requests are answered, large ones vanish: a link on the way has a smaller MTU, and the ICMP that would tell is dropped",
        )
        .remedy("set the same MTU on all links, or let ICMP type 3 code 4 (IPv6: type 2) pass")
        .command("sysctl -w net.ipv4.tcp_mtu_probing=1"),
        Err(Unanswered::Fault(fault)) => fault.finding("large packets", target),
        Err(Unanswered::Connected(address, saw, how)) => stranger(address, &saw, how).finding("large packets", target),
    }
}

/// The data port of a node.
pub(super) fn data_port(check: &str, target: &str, keys: &ClusterKeys) -> Finding {
    match lane(target, LaneKind::Data, keys) {
        Ok(lane) => Finding::ok(check, format!("{target}: {} round trip", ms(lane.rtt))),
        Err(fault) => fault.finding(check, target),
    }
}

/// The metadata service a configuration names.
pub(super) fn metadata(server: &str) -> Vec<Finding> {
    if let Some(rest) = server.strip_prefix("http://") {
        return vec![http_metadata(rest, server)];
    }
    if let Some(rest) = server.strip_prefix("etcd://") {
        return vec![etcd(rest)];
    }
    match server.strip_prefix("redis://") {
        Some(rest) => vec![redis(rest, server)],
        None => Vec::new(),
    }
}

fn with_port(address: &str, port: u16) -> String {
    split_host_port(address, port)
        .map_or_else(|_| address.to_owned(), |(h, p)| join_host_port(&h, p))
}

fn http_metadata(rest: &str, url: &str) -> Finding {
    let check = "metadata (http)";
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let path = format!("/{path}?key=mooncake/doctor/absent");
    match http(&with_port(host, 80), "GET", &path, "", "") {
        Err(fault) => fault.finding(check, url),
        Ok(a) if a.status == 200 => {
            Finding::ok(check, format!("{url}: answered in {}", ms(a.took)))
        }
        // Every implementation of this protocol says so of a key that is not there; other servers say other things.
        Ok(a) if a.status == 404 && a.body.contains("metadata not found") => {
            Finding::ok(check, format!("{url}: answered in {}", ms(a.took)))
        }
        Ok(a) if matches!(a.status, 401 | 403) => {
            let reason = format!("refused the request (HTTP {})", a.status);
            Finding::fail(check, "metadata_auth", url, reason)
                .remedy("use a metadata service without a login, or P2PHANDSHAKE")
        }
        Ok(a) => {
            let server = a
                .header("server")
                .map_or_else(String::new, |s| format!(" by {s}"));
            let reason = format!(
                "an HTTP server{server} answers, and it is no metadata service (HTTP {})",
                a.status
            );
            Finding::fail(check, "something_else", url, reason)
                .remedy("correct the URL: the master serves http://MASTER:50051/metadata")
        }
    }
}

fn etcd(rest: &str) -> Finding {
    let check = "metadata (etcd)";
    let target = with_port(rest.trim_end_matches('/'), 2379);
    let answer = match http(&target, "GET", "/version", "", "") {
        Ok(answer) => answer,
        Err(fault) => return fault.finding(check, target),
    };
    let version: Option<String> = serde_json::from_str::<serde_json::Value>(&answer.body)
        .ok()
        .and_then(|v| v.get("etcdserver")?.as_str().map(str::to_owned));
    let Some(version) = version.filter(|_| answer.status == 200) else {
        let reason = format!(
            "an HTTP server answers, and it is not etcd (HTTP {})",
            answer.status
        );
        return Finding::fail(check, "something_else", target, reason)
            .remedy("correct the address: etcd's client port is 2379");
    };
    // bW9vbmNha2U= is `mooncake`: a key that nobody writes.
    let asked = http(
        &target,
        "POST",
        "/v3/kv/range",
        "Content-Type: application/json\r\n",
        r#"{"key":"bW9vbmNha2U="}"#,
    );
    match asked {
        Err(fault) => fault.finding(check, target),
        Ok(a) if a.status == 200 => Finding::ok(
            check,
            format!("{target}: etcd {version}, answered in {}", ms(a.took)),
        ),
        Ok(a)
            if a.body.contains("user name is empty")
                || a.body.contains("permission denied")
                || matches!(a.status, 401 | 403) =>
        {
            let reason = "etcd wants a user, and mooncake gives none";
            Finding::fail(check, "metadata_auth", target, reason)
                .remedy("disable auth in etcd, or use another metadata service")
                .command("etcdctl auth disable")
        }
        Ok(a) if a.status == 404 => {
            let reason = format!("etcd {version} has no JSON gateway at /v3");
            Finding::fail(check, "version", target, reason).remedy("run etcd 3.4 or newer")
        }
        Ok(a) => {
            let reason = format!("etcd {version} answered HTTP {} to a read", a.status);
            Finding::fail(check, "metadata_broken", target, reason)
                .remedy("look at etcd's log: it may have lost its quorum")
        }
    }
}

fn redis(rest: &str, url: &str) -> Finding {
    let check = "metadata (redis)";
    let (login, place) = rest
        .rsplit_once('@')
        .map_or((None, rest), |(l, p)| (Some(l), p));
    let target = with_port(place.split('/').next().unwrap_or(place), 6379);
    let shown = without_secret(url);
    let mut met = match connect(&target) {
        Ok(met) => met,
        Err(fault) => return fault.finding(check, shown),
    };
    let mut say = |words: &[&str]| -> io::Result<String> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        met.stream.write_all(request.as_bytes())?;
        let mut piece = [0; 8192];
        let n = met.stream.read(&mut piece)?;
        Ok(String::from_utf8_lossy(&piece[..n]).into_owned())
    };
    let login = login.map(|l| l.split_once(':').unwrap_or(("", l)));
    let (mut greeted, start) = (Ok("+OK".to_owned()), Instant::now());
    if let Some((user, password)) = login {
        greeted = if user.is_empty() {
            say(&["AUTH", password])
        } else {
            say(&["AUTH", user, password])
        };
    }
    let ping = greeted.and_then(|g| {
        if g.starts_with('+') {
            say(&["PING"])
        } else {
            Ok(g)
        }
    });
    let took = start.elapsed();
    let first = ping
        .as_deref()
        .ok()
        .and_then(|p| p.lines().next())
        .unwrap_or_default()
        .to_owned();
    if first.starts_with("-NOAUTH") {
        return Finding::fail(
            check,
            "metadata_auth",
            shown,
            "Redis wants a password, and the URL has none",
        )
        .remedy("write redis://:PASSWORD@HOST:PORT");
    }
    if first.starts_with("-WRONGPASS")
        || first.starts_with("-ERR AUTH")
        || first.starts_with("-ERR invalid password")
    {
        return Finding::fail(
            check,
            "metadata_auth",
            shown,
            "Redis refused the password of the URL",
        )
        .remedy("correct the password: redis://:PASSWORD@HOST:PORT");
    }
    if first.starts_with("-DENIED") {
        return Finding::fail(
            check,
            "metadata_protected",
            shown,
            "Redis is in protected mode and takes local connections only",
        )
        .remedy("set a password in Redis, and write it in the URL");
    }
    if first.starts_with("-LOADING") {
        return Finding::warn(
            check,
            "metadata_loading",
            shown,
            "Redis is reading its data from disk",
        )
        .remedy("wait until it has");
    }
    if !first.starts_with("+PONG") {
        let how = match &ping {
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
                ) =>
            {
                "silent"
            }
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => "reset",
            _ => "closed",
        };
        let saw = if first.is_empty() {
            String::new()
        } else {
            format!("`{first}`")
        };
        return stranger(met.address, &saw, how).finding(check, shown);
    }
    let info = say(&["INFO", "server"]).unwrap_or_default();
    let version = info
        .lines()
        .find_map(|l| l.strip_prefix("redis_version:"))
        .unwrap_or("of unknown version");
    Finding::ok(
        check,
        format!(
            "{shown}: Redis {}, answered in {}",
            version.trim(),
            ms(took)
        ),
    )
}

/// The proxy, and the instances it names.
pub(super) fn proxy(url: &str, key: Option<&Token>) -> Vec<Finding> {
    let check = "proxy";
    let Some(rest) = url.strip_prefix("http://") else {
        let reason = if url.starts_with("https://") {
            "this build speaks no TLS"
        } else {
            "is not a URL"
        };
        return vec![
            Finding::fail(check, "bad_address", without_secret(url), reason)
                .remedy("write --proxy http://HOST:PORT"),
        ];
    };
    let target = with_port(rest.split('/').next().unwrap_or(rest), 80);
    let answer = match http(&target, "GET", "/health", "", "") {
        Ok(a) => a,
        Err(fault) => return vec![fault.finding(check, target)],
    };
    let line = || {
        answer
            .body
            .lines()
            .next()
            .unwrap_or_default()
            .chars()
            .take(80)
            .collect::<String>()
    };
    match answer.status {
        200 if answer.body.contains("\"ha_state\"") => vec![
            Finding::fail(check, "wrong_kind", target, "is a master, not a proxy")
                .remedy("give the proxy's URL: mooncake proxy prints it at its start"),
        ],
        200 => {
            let shown = format!("{target}: healthy, answered in {}", ms(answer.took));
            let mut found = vec![Finding::ok(check, shown)];
            found.extend(instances::check(&target, key));
            found
        }
        503 => vec![
            Finding::fail(
                check,
                "proxy_unhealthy",
                target,
                format!("answers, and says it cannot serve: {}", line()),
            )
            .remedy("start its prefill and decode instances, or correct their addresses"),
        ],
        status => {
            // A router without /health still lists its models.
            let models = http(&target, "GET", "/v1/models", "", "");
            match models {
                Ok(m) if m.status == 200 && m.body.contains("\"data\"") => {
                    vec![Finding::ok(check, format!("{target}: lists its models"))]
                }
                _ => {
                    let server = answer
                        .header("server")
                        .map_or_else(String::new, |s| format!(" by {s}"));
                    let reason = format!(
                        "an HTTP server{server} answers, and it is no proxy: HTTP {status} to /health, no /v1/models"
                    );
                    vec![
                        Finding::fail(check, "something_else", target, reason)
                            .remedy("correct --proxy"),
                    ]
                }
            }
        }
    }
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

    #[test]
    fn headers_by_name() {
        assert_eq!(
            header("HTTP/1.1 200 OK\r\nDate: x: y\r\n", "date"),
            Some("x: y")
        );
        assert_eq!(header("", "date"), None);
    }
}
