//! Paths of the mesh that work and are slower, or further, than the others.
//!
//! Owns what is called slow and far. Plain: a matrix in, findings out.

use std::collections::BTreeSet;

use super::mesh::{Matrix, micros};
use super::mesh_judge::{Line, Pairs, arrow, host, lines, name};
use super::report::Finding;
use crate::base::units::ByteSize;
use crate::store::wire::ProbeResult;

/// A path is slow when it has less than this share of what most have.
const SLOW: f64 = 0.25;
/// A path that carries this many bytes a second is never called slow: it is more than a 10 Gbit/s link.
const FAST: u64 = 1_250_000_000;
/// A path is far when its round trip is this many times that of most, and at least a millisecond.
const FAR: u64 = 5;
const FAR_US: u64 = 1000;

fn far_apart(m: &Matrix, (a, b): (usize, usize)) -> bool {
    let (a, b) = (&m.nodes[a], &m.nodes[b]);
    a.host_id.is_empty() || a.host_id != b.host_id
}

/// Working paths between hosts; when all nodes share one, between nodes.
fn comparable(m: &Matrix, tested: &Pairs) -> Pairs {
    let works = |p: &&(usize, usize)| m.get(p.0, p.1).is_some_and(|r| r.cause.is_empty());
    let apart: Pairs = tested
        .iter()
        .filter(works)
        .filter(|p| far_apart(m, **p))
        .copied()
        .collect();
    if apart.is_empty() {
        tested.iter().filter(works).copied().collect()
    } else {
        apart
    }
}

/// The value at three quarters of the way up: what paths have that nothing holds back.
fn upper(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values.get(values.len() * 3 / 4).copied().unwrap_or(0)
}

/// The value at a quarter of the way up.
fn lower(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 4).copied().unwrap_or(0)
}

/// Usual bandwidth and round trip.
pub(super) fn typical(m: &Matrix, tested: &Pairs) -> (u64, u64) {
    let paths = comparable(m, tested);
    let of = |pick: fn(&ProbeResult) -> u64| -> Vec<u64> {
        paths
            .iter()
            .filter_map(|p| m.get(p.0, p.1))
            .map(pick)
            .collect()
    };
    (
        upper(of(|r| r.bytes_per_second)),
        lower(of(|r| r.round_trip_us)),
    )
}

pub(super) fn slow(m: &Matrix, tested: &Pairs) -> Vec<Finding> {
    let moved: Pairs = comparable(m, tested)
        .into_iter()
        .filter(|p| m.get(p.0, p.1).is_some_and(|r| r.moved_bytes > 0))
        .collect();
    let rate = |p: &(usize, usize)| m.get(p.0, p.1).map_or(0, |r| r.bytes_per_second);
    let usual = upper(moved.iter().map(rate).collect());
    let is_slow = |p: &&(usize, usize)| rate(p) < FAST && (rate(p) as f64) < usual as f64 * SLOW;
    let mut left: Pairs = moved.iter().filter(is_slow).copied().collect();
    let all = left.clone();
    let lines = lines(m.nodes.len(), &mut left, &moved);
    let shown = |pairs: &mut dyn Iterator<Item = (usize, usize)>| {
        let of = upper(pairs.map(|p| rate(&p)).collect());
        format!(
            "{}/s, where others have {}/s",
            ByteSize(of),
            ByteSize(usual)
        )
    };
    let mut found = Vec::new();
    for line in &lines {
        let node = line.node();
        let both = lines.contains(&Line::Row(node)) && lines.contains(&Line::Column(node));
        let (cause, reason) = match line {
            Line::Row(_) if both => continue,
            _ if both => ("mesh_slow_node", "all it sends and receives is slow"),
            Line::Row(_) => (
                "mesh_slow_outgoing",
                "all it sends is slow, what it receives is not",
            ),
            Line::Column(_) => (
                "mesh_slow_incoming",
                "all it receives is slow, what it sends is not",
            ),
        };
        let value = shown(&mut all.iter().copied().filter(|p| line.has(*p)));
        found.push(
            Finding::warn(format!("node {}", name(m, node)), cause, value, reason)
                .remedy(
                    "look at its link's speed and errors, at limits set on it (tc), and at its CPU",
                )
                .command(format!("ip -s link; tc qdisc    # on {}", name(m, node))),
        );
    }
    for pair in left {
        let value = shown(&mut std::iter::once(pair));
        let reason = "this path is slow, others of both nodes are not";
        found.push(
            Finding::warn(arrow(m, pair), "mesh_slow_path", value, reason)
                .remedy("look at the route between these two and for losses on it")
                .command(format!(
                    "ip route get {}    # on {}",
                    host(m, pair.1),
                    name(m, pair.0)
                )),
        );
    }
    found
}

pub(super) fn far(m: &Matrix, tested: &Pairs) -> Vec<Finding> {
    let paths = comparable(m, tested);
    let trip = |p: &(usize, usize)| m.get(p.0, p.1).map_or(0, |r| r.round_trip_us);
    let usual = lower(paths.iter().map(trip).collect());
    let is_far = |p: &&(usize, usize)| trip(p) >= FAR_US && trip(p) > usual.saturating_mul(FAR);
    let mut left: Pairs = paths.iter().filter(is_far).copied().collect();
    let all = left.clone();
    let lines = lines(m.nodes.len(), &mut left, &paths);
    let mut named = BTreeSet::new();
    let mut found = Vec::new();
    for line in lines {
        let node = line.node();
        if !named.insert(node) {
            continue;
        }
        let trips = all.iter().filter(|p| line.has(**p)).map(trip).collect();
        let value = format!(
            "{}, where others have {}",
            micros(lower(trips)),
            micros(usual)
        );
        let reason = "every round trip with it takes longer than elsewhere";
        found.push(
            Finding::warn(
                format!("node {}", name(m, node)),
                "mesh_far_node",
                value,
                reason,
            )
            .remedy("look at the distance, at queues (tc), and at the load of that host"),
        );
    }
    // A round trip is one figure for both directions.
    left.retain(|p| p.0 < p.1 || !all.contains(&(p.1, p.0)));
    for pair in left {
        let value = format!(
            "{}, where others have {}",
            micros(trip(&pair)),
            micros(usual)
        );
        let reason = "this round trip takes longer than others of both nodes";
        found.push(
            Finding::warn(arrow(m, pair), "mesh_far_path", value, reason)
                .remedy("look at the route between these two")
                .command(format!(
                    "traceroute {}    # on {}",
                    host(m, pair.1),
                    name(m, pair.0)
                )),
        );
    }
    found
}
