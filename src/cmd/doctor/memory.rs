//! This host's memory against what is configured: free, limited by control groups, promised, locked, huge, near.

use super::config::Wanted;
use super::host::{Need, limit};
use super::rdma::CLASS;
use super::report::Finding;
use super::system::Root;
use crate::base::units::ByteSize;

/// A segment from which on ordinary pages are too many for a NIC.
const MANY_PAGES: ByteSize = ByteSize::gib(64);

fn own_memory(wanted: &Wanted) -> u64 {
    let size = |s: Option<ByteSize>| s.map_or(0, |s| s.0);
    size(wanted.segment).saturating_add(size(wanted.buffer))
}

pub(super) fn check(root: &Root, wanted: &Wanted, need: &Need) -> Vec<Finding> {
    let own = own_memory(wanted);
    let total = root.field("/proc/meminfo", "MemTotal").unwrap_or(0);
    let free = root.field("/proc/meminfo", "MemAvailable").unwrap_or(0);
    let shown = format!(
        "{} wanted, {} of {} available",
        ByteSize(own),
        ByteSize(free),
        ByteSize(total)
    );
    let mut found = Vec::new();
    if total == 0 {
        found.push(Finding::skipped("memory", "/proc/meminfo cannot be read"));
    } else if own == 0 {
        found.push(Finding::ok(
            "memory",
            format!(
                "{} of {} available; no size configured",
                ByteSize(free),
                ByteSize(total)
            ),
        ));
    } else if own > total {
        found.push(
            Finding::fail(
                "memory",
                "memory_too_small",
                shown,
                "global_segment_size and local_buffer_size together are more than this machine has",
            )
            .remedy(format!(
                "write \"global_segment_size\" of at most {}",
                ByteSize(total / 10 * 7)
            )),
        );
    } else if own > free && !need.node_here {
        found.push(
            Finding::warn(
                "memory",
                "memory_short",
                shown,
                "more is configured than is available now: the kernel will kill something",
            )
            .remedy("stop what uses the memory, or lower global_segment_size"),
        );
    } else {
        found.push(Finding::ok("memory", shown));
    }
    if let Some((limit, used, place)) = cgroup_memory(root) {
        let left = limit.saturating_sub(used);
        let shown = format!("{} of {} left", ByteSize(left), ByteSize(limit));
        if own > limit || (own > left && !need.node_here) {
            let reason = format!(
                "the control group allows less than the {} configured: the process will be killed",
                ByteSize(own)
            );
            found.push(
                Finding::fail("cgroup memory", "cgroup_memory", shown, reason).remedy(format!(
                    "raise the limit (container --memory, systemd MemoryMax), in {place}"
                )),
            );
        } else {
            found.push(Finding::ok("cgroup memory", shown));
        }
    }
    found
}

/// The tightest memory limit on the way up from this process's group: limit, used, where.
fn cgroup_memory(root: &Root) -> Option<(u64, u64, String)> {
    let mut tightest: Option<(u64, u64, String)> = None;
    for_each_group(root, "memory", |directory| {
        let read = |v2: &str, v1: &str| {
            root.number(&format!("{directory}/{v2}"))
                .or_else(|| root.number(&format!("{directory}/{v1}")))
        };
        let Some(limit) = read("memory.max", "memory.limit_in_bytes") else {
            return;
        };
        // Version 1 writes "none" as a very large number.
        if limit < 1 << 60 && tightest.as_ref().is_none_or(|(least, ..)| limit < *least) {
            let used = read("memory.current", "memory.usage_in_bytes").unwrap_or(0);
            tightest = Some((limit, used, directory.to_owned()));
        }
    });
    tightest
}

/// Calls `look` with every directory from this process's control group to the root, for both versions.
pub(super) fn for_each_group(root: &Root, controller: &str, mut look: impl FnMut(&str)) {
    let Some(groups) = root.read("/proc/self/cgroup") else {
        return;
    };
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(names), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let base = match names {
            "" => "/sys/fs/cgroup".to_owned(),
            names if names.split(',').any(|n| n == controller) => {
                format!("/sys/fs/cgroup/{controller}")
            }
            _ => continue,
        };
        let mut path = path.trim_end_matches('/').to_owned();
        loop {
            look(&format!("{base}{path}"));
            let Some(at) = path.rfind('/') else { break };
            path.truncate(at);
        }
    }
}

