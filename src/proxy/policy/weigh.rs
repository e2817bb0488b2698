//! What it costs to have a prompt computed at an instance, in tokens: what is under way there, what is not cached there, and
//! what that pushes out of its cache.
//!
//! Owns the weights, which `prefix`, `kv` and `cost` share. They come from simulations: conversations that come round, of many
//! kinds, a recorded trace; two to eight instances; caches that hold all, most, half or a quarter of it.

use std::sync::Arc;

use smallvec::SmallVec;

use super::super::config::Role;
use super::super::registry::Instance;
use super::prefix_index::PrefixIndex;
use super::{Ask, streams, tokens};

/// What a stream under way is worth in prompt tokens when decode instances are compared.
const TOKENS_PER_STREAM: f64 = 128.0;

/// What a token to be computed counts beside one that others must wait for anyway. It costs more than this prompt's time: those
/// who come next wait for it too. With 1, a busy moment moves conversations about, and each move makes others move.
const COMPUTED: f64 = 4.0;

/// What a token counts that goes into a full cache where everything pushed out would have been asked for again.
const PUSHED_OUT: f64 = 4.0;
/// The same where waiting costs nothing.
const PUSHED_OUT_IDLE: f64 = 12.0;
/// How much of that counts at the second instance. At the first nothing does, at the last all of it.
const KEPT: f64 = 0.3;
/// From this share on a token that waits is a token that delays.
const WAITING: f64 = 0.4;

/// Tokens under way there.
fn queued(ask: &Ask<'_>, instance: &Instance) -> f64 {
    match ask.role {
        Role::Decode => streams(instance) * TOKENS_PER_STREAM,
        _ => tokens(instance),
    }
}

/// What it costs each of the candidates. `saved`: tokens that each need not compute; `index`: what they were sent.
pub(super) fn costs(
    ask: &Ask<'_>,
    candidates: &[Arc<Instance>],
    saved: &[f64],
    index: &PrefixIndex,
) -> SmallVec<[f64; 8]> {
    let left = |saved: f64| (ask.tokens as f64 - saved).max(0.0);
    let each = candidates.iter().zip(saved);
    if ask.role == Role::Decode {
        // A decode instance computes nothing of it.
        return each.map(|(c, s)| queued(ask, c) + left(*s)).collect();
    }
    let anywhere = saved.iter().map(|s| left(*s)).fold(f64::INFINITY, f64::min);
    let weight = pushed_out(candidates);
    let last = (candidates.len() - 1).max(1) as f64;
    let wanted = index.wanted(candidates);
    let places = each.zip(wanted).enumerate();
    places
        .map(|(place, ((instance, saved), wanted))| {
            let computed = left(*saved);
            // When caches are full, what has to be computed wherever it goes pushes out what would have been asked for again,
            // and that then pushes out others: with caches a little too small everybody loses everything. So it goes where
            // the caches are worth least by now; among equals the first is given up, and the others keep what they have.
            let kept = match place {
                0 => 0.0,
                _ => KEPT + (1.0 - KEPT) * place as f64 / last,
            };
            let lost = wanted * (kept * weight * anywhere + PUSHED_OUT * (computed - anywhere));
            queued(ask, instance) + COMPUTED * computed + lost
        })
        .collect()
}

/// What a token pushed out counts: the less waiting costs, the longer the line may be at the instance that is given up.
fn pushed_out(candidates: &[Arc<Instance>]) -> f64 {
    let shares = candidates
        .iter()
        .map(|c| c.pace.fit().map_or(1.0, |f| f.waiting));
    let mean = shares.sum::<f64>() / candidates.len().max(1) as f64;
    let share = (mean / WAITING).min(1.0);
    PUSHED_OUT_IDLE + (PUSHED_OUT - PUSHED_OUT_IDLE) * share
}
