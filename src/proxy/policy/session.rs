//! `session`: requests of one session go to one instance, by rendezvous hashing, as long as it is not overloaded. When an
//! instance comes or goes only its own sessions move. Requests without a session: `p2c`.

use std::sync::Arc;

use super::super::registry::Instance;
use super::{Ask, Choice, Policy, mix, p2c};

/// Most requests under way compared with the mean before a session moves on.
const OVERLOAD: f64 = 1.5;

#[derive(Debug)]
pub(super) struct Session;

impl Policy for Session {
    fn choose(&self, ask: &Ask<'_>, candidates: &[Arc<Instance>]) -> Choice {
        let Some(session) = ask.session else {
            return Choice::blind(p2c::pick(ask, candidates));
        };
        let total: usize = candidates.iter().map(|c| c.inflight(ask.role)).sum();
        let limit = (total as f64 / candidates.len().max(1) as f64 + 2.0) * OVERLOAD;
        let fits = |c: &Instance| c.inflight(ask.role) as f64 <= limit;
        let ranked = candidates.iter().enumerate().filter(|(_, c)| fits(c));
        let best = ranked
            .max_by_key(|(_, c)| mix(session ^ mix(xxhash_rust::xxh3::xxh3_64(c.name.as_bytes()))))
            .map_or(0, |(index, _)| index);
        Choice::blind(best)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{ask, registry};
    use super::*;
    use crate::proxy::config::Role;

    #[test]
    fn only_the_sessions_of_a_lost_instance_move() {
        let registry = registry(4);
        let all = registry.candidates(Role::Prefill, 0, None);
        let fewer: Vec<_> = all[1..].to_vec();
        for session in 0..200 {
            let ask = ask(b"", Some(mix(session)));
            let before = &all[Session.choose(&ask, &all).place];
            let after = &fewer[Session.choose(&ask, &fewer).place];
            assert!(before.number == after.number || before.number == all[0].number);
        }
    }
}
