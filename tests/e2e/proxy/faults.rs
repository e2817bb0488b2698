//! What goes wrong: the rows of section 1.6, retries by phase, clients that leave, and the counters afterwards.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::mock::{Dialect, Worker};
use super::{Rig, request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const STREAM: &str = r#","stream":true,"max_tokens":50"#;
const ALL: [Dialect; 3] = [Dialect::Store, Dialect::Nixl, Dialect::Mooncake];

async fn send(rig: &Rig, more: &str) -> TcpStream {
    let mut stream = TcpStream::connect(&rig.address).await.unwrap();
    let body = format!(r#"{{"prompt":"hello"{more}}}"#);
    stream
        .write_all(&request("/v1/completions", &body))
        .await
        .unwrap();
    stream
}

fn aborted(worker: &Worker) -> usize {
    worker.aborted.load(Ordering::SeqCst)
}

#[tokio::test]
async fn a_client_that_leaves_during_prefill_stops_it() {
    for dialect in ALL {
        let rig = Rig::new(dialect, 1, 1).await;
        rig.complete("").await;
        rig.prefill[0].ttft.store(10_000_000, Ordering::SeqCst);
        let before = rig.decode[0].count();
        let client = send(&rig, STREAM).await;
        rig.until("prefill runs", async || {
            rig.prefill[0].running.load(Ordering::SeqCst) == 1
        })
        .await;
        drop(client);
        rig.until("prefill stops", async || aborted(&rig.prefill[0]) == 1)
            .await;
        rig.settled().await;
        if dialect != Dialect::Mooncake {
            assert_eq!(rig.decode[0].count(), before, "decode is not called");
        }
    }
}

#[tokio::test]
async fn a_client_that_leaves_before_the_first_token() {
    for dialect in ALL {
        let rig = Rig::new(dialect, 1, 1).await;
        rig.complete("").await;
        let (done, seen) = (
            rig.prefill[0].finished.load(Ordering::SeqCst),
            rig.decode[0].count(),
        );
        rig.decode[0].ttft.store(300_000, Ordering::SeqCst);
        rig.decode[0].itl.store(100_000, Ordering::SeqCst);
        let client = send(&rig, STREAM).await;
        rig.until("decode runs", async || {
            rig.decode[0].count() > seen && rig.prefill[0].finished.load(Ordering::SeqCst) > done
        })
        .await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(client);
        // With pinned KV only after it was fetched; never to its end (5 s).
        rig.until("decode stops", async || aborted(&rig.decode[0]) == 1)
            .await;
        rig.settled().await;
        let released = rig.metric("mooncake_proxy_handoffs_released_total").await;
        assert_eq!(
            released,
            u64::from(dialect != Dialect::Store),
            "{dialect:?}"
        );
    }
}

/// A refusal has fetched nothing, whoever is still there to read it.
#[tokio::test]
async fn a_client_that_leaves_what_decode_refuses_pins_nothing() {
    let rig = Rig::new(Dialect::Nixl, 1, 1).await;
    rig.complete("").await;
    let (done, seen) = (
        rig.prefill[0].finished.load(Ordering::SeqCst),
        rig.decode[0].count(),
    );
    rig.decode[0].refuses_after.store(60_000, Ordering::SeqCst);
    rig.decode[0].fail(400, 1);
    let client = send(&rig, STREAM).await;
    rig.until("decode runs", async || {
        rig.decode[0].count() > seen && rig.prefill[0].finished.load(Ordering::SeqCst) > done
    })
    .await;
    drop(client);
    rig.settled().await;
    assert_eq!(rig.world.pinned(), 0);
    assert_eq!(rig.decode[0].count(), seen + 2, "refused, then fetched");
}

#[tokio::test]
async fn a_client_that_leaves_in_mid_stream_or_closes_half() {
    for half in [false, true] {
        let rig = Rig::new(Dialect::Nixl, 1, 1).await;
        rig.decode[0].itl.store(50_000, Ordering::SeqCst);
        let mut client = send(&rig, STREAM).await;
        let mut buffer = [0; 512];
        assert!(client.read(&mut buffer).await.unwrap() > 0);
        if half {
            client.shutdown().await.unwrap();
        } else {
            drop(client);
        }
        rig.until("decode stops", async || aborted(&rig.decode[0]) == 1)
            .await;
        rig.settled().await;
    }
}

#[tokio::test]
async fn errors_of_prefill_are_passed_on_and_decode_is_not_called() {
    for dialect in ALL {
        let rig = Rig::new(dialect, 1, 1).await;
        for status in [500, 400, 404, 503] {
            let before = rig.prefill[0].count();
            rig.prefill[0].fail(status, 1);
            let reply = rig.complete(STREAM).await;
            assert_eq!(u64::from(reply.status), status);
            assert_eq!(
                reply.text(),
                format!(r#"{{"error":{{"message":"injected","code":{status}}}}}"#)
            );
            assert_eq!(
                rig.prefill[0].count() - before,
                1,
                "not tried again at the same instance"
            );
        }
        if dialect != Dialect::Mooncake {
            assert_eq!(rig.decode[0].count(), 0);
        }
        rig.settled().await;
    }
}

#[tokio::test]
async fn prefill_is_tried_elsewhere() {
    for dialect in [Dialect::Store, Dialect::Nixl] {
        let rig = Rig::new(dialect, 2, 1).await;
        for status in [503, 429, 502, 504] {
            rig.prefill[0].fail(status, 1);
            rig.prefill[1].fail(status, 0);
            for _ in 0..2 {
                assert_eq!(rig.complete("").await.status, 200);
            }
        }
        assert_eq!(
            rig.metric("mooncake_proxy_retries_total{leg=\"prefill\"}")
                .await,
            4
        );
        for (cause, count) in [("busy", 1), ("status", 3), ("connect", 0)] {
            let name = format!("mooncake_proxy_retry_causes_total{{cause=\"{cause}\"}}");
            assert_eq!(rig.metric(&name).await, count);
        }
        rig.settled().await;
    }
}

#[tokio::test]
async fn errors_of_decode_before_its_first_byte() {
    // Store: another decode instance, and prefill is kept.
    let rig = Rig::new(Dialect::Store, 1, 2).await;
    for status in [500, 429, 503] {
        for worker in &rig.decode {
            worker.fail(0, 0);
        }
        rig.decode[0].fail(status, 1);
        rig.decode[1].fail(status, 0);
        for _ in 0..2 {
            assert_eq!(rig.complete(STREAM).await.status, 200);
        }
    }
    assert_eq!(rig.prefill[0].count(), 6, "prefill ran once per request");
    // Nobody else: the error as it came.
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    for status in [500, 429, 400] {
        rig.decode[0].fail(status, 1);
        let reply = rig.complete(STREAM).await;
        assert_eq!(u64::from(reply.status), status);
        assert_eq!(reply.json()["error"]["message"], "injected");
        assert!(reply.head.contains("content-type: application/json"));
    }
    assert_eq!(rig.decode[0].count(), 3);
    rig.settled().await;
}

#[tokio::test]
async fn a_decode_instance_that_dies_in_mid_stream() {
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    rig.decode[0].drop_after.store(3, Ordering::SeqCst);
    let reply = rig.complete(STREAM).await;
    let text = reply.text();
    assert_eq!(reply.status, 200);
    assert!(
        text.contains(r#"data: {"token":2}"#) && text.contains(r#"data: {"error":{"message":"#),
        "{text}"
    );
    assert!(!text.contains("half"), "half a chunk is held back");
    assert!(
        !text.contains("[DONE]") && !text.ends_with("0\r\n\r\n"),
        "no clean end: {text}"
    );
    assert_eq!(rig.metric("mooncake_proxy_upstream_cuts_total").await, 1);
    rig.settled().await;
}

#[tokio::test]
async fn dead_and_silent_instances() {
    let rig = Rig::with(Dialect::Store, 1, 2, |c| {
        c.first_token_timeout = Duration::from_millis(300);
        c.health_interval = Duration::from_secs(30);
    })
    .await;
    rig.decode[0].kill();
    tokio::time::sleep(Duration::from_millis(20)).await;
    for _ in 0..4 {
        assert_eq!(rig.complete("").await.status, 200);
    }
    rig.decode[1].hang.store(true, Ordering::SeqCst);
    let reply = rig.complete("").await;
    assert_eq!(reply.status, 504);
    assert!(!reply.text().contains("127.0.0.1"));
    rig.settled().await;
}

#[tokio::test]
async fn silence_has_a_bound_in_every_phase() {
    for dialect in ALL {
        let rig = Rig::with(dialect, 1, 1, |c| {
            c.prefill_timeout = Duration::from_millis(250);
            c.first_token_timeout = Duration::from_millis(250);
            c.idle_timeout = Duration::from_millis(250);
            c.health_interval = Duration::from_secs(30);
        })
        .await;
        assert_eq!(rig.complete("").await.status, 200);
        rig.prefill[0].hang.store(true, Ordering::SeqCst);
        let reply = rig.complete(STREAM).await;
        assert_eq!(reply.status, 504, "{dialect:?} {}", reply.text());
        rig.prefill[0].hang.store(false, Ordering::SeqCst);
        rig.settled().await;
        // In the middle of an answer: no clean end.
        rig.decode[0].itl.store(2_000_000, Ordering::SeqCst);
        let text = rig.complete(STREAM).await.text();
        assert!(
            text.contains(r#"{"token":0}"#) && text.contains(r#"data: {"error":"#),
            "{text}"
        );
        assert!(!text.contains("[DONE]"), "{text}");
        rig.settled().await;
    }
}

#[tokio::test]
async fn the_breaker_opens_and_closes_again() {
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    rig.decode[0].fail(500, 5);
    for _ in 0..5 {
        assert_eq!(rig.complete("").await.status, 500);
    }
    let refused = rig.complete("").await;
    assert_eq!(refused.status, 503);
    assert!(refused.head.contains("retry-after: "));
    assert_eq!(rig.decode[0].count(), 5, "nobody was sent there");
    assert_eq!(rig.prefill[0].count(), 5, "refused before prefill");
    assert_eq!(rig.get("/ready").await.status, 503);
    tokio::time::sleep(Duration::from_millis(2100)).await;
    assert_eq!(rig.complete("").await.status, 200);
    assert_eq!(rig.get("/ready").await.status, 200);
    rig.settled().await;
}

#[tokio::test]
async fn a_prefill_pool_that_is_down() {
    for (dialect, down, status) in [
        (Dialect::Store, "refuse", 503),
        (Dialect::Store, "decode", 200),
        // Their decode engines cannot.
        (Dialect::Sglang, "decode", 503),
        (Dialect::P2p, "decode", 503),
    ] {
        let rig = Rig::with(dialect, 1, 1, |c| {
            if down == "decode" {
                c.prefill_down = mooncake::proxy::config::PrefillDown::Decode;
            }
        })
        .await;
        rig.prefill[0].unhealthy.store(true, Ordering::SeqCst);
        rig.until("down", async || rig.get("/ready").await.status == 503)
            .await;
        assert_eq!(rig.complete("").await.status, status);
        rig.prefill[0].unhealthy.store(false, Ordering::SeqCst);
        rig.until("up", async || rig.get("/ready").await.status == 200)
            .await;
        assert_eq!(rig.complete("").await.status, 200);
    }
}

#[tokio::test]
async fn admission_refuses_before_prefill() {
    let rig = Rig::with(Dialect::Store, 1, 1, |c| {
        c.inflight_max = 1;
        c.queue_max = 1;
        c.queue_timeout = Duration::from_millis(150);
    })
    .await;
    rig.decode[0].ttft.store(600_000, Ordering::SeqCst);
    let first = send(&rig, "").await;
    rig.until("decode runs", async || {
        rig.decode[0].running.load(Ordering::SeqCst) == 1
    })
    .await;
    let (second, third) = tokio::join!(rig.complete(""), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        rig.complete("").await
    });
    assert_eq!((second.status, third.status), (503, 429));
    assert!(second.head.contains("retry-after: ") && third.head.contains("retry-after: "));
    assert_eq!(rig.prefill[0].count(), 1);
    drop(first);
    rig.settled().await;
    // Decode at its limit: nothing is prefilled for it either.
    let rig = Rig::with(Dialect::Store, 1, 1, |c| {
        c.instance_max = 1;
        c.queue_timeout = Duration::from_millis(100);
    })
    .await;
    rig.decode[0].ttft.store(600_000, Ordering::SeqCst);
    let _first = send(&rig, "").await;
    rig.until("decode runs", async || {
        rig.decode[0].running.load(Ordering::SeqCst) == 1
    })
    .await;
    assert_eq!(rig.complete("").await.status, 503);
    assert_eq!(rig.prefill[0].count(), 1);
}

#[tokio::test]
async fn slow_clients_do_not_hold_a_worker_for_ever() {
    let rig = Rig::with(Dialect::Store, 1, 1, |c| {
        c.client_timeout = Duration::from_millis(300)
    })
    .await;
    // Reads nothing of an endless answer.
    let _client = send(&rig, r#","stream":true,"max_tokens":10000000"#).await;
    rig.until("given up", async || {
        rig.metric("mooncake_proxy_clients_slow_total").await == 1
    })
    .await;
    // Sends nothing more of its body.
    let reply = rig
        .raw(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 10\r\n\r\n{")
        .await;
    assert_eq!(reply.status, 408);
    assert_eq!(rig.raw(b"POST /v1/comp").await.status, 408);
    rig.settled().await;
}

fn disconnects() -> usize {
    std::env::var("MOONCAKE_PROXY_DISCONNECTS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(300)
}

/// A client that sends a request and leaves after a random time.
async fn leave(address: &str, n: usize) {
    let Ok(mut stream) = TcpStream::connect(address).await else {
        return;
    };
    let more = if n.is_multiple_of(3) { "" } else { STREAM };
    let body = format!(r#"{{"prompt":"hello {n}"{more}}}"#);
    let request = request("/v1/completions", &body);
    let end = if n.is_multiple_of(17) {
        request.len() / 2
    } else {
        request.len()
    };
    let _ = stream.write_all(&request[..end]).await;
    let pause = Duration::from_micros((n as u64).wrapping_mul(2_654_435_761) % 12_000);
    let _ = tokio::time::timeout(pause, async {
        let mut buffer = [0; 256];
        while matches!(stream.read(&mut buffer).await, Ok(n) if n > 0) {}
    })
    .await;
}

#[tokio::test]
async fn random_disconnects_leave_no_orphan_and_no_count() {
    for dialect in ALL.into_iter().chain([Dialect::P2p, Dialect::Sglang]) {
        let rig = Rig::new(dialect, 2, 2).await;
        for worker in rig.prefill.iter().chain(&rig.decode) {
            worker.ttft.store(3_000, Ordering::SeqCst);
            worker.itl.store(300, Ordering::SeqCst);
            worker.keep_seen.store(false, Ordering::SeqCst);
        }
        let mut clients = tokio::task::JoinSet::new();
        for n in 0..disconnects() {
            let address = rig.address.clone();
            clients.spawn(async move { leave(&address, n).await });
            if clients.len() >= 40 {
                clients.join_next().await;
            }
        }
        clients.join_all().await;
        rig.settled().await;
        assert_eq!(
            rig.metric("mooncake_proxy_handoffs_orphaned_total").await,
            0,
            "{dialect:?}"
        );
        let page = rig.get("/metrics").await.text();
        for line in page.lines().filter(|l| l.contains("_inflight")) {
            assert!(line.starts_with('#') || line.ends_with(" 0"), "{line}");
        }
        let workers = rig.prefill.iter().chain(&rig.decode);
        let astray = workers.map(|w| w.astray.load(Ordering::SeqCst));
        assert_eq!(astray.sum::<usize>(), 0, "{dialect:?}");
        assert_eq!(rig.complete("").await.status, 200);
    }
}
