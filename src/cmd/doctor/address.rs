//! Names and addresses: what a name resolves to and back, whether an address is this host's, which one is used as source.
//!
//! Refuses to know what listens anywhere; `reach` asks that.

use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs, UdpSocket};
use std::time::Duration;

use super::config::Wanted;
use super::report::Finding;
use super::system::{self, Ran};
use crate::base::net::{join_host_port, split_host_port};

/// Bound of one look-up: a resolver that is not there is asked twice by glibc, 5 s each.
pub(super) const RESOLVE: Duration = Duration::from_millis(2_500);

/// Why a name has no address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoAddress {
    /// The resolver says so.
    Unknown,
    /// No resolver answered.
    Timeout,
}

/// All addresses of `host:port`.
pub(super) fn resolve(address: &str) -> Result<Vec<SocketAddr>, NoAddress> {
    let text = address.to_owned();
    match system::within(RESOLVE, move || text.to_socket_addrs().map(Vec::from_iter)) {
        None => Err(NoAddress::Timeout),
        Some(Ok(all)) if !all.is_empty() => Ok(all),
        Some(Err(e)) if e.to_string().contains("Temporary failure") => Err(NoAddress::Timeout),
        Some(_) => Err(NoAddress::Unknown),
    }
}

/// Whether this host has the address: only then can a socket be bound to it.
pub(super) fn is_local(ip: IpAddr) -> bool {
    ip.is_loopback() || UdpSocket::bind((ip, 0)).is_ok()
}

