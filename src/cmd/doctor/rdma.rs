//! RDMA devices of this host, read from sysfs: there, up, addressed, of one speed, near.
//!
//! Works on any tree below the root, so that fixtures stand for hardware. This build moves no data by RDMA: nothing is
//! opened or registered here, and the checks that would need it (loopback, registration) are not made.

use std::collections::BTreeMap;
use std::time::Duration;

use super::report::Finding;
use super::system::Root;

const CLASS: &str = "/sys/class/infiniband";
/// Time between two readings of error counters.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// Where `libibverbs.so.1` is looked for.
const LIBRARIES: [&str; 8] = [
    "/usr/lib/x86_64-linux-gnu",
    "/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/lib64",
    "/usr/lib",
    "/usr/local/lib",
];
/// Counters that stand still on a fabric that loses nothing.
const LOSSES: [&str; 8] = [
    "hw_counters/out_of_sequence",
    "hw_counters/packet_seq_err",
    "hw_counters/local_ack_timeout_err",
    "hw_counters/rnr_nak_retry_err",
    "hw_counters/np_cnp_sent",
    "hw_counters/np_ecn_marked_roce_packets",
    "counters/symbol_error",
    "counters/link_downed",
];

/// A port of a device.
struct Port {
    device: String,
    number: String,
    path: String,
}

impl Port {
    fn name(&self) -> String {
        if self.number == "1" {
            self.device.clone()
        } else {
            format!("{} port {}", self.device, self.number)
        }
    }
}

/// All checks; one line when there is no device and none is wanted.
pub(super) fn check(
    root: &Root,
    wanted: bool,
    only: &[String],
    gid_index: Option<&str>,
) -> Vec<Finding> {
    let mut devices = root.names(CLASS);
    if devices.is_empty() {
        let why = if root.exists("/sys/module/ib_core") {
            "ib_core is loaded, and no driver has made a device"
        } else {
            "no RDMA driver is loaded"
        };
        if wanted {
            return vec![
                Finding::fail(
                    "devices",
                    "no_device",
                    "none",
                    format!("RDMA is wanted: {why}"),
                )
                .remedy("load the NIC's driver, or use TCP")
                .command("modprobe mlx5_ib"),
            ];
        }
        return vec![Finding::skipped("devices", format!("none: {why}"))];
    }
    let chosen: Vec<String> = devices
        .iter()
        .filter(|d| only.contains(d))
        .cloned()
        .collect();
    if !chosen.is_empty() {
        devices = chosen;
    }
    let mut found = vec![Finding::ok("devices", devices.join(", "))];
    found.push(library(root, wanted));
    found.extend(nodes_of_devices(root, wanted));
    let ports: Vec<Port> = devices
        .iter()
        .flat_map(|d| {
            root.names(&format!("{CLASS}/{d}/ports"))
                .into_iter()
                .map(move |n| Port {
                    device: d.clone(),
                    path: format!("{CLASS}/{d}/ports/{n}"),
                    number: n,
                })
        })
        .collect();
    for port in &ports {
        let link = link(root, port);
        let up = link.cause.is_empty();
        found.push(link);
        if up {
            found.extend(gids(root, port, gid_index));
            found.extend(mtu(root, port));
        }
    }
    found.extend(rates(root, &ports));
    for device in &devices {
        found.extend(place(root, device));
    }
    found.extend(iommu(root));
    found.extend(one_subnet(root, &ports));
    found.extend(losses(root, &ports));
    found
}

/// Whether a library is in one of the usual directories.
pub(super) fn has_library(root: &Root, name: &str) -> Option<String> {
    let mut places = LIBRARIES.iter().map(|d| format!("{d}/{name}"));
    places.find(|p| root.exists(p))
}

fn severe(wanted: bool, check: &str, cause: &'static str, value: &str, reason: &str) -> Finding {
    if wanted {
        Finding::fail(check, cause, value, reason)
    } else {
        Finding::warn(check, cause, value, reason)
    }
}

fn library(root: &Root, wanted: bool) -> Finding {
    match has_library(root, "libibverbs.so.1") {
        Some(path) => Finding::ok("library", path),
        None => severe(
            wanted,
            "library",
            "no_libibverbs",
            "libibverbs.so.1 not found",
            "programs cannot use the devices",
        )
        .remedy("install it")
        .command("apt-get install -y libibverbs1 ibverbs-providers"),
    }
}

