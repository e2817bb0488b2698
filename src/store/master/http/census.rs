//! What each tenant holds, and the pool's objects as a whole: the survey for programs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::Response;
use serde_json::{Value, json};

use super::super::Master;
use super::super::survey::{Survey, Tally};
use super::Shared;
use super::pool::ok;

/// Prefixes told.
const PREFIXES: usize = 20;
/// Tenants told; `/api/v1/tenants` has them all.
const TENANTS: usize = 20;

/// Objects and bytes of one tenant.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Holds {
    pub(super) objects: u64,
    pub(super) bytes: u64,
    /// With all copies.
    pub(super) replica_bytes: u64,
}

async fn survey(master: &Arc<Master>) -> (Arc<Survey>, Duration) {
    let walker = master.clone();
    let walked = tokio::task::spawn_blocking(move || walker.surveyor.recent(&walker));
    walked.await.unwrap_or_default()
}

/// By tenant, and the age of the figures.
pub(super) async fn tenants(master: &Arc<Master>) -> (BTreeMap<String, Holds>, Duration) {
    let (survey, age) = survey(master).await;
    let mut all = BTreeMap::new();
    for t in &survey.tenants {
        let holds: &mut Holds = all.entry(t.tenant.clone()).or_default();
        holds.objects += t.objects;
        holds.bytes += t.bytes;
        holds.replica_bytes += t.replica_bytes;
    }
    (all, age)
}

/// `GET /api/v1/census`.
pub(super) async fn census(State(master): Shared) -> Response {
    let (s, age) = survey(&master).await;
    let tallies =
        |all: &[Tally], most| -> Vec<Value> { all.iter().take(most).map(Tally::json).collect() };
    ok(&json!({
        "age_ms": age.as_millis() as u64, "objects": s.looked_at, "leased_objects": s.leased_objects,
        "pinned_objects": s.pinned_objects, "by_replicas": s.by_replicas, "degraded_objects": s.degraded_objects,
        "unreadable_objects": s.unreadable_objects, "tenants": tallies(&s.tenants, TENANTS),
        "prefixes": tallies(&s.prefixes, PREFIXES),
    }))
}
