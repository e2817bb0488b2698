//! Strangers, wrong tokens, bad input.

use std::time::Duration;

use crate::pool::{Pool, Server, call, stderr, stdout};
use crate::put;

#[test]
fn trust_on_every_door() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    std::fs::write(&file, "correct horse\n").unwrap();
    let file = file.to_str().unwrap();
    let secured = ["--token-file", file];
    let pool = Pool::start_on("127.0.0.1", 1, "32MiB", &secured, &secured);
    let with_token = |more: &[&str]| {
        let mut arguments = more.to_vec();
        arguments.extend_from_slice(&secured);
        pool.call(&arguments)
    };
    let one = directory.path().join("one");
    std::fs::write(&one, "one").unwrap();
    let out = with_token(&["put", "k", one.to_str().unwrap()]);
    assert!(out.status.success(), "{}", stderr(&out));
    assert_eq!(stdout(&with_token(&["get", "k"])), "one");
    assert_eq!(
        stdout(&with_token(&["get", "k", "--transport", "tcp"])),
        "one"
    );
    // Without, and with another one: RPC, HTTP.
    for arguments in [&["get", "k"][..], &["ls"], &["inspect"]] {
        let out = pool.call(arguments);
        assert_eq!(out.status.code(), Some(3), "{}", stderr(&out));
        assert!(stderr(&out).contains("token"), "{}", stderr(&out));
        assert!(!stderr(&out).contains("horse"));
    }
    let http = |path: &str, header: &str| {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(&pool.address).unwrap();
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{header}\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    assert!(http("/health", "").starts_with("HTTP/1.1 200"));
    assert!(http("/get_all_keys", "").starts_with("HTTP/1.1 401"));
    assert!(http("/get_all_keys", "Authorization: Bearer wrong\r\n").starts_with("HTTP/1.1 401"));
    assert!(http("/get_all_keys", "Authorization: Bearer correct horse\r\n").ends_with("k\n"));
    // A node without the token does not get in.
    let stranger = Server::start(&["node", "--master", &pool.address, "--memory", "8MiB"]);
    std::thread::sleep(Duration::from_millis(600));
    drop(stranger);
    let segments = stdout(&with_token(&["inspect", "segments", "--output", "json"]));
    let segments: serde_json::Value = serde_json::from_str(&segments).unwrap();
    assert_eq!(segments.as_array().map(Vec::len), Some(1), "{segments}");
}

#[test]
fn strangers_on_the_masters_port_harm_nobody() {
    use std::io::{Read, Write};
    let pool = Pool::start(1, "32MiB", &[]);
    let client = pool.client();
    put(&client, "k", b"v").unwrap();
    let mut lane = mooncake_lane(&pool.address);
    lane.write_all(&u32::MAX.to_le_bytes()).unwrap();
    let mut rest = Vec::new();
    let _ = lane.read_to_end(&mut rest);
    for garbage in [
        &b"\0\0\0\0"[..],
        b"MKLANE\r\nshort",
        b"PRI * HTTP/2.0\r\n\r\nXX",
        &[0xA5; 4096],
    ] {
        let mut stream = std::net::TcpStream::connect(&pool.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(1)))
            .unwrap();
        stream.write_all(garbage).unwrap();
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    assert_eq!(client.get(b"k").unwrap(), b"v");
}

/// A handshaken control lane of an open cluster, to misbehave on.
fn mooncake_lane(address: &str) -> std::net::TcpStream {
    use mooncake::base::handshake::{LaneKind, connect};
    use mooncake::base::{id::Id128, trust::ClusterKeys};
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    connect(
        &mut stream,
        LaneKind::Control,
        Id128::random(),
        &ClusterKeys::derive(None),
    )
    .unwrap();
    stream
}

#[test]
fn bad_situations_are_one_line_with_the_right_code() {
    let pool = Pool::start(1, "16MiB", &[]);
    let directory = tempfile::tempdir().unwrap();
    let big = directory.path().join("big");
    std::fs::write(&big, vec![1; 20 << 20]).unwrap();
    let big = big.to_str().unwrap();
    let port = pool.address.rsplit_once(':').unwrap().1;
    let data_address = pool.client().segments().unwrap()[0].address.clone();
    let long = "k".repeat(4097);
    let cases: Vec<(Vec<&str>, i32, &str)> = vec![
        (
            vec!["get", "absent", "--master", &pool.address],
            1,
            "object not found",
        ),
        (
            vec!["stat", "absent", "--master", &pool.address],
            1,
            "object not found",
        ),
        (
            vec!["put", "k", big, "--master", &pool.address],
            1,
            "largest one has 16777216",
        ),
        (
            vec!["put", &long, big, "--master", &pool.address],
            2,
            "a key has 1 to 4096 bytes, this one has 4097",
        ),
        (
            vec!["get", "", "--master", &pool.address],
            2,
            "a key has 1 to 4096 bytes",
        ),
        (
            vec![
                "get",
                "k",
                "-o",
                "/nonexistent/dir/f",
                "--master",
                &pool.address,
            ],
            2,
            "cannot write /nonexistent/dir/f",
        ),
        (
            vec!["get", "k", "-o", "/", "--master", &pool.address],
            2,
            "directory",
        ),
        (
            vec!["put", "k", "/nonexistent", "--master", &pool.address],
            2,
            "cannot read /nonexistent",
        ),
        (
            vec!["get", "k", "--master", "127.0.0.1:1"],
            3,
            "master 127.0.0.1:1",
        ),
        (
            vec!["get", "k", "--master", &data_address],
            3,
            "this is a node's data port, give the master's",
        ),
        (
            vec!["get", "k", "--master", "no.such.host.invalid:1"],
            3,
            "no.such.host.invalid",
        ),
        (vec!["master", "--port", port], 2, "cannot listen on"),
        (
            vec!["node", "--master", &pool.address, "--memory", "900TiB"],
            2,
            "larger than this machine's memory",
        ),
        (
            vec!["rm", "--regex", "(", "--master", &pool.address],
            2,
            "regex",
        ),
    ];
    for (arguments, code, text) in cases {
        let out = call(&arguments);
        let error = stderr(&out);
        assert_eq!(out.status.code(), Some(code), "{arguments:?}: {error}");
        assert!(error.contains(text), "{arguments:?}: {error}");
        assert_eq!(error.trim().lines().count(), 1, "{arguments:?}: {error}");
    }
    assert!(stdout(&pool.call(&["inspect"])).contains("objects    0"));
}

