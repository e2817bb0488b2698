//! Requests that mean harm: paths in disguise, bodies that never end, values that are none, heads that are too long.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::mock::Dialect;
use super::{Rig, read_reply, request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn all_counts(rig: &Rig) -> usize {
    let workers = rig.prefill.iter().chain(&rig.decode);
    workers.map(|w| w.count()).sum()
}

/// Workers undo `%XX` before they look for a path: what is not relayed must not be relayed in disguise.
#[tokio::test]
async fn paths_in_disguise() {
    let rig = Rig::new(Dialect::P2p, 1, 1).await;
    for path in [
        "/v1/load_lora%5fadapter",
        "/v1/unload%5Flora_adapter",
        "/v1/load_lora_adapter/",
        "/v1/%2e%2e/sleep",
        "/v1/..%2fsleep",
        "/v1/%5c..%5csleep",
        "/v1/%252e%252e/sleep",
        "/v1/./../sleep",
        "/v1/%ff",
        "/v1/%",
        "/%73leep",
        "/instances%2fadd",
        "/INSTANCES",
    ] {
        let reply = rig.post(path, "{}").await;
        assert_eq!(reply.status, 404, "{path}");
    }
    assert_eq!(all_counts(&rig), 0);
    // A decode engine of p2p does not survive a request that prefill has not seen.
    let reply = rig.post("/v1/%63ompletions", r#"{"prompt":"a"}"#).await;
    assert_eq!(reply.status, 200);
    assert_eq!((rig.prefill[0].count(), rig.decode[0].count()), (1, 1));
    for path in [
        "/v1/chat/completions/batch",
        "/v1/chat/%63ompletions/batch/",
    ] {
        let reply = rig.post(path, r#"{"messages":[[]]}"#).await;
        assert_eq!(reply.status, 501, "{path} {}", reply.text());
    }
    assert_eq!(rig.decode[0].astray.load(Ordering::SeqCst), 0);
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    let reply = rig.post("/v1/chat/completions/batch", "{}").await;
    assert_eq!(reply.status, 200);
}

/// A byte now and then is no progress.
#[tokio::test]
async fn bodies_that_trickle_are_given_up() {
    let rig = Rig::with(Dialect::Store, 1, 1, |c| {
        c.client_timeout = Duration::from_millis(400);
    })
    .await;
    for framing in [
        "content-length: 20000",
        "content-length: 900000",
        "transfer-encoding: chunked",
    ] {
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{framing}\r\n\r\n"
        );
        let mut stream = TcpStream::connect(&rig.address).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        let piece: &[u8] = if framing.ends_with("chunked") {
            b"1\r\n \r\n"
        } else {
            b" "
        };
        let begun = Instant::now();
        let (mut reader, mut writer) = stream.split();
        let trickling = async {
            while writer.write_all(piece).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(60)).await;
            }
            std::future::pending::<()>().await;
        };
        let mut got = [0; 12];
        tokio::select! {
            () = trickling => {}
            read = reader.read_exact(&mut got) => {
                read.unwrap();
            }
            () = tokio::time::sleep(Duration::from_secs(5)) => panic!("{framing}: still waited for"),
        }
        assert_eq!(&got, b"HTTP/1.1 408", "{framing}");
        assert!(begun.elapsed() < Duration::from_secs(3), "{framing}");
    }
    // Slow and steady is served.
    let text = request(
        "/v1/completions",
        &format!(r#"{{"prompt":"{}"}}"#, "a".repeat(3000)),
    );
    let mut stream = TcpStream::connect(&rig.address).await.unwrap();
    for piece in text.chunks(200) {
        stream.write_all(piece).await.unwrap();
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
    assert_eq!(read_reply(&mut stream).await.status, 200);
    // Nor is a head.
    let mut stream = TcpStream::connect(&rig.address).await.unwrap();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(900) {
        if stream.write_all(b"G").await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
    assert_eq!(read_reply(&mut stream).await.status, 408);
    rig.settled().await;
}

/// Whatever stands in the fields that decide the way, there is one answer, soon, and nothing is left behind.
#[tokio::test]
async fn values_that_are_none() {
    let values = [
        "null",
        "0",
        "-1",
        "0.5",
        "1e308",
        "-1e308",
        "1e400",
        "18446744073709551616",
        "\"2\"",
        "\"\"",
        "true",
        "[]",
        "[[]]",
        "{}",
        "[null]",
        "[\"\"]",
        "[\"a\",1]",
        "[1,\"a\"]",
        "[[1],\"a\"]",
        "NaN",
    ];
    let fields = [
        "prompt",
        "messages",
        "input",
        "n",
        "best_of",
        "max_tokens",
        "max_completion_tokens",
        "stream",
        "echo",
        "prompt_logprobs",
        "priority",
        "model_",
        "user",
        "stream_options",
        "use_beam_search",
        "previous_response_id",
        "kv_transfer_params_",
        "logprobs",
    ];
    for dialect in [
        Dialect::Store,
        Dialect::Nixl,
        Dialect::Mooncake,
        Dialect::Sglang,
        Dialect::P2p,
    ] {
        let rig = Rig::with(dialect, 1, 1, |c| c.resume = true).await;
        rig.complete("").await;
        for field in fields {
            for value in values {
                for base in [r#""prompt":"a","#, r#""prompt":["a","b"],"#, ""] {
                    if base.contains(field) {
                        continue;
                    }
                    let body = format!(r#"{{{base}"{field}":{value}}}"#);
                    // Streams of the mock would not end before as many tokens as were asked for.
                    let path = if field == "messages" {
                        "/v1/chat/completions"
                    } else {
                        "/v1/completions"
                    };
                    let begun = Instant::now();
                    let reply = rig.post(path, &body).await;
                    assert!(
                        matches!(reply.status, 200 | 400),
                        "{dialect:?} {body}: {} {}",
                        reply.status,
                        reply.text()
                    );
                    assert!(
                        begun.elapsed() < Duration::from_secs(5),
                        "{dialect:?} {body}"
                    );
                }
            }
        }
        rig.settled().await;
        let page = rig.get("/metrics").await.text();
        for line in page.lines().filter(|l| l.contains("_inflight")) {
            assert!(line.starts_with('#') || line.ends_with(" 0"), "{line}");
        }
        assert_eq!(
            rig.metric("mooncake_proxy_handoffs_orphaned_total").await,
            0
        );
    }
}

/// Two readings of one head: none of them.
#[tokio::test]
async fn heads_with_two_readings() {
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    let body = r#"{"prompt":"a"}"#;
    let start = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
    for (lines, status) in [
        ("content-length: 14\r\n x: folded\r\n", 400),
        ("content-length: 14\r\n\tchunked\r\n", 400),
        ("content-length: 14\r\nx: a\rb\r\n", 400),
        ("content-length: 14\r\nx: a\0b\r\n", 400),
        ("content-length: 14\r\nx y: a\r\n", 400),
        ("content-length: 14\r\n: a\r\n", 400),
        ("content-length: 14\r\nno colon\r\n", 400),
        ("Content-Length: 14\nTransfer-Encoding: chunked\r\n", 400),
        (
            "transfer-encoding: Chunked\r\ntransfer-encoding: chunked\r\n",
            400,
        ),
        ("transfer-encoding: chunked,chunked\r\n", 501),
        ("transfer-encoding: \r\n", 501),
        ("content-length: 14,14\r\n", 400),
        ("content-length: 1e1\r\n", 400),
        ("content-length: 014\r\n", 200),
        ("content_length: 99\r\ncontent-length: 14\r\n", 200),
    ] {
        let text = format!(
            "{start}{lines}connection: close\r\n\r\n{body}GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n"
        );
        let reply = rig.raw(text.as_bytes()).await;
        assert_eq!(reply.status, status, "{lines:?}");
        assert!(!reply.text().contains("HTTP/1.1"), "one answer: {lines:?}");
    }
    for chunks in [
        "e;a\n=b\r\n{\"prompt\":\"a\"}\r\n0\r\n\r\n",
        "0e \r\n{\"prompt\":\"a\"}\r\n0\r\n\r\n",
        "0xe\r\n{\"prompt\":\"a\"}\r\n0\r\n\r\n",
        "e\r\n{\"prompt\":\"a\"}0\r\n\r\n",
        "fffffffffffffffff\r\n{\"prompt\":\"a\"}\r\n0\r\n\r\n",
        "\r\n0\r\n\r\n",
        "e\r\n{\"prompt\":\"a\"}\r\n0\r\n\nx: y\r\n\r\n",
    ] {
        let text = format!("{start}transfer-encoding: chunked\r\n\r\n{chunks}");
        assert_eq!(rig.raw(text.as_bytes()).await.status, 400, "{chunks:?}");
    }
    // One that says both in two versions of HTTP.
    let old = format!("{start}transfer-encoding: chunked\r\n\r\n0\r\n\r\n")
        .replace("HTTP/1.1", "HTTP/1.0");
    assert_eq!(rig.raw(old.as_bytes()).await.status, 501);
    // Workers saw the two that were clear, each with one length.
    for worker in [&rig.prefill[0], &rig.decode[0]] {
        assert_eq!(worker.count(), 2);
        let head = worker.last().head.to_lowercase();
        assert_eq!(head.matches("\r\ncontent-length:").count(), 1, "{head}");
    }
}
