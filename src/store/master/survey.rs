//! Where the pool's memory is used, and by whom: maps of segments, tenants, prefixes, replicas.
//!
//! Owns the walk over the index and its bounds: a lock is held for a few hundred objects at a time, and groups are limited
//! in number. Grants no lease, changes nothing.

use std::collections::HashMap;

use super::Master;
use super::object::Object;
use super::segments::{NodePhase, SegmentsView};
use crate::base::clock::Millis;
use crate::store::alloc::offset::map_of;
use crate::store::model::key::{self, DEFAULT_TENANT};

/// Prefixes (tenants) told apart during a walk; what comes after belongs to the empty prefix.
const GROUPS_MAX: usize = 4096;
/// Numbers of replicas told apart.
const REPLICAS_MAX: usize = 4;

/// Objects of one tenant, or with one prefix.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) tenant: String,
    pub(crate) prefix: Vec<u8>,
    pub(crate) objects: u64,
    /// Of the objects, once per replica.
    pub(crate) bytes: u64,
    pub(crate) leased_objects: u64,
}

/// What a walk found.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    /// By slot: a byte per part, 0 = free, 255 = full.
    pub(crate) maps: HashMap<u32, Vec<u8>>,
    /// Largest first.
    pub(crate) tenants: Vec<Tally>,
    pub(crate) prefixes: Vec<Tally>,
    pub(crate) looked_at: u64,
    pub(crate) pinned_objects: u64,
    pub(crate) leased_objects: u64,
    /// Objects with 1, 2, … replicas (the last: that many or more).
    pub(crate) by_replicas: [u64; REPLICAS_MAX],
    /// Objects of which some replicas lie on nodes that are lost, and those of which all do.
    pub(crate) degraded_objects: u64,
    pub(crate) unreadable_objects: u64,
}

/// Looks at up to `objects_max` objects; `cells` parts per segment, the `top` tenants and prefixes.
pub(crate) fn survey(
    master: &Master,
    cells: usize,
    top: usize,
    objects_max: usize,
    now: Millis,
) -> Survey {
    let state = &master.state;
    let view = state.segments.view();
    let mut walk = Walk::default();
    state.walk(0, objects_max, |object| {
        walk.add(object, &view, now);
        true
    });
    let mut reply = walk.reply;
    reply.tenants = largest(walk.tenants, top);
    reply.prefixes = largest(walk.prefixes, top);
    let maps = view.iter().flatten().map(|s| {
        let (free, _) = s.allocator.lock().largest_free_ranges();
        (s.slot, map_of(s.size, &free, cells))
    });
    reply.maps = maps.collect();
    reply
}

#[derive(Default)]
struct Walk {
    /// By the beginning of the qualified key.
    tenants: HashMap<Box<[u8]>, Tally>,
    prefixes: HashMap<Box<[u8]>, Tally>,
    reply: Survey,
}

impl Walk {
    fn add(&mut self, object: &Object, view: &SegmentsView, now: Millis) {
        let Some((tenant, bytes)) = key::split(&object.key) else {
            return;
        };
        let reply = &mut self.reply;
        let leased = object.leased_until() > now;
        reply.looked_at += 1;
        reply.leased_objects += u64::from(leased);
        reply.pinned_objects += u64::from(object.hard_pin || object.soft_pin_until > now);
        let replicas = object.replicas.len().clamp(1, REPLICAS_MAX);
        reply.by_replicas[replicas - 1] += 1;
        let lives = |slot: u32| {
            let segment = view.get(slot as usize).and_then(Option::as_ref);
            segment.is_some_and(|s| s.node.phase() != NodePhase::Lost)
        };
        let living = object.replicas.iter().filter(|r| lives(r.segment)).count();
        reply.unreadable_objects += u64::from(living == 0);
        reply.degraded_objects += u64::from(living > 0 && living < object.replicas.len());
        let head = object.key.len() - bytes.len();
        let cut = head + prefix_length(bytes);
        let size = object.size.saturating_mul(object.replicas.len() as u64);
        for (groups, to) in [(&mut self.tenants, head), (&mut self.prefixes, cut)] {
            let tally = group(groups, &object.key, head, to);
            if tally.objects == 0 {
                tally.tenant = if tenant.is_empty() {
                    DEFAULT_TENANT
                } else {
                    tenant
                }
                .to_owned();
            }
            tally.objects += 1;
            tally.bytes = tally.bytes.saturating_add(size);
            tally.leased_objects += u64::from(leased);
        }
    }
}

/// The tally of the keys that begin with `key[..to]`, of which the first `head` bytes are the tenant.
fn group<'a>(
    groups: &'a mut HashMap<Box<[u8]>, Tally>,
    key: &[u8],
    head: usize,
    to: usize,
) -> &'a mut Tally {
    let full = groups.len() >= GROUPS_MAX && !groups.contains_key(&key[..to]);
    let name: &[u8] = if full { &[] } else { &key[..to] };
    if !groups.contains_key(name) {
        let prefix = name.get(head..).unwrap_or_default().to_vec();
        let tally = Tally {
            prefix,
            ..Tally::default()
        };
        groups.insert(name.into(), tally);
    }
    groups.entry(name.into()).or_default()
}

/// What a key shares with its neighbours: up to its last `/`, `@` or `:`, else up to its last `_` or `-`, else nothing.
fn prefix_length(key: &[u8]) -> usize {
    let last = |of: &[u8]| key.iter().rposition(|b| of.contains(b));
    last(b"/@:").or_else(|| last(b"_-")).map_or(0, |at| at + 1)
}

fn largest(groups: HashMap<Box<[u8]>, Tally>, top: usize) -> Vec<Tally> {
    let mut all: Vec<Tally> = groups.into_values().collect();
    all.sort_by(|a, b| {
        let (x, y) = ((&a.tenant, &a.prefix), (&b.tenant, &b.prefix));
        b.bytes.cmp(&a.bytes).then_with(|| x.cmp(&y))
    });
    all.truncate(top);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_of_keys() {
        let of = |key: &str| key[..prefix_length(key.as_bytes())].to_owned();
        assert_eq!(of("model/weights.bin"), "model/");
        assert_eq!(of("vllm@org/llama@8@0@1f2e"), "vllm@org/llama@8@0@");
        assert_eq!(of("abc_0_1"), "abc_0_");
        assert_eq!(of("deadbeef"), "");
    }

    #[test]
    fn groups_are_bounded() {
        let mut groups = HashMap::new();
        for n in 0..3 * GROUPS_MAX {
            let key = format!("\0p{n}/x");
            group(&mut groups, key.as_bytes(), 1, key.len() - 1).objects += 1;
        }
        assert_eq!(groups.len(), GROUPS_MAX + 1);
        let all: u64 = groups.values().map(|t| t.objects).sum();
        assert_eq!(all, 3 * GROUPS_MAX as u64);
    }
}
