//! One leg: a request sent to a worker, and what its answer, its silence or its error means.

use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::time::timeout;

use super::super::config::Role;
use super::super::http::head::ReplyHead;
use super::super::http::upstream::{LegError, UpstreamConn};
use super::super::registry::{Instance, Leg};
use super::super::reply::LocalReply;
use super::{Answer, Attempts, Cause, HandOff, Route, Served};

/// How long the release of a hand-off may take once its client has gone.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest prefill reply that is kept to be read.
const PREFILL_REPLY_MAX: usize = 16 << 20;
/// The same where nothing but its usage is wanted.
const USAGE_REPLY_MAX: usize = 64 << 10;

/// What one try of a leg came to.
pub(super) enum Tried {
    Answer(Box<Answer>),
    /// Worth trying elsewhere; what the client gets if that is not possible.
    Again(Served, Failure),
    Final(Served),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The worker never had the request.
    NotSent,
    /// It had it, and refused or broke off.
    Sent,
}

/// Carries a request out up to the first byte of its answer.
impl HandOff {
    /// One prefill leg: its reply's body. With `pins` a client that leaves is passed on as a half-close.
    pub(super) async fn prefill_once(
        &self,
        mut leg: Leg,
        body: &[Bytes],
        pins: bool,
        rank: Option<u32>,
    ) -> Result<Vec<u8>, Tried> {
        let started = Instant::now();
        let instance = leg.instance.clone();
        let within = self.app.config.prefill_timeout;
        let exchange = async {
            let head = self.head(&instance, body, rank);
            let (mut conn, mut reply) = if pins {
                let mut conn = instance.pool.send(&instance.target, &head, body).await?;
                let reply = tokio::select! {
                    reply = conn.reply(false) => reply?,
                    () = self.owner.left() => {
                        conn.half_close().await;
                        timeout(RELEASE_TIMEOUT, conn.reply(false)).await.map_err(|_| LegError::Timeout)??
                    }
                };
                (conn, reply)
            } else {
                instance
                    .pool
                    .ask(&instance.target, &head, body, false)
                    .await?
            };
            if reply.status < 200 {
                return Err(LegError::Malformed);
            }
            if reply.status >= 300 {
                return Ok((conn, reply, Vec::new()));
            }
            let mut kept = Vec::new();
            let kept_max = if pins || self.asks_of_prompt() || self.wish.is_some() {
                PREFILL_REPLY_MAX
            } else {
                USAGE_REPLY_MAX
            };
            tokio::select! {
                done = conn.read_body(&mut reply.body, &mut kept, kept_max) => done?,
                () = self.owner.left(), if pins => {
                    conn.half_close().await;
                    timeout(RELEASE_TIMEOUT, conn.read_body(&mut reply.body, &mut kept, kept_max))
                        .await
                        .map_err(|_| LegError::Timeout)??;
                }
            }
            Ok((conn, reply, kept))
        };
        let result = timeout(within, exchange)
            .await
            .unwrap_or(Err(LegError::Timeout));
        match result {
            Err(_) if self.owner.is_gone() => Err(Tried::Final(Served::Gone)),
            Ok((conn, reply, kept)) if reply.status < 300 => {
                leg.succeeded();
                leg.computed(started.elapsed(), &self.app.kv.worth);
                if reply.keep_alive && !self.owner.is_gone() {
                    instance.pool.give(conn);
                }
                Ok(kept)
            }
            Ok((conn, head, _)) => Err(self.judge(leg, conn, head)),
            Err(error) => Err(self.failed(leg, &error)),
        }
    }

    /// What an answer that is no success means.
    pub(super) fn judge(&self, mut leg: Leg, conn: UpstreamConn, head: ReplyHead) -> Tried {
        let status = head.status;
        match status {
            500.. => leg.failed(&format!("HTTP {status}")),
            429 => {}
            _ => leg.succeeded(),
        }
        let decode = leg.is_decode();
        let answer = Box::new(Answer {
            conn,
            head,
            leg,
            route: Route::default(),
            _place: None,
            cached: None,
            mask: None,
            resume: None,
        });
        match status {
            429 | 502..=504 => Tried::Again(Served::Answer(answer), Failure::Sent),
            500.. if decode => Tried::Again(Served::Answer(answer), Failure::Sent),
            _ => Tried::Answer(answer),
        }
    }

    pub(super) fn failed(&self, mut leg: Leg, error: &LegError) -> Tried {
        leg.failed(error);
        let role = if leg.is_decode() { "decode" } else { "prefill" };
        let served = |status, what: &str| {
            Served::local(LocalReply::error(
                status,
                &format!("the {role} instance {what}"),
            ))
        };
        match error {
            LegError::Connect(_) => {
                leg.instance.pool.clear();
                Tried::Again(served(502, "cannot be reached"), Failure::NotSent)
            }
            LegError::Lost(_) => {
                leg.instance.pool.clear();
                Tried::Again(served(502, "broke off before it answered"), Failure::Sent)
            }
            LegError::Malformed => {
                Tried::Again(served(502, "gave no valid HTTP answer"), Failure::Sent)
            }
            // It may still be computing: trying elsewhere would only add load.
            LegError::Timeout => Tried::Final(served(504, "did not answer in time")),
        }
    }

