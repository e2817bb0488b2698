//! A role that changes while the instance runs: with the engine's help, without, and when it refuses.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::json;

use super::mock::{Dialect, Worker};
use super::{Rig, address};

async fn change(rig: &Rig, worker: &Worker, role: &str, deadline: f64) -> (u16, serde_json::Value) {
    let body = json!({"instance": worker.address, "role": role, "deadline_s": deadline});
    let reply = rig.post("/instances/role", &body.to_string()).await;
    (reply.status, reply.json())
}

async fn role_of(rig: &Rig, worker: &Worker) -> (String, bool) {
    let list = rig.get("/instances").await.json();
    let all = list["instances"].as_array().unwrap().clone();
    let found = all
        .iter()
        .find(|i| i["instance"] == *worker.address)
        .unwrap();
    let is_used = found["draining"] == false && found["aside"].is_null();
    (found["role"].as_str().unwrap().to_owned(), is_used)
}

#[tokio::test]
async fn an_engine_that_can_is_switched_when_it_is_idle() {
    let rig = Rig::new(Dialect::Sglang, 2, 1).await;
    let moved = &rig.prefill[1];
    moved.switches.store(true, Ordering::SeqCst);
    for worker in rig.prefill.iter().chain(&rig.decode) {
        worker.ttft.store(30_000, Ordering::SeqCst);
    }
    // Requests before, meanwhile and after: none fails.
    let load = async {
        for _ in 0..12 {
            let (one, two) = tokio::join!(rig.complete(""), rig.complete(""));
            assert_eq!(
                (one.status, two.status),
                (200, 200),
                "{} {}",
                one.text(),
                two.text()
            );
        }
    };
    let (switched, ()) = tokio::join!(
        async {
            tokio::time::sleep(Duration::from_millis(80)).await;
            change(&rig, moved, "decode", 10.0).await
        },
        load
    );
    assert_eq!(switched.0, 200, "{}", switched.1);
    assert_eq!(switched.1["engine_switched"], true);
    assert_eq!(moved.switched.load(Ordering::SeqCst), 1);
    rig.until("used as decode", async || {
        rig.complete("").await;
        moved.last().body["bootstrap_room"].is_u64() && role_of(&rig, moved).await.0 == "decode"
    })
    .await;
    let (status, again) = change(&rig, moved, "decode", 1.0).await;
    assert_eq!(
        (status, again["engine_switched"].as_bool()),
        (200, Some(false))
    );
    let (status, both) = change(&rig, moved, "both", 1.0).await;
    assert_eq!(status, 400, "{both}");
    // And back: it is asked anew what it is.
    assert_eq!(change(&rig, moved, "prefill", 10.0).await.0, 200);
    rig.until("used as prefill", async || {
        let before = moved.count();
        rig.complete("").await;
        rig.complete("").await;
        moved.count() > before
    })
    .await;
    rig.settled().await;
}

