//! `inspect top`: rates and nodes, again and again; `inspect diff`: what changed between two moments.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{Arg, ArgMatches, Command};
use serde_json::{Map, Value, json};

use crate::base::units::{ByteSize, format_duration};
use crate::cmd::print::{self, Columns, Output};
use crate::cmd::{ExitStatus, UsageError, connect};
use crate::store::client::PoolClient;
use crate::store::wire::OverviewReply;

/// Flags of views that can be shown again and again.
pub(super) fn watched(command: Command) -> Command {
    command
        .arg(
            Arg::new("watch")
                .long("watch")
                .value_name("TIME")
                .num_args(0..=1)
                .default_missing_value("1s")
                .help("Show it again every TIME, in place on a terminal [default of a bare --watch: 1s]"),
        )
        .arg(
            Arg::new("count")
                .long("count")
                .value_name("N")
                .value_parser(clap::value_parser!(u64).range(1..))
                .help("End after so many times"),
        )
}

/// Shows a view once, or again and again; a master that does not answer in between is said and asked again.
pub(super) fn repeat(
    matches: &ArgMatches,
    default: Option<Duration>,
    mut show: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<ExitStatus> {
    let every = super::time(matches, "watch")?.or(default);
    let Some(every) = every.map(|e| e.max(Duration::from_millis(100))) else {
        show()?;
        return Ok(ExitStatus::Ok);
    };
    let count = matches.get_one::<u64>("count").copied();
    let in_place = std::io::stdout().is_terminal();
    if in_place {
        let mut out = std::io::stdout().lock();
        write!(out, "\x1b[2J")?;
        out.flush()?;
    }
    let mut shown = 0;
    loop {
        let start = Instant::now();
        let seen = print::frame(&mut show)?;
        shown += 1;
        let last = count.is_some_and(|c| shown >= c);
        match seen {
            Err(error) if last || shown == 1 || print::is_broken_pipe(&error) => return Err(error),
            Err(error) => print::error_line(&format!("mooncake: {error:#}")),
            Ok(()) => {}
        }
        if last {
            return Ok(ExitStatus::Ok);
        }
        if !in_place {
            print::line("")?;
        }
        std::thread::sleep(every.saturating_sub(start.elapsed()));
    }
}

pub(super) fn top(matches: &ArgMatches, output: Output) -> anyhow::Result<ExitStatus> {
    let client = connect::client(matches)?;
    let mut last: Option<(Instant, OverviewReply)> = None;
    repeat(matches, Some(Duration::from_secs(1)), || {
        let now = (Instant::now(), client.overview()?);
        frame(&client, last.as_ref(), &now, output)?;
        last = Some(now);
        Ok(())
    })
}

fn frame(
    client: &PoolClient,
    last: Option<&(Instant, OverviewReply)>,
    (at, o): &(Instant, OverviewReply),
    output: Output,
) -> anyhow::Result<()> {
    let per_second = |field: fn(&OverviewReply) -> u64| {
        let (before, old) = last?;
        let time = at.duration_since(*before).as_secs_f64().max(0.001);
        Some(field(o).saturating_sub(field(old)) as f64 / time)
    };
    let hits = per_second(|o| o.hits);
    let misses = per_second(|o| o.misses);
    let evicted = per_second(|o| o.evicted_objects);
    let bytes = per_second(|o| o.evicted_bytes);
    let read = per_second(|o| o.read_bytes);
    let written = per_second(|o| o.written_bytes);
    if output == Output::Json {
        let line = json!({
            "uptime_ms": o.uptime_ms, "objects": o.objects, "used_bytes": o.used_bytes, "capacity_bytes": o.capacity_bytes,
            "clients": o.clients, "rebuilding": o.rebuilding, "hits_per_s": hits, "misses_per_s": misses,
            "evicted_per_s": evicted, "evicted_bytes_per_s": bytes,
            "read_bytes_per_s": read, "written_bytes_per_s": written,
        });
        print::line(&line.to_string())?;
        return Ok(());
    }
    let rate = |r: Option<f64>| r.map_or_else(|| "-".to_owned(), |r| format!("{r:.0}"));
    let asked = hits.unwrap_or(0.0) + misses.unwrap_or(0.0);
    let share = if asked > 0.0 {
        format!(" ({:.1} %)", hits.unwrap_or(0.0) * 100.0 / asked)
    } else {
        String::new()
    };
    let up = format_duration(Duration::from_secs(o.uptime_ms / 1000));
    let state = if o.rebuilding { ", rebuilding" } else { "" };
    print::line(&format!(
        "{}  {}  up {up}{state}  {} {}  {} objects  {} puts under way",
        client.master(),
        o.build,
        o.clients,
        if o.clients == 1 { "client" } else { "clients" },
        o.objects,
        o.pending_puts
    ))?;
    print::line(&format!(
        "memory  {} {} of {}",
        bar(
            o.used_bytes,
            o.capacity_bytes,
            print::columns().map_or(40, |c| c.saturating_sub(38).clamp(8, 40))
        ),
        ByteSize(o.used_bytes),
        ByteSize(o.capacity_bytes)
    ))?;
    print::line(&format!(
        "per second  found {}{share}  not found {}  evicted {} ({})",
        rate(hits),
        rate(misses),
        rate(evicted),
        ByteSize(bytes.unwrap_or(0.0) as u64)
    ))?;
    let speed =
        |r: Option<f64>| r.map_or_else(|| "-".to_owned(), |r| ByteSize(r as u64).to_string());
    print::line(&format!(
        "per second  read {}  written {} (as clients tell, once a second)",
        speed(read),
        speed(written)
    ))?;
    let segments = client.segments()?;
    let mut table = Columns::new(&[
        "SEGMENT",
        "STATE",
        "?OCCUPANCY",
        ">USED",
        "?>OBJECTS",
        "?>FREE RANGES",
    ]);
    for s in &segments {
        table.row(&[
            print::shown(&s.name),
            s.state.clone(),
            bar(s.used_bytes, s.size_bytes, 20),
            super::percent(s.used_bytes, s.size_bytes),
            s.objects.to_string(),
            s.free_ranges.to_string(),
        ]);
    }
    table.print()?;
    Ok(())
}

/// How full something is, in `width` characters.
pub(super) fn bar(part: u64, whole: u64, width: usize) -> String {
    let eighths = (part as f64 / whole.max(1) as f64 * width as f64 * 8.0).round() as usize;
    let (full, rest) = ((eighths / 8).min(width), eighths % 8);
    let mut bar = "█".repeat(full);
    if full < width && rest > 0 {
        bar.push(['▏', '▏', '▎', '▍', '▌', '▋', '▊', '▉'][rest]);
    }
    let missing = width - bar.chars().count();
    format!("{bar}{}", "·".repeat(missing))
}

pub(super) fn diff_command() -> Command {
    Command::new("diff")
        .about("What changed between two moments: two files of `inspect --output json`, or now and --interval later")
        .arg(
            Arg::new("files")
                .value_name("FILE")
                .num_args(2)
                .value_parser(clap::value_parser!(PathBuf))
                .help("Earlier and later"),
        )
        .arg(
            Arg::new("interval")
                .long("interval")
                .value_name("TIME")
                .conflicts_with("files")
                .help("Ask now and after this time [default: 10s]"),
        )
}

fn read(path: &PathBuf) -> anyhow::Result<Value> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| UsageError(format!("{}: {e}", path.display())))?;
    serde_json::from_str(&text)
        .map_err(|e| UsageError(format!("{}: is no JSON: {e}", path.display())).into())
}

