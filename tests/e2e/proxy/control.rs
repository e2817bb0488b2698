//! Instances that come and go, keys, and requests that are none.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use super::mock::{Dialect, MODEL, Worker, World};
use super::{KEY, Rig, address, request};
use mooncake::proxy::Proxy;
use mooncake::proxy::config::ProxyConfig;

fn add(worker: &Worker, role: &str) -> String {
    format!(r#"{{"type":"{role}","instance":"{}"}}"#, worker.address)
}

#[tokio::test]
async fn add_answers_as_the_demo_proxy_does() {
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    let new = Worker::start(&rig.world, Dialect::Store).await;
    let other = Worker::start(&rig.world, Dialect::Store).await;
    "something-else".clone_into(&mut other.model.lock().unwrap());
    let good = add(&new, "decode");
    let wrong_key = String::from_utf8(request("/instances/add", &good)).unwrap();
    let no_key = wrong_key.replace(&format!("x-api-key: {KEY}\r\n"), "");
    assert_eq!(rig.raw(no_key.as_bytes()).await.status, 422);
    let wrong_key = wrong_key.replace(KEY, "Admin-key");
    let reply = rig.raw(wrong_key.as_bytes()).await;
    assert_eq!(
        (reply.status, reply.json()["detail"].as_str()),
        (403, Some("Forbidden: Invalid API Key."))
    );
    for (body, detail) in [
        (add(&new, "other"), "Invalid instance type."),
        (
            r#"{"type":"decode","instance":"nocolon"}"#.to_owned(),
            "Invalid instance format.",
        ),
        (
            r#"{"type":"decode","instance":"h:99999"}"#.to_owned(),
            "Invalid instance address.",
        ),
        (
            r#"{"type":"decode","instance":"h:1:2:3"}"#.to_owned(),
            "Invalid instance address.",
        ),
        (
            r#"{"type":"decode","instance":"127.0.0.1:1"}"#.to_owned(),
            "Instance validation failed.",
        ),
        (add(&other, "decode"), "Instance validation failed."),
        (add(&rig.decode[0], "decode"), "Instance already exists."),
        ("[1]".to_owned(), "The body is not a JSON object."),
    ] {
        let reply = rig.post("/instances/add", &body).await;
        assert_eq!(
            (reply.status, reply.json()["detail"].as_str()),
            (400, Some(detail)),
            "{body}"
        );
    }
    let reply = rig.post("/instances/add", &good).await;
    assert_eq!(reply.status, 200);
    assert_eq!(
        reply.json()["message"],
        format!("Added {} to decode_instances.", new.address)
    );
    assert_eq!(rig.get("/status").await.json()["decode_node_count"], 2);
    rig.until("used", async || {
        rig.complete("").await;
        new.count() > 0
    })
    .await;
    // Without a key of its own the proxy refuses everybody.
    let rig = Rig::with(Dialect::Store, 1, 1, |c| c.admin_key = None).await;
    let reply = rig.post("/instances/add", &good).await;
    assert_eq!(
        (reply.status, reply.json()["detail"].as_str()),
        (500, Some("Server configuration error."))
    );
}

#[tokio::test]
async fn hot_changes_under_load_fail_no_request() {
    let rig = Arc::new(Rig::new(Dialect::Store, 2, 2).await);
    for worker in rig.prefill.iter().chain(&rig.decode) {
        worker.ttft.store(2_000, Ordering::SeqCst);
        worker.itl.store(500, Ordering::SeqCst);
        worker.keep_seen.store(false, Ordering::SeqCst);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let served = Arc::new(AtomicUsize::new(0));
    let mut load = tokio::task::JoinSet::new();
    for n in 0..16 {
        let (rig, stop, served) = (rig.clone(), stop.clone(), served.clone());
        load.spawn(async move {
            while !stop.load(Ordering::SeqCst) {
                let more = if n % 2 == 0 {
                    r#","stream":true,"max_tokens":10"#
                } else {
                    ""
                };
                let reply = rig.complete(more).await;
                assert_eq!(reply.status, 200, "{}", reply.text());
                assert!(
                    n % 2 == 1 || reply.text().ends_with("0\r\n\r\n"),
                    "{}",
                    reply.text()
                );
                served.fetch_add(1, Ordering::SeqCst);
            }
        });
    }
    for round in 0..8 {
        let new = Worker::start(&rig.world, Dialect::Store).await;
        let role = if round % 2 == 0 { "decode" } else { "prefill" };
        assert_eq!(
            rig.post("/instances/add", &add(&new, role)).await.status,
            200
        );
        rig.until("the new one works", async || new.count() > 3)
            .await;
        let body = format!(
            r#"{{"instance":"{}","deadline_s":5,"role":"both"}}"#,
            new.address
        );
        match round % 4 {
            0 | 1 => assert_eq!(rig.post("/instances/drain", &body).await.status, 202),
            2 => assert_eq!(rig.post("/instances/remove", &body).await.status, 200),
            _ => {
                assert_eq!(rig.post("/instances/role", &body).await.status, 200);
                assert_eq!(rig.post("/instances/drain", &body).await.status, 202);
            }
        }
        rig.until("gone", async || {
            !rig.get("/status").await.text().contains(&new.address)
        })
        .await;
        // Drained means idle.
        rig.until("idle", async || new.running.load(Ordering::SeqCst) == 0)
            .await;
        new.kill();
    }
    stop.store(true, Ordering::SeqCst);
    load.join_all().await;
    assert!(served.load(Ordering::SeqCst) > 100);
    rig.settled().await;
}

#[tokio::test]
async fn added_instances_survive_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.json");
    let rig = Rig::with(Dialect::Store, 1, 1, |c| c.state_file = Some(path.clone())).await;
    let new = Worker::start(&rig.world, Dialect::Store).await;
    assert_eq!(
        rig.post("/instances/add", &add(&new, "decode"))
            .await
            .status,
        200
    );
    assert!(
        rig.proxy.stop(Duration::from_secs(5)).await,
        "nothing was under way"
    );
    let mut config = ProxyConfig::new(MODEL);
    config.state_file = Some(path.clone());
    config.prefill = vec![address(&rig.prefill[0].address)];
    let again = Proxy::start(config.clone()).unwrap();
    assert!(format!("{again:?}").contains("2 instances"));
    let mut device = config.clone();
    device.state_file = Some("/dev/zero".into());
    assert!(Proxy::start(device).is_err(), "what never ends is not read");
    std::fs::write(&path, "{}").unwrap();
    assert!(
        Proxy::start(config).is_err(),
        "a file that is none is not thrown away"
    );
}

fn remembered(path: &std::path::Path) -> Vec<(String, String)> {
    let text = std::fs::read(path).unwrap();
    let value: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let all = value["instances"].as_array().unwrap().clone();
    let one = |i: &serde_json::Value| {
        let text = |name: &str| i[name].as_str().unwrap().to_owned();
        (text("instance"), text("role"))
    };
    let mut all: Vec<_> = all.iter().map(one).collect();
    all.sort();
    all
}

/// Changes at the same time: the file has all of them, whoever wrote last.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_state_file_has_everything_that_was_answered() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.json");
    let rig =
        Arc::new(Rig::with(Dialect::Store, 1, 1, |c| c.state_file = Some(path.clone())).await);
    let mut wanted = Vec::new();
    for round in 0..3 {
        let mut adding = tokio::task::JoinSet::new();
        for n in 0..12 {
            let new = Worker::start(&rig.world, Dialect::Store).await;
            let role = if n % 2 == 0 { "decode" } else { "prefill" };
            wanted.push((new.address.clone(), role.to_owned()));
            let rig = rig.clone();
            adding.spawn(async move {
                let reply = rig.post("/instances/add", &add(&new, role)).await;
                assert_eq!(reply.status, 200);
            });
        }
        adding.join_all().await;
        wanted.sort();
        assert_eq!(remembered(&path), wanted, "{round}");
    }
    // Removals and other roles, at once.
    let mut changing = tokio::task::JoinSet::new();
    let gone = wanted.split_off(18);
    for (at, (name, role)) in wanted.iter_mut().enumerate() {
        "both".clone_into(role);
        let (name, taken) = (name.clone(), gone[at].0.clone());
        let rig = rig.clone();
        changing.spawn(async move {
            let body = format!(r#"{{"instance":"{name}","role":"both"}}"#);
            let taken = format!(r#"{{"instance":"{taken}"}}"#);
            let (one, two) = tokio::join!(
                rig.post("/instances/role", &body),
                rig.post("/instances/remove", &taken)
            );
            assert_eq!((one.status, two.status), (200, 200));
        });
    }
    changing.join_all().await;
    assert_eq!(remembered(&path), wanted);
}

/// What flags say of an instance counts, whatever the file remembers of it.
#[tokio::test]
async fn flags_count_before_what_is_remembered() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.json");
    let rig = Rig::with(Dialect::Store, 1, 1, |c| c.state_file = Some(path.clone())).await;
    let new = Worker::start(&rig.world, Dialect::Store).await;
    let reply = rig.post("/instances/add", &add(&new, "decode")).await;
    assert_eq!(reply.status, 200);
    let again = Rig::with(Dialect::Store, 1, 1, |c| {
        c.state_file = Some(path.clone());
        c.prefill.push(address(&new.address));
    })
    .await;
    let status = again.get("/status").await.json();
    assert_eq!(
        (
            status["prefill_node_count"].as_u64(),
            status["decode_node_count"].as_u64()
        ),
        (Some(2), Some(1)),
        "{status}"
    );
}

#[tokio::test]
async fn reload_brings_and_takes() {
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    let new = Worker::start(&rig.world, Dialect::Store).await;
    let (p, d) = (address(&rig.prefill[0].address), address(&new.address));
    rig.proxy.reload(&[p], &[d]);
    rig.until("the new one works", async || {
        rig.complete("").await;
        new.count() > 0
    })
    .await;
    assert!(
        !rig.get("/status")
            .await
            .text()
            .contains(&rig.decode[0].address)
    );
}

#[tokio::test]
async fn stopping_lets_requests_end() {
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    rig.decode[0].ttft.store(300_000, Ordering::SeqCst);
    let (reply, ended) = tokio::join!(rig.complete(""), async {
        rig.until("decode runs", async || {
            rig.decode[0].running.load(Ordering::SeqCst) == 1
        })
        .await;
        rig.proxy.stop(Duration::from_secs(5)).await
    });
    assert_eq!((reply.status, ended), (200, true));
    assert!(reply.head.contains("connection: close"));
    assert!(tokio::net::TcpStream::connect(&rig.address).await.is_err());
}

#[tokio::test]
async fn instances_that_serve_something_else_are_not_used() {
    let world = Arc::new(World::default());
    let wrong = Worker::start(&world, Dialect::Store).await;
    "other".clone_into(&mut wrong.model.lock().unwrap());
    let rig = Rig::with(Dialect::Store, 1, 1, |c| {
        c.decode.push(address(&wrong.address))
    })
    .await;
    rig.until("found out", async || {
        rig.get("/instances").await.text().contains("wrong_model")
    })
    .await;
    for _ in 0..6 {
        assert_eq!(rig.complete("").await.status, 200);
    }
    assert_eq!(wrong.count(), 0);
}

/// Answers whatever comes with these bytes, or never.
async fn stranger(answer: Option<&'static [u8]>) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            if let Some(answer) = answer {
                let _ = stream.read(&mut [0; 1024]).await;
                let _ = stream.write_all(answer).await;
            } else {
                kept.push(stream);
            }
        }
    });
    address
}

