//! The master's metrics: what it counts beside its state, and how both are printed: upstream's names first (those that mean
//! nothing here at 0), then what upstream lacks.

pub(crate) mod exposition;
pub(crate) mod hot;
mod moved;
mod quotas;
mod rpc;
mod tenants;
mod upstream;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use exposition::Writer;
use upstream::Kind;

use super::Master;
use super::quotas::Snapshot;
use super::state::PUT_FAILURES;
use crate::base::histogram::{Counted, Histogram, NANOSECONDS};
use crate::store::wire;
pub(crate) use rpc::{Rpc, outcome};
pub(crate) use tenants::Asked;

/// What is counted where operations are carried out.
pub(crate) struct Metrics {
    rpcs: Vec<rpc::RpcStats>,
    pub(crate) batches: AtomicU64,
    pub(crate) batch_nanoseconds: Histogram,
    pub(crate) tenants: tenants::Tenants,
    pub(crate) hot: hot::Hot,
    pub(crate) slow: AtomicU64,
    pub(crate) moved: moved::ClientMoves,
}

/// A histogram as it is shown: values are divided by `scale` to be in the unit of the name.
pub(crate) struct Shown {
    pub(crate) name: &'static str,
    pub(crate) help: &'static str,
    pub(crate) label: Option<(&'static str, &'static str)>,
    pub(crate) counted: Counted,
    pub(crate) scale: f64,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        Self {
            rpcs: rpc::Rpc::ALL.iter().map(|_| rpc::RpcStats::new()).collect(),
            batches: AtomicU64::new(0),
            batch_nanoseconds: Histogram::new(NANOSECONDS),
            tenants: tenants::Tenants::default(),
            hot: hot::Hot::default(),
            slow: AtomicU64::new(0),
            moved: moved::ClientMoves::default(),
        }
    }

    /// An operation has been carried out.
    pub(crate) fn carried_out(&self, rpc: Rpc, took: Duration, reply: &wire::Reply) {
        self.rpcs[rpc as usize].count(took, reply);
    }

    fn rpc(&self, rpc: Rpc) -> &rpc::RpcStats {
        &self.rpcs[rpc as usize]
    }

    /// All histograms that are ours.
    pub(crate) fn histograms(&self, master: &Master) -> Vec<Shown> {
        let counters = &master.state.counters;
        let one = |name, help, counted, scale| Shown {
            name,
            help,
            label: None,
            counted,
            scale,
        };
        let mut all = vec![
            one(
                "mooncake_master_batch_seconds",
                "Time to carry out a batch, waits included",
                self.batch_nanoseconds.now(),
                1e9,
            ),
            one(
                "mooncake_lease_age_seconds",
                "Time since the last read of an object that is located again",
                counters.lease_age_ms.now(),
                1e3,
            ),
            one(
                "mooncake_eviction_age_seconds",
                "Time since an evicted object was last read, or stored if nobody read it",
                counters.eviction_age_ms.now(),
                1e3,
            ),
        ];
        for (rpc, name) in rpc::Rpc::ALL {
            all.push(Shown {
                name: "mooncake_rpc_seconds",
                help: "Time to carry out an operation, waits included",
                label: Some(("operation", name)),
                counted: self.rpc(rpc).nanoseconds.now(),
                scale: 1e9,
            });
        }
        all
    }

    /// Prometheus text of this moment.
    pub(crate) fn render(&self, master: &Master) -> String {
        let mut w = Writer::default();
        self.upstream(master, &mut w);
        self.ours(master, &mut w);
        w.text
    }

    fn upstream(&self, master: &Master, w: &mut Writer) {
        let values = self.upstream_values(master);
        let value = |name: &str| values.get(name).copied().unwrap_or(0);
        let counters = &master.state.counters;
        let tenants = master.state.tenant_snapshots();
        for (name, kind) in upstream::NAMES {
            let help = format!(
                "As upstream's, {}",
                name.trim_end_matches('_').replace('_', " ")
            );
            match kind {
                Kind::Counter => w.single(name, "counter", &help, value(name)),
                Kind::Gauge => w.single(name, "gauge", &help, value(name)),
                Kind::Histogram(bounds) => {
                    let counted = if *name == "master_value_size_bytes" {
                        counters.value_bytes.now()
                    } else {
                        Histogram::new(bounds).now()
                    };
                    w.head(name, "histogram", &help);
                    w.histogram(name, &[], &counted, 1.0);
                }
                Kind::LabelledCounter => {
                    w.head(name, "counter", &help);
                    quotas::series(&tenants, name, w);
                }
                Kind::LabelledGauge => {
                    w.head(name, "gauge", &help);
                    segment_series(master, name, w);
                    quotas::series(&tenants, name, w);
                }
            }
        }
    }

    /// The values of upstream's names that mean something here.
    fn upstream_values(&self, master: &Master) -> HashMap<String, u64> {
        let state = &master.state;
        let (o, c) = (master.overview_values(), &state.counters);
        let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let mut all = HashMap::new();
        let mut set = |name: &str, value: u64| {
            let known = upstream::NAMES.iter().any(|(n, _)| *n == name);
            debug_assert!(known, "{name} is one of upstream's names");
            all.insert(name.to_owned(), value);
        };
        set("master_allocated_bytes", o.used_bytes);
        set("master_total_capacity_bytes", o.capacity_bytes);
        set("master_key_count", o.objects);
        set("mem_cache_nums_", o.objects);
        set("master_soft_pin_key_count", load(&c.soft_pinned));
        set("master_active_clients", o.clients);
        set("mem_cache_hit_nums_", o.hits);
        set("valid_get_nums_", o.hits);
        set("total_get_nums_", o.hits + o.misses);
        let hit_bytes = self.tenants.all();
        let hit_bytes = hit_bytes.iter().map(|(_, a)| load(&a.hit_bytes));
        set("mem_cache_hit_bytes_total", hit_bytes.sum());
        set(
            "master_put_start_alloc_failures_total",
            load(&c.put_failures),
        );
        set(
            "master_put_start_partial_allocations_total",
            load(&c.partial_puts),
        );
        set("master_put_start_release_cnt", load(&c.released_puts));
        set(
            "master_put_start_discarded_staging_size",
            state.unsettled_bytes(),
        );
        for suffix in ["total", "mem"] {
            let of = |name: &str| format!("master_{name}_evictions_{suffix}");
            set(&of("successful"), load(&c.evictions_useful));
            set(&of("attempted"), load(&c.eviction_rounds));
        }
        for suffix in ["", "_mem"] {
            let of = |name: &str| format!("master_evicted_{name}{suffix}");
            set(&of("key_count"), o.evicted_objects);
            set(&of("size_bytes"), o.evicted_bytes);
        }
        set("master_mount_segment_requests_total", load(&c.mounts));
        set("master_remount_segment_requests_total", load(&c.remounts));
        set("master_unmount_segment_requests_total", load(&c.unmounts));
        set("master_ping_requests_total", load(&c.pings));
        set(
            "mooncake_tenant_quota_allocatable_capacity_bytes",
            o.capacity_bytes,
        );
        // Upstream's words for what nodes copy to each other.
        let (done, failed) = (load(&state.copies.done), load(&state.copies.failed));
        for name in ["create_move_task", "move_start", "move_end"] {
            set(&format!("master_{name}_requests_total"), done + failed);
            set(&format!("master_{name}_failures_total"), failed);
        }
        let tenants = state.tenant_snapshots();
        let explicit = tenants.iter().filter(|t| t.explicit);
        let sum = |of: fn(&Snapshot) -> u64| explicit.clone().map(of).fold(0, u64::saturating_add);
        set(
            "mooncake_tenant_quota_requested_bytes_sum",
            sum(|t| t.requested),
        );
        set(
            "mooncake_tenant_quota_effective_bytes_sum",
            sum(|t| t.effective),
        );
        // A put into an arena is both phases in one.
        for (name, kinds) in [
            ("put_start", &[Rpc::PutStart, Rpc::ArenaCommit][..]),
            ("put_end", &[Rpc::PutEnd, Rpc::ArenaCommit]),
            ("put_revoke", &[Rpc::PutRevoke]),
            ("get_replica_list", &[Rpc::Locate]),
            ("exist_key", &[Rpc::Exist]),
            ("get_replica_list_by_regex", &[Rpc::ListMatching]),
            ("remove", &[Rpc::Remove]),
            ("remove_by_regex", &[Rpc::RemoveMatching]),
            ("remove_all", &[Rpc::RemoveAll]),
        ] {
            let sum = |of: fn(&rpc::RpcStats) -> &AtomicU64| {
                kinds.iter().map(|k| load(of(self.rpc(*k)))).sum::<u64>()
            };
            let in_batches = matches!(kinds[0], Rpc::PutStart | Rpc::PutEnd | Rpc::PutRevoke)
                || matches!(kinds[0], Rpc::Locate | Rpc::Exist);
            let (mut calls, mut failed) = (sum(|s| &s.calls), sum(|s| &s.failed_calls));
            if !in_batches {
                // Upstream knows no batches of these: each item is a call.
                calls += sum(|s| &s.items);
                failed += sum(|s| &s.failed_items);
            }
            set(&format!("master_{name}_requests_total"), calls);
            set(&format!("master_{name}_failures_total"), failed);
            if in_batches {
                let mut of = |what: &str, value: u64| {
                    set(&format!("master_batch_{name}_{what}_total"), value);
                };
                of("requests", sum(|s| &s.batches));
                of("failures", sum(|s| &s.failed_batches));
                of("partial_successes", sum(|s| &s.partial_batches));
                of("items", sum(|s| &s.items));
                of("failed_items", sum(|s| &s.failed_items));
            }
        }
        all
    }

    fn ours(&self, master: &Master, w: &mut Writer) {
        let (state, c) = (&master.state, &master.state.counters);
        let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
        for (name, help, value) in [
            ("batches", "Batches carried out", load(&self.batches)),
            ("misses", "Keys not found by locate", load(&c.misses)),
            ("puts", "Objects completed", load(&c.puts)),
            ("removed", "Objects removed", load(&c.removed)),
            (
                "refused_tokens",
                "Connections and requests with a missing or wrong token",
                master.refused.count(),
            ),
            (
                "evicted_unread",
                "Objects evicted that nobody had read",
                load(&c.evicted_unread),
            ),
            (
                "slow_operations",
                "Operations that took longer than --slow-log",
                load(&self.slow),
            ),
            (
                "events",
                "Changes of the index recorded for subscribers",
                state.events.next() - 1,
            ),
        ] {
            let name = format!("mooncake_master_{name}_total");
            w.single(&name, "counter", help, value);
        }
        let name = "mooncake_master_put_failures_total";
        w.head(name, "counter", "Puts that got no place, by reason");
        for (reason, count) in PUT_FAILURES.iter().zip(&c.put_failures_by) {
            w.series(name, &[("reason", reason)], load(count));
        }
        w.single(
            "mooncake_master_eviction_hold_max_nanoseconds",
            "gauge",
            "Longest time eviction held one shard",
            load(&c.eviction_hold_max_ns),
        );
        w.single(
            "mooncake_master_event_subscribers",
            "gauge",
            "Subscribers to the events of the index",
            master.subscribers.count() as u64,
        );
        let tenants = self.tenants.all();
        for (name, help, of) in [
            (
                "mooncake_tenant_hits_total",
                "Keys of a tenant found by locate",
                (|a: &Asked| &a.hits) as fn(&Asked) -> &AtomicU64,
            ),
            (
                "mooncake_tenant_misses_total",
                "Keys of a tenant not found by locate",
                |a| &a.misses,
            ),
        ] {
            w.head(name, "counter", help);
            for (tenant, asked) in &tenants {
                w.series(name, &[("tenant_id", tenant)], load(of(asked)));
            }
        }
        w.head(
            "mooncake_node_state",
            "gauge",
            "Nodes by state: 1 for the state a node is in",
        );
        let now = crate::base::clock::Millis::now();
        for node in state.segments.nodes() {
            let labels = [
                ("node", node.address.as_str()),
                ("state", node.state_name(now)),
            ];
            w.series("mooncake_node_state", &labels, 1);
        }
        nodes(master, w);
        self.moved.render(w);
        moves(master, w);
        let mut before = "";
        for shown in self.histograms(master) {
            if shown.name != before {
                w.head(shown.name, "histogram", shown.help);
                before = shown.name;
            }
            w.histogram(
                shown.name,
                shown.label.as_slice(),
                &shown.counted,
                shown.scale,
            );
        }
    }
}