/// The address this host would show to a peer. Sends nothing.
fn source(peer: SocketAddr) -> Option<IpAddr> {
    let any = if peer.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(peer).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// The name of an address, by the system's resolver.
fn back(ip: IpAddr) -> Option<String> {
    match system::run(
        "getent",
        &["hosts", &ip.to_string()],
        Duration::from_millis(1_500),
    ) {
        Ran::Text(text) => text.split_whitespace().nth(1).map(str::to_owned),
        _ => None,
    }
}

/// A finding for a name that does not resolve.
pub(super) fn unresolved(check: &str, host: &str, why: NoAddress) -> Finding {
    match why {
        NoAddress::Unknown => Finding::fail(
            check,
            "name_unknown",
            host,
            "the resolver knows no such name",
        )
        .remedy("correct the name, or add it to DNS or /etc/hosts"),
        NoAddress::Timeout => {
            Finding::fail(check, "resolver_silent", host, "no name server answered")
                .remedy("correct the name servers in /etc/resolv.conf, or use the address itself")
        }
    }
}

/// What is wrong with how a master's address is written, and how it was probably meant.
pub(super) fn misspelt(address: &str) -> Option<(String, String)> {
    let is = |reason: &str, meant: String| Some((reason.to_owned(), meant));
    if let Some((_, rest)) = address.split_once("://") {
        let meant = rest.split('/').next().unwrap_or(rest);
        return is(
            "is a URL; the master is given as HOST:PORT",
            meant.to_owned(),
        );
    }
    if let Some((meant, _)) = address.split_once('/') {
        return is(
            "has a path; the master is given as HOST:PORT",
            meant.to_owned(),
        );
    }
    let (host, port) = match split_host_port(address, 50_051) {
        Ok(both) => both,
        Err(reason) => return is(&reason, "HOST:50051".to_owned()),
    };
    if host.contains(':') && host.parse::<std::net::Ipv6Addr>().is_err() {
        let (host, port) = address.rsplit_once(':').unwrap_or((address, "50051"));
        return is(
            "an IPv6 address that is followed by a port stands in brackets",
            format!("[{host}]:{port}"),
        );
    }
    if port == 0 {
        return is("port 0 is none", join_host_port(&host, 50_051));
    }
    None
}

/// Checks the names of this host and of the master.
pub(super) fn check(wanted: &Wanted, master: &str) -> Vec<Finding> {
    let mut found = Vec::new();
    if let Some((reason, meant)) = misspelt(master) {
        let f = Finding::fail("master's name", "bad_address", master, reason);
        return vec![f.remedy(format!("write {meant}"))];
    }
    let named = split_host_port(master, 50_051).ok();
    let all = named.map(|(host, port)| (host.clone(), resolve(&join_host_port(&host, port))));
    let master_is_here = match &all {
        Some((_, Ok(all))) => all.iter().all(|a| is_local(a.ip())),
        // Unknown: then nothing is said about loopback.
        _ => true,
    };
    if let Some((host, all)) = all {
        match all {
            Err(why) => found.push(unresolved("master's name", &host, why)),
            Ok(all) => found.extend(of_master(&host, &all)),
        }
    }
    if let Some(own) = &wanted.hostname {
        found.push(own_name(own, master_is_here));
    }
    found
}

fn of_master(host: &str, all: &[SocketAddr]) -> Vec<Finding> {
    let mut found = Vec::new();
    let Some(first) = all.first() else {
        return found;
    };
    let list: Vec<String> = all.iter().map(|a| a.ip().to_string()).collect();
    let mut value = if list == [host] {
        host.to_owned()
    } else {
        format!("{host} is {}", list.join(", "))
    };
    if host.parse::<IpAddr>().is_err()
        && let Some(name) = back(first.ip())
    {
        value = format!("{value}; back: {name}");
    }
    // Clients use the first address of a name only.
    let answers =
        |a: &SocketAddr| TcpStream::connect_timeout(a, Duration::from_millis(1_200)).is_ok();
    if all.len() > 1
        && !answers(first)
        && let Some(good) = all[1..].iter().find(|a| answers(a))
    {
        let reason = format!(
            "{} is tried, and nothing answers there; {} would answer",
            first.ip(),
            good.ip()
        );
        let f = Finding::fail("master's name", "first_address_dead", value, reason);
        found.push(f.remedy(format!(
            "give the master as {good}, or let it listen on {}",
            first.ip()
        )));
    } else {
        found.push(Finding::ok("master's name", value));
    }
    match source(*first) {
        Some(ip) => found.push(Finding::ok(
            "source address",
            format!("{ip} towards {}", first.ip()),
        )),
        None => {
            let reason = "this host has no route there";
            let f = Finding::fail("source address", "no_route", first.ip().to_string(), reason);
            found.push(
                f.remedy("bring the interface up, or add a route")
                    .command(format!("ip route get {}", first.ip())),
            );
        }
    }
    found
}

fn own_name(own: &str, master_is_here: bool) -> Finding {
    let check = "local_hostname";
    let Ok((host, port)) = split_host_port(own, 0) else {
        return Finding::fail(check, "bad_address", own, "is not a name or address")
            .remedy("write a name or an address of this host");
    };
    let all = match resolve(&join_host_port(&host, port)) {
        Ok(all) => all,
        Err(why) => return unresolved(check, &host, why),
    };
    let list: Vec<String> = all.iter().map(|a| a.ip().to_string()).collect();
    let value = if list == [host.as_str()] {
        host.clone()
    } else {
        format!("{host} is {}", list.join(", "))
    };
    if let Some(foreign) = all.iter().find(|a| !is_local(a.ip())) {
        let reason = format!(
            "{} is not an address of this host: others would look for its data elsewhere",
            foreign.ip()
        );
        return Finding::fail(check, "foreign_address", value, reason)
            .remedy("write an address of this host")
            .command("ip -brief address");
    }
    if !master_is_here && all.iter().all(|a| a.ip().is_loopback()) {
        let reason = "is loopback, and the master is on another host: others cannot reach this one by that name";
        return Finding::fail(check, "loopback_name", value, reason)
            .remedy("write the address that others reach this host by")
            .command("ip -brief address");
    }
    Finding::ok(check, value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_as_they_were_meant() {
        let meant = |address: &str| misspelt(address).map(|(_, meant)| meant);
        assert_eq!(meant("http://m:8080/x").as_deref(), Some("m:8080"));
        assert_eq!(meant("m:50051/").as_deref(), Some("m:50051"));
        assert_eq!(meant("fd00::7:50051").as_deref(), Some("[fd00::7]:50051"));
        assert_eq!(meant("::1:50872").as_deref(), Some("[::1]:50872"));
        assert_eq!(meant("m:0").as_deref(), Some("m:50051"));
        for good in ["m", "m:1", "[::1]:1", "::1", "10.0.0.1:50051"] {
            assert_eq!(meant(good), None, "{good}");
        }
    }

    #[test]
    fn own_and_foreign_addresses() {
        assert!(is_local("127.0.0.1".parse().unwrap()));
        assert!(!is_local("192.0.2.9".parse().unwrap()));
        assert_eq!(own_name("127.0.0.1", true).cause, "");
        assert_eq!(own_name("127.0.0.1", false).cause, "loopback_name");
        assert_eq!(own_name("192.0.2.9", true).cause, "foreign_address");
        assert_eq!(
            own_name("no-such-name.invalid", true).verdict,
            super::super::report::Verdict::Fail
        );
    }
}