/// Whether this process may lock as much as it likes.
fn may_lock(root: &Root) -> bool {
    let caps = root.read("/proc/self/status").and_then(|t| {
        let line = t
            .lines()
            .find_map(|l| l.strip_prefix("CapEff:"))?
            .trim()
            .to_owned();
        u64::from_str_radix(&line, 16).ok()
    });
    caps.is_some_and(|c| c >> 14 & 1 == 1)
}

/// Memory registered with a NIC is locked; nothing else here is.
pub(super) fn memlock(root: &Root, wanted: &Wanted) -> Vec<Finding> {
    let all = root.names(CLASS);
    let named = all.iter().filter(|d| wanted.devices.contains(d)).count();
    let nics = if named > 0 { named } else { all.len() } as u64;
    if !wanted.rdma || nics == 0 {
        return Vec::new();
    }
    let Some((soft, _)) = limit(root, "Max locked memory") else {
        return Vec::new();
    };
    // Every registration counts, and each NIC has one of its own.
    let needed = own_memory(wanted).saturating_mul(nics);
    let shown = |limit: &str| {
        format!(
            "limit {limit}, {} to register on each of {nics} NIC(s)",
            ByteSize(own_memory(wanted))
        )
    };
    if may_lock(root) {
        return vec![Finding::ok("locked memory", shown("none (CAP_IPC_LOCK)"))];
    }
    if soft == u64::MAX {
        return vec![Finding::ok("locked memory", shown("none"))];
    }
    if soft >= needed {
        return vec![Finding::ok(
            "locked memory",
            shown(&ByteSize(soft).to_string()),
        )];
    }
    let reason = "registering memory with the NIC will fail with ENOMEM";
    vec![
        Finding::fail("locked memory", "memlock", shown(&ByteSize(soft).to_string()), reason)
            .remedy("LimitMEMLOCK=infinity in the service (limits.conf does not reach services), container --ulimit memlock=-1")
            .command("ulimit -l unlimited"),
    ]
}

pub(super) fn hugepages(root: &Root, wanted: &Wanted) -> Finding {
    let check = "huge pages";
    let base = "/sys/kernel/mm/hugepages/hugepages-2048kB";
    let (Some(all), Some(free)) = (
        root.number(&format!("{base}/nr_hugepages")),
        root.number(&format!("{base}/free_hugepages")),
    ) else {
        return Finding::skipped(check, "this kernel has no 2 MiB pages");
    };
    let bytes = ByteSize(free.saturating_mul(2 << 20));
    let segment = wanted.segment.unwrap_or(ByteSize::ZERO);
    if all == 0 {
        let registered = wanted.rdma && !root.names(CLASS).is_empty();
        if registered && segment >= MANY_PAGES {
            let shown = format!("none reserved for a segment of {segment}");
            let reason =
                "each of its 4 KiB pages is pinned by itself: registering it takes tens of seconds";
            return Finding::warn(check, "hugepages_none", shown, reason)
                .remedy("reserve huge pages for it")
                .command(format!(
                    "sysctl -w vm.nr_hugepages={}",
                    segment.0.div_ceil(2 << 20)
                ));
        }
        return Finding::ok(check, "none reserved; ordinary pages are used");
    }
    let shown = format!(
        "{bytes} of {} reserved are free",
        ByteSize(all.saturating_mul(2 << 20))
    );
    if free > 0 && segment.0 > bytes.0 && segment.0 > 0 {
        let wanted = segment.0.div_ceil(2 << 20) + (all - free);
        return Finding::warn(check, "hugepages_too_few", shown, format!("a segment of {segment} does not fit: it gets ordinary pages, and the reserve lies idle"))
            .remedy("reserve enough, or none").command(format!("sysctl -w vm.nr_hugepages={wanted}"));
    }
    if let Some(far) = far_pages(root, wanted) {
        return far;
    }
    if segment.0 > 0 && !segment.0.is_multiple_of(2 << 20) && bytes.0 >= segment.0 {
        return Finding::warn(
            check,
            "hugepages_odd_size",
            shown,
            format!(
                "a segment of {} bytes is no multiple of 2 MiB: it gets ordinary pages",
                segment.0
            ),
        )
        .remedy("write \"global_segment_size\" as a multiple of 2 MiB");
    }
    Finding::ok(check, shown)
}