/// What nodes copied to each other.
fn moves(master: &Master, w: &mut Writer) {
    let copies = &master.state.copies;
    let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
    for (name, kind, help, value) in [
        (
            "copies_total",
            "counter",
            "Objects moved from one node to another",
            load(&copies.done),
        ),
        (
            "copied_bytes_total",
            "counter",
            "Payload of objects moved",
            load(&copies.done_bytes),
        ),
        (
            "copy_failures_total",
            "counter",
            "Copies that came to nothing",
            load(&copies.failed),
        ),
        (
            "copies_under_way",
            "gauge",
            "Objects being moved",
            copies.under_way() as u64,
        ),
    ] {
        w.single(&format!("mooncake_master_{name}"), kind, help, value);
    }
}

/// What nodes told of their data lanes with their last heartbeat. Names of nodes need not be unique: the address is.
fn nodes(master: &Master, w: &mut Writer) {
    type Of = fn(&wire::Heartbeat) -> u64;
    let beats: Vec<(String, wire::Heartbeat)> = master
        .state
        .segments
        .nodes()
        .iter()
        .map(|n| (n.address.clone(), n.served.lock().clone()))
        .collect();
    let families: [(&str, &str, &str, Of); 5] = [
        (
            "mooncake_node_read_bytes_total",
            "counter",
            "Bytes read through the data lanes of a node",
            |b| b.read_bytes,
        ),
        (
            "mooncake_node_written_bytes_total",
            "counter",
            "Bytes written through the data lanes of a node",
            |b| b.written_bytes,
        ),
        (
            "mooncake_node_refused_requests_total",
            "counter",
            "Requests a node refused: no valid grant, outside it, or fenced off",
            |b| b.refused,
        ),
        (
            "mooncake_node_refused_lanes_total",
            "counter",
            "Data lanes a node turned away: wrong token, too many, strangers",
            |b| b.lanes_refused,
        ),
        (
            "mooncake_node_lanes",
            "gauge",
            "Data lanes open at a node",
            |b| b.lanes,
        ),
    ];
    for (name, kind, help, of) in families {
        w.head(name, kind, help);
        for (node, beat) in &beats {
            w.series(name, &[("node", node)], of(beat));
        }
    }
    let name = "mooncake_node_transport_bytes_total";
    let help = "Bytes through the data lanes of a node, by the way they took";
    w.head(name, "counter", help);
    for (node, beat) in &beats {
        for transport in ["tcp", "unix", "rdma"] {
            for operation in ["read", "write"] {
                let told = beat
                    .bytes
                    .iter()
                    .find(|b| b.transport == transport && b.operation == operation);
                let labels = [
                    ("node", node.as_str()),
                    ("transport", transport),
                    ("operation", operation),
                ];
                w.series(name, &labels, told.map_or(0, |b| b.bytes));
            }
        }
    }
    let name = "mooncake_node_request_seconds";
    let help = "Time of a request at a node, from its first byte to the last of the answer";
    w.head(name, "histogram", help);
    for (node, beat) in &beats {
        for (transport, operation) in [
            ("tcp", "read"),
            ("tcp", "write"),
            ("unix", "read"),
            ("unix", "write"),
            ("rdma", "read"),
            ("rdma", "write"),
        ] {
            let told = beat.times.iter().find(|t| {
                t.transport == transport
                    && t.operation == operation
                    && t.counts.len() == NANOSECONDS.len() + 1
            });
            let Some(times) = told else { continue };
            let labels = [
                ("node", node.as_str()),
                ("transport", transport),
                ("operation", operation),
            ];
            let counted = Counted {
                bounds: NANOSECONDS,
                counts: times.counts.clone(),
                sum: times.sum_ns,
            };
            w.histogram(name, &labels, &counted, 1e9);
        }
    }
}

/// The series of upstream's families that are labelled by segment.
fn segment_series(master: &Master, name: &str, w: &mut Writer) {
    let value = |s: &super::segments::SegmentState| match name {
        "segment_allocated_bytes" => Some(s.allocator.lock().used()),
        "segment_total_capacity_bytes" => Some(s.size),
        _ => None,
    };
    let mut by_name: HashMap<&str, u64> = HashMap::new();
    let view = master.state.segments.view();
    for segment in view.iter().flatten() {
        if let Some(value) = value(segment) {
            // Names need not be unique, series must be.
            *by_name.entry(&segment.name).or_default() += value;
        }
    }
    for (segment, value) in by_name {
        w.series(name, &[("segment", segment)], value);
    }
}
