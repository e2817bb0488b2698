//! What is passed on, and the little that is not: usage, headers of one connection, WebSockets.

use std::sync::atomic::Ordering;

use super::mock::Dialect;
use super::{MODEL, Rig, read_reply, request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[tokio::test]
async fn clients_are_told_what_prefill_had_cached() {
    for dialect in [Dialect::Store, Dialect::Nixl] {
        let rig = Rig::new(dialect, 1, 1).await;
        // The first reply of an instance that is not known yet is read as well.
        rig.complete("").await;
        rig.prefill[0].cached_tokens.store(16, Ordering::SeqCst);
        rig.decode[0].cached_tokens.store(1024, Ordering::SeqCst);
        let reply = rig.complete("").await;
        let cached = &reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"];
        assert_eq!(*cached, 16, "{}", reply.text());
        // Nothing else has changed.
        let direct = {
            let mut stream = TcpStream::connect(&rig.decode[0].address).await.unwrap();
            let body = r#"{"prompt":"hello"}"#;
            stream
                .write_all(&request("/v1/completions", body))
                .await
                .unwrap();
            read_reply(&mut stream).await
        };
        assert_eq!(reply.text(), direct.text().replace("1024", "16  "));
        let more = r#","stream":true,"max_tokens":3,"stream_options":{"include_usage":true}"#;
        let text = rig.complete(more).await.text();
        assert!(text.contains(r#""cached_tokens":16  }"#), "{text}");
        assert!(text.ends_with("data: [DONE]\n\n\r\n0\r\n\r\n"), "{text}");
        assert_eq!(rig.metric("mooncake_proxy_usage_merged_total").await, 2);
        // Prefill alone knows: decode's count is left when prefill tells none.
        rig.prefill[0].cached_tokens.store(0, Ordering::SeqCst);
        assert!(rig.complete("").await.text().contains("1024"));
        rig.settled().await;
    }
}

#[tokio::test]
async fn headers_that_connection_names_end_here() {
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    let text = String::from_utf8(request("/v1/completions", r#"{"prompt":"a"}"#)).unwrap();
    let text = text.replace(
        "connection: close",
        "connection: close, X-Private\r\nx-private: 1\r\nx-public: 2",
    );
    assert_eq!(rig.raw(text.as_bytes()).await.status, 200);
    for worker in [&rig.prefill[0], &rig.decode[0]] {
        let head = worker.last().head;
        assert!(
            !head.contains("x-private") && head.contains("x-public: 2"),
            "{head}"
        );
    }
}

#[tokio::test]
async fn a_websocket_goes_both_ways_until_one_side_ends() {
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    let mut stream = TcpStream::connect(&rig.address).await.unwrap();
    let ask = "GET /v1/realtime HTTP/1.1\r\nhost: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\nsec-websocket-key: k\r\n\r\nearly";
    stream.write_all(ask.as_bytes()).await.unwrap();
    let mut got = Vec::new();
    while !got.ends_with(b"helloearly") {
        assert!(
            stream.read_buf(&mut got).await.unwrap() > 0,
            "{:?}",
            String::from_utf8_lossy(&got)
        );
    }
    let head = String::from_utf8_lossy(&got).into_owned();
    assert!(
        head.starts_with("HTTP/1.1 101 ") && head.contains("sec-websocket-accept: x"),
        "{head}"
    );
    assert_eq!(rig.proxy.inflight(), 1);
    let big = vec![7; 1 << 20];
    let mut back = vec![0; big.len()];
    let (mut reader, mut writer) = stream.split();
    let (wrote, read) = tokio::join!(writer.write_all(&big), reader.read_exact(&mut back));
    wrote.unwrap();
    read.unwrap();
    assert!(back == big);
    stream.shutdown().await.unwrap();
    assert_eq!(stream.read_buf(&mut got).await.unwrap(), 0);
    rig.settled().await;
    // Who did not ask gets none, and a refusal is passed on as it is.
    assert_eq!(rig.get("/v1/realtime").await.status, 426);
}

/// Their memory is used again: nobody is sent another's.
#[tokio::test]
async fn long_prompts_arrive_as_they_were_sent() {
    let rig = Rig::new(Dialect::Nixl, 1, 1).await;
    let send = async |n: usize| {
        let prompt = format!("{n:05} ").repeat(11_000 + 9_000 * (n % 7));
        let body = format!(r#"{{"model":"{MODEL}","prompt":"{prompt}","max_tokens":1}}"#);
        assert_eq!(rig.post("/v1/completions", &body).await.status, 200);
        prompt
    };
    let mut sent = Vec::new();
    for round in 0..4 {
        let at = round * 4;
        let four = tokio::join!(send(at), send(at + 1), send(at + 2), send(at + 3));
        sent.extend([four.0, four.1, four.2, four.3]);
    }
    for worker in [&rig.prefill[0], &rig.decode[0]] {
        let seen = worker.seen.lock().unwrap();
        let mut got: Vec<&str> = seen
            .iter()
            .filter_map(|s| s.body["prompt"].as_str())
            .collect();
        got.sort_unstable();
        assert!(sent.iter().eq(got.iter()), "another's bytes");
    }
}
