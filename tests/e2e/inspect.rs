//! `mooncake inspect`: every view as text and JSON, on a whole pool, a half-dead one, and without a master.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mooncake::engine::transport::TransportKind;
use mooncake::store::client::{PoolClient, PutOptions};
use serde_json::Value;

use crate::pool::{BINARY, Pool, Server, call, eventually, pattern, stdout};
use crate::{copies, put};

fn text(out: &Output) -> String {
    let err = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(0), "{err}");
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn json(pool: &Pool, arguments: &[&str]) -> Value {
    let mut all = vec!["inspect"];
    all.extend_from_slice(arguments);
    all.extend_from_slice(&["--output", "json"]);
    let out = text(&pool.call(&all));
    serde_json::from_str(&out).unwrap_or_else(|e| panic!("{arguments:?}: {e}: {out}"))
}

fn names(keys: &Value) -> Vec<&str> {
    let keys = keys["keys"].as_array().unwrap().iter();
    keys.map(|k| k["key"].as_str().unwrap()).collect()
}

#[test]
fn views_of_a_pool() {
    let pool = Pool::start(2, "16MiB", &[]);
    let client = pool.client();
    for (n, size) in [3000, 100, 20_000].into_iter().enumerate() {
        put(&client, &format!("model/{n}"), &vec![1; size]).unwrap();
    }
    client
        .put_bytes(b"other\x1b[31m", &[1; 500], &copies(2))
        .unwrap();
    client.get(b"model/1").unwrap();

    let overview = json(&pool, &[]);
    assert_eq!(
        (&overview["objects"], &overview["nodes_not_ok"]),
        (&4.into(), &0.into())
    );
    let nodes = json(&pool, &["nodes"]);
    assert_eq!(nodes[1]["build"], env!("CARGO_PKG_VERSION"));
    let segments = json(&pool, &["segments"]);
    assert_eq!(segments[0]["map"].as_array().unwrap().len(), 64);
    let shown = text(&pool.call(&["inspect", "segments"]));
    assert!(
        shown.contains('█') && shown.contains("[") && shown.contains("····"),
        "{shown}"
    );

    // Keys: order, prefix, pages; what a key is made of does not reach the terminal as it is.
    assert_eq!(names(&json(&pool, &["keys"])).len(), 4);
    let prefix = ["keys", "--prefix", "model/"];
    let sorted = |by: &str, more: &[&str]| {
        let mut all = prefix.to_vec();
        all.extend(["--sort", by]);
        all.extend_from_slice(more);
        json(&pool, &all)
    };
    assert_eq!(
        names(&sorted("key", &[])),
        ["model/0", "model/1", "model/2"]
    );
    assert_eq!(
        names(&sorted("size", &[])),
        ["model/2", "model/0", "model/1"]
    );
    // Read last first, however long ago; then what nobody has read, stored last first.
    std::thread::sleep(Duration::from_millis(20));
    client.get(b"model/0").unwrap();
    let hot = sorted("heat", &[]);
    assert_eq!(names(&hot), ["model/0", "model/1", "model/2"]);
    assert_eq!(hot["keys"][2]["was_read"], false);
    let out = pool.call(&["inspect", "keys", "--sort", "heat", "--cursor", "0"]);
    assert_eq!(out.status.code(), Some(2), "a cursor is not ignored");
    let aged = sorted("age", &["--limit", "2"]);
    assert_eq!((names(&aged).len(), &aged["complete"]), (2, &true.into()));
    let first = sorted("key", &["--limit", "2"]);
    let cursor = match &first["next_cursor"] {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    assert_eq!(
        names(&sorted("key", &["--limit", "2", "--cursor", &cursor])),
        ["model/2"]
    );
    let shown = text(&pool.call(&["inspect", "keys"]));
    assert!(
        shown.contains("other\\u{1b}[31m") && !shown.contains('\x1b'),
        "{shown}"
    );

    // Who and what is read.
    assert_eq!(json(&pool, &["tenants"])["tenants"][0]["objects"], 4);
    assert!(text(&pool.call(&["inspect", "tenants"])).contains("default"));
    assert!(json(&pool, &["hot"])["prefixes"].is_array());

    // A key's history outlives it; exit code 1 says that it is not there.
    let there = json(&pool, &["key", "model/0"]);
    assert_eq!(there["history"][0]["event"], "stored");
    assert_eq!(there["size_bytes"], 3000);
    std::thread::sleep(Duration::from_millis(50));
    text(&pool.call(&["rm", "model/0", "--force"]));
    let gone = pool.call(&["inspect", "key", "model/0"]);
    let said = String::from_utf8_lossy(&gone.stdout).into_owned();
    assert_eq!(gone.status.code(), Some(1), "{said}");
    assert!(
        said.contains("is not there") && said.contains("removed"),
        "{said}"
    );
    let never = pool.call(&["inspect", "key", "never"]);
    assert!(String::from_utf8_lossy(&never.stdout).contains("remembers nothing"));

    // Events from the first on: four stored, one removed.
    let events = text(&pool.call(&[
        "inspect", "events", "--from", "1", "--count", "5", "--output", "json",
    ]));
    let events: Vec<Value> = events
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(events[0]["event"], "stored");
    assert_eq!(
        (&events[4]["event"], &events[4]["key"]),
        (&"removed".into(), &"model/0".into())
    );
    let start = Instant::now();
    assert_eq!(
        text(&pool.call(&["inspect", "events", "--for", "500ms"])),
        ""
    );
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn events_that_are_not_there_are_said_to_be() {
    let pool = Pool::start(1, "16MiB", &["--kv-events=false"]);
    put(&pool.client(), "k", b"v").unwrap();
    let said = |arguments: &[&str]| {
        let out = pool.call(arguments);
        let all = [out.stdout, out.stderr].concat();
        (
            out.status.code(),
            String::from_utf8_lossy(&all).into_owned(),
        )
    };
    let (code, text) = said(&["inspect", "events", "--for", "1"]);
    assert!(code == Some(2) && text.contains("--kv-events"), "{text}");
    let (code, text) = said(&["inspect", "key", "k"]);
    assert!(
        code == Some(0) && text.contains("records no events"),
        "{text}"
    );
    let pool = Pool::start(1, "16MiB", &[]);
    pool.client()
        .put_bytes(b"\xff\x01", b"v", &copies(1))
        .unwrap();
    let out = pool.call(&["inspect", "events", "--from", "99999999", "--for", "1"]);
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        out.status.code() == Some(2) && text.contains("will be 2"),
        "{text}"
    );
    let out = pool.call(&[
        "inspect", "events", "--from", "1", "--count", "1", "--output", "json",
    ]);
    let event: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(event["key_hex"], "ff01");
    // What listens there in the master's place is said in words.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = listener.local_addr().unwrap().to_string();
    let ask = ["inspect", "tenants", "--timeout", "1s", "--master", &silent];
    let text = String::from_utf8_lossy(&crate::pool::call(&ask).stderr).into_owned();
    assert!(text.contains("does not answer in time"), "{text}");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = std::io::Write::write_all(&mut stream.unwrap(), b"SSH-2.0-x\r\n\r\n");
        }
    });
    let text = String::from_utf8_lossy(&crate::pool::call(&ask).stderr).into_owned();
    assert!(text.contains("another program listens there"), "{text}");
}