fn nodes_of_devices(root: &Root, wanted: bool) -> Option<Finding> {
    let check = "/dev/infiniband";
    if !root.exists("/sys/module/ib_uverbs") {
        return Some(
            severe(
                wanted,
                check,
                "no_uverbs_module",
                "ib_uverbs is not loaded",
                "programs cannot open the devices",
            )
            .remedy("load it")
            .command("modprobe ib_uverbs"),
        );
    }
    let nodes: Vec<String> = root
        .names("/dev/infiniband")
        .into_iter()
        .filter(|n| n.starts_with("uverbs"))
        .collect();
    if nodes.is_empty() {
        return Some(
            severe(
                wanted,
                check,
                "no_device_node",
                "no uverbs node",
                "the devices cannot be opened; in a container they were not passed in",
            )
            .remedy("start the container with --device=/dev/infiniband"),
        );
    }
    let forbidden = |n: &&String| {
        let path = root.at(&format!("/dev/infiniband/{n}"));
        let opened = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path);
        opened.is_err_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied)
    };
    let closed = nodes.iter().find(forbidden);
    Some(match closed {
        Some(node) => severe(
            wanted,
            check,
            "device_node_forbidden",
            node,
            "this user may not open it",
        )
        .remedy("add the user to the group that owns it")
        .command("ls -l /dev/infiniband"),
        None => Finding::ok(check, nodes.join(", ")),
    })
}

/// `4: ACTIVE` as number and word.
fn state(text: &str) -> (u32, &str) {
    let (number, word) = text.split_once(':').unwrap_or((text, ""));
    (number.trim().parse().unwrap_or(0), word.trim())
}

fn is_infiniband(root: &Root, port: &Port) -> bool {
    root.read(&format!("{}/link_layer", port.path)).as_deref() == Some("InfiniBand")
}

