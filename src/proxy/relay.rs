//! A worker's answer on its way to the client: the bytes that came, as they come.
//!
//! Owns the reply's head, the loop that copies the body, and how an answer ends that its worker broke off: with an SSE
//! error event where that is possible, and never cleanly. Chunk framing is passed on as it is; only for HTTP/1.0 clients
//! and for workers that end a body by closing is it made anew.

use std::sync::Arc;
use std::time::Instant;

use bytes::Buf;
use tokio::time::timeout;

use super::App;
use super::handoff::{Answer, Route};
use super::http::chunked::BodyScanner;
use super::http::downstream::Downstream;
use super::mask::Mask;
use super::reply::{LocalReply, error_object, reason};
use super::usage::{self, Cached};

/// A part of a chunk longer than this is passed on before the chunk is complete.
const HELD_BYTES_MAX: usize = 32 << 10;

/// How a relay ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// Complete; the connection may be used again.
    Whole,
    /// Complete; the connection must be closed.
    Close,
    /// The worker broke off.
    Cut,
    /// The client has gone, or does not read.
    ClientGone,
}

/// What the reply needs to know of its request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked<'a> {
    pub(crate) http11: bool,
    pub(crate) keep_alive: bool,
    pub(crate) request_id: &'a str,
    pub(crate) debug_headers: bool,
}

/// How the body is framed for the client.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    /// As it came.
    Same,
    /// Payload in chunks of our own.
    Chunks,
    /// Payload until the connection closes.
    Bare,
}

/// `hides`: something in the payload is replaced, so chunk boundaries must not lie within it.
fn framing(body: &BodyScanner, http11: bool, hides: bool) -> Framing {
    match (body, http11) {
        (BodyScanner::Chunked(_), true) if hides => Framing::Chunks,
        (BodyScanner::Length(_), _) | (BodyScanner::Chunked(_), true) => Framing::Same,
        (BodyScanner::UntilClose, true) => Framing::Chunks,
        _ => Framing::Bare,
    }
}

pub(super) fn line(head: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    for part in [name, b": ", value, b"\r\n"] {
        head.extend_from_slice(part);
    }
}

fn head_of(
    answer: &Answer,
    route: &Route,
    asked: &Asked<'_>,
    framing: Framing,
    bodiless: bool,
) -> Vec<u8> {
    let reply = &answer.head;
    let mut head = Vec::with_capacity(512);
    let text = if reply.reason.is_empty() {
        reason(reply.status)
    } else {
        &reply.reason
    };
    head.extend_from_slice(format!("HTTP/1.1 {} {text}\r\n", reply.status).as_bytes());
    let mut has_id = false;
    for (name, value) in reply.headers.iter() {
        // A HEAD's answer keeps the length it would have had.
        if reply.headers.ends_here(name)
            && !(bodiless && name.eq_ignore_ascii_case(b"content-length"))
        {
            continue;
        }
        let is_id = name.eq_ignore_ascii_case(b"x-request-id");
        if is_id && answer.mask.is_some() {
            continue;
        }
        has_id = has_id || is_id;
        line(&mut head, name, value);
    }
    if !has_id {
        line(&mut head, b"x-request-id", asked.request_id.as_bytes());
    }
    if asked.debug_headers {
        debug_lines(&mut head, route);
    }
    match (framing, &reply.body) {
        (Framing::Same, BodyScanner::Length(0))
            if bodiless || matches!(reply.status, 204 | 304) => {}
        (Framing::Same, BodyScanner::Length(length)) => {
            line(&mut head, b"content-length", length.to_string().as_bytes());
        }
        (Framing::Bare, _) => {}
        _ => line(&mut head, b"transfer-encoding", b"chunked"),
    }
    match (asked.keep_alive && framing != Framing::Bare, asked.http11) {
        (false, _) => line(&mut head, b"connection", b"close"),
        (true, false) => line(&mut head, b"connection", b"keep-alive"),
        (true, true) => {}
    }
    head.extend_from_slice(b"\r\n");
    head
}

