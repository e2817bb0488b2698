//! Objects over HTTP, byte for byte, and beside clients of the pool.

use std::io::{Read, Write};
use std::time::Duration;

use crate::http::request;
use crate::pool::{Blob, Pool, eventually, pattern};
use crate::put;

struct Answer {
    status: u16,
    head: String,
    body: Blob,
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        let of = |l: &str| l.to_ascii_lowercase().starts_with(&format!("{name}:"));
        let line = self.head.lines().find(|l| of(l)).unwrap_or("");
        line.split_once(": ").map_or("", |(_, value)| value)
    }
}

fn send(address: &str, method: &str, path: &str, headers: &str, body: &[u8]) -> Answer {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
    )
    .unwrap();
    stream.write_all(body).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
    let head = String::from_utf8(answer[..end].to_vec()).unwrap();
    Answer {
        status: head.split(' ').nth(1).unwrap().parse().unwrap(),
        body: Blob(answer.split_off(end + 4)),
        head,
    }
}

#[test]
fn objects_over_http() {
    let pool = Pool::start(2, "64MiB", &["--recovery-grace", "0s"]);
    let at = pool.address.as_str();
    let path = "/api/v1/objects/a/b%20c";
    let bytes = pattern(10_000_000, 3);
    let stored = send(at, "PUT", &format!("{path}?replicas=2"), "", &bytes);
    assert_eq!(stored.status, 201, "{}", stored.head);
    assert_eq!(stored.body.0, b"{\"success\":true,\"replicas\":2}\n");
    // The same object as everybody's.
    assert!(pool.client().get(b"a/b c").unwrap() == bytes);
    let all = send(at, "GET", path, "", b"");
    assert_eq!(
        (all.status, all.header("content-length")),
        (200, "10000000")
    );
    assert!(all.body.0 == bytes);
    let head = send(at, "HEAD", path, "", b"");
    assert_eq!(
        (head.status, head.header("content-length")),
        (200, "10000000")
    );
    assert!(head.body.0.is_empty() && head.header("etag") == all.header("etag"));
    // Parts.
    let part = send(at, "GET", path, "Range: bytes=4000000-8999999\r\n", b"");
    assert_eq!(part.status, 206);
    assert_eq!(
        part.header("content-range"),
        "bytes 4000000-8999999/10000000"
    );
    assert!(part.body.0 == bytes[4_000_000..9_000_000]);
    let tail = send(at, "GET", path, "Range: bytes=-5\r\n", b"");
    assert!(tail.body.0 == bytes[9_999_995..]);
    assert_eq!(
        send(at, "GET", path, "Range: bytes=10000000-\r\n", b"").status,
        416
    );
    // Replaced, or left alone.
    let kept = send(at, "PUT", path, "If-None-Match: *\r\n", b"new");
    assert_eq!(kept.status, 412);
    assert_eq!(send(at, "PUT", path, "", b"new").status, 201);
    let new = send(at, "GET", path, "", b"");
    assert_eq!(new.body.0, b"new");
    assert_ne!(new.header("etag"), all.header("etag"));
    // Tenants are apart.
    assert_eq!(
        send(at, "GET", &format!("{path}?tenant=acme"), "", b"").status,
        404
    );
    assert_eq!(
        send(at, "PUT", &format!("{path}?tenant=acme"), "", b"x").status,
        201
    );
    let keys = request(at, "GET", "/api/v1/keys?tenant=acme").1;
    assert!(keys.contains("a/b c"), "{keys}");
    // Its quota is used up.
    crate::quotas::set(&pool, "small", 100_000);
    let full = send(at, "PUT", &format!("{path}?tenant=small"), "", &bytes);
    let said = String::from_utf8_lossy(&full.body.0);
    assert_eq!(full.status, 507, "{said}");
    assert!(said.contains("TENANT_QUOTA_EXCEEDED"), "{said}");
    // Gone.
    assert_eq!(
        send(at, "DELETE", path, "", b"").status,
        409,
        "it is leased"
    );
    assert_eq!(
        send(at, "DELETE", &format!("{path}?force=true"), "", b"").status,
        204
    );
    let gone = send(at, "GET", path, "", b"");
    assert_eq!(gone.status, 404);
    assert!(String::from_utf8_lossy(&gone.body.0).contains("OBJECT_NOT_FOUND"));
    // What cannot be.
    assert_eq!(send(at, "PUT", path, "", b"").status, 400);
    assert_eq!(send(at, "PUT", path, "", &vec![0; 65 << 20]).status, 413);
    let long = format!("/api/v1/objects/{}", "k".repeat(4097));
    assert_eq!(send(at, "PUT", &long, "", b"x").status, 400);
    assert_eq!(
        send(at, "PUT", &format!("{path}?replicas=x"), "", b"x").status,
        400
    );
}

