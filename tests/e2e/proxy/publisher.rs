//! An engine's publisher of KV events as libzmq speaks it: PUB with numbered batches, and a ROUTER that replays them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast;

/// A part of an event, written as MessagePack.
pub(crate) enum Part<'a> {
    Nil,
    Int(u64),
    Text(&'a str),
    Ints(&'a [u64]),
}

fn part(out: &mut Vec<u8>, part: &Part<'_>) {
    match part {
        Part::Nil => out.push(0xc0),
        Part::Int(number) => {
            out.push(0xcf);
            out.extend_from_slice(&number.to_be_bytes());
        }
        Part::Text(text) => {
            out.extend_from_slice(&[0xd9, text.len() as u8]);
            out.extend_from_slice(text.as_bytes());
        }
        Part::Ints(numbers) => {
            out.push(0xdd);
            out.extend_from_slice(&(numbers.len() as u32).to_be_bytes());
            for number in *numbers {
                self::part(out, &Part::Int(*number));
            }
        }
    }
}

fn map(fields: &[(&str, Part<'_>)]) -> Vec<u8> {
    let mut out = vec![0x80 | fields.len() as u8];
    for (name, value) in fields {
        part(&mut out, &Part::Text(name));
        part(&mut out, value);
    }
    out
}

pub(crate) fn stored(hashes: &[u64], parent: Option<u64>, tokens: &[u64], medium: &str) -> Vec<u8> {
    map(&[
        ("type", Part::Text("BlockStored")),
        ("block_hashes", Part::Ints(hashes)),
        ("parent_block_hash", parent.map_or(Part::Nil, Part::Int)),
        ("token_ids", Part::Ints(tokens)),
        (
            "block_size",
            Part::Int(if tokens.is_empty() { 0 } else { 4 }),
        ),
        ("lora_id", Part::Nil),
        ("medium", Part::Text(medium)),
    ])
}

/// The first block of a prompt as one of several ranks tells of it, under an adapter or none.
pub(crate) fn stored_by(rank: u64, hash: u64, tokens: &[u64], lora: Option<&str>) -> Vec<u8> {
    map(&[
        ("type", Part::Text("BlockStored")),
        ("block_hashes", Part::Ints(&[hash])),
        ("parent_block_hash", Part::Nil),
        ("token_ids", Part::Ints(tokens)),
        ("block_size", Part::Int(4)),
        ("medium", Part::Text("GPU")),
        ("lora_name", lora.map_or(Part::Nil, Part::Text)),
        ("dp_rank", Part::Int(rank)),
    ])
}

pub(crate) fn removed_by(rank: u64, hash: u64) -> Vec<u8> {
    map(&[
        ("type", Part::Text("BlockRemoved")),
        ("block_hashes", Part::Ints(&[hash])),
        ("medium", Part::Text("GPU")),
        ("dp_rank", Part::Int(rank)),
    ])
}

pub(crate) fn removed(hashes: &[u64], medium: &str) -> Vec<u8> {
    map(&[
        ("type", Part::Text("BlockRemoved")),
        ("block_hashes", Part::Ints(hashes)),
        ("medium", Part::Text(medium)),
    ])
}

fn frames(parts: &[&[u8]]) -> Vec<u8> {
    let mut out = Vec::new();
    for (at, body) in parts.iter().enumerate() {
        out.push(2 | u8::from(at + 1 < parts.len()));
        out.extend_from_slice(&(body.len() as u64).to_be_bytes());
        out.extend_from_slice(body);
    }
    out
}

pub(crate) struct Publisher {
    pub(crate) port: u16,
    pub(crate) replay_port: u16,
    next: AtomicU64,
    kept: Mutex<Vec<(u64, Vec<u8>)>>,
    live: Mutex<broadcast::Sender<Option<Vec<u8>>>>,
    pub(crate) replays: AtomicU64,
    pub(crate) subscribers: AtomicU64,
    /// What is published goes to the replay only.
    pub(crate) loses: AtomicBool,
}

impl Publisher {
    pub(crate) async fn start() -> Arc<Self> {
        Self::on(TcpListener::bind("127.0.0.1:0").await.unwrap()).await
    }

    pub(crate) async fn on(live: TcpListener) -> Arc<Self> {
        let replay = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let publisher = Arc::new(Self {
            port: live.local_addr().unwrap().port(),
            replay_port: replay.local_addr().unwrap().port(),
            next: AtomicU64::new(0),
            kept: Mutex::default(),
            live: Mutex::new(broadcast::channel(1024).0),
            replays: AtomicU64::new(0),
            subscribers: AtomicU64::new(0),
            loses: AtomicBool::new(false),
        });
        for (listener, is_replay) in [(live, false), (replay, true)] {
            let publisher = publisher.clone();
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let publisher = publisher.clone();
                    tokio::spawn(async move {
                        let served = publisher.serve(stream, is_replay);
                        let _ = tokio::time::timeout(Duration::from_secs(60), served).await;
                    });
                }
            });
        }
        publisher
    }

    pub(crate) fn publish(&self, events: &[Vec<u8>]) {
        let number = self.next.fetch_add(1, Ordering::SeqCst);
        let mut payload = vec![0x93, 0xcb, 0x41, 0xd9, 0, 0, 0, 0, 0, 0];
        payload.extend_from_slice(&[0xdc, 0, events.len() as u8]);
        payload.extend(events.concat());
        payload.push(0);
        self.kept.lock().unwrap().push((number, payload.clone()));
        if !self.loses.load(Ordering::SeqCst) {
            let message = frames(&[b"kv-events", &number.to_be_bytes(), &payload]);
            let _ = self.live.lock().unwrap().send(Some(message));
        }
    }

    /// As a process that restarts: connections break, numbers begin at 0, nothing is cached.
    pub(crate) fn restart(&self) {
        self.kept.lock().unwrap().clear();
        self.next.store(0, Ordering::SeqCst);
        self.disconnect();
    }

    pub(crate) fn live_subscribers(&self) -> usize {
        self.live.lock().unwrap().receiver_count()
    }

    pub(crate) fn disconnect(&self) {
        let _ = self.live.lock().unwrap().send(None);
    }

    async fn serve(&self, mut stream: TcpStream, is_replay: bool) -> std::io::Result<()> {
        let mut greeting = [0; 64];
        (greeting[0], greeting[9], greeting[10], greeting[11]) = (0xff, 0x7f, 3, 1);
        greeting[12..16].copy_from_slice(b"NULL");
        stream.write_all(&greeting).await?;
        stream.read_exact(&mut [0; 64]).await?;
        let ready = frame(&mut stream).await?;
        assert!(
            ready.1.starts_with(b"\x05READY\x0bSocket-Type"),
            "{ready:?}"
        );
        let kind = if is_replay { "ROUTER" } else { "PUB" };
        let body = [
            b"\x05READY\x0bSocket-Type\0\0\0",
            &[kind.len() as u8][..],
            kind.as_bytes(),
        ]
        .concat();
        stream
            .write_all(&[&[4, body.len() as u8][..], &body].concat())
            .await?;
        if is_replay {
            return self.replay(stream).await;
        }
        let mut live = self.live.lock().unwrap().subscribe();
        let subscription = frame(&mut stream).await?;
        assert_eq!(subscription.1.first(), Some(&1));
        self.subscribers.fetch_add(1, Ordering::SeqCst);
        while let Ok(Some(message)) = live.recv().await {
            stream.write_all(&message).await?;
        }
        Ok(())
    }

    async fn replay(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let (empty, number) = (frame(&mut stream).await?, frame(&mut stream).await?);
        assert_eq!((empty.0 & 1, empty.1.len()), (1, 0));
        let from = u64::from_be_bytes(number.1.try_into().unwrap());
        self.replays.fetch_add(1, Ordering::SeqCst);
        let mut out = Vec::new();
        for (number, payload) in self.kept.lock().unwrap().iter().filter(|(n, _)| *n >= from) {
            out.extend(frames(&[b"", &number.to_be_bytes(), payload]));
        }
        out.extend(frames(&[b"", &u64::MAX.to_be_bytes(), b""]));
        stream.write_all(&out).await?;
        stream.read_exact(&mut [0]).await?;
        Ok(())
    }
}

