//! KV events: who has what cached decides, gaps and restarts are found out, and decode waits for the pool.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::Rig;
use super::mock::{Dialect, MODEL, Worker, tokens_of};
use super::publisher::{Publisher, removed, stored};
use mooncake::proxy::config::{EventsRule, PolicyChoice, ProxyConfig};

const KV: PolicyChoice = PolicyChoice {
    prefill: "kv",
    decode: "round_robin",
};

/// A rule for all instances.
fn rule(publisher: &Publisher, replay: bool) -> EventsRule {
    EventsRule {
        instance: None,
        endpoint: publisher.port.to_string(),
        replay: replay.then(|| publisher.replay_port.to_string()),
    }
}

/// Two prefill instances with a publisher each, and policy `kv`.
async fn rig(replay: bool, change: impl FnOnce(&mut ProxyConfig)) -> (Rig, [Arc<Publisher>; 2]) {
    let publishers = [Publisher::start().await, Publisher::start().await];
    let rig = Rig::with(Dialect::Store, 2, 1, |c| {
        c.policy = KV;
        for (instance, publisher) in c.prefill.iter().zip(&publishers) {
            c.kv_events.push(EventsRule {
                instance: Some(instance.clone()),
                ..rule(publisher, replay)
            });
        }
        change(c);
    })
    .await;
    rig.until("both are followed", async || {
        feed(&rig, 0, "live").await == true && feed(&rig, 1, "live").await == true
    })
    .await;
    for publisher in &publishers {
        rig.until("subscribed", async || {
            publisher.subscribers.load(Ordering::SeqCst) > 0
        })
        .await;
    }
    (rig, publishers)
}

async fn feed(rig: &Rig, at: usize, field: &str) -> Value {
    let list = rig.get("/instances").await.json();
    let name = &rig.prefill[at].address;
    let all = list["instances"].as_array().unwrap();
    let found = all.iter().find(|i| i["instance"] == *name).unwrap();
    found["kv_events"][field].clone()
}

async fn blocks(rig: &Rig, at: usize, wanted: u64) {
    rig.until(&format!("{wanted} blocks"), async || {
        feed(rig, at, "blocks").await == wanted
    })
    .await;
}

