//! Taking a place at an instance: who may be asked, the policy's word, and waiting for one that is only busy.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::super::config::Role;
use super::super::policy::Ask;
use super::super::registry::{Instance, Leg};
use super::super::reply::LocalReply;
use super::HandOff;

/// How long one of several prompts waits for a prefill instance.
const BESIDE_PATIENCE: Duration = Duration::from_millis(500);
/// How long another try waits for instances that are only busy.
const AGAIN_PATIENCE: Duration = Duration::from_secs(2);
/// Who stands first in line looks again this often: nobody tells when a breaker's pause ends.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

impl HandOff {
    fn ask<'a>(&'a self, role: Role, with: Option<&'a Instance>) -> Ask<'a> {
        Ask {
            role,
            prompt: self.prompt(),
            tokens: self.tokens(),
            session: self.job.session,
            known: self.known(),
            from: with.filter(|_| role == Role::Decode),
        }
    }

    /// Takes a place at an instance, waiting in line for one that is only busy. `Ok(None)`: all were tried.
    ///
    /// `with`: who it must suit, for a decode leg its prefill instance.
    pub(super) async fn pick(
        &self,
        role: Role,
        tried: &[u64],
        with: Option<&Instance>,
    ) -> Result<Option<Leg>, LocalReply> {
        let app = &self.app;
        let patience = app.config.queue_timeout;
        let patience = if self.is_beside && self.part.is_some() {
            patience.min(BESIDE_PATIENCE)
        } else {
            patience
        };
        let deadline = tokio::time::Instant::now() + patience;
        let line = app.line(role);
        // A newcomer does not overtake who waits; what is tried again has waited already.
        let mut waiting = (tried.is_empty() && !line.is_empty())
            .then(|| line.join(self.job.claim, self.kin(role, with)));
        if let Some(waiting) = &waiting {
            let first = waiting.turn(std::future::pending());
            if tokio::time::timeout_at(deadline, first).await.is_err() {
                return Err(self.all_busy(role));
            }
        }
        loop {
            let changed = app.registry.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(leg) = self.take(role, tried, with) {
                if let Some(waiting) = waiting {
                    waiting.served();
                }
                return Ok(Some(leg));
            }
            if !tried.is_empty() {
                return Ok(None);
            }
            if !app.registry.serves(role) && !app.registry.expects(role) {
                if !self.is_beside {
                    app.metrics.refused_none.add();
                }
                let text = format!("no {} instance is available", role.name());
                return Err(LocalReply::later(503, &text, 2));
            }
            let waiting =
                waiting.get_or_insert_with(|| line.join(self.job.claim, self.kin(role, with)));
            waiting.found_nothing();
            let looks = async {
                let _ = tokio::time::timeout(LOOK_AGAIN, changed).await;
            };
            let turn = waiting.turn(looks);
            if tokio::time::timeout_at(deadline, turn).await.is_err() {
                return Err(self.all_busy(role));
            }
        }
    }

    /// The same for another try, which stands in no line. It waits a moment for those who are only busy: that may be with what
    /// is left of this very request, a leg that is being stopped or KV that is being let go.
    pub(super) async fn pick_again(
        &self,
        role: Role,
        tried: &[u64],
        with: Option<&Instance>,
    ) -> Option<Leg> {
        let patience = AGAIN_PATIENCE.min(self.app.config.queue_timeout);
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            let changed = self.app.registry.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(leg) = self.take(role, tried, with) {
                return Some(leg);
            }
            let all = self
                .app
                .registry
                .candidates(role, 0, with.and_then(group_of));
            let suits = |i: &Arc<Instance>| !tried.contains(&i.number) && self.is_alike(role, i);
            if !all.iter().any(suits) {
                return None;
            }
            tokio::time::timeout_at(deadline, changed).await.ok()?;
        }
    }

    fn all_busy(&self, role: Role) -> LocalReply {
        if !self.is_beside {
            self.app.metrics.refused_busy.add();
        }
        LocalReply::later(503, &format!("all {} instances are busy", role.name()), 1)
    }

    /// A place at one that is free now.
    fn take(&self, role: Role, tried: &[u64], with: Option<&Instance>) -> Option<Leg> {
        let app = &self.app;
        let group = with.and_then(group_of);
        let mut free = app
            .registry
            .candidates(role, app.config.instance_max, group);
        free.retain(|i| {
            !tried.contains(&i.number) && self.is_alike(role, i) && self.has_room(role, i, with)
        });
        let ask = self.ask(role, with);
        while !free.is_empty() {
            let choice = app.policy(role).choose(&ask, &free);
            let chosen = choice.place.min(free.len() - 1);
            let cached = choice.cached.min(ask.tokens);
            let tokens = match role {
                Role::Prefill => ask.tokens - cached,
                _ => 0,
            };
            if let Some(mut leg) = app.registry.enter(&free[chosen], role, tokens) {
                app.policy(role).routed(&ask, &leg.instance);
                leg.slower = choice.slower;
                let counts = &app.metrics.caches[usize::from(role == Role::Decode)];
                counts.query.add_all(ask.tokens);
                counts.matched.add_all(choice.matched.min(ask.tokens));
                counts.selected.add_all(cached);
                if role == Role::Prefill {
                    let metrics = &app.metrics;
                    metrics.tokens_routed.add_all(ask.tokens);
                    metrics.tokens_cached.add_all(ask.tokens - tokens);
                }
                let computes = role == Role::Prefill || app.config.aggregated;
                if computes && !leg.instance.tells_cached.load(Ordering::Relaxed) {
                    self.learn_tokens(&leg.instance);
                }
                return Some(leg);
            }
            // Its breaker has let another probe in meanwhile.
            free.remove(chosen);
        }
        None
    }

    /// Whether an instance speaks what this hand-off has begun with.
    fn is_alike(&self, role: Role, instance: &Instance) -> bool {
        let Some(alike) = self.alike.filter(|_| role == Role::Prefill) else {
            return true;
        };
        let kind = instance.link.read().kind;
        alike.suits(kind, &self.job.facts)
    }

    /// What a place must suit, as a number.
    fn kin(&self, role: Role, with: Option<&Instance>) -> u64 {
        let alike = self.alike.filter(|_| role == Role::Prefill);
        let alike = alike.map_or(0, |a| 1 + a.0.map_or(0, |kind| 1 + kind as u64));
        let Some(with) = with else { return alike };
        let pair = match self.app.config.pair_handoffs_max {
            0 => 0,
            _ => with.number + 1,
        };
        let seed = pair.wrapping_mul(16) + alike;
        xxhash_rust::xxh3::xxh3_64_with_seed(with.group.as_bytes(), seed)
    }

    /// Whether one more hand-off may begin there.
    fn has_room(&self, role: Role, instance: &Instance, with: Option<&Instance>) -> bool {
        let (config, handoffs) = (&self.app.config, &self.app.handoffs);
        let below = |max: usize, count: usize| max == 0 || count < max;
        match (role, with) {
            (Role::Prefill, _) if self.is_beside => true,
            (Role::Prefill, _) => below(config.handoffs_max, handoffs.of(instance.number)),
            (_, Some(prefill)) => {
                let count = || handoffs.of_pair(prefill.number, instance.number);
                config.pair_handoffs_max == 0 || below(config.pair_handoffs_max, count())
            }
            _ => true,
        }
    }
}

fn group_of(instance: &Instance) -> Option<&str> {
    Some(instance.group.as_str()).filter(|g| !g.is_empty())
}
