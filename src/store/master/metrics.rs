//! The master's metrics, by upstream's names where it has them. One registry per master.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use super::Master;
use super::state::Counters;

type Labels = Vec<(String, String)>;
/// A counter of the registry and the state's counter it follows.
type Mirrored = (Counter, fn(&Counters) -> &AtomicU64);

pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) batches: Counter,
    pub(crate) exist_items: Counter,
    pub(crate) batch_seconds: Histogram,
    key_count: Gauge,
    allocated: Gauge,
    capacity: Gauge,
    clients: Gauge,
    hold: Gauge,
    segment_allocated: Family<Labels, Gauge>,
    segment_capacity: Family<Labels, Gauge>,
    mirrored: Vec<Mirrored>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::default();
        let mut gauge = |name: &str, help: &str| {
            let gauge = Gauge::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        let key_count = gauge("master_key_count", "Objects in the index");
        let allocated = gauge("master_allocated_bytes", "Bytes allocated in all segments");
        let capacity = gauge("master_total_capacity_bytes", "Bytes of all segments");
        let clients = gauge("master_active_clients", "Clients with an open control lane");
        let hold = gauge(
            "mooncake_master_eviction_hold_max_nanoseconds",
            "Longest time eviction held one shard",
        );
        let segment_allocated = Family::<Labels, Gauge>::default();
        let segment_capacity = Family::<Labels, Gauge>::default();
        registry.register(
            "segment_allocated_bytes",
            "Bytes allocated in a segment",
            segment_allocated.clone(),
        );
        registry.register(
            "segment_total_capacity_bytes",
            "Bytes of a segment",
            segment_capacity.clone(),
        );
        let mut counter = |name: &str, help: &str| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let batches = counter("mooncake_master_batches", "Batches carried out");
        let exist_items = counter("master_batch_exist_key_items", "Keys asked for by exist");
        let mirrored: Vec<Mirrored> = vec![
            (counter("mem_cache_hit_nums", "Keys located"), |c| &c.hits),
            (
                counter("mooncake_master_misses", "Keys not found by locate"),
                |c| &c.misses,
            ),
            (counter("mooncake_master_puts", "Objects completed"), |c| {
                &c.puts
            }),
            (
                counter(
                    "master_put_start_alloc_failures",
                    "Puts that found no space",
                ),
                |c| &c.put_failures,
            ),
            (counter("mooncake_master_removed", "Objects removed"), |c| {
                &c.removed
            }),
            (
                counter("master_successful_evictions", "Objects evicted"),
                |c| &c.evicted_objects,
            ),
            (counter("master_evicted_size_bytes", "Bytes evicted"), |c| {
                &c.evicted_bytes
            }),
            (
                counter("master_attempted_evictions", "Rounds of eviction"),
                |c| &c.eviction_rounds,
            ),
        ];
        let batch_seconds = Histogram::new(exponential_buckets(1e-6, 4.0, 12));
        registry.register(
            "mooncake_master_batch_seconds",
            "Time to carry out a batch, waits included",
            batch_seconds.clone(),
        );
        Self {
            registry,
            batches,
            exist_items,
            batch_seconds,
            key_count,
            allocated,
            capacity,
            clients,
            hold,
            segment_allocated,
            segment_capacity,
            mirrored,
        }
    }

    /// Prometheus text of this moment.
    pub(crate) fn render(&self, master: &Master) -> String {
        let overview = master.overview_values();
        self.key_count.set(overview.objects as i64);
        self.allocated.set(overview.used_bytes as i64);
        self.capacity.set(overview.capacity_bytes as i64);
        self.clients.set(overview.clients as i64);
        let counters = &master.state.counters;
        self.hold
            .set(counters.eviction_hold_max_ns.load(Ordering::Relaxed) as i64);
        self.segment_allocated.clear();
        self.segment_capacity.clear();
        for segment in master.state.segments.view().iter().flatten() {
            let labels = vec![("segment".to_owned(), segment.name.clone())];
            let used = segment.allocator.lock().used();
            self.segment_allocated
                .get_or_create(&labels)
                .set(used as i64);
            self.segment_capacity
                .get_or_create(&labels)
                .set(segment.size as i64);
        }
        for (counter, source) in &self.mirrored {
            let now = source(counters).load(Ordering::Relaxed);
            counter.inc_by(now.saturating_sub(counter.get()));
        }
        let mut text = String::new();
        let _ = encode(&mut text, &self.registry);
        text
    }
}
