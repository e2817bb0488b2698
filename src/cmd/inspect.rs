//! `mooncake inspect`: looks at a pool. Never changes anything, grants no lease, and shows what it could get when parts
//! of the pool are down.

use clap::{Arg, ArgMatches, Command};
use serde_json::{Value, json};

use super::print::{Columns, Output};
use super::{ExitStatus, Outcome, connect, inspect_proxy, print, stat};
use crate::base::units::{ByteSize, format_duration};
use crate::store::client::PoolClient;
use crate::store::wire::SegmentView;

pub(super) fn command() -> Command {
    let sub =
        |name: &'static str, about: &'static str| connect::add(Command::new(name).about(about));
    connect::add(
        Command::new("inspect").about("Look at a pool: overview, nodes, segments, a key, a proxy"),
    )
    .args_conflicts_with_subcommands(true)
    .subcommand(sub("nodes", "Nodes with their state"))
    .subcommand(sub("segments", "Segments with occupancy and fragmentation"))
    .subcommand(
        sub("key", "One key: replicas, lease, pins, version, checksum")
            .arg(Arg::new("key").value_name("KEY").required(true)),
    )
    .subcommand(inspect_proxy::command())
}

pub(super) fn run(matches: &ArgMatches) -> Outcome {
    let (name, matches) = matches.subcommand().unwrap_or(("overview", matches));
    if name == "proxy" {
        return inspect_proxy::run(matches);
    }
    let client = connect::client(matches)?;
    let output = connect::output(matches);
    match name {
        "nodes" => nodes(&client, output)?,
        "segments" => segments(&client, output)?,
        "key" => {
            let key = matches.get_one::<String>("key").map_or("", String::as_str);
            stat::show(key, &client.stat(key.as_bytes())?, output)?;
        }
        _ => overview(&client, output)?,
    }
    Ok(ExitStatus::Ok)
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

fn overview(client: &PoolClient, output: Output) -> anyhow::Result<()> {
    let o = client.overview()?;
    let segments = client.segments()?;
    let mut nodes: Vec<&str> = segments.iter().map(|s| s.node.as_str()).collect();
    nodes.sort_unstable();
    nodes.dedup();
    if output == Output::Json {
        print::json(&json!({
            "master": client.master(), "build": o.build, "uptime_ms": o.uptime_ms, "rebuilding": o.rebuilding,
            "nodes": nodes.len(), "segments": segments.len(), "clients": o.clients,
            "objects": o.objects, "capacity_bytes": o.capacity_bytes, "used_bytes": o.used_bytes,
            "arena_free_bytes": o.arena_free_bytes, "pending_puts": o.pending_puts, "arenas": o.arenas,
            "evicted_objects": o.evicted_objects, "evicted_bytes": o.evicted_bytes,
            "hits": o.hits, "misses": o.misses, "metadata_bytes": o.metadata_bytes,
            "eviction_hold_max_us": o.eviction_hold_max_us,
        }))?;
        return Ok(());
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
        (
            "nodes",
            format!("{} with {} segments", nodes.len(), segments.len()),
        ),
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
                    "host_id": s.host_id,
                })
            })
            .collect();
        print::json(&Value::Array(all))?;
        return Ok(());
    }
    let headings = [
        "NODE",
        "ADDRESS",
        "STATE",
        "PATH",
        ">SEGMENTS",
        ">SIZE",
        ">USED",
        ">OBJECTS",
    ];
    let mut table = Columns::new(&headings);
    for (s, size, used, objects, count) in &rows {
        table.row(&[
            s.node.clone(),
            s.address.clone(),
            s.state.clone(),
            path(s).to_owned(),
            count.to_string(),
            ByteSize(*size).to_string(),
            percent(*used, *size),
            objects.to_string(),
        ]);
    }
    table.print()?;
    Ok(())
}

fn segments(client: &PoolClient, output: Output) -> anyhow::Result<()> {
    let segments = client.segments()?;
    if output == Output::Json {
        let all: Vec<Value> = segments
            .iter()
            .map(|s| {
                json!({
                    "segment": s.name, "node": s.node, "state": s.state, "size_bytes": s.size_bytes,
                    "used_bytes": s.used_bytes, "largest_free_bytes": s.largest_free_bytes,
                    "free_ranges": s.free_ranges, "fragmentation_percent": fragmentation(s),
                    "objects": s.objects, "incarnation": format!("{:016x}", s.incarnation),
                    "pages": s.page_kind,
                })
            })
            .collect();
        print::json(&Value::Array(all))?;
        return Ok(());
    }
    let headings = [
        "SEGMENT",
        "STATE",
        "PAGES",
        ">SIZE",
        ">USED",
        ">LARGEST FREE",
        ">FREE RANGES",
        ">FRAGMENTED",
        ">OBJECTS",
    ];
    let mut table = Columns::new(&headings);
    for s in &segments {
        table.row(&[
            s.name.clone(),
            s.state.clone(),
            s.page_kind.clone(),
            ByteSize(s.size_bytes).to_string(),
            percent(s.used_bytes, s.size_bytes),
            ByteSize(s.largest_free_bytes).to_string(),
            s.free_ranges.to_string(),
            format!("{:.0} %", fragmentation(s)),
            s.objects.to_string(),
        ]);
    }
    table.print()?;
    Ok(())
}