/// Which way a request went.
pub(super) fn debug_lines(head: &mut Vec<u8>, route: &Route) {
    for (name, instance) in [
        ("x-mooncake-prefill", &route.prefill),
        ("x-mooncake-decode", &route.decode),
    ] {
        if let Some(instance) = instance {
            line(head, name.as_bytes(), instance.name.as_bytes());
        }
    }
    line(head, b"x-mooncake-route-reason", route.reason.as_bytes());
}

pub(super) fn recode(out: &mut Vec<u8>, data: &[u8], framing: Framing) {
    if data.is_empty() {
        return;
    }
    if framing == Framing::Chunks {
        out.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes());
    }
    out.extend_from_slice(data);
    if framing == Framing::Chunks {
        out.extend_from_slice(b"\r\n");
    }
}

/// The event a client finds at the end of a stream that was broken off.
fn cut_event(framing: Framing) -> Vec<u8> {
    error_event(
        &error_object(502, "the decode instance broke off its answer").to_string(),
        framing,
    )
}

/// The same with another error.
pub(super) fn error_event(object: &str, framing: Framing) -> Vec<u8> {
    let event = format!("\n\ndata: {object}\n\n");
    let mut out = Vec::new();
    let framing = if framing == Framing::Same {
        Framing::Chunks
    } else {
        framing
    };
    recode(&mut out, event.as_bytes(), framing);
    out
}

struct Copy<'a> {
    app: &'a App,
    framing: Framing,
    is_events: bool,
    /// Bytes in the inbox that the scanner has seen and the client has not.
    held: usize,
    /// The client has whole chunks only.
    at_boundary: bool,
    /// Count of cached tokens to be told in the place of decode's.
    cached: Option<Cached>,
    mask: Option<Mask>,
    /// Held until it is complete, for that reason.
    waits: bool,
    /// When something was passed on last.
    passed: Option<Instant>,
    /// Payload that is framed anew and has not been passed on yet.
    plain: Vec<u8>,
    out: Vec<u8>,
}

enum Step {
    More,
    Done,
    Cut,
    ClientGone,
}