/// A DEALER that has connected and shaken hands.
pub(crate) async fn dealer(address: std::net::SocketAddr) -> TcpStream {
    let end = std::time::Instant::now() + Duration::from_secs(5);
    let mut stream = loop {
        match TcpStream::connect(address).await {
            Ok(stream) => break stream,
            Err(error) => assert!(std::time::Instant::now() < end, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let mut greeting = [0; 64];
    (greeting[0], greeting[9], greeting[10], greeting[11]) = (0xff, 0x7f, 3, 1);
    greeting[12..16].copy_from_slice(b"NULL");
    stream.write_all(&greeting).await.unwrap();
    stream
        .write_all(b"\x04\x1c\x05READY\x0bSocket-Type\0\0\0\x06DEALER")
        .await
        .unwrap();
    stream.read_exact(&mut [0; 64]).await.unwrap();
    let ready = frame(&mut stream).await.unwrap();
    assert!(ready.1.ends_with(b"ROUTER"), "{ready:?}");
    stream
}

/// Sends a map of texts as one message.
pub(crate) async fn send_map(stream: &mut TcpStream, fields: &[(&str, &str)]) {
    let fields: Vec<_> = fields.iter().map(|(n, v)| (*n, Part::Text(v))).collect();
    stream.write_all(&frames(&[&map(&fields)])).await.unwrap();
}

async fn frame(stream: &mut TcpStream) -> std::io::Result<(u8, Vec<u8>)> {
    let flags = stream.read_u8().await?;
    assert_eq!(flags & 2, 0, "short frames only");
    let mut body = vec![0; usize::from(stream.read_u8().await?)];
    stream.read_exact(&mut body).await?;
    Ok((flags, body))
}