#[tokio::test]
async fn an_engine_without_it_changes_in_the_table_alone() {
    let rig = Rig::new(Dialect::Store, 2, 1).await;
    let moved = &rig.prefill[1];
    moved.ttft.store(300_000, Ordering::SeqCst);
    let (slow, changed) = tokio::join!(
        async { tokio::join!(rig.complete(""), rig.complete("")) },
        async {
            rig.until("busy", async || moved.running.load(Ordering::SeqCst) == 1)
                .await;
            change(&rig, moved, "decode", 0.0).await
        }
    );
    assert_eq!((slow.0.status, slow.1.status), (200, 200));
    assert_eq!(
        (changed.0, changed.1["engine_switched"].as_bool()),
        (200, Some(false))
    );
    moved.ttft.store(0, Ordering::SeqCst);
    rig.until("used as decode", async || {
        rig.complete(r#","max_tokens":7"#).await;
        moved.last().body["max_tokens"] == 7
    })
    .await;
    assert_eq!(role_of(&rig, moved).await, ("decode".to_owned(), true));
}

#[tokio::test]
async fn what_goes_wrong_with_a_switch() {
    let rig = Rig::new(Dialect::Sglang, 2, 1).await;
    let moved = &rig.prefill[1];
    moved.switches.store(true, Ordering::SeqCst);
    // Not idle in time: nothing has changed, and it is used on.
    moved.ttft.store(400_000, Ordering::SeqCst);
    let (_, (status, body)) = tokio::join!(
        async { tokio::join!(rig.complete(""), rig.complete("")) },
        async {
            rig.until("busy", async || moved.running.load(Ordering::SeqCst) == 1)
                .await;
            let (first, second) = tokio::join!(
                change(&rig, moved, "decode", 0.1),
                change(&rig, moved, "decode", 0.1)
            );
            // One of two at once is told that it is under way.
            let mut both = [
                first.1["detail"].to_string(),
                second.1["detail"].to_string(),
            ];
            both.sort();
            assert!(
                both[0].contains("deadline") && both[1].contains("already"),
                "{both:?}"
            );
            if first.1["detail"].to_string().contains("deadline") {
                first
            } else {
                second
            }
        }
    );
    assert_eq!(status, 409, "{body}");
    assert_eq!(role_of(&rig, moved).await, ("prefill".to_owned(), true));
    moved.ttft.store(0, Ordering::SeqCst);
    rig.settled().await;
    // Refused, and safe to use.
    let refuses =
        json!({"success": false, "message": "no room for graphs", "safe_to_restore": true});
    *moved.switch_fault.lock().unwrap() = Some((400, refuses));
    let (status, body) = change(&rig, moved, "decode", 1.0).await;
    assert!(
        status == 409
            && body["detail"]
                .as_str()
                .unwrap()
                .contains("no room for graphs"),
        "{body}"
    );
    assert_eq!(role_of(&rig, moved).await, ("prefill".to_owned(), true));
    // An older one does not say: what it is now decides.
    *moved.switch_fault.lock().unwrap() =
        Some((400, json!({"success": false, "message": "not enabled"})));
    assert_eq!(change(&rig, moved, "decode", 1.0).await.0, 409);
    assert_eq!(role_of(&rig, moved).await, ("prefill".to_owned(), true));
    // Broken: it is not used any more, and the others are.
    let broken =
        json!({"success": false, "message": "unhealthy, restart", "safe_to_restore": false});
    *moved.switch_fault.lock().unwrap() = Some((400, broken));
    let (status, body) = change(&rig, moved, "decode", 1.0).await;
    assert_eq!(status, 502, "{body}");
    assert!(!role_of(&rig, moved).await.1);
    let before = moved.count();
    for _ in 0..4 {
        assert_eq!(rig.complete("").await.status, 200);
    }
    assert_eq!(moved.count(), before);
    for (body, status) in [
        (json!({"instance": moved.address, "role": "x"}), 400),
        (json!({"instance": "127.0.0.1:1", "role": "decode"}), 404),
        (
            json!({"instance": moved.address, "role": "decode", "deadline_s": -1}),
            400,
        ),
    ] {
        let reply = rig.post("/instances/role", &body.to_string()).await;
        assert_eq!(reply.status, status, "{body}");
    }
}

#[tokio::test]
async fn the_ranks_of_a_server_change_together() {
    let rig = Rig::with(Dialect::Sglang, 1, 1, |c| c.prefill = c.prefill[0].ranks(2)).await;
    let worker = &rig.prefill[0];
    // The room chooses the rank.
    for rank in [0, 1] {
        assert_eq!(rig.complete("").await.status, 200);
        let room = worker.last().body["bootstrap_room"].as_u64().unwrap();
        assert_eq!(room % 2, rank);
    }
    worker.switches.store(true, Ordering::SeqCst);
    let body = json!({"instance": format!("{}@0", worker.address), "role": "decode"});
    let reply = rig.post("/instances/role", &body.to_string()).await;
    assert_eq!(reply.status, 400, "{}", reply.text());
    assert_eq!(change(&rig, worker, "decode", 1.0).await.0, 200);
    assert_eq!(worker.switched.load(Ordering::SeqCst), 1);
    assert_eq!(address(&worker.address).ranks(2).len(), 2);
    assert_eq!(rig.get("/status").await.json()["decode_node_count"], 3);
}

#[tokio::test]
async fn an_engine_that_cannot_be_asked_keeps_its_role() {
    let rig = Rig::with(Dialect::Sglang, 3, 1, |c| {
        c.health_interval = Duration::from_secs(30);
    })
    .await;
    // It answers with a fault: that is not "not offered".
    let moved = &rig.prefill[1];
    moved.switches.store(true, Ordering::SeqCst);
    for status in [500, 503] {
        moved.switch_asked.store(status, Ordering::SeqCst);
        let (told, body) = change(&rig, moved, "decode", 1.0).await;
        assert_eq!(told, 502, "{body}");
        let detail = body["detail"].as_str().unwrap();
        assert!(detail.contains("nothing was changed") && detail.contains(&status.to_string()));
        assert_eq!(role_of(&rig, moved).await, ("prefill".to_owned(), true));
    }
    assert_eq!(moved.switched.load(Ordering::SeqCst), 0);
    // Nobody is there at all.
    let dead = &rig.prefill[2];
    dead.kill();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let (told, body) = change(&rig, dead, "decode", 1.0).await;
    assert_eq!(told, 502, "{body}");
    assert_eq!(role_of(&rig, dead).await, ("prefill".to_owned(), true));
}

#[tokio::test]
async fn a_server_that_was_started_for_one_role_offers_no_other() {
    let rig = Rig::new(Dialect::Sglang, 2, 1).await;
    let fixed = &rig.prefill[1];
    let (status, body) = change(&rig, fixed, "decode", 1.0).await;
    assert_eq!(status, 409, "{body}");
    assert!(
        body["detail"]
            .as_str()
            .unwrap()
            .contains("offers no change")
    );
    assert_eq!(role_of(&rig, fixed).await, ("prefill".to_owned(), true));
    for _ in 0..2 {
        assert_eq!(rig.complete("").await.status, 200);
    }
    rig.settled().await;
}

#[tokio::test]
async fn an_engine_without_an_answer_is_set_aside_until_it_says_what_it_is() {
    // It breaks off before it switches, or after.
    for (breaks, becomes) in [(1, "prefill"), (2, "decode")] {
        let rig = Rig::new(Dialect::Sglang, 2, 1).await;
        let moved = &rig.prefill[1];
        moved.switches.store(true, Ordering::SeqCst);
        moved.switch_breaks.store(breaks, Ordering::SeqCst);
        moved.mute.store(8, Ordering::SeqCst);
        let asked = std::time::Instant::now();
        let (status, body) = change(&rig, moved, "decode", 5.0).await;
        assert_eq!(status, 504, "{body}");
        assert!(
            body["detail"].as_str().unwrap().contains("not known"),
            "{body}"
        );
        assert!(!role_of(&rig, moved).await.1);
        let before = moved.count();
        assert_eq!(rig.complete("").await.status, 200);
        assert_eq!(moved.count(), before, "it gets no requests");
        rig.until("it has said so", async || {
            role_of(&rig, moved).await == (becomes.to_owned(), true)
        })
        .await;
        // That it has not switched is believed only after a while: it may be at it.
        assert!(becomes == "decode" || asked.elapsed() > Duration::from_millis(1400));
        rig.until("used again", async || {
            assert_eq!(rig.complete("").await.status, 200);
            moved.count() > before
        })
        .await;
        rig.settled().await;
    }
}

#[tokio::test]
async fn an_engine_that_broke_is_used_again_after_a_restart() {
    let rig = Rig::new(Dialect::Sglang, 2, 1).await;
    let moved = &rig.prefill[1];
    moved.switches.store(true, Ordering::SeqCst);
    let broken = json!({"success": false, "message": "restart", "safe_to_restore": false});
    *moved.switch_fault.lock().unwrap() = Some((400, broken));
    assert_eq!(change(&rig, moved, "decode", 5.0).await.0, 502);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(
        !role_of(&rig, moved).await.1,
        "it says what it is, and is not sound"
    );
    // The process ends, and another comes at its place.
    moved.kill();
    tokio::time::sleep(Duration::from_millis(400)).await;
    let at: std::net::SocketAddr = moved.address.parse().unwrap();
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(at).unwrap();
    let reborn = Worker::on(&rig.world, Dialect::Sglang, socket.listen(64).unwrap()).await;
    rig.until("used again", async || {
        assert_eq!(rig.complete("").await.status, 200);
        reborn.count() > 0
    })
    .await;
    assert_eq!(role_of(&rig, moved).await, ("prefill".to_owned(), true));
    rig.settled().await;
}