pub(super) fn diff(matches: &ArgMatches, output: Output) -> anyhow::Result<ExitStatus> {
    let files: Vec<&PathBuf> = matches.get_many("files").unwrap_or_default().collect();
    let (before, after) = if let [a, b] = files[..] {
        (read(a)?, read(b)?)
    } else {
        let interval = super::time(matches, "interval")?.unwrap_or(Duration::from_secs(10));
        if interval > Duration::from_secs(3600) {
            return Err(UsageError("--interval: an hour at most".to_owned()).into());
        }
        let client = connect::client(matches)?;
        let before = super::overview_document(&client)?;
        if std::io::stderr().is_terminal() {
            print::error_line(&format!("looking again in {} s", interval.as_secs_f64()));
        }
        std::thread::sleep(interval);
        (
            before,
            super::overview_document(&client).context("the second look")?,
        )
    };
    let (old, new) = (flat(&before), flat(&after));
    let number = |map: &Map<String, Value>, name: &str| map.get(name).and_then(Value::as_f64);
    let elapsed = match (number(&old, "uptime_ms"), number(&new, "uptime_ms")) {
        (Some(a), Some(b)) if b > a => Some((b - a) / 1000.0),
        _ => None,
    };
    let mut names: Vec<&String> = old.keys().collect();
    names.extend(new.keys().filter(|k| !old.contains_key(*k)));
    let changed = names.into_iter().filter(|n| old.get(*n) != new.get(*n));
    let rows: Vec<(String, Value, Value, Option<f64>)> = changed
        .map(|name| {
            let (a, b) = (number(&old, name), number(&new, name));
            let value = |map: &Map<String, Value>| map.get(name).cloned().unwrap_or(Value::Null);
            (
                name.clone(),
                value(&old),
                value(&new),
                a.zip(b).map(|(a, b)| b - a),
            )
        })
        .collect();
    if output == Output::Json {
        let rows: Vec<Value> = rows
            .iter()
            .map(|(name, a, b, delta)| {
                let rate = delta.zip(elapsed).map(|(d, t)| d / t);
                json!({"field": name, "before": a, "after": b, "change": delta, "per_second": rate})
            })
            .collect();
        print::json(&json!({"seconds": elapsed, "changes": rows}))?;
        return Ok(ExitStatus::Ok);
    }
    let mut table = Columns::new(&["FIELD", ">BEFORE", ">AFTER", ">CHANGE", ">PER SECOND"]);
    let cell = |v: &Value| {
        print::shown(
            v.as_str()
                .map_or_else(|| v.to_string(), str::to_owned)
                .as_str(),
        )
    };
    for (name, a, b, delta) in &rows {
        let change = delta.map_or_else(String::new, |d| format!("{d:+}"));
        let rate = delta.zip(elapsed).filter(|_| name != "uptime_ms");
        let rate = rate.map_or_else(String::new, |(d, t)| format!("{:+.1}", d / t));
        table.row(&[print::shown(name), cell(a), cell(b), change, rate]);
    }
    table.print()?;
    Ok(ExitStatus::Ok)
}

