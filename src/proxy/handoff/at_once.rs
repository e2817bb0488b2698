//! The way of mooncake's push: both legs at once under a new transfer id.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::super::config::Role;
use super::super::connector::{self, mooncake};
use super::super::registry::Leg;
use super::super::reply::LocalReply;
use super::leg::Tried;
use super::{Attempts, HandOff, Route, Served};

impl HandOff {
    /// Both legs at once: mooncake's push.
    pub(super) async fn at_once(
        &mut self,
        mut prefill: Leg,
        mut decode: Leg,
        limit: &'static str,
    ) -> Served {
        let mut attempts = Attempts::default();
        self.owner.pin();
        loop {
            attempts.tried.push(decode.instance.number);
            let kept = prefill.instance.clone();
            self.hold(&kept, Some(&decode.instance));
            self.route.prefill = Some(kept.clone());
            self.route.decode = Some(decode.instance.clone());
            let (last, again) = match self.push(prefill, decode, limit).await {
                Pushed::Done(served) => return served,
                Pushed::Again(served) => (served, true),
                Pushed::Final(served) => (served, false),
            };
            if !again || !self.may_retry(&mut attempts, "decode") {
                return last;
            }
            prefill = match self.pick(Role::Prefill, &[], Some(&kept)).await {
                Ok(Some(leg)) => leg,
                _ => return last,
            };
            // Another decode instance if there is one; else the same may have been only briefly busy.
            decode = match self
                .pick(Role::Decode, &attempts.tried, Some(&prefill.instance))
                .await
            {
                Ok(Some(leg)) => leg,
                _ => return last,
            };
        }
    }

    async fn push(&self, prefill: Leg, decode: Leg, limit: &'static str) -> Pushed {
        let link = prefill.instance.link.read().clone();
        let turn = prefill.instance.turn.fetch_add(1, Ordering::Relaxed) as usize;
        let Some(engine) = link.engines.get(turn % link.engines.len().max(1)).cloned() else {
            return Pushed::Final(Served::local(LocalReply::later(
                503,
                "the prefill engine is not known yet",
                1,
            )));
        };
        let transfer = format!(
            "xfer-{:016x}{:016x}",
            rand::random::<u64>(),
            rand::random::<u64>()
        );
        let mut edits = connector::prefill_edits(limit);
        edits.push(mooncake::prefill_edit(&transfer));
        let prefill_body = self.splice(&edits);
        let host = prefill.instance.address.host.clone();
        let edit = mooncake::decode_edit(&transfer, &host, link.bootstrap_port, &engine.id);
        let decode_body = self.splice(&[edit]);
        let other = Self {
            app: self.app.clone(),
            job: self.job.clone(),
            owner: self.owner.clone(),
            route: Route::default(),
            cached: None,
            place: None,
        };
        let rank = (link.engines.len() > 1).then_some(engine.rank);
        let started = Instant::now();
        let app = self.app.clone();
        let mut prefilling = Box::pin(async move {
            let result = other.prefill_once(prefill, &prefill_body, true, rank).await;
            app.metrics.prefill.record(started.elapsed());
            result
        });
        let decoding = self.decode_once(decode, &decode_body);
        tokio::pin!(decoding);
        tokio::select! {
            prefilled = &mut prefilling => match prefilled {
                Ok(_) => {
                    self.app.metrics.handoffs.add();
                    self.decoded(decoding.await, true)
                }
                // Decode waits for KV that will not come: dropping it tells it so.
                Err(Tried::Again(served, _)) => Pushed::Again(served),
                Err(Tried::Final(served)) => Pushed::Final(served),
                Err(Tried::Answer(answer)) => Pushed::Done(Served::Answer(answer)),
            },
            decoded = &mut decoding => {
                let fine = matches!(&decoded, Tried::Answer(a) if a.head.status < 300);
                if fine {
                    // The push is done; prefill's reply follows and is read by the proxy, whatever the client does.
                    self.app.metrics.handoffs.add();
                    tokio::spawn(prefilling);
                }
                self.decoded(decoded, false)
            }
        }
    }

    fn decoded(&self, tried: Tried, prefilled: bool) -> Pushed {
        match tried {
            Tried::Answer(_) if self.owner.is_gone() => {
                self.app.metrics.released.add();
                Pushed::Done(Served::Gone)
            }
            Tried::Answer(answer) => Pushed::Done(Served::Answer(answer)),
            Tried::Again(served, _) => {
                if prefilled {
                    self.app.metrics.orphans.add();
                }
                Pushed::Again(served)
            }
            Tried::Final(served) => {
                if prefilled {
                    self.app.metrics.orphans.add();
                }
                Pushed::Final(served)
            }
        }
    }
}

enum Pushed {
    Done(Served),
    Again(Served),
    Final(Served),
}
