//! Figures of the proxy in Prometheus' text form.
//!
//! Owns plain atomics, so that counting costs nothing on the way of a request; what the instances know is read when
//! somebody asks.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::App;
use super::access_log::AccessLog;
use super::config::Role;
use super::handoff::Cause;
use super::kv::worth::SLOWER;
use crate::base::clock::Millis;

/// A counter.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self) {
        self.add_all(1);
    }

    pub(crate) fn add_all(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds in seconds.
const BOUNDS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0,
];

/// Times.
#[derive(Debug, Default)]
pub(crate) struct Histogram {
    buckets: [AtomicU64; 15],
    sum_us: AtomicU64,
}

impl Histogram {
    pub(crate) fn record(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let at = BOUNDS.partition_point(|b| *b < seconds);
        self.buckets[at].fetch_add(1, Ordering::Relaxed);
        self.sum_us
            .fetch_add(time.as_micros() as u64, Ordering::Relaxed);
    }

    fn print(&self, out: &mut String, name: &str, help: &str) {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        let mut total = 0;
        for (at, bucket) in self.buckets.iter().enumerate() {
            total += bucket.load(Ordering::Relaxed);
            let bound = BOUNDS.get(at).map_or("+Inf".to_owned(), f64::to_string);
            let _ = writeln!(out, "{name}_bucket{{le=\"{bound}\"}} {total}");
        }
        let sum = self.sum_us.load(Ordering::Relaxed) as f64 / 1e6;
        let _ = writeln!(out, "{name}_sum {sum}\n{name}_count {total}");
    }
}

/// Prompt tokens of requests a policy chose for, by its own account.
#[derive(Debug, Default)]
pub(crate) struct CacheCounts {
    /// All of them.
    pub(crate) query: Counter,
    /// Cached at the candidate that has the most.
    pub(crate) matched: Counter,
    /// Cached at the one that was chosen.
    pub(crate) selected: Counter,
}

impl CacheCounts {
    pub(crate) fn all(&self) -> [(&'static str, u64); 3] {
        [
            ("query", self.query.get()),
            ("matched", self.matched.get()),
            ("selected", self.selected.get()),
        ]
    }
}

/// Everything that is counted.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    /// By class of status: 1xx..5xx.
    pub(crate) answers: [Counter; 6],
    pub(crate) retries_prefill: Counter,
    pub(crate) retries_decode: Counter,
    pub(crate) retries_refused: Counter,
    /// Retries by [`Cause`].
    pub(crate) causes: [Counter; 4],
    /// Prompt tokens that prefill instances were sent, and those of them their policy took for cached there.
    pub(crate) tokens_routed: Counter,
    pub(crate) tokens_cached: Counter,
    /// What prefill instances counted as cached themselves.
    pub(crate) tokens_told: Counter,
    /// Prefill's policy, and decode's.
    pub(crate) caches: [CacheCounts; 2],
    pub(crate) clients_gone: Counter,
    pub(crate) clients_slow: Counter,
    pub(crate) upstream_cuts: Counter,
    pub(crate) refused_busy: Counter,
    pub(crate) refused_none: Counter,
    pub(crate) alone: Counter,
    pub(crate) handoffs: Counter,
    pub(crate) released: Counter,
    pub(crate) orphans: Counter,
    pub(crate) tokenized: Counter,
    pub(crate) usage_merged: Counter,
    pub(crate) continued: Counter,
    pub(crate) early: Counter,
    pub(crate) barrier_waits: Counter,
    pub(crate) barrier_timeouts: Counter,
    pub(crate) ttft: Histogram,
    pub(crate) prefill: Histogram,
    pub(crate) request: Histogram,
    pub(crate) queue: Histogram,
    pub(crate) barrier: Histogram,
    pub(crate) itl: Histogram,
}

impl Metrics {
    pub(crate) fn answered(&self, status: u16) {
        self.answers[usize::from(status / 100).min(5)].add();
    }
}