    /// The decode leg with its retries up to the first byte of its body. `pinned`: parameters serve only once.
    pub(super) async fn decode(
        &mut self,
        mut leg: Leg,
        body: &[Bytes],
        pinned: bool,
    ) -> (Served, Option<Failure>) {
        let mut attempts = Attempts::default();
        loop {
            let instance = leg.instance.clone();
            attempts.tried.push(instance.number);
            self.route.decode = Some(instance.clone());
            let started = Instant::now();
            let (last, failure) = match self.decode_once(leg, body).await {
                // A refusal has fetched nothing: it comes back as an answer, and the KV is released.
                Tried::Answer(answer) if self.owner.is_gone() && answer.head.status < 300 => {
                    // The first byte is here, so the KV has been fetched: closing is all that is left to do.
                    self.app.metrics.released.add();
                    return (Served::Gone, None);
                }
                Tried::Answer(answer) => {
                    // Without a stream the first byte comes when everything has been generated: that says nothing of the link.
                    if let Some(prefill) = &self.route.prefill
                        && answer.head.status < 300
                        && self.job.facts.stream
                    {
                        let tokens = self.tokens();
                        prefill
                            .links
                            .learn(instance.number, tokens, started.elapsed());
                    }
                    return (Served::Answer(answer), None);
                }
                Tried::Final(served) => return (served, None),
                Tried::Again(served, failure) => (served, failure),
            };
            let elsewhere = !pinned || failure == Failure::NotSent;
            // A hand-off whose client has gone is still tried elsewhere: it is the KV that must be released.
            let releasing = pinned && self.owner.is_gone() && attempts.tried.len() <= 2;
            if !elsewhere
                || !(releasing
                    || self.may_retry(&mut attempts, "decode", Cause::of(&last, failure)))
            {
                return (last, Some(failure));
            }
            let with = self.route.prefill.clone().unwrap_or(instance);
            leg = match self.pick(Role::Decode, &attempts.tried, Some(&with)).await {
                Ok(Some(leg)) => leg,
                _ => return (last, Some(failure)),
            };
        }
    }

    pub(super) async fn decode_once(&self, leg: Leg, body: &[Bytes]) -> Tried {
        let instance = leg.instance.clone();
        let exchange = async {
            let head = self.head(&instance, body, None);
            let bodiless = self.job.method == "HEAD";
            let (mut conn, reply) = instance
                .pool
                .ask(&instance.target, &head, body, bodiless)
                .await?;
            if reply.status < 200 && !self.job.upgrades {
                return Err(LegError::Malformed);
            }
            if reply.status < 300 {
                conn.first_byte(&reply.body).await?;
            }
            Ok((conn, reply))
        };
        let result = timeout(self.app.config.first_token_timeout, exchange)
            .await
            .unwrap_or(Err(LegError::Timeout));
        match result {
            Ok((conn, head)) if head.status < 300 => {
                let mut leg = leg;
                leg.forget_tokens();
                if !self.is_begun {
                    self.app.metrics.ttft.record(self.job.arrived.elapsed());
                }
                Tried::Answer(Box::new(Answer {
                    conn,
                    head,
                    leg,
                    route: Route::default(),
                    _place: None,
                    cached: None,
                    mask: None,
                    resume: None,
                }))
            }
            Ok((conn, head)) => self.judge(leg, conn, head),
            Err(error) => self.failed(leg, &error),
        }
    }

    /// The head of this request for a worker.
    pub(super) fn head(&self, instance: &Instance, body: &[Bytes], rank: Option<u32>) -> Vec<u8> {
        self.head_for(&self.job.target, instance, body, rank)
    }

    /// The same for another path.
    pub(super) fn head_for(
        &self,
        target: &str,
        instance: &Instance,
        body: &[Bytes],
        rank: Option<u32>,
    ) -> Vec<u8> {
        let job = &self.job;
        let length: usize = body.iter().map(Bytes::len).sum();
        let mut head = Vec::with_capacity(job.lines.len() + target.len() + 256);
        for part in [
            job.method.as_str(),
            " ",
            target,
            " HTTP/1.1\r\nhost: ",
            &instance.authority,
            "\r\n",
        ] {
            head.extend_from_slice(part.as_bytes());
        }
        head.extend_from_slice(&job.lines);
        head.extend_from_slice(b"x-request-id: ");
        let id = self.wire_id.as_deref().unwrap_or(&job.request_id);
        head.extend_from_slice(id.as_bytes());
        head.extend_from_slice(b"\r\n");
        if let Some(rank) = rank.or(instance.address.rank) {
            head.extend_from_slice(format!("x-data-parallel-rank: {rank}\r\n").as_bytes());
        }
        if length > 0 || job.method == "POST" {
            head.extend_from_slice(b"content-length: ");
            head.extend_from_slice(length.to_string().as_bytes());
            head.extend_from_slice(b"\r\n");
        }
        head.extend_from_slice(b"\r\n");
        head
    }
}
