//! Places at instances: what is tried again does not wait for its own, what gives up is no refusal, whoever fails is blamed.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Rig;
use super::mock::{Dialect, Worker};
use mooncake::proxy::config::ProxyConfig;

/// One request at a time everywhere, and long patience: who waits for its own place does so for 8 s.
fn narrow(c: &mut ProxyConfig) {
    c.instance_max = 1;
    c.handoffs_max = 1;
    c.pair_handoffs_max = 1;
    c.queue_timeout = Duration::from_secs(8);
}

async fn quickly(rig: &Rig) -> u16 {
    let begun = Instant::now();
    let reply = rig.complete("").await;
    assert!(begun.elapsed() < Duration::from_secs(4), "{}", reply.text());
    reply.status
}

/// Decode refuses what it was handed over: the prompt is computed again, and the same decode instance is the only one.
#[tokio::test]
async fn the_leg_that_failed_is_no_place_that_is_waited_for() {
    let rig = Rig::with(Dialect::Nixl, 1, 1, narrow).await;
    assert_eq!(quickly(&rig).await, 200);
    rig.decode[0].fail(503, 1);
    let before = rig.prefill[0].count();
    assert_eq!(quickly(&rig).await, 200);
    assert_eq!(rig.prefill[0].count(), before + 2, "computed once more");
    rig.settled().await;
    assert_eq!(rig.metric("mooncake_proxy_refused_busy_total").await, 0);
}

#[tokio::test]
async fn retries_do_not_wait_for_the_places_of_their_own_hand_off() {
    for (dialect, role) in [
        (Dialect::Mooncake, "decode"),
        (Dialect::Mooncake, "prefill"),
        (Dialect::Sglang, "decode"),
        (Dialect::P2p, "decode"),
        (Dialect::P2p, "prefill"),
        (Dialect::Store, "prefill"),
    ] {
        // Of the role that fails there are two.
        let (p, d) = if role == "decode" { (1, 2) } else { (2, 1) };
        let rig = Rig::with(dialect, p, d, narrow).await;
        let failing = if role == "decode" {
            &rig.decode
        } else {
            &rig.prefill
        };
        for worker in failing {
            worker.fail(503, 1);
            for _ in 0..4 {
                assert_eq!(quickly(&rig).await, 200, "{dialect:?} {role}");
            }
            assert_eq!(worker.fail_count.load(Ordering::SeqCst), 0);
        }
        rig.settled().await;
    }
}

async fn failed(rig: &Rig, worker: &Worker) -> u64 {
    let list = rig.get("/instances").await.json();
    let all = list["instances"].as_array().unwrap().clone();
    let found = all.iter().find(|i| i["instance"] == *worker.address);
    found.unwrap()["failed"].as_u64().unwrap()
}

/// Of two legs at once it is the one that failed that is left out of the next try, and that its breaker counts.
#[tokio::test]
async fn the_leg_that_failed_is_blamed_and_the_other_is_used_again() {
    for dialect in [Dialect::Mooncake, Dialect::Sglang] {
        // A session's instance is always the same, so the one that has failed would be chosen again.
        let rig = Rig::with(dialect, 2, 2, |c| {
            c.policy.prefill = "session";
            c.policy.decode = "session";
            c.retries = 1;
        })
        .await;
        let send = async || {
            let reply = rig.complete(r#","user":"u""#).await;
            assert_eq!(reply.status, 200, "{dialect:?} {}", reply.text());
        };
        send().await;
        let used = |workers: &[Arc<Worker>]| workers.iter().find(|w| w.count() > 0).cloned();
        let (p, d) = (used(&rig.prefill).unwrap(), used(&rig.decode).unwrap());
        for (failing, other) in [(&p, &d), (&d, &p)] {
            let before = failed(&rig, other).await;
            failing.fail(503, 2);
            for _ in 0..3 {
                send().await;
            }
            assert_eq!(failing.fail_count.load(Ordering::SeqCst), 0);
            assert_eq!(failed(&rig, failing).await, 2, "{dialect:?}");
            let blamed = failed(&rig, other).await;
            assert_eq!(blamed, before, "{dialect:?}: it did nothing wrong");
        }
        rig.settled().await;
    }
}

/// A prompt of a list that finds no prefill instance in time is decode's to compute: nobody was refused.
#[tokio::test]
async fn a_prompt_of_a_list_that_gives_up_is_no_refusal() {
    let rig = Rig::with(Dialect::Store, 1, 1, |c| {
        c.instance_max = 1;
        c.queue_timeout = Duration::from_secs(5);
    })
    .await;
    assert_eq!(rig.complete("").await.status, 200);
    rig.prefill[0].ttft.store(900_000, Ordering::SeqCst);
    let body = r#"{"prompt":["a","b","c"],"max_tokens":2}"#;
    let reply = rig.post("/v1/completions", body).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(rig.prefill[0].count(), 2, "the first alone was prefilled");
    assert_eq!(rig.metric("mooncake_proxy_refused_busy_total").await, 0);
    rig.settled().await;
}

/// KV of a hand-off lies at prefill until decode has it: a drain waits for that.
#[tokio::test]
async fn drains_and_role_changes_wait_for_hand_offs() {
    let rig = Rig::new(Dialect::Nixl, 2, 1).await;
    for _ in 0..2 {
        assert_eq!(rig.complete("").await.status, 200);
    }
    rig.decode[0].ttft.store(600_000, Ordering::SeqCst);
    let before: Vec<usize> = rig
        .prefill
        .iter()
        .map(|w| w.finished.load(Ordering::SeqCst))
        .collect();
    let (reply, ()) = tokio::join!(rig.complete(""), async {
        let mut used = None;
        rig.until("prefilled", async || {
            let done =
                |(at, w): (usize, &Arc<Worker>)| w.finished.load(Ordering::SeqCst) > before[at];
            used = rig.prefill.iter().enumerate().position(done);
            used.is_some() && rig.decode[0].running.load(Ordering::SeqCst) == 1
        })
        .await;
        let worker = &rig.prefill[used.unwrap()];
        let body = format!(r#"{{"instance":"{}","deadline_s":20}}"#, worker.address);
        assert_eq!(rig.post("/instances/drain", &body).await.status, 202);
        tokio::time::sleep(Duration::from_millis(300)).await;
        let there = rig.get("/status").await.text().contains(&worker.address);
        assert!(there, "decode has not fetched it");
        rig.until("gone", async || {
            !rig.get("/status").await.text().contains(&worker.address)
        })
        .await;
        assert_eq!(rig.world.pinned(), 0);
    });
    assert_eq!(reply.status, 200);
}

/// `echo` is a field of completions; in a chat it is something else, and the request takes both legs.
#[tokio::test]
async fn echo_in_a_chat_is_nothing_special() {
    let rig = Rig::new(Dialect::Mooncake, 1, 1).await;
    let chat = r#"{"messages":[{"role":"user","content":"a"}],"echo":true}"#;
    assert_eq!(rig.post("/v1/chat/completions", chat).await.status, 200);
    assert_eq!((rig.prefill[0].count(), rig.decode[0].count()), (1, 1));
    assert_eq!(rig.prefill[0].last().body["echo"], true);
    rig.settled().await;
}
