//! Where the pool's memory is used, and by whom: maps of segments, tenants, prefixes, replicas. What the dashboard,
//! `/api/v1/census`, `/api/v1/tenants` and `mooncake doctor` say of the whole pool comes from here.
//!
//! Owns the walk over the index and its bounds: one at a time, shown again for a while, a lock held for a few hundred objects,
//! groups limited in number. Grants no lease, changes nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::{Value, json};

use super::Master;
use super::object::Object;
use super::segments::{NodePhase, SegmentsView};
use crate::base::clock::Millis;
use crate::store::alloc::offset::map_of;
use crate::store::model::key::{self, DEFAULT_TENANT};

/// Prefixes told apart during a walk; what comes after belongs to the empty prefix.
const PREFIXES_MAX: usize = 4096;
/// Tenants likewise; those beyond are counted together.
const TENANTS_MAX: usize = 10_000;
/// The name they are counted under.
const OTHERS: &str = "(others)";
/// Parts of a segment's map.
const CELLS: usize = 96;
/// Prefixes kept of a walk.
const PREFIXES_KEPT: usize = 64;
/// What a walk found is shown again for this long, and for this many times as long as it took: looking never takes more than a
/// twentieth of one processor.
const AGE: Duration = Duration::from_secs(4);
const AGE_OF_WALK: u32 = 20;
/// Numbers of replicas told apart.
const REPLICAS_MAX: usize = 4;

/// Objects of one tenant, or with one prefix.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) tenant: String,
    pub(crate) prefix: Vec<u8>,
    pub(crate) objects: u64,
    pub(crate) bytes: u64,
    /// Once per replica.
    pub(crate) replica_bytes: u64,
    pub(crate) leased_objects: u64,
}

impl Tally {
    /// As dashboards and programs get it.
    pub(crate) fn json(&self) -> Value {
        json!({
            "tenant": self.tenant, "prefix": String::from_utf8_lossy(&self.prefix), "objects": self.objects,
            "bytes": self.bytes, "replica_bytes": self.replica_bytes, "leased_objects": self.leased_objects,
        })
    }
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
    /// Objects with fewer replicas on living nodes than they were put with, and those with none.
    pub(crate) degraded_objects: u64,
    pub(crate) unreadable_objects: u64,
}

/// The last walk, for everybody who asks.
#[derive(Debug, Default)]
pub(crate) struct Surveyor {
    last: Mutex<Option<Walked>>,
}

#[derive(Debug)]
struct Walked {
    at: Instant,
    took: Duration,
    survey: Arc<Survey>,
}

impl Surveyor {
    /// A walk that is recent enough, else a new one; with its age. May take as long as the index is large: not for a thread that
    /// others wait for.
    pub(crate) fn recent(&self, master: &Master) -> (Arc<Survey>, Duration) {
        // Held during the walk: others wait for its result instead of walking as well.
        let mut last = self.last.lock();
        if let Some(walked) = &*last {
            let age = walked.at.elapsed();
            if age < AGE.max(walked.took * AGE_OF_WALK) {
                return (walked.survey.clone(), age);
            }
        }
        let start = Instant::now();
        let survey = Arc::new(survey(master, Millis::now()));
        *last = Some(Walked {
            at: Instant::now(),
            took: start.elapsed(),
            survey: survey.clone(),
        });
        (survey, Duration::ZERO)
    }
}

/// Looks at every object.
fn survey(master: &Master, now: Millis) -> Survey {
    let state = &master.state;
    let view = state.segments.view();
    let mut walk = Walk::default();
    state.walk(0, usize::MAX, |object| {
        walk.add(object, &view, now);
        false
    });
    let mut reply = walk.reply;
    reply.tenants = largest(walk.tenants, usize::MAX);
    reply.prefixes = largest(walk.prefixes, PREFIXES_KEPT);
    let maps = view.iter().flatten().map(|s| {
        let (free, _) = s.allocator.lock().largest_free_ranges();
        (s.slot, map_of(s.size, &free, CELLS))
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
        let wanted = object.replicas.len().max(object.put_with.replicas().into());
        reply.unreadable_objects += u64::from(living == 0);
        reply.degraded_objects += u64::from(living > 0 && living < wanted);
        let head = object.key.len() - bytes.len();
        let cut = head + prefix_length(bytes);
        let copies = object.replicas.len() as u64;
        let groups = [
            (&mut self.tenants, head, TENANTS_MAX),
            (&mut self.prefixes, cut, PREFIXES_MAX),
        ];
        for (groups, to, most) in groups {
            let tally = group(groups, &object.key, head, to, most);
            if tally.objects == 0 && tally.tenant.is_empty() {
                tally.tenant = match tenant {
                    "" => DEFAULT_TENANT.to_owned(),
                    name => name.to_owned(),
                };
            }
            tally.objects += 1;
            tally.bytes = tally.bytes.saturating_add(object.size);
            tally.replica_bytes = tally
                .replica_bytes
                .saturating_add(object.size.saturating_mul(copies));
            tally.leased_objects += u64::from(leased);
        }
    }
}

/// The tally of the keys that begin with `key[..to]`, of which the first `head` bytes are the tenant; beyond `most` groups, that
/// of all others.
fn group<'a>(
    groups: &'a mut HashMap<Box<[u8]>, Tally>,
    key: &[u8],
    head: usize,
    to: usize,
    most: usize,
) -> &'a mut Tally {
    let full = groups.len() >= most && !groups.contains_key(&key[..to]);
    let name: &[u8] = if full { &[] } else { &key[..to] };
    if !groups.contains_key(name) {
        let prefix = name.get(head..).unwrap_or_default().to_vec();
        let tenant = if full { OTHERS } else { "" }.to_owned();
        let tally = Tally {
            tenant,
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
        b.replica_bytes
            .cmp(&a.replica_bytes)
            .then_with(|| x.cmp(&y))
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
        let (mut groups, most) = (HashMap::new(), 100);
        for n in 0..3 * most {
            let key = format!("\0p{n}/x");
            group(&mut groups, key.as_bytes(), 1, key.len() - 1, most).objects += 1;
        }
        assert_eq!(groups.len(), most + 1);
        let all: u64 = groups.values().map(|t| t.objects).sum();
        assert_eq!(all, 3 * most as u64);
        let others = groups.values().find(|t| t.tenant == OTHERS);
        assert_eq!(others.map(|t| t.objects), Some(2 * most as u64));
    }
}
