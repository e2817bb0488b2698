//! Why a key was evicted, and why puts of it failed, as JSON.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::get;
use serde_json::{Value, json};

use super::super::Master;
use super::super::history::{Cause, Eviction, Failure};
use super::pool::key_of;
use super::{Params, Shared, answer, invalid};
use crate::store::model::error::{StoreError, code_name};
use crate::store::model::key;

pub(super) fn routes() -> Router<Arc<Master>> {
    Router::new().route("/api/v1/key/history", get(history))
}

fn eviction(e: &Eviction) -> Value {
    let cause = match e.cause {
        Cause::Space => "space",
        Cause::Quota => "quota",
    };
    json!({
        "unix_ms": e.unix_ms, "version": e.version.to_string(), "size_bytes": e.size, "cause": cause,
        "unread_ms": e.unread_ms, "was_read": e.was_read, "soft_pinned": e.soft_pinned,
    })
}

fn failure(f: &Failure) -> Value {
    let reason = match f.code {
        -200 => "no free range is large enough, and nothing more may go".to_owned(),
        code => StoreError::from_code(code).to_string(),
    };
    json!({
        "unix_ms": f.unix_ms, "size_bytes": f.size, "replicas": f.replicas, "error_code": f.code,
        "error_name": code_name(f.code), "reason": reason, "waited_ms": f.waited_ms,
    })
}

async fn history(State(master): Shared, Query(params): Params) -> Response {
    let tenant = params.get("tenant").map_or("", String::as_str);
    let Some(bytes) = key_of(&params) else {
        return invalid("one of `key` and `key_hex` is needed");
    };
    let mut qualified = Vec::new();
    if let Err(error) = key::qualify(tenant, &bytes, &mut qualified) {
        return invalid(&error.to_string());
    }
    let (evictions, failures) = master.state.history.of(key::hash(&qualified));
    answer(
        StatusCode::OK,
        &json!({
            "evictions": evictions.iter().map(eviction).collect::<Vec<_>>(),
            "put_failures": failures.iter().map(failure).collect::<Vec<_>>(),
        }),
    )
}
