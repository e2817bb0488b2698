//! Events as server-sent events: `GET /events?from=N&epoch=E&tenant=T&prefix=P&snapshot=true`.
//!
//! Ids are `EPOCH-SEQ`, so that a browser that reconnects with `Last-Event-ID` goes on after what it has seen.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt::Write;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::super::Master;
use super::super::events::{Event, Filter};
use super::SEND;
use super::feed::{Chunk, Feed, Wish};
use super::json;

/// Texts on their way to one subscriber.
const QUEUE: usize = 4;

fn wish(params: &HashMap<String, String>, headers: &HeaderMap) -> Result<Wish, String> {
    let number = |name: &str| match params.get(name) {
        None => Ok(0),
        Some(text) => text
            .parse::<u64>()
            .map_err(|_| format!("{name}: `{text}` is not a number\n")),
    };
    let mut wish = Wish {
        from: number("from")?,
        epoch: number("epoch")?,
        table: params
            .get("snapshot")
            .is_some_and(|v| v == "true" || v == "1"),
        filter: Filter {
            tenant: params.get("tenant").cloned(),
            prefix: params
                .get("prefix")
                .map_or_else(Vec::new, |p| p.clone().into_bytes()),
        },
    };
    let last = headers.get("last-event-id").and_then(|v| v.to_str().ok());
    let seen = last.and_then(|id| {
        let (epoch, seq) = id.split_once('-')?;
        Some((epoch.parse::<u64>().ok()?, seq.parse::<u64>().ok()?))
    });
    if let Some((epoch, seq)) = seen {
        wish.epoch = epoch;
        wish.from = seq.saturating_add(1);
        wish.table = false;
    }
    Ok(wish)
}

/// The handler of `/events`.
pub(crate) async fn events(
    State(master): State<Arc<Master>>,
    Query(params): Query<HashMap<String, String>>,
    headers: HeaderMap,
) -> Response {
    if !master.state.events.enabled() {
        let text = "this master records no events: start it with --kv-events\n";
        return (StatusCode::NOT_FOUND, text).into_response();
    }
    let wish = match wish(&params, &headers) {
        Ok(wish) => wish,
        Err(problem) => return (StatusCode::BAD_REQUEST, problem).into_response(),
    };
    let Some(subscribed) = master.subscribers.enter() else {
        return (StatusCode::SERVICE_UNAVAILABLE, "too many subscribers\n").into_response();
    };
    let epoch = master.state.events.epoch();
    let mut feed = Feed::new(master, wish);
    let (sender, receiver) = mpsc::channel::<Result<Bytes, Infallible>>(QUEUE);
    tokio::spawn(async move {
        let _subscribed = subscribed;
        // The head of the answer leaves with the first bytes.
        let hello = format!("retry: 1000\n: epoch {epoch}, next {}\n\n", feed.next_seq());
        let mut text = hello;
        loop {
            if sender.send_timeout(Ok(text.into()), SEND).await.is_err() {
                return;
            }
            let chunk = tokio::select! {
                chunk = feed.next() => chunk,
                () = sender.closed() => return,
            };
            text = render(&chunk, epoch, feed.next_seq());
        }
    });
    let kind = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (kind, Body::from_stream(ReceiverStream::new(receiver))).into_response()
}

fn render(chunk: &Chunk, epoch: u64, next: u64) -> String {
    let mut text = String::new();
    let mut one = |event: &Event, name: &str| {
        if event.seq > 0 {
            let _ = writeln!(text, "id: {epoch}-{}", event.seq);
        }
        let _ = write!(text, "event: {name}\ndata: {}\n\n", json::event(event));
    };
    match chunk {
        Chunk::Events(events) => {
            for event in events {
                one(event, json::name(event.change));
            }
        }
        Chunk::Table { events, last } => {
            for event in events {
                one(event, "snapshot");
            }
            if *last {
                let seq = next.saturating_sub(1);
                let _ = write!(
                    text,
                    "id: {epoch}-{seq}\nevent: snapshot_end\ndata: {{\"epoch\":{epoch},\"next_seq\":{next}}}\n\n"
                );
            }
        }
        Chunk::Gap {
            from,
            to,
            restarted,
        } => {
            let seq = to.saturating_sub(1);
            let _ = write!(
                text,
                "id: {epoch}-{seq}\nevent: gap\ndata: {{\"from_seq\":{from},\"to_seq\":{to},\"restarted\":{restarted}}}\n\n"
            );
        }
        Chunk::Quiet => text.push_str(": quiet\n\n"),
    }
    text
}
