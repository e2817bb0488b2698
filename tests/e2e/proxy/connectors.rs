//! p2p and SGLang: what each leg is told, who is tried again, and that nothing is left behind; ranks of a server.

use std::sync::atomic::Ordering;

use super::mock::{Dialect, Worker};
use super::{Rig, address, request};
use tokio::net::TcpListener;

const STREAM: &str = r#","stream":true,"max_tokens":20"#;

fn id_of(worker: &Worker) -> String {
    let head = worker.last().head;
    let line = head.lines().find_map(|l| l.strip_prefix("x-request-id: "));
    line.unwrap().to_owned()
}

#[tokio::test]
async fn p2p_names_the_pair_in_the_request_id_and_clients_do_not_see_it() {
    let rig = Rig::new(Dialect::P2p, 2, 2).await;
    for more in ["", STREAM, r#","n":2"#, r#","echo":true"#] {
        let body = format!(r#"{{"prompt":"hello"{more}}}"#);
        let text = String::from_utf8(request("/v1/completions", &body)).unwrap();
        let text = text.replace("host: x", "host: x\r\nx-request-id: mine-1");
        let reply = rig.raw(text.as_bytes()).await;
        assert_eq!(reply.status, 200, "{more}: {}", reply.text());
        assert!(
            reply.head.contains("x-request-id: mine-1\r\n"),
            "{}",
            reply.head
        );
        let shown = format!("{}{}", reply.head, reply.text());
        assert!(
            !shown.contains("_addr_") && !shown.contains("127.0.0.1"),
            "{shown}"
        );
        if more != STREAM {
            let id = reply.json()["id"].as_str().unwrap().to_owned();
            assert!(id.starts_with("cmpl-mine-1___"), "{id}");
        }
    }
    let used = rig.decode.iter().find(|w| w.count() > 0).unwrap();
    let (id, raw) = (id_of(used), used.last().raw);
    let kv = used.bootstrap.load(Ordering::SeqCst);
    assert!(
        id.contains(&format!("___decode_addr_127.0.0.1:{kv}_")),
        "{id}"
    );
    assert!(
        String::from_utf8(raw)
            .unwrap()
            .starts_with(r#"{"prompt":"hello""#)
    );
    let prefills: usize = rig.prefill.iter().map(|w| w.count()).sum();
    assert_eq!(
        prefills, 4,
        "every request has both legs: such a decode engine cannot do alone"
    );
    let all = rig.prefill.iter().chain(&rig.decode);
    assert_eq!(
        all.map(|w| w.astray.load(Ordering::SeqCst)).sum::<usize>(),
        0
    );
    rig.settled().await;
}

/// However an answer is cut into pieces, the addresses in the id do not get out.
#[tokio::test]
async fn the_id_of_p2p_is_hidden_where_it_comes_in_pieces() {
    let rig = Rig::new(Dialect::P2p, 1, 1).await;
    for in_chunks in [false, true] {
        for piece in [1, 7, 30, 64] {
            let worker = &rig.decode[0];
            worker.in_chunks.store(in_chunks, Ordering::SeqCst);
            worker.piecewise.store(piece, Ordering::SeqCst);
            let text = String::from_utf8(request("/v1/completions", r#"{"prompt":"a"}"#)).unwrap();
            let text = text.replace("host: x", "host: x\r\nx-request-id: mine-1");
            for version in ["HTTP/1.1", "HTTP/1.0"] {
                let reply = rig.raw(text.replace("HTTP/1.1", version).as_bytes()).await;
                assert_eq!(reply.status, 200);
                let body = match reply.head.contains("chunked") {
                    true => payload(&reply.body),
                    false => reply.body.clone(),
                };
                let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
                let id = body["id"].as_str().unwrap();
                assert!(id.starts_with("cmpl-mine-1___"), "{id}");
                assert!(!id.contains("addr") && !id.contains("127"), "{id}");
            }
        }
    }
    rig.settled().await;
}

/// The payload of a body in chunks.
fn payload(mut wire: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let end = wire.windows(2).position(|w| w == b"\r\n").unwrap();
        let size = usize::from_str_radix(std::str::from_utf8(&wire[..end]).unwrap(), 16).unwrap();
        if size == 0 {
            assert_eq!(wire, b"0\r\n\r\n");
            return all;
        }
        all.extend_from_slice(&wire[end + 2..end + 2 + size]);
        wire = &wire[end + 4 + size..];
    }
}

#[tokio::test]
async fn p2p_begins_anew_with_another_pair() {
    let rig = Rig::new(Dialect::P2p, 2, 2).await;
    // Decode answers with an error: what was sent to it is fetched there by a smaller request.
    rig.decode[0].fail(503, 1);
    rig.decode[1].fail(503, 0);
    for _ in 0..2 {
        assert_eq!(rig.complete("").await.status, 200);
    }
    rig.settled().await;
    let prefills: usize = rig.prefill.iter().map(|w| w.count()).sum();
    assert_eq!(
        prefills, 3,
        "the prompt was computed anew for the other pair"
    );
    assert_eq!(
        rig.metric("mooncake_proxy_handoffs_released_total").await,
        1
    );
    assert_eq!(
        rig.metric("mooncake_proxy_handoffs_orphaned_total").await,
        0
    );
    // Prefill fails: the next one, and the same decode instance will do.
    rig.prefill[0].fail(503, 1);
    rig.prefill[1].fail(503, 0);
    for _ in 0..2 {
        assert_eq!(rig.complete("").await.status, 200);
    }
    // A refusal of decode is the client's, and leaves nothing behind.
    rig.decode[0].fail(400, 1);
    rig.decode[1].fail(400, 1);
    assert_eq!(rig.complete("").await.status, 400);
    rig.settled().await;
    assert_eq!(
        rig.metric("mooncake_proxy_handoffs_orphaned_total").await,
        0
    );
}

#[tokio::test]
async fn sglang_is_found_out_and_both_legs_meet_in_a_room() {
    let rig = Rig::with(Dialect::Sglang, 1, 1, |c| c.trust_kv_params = true).await;
    assert_eq!(
        rig.get("/instances").await.json()["instances"][0]["connector"],
        "sglang"
    );
    let port = rig.prefill[0].bootstrap.load(Ordering::SeqCst);
    for more in ["", STREAM, r#","n":2,"max_tokens":0"#] {
        assert_eq!(rig.complete(more).await.status, 200, "{more}");
        let (p, d) = (rig.prefill[0].last(), rig.decode[0].last());
        assert_eq!(p.raw, d.raw, "the same body for both");
        assert_eq!(p.body["bootstrap_host"], "127.0.0.1");
        assert_eq!(p.body["bootstrap_port"], port);
        assert!(p.body["bootstrap_room"].is_u64());
    }
    let list = r#"{"prompt":["a","b"],"bootstrap_room":7,"bootstrap_host":"elsewhere"}"#;
    assert_eq!(rig.post("/v1/completions", list).await.status, 200);
    let d = rig.decode[0].last().body;
    assert_eq!(
        d["bootstrap_host"],
        serde_json::json!(["127.0.0.1", "127.0.0.1"])
    );
    assert_eq!(d["bootstrap_port"], serde_json::json!([port, port]));
    let rooms = d["bootstrap_room"].as_array().unwrap();
    assert!(rooms.len() == 2 && rooms[0] != rooms[1]);
    let chat = r#"{"messages":[{"role":"user","content":"a"}],"n":3}"#;
    assert_eq!(rig.post("/v1/chat/completions", chat).await.status, 200);
    let d = rig.decode[0].last().body;
    assert_eq!(d["bootstrap_room"].as_array().map(Vec::len), Some(3));
    let many = format!(r#"{{"prompt":["a"{}]}}"#, r#","a""#.repeat(4096));
    let reply = rig.post("/v1/completions", &many).await;
    assert_eq!(reply.status, 400, "{}", reply.text());
    rig.settled().await;
}

#[tokio::test]
async fn errors_of_sglang_are_passed_on_and_tried_elsewhere() {
    let rig = Rig::new(Dialect::Sglang, 1, 2).await;
    rig.prefill[0].fail(400, 1);
    let reply = rig.complete(STREAM).await;
    assert_eq!(
        (reply.status, reply.json()["error"]["message"].as_str()),
        (400, Some("injected"))
    );
    rig.decode[0].fail(503, 1);
    rig.decode[1].fail(503, 0);
    for _ in 0..2 {
        assert_eq!(rig.complete(STREAM).await.status, 200);
    }
    rig.settled().await;
}

#[tokio::test]
async fn ranks_of_a_server_are_routed_to_by_header() {
    let rig = Rig::with(Dialect::Store, 1, 1, |c| {
        c.prefill = c.prefill[0].ranks(2);
        c.decode = c.decode[0].ranks(3);
    })
    .await;
    let ranks = |worker: &Worker| {
        let seen = worker.seen.lock().unwrap();
        let of = |head: &str| {
            let line = head
                .lines()
                .find_map(|l| l.strip_prefix("x-data-parallel-rank: "));
            line.map(str::to_owned)
        };
        seen.iter()
            .map(|s| of(&s.head).unwrap())
            .collect::<Vec<_>>()
    };
    for _ in 0..6 {
        let text = String::from_utf8(request("/v1/completions", r#"{"prompt":"a"}"#)).unwrap();
        let text = text.replace("host: x", "host: x\r\nX-Data-Parallel-Rank: 9");
        assert_eq!(rig.raw(text.as_bytes()).await.status, 200);
    }
    assert_eq!(ranks(&rig.prefill[0]), ["0", "1", "0", "1", "0", "1"]);
    assert_eq!(ranks(&rig.decode[0]), ["0", "1", "2", "0", "1", "2"]);
    assert!(
        rig.decode[0]
            .last()
            .head
            .contains(&format!("host: {}\r\n", rig.decode[0].address))
    );
    let status = rig.get("/status").await.json();
    let name = format!("{}@1", rig.prefill[0].address);
    assert!(
        status["prefill_nodes"]
            .as_array()
            .unwrap()
            .iter()
            .any(|n| *n == name)
    );
    // By its address a server is meant as a whole, a rank by itself.
    let of = |name: &str| format!(r#"{{"instance":"{name}","type":"decode"}}"#);
    let second = format!("{}@1", rig.decode[0].address);
    assert_eq!(
        rig.post("/instances/remove", &of(&second)).await.status,
        200
    );
    assert_eq!(rig.get("/status").await.json()["decode_node_count"], 2);
    let reply = rig
        .post("/instances/add", &of(&rig.decode[0].address))
        .await;
    assert_eq!(reply.json()["detail"], "Instance already exists.");
    assert_eq!(
        rig.post("/instances/remove", &of(&rig.decode[0].address))
            .await
            .status,
        200
    );
    assert_eq!(rig.get("/status").await.json()["decode_node_count"], 0);
    let add = format!(
        r#"{{"instance":"{}","type":"decode","data_parallel_size":2}}"#,
        rig.decode[0].address
    );
    assert_eq!(rig.post("/instances/add", &add).await.status, 200);
    assert_eq!(rig.get("/status").await.json()["decode_node_count"], 2);
    let bad = add.replace(":2}", ":0}");
    assert_eq!(rig.post("/instances/add", &bad).await.status, 400);
}

#[tokio::test]
async fn a_rank_of_mooncake_has_its_own_engine() {
    for told in [false, true] {
        let rig = Rig::with(Dialect::Mooncake, 1, 1, |c| {
            if told {
                c.prefill = c.prefill[0].ranks(2);
            }
        })
        .await;
        rig.prefill[0].ranks.store(2, Ordering::SeqCst);
        rig.until("both engines", async || {
            let all = rig.get("/instances").await.json();
            let all = all["instances"].as_array().unwrap().clone();
            let mut prefill = all.iter().filter(|i| i["role"] == "prefill");
            prefill.all(|i| i["engines"] == 2)
        })
        .await;
        let engine = rig.prefill[0].engine.lock().unwrap().clone();
        let mut used = [0; 2];
        for _ in 0..8 {
            assert_eq!(rig.complete("").await.status, 200);
            let (p, d) = (rig.prefill[0].last(), rig.decode[0].last());
            let second = p.head.contains("x-data-parallel-rank: 1\r\n");
            let wanted = if second {
                format!("{engine}-1")
            } else {
                engine.clone()
            };
            assert_eq!(d.body["kv_transfer_params"]["remote_engine_id"], wanted);
            used[usize::from(second)] += 1;
        }
        assert_eq!(used, [4, 4]);
        rig.settled().await;
    }
}

#[tokio::test]
async fn events_of_ranks_come_from_ports_one_after_the_other() {
    let ports = loop {
        // Two ports side by side.
        let one = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = one.local_addr().unwrap().port();
        if let Ok(two) = TcpListener::bind(("127.0.0.1", port + 1)).await {
            break [one, two];
        }
    };
    let base = ports[0].local_addr().unwrap().port();
    let [one, two] = ports;
    let publishers = [
        super::publisher::Publisher::on(one).await,
        super::publisher::Publisher::on(two).await,
    ];
    let rig = Rig::with(Dialect::Store, 1, 1, |c| {
        c.prefill = c.prefill[0].ranks(2);
        c.policy.prefill = "kv";
        c.kv_events = mooncake::proxy::config::EventsRule::parse_list(&base.to_string()).unwrap();
    })
    .await;
    for publisher in &publishers {
        rig.until("followed", async || {
            publisher.subscribers.load(Ordering::SeqCst) > 0
        })
        .await;
    }
    let tokens = [1, 2, 3, 4, 5, 6, 7, 8];
    publishers[1].publish(&[super::publisher::stored(&[11, 12], None, &tokens, "GPU")]);
    rig.until("heard", async || {
        rig.get("/instances").await.text().contains(r#""blocks":2"#)
    })
    .await;
    for _ in 0..4 {
        let reply = rig.post(
            "/v1/completions",
            r#"{"prompt":[1,2,3,4,5,6,7,8],"max_tokens":1}"#,
        );
        assert_eq!(reply.await.status, 200);
        assert!(
            rig.prefill[0]
                .last()
                .head
                .contains("x-data-parallel-rank: 1\r\n")
        );
    }
}

#[tokio::test]
async fn p2p_instances_register_themselves() {
    let world = std::sync::Arc::default();
    let (p, d) = (
        Worker::start(&world, Dialect::P2p).await,
        Worker::start(&world, Dialect::P2p).await,
    );
    let probe = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = probe.local_addr().unwrap();
    drop(probe);
    let rig = Rig::with(Dialect::P2p, 1, 1, |c| {
        c.discover =
            mooncake::proxy::discover::Discovery::parse_list(&format!("zmq:{at}")).unwrap();
        c.connector = None;
        c.prefill = vec![address(&p.spec())];
        c.decode.clear();
        // One that is named, so that the rig becomes ready before anybody has registered.
        c.aggregated = true;
        c.decode.push(address(&d.address));
    })
    .await;
    drop((p, d));
    let kv = |w: &Worker| format!("127.0.0.1:{}", w.bootstrap.load(Ordering::SeqCst));
    let mut sockets = Vec::new();
    for (kind, worker) in [("P", &rig.prefill[0]), ("D", &rig.decode[0])] {
        let mut socket = super::publisher::dealer(at).await;
        let fields = [
            ("type", kind),
            ("http_address", &worker.address),
            ("zmq_address", &kv(worker)),
        ];
        super::publisher::send_map(&mut socket, &fields).await;
        sockets.push(socket);
    }
    for worker in [&rig.prefill[0], &rig.decode[0]] {
        rig.until("registered", async || {
            let list = rig.get("/instances").await.json();
            let all = list["instances"].as_array().unwrap().clone();
            all.iter().any(|i| {
                i["instance"] == *worker.address
                    && i["origin"] == "registered"
                    && i["connector"] == "p2p"
            })
        })
        .await;
    }
}
