//! `/api/v1`: the pool as JSON, in pages: what `mooncake inspect` and dashboards show. Reads only; grants no lease.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Router;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::get;
use serde_json::{Map, Value, json};

use super::super::events::Filter;
use super::super::{Master, operations, stream};
use super::census::{self, census};
use super::keys::keys;
use super::page::{hex, limit, number, page, unhex};
use super::{Params, Shared, answer, failure, invalid};
use crate::base::clock::Millis;
use crate::store::alloc::offset::map_of;
use crate::store::model::error::StoreError;
use crate::store::model::key;
use crate::store::wire;

/// Cells of one occupancy map.
const CELLS_MAX: usize = 4096;

pub(super) fn routes() -> Router<Arc<Master>> {
    Router::new()
        .route("/api/v1/overview", get(overview))
        .route("/api/v1/nodes", get(nodes))
        .route("/api/v1/segments", get(segments))
        .route("/api/v1/segments/map", get(segment_map))
        .route("/api/v1/keys", get(keys))
        .route("/api/v1/key", get(one_key))
        .route("/api/v1/tenants", get(tenants))
        .route("/api/v1/census", get(census))
        .route("/api/v1/hot", get(hot))
        .route("/api/v1/histograms", get(histograms))
        .route("/api/v1/events", get(events))
}

pub(super) fn ok(value: &Value) -> Response {
    answer(StatusCode::OK, value)
}

pub(super) fn filter(params: &HashMap<String, String>) -> Filter {
    Filter {
        tenant: params.get("tenant").cloned(),
        prefix: params
            .get("prefix")
            .map_or_else(Vec::new, |p| p.clone().into_bytes()),
    }
}

/// `key`, and `key_hex` when it is no text.
pub(super) fn set_key(map: &mut Map<String, Value>, bytes: &[u8]) {
    map.insert("key".to_owned(), String::from_utf8_lossy(bytes).into());
    if std::str::from_utf8(bytes).is_err() {
        map.insert("key_hex".to_owned(), hex(bytes).into());
    }
}

/// The key that `key` or `key_hex` names.
pub(super) fn key_of(params: &HashMap<String, String>) -> Option<Vec<u8>> {
    match (params.get("key"), params.get("key_hex")) {
        (Some(key), None) => Some(key.clone().into_bytes()),
        (None, Some(text)) => unhex(text),
        _ => None,
    }
}

fn share(part: u64, whole: u64) -> Value {
    if whole == 0 {
        Value::Null
    } else {
        json!(part as f64 / whole as f64)
    }
}

async fn overview(State(master): Shared) -> Response {
    let last = master.refused.last();
    let refused = json!({
        "count": master.refused.count(), "last_ms": last.map(|(ago, _)| ago.as_millis() as u64),
        "last_from": last.map(|(_, ip)| ip.to_string()),
    });
    let o = master.overview_values();
    let state = &master.state;
    let (nodes, segments) = (state.segments.nodes(), state.segments.view());
    let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
    let moved = master.metrics.moved.all();
    let transfers: Vec<Value> = moved
        .iter()
        .filter(|m| m.bytes > 0)
        .map(|m| {
            json!({
                "transport": m.transport, "operation": m.operation, "bytes": m.bytes, "transfers": m.times.count(),
                "p50_ns": m.times.quantile(0.5), "p99_ns": m.times.quantile(0.99),
            })
        })
        .collect();
    ok(&json!({
        "build": o.build, "uptime_ms": o.uptime_ms, "term": state.term(), "rebuilding": o.rebuilding,
        "nodes": nodes.len(), "segments": segments.iter().flatten().count(), "clients": o.clients,
        "objects": o.objects, "soft_pinned_objects": load(&state.counters.soft_pinned),
        "capacity_bytes": o.capacity_bytes, "used_bytes": o.used_bytes,
        "arena_free_bytes": o.arena_free_bytes, "arenas": o.arenas, "pending_puts": o.pending_puts,
        "puts": load(&state.counters.puts), "put_failures": load(&state.counters.put_failures),
        "removed": load(&state.counters.removed),
        "evicted_objects": o.evicted_objects, "evicted_bytes": o.evicted_bytes,
        "eviction_hold_max_us": o.eviction_hold_max_us,
        "read_bytes": o.read_bytes, "written_bytes": o.written_bytes, "transfers": transfers,
        "hits": o.hits, "misses": o.misses, "hit_rate": share(o.hits, o.hits + o.misses),
        "events": {
            "enabled": state.events.enabled(), "epoch": state.events.epoch(),
            "oldest_seq": state.events.oldest(), "next_seq": state.events.next(),
            "subscribers": master.subscribers.count(),
        },
        "refused_tokens": refused,
    }))
}