impl Copy<'_> {
    /// Prepares what has come for the client: `self.out` and that many bytes of the inbox.
    fn take(&mut self, answer: &mut Answer) -> Result<(usize, bool), ()> {
        let (framing, plain) = (self.framing, &mut self.plain);
        let fresh = answer.conn.inbox.get(self.held..).unwrap_or_default();
        let progress = answer
            .head
            .body
            .advance(fresh, |data| {
                if framing != Framing::Same {
                    plain.extend_from_slice(data);
                }
            })
            .map_err(|_| ())?;
        let seen = self.held + progress.consumed;
        if framing != Framing::Same {
            answer.conn.inbox.advance(seen);
            self.held = 0;
            return Ok((self.ready_payload(progress.done), progress.done));
        }
        let whole = if progress.boundary > 0 {
            self.held + progress.boundary
        } else {
            0
        };
        let holds = self.is_events && !progress.done && seen - whole <= HELD_BYTES_MAX;
        // A number to be changed must not come in two pieces.
        self.waits = self.waits_for_all(seen, progress.done);
        let ready = match (holds, self.waits) {
            (_, true) => 0,
            (true, _) => whole,
            _ => seen,
        };
        let ready = match &self.mask {
            Some(mask) if !progress.done => {
                let piece = answer.conn.inbox.get(..ready).unwrap_or_default();
                ready - mask.tail(piece)
            }
            _ => ready,
        };
        if ready > 0 {
            self.at_boundary = ready == whole;
        }
        self.held = seen - ready;
        Ok((ready, progress.done))
    }

    /// A number to be changed must not come in two pieces.
    fn waits_for_all(&self, length: usize, done: bool) -> bool {
        self.cached.is_some() && !self.is_events && !done && length <= HELD_BYTES_MAX
    }

    /// How much of the payload that is framed anew can be passed on: whole events, and no beginning of what is replaced.
    fn ready_payload(&mut self, done: bool) -> usize {
        let length = self.plain.len();
        self.waits = self.waits_for_all(length, done);
        if self.waits {
            return 0;
        }
        if done {
            return length;
        }
        let end_of = |end: &[u8]| {
            let at = memchr::memmem::rfind(&self.plain, end);
            at.map_or(0, |at| at + end.len())
        };
        let whole = end_of(b"\n\n").max(end_of(b"\n\r\n"));
        let holds = self.is_events && length - whole <= HELD_BYTES_MAX;
        let ready = if holds { whole } else { length };
        let piece = &self.plain[..ready];
        ready - self.mask.as_ref().map_or(0, |mask| mask.tail(piece))
    }

    /// What will not be followed by more of the same body.
    fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        if let Some(mask) = &self.mask {
            mask.apply(&mut self.plain);
        }
        recode(&mut rest, &std::mem::take(&mut self.plain), self.framing);
        if self.framing == Framing::Chunks {
            rest.extend_from_slice(b"0\r\n\r\n");
        }
        rest
    }

    async fn step(
        &mut self,
        answer: &mut Answer,
        client: &mut Downstream,
        head: &mut Vec<u8>,
    ) -> Step {
        let Ok((ready, done)) = self.take(answer) else {
            return Step::Cut;
        };
        let is_same = self.framing == Framing::Same;
        let piece = if is_same {
            answer.conn.inbox.get_mut(..ready).unwrap_or_default()
        } else {
            &mut self.plain[..ready]
        };
        if let Some(cached) = self.cached.as_mut().filter(|_| usage::tells(piece)) {
            let count = cached.count().await;
            if count.is_some_and(|count| usage::patch(piece, count)) {
                self.app.metrics.usage_merged.add();
            }
            // Of an answer in one piece there is one; what did not come in time is not waited for again.
            if !self.is_events || count.is_none() {
                self.cached = None;
            }
        }
        if let Some(mask) = &self.mask {
            mask.apply(piece);
        }
        let ready = if is_same {
            ready
        } else {
            let piece: Vec<u8> = self.plain.drain(..ready).collect();
            recode(&mut self.out, &piece, self.framing);
            if done && self.framing == Framing::Chunks {
                self.out.extend_from_slice(b"0\r\n\r\n");
            }
            0
        };
        let (mut watch, mut writer) = client.halves();
        if ready > 0 || !self.out.is_empty() || !head.is_empty() && !self.waits || done {
            let body = answer.conn.inbox.get(..ready).unwrap_or_default();
            let wrote = if head.is_empty() && self.out.is_empty() {
                writer.write(body).await
            } else {
                // The head travels with the first bytes.
                head.append(&mut self.out);
                head.extend_from_slice(body);
                let wrote = writer.write(head).await;
                *head = Vec::new();
                wrote
            };
            if let Err(error) = wrote {
                if error.kind() == std::io::ErrorKind::TimedOut {
                    self.app.metrics.clients_slow.add();
                }
                return Step::ClientGone;
            }
            if let Some(resume) = &mut answer.resume {
                resume.passed(answer.conn.inbox.get(..ready).unwrap_or_default());
            }
            answer.conn.inbox.advance(ready);
            if self.is_events && !done {
                let now = Instant::now();
                if let Some(before) = self.passed.replace(now) {
                    self.app.metrics.itl.record(now - before);
                }
            }
        }
        if done {
            return Step::Done;
        }
        let idle = self.app.config.idle_timeout;
        tokio::select! {
            read = timeout(idle, answer.conn.read()) => match read {
                Ok(Ok(count)) if count > 0 => Step::More,
                Ok(Ok(_)) if matches!(answer.head.body, BodyScanner::UntilClose) => {
                    head.extend_from_slice(&self.rest());
                    if writer.write(head).await.is_ok() { Step::Done } else { Step::ClientGone }
                }
                _ => Step::Cut,
            },
            () = watch.gone() => Step::ClientGone,
        }
    }
}

