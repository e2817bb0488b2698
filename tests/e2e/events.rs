//! Following a pool: what is stored and removed, from the beginning, from a snapshot, after a gap, after a restart.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::time::Duration;

use mooncake::store::client::PoolClient;
use mooncake::store::wire::object_event::{Kind, Reason};
use mooncake::store::wire::pool_client::PoolClient as Grpc;
use mooncake::store::wire::{EventBatch, EventsRequest};

use crate::pool::{Pool, eventually};
use crate::put;

/// Subscribes and collects batches until `enough` says so.
fn follow(
    address: &str,
    request: EventsRequest,
    mut enough: impl FnMut(&EventBatch) -> bool,
) -> Vec<EventBatch> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let collect = async {
        let endpoint = tonic::transport::Endpoint::new(format!("http://{address}")).unwrap();
        let mut client = Grpc::new(endpoint.connect().await.unwrap());
        let mut stream = client.events(request).await.unwrap().into_inner();
        let mut batches = Vec::new();
        loop {
            let batch = stream.message().await.unwrap().unwrap();
            let done = enough(&batch);
            batches.push(batch);
            if done {
                return batches;
            }
        }
    };
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(20), collect)
            .await
            .expect("the events came")
    })
}

/// `(seq, kind, reason, key)` of all events.
fn told(batches: &[EventBatch]) -> Vec<(u64, Kind, Reason, String)> {
    let one = |e: &mooncake::store::wire::ObjectEvent| {
        let key = String::from_utf8(e.key.to_vec()).unwrap();
        (e.seq, e.kind(), e.reason(), key)
    };
    batches.iter().flat_map(|b| &b.events).map(one).collect()
}

fn from(from_seq: u64) -> EventsRequest {
    EventsRequest {
        from_seq,
        ..EventsRequest::default()
    }
}

fn put_many(client: &PoolClient, prefix: &str, count: usize) {
    for n in 0..count {
        put(client, &format!("{prefix}{n}"), b"value").unwrap();
    }
}

#[test]
fn everything_is_told_in_order_and_again() {
    let pool = Pool::start(1, "32MiB", &[]);
    let client = pool.client();
    put_many(&client, "a", 3);
    client.remove(&[b"a1"], true).unwrap();
    let until = |wanted: u64| move |b: &EventBatch| b.next_seq >= wanted;
    let first = told(&follow(&pool.address, from(1), until(5)));
    let expected = [
        (1, Kind::Stored, Reason::None, "a0".to_owned()),
        (2, Kind::Stored, Reason::None, "a1".to_owned()),
        (3, Kind::Stored, Reason::None, "a2".to_owned()),
        (4, Kind::Removed, Reason::ByRequest, "a1".to_owned()),
    ];
    assert_eq!(first, expected);
    // A part of it again, and filtered.
    assert_eq!(
        told(&follow(&pool.address, from(3), until(5))),
        expected[2..]
    );
    let filtered = EventsRequest {
        prefix: "a1".into(),
        ..from(1)
    };
    let batches = follow(&pool.address, filtered, until(5));
    assert_eq!(told(&batches), [expected[1].clone(), expected[3].clone()]);
    let (epoch, term) = (batches[0].epoch, batches[0].term);
    assert!(epoch > 0 && term > 0);
    // All of it goes: said once for the tenant, and of each key.
    client.remove_matching("", true).unwrap();
    let rest = told(&follow(&pool.address, from(5), until(8)));
    assert_eq!((rest[0].1, rest[0].3.as_str()), (Kind::Cleared, ""));
    let mut gone: Vec<&str> = rest[1..].iter().map(|e| e.3.as_str()).collect();
    gone.sort_unstable();
    assert_eq!(gone, ["a0", "a2"]);
}

#[test]
fn a_gap_is_told_and_a_snapshot_mends_it() {
    let pool = Pool::start(1, "32MiB", &["--kv-events-queue-capacity", "10"]);
    let client = pool.client();
    put_many(&client, "k", 50);
    let batches = follow(&pool.address, from(1), |b| b.next_seq == 51);
    let gap = batches[0].gap.unwrap();
    assert_eq!((gap.from_seq, gap.to_seq, gap.restarted), (1, 41, false));
    assert_eq!(told(&batches).len(), 10);
    let snapshot = EventsRequest {
        snapshot: true,
        ..EventsRequest::default()
    };
    let mut ended = false;
    let mut late = Some(pool.client());
    let batches = follow(&pool.address, snapshot, |b| {
        ended |= b.snapshot_end;
        if let Some(late) = late.take_if(|_| ended) {
            put(&late, "late", b"value").unwrap();
        }
        b.events.iter().any(|e| e.key == "late")
    });
    let mut known = BTreeMap::new();
    for event in batches.iter().flat_map(|b| &b.events) {
        known.insert(event.key.to_vec(), event.version);
    }
    assert_eq!(known.len(), 51);
    let last = batches.last().unwrap();
    assert!(!last.snapshot && last.events[0].seq == 51 && last.gap.is_none());
}

