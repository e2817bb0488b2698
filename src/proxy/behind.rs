//! An answer that begins with prefill's token, on its way to the client: the token at once, then decode's events behind it.
//!
//! Owns its head, the loop that passes whole events on, and how it ends where nobody can go on: with an SSE error event, and
//! never cleanly. Payload is framed anew, since events change their length. Refuses to know what changes in them (`seam`) and
//! how decode is asked (`handoff::early`).

use std::sync::Arc;
use std::time::Instant;

use bytes::Buf;
use tokio::time::timeout;

use super::App;
use super::handoff::early::Early;
use super::handoff::{Answer, Route, Served};
use super::http::chunked::BodyScanner;
use super::http::downstream::Downstream;
use super::relay::{Asked, Ended, Framing, debug_lines, error_event, finish, line, recode};
use super::reply::error_object;
use super::seam::Seam;

/// Longest event.
const EVENT_BYTES_MAX: usize = 1 << 20;
/// The end of chunked framing.
const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// The head vLLM would have sent.
fn head_of(early: &Early, asked: &Asked<'_>, framing: Framing) -> Vec<u8> {
    let mut head = Vec::with_capacity(512 + early.event().len());
    head.extend_from_slice(b"HTTP/1.1 200 OK\r\n");
    line(
        &mut head,
        b"content-type",
        b"text/event-stream; charset=utf-8",
    );
    line(&mut head, b"x-request-id", asked.request_id.as_bytes());
    if asked.debug_headers {
        debug_lines(&mut head, early.route());
    }
    if framing == Framing::Chunks {
        line(&mut head, b"transfer-encoding", b"chunked");
    }
    if framing == Framing::Bare || !asked.keep_alive {
        line(&mut head, b"connection", b"close");
    }
    head.extend_from_slice(b"\r\n");
    head
}

/// How much of a payload is whole events.
fn whole_events(payload: &[u8]) -> usize {
    let end_of = |end: &[u8]| {
        let at = memchr::memmem::rfind(payload, end);
        at.map_or(0, |at| at + end.len())
    };
    end_of(b"\n\n").max(end_of(b"\n\r\n"))
}

struct Passing<'a> {
    app: &'a Arc<App>,
    framing: Framing,
    seam: Seam,
    /// Payload that has not been passed on yet.
    plain: Vec<u8>,
    /// When something was passed on last.
    passed: Instant,
}

enum Step {
    More,
    Done,
    Cut,
    ClientGone,
}

