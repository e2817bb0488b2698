//! `inspect keys`, `inspect key`, `inspect tenants`, `inspect hot`: what is stored, by whom, and what happened to one key.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use clap::{Arg, ArgMatches, Command};
use serde_json::{Value, json};

use super::clock;
use crate::base::units::ByteSize;
use crate::cmd::api::{Api, escaped, list, number, text};
use crate::cmd::print::{self, Columns, Output};
use crate::cmd::{ExitStatus, UsageError, connect, stat};
use crate::store::client::PoolClient;
use crate::store::model::error::StoreError;

/// Keys of one page of a walk.
const PAGE: usize = 1000;
/// Keys shown at most.
const LIMIT_MAX: u64 = 10_000;
/// Events of a key that are shown.
const HISTORY: usize = 20;

pub(super) fn command(name: &'static str) -> Command {
    Command::new(name)
        .about("Keys with size, replicas and lease, a page at a time")
        .arg(super::prefix_argument())
        .arg(
            Arg::new("sort")
                .long("sort")
                .value_name("BY")
                .value_parser(["none", "key", "size", "heat", "age"])
                .default_value("none")
                .help(
                    "size: largest first; heat: read last first, what nobody has read at the end; age: written first \
                     first (by version)",
                ),
        )
        .arg(
            Arg::new("limit")
                .long("limit")
                .value_name("N")
                .value_parser(clap::value_parser!(u64).range(1..=LIMIT_MAX))
                .default_value("50")
                .help("Keys of one page"),
        )
        .arg(
            Arg::new("cursor")
                .long("cursor")
                .value_name("TEXT")
                .help("Go on where the last page ended (not with heat and age, which have one page)"),
        )
}

