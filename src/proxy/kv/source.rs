//! Follows what one publisher says about its KV cache, and never believes more than it has heard without a gap.
//!
//! Messages are numbered. What is missing is fetched from the replay endpoint where there is one; else everything it
//! was thought to hold is forgotten. After a reconnect the last message is asked for again: if it is not the same
//! any more, the publisher has restarted. Owns that and the connections; knows no policy.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::timeout;

use super::super::App;
use super::super::config::EventsAddress;
use super::super::registry::Instance;
use super::Feed;
use super::event::{self, Batch, Event, Tier};
use super::zmtp::{Kind, Message, Socket, ZmtpError};

/// Between two tries to connect, growing up to the second.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// Whole replay.
const REPLAY_TIMEOUT: Duration = Duration::from_secs(30);
/// Ends a replay.
const REPLAY_END: u64 = u64::MAX;

/// A message's number and a hash of it.
type Mark = (u64, u64);

/// Who is told what a publisher says.
pub(crate) trait Listener: Send + Sync + 'static {
    /// For people.
    fn name(&self) -> &str;
    /// How it is coming along.
    fn feed(&self) -> &Feed;
    /// Whether it still wants to hear.
    fn is_wanted(&self) -> bool;
    /// Events in their order, without a gap.
    fn take(&self, batch: &Batch);
    /// Everything that was told is gone, or not sure any more.
    fn forget(&self);
}

/// An instance of this proxy: what it tells goes into the index.
pub(crate) struct Told {
    pub(crate) app: Arc<App>,
    pub(crate) instance: Arc<Instance>,
}

impl Listener for Told {
    fn name(&self) -> &str {
        &self.instance.name
    }

    fn feed(&self) -> &Feed {
        &self.instance.feed
    }

    fn is_wanted(&self) -> bool {
        self.app.has(&self.instance)
    }

    fn take(&self, batch: &Batch) {
        let kv = &self.app.kv;
        for event in &batch.events {
            if let Event::Stored(stored) = event {
                if stored.tier == Some(Tier::Store) {
                    kv.set_pool();
                } else if !stored.tokens.is_empty() {
                    self.instance.feed.note(&stored.hashes);
                }
            }
            kv.index.apply(self.instance.number, event);
        }
        // Whoever waits for a block looks again.
        kv.index.pooled.notify_waiters();
    }

    fn forget(&self) {
        self.app.kv.index.forget(self.instance.number);
    }
}

struct Source {
    listener: Arc<dyn Listener>,
    address: EventsAddress,
    /// The last message that was taken in.
    last: Option<Mark>,
    publisher: Option<Vec<u8>>,
    /// A message came on this connection that was the next: smaller numbers are no repetition any more.
    is_current: bool,
}

/// Follows a publisher until nobody wants to hear of it or the proxy stops.
pub(crate) async fn watch(app: Arc<App>, listener: Arc<dyn Listener>, address: EventsAddress) {
    let mut source = Source {
        listener: listener.clone(),
        address,
        last: None,
        publisher: None,
        is_current: false,
    };
    let mut pause = PAUSE.0;
    loop {
        let error = tokio::select! {
            error = source.follow() => error,
            () = gone(&app, listener.as_ref()) => break,
        };
        if listener.feed().is_live() {
            pause = PAUSE.0;
        }
        listener.feed().set_live(false);
        if source.address.replay.is_none() {
            source.forget();
        }
        tracing::info!(instance = %listener.name(), events = %source.address, %error, "its KV events are not heard; trying again");
        let jitter = pause.mul_f64(0.2 * rand::random::<f64>());
        tokio::select! {
            () = tokio::time::sleep(pause + jitter) => {}
            () = gone(&app, listener.as_ref()) => break,
        }
        pause = (pause * 2).min(PAUSE.1);
    }
    listener.feed().set_live(false);
    listener.forget();
}

async fn gone(app: &App, listener: &dyn Listener) {
    while listener.is_wanted() {
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(500)) => {}
            () = app.stopping() => return,
        }
    }
}

/// Number and payload: the last two frames.
fn parts(message: &Message) -> Result<(u64, &[u8]), ZmtpError> {
    let [.., number, payload] = message.as_slice() else {
        return Err(ZmtpError::Malformed);
    };
    let number = number
        .as_ref()
        .try_into()
        .map_err(|_| ZmtpError::Malformed)?;
    Ok((u64::from_be_bytes(number), payload))
}

