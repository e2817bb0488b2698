//! `mooncake inspect`: looks at a pool. Never changes anything, grants no lease, and shows what it could get when parts
//! of the pool are down.

mod events;
mod keys;
mod proxy;
mod top;

use std::time::Duration;

use clap::{Arg, ArgMatches, Command};
use serde_json::{Value, json};

use super::print::{Columns, Output};
use super::{Outcome, UsageError, connect, print};
use crate::base::units::{ByteSize, format_duration, parse_duration};
use crate::cmd::api::Api;
use crate::store::client::PoolClient;
use crate::store::wire::SegmentView;

/// Parts of a segment's map on a terminal.
const CELLS: usize = 64;
/// Segments whose maps are shown.
const MAPS_MAX: usize = 64;
/// Time for all maps together.
const MAPS_TIME: Duration = Duration::from_secs(5);

/// `--prefix`, of views that show keys.
fn prefix_argument() -> clap::Arg {
    clap::Arg::new("prefix")
        .long("prefix")
        .value_name("TEXT")
        .default_value("")
        .hide_default_value(true)
        .help("Only keys that begin so")
}

pub(super) fn command() -> Command {
    let sub =
        |name: &'static str, about: &'static str| connect::add(Command::new(name).about(about));
    let watched = |name: &'static str, about: &'static str| top::watched(sub(name, about));
    let about = "Look at a pool: overview, nodes, segments, keys, tenants, events, a proxy";
    connect::add(top::watched(Command::new("inspect").about(about)))
        .args_conflicts_with_subcommands(true)
        .subcommand(watched("nodes", "Nodes with their state and release"))
        .subcommand(watched(
            "segments",
            "Segments with occupancy, fragmentation and a map of what is used",
        ))
        .subcommand(connect::add(keys::command("keys")))
        .subcommand(
            sub(
                "key",
                "One key: replicas, lease, pins, version, checksum, and what happened to it",
            )
            .arg(Arg::new("key").value_name("KEY").required(true)),
        )
        .subcommand(watched(
            "tenants",
            "Tenants with what they hold and their hit rate",
        ))
        .subcommand(watched(
            "hot",
            "What was read most lately: first keys of batches",
        ))
        .subcommand(connect::add(events::command()))
        .subcommand(watched(
            "top",
            "Rates, memory and segments, refreshed like top",
        ))
        .subcommand(connect::add(top::diff_command()))
        .subcommand(proxy::command())
}

pub(super) fn run(matches: &ArgMatches) -> Outcome {
    let (name, matches) = matches.subcommand().unwrap_or(("overview", matches));
    if name == "proxy" {
        return proxy::run(matches);
    }
    let output = connect::output(matches);
    match name {
        "keys" => keys::keys(matches, output),
        "key" => keys::key(matches, output),
        "events" => events::run(matches, output),
        "top" => top::top(matches, output),
        "diff" => top::diff(matches, output),
        "tenants" => top::repeat(matches, None, || keys::tenants(matches, output)),
        "hot" => top::repeat(matches, None, || keys::hot(matches, output)),
        _ => {
            let client = connect::client(matches)?;
            top::repeat(matches, None, || match name {
                "nodes" => nodes(&client, output),
                "segments" => segments(&client, matches, output),
                _ => overview(&client, output),
            })
        }
    }
}

/// A flag that is a time.
fn time(matches: &ArgMatches, name: &str) -> anyhow::Result<Option<Duration>> {
    let Some(given) = matches.get_one::<String>(name) else {
        return Ok(None);
    };
    let time = parse_duration(given, Duration::from_secs(1));
    Ok(Some(
        time.map_err(|e| UsageError(format!("--{name}: {e}")))?,
    ))
}

/// A moment as UTC time of day with milliseconds; empty for none.
fn clock(unix_ms: u64) -> String {
    if unix_ms == 0 {
        return String::new();
    }
    let (seconds, ms) = (unix_ms / 1000 % 86_400, unix_ms % 1000);
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    format!("{hours:02}:{minutes:02}:{:02}.{ms:03}Z", seconds % 60)
}

fn percent(part: u64, whole: u64) -> String {
    format!("{:.1} %", part as f64 * 100.0 / whole.max(1) as f64)
}

/// How far the free space is from being one range, in percent: 0 = one range.
fn fragmentation(s: &SegmentView) -> f64 {
    let free = s.size_bytes.saturating_sub(s.used_bytes);
    if free == 0 {
        0.0
    } else {
        100.0 * (1.0 - s.largest_free_bytes as f64 / free as f64).max(0.0)
    }
}

fn node_states(segments: &[SegmentView]) -> Vec<(&str, &str, &str)> {
    let mut nodes: Vec<_> = segments
        .iter()
        .map(|s| (s.node.as_str(), s.state.as_str(), s.build.as_str()))
        .collect();
    nodes.sort_unstable();
    nodes.dedup();
    nodes
}

