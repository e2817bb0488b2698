//! What each tenant holds and may hold.
//!
//! Owns the accounts (bytes of complete replicas and of puts under way, headers included), the policies, and the decision
//! whether a put is let in. A tenant above its quota has to make room among its own objects first. Policies are no file of
//! the master's: every node keeps the whole table, and a new master takes the latest word on each tenant from its nodes.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};

use super::events::Reason;
use super::history::Cause;
use super::object::Object;
use super::segments::NodePhase;
use super::state::{MasterState, add};
use crate::base::clock::{Millis, unix_ms};
use crate::store::model::error::StoreError;
use crate::store::model::header::footprint;
use crate::store::model::key;

/// Policies remembered, those of tenants that have none any more included.
const POLICIES_MAX: usize = 10_000;
/// Accounts beyond this are tidied up: empty ones without a policy go.
const ACCOUNTS_KEPT: usize = 4096;
/// A quota that cannot be met from the tenant's own objects is not tried again for this long.
const REST: Duration = Duration::from_millis(100);
/// Share of a quota that is made free at once, as a divisor: walking the index for each put would cost more.
const AT_ONCE: u64 = 64;
/// Objects of the tenant that are compared for the oldest, times what is wanted.
const SAMPLE: u64 = 4;
/// Largest quota, upstream's.
pub(crate) const QUOTA_MAX: u64 = (1 << 63) - 1;

/// One tenant.
#[derive(Debug, Default)]
pub(crate) struct Account {
    charged: AtomicU64,
    /// 0 = no policy.
    requested: AtomicU64,
    rejected: AtomicU64,
    evicted_bytes: AtomicU64,
    /// Nothing more to evict until then.
    rests_until: AtomicU64,
    cursor: AtomicU64,
}

/// What is decided about a tenant; the latest counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Policy {
    pub(crate) version: u64,
    /// 0: there is none any more.
    pub(crate) quota_bytes: u64,
}

/// All policies, and the latest version among them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Policies {
    pub(crate) version: u64,
    pub(crate) tenants: BTreeMap<String, Policy>,
}

/// A tenant at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Snapshot {
    pub(crate) tenant: String,
    pub(crate) requested: u64,
    pub(crate) effective: u64,
    pub(crate) charged: u64,
    pub(crate) closed: bool,
    pub(crate) over: bool,
    pub(crate) explicit: bool,
    pub(crate) rejected: u64,
    pub(crate) evicted_bytes: u64,
}

/// See the module header. Tenants are named as in keys: the unnamed one is empty.
#[derive(Default)]
pub(crate) struct Quotas {
    accounts: RwLock<HashMap<Box<str>, Arc<Account>>>,
    policies: Mutex<Policies>,
    /// Sum of all requested.
    requested: AtomicU64,
    /// Puts for tenants without a policy where each needs one.
    pub(crate) unregistered: AtomicU64,
}

/// Bytes let in for a put; given back when it is over, whatever came of it.
#[derive(Debug)]
pub(crate) struct Reserved {
    account: Arc<Account>,
    bytes: u64,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.account
            .charged
            .fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Reserved {
    /// Keeps `bytes` of it.
    pub(crate) fn shrink(&mut self, bytes: u64) {
        let less = self.bytes.saturating_sub(bytes);
        self.account.charged.fetch_sub(less, Ordering::Relaxed);
        self.bytes -= less;
    }
}

/// The tenant of a qualified key.
fn tenant_of(qualified: &[u8]) -> &str {
    key::split(qualified).map_or("", |(tenant, _)| tenant)
}

impl Quotas {
    fn account(&self, tenant: &str) -> Arc<Account> {
        if let Some(found) = self.accounts.read().get(tenant) {
            return found.clone();
        }
        let mut accounts = self.accounts.write();
        if accounts.len() >= ACCOUNTS_KEPT && accounts.len().is_power_of_two() {
            // Whoever holds one is about to charge it.
            accounts.retain(|_, a| {
                Arc::strong_count(a) > 1
                    || a.charged.load(Ordering::Relaxed) > 0
                    || a.requested.load(Ordering::Relaxed) > 0
            });
        }
        accounts.entry(tenant.into()).or_default().clone()
    }

