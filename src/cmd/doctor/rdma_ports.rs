//! Ports of RDMA devices: link, rate, MTU, and which GID is used and why.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::rdma::{CLASS, Port};
use super::report::Finding;
use super::system::Root;

/// `4: ACTIVE` as number and word.
fn state(text: &str) -> (u32, &str) {
    let (number, word) = text.split_once(':').unwrap_or((text, ""));
    (number.trim().parse().unwrap_or(0), word.trim())
}

pub(super) fn is_infiniband(root: &Root, port: &Port) -> bool {
    root.read(&format!("{}/link_layer", port.path)).as_deref() == Some("InfiniBand")
}

pub(super) fn link(root: &Root, port: &Port) -> Finding {
    let read = |name: &str| {
        root.read(&format!("{}/{name}", port.path))
            .unwrap_or_default()
    };
    let check = format!("{} link", port.name());
    let (logical, physical) = (read("state"), read("phys_state"));
    let ((l, lw), (p, pw)) = (state(&logical), state(&physical));
    let shown = format!("{lw}, {pw}, {}", read("rate"));
    if l == 4 {
        let lid = read("lid");
        let lid = lid.trim_start_matches("0x");
        if is_infiniband(root, port) && u32::from_str_radix(lid, 16) == Ok(0) {
            return Finding::fail(
                check,
                "no_lid",
                shown,
                "the port has no LID: no subnet manager has seen it",
            )
            .remedy("start a subnet manager on the fabric")
            .command("systemctl start opensm");
        }
        return Finding::ok(check, shown);
    }
    // Physically up and logically not: the fabric is there and nobody has brought the port up.
    if l == 2 && p == 5 {
        return Finding::fail(
            check,
            "link_init",
            shown,
            "the cable is up, and no subnet manager has activated the port",
        )
        .remedy("start a subnet manager on the fabric")
        .command("systemctl start opensm");
    }
    match p {
        3 => Finding::fail(check, "link_disabled", shown, "the port is switched off")
            .remedy("switch it on")
            .command(format!(
                "ip link set dev {} up",
                netdev(root, port).unwrap_or_else(|| port.device.clone())
            )),
        _ => Finding::fail(
            check,
            "link_down",
            shown,
            "no link: cable, transceiver or switch port",
        )
        .remedy("plug the cable, or bring the interface up")
        .command(format!(
            "ip link set dev {} up",
            netdev(root, port).unwrap_or_else(|| port.device.clone())
        )),
    }
}

/// The network interface of a port.
pub(super) fn netdev(root: &Root, port: &Port) -> Option<String> {
    let of_gid = root
        .names(&format!("{}/gid_attrs/ndevs", port.path))
        .into_iter();
    let named = of_gid
        .filter_map(|i| root.read(&format!("{}/gid_attrs/ndevs/{i}", port.path)))
        .find(|n| !n.is_empty());
    named.or_else(|| {
        root.names(&format!("{CLASS}/{}/device/net", port.device))
            .into_iter()
            .next()
    })
}

/// An empty slot.
const NO_GID: &str = "0000:0000:0000:0000:0000:0000:0000:0000";
/// Interfaces of containers and tunnels: their addresses mean nothing to other hosts.
const OVERLAYS: [&str; 10] = [
    "docker", "cni", "flannel", "cali", "cilium", "veth", "br-", "virbr", "weave", "tun",
];

/// A used slot of a port's table of GIDs.
struct Gid {
    index: u32,
    address: IpAddr,
    kind: String,
    interface: String,
}

/// Whom an address can be told to, fewest first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Reach {
    LinkLocal,
    Overlay,
    Private,
    Routable,
}

impl Reach {
    fn word(self) -> &'static str {
        match self {
            Self::LinkLocal => "link-local",
            Self::Overlay => "of an overlay",
            Self::Private => "private",
            Self::Routable => "routable",
        }
    }
}

impl Gid {
    fn is_v2(&self) -> bool {
        self.kind.contains("v2")
    }

    fn reach(&self) -> Reach {
        let local = match self.address {
            IpAddr::V4(a) => a.is_link_local(),
            IpAddr::V6(a) => a.is_unicast_link_local(),
        };
        let private = match self.address {
            IpAddr::V4(a) => a.is_private() || is_shared(a),
            IpAddr::V6(a) => a.is_unique_local(),
        };
        if local {
            Reach::LinkLocal
        } else if OVERLAYS.iter().any(|o| self.interface.starts_with(o)) {
            Reach::Overlay
        } else if private {
            Reach::Private
        } else {
            Reach::Routable
        }
    }

    fn shown(&self) -> String {
        let on = if self.interface.is_empty() {
            String::new()
        } else {
            format!(" on {}", self.interface)
        };
        format!("index {}: {}, {}{on}", self.index, self.address, self.kind)
    }
}