async fn nodes(State(master): Shared, Query(params): Params) -> Response {
    let now = Millis::now();
    let view = master.state.segments.view();
    let nodes = master.state.segments.nodes();
    let paged = page(&params, nodes, |n| {
        format!("{}\0{}", n.name, n.id).into_bytes()
    });
    let (nodes, next_cursor) = match paged {
        Ok(paged) => paged,
        Err(problem) => return *problem,
    };
    let show = |node: Arc<super::super::segments::NodeState>| {
        let own = || {
            node.slots
                .iter()
                .filter_map(|s| view.get(*s as usize)?.as_ref())
        };
        let silent = now.since(Millis(node.last_seen.load(Ordering::Relaxed)));
        json!({
            "node": node.name, "node_id": node.id.to_string(), "address": node.address, "host_id": node.host_id,
            "state": node.state_name(now), "silent_ms": silent, "segments": own().count(),
            "size_bytes": own().map(|s| s.size).sum::<u64>(),
            "used_bytes": own().map(|s| s.allocator.lock().used()).sum::<u64>(),
            "objects": own().map(|s| s.objects.load(Ordering::Relaxed)).sum::<u64>(),
            "leaving_bytes": node.drops.lock().bytes(),
            "refused_requests": node.served.lock().refused, "refused_lanes": node.served.lock().lanes_refused,
        })
    };
    let nodes: Vec<Value> = nodes.into_iter().map(show).collect();
    ok(&json!({"nodes": nodes, "next_cursor": next_cursor}))
}

async fn segments(State(master): Shared, Query(params): Params) -> Response {
    let now = Millis::now();
    let view = master.state.segments.view();
    let all: Vec<_> = view.iter().flatten().collect();
    // Slots are never reused.
    let (segments, next_cursor) = match page(&params, all, |s| s.slot.to_be_bytes().to_vec()) {
        Ok(paged) => paged,
        Err(problem) => return *problem,
    };
    let show = |s: &Arc<super::super::segments::SegmentState>| {
        let v = operations::segment_view(s, now);
        let free = v.size_bytes.saturating_sub(v.used_bytes);
        json!({
            "segment": v.segment, "name": v.name, "incarnation": format!("{:x}", v.incarnation), "node": v.node,
            "node_segment": v.node_segment, "address": v.address, "host_id": v.host_id, "state": v.state,
            "page_kind": v.page_kind, "size_bytes": v.size_bytes, "used_bytes": v.used_bytes, "objects": v.objects,
            "arena_free_bytes": s.arena_bytes.load(Ordering::Relaxed), "free_ranges": v.free_ranges,
            "largest_free_bytes": v.largest_free_bytes,
            "fragmentation": if free == 0 { json!(0.0) } else { json!(1.0 - v.largest_free_bytes as f64 / free as f64) },
        })
    };
    let segments: Vec<Value> = segments.into_iter().map(show).collect();
    let epoch = master.state.segments.epoch();
    ok(&json!({"view_epoch": epoch, "segments": segments, "next_cursor": next_cursor}))
}

/// How full each of `cells` equal parts of a segment is, 0 to 1.
async fn segment_map(State(master): Shared, Query(params): Params) -> Response {
    let wanted = params.get("segment").map_or("", String::as_str);
    let cells = match number(&params, "cells", 256) {
        Ok(cells) => usize::try_from(cells)
            .unwrap_or(CELLS_MAX)
            .clamp(1, CELLS_MAX),
        Err(problem) => return *problem,
    };
    let view = master.state.segments.view();
    // By name or by number.
    let found = view
        .iter()
        .flatten()
        .find(|s| s.name == wanted || s.slot.to_string() == wanted);
    let Some(segment) = found else {
        return failure(StatusCode::NOT_FOUND, StoreError::SegmentNotFound.code());
    };
    let (free, complete) = segment.allocator.lock().largest_free_ranges();
    // Enough for a picture.
    let share = |used: u8| (f64::from(used) / 255.0 * 1000.0).round() / 1000.0;
    let map = map_of(segment.size, &free, cells);
    let cell_bytes = segment.size.div_ceil(cells as u64);
    ok(&json!({
        "segment": segment.slot, "name": segment.name, "size_bytes": segment.size, "cell_bytes": cell_bytes,
        "complete": complete, "cells": map.into_iter().map(share).collect::<Vec<f64>>(),
    }))
}

async fn one_key(State(master): Shared, Query(params): Params) -> Response {
    let tenant = params.get("tenant").cloned().unwrap_or_default();
    let Some(bytes) = key_of(&params) else {
        return invalid("one of `key` and `key_hex` is needed");
    };
    let stat = wire::operation::Kind::Stat(wire::Stat {
        tenant: tenant.clone(),
        key: bytes.clone().into(),
    });
    let d = match super::execute(&master, stat).await {
        Some(wire::reply::Kind::Description(d)) => d,
        Some(wire::reply::Kind::Refused(r)) => {
            return failure(super::status(r.code), r.code);
        }
        _ => return failure(StatusCode::INTERNAL_SERVER_ERROR, -1),
    };
    let replicas: Vec<Value> = d
        .replicas
        .iter()
        .map(|r| {
            json!({
                "segment": r.segment, "segment_name": r.segment_name, "node": r.node, "offset": r.offset,
                "state": r.state,
            })
        })
        .collect();
    let mut map = Map::new();
    let tenant = if tenant.is_empty() {
        key::DEFAULT_TENANT
    } else {
        &tenant
    };
    map.insert("tenant".to_owned(), tenant.into());
    set_key(&mut map, &bytes);
    let rest = json!({
        "size_bytes": d.size_bytes, "version": d.version.to_string(), "checksum": d.has_checksum.then_some(d.checksum),
        "lease_left_ms": d.lease_left_ms, "soft_pin_left_ms": d.soft_pin_left_ms, "hard_pin": d.hard_pin,
        "group": d.group, "data_type": d.data_type, "replicas": replicas,
    });
    if let Value::Object(rest) = rest {
        map.extend(rest);
    }
    ok(&Value::Object(map))
}

