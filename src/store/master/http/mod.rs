//! HTTP on the master's port: health, metrics, events, upstream's admin endpoints ([`admin`]) and the pool as JSON ([`pool`]).

mod admin;
mod census;
mod drain;
mod history;
mod keys;
mod page;
mod pool;
mod quotas;

use std::collections::HashMap;
use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::{Value, json};

use super::metrics::exposition;
use super::{Master, dashboard, names, operations, stream};
use crate::base::clock::Millis;
use crate::base::units::ByteSize;
use crate::store::model::error::{StoreError, code_name};
use crate::store::wire::{OperationBatch, operation, reply};

type Shared = State<Arc<Master>>;
type Params = Query<HashMap<String, String>>;

/// The routes.
pub(crate) fn router(master: Arc<Master>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/metrics/summary", get(summary))
        .route("/events", get(stream::sse_events))
        .route(
            "/metadata",
            get(names::get)
                .put(names::put)
                .delete(names::delete)
                .layer(DefaultBodyLimit::max(names::VALUE_BYTES_MAX)),
        )
        .route("/", get(dashboard::page))
        .route("/dashboard/live", get(dashboard::live))
        .merge(admin::routes())
        .merge(drain::routes())
        .merge(history::routes())
        .merge(quotas::routes())
        .merge(pool::routes())
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

/// 400 with a reason.
fn invalid(reason: &str) -> Response {
    let code = StoreError::InvalidParams {
        what: String::new(),
    }
    .code();
    answer(
        StatusCode::BAD_REQUEST,
        &json!({"success": false, "error_code": code, "error_message": reason}),
    )
}

/// The status for one of the pool's codes.
fn status(code: i32) -> StatusCode {
    if code == StoreError::NotFound.code() || code == StoreError::SegmentNotFound.code() {
        StatusCode::NOT_FOUND
    } else if code == (StoreError::InvalidKey { length: 0 }).code() {
        StatusCode::BAD_REQUEST
    } else if code == StoreError::Rebuilding.code() {
        StatusCode::SERVICE_UNAVAILABLE
    } else {
        StatusCode::INTERNAL_SERVER_ERROR
    }
}

/// The status upstream's admin endpoints give, with the reason.
fn refused(error: &StoreError) -> Response {
    let status = match error.code() {
        -600 | -400 => StatusCode::BAD_REQUEST,
        -101 | -704 | -1402 => StatusCode::NOT_FOUND,
        -1010 | -1011 | -1401 | -1702 => StatusCode::CONFLICT,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let message = format!("{}: {error}", code_name(error.code()));
    answer(
        status,
        &json!({"success": false, "error_code": error.code(), "error_message": message}),
    )
}

/// Carries out one operation on a thread that may wait.
async fn execute(master: &Arc<Master>, operation: operation::Kind) -> Option<reply::Kind> {
    let master = master.clone();
    let batch = OperationBatch {
        operations: vec![operation.into()],
        ..OperationBatch::default()
    };
    let done = tokio::task::spawn_blocking(move || operations::execute(&master, batch)).await;
    done.ok()?.replies.pop()?.kind
}

/// Alive in any case; ready once it can tell what is not there.
async fn health(State(master): Shared) -> Response {
    let ready = !master.state.recovering(Millis::now());
    answer(
        StatusCode::OK,
        &json!({
            "status": "ok", "role": "leader", "ha_state": "serving", "service_ready": ready,
            "leader_address": null, "view_version": null,
        }),
    )
}

async fn metrics(State(master): Shared) -> Response {
    let text = master.metrics.render(&master);
    ([(header::CONTENT_TYPE, exposition::CONTENT_TYPE)], text).into_response()
}

async fn summary(State(master): Shared) -> Response {
    let o = master.overview_values();
    plain(format!(
        "role=leader, state=serving, service_ready={}, master={{Mem Storage: {} / {} | Keys: {} | Clients: {} | \
         Hits: {} / {} | Evicted: {} keys, {}}}\n",
        !o.rebuilding,
        ByteSize(o.used_bytes),
        ByteSize(o.capacity_bytes),
        o.objects,
        o.clients,
        o.hits,
        o.hits + o.misses,
        o.evicted_objects,
        ByteSize(o.evicted_bytes),
    ))
}
