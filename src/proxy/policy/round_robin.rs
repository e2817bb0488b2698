//! `round_robin`: one after the other, whatever they are doing.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::registry::Instance;
use super::{Ask, Choice, Policy};

#[derive(Debug, Default)]
pub(super) struct RoundRobin {
    turn: AtomicUsize,
}

impl Policy for RoundRobin {
    fn choose(&self, _: &Ask<'_>, candidates: &[Arc<Instance>]) -> Choice {
        Choice::blind(self.turn.fetch_add(1, Ordering::Relaxed) % candidates.len().max(1))
    }
}