/// Every value by its path; entries of lists are named by what names them.
fn flat(value: &Value) -> Map<String, Value> {
    fn walk(path: &str, value: &Value, out: &mut Map<String, Value>) {
        let join = |name: &str| {
            if path.is_empty() {
                name.to_owned()
            } else {
                format!("{path}.{name}")
            }
        };
        match value {
            Value::Object(map) => map.iter().for_each(|(name, v)| walk(&join(name), v, out)),
            Value::Array(all) => {
                for (index, v) in all.iter().enumerate() {
                    let named = ["segment", "node", "key", "tenant", "instance"].iter();
                    let name = named.filter_map(|n| v.get(*n)?.as_str()).next();
                    let name = name.map_or_else(|| index.to_string(), str::to_owned);
                    walk(&join(&name), v, out);
                }
            }
            other => {
                out.insert(path.to_owned(), other.clone());
            }
        }
    }
    let mut out = Map::new();
    walk("", value, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars() {
        assert_eq!(bar(0, 10, 4), "····");
        assert_eq!(bar(10, 10, 4), "████");
        assert_eq!(bar(5, 10, 4), "██··");
        assert_eq!(bar(20, 10, 4), "████");
        assert_eq!(bar(0, 0, 2), "··");
        assert_eq!(bar(1, 8, 4).chars().count(), 4);
    }

    #[test]
    fn values_by_path() {
        let map = flat(&json!({"a": 1, "b": {"c": true}, "l": [{"node": "x", "n": 2}, 7]}));
        let names: Vec<&str> = map.keys().map(String::as_str).collect();
        assert_eq!(names, ["a", "b.c", "l.x.node", "l.x.n", "l.1"]);
    }
}
