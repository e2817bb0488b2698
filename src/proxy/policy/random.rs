//! `random`: any of them, by weight.

use std::sync::Arc;

use super::super::registry::Instance;
use super::{Ask, Policy};

#[derive(Debug)]
pub(super) struct Random;

impl Policy for Random {
    fn choose(&self, _: &Ask<'_>, candidates: &[Arc<Instance>]) -> usize {
        let total: f64 = candidates.iter().map(|c| c.weight).sum();
        let mut point = rand::random::<f64>() * total;
        for (index, candidate) in candidates.iter().enumerate() {
            point -= candidate.weight;
            if point < 0.0 {
                return index;
            }
        }
        candidates.len().saturating_sub(1)
    }
}
