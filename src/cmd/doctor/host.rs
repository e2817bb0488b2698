//! This host against what the configuration needs of it: limits, clock, network; memory and disk are in `memory` and `disk`.
//!
//! Every check compares with a need: a limit that is low and harmless at the configured sizes is no warning. Reads `/proc` and
//! `/sys`. Refuses to know whether anybody else can be reached.

use std::time::Duration;

use super::config::Wanted;
use super::report::Finding;
use super::system::Root;
use super::{disk, memory};
use crate::base::units::ByteSize;

/// What other checks have learned that this host has to bear.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Need {
    /// Other processes of the pool: each may open lanes to this one.
    pub(super) peers: u64,
    /// A node of the pool runs on this host already: its memory is taken.
    pub(super) node_here: bool,
    /// Seconds this host is ahead of the master.
    pub(super) skew: Option<i64>,
    /// Round trip to the master, when it is on another host.
    pub(super) rtt: Option<Duration>,
    /// Path MTU towards the master, likewise.
    pub(super) mtu: Option<u32>,
}

/// Descriptors a client or node has open before anybody connects.
const FILES_BASE: u64 = 64;
/// Lanes that one peer usually opens: a control lane and a few for data.
const LANES_EACH: u64 = 8;
/// Below this no link of a data centre goes, tunnels included; IPv6 demands it.
const MTU_LEAST: u32 = 1280;
/// The master adds a minute to a lease before a read grant ends: a node that is further ahead refuses it.
const SKEW_FAIL: i64 = 60;
const SKEW_WARN: i64 = 5;

pub(super) fn check(root: &Root, wanted: &Wanted, need: &Need) -> Vec<Finding> {
    let mut found = memory::check(root, wanted, need);
    found.push(open_files(root, need));
    found.extend(memory::memlock(root, wanted));
    found.extend(memory::limits(root, wanted));
    found.push(threads(root, need));
    found.push(memory::hugepages(root, wanted));
    found.extend(memory::mappings(root, wanted));
    found.push(memory::transparent_pages(root));
    found.extend(memory::overcommit(root, wanted));
    found.extend(memory::numa(root, wanted));
    found.push(memory::shared_memory(root));
    found.push(clock(need.skew));
    if let Some(path) = &wanted.ssd {
        found.push(disk::io_uring(root));
        found.extend(disk::check(path));
    }
    if let Some(mtu) = need.mtu {
        found.push(path_mtu(mtu));
    }
    if let Some(rtt) = need.rtt {
        found.push(tcp_buffers(root, rtt));
    }
    found
}

/// Soft and hard limit of this process; `u64::MAX` = unlimited.
pub(super) fn limit(root: &Root, name: &str) -> Option<(u64, u64)> {
    let text = root.read("/proc/self/limits")?;
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    let mut words = line.split_whitespace().map(|w| {
        if w == "unlimited" {
            Some(u64::MAX)
        } else {
            w.parse().ok()
        }
    });
    Some((words.next()??, words.next()??))
}

fn open_files(root: &Root, need: &Need) -> Finding {
    let check = "open files";
    let Some((soft, hard)) = limit(root, "Max open files") else {
        return Finding::skipped(check, "/proc/self/limits cannot be read");
    };
    let wanted = FILES_BASE + need.peers * LANES_EACH;
    let shown = format!("limit {soft}, about {wanted} needed");
    if soft >= wanted {
        return Finding::ok(check, shown);
    }
    let reason = format!(
        "each of the {} other processes of the pool may open {LANES_EACH} lanes",
        need.peers
    );
    let target = wanted.next_power_of_two().max(1024);
    let remedy = if hard >= wanted {
        "raise the soft limit"
    } else {
        "raise the limit: LimitNOFILE= of the service, or limits.conf"
    };
    Finding::fail(check, "nofile", shown, reason)
        .remedy(remedy)
        .command(format!("ulimit -n {target}"))
}

