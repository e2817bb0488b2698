//! Results as a table on the terminal, Markdown, or JSON.

use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};

use super::sample::{Sample, Spread};
use crate::base::units::ByteSize;
use crate::cmd::print::{self, Columns, Output};

/// One side of one cell over all rounds.
pub(super) struct Side {
    pub(super) name: String,
    pub(super) samples: Vec<Sample>,
}

/// One measured cell.
pub(super) struct Row {
    pub(super) op: &'static str,
    pub(super) size: u64,
    pub(super) batch: usize,
    pub(super) path: &'static str,
    /// Ours first.
    pub(super) sides: Vec<Side>,
    /// Whether the figure that counts is bytes (else calls).
    pub(super) by_bytes: bool,
}

impl Row {
    fn rate(&self, side: &Side) -> Spread {
        Spread::of(side.samples.iter().map(|s| self.value(s)))
    }

    fn value(&self, s: &Sample) -> f64 {
        if self.by_bytes {
            s.gigabytes_per_second()
        } else {
            s.items_per_second()
        }
    }

    /// Ours against another side, round by round: throughput, or for a bare echo the time of one call.
    fn ratio(&self, other: &Side) -> Spread {
        let pairs = self.sides[0].samples.iter().zip(&other.samples);
        if other.name == "echo" {
            return Spread::of(pairs.map(|(a, b)| a.microseconds(0.5) / b.microseconds(0.5)));
        }
        Spread::of(pairs.map(|(a, b)| self.value(a) / self.value(b)))
    }
}

const HEADINGS: [&str; 11] = [
    "OP",
    ">SIZE",
    ">BATCH",
    "PATH",
    "SIDE",
    ">GB/s",
    ">KEYS/s",
    ">p50 us",
    ">p99 us",
    ">OURS/SIDE",
    "RANGE",
];

fn cells(rows: &[Row]) -> Vec<Vec<String>> {
    let mut lines = Vec::new();
    for row in rows {
        for (number, side) in row.sides.iter().enumerate() {
            let over = |f: &dyn Fn(&Sample) -> f64| Spread::of(side.samples.iter().map(f)).median;
            let rate = row.rate(side);
            let (ratio, range) = match number {
                0 => (
                    String::new(),
                    format!(
                        "{:.2}-{:.2}",
                        rate.min / rate.median,
                        rate.max / rate.median
                    ),
                ),
                _ => {
                    let ratio = row.ratio(side);
                    let what = if side.name == "echo" { " x time" } else { " x" };
                    (
                        format!("{:.2}{what}", ratio.median),
                        format!("{:.2}-{:.2}", ratio.min, ratio.max),
                    )
                }
            };
            let bytes = over(&Sample::gigabytes_per_second);
            lines.push(vec![
                row.op.to_owned(),
                ByteSize(row.size).to_string(),
                row.batch.to_string(),
                row.path.to_owned(),
                side.name.clone(),
                if bytes > 0.0 {
                    format!("{bytes:.2}")
                } else {
                    String::new()
                },
                format!("{:.0}", over(&Sample::items_per_second)),
                format!("{:.1}", over(&|s: &Sample| s.microseconds(0.5))),
                format!("{:.1}", over(&|s: &Sample| s.microseconds(0.99))),
                ratio,
                range,
            ]);
        }
    }
    lines
}

pub(super) fn show(rows: &[Row], output: Output) -> std::io::Result<()> {
    if output == Output::Json {
        return print::json(&document(rows));
    }
    let mut table = Columns::new(&HEADINGS);
    for line in cells(rows) {
        table.row(&line);
    }
    table.print()
}

fn document(rows: &[Row]) -> Value {
    let side = |row: &Row, side: &Side| {
        let samples: Vec<Value> = side
            .samples
            .iter()
            .map(|s| {
                json!({
                    "gigabytes_per_second": s.gigabytes_per_second(), "items_per_second": s.items_per_second(),
                    "p50_us": s.microseconds(0.5), "p99_us": s.microseconds(0.99),
                })
            })
            .collect();
        json!({"side": side.name, "ratio_median": row.ratio(side).median, "rounds": samples})
    };
    let all: Vec<Value> = rows
        .iter()
        .map(|row| {
            let sides: Vec<Value> = row.sides.iter().map(|s| side(row, s)).collect();
            json!({"op": row.op, "size_bytes": row.size, "batch": row.batch, "path": row.path, "sides": sides})
        })
        .collect();
    Value::Array(all)
}

/// Writes the table to a file: `.md` Markdown, `.json` JSON.
pub(super) fn export(rows: &[Row], path: &Path, heading: &str) -> anyhow::Result<()> {
    let mut file = std::fs::File::create(path)?;
    if path.extension().is_some_and(|e| e == "json") {
        serde_json::to_writer_pretty(&mut file, &document(rows))?;
        return Ok(());
    }
    writeln!(file, "{heading}\n")?;
    let headings: Vec<&str> = HEADINGS.iter().map(|h| h.trim_start_matches('>')).collect();
    writeln!(file, "| {} |", headings.join(" | "))?;
    let rule: Vec<&str> = HEADINGS
        .iter()
        .map(|h| if h.starts_with('>') { "---:" } else { "---" })
        .collect();
    writeln!(file, "| {} |", rule.join(" | "))?;
    for line in cells(rows) {
        writeln!(file, "| {} |", line.join(" | "))?;
    }
    Ok(())
}