/// Sends `count` requests with a prompt and says how many each prefill instance got.
async fn routed(rig: &Rig, prompt: &str, count: usize) -> [usize; 2] {
    let before = [rig.prefill[0].count(), rig.prefill[1].count()];
    for _ in 0..count {
        let body = format!(r#"{{"model":"{MODEL}","prompt":{prompt},"max_tokens":1}}"#);
        assert_eq!(rig.post("/v1/completions", &body).await.status, 200);
    }
    [0, 1].map(|n| rig.prefill[n].count() - before[n])
}

#[tokio::test]
async fn a_prompt_goes_where_its_tokens_are_cached() {
    let (rig, [one, two]) = rig(false, |_| ()).await;
    let (prompt, other) = ("[1,2,3,4,5,6,7,8,9]", "[8,7,6,5,4,3,2,1]");
    one.publish(&[stored(&[11, 12], None, &[1, 2, 3, 4, 5, 6, 7, 8], "GPU")]);
    two.publish(&[stored(&[77, 78], None, &[8, 7, 6, 5, 4, 3, 2, 1], "GPU")]);
    blocks(&rig, 0, 2).await;
    blocks(&rig, 1, 2).await;
    assert_eq!(routed(&rig, prompt, 6).await, [6, 0]);
    let counts = async |what: &str| {
        let labels = format!(r#"role="prefill",policy="kv",tokens="{what}""#);
        rig.metric(&format!("mooncake_proxy_cache_tokens_total{{{labels}}}"))
            .await
    };
    assert_eq!(
        (
            counts("query").await,
            counts("matched").await,
            counts("selected").await
        ),
        (54, 48, 48)
    );
    assert_eq!(routed(&rig, other, 6).await, [0, 6]);
    // The other engine calls the same tokens otherwise; what was routed no longer counts once events speak against it.
    one.publish(&[removed(&[11, 12], "GPU")]);
    two.publish(&[stored(&[500, 501], None, &[1, 2, 3, 4, 5, 6, 7, 8], "GPU")]);
    blocks(&rig, 0, 0).await;
    blocks(&rig, 1, 4).await;
    assert_eq!(routed(&rig, prompt, 6).await, [0, 6]);
    rig.settled().await;
}

#[tokio::test]
async fn a_text_is_learnt_and_then_judged_by_its_tokens() {
    let (rig, [one, two]) = rig(false, |_| ()).await;
    let text =
        "It was a bright cold day in April, and the clocks were striking thirteen. ".repeat(60);
    let tokens: Vec<u64> = tokens_of(&text).iter().map(|t| u64::from(*t)).collect();
    let hashes: Vec<u64> = (0..tokens.len() as u64 / 4).collect();
    one.publish(&[stored(&[9999], None, &[0, 0, 0, 0], "GPU")]);
    blocks(&rig, 0, 1).await;
    let sent = routed(&rig, &format!("\"{text}\""), 1).await;
    rig.until("learnt", async || {
        rig.metric("mooncake_proxy_texts_tokenized_total").await > 0
    })
    .await;
    // Whoever was sent it starts anew and has nothing; the other says that it has it.
    let (gone, other) = (sent[1], sent[0]);
    let body = format!(
        r#"{{"instance":"{}","type":"prefill"}}"#,
        rig.prefill[gone].address
    );
    assert_eq!(rig.post("/instances/remove", &body).await.status, 200);
    assert_eq!(rig.post("/instances/add", &body).await.status, 200);
    rig.until("followed", async || feed(&rig, gone, "live").await == true)
        .await;
    [&one, &two][other].publish(&[stored(&hashes, None, &tokens, "GPU")]);
    rig.until("told", async || {
        feed(&rig, other, "blocks").await.as_u64() >= Some(hashes.len() as u64)
    })
    .await;
    let longer = format!("\"{text} And then some more that nobody has seen.\"");
    let got = routed(&rig, &longer, 4).await;
    assert_eq!(got[other], 4, "{got:?}");
}

#[tokio::test]
async fn tokens_are_asked_for_where_prefill_counts_otherwise() {
    let (rig, [one, _]) = rig(false, |_| ()).await;
    one.publish(&[stored(&[9999], None, &[0, 0, 0, 0], "GPU")]);
    blocks(&rig, 0, 1).await;
    for worker in &rig.prefill {
        worker.cached_tokens.store(1, Ordering::SeqCst);
    }
    // Until an instance has told a count every text is asked for; these are too short.
    assert!(routed(&rig, r#""short""#, 8).await.iter().all(|n| *n > 0));
    let text = format!("\"{}\"", "So it goes, and so it went. ".repeat(200));
    let asked = async || rig.metric("mooncake_proxy_texts_tokenized_total").await;
    // New, and nothing was cached: as thought.
    routed(&rig, &text, 1).await;
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    assert_eq!(asked().await, 0);
    // Sent a moment ago, and it is not cached any more.
    routed(&rig, &text, 1).await;
    rig.until("asked", async || asked().await == 1).await;
}

#[tokio::test]
async fn what_was_missed_is_replayed_or_forgotten() {
    for replay in [true, false] {
        let (rig, [one, _]) = rig(replay, |_| ()).await;
        one.publish(&[stored(&[11], None, &[1, 2, 3, 4], "GPU")]);
        blocks(&rig, 0, 1).await;
        one.loses.store(true, Ordering::SeqCst);
        one.publish(&[stored(&[12], Some(11), &[5, 6, 7, 8], "GPU")]);
        one.loses.store(false, Ordering::SeqCst);
        one.publish(&[stored(&[13], Some(12), &[9, 9, 9, 9], "GPU")]);
        if replay {
            blocks(&rig, 0, 3).await;
            assert!(one.replays.load(Ordering::SeqCst) >= 2);
        } else {
            // Nothing is sure, and the beginning of what came now is not known.
            blocks(&rig, 0, 0).await;
            one.publish(&[stored(&[21], None, &[1, 2, 3, 4], "GPU")]);
            blocks(&rig, 0, 1).await;
        }
        assert_eq!(feed(&rig, 0, "gaps").await, 1);
    }
}

#[tokio::test]
async fn a_broken_connection_is_no_restart_and_a_restart_is() {
    let (rig, [one, _]) = rig(true, |_| ()).await;
    one.publish(&[stored(&[11], None, &[1, 2, 3, 4], "GPU")]);
    one.publish(&[stored(&[12], Some(11), &[5, 6, 7, 8], "GPU")]);
    blocks(&rig, 0, 2).await;
    one.disconnect();
    rig.until("again", async || {
        one.subscribers.load(Ordering::SeqCst) == 2
    })
    .await;
    rig.until("live", async || feed(&rig, 0, "live").await == true)
        .await;
    assert_eq!(feed(&rig, 0, "blocks").await, 2);
    // The new process has as many messages, but others.
    one.restart();
    one.publish(&[stored(&[31], None, &[3, 3, 3, 3], "GPU")]);
    one.publish(&[stored(
        &[32, 33],
        Some(31),
        &[4, 4, 4, 4, 5, 5, 5, 5],
        "GPU",
    )]);
    blocks(&rig, 0, 3).await;
    assert_eq!(routed(&rig, "[3,3,3,3,4,4,4,4]", 4).await, [4, 0]);
}

#[tokio::test]
async fn events_of_added_instances_end_with_them() {
    let rig = Rig::with(Dialect::Store, 1, 1, |c| c.policy = KV).await;
    let new = Worker::start(&rig.world, Dialect::Store).await;
    let publisher = Publisher::start().await;
    let body = |events: &str| {
        format!(
            r#"{{"type":"prefill","instance":"{}","kv_events":{events}}}"#,
            new.address
        )
    };
    let bad = rig
        .post("/instances/add", &body(r#"{"endpoint":"ipc://x"}"#))
        .await;
    assert_eq!(
        (bad.status, bad.json()["detail"].as_str()),
        (400, Some("Invalid kv_events."))
    );
    let events = format!(
        r#"{{"endpoint":"tcp://*:{}","replay_endpoint":"tcp://*:{}","topic":"kv"}}"#,
        publisher.port, publisher.replay_port
    );
    assert_eq!(rig.post("/instances/add", &body(&events)).await.status, 200);
    publisher.publish(&[stored(&[1], None, &[1, 2, 3, 4], "GPU")]);
    rig.until("heard", async || {
        rig.get("/instances").await.text().contains(r#""blocks":1"#)
    })
    .await;
    let body = format!(r#"{{"instance":"{}"}}"#, new.address);
    assert_eq!(rig.post("/instances/remove", &body).await.status, 200);
    rig.until("left", async || {
        publisher.publish(&[]);
        publisher.live_subscribers() == 0
    })
    .await;
}

#[tokio::test]
async fn decode_waits_until_the_pool_has_the_last_block() {
    let (rig, [one, two]) = rig(false, |c| c.barrier = Duration::from_millis(400)).await;
    let status = rig.get("/status").await.json();
    assert_eq!(status["store_barrier"], "no source");
    let prompt = "[1,2,3,4,5,6,7,8]";
    for publisher in [&one, &two] {
        publisher.publish(&[stored(&[11, 12], None, &[1, 2, 3, 4, 5, 6, 7, 8], "GPU")]);
    }
    one.publish(&[stored(&[11], None, &[], "EXTERNAL")]);
    rig.until("a source", async || {
        rig.get("/status").await.json()["store_barrier"] == "on"
    })
    .await;
    let began = Instant::now();
    tokio::join!(routed(&rig, prompt, 1), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(
            rig.decode[0].count(),
            0,
            "the second block is not there yet"
        );
        one.publish(&[stored(&[12], Some(11), &[], "EXTERNAL")]);
    });
    let took = began.elapsed();
    assert!((100..390).contains(&took.as_millis()), "{took:?}");
    assert_eq!(rig.metric("mooncake_proxy_barrier_waits_total").await, 1);
    // It is there now: no wait. A block that never comes costs the bound and no more.
    routed(&rig, prompt, 1).await;
    assert_eq!(rig.metric("mooncake_proxy_barrier_waits_total").await, 1);
    let began = Instant::now();
    routed(&rig, "[9,9,9,9]", 1).await;
    assert!(began.elapsed() >= Duration::from_millis(390));
    assert_eq!(rig.metric("mooncake_proxy_barrier_timeouts_total").await, 1);
}
