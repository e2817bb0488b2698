//! What lies in a pool and how it copes: room, fragmentation, eviction, puts that failed and why, objects at risk, whose they are.
//!
//! The figures are the master's own, of all objects; nothing is sampled here.

use std::time::Duration;

use serde_json::Value;

use super::http::{bearer, http};
use super::pool::Seen;
use super::report::Finding;
use crate::base::trust::Token;
use crate::base::units::{ByteSize, format_duration};
use crate::store::client::PoolClient;
use crate::store::model::key::DEFAULT_TENANT;
use crate::store::wire::{OverviewReply, SegmentView};

/// A pool that is turned over faster than this keeps nothing long enough to be found again.
const TURNOVER: Duration = Duration::from_secs(60);
/// Time between two looks at the counters.
const LOOK_AGAIN: Duration = Duration::from_millis(700);
/// Share of a pool's objects that keeps eviction from working.
const MOST: f64 = 0.8;

/// What the master's HTTP tells beyond its lanes.
#[derive(Debug, Default)]
pub(super) struct Told {
    census: Option<Value>,
    overview: Option<Value>,
    metrics: Option<String>,
}

/// Asks; what is not answered is missing.
pub(super) fn ask(master: &str, token: Option<&Token>) -> Told {
    let header = bearer(token);
    let get = |path: &str| {
        let answer = http(master, "GET", path, &header, "").ok()?;
        (answer.status == 200).then_some(answer.body)
    };
    let document = |path: &str| {
        let value: Option<Value> = get(path).and_then(|text| serde_json::from_str(&text).ok());
        value.filter(|v| v.get("objects").is_some())
    };
    Told {
        census: document("/api/v1/census"),
        overview: document("/api/v1/overview"),
        metrics: get("/metrics"),
    }
}

pub(super) fn check(client: &PoolClient, seen: &Seen, told: &Told, tenant: &str) -> Vec<Finding> {
    let mut found = vec![room(&seen.overview, told)];
    found.extend(fragmentation(&seen.segments));
    std::thread::sleep(LOOK_AGAIN);
    let later = client.overview().ok();
    found.push(eviction(&seen.overview, later.as_ref(), LOOK_AGAIN));
    found.extend(failures(told.metrics.as_deref()));
    found.push(at_risk(told));
    found.extend(tenants(told, tenant));
    found.extend(refused(told));
    found
}

/// A number of the census, 0 when it is not there.
fn count(told: &Told, name: &str) -> u64 {
    let value = told.census.as_ref().and_then(|c| c.get(name)?.as_u64());
    value.unwrap_or(0)
}

fn room(o: &OverviewReply, told: &Told) -> Finding {
    let share = o.used_bytes as f64 / o.capacity_bytes.max(1) as f64;
    let shown = format!(
        "{} of {} used ({:.0} %), {} objects",
        ByteSize(o.used_bytes),
        ByteSize(o.capacity_bytes),
        share * 100.0,
        o.objects
    );
    // The default watermark is 0.90 and a round frees 0.05: a pool that evicts stays below.
    if o.capacity_bytes == 0 || share <= 0.97 {
        return Finding::ok("room", shown);
    }
    let part = |name| count(told, name) as f64 / count(told, "objects").max(1) as f64;
    let (pinned, leased) = (part("pinned_objects"), part("leased_objects"));
    let (cause, reason, remedy) = if pinned > MOST {
        (
            "pool_pinned",
            format!(
                "{:.0} % of the objects are pinned: eviction may not take them",
                pinned * 100.0
            ),
            "pin less, or remove what is no longer needed",
        )
    } else if leased > MOST {
        (
            "pool_leased",
            format!(
                "{:.0} % of the objects are leased: eviction may not take them yet",
                leased * 100.0
            ),
            "shorten --default-kv-lease-ttl, or add memory",
        )
    } else {
        (
            "pool_full",
            "eviction does not keep up, or everything is leased or pinned".to_owned(),
            "add memory: another node, or more of it",
        )
    };
    Finding::warn("room", cause, shown, reason).remedy(remedy)
}

fn fragmentation(segments: &[SegmentView]) -> Vec<Finding> {
    let bad: Vec<String> = segments
        .iter()
        .filter(|s| {
            let free = s.size_bytes.saturating_sub(s.used_bytes);
            free > s.size_bytes / 10 && s.largest_free_bytes < free / 20
        })
        .map(|s| {
            format!(
                "{}: {} free, largest range {}",
                s.name,
                ByteSize(s.size_bytes.saturating_sub(s.used_bytes)),
                ByteSize(s.largest_free_bytes)
            )
        })
        .collect();
    if bad.is_empty() {
        return vec![Finding::ok(
            "fragmentation",
            format!("none in {} segment(s)", segments.len()),
        )];
    }
    vec![
        Finding::warn(
            "fragmentation",
            "fragmented",
            bad.join("; "),
            "free space lies in small pieces: large objects cause eviction though there is room",
        )
        .remedy("use objects of similar sizes, or larger segments"),
    ]
}

fn eviction(first: &OverviewReply, later: Option<&OverviewReply>, between: Duration) -> Finding {
    let rate = |bytes: u64, time: Duration| bytes as f64 / time.as_secs_f64().max(0.001);
    let overall = rate(first.evicted_bytes, Duration::from_millis(first.uptime_ms));
    let recent = later.map_or(0.0, |l| {
        rate(l.evicted_bytes.saturating_sub(first.evicted_bytes), between)
    });
    let fastest = overall.max(recent);
    let shown = format!(
        "{} objects, {} since the start",
        first.evicted_objects,
        ByteSize(first.evicted_bytes)
    );
    if first.capacity_bytes > 0 && fastest > first.capacity_bytes as f64 / TURNOVER.as_secs_f64() {
        let seconds = first.capacity_bytes as f64 / fastest;
        let reason = format!(
            "at this rate the whole pool is replaced every {}: little is found again",
            format_duration(Duration::from_secs_f64(seconds.max(0.1)))
        );
        return Finding::warn("eviction", "eviction_thrash", shown, reason)
            .remedy("add memory: another node, or more of it");
    }
    Finding::ok("eviction", shown)
}

