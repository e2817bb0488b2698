//! Which segments get the replicas of a new object: an order of candidates per strategy. Distinct nodes come first; the
//! allocation itself is the caller's.

use std::sync::Arc;

use rand::seq::SliceRandom;

use super::segments::{SegmentState, SegmentsView};
use crate::base::clock::Millis;

/// How candidates are ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlacementStrategy {
    /// Uniformly, weighted by nothing.
    Random,
    /// Largest share of free space first.
    FreeRatioFirst,
    /// The writer's own host first, then by free space.
    LocalFirst,
}

impl PlacementStrategy {
    /// The names, for settings (upstream's spellings).
    pub const NAMES: &'static [&'static str] = &["random", "free_ratio_first", "local_first"];

    /// By name; an unknown one is `Random` (settings have been checked).
    pub fn by_name(name: &str) -> Self {
        match name {
            "free_ratio_first" => Self::FreeRatioFirst,
            "local_first" => Self::LocalFirst,
            _ => Self::Random,
        }
    }
}

/// Candidates in order of preference: named segments, then the strategy's order; suspects last.
pub(crate) fn candidates(
    view: &SegmentsView,
    strategy: PlacementStrategy,
    preferred: &[String],
    host_id: &str,
    now: Millis,
) -> Vec<Arc<SegmentState>> {
    let mut all: Vec<Arc<SegmentState>> = view
        .iter()
        .flatten()
        .filter(|s| s.placeable())
        .cloned()
        .collect();
    all.shuffle(&mut rand::rng());
    let free_permille = |s: &SegmentState| {
        let allocator = s.allocator.lock();
        (allocator.size() - allocator.used()) * 1000 / allocator.size().max(1)
    };
    match strategy {
        PlacementStrategy::Random => {}
        PlacementStrategy::FreeRatioFirst => all.sort_by_cached_key(|s| 1000 - free_permille(s)),
        PlacementStrategy::LocalFirst => all.sort_by_cached_key(|s| {
            let elsewhere = host_id.is_empty() || s.node.host_id != host_id;
            (elsewhere, 1000 - free_permille(s))
        }),
    }
    let wanted = |s: &SegmentState| {
        let by_name = preferred
            .iter()
            .position(|p| *p == s.name || *p == s.node.name);
        by_name.unwrap_or(preferred.len())
    };
    all.sort_by_key(|s| (s.node.suspect(now), wanted(s)));
    all
}
