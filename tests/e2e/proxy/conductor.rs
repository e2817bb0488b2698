//! The Conductor's HTTP API: publishers that are registered, and what is told of them.

use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use super::mock::Dialect;
use super::publisher::{Publisher, removed, removed_by, stored, stored_by};
use super::{Rig, request};

async fn post(rig: &Rig, path: &str, body: &Value) -> (u16, Value) {
    let reply = rig.post(path, &body.to_string()).await;
    (reply.status, reply.json())
}

fn registration(publisher: &Publisher, rank: u32) -> Value {
    json!({
        "endpoint": format!("tcp://127.0.0.1:{}", publisher.port),
        "replay_endpoint": format!("tcp://127.0.0.1:{}", publisher.replay_port),
        "type": "vLLM", "modelname": "org/m", "instance_id": "node1", "block_size": 4, "dp_rank": rank,
    })
}

#[tokio::test]
async fn routers_ask_who_has_the_beginning_of_a_prompt() {
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    let publishers = [Publisher::start().await, Publisher::start().await];
    // What was published before is replayed.
    publishers[0].publish(&[stored(&[11, 12], None, &[1, 2, 3, 4, 5, 6, 7, 8], "GPU")]);
    for (rank, publisher) in publishers.iter().enumerate() {
        let (status, told) = post(&rig, "/register", &registration(publisher, rank as u32)).await;
        assert_eq!(
            (status, told["status"].as_str()),
            (200, Some("registered successfully"))
        );
        rig.until("followed", async || {
            publisher.subscribers.load(Ordering::SeqCst) > 0
        })
        .await;
    }
    publishers[1].publish(&[
        stored(&[91], None, &[1, 2, 3, 4], "GPU"),
        stored(&[91], None, &[], "CPU"),
        removed(&[91], "GPU"),
    ]);
    let blocks = async || {
        let list = rig.get("/instances").await.json();
        let all = list["publishers"].as_array().unwrap().clone();
        all.iter()
            .map(|p| p["blocks"].as_u64().unwrap())
            .sum::<u64>()
    };
    rig.until("heard", async || blocks().await == 3).await;
    let mut ask = json!({"model": "m", "token_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9], "block_size": 4});
    let wanted = json!({"default": {"node1": {
        "longest_matched": 8, "GPU": 8, "CPU": 4, "DISK": 0, "EXTERNAL": 0, "DP": {"0": 8, "1": 4},
    }}});
    assert_eq!(post(&rig, "/query", &ask).await, (200, wanted.clone()));
    // By the standard's hashes.
    let hash = |bytes: &[u8]| xxhash_rust::xxh3::xxh3_64(bytes);
    let local = |tokens: [u32; 4]| hash(&tokens.map(u32::to_le_bytes).concat());
    let first = local([1, 2, 3, 4]);
    let second = hash(&[first.to_le_bytes(), local([5, 6, 7, 8]).to_le_bytes()].concat());
    let by_hash = json!({"model": "m", "seq_hashes": [first, second, 5], "block_size": 4});
    assert_eq!(post(&rig, "/query_by_hash", &by_hash).await, (200, wanted));
    // What is not the same in every respect is no hit.
    for (field, value) in [
        ("model", json!("other")),
        ("tenant_id", json!("t")),
        ("cache_salt", json!("s")),
        ("lora_name", json!("l")),
        ("block_size", json!(2)),
        ("instance_id", json!("node2")),
    ] {
        let mut other = ask.clone();
        other[field] = value;
        let (status, told) = post(&rig, "/query", &other).await;
        let tenant = other["tenant_id"].as_str().unwrap_or("default");
        assert_eq!((status, &told[tenant]), (200, &json!({})), "{field}");
    }
    ask["token_ids"] = json!([9, 9, 9, 9]);
    let (_, told) = post(&rig, "/query", &ask).await;
    assert_eq!(told["default"]["node1"]["longest_matched"], 0);
    let (status, told) = post(&rig, "/unregister", &registration(&publishers[0], 0)).await;
    assert_eq!(
        (status, &told["removed_instances"]),
        (200, &json!(["node1|default|0"]))
    );
    rig.until("left", async || {
        publishers[0].publish(&[]);
        publishers[0].live_subscribers() == 0
    })
    .await;
    let gone = post(&rig, "/unregister", &registration(&publishers[0], 0)).await;
    assert_eq!(gone.0, 404);
    // Registered anew under the same name: the earlier one is left.
    assert_eq!(
        post(&rig, "/register", &registration(&publishers[0], 1))
            .await
            .0,
        200
    );
    rig.until("replaced", async || {
        publishers[1].publish(&[]);
        publishers[1].live_subscribers() == 0
    })
    .await;
}

/// Two ranks and an adapter behind one publisher: nobody's block is another's.
#[tokio::test]
async fn a_publisher_that_speaks_for_several() {
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    let publisher = Publisher::start().await;
    let (status, _) = post(&rig, "/register", &registration(&publisher, 0)).await;
    assert_eq!(status, 200);
    rig.until("followed", async || {
        publisher.subscribers.load(Ordering::SeqCst) > 0
    })
    .await;
    let heard = async |events: u64| {
        rig.until("heard", async || {
            let list = rig.get("/instances").await.json();
            list["publishers"][0]["events"] == events
        })
        .await;
    };
    let matched = async |tokens: [u32; 4]| {
        let ask = json!({"model": "m", "token_ids": tokens, "block_size": 4});
        let (_, told) = post(&rig, "/query", &ask).await;
        told["default"]["node1"]["longest_matched"]
            .as_u64()
            .unwrap()
    };
    publisher.publish(&[
        stored_by(0, 11, &[1, 2, 3, 4], None),
        stored_by(1, 11, &[1, 2, 3, 4], None),
        stored_by(0, 12, &[5, 6, 7, 8], Some("sql")),
    ]);
    heard(3).await;
    assert_eq!(matched([1, 2, 3, 4]).await, 4);
    assert_eq!(matched([5, 6, 7, 8]).await, 0, "another model's");
    publisher.publish(&[removed_by(0, 11)]);
    heard(4).await;
    assert_eq!(matched([1, 2, 3, 4]).await, 4, "the other rank has it");
    publisher.publish(&[removed_by(1, 11)]);
    heard(5).await;
    assert_eq!(matched([1, 2, 3, 4]).await, 0);
}

#[tokio::test]
async fn what_is_asked_wrongly() {
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    let publisher = Publisher::start().await;
    let good = registration(&publisher, 0);
    for (field, value) in [
        ("endpoint", json!("ipc:///x")),
        ("endpoint", json!("tcp://*:5")),
        ("modelname", json!(null)),
        ("instance_id", json!("")),
        ("block_size", json!(0)),
        ("dp_rank", json!(-1)),
        ("type", json!(7)),
    ] {
        let mut bad = good.clone();
        bad[field] = value;
        let (status, told) = post(&rig, "/register", &bad).await;
        assert_eq!(status, 400, "{bad}");
        assert!(told["detail"].as_str().unwrap().contains(field), "{told}");
    }
    for (path, body) in [
        ("/query", json!({"model": "m", "block_size": 4})),
        (
            "/query",
            json!({"model": "m", "block_size": 4, "token_ids": [-1]}),
        ),
        ("/query", json!({"model": "m", "token_ids": [1]})),
        (
            "/query_by_hash",
            json!({"model": "m", "block_size": 4, "seq_hashes": ["x"]}),
        ),
    ] {
        assert_eq!(post(&rig, path, &body).await.0, 400, "{path} {body}");
    }
    let text = String::from_utf8(request("/query", "{}")).unwrap();
    let keyless = text.replace("x-api-key", "x-other");
    assert_eq!(rig.raw(keyless.as_bytes()).await.status, 422);
    assert_eq!(rig.get("/register").await.status, 405);
}
