//! Connections of the master's port that are no lanes: which protocol they speak, how many there may be, and how long each may
//! keep the master waiting.
//!
//! Owns the deadlines of HTTP below the requests. Knows no route. Streams of events live as long as somebody takes them.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, BodyDataStream, Bytes};
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tokio_stream::Stream;

use crate::base::handshake::MAGIC;

/// How a client of HTTP/2 begins.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How long a connection may take to show what it is.
const FIRST_BYTES: Duration = Duration::from_secs(10);
/// Connections that have not shown it yet.
const STRANGERS_MAX: usize = 1024;
/// Connections of scripts, browsers, Prometheus.
const HTTP1_MAX: usize = 1024;
/// Connections of gRPC: each node has one.
const HTTP2_MAX: usize = 8192;
/// From the end of one answer to the end of the next request's head.
const HEAD: Duration = Duration::from_secs(30);
/// For the whole body of a request.
const BODY: Duration = Duration::from_secs(30);
/// What was sent and is not taken for so long ends the connection.
const UNTAKEN: Duration = Duration::from_secs(60);
/// A peer over HTTP/2 is asked whether it is there, and how long it has to answer.
const PING_EVERY: Duration = Duration::from_secs(30);
const PING_ANSWER: Duration = Duration::from_secs(30);

const BUSY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";

/// What the first bytes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    Lane,
    Http1,
    Http2,
}

/// `None`: more bytes are needed.
fn protocol_of(first: &[u8]) -> Option<Protocol> {
    for (announced, protocol) in [(&MAGIC[..], Protocol::Lane), (PREFACE, Protocol::Http2)] {
        if first.starts_with(announced) {
            return Some(protocol);
        }
        if announced.starts_with(first) {
            return None;
        }
    }
    Some(Protocol::Http1)
}

/// How many connections there may be.
pub(super) struct Connections {
    strangers: Arc<Semaphore>,
    http1: Arc<Semaphore>,
    http2: Arc<Semaphore>,
}

impl Default for Connections {
    fn default() -> Self {
        let places = |most| Arc::new(Semaphore::new(most));
        Self {
            strangers: places(STRANGERS_MAX),
            http1: places(HTTP1_MAX),
            http2: places(HTTP2_MAX),
        }
    }
}

/// A place among them, given back when it is dropped.
pub(super) type Place = OwnedSemaphorePermit;

impl Connections {
    /// A place for a connection that was just accepted; `None`: there are too many, close it.
    pub(super) fn stranger(&self) -> Option<Place> {
        self.strangers.clone().try_acquire_owned().ok()
    }

    /// Serves requests until the peer leaves or keeps us waiting.
    pub(super) async fn serve(&self, stream: TcpStream, protocol: Protocol, router: Router) {
        let (places, http1) = match protocol {
            Protocol::Http2 => (&self.http2, false),
            _ => (&self.http1, true),
        };
        let Ok(_place) = places.clone().try_acquire_owned() else {
            if http1 {
                let _ = stream.try_write(BUSY);
            }
            return;
        };
        let _ = stream.set_nodelay(true);
        let _ = socket2::SockRef::from(&stream).set_tcp_user_timeout(Some(UNTAKEN));
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD);
        builder
            .http2()
            .timer(TokioTimer::new())
            .keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_ANSWER);
        let builder = if http1 {
            builder.http1_only()
        } else {
            builder.http2_only()
        };
        let service = TowerToHyperService::new(router);
        let served = builder.serve_connection(TokioIo::new(stream), service);
        if let Err(error) = served.await {
            tracing::debug!(%error, "a connection ended");
        }
    }
}

/// What a connection is by its first bytes, of which nothing is consumed.
pub(super) async fn protocol(stream: &TcpStream) -> io::Result<Protocol> {
    let late = || io::Error::from(io::ErrorKind::TimedOut);
    let peeked = tokio::time::timeout(FIRST_BYTES, peek(stream)).await;
    peeked.map_err(|_| late())?
}

async fn peek(stream: &TcpStream) -> io::Result<Protocol> {
    let mut first = [0; PREFACE.len()];
    loop {
        let n = stream.peek(&mut first).await?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(protocol) = protocol_of(&first[..n]) {
            return Ok(protocol);
        }
        // A few bytes only so far: peek returns at once as long as they lie there.
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A body that fails when it has not come in time.
struct Timely {
    body: BodyDataStream,
    late: Pin<Box<Sleep>>,
}

impl Stream for Timely {
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.late.as_mut().poll(context).is_ready() {
            return Poll::Ready(Some(Err(io::ErrorKind::TimedOut.into())));
        }
        let frame = Pin::new(&mut self.body).poll_next(context);
        frame.map(|frame| frame.map(|f| f.map_err(io::Error::other)))
    }
}

/// Bounds the time for which a handler waits for its request's body.
pub(super) async fn timely_body(request: Request, next: Next) -> Response {
    let request = request.map(|body| {
        let late = Box::pin(tokio::time::sleep(BODY));
        let body = body.into_data_stream();
        Body::from_stream(Timely { body, late })
    });
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bytes_tell() {
        assert_eq!(protocol_of(&MAGIC), Some(Protocol::Lane));
        assert_eq!(protocol_of(PREFACE), Some(Protocol::Http2));
        for undecided in [&MAGIC[..3], &PREFACE[..1], &PREFACE[..20]] {
            assert_eq!(protocol_of(undecided), None);
        }
        for http1 in [
            &b"GET / HTTP/1.1"[..],
            b"PUT /",
            b"PRI * HTTP/2.0\r\n\r\nXX",
            b"\0",
        ] {
            assert_eq!(protocol_of(http1), Some(Protocol::Http1));
        }
    }
}
