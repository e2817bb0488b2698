//! Segments that are emptied and nodes that leave: what lies there moves, and whoever dies meanwhile takes nothing along.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mooncake::engine::transport::TransportKind;
use mooncake::store::client::{PoolClient, PutOptions};
use mooncake::store::model::error::StoreError;
use serde_json::{Value, json};

use crate::pool::{Blob, Pool, eventually, pattern, stderr, stdout};
use crate::{copies, put};

/// A request with a JSON body; status and answer.
pub(crate) fn send(address: &str, method: &str, path: &str, body: &str) -> (u16, Value) {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(body).unwrap_or(Value::Null))
}

/// A pool whose nodes' segments are known by name, in the order of the nodes.
fn named_pool(nodes: usize, memory: &str, master: &[&str]) -> (Pool, Vec<String>) {
    let mut pool = Pool::start(0, memory, master);
    let mut names: Vec<String> = Vec::new();
    for _ in 0..nodes {
        add_named(&mut pool, memory, &mut names);
    }
    (pool, names)
}

fn add_named(pool: &mut Pool, memory: &str, names: &mut Vec<String>) {
    pool.add_node(memory);
    let all = pool.client().segments().unwrap();
    let new = all.iter().find(|s| !names.contains(&s.name)).unwrap();
    names.push(new.name.clone());
}

fn begin(pool: &Pool, segment: &str, concurrency: u32) -> String {
    let body = json!({"segments": [segment], "max_concurrency": concurrency});
    let (status, answer) = send(
        &pool.address,
        "POST",
        "/api/v1/drain_jobs",
        &body.to_string(),
    );
    assert_eq!(
        (status, &answer["status"]),
        (200, &json!("CREATED")),
        "{answer}"
    );
    answer["job_id"].as_str().unwrap().to_owned()
}

