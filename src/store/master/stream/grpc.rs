//! Events over gRPC.

use std::sync::Arc;

use tokio::sync::mpsc;
use tonic::Status;

use super::super::Master;
use super::super::events::{Change, Event, Filter, Reason};
use super::SEND;
use super::feed::{Chunk, Feed, Wish};
use crate::store::wire::{EventBatch, EventGap, EventsRequest, ObjectEvent, object_event};

/// Batches on their way to one subscriber.
const QUEUE: usize = 4;

/// Subscribes; the receiver gets batches until it is dropped.
///
/// # Errors
/// `FailedPrecondition` when no events are recorded, `ResourceExhausted` when there are too many subscribers.
pub(crate) fn events(
    master: &Arc<Master>,
    request: EventsRequest,
) -> Result<mpsc::Receiver<Result<EventBatch, Status>>, Status> {
    if !master.state.events.enabled() {
        return Err(Status::failed_precondition(
            "this master records no events: start it with --kv-events",
        ));
    }
    let subscribed = master
        .subscribers
        .enter()
        .ok_or_else(|| Status::resource_exhausted("too many subscribers"))?;
    let wish = Wish {
        from: request.from_seq,
        epoch: request.epoch,
        table: request.snapshot,
        filter: Filter {
            tenant: request.tenant,
            prefix: request.prefix.to_vec(),
        },
    };
    let mut feed = Feed::new(master.clone(), wish);
    let (sender, receiver) = mpsc::channel(QUEUE);
    let master = master.clone();
    tokio::spawn(async move {
        let _subscribed = subscribed;
        loop {
            let chunk = tokio::select! {
                chunk = feed.next() => chunk,
                () = sender.closed() => return,
            };
            let batch = EventBatch {
                epoch: master.state.events.epoch(),
                term: master.state.term(),
                next_seq: feed.next_seq(),
                ..batch(chunk)
            };
            if sender.send_timeout(Ok(batch), SEND).await.is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}

fn batch(chunk: Chunk) -> EventBatch {
    match chunk {
        Chunk::Table { events, last } => EventBatch {
            events: events.into_iter().map(event).collect(),
            snapshot: true,
            snapshot_end: last,
            ..EventBatch::default()
        },
        Chunk::Events(events) => EventBatch {
            events: events.into_iter().map(event).collect(),
            ..EventBatch::default()
        },
        Chunk::Gap {
            from,
            to,
            restarted,
        } => EventBatch {
            gap: Some(EventGap {
                from_seq: from,
                to_seq: to,
                restarted,
            }),
            ..EventBatch::default()
        },
        Chunk::Quiet => EventBatch::default(),
    }
}

fn event(event: Event) -> ObjectEvent {
    use object_event::{Kind, Reason as Why};
    let (kind, reason) = match event.change {
        Change::Stored => (Kind::Stored, Why::None),
        Change::Cleared => (Kind::Cleared, Why::ByRequest),
        Change::Removed(reason) => {
            let why = match reason {
                Reason::Removed => Why::ByRequest,
                Reason::Evicted => Why::Evicted,
                Reason::Incomplete => Why::Incomplete,
                Reason::NodeLost => Why::NodeLost,
            };
            (Kind::Removed, why)
        }
    };
    ObjectEvent {
        seq: event.seq,
        kind: kind.into(),
        reason: reason.into(),
        tenant: event.tenant,
        key: event.key.into(),
        group: event.group,
        size_bytes: event.size,
        version: event.version,
        replicas: event.replicas.into(),
        unix_ms: event.unix_ms,
    }
}
