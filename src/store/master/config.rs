//! What the master's state is told once.

use std::time::Duration;

use super::eviction::PolicyKind;
use super::placement::PlacementStrategy;

/// Settings of the state. Defaults are upstream's where it has the setting.
#[derive(Clone, Debug)]
pub struct MasterConfig {
    /// Granted by get and exist.
    pub lease_ttl: Duration,
    /// Longest soft pin accepted.
    pub soft_pin_ttl_max: Duration,
    /// Whether soft-pinned objects go when nothing else is left.
    pub evict_soft_pinned: bool,
    /// Share of the capacity above which eviction runs in the background, 0..=1.
    pub high_watermark: f64,
    /// Share of the capacity that one round of eviction frees below the watermark.
    pub eviction_ratio: f64,
    /// A node silent for this long is unmounted.
    pub client_ttl: Duration,
    /// An unfinished put of a living client is reclaimed after this.
    pub put_release: Duration,
    /// How long a put waits for space when the caller names no deadline.
    pub put_wait: Duration,
    /// After the start, absence is not answered for this long: nodes of an earlier master may still be on their way.
    pub recovery_grace: Duration,
    /// Changes of the index kept for subscribers; 0 = none.
    pub events_max: usize,
    /// Operations that take longer are logged; zero = none.
    pub slow_log: Duration,
    /// Whether a tenant without a quota may store nothing.
    pub strict_tenants: bool,
    /// Where replicas go.
    pub placement: PlacementStrategy,
    /// What is evicted first.
    pub policy: PolicyKind,
}

impl Default for MasterConfig {
    fn default() -> Self {
        Self {
            lease_ttl: Duration::from_secs(10),
            soft_pin_ttl_max: Duration::from_secs(86_400),
            evict_soft_pinned: true,
            high_watermark: 0.90,
            eviction_ratio: 0.05,
            client_ttl: Duration::from_secs(10),
            put_release: Duration::from_secs(600),
            put_wait: Duration::from_secs(2),
            recovery_grace: Duration::from_secs(1),
            events_max: 65_536,
            slow_log: Duration::ZERO,
            strict_tenants: false,
            placement: PlacementStrategy::Random,
            policy: PolicyKind::Sieve,
        }
    }
}
