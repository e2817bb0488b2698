//! The way of store and nixl: prefill to its end, then decode, and what becomes of parameters that serve only once.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use super::super::config::{ConnectorKind, Role};
use super::super::connector::{self, nixl};
use super::super::registry::{Health, Instance, Leg};
use super::super::reply::LocalReply;
use super::super::usage::Cached;
use super::leg::{Failure, Tried};
use super::{Attempts, Cause, HandOff, Served};

impl HandOff {
    /// Prefill, then decode: store and nixl, and instances of which neither is known yet.
    pub(super) async fn one_after_the_other(
        &mut self,
        mut prefill: Leg,
        mut decode: Leg,
        limit: &'static str,
    ) -> Served {
        // Once more from the beginning when decode refused parameters that serve only once.
        for _ in 0..2 {
            let started = Instant::now();
            let (params, from) = match self.prefill(prefill, limit).await {
                Ok(done) => done,
                Err(served) => return served,
            };
            self.app.metrics.prefill.record(started.elapsed());
            self.route.prefill = Some(from.clone());
            self.hold(&from, Some(&decode.instance));
            if params.is_none() && self.owner.is_gone() {
                return Served::Gone;
            }
            let Some(params) = params else {
                decode = match self.begin(decode, &from, started) {
                    Ok(early) => return early,
                    Err(leg) => leg,
                };
                decode = match self.still_usable(decode, &from).await {
                    Ok(leg) => leg,
                    Err(served) => return served,
                };
                self.wait_for_pool(&from, started).await;
                self.resumable = true;
                let body = self.splice(&self.untold_edits());
                let served = self.decode(decode, &body, false).await.0;
                return self.with_prompt_part(served).await;
            };
            self.app.metrics.handoffs.add();
            decode = match self.still_usable(decode, &from).await {
                Ok(leg) => leg,
                Err(served) => {
                    self.release(&from, limit, Some(&params), None);
                    return served;
                }
            };
            let body = self.with_params(params.clone(), limit);
            let (mut served, failure) = self.decode(decode, &body, true).await;
            let Some(failure) = failure else {
                if served.is_refusal() {
                    self.release(&from, limit, Some(&params), None);
                }
                return self.with_prompt_part(served).await;
            };
            // The parameters may have been used up: the prompt is computed again, once.
            let cause = Cause::of(&served, failure);
            let again = failure == Failure::Sent
                && self.may_retry(&mut Attempts::default(), "prefill", cause);
            self.release(&from, limit, Some(&params), None);
            if !again {
                return served;
            }
            // Its own places must not be what it waits for.
            self.place = None;
            served.leave();
            prefill = match self.pick(Role::Prefill, &[], None).await {
                Ok(Some(leg)) => leg,
                _ => return served,
            };
            self.hold(&prefill.instance, None);
            decode = match self.pick(Role::Decode, &[], Some(&prefill.instance)).await {
                Ok(Some(leg)) => leg,
                _ => return served,
            };
        }
        Served::local(LocalReply::error(502, "the hand-off to decode failed"))
    }

    /// The decode instance chosen before prefill, or another when that one has left meanwhile.
    pub(super) async fn still_usable(&self, leg: Leg, prefill: &Instance) -> Result<Leg, Served> {
        let i = &leg.instance;
        let registered = self
            .app
            .registry
            .find(&i.address)
            .is_some_and(|r| Arc::ptr_eq(&r, i));
        if registered && i.health() == Health::Up {
            return Ok(leg);
        }
        drop(leg);
        match self.pick(Role::Decode, &[], Some(prefill)).await {
            Ok(Some(leg)) => Ok(leg),
            Ok(None) => Err(Served::local(LocalReply::later(
                503,
                "no decode instance is available",
                2,
            ))),
            Err(reply) => Err(Served::local(reply)),
        }
    }

    /// The prefill leg with its retries: the parameters it gave, if any, and who computed it.
    pub(super) async fn prefill(
        &mut self,
        mut leg: Leg,
        limit: &'static str,
    ) -> Result<(Option<Bytes>, Arc<Instance>), Served> {
        let mut attempts = Attempts::default();
        loop {
            let instance = leg.instance.clone();
            attempts.tried.push(instance.number);
            let (kind, generation) = {
                let link = instance.link.read();
                (link.kind, link.generation)
            };
            let mut edits = connector::prefill_edits(limit);
            self.prompt_edits(kind, &mut edits);
            self.token_edits(kind, &mut edits);
            // Of an instance that is not known yet the reply tells: with parameters it is nixl, without store.
            let pins = kind != Some(ConnectorKind::Store);
            if pins {
                self.owner.pin();
                edits.push(self.params_edit(nixl::prefill_params()));
            }
            let body = self.splice(&edits);
            let uncached = leg.tokens();
            let (last, failure) = match self.prefill_once(leg, &body, pins, None).await {
                Ok(reply) => {
                    let reply = Bytes::from(reply);
                    let params = pins.then(|| nixl::params(&reply)).flatten();
                    self.told = self.prompt_part(&reply);
                    self.first_token(&reply);
                    let told = self.told_counts(&reply);
                    self.cached = told.cached.map(Cached::Known);
                    self.learn_if_wrong(&instance, uncached, told);
                    if kind.is_none() && !self.owner.is_gone() {
                        let found = if params.is_some() {
                            ConnectorKind::Nixl
                        } else {
                            ConnectorKind::Store
                        };
                        let mut link = instance.link.write();
                        // It may have been restarted, or have been asked meanwhile.
                        if link.kind.is_none() && link.generation == generation {
                            link.kind = Some(found);
                            tracing::info!(instance = %instance.name, connector = found.name(), "connector found out");
                        }
                    }
                    return Ok((params, instance));
                }
                Err(Tried::Again(served, failure)) => (served, failure),
                Err(Tried::Final(served)) => return Err(served),
                Err(Tried::Answer(answer)) => return Err(Served::Answer(answer)),
            };
            let cause = Cause::of(&last, failure);
            if !self.may_retry(&mut attempts, "prefill", cause) {
                return Err(last);
            }
            leg = match self
                .pick(Role::Prefill, &attempts.tried, Some(&instance))
                .await
            {
                Ok(Some(leg)) => leg,
                _ => return Err(last),
            };
            if self.place.is_some() {
                self.hold(&leg.instance, None);
            }
        }
    }
}