/// Passes an answer on.
pub(crate) async fn relay(
    app: &Arc<App>,
    client: &mut Downstream,
    mut answer: Box<Answer>,
    asked: &Asked<'_>,
    bodiless: bool,
) -> Ended {
    let framing = framing(&answer.head.body, asked.http11, answer.mask.is_some());
    let route = std::mem::take(&mut answer.route);
    let cached = answer.cached.take();
    let mut head = head_of(&answer, &route, asked, framing, bodiless);
    let is_events = answer
        .head
        .headers
        .get("content-type")
        .is_some_and(|t| t.len() >= 17 && t[..17].eq_ignore_ascii_case(b"text/event-stream"));
    let mut copy = Copy {
        app,
        framing,
        is_events,
        held: 0,
        at_boundary: true,
        cached: cached.filter(|_| {
            answer.head.status < 300 && !matches!(answer.head.body, BodyScanner::UntilClose)
        }),
        mask: answer.mask.clone(),
        waits: false,
        passed: None,
        plain: Vec::new(),
        out: Vec::new(),
    };
    if answer.head.body.is_empty() {
        let written = client.write(&head).await;
        return finish(answer, asked, framing, written.is_ok());
    }
    loop {
        match copy.step(&mut answer, client, &mut head).await {
            Step::More => {}
            Step::Done => return finish(answer, asked, framing, true),
            Step::ClientGone => return Ended::ClientGone,
            Step::Cut => {
                app.metrics.upstream_cuts.add();
                answer.leg.failed(&"broke off its answer");
                answer.leg.instance.pool.clear();
                let chunked = matches!(answer.head.body, BodyScanner::Chunked(_));
                let framed = framing != Framing::Same || chunked;
                if let Some(resume) = answer.resume.take()
                    && chunked
                    && framing == Framing::Same
                    && copy.at_boundary
                {
                    let dead = answer.leg.instance.number;
                    let next = tokio::select! {
                        next = resume.next(app, dead) => next,
                        () = client.gone() => return Ended::ClientGone,
                    };
                    if let Some(next) = next {
                        let before = std::mem::replace(&mut answer, next);
                        answer._place = before._place;
                        copy.held = 0;
                        copy.cached = None;
                        continue;
                    }
                }
                if is_events && framed && copy.at_boundary {
                    let _ = client.write(&cut_event(framing)).await;
                }
                return Ended::Cut;
            }
        }
    }
}

pub(super) fn finish(
    mut answer: Box<Answer>,
    asked: &Asked<'_>,
    framing: Framing,
    written: bool,
) -> Ended {
    if answer.head.status < 500 {
        answer.leg.succeeded();
    }
    let Answer {
        conn, head, leg, ..
    } = *answer;
    if head.keep_alive {
        leg.instance.pool.give(conn);
    }
    match written {
        false => Ended::ClientGone,
        true if framing == Framing::Bare || !asked.keep_alive => Ended::Close,
        true => Ended::Whole,
    }
}

/// Writes an answer of the proxy's own.
pub(crate) async fn local(
    client: &mut Downstream,
    reply: &LocalReply,
    asked: &Asked<'_>,
    bodiless: bool,
) -> Ended {
    let mut out = Vec::with_capacity(256 + reply.body.len());
    out.extend_from_slice(
        format!("HTTP/1.1 {} {}\r\n", reply.status, reason(reply.status)).as_bytes(),
    );
    line(&mut out, b"content-type", reply.content_type.as_bytes());
    line(
        &mut out,
        b"content-length",
        reply.body.len().to_string().as_bytes(),
    );
    if !asked.request_id.is_empty() {
        line(&mut out, b"x-request-id", asked.request_id.as_bytes());
    }
    if let Some(seconds) = reply.retry_after {
        line(&mut out, b"retry-after", seconds.to_string().as_bytes());
    }
    if let Some(allow) = reply.allow {
        line(&mut out, b"allow", allow.as_bytes());
    }
    match (asked.keep_alive, asked.http11) {
        (false, _) => line(&mut out, b"connection", b"close"),
        (true, false) => line(&mut out, b"connection", b"keep-alive"),
        (true, true) => {}
    }
    out.extend_from_slice(b"\r\n");
    if !bodiless {
        out.extend_from_slice(&reply.body);
    }
    match client.write(&out).await {
        Err(_) => Ended::ClientGone,
        Ok(()) if asked.keep_alive => Ended::Whole,
        Ok(()) => Ended::Close,
    }
}
