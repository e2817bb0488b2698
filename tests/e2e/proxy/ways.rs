//! The ways of a request that goes well: connectors, relay, policies, bodies large and small.

use std::sync::atomic::Ordering;

use super::mock::Dialect;
use super::{KEY, Rig, read_reply, request};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

#[tokio::test]
async fn store_prefills_one_token_and_leaves_decode_its_body() {
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    let body = r#"{ "prompt":"hello", "max_tokens" : 3,"stream":true,"stream_options":{"include_usage":true}, "x":{"y":[1.0,"\u00e9"]},"min_tokens":2}"#;
    for _ in 0..3 {
        let reply = rig.post("/v1/completions?a=b", body).await;
        assert_eq!(reply.status, 200);
        assert!(
            reply
                .head
                .contains("content-type: text/event-stream; charset=utf-8")
        );
        let wanted = "13\r\ndata: {\"token\":0}\n\n\r\n13\r\ndata: {\"token\":1}\n\n\r\n13\r\ndata: {\"token\":2}\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
        assert_eq!(reply.text(), wanted, "chunks are passed on as they came");
    }
    let (p, d) = (rig.prefill[0].last(), rig.decode[0].last());
    assert_eq!(d.raw, body.as_bytes(), "byte for byte");
    assert_eq!(d.path, "/v1/completions?a=b");
    let raw = String::from_utf8(p.raw).unwrap();
    assert_eq!(
        raw,
        r#"{ "prompt":"hello", "max_tokens" : 1,"stream":false,"x":{"y":[1.0,"\u00e9"]}}"#
    );
    rig.settled().await;
}

#[tokio::test]
async fn headers_and_request_ids_reach_both_legs() {
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    let body = r#"{"prompt":"a"}"#;
    let text = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: Application/JSON; charset=utf-8\r\nX-Request-Id: me-1\r\n\
         traceparent: 00-1-2-03\r\nAuthorization: Bearer user\r\nX-Api-Key: {KEY}\r\nTE: trailers\r\nConnection: close\r\n\
         Transfer-Encoding: chunked\r\n\r\n7;x=y\r\n{}\r\n7\r\n{}\r\n0\r\n\r\n",
        &body[..7],
        &body[7..]
    );
    let reply = rig.raw(text.as_bytes()).await;
    assert_eq!(reply.status, 200);
    assert!(
        reply.head.contains("x-request-id: me-1\r\n") && reply.head.contains("x-worker: 1\r\n")
    );
    for seen in [rig.prefill[0].last(), rig.decode[0].last()] {
        for line in [
            "x-request-id: me-1",
            "traceparent: 00-1-2-03",
            "Authorization: Bearer user",
        ] {
            assert!(seen.head.contains(line), "{line} in {}", seen.head);
        }
        let head = seen.head.to_lowercase();
        for gone in [KEY, "transfer-encoding", "te:", "connection"] {
            assert!(!head.contains(gone), "{gone} in {head}");
        }
    }
    assert!(
        !reply.head.contains(&rig.decode[0].address),
        "no address of ours"
    );
}