#[test]
fn views_again_and_again_and_their_difference() {
    let pool = Pool::start(1, "16MiB", &[]);
    put(&pool.client(), "a", b"1").unwrap();
    let top = text(&pool.call(&["inspect", "top", "--watch", "200ms", "--count", "3"]));
    assert_eq!(top.matches("OCCUPANCY").count(), 3, "{top}");
    assert!(
        !top.contains('\x1b'),
        "no control sequences in a pipe: {top}"
    );
    let nodes = text(&pool.call(&["inspect", "nodes", "--watch", "100ms", "--count", "2"]));
    assert_eq!(nodes.matches("RELEASE").count(), 2, "{nodes}");
    let lines = text(&pool.call(&[
        "inspect", "top", "--watch", "100ms", "--count", "2", "--output", "json",
    ]));
    let frames: Vec<Value> = lines
        .lines()
        .filter(|l| !l.is_empty())
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(frames.len(), 2);
    assert!(frames[0]["hits_per_s"].is_null() && frames[1]["hits_per_s"].is_number());

    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, json(&pool, &[]).to_string()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let before = file("before.json");
    put(&pool.client(), "b", b"22").unwrap();
    let after = file("after.json");
    let changes = json(&pool, &["diff", &before, &after]);
    let of = |name: &str| {
        let all = changes["changes"].as_array().unwrap();
        all.iter().find(|c| c["field"] == name).cloned().unwrap()
    };
    assert_eq!(of("objects")["change"], 1.0);
    let shown = text(&pool.call(&["inspect", "diff", &before, &after]));
    assert!(
        shown
            .lines()
            .any(|l| l.starts_with("objects ") && l.contains("+1")),
        "{shown}"
    );
    assert!(json(&pool, &["diff", "--interval", "300ms"])["seconds"].as_f64() >= Some(0.2));
    let wrong = pool.call(&["inspect", "diff", &before, "/nowhere.json"]);
    assert_eq!(wrong.status.code(), Some(2));
}