fn mark(number: u64, payload: &[u8]) -> Mark {
    (number, xxhash_rust::xxh3::xxh3_64(payload))
}

impl Source {
    /// Runs until the connection breaks.
    async fn follow(&mut self) -> ZmtpError {
        match self.try_follow().await {
            Err(error) => error,
            Ok(never) => match never {},
        }
    }

    async fn try_follow(&mut self) -> Result<std::convert::Infallible, ZmtpError> {
        let mut socket = Socket::connect(&self.address.target, Kind::Sub).await?;
        socket.subscribe(self.address.topic.as_bytes()).await?;
        self.is_current = false;
        if self.address.replay.is_some() {
            self.catch_up().await?;
        } else {
            self.forget();
        }
        self.listener.feed().set_live(true);
        tracing::info!(instance = %self.listener.name(), events = %self.address, "following its KV events");
        loop {
            let message = socket.receive().await?;
            self.take(&message).await?;
        }
    }

    async fn take(&mut self, message: &Message) -> Result<(), ZmtpError> {
        let (number, payload) = parts(message)?;
        let Some((last, _)) = self.last else {
            self.apply(number, payload);
            return Ok(());
        };
        if number > last.saturating_add(1) {
            self.listener.feed().gaps.fetch_add(1, Ordering::Relaxed);
            if self.address.replay.is_some() {
                self.catch_up().await?;
            } else {
                self.forget();
            }
            if self.last.is_some_and(|(last, _)| number <= last) {
                return Ok(());
            }
        } else if number <= last {
            if !self.is_current {
                // The replay has told it already.
                return Ok(());
            }
            self.forget();
        } else {
            self.is_current = true;
        }
        self.apply(number, payload);
        Ok(())
    }

    /// Asks for everything after the last message; for everything there is when nothing is known or it was another's.
    async fn catch_up(&mut self) -> Result<(), ZmtpError> {
        timeout(REPLAY_TIMEOUT, async {
            if self.last.is_some() && self.replay().await? {
                return Ok(());
            }
            self.forget();
            self.replay().await.map(|_| ())
        })
        .await
        .unwrap_or(Err(ZmtpError::Timeout))
    }

    /// One replay, from the last message on. Says whether that one was found as it was.
    async fn replay(&mut self) -> Result<bool, ZmtpError> {
        let Some(target) = self.address.replay.clone() else {
            return Ok(false);
        };
        let known = self.last;
        let from = known.map_or(0, |(number, _)| number);
        let mut socket = Socket::connect(&target, Kind::Dealer).await?;
        socket.send(&[b"", &from.to_be_bytes()]).await?;
        let mut is_first = true;
        loop {
            let message = socket.receive().await?;
            let (number, payload) = parts(&message)?;
            if number == REPLAY_END {
                return Ok(known.is_none() || !is_first);
            }
            if std::mem::take(&mut is_first) && known.is_some() {
                if known != Some(mark(number, payload)) {
                    return Ok(false);
                }
                continue;
            }
            let expected = self.last.map(|(last, _)| last.saturating_add(1));
            if expected.is_some_and(|e| e != number) {
                self.forget();
            }
            self.apply(number, payload);
        }
    }

    fn forget(&mut self) {
        self.last = None;
        self.publisher = None;
        self.listener.forget();
    }

    fn apply(&mut self, number: u64, payload: &[u8]) {
        let feed = self.listener.feed();
        let Ok(mut batch) = event::batch(payload) else {
            // What it said is not known, so nothing is sure any more.
            feed.gaps.fetch_add(1, Ordering::Relaxed);
            self.forget();
            self.last = Some(mark(number, payload));
            return;
        };
        if batch.publisher.is_some() && batch.publisher != self.publisher {
            if self.publisher.is_some() {
                self.forget();
            }
            self.publisher = batch.publisher.take();
        }
        self.last = Some(mark(number, payload));
        let heard = batch.events.len() as u64;
        let feed = self.listener.feed();
        feed.events.fetch_add(heard, Ordering::Relaxed);
        self.listener.take(&batch);
    }
}
