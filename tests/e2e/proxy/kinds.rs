//! Which connector an instance has: found out in spite of faults, again after a restart, and kept to by what is tried again.

use std::sync::atomic::Ordering;

use super::Rig;
use super::mock::{Dialect, Worker};

async fn connector(rig: &Rig, worker: &Worker) -> String {
    let list = rig.get("/instances").await.json();
    let all = list["instances"].as_array().unwrap().clone();
    let found = all.iter().find(|i| i["instance"] == *worker.address);
    found.unwrap()["connector"].as_str().unwrap().to_owned()
}

/// A question that got no answer is asked again, and nobody is served by a guess meanwhile.
#[tokio::test]
async fn an_sglang_server_is_found_out_though_it_did_not_answer_first() {
    for mute in [1, 2, 5] {
        let rig = Rig::new(Dialect::Sglang, 1, 1).await;
        let slow = &rig.prefill[0];
        slow.unhealthy.store(true, Ordering::SeqCst);
        rig.until("down", async || rig.get("/ready").await.status == 503)
            .await;
        slow.mute.store(mute, Ordering::SeqCst);
        slow.unhealthy.store(false, Ordering::SeqCst);
        rig.until("up", async || rig.get("/ready").await.status == 200)
            .await;
        if mute < 3 {
            assert_eq!(
                slow.mute.load(Ordering::SeqCst),
                0,
                "it was not used before"
            );
        }
        // Asked until it says so, though it is in use by then.
        rig.until("found out", async || {
            connector(&rig, slow).await == "sglang"
        })
        .await;
        let reply = rig.complete("").await;
        assert_eq!(reply.status, 200, "{mute} {}", reply.text());
        assert!(slow.last().body["bootstrap_room"].is_u64());
        assert!(slow.last().body["kv_transfer_params"].is_null());
        rig.settled().await;
    }
}

