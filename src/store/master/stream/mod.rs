//! Subscribers to the events of the index: over gRPC, as server-sent events, and as ZeroMQ messages.
//!
//! Owns the ways out; what is sent is decided by [`feed`]. A subscriber reads the ring at its own pace: one that is too
//! slow finds a gap, and one that takes nothing for [`SEND`] is dropped. Nobody here holds up the index.

mod feed;
mod grpc;
mod json;
mod msgpack;
mod publisher;
mod sse;
mod zmtp;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

pub(crate) use grpc::events as grpc_events;
pub(crate) use json::event as event_json;
pub use publisher::{KvEventsConfig, PublisherStats};
pub(crate) use sse::events as sse_events;

/// A subscriber that takes nothing for this long is dropped.
const SEND: Duration = Duration::from_secs(30);
/// Subscribers at once, all ways together.
const SUBSCRIBERS_MAX: usize = 256;

/// The open subscriptions of a master.
#[derive(Debug, Default)]
pub(crate) struct Subscribers(AtomicUsize);

impl Subscribers {
    /// One more; `None` when there are too many.
    fn enter(self: &Arc<Self>) -> Option<Subscribed> {
        let before = self.0.fetch_add(1, Ordering::AcqRel);
        let one = Subscribed(self.clone());
        (before < SUBSCRIBERS_MAX).then_some(one)
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counts a subscription until it is dropped.
struct Subscribed(Arc<Subscribers>);

impl Drop for Subscribed {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::AcqRel);
    }
}
