//! The only door to stdout and stderr.

use std::io::{self, Write};

use comfy_table::{CellAlignment, ContentArrangement, Table};
use serde_json::Value;

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Text,
    /// One JSON document.
    Json,
}

/// Writes a line to stdout.
pub(crate) fn line(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}

/// Writes a line to stderr; nobody to tell if that fails.
pub(crate) fn error_line(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// A key as it may be shown on a terminal: control characters escaped, so that no key can play tricks with it.
pub(crate) fn shown(key: &str) -> String {
    key.chars()
        .flat_map(|c| {
            let escaped = c.is_control();
            let plain = (!escaped).then_some(c);
            escaped
                .then(|| c.escape_default())
                .into_iter()
                .flatten()
                .chain(plain)
        })
        .collect()
}

/// Writes a JSON document to stdout.
pub(crate) fn json(value: &Value) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value).map_err(io::Error::from)?;
    writeln!(out)?;
    out.flush()
}

/// Whether an error is a reader that went away (`mooncake ls | head`), which is no failure.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<io::Error>()
            .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
    })
}

/// A table without frames: columns aligned, numbers (as told) to the right.
pub(crate) struct Columns {
    table: Table,
}

impl Columns {
    /// With headings; those that begin with `>` are right-aligned.
    pub(crate) fn new(headings: &[&str]) -> Self {
        let mut table = Table::new();
        table.load_style(comfy_table::presets::NOTHING);
        table.set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(headings.iter().map(|h| h.trim_start_matches('>')));
        for (index, heading) in headings.iter().enumerate() {
            if let Some(column) = table.column_mut(index) {
                column.set_padding((0, 2));
                if heading.starts_with('>') {
                    column.set_cell_alignment(CellAlignment::Right);
                }
            }
        }
        Self { table }
    }

    pub(crate) fn row(&mut self, cells: &[String]) {
        self.table.add_row(cells);
    }

    pub(crate) fn print(&self) -> io::Result<()> {
        let mut text = String::new();
        for row in self.table.lines() {
            text.push_str(row.trim_end());
            text.push('\n');
        }
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }
}
