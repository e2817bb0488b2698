//! The nodes of a pool as the master knows them: lost, suspect, emptied, of other releases, at addresses that do not work.
//! What lies in them is judged in `load`.
//!
//! Asks the master as `mooncake inspect` does, grants no lease and changes nothing. Refuses to know how it is reached.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::load;
use super::report::Finding;
use crate::base::units::format_duration;
use crate::store::client::PoolClient;
use crate::store::model::error::StoreError;
use crate::store::wire::{OverviewReply, SegmentView};

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

/// Judges what was seen; asks again for what changes. `told`: what the master's HTTP says.
pub(super) fn check(
    client: &PoolClient,
    seen: &Seen,
    told: &load::Told,
    host_id: &str,
    tenant: &str,
) -> Vec<Finding> {
    let mut found = states(&seen.segments);
    found.extend(addresses(&seen.segments, host_id));
    found.extend(same_host(&seen.segments, host_id));
    found.push(version(&seen.overview, &seen.segments));
    found.extend(index(&seen.overview));
    found.extend(load::check(client, seen, told, tenant));
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
    if by_state.keys().all(|s| *s == "draining") {
        let all = by_state
            .values()
            .flatten()
            .copied()
            .collect::<Vec<_>>()
            .join(", ");
        let reason = "every node is being emptied: puts find no place";
        let f = Finding::fail(check, "all_draining", all, reason);
        return vec![f.remedy("start nodes that stay before the others go")];
    }
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

/// Nodes of this host that offer shared memory which cannot be had from here.
fn same_host(segments: &[SegmentView], host_id: &str) -> Option<Finding> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixStream};
    let answers = |name: &str| {
        let address = SocketAddr::from_abstract_name(name);
        address.and_then(|a| UnixStream::connect_addr(&a)).is_ok()
    };
    let offers =
        |s: &&SegmentView| s.host_id == host_id && s.state == "ok" && !s.shm_socket.is_empty();
    let near = segments.iter().filter(offers);
    let names: BTreeSet<&str> = near
        .filter(|s| !answers(&s.shm_socket))
        .map(|s| s.node.as_str())
        .collect();
    if names.is_empty() {
        return None;
    }
    let list = names.into_iter().collect::<Vec<_>>().join(", ");
    let reason = "runs on this host, and its shared memory cannot be had from here: it has a network namespace of its own (a container)";
    Some(
        Finding::warn("shared memory", "same_host_tcp", list, reason).remedy(
            "run both in one network namespace (containers: --network host), or live with TCP",
        ),
    )
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
