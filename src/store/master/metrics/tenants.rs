//! Hits and misses by tenant. Bounded: whoever may ask can name a tenant.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

use crate::store::model::key::DEFAULT_TENANT;

/// Tenants counted on their own; those that come later are counted together, under this name.
const TENANTS_MAX: usize = 1000;
const OTHERS: &str = "(others)";

/// Keys asked for by locate.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    pub(crate) hits: AtomicU64,
    pub(crate) misses: AtomicU64,
    pub(crate) hit_bytes: AtomicU64,
}

impl Asked {
    pub(crate) fn add(&self, hits: u64, misses: u64, hit_bytes: u64) {
        self.hits.fetch_add(hits, Ordering::Relaxed);
        self.misses.fetch_add(misses, Ordering::Relaxed);
        self.hit_bytes.fetch_add(hit_bytes, Ordering::Relaxed);
    }
}

/// By tenant.
#[derive(Debug, Default)]
pub(crate) struct Tenants {
    /// The unnamed one needs no lookup.
    unnamed: Arc<Asked>,
    named: RwLock<BTreeMap<String, Arc<Asked>>>,
}

impl Tenants {
    pub(crate) fn of(&self, tenant: &str) -> Arc<Asked> {
        if tenant.is_empty() || tenant == DEFAULT_TENANT {
            return self.unnamed.clone();
        }
        if let Some(found) = self.named.read().get(tenant) {
            return found.clone();
        }
        let mut named = self.named.write();
        let name = if named.len() < TENANTS_MAX {
            tenant
        } else {
            OTHERS
        };
        named.entry(name.to_owned()).or_default().clone()
    }

    /// All of them with their names; the unnamed one first.
    pub(crate) fn all(&self) -> Vec<(String, Arc<Asked>)> {
        let unnamed = (DEFAULT_TENANT.to_owned(), self.unnamed.clone());
        let named = self.named.read();
        let rest = named.iter().map(|(n, a)| (n.clone(), a.clone()));
        std::iter::once(unnamed).chain(rest).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounded() {
        let tenants = Tenants::default();
        for n in 0..TENANTS_MAX + 50 {
            tenants.of(&format!("t{n}")).add(1, 2, 3);
        }
        tenants.of("default").add(7, 0, 0);
        let all = tenants.all();
        assert_eq!(all.len(), TENANTS_MAX + 2);
        assert_eq!(all[0].1.hits.load(Ordering::Relaxed), 7);
        let others = tenants.of("yet another");
        assert_eq!(others.misses.load(Ordering::Relaxed), 100);
    }
}
