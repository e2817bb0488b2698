//! The way of mooncake's push and of SGLang: both legs at once, brought together by a transfer id or a room.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::super::config::{ConnectorKind, Role};
use super::super::connector::{self, mooncake, sglang};
use super::super::health;
use super::super::openai::PROMPTS_MAX;
use super::super::registry::{Instance, Leg, Link};
use super::super::reply::LocalReply;
use super::super::splice::Pieces;
use super::super::usage::Cached;
use super::leg::{Failure, Tried};
use super::{Attempts, Cause, HandOff, Owner, Served};

/// What is sent where.
struct Legs {
    prefill: Pieces,
    decode: Pieces,
    /// Of the prefill server, when it has several.
    rank: Option<u32>,
    /// What lets go of KV that prefill keeps after its reply; `None`: it keeps none.
    release: Option<Bytes>,
}

impl HandOff {
    /// Both legs at once.
    pub(super) async fn at_once(
        &mut self,
        mut prefill: Leg,
        mut decode: Leg,
        limit: &'static str,
    ) -> Served {
        let mut attempts = Attempts::default();
        self.owner.pin();
        loop {
            let numbers = (prefill.instance.number, decode.instance.number);
            let kept = prefill.instance.clone();
            self.hold(&kept, Some(&decode.instance));
            self.route.prefill = Some(kept.clone());
            self.route.decode = Some(decode.instance.clone());
            let (last, failure) = match self.push(prefill, decode, limit).await {
                Pushed::Done(served) | Pushed::Final(served) => return served,
                Pushed::Again(served, failure, role) => {
                    let is_prefill = role == Role::Prefill;
                    let number = if is_prefill { numbers.0 } else { numbers.1 };
                    attempts.tried.push(number);
                    (served, failure)
                }
            };
            let cause = Cause::of(&last, failure);
            if !self.may_retry(&mut attempts, "decode", cause) {
                return last;
            }
            // It may have restarted: decode fails then as long as its old engine id is used.
            health::find_bootstrap(&self.app, &kept).await;
            // Its own place must not be what it waits for.
            self.place = None;
            let tried = &attempts.tried;
            prefill = match self.pick_again(Role::Prefill, tried, Some(&kept)).await {
                Some(leg) => leg,
                None => return last,
            };
            // Others than those that have failed.
            let with = Some(prefill.instance.as_ref());
            decode = match self.pick_again(Role::Decode, tried, with).await {
                Some(leg) => leg,
                None => return last,
            };
        }
    }

    fn legs(&self, prefill: &Instance, limit: &'static str) -> Result<Legs, LocalReply> {
        let link = prefill.link.read().clone();
        match link.kind {
            Some(ConnectorKind::Sglang) => self.sglang(prefill, &link),
            _ => self.mooncake(prefill, &link, limit),
        }
    }

    fn mooncake(
        &self,
        prefill: &Instance,
        link: &Link,
        limit: &'static str,
    ) -> Result<Legs, LocalReply> {
        let engine = match prefill.address.rank {
            Some(rank) => link.engines.iter().find(|e| e.rank == rank),
            None => {
                let turn = prefill.turn.fetch_add(1, Ordering::Relaxed) as usize;
                link.engines.get(turn % link.engines.len().max(1))
            }
        };
        let unknown = || LocalReply::later(503, "the prefill engine is not known yet", 1);
        let engine = engine.ok_or_else(unknown)?;
        let transfer = format!(
            "xfer-{:016x}{:016x}",
            rand::random::<u64>(),
            rand::random::<u64>()
        );
        let mut edits = connector::prefill_edits(limit);
        edits.push(self.params_edit(mooncake::prefill_params(&transfer)));
        let host = &prefill.address.host;
        let params = mooncake::decode_params(&transfer, host, link.bootstrap_port, &engine.id);
        let edit = self.params_edit(params.clone());
        Ok(Legs {
            release: Some(params),
            prefill: self.splice(&edits),
            decode: self.splice(&[edit]),
            rank: (link.engines.len() > 1).then_some(engine.rank),
        })
    }