impl Passing<'_> {
    /// Whether the client took it.
    async fn write(&self, client: &mut Downstream, bytes: &[u8]) -> bool {
        match client.write(bytes).await {
            Ok(()) => true,
            Err(error) => {
                if error.kind() == std::io::ErrorKind::TimedOut {
                    self.app.metrics.clients_slow.add();
                }
                false
            }
        }
    }

    /// Passes on what is whole of what has come; at its end all of it.
    async fn pass(&mut self, answer: &mut Answer, client: &mut Downstream, done: bool) -> bool {
        let length = if done {
            self.plain.len()
        } else {
            whole_events(&self.plain)
        };
        if length == 0 && !done {
            return true;
        }
        let events: Vec<u8> = self.plain.drain(..length).collect();
        let mut joined = Vec::with_capacity(length + 64);
        if self.seam.join(&events, &mut joined) {
            self.app.metrics.usage_merged.add();
        }
        let mut out = Vec::with_capacity(joined.len() + 32);
        recode(&mut out, &joined, self.framing);
        if done && self.framing == Framing::Chunks {
            out.extend_from_slice(LAST_CHUNK);
        }
        if !self.write(client, &out).await {
            return false;
        }
        if let Some(resume) = &mut answer.resume {
            resume.passed_events(&joined);
        }
        if !done {
            let now = Instant::now();
            let before = std::mem::replace(&mut self.passed, now);
            self.app.metrics.itl.record(now - before);
        }
        true
    }

    async fn step(&mut self, answer: &mut Answer, client: &mut Downstream) -> Step {
        let plain = &mut self.plain;
        let scanned = answer
            .head
            .body
            .advance(&answer.conn.inbox, |data| plain.extend_from_slice(data));
        let Ok(progress) = scanned else {
            return Step::Cut;
        };
        answer.conn.inbox.advance(progress.consumed);
        if !self.pass(answer, client, progress.done).await {
            return Step::ClientGone;
        }
        if progress.done {
            return Step::Done;
        }
        if self.plain.len() > EVENT_BYTES_MAX {
            return Step::Cut;
        }
        let idle = self.app.config.idle_timeout;
        let read = tokio::select! {
            read = timeout(idle, answer.conn.read()) => read,
            () = client.gone() => return Step::ClientGone,
        };
        match read {
            Ok(Ok(count)) if count > 0 => Step::More,
            Ok(Ok(_)) if matches!(answer.head.body, BodyScanner::UntilClose) => {
                match self.pass(answer, client, true).await {
                    true => Step::Done,
                    false => Step::ClientGone,
                }
            }
            _ => Step::Cut,
        }
    }

    /// Says that nobody goes on, and leaves the end open.
    async fn cut(&self, client: &mut Downstream, error: &str) -> Ended {
        let _ = client.write(&error_event(error, self.framing)).await;
        Ended::Cut
    }

    async fn run(
        mut self,
        client: &mut Downstream,
        mut answer: Box<Answer>,
        asked: &Asked<'_>,
    ) -> Ended {
        loop {
            match self.step(&mut answer, client).await {
                Step::More => {}
                Step::Done => return finish(answer, asked, self.framing, true),
                Step::ClientGone => return Ended::ClientGone,
                Step::Cut => {
                    self.app.metrics.upstream_cuts.add();
                    answer.leg.failed(&"broke off its answer");
                    answer.leg.instance.pool.clear();
                    let Some(resume) = answer.resume.take() else {
                        break;
                    };
                    let dead = answer.leg.instance.number;
                    let next = tokio::select! {
                        next = resume.next(self.app, dead) => next,
                        () = client.gone() => return Ended::ClientGone,
                    };
                    let Some(next) = next else { break };
                    let before = std::mem::replace(&mut answer, next);
                    answer._place = before._place;
                    self.plain.clear();
                    let tokens = answer.resume.as_ref().map(|r| r.tokens());
                    self.seam.before = tokens.unwrap_or(self.seam.before);
                }
            }
        }
        let error = error_object(502, "the decode instance broke off its answer");
        self.cut(client, &error.to_string()).await
    }
}

/// Passes an answer on, and says which way it went.
pub(crate) async fn relay(
    app: &Arc<App>,
    client: &mut Downstream,
    early: Box<Early>,
    asked: &Asked<'_>,
) -> (Ended, Route) {
    let framing = if asked.http11 {
        Framing::Chunks
    } else {
        Framing::Bare
    };
    let passing = Passing {
        app,
        framing,
        seam: early.seam(),
        plain: Vec::new(),
        passed: Instant::now(),
    };
    let route = early.route().clone();
    let mut out = head_of(&early, asked, framing);
    recode(&mut out, early.event(), framing);
    if let Some(ending) = early.ending() {
        recode(&mut out, ending, framing);
        if framing == Framing::Chunks {
            out.extend_from_slice(LAST_CHUNK);
        }
    }
    if !passing.write(client, &out).await {
        return (Ended::ClientGone, route);
    }
    if early.ending().is_some() {
        let closes = framing == Framing::Bare || !asked.keep_alive;
        return (if closes { Ended::Close } else { Ended::Whole }, route);
    }
    let (served, route) = tokio::select! {
        done = early.go_on() => done,
        () = client.gone() => return (Ended::ClientGone, route),
    };
    let ended = match served {
        Served::Answer(answer) if is_stream(&answer) => passing.run(client, answer, asked).await,
        served => {
            app.metrics.upstream_cuts.add();
            passing.cut(client, &why(served)).await
        }
    };
    (ended, route)
}

fn is_stream(answer: &Answer) -> bool {
    let kind = answer.head.headers.get("content-type");
    let prefix = b"text/event-stream";
    let is_events = kind.is_some_and(|kind| {
        let start = kind.get(..prefix.len());
        start.is_some_and(|start| start.eq_ignore_ascii_case(prefix))
    });
    answer.head.status < 300 && is_events
}

/// What the client is told when decode has not begun to go on.
fn why(served: Served) -> String {
    match served {
        Served::Local(reply) => String::from_utf8(reply.body).unwrap_or_default(),
        _ => error_object(502, "the decode instance refused to go on").to_string(),
    }
}
