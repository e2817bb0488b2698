//! `cost`: the expected time until the first token, in seconds: what is pending at the prefill instance and what is not cached
//! there, by how fast it computes prompts, and how long its KV takes to a decode instance. For a fleet of unequal machines and
//! links; the same index and weights as `prefix`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use smallvec::SmallVec;

use super::super::config::Role;
use super::super::registry::Instance;
use super::prefix_index::PrefixIndex;
use super::weigh::costs;
use super::{Ask, Choice, Policy, least};

/// One request in so many goes to the next in turn.
const EXPLORE_EVERY: usize = 32;
/// Seconds per token as long as nobody has been measured.
const PER_TOKEN: f64 = 1e-4;

#[derive(Debug, Default)]
pub(super) struct Cost {
    index: PrefixIndex,
    turn: AtomicUsize,
}

/// Seconds for a token to be computed there, as far as it is known.
fn per_token(instance: &Instance) -> Option<f64> {
    if let Some(fit) = instance.pace.fit() {
        return Some(fit.per_token);
    }
    let rate = instance.rate.load(Ordering::Relaxed) as f64;
    (rate > 0.0).then(|| 1.0 / rate)
}

/// What is not known counts as the mean of what is, so that it is found out.
fn filled(values: impl Iterator<Item = Option<f64>>, otherwise: f64) -> SmallVec<[f64; 8]> {
    let values: SmallVec<[Option<f64>; 8]> = values.collect();
    let known = values.iter().flatten().count();
    let mean = match known {
        0 => otherwise,
        _ => values.iter().flatten().sum::<f64>() / known as f64,
    };
    values.into_iter().map(|v| v.unwrap_or(mean)).collect()
}

/// Seconds per token, and seconds for the KV's way, of each candidate.
fn measured(
    ask: &Ask<'_>,
    candidates: &[Arc<Instance>],
) -> (SmallVec<[f64; 8]>, SmallVec<[f64; 8]>) {
    let each = candidates.iter();
    if ask.role == Role::Decode {
        // What is under way there is weighed as prefill's tokens are; a decode instance computes none.
        let pace = ask.from.and_then(per_token).unwrap_or(PER_TOKEN);
        let way = each.map(|c| ask.from?.links.to(c.number, ask.tokens));
        return (
            SmallVec::from_elem(pace, candidates.len()),
            filled(way, 0.0),
        );
    }
    let paces = filled(each.clone().map(|c| per_token(c)), PER_TOKEN);
    (
        paces,
        filled(each.map(|c| c.links.quickest(ask.tokens)), 0.0),
    )
}

impl Policy for Cost {
    fn choose(&self, ask: &Ask<'_>, candidates: &[Arc<Instance>]) -> Choice {
        let matched = self.index.matched(ask.prompt, candidates);
        let saved: SmallVec<[f64; 8]> = matched.iter().map(|m| ask.tokens_of(*m)).collect();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        if turn.is_multiple_of(EXPLORE_EVERY) {
            // Who was slow once would otherwise never be measured again.
            return Choice::of(turn / EXPLORE_EVERY % candidates.len().max(1), &saved);
        }
        let (paces, ways) = measured(ask, candidates);
        let costs = costs(ask, candidates, &saved, &self.index);
        let each = costs.iter().zip(paces.iter().zip(&ways));
        let each = candidates.iter().zip(each);
        let seconds = each.map(|(c, (cost, (pace, way)))| cost * pace / c.weight + way);
        Choice::of(least(turn, seconds), &saved)
    }

    fn routed(&self, ask: &Ask<'_>, instance: &Instance) {
        self.index.insert(ask, instance);
    }

    fn forget(&self, number: u64) {
        self.index.forget(number);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::super::config::InstanceAddress;
    use super::super::super::registry::{Health, NewInstance};
    use super::super::tests::{ask, registry};
    use super::*;

    fn often(policy: &Cost, ask: &Ask<'_>, candidates: &[Arc<Instance>]) -> Vec<usize> {
        let mut seen = vec![0; candidates.len()];
        (0..320).for_each(|_| seen[policy.choose(ask, candidates).place] += 1);
        seen
    }

    #[test]
    fn the_faster_machine_and_the_faster_link_get_more() {
        let registry = registry(3);
        let all = registry.candidates(Role::Prefill, 0, None);
        let text = "x".repeat(8000);
        let learn = |instance: &Instance, us_per_token: u64| {
            for n in 1..40 {
                let (own, ahead) = (100 * n, 50 * (n * 7 % 40));
                let time = Duration::from_micros(us_per_token * (own + ahead));
                instance.pace.learn(own, ahead, time);
            }
        };
        learn(&all[0], 40);
        learn(&all[1], 20);
        let policy = Cost::default();
        let seen = often(&policy, &ask(text.as_bytes(), None), &all);
        assert!(seen[1] > 250, "{seen:?}");
        // Its KV takes longer than the other's computing.
        for tokens in [1000, 2000, 3000] {
            all[0].links.learn(8, tokens, Duration::from_micros(tokens));
            all[1]
                .links
                .learn(8, tokens, Duration::from_micros(100 * tokens));
            all[2]
                .links
                .learn(8, tokens, Duration::from_micros(100 * tokens));
        }
        let seen = often(&policy, &ask(text.as_bytes(), None), &all);
        assert!(seen[0] > 250, "{seen:?}");
    }

    #[test]
    fn decode_goes_where_the_kv_gets_soonest() {
        let registry = registry(1);
        let prefill = registry.candidates(Role::Prefill, 0, None).remove(0);
        for n in 1..=2 {
            let address = InstanceAddress::parse(&format!("10.0.1.{n}:80")).unwrap();
            let new = NewInstance::plain(address, Role::Decode);
            registry.add(new).unwrap().set_health(Health::Up);
        }
        let all = registry.candidates(Role::Decode, 0, None);
        for tokens in [500, 1500, 4000] {
            let us = |us| Duration::from_micros(us);
            prefill.links.learn(all[0].number, tokens, us(50 * tokens));
            prefill.links.learn(all[1].number, tokens, us(5 * tokens));
        }
        let text = "x".repeat(8000);
        let ask = Ask {
            role: Role::Decode,
            from: Some(&prefill),
            ..ask(text.as_bytes(), None)
        };
        let policy = Cost::default();
        let seen = often(&policy, &ask, &all);
        assert!(seen[1] > 280, "{seen:?}");
        // Until it has more under way than the way is shorter: 90 ms are 7 streams.
        let _legs: Vec<_> = (0..20)
            .map(|_| registry.enter(&all[1], Role::Decode, 0))
            .collect();
        let seen = often(&policy, &ask, &all);
        assert!(seen[0] > 280, "{seen:?}");
    }
}