async fn tenants(State(master): Shared, Query(params): Params) -> Response {
    let (holds, age) = census::tenants(&master).await;
    let asked: HashMap<String, _> = master.metrics.tenants.all().into_iter().collect();
    let mut names: Vec<&String> = holds.keys().chain(asked.keys()).collect();
    names.sort_unstable();
    names.dedup();
    let (names, next_cursor) = match page(&params, names, |n| n.as_bytes().to_vec()) {
        Ok(paged) => paged,
        Err(problem) => return *problem,
    };
    let show = |name: &&String| {
        let h = holds.get(*name).copied().unwrap_or_default();
        let count = |of: fn(&super::super::metrics::Asked) -> &AtomicU64| {
            asked
                .get(*name)
                .map_or(0, |a| of(a).load(Ordering::Relaxed))
        };
        let (hits, misses) = (count(|a| &a.hits), count(|a| &a.misses));
        json!({
            "tenant": name, "objects": h.objects, "bytes": h.bytes, "replica_bytes": h.replica_bytes,
            "hits": hits, "misses": misses, "hit_bytes": count(|a| &a.hit_bytes),
            "hit_rate": share(hits, hits + misses),
        })
    };
    let tenants: Vec<Value> = names.iter().map(show).collect();
    let age_ms = age.as_millis() as u64;
    ok(&json!({"age_ms": age_ms, "tenants": tenants, "next_cursor": next_cursor}))
}

async fn hot(State(master): Shared, Query(params): Params) -> Response {
    let limit = match limit(&params) {
        Ok(limit) => limit,
        Err(problem) => return *problem,
    };
    let show = |head: super::super::metrics::hot::Head| {
        let mut map = Map::new();
        let tenant = if head.tenant.is_empty() {
            key::DEFAULT_TENANT
        } else {
            &head.tenant
        };
        map.insert("tenant".to_owned(), tenant.into());
        set_key(&mut map, &head.key);
        map.insert("requests".to_owned(), head.requests.into());
        map.insert("error".to_owned(), head.error.into());
        map.insert("keys_found".to_owned(), head.found.into());
        Value::Object(map)
    };
    let top = master.metrics.hot.top(limit, Millis::now());
    let top: Vec<Value> = top.into_iter().map(show).collect();
    ok(&json!({"prefixes": top}))
}

async fn histograms(State(master): Shared) -> Response {
    let all = master.metrics.histograms(&master);
    let show = |shown: &super::super::metrics::Shown| {
        let c = &shown.counted;
        let scaled = |n: Option<u64>| n.map(|n| n as f64 / shown.scale);
        let bounds = c.bounds.iter().map(|b| json!(*b as f64 / shown.scale));
        let bounds = bounds.chain([Value::Null]);
        let buckets: Vec<Value> = bounds
            .zip(&c.counts)
            .map(|(le, count)| json!({"le": le, "count": count}))
            .collect();
        let labels: Map<String, Value> = shown
            .label
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).into()))
            .collect();
        json!({
            "name": shown.name, "help": shown.help, "labels": labels, "count": c.count(),
            "sum": c.sum as f64 / shown.scale, "p50": scaled(c.quantile(0.5)), "p90": scaled(c.quantile(0.9)),
            "p99": scaled(c.quantile(0.99)), "p999": scaled(c.quantile(0.999)), "buckets": buckets,
        })
    };
    let all: Vec<Value> = all.iter().map(show).collect();
    ok(&json!({"histograms": all}))
}

/// A page of the events kept; `from=0`: the last `limit`.
async fn events(State(master): Shared, Query(params): Params) -> Response {
    let (from, limit) = match (number(&params, "from", 0), limit(&params)) {
        (Ok(from), Ok(limit)) => (from, limit),
        (Err(problem), _) | (_, Err(problem)) => return *problem,
    };
    let ring = &master.state.events;
    let (oldest, next) = (ring.oldest(), ring.next());
    let begin = match from {
        0 => next.saturating_sub(limit as u64).max(oldest),
        from => from.max(oldest),
    };
    // What was forgotten since, or is yet to come, makes an empty page.
    let (events, next_seq) = ring
        .read(begin, limit, &filter(&params))
        .unwrap_or((Vec::new(), next));
    let events: Vec<Value> = events.iter().map(stream::event_json).collect();
    ok(&json!({
        "enabled": ring.enabled(), "epoch": ring.epoch(), "oldest_seq": oldest, "next_seq": next_seq,
        "gap": from != 0 && from < oldest, "events": events,
    }))
}