#[test]
fn a_restarted_master_and_a_lost_node_are_told() {
    let mut pool = Pool::start(1, "32MiB", &["--client-ttl", "1s"]);
    put_many(&pool.client(), "k", 5);
    let before = follow(&pool.address, from(1), |b| b.next_seq == 6);
    let epoch = before[0].epoch;
    pool.restart_master();
    let client = pool.client();
    eventually("the node is back", Duration::from_secs(10), || {
        client.get(b"k0").is_ok()
    });
    let request = EventsRequest { epoch, ..from(6) };
    let batches = follow(&pool.address, request, |b| b.next_seq == 6);
    assert!(batches[0].gap.unwrap().restarted);
    assert_ne!(batches[0].epoch, epoch);
    let stored = told(&batches);
    assert!(stored.len() == 5 && stored.iter().all(|e| e.1 == Kind::Stored));
    pool.nodes[0].kill();
    let lost = told(&follow(&pool.address, from(6), |b| b.next_seq == 11));
    assert!(
        lost.iter()
            .all(|e| (e.1, e.2) == (Kind::Removed, Reason::NodeLost))
    );
    assert_eq!(lost.len(), 5);
}

#[test]
fn eviction_is_told_with_its_reason() {
    let pool = Pool::start(1, "16MiB", &["--default-kv-lease-ttl", "10ms"]);
    let client = pool.client();
    let large = vec![7; 1 << 20];
    for n in 0..30 {
        put(&client, &format!("k{n}"), &large).unwrap();
    }
    let mut evicted = 0;
    follow(&pool.address, from(1), |b| {
        let reasons = b.events.iter().map(|e| e.reason());
        evicted += reasons.filter(|r| *r == Reason::Evicted).count();
        evicted >= 14
    });
}

/// Sends a request and reads lines until one contains `last`.
fn sse(address: &str, request: &str, last: &str) -> Vec<String> {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    write!(stream, "GET {request}\r\nHost: localhost\r\n").unwrap();
    stream.write_all(b"\r\n").unwrap();
    let mut lines = Vec::new();
    for line in BufReader::new(stream).lines() {
        let line = line.unwrap();
        let done = line.contains(last);
        lines.push(line);
        if done {
            return lines;
        }
    }
    panic!("no line with {last:?} in {lines:#?}");
}

#[test]
fn server_sent_events() {
    let pool = Pool::start(1, "32MiB", &[]);
    let client = pool.client();
    put_many(&client, "k", 2);
    client.remove(&[b"k0"], true).unwrap();
    let lines = sse(&pool.address, "/events?from=1 HTTP/1.1", "\"removed\"");
    assert!(lines[0].starts_with("HTTP/1.1 200"), "{lines:#?}");
    assert!(lines.iter().any(|l| l == "content-type: text/event-stream"));
    let ids: Vec<&String> = lines.iter().filter(|l| l.starts_with("id: ")).collect();
    assert!(ids.len() == 3 && ids[0].ends_with("-1"), "{lines:#?}");
    let data = lines.last().unwrap().strip_prefix("data: ").unwrap();
    let event: serde_json::Value = serde_json::from_str(data).unwrap();
    assert_eq!(event["event"], "removed");
    assert_eq!(event["reason"], "removed");
    assert!(event["version"].is_string(), "{event}");
    assert_eq!(event["key"], "k0");
    assert_eq!(event["tenant"], "default");
    // Where a browser left off.
    let again = format!("/events HTTP/1.1\r\nLast-Event-ID: {}", &ids[1][4..]);
    let lines = sse(&pool.address, &again, "\"removed\"");
    assert_eq!(lines.iter().filter(|l| l.starts_with("id: ")).count(), 1);
    let lines = sse(
        &pool.address,
        "/events?snapshot=true HTTP/1.1",
        "\"next_seq\":4",
    );
    let shown = lines.iter().filter(|l| *l == "event: snapshot").count();
    assert_eq!(shown, 1, "{lines:#?}");
    let off = Pool::start(0, "32MiB", &["--kv-events=false"]);
    let lines = sse(&off.address, "/events HTTP/1.1", "--kv-events");
    assert!(lines[0].starts_with("HTTP/1.1 404"));
}

#[test]
fn a_subscriber_that_does_not_read_finds_a_gap_and_holds_up_nobody() {
    let pool = Pool::start(1, "64MiB", &["--kv-events-queue-capacity", "1000"]);
    let mut stuck = std::net::TcpStream::connect(&pool.address).unwrap();
    stuck
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stuck
        .write_all(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .unwrap();
    let mut reader = BufReader::new(stuck);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(line.starts_with("HTTP/1.1 200"), "{line}");
    // More than sockets buffer, 1 KiB of key each.
    let client = pool.client();
    let filler = "k".repeat(1000);
    let begun = std::time::Instant::now();
    for n in 0..16_000 {
        put(&client, &format!("{filler}{n}"), b"v").unwrap();
    }
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(60), "{took:?}");
    let gap = reader
        .lines()
        .map(Result::unwrap)
        .find(|l| l == "event: gap");
    assert!(gap.is_some(), "a gap is told once it reads");
}
