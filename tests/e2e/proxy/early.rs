//! `--early-first-token`: what the client reads is what one instance alone would have said, to the byte, only sooner.

use std::sync::atomic::Ordering;
use std::time::Duration;

use mooncake::proxy::config::{ConnectorKind, EventsRule, ProxyConfig};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::mock::{Dialect, Worker};
use crate::publisher::{Publisher, stored};
use crate::speech::Manner;
use crate::{Reply, Rig, read_reply, request};

const EARLY: &str = "mooncake_proxy_early_tokens_total";

async fn rig(decode: usize, change: impl FnOnce(&mut ProxyConfig)) -> Rig {
    rig_of(1, decode, change).await
}

async fn rig_of(prefill: usize, decode: usize, change: impl FnOnce(&mut ProxyConfig)) -> Rig {
    let rig = Rig::with(Dialect::Store, prefill, decode, |config| {
        config.connector = Some(ConnectorKind::Store);
        config.early = true;
        config.debug_headers = true;
        change(config);
    })
    .await;
    for (n, worker) in rig.prefill.iter().chain(&rig.decode).enumerate() {
        // Two clocks never quite agree.
        let created = 1_700_000_000 + n as u64;
        speaks(worker, |m| m.created = created);
    }
    rig
}

fn speaks(worker: &Worker, change: impl FnOnce(&mut Manner)) {
    let mut manner = worker.manner.lock().unwrap();
    change(manner.get_or_insert_with(Manner::default));
}

fn everybody(rig: &Rig, change: impl Fn(&mut Manner)) {
    for worker in rig.prefill.iter().chain(&rig.decode) {
        speaks(worker, &change);
    }
}