fn family(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// The page.
pub(crate) fn page(app: &App) -> String {
    let m = &app.metrics;
    let mut out = String::with_capacity(8192);
    family(
        &mut out,
        "mooncake_proxy_answers_total",
        "counter",
        "Answers by class of status",
    );
    for class in 2..=5 {
        let count = m.answers[class].get();
        let _ = writeln!(
            out,
            "mooncake_proxy_answers_total{{class=\"{class}xx\"}} {count}"
        );
    }
    family(
        &mut out,
        "mooncake_proxy_retries_total",
        "counter",
        "Legs that were tried again",
    );
    for (leg, counter) in [
        ("prefill", &m.retries_prefill),
        ("decode", &m.retries_decode),
    ] {
        let _ = writeln!(
            out,
            "mooncake_proxy_retries_total{{leg=\"{leg}\"}} {}",
            counter.get()
        );
    }
    let name = "mooncake_proxy_retry_causes_total";
    family(&mut out, name, "counter", "Legs tried again, by cause");
    for (cause, counter) in Cause::NAMES.iter().zip(&m.causes) {
        let _ = writeln!(out, "{name}{{cause=\"{cause}\"}} {}", counter.get());
    }
    caches(app, &mut out);
    let lost = app.access_log.as_ref().map_or(0, AccessLog::lost);
    let name = "mooncake_proxy_access_log_lost_total";
    family(
        &mut out,
        name,
        "counter",
        "Lines the access log was too slow for",
    );
    let _ = writeln!(out, "{name} {lost}");
    for (name, help, counter) in [
        (
            "prompt_tokens_routed",
            "Prompt tokens sent to prefill instances, estimated",
            &m.tokens_routed,
        ),
        (
            "prompt_tokens_cached",
            "Of these, what the policy took for cached where it was sent",
            &m.tokens_cached,
        ),
        (
            "prompt_tokens_told_cached",
            "Prompt tokens that prefill instances counted as cached in their replies",
            &m.tokens_told,
        ),
        (
            "retries_refused",
            "Retries the budget did not allow",
            &m.retries_refused,
        ),
        (
            "clients_gone",
            "Clients that left before their answer was complete",
            &m.clients_gone,
        ),
        (
            "clients_slow",
            "Clients that did not read in time",
            &m.clients_slow,
        ),
        (
            "upstream_cuts",
            "Answers a worker broke off",
            &m.upstream_cuts,
        ),
        (
            "refused_busy",
            "Requests refused because everybody was busy",
            &m.refused_busy,
        ),
        (
            "refused_none",
            "Requests refused because nobody could serve them",
            &m.refused_none,
        ),
        ("decode_alone", "Requests that skipped prefill", &m.alone),
        (
            "handoffs",
            "Prefills whose KV was handed to a decode instance",
            &m.handoffs,
        ),
        (
            "handoffs_released",
            "Hand-offs finished for clients that had gone",
            &m.released,
        ),
        (
            "handoffs_orphaned",
            "Prefills whose KV nobody fetched",
            &m.orphans,
        ),
        (
            "barrier_waits",
            "Decodes that waited for the last block in the pool",
            &m.barrier_waits,
        ),
        (
            "barrier_timeouts",
            "Decodes that began without it",
            &m.barrier_timeouts,
        ),
        (
            "usage_merged",
            "Answers that tell prefill's count of cached tokens",
            &m.usage_merged,
        ),
        (
            "answers_continued",
            "Answers another decode instance went on with",
            &m.continued,
        ),
        (
            "early_tokens",
            "Answers that began with prefill's token",
            &m.early,
        ),
        (
            "texts_tokenized",
            "Texts whose tokens a worker told",
            &m.tokenized,
        ),
    ] {
        let name = format!("mooncake_proxy_{name}_total");
        family(&mut out, &name, "counter", help);
        let _ = writeln!(out, "{name} {}", counter.get());
    }
    for (name, help, histogram) in [
        (
            "ttft_seconds",
            "Arrival to the first byte of an answer's body",
            &m.ttft,
        ),
        (
            "itl_seconds",
            "Between two pieces of a streamed answer, as they were passed on",
            &m.itl,
        ),
        ("prefill_seconds", "Prefill legs", &m.prefill),
        (
            "request_seconds",
            "Arrival to the end of an answer",
            &m.request,
        ),
        ("queue_seconds", "Waiting for a place", &m.queue),
        (
            "barrier_seconds",
            "Waiting for the last block in the pool",
            &m.barrier,
        ),
    ] {
        histogram.print(&mut out, &format!("mooncake_proxy_{name}"), help);
    }
    family(
        &mut out,
        "mooncake_proxy_waiting",
        "gauge",
        "Requests waiting for a place",
    );
    let _ = writeln!(out, "mooncake_proxy_waiting {}", app.gate.waiting());
    let name = "mooncake_proxy_bytes_per_token";
    let help = "Bytes of a prompt per token, learnt";
    family(&mut out, name, "gauge", help);
    let _ = writeln!(out, "{name} {}", app.bytes_per_token.get());
    instances(app, &mut out);
    out
}

fn caches(app: &App, out: &mut String) {
    let name = "mooncake_proxy_cache_tokens_total";
    let help = "Prompt tokens by policy: all, cached at the best candidate, cached at the one chosen; estimated";
    family(out, name, "counter", help);
    for (role, policy, counts) in app.cache_counts() {
        for (what, count) in counts.all() {
            let role = role.name();
            let _ = writeln!(
                out,
                "{name}{{role=\"{role}\",policy=\"{policy}\",tokens=\"{what}\"}} {count}"
            );
        }
    }
    let name = "mooncake_proxy_tier_weight";
    let help = "Share of computing a token that a hit below the GPU saves, learnt";
    family(out, name, "gauge", help);
    for (tier, weight) in SLOWER.iter().zip(app.kv.worth.weights().all()) {
        let tier = tier.name();
        let _ = writeln!(out, "{name}{{tier=\"{tier}\"}} {weight:.3}");
    }
}

fn instances(app: &App, out: &mut String) {
    let all = app.registry.all();
    let now = Millis::now();
    family(
        out,
        "mooncake_proxy_inflight",
        "gauge",
        "Requests under way",
    );
    for i in all.iter() {
        for role in [Role::Prefill, Role::Decode] {
            let (count, role_name) = (i.inflight(role), role.name());
            let _ = writeln!(
                out,
                "mooncake_proxy_inflight{{instance=\"{}\",role=\"{role_name}\"}} {count}",
                i.name
            );
        }
    }
    for (name, kind, help, value) in [
        (
            "up",
            "gauge",
            "Whether the instance passes its health checks",
            (|i, _| u64::from(i.health() == super::registry::Health::Up))
                as fn(&super::registry::Instance, Millis) -> u64,
        ),
        (
            "breaker_open",
            "gauge",
            "Whether its breaker is not closed",
            |i, now| u64::from(i.breaker.state(now) != "closed"),
        ),
        (
            "inflight_tokens",
            "gauge",
            "Prompt tokens under way as prefill, estimated",
            |i, _| i.tokens(),
        ),
        (
            "kv_live",
            "gauge",
            "Whether its KV events are followed",
            |i, _| u64::from(i.feed.is_live()),
        ),
        (
            "kv_events_total",
            "counter",
            "KV events heard of it",
            |i, _| i.feed.events.load(Ordering::Relaxed),
        ),
        (
            "kv_gaps_total",
            "counter",
            "Gaps in its KV events",
            |i, _| i.feed.gaps.load(Ordering::Relaxed),
        ),
        ("served_total", "counter", "Legs it answered", |i, _| {
            i.served.load(Ordering::Relaxed)
        }),
        ("failed_total", "counter", "Legs it failed", |i, _| {
            i.failed.load(Ordering::Relaxed)
        }),
    ] {
        let name = format!("mooncake_proxy_instance_{name}");
        family(out, &name, kind, help);
        for i in all.iter() {
            let _ = writeln!(out, "{name}{{instance=\"{}\"}} {}", i.name, value(i, now));
        }
    }
}