#[test]
fn nodes_tell_what_they_served() {
    let pool = Pool::start(1, "32MiB", &[]);
    let client = pool.client_over(mooncake::engine::transport::TransportKind::Tcp);
    put(&client, "k", &[7; 100_000]).unwrap();
    assert_eq!(client.get(b"k").unwrap().len(), 100_000);
    eventually(
        "the node's heartbeat tells of it",
        Duration::from_secs(10),
        || {
            let (_, text) = request(&pool.address, "GET", "/metrics");
            let value = |series: &str| {
                let line = text.lines().find(|l| l.starts_with(series))?;
                line.rsplit(' ').next()?.parse::<f64>().ok()
            };
            let times = text
                .lines()
                .filter(|l| l.starts_with("mooncake_node_request_seconds_count"))
                .filter(|l| l.contains("transport=\"tcp\""));
            value("mooncake_node_read_bytes_total").is_some_and(|b| b >= 100_000.0)
                && value("mooncake_node_written_bytes_total").is_some_and(|b| b >= 100_000.0)
                && value("mooncake_node_refused_requests_total") == Some(0.0)
                && value("mooncake_node_lanes").is_some_and(|n| n >= 1.0)
                && times.count() == 2
        },
    );
}

/// Sends what is given, and says so if that is all.
fn raw(address: &str, bytes: &[u8], ends: bool) -> String {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stream.write_all(bytes).unwrap();
    if ends {
        let _ = stream.shutdown(std::net::Shutdown::Write);
    }
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn wrong_parameters_and_bodies_that_break_off_are_400() {
    let pool = Pool::start(1, "64MiB", &["--recovery-grace", "0s"]);
    let at = pool.address.as_str();
    for wrong in [
        "replicas=65",
        "replicas=0",
        "replicas=x",
        "hard_pin=maybe",
        "soft_pin_ms=-1",
    ] {
        let answer = send(
            at,
            "PUT",
            &format!("/api/v1/objects/k?{wrong}"),
            "",
            b"value",
        );
        assert_eq!(answer.status, 400, "{wrong}: {:?}", answer.body);
    }
    assert_eq!(
        send(at, "DELETE", "/api/v1/objects/k?force=perhaps", "", b"").status,
        400
    );
    let cut = raw(
        at,
        b"PUT /api/v1/objects/k HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\nfew bytes",
        true,
    );
    // hyper may close without an answer when the client has half-closed: what counts is that it is no 413 and stores nothing.
    assert!(cut.is_empty() || cut.starts_with("HTTP/1.1 400"), "{cut}");
    let bad_chunk = raw(
        at,
        b"PUT /api/v1/objects/k HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        false,
    );
    assert!(bad_chunk.starts_with("HTTP/1.1 400"), "{bad_chunk}");
    assert_eq!(send(at, "GET", "/api/v1/objects/k", "", b"").status, 404);
}

#[test]
fn announced_bytes_take_no_room_before_they_come() {
    let pool = Pool::start(1, "64MiB", &["--recovery-grace", "0s"]);
    let at = pool.address.as_str();
    // Together they announce more than all bodies may have.
    let idle: Vec<_> = (0..8)
        .map(|n| {
            let mut stream = std::net::TcpStream::connect(at).unwrap();
            let head = format!(
                "PUT /api/v1/objects/idle{n} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n",
                250 << 20
            );
            stream.write_all(head.as_bytes()).unwrap();
            stream
        })
        .collect();
    std::thread::sleep(Duration::from_millis(300));
    let begun = std::time::Instant::now();
    let bytes = pattern(3_000_000, 1);
    let stored = send(at, "PUT", "/api/v1/objects/k", "", &bytes);
    assert_eq!(stored.status, 201, "{:?}", stored.body);
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
    drop(idle);
}

#[test]
fn without_a_token_a_page_of_another_site_cannot_read_under_a_name_made_to_lead_here() {
    let pool = Pool::start(1, "64MiB", &[]);
    let at = pool.address.as_str();
    let ask = |host: &str| {
        let text =
            format!("GET /api/v1/overview HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        raw(at, text.as_bytes(), false)
    };
    for own in [
        "localhost",
        "localhost:50051",
        "127.0.0.1:1",
        "[::1]:50051",
        "a.localhost",
    ] {
        assert!(ask(own).starts_with("HTTP/1.1 200"), "{own}: {}", ask(own));
    }
    for other in ["evil.example", "localhost.evil.example:50051", "x"] {
        let said = ask(other);
        assert!(
            said.starts_with("HTTP/1.1 403") && said.contains("Host"),
            "{other}: {said}"
        );
    }
}