#[test]
fn logs_are_json_when_told_so_and_as_much_as_asked_for() {
    let logged = |level: &str, format: &str| -> Vec<String> {
        let arguments = [
            "master",
            "--port",
            "0",
            "--metrics-port",
            "off",
            "--log-format",
            format,
        ];
        let mut child = std::process::Command::new(crate::pool::BINARY)
            .args(arguments)
            .env("RUST_LOG", level)
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut first = String::new();
        let mut stdout = std::io::BufReader::new(child.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut stdout, &mut first).unwrap();
        let pid = child.id().to_string();
        let stopped = std::process::Command::new("kill")
            .args(["-TERM", &pid])
            .status();
        assert!(stopped.unwrap().success());
        let out = child.wait_with_output().unwrap();
        let text = String::from_utf8(out.stderr).unwrap();
        text.lines().map(str::to_owned).collect()
    };
    let lines = logged("info", "json");
    assert!(!lines.is_empty());
    for line in &lines {
        let value: serde_json::Value =
            serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert!(
            value["timestamp"].is_string() && value["level"].is_string(),
            "{line}"
        );
        assert!(value["fields"]["message"].is_string(), "{line}");
    }
    assert!(
        lines.iter().any(|l| l.contains("master stops")),
        "{lines:?}"
    );
    let lines = logged("error", "text");
    assert!(lines.is_empty(), "{lines:?}");
}

/// Until the other side closes; `None`: not within `limit`.
fn closed_after(stream: &mut std::net::TcpStream, limit: Duration) -> Option<Duration> {
    use std::io::Read;
    let begun = std::time::Instant::now();
    stream.set_read_timeout(Some(limit)).unwrap();
    let mut bytes = [0; 4096];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return Some(begun.elapsed()),
            Ok(_) if begun.elapsed() < limit => {}
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => {
                return Some(begun.elapsed());
            }
            _ => return None,
        }
    }
}

#[test]
fn nobody_keeps_the_master_waiting() {
    use std::io::Write;
    let pool = Pool::start(1, "16MiB", &[]);
    let limit = Duration::from_secs(45);
    let quota = "PUT /api/v1/tenant_quotas?tenant_id=a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{";
    let cases: &[(&str, &[u8])] = &[
        ("nothing", b""),
        ("half of what a lane says", b"MKL"),
        ("half of what HTTP/2 says", b"PRI * HT"),
        ("half a request line", b"GET /hea"),
        (
            "half a head",
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-",
        ),
        (
            "no second request",
            b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        ),
        ("half a body", quota.as_bytes()),
    ];
    let mut events = std::net::TcpStream::connect(&pool.address).unwrap();
    events
        .write_all(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .unwrap();
    let open: Vec<_> = cases
        .iter()
        .map(|(name, bytes)| {
            let mut stream = std::net::TcpStream::connect(&pool.address).unwrap();
            stream.write_all(bytes).unwrap();
            (
                *name,
                std::thread::spawn(move || closed_after(&mut stream, limit)),
            )
        })
        .collect();
    for (name, waited) in open {
        assert!(
            waited.join().unwrap().is_some(),
            "{name}: still open after {limit:?}"
        );
    }
    // A stream of events outlives all those deadlines.
    assert_eq!(closed_after(&mut events, Duration::from_secs(2)), None);
    put(&pool.client(), "k", b"v").unwrap();
    let mut seen = String::new();
    let end = std::time::Instant::now() + Duration::from_secs(5);
    while !seen.contains("event: stored") {
        use std::io::Read;
        assert!(std::time::Instant::now() < end, "{seen}");
        let mut bytes = [0; 4096];
        let n = events.read(&mut bytes).unwrap();
        seen.push_str(&String::from_utf8_lossy(&bytes[..n]));
    }
}

#[test]
fn a_flood_of_connections_leaves_room_for_the_pool() {
    use std::io::{Read, Write};
    let pool = Pool::start(1, "16MiB", &[]);
    let client = pool.client();
    put(&client, "k", b"v").unwrap();
    let idle = || {
        let mut stream = std::net::TcpStream::connect(&pool.address).unwrap();
        stream
            .write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let mut head = [0; 12];
        stream.read_exact(&mut head).map(|()| (head, stream))
    };
    let mut open = Vec::new();
    let refused = loop {
        let (head, stream) = idle().unwrap();
        if &head == b"HTTP/1.1 503" {
            break open.len();
        }
        open.push(stream);
        assert!(open.len() < 1100, "no bound");
    };
    assert!(refused >= 1000, "{refused}");
    assert_eq!(client.get(b"k").unwrap(), b"v");
    assert_eq!(pool.client().get(b"k").unwrap(), b"v", "a new client");
    drop(open);
    let free = || idle().is_ok_and(|(head, _)| &head == b"HTTP/1.1 200");
    crate::pool::eventually("room again", Duration::from_secs(5), free);
}
