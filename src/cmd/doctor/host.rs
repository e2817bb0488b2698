//! This host against what the configuration needs of it: memory, limits, pages, clock, disk, network.
//!
//! Every check compares with a need: a limit that is low and harmless at the configured sizes is no warning. Reads `/proc`,
//! `/sys` and one directory that the configuration names (a probe file is written there and removed). Refuses to know
//! whether anybody else can be reached.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use super::config::Wanted;
use super::report::Finding;
use super::system::{self, Root};
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
    let mut found = memory(root, wanted, need);
    found.push(open_files(root, need));
    found.extend(memlock(root, wanted));
    found.push(threads(root, need));
    found.push(hugepages(root, wanted));
    found.push(transparent_pages(root));
    found.extend(overcommit(root, wanted));
    found.extend(numa(root, wanted));
    found.push(shared_memory(root));
    found.push(clock(need.skew));
    if let Some(path) = &wanted.ssd {
        found.push(io_uring(root));
        found.extend(disk(path));
    }
    if let Some(mtu) = need.mtu {
        found.push(path_mtu(mtu));
    }
    if let Some(rtt) = need.rtt {
        found.push(tcp_buffers(root, rtt));
    }
    found
}

fn own_memory(wanted: &Wanted) -> u64 {
    let size = |s: Option<ByteSize>| s.map_or(0, |s| s.0);
    size(wanted.segment).saturating_add(size(wanted.buffer))
}

