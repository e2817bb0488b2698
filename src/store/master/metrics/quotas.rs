//! Quotas of tenants under upstream's names. Bounded: those with a policy first, then those that hold the most.

use super::super::quotas::Snapshot;
use super::exposition::Writer;

/// Tenants shown on their own.
const TENANTS_MAX: usize = 1000;

/// The series of one family; nothing when it is about something else.
pub(super) fn series(tenants: &[Snapshot], name: &str, w: &mut Writer) {
    let of: fn(&Snapshot) -> u64 = match name {
        "mooncake_tenant_quota_requested_bytes" => |t| t.requested,
        "mooncake_tenant_quota_effective_bytes" => |t| t.effective,
        "mooncake_tenant_quota_charged_bytes" => |t| t.charged,
        "mooncake_tenant_quota_admission_closed" => |t| u64::from(t.closed),
        "mooncake_tenant_quota_over_quota" => |t| u64::from(t.over),
        "mooncake_tenant_quota_explicit_policy" => |t| u64::from(t.explicit),
        "mooncake_tenant_quota_reject_total" => |t| t.rejected,
        "mooncake_tenant_evict_bytes_total" => |t| t.evicted_bytes,
        _ => return,
    };
    let mut shown: Vec<&Snapshot> = tenants.iter().collect();
    if shown.len() > TENANTS_MAX {
        shown.sort_by_key(|t| std::cmp::Reverse((t.explicit, t.charged)));
        shown.truncate(TENANTS_MAX);
    }
    for tenant in shown {
        let id = ("tenant_id", tenant.tenant.as_str());
        if name == "mooncake_tenant_quota_reject_total" {
            let reason = if tenant.explicit {
                "quota_exceeded"
            } else {
                "not_registered"
            };
            w.series(name, &[id, ("reason", reason)], of(tenant));
        } else {
            w.series(name, &[id], of(tenant));
        }
    }
}