/// Free huge pages that all lie on other NUMA nodes than the NICs.
fn far_pages(root: &Root, wanted: &Wanted) -> Option<Finding> {
    if !wanted.rdma {
        return None;
    }
    let free = |node: u64| {
        root.number(&format!(
            "/sys/devices/system/node/node{node}/hugepages/hugepages-2048kB/free_hugepages"
        ))
    };
    let mut near: Vec<u64> = root
        .names(CLASS)
        .iter()
        .filter_map(|d| root.number(&format!("{CLASS}/{d}/device/numa_node")))
        .collect();
    near.sort_unstable();
    near.dedup();
    let all = list(&root.read("/sys/devices/system/node/online")?);
    let on = |nodes: &[u64]| nodes.iter().filter_map(|n| free(*n)).sum::<u64>();
    if near.is_empty() || on(&near) > 0 || on(&all) == 0 {
        return None;
    }
    let shown = format!(
        "none free on node {}, where the NICs are",
        near.iter()
            .map(u64::to_string)
            .collect::<Vec<_>>()
            .join(", ")
    );
    let reason = "the segment would lie on another NUMA node than the NICs: each transfer crosses between processors";
    let pages = wanted
        .segment
        .unwrap_or(ByteSize::ZERO)
        .0
        .div_ceil(2 << 20)
        .max(1);
    let node = near.first().copied().unwrap_or(0);
    Some(
        Finding::warn("huge pages", "hugepages_far", shown, reason)
            .remedy("reserve them on the NICs' node")
            .command(format!("echo {pages} > /sys/devices/system/node/node{node}/hugepages/hugepages-2048kB/nr_hugepages")),
    )
}

/// Mappings a process has before anything is registered.
const MAPS_BASE: u64 = 4096;
/// Engines register memory in pieces of some MiB, and each may split a mapping.
const PIECE: u64 = 4 << 20;

/// Limits of this process below which a segment cannot be made: it is a file in memory, and mapped.
pub(super) fn limits(root: &Root, wanted: &Wanted) -> Vec<Finding> {
    let own = own_memory(wanted);
    let all = [
        (
            "address space",
            "Max address space",
            "address_space",
            "ulimit -v",
            "LimitAS",
        ),
        (
            "file size",
            "Max file size",
            "file_size",
            "ulimit -f",
            "LimitFSIZE",
        ),
    ];
    all.into_iter()
        .filter_map(|(check, name, cause, shell, unit)| {
            let (soft, _) = limit(root, name).filter(|(soft, _)| *soft < own)?;
            let shown = format!("limit {}, {} to map", ByteSize(soft), ByteSize(own));
            let reason =
                "a segment is a file in memory that is mapped: it cannot be made this large";
            Some(
                Finding::fail(check, cause, shown, reason)
                    .remedy(format!(
                        "raise the limit: {unit}= of the service, or limits.conf"
                    ))
                    .command(format!("{shell} unlimited")),
            )
        })
        .collect()
}

pub(super) fn mappings(root: &Root, wanted: &Wanted) -> Option<Finding> {
    let most = root.number("/proc/sys/vm/max_map_count")?;
    if !wanted.rdma || root.names(CLASS).is_empty() {
        return None;
    }
    let needed = own_memory(wanted) / PIECE + MAPS_BASE;
    let shown = format!("vm.max_map_count = {most}, up to {needed} needed");
    if most >= needed {
        return Some(Finding::ok("mappings", shown));
    }
    let reason = "each registered piece may split a mapping: registering fails with ENOMEM when there are too many";
    Some(
        Finding::warn("mappings", "map_count", shown, reason)
            .remedy("raise the limit")
            .command(format!(
                "sysctl -w vm.max_map_count={}",
                needed.next_power_of_two()
            )),
    )
}

pub(super) fn transparent_pages(root: &Root) -> Finding {
    let chosen = |path: &str| {
        let text = root.read(path)?;
        Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
    };
    match (
        chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
    ) {
        (Some(all), Some(shared)) => Finding::ok(
            "transparent pages",
            format!("{all}; shared memory: {shared}"),
        ),
        (Some(all), None) => Finding::ok("transparent pages", all),
        _ => Finding::skipped("transparent pages", "this kernel has none"),
    }
}

