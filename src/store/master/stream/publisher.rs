//! Events over ZeroMQ, in the wire format of the KV-event publishers of inference engines: PUB messages of three frames
//! (an empty topic, a number, a MessagePack batch) and a replay, both on one port: what a peer is decides which it gets.
//!
//! Batches are made once, numbered from 0, and kept for replay; subscribers that are slow miss numbers, which they can see.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::body::Bytes;
use parking_lot::Mutex;
use tokio::io::AsyncWriteExt;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{broadcast, mpsc};

use super::super::Master;
use super::super::events::{Change, Event};
use super::feed::{Chunk, Feed, Wish};
use super::msgpack::Writer;
use super::zmtp::{self, Incoming};
use super::{SEND, Subscribers, json};

/// Events of one batch.
const BATCH: usize = 64;
/// Batches kept for replay, and their bytes.
const REPLAY_BATCHES: usize = 10_000;
const REPLAY_BYTES: usize = 64 << 20;
/// Batches a subscriber may be behind before it misses some.
const BEHIND: usize = 1024;
/// The number that ends a replay.
const END: u64 = u64::MAX;

/// How events are published.
#[derive(Clone, Debug)]
pub struct KvEventsConfig {
    /// Where subscribers connect.
    pub listen: SocketAddr,
    /// This pool's name in the events.
    pub backend_id: String,
    /// Whether events also carry the names of engines' own events (`type`, `block_hashes`).
    pub legacy: bool,
    /// Whether events carry the key as text.
    pub object_key: bool,
}

/// What was published so far.
#[derive(Debug, Default)]
pub struct PublisherStats {
    pub(crate) batches: AtomicU64,
    pub(crate) events: AtomicU64,
    pub(crate) dropped: AtomicU64,
    pub(crate) unparsed: AtomicU64,
}

struct Hub {
    config: KvEventsConfig,
    live: broadcast::Sender<(u64, Bytes)>,
    kept: Mutex<Replay>,
    subscribers: Arc<Subscribers>,
}

#[derive(Default)]
struct Replay {
    batches: VecDeque<(u64, Bytes)>,
    bytes: usize,
}

impl Replay {
    fn keep(&mut self, seq: u64, payload: Bytes) {
        self.bytes += payload.len();
        self.batches.push_back((seq, payload));
        while self.batches.len() > REPLAY_BATCHES || self.bytes > REPLAY_BYTES {
            let Some((_, gone)) = self.batches.pop_front() else {
                return;
            };
            self.bytes -= gone.len();
        }
    }

    fn from(&self, seq: u64) -> Vec<(u64, Bytes)> {
        let later = self.batches.iter().filter(|(s, _)| *s >= seq);
        later.cloned().collect()
    }
}

impl Master {
    /// Publishes the events of the index over ZeroMQ from now on; returns where.
    ///
    /// # Errors
    /// When the address cannot be listened on.
    pub async fn publish_kv_events(
        self: &Arc<Self>,
        config: KvEventsConfig,
    ) -> io::Result<SocketAddr> {
        let listener = TcpListener::bind(config.listen).await?;
        let address = listener.local_addr()?;
        let hub = Arc::new(Hub {
            config,
            live: broadcast::Sender::new(BEHIND),
            kept: Mutex::default(),
            subscribers: self.subscribers.clone(),
        });
        let wish = Wish {
            from: 1,
            ..Wish::default()
        };
        let feed = Feed::new(self.clone(), wish);
        let stats = self.kv_events.get_or_init(Default::default).clone();
        tokio::spawn(pump(hub.clone(), feed, stats));
        tokio::spawn(listen(hub, listener));
        Ok(address)
    }
}

/// Makes batches of events for as long as the master runs.
async fn pump(hub: Arc<Hub>, mut feed: Feed, stats: Arc<PublisherStats>) {
    let mut seq = 0;
    loop {
        match feed.next().await {
            Chunk::Events(events) => {
                for events in events.chunks(BATCH) {
                    let Some(payload) = batch(&hub.config, events, &stats) else {
                        continue;
                    };
                    hub.kept.lock().keep(seq, payload.clone());
                    // An error only says that nobody listens.
                    let _ = hub.live.send((seq, payload));
                    seq += 1;
                }
            }
            Chunk::Gap { from, to, .. } => {
                stats
                    .dropped
                    .fetch_add(to.saturating_sub(from), Ordering::Relaxed);
                // A number nobody gets shows subscribers that something is missing.
                seq += 1;
            }
            Chunk::Table { .. } | Chunk::Quiet => {}
        }
    }
}