    /// Replicas of this many bytes have come.
    pub(crate) fn charge(&self, qualified: &[u8], bytes: u64) {
        let tenant = tenant_of(qualified);
        // Under the lock: an account is not tidied away between look-up and charge.
        if let Some(account) = self.accounts.read().get(tenant) {
            account.charged.fetch_add(bytes, Ordering::Relaxed);
            return;
        }
        self.account(tenant)
            .charged
            .fetch_add(bytes, Ordering::Relaxed);
    }

    /// They have gone.
    pub(crate) fn refund(&self, qualified: &[u8], bytes: u64) {
        if let Some(account) = self.accounts.read().get(tenant_of(qualified)) {
            account.charged.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    /// What a tenant may hold: what was asked for, scaled down when all of them together ask for more than there is.
    fn effective(&self, requested: u64, capacity: u64) -> u64 {
        let sum = self.requested.load(Ordering::Relaxed);
        if sum <= capacity {
            return requested;
        }
        (u128::from(requested) * u128::from(capacity) / u128::from(sum)) as u64
    }

    /// Adopts what is later than what is known; whether anything was.
    pub(crate) fn merge(&self, told: impl IntoIterator<Item = (String, Policy)>) -> bool {
        let mut policies = self.policies.lock();
        let mut changed = false;
        for (tenant, policy) in told {
            let known = policies.tenants.get(&tenant);
            if known.is_some_and(|k| k.version >= policy.version)
                || (known.is_none() && policies.tenants.len() >= POLICIES_MAX)
                || tenant.len() > key::TENANT_BYTES_MAX
            {
                continue;
            }
            policies.version = policies.version.max(policy.version);
            let account = self.account(named(&tenant));
            let quota = policy.quota_bytes.min(QUOTA_MAX);
            account.requested.store(quota, Ordering::Relaxed);
            policies.tenants.insert(tenant, policy);
            changed = true;
        }
        let all = policies.tenants.values().map(|p| p.quota_bytes);
        let sum = all.fold(0, u64::saturating_add);
        self.requested.store(sum, Ordering::Relaxed);
        changed
    }

    /// The table as nodes keep it.
    pub(crate) fn policies(&self) -> Policies {
        self.policies.lock().clone()
    }

    pub(crate) fn version(&self) -> u64 {
        self.policies.lock().version
    }

    /// Decides about a tenant; 0 = no policy any more. Returns the version of the decision.
    ///
    /// # Errors
    /// `NotFound` when there is no policy to take away, `InvalidParams` when there are too many, −1702 when a tenant that is
    /// to have none holds something.
    fn decide(&self, tenant: &str, quota_bytes: u64) -> Result<u64, StoreError> {
        let mut policies = self.policies.lock();
        let known = policies.tenants.get(tenant).filter(|p| p.quota_bytes > 0);
        if quota_bytes == 0 {
            known.ok_or(StoreError::NotFound)?;
            if self.account(named(tenant)).charged.load(Ordering::Relaxed) > 0 {
                let reason = format!("tenant {tenant} holds objects: remove them first");
                return Err(StoreError::Refused {
                    code: -1702,
                    reason,
                });
            }
        }
        if !policies.tenants.contains_key(tenant) && policies.tenants.len() >= POLICIES_MAX {
            // What was decided longest ago and says nothing any more.
            let old = policies.tenants.iter().filter(|(_, p)| p.quota_bytes == 0);
            let old = old.min_by_key(|(_, p)| p.version).map(|(t, _)| t.clone());
            let Some(old) = old else {
                let what = format!("at most {POLICIES_MAX} tenants have a policy");
                return Err(StoreError::InvalidParams { what });
            };
            policies.tenants.remove(&old);
        }
        let version = (policies.version + 1).max(unix_ms());
        drop(policies);
        self.merge([(
            tenant.to_owned(),
            Policy {
                version,
                quota_bytes,
            },
        )]);
        Ok(version)
    }

    fn snapshot(&self, tenant: &str, account: &Account, capacity: u64, strict: bool) -> Snapshot {
        let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let (requested, charged) = (load(&account.requested), load(&account.charged));
        let explicit = requested > 0;
        let effective = match (explicit, strict) {
            (true, _) => self.effective(requested, capacity),
            (false, true) => 0,
            (false, false) => capacity,
        };
        Snapshot {
            tenant: shown(tenant).to_owned(),
            requested,
            effective,
            charged,
            closed: (explicit || strict) && charged >= effective,
            over: explicit && charged > effective,
            explicit,
            rejected: load(&account.rejected),
            evicted_bytes: load(&account.evicted_bytes),
        }
    }
}

/// A tenant as keys name it.
fn named(tenant: &str) -> &str {
    if tenant == key::DEFAULT_TENANT {
        ""
    } else {
        tenant
    }
}

/// A tenant as people name it.
fn shown(tenant: &str) -> &str {
    if tenant.is_empty() {
        key::DEFAULT_TENANT
    } else {
        tenant
    }
}

/// Whether a policy may have this name: upstream's rule.
pub(crate) fn is_valid(tenant: &str) -> bool {
    !tenant.is_empty()
        && tenant.len() <= key::TENANT_BYTES_MAX
        && !tenant.starts_with('_')
        && !tenant.chars().any(char::is_control)
}

/// Bytes an object takes in all of its replicas.
pub(crate) fn bytes_of(size: u64, replicas: usize) -> u64 {
    footprint(size).unwrap_or(0).saturating_mul(replicas as u64)
}

impl MasterState {
    /// Lets a put of `bytes` in, if its tenant may have them; older objects of the tenant go for it.
    ///
    /// # Errors
    /// −1700 when the quota does not allow it and nothing more of the tenant may go, −1701 when every tenant needs a policy
    /// and this one has none.
    pub(crate) fn admit(
        &self,
        qualified: &[u8],
        bytes: u64,
        now: Millis,
    ) -> Result<Reserved, StoreError> {
        let tenant = tenant_of(qualified);
        let account = self.quotas.account(tenant);
        let requested = account.requested.load(Ordering::Relaxed);
        if requested == 0 {
            if self.config.strict_tenants {
                add(&self.quotas.unregistered, 1);
                account.rejected.fetch_add(1, Ordering::Relaxed);
                return Err(StoreError::from_code(-1701));
            }
            account.charged.fetch_add(bytes, Ordering::Relaxed);
            return Ok(Reserved { account, bytes });
        }
        let (capacity, _) = self.capacity();
        let quota = self.quotas.effective(requested, capacity);
        let within = |charged: u64| charged.checked_add(bytes).filter(|sum| *sum <= quota);
        let (set, get) = (Ordering::AcqRel, Ordering::Acquire);
        for attempt in 0..3 {
            let charged = match account.charged.fetch_update(set, get, within) {
                Ok(_) => return Ok(Reserved { account, bytes }),
                Err(charged) => charged,
            };
            let rests = account.rests_until.load(Ordering::Relaxed) > now.0;
            if attempt == 2 || rests || bytes > quota {
                break;
            }
            let missing = charged.saturating_add(bytes) - quota;
            let freed = self.evict_tenant(tenant, &account, missing.max(quota / AT_ONCE), now);
            if freed < missing {
                account
                    .rests_until
                    .store(now.plus(REST).0, Ordering::Relaxed);
            }
        }
        account.rejected.fetch_add(1, Ordering::Relaxed);
        Err(StoreError::from_code(-1700))
    }

    /// Evicts objects of one tenant, the longest unread of a sample; returns their bytes in all replicas.
    fn evict_tenant(&self, tenant: &str, account: &Account, wanted: u64, now: Millis) -> u64 {
        let mut freed = 0;
        let passes: &[bool] = if self.config.evict_soft_pinned {
            &[false, true]
        } else {
            &[false]
        };
        for soft_pinned_too in passes {
            let mut sample: Vec<(Millis, u64, Box<[u8]>, u64)> = Vec::new();
            let mut bytes = 0;
            let from = account.cursor.load(Ordering::Relaxed);
            let (mut cursor, mut wrapped) = (from, false);
            loop {
                cursor = self.walk(cursor, 4096, |o| {
                    if tenant_of(&o.key) == tenant && o.evictable(now, *soft_pinned_too) {
                        bytes += bytes_of(o.size, o.replicas.len());
                        sample.push((self.last_read(o), o.hash, o.key.clone(), o.version));
                    }
                    true
                });
                if bytes >= wanted.saturating_mul(SAMPLE) || (wrapped && cursor >= from) {
                    break;
                }
                if cursor == 0 {
                    if wrapped || from == 0 {
                        break;
                    }
                    wrapped = true;
                }
            }
            account.cursor.store(cursor, Ordering::Relaxed);
            sample.sort_unstable_by_key(|(read, ..)| *read);
            for (_, hash, qualified, version) in sample {
                if freed >= wanted {
                    break;
                }
                let is_it = |o: &Object| o.version == version && o.evictable(now, *soft_pinned_too);
                let victim = {
                    let mut shard = self.shard(hash);
                    let found = shard.get(hash, &qualified).is_some_and(is_it);
                    let victim = found.then(|| shard.remove(hash, &qualified)).flatten();
                    if let Some(victim) = &victim {
                        self.events.removed(victim, Reason::Evicted);
                    }
                    victim
                };
                if let Some(victim) = victim {
                    freed += bytes_of(victim.size, victim.replicas.len());
                    freed += self.evict_one(&victim, *soft_pinned_too, Cause::Quota, now);
                }
            }
            if freed >= wanted {
                break;
            }
        }
        add(&account.evicted_bytes, freed);
        freed
    }

    /// Gives a tenant a quota, or takes it away (0). The version after which all nodes know it.
    ///
    /// # Errors
    /// As [`Quotas::decide`]; `Rebuilding` while nodes may still come that know of other decisions.
    pub(crate) fn set_quota(
        &self,
        tenant: &str,
        quota_bytes: u64,
        now: Millis,
    ) -> Result<u64, StoreError> {
        if self.recovering(now) {
            return Err(StoreError::Rebuilding);
        }
        let version = self.quotas.decide(tenant, quota_bytes)?;
        for node in self.segments.nodes() {
            node.wake();
        }
        Ok(version)
    }

    /// Nodes in service that keep this version or a later one, and how many there are.
    pub(crate) fn quota_keepers(&self, version: u64) -> (usize, usize) {
        let nodes = self.segments.nodes();
        let here = nodes.iter().filter(|n| n.phase() == NodePhase::Ok);
        let kept = here
            .clone()
            .filter(|n| n.quotas_kept.load(Ordering::Acquire) >= version);
        (kept.count(), here.count())
    }

    /// All tenants that hold something or have a policy, by name.
    pub(crate) fn tenant_snapshots(&self) -> Vec<Snapshot> {
        let (capacity, _) = self.capacity();
        let strict = self.config.strict_tenants;
        let accounts = self.quotas.accounts.read();
        let mut all: Vec<Snapshot> = accounts
            .iter()
            .map(|(tenant, a)| self.quotas.snapshot(tenant, a, capacity, strict))
            .filter(|s| s.explicit || s.charged > 0)
            .collect();
        all.sort_by(|a, b| a.tenant.cmp(&b.tenant));
        all
    }

    /// One tenant.
    pub(crate) fn tenant_snapshot(&self, tenant: &str) -> Option<Snapshot> {
        let (capacity, _) = self.capacity();
        let strict = self.config.strict_tenants;
        let accounts = self.quotas.accounts.read();
        let account = accounts.get(named(tenant))?;
        let found = self
            .quotas
            .snapshot(named(tenant), account, capacity, strict);
        (found.explicit || found.charged > 0).then_some(found)
    }
}
