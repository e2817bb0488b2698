//! The pool itself: nodes that are lost or suspect, room, eviction, failed puts, objects at risk, versions.
//!
//! Asks the master as `mooncake inspect` does, grants no lease and changes nothing. Refuses to know how it is reached.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::report::Finding;
use crate::base::units::{ByteSize, format_duration};
use crate::store::client::PoolClient;
use crate::store::model::error::StoreError;
use crate::store::wire::{OverviewReply, SegmentView};

/// Keys looked at for lost replicas.
const SAMPLE: u32 = 200;
/// A pool that is turned over faster than this keeps nothing long enough to be found again.
const TURNOVER: Duration = Duration::from_secs(60);
/// Time between two looks at the counters.
const LOOK_AGAIN: Duration = Duration::from_millis(700);

/// What the master says of its pool.
pub(super) struct Seen {
    pub(super) overview: OverviewReply,
    pub(super) segments: Vec<SegmentView>,
}

/// Asks once.
pub(super) fn look(client: &PoolClient) -> Result<Seen, StoreError> {
    Ok(Seen {
        overview: client.overview()?,
        segments: client.segments()?,
    })
}

/// `(name, address)` of every node, once.
pub(super) fn nodes(segments: &[SegmentView]) -> Vec<(String, String, String)> {
    let mut known = BTreeSet::new();
    let nodes = segments
        .iter()
        .filter(|s| known.insert((s.node_high, s.node_low)));
    nodes
        .map(|s| (s.node.clone(), s.address.clone(), s.host_id.clone()))
        .collect()
}

/// Judges what was seen; asks again for what changes, and for a sample of objects.
pub(super) fn check(
    client: &PoolClient,
    seen: &Seen,
    metrics: Option<&str>,
    host_id: &str,
) -> Vec<Finding> {
    let mut found = states(&seen.segments);
    found.extend(addresses(&seen.segments, host_id));
    found.push(version(&seen.overview, &seen.segments));
    found.extend(index(&seen.overview));
    found.push(room(&seen.overview));
    found.extend(fragmentation(&seen.segments));
    std::thread::sleep(LOOK_AGAIN);
    let later = client.overview().ok();
    found.push(eviction(&seen.overview, later.as_ref(), LOOK_AGAIN));
    found.push(failures(metrics));
    found.push(at_risk(client, &seen.segments));
    found
}

fn states(segments: &[SegmentView]) -> Vec<Finding> {
    let check = "nodes";
    if segments.is_empty() {
        return vec![
            Finding::fail(
                check,
                "no_nodes",
                "none",
                "the pool has no memory: every put fails",
            )
            .remedy("start a node on each host")
            .command("mooncake node --master MASTER:50051 --memory 4GiB"),
        ];
    }
    let mut by_state: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for s in segments {
        by_state
            .entry(s.state.as_str())
            .or_default()
            .insert(s.node.as_str());
    }
    let mut found = Vec::new();
    for (state, nodes) in &by_state {
        let list = nodes.iter().copied().collect::<Vec<_>>().join(", ");
        let one = format!("{state}: {list}");
        found.push(match *state {
            "ok" => Finding::ok(check, format!("{} in service", nodes.len())),
            "lost" => Finding::fail(check, "node_lost", one, "the session broke; it is unmounted after client-ttl, and what lay only there is gone")
                .remedy("look whether that host and its node are alive; a node that lives comes back by itself"),
            "suspect" => Finding::warn(check, "node_suspect", one, "a client could not reach it in the last seconds: it is avoided")
                .remedy("run mooncake doctor on that host"),
            "rebuilding" => Finding::warn(check, "node_rebuilding", one, "its directory is being read").remedy("wait"),
            _ => Finding::ok(check, one),
        });
    }
    found
}

