//! `least_loaded`: who has the least under way, in tokens or streams, by the proxy's own exact count.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::registry::Instance;
use super::{Ask, Choice, Policy, least, load};

#[derive(Debug, Default)]
pub(super) struct LeastLoaded {
    turn: AtomicUsize,
}

impl Policy for LeastLoaded {
    fn choose(&self, ask: &Ask<'_>, candidates: &[Arc<Instance>]) -> Choice {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        Choice::blind(least(turn, candidates.iter().map(|c| load(c, ask.role))))
    }
}
