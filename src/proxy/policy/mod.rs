//! Who gets a request: one policy per role, each in its file behind `Policy`.
//!
//! Owns the contract and the list of names. A policy sees the candidates (usable now, never none) and the request; it does
//! no I/O, keeps bounded state, and never decides whether somebody is usable. A strategy of one's own is a file here and a
//! line in `NAMES` and `build`.

mod cost;
mod kv;
mod least_loaded;
#[cfg(test)]
mod load_test;
mod p2c;
mod prefix;
mod prefix_index;
mod random;
mod round_robin;
mod session;
mod weigh;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::App;
use super::config::Role;
use super::kv::Kv;
use super::kv::text::Known;
use super::kv::worth::Slower;
use super::registry::Instance;

/// What a policy may know of a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask<'a> {
    pub(crate) role: Role,
    /// The prompt as it is written in the body.
    pub(crate) prompt: &'a [u8],
    /// Its length in tokens, estimated.
    pub(crate) tokens: u64,
    /// Hash of what names the session.
    pub(crate) session: Option<u64>,
    /// The prompt's tokens, where they are known.
    pub(crate) known: Option<&'a Known>,
    /// For decode: where the prompt is computed.
    pub(crate) from: Option<&'a Instance>,
}

impl Ask<'_> {
    /// Tokens per byte of the prompt, by the estimate of its tokens.
    fn tokens_per_byte(&self) -> f64 {
        self.tokens as f64 / self.prompt.len().max(1) as f64
    }

    /// Tokens of that many bytes of the prompt.
    fn tokens_of(&self, bytes: usize) -> f64 {
        bytes as f64 * self.tokens_per_byte()
    }
}

/// Who was chosen, and what of the prompt is cached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Choice {
    /// Index into the candidates.
    pub(crate) place: usize,
    /// Prompt tokens that it probably need not compute.
    pub(crate) cached: u64,
    /// The most that any candidate need not.
    pub(crate) matched: u64,
    /// Tokens it has to fetch from slower tiers.
    pub(crate) slower: Slower,
}

impl Choice {
    /// By one that does not look at caches.
    fn blind(place: usize) -> Self {
        Self {
            place,
            ..Self::default()
        }
    }

    /// Of candidates that save so many tokens each.
    fn of(place: usize, saved: &[f64]) -> Self {
        Self {
            place,
            cached: saved.get(place).map_or(0, |s| s.round() as u64),
            matched: saved.iter().copied().fold(0.0, f64::max).round() as u64,
            ..Self::default()
        }
    }
}

