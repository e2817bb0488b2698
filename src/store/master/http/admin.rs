//! Upstream's admin endpoints, in upstream's shapes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Router;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Map, Value, json};

use super::super::eviction::Access;
use super::super::object::{Object, Replica};
use super::super::segments::{DrainState, NodePhase, SegmentState, SegmentsView};
use super::super::{Master, operations};
use super::{Params, Shared, answer, failure, invalid, plain};
use crate::base::clock::Millis;
use crate::base::units::ByteSize;
use crate::store::model::error::{StoreError, code_name};
use crate::store::model::key;
use crate::store::wire::{RemoveMatching, operation, reply};

/// Keys of one `batch_query_keys`.
const KEYS_MAX: usize = 10_000;

pub(super) fn routes() -> Router<Arc<Master>> {
    Router::new()
        .route("/role", get(|| async { "leader" }))
        .route("/ha_status", get(|| async { "serving" }))
        .route("/leader", get(leader))
        .route("/kv_events/status", get(kv_events_status))
        .route("/query_key", get(query_key))
        .route("/batch_query_keys", get(batch_query_keys))
        .route("/get_all_keys", get(all_keys))
        .route("/get_all_segments", get(all_segments))
        .route("/get_segments_detail", get(segments_detail))
        .route("/query_segment", get(query_segment))
        .route("/api/v1/segments/status", get(segment_status))
        .route("/api/v1/remove_all", post(remove_all))
}

async fn leader() -> Response {
    let none = json!({"present": false, "leader_address": null, "view_version": null});
    answer(StatusCode::OK, &none)
}

async fn kv_events_status(State(master): Shared) -> Response {
    let stats = master.kv_events.get().cloned();
    let enabled = stats.is_some();
    let stats = stats.unwrap_or_default();
    let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
    answer(
        StatusCode::OK,
        &json!({
            "enabled": enabled, "subscribers": master.subscribers.count(),
            "published_batches": load(&stats.batches), "published_events": load(&stats.events),
            "dropped_events": load(&stats.dropped), "skipped_unparsed_keys": load(&stats.unparsed),
        }),
    )
}

/// What a key is that the index does not have: absent, or not known yet while nodes may still report it.
fn absence(master: &Master, now: Millis) -> StoreError {
    if master.state.recovering(now) {
        StoreError::Rebuilding
    } else {
        StoreError::NotFound
    }
}

/// The replicas of an object that can be read, as upstream describes buffers.
fn buffers(view: &SegmentsView, object: &Object) -> Vec<Value> {
    let one = |r: &Replica| {
        let segment = view.get(r.segment as usize)?.as_ref()?;
        Some(json!({
            "size_": object.size, "buffer_address_": r.offset, "protocol_": "tcp",
            "transport_endpoint_": segment.node.address,
        }))
    };
    object.replicas.iter().filter_map(one).collect()
}

async fn query_key(State(master): Shared, Query(params): Params) -> Response {
    let missing = |error: &StoreError| failure(super::status(error.code()), error.code());
    let mut qualified = Vec::new();
    let wanted = params.get("key").map_or("", String::as_str);
    if key::qualify("", wanted.as_bytes(), &mut qualified).is_err() {
        return missing(&StoreError::NotFound);
    }
    let view = master.state.segments.view();
    let access = Access {
        now: Millis::now(),
        ..Access::default()
    };
    let hash = key::hash(&qualified);
    let found = master
        .state
        .locate(&view, hash, &qualified, &access, |o| buffers(&view, o));
    match found {
        Some(data) => answer(StatusCode::OK, &json!({"success": true, "data": data})),
        None => missing(&absence(&master, access.now)),
    }
}

/// Grants no lease.
async fn batch_query_keys(State(master): Shared, Query(params): Params) -> Response {
    let keys: Vec<&str> = params
        .get("keys")
        .filter(|k| !k.is_empty())
        .map_or_else(Vec::new, |k| k.split(',').collect());
    if keys.is_empty() || keys.len() > KEYS_MAX {
        let error = "No keys provided. Use ?keys=key1,key2,...";
        return answer(
            StatusCode::BAD_REQUEST,
            &json!({"success": false, "error": error}),
        );
    }
    let view = master.state.segments.view();
    let now = Millis::now();
    let mut data = Map::new();
    let mut qualified = Vec::new();
    for name in keys {
        let found = key::qualify("", name.as_bytes(), &mut qualified)
            .ok()
            .and_then(|()| {
                let hash = key::hash(&qualified);
                master.state.peek(hash, &qualified, |o| buffers(&view, o))
            });
        let value = match found {
            Some(values) => json!({"ok": true, "values": values}),
            None => json!({"ok": false, "error": code_name(absence(&master, now).code())}),
        };
        data.insert(name.to_owned(), value);
    }
    answer(StatusCode::OK, &json!({"success": true, "data": data}))
}