fn cursor_of(page: &Value) -> Option<String> {
    match page.get("next_cursor")? {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

fn page(api: &Api, query: &str, limit: usize, cursor: Option<&str>) -> Result<Value, StoreError> {
    let cursor = cursor.map_or_else(String::new, |c| format!("&cursor={}", escaped(c)));
    api.get(&format!("keys?limit={limit}{query}{cursor}"))
}

/// The `limit` first by `rank`, from a walk over all pages that ends at the deadline; whether it saw everything.
fn ranked(
    api: &Api,
    query: &str,
    limit: usize,
    deadline: Instant,
    rank: fn(&Value) -> u64,
) -> Result<(Vec<Value>, bool), StoreError> {
    // The least of what is kept lies on top.
    let mut kept: BinaryHeap<Reverse<(u64, String)>> = BinaryHeap::new();
    let mut cursor: Option<String> = None;
    let complete = loop {
        let page = page(api, query, PAGE, cursor.as_deref())?;
        for key in list(&page, "keys") {
            kept.push(Reverse((rank(key), key.to_string())));
            if kept.len() > limit {
                kept.pop();
            }
        }
        cursor = cursor_of(&page);
        if cursor.is_none() {
            break true;
        }
        if Instant::now() >= deadline {
            break false;
        }
    };
    let kept = kept.into_sorted_vec().into_iter();
    let parsed = kept.filter_map(|Reverse((_, text))| serde_json::from_str(&text).ok());
    Ok((parsed.collect(), complete))
}

pub(super) fn keys(matches: &ArgMatches, output: Output) -> anyhow::Result<ExitStatus> {
    let api = Api::new(matches)?;
    let given = |name: &str| matches.get_one::<String>(name).map(String::as_str);
    let limit = matches.get_one::<u64>("limit").copied().unwrap_or(50) as usize;
    let sort = given("sort").unwrap_or("none");
    let config = connect::config(matches)?;
    let mut query = format!("&prefix={}", escaped(given("prefix").unwrap_or_default()));
    if matches.get_one::<String>("tenant").is_some() {
        query.push_str(&format!("&tenant={}", escaped(&config.tenant)));
    }
    let rank: Option<fn(&Value) -> u64> = match sort {
        "heat" => Some(heat),
        // Versions grow: the oldest is the smallest.
        "age" => Some(|k| u64::MAX - version(k)),
        _ => None,
    };
    if rank.is_some() && given("cursor").is_some() {
        let problem = format!("--cursor: --sort {sort} has one page only; a larger one: --limit");
        return Err(UsageError(problem).into());
    }
    let (keys, next, complete) = if let Some(rank) = rank {
        let (keys, complete) = ranked(&api, &query, limit, Instant::now() + config.timeout, rank)?;
        (keys, None, complete)
    } else {
        if sort != "none" {
            query.push_str(&format!("&sort={sort}"));
        }
        let page = page(&api, &query, limit.min(PAGE), given("cursor"))?;
        (list(&page, "keys").to_vec(), cursor_of(&page), true)
    };
    if output == Output::Json {
        print::json(&json!({"keys": keys, "next_cursor": next, "complete": complete}))?;
        return Ok(ExitStatus::Ok);
    }
    let mut table = Columns::new(&[
        "KEY",
        "?TENANT",
        ">SIZE",
        "?>READ",
        "?>LEASE",
        "?PIN",
        "?>REPLICAS",
    ]);
    for k in &keys {
        let pin = if k.get("hard_pin") == Some(&Value::Bool(true)) {
            "hard"
        } else if number(k, "soft_pin_left_ms") > 0 {
            "soft"
        } else {
            ""
        };
        table.row(&[
            print::shown(text(k, "key")),
            print::shown(text(k, "tenant")),
            ByteSize(number(k, "size_bytes")).to_string(),
            last_read(k),
            lease(number(k, "lease_left_ms")),
            pin.to_owned(),
            number(k, "replicas").to_string(),
        ]);
    }
    table.print()?;
    if let Some(next) = next {
        print::error_line(&format!("more: --cursor {next}"));
    }
    if !complete {
        print::error_line(
            "not all keys were looked at within --timeout: the order is that of a part",
        );
    }
    Ok(ExitStatus::Ok)
}

/// Versions come as text; from a master of an earlier release as a number.
fn version(key: &Value) -> u64 {
    match key.get("version") {
        Some(Value::String(text)) => text.parse().unwrap_or(0),
        Some(other) => other.as_u64().unwrap_or(0),
        None => 0,
    }
}

fn was_read(key: &Value) -> Option<bool> {
    key.get("was_read")?.as_bool()
}

/// Read last first; then what nobody has read, stored last first.
fn heat(key: &Value) -> u64 {
    const READ: u64 = 1 << 63;
    let recent = (READ - 1).saturating_sub(number(key, "unread_ms"));
    match was_read(key) {
        Some(true) => READ + recent,
        Some(false) => recent,
        // A master of an earlier release tells the lease only.
        None => number(key, "lease_left_ms"),
    }
}

fn last_read(key: &Value) -> String {
    match was_read(key) {
        Some(true) => format!("{:.1} s ago", number(key, "unread_ms") as f64 / 1000.0),
        Some(false) => "never".to_owned(),
        None => String::new(),
    }
}

fn lease(ms: u64) -> String {
    match ms {
        0 => String::new(),
        ms => format!("{:.1} s", ms as f64 / 1000.0),
    }
}

/// One key, and what the master still remembers of it.
pub(super) fn key(matches: &ArgMatches, output: Output) -> anyhow::Result<ExitStatus> {
    let name = matches.get_one::<String>("key").map_or("", String::as_str);
    let client: PoolClient = connect::client(matches)?;
    let found = client.stat(name.as_bytes());
    if let Err(error) = &found
        && *error != StoreError::NotFound
    {
        return Err(error.clone().into());
    }
    let tenant = connect::config(matches)?.tenant;
    let history = Api::new(matches).and_then(|api| Ok(history(&api, &tenant, name)?));
    if output == Output::Json {
        let mut document = found.as_ref().map_or_else(
            |_| json!({"key": name, "found": false}),
            |d| stat::document(name, d),
        );
        if let Some(map) = document.as_object_mut() {
            let known = history.as_ref().map_or(Value::Null, |h| json!(h.events));
            map.insert("history".to_owned(), known);
            let recorded = history.as_ref().ok().map(|h| h.recorded);
            map.insert("events_recorded".to_owned(), json!(recorded));
        }
        print::json(&document)?;
    } else {
        match &found {
            Ok(description) => stat::show(name, description, output)?,
            Err(_) => print::line(&format!("key       {} is not there", print::shown(name)))?,
        }
        match &history {
            Ok(history) => show_history(history)?,
            Err(error) => {
                print::error_line(&format!("its history could not be asked for: {error:#}"))
            }
        }
    }
    Ok(if found.is_ok() {
        ExitStatus::Ok
    } else {
        ExitStatus::Negative
    })
}

/// What happened to a key.
struct History {
    events: Vec<Value>,
    /// Whether this master records events at all.
    recorded: bool,
}

fn history(api: &Api, tenant: &str, name: &str) -> Result<History, StoreError> {
    let tenant = if tenant.is_empty() { "default" } else { tenant };
    let (tenant, prefix) = (escaped(tenant), escaped(name));
    let (mut kept, mut recorded) = (Vec::new(), true);
    // The ring holds 65,536 unless told otherwise: a few pages at most, each of what matches.
    let mut from = 1;
    for _ in 0..200 {
        let path = format!("events?from={from}&limit=1000&tenant={tenant}&prefix={prefix}");
        let page = api.get(&path)?;
        recorded = page.get("enabled") != Some(&Value::Bool(false));
        let of_this = |e: &&Value| text(e, "key") == name || text(e, "event") == "cleared";
        kept.extend(list(&page, "events").iter().filter(of_this).cloned());
        let next = number(&page, "next_seq");
        if list(&page, "events").is_empty() || next <= from {
            break;
        }
        from = next;
    }
    // A master of an earlier release remembers no more than the events.
    if let Ok(more) = api.get(&format!("key/history?tenant={tenant}&key={prefix}")) {
        for eviction in list(&more, "evictions") {
            let of = |e: &&mut Value| {
                e.get("version") == eviction.get("version") && text(e, "reason") == "evicted"
            };
            if let Some(Value::Object(event)) = kept.iter_mut().find(of) {
                event.insert("eviction".to_owned(), eviction.clone());
            }
        }
        kept.extend(list(&more, "put_failures").iter().map(|failure| {
            let mut failure = failure.clone();
            failure["event"] = "put failed".into();
            failure
        }));
        kept.sort_by_key(|e| number(e, "unix_ms"));
    }
    let from = kept.len().saturating_sub(HISTORY);
    let events = kept.split_off(from);
    Ok(History { events, recorded })
}

/// Why something happened, in words.
fn why(event: &Value) -> String {
    let seconds = |ms: u64| format!("{:.1} s", ms as f64 / 1000.0);
    if let Some(eviction) = event.get("eviction") {
        let cause = match text(eviction, "cause") {
            "quota" => "its tenant was above its quota",
            _ => "space was needed",
        };
        let unread = seconds(number(eviction, "unread_ms"));
        let age = match eviction.get("was_read") {
            Some(Value::Bool(true)) => format!("not read for {unread}"),
            _ => format!("never read in {unread}"),
        };
        return format!("evicted: {cause}, {age}");
    }
    if text(event, "event") == "put failed" {
        let waited = number(event, "waited_ms");
        let waited = if waited > 0 {
            format!(", waited {}", seconds(waited))
        } else {
            String::new()
        };
        return format!("{}{waited}", text(event, "reason"));
    }
    text(event, "reason").replace('_', " ")
}

fn show_history(history: &History) -> std::io::Result<()> {
    if !history.recorded {
        print::line(
            "history   this master records no events (--kv-events=false): only evictions and failed puts are known",
        )?;
    } else if history.events.is_empty() {
        return print::line("history   the master remembers nothing of it");
    }
    if history.events.is_empty() {
        return Ok(());
    }
    let mut table = Columns::new(&["WHEN", "WHAT", "WHY", ">SIZE", "VERSION"]);
    for e in &history.events {
        table.row(&[
            clock(number(e, "unix_ms")),
            text(e, "event").to_owned(),
            why(e),
            ByteSize(number(e, "size_bytes")).to_string(),
            version(e).to_string(),
        ]);
    }
    table.print()
}

pub(super) fn tenants(matches: &ArgMatches, output: Output) -> anyhow::Result<()> {
    let answer = Api::new(matches)?.all("tenants", "tenants")?;
    if output == Output::Json {
        print::json(&answer)?;
        return Ok(());
    }
    let mut table = Columns::new(&[
        "TENANT",
        ">SIZE",
        "?>HIT RATE",
        "?>OBJECTS",
        "?>WITH REPLICAS",
        "?>HITS",
        "?>MISSES",
    ]);
    for t in list(&answer, "tenants") {
        let rate = t.get("hit_rate").and_then(Value::as_f64);
        table.row(&[
            print::shown(text(t, "tenant")),
            ByteSize(number(t, "bytes")).to_string(),
            rate.map_or_else(String::new, |r| format!("{:.1} %", r * 100.0)),
            number(t, "objects").to_string(),
            ByteSize(number(t, "replica_bytes")).to_string(),
            number(t, "hits").to_string(),
            number(t, "misses").to_string(),
        ]);
    }
    table.print()?;
    Ok(())
}

pub(super) fn hot(matches: &ArgMatches, output: Output) -> anyhow::Result<()> {
    let answer = Api::new(matches)?.get("hot?limit=20")?;
    if output == Output::Json {
        print::json(&answer)?;
        return Ok(());
    }
    let mut table = Columns::new(&["FIRST KEY", "?TENANT", ">REQUESTS", "?>KEYS FOUND"]);
    for p in list(&answer, "prefixes") {
        table.row(&[
            print::shown(text(p, "key")),
            print::shown(text(p, "tenant")),
            number(p, "requests").to_string(),
            number(p, "keys_found").to_string(),
        ]);
    }
    table.print()?;
    Ok(())
}

/// The maps of segments, as far as they come within the deadline: name to how full each part is, 0 to 1.
pub(super) fn maps(
    api: &Api,
    names: &[String],
    cells: usize,
    patience: Duration,
) -> Vec<Option<Vec<f64>>> {
    let end = Instant::now() + patience;
    names
        .iter()
        .map(|name| {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let path = format!("segments/map?segment={}&cells={cells}", escaped(name));
            let map = api.get_within(&path, left).ok()?;
            Some(
                list(&map, "cells")
                    .iter()
                    .filter_map(Value::as_f64)
                    .collect(),
            )
        })
        .collect()
}
