//! What an odd row, column or pair of the mesh means: who does not reach whom. `mesh_speed` looks at the paths that work.
//!
//! Owns the conclusions. Plain: a matrix in, findings out.
//!
//! A row that fails is a node that reaches nobody; a column, a node that nobody reaches; both, a node that is cut off.
//! Rows and columns are taken greedily, those that explain the most first, a column before a row; what is left over is
//! between groups of nodes, or between two.

use std::collections::BTreeSet;

use super::mesh::{Matrix, micros};
use super::mesh_speed::{far, slow, typical};
use super::report::Finding;
use crate::base::units::ByteSize;
use crate::store::wire::ProbeResult;

pub(super) type Pairs = BTreeSet<(usize, usize)>;

/// A row or a column of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// What a node sends.
    Row(usize),
    /// What a node receives.
    Column(usize),
}

impl Line {
    pub(super) fn node(self) -> usize {
        match self {
            Self::Row(n) | Self::Column(n) => n,
        }
    }
    pub(super) fn has(self, (from, to): (usize, usize)) -> bool {
        match self {
            Self::Row(n) => from == n,
            Self::Column(n) => to == n,
        }
    }
}

/// Lines that are wholly odd and explain at least two pairs; those pairs leave `odd`. `tested`: all that were looked at.
pub(super) fn lines(nodes: usize, odd: &mut Pairs, tested: &Pairs) -> Vec<Line> {
    let whole: Vec<Line> = (0..nodes)
        .map(Line::Column)
        .chain((0..nodes).map(Line::Row))
        .filter(|line| {
            let mut all = tested.iter().filter(|p| line.has(**p)).peekable();
            all.peek().is_some() && all.all(|p| odd.contains(p))
        })
        .collect();
    let mut found = Vec::new();
    loop {
        let explains = |line: &Line| odd.iter().filter(|p| line.has(**p)).count();
        // The first of equals: columns come first.
        let best = whole
            .iter()
            .rev()
            .max_by_key(|line| explains(line))
            .copied();
        match best {
            Some(line) if explains(&line) >= 2 => {
                odd.retain(|p| !line.has(*p));
                found.push(line);
            }
            _ => return found,
        }
    }
}

pub(super) fn name(m: &Matrix, node: usize) -> String {
    m.nodes[node].name.clone()
}

pub(super) fn arrow(m: &Matrix, (from, to): (usize, usize)) -> String {
    format!("{} → {}", name(m, from), name(m, to))
}

/// Everything that is to be said of a matrix.
pub(super) fn judge(m: &Matrix) -> Vec<Finding> {
    let count = m.nodes.len();
    if count < 2 {
        return vec![Finding::skipped(
            "mesh",
            "a mesh needs two nodes; the pool has fewer",
        )];
    }
    let pairs = (0..count).flat_map(|a| (0..count).map(move |b| (a, b)));
    let pairs: Pairs = pairs.filter(|(a, b)| a != b).collect();
    let tested: Pairs = pairs
        .iter()
        .copied()
        .filter(|p| m.get(p.0, p.1).is_some())
        .collect();
    let mut found = untested(m, &pairs, &tested);
    let failed: Pairs = tested
        .iter()
        .copied()
        .filter(|p| m.get(p.0, p.1).is_some_and(|r| !r.cause.is_empty()))
        .collect();
    found.extend(unreached(m, failed.clone(), &tested));
    found.extend(slow(m, &tested));
    found.extend(far(m, &tested));
    if !tested.is_empty() {
        let worked = tested.len() - failed.len();
        let (rate, trip) = typical(m, &tested);
        let shown = format!(
            "{worked} of {} paths work, usually {} and {}/s",
            pairs.len(),
            micros(trip),
            ByteSize(rate)
        );
        if worked > 0 {
            found.insert(0, Finding::ok("paths", shown));
        }
    }
    found
}