/// Reasons for which a put gets no place, as metrics name them: what that means, and what to do.
const FAILURES: [(&str, &str, &str, &str); 4] = [
    (
        "no_space",
        "puts_failed",
        "they found no space: everything was leased, pinned, or in too small pieces",
        "add memory, pin less, or shorten --default-kv-lease-ttl",
    ),
    (
        "too_large",
        "puts_too_large",
        "they were larger than any segment",
        "mount larger segments (--memory of a node, global_segment_size), or put smaller objects",
    ),
    (
        "no_node",
        "puts_without_node",
        "no node in service took anything: there was none, or the preferred segment was not there",
        "start nodes, or correct preferred_segment",
    ),
    (
        "rebuilding",
        "puts_while_rebuilding",
        "the master was reading its nodes' directories",
        "nothing, when the master was restarted a short while ago; else look at the nodes",
    ),
];

/// Puts that got no place since the master's start, by reason.
fn failures(metrics: Option<&str>) -> Vec<Finding> {
    let check = "failed puts";
    let value = |name: &str| {
        let line = metrics?
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        line?.trim().parse::<u64>().ok()
    };
    let Some(all) = value("master_put_start_alloc_failures_total") else {
        return vec![Finding::skipped(
            check,
            "the master's /metrics could not be read",
        )];
    };
    if all == 0 {
        return vec![Finding::ok(check, "none since the master's start")];
    }
    let mut named = 0;
    let mut found: Vec<Finding> = FAILURES
        .iter()
        .filter_map(|(reason, cause, means, remedy)| {
            let series = format!("mooncake_master_put_failures_total{{reason=\"{reason}\"}}");
            let n = value(&series).filter(|n| *n > 0)?;
            named += n;
            let shown = format!("{n} since the master's start");
            Some(Finding::warn(check, cause, shown, *means).remedy(*remedy))
        })
        .collect();
    if all > named {
        let shown = format!("{} since the master's start", all - named);
        let f = Finding::warn(
            check,
            "puts_refused",
            shown,
            "they were refused as they were asked for",
        );
        found.push(f.remedy("look at the client's log for its error"));
    }
    found
}

/// Objects with fewer replicas on living nodes than they were put with.
fn at_risk(told: &Told) -> Finding {
    let check = "objects at risk";
    if told.census.is_none() {
        return Finding::skipped(check, "the master did not say what it holds");
    }
    let (all, gone, fewer) = (
        count(told, "objects"),
        count(told, "unreadable_objects"),
        count(told, "degraded_objects"),
    );
    if gone + fewer == 0 {
        return Finding::ok(check, format!("none of {all}"));
    }
    let shown = format!(
        "of {all}: {gone} only on lost nodes, {fewer} with fewer replicas than they were put with"
    );
    let (reason, remedy) = if gone > 0 {
        (
            "what lies only on a lost node is gone when it is unmounted",
            "bring that node back before client-ttl ends, or write with more replicas",
        )
    } else {
        (
            "the loss of one more node may lose them: nothing makes new copies by itself",
            "bring the lost node back, start as many nodes as there are replicas, or put them again",
        )
    };
    Finding::warn(check, "under_replicated", shown, reason).remedy(remedy)
}

/// Refused within this time, somebody is still knocking: a node asks again every second or so.
const KNOCKING_MS: u64 = 15_000;
/// A single refusal may have been somebody's mistake, made good since.
const KNOCKS: u64 = 3;

/// Somebody with a wrong token: a node or client that is missed, and cannot be seen anywhere else.
fn refused(told: &Told) -> Option<Finding> {
    let refused = told.overview.as_ref()?.get("refused_tokens")?;
    let number = |name: &str| refused.get(name).and_then(Value::as_u64);
    let (count, last) = (number("count")?, number("last_ms"));
    let check = "wrong tokens";
    if count < KNOCKS || last.is_none_or(|ms| ms > KNOCKING_MS) {
        return Some(Finding::ok(check, "nobody was refused lately"));
    }
    let from = refused
        .get("last_from")
        .and_then(Value::as_str)
        .unwrap_or("unknown");
    let shown = format!("{count} refusals, the last of {from}");
    let reason = "somebody there asks again and again with a missing or wrong token: a node or client that is not in the pool";
    Some(
        Finding::warn(check, "token_refused", shown, reason)
            .remedy("give that host the cluster's --token-file or MOONCAKE_TOKEN"),
    )
}

/// A tenant that has nothing beside others that have: most often a misspelt one.
fn tenants(told: &Told, tenant: &str) -> Option<Finding> {
    let tenants = told.census.as_ref()?.get("tenants")?.as_array()?;
    let names: Vec<&str> = tenants
        .iter()
        .filter_map(|t| t.get("tenant")?.as_str())
        .collect();
    // The census names the largest few only: of many, nothing can be concluded.
    let named = !tenant.is_empty() && tenant != DEFAULT_TENANT;
    if !named || names.is_empty() || names.len() >= 20 {
        return None;
    }
    if names.contains(&tenant) {
        return Some(Finding::ok("tenant", format!("{tenant} has objects")));
    }
    let reason = format!("holds nothing, and others do: {}", names.join(", "));
    Some(
        Finding::warn("tenant", "tenant_empty", tenant.to_owned(), reason)
            .remedy("correct tenant_id, unless nothing was written under it yet"),
    )
}