fn link(root: &Root, port: &Port) -> Finding {
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
fn netdev(root: &Root, port: &Port) -> Option<String> {
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

const NO_GID: &str = "0000:0000:0000:0000:0000:0000:0000:0000";

fn gids(root: &Root, port: &Port, chosen: Option<&str>) -> Option<Finding> {
    if is_infiniband(root, port) {
        return None;
    }
    let check = format!("{} GIDs", port.name());
    let mut all: BTreeMap<u32, (String, String)> = BTreeMap::new();
    for index in root.names(&format!("{}/gids", port.path)) {
        let gid = root
            .read(&format!("{}/gids/{index}", port.path))
            .unwrap_or_default();
        // Reading the type of an empty slot is an error.
        if let (Ok(n), false) = (index.parse(), gid.is_empty() || gid == NO_GID) {
            let kind = root
                .read(&format!("{}/gid_attrs/types/{index}", port.path))
                .unwrap_or_default();
            all.insert(n, (gid, kind));
        }
    }
    if let Some(index) = chosen {
        let shown = format!("MC_GID_INDEX={index}");
        return Some(match index.parse().ok().and_then(|i: u32| all.get(&i)) {
            None => Finding::fail(
                check,
                "gid_index_empty",
                shown,
                format!(
                    "that slot is empty; used are {}",
                    all.keys()
                        .map(u32::to_string)
                        .collect::<Vec<_>>()
                        .join(", ")
                ),
            )
            .remedy("unset MC_GID_INDEX: it is chosen by itself")
            .command("unset MC_GID_INDEX"),
            Some((gid, kind)) if !kind.contains("v2") => Finding::warn(
                check,
                "gid_v1",
                format!("{shown}: {gid}, {kind}"),
                "RoCE v1 does not pass routers",
            )
            .remedy("unset MC_GID_INDEX: it is chosen by itself")
            .command("unset MC_GID_INDEX"),
            Some((gid, kind)) => Finding::ok(check, format!("{shown}: {gid}, {kind}")),
        });
    }
    if all.is_empty() {
        return Some(
            Finding::fail(
                check,
                "no_gid",
                "none",
                "RoCE needs an address on the interface",
            )
            .remedy("give the interface an address")
            .command(format!(
                "ip addr add ADDRESS/24 dev {}",
                netdev(root, port).unwrap_or_else(|| port.device.clone())
            )),
        );
    }
    let v2 = |k: &str| k.contains("v2");
    let local = |gid: &str| gid.starts_with("fe80");
    if !all.values().any(|(_, k)| v2(k)) {
        return Some(
            Finding::warn(
                check,
                "gid_v1",
                format!("{} of RoCE v1", all.len()),
                "RoCE v1 does not pass routers",
            )
            .remedy("give the interface an IP address, and load the driver in RoCE v2 mode"),
        );
    }
    match all.iter().find(|(_, (g, k))| v2(k) && !local(g)) {
        Some((i, (gid, kind))) => Some(Finding::ok(
            check,
            format!("{} in use; index {i} is routable: {gid}, {kind}", all.len()),
        )),
        None => Some(
            Finding::warn(
                check,
                "gid_link_local",
                format!("{} in use, all link-local", all.len()),
                "hosts of other networks cannot be reached",
            )
            .remedy("give the interface an IP address")
            .command(format!(
                "ip addr add ADDRESS/24 dev {}",
                netdev(root, port).unwrap_or_else(|| port.device.clone())
            )),
        ),
    }
}

fn mtu(root: &Root, port: &Port) -> Option<Finding> {
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

fn rates(root: &Root, ports: &[Port]) -> Option<Finding> {
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

fn place(root: &Root, device: &str) -> Vec<Finding> {
    let base = format!("{CLASS}/{device}/device");
    if !root.exists(&base) {
        // Software devices have no PCI parent.
        return Vec::new();
    }
    let mut found = Vec::new();
    let check = format!("{device} PCIe");
    let read = |name: &str| root.read(&format!("{base}/{name}")).unwrap_or_default();
    let (width, most_width) = (read("current_link_width"), read("max_link_width"));
    let (speed, most_speed) = (read("current_link_speed"), read("max_link_speed"));
    let number = |t: &str| {
        t.split_whitespace()
            .next()
            .and_then(|n| n.parse::<f64>().ok())
            .unwrap_or(0.0)
    };
    if number(&width) < number(&most_width) || number(&speed) < number(&most_speed) {
        found.push(
            Finding::warn(
                check,
                "pcie_degraded",
                format!("x{width} at {speed}, of x{most_width} at {most_speed}"),
                "the slot gives less than the device can take",
            )
            .remedy("seat the card in a slot with all lanes, and look at the BIOS settings"),
        );
    } else if !width.is_empty() {
        found.push(Finding::ok(check, format!("x{width} at {speed}")));
    }
    let nodes = root
        .names("/sys/devices/system/node")
        .iter()
        .filter(|n| {
            n.strip_prefix("node")
                .is_some_and(|r| r.parse::<u32>().is_ok())
        })
        .count();
    match read("numa_node").parse::<i64>() {
        Ok(-1) if nodes > 1 => found.push(
            Finding::warn(format!("{device} NUMA"), "numa_unknown", "-1", "the firmware does not say which node the device belongs to: memory may be far from it").remedy("update the BIOS, or bind the process: numactl --cpunodebind=N --membind=N"),
        ),
        Ok(n) if n >= 0 => found.push(Finding::ok(format!("{device} NUMA"), format!("node {n}"))),
        _ => {}
    }
    found
}

fn iommu(root: &Root) -> Option<Finding> {
    let groups = root.names("/sys/kernel/iommu_groups");
    if groups.is_empty() {
        return Some(Finding::ok("IOMMU", "off"));
    }
    let translated = groups
        .iter()
        .filter_map(|g| root.read(&format!("/sys/kernel/iommu_groups/{g}/type")))
        .any(|t| t.starts_with("DMA"));
    if translated {
        return Some(Finding::warn("IOMMU", "iommu_translates", "DMA is translated", "each transfer of the NIC is looked up: slower, and peer-to-peer with GPUs may fail").remedy("boot with iommu=pt"));
    }
    Some(Finding::ok("IOMMU", "pass-through"))
}

/// Several interfaces in one network, and one of them answers for all.
fn one_subnet(root: &Root, ports: &[Port]) -> Option<Finding> {
    let interfaces: Vec<String> = ports.iter().filter_map(|p| netdev(root, p)).collect();
    if interfaces.len() < 2 {
        return None;
    }
    let flag = |i: &str, name: &str| {
        root.number(&format!("/proc/sys/net/ipv4/conf/{i}/{name}"))
            .unwrap_or(0)
            .max(
                root.number(&format!("/proc/sys/net/ipv4/conf/all/{name}"))
                    .unwrap_or(0),
            )
    };
    let strict: Vec<&str> = interfaces
        .iter()
        .filter(|i| flag(i, "rp_filter") == 1)
        .map(String::as_str)
        .collect();
    if strict.is_empty() {
        return Some(Finding::ok(
            "reverse path",
            format!("loose or off on {}", interfaces.join(", ")),
        ));
    }
    Some(
        Finding::warn(
            "reverse path",
            "rp_filter",
            format!("rp_filter = 1 on {}", strict.join(", ")),
            "with several NICs in one network, answers that come in by another NIC are dropped",
        )
        .remedy("make it loose")
        .command(
            strict
                .iter()
                .map(|i| format!("sysctl -w net.ipv4.conf.{i}.rp_filter=2"))
                .collect::<Vec<_>>()
                .join("; "),
        ),
    )
}

fn losses(root: &Root, ports: &[Port]) -> Option<Finding> {
    let read = || -> BTreeMap<String, u64> {
        let counters = ports
            .iter()
            .flat_map(|p| LOSSES.iter().map(move |c| (p, c)));
        counters
            .filter_map(|(p, c)| {
                Some((
                    format!("{} {}", p.name(), c.rsplit('/').next()?),
                    root.number(&format!("{}/{c}", p.path))?,
                ))
            })
            .collect()
    };
    let before = read();
    if before.is_empty() {
        return None;
    }
    std::thread::sleep(LOOK_AGAIN);
    let after = read();
    let grown: Vec<String> = after
        .iter()
        .filter_map(|(n, v)| {
            before
                .get(n)
                .filter(|b| v > *b)
                .map(|b| format!("{n} +{}", v - b))
        })
        .collect();
    if grown.is_empty() {
        return Some(Finding::ok(
            "losses",
            format!("{} counters stand still", before.len()),
        ));
    }
    Some(
        Finding::warn(
            "losses",
            "fabric_loses",
            grown.join(", "),
            "the fabric is losing or marking packets right now",
        )
        .remedy("set up PFC and ECN on NICs and switches, or replace the cable"),
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
}