fn untested(m: &Matrix, pairs: &Pairs, tested: &Pairs) -> Vec<Finding> {
    let missing: Pairs = pairs.difference(tested).copied().collect();
    let mut rest = missing.clone();
    let mut found = Vec::new();
    for node in 0..m.nodes.len() {
        let row = Line::Row(node);
        if !pairs
            .iter()
            .filter(|p| row.has(**p))
            .all(|p| missing.contains(p))
        {
            continue;
        }
        rest.retain(|p| !row.has(*p));
        let n = &m.nodes[node];
        let why = match n.state.as_str() {
            _ if n.build.is_empty() => "is of an older release that cannot test".to_owned(),
            "ok" | "draining" | "suspect" => "was asked and reported nothing".to_owned(),
            state => format!("is {state}: the master could not ask it"),
        };
        found.push(
            Finding::warn("mesh", "mesh_no_report", n.name.clone(), why)
                .remedy("look whether that host and its node are alive"),
        );
    }
    if !rest.is_empty() {
        let reason = format!("{} paths were not tested in time", rest.len());
        found.push(Finding::skipped("mesh", reason));
    }
    found
}

/// What most of the failed paths said.
fn said(m: &Matrix, pairs: impl Iterator<Item = (usize, usize)>) -> (&str, &str) {
    let mut all: Vec<&ProbeResult> = pairs.filter_map(|(a, b)| m.get(a, b)).collect();
    all.retain(|r| !r.cause.is_empty());
    let often = |r: &&ProbeResult| all.iter().filter(|o| o.cause == r.cause).count();
    let most = all.iter().copied().max_by_key(often);
    most.map_or(("", ""), |r| (r.cause.as_str(), r.reason.as_str()))
}

fn port(m: &Matrix, node: usize) -> &str {
    let address = m.nodes[node].address.as_str();
    address.rsplit_once(':').map_or("", |(_, port)| port)
}

fn unreached(m: &Matrix, failed: Pairs, tested: &Pairs) -> Vec<Finding> {
    let mut left = failed.clone();
    let lines = lines(m.nodes.len(), &mut left, tested);
    let mut found = Vec::new();
    for line in &lines {
        let node = line.node();
        let both = lines.contains(&Line::Row(node)) && lines.contains(&Line::Column(node));
        if both && matches!(line, Line::Row(_)) {
            continue;
        }
        let in_line = failed.iter().copied().filter(|p| line.has(*p));
        let (cause, reason) = said(m, in_line);
        found.push(odd_line(m, *line, both, cause, reason));
    }
    found.extend(split(m, &mut left));
    found.extend(single(m, left));
    found
}

fn odd_line(m: &Matrix, line: Line, both: bool, cause: &str, reason: &str) -> Finding {
    let node = line.node();
    let (who, address) = (name(m, node), m.nodes[node].address.clone());
    let check = format!("node {who}");
    if cause == "black_hole" || cause == "crawls" {
        return black_hole(check, who, reason);
    }
    let finds_itself = m.get(node, node).is_none_or(|r| r.cause.is_empty());
    if both {
        return Finding::fail(
            check,
            "mesh_cut_off",
            address,
            format!("reaches nobody, and nobody reaches it: {reason}"),
        )
        .remedy("look at its link, its routes, and at firewalls on both sides of it");
    }
    match line {
        Line::Row(_) => Finding::fail(
            check,
            "mesh_outgoing",
            address,
            format!("reaches nobody, and is reached: what it sends is stopped: {reason}"),
        )
        .remedy("allow outgoing TCP on that host, and look at its routes")
        .command(format!("nft list ruleset    # on {who}, chain output")),
        Line::Column(_) if !finds_itself => Finding::fail(
            check,
            "mesh_address",
            address,
            format!("nobody reaches it there, itself included: it announces an address that is not its own ({reason})"),
        )
        .remedy("start that node with --bind or --advertise ITS-ADDRESS"),
        Line::Column(_) => Finding::fail(
            check,
            "mesh_incoming",
            address.clone(),
            format!("nobody but itself reaches it, and it reaches others: {reason}"),
        )
        .remedy(format!("allow TCP port {} in that host's firewall", port(m, node)))
        .command(format!("nft list ruleset | grep -n -e drop -e {}    # on {who}", port(m, node))),
    }
}

fn black_hole(check: String, who: String, reason: &str) -> Finding {
    Finding::fail(
        check,
        "mesh_mtu",
        who,
        format!("{reason}: a link on the way has a smaller MTU and the ICMP that would tell is dropped, or it loses packets"),
    )
    .remedy("set the same MTU on all links, or let ICMP type 3 code 4 (IPv6: type 2) pass")
    .command("sysctl -w net.ipv4.tcp_mtu_probing=1")
}

