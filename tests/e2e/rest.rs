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
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
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