/// Data addresses that only one host can use, in a pool of several.
fn addresses(segments: &[SegmentView], host_id: &str) -> Vec<Finding> {
    let hosts: BTreeSet<&str> = segments.iter().map(|s| s.host_id.as_str()).collect();
    let mut many = hosts.len() > 1;
    many |= hosts.iter().any(|h| *h != host_id);
    let loopback: BTreeSet<&str> = segments
        .iter()
        .filter(|s| {
            s.address
                .parse::<std::net::SocketAddr>()
                .is_ok_and(|a| a.ip().is_loopback())
        })
        .map(|s| s.address.as_str())
        .collect();
    if !many || loopback.is_empty() {
        return Vec::new();
    }
    let list = loopback.into_iter().collect::<Vec<_>>().join(", ");
    vec![
        Finding::fail("data addresses", "loopback_node", list, "a node of a pool of several hosts announces loopback: other hosts cannot reach its data")
            .remedy("start that node with --bind or --advertise ITS-ADDRESS"),
    ]
}

/// Releases that meet: this program, the master, the nodes.
fn version(o: &OverviewReply, segments: &[SegmentView]) -> Finding {
    let own = env!("CARGO_PKG_VERSION");
    let mut builds: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for s in segments {
        let build = if s.build.is_empty() {
            "older"
        } else {
            &s.build
        };
        builds.entry(build).or_default().insert(&s.node);
    }
    if o.build == own && builds.keys().all(|b| *b == own) {
        return Finding::ok("version", format!("{own}, master, nodes and this program"));
    }
    let mut shown = format!("master {}, this program {own}", o.build);
    for (build, nodes) in builds {
        // The few, not the many: a mix is usually one host that was forgotten.
        let list = if nodes.len() <= 4 {
            nodes.into_iter().collect::<Vec<_>>().join(" ")
        } else {
            format!("{} nodes", nodes.len())
        };
        shown.push_str(&format!(", {list} {build}"));
    }
    Finding::warn("version", "version_mix", shown, "different releases meet")
        .remedy("run the same release on all hosts")
}

/// A master that has just started gives its nodes time to come back.
const STARTING: Duration = Duration::from_secs(5);

fn index(o: &OverviewReply) -> Option<Finding> {
    if !o.rebuilding {
        return None;
    }
    let up = Duration::from_millis(o.uptime_ms);
    if up < STARTING {
        return Some(Finding::ok(
            "index",
            "the master has just started, and waits for its nodes",
        ));
    }
    let shown = format!(
        "rebuilding, {} after the start",
        format_duration(Duration::from_secs(up.as_secs()))
    );
    let reason = "the master reads its nodes' directories: keys may be answered as not known yet";
    Some(
        Finding::warn("index", "rebuilding", shown, reason).remedy(
            "wait; if it lasts, look for a node that does not answer: mooncake inspect nodes",
        ),
    )
}

fn room(o: &OverviewReply) -> Finding {
    let share = o.used_bytes as f64 / o.capacity_bytes.max(1) as f64;
    let shown = format!(
        "{} of {} used ({:.0} %), {} objects",
        ByteSize(o.used_bytes),
        ByteSize(o.capacity_bytes),
        share * 100.0,
        o.objects
    );
    // The default watermark is 0.90 and a round frees 0.05: a pool that evicts stays below.
    if o.capacity_bytes > 0 && share > 0.97 {
        return Finding::warn(
            "room",
            "pool_full",
            shown,
            "eviction does not keep up, or everything is leased or pinned",
        )
        .remedy("add memory: another node, or more of it");
    }
    Finding::ok("room", shown)
}