/// Groups that are whole within and have nothing between them.
fn split(m: &Matrix, left: &mut Pairs) -> Option<Finding> {
    let count = m.nodes.len();
    let mut group: Vec<usize> = (0..count).collect();
    let joined = |a: usize, b: usize| {
        [(a, b), (b, a)]
            .iter()
            .any(|p| m.get(p.0, p.1).is_some_and(|r| r.cause.is_empty()))
    };
    for a in 0..count {
        for b in 0..a {
            if joined(a, b) && group[a] != group[b] {
                let (old, new) = (group[a], group[b]);
                group
                    .iter_mut()
                    .filter(|g| **g == old)
                    .for_each(|g| *g = new);
            }
        }
    }
    let across = |p: &(usize, usize)| group[p.0] != group[p.1];
    let names: BTreeSet<usize> = group.iter().copied().collect();
    let members = |g: usize| -> Vec<String> {
        (0..count)
            .filter(|n| group[*n] == g)
            .map(|n| name(m, n))
            .collect()
    };
    // Nodes alone were named as rows and columns.
    let sides: Vec<Vec<String>> = names
        .into_iter()
        .map(members)
        .filter(|s| s.len() > 1)
        .collect();
    let (_, reason) = said(m, left.iter().copied().filter(|p| across(p)));
    let between = left.iter().filter(|p| across(p)).count();
    if sides.len() < 2 || between < 4 {
        return None;
    }
    let finding = Finding::fail(
        "groups",
        "mesh_split",
        sides
            .iter()
            .map(|s| s.join(", "))
            .collect::<Vec<_>>()
            .join(" | "),
        format!("within each group all is well, and nothing passes between them: {reason}"),
    )
    .remedy("look at the switch, router or firewall between these networks");
    left.retain(|p| !across(p));
    Some(finding)
}

/// What is between two nodes.
fn single(m: &Matrix, left: Pairs) -> Vec<Finding> {
    let mut found = Vec::new();
    for &(from, to) in &left {
        let back = (to, from);
        let both = left.contains(&back);
        if both && from > to {
            continue;
        }
        let (cause, reason) = said(m, std::iter::once((from, to)));
        let (a, b) = (name(m, from), name(m, to));
        let check = format!("{a} {} {b}", if both { "↔" } else { "→" });
        let value = m.nodes[to].address.clone();
        found.push(match cause {
            "black_hole" | "crawls" => black_hole(check, b, reason),
            _ if both => Finding::fail(
                check,
                "mesh_pair",
                value,
                format!("neither reaches the other: {reason}"),
            )
            .remedy("look at the route between these two, and at rules that name them")
            .command(format!("ip route get {}    # on {a}", host(m, to))),
            _ => Finding::fail(
                check,
                "mesh_one_way",
                value,
                format!("does not reach it, and the way back works: {reason}"),
            )
            .remedy(format!(
                "look for a firewall rule on {b} that names {a}, and on {a} that names {b}"
            ))
            .command(format!(
                "nft list ruleset | grep -n {}    # on {b}",
                host(m, from)
            )),
        });
    }
    found
}