/// 100.64.0.0/10, between provider and customer: routed within one network.
fn is_shared(a: Ipv4Addr) -> bool {
    a.octets()[0] == 100 && a.octets()[1] & 0xC0 == 64
}

fn table(root: &Root, port: &Port) -> BTreeMap<u32, Gid> {
    let slot = |name: String| {
        let index: u32 = name.parse().ok()?;
        let text = root.read(&format!("{}/gids/{index}", port.path))?;
        let address: Ipv6Addr = text.parse().ok().filter(|_| text != NO_GID)?;
        // Reading the attributes of an empty slot is an error.
        let read = |what: &str| root.read(&format!("{}/gid_attrs/{what}/{index}", port.path));
        let gid = Gid {
            index,
            address: address.to_canonical(),
            kind: read("types").unwrap_or_default(),
            interface: read("ndevs").unwrap_or_default(),
        };
        Some((index, gid))
    };
    let names = root.names(&format!("{}/gids", port.path));
    names.into_iter().filter_map(slot).collect()
}

/// What the transport takes by itself: RoCE v2 with an interface, the address that most hosts can reach, the lowest index.
fn best(all: &BTreeMap<u32, Gid>) -> Option<&Gid> {
    let rank = |g: &&Gid| (!g.interface.is_empty(), g.reach(), u32::MAX - g.index);
    all.values().filter(|g| g.is_v2()).max_by_key(rank)
}

/// The GID of a RoCE port. `chosen`: the variable that names an index, and its value.
pub(super) fn gids(root: &Root, port: &Port, chosen: Option<&(String, String)>) -> Option<Finding> {
    if is_infiniband(root, port) {
        return None;
    }
    let check = format!("{} GIDs", port.name());
    let all = table(root, port);
    if let Some((variable, index)) = chosen {
        return Some(chosen_gid(check, &all, variable, index));
    }
    let address = || {
        let interface = netdev(root, port).unwrap_or_else(|| port.device.clone());
        format!("ip addr add ADDRESS/24 dev {interface}")
    };
    if all.is_empty() {
        let reason = "RoCE needs an address on the interface";
        let f = Finding::fail(check, "no_gid", "none", reason);
        return Some(f.remedy("give the interface an address").command(address()));
    }
    let Some(best) = best(&all) else {
        let shown = format!("{} of RoCE v1", all.len());
        let f = Finding::warn(check, "gid_v1", shown, "RoCE v1 does not pass routers");
        return Some(
            f.remedy("give the interface an IP address, and load the driver in RoCE v2 mode"),
        );
    };
    let (cause, reason) = match best.reach() {
        Reach::LinkLocal => (
            "gid_link_local",
            "hosts of other networks cannot be reached",
        ),
        Reach::Overlay => (
            "gid_overlay",
            "an address of containers or a tunnel: other hosts have no way to it",
        ),
        reach => {
            let why = if all.len() == 1 {
                "the only one".to_owned()
            } else {
                format!("best of {}", all.len())
            };
            return Some(Finding::ok(
                check,
                format!("{} ({}, {why})", best.shown(), reach.word()),
            ));
        }
    };
    let shown = format!("{}, best of {}", best.shown(), all.len());
    let f = Finding::warn(check, cause, shown, reason);
    Some(
        f.remedy("give the interface an IP address")
            .command(address()),
    )
}

fn chosen_gid(check: String, all: &BTreeMap<u32, Gid>, variable: &str, index: &str) -> Finding {
    let shown = format!("{variable}={index}");
    let mend = |f: Finding| {
        f.remedy(format!("unset {variable}: it is chosen by itself"))
            .command(format!("unset {variable}"))
    };
    match index.parse().ok().and_then(|i: u32| all.get(&i)) {
        None => {
            let used: Vec<String> = all.keys().map(u32::to_string).collect();
            let reason = format!("that slot is empty; used are {}", used.join(", "));
            mend(Finding::fail(check, "gid_index_empty", shown, reason))
        }
        Some(gid) if !gid.is_v2() => mend(Finding::warn(
            check,
            "gid_v1",
            format!("{shown}: {}", gid.shown()),
            "RoCE v1 does not pass routers",
        )),
        Some(gid) if gid.reach() < Reach::Private => mend(Finding::warn(
            check,
            "gid_link_local",
            format!("{shown}: {} ({})", gid.shown(), gid.reach().word()),
            "hosts of other networks cannot be reached",
        )),
        Some(gid) => Finding::ok(check, format!("{shown}: {}", gid.shown())),
    }
}

