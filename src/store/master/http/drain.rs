//! Drain jobs in upstream's shapes. Beyond them: `blocked`, the first objects that could not be moved, and why.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{get, post};
use serde_json::{Value, json};

use super::super::Master;
use super::super::drain::{JobReport, Stuck};
use super::{Params, Shared, answer, invalid, refused};
use crate::base::clock::Millis;
use crate::base::id::Id128;
use crate::store::model::error::StoreError;
use crate::store::model::key;

/// Most bytes of a job's description.
const BODY_MAX: usize = 256 << 10;
/// How long nodes may take to say that they keep a job; one that is slow is told with its next message.
const KEPT: Duration = Duration::from_millis(500);
/// Upstream's default.
const CONCURRENCY: u32 = 4;

pub(super) fn routes() -> Router<Arc<Master>> {
    Router::new()
        .route(
            "/api/v1/drain_jobs",
            post(create).layer(DefaultBodyLimit::max(BODY_MAX)),
        )
        .route("/api/v1/drain_jobs/query", get(query))
        .route("/api/v1/drain_jobs/cancel", post(cancel))
}

/// A list of names in the body; absent = none.
fn names(body: &Value, field: &str) -> Option<Vec<String>> {
    match body.get(field) {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(Value::Array(all)) => all.iter().map(|v| v.as_str().map(str::to_owned)).collect(),
        Some(_) => None,
    }
}

async fn create(State(master): Shared, body: Bytes) -> Response {
    let Ok(body @ Value::Object(_)) = serde_json::from_slice::<Value>(&body) else {
        return invalid("Invalid JSON body: an object with `segments` is expected");
    };
    let (Some(segments), Some(targets)) =
        (names(&body, "segments"), names(&body, "target_segments"))
    else {
        return invalid("Invalid JSON body: `segments` and `target_segments` are lists of names");
    };
    let concurrency = match body.get("max_concurrency") {
        None | Some(Value::Null) => Some(CONCURRENCY),
        Some(given) => given.as_u64().map(|n| u32::try_from(n).unwrap_or(u32::MAX)),
    };
    let Some(concurrency) = concurrency else {
        return invalid("Invalid JSON body: `max_concurrency` is a number");
    };
    let now = Millis::now();
    let drained =
        tokio::task::block_in_place(|| master.state.drain(&segments, &targets, concurrency, now));
    match drained {
        Ok(id) => {
            tracing::info!(job = %id, segments = %segments.join(", "), "drain job created");
            until_kept(&master).await;
            job_answer(id, "CREATED")
        }
        Err(error) => refused(&error),
    }
}

/// Waits until all nodes keep what is known of jobs, for a while: then it outlives this master.
async fn until_kept(master: &Master) {
    let version = master.state.drains.version();
    let end = Instant::now() + KEPT;
    loop {
        let (kept, nodes) = master.state.drain_keepers(version);
        if kept == nodes || Instant::now() >= end {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn job_answer(id: Id128, status: &str) -> Response {
    answer(
        StatusCode::OK,
        &json!({
            "success": true, "job_id": id.to_string(), "status": status, "error_code": 0, "error_message": "",
        }),
    )
}

/// The `job_id` of a request.
fn job_id(given: Option<&String>) -> Option<Id128> {
    let (high, low) = given?.split_once('-')?;
    let half = |text: &str| {
        let plain = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
        plain.then(|| u64::from_str_radix(text, 16).ok()).flatten()
    };
    Some(Id128 {
        high: half(high)?,
        low: half(low)?,
    })
}

async fn query(State(master): Shared, Query(params): Params) -> Response {
    let Some(id) = job_id(params.get("job_id")) else {
        return invalid("Missing or invalid job_id");
    };
    match master.state.drains.report(id) {
        Some(report) => answer(StatusCode::OK, &shown(id, &report)),
        // A node that keeps it may still come.
        None if master.state.recovering(Millis::now()) => refused(&StoreError::Rebuilding),
        None => refused(&unknown()),
    }
}

fn unknown() -> StoreError {
    StoreError::Refused {
        code: -1402,
        reason: "no such job".to_owned(),
    }
}

fn shown(id: Id128, r: &JobReport) -> Value {
    let blocked = |stuck: &Stuck| {
        let (tenant, bytes) = key::split(&stuck.key).unwrap_or(("", &[]));
        let tenant = if tenant.is_empty() {
            key::DEFAULT_TENANT
        } else {
            tenant
        };
        json!({
            "tenant": tenant, "key": String::from_utf8_lossy(bytes), "size_bytes": stuck.size, "reason": stuck.reason,
        })
    };
    let mut shown = json!({
        "success": true, "job_id": id.to_string(), "type": 0, "type_name": "DRAIN",
        "status": r.status as i32, "status_name": r.status.name(),
        "created_at_ms_epoch": r.created_unix_ms, "last_updated_at_ms_epoch": r.updated_unix_ms,
        "segments": r.segments, "succeeded_units": r.succeeded, "failed_units": r.failed,
        "blocked_units": r.blocked, "active_units": r.active, "migrated_bytes": r.moved_bytes,
    });
    shown["message"] = r.message.as_str().into();
    shown["error_code"] = 0.into();
    shown["error_message"] = "".into();
    shown["blocked"] = r.stuck.iter().map(blocked).collect::<Vec<_>>().into();
    shown
}

async fn cancel(State(master): Shared, Query(params): Params) -> Response {
    let Some(id) = job_id(params.get("job_id")) else {
        return invalid("Missing or invalid job_id");
    };
    match tokio::task::block_in_place(|| master.state.cancel_drain(id)) {
        Ok(()) => {
            until_kept(&master).await;
            job_answer(id, "CANCELED")
        }
        Err(_)
            if master.state.drains.report(id).is_none()
                && master.state.recovering(Millis::now()) =>
        {
            refused(&StoreError::Rebuilding)
        }
        Err(error) => refused(&error),
    }
}