/// A lane is a thread at the serving side.
fn threads(root: &Root, need: &Need) -> Finding {
    let check = "threads";
    let wanted = FILES_BASE + need.peers * LANES_EACH;
    let mut least = limit(root, "Max processes").map_or(u64::MAX, |(soft, _)| soft);
    let mut place = "ulimit -u".to_owned();
    memory::for_each_group(root, "pids", |directory| {
        if let Some(max) = root
            .number(&format!("{directory}/pids.max"))
            .filter(|m| *m < least)
        {
            least = max;
            place = format!("pids.max of {directory}");
        }
    });
    let of = if least == u64::MAX {
        "no limit".to_owned()
    } else {
        format!("limit {least}")
    };
    let shown = format!("{of}, about {wanted} needed");
    if least >= wanted {
        return Finding::ok(check, shown);
    }
    Finding::fail(
        check,
        "threads",
        shown,
        "every lane has a thread at the side that serves it",
    )
    .remedy(format!(
        "raise {place} (container --pids-limit, systemd TasksMax)"
    ))
    .command(format!(
        "ulimit -u {}",
        wanted.next_power_of_two().max(1024)
    ))
}

fn clock(skew: Option<i64>) -> Finding {
    let check = "clock";
    let Some(skew) = skew else {
        return Finding::skipped(check, "the master did not say what time it is");
    };
    let shown = match skew {
        -1..=1 => "same as the master's (to a second)".to_owned(),
        s if s > 0 => format!("{s} s ahead of the master's"),
        s => format!("{} s behind the master's", -s),
    };
    let mend = |f: Finding| {
        f.remedy("synchronise both hosts' clocks")
            .command("chronyc makestep || systemctl restart systemd-timesyncd")
    };
    match skew.abs() {
        s if s >= SKEW_FAIL => mend(Finding::fail(
            check,
            "clock_skew",
            shown,
            "grants carry a time: a node that is so far off refuses them, or takes old ones",
        )),
        s if s >= SKEW_WARN => mend(Finding::warn(
            check,
            "clock_skew",
            shown,
            "grants carry a time: a minute's difference breaks them",
        )),
        _ => Finding::ok(check, shown),
    }
}

fn path_mtu(mtu: u32) -> Finding {
    let shown = format!("{mtu} towards the master");
    if mtu < MTU_LEAST {
        return Finding::warn(
            "path MTU",
            "mtu_low",
            shown,
            "every packet carries little: an interface or tunnel on the way is set too small",
        )
        .remedy("raise the MTU of that interface")
        .command("ip link | grep mtu");
    }
    Finding::ok("path MTU", shown)
}

/// A connection has at most one window under way per round trip.
fn tcp_buffers(root: &Root, rtt: Duration) -> Finding {
    let check = "TCP buffers";
    let most = |path: &str| {
        root.read(path)?
            .split_whitespace()
            .nth(2)?
            .parse::<u64>()
            .ok()
    };
    let (Some(read), Some(write)) = (
        most("/proc/sys/net/ipv4/tcp_rmem"),
        most("/proc/sys/net/ipv4/tcp_wmem"),
    ) else {
        return Finding::skipped(check, "the limits cannot be read");
    };
    let speeds = root
        .names("/sys/class/net")
        .into_iter()
        .filter(|n| n != "lo")
        .filter_map(|n| root.number(&format!("/sys/class/net/{n}/speed")));
    // Virtual interfaces say nothing, or -1.
    let mbits = speeds.filter(|s| *s < 10_000_000).max().unwrap_or(1000);
    let needed = (mbits as f64 * 125_000.0 * rtt.as_secs_f64()) as u64;
    let shown = format!(
        "at most {} read, {} write; {} are under way at {mbits} Mbit/s",
        ByteSize(read),
        ByteSize(write),
        ByteSize(needed)
    );
    if read.min(write) < needed {
        let reason = format!(
            "one connection cannot fill the link at a round trip of {:.1} ms",
            rtt.as_secs_f64() * 1e3
        );
        let most = needed.saturating_mul(2).next_power_of_two();
        return Finding::warn(check, "tcp_buffers", shown, reason)
            .remedy("raise the limits")
            .command(format!("sysctl -w net.ipv4.tcp_rmem='4096 131072 {most}' net.ipv4.tcp_wmem='4096 65536 {most}'"));
    }
    Finding::ok(check, shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skew() {
        assert_eq!(clock(Some(1)).cause, "");
        assert_eq!(clock(Some(-7)).cause, "clock_skew");
        assert_eq!(
            clock(Some(3600)).verdict,
            super::super::report::Verdict::Fail
        );
    }
}