#[tokio::test]
async fn what_is_no_openai_server_is_not_added() {
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    for answer in [
        Some(&b"SSH-2.0-x\r\n"[..]),
        Some(b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n{}"),
        Some(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nnope"),
        Some(b"HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\n{\"data\":[]}"),
        Some(b""),
        None,
    ] {
        let address = stranger(answer).await;
        let body = format!(r#"{{"type":"decode","instance":"{address}"}}"#);
        let began = std::time::Instant::now();
        let reply = rig.post("/instances/add", &body).await;
        assert_eq!(
            (reply.status, reply.json()["detail"].as_str()),
            (400, Some("Instance validation failed.")),
            "{answer:?}"
        );
        assert!(began.elapsed() < Duration::from_secs(4), "{answer:?}");
    }
    assert_eq!(rig.get("/status").await.json()["decode_node_count"], 1);
}

#[tokio::test]
async fn bad_requests_get_what_a_client_expects_and_hurt_nobody() {
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    for (body, status) in [
        ("", 400),
        ("hello", 400),
        ("[]", 400),
        (r#"{"prompt":"a""#, 400),
        (r#"{"prompt":"a"}{"prompt":"b"}"#, 400),
        (r#"{"model":"other","prompt":"a"}"#, 404),
    ] {
        let reply = rig.post("/v1/completions", body).await;
        assert_eq!(reply.status, status, "{body}");
        assert!(reply.json()["error"]["message"].is_string());
    }
    let good = String::from_utf8(request(
        "/v1/completions",
        r#"{"model":"org/mock-model","prompt":"a"}"#,
    ))
    .unwrap();
    let text = good.replace("application/json", "text/plain");
    let reply = rig.raw(text.as_bytes()).await;
    let detail = "Unsupported Media Type: Only 'application/json' is allowed";
    assert_eq!(
        (reply.status, reply.json()["detail"].as_str()),
        (415, Some(detail))
    );
    for (request, status) in [
        ("GET /v1/completions HTTP/1.1\r\nhost: x\r\n\r\n", 405),
        (
            "GET /nothing HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
            404,
        ),
        (
            "POST /v1/load_lora_adapter HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
            404,
        ),
        ("CONNECT h:1 HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        ("GET http://h/v1/models HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        ("nonsense\r\n\r\n", 400),
        ("GET / HTTP/2.0\r\n\r\n", 400),
    ] {
        let request = request.replace("x\r\n\r\n", "x\r\nconnection: close\r\n\r\n");
        assert_eq!(
            rig.raw(request.as_bytes()).await.status,
            status,
            "{request}"
        );
    }
    let long = good.replace(
        "host: x",
        &format!("host: x\r\nx-long: {}", "a".repeat(65 << 10)),
    );
    assert_eq!(rig.raw(long.as_bytes()).await.status, 431);
    let many = good.replace("host: x", &format!("host: x{}", "\r\na: b".repeat(200)));
    assert_eq!(rig.raw(many.as_bytes()).await.status, 431);
    let large = good.replace(
        "host: x",
        &format!("host: x\r\nx-long: {}", "a".repeat(60 << 10)),
    );
    assert_eq!(
        rig.prefill[0].count() + rig.decode[0].count(),
        0,
        "no worker was bothered"
    );
    assert_eq!(rig.raw(large.as_bytes()).await.status, 200);
}

#[tokio::test]
async fn requests_with_two_readings_have_none() {
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    let start = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
    let smuggled = "GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n";
    for (lines, body, status) in [
        (
            "content-length: 14\r\ncontent-length: 60\r\n",
            r#"{"prompt":"a"}"#,
            400,
        ),
        (
            "content-length: 14\r\ncontent-length: 14\r\n",
            r#"{"prompt":"a"}"#,
            400,
        ),
        (
            "content-length: 14\r\ntransfer-encoding: chunked\r\n",
            "0\r\n\r\n",
            400,
        ),
        (
            "transfer-encoding: chunked\r\ncontent-length: 4\r\n",
            "0\r\n\r\n",
            400,
        ),
        (
            "transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n",
            "0\r\n\r\n",
            400,
        ),
        ("transfer-encoding: identity\r\n", "", 501),
        ("transfer-encoding: chunked, gzip\r\n", "0\r\n\r\n", 501),
        (
            "transfer-encoding: chunked\r\n",
            "e\n{\"prompt\":\"a\"}\r\n0\r\n\r\n",
            400,
        ),
        (
            "transfer-encoding: chunked\r\n",
            "-e\r\n{\"prompt\":\"a\"}\r\n0\r\n\r\n",
            400,
        ),
        ("content-length: -1\r\n", "", 400),
        ("content-length : 14\r\n", r#"{"prompt":"a"}"#, 400),
        ("x: y\ncontent-length: 14\r\n", r#"{"prompt":"a"}"#, 400),
    ] {
        let text = format!("{start}{lines}\r\n{body}{smuggled}");
        let reply = rig.raw(text.as_bytes()).await;
        assert_eq!(reply.status, status, "{lines}{body}");
        assert!(
            !reply.text().contains("HTTP/1.1"),
            "one answer, then closed"
        );
    }
    assert_eq!(rig.prefill[0].count() + rig.decode[0].count(), 0);
}

#[tokio::test]
async fn the_dashboard_names_what_there_is() {
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    let page = rig.get("/metrics").await.text();
    let board = include_str!("../../../deploy/monitoring/grafana/dashboards/proxy.json");
    let board: serde_json::Value = serde_json::from_str(board).unwrap();
    let mut count = 0;
    for panel in board["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let words = target["expr"].as_str().unwrap();
            let words = words.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            for name in words.filter(|w| w.starts_with("mooncake_proxy_")) {
                let is_there = |name: &str| page.contains(&format!("# TYPE {name} "));
                let family = name.strip_suffix("_bucket").unwrap_or(name);
                assert!(is_there(family), "{name} is not a metric of the proxy");
                count += 1;
            }
        }
    }
    assert!(count > 20, "{count}");
}