/// An SGLang server is one or the other: requests for the other role would wait there for ever.
#[tokio::test]
async fn a_server_that_says_it_is_something_else_is_not_used() {
    let rig = Rig::new(Dialect::Sglang, 1, 1).await;
    for (role, own) in [("prefill", "decode"), ("decode", "prefill")] {
        let new = Worker::start(&rig.world, Dialect::Sglang).await;
        own.clone_into(&mut new.mode.lock().unwrap());
        let body = format!(r#"{{"instance":"{}","type":"{role}"}}"#, new.address);
        assert_eq!(rig.post("/instances/add", &body).await.status, 200);
        let health = async || {
            let list = rig.get("/instances").await.json();
            let all = list["instances"].as_array().unwrap().clone();
            let found = all.iter().find(|i| i["instance"] == *new.address).cloned();
            found.unwrap()["health"].as_str().unwrap().to_owned()
        };
        rig.until("found out", async || health().await == "wrong_role")
            .await;
        for _ in 0..4 {
            assert_eq!(rig.complete("").await.status, 200);
        }
        assert_eq!(new.count(), 0);
        // Started anew as what it is used for.
        role.clone_into(&mut new.mode.lock().unwrap());
        rig.until("used", async || {
            assert_eq!(rig.complete("").await.status, 200);
            new.count() > 0
        })
        .await;
        rig.settled().await;
    }
}

/// Out of reach for a while is not restarted: the same engine id is still a bootstrap server's.
#[tokio::test]
async fn mooncake_is_found_out_again_though_nothing_has_changed() {
    let rig = Rig::new(Dialect::Mooncake, 1, 1).await;
    let worker = &rig.prefill[0];
    assert_eq!(connector(&rig, worker).await, "mooncake");
    worker.unhealthy.store(true, Ordering::SeqCst);
    rig.until("down", async || rig.get("/ready").await.status == 503)
        .await;
    worker.unhealthy.store(false, Ordering::SeqCst);
    rig.until("up", async || rig.get("/ready").await.status == 200)
        .await;
    assert_eq!(connector(&rig, worker).await, "mooncake");
    assert_eq!(rig.complete("").await.status, 200);
    assert!(worker.last().body["kv_transfer_params"]["transfer_id"].is_string());
    rig.settled().await;
}

/// A request that was sent before a restart says nothing about who is there now.
#[tokio::test]
async fn an_answer_of_before_a_restart_names_no_connector() {
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    let worker = &rig.prefill[0];
    worker.ttft.store(1_200_000, Ordering::SeqCst);
    let (reply, ()) = tokio::join!(rig.complete(""), async {
        rig.until("prefill runs", async || {
            worker.running.load(Ordering::SeqCst) == 1
        })
        .await;
        worker.unhealthy.store(true, Ordering::SeqCst);
        rig.until("down", async || rig.get("/ready").await.status == 503)
            .await;
        worker.unhealthy.store(false, Ordering::SeqCst);
        rig.until("up", async || rig.get("/ready").await.status == 200)
            .await;
        assert_eq!(worker.running.load(Ordering::SeqCst), 1);
    });
    assert_eq!(reply.status, 200);
    assert_eq!(connector(&rig, worker).await, "unknown");
    worker.ttft.store(0, Ordering::SeqCst);
    assert_eq!(rig.complete("").await.status, 200);
    assert_eq!(connector(&rig, worker).await, "store");
}

/// Two prefill instances of different connectors; who is tried again is asked in its own language, or not at all.
#[tokio::test]
async fn another_try_goes_to_whoever_hands_over_alike() {
    for (first, second) in [
        (Dialect::Store, Dialect::Nixl),
        (Dialect::Nixl, Dialect::Sglang),
        (Dialect::Sglang, Dialect::Store),
        (Dialect::Store, Dialect::Mooncake),
        (Dialect::Mooncake, Dialect::Store),
    ] {
        let rig = Rig::with(first, 1, 1, |c| c.policy.prefill = "random").await;
        let one = Worker::start(&rig.world, first).await;
        let other = Worker::start(&rig.world, second).await;
        let alike = Worker::start(&rig.world, first).await;
        let name = |dialect| match dialect {
            Dialect::Store => "store",
            Dialect::Nixl => "nixl",
            Dialect::Mooncake => "mooncake",
            Dialect::Sglang => "sglang",
            Dialect::P2p => "p2p",
        };
        // Told, and the other so rarely chosen that it is so only when nobody else is left.
        let told = async |worker: &Worker, dialect, weight: f64| {
            let port = worker.bootstrap.load(Ordering::SeqCst);
            let body = serde_json::json!({
                "instance": worker.address, "type": "prefill", "connector": name(dialect), "weight": weight,
                "bootstrap_port": Some(port).filter(|p| *p > 0),
            });
            let _ = rig.post("/instances/remove", &body.to_string()).await;
            let reply = rig.post("/instances/add", &body.to_string()).await;
            assert_eq!(reply.status, 200, "{}", reply.text());
        };
        told(&one, first, 1000.0).await;
        told(&other, second, 0.001).await;
        let gone = format!(r#"{{"instance":"{}"}}"#, rig.prefill[0].address);
        assert_eq!(rig.post("/instances/remove", &gone).await.status, 200);
        let all_up = async || {
            let list = rig.get("/instances").await.json();
            let all = list["instances"].as_array().unwrap().clone();
            let knows = |i: &serde_json::Value| {
                i["connector"] != "mooncake" || i["engines"].as_u64() > Some(0)
            };
            all.iter().all(|i| i["health"] == "up" && knows(i))
        };
        rig.until("both up", all_up).await;
        one.fail(503, 1000);
        let before = other.count();
        let reply = rig.complete("").await;
        assert_eq!(
            (reply.status, one.count() > 0, other.count()),
            (503, true, before),
            "{first:?} {second:?}: {}",
            reply.text()
        );
        // With one that is alike it is served.
        told(&alike, first, 1000.0).await;
        rig.until("served", async || {
            rig.complete("").await.status == 200 && alike.count() > 0
        })
        .await;
        assert_eq!(other.count(), before, "{first:?} {second:?}");
        assert!(one.count() > 1);
    }
}
