//! The way of p2p: prefill pushes to one decode instance, under a request id that names both. Whatever fails, a new pair with
//! a new id begins anew.

use std::time::Instant;

use super::super::config::Role;
use super::super::connector::{self, p2p, store};
use super::super::registry::Leg;
use super::super::reply::LocalReply;
use super::super::usage::Cached;
use super::leg::{Failure, Tried};
use super::{Attempts, Cause, HandOff, Served};

/// How a pair got on.
enum Pair {
    Done(Served),
    /// Worth another pair. Which instance of it failed, prefill's or decode's.
    Again(Served, Failure, u64, &'static str),
}

impl HandOff {
    /// Prefill, then the decode instance that has its KV.
    pub(super) async fn paired(
        &mut self,
        mut prefill: Leg,
        mut decode: Leg,
        limit: &'static str,
    ) -> Served {
        let mut attempts = Attempts::default();
        self.owner.pin();
        loop {
            let (p, d) = (prefill.instance.clone(), decode.instance.clone());
            self.wire_id = p2p::request_id(&p.address, &d.address);
            if self.wire_id.is_none() {
                let text = "the KV port of an instance is not known";
                return Served::local(LocalReply::error(503, text));
            }
            self.hold(&p, Some(&d));
            self.route.prefill = Some(p.clone());
            self.route.decode = Some(d.clone());
            let (last, failure, failed, leg) = match self.pair(prefill, decode, limit).await {
                Pair::Done(served) => return served,
                Pair::Again(served, failure, failed, leg) => (served, failure, failed, leg),
            };
            let cause = Cause::of(&last, failure);
            if !self.may_retry(&mut attempts, leg, cause) {
                return last;
            }
            attempts.tried.push(failed);
            // Its own place must not be what it waits for.
            self.place = None;
            let tried = &attempts.tried;
            prefill = match self.pick_again(Role::Prefill, tried, None).await {
                Some(leg) => leg,
                None => return last,
            };
            let with = Some(prefill.instance.as_ref());
            decode = match self.pick_again(Role::Decode, tried, with).await {
                Some(leg) => leg,
                None => return last,
            };
        }
    }

    async fn pair(&mut self, prefill: Leg, decode: Leg, limit: &'static str) -> Pair {
        let (p, d) = (prefill.instance.clone(), decode.instance.clone());
        let started = Instant::now();
        let body = self.splice(&connector::prefill_edits(limit));
        let reply = match self.prefill_once(prefill, &body, true, None).await {
            Ok(reply) => reply,
            Err(Tried::Again(served, failure)) => {
                return Pair::Again(served, failure, p.number, "prefill");
            }
            Err(Tried::Final(served)) => return Pair::Done(served),
            Err(Tried::Answer(answer)) => return Pair::Done(Served::Answer(answer)),
        };
        self.app.metrics.prefill.record(started.elapsed());
        self.app.metrics.handoffs.add();
        self.cached = self.told_counts(&reply).cached.map(Cached::Known);
        // From here on the KV lies at the decode instance and waits for this request.
        let body = if self.owner.is_gone() {
            self.splice(&connector::release_edits(limit))
        } else {
            store::decode_body(&self.job.body)
        };
        match self.decode_once(decode, &body).await {
            Tried::Answer(answer) if answer.head.status >= 300 => {
                self.release(&p, limit, None, Some(&d));
                Pair::Done(Served::Answer(answer))
            }
            Tried::Answer(_) if self.owner.is_gone() => {
                self.app.metrics.released.add();
                Pair::Done(Served::Gone)
            }
            Tried::Answer(answer) => Pair::Done(Served::Answer(answer)),
            // Its connection is closed, which ends it there.
            Tried::Final(served) => Pair::Done(served),
            Tried::Again(served, failure) => {
                // Whoever answered is alive and keeps the KV; whoever did not has lost it.
                if failure == Failure::Sent && matches!(served, Served::Answer(_)) {
                    self.release(&p, limit, None, Some(&d));
                }
                Pair::Again(served, failure, d.number, "decode")
            }
        }
    }
}