fn memory(root: &Root, wanted: &Wanted, need: &Need) -> Vec<Finding> {
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
fn for_each_group(root: &Root, controller: &str, mut look: impl FnMut(&str)) {
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

/// Soft and hard limit of this process; `u64::MAX` = unlimited.
fn limit(root: &Root, name: &str) -> Option<(u64, u64)> {
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
fn memlock(root: &Root, wanted: &Wanted) -> Vec<Finding> {
    let nics = root.names("/sys/class/infiniband").len() as u64;
    if !wanted.rdma || nics == 0 {
        return Vec::new();
    }
    let Some((soft, _)) = limit(root, "Max locked memory") else {
        return Vec::new();
    };
    let needed = own_memory(wanted);
    let shown = |limit: &str| {
        format!(
            "limit {limit}, {} to register on {nics} NIC(s)",
            ByteSize(needed)
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

/// A lane is a thread at the serving side.
fn threads(root: &Root, need: &Need) -> Finding {
    let check = "threads";
    let wanted = FILES_BASE + need.peers * LANES_EACH;
    let mut least = limit(root, "Max processes").map_or(u64::MAX, |(soft, _)| soft);
    let mut place = "ulimit -u".to_owned();
    for_each_group(root, "pids", |directory| {
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

fn hugepages(root: &Root, wanted: &Wanted) -> Finding {
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

fn transparent_pages(root: &Root) -> Finding {
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

fn overcommit(root: &Root, wanted: &Wanted) -> Vec<Finding> {
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

fn numa(root: &Root, wanted: &Wanted) -> Vec<Finding> {
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
fn shared_memory(root: &Root) -> Finding {
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

fn io_uring(root: &Root) -> Finding {
    let check = "io_uring";
    match root.number("/proc/sys/kernel/io_uring_disabled") {
        Some(2) => Finding::warn(
            check,
            "io_uring_off",
            "kernel.io_uring_disabled = 2",
            "the SSD tier falls back to plain reads and writes",
        )
        .remedy("allow it")
        .command("sysctl -w kernel.io_uring_disabled=0"),
        Some(1) => Finding::warn(
            check,
            "io_uring_off",
            "kernel.io_uring_disabled = 1",
            "only a group of users may use it; others fall back to plain reads and writes",
        )
        .remedy("allow it, or join the group of kernel.io_uring_group")
        .command("sysctl -w kernel.io_uring_disabled=0"),
        Some(_) => Finding::ok(check, "allowed"),
        None => Finding::ok(check, "this kernel has no switch against it"),
    }
}

const BLOCK: usize = 1 << 20;
/// Enough for a figure, little enough for any disk.
const BLOCKS: u64 = 16;

fn disk(path: &Path) -> Vec<Finding> {
    let check = "SSD path";
    let name = path.display().to_string();
    let Ok(meta) = std::fs::metadata(path) else {
        return vec![
            Finding::fail(check, "ssd_missing", name.clone(), "no such directory")
                .remedy("make it")
                .command(format!("mkdir -p {name}")),
        ];
    };
    if !meta.is_dir() {
        return vec![
            Finding::fail(check, "ssd_no_directory", name, "is not a directory")
                .remedy("name a directory in ssd_offload_path"),
        ];
    }
    let mut found = Vec::new();
    if let Ok(stat) = rustix::fs::statvfs(path) {
        let (free, all) = (
            stat.f_bavail.saturating_mul(stat.f_frsize),
            stat.f_blocks.saturating_mul(stat.f_frsize),
        );
        let shown = format!("{} of {} free", ByteSize(free), ByteSize(all));
        // The share at which file systems become slow.
        if free < all / 20 {
            found.push(
                Finding::fail(
                    "SSD space",
                    "ssd_full",
                    shown,
                    "less than a twentieth is free",
                )
                .remedy("free some, or name another directory in ssd_offload_path"),
            );
        } else {
            found.push(Finding::ok("SSD space", shown));
        }
    }
    let place = path.to_owned();
    let probed = system::within(Duration::from_secs(4), move || write_probe(&place));
    found.insert(0, match probed {
        None => Finding::fail(check, "ssd_stuck", name, "a write of 16 MiB did not end within 4 s").remedy("look at the disk: dmesg"),
        Some(Err(e)) if e.kind() == std::io::ErrorKind::ReadOnlyFilesystem => {
            Finding::fail(check, "ssd_readonly", name, format!("cannot be written: {e}"))
                .remedy("mount it for writing; a disk that fails is mounted read-only by itself: dmesg")
        }
        Some(Err(e)) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            Finding::fail(check, "ssd_forbidden", name.clone(), format!("cannot be written: {e}"))
                .remedy("let this user write there").command(format!("chown $(id -u) {name}"))
        }
        Some(Err(e)) => Finding::fail(check, "ssd_broken", name, format!("cannot be written: {e}")).remedy("look at the disk: dmesg"),
        Some(Ok((direct, rate))) => {
            let shown = format!("{name}: {:.0} MB/s written{}", rate / 1e6, if direct { ", direct I/O" } else { "" });
            if !direct {
                Finding::warn(check, "ssd_no_direct_io", shown, "this file system has no direct I/O: data would be cached twice").remedy("use a directory on ext4 or xfs")
            } else if rate < 50e6 {
                Finding::warn(check, "ssd_slow", shown, "slower than a network of 1 Gbit/s: reading back would cost more than it saves").remedy("name a directory on an SSD in ssd_offload_path")
            } else {
                Finding::ok(check, shown)
            }
        }
    });
    found
}

/// Writes a file past the page cache and removes it: whether that was possible, and bytes per second.
fn write_probe(directory: &Path) -> std::io::Result<(bool, f64)> {
    let path = directory.join(format!(".mooncake-doctor-{}", std::process::id()));
    let open = |flags: i32| {
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .custom_flags(flags)
            .open(&path)
    };
    let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
    // Direct I/O wants memory that begins at a block.
    let memory = vec![0x5A_u8; BLOCK + 4096];
    let at = memory.as_ptr().align_offset(4096).min(4096);
    let outcome = (|| {
        let (file, is_direct) = match open(direct) {
            Ok(file) => (file, true),
            Err(e) if e.raw_os_error() == Some(22) => {
                let _ = std::fs::remove_file(&path);
                (open(0)?, false)
            }
            Err(e) => return Err(e),
        };
        let start = Instant::now();
        for n in 0..BLOCKS {
            file.write_all_at(&memory[at..at + BLOCK], n * BLOCK as u64)?;
        }
        file.sync_data()?;
        let rate = (BLOCKS * BLOCK as u64) as f64 / start.elapsed().as_secs_f64().max(1e-6);
        Ok((is_direct, rate))
    })();
    let _ = std::fs::remove_file(&path);
    outcome
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

/// Seconds since 1970 of `Sun, 06 Nov 1994 08:49:37 GMT`.
pub(super) fn http_date(text: &str) -> Option<i64> {
    const MONTHS: &str = "JanFebMarAprMayJunJulAugSepOctNovDec";
    let mut words = text.split_once(", ")?.1.split_whitespace();
    let day: i64 = words.next()?.parse().ok()?;
    let month = MONTHS.find(words.next()?)? as i64 / 3 + 1;
    let year: i64 = words
        .next()?
        .parse()
        .ok()
        .filter(|y| (1970..10_000).contains(y))?;
    let mut time = words.next()?.split(':').map(|n| n.parse::<i64>().ok());
    let (h, m, s) = (time.next()??, time.next()??, time.next()??);
    // Days from the civil calendar, years that begin in March.
    let y = if month <= 2 { year - 1 } else { year };
    let era = y.div_euclid(400);
    let of_era = y.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
    Some(days * 86_400 + h * 3600 + m * 60 + s)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(
            http_date("Sun, 06 Nov 1994 08:49:37 GMT"),
            Some(784_111_777)
        );
        assert_eq!(
            http_date("Thu, 29 Feb 2024 00:00:00 GMT"),
            Some(1_709_164_800)
        );
        for bad in [
            "",
            "x, 1",
            "Sun, 06 Foo 1994 08:49:37 GMT",
            "Sun, 06 Nov 1994",
        ] {
            assert_eq!(http_date(bad), None, "{bad}");
        }
    }

    #[test]
    fn lists_of_numbers() {
        assert_eq!(list("0-2,5"), [0, 1, 2, 5]);
        assert_eq!(list("x,,7-"), Vec::<u64>::new());
    }

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
