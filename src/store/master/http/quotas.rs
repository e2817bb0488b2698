//! Quotas of tenants in upstream's shapes. Beyond them: `kept_by_nodes` and `nodes`, where a decision is kept.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::get;
use serde_json::{Value, json};

use super::super::Master;
use super::super::quotas::{QUOTA_MAX, Snapshot, is_valid};
use super::{Params, Shared, answer, invalid, refused};
use crate::base::clock::Millis;
use crate::store::model::error::StoreError;

const BODY_MAX: usize = 4096;
/// How long an answer waits for the nodes to keep a decision.
const KEPT: Duration = Duration::from_secs(2);

pub(super) fn routes() -> Router<Arc<Master>> {
    let methods = get(quotas).put(set).delete(unset);
    Router::new().route(
        "/api/v1/tenant_quotas",
        methods.layer(DefaultBodyLimit::max(BODY_MAX)),
    )
}

fn row(s: &Snapshot) -> Value {
    json!({
        "tenant_id": s.tenant, "requested_quota_bytes": s.requested, "effective_quota_bytes": s.effective,
        "charged_bytes": s.charged, "admission_closed": s.closed, "over_quota": s.over,
        "has_explicit_policy": s.explicit,
    })
}

async fn quotas(State(master): Shared, Query(params): Params) -> Response {
    let data = match params.get("tenant_id").filter(|t| !t.is_empty()) {
        None => master
            .state
            .tenant_snapshots()
            .iter()
            .map(row)
            .collect::<Vec<Value>>()
            .into(),
        Some(tenant) if !is_valid(tenant) => return invalid("Invalid tenant_id"),
        Some(tenant) => match master.state.tenant_snapshot(tenant) {
            Some(found) => row(&found),
            None => return refused(&StoreError::NotFound),
        },
    };
    answer(StatusCode::OK, &json!({"success": true, "data": data}))
}

async fn set(State(master): Shared, Query(params): Params, body: Bytes) -> Response {
    let Some(tenant) = params.get("tenant_id").filter(|t| is_valid(t)) else {
        return invalid("Missing or invalid tenant_id");
    };
    let body: Option<Value> = serde_json::from_slice(&body).ok();
    let Some(wanted) = body.as_ref().and_then(|b| b.get("requested_quota_bytes")) else {
        return invalid("Invalid JSON body: an object with `requested_quota_bytes` is expected");
    };
    let Some(quota) = wanted.as_u64().filter(|q| (1..=QUOTA_MAX).contains(q)) else {
        return invalid("Tenant quota must be in [1, 2^63 - 1] bytes");
    };
    decided(&master, tenant, quota).await
}

async fn unset(State(master): Shared, Query(params): Params) -> Response {
    match params.get("tenant_id").filter(|t| is_valid(t)) {
        Some(tenant) => decided(&master, tenant, 0).await,
        None => invalid("Missing or invalid tenant_id"),
    }
}

async fn decided(master: &Arc<Master>, tenant: &str, quota: u64) -> Response {
    let version = match master.state.set_quota(tenant, quota, Millis::now()) {
        Ok(version) => version,
        Err(error) => return refused(&error),
    };
    tracing::info!(tenant, quota_bytes = quota, "tenant quota changed");
    let end = Instant::now() + KEPT;
    let (kept, nodes) = loop {
        let (kept, nodes) = master.state.quota_keepers(version);
        if kept == nodes || Instant::now() >= end {
            break (kept, nodes);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let data = master.state.tenant_snapshot(tenant).map(|s| row(&s));
    answer(
        StatusCode::OK,
        &json!({"success": true, "data": data, "kept_by_nodes": kept, "nodes": nodes}),
    )
}