pub(super) fn overcommit(root: &Root, wanted: &Wanted) -> Vec<Finding> {
    let check = "overcommit";
    let Some(mode) = root.number("/proc/sys/vm/overcommit_memory") else {
        return Vec::new();
    };
    if mode != 2 {
        return vec![Finding::ok(check, format!("mode {mode}"))];
    }
    let field = |name: &str| root.field("/proc/meminfo", name).unwrap_or(0);
    let left = field("CommitLimit").saturating_sub(field("Committed_AS"));
    let shown = format!("mode 2, {} may still be promised", ByteSize(left));
    let own = own_memory(wanted);
    if own > left {
        let reason = format!("strict accounting refuses the {} configured", ByteSize(own));
        return vec![
            Finding::fail(check, "overcommit", shown, reason)
                .remedy("allow overcommit, or raise vm.overcommit_ratio")
                .command("sysctl -w vm.overcommit_memory=0"),
        ];
    }
    vec![Finding::ok(check, shown)]
}

/// `0-2,5` as numbers.
fn list(text: &str) -> Vec<u64> {
    text.split(',')
        .filter_map(|part| {
            let (from, to) = part
                .trim()
                .split_once('-')
                .unwrap_or((part.trim(), part.trim()));
            Some((from.parse::<u64>().ok()?, to.parse::<u64>().ok()?.min(4096)))
        })
        .flat_map(|(from, to)| from..=to)
        .collect()
}

pub(super) fn numa(root: &Root, wanted: &Wanted) -> Vec<Finding> {
    let Some(online) = root.read("/sys/devices/system/node/online") else {
        return Vec::new();
    };
    let nodes = list(&online);
    let shown = format!("{} node(s)", nodes.len());
    let allowed = root.read("/proc/self/status").and_then(|t| {
        Some(list(
            t.lines()
                .find_map(|l| l.strip_prefix("Mems_allowed_list:"))?,
        ))
    });
    let allowed: Vec<u64> = allowed
        .unwrap_or_default()
        .into_iter()
        .filter(|n| nodes.contains(n))
        .collect();
    if allowed.is_empty() || allowed.len() == nodes.len() {
        return vec![Finding::ok("NUMA", shown)];
    }
    let total: u64 = allowed
        .iter()
        .filter_map(|n| {
            let text = root.read(&format!("/sys/devices/system/node/node{n}/meminfo"))?;
            let line = text.lines().find(|l| l.contains("MemTotal:"))?;
            line.split_whitespace()
                .rev()
                .nth(1)?
                .parse::<u64>()
                .ok()
                .map(|k| k * 1024)
        })
        .sum();
    let shown = format!(
        "{shown}, this process may use {} of them with {}",
        allowed.len(),
        ByteSize(total)
    );
    let own = own_memory(wanted);
    if own > total {
        let reason = format!("the {} configured do not fit in these nodes", ByteSize(own));
        return vec![Finding::fail("NUMA", "numa_bound", shown, reason).remedy(
            "widen the cpuset (cpuset.mems, numactl --membind), or lower global_segment_size",
        )];
    }
    vec![Finding::ok("NUMA", shown)]
}

/// Segments are memfds and need no `/dev/shm`; engines with several workers do.
pub(super) fn shared_memory(root: &Root) -> Finding {
    let check = "/dev/shm";
    let Ok(stat) = rustix::fs::statvfs(root.at("/dev/shm")) else {
        return Finding::skipped(check, "not there; segments do not need it");
    };
    let size = ByteSize(stat.f_blocks.saturating_mul(stat.f_frsize));
    let gpus = root
        .names("/dev")
        .iter()
        .filter(|n| {
            n.strip_prefix("nvidia")
                .is_some_and(|r| !r.is_empty() && r.bytes().all(|b| b.is_ascii_digit()))
        })
        .count();
    if gpus > 1 && size < ByteSize::gib(1) {
        let reason = format!("engines that use the {gpus} GPUs together pass data through it");
        return Finding::warn(check, "shm_small", size.to_string(), reason)
            .remedy("give the container --shm-size=10g")
            .command("mount -o remount,size=10G /dev/shm");
    }
    Finding::ok(check, format!("{size}; segments do not need it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_numbers() {
        assert_eq!(list("0-2,5"), [0, 1, 2, 5]);
        assert_eq!(list("x,,7-"), Vec::<u64>::new());
    }
}
