//! Which of a port's addresses (GIDs) is used: read from sysfs below a given root, ranked, never assumed to be index 3.
//!
//! Owns the ranking; opens no device, so that fixture trees stand for hardware.

use std::net::Ipv6Addr;
use std::path::Path;

/// One address of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gid {
    /// Its index in the port's table.
    pub index: u8,
    /// Its bytes.
    pub bytes: [u8; 16],
    /// Whether it is RoCE v1, which does not pass routers.
    pub v1: bool,
    /// The network interface behind it, if any.
    pub interface: Option<String>,
}

/// Interfaces that containers make: reachable on this host only, as a rule.
const OVERLAYS: [&str; 6] = ["docker", "cni", "br-", "virbr", "flannel", "cali"];

/// All addresses of a port that are not zero, in order of their index.
pub fn all(root: &Path, device: &str, port: u8) -> Vec<Gid> {
    let base = root.join(format!("sys/class/infiniband/{device}/ports/{port}"));
    let read = |path: String| {
        let text = std::fs::read_to_string(base.join(path)).ok()?;
        Some(text.trim().to_owned())
    };
    let Ok(entries) = std::fs::read_dir(base.join("gids")) else {
        return Vec::new();
    };
    let mut found: Vec<Gid> = entries
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u8>().ok())
        .filter_map(|index| {
            let address: Ipv6Addr = read(format!("gids/{index}"))?.parse().ok()?;
            let bytes = address.octets();
            let kind = read(format!("gid_attrs/types/{index}")).unwrap_or_default();
            (bytes != [0; 16]).then(|| Gid {
                index,
                bytes,
                v1: kind.contains("v1"),
                interface: read(format!("gid_attrs/ndevs/{index}")).filter(|n| !n.is_empty()),
            })
        })
        .collect();
    found.sort_unstable_by_key(|g| g.index);
    found
}

/// Smaller is better; `None` when it must not be used by itself.
fn rank(gid: &Gid, ethernet: bool) -> Option<u8> {
    if !ethernet {
        // InfiniBand: the first is the port's own.
        return Some(0);
    }
    if gid.v1 {
        return None;
    }
    let overlay = gid
        .interface
        .as_ref()
        .is_some_and(|n| OVERLAYS.iter().any(|o| n.starts_with(o)));
    let address = Ipv6Addr::from(gid.bytes);
    let place = match address.to_ipv4_mapped() {
        _ if overlay => 3,
        Some(v4) if v4.is_link_local() || v4.is_loopback() => 3,
        Some(v4) if v4.is_private() => 1,
        Some(_) => 0,
        None if address.is_unicast_link_local() => 2,
        None => 0,
    };
    let bare = if gid.interface.is_some() { 0 } else { 10 };
    Some(place + bare)
}

/// The address to use: the index asked for, else the best.
///
/// # Errors
/// One line for people.
pub fn choose(gids: &[Gid], ethernet: bool, wanted: Option<u8>) -> Result<Gid, String> {
    if let Some(index) = wanted {
        let found = gids.iter().find(|g| g.index == index);
        return found
            .cloned()
            .ok_or_else(|| format!("GID index {index} (MC_GID_INDEX) is empty"));
    }
    let ranked = gids.iter().filter_map(|g| Some((rank(g, ethernet)?, g)));
    let best = ranked.min_by_key(|(rank, g)| (*rank, g.index));
    match best {
        Some((_, gid)) => Ok(gid.clone()),
        None if gids.is_empty() => Err("the port has no GID: give its interface an address".into()),
        None => Err("the port has RoCE v1 GIDs only".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(entries: &[(u8, &str, &str, &str)]) -> Vec<Gid> {
        let root = tempfile::tempdir().unwrap();
        let base = root.path().join("sys/class/infiniband/mlx5_0/ports/1");
        for directory in ["gids", "gid_attrs/types", "gid_attrs/ndevs"] {
            std::fs::create_dir_all(base.join(directory)).unwrap();
        }
        std::fs::write(
            base.join("gids/200"),
            "0000:0000:0000:0000:0000:0000:0000:0000\n",
        )
        .unwrap();
        for (index, gid, kind, interface) in entries {
            std::fs::write(base.join(format!("gids/{index}")), format!("{gid}\n")).unwrap();
            std::fs::write(base.join(format!("gid_attrs/types/{index}")), kind).unwrap();
            if !interface.is_empty() {
                std::fs::write(base.join(format!("gid_attrs/ndevs/{index}")), interface).unwrap();
            }
        }
        all(root.path(), "mlx5_0", 1)
    }

    const LINK_LOCAL: &str = "fe80:0000:0000:0000:5054:00ff:fe77:0001";
    const PRIVATE: &str = "0000:0000:0000:0000:0000:ffff:0a4d:0001";
    const PUBLIC: &str = "0000:0000:0000:0000:0000:ffff:0808:0808";

    #[test]
    fn the_best_address_wins() {
        let gids = port(&[
            (0, LINK_LOCAL, "IB/RoCE v1", "eth0"),
            (1, LINK_LOCAL, "RoCE v2", "eth0"),
            (2, PRIVATE, "IB/RoCE v1", "eth0"),
            (3, PRIVATE, "RoCE v2", "eth0"),
        ]);
        assert_eq!(gids.len(), 4, "zero is no address");
        assert_eq!(choose(&gids, true, None).unwrap().index, 3);
        assert_eq!(choose(&gids, true, Some(0)).unwrap().index, 0);
        assert!(choose(&gids, true, Some(7)).unwrap_err().contains("empty"));
        let gids = port(&[(0, PRIVATE, "RoCE v2", "eth0"), (1, PUBLIC, "RoCE v2", "")]);
        assert_eq!(
            choose(&gids, true, None).unwrap().index,
            0,
            "one with an interface first"
        );
        let gids = port(&[
            (0, PUBLIC, "RoCE v2", "docker0"),
            (5, PRIVATE, "RoCE v2", "ens1"),
        ]);
        assert_eq!(choose(&gids, true, None).unwrap().index, 5);
    }

    #[test]
    fn what_cannot_be_used_is_said() {
        let old = port(&[(0, PRIVATE, "IB/RoCE v1", "eth0")]);
        assert!(choose(&old, true, None).unwrap_err().contains("v1 GIDs"));
        assert!(choose(&[], true, None).unwrap_err().contains("no GID"));
        assert_eq!(
            choose(&port(&[(0, LINK_LOCAL, "IB/RoCE v1", "")]), false, None)
                .unwrap()
                .index,
            0
        );
    }
}
