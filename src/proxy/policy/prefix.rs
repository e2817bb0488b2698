//! `prefix`: who probably has the beginning of the prompt cached, weighed against what it has to do (approximate: from what
//! was routed, not from what the instances say).
//!
//! Owns that weighing; `prefix_index` remembers what was routed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::config::Role;
use super::super::registry::Instance;
use super::prefix_index::PrefixIndex;
use super::{Ask, Policy, least, streams, tokens};

/// What a stream under way is worth in prompt tokens when decode instances are compared.
const TOKENS_PER_STREAM: f64 = 128.0;

/// What a token to be computed counts beside one that others must wait for anyway. It costs more than this prompt's time: those
/// who come next wait for it too, and in a full cache it takes the place of one that would have been asked for again. With 1,
/// a busy moment moves conversations about, and each move makes others move. In simulations (conversations, a recorded
/// trace; caches of several sizes) mean waiting fell up to 4 and hardly after that; with little to do 2 is the best.
const COMPUTED: f64 = 4.0;

#[derive(Debug, Default)]
pub(super) struct Prefix {
    index: PrefixIndex,
    turn: AtomicUsize,
}

/// Tokens under way there.
fn queued(ask: &Ask<'_>, instance: &Instance) -> f64 {
    match ask.role {
        Role::Decode => streams(instance) * TOKENS_PER_STREAM,
        _ => tokens(instance),
    }
}

/// What it costs to have the prompt computed there, in tokens. `saved`: tokens of it that need not be.
pub(super) fn cost(ask: &Ask<'_>, instance: &Instance, saved: f64) -> f64 {
    let uncached = (ask.tokens as f64 - saved).max(0.0);
    // A decode instance computes nothing of it.
    let weight = if ask.role == Role::Decode {
        1.0
    } else {
        COMPUTED
    };
    queued(ask, instance) + weight * uncached
}

impl Policy for Prefix {
    fn choose(&self, ask: &Ask<'_>, candidates: &[Arc<Instance>]) -> usize {
        let matched = self.index.matched(ask.prompt, candidates);
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let costs = candidates.iter().zip(&matched);
        least(
            turn,
            costs.map(|(c, m)| cost(ask, c, ask.tokens_of(*m)) / c.weight),
        )
    }

    fn routed(&self, ask: &Ask<'_>, instance: &Instance) {
        self.index.insert(ask, instance);
    }

    fn cached_tokens(&self, ask: &Ask<'_>, instance: &Arc<Instance>) -> u64 {
        let matched = self
            .index
            .matched(ask.prompt, std::slice::from_ref(instance));
        ask.tokens_of(matched[0]) as u64
    }

    fn forget(&self, number: u64) {
        self.index.forget(number);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{ask, registry};
    use super::*;

    #[test]
    fn a_conversation_stays_and_moves_away_from_a_busy_instance() {
        let registry = registry(3);
        let policy = Prefix::default();
        let all = registry.candidates(Role::Prefill, 0, None);
        let mut text = "system prompt ".repeat(400);
        let first = policy.choose(&ask(text.as_bytes(), None), &all);
        policy.routed(&ask(text.as_bytes(), None), &all[first]);
        for turn in 0..6 {
            text.push_str(&format!("turn {turn} says something. ").repeat(20));
            let ask = ask(text.as_bytes(), None);
            assert_eq!(policy.choose(&ask, &all), first);
            policy.routed(&ask, &all[first]);
            assert!(policy.cached_tokens(&ask, &all[first]) > 1000);
        }
        // Another's prompt of the same length is no reason to compute everything anew; a long queue is.
        let other = registry.enter(&all[first], Role::Prefill, text.len() as u64 / 4);
        assert_eq!(policy.choose(&ask(text.as_bytes(), None), &all), first);
        drop(other);
        let _busy = registry.enter(&all[first], Role::Prefill, 1_000_000);
        assert_ne!(policy.choose(&ask(text.as_bytes(), None), &all), first);
        policy.forget(all[first].number);
        assert_eq!(
            policy.cached_tokens(&ask(text.as_bytes(), None), &all[first]),
            0
        );
    }
}