async fn listen(hub: Arc<Hub>, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let hub = hub.clone();
                tokio::spawn(async move {
                    if let Err(error) = connection(&hub, stream).await {
                        tracing::debug!(%error, "a subscriber of KV events left");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a subscriber of KV events was not accepted");
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        }
    }
}

fn counterpart(peer: &[u8]) -> Option<&'static str> {
    match peer {
        b"SUB" | b"XSUB" => Some("PUB"),
        b"REQ" | b"DEALER" => Some("ROUTER"),
        _ => None,
    }
}

async fn connection(hub: &Arc<Hub>, mut stream: TcpStream) -> io::Result<()> {
    let Some(_subscribed) = hub.subscribers.enter() else {
        return Err(io::Error::other("too many subscribers"));
    };
    stream.set_nodelay(true)?;
    let peer = zmtp::accept(&mut stream, counterpart).await?;
    let (reading, writing) = stream.into_split();
    if peer.ends_with(b"SUB") {
        publish(hub, reading, writing).await
    } else {
        replay(hub, reading, writing).await
    }
}

async fn send(writing: &mut OwnedWriteHalf, bytes: &[u8]) -> io::Result<()> {
    let sent = tokio::time::timeout(SEND, writing.write_all(bytes)).await;
    sent.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// The answer to a PING, if it is one.
fn pong(name: &[u8], data: &[u8]) -> Option<Vec<u8>> {
    // Two bytes of time to live come before the context, which goes back.
    (name == b"PING").then(|| zmtp::command(b"PONG", data.get(2..).unwrap_or_default()))
}

/// What the reading half of a subscriber tells the writing half.
enum Told {
    Pong(Vec<u8>),
    Subscribed(bool),
}

async fn publish(
    hub: &Arc<Hub>,
    mut reading: OwnedReadHalf,
    mut writing: OwnedWriteHalf,
) -> io::Result<()> {
    let mut live = hub.live.subscribe();
    let (tell, mut told) = mpsc::channel(16);
    let reader = tokio::spawn(async move {
        while let Ok(incoming) = zmtp::receive(&mut reading).await {
            let news = match incoming {
                // Only a subscription to everything matches the empty topic.
                Incoming::Message(parts) => match parts.first().map(Vec::as_slice) {
                    Some([1]) => Some(Told::Subscribed(true)),
                    Some([0]) => Some(Told::Subscribed(false)),
                    _ => None,
                },
                Incoming::Command(name, data) => match name.as_slice() {
                    b"SUBSCRIBE" if data.is_empty() => Some(Told::Subscribed(true)),
                    b"CANCEL" if data.is_empty() => Some(Told::Subscribed(false)),
                    _ => pong(&name, &data).map(Told::Pong),
                },
            };
            if let Some(news) = news
                && tell.send(news).await.is_err()
            {
                return;
            }
        }
    });
    let done = async {
        let mut subscriptions = 0u32;
        loop {
            tokio::select! {
                news = told.recv() => match news {
                    None => return Ok(()),
                    Some(Told::Pong(bytes)) => send(&mut writing, &bytes).await?,
                    Some(Told::Subscribed(true)) => subscriptions = subscriptions.saturating_add(1),
                    Some(Told::Subscribed(false)) => subscriptions = subscriptions.saturating_sub(1),
                },
                next = live.recv() => match next {
                    Ok((seq, payload)) if subscriptions > 0 => {
                        let bytes = zmtp::message(&[b"", &seq.to_be_bytes(), &payload]);
                        send(&mut writing, &bytes).await?;
                    }
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return Ok(()),
                },
            }
        }
    }
    .await;
    reader.abort();
    done
}

/// Answers requests `[…, from]` with the batches kept from that number on, each `["", number, batch]`, and the end mark.
async fn replay(
    hub: &Arc<Hub>,
    mut reading: OwnedReadHalf,
    mut writing: OwnedWriteHalf,
) -> io::Result<()> {
    loop {
        let parts = match zmtp::receive(&mut reading).await? {
            Incoming::Message(parts) => parts,
            Incoming::Command(name, data) => {
                if let Some(bytes) = pong(&name, &data) {
                    send(&mut writing, &bytes).await?;
                }
                continue;
            }
        };
        let from = parts
            .last()
            .and_then(|p| p.as_slice().try_into().ok())
            .map(u64::from_be_bytes);
        let Some(from) = from else {
            return Err(io::Error::other("a replay request is 8 bytes"));
        };
        let batches = hub.kept.lock().from(from);
        for (seq, payload) in batches {
            let bytes = zmtp::message(&[b"", &seq.to_be_bytes(), &payload]);
            send(&mut writing, &bytes).await?;
        }
        let end = zmtp::message(&[b"", &END.to_be_bytes(), b""]);
        send(&mut writing, &end).await?;
    }
}

/// The block hash that a key is, when it is one: a decimal or `0x` number.
fn sequence_hash(key: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(key).ok()?;
    let digits = |t: &str| t.bytes().all(|b| b.is_ascii_alphanumeric());
    match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        Some(hex) if digits(hex) => u64::from_str_radix(hex, 16).ok(),
        None if digits(text) => text.parse().ok(),
        _ => None,
    }
}

