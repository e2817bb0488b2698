//! What this host does to a program that asks for too much: CPU taken away, processes killed, memory reclaimed, connections dropped.
//!
//! Reads counters of control groups and of the kernel. A limit that has not been felt is no fault.

use super::memory::for_each_group;
use super::report::Finding;
use super::system::Root;

/// Share of periods in which the group was stopped that is felt as latency.
const THROTTLED: f64 = 0.05;
/// Periods that say something.
const PERIODS_LEAST: u64 = 100;
/// Percent of the last minute in which some task waited for memory.
const STALLED: f64 = 20.0;
/// Share of the table of connections from which on new ones are dropped now and then.
const TRACKED: f64 = 0.9;

pub(super) fn check(root: &Root) -> Vec<Finding> {
    let mut found = vec![throttling(root), kills(root)];
    found.extend(stalls(root));
    found.extend(tracking(root));
    found
}

/// `name 123` in a file of such lines.
fn value(text: &str, name: &str) -> Option<u64> {
    text.lines()
        .find_map(|l| l.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

fn throttling(root: &Root) -> Finding {
    let check = "CPU";
    let mut worst: Option<(f64, String)> = None;
    for_each_group(root, "cpu", |directory| {
        let text = root
            .read(&format!("{directory}/cpu.stat"))
            .unwrap_or_default();
        let (Some(all), Some(stopped)) = (value(&text, "nr_periods"), value(&text, "nr_throttled"))
        else {
            return;
        };
        let share = stopped as f64 / all.max(1) as f64;
        if all >= PERIODS_LEAST && worst.as_ref().is_none_or(|(w, _)| share > *w) {
            worst = Some((share, directory.to_owned()));
        }
    });
    match worst {
        Some((share, place)) if share > THROTTLED => {
            let shown = format!(
                "stopped in {:.0} % of the periods by {place}",
                share * 100.0
            );
            let reason = "the control group's CPU limit is reached: answers come in bursts, tens of milliseconds late";
            Finding::warn(check, "cpu_throttled", shown, reason)
                .remedy("raise the limit (container --cpus, Kubernetes limits.cpu, systemd CPUQuota), or take it off")
        }
        _ => Finding::ok(check, "not held back by a control group"),
    }
}

fn kills(root: &Root) -> Finding {
    let check = "memory kills";
    let mut most: Option<(u64, String)> = None;
    for_each_group(root, "memory", |directory| {
        let text = root
            .read(&format!("{directory}/memory.events"))
            .unwrap_or_default();
        if let Some(n) = value(&text, "oom_kill").filter(|n| *n > 0)
            && most.as_ref().is_none_or(|(m, _)| n > *m)
        {
            most = Some((n, directory.to_owned()));
        }
    });
    match most {
        Some((n, place)) => {
            let reason = format!(
                "the kernel has killed processes of {place}: the group's memory is too small for what runs in it"
            );
            Finding::warn(check, "oom_kills", n.to_string(), reason)
                .remedy(
                    "raise the limit, or lower global_segment_size: the segment counts towards it",
                )
                .command("dmesg | grep -i -e oom -e 'out of memory'")
        }
        None => Finding::ok(check, "none in this control group"),
    }
}

fn stalls(root: &Root) -> Option<Finding> {
    let text = root.read("/proc/pressure/memory")?;
    let share: f64 = text
        .lines()
        .find(|l| l.starts_with("some "))?
        .split_whitespace()
        .find_map(|w| w.strip_prefix("avg60="))?
        .parse()
        .ok()?;
    let shown = format!("tasks waited for memory in {share:.0} % of the last minute");
    if share < STALLED {
        return Some(Finding::ok("memory pressure", shown));
    }
    let reason = "the kernel is busy reclaiming memory: everything on this host is slow, and segments may be swapped out";
    Some(
        Finding::warn("memory pressure", "memory_pressure", shown, reason)
            .remedy("stop what uses the memory, or lower global_segment_size")
            .command("ps aux --sort=-rss | head"),
    )
}

/// The firewall's table of connections: when it is full, new ones are dropped without a word.
fn tracking(root: &Root) -> Option<Finding> {
    let read = |name: &str| root.number(&format!("/proc/sys/net/netfilter/nf_conntrack_{name}"));
    let (count, most) = (read("count")?, read("max")?);
    let shown = format!("{count} of {most} connections tracked");
    if (count as f64) < most as f64 * TRACKED {
        return Some(Finding::ok("connection tracking", shown));
    }
    let reason = "the firewall's table is full or nearly so: new connections time out now and then";
    Some(
        Finding::fail("connection tracking", "conntrack_full", shown, reason)
            .remedy("raise the limit, or do not track the pool's ports (notrack)")
            .command(format!(
                "sysctl -w net.netfilter.nf_conntrack_max={}",
                most.saturating_mul(4)
            )),
    )
}