/// Every view, with what makes it end.
const VIEWS: &[&[&str]] = &[
    &[],
    &["nodes"],
    &["segments"],
    &["keys"],
    &["keys", "--sort", "heat"],
    &["key", "a"],
    &["tenants"],
    &["hot"],
    &["top", "--count", "1"],
    &["events", "--for", "300ms"],
    &["diff", "--interval", "200ms"],
];

/// Between a client and a master: passes bytes on until it is told to cut every connection and take none.
struct Relay {
    address: String,
    cut: Arc<AtomicBool>,
}

impl Relay {
    fn to(master: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let cut = Arc::new(AtomicBool::new(false));
        let (closed, master) = (cut.clone(), master.to_owned());
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let Ok(far) = TcpStream::connect(&master) else {
                    continue;
                };
                if closed.load(Ordering::Acquire) {
                    continue;
                }
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let closed = closed.clone();
                    std::thread::spawn(move || pass(from, to, &closed));
                }
            }
        });
        Self { address, cut }
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, cut: &AtomicBool) {
    let mut piece = [0; 65_536];
    from.set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    while !cut.load(Ordering::Acquire) {
        match from.read(&mut piece) {
            Ok(0) => break,
            Ok(n) if to.write_all(&piece[..n]).is_err() => break,
            Err(e) if !matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
            _ => {}
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
}

fn event(follower: &Server, of: &str) -> Value {
    serde_json::from_str(&follower.line(of)).unwrap()
}

#[test]
fn events_go_on_where_they_were() {
    let mut pool = Pool::start(1, "16MiB", &["--kv-events-queue-capacity", "1000"]);
    let client = pool.client();
    let relay = Relay::to(&pool.address);
    let follow = |master: &str| {
        Server::start(&[
            "inspect",
            "events",
            "--output",
            "json",
            "--timeout",
            "10s",
            "--master",
            master,
        ])
    };
    let follower = follow(&relay.address);
    // It begins at the moment it was started, whenever that was.
    let mut n = 0;
    while follower.lines().is_empty() {
        put(&client, &format!("first{n}"), b"1").unwrap();
        n += 1;
        assert!(n < 200, "no event came");
        std::thread::sleep(Duration::from_millis(50));
    }
    let away = |client: &PoolClient, puts: u64, name: &str| {
        relay.cut.store(true, Ordering::Release);
        for n in 0..puts {
            put(client, &format!("{name}{n}"), b"2").unwrap();
        }
        std::thread::sleep(Duration::from_millis(700));
        relay.cut.store(false, Ordering::Release);
    };
    // The connection is cut: what happened meanwhile is told, in order, and nothing is missing.
    away(&client, 30, "meanwhile");
    for n in 0..30 {
        let line = follower.line("meanwhile");
        assert!(line.contains(&format!("\"meanwhile{n}\"")), "{n}: {line}");
    }
    // More than the master keeps: how many are lost is said first.
    away(&client, 1500, "many");
    let (mut told, mut lost) = (0, 0);
    for line in std::iter::repeat_with(|| event(&follower, "")) {
        if line["event"] == "gap" {
            assert_eq!(line["restarted"], false);
            lost += line["lost"].as_u64().unwrap();
            continue;
        }
        told += 1;
        if line["key"] == "many1499" {
            break;
        }
    }
    assert!(lost > 0 && told + lost == 1500, "{told} {lost}");
    // Another master: said, and its events follow.
    pool.restart_master();
    eventually("the node is back", Duration::from_secs(10), || {
        put(&pool.client(), "anew", b"3").is_ok()
    });
    assert_eq!(event(&follower, "gap")["restarted"], true);
    event(&follower, "anew");
    drop(follower);

    // A master that stays away is given up after --timeout.
    let mut follower = Server::start(&[
        "inspect",
        "events",
        "--timeout",
        "1s",
        "--master",
        &pool.address,
    ]);
    std::thread::sleep(Duration::from_millis(500));
    pool.master.kill();
    let start = Instant::now();
    assert_eq!(follower.wait(), 3);
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn watching_goes_on_over_a_restart_of_the_master() {
    let mut pool = Pool::start(1, "16MiB", &[]);
    let arguments = [
        "inspect",
        "top",
        "--watch",
        "300ms",
        "--count",
        "12",
        "--timeout",
        "1s",
        "--master",
        &pool.address,
    ];
    let mut watcher = Server::start(&arguments);
    watcher.line("OCCUPANCY");
    pool.restart_master();
    assert_eq!(watcher.wait(), 0);
    assert!(
        watcher.lines().iter().any(|l| l.contains("OCCUPANCY")),
        "it showed the new master"
    );
}

/// What a terminal of that size gets, without what moves its cursor. `script` of util-linux makes the terminal.
fn on_terminal(columns: usize, rows: usize, arguments: &str) -> Option<Vec<String>> {
    let line = format!("stty cols {columns} rows {rows}; {BINARY} {arguments}");
    let out = Command::new("script")
        .args(["-qec", &line, "/dev/null"])
        .output()
        .ok()?;
    assert_eq!(
        out.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&out.stdout)
    );
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let last = text.rsplit("\x1b[H").next().unwrap_or_default();
    let controls = regex::Regex::new("\x1b\\[[0-9;]*[A-Za-z]").unwrap();
    let plain = controls.replace_all(last, "").into_owned();
    Some(
        plain
            .lines()
            .map(|l| l.trim_end_matches('\r').to_owned())
            .collect(),
    )
}

#[test]
fn views_fit_their_terminal() {
    let pool = Pool::start(3, "16MiB", &[]);
    put(&pool.client(), "a", &[1; 9_000_000]).unwrap();
    let master = &pool.address;
    for view in ["top", "segments", "nodes", "tenants", "hot"] {
        for (columns, rows) in [(120, 30), (80, 24), (50, 24), (80, 4)] {
            let arguments = format!("inspect {view} --watch 100ms --count 2 --master {master}");
            let Some(lines) = on_terminal(columns, rows, &arguments) else {
                println!("skipped: no `script`");
                return;
            };
            let widest = lines.iter().map(|l| l.chars().count()).max();
            assert!(widest <= Some(columns), "{view} {columns}: {lines:#?}");
            assert!(lines.len() < rows, "{view} {rows}: {lines:#?}");
            assert!(!lines.is_empty() || view == "hot");
        }
    }
    for view in ["keys", "tenants", "hot"] {
        let lines = on_terminal(30, 24, &format!("inspect {view} --master {master}")).unwrap();
        let widest = lines.iter().map(|l| l.chars().count()).max();
        assert!(widest <= Some(30), "{view}: {lines:#?}");
    }
    let narrow = on_terminal(80, 24, &format!("inspect top --count 1 --master {master}")).unwrap();
    assert!(
        narrow
            .iter()
            .any(|l| l.contains("SEGMENT") && l.contains("USED") && l.contains("OBJECTS")),
        "{narrow:#?}"
    );
    // A proxy for the web is not asked for the pool.
    let out = Command::new(BINARY)
        .args(["inspect", "keys", "--master", master])
        .env("http_proxy", "http://127.0.0.1:9")
        .output()
        .unwrap();
    assert_eq!(
        out.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
}

#[test]
fn a_half_dead_pool_and_none() {
    let mut pool = Pool::start(3, "16MiB", &[]);
    put(&pool.client(), "a", b"1").unwrap();
    pool.nodes[0].kill();
    let end = Instant::now() + Duration::from_secs(10);
    while json(&pool, &[])["nodes_not_ok"] != 1 {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(text(&pool.call(&["inspect"])).contains("lost"));
    // One node gone, one that takes connections and answers nothing.
    pool.nodes[1].signal("-STOP");
    for view in VIEWS {
        let mut all = vec!["inspect"];
        all.extend_from_slice(view);
        let start = Instant::now();
        let out = pool.call(&all);
        // A key whose node is gone is shown, as far as it is known.
        let code = out.status.code();
        assert!(
            code == Some(0) || (view == &["key", "a"] && code == Some(1)),
            "{view:?}"
        );
        assert!(!out.stdout.is_empty() || view[0] == "events", "{view:?}");
        assert!(
            start.elapsed() < Duration::from_secs(8),
            "{view:?}: {:?}",
            start.elapsed()
        );
    }
    pool.nodes[1].signal("-CONT");
    // Stopped, it takes connections and answers nothing: every view ends by its own deadline.
    pool.master.signal("-STOP");
    for view in VIEWS {
        let mut all = vec!["inspect"];
        all.extend_from_slice(view);
        all.extend_from_slice(&["--timeout", "1s"]);
        let start = Instant::now();
        let out = pool.call(&all);
        assert_eq!(out.status.code(), Some(3), "{view:?}");
        let took = start.elapsed();
        assert!(took < Duration::from_secs(8), "{view:?}: {took:?}");
    }
    pool.master.signal("-CONT");
    // Another HTTP server, that is content with everything.
    let stranger = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let elsewhere = stranger.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for mut stream in stranger.incoming().flatten() {
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}");
        }
    });
    for view in ["keys", "tenants", "hot"] {
        let out = call(&["inspect", view, "--master", &elsewhere, "--timeout", "1s"]);
        assert_eq!(out.status.code(), Some(3), "{view}");
    }
    let address = pool.address.clone();
    drop(pool);
    for view in [
        "nodes", "segments", "keys", "tenants", "hot", "top", "events", "diff",
    ] {
        let out = call(&["inspect", view, "--master", &address, "--timeout", "1s"]);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(3), "{view}: {said}");
        assert_eq!(said.trim().lines().count(), 1, "{view}: {said}");
    }
}

