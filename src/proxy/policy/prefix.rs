//! `prefix`: who probably has the beginning of the prompt cached, weighed against what it has to do (approximate: from what
//! was routed, not from what the instances say).
//!
//! `weigh` does the weighing, `prefix_index` remembers what was routed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use smallvec::SmallVec;

use super::super::registry::Instance;
use super::prefix_index::PrefixIndex;
use super::weigh::costs;
use super::{Ask, Choice, Policy, least};

#[derive(Debug, Default)]
pub(super) struct Prefix {
    index: PrefixIndex,
    turn: AtomicUsize,
}

impl Policy for Prefix {
    fn choose(&self, ask: &Ask<'_>, candidates: &[Arc<Instance>]) -> Choice {
        let matched = self.index.matched(ask.prompt, candidates);
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let saved: SmallVec<[f64; 8]> = matched.iter().map(|m| ask.tokens_of(*m)).collect();
        let costs = costs(ask, candidates, &saved, &self.index);
        let each = candidates.iter().zip(costs);
        let place = least(turn, each.map(|(c, cost)| cost / c.weight));
        Choice::of(place, &saved)
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
    use super::super::super::config::Role;
    use super::super::tests::{ask, registry};
    use super::*;

    #[test]
    fn a_conversation_stays_and_moves_away_from_a_busy_instance() {
        let registry = registry(3);
        let policy = Prefix::default();
        let all = registry.candidates(Role::Prefill, 0, None);
        let mut text = "system prompt ".repeat(400);
        let first = policy.choose(&ask(text.as_bytes(), None), &all).place;
        policy.routed(&ask(text.as_bytes(), None), &all[first]);
        for turn in 0..6 {
            text.push_str(&format!("turn {turn} says something. ").repeat(20));
            let ask = ask(text.as_bytes(), None);
            let choice = policy.choose(&ask, &all);
            assert_eq!(choice.place, first);
            assert!(turn == 0 || choice.cached > 1000);
            policy.routed(&ask, &all[first]);
        }
        // Another's prompt of the same length is no reason to compute everything anew; a long queue is.
        let other = registry.enter(&all[first], Role::Prefill, text.len() as u64 / 4);
        assert_eq!(
            policy.choose(&ask(text.as_bytes(), None), &all).place,
            first
        );
        drop(other);
        let _busy = registry.enter(&all[first], Role::Prefill, 1_000_000);
        let elsewhere = policy.choose(&ask(text.as_bytes(), None), &all);
        assert_ne!(elsewhere.place, first);
        assert!(elsewhere.cached == 0 && elsewhere.matched > 1000);
        policy.forget(all[first].number);
        let alone = policy.choose(&ask(text.as_bytes(), None), &all[first..=first]);
        assert_eq!((alone.cached, alone.matched), (0, 0));
    }
}
