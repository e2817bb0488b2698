//! `--mesh`: has the master tell every node to test the way to every other, and shows what came back as a matrix.
//!
//! Owns asking and showing; what an odd row, column or pair means is `mesh_judge`'s.

use std::time::Duration;

use comfy_table::{CellAlignment, ContentArrangement, Table};
use serde_json::{Value, json};

use super::mesh_judge::judge;
use super::report::Finding;
use crate::base::units::ByteSize;
use crate::cmd::print;
use crate::store::client::{ClientConfig, stream};
use crate::store::model::error::StoreError;
use crate::store::wire::{MeshNode, ProbeResult, mesh_item::Kind};

/// Bytes moved by each pair, unless a path is so slow that 1 MiB must do.
const TRANSFER: u64 = 16 << 20;
/// Nodes up to which the whole matrix is printed.
const PRINTED_MAX: usize = 16;

/// Everything every node said of every other.
#[derive(Debug, Default)]
pub(super) struct Matrix {
    pub(super) nodes: Vec<MeshNode>,
    /// By `from * nodes + to`; `None`: nobody said anything.
    cells: Vec<Option<ProbeResult>>,
    ended: bool,
    left_out: u32,
}

impl Matrix {
    pub(super) fn of(nodes: Vec<MeshNode>) -> Self {
        let cells = vec![None; nodes.len() * nodes.len()];
        Self {
            nodes,
            cells,
            ..Self::default()
        }
    }

    pub(super) fn get(&self, from: usize, to: usize) -> Option<&ProbeResult> {
        self.cells.get(from * self.nodes.len() + to)?.as_ref()
    }

    pub(super) fn set(&mut self, from: usize, to: usize, result: ProbeResult) {
        let count = self.nodes.len();
        if from < count && to < count {
            self.cells[from * count + to] = Some(result);
        }
    }

    #[cfg(test)]
    pub(super) fn cells_for_test(&mut self, from: usize, to: usize) {
        let count = self.nodes.len();
        self.cells[from * count + to] = None;
    }

    fn take(&mut self, kind: Kind) {
        match kind {
            Kind::Nodes(n) => *self = Self::of(n.nodes),
            Kind::Pair(p) => {
                let (from, to) = (p.from as usize, p.to as usize);
                let mut result = p.result.unwrap_or_default();
                // The first look met an idle path: bytes of others delay the second.
                if let Some(first) = self.get(from, to).filter(|r| r.cause.is_empty()) {
                    result.round_trip_us = result.round_trip_us.min(first.round_trip_us);
                }
                self.set(from, to, result);
            }
            Kind::End(end) => {
                self.ended = true;
                self.left_out = end.left_out;
            }
        }
    }

    /// `(from, to)` of all pairs of different nodes.
    fn pairs(&self) -> impl Iterator<Item = (usize, usize)> {
        let count = self.nodes.len();
        (0..count * count)
            .map(move |n| (n / count, n % count))
            .filter(|(a, b)| a != b)
    }

    /// For programs.
    pub(super) fn json(&self) -> Value {
        let nodes: Vec<Value> = self
            .nodes
            .iter()
            .map(|n| {
                json!({"node": n.name, "address": n.address, "host_id": n.host_id, "build": n.build, "state": n.state})
            })
            .collect();
        let pairs: Vec<Value> = self
            .pairs()
            .map(|(from, to)| {
                let mut pair = json!({"from": self.nodes[from].name, "to": self.nodes[to].name});
                let more = match self.get(from, to) {
                    None => json!({"status": "untested"}),
                    Some(r) if r.cause.is_empty() => json!({
                        "status": "ok", "connect_us": r.connect_us, "round_trip_us": r.round_trip_us,
                        "moved_bytes": r.moved_bytes, "bytes_per_second": r.bytes_per_second,
                    }),
                    Some(r) => json!({"status": "fail", "cause": r.cause, "reason": r.reason}),
                };
                if let (Some(pair), Value::Object(more)) = (pair.as_object_mut(), more) {
                    pair.extend(more);
                }
                pair
            })
            .collect();
        json!({"nodes": nodes, "pairs": pairs, "complete": self.ended, "left_out": self.left_out})
    }

    /// For people: rows send, columns receive; round trip above bandwidth, or the cause.
    pub(super) fn text(&self) -> String {
        let mut text = String::from("from (row) to (column): round trip, bytes per second\n");
        for (number, node) in self.nodes.iter().enumerate() {
            let address = if node.name == node.address {
                String::new()
            } else {
                format!(" at {}", node.address)
            };
            let line = format!("  {} = {}{address}", number + 1, node.name);
            text.push_str(&print::shown(&line));
            text.push('\n');
        }
        if self.nodes.len() > PRINTED_MAX {
            text.push_str("  too many nodes to print them all: --output json has every pair\n");
            return text;
        }
        let mut table = Table::new();
        table.load_style(comfy_table::presets::UTF8_FULL_CONDENSED);
        table.set_content_arrangement(ContentArrangement::Disabled);
        let numbers = (1..=self.nodes.len()).map(|n| n.to_string());
        table.set_header(std::iter::once(String::new()).chain(numbers));
        for from in 0..self.nodes.len() {
            let cells = (0..self.nodes.len()).map(|to| self.cell(from, to));
            table.add_row(std::iter::once((from + 1).to_string()).chain(cells));
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        for line in table.lines() {
            text.push_str("  ");
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }

    fn cell(&self, from: usize, to: usize) -> String {
        match self.get(from, to) {
            _ if from == to => "·".to_owned(),
            None => "?".to_owned(),
            Some(r) if !r.cause.is_empty() => print::shown(&r.cause),
            Some(r) if r.moved_bytes == 0 => micros(r.round_trip_us),
            Some(r) => format!(
                "{} {}/s",
                micros(r.round_trip_us),
                ByteSize(r.bytes_per_second)
            ),
        }
    }
}

/// Microseconds, short.
pub(super) fn micros(us: u64) -> String {
    if us < 1000 {
        format!("{us} us")
    } else {
        format!("{:.1} ms", us as f64 / 1000.0)
    }
}

/// Runs the test and judges it.
pub(super) fn check(client: &ClientConfig, time: Duration) -> (Vec<Finding>, Option<Matrix>) {
    let mut matrix = Matrix::default();
    if let Err(error) = stream::mesh(client, TRANSFER, time, |kind| matrix.take(kind)) {
        return (vec![not_run(&error)], None);
    }
    let mut findings = judge(&matrix);
    if !matrix.ended {
        findings.push(
            Finding::warn(
                "mesh",
                "mesh_cut_short",
                "",
                "the master ended the test early",
            )
            .remedy("look at the master's log, and run it again"),
        );
    }
    if matrix.left_out > 0 {
        let reason = format!(
            "{} nodes beyond the first {} were not tested",
            matrix.left_out,
            matrix.nodes.len()
        );
        findings.push(Finding::skipped("more nodes", reason));
    }
    (findings, Some(matrix))
}

fn not_run(error: &StoreError) -> Finding {
    let reason = error.to_string();
    let busy = reason.contains("another mesh test");
    let remedy = if busy {
        "wait until the other test has ended"
    } else {
        "look at the master's log; it must be of this release"
    };
    Finding::fail("mesh", "mesh_not_run", "", reason).remedy(remedy)
}