/// `[ms, [event…], 0]`; `None` when there is nothing to say in it.
fn batch(config: &KvEventsConfig, events: &[Event], stats: &PublisherStats) -> Option<Bytes> {
    let mut bodies = Writer::default();
    let mut count = 0;
    for event in events {
        let hash = sequence_hash(&event.key);
        if event.change != Change::Cleared && hash.is_none() {
            stats.unparsed.fetch_add(1, Ordering::Relaxed);
            if !config.object_key {
                continue;
            }
        }
        body(&mut bodies, config, event, hash);
        count += 1;
    }
    if count == 0 {
        return None;
    }
    stats.batches.fetch_add(1, Ordering::Relaxed);
    stats.events.fetch_add(count as u64, Ordering::Relaxed);
    let mut out = Writer::default();
    out.array(3);
    out.unsigned(events.last().map_or(0, |e| e.unix_ms));
    out.array(count);
    out.0.extend_from_slice(&bodies.0);
    out.unsigned(0);
    Some(out.0.into())
}

fn body(out: &mut Writer, config: &KvEventsConfig, event: &Event, hash: Option<u64>) {
    let legacy = match event.change {
        Change::Stored => "BlockStored",
        Change::Removed(_) => "BlockRemoved",
        Change::Cleared => "AllBlocksCleared",
    };
    let stored = event.change == Change::Stored;
    let mut fields = 13 + usize::from(config.object_key) + 2 * usize::from(config.legacy);
    fields += match (event.change, config.legacy) {
        (Change::Stored, true) => 4,
        (Change::Stored, false) => 3,
        _ => 1,
    };
    out.map(fields);
    out.text("event_id");
    out.unsigned(event.seq);
    out.text("timestamp");
    out.unsigned(event.unix_ms);
    out.text("event_type");
    out.text(json::name(event.change));
    if config.legacy {
        out.text("type");
        out.text(legacy);
    }
    // What only an engine knows of its blocks.
    for unknown in ["model_name", "block_size", "additional_salt", "lora_name"] {
        out.text(unknown);
        out.nil();
    }
    out.text("tenant_id");
    out.text(&event.tenant);
    out.text("backend_id");
    out.text(&config.backend_id);
    out.text("group_id");
    out.text_or_nil(&event.group);
    out.text("medium");
    out.text("cpu");
    out.text("dp_rank");
    out.nil();
    if config.object_key {
        out.text("object_key");
        out.text_or_nil(&String::from_utf8_lossy(&event.key));
    }
    out.text("seq_hashes");
    out.array(usize::from(hash.is_some()));
    hash.inspect(|h| out.unsigned(*h));
    if config.legacy {
        out.text("block_hashes");
        out.array(usize::from(hash.is_some()));
        hash.inspect(|h| out.signed(*h as i64));
    }
    out.text("base_block_idx");
    if stored {
        // Objects of the pool stand alone; an index that wants a depth gets 0.
        out.unsigned(0);
        out.text("parent_hash");
        out.nil();
        out.text("token_ids");
        out.nil();
        if config.legacy {
            out.text("parent_block_hash");
            out.nil();
        }
    } else {
        out.nil();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_are_hashes() {
        assert_eq!(sequence_hash(b"123"), Some(123));
        assert_eq!(sequence_hash(b"0xfF"), Some(255));
        for key in [
            &b""[..],
            b"0x",
            b"+5",
            b"0x+5",
            b"12a",
            b"99999999999999999999",
            b"k",
        ] {
            assert_eq!(sequence_hash(key), None, "{key:?}");
        }
    }

    #[test]
    fn replay_is_bounded() {
        let mut replay = Replay::default();
        for seq in 0..REPLAY_BATCHES as u64 + 10 {
            replay.keep(seq, Bytes::from_static(b"x"));
        }
        assert_eq!(replay.batches.front().map(|b| b.0), Some(10));
        assert_eq!(replay.from(REPLAY_BATCHES as u64 + 8).len(), 2);
        assert_eq!(replay.bytes, REPLAY_BATCHES);
    }
}