fn job(pool: &Pool, id: &str) -> Value {
    let path = format!("/api/v1/drain_jobs/query?job_id={id}");
    // A new master does not know yet what its nodes keep.
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let (status, answer) = send(&pool.address, "GET", &path, "");
        if status != 409 || Instant::now() >= end {
            assert_eq!(status, 200, "{answer}");
            return answer;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn ended(pool: &Pool, id: &str) -> Value {
    let end = Instant::now() + Duration::from_secs(40);
    loop {
        let state = job(pool, id);
        if !["CREATED", "PLANNING", "RUNNING"].contains(&state["status_name"].as_str().unwrap()) {
            return state;
        }
        assert!(Instant::now() < end, "{state}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn segment_state(pool: &Pool, name: &str) -> String {
    let path = format!("/api/v1/segments/status?segment={name}");
    let (_, answer) = send(&pool.address, "GET", &path, "");
    answer["status_name"].as_str().unwrap_or("none").to_owned()
}

fn objects_at(client: &PoolClient, name: &str) -> u64 {
    let all = client.segments().unwrap();
    all.iter().find(|s| s.name == name).map_or(0, |s| s.objects)
}

/// Small ones through arenas near and far, large ones in two phases, some twice, some pinned.
fn fill(pool: &Pool, count: u64) -> Vec<(String, usize)> {
    let near = pool.client();
    let far = pool.client_over(TransportKind::Tcp);
    let mut all = Vec::new();
    for n in 0..count {
        let size = if n % 25 == 3 {
            1_500_000
        } else {
            900 + n as usize
        };
        let options = PutOptions {
            replicas: if n % 10 == 4 { 2 } else { 1 },
            hard_pin: n % 7 == 0,
            ..PutOptions::default()
        };
        let client = if n % 3 == 0 { &far } else { &near };
        let key = format!("k{n}");
        client
            .put_bytes(key.as_bytes(), &pattern(size, n), &options)
            .unwrap();
        all.push((key, size));
    }
    all
}

fn all_there(client: &PoolClient, all: &[(String, usize)], when: &str) {
    for (n, (key, size)) in all.iter().enumerate() {
        assert_eq!(
            client.get(key.as_bytes()).map(Blob),
            Ok(Blob(pattern(*size, n as u64))),
            "{key} {when}"
        );
    }
}

#[test]
fn a_drained_segment_is_empty_and_its_node_may_go() {
    let (mut pool, names) = named_pool(3, "64MiB", &[]);
    let all = fill(&pool, 300);
    let client = pool.client();
    assert!(objects_at(&client, &names[0]) > 20);
    // Readers notice nothing.
    let stop = Arc::new(AtomicBool::new(false));
    let reads = Arc::new(AtomicU64::new(0));
    let reader = {
        let (client, all) = (pool.client(), all.clone());
        let (stop, reads) = (stop.clone(), reads.clone());
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                all_there(&client, &all, "while it is drained");
                reads.fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    let id = begin(&pool, &names[0], 2);
    let body = json!({"segments": [names[0]]}).to_string();
    let again = send(&pool.address, "POST", "/api/v1/drain_jobs", &body);
    assert_eq!(
        (again.0, &again.1["error_code"]),
        (409, &json!(-1010)),
        "{again:?}"
    );
    let state = ended(&pool, &id);
    stop.store(true, Ordering::Relaxed);
    reader.join().unwrap();
    assert!(reads.load(Ordering::Relaxed) > 0);
    assert_eq!(state["status_name"], "SUCCEEDED", "{state}");
    assert_eq!(
        (&state["type_name"], &state["status"]),
        (&json!("DRAIN"), &json!(3))
    );
    assert_eq!(
        (&state["active_units"], &state["blocked_units"]),
        (&json!(0), &json!(0))
    );
    assert!(state["succeeded_units"].as_u64().unwrap() > 20, "{state}");
    assert!(
        state["migrated_bytes"].as_u64().unwrap() > 20_000,
        "{state}"
    );
    assert_eq!(segment_state(&pool, &names[0]), "DRAINED");
    assert_eq!(objects_at(&client, &names[0]), 0);
    // It takes nothing new, by name neither.
    for n in 0..60u64 {
        let options = PutOptions {
            preferred_segments: vec![names[0].clone()],
            ..PutOptions::default()
        };
        client
            .put_bytes(format!("n{n}").as_bytes(), &pattern(3000, n), &options)
            .unwrap();
        put(&client, &format!("o{n}"), &pattern(300, n)).unwrap();
    }
    assert_eq!(objects_at(&client, &names[0]), 0);
    let both = client.stat(b"k4").unwrap();
    assert_eq!(both.replicas.len(), 2, "as many replicas as before");
    // Where there is no third node, the other replica has to do.
    let id = begin(&pool, &names[1], 4);
    let state = ended(&pool, &id);
    assert_eq!(state["status_name"], "SUCCEEDED", "{state}");
    assert_eq!(client.stat(b"k4").unwrap().replicas.len(), 1);
    assert_eq!(
        client.stat(b"k4").unwrap().replicas[0].segment_name,
        names[2]
    );
    // Over means over.
    let cancel = format!("/api/v1/drain_jobs/cancel?job_id={id}");
    assert_eq!(send(&pool.address, "POST", &cancel, "").0, 409);
    pool.nodes[0].kill();
    all_there(&pool.client(), &all, "after its node was killed");
    // What was moved is found by the next master too.
    pool.restart_master();
    all_there(&pool.client(), &all, "after the master was killed");
}

#[test]
fn what_has_no_place_is_named_and_stays_and_a_job_can_be_canceled() {
    let (mut pool, names) = named_pool(2, "32MiB", &["--enable-metric-reporting=false"]);
    let client = pool.client_over(TransportKind::Tcp);
    let pinned = PutOptions {
        hard_pin: true,
        ..PutOptions::default()
    };
    let mut kept = 0u64;
    for n in 0..60 {
        let key = format!("p{n}");
        if client
            .put_bytes(key.as_bytes(), &pattern(1 << 20, n), &pinned)
            .is_err()
        {
            break;
        }
        kept += 1;
    }
    assert!(kept > 40);
    let id = begin(&pool, &names[1], 4);
    eventually(
        "objects without a place are told",
        Duration::from_secs(20),
        || {
            let state = job(&pool, &id);
            state["blocked_units"].as_u64().unwrap() > 0
                && state["blocked"][0]["reason"] == "no free range is large enough"
        },
    );
    let state = job(&pool, &id);
    assert_eq!(state["status_name"], "RUNNING", "{state}");
    assert!(
        state["message"].as_str().unwrap().contains("no place"),
        "{state}"
    );
    assert_eq!(segment_state(&pool, &names[1]), "DRAINING");
    // It goes on under the next master, and what is decided there holds under the one after.
    pool.restart_master();
    eventually("it is tried again", Duration::from_secs(20), || {
        job(&pool, &id)["blocked_units"].as_u64().unwrap() > 0
    });
    assert_eq!(segment_state(&pool, &names[1]), "DRAINING");
    let cancel = format!("/api/v1/drain_jobs/cancel?job_id={id}");
    let (status, answer) = send(&pool.address, "POST", &cancel, "");
    assert_eq!((status, &answer["status"]), (200, &json!("CANCELED")));
    pool.restart_master();
    eventually("both segments are back", Duration::from_secs(10), || {
        segment_state(&pool, &names[1]) == "OK"
    });
    assert_eq!(ended(&pool, &id)["status_name"], "CANCELED");
    for n in 0..kept {
        assert_eq!(
            client.get(format!("p{n}").as_bytes()).map(Blob),
            Ok(Blob(pattern(1 << 20, n)))
        );
    }
    // With room, the command line sees it through.
    let done = pool.call(&["rm", "--regex", "p.*[02468]$", "--force"]);
    assert!(done.status.success(), "{}", stderr(&done));
    let done = pool.call(&["drain", &names[1], "--to", &names[0], "--wait", "30s"]);
    assert!(done.status.success(), "{}{}", stdout(&done), stderr(&done));
    assert!(stdout(&done).contains("objects moved"), "{}", stdout(&done));
    assert_eq!(segment_state(&pool, &names[1]), "DRAINED");
}

#[test]
fn drain_jobs_are_checked() {
    let (pool, names) = named_pool(2, "32MiB", &[]);
    let at = &pool.address;
    let jobs = "/api/v1/drain_jobs";
    for (body, status, code) in [
        (json!({}), 400, -600),
        (json!({"segments": []}), 400, -600),
        (json!({"segments": "x"}), 400, -600),
        (
            json!({"segments": [names[0]], "max_concurrency": 0}),
            400,
            -600,
        ),
        (json!({"segments": [names[0], names[0]]}), 400, -600),
        (json!({"segments": ["nobody"]}), 404, -101),
        (
            json!({"segments": [names[0]], "target_segments": ["nobody"]}),
            404,
            -101,
        ),
        (
            json!({"segments": [names[0]], "target_segments": [names[0]]}),
            400,
            -600,
        ),
    ] {
        let (got, answer) = send(at, "POST", jobs, &body.to_string());
        assert_eq!(
            (got, &answer["error_code"]),
            (status, &json!(code)),
            "{body}: {answer}"
        );
    }
    assert_eq!(send(at, "POST", jobs, "{").0, 400);
    let query = |id: &str| send(at, "GET", &format!("{jobs}/query?job_id={id}"), "");
    assert_eq!(query("").0, 400);
    assert_eq!(query("1").0, 400);
    // At first a node may still come that knows it.
    eventually("nobody knows it", Duration::from_secs(20), || {
        let (status, answer) = query("0123456789abcdef-0123456789abcdef");
        (status, &answer["error_code"]) == (404, &json!(-1402))
    });
    let unknown = pool.call(&["drain", "nobody"]);
    assert_eq!(unknown.status.code(), Some(2), "{}", stderr(&unknown));
    // With a token, nobody drains without it.
    let directory = tempfile::tempdir().unwrap();
    let token = directory.path().join("token");
    std::fs::write(&token, "correct horse battery staple").unwrap();
    let secured = Pool::start(0, "32MiB", &["--token-file", token.to_str().unwrap()]);
    let body = json!({"segments": ["x"]}).to_string();
    assert_eq!(send(&secured.address, "POST", jobs, &body).0, 401);
    assert_eq!(
        send(
            &secured.address,
            "PUT",
            "/api/v1/tenant_quotas?tenant_id=a",
            "{}"
        )
        .0,
        401
    );
}

#[test]
fn d2_what_is_removed_while_it_is_moved_stays_removed() {
    let (mut pool, names) = named_pool(2, "128MiB", &[]);
    let client = pool.client();
    let total = 4000u64;
    for n in 0..total {
        let size = if n % 50 == 0 { 400_000 } else { 700 };
        put(&client, &format!("k{n}"), &pattern(size, n)).unwrap();
    }
    let id = begin(&pool, &names[0], 4);
    let mut removed = Vec::new();
    for n in (0..total).step_by(3) {
        let key = format!("k{n}");
        match client.remove(&[key.as_bytes()], true).unwrap()[0] {
            Ok(()) => removed.push(key),
            ref other => panic!("{key}: {other:?}"),
        }
    }
    let state = ended(&pool, &id);
    assert_eq!(state["status_name"], "SUCCEEDED", "{state}");
    pool.restart_master();
    let client = pool.client();
    for key in &removed {
        assert_eq!(
            client.get(key.as_bytes()).map(Blob),
            Err(StoreError::NotFound),
            "{key}"
        );
    }
    for n in (0..total).filter(|n| n % 3 != 0) {
        let size = if n % 50 == 0 { 400_000 } else { 700 };
        let got = client.get(format!("k{n}").as_bytes()).map(Blob);
        assert_eq!(got, Ok(Blob(pattern(size, n))), "k{n}");
    }
}

#[test]
fn a_job_goes_on_under_the_next_master() {
    let (mut pool, names) = named_pool(3, "128MiB", &[]);
    let all = fill(&pool, 900);
    let id = begin(&pool, &names[0], 1);
    eventually("something was moved", Duration::from_secs(20), || {
        job(&pool, &id)["succeeded_units"].as_u64().unwrap() > 0
    });
    assert_eq!(job(&pool, &id)["status_name"], "RUNNING", "in the middle");
    let waiting = std::process::Command::new(env!("CARGO_BIN_EXE_mooncake"))
        .args([
            "drain",
            "--job",
            &id,
            "--wait",
            "60s",
            "--master",
            &pool.address,
        ])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(100));
    pool.restart_master();
    let client = pool.client();
    put(&client, "meanwhile", &pattern(5000, 1)).unwrap();
    let state = ended(&pool, &id);
    assert_eq!(state["status_name"], "SUCCEEDED", "{state}");
    assert_eq!(state["segments"], json!([names[0]]));
    assert_eq!(objects_at(&client, &names[0]), 0);
    all_there(&client, &all, "after the master was killed");
    let told = waiting.wait_with_output().unwrap();
    assert!(told.status.success(), "{}{}", stdout(&told), stderr(&told));
    // What was emptied takes nothing new under the next master either.
    pool.restart_master();
    let client = pool.client();
    all_there(&client, &all, "after the master was killed again");
    assert_eq!(segment_state(&pool, &names[0]), "DRAINED");
    assert_eq!(job(&pool, &id)["status_name"], "SUCCEEDED");
    for n in 0..200 {
        put(&client, &format!("later{n}"), &pattern(3000, n)).unwrap();
    }
    assert_eq!(objects_at(&client, &names[0]), 0);
}

#[test]
fn the_next_master_knows_how_many_replicas_were_wanted() {
    let (mut pool, _) = named_pool(2, "64MiB", &["--client-ttl", "2s"]);
    let client = pool.client();
    for n in 0..30 {
        let size = if n % 2 == 0 { 900 } else { 1_500_000 };
        let key = format!("two{n}");
        client
            .put_bytes(key.as_bytes(), &pattern(size, n), &copies(2))
            .unwrap();
        put(&client, &format!("one{n}"), &pattern(700, n)).unwrap();
    }
    let degraded = |pool: &Pool| {
        let (_, census) = send(&pool.address, "GET", "/api/v1/census", "");
        census["degraded_objects"].as_u64()
    };
    pool.nodes[1].kill();
    pool.restart_master();
    eventually(
        "objects with one of two replicas are told",
        Duration::from_secs(30),
        || degraded(&pool) == Some(30),
    );
}

#[test]
fn d1_whoever_dies_while_objects_are_moved_takes_only_its_own_along() {
    let (mut pool, names) = named_pool(3, "128MiB", &["--client-ttl", "2s"]);
    let all = fill(&pool, 900);
    let client = pool.client();
    // A target: what lay there is gone with it, what was on its way there is not.
    let id = begin(&pool, &names[0], 2);
    let of = |name: &str| -> Vec<usize> {
        let lies = |key: &str| client.stat(key.as_bytes()).ok();
        let only = |key: &str| {
            lies(key).is_some_and(|d| d.replicas.iter().all(|r| r.segment_name == name))
        };
        (0..all.len()).filter(|n| only(&all[*n].0)).collect()
    };
    pool.nodes[2].kill();
    let state = ended(&pool, &id);
    assert_eq!(state["status_name"], "SUCCEEDED", "{state}");
    eventually(
        "the dead node is unmounted",
        Duration::from_secs(10),
        || client.segments().unwrap().len() == 2,
    );
    assert_eq!(of(&names[0]), Vec::<usize>::new());
    let mut there = 0;
    for (n, (key, size)) in all.iter().enumerate() {
        match client.get(key.as_bytes()).map(Blob) {
            Ok(got) => {
                assert_eq!(got, Blob(pattern(*size, n as u64)), "{key}");
                there += 1;
            }
            Err(error) => assert_eq!(error, StoreError::NotFound, "{key}"),
        }
    }
    assert!(there > all.len() / 3, "{there} of {}", all.len());
    // A source that dies ends its job, and the pool goes on.
    let mut names = names;
    add_named(&mut pool, "128MiB", &mut names);
    let id = begin(&pool, &names[1], 1);
    pool.nodes[1].kill();
    let state = ended(&pool, &id);
    assert!(
        ["FAILED", "SUCCEEDED"].contains(&state["status_name"].as_str().unwrap()),
        "{state}"
    );
    put(&pool.client(), "after", b"it goes on").unwrap();
}

#[test]
fn a_node_that_stops_moves_what_lies_only_there() {
    let (mut pool, _) = named_pool(2, "64MiB", &[]);
    let all = fill(&pool, 200);
    pool.nodes[0].signal("-TERM");
    assert_eq!(pool.nodes[0].wait(), 0);
    let client = pool.client();
    assert_eq!(client.segments().unwrap().len(), 1);
    all_there(&client, &all, "after its node has left");
    // The last node has nobody to give anything to, and does not wait for it.
    let begun = Instant::now();
    pool.nodes[1].signal("-TERM");
    assert_eq!(pool.nodes[1].wait(), 0);
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    // (A client that has its memory mapped and a lease may read there a little longer.)
    assert_eq!(pool.client().exist(&[b"k1"]), Ok(vec![false]));
}

#[test]
fn a_node_leaves_without_moving_when_told_so_and_at_once_on_the_second_signal() {
    let mut pool = Pool::start_on("127.0.0.1", 2, "64MiB", &[], &["--drain-timeout", "0"]);
    let client = pool.client_over(TransportKind::Tcp);
    for n in 0..100u64 {
        put(&client, &format!("k{n}"), &pattern(2000, n)).unwrap();
    }
    pool.nodes[0].signal("-TERM");
    assert_eq!(pool.nodes[0].wait(), 0);
    let keys: Vec<String> = (0..100).map(|n| format!("k{n}")).collect();
    let keys: Vec<&[u8]> = keys.iter().map(String::as_bytes).collect();
    let left = client.exist(&keys).unwrap().iter().filter(|e| **e).count();
    assert!(
        (1..100).contains(&left),
        "{left} of 100 lay on the other node"
    );
    // What cannot be moved (pinned on both sides, no room) is waited for; a second signal is not.
    let mut full = Pool::start_on("127.0.0.1", 2, "16MiB", &[], &["--drain-timeout", "60s"]);
    let client = full.client_over(TransportKind::Tcp);
    let pinned = PutOptions {
        hard_pin: true,
        ..copies(1)
    };
    let mut n = 0;
    while client
        .put_bytes(format!("p{n}").as_bytes(), &pattern(1 << 20, n), &pinned)
        .is_ok()
    {
        n += 1;
    }
    let begun = Instant::now();
    full.nodes[0].signal("-TERM");
    std::thread::sleep(Duration::from_millis(300));
    full.nodes[0].signal("-TERM");
    assert_eq!(full.nodes[0].wait(), 3);
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
}
