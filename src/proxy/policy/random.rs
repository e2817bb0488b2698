//! `random`: any of them, by weight.

use std::sync::Arc;

use super::super::registry::Instance;
use super::{Ask, Choice, Policy};

#[derive(Debug)]
pub(super) struct Random;

impl Policy for Random {
    fn choose(&self, _: &Ask<'_>, candidates: &[Arc<Instance>]) -> Choice {
        let total: f64 = candidates.iter().map(|c| c.weight).sum();
        let mut point = rand::random::<f64>() * total;
        for (index, candidate) in candidates.iter().enumerate() {
            point -= candidate.weight;
            if point < 0.0 {
                return Choice::blind(index);
            }
        }
        Choice::blind(candidates.len().saturating_sub(1))
    }
}