/// The overview for programs.
fn overview_document(client: &PoolClient) -> anyhow::Result<Value> {
    let o = client.overview()?;
    let segments = client.segments()?;
    let nodes = node_states(&segments);
    Ok(json!({
        "master": client.master(), "build": o.build, "uptime_ms": o.uptime_ms, "rebuilding": o.rebuilding,
        "nodes": nodes.len(), "nodes_not_ok": nodes.iter().filter(|n| n.1 != "ok").count(),
        "segments": segments.len(), "clients": o.clients,
        "objects": o.objects, "capacity_bytes": o.capacity_bytes, "used_bytes": o.used_bytes,
        "arena_free_bytes": o.arena_free_bytes, "pending_puts": o.pending_puts, "arenas": o.arenas,
        "evicted_objects": o.evicted_objects, "evicted_bytes": o.evicted_bytes,
        "hits": o.hits, "misses": o.misses, "metadata_bytes": o.metadata_bytes,
        "eviction_hold_max_us": o.eviction_hold_max_us,
        "read_bytes": o.read_bytes, "written_bytes": o.written_bytes,
    }))
}

fn overview(client: &PoolClient, output: Output) -> anyhow::Result<()> {
    if output == Output::Json {
        print::json(&overview_document(client)?)?;
        return Ok(());
    }
    let o = client.overview()?;
    let segments = client.segments()?;
    let nodes = node_states(&segments);
    let troubled: Vec<String> = nodes
        .iter()
        .filter(|n| n.1 != "ok")
        .map(|(node, state, _)| format!("{} {state}", print::shown(node)))
        .collect();
    let mut releases: Vec<&str> = nodes.iter().map(|n| n.2).collect();
    releases.push(&o.build);
    releases.sort_unstable();
    releases.dedup();
    let mut about_nodes = format!("{} with {} segments", nodes.len(), segments.len());
    if !troubled.is_empty() {
        about_nodes.push_str(&format!(": {}", troubled.join(", ")));
    }
    if releases.len() > 1 {
        about_nodes.push_str("; different releases: see inspect nodes");
    }
    let asked = o.hits + o.misses;
    let uptime = format_duration(std::time::Duration::from_secs(o.uptime_ms / 1000));
    let rebuilding = if o.rebuilding {
        ", rebuilding its index"
    } else {
        ""
    };
    let used = format!(
        "{} of {} ({})",
        ByteSize(o.used_bytes),
        ByteSize(o.capacity_bytes),
        percent(o.used_bytes, o.capacity_bytes)
    );
    for (name, value) in [
        (
            "master",
            format!("{} ({}, up {uptime}{rebuilding})", client.master(), o.build),
        ),
        ("nodes", about_nodes),
        ("clients", o.clients.to_string()),
        ("objects", o.objects.to_string()),
        ("used", used),
        (
            "in arenas",
            format!(
                "{} granted ahead in {} arenas",
                ByteSize(o.arena_free_bytes),
                o.arenas
            ),
        ),
        ("puts", format!("{} unfinished", o.pending_puts)),
        (
            "located",
            format!("{} of {asked} ({})", o.hits, percent(o.hits, asked)),
        ),
        (
            "evicted",
            format!(
                "{} objects, {}",
                o.evicted_objects,
                ByteSize(o.evicted_bytes)
            ),
        ),
        (
            "index",
            format!("{} of metadata", ByteSize(o.metadata_bytes)),
        ),
    ] {
        print::line(&format!("{name:<10} {value}"))?;
    }
    Ok(())
}

fn nodes(client: &PoolClient, output: Output) -> anyhow::Result<()> {
    let segments = client.segments()?;
    let mut rows: Vec<(&SegmentView, u64, u64, u64, usize)> = Vec::new();
    for s in &segments {
        let known = rows
            .iter_mut()
            .find(|r| (r.0.node_high, r.0.node_low) == (s.node_high, s.node_low));
        match known {
            Some(row) => {
                row.1 += s.size_bytes;
                row.2 += s.used_bytes;
                row.3 += s.objects;
                row.4 += 1;
            }
            None => rows.push((s, s.size_bytes, s.used_bytes, s.objects, 1)),
        }
    }
    let path = |s: &SegmentView| client.path(s).map_or("none", |p| p.name());
    if output == Output::Json {
        let all: Vec<Value> = rows
            .iter()
            .map(|(s, size, used, objects, count)| {
                json!({
                    "node": s.node, "address": s.address, "state": s.state, "segments": count,
                    "size_bytes": size, "used_bytes": used, "objects": objects, "path": path(s),
                    "host_id": s.host_id, "build": s.build, "bytes": served(s),
                })
            })
            .collect();
        print::json(&Value::Array(all))?;
        return Ok(());
    }
    let mut headings = vec![
        "NODE",
        "?ADDRESS",
        "STATE",
        "?RELEASE",
        "?PATH",
        "?>SEGMENTS",
        ">SIZE",
        ">USED",
        "?>OBJECTS",
    ];
    // Where no node has moved a byte by RDMA, a column about it says nothing.
    let by_rdma = rows.iter().any(|r| moved(r.0, "rdma") > 0);
    if by_rdma {
        headings.extend([">BY TCP", ">BY RDMA"]);
    }
    let mut table = Columns::new(&headings);
    for (s, size, used, objects, count) in &rows {
        let mut row = vec![
            s.node.clone(),
            s.address.clone(),
            s.state.clone(),
            if s.build.is_empty() {
                "older"
            } else {
                &s.build
            }
            .to_owned(),
            path(s).to_owned(),
            count.to_string(),
            ByteSize(*size).to_string(),
            percent(*used, *size),
            objects.to_string(),
        ];
        if by_rdma {
            row.extend(["tcp", "rdma"].map(|way| ByteSize(moved(s, way)).to_string()));
        }
        table.row(&row);
    }
    table.print()?;
    Ok(())
}