pub(super) fn host(m: &Matrix, node: usize) -> &str {
    let address = m.nodes[node].address.as_str();
    address.rsplit_once(':').map_or(address, |(host, _)| host)
}
#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::wire::MeshNode;

    fn good() -> ProbeResult {
        ProbeResult {
            connect_us: 100,
            round_trip_us: 100,
            moved_bytes: 1 << 20,
            bytes_per_second: 1_000_000_000,
            ..ProbeResult::default()
        }
    }

    fn bad(cause: &str) -> ProbeResult {
        ProbeResult {
            cause: cause.to_owned(),
            reason: "why".to_owned(),
            ..ProbeResult::default()
        }
    }

    /// All paths good but those that `change` names.
    fn matrix(count: usize, change: impl Fn(usize, usize) -> Option<ProbeResult>) -> Matrix {
        let node = |n: usize| MeshNode {
            name: format!("n{n}"),
            address: format!("10.0.0.{n}:7000"),
            host_id: format!("h{n}"),
            build: "1".to_owned(),
            state: "ok".to_owned(),
            probes: true,
        };
        let mut m = Matrix::of((0..count).map(node).collect());
        for from in 0..count {
            for to in 0..count {
                m.set(from, to, change(from, to).unwrap_or_else(good));
            }
        }
        m
    }

    fn causes(m: &Matrix) -> Vec<(String, &'static str)> {
        let found = judge(m).into_iter().filter(|f| !f.cause.is_empty());
        found.map(|f| (f.check, f.cause)).collect()
    }

    fn one(m: &Matrix, check: &str, cause: &str) {
        assert_eq!(
            causes(m),
            [(check.to_owned(), cause)]
                .map(|(c, k)| (c, Box::leak(k.to_owned().into_boxed_str()) as &str))
        );
    }

    #[test]
    fn nothing_is_said_of_a_sound_mesh() {
        for count in 2..6 {
            assert_eq!(causes(&matrix(count, |_, _| None)), []);
        }
        assert_eq!(causes(&matrix(1, |_, _| None)), []);
        assert_eq!(causes(&Matrix::default()), []);
    }

    #[test]
    fn rows_and_columns_are_told_apart() {
        for count in 3..7 {
            let t = |on: bool| on.then(|| bad("timeout"));
            one(
                &matrix(count, |a, b| t(b == 1 && a != 1)),
                "node n1",
                "mesh_incoming",
            );
            one(&matrix(count, |_, b| t(b == 1)), "node n1", "mesh_address");
            one(
                &matrix(count, |a, b| t(a == 1 && b != 1)),
                "node n1",
                "mesh_outgoing",
            );
            one(
                &matrix(count, |a, b| t((a == 1) != (b == 1))),
                "node n1",
                "mesh_cut_off",
            );
            one(
                &matrix(count, |a, b| t((a, b) == (0, 2))),
                "n0 → n2",
                "mesh_one_way",
            );
            one(
                &matrix(count, |a, b| t(a + b == 2 && a != b)),
                "n0 ↔ n2",
                "mesh_pair",
            );
            let hole = |a: usize, b: usize| ((a == 1) != (b == 1)).then(|| bad("black_hole"));
            one(&matrix(count, hole), "node n1", "mesh_mtu");
        }
    }

    #[test]
    fn two_deaf_nodes_do_not_make_a_third_mute() {
        let m = matrix(3, |a, b| (a != b && b > 0).then(|| bad("timeout")));
        let mut found = causes(&m);
        found.sort();
        let wanted = ["node n1", "node n2"].map(|n| (n.to_owned(), "mesh_incoming"));
        assert_eq!(found, wanted);
    }

    #[test]
    fn groups_and_pairs() {
        let apart = |a: usize, b: usize| (a / 2 != b / 2).then(|| bad("timeout"));
        one(&matrix(4, apart), "groups", "mesh_split");
        one(
            &matrix(2, |a, b| (a != b).then(|| bad("timeout"))),
            "n0 ↔ n1",
            "mesh_pair",
        );
        one(
            &matrix(2, |a, b| (a > b).then(|| bad("timeout"))),
            "n1 → n0",
            "mesh_one_way",
        );
    }

    #[test]
    fn slow_and_far() {
        let at = |rate: u64, us: u64| ProbeResult {
            bytes_per_second: rate,
            round_trip_us: us,
            ..good()
        };
        let crawl = |on: bool| on.then(|| at(10_000_000, 100));
        one(
            &matrix(4, |a, _| crawl(a == 2)),
            "node n2",
            "mesh_slow_outgoing",
        );
        one(
            &matrix(4, |_, b| crawl(b == 2)),
            "node n2",
            "mesh_slow_incoming",
        );
        one(
            &matrix(4, |a, b| crawl(a == 2 || b == 2)),
            "node n2",
            "mesh_slow_node",
        );
        one(
            &matrix(4, |a, b| crawl((a, b) == (0, 3))),
            "n0 → n3",
            "mesh_slow_path",
        );
        one(&matrix(2, |a, b| crawl(a > b)), "n1 → n0", "mesh_slow_path");
        let long = |on: bool| on.then(|| at(1_000_000_000, 5000));
        one(
            &matrix(4, |a, b| long(a == 2 || b == 2)),
            "node n2",
            "mesh_far_node",
        );
        one(
            &matrix(4, |a, b| long(a + b == 3 && a * b == 0)),
            "n0 → n3",
            "mesh_far_path",
        );
    }

    #[test]
    fn a_silent_node_is_named() {
        let mut m = matrix(3, |_, _| None);
        for to in 0..3 {
            m.cells_for_test(1, to);
        }
        m.nodes[1].state = "lost".to_owned();
        one(&m, "mesh", "mesh_no_report");
    }
}