#[test]
fn what_clients_move_is_told_by_transport_and_why_a_put_failed_by_key() {
    let pool = Pool::start(1, "64MiB", &["--default-kv-lease-ttl", "50ms"]);
    let bytes = pattern(1 << 20, 1);
    for kind in [TransportKind::Shm, TransportKind::Tcp] {
        let client = pool.client_over(kind);
        for n in 0..8 {
            put(&client, &format!("{}{n}", kind.name()), &bytes).unwrap();
            client
                .get(format!("{}{n}", kind.name()).as_bytes())
                .unwrap();
        }
        // A client that goes tells the rest.
        drop(client);
    }
    let overview = |pool: &Pool| -> Value {
        let (_, text) = crate::http::request(&pool.address, "GET", "/api/v1/overview");
        serde_json::from_str(&text).unwrap()
    };
    let o = overview(&pool);
    assert!(o["written_bytes"].as_u64().unwrap() >= 16 << 20, "{o}");
    assert!(o["read_bytes"].as_u64().unwrap() >= 16 << 20, "{o}");
    let ways = o["transfers"].as_array().unwrap();
    for (transport, operation) in [
        ("shm", "read"),
        ("shm", "write"),
        ("tcp", "read"),
        ("tcp", "write"),
    ] {
        let of = |w: &&Value| w["transport"] == transport && w["operation"] == operation;
        let way = ways
            .iter()
            .find(of)
            .unwrap_or_else(|| panic!("{transport} {operation}: {o}"));
        assert!(
            (8 << 20..10 << 20).contains(&way["bytes"].as_u64().unwrap()),
            "{way}"
        );
        assert!(way["transfers"].as_u64().unwrap() >= 8, "{way}");
    }
    let (_, metrics) = crate::http::request(&pool.address, "GET", "/metrics");
    let series = "mooncake_client_transfer_seconds_count{transport=\"shm\",operation=\"read\"}";
    let line = metrics.lines().find(|l| l.starts_with(series)).unwrap();
    assert!(
        line.rsplit(' ').next().unwrap().parse::<u64>().unwrap() >= 8,
        "{line}"
    );
    // A client that stays tells about once a second, beside what it asks anyway.
    let client = pool.client_over(TransportKind::Shm);
    let begun = std::time::Instant::now();
    while overview(&pool)["read_bytes"] == o["read_bytes"] {
        client.get(b"shm0").unwrap();
        client.exist(&[b"shm0"]).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(5));
        std::thread::sleep(Duration::from_millis(50));
    }
    let top = pool.call(&["inspect", "top", "--count", "1"]);
    assert!(
        stdout(&top).contains("per second  read"),
        "{}",
        stdout(&top)
    );
    // Too much to ask for: remembered with the key.
    let pinned = PutOptions {
        hard_pin: true,
        ..PutOptions::default()
    };
    let mut n = 0;
    let full = loop {
        let key = format!("pin{n}");
        if client
            .put_bytes(key.as_bytes(), &pattern(4 << 20, n), &pinned)
            .is_err()
        {
            break key;
        }
        n += 1;
    };
    let shown = pool.call(&["inspect", "key", &full]);
    assert!(
        stdout(&shown).contains("put failed") && stdout(&shown).contains("waited"),
        "{}",
        stdout(&shown)
    );
    let shown = pool.call(&["inspect", "key", "tcp0"]);
    assert!(
        stdout(&shown).contains("space was needed, not read for"),
        "{}",
        stdout(&shown)
    );
}
