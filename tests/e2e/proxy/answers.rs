//! What is special about a request and its answer: echo, logprobs of the prompt, several prompts or choices, counts that come
//! late, and an answer that another instance goes on with.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::json;

use super::Rig;
use super::mock::Dialect;

/// One instance of each, the connector already found out.
async fn rig(dialect: Dialect) -> Rig {
    let rig = Rig::new(dialect, 1, 1).await;
    assert_eq!(rig.complete("").await.status, 200);
    rig
}

#[tokio::test]
async fn echo_and_prompt_logprobs_are_prefills() {
    for dialect in [Dialect::Store, Dialect::Nixl] {
        let rig = rig(dialect).await;
        let reply = rig
            .complete(r#","echo":true,"logprobs":1,"max_tokens":1,"x":[1.50]"#)
            .await;
        let choice = &reply.json()["choices"][0];
        assert_eq!(choice["text"], "hello tok", "{}", reply.text());
        assert_eq!(choice["logprobs"]["tokens"], json!(["hello", " tok"]));
        assert_eq!(choice["logprobs"]["text_offset"], json!([0, 5]));
        assert_eq!(choice["logprobs"]["token_logprobs"], json!([-0.25, -0.25]));
        let length = reply
            .head
            .lines()
            .find_map(|l| l.strip_prefix("content-length: "));
        assert_eq!(length, Some(reply.body.len().to_string().as_str()));
        let (p, d) = (rig.prefill[0].last(), rig.decode[0].last());
        assert_eq!(
            (p.body["echo"].as_bool(), p.body["max_tokens"].as_u64()),
            (Some(true), Some(0))
        );
        assert!(
            d.body["echo"].is_null() && d.body["max_tokens"] == 1,
            "{}",
            d.body
        );
        if dialect == Dialect::Store {
            let raw = String::from_utf8(d.raw).unwrap();
            assert_eq!(
                raw,
                r#"{"prompt":"hello","logprobs":1,"max_tokens":1,"x":[1.50]}"#
            );
        }
        let reply = rig.complete(r#","prompt_logprobs":0"#).await;
        let told = &reply.json()["choices"][0]["prompt_logprobs"];
        assert_eq!(
            *told,
            json!([null, {"17": {"logprob": -0.5}}]),
            "{}",
            reply.text()
        );
        assert!(rig.decode[0].last().body["prompt_logprobs"].is_null());
        let long = "a b ".repeat(60_000);
        let body = format!(r#"{{"prompt":"{long}","echo":true,"max_tokens":1}}"#);
        let text = rig.post("/v1/completions", &body).await.json()["choices"][0]["text"].clone();
        assert_eq!(text.as_str().map(str::len), Some(long.len() + 4));
        assert!(rig.decode[0].last().body["echo"].is_null());
        // The connection is used again: nothing of the answer was left on it.
        assert_eq!(rig.complete("").await.status, 200);
        // Streams: the first event has the prompt, the others are what they were.
        rig.decode[0].speaks.store(true, Ordering::SeqCst);
        let text = rig
            .complete(r#","echo":true,"stream":true,"max_tokens":3"#)
            .await
            .text();
        let texts: Vec<&str> = text
            .split(r#""text":""#)
            .skip(1)
            .map(|t| t.split('"').next().unwrap())
            .collect();
        assert_eq!(texts, ["hello t0", " t1", " t2"], "{text}");
        assert!(text.ends_with("data: [DONE]\n\n\r\n0\r\n\r\n"), "{text}");
        // Engines refuse these in a stream; prefill has none, so its answer goes into the first event.
        let text = rig
            .complete(r#","prompt_logprobs":1,"stream":true,"max_tokens":2"#)
            .await
            .text();
        let told = r#""prompt_logprobs":[null,{"17":{"logprob":-0.5}}]"#;
        let at = text.find(told).unwrap_or_else(|| panic!("{text}"));
        assert!(text.matches(told).count() == 1 && at < text.find(" t1").unwrap());
        let (p, d) = (rig.prefill[0].last().body, rig.decode[0].last().body);
        assert_eq!(
            (p["prompt_logprobs"].as_u64(), p["stream"].as_bool()),
            (Some(1), Some(false))
        );
        assert!(d["prompt_logprobs"].is_null() && d["stream"] == true, "{d}");
        rig.settled().await;
    }
}

#[tokio::test]
async fn errors_of_either_are_passed_on_where_answers_are_merged() {
    let rig = rig(Dialect::Nixl).await;
    rig.prefill[0].fail(400, 1);
    let reply = rig.complete(r#","echo":true"#).await;
    assert_eq!(
        (reply.status, reply.json()["error"]["message"].as_str()),
        (400, Some("injected"))
    );
    rig.decode[0].fail(400, 1);
    let reply = rig.complete(r#","echo":true"#).await;
    assert_eq!(
        (reply.status, reply.json()["error"]["message"].as_str()),
        (400, Some("injected"))
    );
    rig.settled().await;
    assert_eq!(
        rig.metric("mooncake_proxy_handoffs_orphaned_total").await,
        0
    );
}

/// The prompts of a batch do not wait for the place that the batch itself has taken.
#[tokio::test]
async fn batches_go_through_the_narrowest_bounds() {
    let rig = Rig::with(Dialect::Store, 1, 1, |c| {
        c.handoffs_max = 1;
        c.queue_timeout = std::time::Duration::from_secs(20);
    })
    .await;
    assert_eq!(rig.complete("").await.status, 200);
    let body = r#"{"prompt":["one","two","three"],"max_tokens":4}"#;
    let before = rig.prefill[0].count();
    let begun = std::time::Instant::now();
    let (a, b) = tokio::join!(
        rig.post("/v1/completions", body),
        rig.post("/v1/completions", body)
    );
    assert_eq!((a.status, b.status), (200, 200));
    assert_eq!(rig.prefill[0].count(), before + 6);
    assert!(begun.elapsed() < std::time::Duration::from_secs(10));
    rig.settled().await;
}

#[tokio::test]
async fn a_batch_is_prefilled_prompt_by_prompt() {
    let rig = Rig::new(Dialect::Store, 2, 1).await;
    for _ in 0..2 {
        assert_eq!(rig.complete("").await.status, 200);
    }
    let before: Vec<usize> = rig.prefill.iter().map(|w| w.count()).collect();
    let body =
        r#"{"prompt":["one", "two",  "three","four","five","six"], "max_tokens":4, "stream":true}"#;
    for worker in &rig.prefill {
        worker.ttft.store(20_000, Ordering::SeqCst);
    }
    let watch = async {
        let mut most = 0;
        for _ in 0..60 {
            let running =
                |w: &std::sync::Arc<super::mock::Worker>| w.running.load(Ordering::SeqCst);
            most = most.max(rig.prefill.iter().map(running).sum());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        most
    };
    let (reply, most) = tokio::join!(rig.post("/v1/completions", body), watch);
    assert_eq!(reply.status, 200);
    assert_eq!(most, 4, "at once");
    assert_eq!(rig.decode[0].last().raw, body.as_bytes(), "byte for byte");
    let mut prompts = Vec::new();
    for (worker, before) in rig.prefill.iter().zip(before) {
        let seen = worker.seen.lock().unwrap();
        assert_eq!(seen.len() - before, 3, "each to whom its policy sends it");
        prompts.extend(seen[before..].iter().map(|s| {
            assert_eq!(
                (s.body["max_tokens"].as_u64(), s.body["stream"].as_bool()),
                (Some(1), Some(false))
            );
            s.body["prompt"].as_str().unwrap().to_owned()
        }));
    }
    prompts.sort();
    assert_eq!(prompts, ["five", "four", "one", "six", "three", "two"]);
    // An error of one is the answer.
    rig.prefill[0].fail(400, 1);
    assert_eq!(rig.post("/v1/completions", body).await.status, 400);
    let ids = r#"{"prompt":[[1,2],[3]]}"#;
    assert_eq!(rig.post("/v1/completions", ids).await.status, 200);
    assert!(
        rig.prefill
            .iter()
            .any(|w| w.last().body["prompt"] == json!([3]))
    );
    rig.settled().await;
}

#[tokio::test]
async fn several_choices_are_prefilled_once() {
    let rig = rig(Dialect::Store).await;
    let before = rig.prefill[0].count();
    assert_eq!(rig.complete(r#","n":3,"best_of":4"#).await.status, 200);
    let p = rig.prefill[0].last().body;
    assert_eq!(rig.prefill[0].count(), before + 1);
    assert!(p["n"] == 1 && p["best_of"].is_null());
    assert_eq!(rig.decode[0].last().body["n"], 3);
    assert_eq!(rig.complete(r#","use_beam_search":true"#).await.status, 200);
    assert_eq!(rig.complete(r#","max_tokens":0"#).await.status, 200);
    assert_eq!(rig.prefill[0].count(), before + 1);
}

#[tokio::test]
async fn a_count_that_prefill_tells_late_is_told() {
    let rig = Rig::new(Dialect::Mooncake, 1, 1).await;
    rig.prefill[0].cached_tokens.store(16, Ordering::SeqCst);
    rig.decode[0].cached_tokens.store(1024, Ordering::SeqCst);
    let usage = r#","stream":true,"max_tokens":3,"stream_options":{"include_usage":true}"#;
    for more in ["", usage] {
        let text = rig.complete(more).await.text();
        assert!(text.contains(r#""cached_tokens":16  }"#), "{text}");
    }
    rig.settled().await;
    assert_eq!(rig.metric("mooncake_proxy_usage_merged_total").await, 2);
}

fn texts(text: &str) -> String {
    text.split(r#""text":""#)
        .skip(1)
        .map(|t| t.split('"').next().unwrap())
        .collect()
}

#[tokio::test]
async fn another_decode_instance_goes_on() {
    let rig = Rig::with(Dialect::Store, 1, 2, |c| c.resume = true).await;
    for worker in &rig.decode {
        worker.speaks.store(true, Ordering::SeqCst);
    }
    rig.decode[0].drop_after.store(3, Ordering::SeqCst);
    for _ in 0..2 {
        let text = rig
            .complete(r#","stream":true,"max_tokens":8,"min_tokens":5,"seed":1"#)
            .await
            .text();
        assert_eq!(texts(&text), " t0 t1 t2 t3 t4 t5 t6 t7", "{text}");
        assert!(text.ends_with("data: [DONE]\n\n\r\n0\r\n\r\n"), "{text}");
        assert!(!text.contains("half") && !text.contains("error"), "{text}");
    }
    let continued = rig.metric("mooncake_proxy_answers_continued_total").await;
    assert!((1..=2).contains(&continued), "{continued}");
    let rest = rig.decode[1]
        .seen
        .lock()
        .unwrap()
        .iter()
        .find(|s| s.body["max_tokens"] == 5)
        .cloned();
    let rest = rest.unwrap().body;
    assert_eq!(
        (rest["prompt"].as_str(), rest["min_tokens"].as_u64()),
        (Some("hello t0 t1 t2"), Some(2))
    );
    // What the second half would not be the same for ends as it does without it.
    for more in [
        r#","logprobs":1"#,
        r#","frequency_penalty":1"#,
        r#","guided_regex":"a""#,
    ] {
        let mut cut = false;
        for _ in 0..2 {
            let text = rig
                .complete(&format!(r#","stream":true,"max_tokens":8{more}"#))
                .await
                .text();
            cut = cut || text.contains(r#"data: {"error":"#);
        }
        assert!(cut, "{more}");
    }
    // Nobody else is left: as without.
    rig.decode[1].drop_after.store(2, Ordering::SeqCst);
    let text = rig
        .complete(r#","stream":true,"max_tokens":8"#)
        .await
        .text();
    assert!(
        text.contains(r#"data: {"error":"#) && !text.ends_with("0\r\n\r\n"),
        "{text}"
    );
    rig.settled().await;
}

/// Half an event has been passed on: nothing can follow it.
#[tokio::test]
async fn nobody_goes_on_in_the_middle_of_an_event() {
    let rig = Rig::with(Dialect::Store, 1, 2, |c| c.resume = true).await;
    for worker in &rig.decode {
        worker.speaks.store(true, Ordering::SeqCst);
        worker.drop_after.store(3, Ordering::SeqCst);
        worker.drops_in_event.store(true, Ordering::SeqCst);
    }
    let text = rig
        .complete(r#","stream":true,"max_tokens":8"#)
        .await
        .text();
    assert_eq!(texts(&text), " t0 t1 t2", "{text}");
    assert!(text.contains(r#"data: {"error":"#), "{text}");
    assert_eq!(
        rig.metric("mooncake_proxy_answers_continued_total").await,
        0
    );
    rig.settled().await;
}