#[tokio::test]
async fn nixl_is_found_out_and_its_parameters_go_to_decode() {
    let rig = Rig::new(Dialect::Nixl, 1, 1).await;
    for _ in 0..3 {
        assert_eq!(rig.complete(r#","max_tokens":4"#).await.status, 200);
    }
    let d = rig.decode[0].last().body;
    assert_eq!(d["kv_transfer_params"]["do_remote_prefill"], true);
    assert_eq!(d["max_tokens"], 4);
    assert_eq!(
        rig.get("/instances").await.json()["instances"][0]["connector"],
        "nixl"
    );
    rig.settled().await;
    assert_eq!(rig.world.prefilled.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn mooncake_is_found_out_runs_both_at_once_and_survives_a_restart() {
    let rig = Rig::new(Dialect::Mooncake, 1, 1).await;
    assert_eq!(
        rig.get("/instances").await.json()["instances"][0]["connector"],
        "mooncake"
    );
    let reply = rig.complete(r#","max_tokens":2,"stream":true"#).await;
    assert_eq!(reply.status, 200);
    let (p, d) = (rig.prefill[0].last().body, rig.decode[0].last().body);
    let (p, d) = (&p["kv_transfer_params"], &d["kv_transfer_params"]);
    assert_eq!(p["transfer_id"], d["transfer_id"]);
    assert_eq!(
        d["remote_engine_id"],
        *rig.prefill[0].engine.lock().unwrap()
    );
    let port = rig.prefill[0].bootstrap.load(Ordering::SeqCst);
    assert_eq!(
        d["remote_bootstrap_addr"],
        format!("http://127.0.0.1:{port}")
    );
    "reborn".clone_into(&mut rig.prefill[0].engine.lock().unwrap());
    rig.until("the new engine id", async || {
        rig.complete("").await;
        rig.decode[0].last().body["kv_transfer_params"]["remote_engine_id"] == "reborn"
    })
    .await;
    rig.settled().await;
}

#[tokio::test]
async fn what_takes_one_leg() {
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    // Nothing is known of the connector yet.
    for more in [
        r#","n":2"#,
        r#","echo":true"#,
        r#","prompt_logprobs":1"#,
        r#","max_tokens":0"#,
    ] {
        assert_eq!(rig.complete(more).await.status, 200);
    }
    let batch = rig.post("/v1/completions", r#"{"prompt":["a","b"]}"#).await;
    assert_eq!(batch.status, 200);
    assert_eq!(
        rig.post("/v1/embeddings", r#"{"input":"a"}"#).await.status,
        200
    );
    assert_eq!(rig.post("/tokenize", "{}").await.status, 200);
    assert_eq!(
        rig.get("/v1/models").await.json()["data"][0]["id"],
        super::MODEL
    );
    assert_eq!((rig.prefill[0].count(), rig.decode[0].count()), (0, 7));
    let ids = rig.post("/v1/completions", r#"{"prompt":[1,2,3]}"#).await;
    assert_eq!((ids.status, rig.prefill[0].count()), (200, 1));
    for (path, limit) in [
        ("/v1/responses", "max_output_tokens"),
        ("/v1/messages", "max_tokens"),
    ] {
        assert_eq!(
            rig.post(path, r#"{"input":"a","messages":[]}"#)
                .await
                .status,
            200
        );
        assert_eq!(rig.prefill[0].last().body[limit], 1, "{path}");
    }
    // What only the decode instance knows is not asked of prefill, and prefill keeps nothing.
    let before = rig.prefill[0].count();
    let goes_on = r#"{"input":"a","previous_response_id":"resp_1"}"#;
    assert_eq!(rig.post("/v1/responses", goes_on).await.status, 200);
    assert_eq!(rig.prefill[0].count(), before);
    let kept = r#"{"input":"a","store":true,"background":true}"#;
    assert_eq!(rig.post("/v1/responses", kept).await.status, 200);
    let (p, d) = (rig.prefill[0].last().body, rig.decode[0].last().body);
    assert!(p["store"] == false && p["background"] == false, "{p}");
    assert!(d["store"] == true && d["background"] == true, "{d}");
}

#[tokio::test]
async fn aggregated_and_conditional() {
    let rig = Rig::with(Dialect::Store, 0, 2, |c| c.aggregated = true).await;
    assert_eq!(rig.complete("").await.status, 200);
    let rig = Rig::with(Dialect::Store, 1, 1, |c| c.prefill_min_tokens = 100).await;
    assert_eq!(rig.complete("").await.status, 200);
    assert_eq!(rig.prefill[0].count(), 0);
    let long = format!(r#"{{"prompt":"{}"}}"#, "word ".repeat(200));
    assert_eq!(rig.post("/v1/completions", &long).await.status, 200);
    assert_eq!(rig.prefill[0].count(), 1);
}

#[tokio::test]
async fn a_cached_prompt_skips_prefill_and_a_new_one_does_not() {
    let rig = Rig::with(Dialect::Store, 1, 1, |c| {
        c.prefill_min_tokens = 100;
        c.policy.prefill = "prefix";
    })
    .await;
    let long = format!(r#"{{"prompt":"{}"}}"#, "word ".repeat(900));
    for _ in 0..3 {
        assert_eq!(rig.post("/v1/completions", &long).await.status, 200);
    }
    assert_eq!((rig.prefill[0].count(), rig.decode[0].count()), (1, 3));
}

#[tokio::test]
async fn every_policy_serves_everybody() {
    for name in mooncake::proxy::policy::NAMES {
        let rig = Rig::with(Dialect::Store, 3, 2, |c| {
            c.policy.prefill = name;
            c.policy.decode = name;
        })
        .await;
        for n in 0..60 {
            let body = format!(
                r#"{{"prompt":"{}","user":"u{n}"}}"#,
                format!("p{n} ").repeat(90)
            );
            assert_eq!(rig.post("/v1/completions", &body).await.status, 200);
        }
        for worker in rig.prefill.iter().chain(&rig.decode) {
            // One request at a time: `cost` stays with whoever was measured fastest.
            let few = if *name == "cost" { 0 } else { 3 };
            assert!(worker.count() >= few, "{name}: {}", worker.count());
        }
        rig.settled().await;
    }
}

#[tokio::test]
async fn large_bodies_and_many_requests_on_one_connection() {
    let rig = Rig::with(Dialect::Store, 1, 1, |c| c.body_bytes_max = 9 << 20).await;
    let big = format!(r#"{{"prompt":"{}","max_tokens":2}}"#, "x".repeat(8 << 20));
    assert_eq!(rig.post("/v1/completions", &big).await.status, 200);
    assert_eq!(rig.decode[0].last().raw.len(), big.len());
    let too_big = format!(r#"{{"prompt":"{}"}}"#, "x".repeat(10 << 20));
    assert_eq!(rig.post("/v1/completions", &too_big).await.status, 413);
    // Pipelined: answered in order.
    let one = String::from_utf8(request("/v1/completions", r#"{"prompt":"a"}"#)).unwrap();
    let kept = one.replace("connection: close\r\n", "");
    let mut stream = TcpStream::connect(&rig.address).await.unwrap();
    stream
        .write_all((kept.repeat(5) + &one).as_bytes())
        .await
        .unwrap();
    let all = read_reply(&mut stream).await;
    assert_eq!(
        all.text().matches("HTTP/1.1 200").count(),
        5,
        "five after the first"
    );
    // HTTP/1.0: no chunks, closed at the end.
    let old = String::from_utf8(request(
        "/v1/completions",
        r#"{"prompt":"a","stream":true,"max_tokens":1}"#,
    ))
    .unwrap();
    let reply = rig
        .raw(old.replace("HTTP/1.1", "HTTP/1.0").as_bytes())
        .await;
    assert_eq!(reply.text(), "data: {\"token\":0}\n\ndata: [DONE]\n\n");
    rig.settled().await;
}
