//! The network between RDMA devices as one host sees it: counters of loss, marks of congestion, routes.
//!
//! What switches do cannot be seen from here: everything about priorities and marks is a hint.

use std::collections::BTreeMap;
use std::time::Duration;

use super::rdma::Port;
use super::rdma_ports::{is_infiniband, netdev};
use super::report::Finding;
use super::system::Root;

/// Time between two readings of counters.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Counters that stand still on a fabric that loses nothing.
const LOSSES: [&str; 6] = [
    "hw_counters/out_of_sequence",
    "hw_counters/packet_seq_err",
    "hw_counters/local_ack_timeout_err",
    "hw_counters/rnr_nak_retry_err",
    "counters/symbol_error",
    "counters/link_downed",
];
/// Counters of marks: the fabric is full, and says so before it loses anything.
const MARKS: [&str; 3] = [
    "hw_counters/np_cnp_sent",
    "hw_counters/np_ecn_marked_roce_packets",
    "hw_counters/rp_cnp_handled",
];

/// Reads all counters twice: what grew in between.
pub(super) fn counters(root: &Root, ports: &[Port]) -> Vec<Finding> {
    let read = |names: &[&str]| -> BTreeMap<String, u64> {
        let counters = ports.iter().flat_map(|p| names.iter().map(move |c| (p, c)));
        counters
            .filter_map(|(p, c)| {
                let value = root.number(&format!("{}/{c}", p.path))?;
                Some((format!("{} {}", p.name(), c.rsplit('/').next()?), value))
            })
            .collect()
    };
    let before = (read(&LOSSES), read(&MARKS));
    if before.0.is_empty() && before.1.is_empty() {
        return Vec::new();
    }
    std::thread::sleep(LOOK_AGAIN);
    let grown = |before: &BTreeMap<String, u64>, names: &[&str]| -> Vec<String> {
        let grew = |(n, v): (String, u64)| {
            let old = before.get(&n).filter(|old| v > **old)?;
            Some(format!("{n} +{}", v - old))
        };
        read(names).into_iter().filter_map(grew).collect()
    };
    let (lost, marked) = (grown(&before.0, &LOSSES), grown(&before.1, &MARKS));
    let mut found = Vec::new();
    if !lost.is_empty() {
        let reason = "the fabric is losing packets right now";
        found.push(
            Finding::warn("losses", "fabric_loses", lost.join(", "), reason)
                .remedy("set up PFC and ECN on NICs and switches, or replace the cable"),
        );
    }
    if !marked.is_empty() {
        let reason = "switches mark packets right now: more is sent to a port than it can pass on";
        found.push(
            Finding::warn("congestion", "fabric_congested", marked.join(", "), reason)
                .remedy("spread the load over more NICs, and look at the switch's queues"),
        );
    }
    if found.is_empty() {
        let all = before.0.len() + before.1.len();
        found.push(Finding::ok(
            "losses",
            format!("{all} counters stand still for a second"),
        ));
    }
    found
}

/// Whether NICs heed marks of congestion, as far as the driver shows it.
pub(super) fn marks(root: &Root, ports: &[Port], class: Option<&str>) -> Vec<Finding> {
    let mut found = traffic_class(class);
    for port in ports.iter().filter(|p| !is_infiniband(root, p)) {
        let Some(interface) = netdev(root, port) else {
            continue;
        };
        let on = |side: &str| {
            let base = format!("/sys/class/net/{interface}/ecn/{side}/enable");
            let all: Vec<Option<u64>> = root
                .names(&base)
                .iter()
                .map(|n| root.number(&format!("{base}/{n}")))
                .collect();
            (!all.is_empty()).then(|| all.iter().filter(|v| **v == Some(1)).count())
        };
        let (Some(notify), Some(react)) = (on("roce_np"), on("roce_rp")) else {
            continue;
        };
        let check = format!("{} ECN", port.name());
        let shown = format!("notifies on {notify} priorities, slows down on {react}");
        if notify == 0 || react == 0 {
            let reason = "the NIC does not heed marks of congestion: without PFC on every switch, bursts are lost";
            let set = |side: &str| {
                format!(
                    "for p in 0 1 2 3 4 5 6 7; do echo 1 > /sys/class/net/{interface}/ecn/{side}/enable/$p; done"
                )
            };
            found.push(
                Finding::warn(check, "ecn_off", shown, reason)
                    .remedy("switch ECN on, here and on the switches")
                    .command(format!("{}; {}", set("roce_np"), set("roce_rp"))),
            );
        } else {
            found.push(Finding::ok(check, shown));
        }
    }
    found
}