/// Bytes a node has moved one way, in and out.
fn moved(s: &SegmentView, way: &str) -> u64 {
    let mine = s.served.iter().filter(|b| b.transport == way);
    mine.map(|b| b.bytes).sum()
}

/// `{"rdma": {"read": …, "write": …}, …}`.
fn served(s: &SegmentView) -> Value {
    let mut all = serde_json::Map::new();
    for b in &s.served {
        all.entry(b.transport.clone())
            .or_insert_with(|| json!({}))
            .as_object_mut()
            .and_then(|of| of.insert(b.operation.clone(), json!(b.bytes)));
    }
    Value::Object(all)
}

fn segments(client: &PoolClient, matches: &ArgMatches, output: Output) -> anyhow::Result<()> {
    let segments = client.segments()?;
    let names: Vec<String> = segments
        .iter()
        .take(MAPS_MAX)
        .map(|s| s.name.clone())
        .collect();
    let api = Api::new(matches)?;
    let longest = names.iter().map(|n| n.chars().count()).max().unwrap_or(0);
    // A map is as wide as there is room for beside its name.
    let cells = print::columns().map_or(CELLS, |c| c.saturating_sub(longest + 4).clamp(8, CELLS));
    let maps = keys::maps(&api, &names, cells, MAPS_TIME);
    if output == Output::Json {
        let all: Vec<Value> = segments
            .iter()
            .enumerate()
            .map(|(n, s)| {
                json!({
                    "segment": s.name, "node": s.node, "state": s.state, "size_bytes": s.size_bytes,
                    "used_bytes": s.used_bytes, "largest_free_bytes": s.largest_free_bytes,
                    "free_ranges": s.free_ranges, "fragmentation_percent": fragmentation(s),
                    "objects": s.objects, "incarnation": format!("{:016x}", s.incarnation),
                    "pages": s.page_kind, "map": maps.get(n).cloned().flatten(),
                })
            })
            .collect();
        print::json(&Value::Array(all))?;
        return Ok(());
    }
    let headings = [
        "SEGMENT",
        "STATE",
        "?PAGES",
        ">SIZE",
        "?OCCUPANCY",
        ">USED",
        "?>LARGEST FREE",
        "?>FREE RANGES",
        ">FRAGMENTED",
        "?>OBJECTS",
    ];
    let mut table = Columns::new(&headings);
    for s in &segments {
        table.row(&[
            s.name.clone(),
            s.state.clone(),
            s.page_kind.clone(),
            ByteSize(s.size_bytes).to_string(),
            top::bar(s.used_bytes, s.size_bytes, 12),
            percent(s.used_bytes, s.size_bytes),
            ByteSize(s.largest_free_bytes).to_string(),
            s.free_ranges.to_string(),
            format!("{:.0} %", fragmentation(s)),
            s.objects.to_string(),
        ]);
    }
    table.print()?;
    show_maps(&names, &maps)?;
    Ok(())
}

/// A line per segment: each character a part of it, the higher the fuller.
fn show_maps(names: &[String], maps: &[Option<Vec<f64>>]) -> std::io::Result<()> {
    let width = names.iter().map(|n| n.chars().count()).max().unwrap_or(0);
    for (name, map) in names.iter().zip(maps) {
        let Some(map) = map else {
            print::error_line(&format!(
                "no map of {}: the master did not send it",
                print::shown(name)
            ));
            continue;
        };
        let cells: String = map.iter().map(|fill| level(*fill)).collect();
        print::line(&format!("{:<width$}  [{cells}]", print::shown(name)))?;
    }
    Ok(())
}

fn level(fill: f64) -> char {
    const LEVELS: [char; 9] = ['·', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    LEVELS[(fill.clamp(0.0, 1.0) * 8.0).ceil() as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_clocks() {
        let shown: String = [0.0, 0.001, 0.5, 1.0, 7.0, f64::NAN]
            .into_iter()
            .map(level)
            .collect();
        assert_eq!(shown, "·▁▄██·");
        assert_eq!(clock(0), "");
        assert_eq!(clock(1_700_000_000_123), "22:13:20.123Z");
    }
}
