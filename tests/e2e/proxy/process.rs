//! The command as a process: start line, SIGHUP, SIGTERM, `inspect proxy`, exit codes.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::mock::{Dialect, MODEL, Worker, World};
use super::{KEY, read_reply, request};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

const BINARY: &str = env!("CARGO_BIN_EXE_mooncake");

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command.args(arguments).env("ADMIN_API_KEY", KEY);
    command.env("RUST_LOG", "warn").kill_on_drop(true);
    command.stdin(Stdio::null()).stderr(Stdio::null());
    command
}

async fn start(arguments: &[&str]) -> (Child, String) {
    let mut child = command(arguments).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = lines.next_line().await.unwrap().unwrap();
    let (_, address) = line.split_once("http://").unwrap();
    (child, address.to_owned())
}

async fn complete(address: &str) -> u16 {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = request("/v1/completions", r#"{"prompt":"a"}"#);
    stream.write_all(&request).await.unwrap();
    read_reply(&mut stream).await.status
}

async fn until_served_by(address: &str, worker: &Worker) {
    let end = std::time::Instant::now() + Duration::from_secs(10);
    while complete(address).await != 200 || worker.count() == 0 {
        assert!(std::time::Instant::now() < end);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn signal(child: &Child, name: &str) {
    let pid = child.id().unwrap().to_string();
    let sent = std::process::Command::new("kill")
        .args([name, &pid])
        .status();
    assert!(sent.unwrap().success());
}

#[tokio::test]
async fn signals_and_inspect() {
    let world = Arc::new(World::default());
    let mut workers = Vec::new();
    for _ in 0..4 {
        workers.push(Worker::start(&world, Dialect::Store).await);
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("proxy.toml");
    let settings = |p: &Worker, d: &Worker| {
        let text = format!("prefill = \"{}\"\ndecode = \"{}\"\n", p.address, d.address);
        std::fs::write(&path, text).unwrap();
    };
    settings(&workers[0], &workers[1]);
    let file = path.to_str().unwrap();
    let (mut child, address) = start(&[
        "proxy",
        "-m",
        MODEL,
        "--config",
        file,
        "--port",
        "0",
        "--threads",
        "2",
        "--health-interval",
        "100ms",
    ])
    .await;
    until_served_by(&address, &workers[1]).await;
    settings(&workers[2], &workers[3]);
    signal(&child, "-HUP");
    until_served_by(&address, &workers[3]).await;
    // One role after the other: a request in between may still have met the old prefill instance.
    until_served_by(&address, &workers[2]).await;
    let shown = command(&["inspect", "proxy", &address])
        .output()
        .await
        .unwrap();
    let text = String::from_utf8(shown.stdout).unwrap();
    assert!(
        shown.status.success()
            && text.contains(&workers[3].address)
            && !text.contains(&workers[1].address),
        "{text}"
    );
    let wrong = command(&["inspect", "proxy", &address])
        .env("ADMIN_API_KEY", "x")
        .output()
        .await
        .unwrap();
    assert_eq!(wrong.status.code(), Some(3));
    let mut taken = command(&[
        "proxy",
        "-m",
        "m",
        "-p",
        "h:1",
        "-d",
        "h:2",
        "--port",
        address.rsplit(':').next().unwrap(),
    ]);
    assert_eq!(taken.output().await.unwrap().status.code(), Some(2));
    // A request under way ends before the process does.
    workers[3].ttft.store(400_000, Ordering::SeqCst);
    let serving = tokio::spawn({
        let address = address.clone();
        async move { complete(&address).await }
    });
    while workers[3].running.load(Ordering::SeqCst) == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    signal(&child, "-TERM");
    assert_eq!(serving.await.unwrap(), 200);
    let status = tokio::time::timeout(Duration::from_secs(5), child.wait()).await;
    assert!(status.unwrap().unwrap().success());
}

#[tokio::test]
async fn places_of_kv_are_refused_unless_told_otherwise() {
    let world = Arc::new(World::default());
    let worker = Worker::start(&world, Dialect::Store).await;
    for (more, status) in [(None, 400), (Some("--trust-kv-params"), 200)] {
        let mut arguments = vec![
            "proxy",
            "-m",
            MODEL,
            "--agg",
            "-d",
            &worker.address,
            "--port",
            "0",
        ];
        arguments.extend(more);
        let (child, address) = start(&arguments).await;
        let body = r#"{"prompt":"a","kv_transfer_params":{"remote_host":"h"}}"#;
        let mut stream = TcpStream::connect(&address).await.unwrap();
        let request = request("/v1/completions", body);
        stream.write_all(&request).await.unwrap();
        assert_eq!(read_reply(&mut stream).await.status, status, "{more:?}");
        drop(child);
    }
    assert_eq!(worker.count(), 1);
}

/// A pool of one master and one node, and what is run beside them.
struct Pool {
    master: String,
    _processes: Vec<Child>,
}

impl Pool {
    async fn start() -> Self {
        let arguments = [
            "master",
            "--bind",
            "127.0.0.1",
            "--port",
            "0",
            "--metrics-port",
            "0",
        ];
        let mut master = command(&arguments).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(master.stdout.take().unwrap()).lines();
        let line = lines.next_line().await.unwrap().unwrap();
        let address = line
            .split_whitespace()
            .find(|w| w.starts_with("127.0.0.1:"));
        let address = address.unwrap_or_else(|| panic!("{line}")).to_owned();
        let node = ["node", "--master", &address, "--memory", "64MiB"];
        let mut node = command(&node).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(node.stdout.take().unwrap()).lines();
        lines.next_line().await.unwrap().unwrap();
        Self {
            master: address,
            _processes: vec![master, node],
        }
    }

    async fn put(&self, hash: u64, rank: u32) {
        self.put_of("mock-model", hash, rank).await;
    }

    async fn put_of(&self, model: &str, hash: u64, rank: u32) {
        let key = format!("{model}@tp_rank:{rank}@pcp0@dcp0@pp_rank:0@group:0@{hash:064x}");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"kv").unwrap();
        let path = file.path().to_str().unwrap();
        let put = command(&["put", "--master", &self.master, &key, path])
            .status()
            .await
            .unwrap();
        assert!(put.success());
    }
}

#[tokio::test]
async fn decode_waits_for_what_the_master_says() {
    let pool = Pool::start().await;
    // One block is there before the proxy is: the snapshot tells it.
    pool.put(11, 0).await;
    let publisher = super::publisher::Publisher::start().await;
    let (host, port) = pool.master.rsplit_once(':').unwrap();
    let rig = super::Rig::with(Dialect::Store, 1, 1, |c| {
        c.master = Some((host.to_owned(), port.parse().unwrap()));
        c.barrier = Duration::from_secs(5);
        c.policy.prefill = "kv";
        c.kv_events =
            mooncake::proxy::config::EventsRule::parse_list(&publisher.port.to_string()).unwrap();
    })
    .await;
    rig.until("followed", async || {
        rig.get("/status").await.json()["store_barrier"] == "on"
            && publisher.subscribers.load(Ordering::SeqCst) == 2
    })
    .await;
    let tokens = [1, 2, 3, 4, 5, 6, 7, 8];
    publisher.publish(&[super::publisher::stored(&[11, 12], None, &tokens, "GPU")]);
    rig.until("known", async || {
        rig.get("/instances")
            .await
            .text()
            .contains(r#""pool_blocks":1"#)
    })
    .await;
    let body = r#"{"prompt":[1,2,3,4,5,6,7,8],"max_tokens":1}"#;
    let (reply, ()) = tokio::join!(rig.post("/v1/completions", body), async {
        rig.until("prefilled", async || rig.prefill[0].count() == 1)
            .await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(rig.decode[0].count(), 0, "the last block is not there");
        pool.put(12, 0).await;
    });
    assert_eq!((reply.status, rig.decode[0].count()), (200, 1));
    assert_eq!(rig.metric("mooncake_proxy_barrier_waits_total").await, 1);
    assert_eq!(rig.metric("mooncake_proxy_barrier_timeouts_total").await, 0);
    let removed = command(&["rm", "--master", &pool.master, "--force", "--regex", ".*"])
        .status()
        .await
        .unwrap();
    assert!(removed.success());
    rig.until("gone", async || {
        rig.get("/instances")
            .await
            .text()
            .contains(r#""pool_blocks":0"#)
    })
    .await;
}

/// vLLM's connector names keys by where the weights come from, whatever the model is served as.
#[tokio::test]
async fn keys_of_the_pool_are_named_by_the_models_root() {
    let pool = Pool::start().await;
    pool.put_of("Weights-8B", 11, 0).await;
    let publisher = super::publisher::Publisher::start().await;
    let (host, port) = pool.master.rsplit_once(':').unwrap();
    let world = std::sync::Arc::default();
    let worker = super::mock::Worker::start(&world, Dialect::Store).await;
    "/data/Weights-8B/".clone_into(&mut worker.root.lock().unwrap());
    let rig = super::Rig::with(Dialect::Store, 1, 1, |c| {
        c.prefill = vec![super::address(&worker.address)];
        c.master = Some((host.to_owned(), port.parse().unwrap()));
        c.policy.prefill = "kv";
        c.kv_events =
            mooncake::proxy::config::EventsRule::parse_list(&publisher.port.to_string()).unwrap();
    })
    .await;
    rig.until("followed", async || {
        publisher.subscribers.load(Ordering::SeqCst) == 2
    })
    .await;
    publisher.publish(&[super::publisher::stored(
        &[11, 12],
        None,
        &[1, 2, 3, 4, 5, 6, 7, 8],
        "GPU",
    )]);
    rig.until("known", async || {
        let list = rig.get("/instances").await.text();
        list.contains(r#""pool_blocks":1"#)
    })
    .await;
}
