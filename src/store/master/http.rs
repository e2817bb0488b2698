//! HTTP on the master's port: health, metrics, and upstream's read-only admin endpoints, in upstream's shapes.

use std::collections::HashMap;
use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};

use super::eviction::Access;
use super::{Master, names, operations};
use crate::base::clock::Millis;
use crate::store::model::error::{StoreError, code_name};
use crate::store::model::key;

type Shared = State<Arc<Master>>;
type Params = Query<HashMap<String, String>>;

/// The routes.
pub(crate) fn router(master: Arc<Master>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/role", get(|| async { "leader" }))
        .route("/ha_status", get(|| async { "serving" }))
        .route("/leader", get(leader))
        .route("/metrics", get(metrics))
        .route("/metrics/summary", get(summary))
        .route("/query_key", get(query_key))
        .route("/get_all_keys", get(all_keys))
        .route("/get_all_segments", get(all_segments))
        .route("/get_segments_detail", get(segments_detail))
        .route("/query_segment", get(query_segment))
        .route("/api/v1/remove_all", post(remove_all))
        .route(
            "/metadata",
            get(names::get)
                .put(names::put)
                .delete(names::delete)
                .layer(DefaultBodyLimit::max(names::VALUE_BYTES_MAX)),
        )
        .fallback(|| async { (StatusCode::NOT_FOUND, "404 Not Found") })
        .with_state(master)
}

fn plain(text: String) -> Response {
    ([(header::CONTENT_TYPE, "text/plain")], text).into_response()
}

fn answer(status: StatusCode, value: &Value) -> Response {
    let kind = [(header::CONTENT_TYPE, "application/json; charset=utf-8")];
    (status, kind, value.to_string()).into_response()
}

fn failure(status: StatusCode, code: i32) -> Response {
    let name = code_name(code);
    answer(
        status,
        &json!({"success": false, "error_code": code, "error_message": name}),
    )
}

async fn health() -> Response {
    answer(
        StatusCode::OK,
        &json!({
            "status": "ok", "role": "leader", "ha_state": "serving", "service_ready": true,
            "leader_address": null, "view_version": null,
        }),
    )
}

async fn leader() -> Response {
    let none = json!({"present": false, "leader_address": null, "view_version": null});
    answer(StatusCode::OK, &none)
}

async fn metrics(State(master): Shared) -> Response {
    let text = master.metrics.render(&master);
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

async fn summary(State(master): Shared) -> Response {
    let o = master.overview_values();
    plain(format!(
        "role=leader, state=serving, master={{Mem Storage: {} / {} | Keys: {} | Clients: {} | Evicted: {}}}\n",
        crate::base::units::ByteSize(o.used_bytes),
        crate::base::units::ByteSize(o.capacity_bytes),
        o.objects,
        o.clients,
        o.evicted_objects,
    ))
}

async fn query_key(State(master): Shared, Query(params): Params) -> Response {
    let missing = || failure(StatusCode::NOT_FOUND, StoreError::NotFound.code());
    let mut qualified = Vec::new();
    let wanted = params.get("key").map_or("", String::as_str);
    if key::qualify("", wanted.as_bytes(), &mut qualified).is_err() {
        return missing();
    }
    let view = master.state.segments.view();
    let access = Access {
        now: Millis::now(),
        ..Access::default()
    };
    let hash = key::hash(&qualified);
    let found = master
        .state
        .locate(&view, hash, &qualified, &access, |object| {
            let replica = |r: &super::object::Replica| {
                let segment = view.get(r.segment as usize)?.as_ref()?;
                Some(json!({
                    "size_": object.size, "buffer_address_": r.offset, "protocol_": "tcp",
                    "transport_endpoint_": segment.node.address,
                }))
            };
            object
                .replicas
                .iter()
                .filter_map(replica)
                .collect::<Vec<_>>()
        });
    match found {
        Some(data) => answer(StatusCode::OK, &json!({"success": true, "data": data})),
        None => missing(),
    }
}

async fn all_keys(State(master): Shared) -> Response {
    let mut text = String::new();
    master.state.walk(0, usize::MAX, |object| {
        if let Some((_, bytes)) = key::split(&object.key) {
            text.push_str(&String::from_utf8_lossy(bytes));
            text.push('\n');
        }
        true
    });
    plain(text)
}

async fn all_segments(State(master): Shared) -> Response {
    let view = master.state.segments.view();
    plain(
        view.iter()
            .flatten()
            .map(|s| format!("{}\n", s.name))
            .collect(),
    )
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
                "size_human": crate::base::units::ByteSize(v.size_bytes).to_string(),
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

async fn query_segment(State(master): Shared, Query(params): Params) -> Response {
    let wanted = params.get("segment").map_or("", String::as_str);
    let view = master.state.segments.view();
    let found = view.iter().flatten().find(|s| s.name == wanted);
    match found {
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

async fn remove_all(State(master): Shared, Query(params): Params) -> Response {
    use crate::store::wire::{OperationBatch, RemoveMatching, operation, reply};
    let operation = operation::Kind::RemoveMatching(RemoveMatching {
        tenant: params.get("tenant_id").cloned().unwrap_or_default(),
        regex: String::new(),
        force: params.get("force").is_some_and(|f| f == "true"),
    });
    let batch = OperationBatch {
        operations: vec![operation.into()],
        ..OperationBatch::default()
    };
    let done = tokio::task::spawn_blocking(move || operations::execute(&master, batch)).await;
    let reply = done
        .ok()
        .and_then(|mut batch| batch.replies.pop())
        .and_then(|r| r.kind);
    match reply {
        Some(reply::Kind::Removed(r)) if r.code == 0 => answer(
            StatusCode::OK,
            &json!({"success": true, "removed_count": r.count}),
        ),
        Some(reply::Kind::Removed(r)) => failure(StatusCode::INTERNAL_SERVER_ERROR, r.code),
        _ => failure(StatusCode::INTERNAL_SERVER_ERROR, -1),
    }
}