pub(super) fn mtu(root: &Root, port: &Port) -> Option<Finding> {
    if is_infiniband(root, port) {
        return None;
    }
    let interface = netdev(root, port)?;
    let mtu = root.number(&format!("/sys/class/net/{interface}/mtu"))?;
    let check = format!("{} MTU", port.name());
    let shown = format!("{mtu} on {interface}");
    // 4096 bytes of payload and about 100 of headers make one RDMA packet of the largest size.
    if mtu < 4200 {
        return Some(
            Finding::warn(
                check,
                "rdma_mtu",
                shown,
                "RDMA packets of 4096 bytes do not fit: they are cut to 1024",
            )
            .remedy("set 9000 on the interface and on the switch")
            .command(format!("ip link set dev {interface} mtu 9000")),
        );
    }
    Some(Finding::ok(check, shown))
}

/// The smallest MTU of two ends counts: rails that differ make some of them slow.
pub(super) fn mtus(root: &Root, ports: &[Port]) -> Option<Finding> {
    let of = |p: &Port| {
        let interface = netdev(root, p).filter(|_| !is_infiniband(root, p))?;
        let mtu = root.number(&format!("/sys/class/net/{interface}/mtu"))?;
        Some((p.name(), mtu))
    };
    let all: Vec<(String, u64)> = ports.iter().filter_map(of).collect();
    let most = all.iter().map(|(_, mtu)| *mtu).max()?;
    let least: Vec<String> = all
        .iter()
        .filter(|(_, mtu)| *mtu < most)
        .map(|(name, mtu)| format!("{name} {mtu}"))
        .collect();
    if least.is_empty() {
        return None;
    }
    let shown = format!("{}; the others {most}", least.join(", "));
    let reason = "rails of one network have different MTUs: some pairs of NICs use smaller packets than others";
    let f = Finding::warn("MTU of the rails", "mtu_differs", shown, reason);
    Some(f.remedy("set the same MTU on all RDMA interfaces and their switches"))
}

pub(super) fn rates(root: &Root, ports: &[Port]) -> Option<Finding> {
    let gbits = |p: &Port| {
        root.read(&format!("{}/rate", p.path))?
            .split_whitespace()
            .next()?
            .parse::<f64>()
            .ok()
    };
    let all: Vec<(String, f64)> = ports
        .iter()
        .filter_map(|p| Some((p.name(), gbits(p)?)))
        .collect();
    let best = all.iter().map(|(_, r)| *r).fold(0.0, f64::max);
    let slow: Vec<String> = all
        .iter()
        .filter(|(_, r)| *r < best)
        .map(|(n, r)| format!("{n} {r} Gb/s"))
        .collect();
    if all.len() < 2 {
        return None;
    }
    if slow.is_empty() {
        return Some(Finding::ok(
            "rates",
            format!("{best} Gb/s on all {} ports", all.len()),
        ));
    }
    Some(
        Finding::warn(
            "rates",
            "rate_differs",
            format!("{}; the others {best} Gb/s", slow.join(", ")),
            "transfers are spread over all devices: the slowest one holds them up",
        )
        .remedy("look for a bad cable or a forced speed, or name the fast devices in device_name"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states() {
        assert_eq!(state("4: ACTIVE"), (4, "ACTIVE"));
        assert_eq!(state(""), (0, ""));
    }

    #[test]
    fn gids_are_ranked_by_whom_they_reach() {
        let gid = |index: u32, address: &str, kind: &str, interface: &str| {
            let gid = Gid {
                index,
                address: address.parse().unwrap(),
                kind: kind.to_owned(),
                interface: interface.to_owned(),
            };
            (index, gid)
        };
        let chosen = |all: Vec<(u32, Gid)>| best(&all.into_iter().collect()).map(|g| g.index);
        let (v1, v2) = ("IB/RoCE v1", "RoCE v2");
        assert_eq!(
            chosen(vec![
                gid(0, "fe80::1", v1, "e"),
                gid(2, "10.0.0.1", v1, "e")
            ]),
            None
        );
        let usual = vec![
            gid(1, "fe80::1", v2, "e"),
            gid(3, "10.0.0.1", v2, "e"),
            gid(5, "10.0.0.2", v2, "e"),
        ];
        assert_eq!(chosen(usual), Some(3));
        let overlay = vec![
            gid(1, "172.17.0.1", v2, "docker0"),
            gid(3, "192.168.1.1", v2, "e"),
        ];
        assert_eq!(chosen(overlay), Some(3));
        let public = vec![gid(1, "10.0.0.1", v2, "e"), gid(3, "2001:db8::1", v2, "e")];
        assert_eq!(chosen(public), Some(3));
        assert_eq!(
            chosen(vec![gid(1, "8.8.8.8", v2, ""), gid(3, "10.0.0.1", v2, "e")]),
            Some(3)
        );
    }
}