fn fragmentation(segments: &[SegmentView]) -> Vec<Finding> {
    let bad: Vec<String> = segments
        .iter()
        .filter(|s| {
            let free = s.size_bytes.saturating_sub(s.used_bytes);
            free > s.size_bytes / 10 && s.largest_free_bytes < free / 20
        })
        .map(|s| {
            format!(
                "{}: {} free, largest range {}",
                s.name,
                ByteSize(s.size_bytes.saturating_sub(s.used_bytes)),
                ByteSize(s.largest_free_bytes)
            )
        })
        .collect();
    if bad.is_empty() {
        return vec![Finding::ok(
            "fragmentation",
            format!("none in {} segment(s)", segments.len()),
        )];
    }
    vec![
        Finding::warn(
            "fragmentation",
            "fragmented",
            bad.join("; "),
            "free space lies in small pieces: large objects cause eviction though there is room",
        )
        .remedy("use objects of similar sizes, or larger segments"),
    ]
}

fn eviction(first: &OverviewReply, later: Option<&OverviewReply>, between: Duration) -> Finding {
    let rate = |bytes: u64, time: Duration| bytes as f64 / time.as_secs_f64().max(0.001);
    let overall = rate(first.evicted_bytes, Duration::from_millis(first.uptime_ms));
    let recent = later.map_or(0.0, |l| {
        rate(l.evicted_bytes.saturating_sub(first.evicted_bytes), between)
    });
    let fastest = overall.max(recent);
    let shown = format!(
        "{} objects, {} since the start",
        first.evicted_objects,
        ByteSize(first.evicted_bytes)
    );
    if first.capacity_bytes > 0 && fastest > first.capacity_bytes as f64 / TURNOVER.as_secs_f64() {
        let seconds = first.capacity_bytes as f64 / fastest;
        let reason = format!(
            "at this rate the whole pool is replaced every {}: little is found again",
            format_duration(Duration::from_secs_f64(seconds.max(0.1)))
        );
        return Finding::warn("eviction", "eviction_thrash", shown, reason)
            .remedy("add memory: another node, or more of it");
    }
    Finding::ok("eviction", shown)
}

fn failures(metrics: Option<&str>) -> Finding {
    let check = "failed puts";
    let name = "master_put_start_alloc_failures_total";
    let count = metrics.and_then(|text| {
        text.lines()
            .find_map(|l| l.strip_prefix(name)?.trim().parse::<u64>().ok())
    });
    match count {
        None => Finding::skipped(check, "the master's /metrics could not be read"),
        Some(0) => Finding::ok(check, "none since the master's start"),
        Some(n) => Finding::warn(
            check,
            "puts_failed",
            format!("{n} since the master's start"),
            "they found no space: everything was leased, pinned, or in too small pieces",
        )
        .remedy("add memory, pin less, or shorten --default-kv-lease-ttl"),
    }
}

/// Objects of this tenant whose every replica lies on a node that is not in service.
fn at_risk(client: &PoolClient, segments: &[SegmentView]) -> Finding {
    let check = "objects at risk";
    let down: BTreeSet<&str> = segments
        .iter()
        .filter(|s| matches!(s.state.as_str(), "lost" | "suspect"))
        .map(|s| s.name.as_str())
        .collect();
    if down.is_empty() {
        return Finding::ok(check, "none: all nodes are in service");
    }
    let Ok(page) = client.list("", "", 0, SAMPLE) else {
        return Finding::skipped(check, "the master did not list its keys");
    };
    let (mut alone, mut fewer) = (0, 0);
    let looked = page.objects.len();
    for object in &page.objects {
        let Ok(d) = client.stat(&object.key) else {
            continue;
        };
        let gone = d
            .replicas
            .iter()
            .filter(|r| down.contains(r.segment_name.as_str()))
            .count();
        if gone == d.replicas.len() {
            alone += 1;
        } else if gone > 0 {
            fewer += 1;
        }
    }
    if alone + fewer == 0 {
        return Finding::ok(check, format!("none of {looked} looked at"));
    }
    let shown = format!(
        "of {looked} looked at: {alone} only on nodes that are down, {fewer} with fewer replicas than written"
    );
    Finding::warn(
        check,
        "under_replicated",
        shown,
        "what lies only on a lost node is gone when it is unmounted",
    )
    .remedy("bring that node back before client-ttl ends, or write with more replicas")
}
