//! The only door to stdout and stderr.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicUsize, Ordering};

use comfy_table::{CellAlignment, ColumnConstraint, ContentArrangement, Table};
use serde_json::Value;

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Text,
    /// One JSON document.
    Json,
}

/// Lines that still fit on the screen while a frame is drawn; `usize::MAX` = no frame.
static ROOM: AtomicUsize = AtomicUsize::new(usize::MAX);

/// Columns and rows of the terminal that stdout is; `None` when it is none, or does not say.
fn terminal() -> Option<(usize, usize)> {
    let out = io::stdout();
    let size = rustix::termios::tcgetwinsize(&out)
        .ok()
        .filter(|s| out.is_terminal() && s.ws_col > 0 && s.ws_row > 0)?;
    Some((usize::from(size.ws_col), usize::from(size.ws_row)))
}

/// Draws what `show` prints over what is on the terminal, cut to its size, so that nothing flickers or scrolls away. On anything
/// else it is printed as it is.
pub(crate) fn frame<T>(show: impl FnOnce() -> T) -> io::Result<T> {
    let Some((_, rows)) = terminal() else {
        return Ok(show());
    };
    write!(io::stdout().lock(), "\x1b[H")?;
    ROOM.store(rows.saturating_sub(1), Ordering::Relaxed);
    let shown = show();
    ROOM.store(usize::MAX, Ordering::Relaxed);
    let mut out = io::stdout().lock();
    write!(out, "\x1b[J")?;
    out.flush()?;
    Ok(shown)
}

/// The first `most` characters, the last of them `…` when there were more.
fn cut(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(most.saturating_sub(1)).collect();
    short.push('…');
    short
}

/// Writes a line to stdout.
pub(crate) fn line(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let room = ROOM.load(Ordering::Relaxed);
    if room == usize::MAX {
        writeln!(out, "{text}")?;
        return out.flush();
    }
    let Some((columns, _)) = terminal().filter(|_| room > 0) else {
        return Ok(());
    };
    ROOM.store(room - 1, Ordering::Relaxed);
    let text = if room == 1 {
        "…".to_owned()
    } else {
        cut(text, columns)
    };
    writeln!(out, "{text}\x1b[K")
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

/// Columns of the terminal that stdout is; `None` when it is none: then there is no limit.
pub(crate) fn columns() -> Option<usize> {
    terminal().map(|(columns, _)| columns)
}

/// A table without frames: columns aligned, numbers (as told) to the right.
///
/// When the terminal is too narrow, columns whose heading begins with `?` (before `>`) are left out, the last such first; in a
/// frame, what stands in the first column is then cut. Elsewhere it is kept whole: somebody may want to copy a key.
pub(crate) struct Columns {
    headings: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Columns {
    /// With headings; those that begin with `>` are right-aligned.
    pub(crate) fn new(headings: &[&str]) -> Self {
        Self {
            headings: headings.iter().map(|h| (*h).to_owned()).collect(),
            rows: Vec::new(),
        }
    }

    pub(crate) fn row(&mut self, cells: &[String]) {
        self.rows.push(cells.to_vec());
    }

    /// The lines without the columns in `hidden`, the first column cut to `most`.
    fn lines(&self, hidden: &[usize], most: usize) -> Vec<String> {
        let mut table = Table::new();
        table.load_style(comfy_table::presets::NOTHING);
        table.set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(
            self.headings
                .iter()
                .map(|h| h.trim_start_matches(['?', '>'])),
        );
        for (index, heading) in self.headings.iter().enumerate() {
            if let Some(column) = table.column_mut(index) {
                column.set_padding((0, 2));
                if heading.trim_start_matches('?').starts_with('>') {
                    column.set_cell_alignment(CellAlignment::Right);
                }
                if hidden.contains(&index) {
                    column.set_constraint(ColumnConstraint::Hidden);
                }
            }
        }
        for row in &self.rows {
            let cell = |(n, cell): (usize, &String)| {
                if n == 0 {
                    cut(cell, most)
                } else {
                    cell.clone()
                }
            };
            table.add_row(row.iter().enumerate().map(cell));
        }
        table.lines().map(|l| l.trim_end().to_owned()).collect()
    }

    /// The lines, made to fit so many columns as far as that goes.
    fn fitted(&self, columns: usize, cut_names: bool) -> Vec<String> {
        let spare = (0..self.headings.len()).filter(|n| self.headings[*n].starts_with('?'));
        let mut spare: Vec<usize> = spare.collect();
        let mut hidden = Vec::new();
        let mut most = usize::MAX;
        loop {
            let lines = self.lines(&hidden, most);
            let width = lines.iter().map(|l| l.chars().count()).max().unwrap_or(0);
            let first = self
                .rows
                .iter()
                .filter_map(|r| Some(r.first()?.chars().count().min(most)))
                .max();
            match (width > columns, spare.pop(), first) {
                (true, Some(index), _) => hidden.push(index),
                // A name of fewer characters than this says nothing.
                (true, None, Some(first)) if cut_names && first > 12 && most == usize::MAX => {
                    most = first.saturating_sub(width - columns).max(12);
                }
                _ => return lines,
            }
        }
    }

    pub(crate) fn print(&self) -> io::Result<()> {
        let in_frame = ROOM.load(Ordering::Relaxed) != usize::MAX;
        let lines = self.fitted(columns().unwrap_or(usize::MAX), in_frame);
        if in_frame {
            return lines.iter().try_for_each(|row| line(row));
        }
        let mut out = io::stdout().lock();
        for row in lines {
            writeln!(out, "{row}")?;
        }
        out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lines_are_cut() {
        assert_eq!(cut("abc", 3), "abc");
        assert_eq!(cut("abcd", 3), "ab…");
        assert_eq!(cut("äöü…x", 4), "äöü…");
    }

    #[test]
    fn tables_are_made_to_fit() {
        let mut table = Columns::new(&["NAME", "?>SIZE", "STATE", "?NOTE"]);
        table.row(&[
            "a-rather-long-name".into(),
            "12".into(),
            "ok".into(),
            "x".into(),
        ]);
        assert_eq!(
            table.fitted(usize::MAX, true),
            [
                "NAME                SIZE  STATE  NOTE",
                "a-rather-long-name    12  ok     x"
            ]
        );
        assert_eq!(table.fitted(33, true)[0], "NAME                SIZE  STATE");
        assert_eq!(table.fitted(27, true)[0], "NAME                STATE");
        assert_eq!(
            table.fitted(21, true),
            ["NAME            STATE", "a-rather-long…  ok"]
        );
    }
}
