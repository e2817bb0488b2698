//! The proxy in front of workers that fail in every way section 1.6 of the reference names, with the right answers.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

mod answers;
mod attacks;
mod client_params;
mod conductor;
mod connectors;
mod control;
mod discovery;
mod early;
mod events;
mod faults;
mod kinds;
mod limits;
mod mock;
mod passing;
mod places;
mod process;
mod publisher;
mod registered;
mod roles;
mod speech;
mod ways;

use std::sync::Arc;
use std::time::{Duration, Instant};

use mock::{Dialect, MODEL, Worker, World};
use mooncake::base::trust::Token;
use mooncake::proxy::Proxy;
use mooncake::proxy::config::{InstanceAddress, ProxyConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

pub(crate) const KEY: &str = "admin-key";

/// A proxy with workers.
pub(crate) struct Rig {
    pub(crate) world: Arc<World>,
    pub(crate) prefill: Vec<Arc<Worker>>,
    pub(crate) decode: Vec<Arc<Worker>>,
    pub(crate) proxy: Proxy,
    pub(crate) address: String,
}

pub(crate) fn address(text: &str) -> InstanceAddress {
    InstanceAddress::parse(text).unwrap()
}

impl Rig {
    pub(crate) async fn new(dialect: Dialect, prefill: usize, decode: usize) -> Self {
        Self::with(dialect, prefill, decode, |_| ()).await
    }

    pub(crate) async fn with(
        dialect: Dialect,
        prefill: usize,
        decode: usize,
        change: impl FnOnce(&mut ProxyConfig),
    ) -> Self {
        let world = Arc::new(World::default());
        let mut workers = Vec::new();
        for n in 0..prefill + decode {
            // Only prefill has a bootstrap server, yet decode speaks the dialect.
            let _ = n;
            workers.push(Worker::start(&world, dialect).await);
        }
        let decode_workers = workers.split_off(prefill);
        for worker in &decode_workers {
            "decode".clone_into(&mut worker.mode.lock().unwrap());
        }
        let mut config = ProxyConfig::new(MODEL);
        config.prefill = workers.iter().map(|w| address(&w.spec())).collect();
        let decode_spec = |w: &Arc<Worker>| match dialect {
            Dialect::P2p => address(&w.spec()),
            _ => address(&w.address),
        };
        config.decode = decode_workers.iter().map(decode_spec).collect();
        if dialect == Dialect::P2p {
            config.connector = Some(mooncake::proxy::config::ConnectorKind::P2p);
        }
        config.admin_key = Token::new(KEY);
        config.health_interval = Duration::from_millis(100);
        config.queue_timeout = Duration::from_millis(500);
        change(&mut config);
        let proxy = Proxy::start(config).unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let serving = proxy.clone();
        tokio::spawn(async move { serving.serve(listener).await });
        let rig = Self {
            world,
            prefill: workers,
            decode: decode_workers,
            proxy,
            address,
        };
        rig.until("ready", async || rig.get("/ready").await.status == 200)
            .await;
        rig
    }

    pub(crate) async fn until(&self, what: &str, mut reached: impl AsyncFnMut() -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !reached().await {
            assert!(Instant::now() < end, "not reached: {what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Everything is released: nothing under way anywhere and no KV pinned.
    pub(crate) async fn settled(&self) {
        let workers = || self.prefill.iter().chain(&self.decode);
        self.until("settled", async || {
            self.proxy.inflight() == 0
                && self.world.pinned() == 0
                && workers().all(|w| w.running.load(std::sync::atomic::Ordering::SeqCst) == 0)
        })
        .await;
    }

    pub(crate) async fn raw(&self, request: &[u8]) -> Reply {
        let mut stream = TcpStream::connect(&self.address).await.unwrap();
        // The answer may come before all was sent.
        let _ = stream.write_all(request).await;
        read_reply(&mut stream).await
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.raw(
            format!(
                "GET {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {KEY}\r\nconnection: close\r\n\r\n"
            )
            .as_bytes(),
        )
        .await
    }

    pub(crate) async fn post(&self, path: &str, body: &str) -> Reply {
        self.raw(&request(path, body)).await
    }

    pub(crate) async fn complete(&self, more: &str) -> Reply {
        self.post("/v1/completions", &format!(r#"{{"prompt":"hello"{more}}}"#))
            .await
    }

    pub(crate) async fn metric(&self, name: &str) -> u64 {
        let page = self.get("/metrics").await;
        let line = page
            .text()
            .lines()
            .find_map(|l| l.strip_prefix(&format!("{name} ")).map(str::to_owned));
        line.unwrap().parse().unwrap()
    }
}

pub(crate) fn request(path: &str, body: &str) -> Vec<u8> {
    format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {KEY}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// Reads to the end of the connection; the body is as it is on the wire.
pub(crate) async fn read_reply(stream: &mut TcpStream) -> Reply {
    let mut all = Vec::new();
    let reading = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut all));
    let _ = reading.await.unwrap();
    let at = all.windows(4).position(|w| w == b"\r\n\r\n");
    let at = at.unwrap_or_else(|| panic!("no reply: {:?}", String::from_utf8_lossy(&all))) + 4;
    let head = String::from_utf8_lossy(&all[..at]).into_owned();
    Reply {
        status: head[9..12].parse().unwrap(),
        head,
        body: all[at..].to_vec(),
    }
}