/// `MC_IB_TC`: the byte whose upper six bits are the DSCP, and whose lower two say that marks are understood.
fn traffic_class(given: Option<&str>) -> Vec<Finding> {
    let check = "traffic class";
    let Some(given) = given else {
        return Vec::new();
    };
    let shown = format!("MC_IB_TC={given}");
    let Ok(class) = given.parse::<u8>() else {
        let f = Finding::fail(check, "traffic_class", shown, "is not a number of 0 to 255");
        return vec![
            f.remedy("unset MC_IB_TC, or write the class of the fabric's lossless queue")
                .command("unset MC_IB_TC"),
        ];
    };
    let shown = format!("{shown}: DSCP {}", class >> 2);
    if class != 0 && class & 3 == 0 {
        let reason =
            "its two lowest bits are 0: switches drop such packets where they would mark others";
        let f = Finding::warn(check, "traffic_class_unmarked", shown, reason);
        return vec![f.remedy(format!(
            "write MC_IB_TC={}, unless the fabric uses PFC alone",
            class | 2
        ))];
    }
    vec![Finding::ok(check, shown)]
}

/// Several interfaces in one network, and one of them answers for all.
pub(super) fn reverse_path(root: &Root, ports: &[Port]) -> Option<Finding> {
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

/// Networks of an interface: `(network, mask)` as the kernel's table has them, without gateways.
fn networks(root: &Root, interface: &str) -> Vec<(String, String)> {
    let table = root.read("/proc/net/route").unwrap_or_default();
    let row = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let direct = words.first() == Some(&interface) && words.get(2) == Some(&"00000000");
        let (network, mask) = (words.get(1)?, words.get(7)?);
        (direct && *mask != "00000000").then(|| ((*network).to_owned(), (*mask).to_owned()))
    };
    table.lines().filter_map(row).collect()
}

/// Several NICs in one network: without more, any of them answers for all, and all traffic comes in by one.
pub(super) fn one_network(root: &Root, ports: &[Port]) -> Option<Finding> {
    let mut interfaces: Vec<String> = ports.iter().filter_map(|p| netdev(root, p)).collect();
    interfaces.sort();
    interfaces.dedup();
    let shares = |i: &&String| {
        let own = networks(root, i);
        let others = interfaces.iter().filter(|o| o != i);
        others
            .flat_map(|o| networks(root, o))
            .any(|n| own.contains(&n))
    };
    let flag = |i: &str| {
        let of = |who: &str| root.number(&format!("/proc/sys/net/ipv4/conf/{who}/arp_ignore"));
        of(i).unwrap_or(0).max(of("all").unwrap_or(0))
    };
    let together: Vec<&String> = interfaces.iter().filter(shares).collect();
    let careless: Vec<&str> = together
        .iter()
        .map(|i| i.as_str())
        .filter(|i| flag(i) == 0)
        .collect();
    if together.is_empty() {
        return None;
    }
    if careless.is_empty() {
        return Some(Finding::ok(
            "one network",
            "each interface answers for its own addresses only",
        ));
    }
    let shown = format!("{} are in one network, arp_ignore = 0", careless.join(", "));
    let reason = "any of these NICs answers for the addresses of all: traffic meant for several comes in by one";
    let set = |i: &&str| {
        format!("sysctl -w net.ipv4.conf.{i}.arp_ignore=1 net.ipv4.conf.{i}.arp_announce=2")
    };
    Some(
        Finding::warn("one network", "arp_flux", shown, reason)
            .remedy("let each answer for its own address, and route by source (or give each NIC a network of its own)")
            .command(careless.iter().map(set).collect::<Vec<_>>().join("; ")),
    )
}
