//! Sockets of this host: who listens on a port, who holds it otherwise. Reads `/proc/net/tcp` and the descriptors of processes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use super::system::Root;

/// Bound of looking for the process behind a socket: hosts have many processes.
const HOLDERS: Duration = Duration::from_millis(1_500);

/// A socket that takes connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listener {
    pub(super) ip: IpAddr,
    pub(super) port: u16,
    inode: u64,
    /// `name (pid N)`; empty when it cannot be seen.
    pub(super) holder: String,
}

/// Listeners of this machine on one port, with who holds them.
pub(super) fn listeners_on(port: u16) -> Vec<Listener> {
    let root = Root::new(std::path::Path::new("/"));
    let mut found: Vec<Listener> = listeners(&root)
        .into_iter()
        .filter(|l| l.port == port)
        .collect();
    name_holders(&root, &mut found);
    found
}

/// Who holds a port of this machine as the source of a connection: nobody can listen there meanwhile.
pub(super) fn source_of(port: u16) -> Option<String> {
    let root = Root::new(std::path::Path::new("/"));
    let mut found: Vec<Listener> = sockets(&root, "01")
        .into_iter()
        .filter(|l| l.port == port)
        .collect();
    name_holders(&root, &mut found);
    found.into_iter().map(|l| l.holder).next()
}

pub(super) fn listeners(root: &Root) -> Vec<Listener> {
    sockets(root, "0A")
}

/// Sockets in a state as `/proc/net/tcp` names it: 0A = LISTEN, 01 = ESTABLISHED.
fn sockets(root: &Root, state: &str) -> Vec<Listener> {
    let mut all = Vec::new();
    for path in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let Some(text) = root.read(path) else {
            continue;
        };
        all.extend(text.lines().skip(1).filter_map(|l| socket(l, state)));
    }
    all
}

/// One line of `/proc/net/tcp`.
fn socket(line: &str, state: &str) -> Option<Listener> {
    let words: Vec<&str> = line.split_whitespace().collect();
    if words.get(3) != Some(&state) {
        return None;
    }
    let (ip, port) = words.get(1)?.split_once(':')?;
    // Words of 32 bits in the machine's order.
    let word = |at: usize| {
        Some(
            u32::from_str_radix(ip.get(at * 8..at * 8 + 8)?, 16)
                .ok()?
                .to_ne_bytes(),
        )
    };
    let ip = if ip.len() == 8 {
        IpAddr::V4(Ipv4Addr::from(word(0)?))
    } else {
        let mut bytes = [0; 16];
        for at in 0..4 {
            bytes[at * 4..at * 4 + 4].copy_from_slice(&word(at)?);
        }
        let v6 = Ipv6Addr::from(bytes);
        v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
    };
    Some(Listener {
        ip,
        port: u16::from_str_radix(port, 16).ok()?,
        inode: words.get(9)?.parse().ok()?,
        holder: String::new(),
    })
}

/// Looks for the processes that have the sockets open.
pub(super) fn name_holders(root: &Root, listeners: &mut [Listener]) {
    let end = Instant::now() + HOLDERS;
    let mut missing = listeners.len();
    for pid in root
        .names("/proc")
        .into_iter()
        .filter(|n| n.bytes().all(|b| b.is_ascii_digit()))
    {
        if missing == 0 || Instant::now() > end {
            return;
        }
        for fd in root.names(&format!("/proc/{pid}/fd")) {
            let Ok(target) = std::fs::read_link(root.at(&format!("/proc/{pid}/fd/{fd}"))) else {
                continue;
            };
            let Some(inode) = target.to_str().and_then(|t| {
                t.strip_prefix("socket:[")?
                    .strip_suffix(']')?
                    .parse::<u64>()
                    .ok()
            }) else {
                continue;
            };
            for l in listeners
                .iter_mut()
                .filter(|l| l.inode == inode && l.holder.is_empty())
            {
                let name = root.read(&format!("/proc/{pid}/comm")).unwrap_or_default();
                l.holder = format!("{name} (pid {pid})");
                missing -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_proc() {
        let line = "   0: 0100007F:C383 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 41 1 0";
        let l = socket(line, "0A").unwrap();
        assert_eq!(
            (l.ip, l.port, l.inode),
            ("127.0.0.1".parse().unwrap(), 50_051, 41)
        );
        let line = "   0: 00000000000000000000000000000000:0050 0:0 0A 0:0 0:0 0 0 0 42 1 0";
        assert_eq!(
            socket(line, "0A").unwrap().ip,
            "::".parse::<IpAddr>().unwrap()
        );
        assert_eq!(socket("garbage", "0A"), None);
        assert_eq!(socket("0: xx:yy 0 0A", "0A"), None);
    }
}
