//! Who comes in and in which order, hand-offs under way, others' load, and KV of a request that decode has refused.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::mock::{Dialect, Worker};
use super::{Rig, request};
use mooncake::proxy::config::PolicyChoice;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[tokio::test]
async fn kv_of_a_refused_request_is_let_go() {
    let rig = Rig::new(Dialect::Nixl, 1, 1).await;
    rig.complete("").await;
    let before = rig.decode[0].count();
    rig.decode[0].fail(400, 1);
    let reply = rig
        .complete(r#","temperature":-1,"stream":true,"max_tokens":99"#)
        .await;
    assert_eq!(reply.status, 400);
    assert_eq!(reply.json()["error"]["message"], "injected");
    rig.settled().await;
    assert_eq!(
        rig.decode[0].count(),
        before + 2,
        "refused once, fetched once"
    );
    let fetch = rig.decode[0].last().body;
    assert_eq!(
        (fetch["max_tokens"].as_u64(), fetch["prompt"].as_str()),
        (Some(1), Some("hello"))
    );
    assert!(fetch["temperature"].is_null() && fetch["stream"].is_null());
    assert_eq!(
        rig.metric("mooncake_proxy_handoffs_orphaned_total").await,
        0
    );
    assert_eq!(
        rig.metric("mooncake_proxy_handoffs_released_total").await,
        1
    );
}

#[tokio::test]
async fn kv_of_a_push_that_decode_refuses_is_let_go_too() {
    // Decode refuses before prefill is done, about then, and after.
    for (prefill, decode) in [(40_000, 0), (2_000, 2_000), (0, 0), (0, 30_000)] {
        for status in [400, 503] {
            let rig = Rig::new(Dialect::Mooncake, 1, 2).await;
            rig.prefill[0].ttft.store(prefill, Ordering::SeqCst);
            for worker in &rig.decode {
                worker.refuses_after.store(decode, Ordering::SeqCst);
                worker.fail(status, 1);
            }
            for _ in 0..3 {
                let reply = rig.complete("").await;
                assert!(
                    [200, status].contains(&u64::from(reply.status)),
                    "{}",
                    reply.text()
                );
            }
            rig.settled().await;
            let orphans = rig.metric("mooncake_proxy_handoffs_orphaned_total").await;
            assert_eq!(orphans, 0, "{prefill} {decode} {status}");
        }
    }
}

#[tokio::test]
async fn hand_offs_are_bounded_until_decode_has_its_first_byte() {
    for pair in [false, true] {
        let rig = Rig::with(Dialect::Nixl, 1, 1, |c| {
            if pair {
                c.pair_handoffs_max = 2;
            } else {
                c.handoffs_max = 2;
            }
            c.queue_timeout = Duration::from_secs(10);
        })
        .await;
        rig.complete("").await;
        rig.decode[0].ttft.store(100_000, Ordering::SeqCst);
        let all = async {
            let six = [(); 6].map(|()| rig.complete(""));
            let [a, b, c, d, e, f] = six;
            let (a, b, c, d, e, f) = tokio::join!(a, b, c, d, e, f);
            assert!([a, b, c, d, e, f].iter().all(|r| r.status == 200));
        };
        let watch = async {
            for _ in 0..40 {
                let pinned = rig.world.pinned();
                assert!(pinned <= 2, "{pinned} hand-offs");
                assert!(rig.decode[0].running.load(Ordering::SeqCst) <= 2);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::join!(all, watch);
        rig.settled().await;
        assert!(
            rig.get("/instances")
                .await
                .text()
                .contains(r#""handoffs":0"#)
        );
    }
}

#[tokio::test]
async fn the_urgent_come_first() {
    let rig = Rig::with(Dialect::Store, 1, 1, |c| c.inflight_max = 1).await;
    rig.decode[0].ttft.store(60_000, Ordering::SeqCst);
    let later = rig.post("/v1/completions", r#"{"prompt":"later","priority":5}"#);
    let urgent = async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let text = String::from_utf8(request("/v1/completions", r#"{"prompt":"urgent"}"#)).unwrap();
        rig.raw(
            text.replace("host: x", "host: x\r\nx-priority: -3")
                .as_bytes(),
        )
        .await
    };
    let (first, later, urgent) = tokio::join!(rig.complete(""), later, urgent);
    assert_eq!((first.status, later.status, urgent.status), (200, 200, 200));
    let seen = rig.decode[0].seen.lock().unwrap();
    let prompts: Vec<_> = seen.iter().map(|s| s.body["prompt"].clone()).collect();
    assert_eq!(prompts, ["hello", "urgent", "later"]);
}

#[tokio::test]
async fn priorities_and_keys_hold_at_a_busy_instance_too() {
    let rig = Rig::with(Dialect::Store, 0, 1, |c| {
        c.aggregated = true;
        c.instance_max = 1;
        c.queue_timeout = Duration::from_secs(5);
    })
    .await;
    rig.decode[0].ttft.store(60_000, Ordering::SeqCst);
    // Who, whose key, how urgent; they come one after the other while the first is being served.
    let all = [
        ("first", "a", 0),
        ("a1", "a", 0),
        ("a2", "a", 0),
        ("a3", "a", 0),
        ("b1", "b", 0),
        ("late", "c", 9),
        ("urgent", "a", -1),
    ];
    let send = async |at: usize| {
        let (name, key, priority) = all[at];
        tokio::time::sleep(Duration::from_millis(5 * at as u64)).await;
        let body = format!(r#"{{"prompt":"{name}","priority":{priority}}}"#);
        let text = String::from_utf8(request("/v1/completions", &body)).unwrap();
        let line = format!("host: x\r\nauthorization: Bearer {key}");
        rig.raw(text.replace("host: x", &line).as_bytes())
            .await
            .status
    };
    let statuses = tokio::join!(
        send(0),
        send(1),
        send(2),
        send(3),
        send(4),
        send(5),
        send(6)
    );
    assert_eq!(statuses, (200, 200, 200, 200, 200, 200, 200));
    let seen = rig.decode[0].seen.lock().unwrap().clone();
    let order: Vec<_> = seen
        .iter()
        .map(|s| s.body["prompt"].as_str().unwrap())
        .collect();
    assert_eq!(order, ["first", "urgent", "a1", "b1", "a2", "a3", "late"]);
    rig.settled().await;
}

#[tokio::test]
async fn who_waits_too_long_is_told_so_and_the_next_is_served() {
    let rig = Rig::with(Dialect::Store, 0, 1, |c| {
        c.aggregated = true;
        c.instance_max = 1;
        c.queue_timeout = Duration::from_millis(150);
    })
    .await;
    rig.decode[0].ttft.store(200_000, Ordering::SeqCst);
    let (first, second, third) = tokio::join!(
        rig.complete(""),
        async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            rig.complete("").await
        },
        async {
            tokio::time::sleep(Duration::from_millis(120)).await;
            rig.complete("").await
        }
    );
    assert_eq!((first.status, second.status, third.status), (200, 503, 200));
    assert!(second.head.contains("retry-after: "), "{}", second.head);
    rig.settled().await;
}

#[tokio::test]
async fn a_long_body_is_refused_before_it_is_sent() {
    let rig = Rig::with(Dialect::Store, 1, 1, |c| {
        c.inflight_max = 1;
        c.queue_max = 0;
    })
    .await;
    rig.decode[0].ttft.store(300_000, Ordering::SeqCst);
    let refused = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let mut stream = TcpStream::connect(&rig.address).await.unwrap();
        let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000000\r\nexpect: 100-continue\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).await.unwrap();
        String::from_utf8(got).unwrap()
    };
    let (first, refused) = tokio::join!(rig.complete(""), refused);
    assert_eq!(first.status, 200);
    assert!(
        refused.starts_with("HTTP/1.1 429") && refused.contains("retry-after"),
        "{refused}"
    );
}

#[tokio::test]
async fn instances_that_take_shorter_prompts_are_not_added() {
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    let new = Worker::start(&rig.world, Dialect::Store).await;
    new.max_model_len.store(2048, Ordering::SeqCst);
    let body = format!(r#"{{"type":"decode","instance":"{}"}}"#, new.address);
    let reply = rig.post("/instances/add", &body).await;
    assert_eq!(
        (reply.status, reply.json()["detail"].as_str()),
        (400, Some("Instance validation failed."))
    );
    new.max_model_len.store(8192, Ordering::SeqCst);
    assert_eq!(rig.post("/instances/add", &body).await.status, 200);
}

#[tokio::test]
async fn others_load_is_seen() {
    let rig = Rig::with(Dialect::Store, 1, 2, |c| {
        c.policy = PolicyChoice {
            prefill: "round_robin",
            decode: "least_loaded",
        };
    })
    .await;
    rig.decode[0].gauge.store(40, Ordering::SeqCst);
    // Its gauges are asked for again after a restart only, as it had none: so it restarts.
    rig.decode[0].unhealthy.store(true, Ordering::SeqCst);
    rig.until("down", async || {
        rig.get("/instances")
            .await
            .text()
            .contains(r#""health":"down""#)
    })
    .await;
    rig.decode[0].unhealthy.store(false, Ordering::SeqCst);
    rig.until("seen", async || {
        rig.get("/instances")
            .await
            .text()
            .contains(r#""others_requests":40"#)
    })
    .await;
    let before = rig.decode[0].count();
    for _ in 0..8 {
        assert_eq!(rig.complete("").await.status, 200);
    }
    assert_eq!((rig.decode[0].count(), rig.decode[1].count()), (before, 8));
}