fn body(more: &str) -> String {
    let prompt = if more.contains("\"prompt\"") {
        ""
    } else {
        r#","prompt":"hello, world""#
    };
    format!(r#"{{"stream":true{prompt}{more}}}"#)
}

fn post(body: &str) -> Vec<u8> {
    let request = String::from_utf8(request("/v1/completions", body)).unwrap();
    request
        .replacen("host: x\r\n", "host: x\r\nx-request-id: r-1\r\n", 1)
        .into_bytes()
}

async fn ask(address: &str, body: &str) -> Reply {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(&post(body)).await.unwrap();
    read_reply(&mut stream).await
}

/// The payload, and whether it ended as it should.
fn payload(reply: &Reply) -> (String, bool) {
    let mut rest = reply.body.as_slice();
    let mut out = Vec::new();
    loop {
        let Some(end) = rest.windows(2).position(|w| w == b"\r\n") else {
            return (String::from_utf8(out).unwrap(), false);
        };
        let size = std::str::from_utf8(&rest[..end]).unwrap();
        let size = usize::from_str_radix(size, 16).unwrap();
        let data = &rest[end + 2..];
        if size == 0 {
            assert_eq!(data, b"\r\n");
            return (String::from_utf8(out).unwrap(), true);
        }
        let here = size.min(data.len());
        out.extend_from_slice(&data[..here]);
        rest = data.get(size + 2..).unwrap_or_default();
    }
}

/// The same from one instance alone.
async fn alone(worker: &Worker, body: &str) -> String {
    let (text, whole) = payload(&ask(&worker.address, body).await);
    assert!(whole, "{text}");
    text
}

const USAGE: &str = r#","stream_options":{"include_usage":true}"#;
const USAGES: &str = r#","stream_options":{"include_usage":true,"continuous_usage_stats":true}"#;

#[tokio::test]
async fn an_answer_is_what_one_instance_alone_says() {
    let rig = rig(1, |_| ()).await;
    let mut asked = 0;
    for cached in [None, Some(4096)] {
        speaks(&rig.prefill[0], |m| m.cached = cached);
        speaks(&rig.decode[0], |m| m.cached = cached.map(|_| 8));
        for usage in ["", USAGE, USAGES, r#","stream_options":null"#] {
            for more in [
                "",
                r#","max_tokens":2"#,
                r#","max_tokens":8,"min_tokens":8"#,
                r#","max_tokens":8,"temperature":0,"seed":4"#,
                r#","max_tokens":8,"temperature":0.7,"top_p":0.9,"seed":null"#,
                r#","max_tokens":4,"n":1,"stop":[],"frequency_penalty":0,"presence_penalty":0.0,"echo":false,"logprobs":null,"suffix":null"#,
                r#","max_tokens":4,"prompt":[11,22,33]"#,
                r#","max_tokens":4,"prompt":["one line"]"#,
                r#","max_tokens":4,"prompt":[[11, 22, 33]]"#,
            ] {
                let body = body(&format!("{usage}{more}"));
                let reply = ask(&rig.address, &body).await;
                let got = payload(&reply);
                let wanted = alone(&rig.prefill[0], &body).await;
                assert_eq!(got, (wanted, true), "{body}");
                assert!(
                    reply.head.starts_with("HTTP/1.1 200 OK\r\n")
                        && reply.head.contains("content-type: text/event-stream")
                        && reply.head.contains("x-request-id: r-1\r\n")
                        && reply.head.contains("transfer-encoding: chunked\r\n")
                        && reply.head.contains("route-reason: early first token\r\n"),
                    "{}",
                    reply.head
                );
                asked += 1;
                assert_eq!(rig.decode[0].count(), asked);
            }
        }
    }
    // In the middle of the answer a token that is half a character.
    everybody(&rig, |m| m.half_at = Some(2));
    let (text, _) = payload(&ask(&rig.address, &body(USAGE)).await);
    assert_eq!(text, alone(&rig.prefill[0], &body(USAGE)).await);
    rig.settled().await;
    assert_eq!(rig.metric(EARLY).await, asked as u64 + 1);
    let ttft = rig.metric("mooncake_proxy_ttft_seconds_count").await;
    assert_eq!(ttft, asked as u64 + 1, "one first token per answer");
}

#[tokio::test]
async fn what_workers_are_asked() {
    let rig = rig(1, |_| ()).await;
    let body = body(r#","max_tokens":8,"min_tokens":3,"user":"a","prompt":[11, 22]"#);
    ask(&rig.address, &body).await;
    let (p, d) = (rig.prefill[0].last().body, rig.decode[0].last().body);
    assert_eq!(
        p,
        json!({"stream": false, "max_tokens": 1, "min_tokens": 1, "user": "a", "prompt": [11, 22], "return_token_ids": true})
    );
    assert_eq!(
        d,
        json!({"stream": true, "max_tokens": 7, "min_tokens": 2, "user": "a", "prompt": [11, 22, 4_000_000_000_u64]})
    );
}

/// Reads until so many events are there.
async fn events(stream: &mut TcpStream, count: usize) -> String {
    let mut all = Vec::new();
    let reading = async {
        loop {
            let text = String::from_utf8_lossy(&all).into_owned();
            if text.matches("\n\n").count() >= count {
                return text;
            }
            assert!(stream.read_buf(&mut all).await.unwrap() > 0, "{text}");
        }
    };
    tokio::time::timeout(Duration::from_secs(10), reading)
        .await
        .unwrap()
}

#[tokio::test]
async fn the_token_does_not_wait_for_decode_and_whoever_leaves_leaves_nothing() {
    let rig = rig(1, |_| ()).await;
    rig.decode[0].hang.store(true, Ordering::SeqCst);
    for round in 1..=3 {
        let mut stream = TcpStream::connect(&rig.address).await.unwrap();
        stream.write_all(&post(&body(""))).await.unwrap();
        let text = events(&mut stream, 1).await;
        assert!(text.contains(r#""text":" t0""#), "{text}");
        if round > 1 {
            rig.until("decode is asked", async || {
                rig.decode[0].running.load(Ordering::SeqCst) == 1
            })
            .await;
        }
        drop(stream);
        rig.settled().await;
    }
    assert_eq!(rig.metric("mooncake_proxy_clients_gone_total").await, 3);
    let instances = rig.get("/instances").await.json();
    let busy = |i: &Value| i["inflight"] != 0 && !i["inflight"].is_null();
    let all = instances["instances"].as_array().unwrap();
    assert!(!all.iter().any(busy), "{instances}");
    // And in the middle of the stream.
    rig.decode[0].hang.store(false, Ordering::SeqCst);
    rig.decode[0].itl.store(2000, Ordering::SeqCst);
    for count in 1..=5 {
        let mut stream = TcpStream::connect(&rig.address).await.unwrap();
        stream.write_all(&post(&body(""))).await.unwrap();
        events(&mut stream, count).await;
    }
    // Whenever it is.
    rig.prefill[0].ttft.store(2000, Ordering::SeqCst);
    rig.decode[0].ttft.store(2000, Ordering::SeqCst);
    for pause in 0..60 {
        let mut stream = TcpStream::connect(&rig.address).await.unwrap();
        stream.write_all(&post(&body(""))).await.unwrap();
        tokio::time::sleep(Duration::from_micros(pause * 200)).await;
    }
    rig.settled().await;
}

#[tokio::test]
async fn decode_is_held_back_until_the_pool_has_the_prompt_and_the_token_is_not() {
    let publisher = Publisher::start().await;
    let rig = rig(1, |c| {
        c.barrier = Duration::from_secs(5);
        c.policy.prefill = "kv";
        c.kv_events = EventsRule::parse_list(&publisher.port.to_string()).unwrap();
        c.kv_events[0].instance = Some(c.prefill[0].clone());
    })
    .await;
    publisher.publish(&[stored(&[11, 12], None, &[1, 2, 3, 4, 5, 6, 7, 8], "GPU")]);
    publisher.publish(&[stored(&[11], None, &[], "EXTERNAL")]);
    rig.until("a source", async || {
        rig.get("/status").await.json()["store_barrier"] == "on"
    })
    .await;
    let body = body(r#","prompt":[1,2,3,4,5,6,7,8],"max_tokens":4"#);
    let mut stream = TcpStream::connect(&rig.address).await.unwrap();
    stream.write_all(&post(&body)).await.unwrap();
    let mut text = events(&mut stream, 1).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(rig.decode[0].count(), 0, "the last block is not there");
    publisher.publish(&[stored(&[12], Some(11), &[], "EXTERNAL")]);
    text += &events(&mut stream, 4).await;
    for n in 0..4 {
        assert!(text.contains(&format!("\" t{n}\"")), "{text}");
    }
    assert_eq!(rig.metric("mooncake_proxy_barrier_waits_total").await, 1);
    let timeouts = rig.metric("mooncake_proxy_barrier_timeouts_total").await;
    assert_eq!(timeouts, 0);
}

#[tokio::test]
async fn the_token_is_the_second_prefill_instances_where_the_first_fails() {
    let rig = rig_of(2, 1, |_| ()).await;
    for worker in &rig.prefill {
        worker.fail(503, 1);
        let body = body(USAGE);
        let (text, whole) = payload(&ask(&rig.address, &body).await);
        let both = [&rig.prefill[0], &rig.prefill[1]];
        worker.fail(503, 0);
        let mut wanted = Vec::new();
        for one in both {
            wanted.push(alone(one, &body).await);
        }
        assert!(whole && wanted.contains(&text), "{text}");
    }
    assert_eq!(rig.metric(EARLY).await, 2);
}

#[tokio::test]
async fn other_requests_stay_as_they_are() {
    let with = rig(1, |_| ()).await;
    let without = rig(1, |c| c.early = false).await;
    for more in [
        r#","seed":1"#,
        r#","seed":1,"temperature":0.5"#,
        r#","logprobs":1"#,
        r#","echo":true"#,
        r#","stop":"x""#,
        r#","stop":["x"]"#,
        r#","presence_penalty":0.5"#,
        r#","frequency_penalty":1"#,
        r#","repetition_penalty":1.1"#,
        r#","bad_words":["x"]"#,
        r#","guided_regex":"x""#,
        r#","structured_outputs":{"regex":"x"}"#,
        r#","response_format":{"type":"json_object"}"#,
        r#","n":2"#,
        r#","n":null"#,
        r#","max_tokens":1"#,
        r#","max_tokens":2.5"#,
        r#","max_tokens":"8""#,
        r#","min_tokens":null"#,
        r#","max_tokens":4,"min_tokens":5"#,
        r#","return_token_ids":true"#,
        r#","truncate_prompt_tokens":2"#,
        r#","stream_options":{"include_usage":1}"#,
        r#","stream_options":{"more":true}"#,
        r#","prompt":["one","two"]"#,
        r#","prompt":null"#,
        r#","stream":false"#,
        r#","unknown":1"#,
    ] {
        let body = body(more);
        let (one, other) = (
            ask(&with.address, &body).await,
            ask(&without.address, &body).await,
        );
        assert_eq!(one.status, other.status, "{body}");
        assert_eq!(one.text(), other.text(), "{body}");
        for (with, without) in [
            (&with.prefill, &without.prefill),
            (&with.decode, &without.decode),
        ] {
            assert_eq!(with[0].count(), without[0].count(), "{body}");
            // Several prompts of one request come in any order.
            let all = |w: &Worker| {
                let seen = w.seen.lock().unwrap();
                let mut all: Vec<String> = seen
                    .iter()
                    .map(|s| String::from_utf8_lossy(&s.raw).into_owned())
                    .collect();
                all.sort();
                all
            };
            assert_eq!(all(&with[0]), all(&without[0]), "{body}");
        }
    }
    let chat = r#"{"stream":true,"messages":[{"role":"user","content":"x"}]}"#;
    with.post("/v1/chat/completions", chat).await;
    without.post("/v1/chat/completions", chat).await;
    assert_eq!(with.prefill[0].last().raw, without.prefill[0].last().raw);
    assert_eq!(with.metric(EARLY).await, 0);
}

#[tokio::test]
async fn a_token_that_ends_the_text_ends_the_answer() {
    let rig = rig(1, |_| ()).await;
    everybody(&rig, |m| m.ends_at = Some(0));
    speaks(&rig.prefill[0], |m| m.cached = Some(5));
    for usage in ["", USAGE, USAGES] {
        let body = body(usage);
        let reply = ask(&rig.address, &body).await;
        let wanted = alone(&rig.prefill[0], &body).await;
        assert!(wanted.contains(r#""finish_reason":"stop""#), "{wanted}");
        assert_eq!(payload(&reply), (wanted, true), "{body}");
        assert!(!reply.head.contains("x-mooncake-decode"), "{}", reply.head);
    }
    assert_eq!(rig.decode[0].count(), 0);
    // It may not end so soon.
    let body = body(r#","min_tokens":1,"max_tokens":4"#);
    let got = payload(&ask(&rig.address, &body).await);
    assert_eq!(got, (alone(&rig.prefill[0], &body).await, true));
    assert_eq!(rig.decode[0].count(), 1);
    // The second one does.
    everybody(&rig, |m| m.ends_at = Some(1));
    let got = payload(&ask(&rig.address, &body).await);
    assert_eq!(got, (alone(&rig.prefill[0], &body).await, true));
    rig.settled().await;
}

#[tokio::test]
async fn without_a_token_that_can_be_shown_all_is_as_without() {
    let rig = rig(1, |_| ()).await;
    speaks(&rig.prefill[0], |m| m.tells_ids = false);
    let plain = body(USAGES);
    let got = payload(&ask(&rig.address, &plain).await);
    assert_eq!(got, (alone(&rig.decode[0], &plain).await, true));
    assert_eq!(rig.decode[0].last().raw, plain.as_bytes());
    // Half a character.
    everybody(&rig, |m| {
        m.tells_ids = true;
        m.half_at = Some(0);
    });
    let got = payload(&ask(&rig.address, &plain).await);
    assert_eq!(got, (alone(&rig.decode[0], &plain).await, true));
    assert_eq!(rig.decode[0].last().raw, plain.as_bytes());
    // What decode would refuse is refused before anything is shown.
    everybody(&rig, |m| m.half_at = None);
    let long = body(r#","max_tokens":4094"#);
    let reply = ask(&rig.address, &long).await;
    assert_eq!((reply.status, rig.metric(EARLY).await), (400, 0));
    let just = body(r#","max_tokens":4093"#);
    assert_eq!(ask(&rig.address, &just).await.status, 200);
    assert_eq!(rig.metric(EARLY).await, 1);
    rig.settled().await;
}

fn ends_with_error(reply: &Reply) -> bool {
    let (text, whole) = payload(reply);
    let last = text.trim_end().rsplit("\n\n").next().unwrap_or_default();
    !whole && last.starts_with(r#"data: {"error":"#) && !text.contains("[DONE]")
}

#[tokio::test]
async fn another_decode_instance_takes_over_and_nobody_is_no_clean_end() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let rig = rig(2, |c| c.access_log = Some(log.path().to_owned())).await;
    let body = body(USAGE);
    let wanted = alone(&rig.prefill[0], &body).await;
    for worker in &rig.decode {
        worker.fail(503, 1);
    }
    let reply = ask(&rig.address, &body).await;
    assert!(ends_with_error(&reply), "{}", reply.text());
    assert!(reply.text().contains(r#""text":" t0""#));
    // One of them is well.
    rig.decode[0].fail(503, 1);
    for _ in 0..4 {
        let got = payload(&ask(&rig.address, &body).await);
        assert_eq!(got, (wanted.clone(), true));
    }
    assert_eq!(rig.decode[0].fail_count.load(Ordering::SeqCst), 0);
    // A refusal is nobody else's.
    rig.decode[0].fail(400, 2);
    rig.decode[1].fail(400, 2);
    for _ in 0..2 {
        assert!(ends_with_error(&ask(&rig.address, &body).await));
    }
    rig.settled().await;
    let logged = || {
        let lines = std::fs::read_to_string(log.path()).unwrap();
        let lines = lines.lines().map(|l| serde_json::from_str(l).unwrap());
        let ours = lines.filter(|l: &Value| l["path"] == "/v1/completions");
        ours.collect::<Vec<_>>()
    };
    rig.until("logged", async || logged().len() == 7).await;
    let lines = logged();
    let ended: Vec<&str> = lines.iter().filter_map(|l| l["ended"].as_str()).collect();
    assert_eq!(
        ended,
        ["cut", "whole", "whole", "whole", "whole", "cut", "cut"]
    );
    assert!(lines.iter().all(|l| l["status"] == 200
        && l["reason"] == "early first token"
        && l["prefill"] == rig.prefill[0].address.as_str()));
    assert!(lines[0]["retries"].as_u64() > Some(0), "{lines:?}");
}

#[tokio::test]
async fn decode_that_breaks_off_is_gone_on_with_or_cut() {
    for resume in [false, true] {
        let rig = rig(2, |c| c.resume = resume).await;
        let body = body(&format!(r#","max_tokens":8{USAGES}"#));
        let wanted = alone(&rig.prefill[0], &body).await;
        rig.decode[0].drop_after.store(3, Ordering::SeqCst);
        let mut cut = 0;
        for _ in 0..4 {
            let reply = ask(&rig.address, &body).await;
            if ends_with_error(&reply) {
                cut += 1;
            } else {
                assert_eq!(payload(&reply), (wanted.clone(), true));
            }
        }
        assert_eq!(cut > 0, !resume, "{cut}");
        let continued = rig.metric("mooncake_proxy_answers_continued_total").await;
        assert_eq!(continued > 0, resume, "{continued}");
        rig.settled().await;
    }
}

#[tokio::test]
async fn clients_of_http_1_0_get_the_payload() {
    let rig = rig(1, |_| ()).await;
    for ends_at in [None, Some(0)] {
        everybody(&rig, |m| m.ends_at = ends_at);
        let body = body(USAGE);
        let request = String::from_utf8(post(&body)).unwrap();
        let request = request.replacen("HTTP/1.1", "HTTP/1.0", 1);
        let reply = rig.raw(request.as_bytes()).await;
        assert_eq!(reply.text(), alone(&rig.prefill[0], &body).await);
        assert!(!reply.head.contains("transfer-encoding"), "{}", reply.head);
    }
}