    fn sglang(&self, prefill: &Instance, link: &Link) -> Result<Legs, LocalReply> {
        let count = self.job.facts.count;
        if count.is_some_and(|count| count > PROMPTS_MAX) {
            let text = format!("a list of prompts must be valid and have at most {PROMPTS_MAX}");
            return Err(LocalReply::error(400, &text));
        }
        let port = match link.bootstrap_port {
            0 => prefill.address.bootstrap.unwrap_or(sglang::BOOTSTRAP_PORT),
            port => port,
        };
        let host = &prefill.address.host;
        let rank = prefill.address.rank;
        let body = self.splice(&sglang::edits(host, port, count, rank, link.ranks));
        Ok(Legs {
            prefill: body.clone(),
            decode: body,
            rank: None,
            // Its reply comes when the KV has arrived.
            release: None,
        })
    }

    async fn push(&mut self, prefill: Leg, decode: Leg, limit: &'static str) -> Pushed {
        let legs = match self.legs(&prefill.instance, limit) {
            Ok(legs) => legs,
            Err(reply) => return Pushed::Final(Served::local(reply)),
        };
        // Its usage may come after decode has begun to answer.
        let (tell, told) = oneshot::channel();
        self.cached = Some(Cached::Late(told));
        let mut other = self.beside();
        // Prefill is told to stop when the client leaves, and when decode refuses.
        let (client, own) = (self.owner.clone(), Arc::new(Owner::default()));
        other.owner = own.clone();
        let (from, body, rank) = (prefill.instance.clone(), legs.prefill, legs.rank);
        let started = Instant::now();
        let app = self.app.clone();
        let stop = own.clone();
        let mut prefilling = Box::pin(async move {
            let once = other.prefill_once(prefill, &body, true, rank);
            tokio::pin!(once);
            let result = tokio::select! {
                result = &mut once => result,
                () = client.left() => {
                    stop.leave();
                    once.await
                }
            };
            app.metrics.prefill.record(started.elapsed());
            let told = result.as_deref().ok().map(|reply| other.told_counts(reply));
            if let Some(count) = told.and_then(|told| told.cached) {
                let _ = tell.send(count);
            }
            result
        });
        let decoding = self.decode_once(decode, &legs.decode);
        tokio::pin!(decoding);
        tokio::select! {
            prefilled = &mut prefilling => match prefilled {
                Ok(_) => {
                    self.app.metrics.handoffs.add();
                    let decoded = self.decoded(decoding.await);
                    if let Some(params) = legs.release.filter(|_| decoded.is_refusal()) {
                        self.release(&from, limit, Some(&params), None);
                    }
                    decoded
                }
                // Decode waits for KV that will not come: dropping it tells it so.
                Err(Tried::Again(served, failure)) => {
                    Pushed::Again(served, failure, Role::Prefill)
                }
                Err(Tried::Final(served)) => Pushed::Final(served),
                Err(Tried::Answer(answer)) => Pushed::Done(Served::Answer(answer)),
            },
            decoded = &mut decoding => {
                let fine = matches!(&decoded, Tried::Answer(a) if a.head.status < 300);
                if fine {
                    // The push is done; prefill's reply follows and is read by the proxy, whatever the client does.
                    self.app.metrics.handoffs.add();
                    tokio::spawn(prefilling);
                    return self.decoded(decoded);
                }
                // Prefill stops, or was done already and keeps what nobody will fetch.
                own.leave();
                let (other, release) = (self.beside(), legs.release.clone());
                tokio::spawn(async move {
                    let _busy = other.app.releasing();
                    if let (Ok(_), Some(params)) = (prefilling.await, release) {
                        other.release(&from, limit, Some(&params), None);
                    }
                });
                self.decoded(decoded)
            }
        }
    }

    fn decoded(&self, tried: Tried) -> Pushed {
        match tried {
            Tried::Answer(answer) if self.owner.is_gone() && answer.head.status < 300 => {
                self.app.metrics.released.add();
                Pushed::Done(Served::Gone)
            }
            Tried::Answer(answer) => Pushed::Done(Served::Answer(answer)),
            Tried::Again(served, failure) => Pushed::Again(served, failure, Role::Decode),
            Tried::Final(served) => Pushed::Final(served),
        }
    }
}

enum Pushed {
    Done(Served),
    /// And whose leg has failed.
    Again(Served, Failure, Role),
    Final(Served),
}

impl Pushed {
    /// Decode has not fetched anything.
    fn is_refusal(&self) -> bool {
        match self {
            Self::Done(served) => served.is_refusal(),
            Self::Again(..) | Self::Final(_) => true,
        }
    }
}
