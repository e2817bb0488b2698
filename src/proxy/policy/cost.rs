//! `cost`: the expected time until the prompt is computed: tokens that are pending there, divided by how fast the instance
//! has been computing prompts. For a fleet of unequal machines; the same index as `prefix`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use smallvec::SmallVec;

use super::super::registry::Instance;
use super::prefix_index::PrefixIndex;
use super::weigh::costs;
use super::{Ask, Policy, least};

/// One request in so many goes to the next in turn.
const EXPLORE_EVERY: usize = 32;

#[derive(Debug, Default)]
pub(super) struct Cost {
    index: PrefixIndex,
    turn: AtomicUsize,
}

impl Policy for Cost {
    fn choose(&self, ask: &Ask<'_>, candidates: &[Arc<Instance>]) -> usize {
        let matched = self.index.matched(ask.prompt, candidates);
        let rates = || {
            candidates
                .iter()
                .map(|c| c.rate.load(Ordering::Relaxed) as f64)
        };
        let known = rates().filter(|r| *r > 0.0).count().max(1) as f64;
        // Who has not been measured yet counts as the mean, so that it is.
        let mean = (rates().sum::<f64>() / known).max(1.0);
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        if turn.is_multiple_of(EXPLORE_EVERY) {
            // Who was slow once would otherwise never be measured again.
            return turn / EXPLORE_EVERY % candidates.len().max(1);
        }
        let saved: SmallVec<[f64; 8]> = matched.iter().map(|m| ask.tokens_of(*m)).collect();
        let costs = costs(ask, candidates, &saved, &self.index);
        let each = candidates.iter().zip(costs).map(|(c, cost)| {
            let rate = c.rate.load(Ordering::Relaxed) as f64;
            cost / if rate > 0.0 { rate } else { mean }
        });
        least(turn, each)
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
