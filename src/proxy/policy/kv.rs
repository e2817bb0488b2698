//! `kv`: who has most of the prompt cached, by what the instances themselves say (their KV events), weighed against what
//! they have to do.
//!
//! The prompt's own tokens decide where they are known. What was routed a moment ago and is not in the events yet counts
//! as cached for a short time. Of instances without events, and of texts whose tokens are not known, what was routed counts
//! as with `prefix`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use smallvec::SmallVec;

use super::super::kv::Kv as Knowledge;
use super::super::kv::worth::Weights;
use super::super::registry::Instance;
use super::prefix_index::PrefixIndex;
use super::weigh::costs;
use super::{Ask, Choice, Policy, least};

/// How long a routed prompt counts as cached without an event that says so.
const SPECULATION: Duration = Duration::from_secs(4);

pub(super) struct Kv {
    knowledge: Arc<Knowledge>,
    recent: PrefixIndex,
    routed: PrefixIndex,
    turn: AtomicUsize,
}

impl Kv {
    pub(super) fn new(knowledge: &Arc<Knowledge>) -> Self {
        Self {
            knowledge: knowledge.clone(),
            recent: PrefixIndex::lasting(SPECULATION),
            routed: PrefixIndex::default(),
            turn: AtomicUsize::new(0),
        }
    }

    /// Tokens, as the ask counts them, that each instance need not compute.
    fn saved(
        &self,
        ask: &Ask<'_>,
        instances: &[Arc<Instance>],
        weights: &Weights,
    ) -> SmallVec<[f64; 8]> {
        let by_event = match ask.known {
            Some(known) => {
                let numbers: SmallVec<[u64; 8]> = instances.iter().map(|i| i.number).collect();
                let bytes = known.bytes as f64 / known.tokens.max(1) as f64;
                let mut saved =
                    self.knowledge
                        .index
                        .saved(&known.chain, known.tokens, &numbers, weights);
                saved
                    .iter_mut()
                    .for_each(|s| *s *= bytes * ask.tokens_per_byte());
                saved
            }
            None => SmallVec::from_elem(0.0, instances.len()),
        };
        let recent = self.recent.matched(ask.prompt, instances);
        let routed = self.routed.matched(ask.prompt, instances);
        let known = ask.known.map_or(0, |k| k.bytes);
        let bytes = instances.iter().zip(recent.iter().zip(&routed));
        by_event
            .iter()
            .zip(bytes)
            .map(|(saved, (instance, (recent, routed)))| {
                // Events have the last word on what they can be asked about; without its beginning the rest is worth nothing.
                let is_lost = *saved < weights.least() * ask.tokens_of(known);
                let is_told = instance.feed.is_live() && (known >= *routed || is_lost);
                let bytes = if is_told { recent } else { routed };
                saved.max(ask.tokens_of(*bytes))
            })
            .collect()
    }
}

impl Policy for Kv {
    fn choose(&self, ask: &Ask<'_>, candidates: &[Arc<Instance>]) -> Choice {
        let weights = self.knowledge.worth.weights();
        let saved = self.saved(ask, candidates, &weights);
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let costs = costs(ask, candidates, &saved, &self.routed);
        let each = candidates.iter().zip(costs);
        let place = least(turn, each.map(|(c, cost)| cost / c.weight));
        let mut choice = Choice::of(place, &saved);
        if let Some(known) = ask.known {
            let index = &self.knowledge.index;
            let number = candidates[place].number;
            choice.slower = index.slower(&known.chain, known.tokens, number, &weights);
        }
        choice
    }

    fn routed(&self, ask: &Ask<'_>, instance: &Instance) {
        self.routed.insert(ask, instance);
        if instance.feed.is_live() {
            self.recent.insert(ask, instance);
        }
    }

    fn forget(&self, number: u64) {
        self.recent.forget(number);
        self.routed.forget(number);
    }
}