/// Chooses among candidates.
pub(crate) trait Policy: Send + Sync {
    /// One of `candidates`, which holds at least one.
    fn choose(&self, ask: &Ask<'_>, candidates: &[Arc<Instance>]) -> Choice;

    /// A request was sent to `instance`.
    fn routed(&self, _ask: &Ask<'_>, _instance: &Instance) {}

    /// An instance is gone or restarted: what it had cached is lost.
    fn forget(&self, _number: u64) {}
}

/// Names of all policies.
pub const NAMES: &[&str] = &[
    "round_robin",
    "random",
    "least_loaded",
    "p2c",
    "session",
    "prefix",
    "cost",
    "kv",
];

/// The policy of a name; an unknown one is `round_robin`.
pub(crate) fn build(name: &str, knowledge: &Arc<Kv>) -> Box<dyn Policy> {
    match name {
        "random" => Box::new(random::Random),
        "least_loaded" => Box::new(least_loaded::LeastLoaded::default()),
        "p2c" => Box::new(p2c::PowerOfTwo),
        "session" => Box::new(session::Session),
        "prefix" => Box::new(prefix::Prefix::default()),
        "cost" => Box::new(cost::Cost::default()),
        "kv" => Box::new(kv::Kv::new(knowledge)),
        _ => Box::new(round_robin::RoundRobin::default()),
    }
}

/// Whether a policy of the proxy weighs what instances have to do.
pub(crate) fn weighs_load(app: &App) -> bool {
    let weighs = |name: &str| !matches!(name, "round_robin" | "random");
    weighs(app.config.policy.prefill) || weighs(app.config.policy.decode)
}

/// A KV cache this full (in thousandths) makes an engine push running requests out.
const KV_FULL: u64 = 950;

/// Streams at a decode instance, others' included; more when its KV cache is full.
fn streams(instance: &Instance) -> f64 {
    let others = instance.others.load(Ordering::Relaxed) as f64;
    let streams = instance.inflight(Role::Decode) as f64 + others;
    if instance.kv_usage.load(Ordering::Relaxed) >= KV_FULL {
        1.5 * streams + 1.0
    } else {
        streams
    }
}

/// Tokens to be computed at a prefill instance. Of others' requests only the number is known.
fn tokens(instance: &Instance) -> f64 {
    // A request of a few tokens is still a request.
    let own = instance.tokens() as f64 + 16.0 * instance.inflight(Role::Prefill) as f64;
    own + OTHERS_TOKENS * instance.others.load(Ordering::Relaxed) as f64
}

/// What another's request at a prefill instance counts, in tokens.
const OTHERS_TOKENS: f64 = 512.0;

/// What is under way at an instance, in tokens for prefill and in streams for decode, per unit of weight.
fn load(instance: &Instance, role: Role) -> f64 {
    let work = match role {
        Role::Decode => streams(instance),
        _ => tokens(instance),
    };
    work / instance.weight
}

/// Index of the smallest value; ties go round, so that idle instances take turns.
fn least(turn: usize, costs: impl ExactSizeIterator<Item = f64>) -> usize {
    let count = costs.len().max(1);
    let mut best = (f64::INFINITY, usize::MAX, 0);
    for (index, cost) in costs.enumerate() {
        let distance = (index + count - turn % count) % count;
        if (cost, distance) < (best.0, best.1) {
            best = (cost, distance, index);
        }
    }
    best.2
}

/// Finalizer of SplitMix64.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::super::config::InstanceAddress;
    use super::super::registry::{Health, NewInstance, Registry};
    use super::*;

    pub(super) fn registry(count: usize) -> Registry {
        let registry = Registry::default();
        for n in 1..=count {
            let address = InstanceAddress::parse(&format!("10.0.0.{n}:80")).unwrap();
            let instance = registry
                .add(NewInstance::plain(address, Role::Prefill))
                .unwrap();
            instance.set_health(Health::Up);
        }
        registry
    }

    pub(super) fn ask(prompt: &[u8], session: Option<u64>) -> Ask<'_> {
        Ask {
            role: Role::Prefill,
            prompt,
            tokens: prompt.len() as u64 / 4,
            session,
            known: None,
            from: None,
        }
    }

    /// What holds for every policy.
    #[test]
    fn contract() {
        for name in NAMES {
            let policy = build(name, &Arc::default());
            let registry = registry(5);
            let mut legs = Vec::new();
            let mut seen = [0; 5];
            for n in 0..500u64 {
                let candidates = registry.candidates(Role::Prefill, 0, None);
                let text = format!("prompt {n}").repeat(8);
                let ask = ask(text.as_bytes(), Some(mix(n)));
                let chosen = policy.choose(&ask, &candidates).place;
                assert!(chosen < candidates.len(), "{name}");
                policy.routed(&ask, &candidates[chosen]);
                seen[chosen] += 1;
                legs.push(registry.enter(&candidates[chosen], Role::Prefill, ask.tokens));
                // One candidate is always chosen, and an instance that is gone is not held on to.
                assert_eq!(policy.choose(&ask, &candidates[2..3]).place, 0, "{name}");
                policy.forget(n % 5);
            }
            assert!(seen.iter().all(|n| *n > 25), "{name} is lopsided: {seen:?}");
            drop(legs);
            assert_eq!(registry.inflight(), 0);
        }
    }

    #[test]
    fn least_takes_turns_among_equals() {
        let seen: Vec<usize> = (0..4)
            .map(|turn| least(turn, [1.0, 1.0, 2.0].into_iter()))
            .collect();
        assert_eq!(seen, [0, 1, 0, 0]);
    }
}
