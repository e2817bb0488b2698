//! `p2c`: the less loaded of two taken at random. Many proxies that do not know of each other do not run after one idle
//! instance together.

use std::sync::Arc;

use super::super::registry::Instance;
use super::{Ask, Choice, Policy, load};

#[derive(Debug)]
pub(super) struct PowerOfTwo;

pub(super) fn pick(ask: &Ask<'_>, candidates: &[Arc<Instance>]) -> usize {
    let count = candidates.len() as u64;
    if count < 2 {
        return 0;
    }
    let roll = rand::random::<u64>();
    let one = (roll >> 32) % count;
    let two = (one + 1 + (roll & 0xFFFF_FFFF) % (count - 1)) % count;
    let (one, two) = (one as usize, two as usize);
    if load(&candidates[two], ask.role) < load(&candidates[one], ask.role) {
        two
    } else {
        one
    }
}

impl Policy for PowerOfTwo {
    fn choose(&self, ask: &Ask<'_>, candidates: &[Arc<Instance>]) -> Choice {
        Choice::blind(pick(ask, candidates))
    }
}
