//! What each tenant holds, counted by walking the index and shown again for a few seconds.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::super::Master;
use crate::store::model::key;

/// What a walk over the whole index found is shown again for this long.
const CENSUS_AGE: Duration = Duration::from_secs(5);
/// Tenants of one census; those beyond are counted together.
const CENSUS_TENANTS_MAX: usize = 10_000;

/// Objects and bytes of one tenant.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Holds {
    pub(super) objects: u64,
    pub(super) bytes: u64,
    /// With all copies.
    pub(super) replica_bytes: u64,
}

/// By tenant.
type Found = Arc<BTreeMap<String, Holds>>;

/// What tenants hold, counted by walking the index; kept for a while.
#[derive(Default)]
pub(crate) struct Census {
    last: Mutex<Option<(Instant, Found)>>,
    /// One walk at a time.
    walking: tokio::sync::Mutex<()>,
}

impl Census {
    fn recent(&self) -> Option<(Instant, Found)> {
        let last = self.last.lock();
        last.clone().filter(|(at, _)| at.elapsed() < CENSUS_AGE)
    }
}

/// By tenant, and the age of the figures.
pub(super) async fn census(master: &Arc<Master>) -> (Found, Duration) {
    let _one = master.census.walking.lock().await;
    if let Some((at, found)) = master.census.recent() {
        return (found, at.elapsed());
    }
    let walker = master.clone();
    let walked = tokio::task::spawn_blocking(move || {
        let mut all: BTreeMap<String, Holds> = BTreeMap::new();
        walker.state.walk(0, usize::MAX, |object| {
            let tenant = key::split(&object.key).map_or("", |(tenant, _)| tenant);
            let tenant = match tenant {
                "" => key::DEFAULT_TENANT,
                name if all.len() < CENSUS_TENANTS_MAX || all.contains_key(name) => name,
                _ => "(others)",
            };
            if !all.contains_key(tenant) {
                all.insert(tenant.to_owned(), Holds::default());
            }
            if let Some(holds) = all.get_mut(tenant) {
                holds.objects += 1;
                holds.bytes += object.size;
                holds.replica_bytes += object.size * object.replicas.len() as u64;
            }
            false
        });
        all
    });
    let found = Arc::new(walked.await.unwrap_or_default());
    *master.census.last.lock() = Some((Instant::now(), found.clone()));
    (found, Duration::ZERO)
}