async fn all_keys(State(master): Shared) -> Response {
    let walked = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        master.state.walk(0, usize::MAX, |object| {
            if let Some((_, bytes)) = key::split(&object.key) {
                text.push_str(&String::from_utf8_lossy(bytes));
                text.push('\n');
            }
            true
        });
        text
    });
    plain(walked.await.unwrap_or_default())
}

async fn all_segments(State(master): Shared) -> Response {
    let view = master.state.segments.view();
    let names = view.iter().flatten().map(|s| format!("{}\n", s.name));
    plain(names.collect())
}

async fn segments_detail(State(master): Shared) -> Response {
    let view = master.state.segments.view();
    let now = Millis::now();
    let segments: Vec<Value> = view
        .iter()
        .flatten()
        .map(|s| {
            let v = operations::segment_view(s, now);
            let percent = v.used_bytes as f64 * 100.0 / v.size_bytes.max(1) as f64;
            json!({
                "segment_name": v.name, "segment_id": format!("{:x}-{}", v.incarnation, v.segment),
                "client_id": s.node.id.to_string(), "base_address": "0x0", "size_bytes": v.size_bytes,
                "size_human": ByteSize(v.size_bytes).to_string(),
                "te_endpoint": v.address, "protocol": "tcp",
                "status": if v.state == "ok" { "OK".to_owned() } else { v.state.to_uppercase() },
                "allocator_used_bytes": v.used_bytes, "allocator_capacity_bytes": v.size_bytes,
                "allocator_usage_percent": percent,
            })
        })
        .collect();
    answer(
        StatusCode::OK,
        &json!({"total_segments": segments.len(), "segments": segments}),
    )
}

fn by_name<'v>(view: &'v SegmentsView, name: &str) -> Option<&'v Arc<SegmentState>> {
    view.iter().flatten().find(|s| s.name == name)
}

async fn query_segment(State(master): Shared, Query(params): Params) -> Response {
    let wanted = params.get("segment").map_or("", String::as_str);
    let view = master.state.segments.view();
    match by_name(&view, wanted) {
        Some(s) => {
            let used = s.allocator.lock().used();
            plain(format!(
                "{wanted}\nUsed(bytes): {used}\nCapacity(bytes) : {}\n",
                s.size
            ))
        }
        None => (StatusCode::INTERNAL_SERVER_ERROR, "Failed to query segment").into_response(),
    }
}

/// Upstream knows OK and its ways of leaving; a segment whose node is away counts as undefined.
async fn segment_status(State(master): Shared, Query(params): Params) -> Response {
    let Some(wanted) = params.get("segment").filter(|s| !s.is_empty()) else {
        return invalid("Missing segment query parameter");
    };
    let view = master.state.segments.view();
    let Some(segment) = by_name(&view, wanted) else {
        return failure(StatusCode::NOT_FOUND, StoreError::SegmentNotFound.code());
    };
    let (status, name) = match segment.node.phase() {
        NodePhase::Ok => match segment.drain() {
            DrainState::None => (1, "OK"),
            DrainState::Draining => (2, "DRAINING"),
            DrainState::Drained => (3, "DRAINED"),
        },
        NodePhase::Draining => (2, "DRAINING"),
        NodePhase::Gone => (5, "UNMOUNTING"),
        NodePhase::Rebuilding | NodePhase::Lost => (0, "UNDEFINED"),
    };
    answer(
        StatusCode::OK,
        &json!({
            "success": true, "segment": wanted, "status": status, "status_name": name,
            "error_code": 0, "error_message": "",
        }),
    )
}

async fn remove_all(State(master): Shared, Query(params): Params) -> Response {
    let operation = operation::Kind::RemoveMatching(RemoveMatching {
        tenant: params.get("tenant_id").cloned().unwrap_or_default(),
        regex: String::new(),
        force: params.get("force").is_some_and(|f| f == "true"),
    });
    match super::execute(&master, operation).await {
        Some(reply::Kind::Removed(r)) if r.code == 0 => answer(
            StatusCode::OK,
            &json!({"success": true, "removed_count": r.count}),
        ),
        Some(reply::Kind::Removed(r)) => failure(StatusCode::INTERNAL_SERVER_ERROR, r.code),
        _ => failure(StatusCode::INTERNAL_SERVER_ERROR, -1),
    }
}
