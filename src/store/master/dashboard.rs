//! The page at `/` and the stream that feeds it.
//!
//! Owns what leaves for a browser: the page with its policy, one JSON frame a second, the number of viewers. The page asks
//! `/dashboard/live`, `/metrics` and `/events`, and nothing of other hosts. What it shows of the whole index
//! comes from `survey`.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio_stream::wrappers::ReceiverStream;

use super::segments::NodePhase;
use super::{Master, operations, survey};
use crate::base::clock::Millis;
use crate::base::id::random_bytes;

/// Time between frames.
const FRAME: Duration = Duration::from_secs(1);
/// Tenants and prefixes shown.
const TOP: usize = 12;
/// Segments of one frame.
const SEGMENTS_MAX: usize = 512;
/// Streams open at once.
const VIEWERS_MAX: usize = 32;
/// A stream ends after this; the page comes back by itself, and a viewer that vanished is noticed.
const STREAM_MAX: Duration = Duration::from_secs(3600);

const PAGE: &str = include_str!("dashboard.html");

/// What all viewers share.
#[derive(Default)]
pub(crate) struct Dashboard {
    viewers: AtomicUsize,
}

/// The page. Nothing but its own inline script and style may run, and it may talk to its own server only.
pub(crate) async fn page() -> Response {
    let mut nonce = [0; 16];
    random_bytes(&mut nonce);
    let nonce: String = nonce.iter().map(|b| format!("{b:02x}")).collect();
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8".to_owned()),
        (header::CONTENT_SECURITY_POLICY, policy),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
        (header::X_FRAME_OPTIONS, "DENY".to_owned()),
        (header::REFERRER_POLICY, "no-referrer".to_owned()),
        (header::CACHE_CONTROL, "no-store".to_owned()),
    ];
    (headers, PAGE.replace("{{nonce}}", &nonce)).into_response()
}

/// Counts a viewer as long as its stream lives.
struct Viewer(Arc<Master>);

impl Viewer {
    fn new(master: &Arc<Master>) -> Option<Self> {
        let viewer = Self(master.clone());
        let before = master.dashboard.viewers.fetch_add(1, Ordering::AcqRel);
        (before < VIEWERS_MAX).then_some(viewer)
    }
}

impl Drop for Viewer {
    fn drop(&mut self) {
        self.0.dashboard.viewers.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Server-sent events: a frame a second.
pub(crate) async fn live(State(master): State<Arc<Master>>) -> Response {
    let Some(viewer) = Viewer::new(&master) else {
        let text = "too many dashboards are open: close one\n";
        return (StatusCode::SERVICE_UNAVAILABLE, text).into_response();
    };
    let (frames, receiver) = tokio::sync::mpsc::channel::<Result<Bytes, Infallible>>(1);
    tokio::spawn(async move {
        let _viewer = viewer;
        let end = Instant::now() + STREAM_MAX;
        let mut tick = tokio::time::interval(FRAME);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while Instant::now() < end {
            tick.tick().await;
            let asked = master.clone();
            let Ok(frame) = tokio::task::spawn_blocking(move || frame(&asked)).await else {
                return;
            };
            // One that does not read its last frame within this is gone.
            let sent = frames.send_timeout(Ok(frame.into()), Duration::from_secs(20));
            if sent.await.is_err() {
                return;
            }
        }
    });
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (headers, Body::from_stream(ReceiverStream::new(receiver))).into_response()
}

/// One frame as an event.
fn frame(master: &Master) -> String {
    format!("data: {}\n\n", picture(master))
}

fn picture(master: &Master) -> Value {
    let o = master.overview_values();
    let (survey, _) = master.surveyor.recent(master);
    let now = Millis::now();
    let view = master.state.segments.view();
    let map_of = |slot: u32| {
        let map = survey.maps.get(&slot);
        map.map_or_else(String::new, |map| {
            map.iter().map(|b| format!("{b:02x}")).collect()
        })
    };
    let segments: Vec<Value> = view
        .iter()
        .flatten()
        .take(SEGMENTS_MAX)
        .map(|s| {
            let v = operations::segment_view(s, now);
            json!({
                "segment": v.name, "node": v.node, "address": v.address, "state": v.state, "build": v.build,
                "size_bytes": v.size_bytes, "used_bytes": v.used_bytes, "largest_free_bytes": v.largest_free_bytes,
                "free_ranges": v.free_ranges, "objects": v.objects, "pages": v.page_kind, "map": map_of(v.segment),
            })
        })
        .collect();
    let tallies = |all: &[survey::Tally]| -> Vec<Value> {
        all.iter().take(TOP).map(survey::Tally::json).collect()
    };
    let nodes = master.state.segments.nodes();
    let lost = nodes
        .iter()
        .filter(|n| n.phase() == NodePhase::Lost)
        .count();
    let counters = &master.state.counters;
    let load = |c: &std::sync::atomic::AtomicU64| c.load(Ordering::Relaxed);
    json!({
        "build": o.build, "uptime_ms": o.uptime_ms, "rebuilding": o.rebuilding, "term": master.state.term(),
        "nodes": nodes.len(), "lost_nodes": lost, "segment_count": view.iter().flatten().count(),
        "clients": o.clients, "objects": o.objects, "capacity_bytes": o.capacity_bytes, "used_bytes": o.used_bytes,
        "arena_free_bytes": o.arena_free_bytes, "pending_puts": o.pending_puts,
        "hits": o.hits, "misses": o.misses, "puts": load(&counters.puts), "put_failures": load(&counters.put_failures),
        "removed": load(&counters.removed), "evicted_objects": o.evicted_objects, "evicted_bytes": o.evicted_bytes,
        "read_bytes": o.read_bytes, "written_bytes": o.written_bytes,
        "looked_at": survey.looked_at, "leased_objects": survey.leased_objects, "pinned_objects": survey.pinned_objects,
        "by_replicas": survey.by_replicas, "degraded_objects": survey.degraded_objects,
        "unreadable_objects": survey.unreadable_objects,
        "tenants": tallies(&survey.tenants), "prefixes": tallies(&survey.prefixes), "segments": segments,
    })
}
