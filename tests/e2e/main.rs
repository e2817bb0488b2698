//! The pool as real processes: one master, three nodes, clients over tcp and shared memory, and `kill -9` of each part.
//! The names in the tests are those of docs/invariants.md.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

mod pool;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mooncake::engine::batch::LocalSlice;
use mooncake::engine::transport::TransportKind;
use mooncake::store::client::{GetRequest, PoolClient, PutOptions, PutOutcome, PutRequest};
use mooncake::store::model::error::StoreError;
use pool::{Blob, Pool, Server, call, eventually, pattern, stderr, stdout};

fn put(client: &PoolClient, key: &str, bytes: &[u8]) -> Result<PutOutcome, StoreError> {
    client.put_bytes(key.as_bytes(), bytes, &PutOptions::default())
}

fn copies(replicas: u32) -> PutOptions {
    PutOptions {
        replicas,
        ..PutOptions::default()
    }
}

#[test]
fn round_trips_over_tcp_and_shared_memory() {
    let pool = Pool::start(3, "64MiB", &[]);
    for kind in [TransportKind::Tcp, TransportKind::Shm] {
        let client = pool.client_over(kind);
        let other = pool.client();
        for (n, size) in [1usize, 63, 64, 4096, 65_536, 1 << 20, 9_000_001]
            .into_iter()
            .enumerate()
        {
            let key = format!("{}-{size}", kind.name());
            let bytes = pattern(size, n as u64);
            let options = copies(1 + n as u32 % 3);
            let outcome = client.put_bytes(key.as_bytes(), &bytes, &options).unwrap();
            assert_eq!(
                outcome,
                PutOutcome::Stored {
                    replicas: options.replicas
                }
            );
            assert_eq!(
                client.get(key.as_bytes()).map(Blob),
                Ok(Blob(bytes.clone()))
            );
            assert_eq!(other.get(key.as_bytes()).map(Blob), Ok(Blob(bytes.clone())));
            assert_eq!(put(&other, &key, b"other").unwrap(), PutOutcome::Existed);
            assert_eq!(
                other.get(key.as_bytes()).map(Blob),
                Ok(Blob(bytes.clone())),
                "a put of an existing key writes nothing"
            );
        }
        let borrowed = pool
            .client()
            .borrow(format!("{}-65536", kind.name()).as_bytes())
            .unwrap();
        assert_eq!(borrowed.len(), 65_536);
        // SAFETY: mapped as long as `borrowed` lives; nobody removes it meanwhile.
        let seen = unsafe { std::slice::from_raw_parts(borrowed.as_ptr(), 65_536) };
        assert!(seen == pattern(65_536, 4));
        assert!(borrowed.is_valid());
    }
    assert_eq!(pool.client().get(b"absent"), Err(StoreError::NotFound));
}

#[test]
fn batches_with_mixed_outcomes() {
    let pool = Pool::start(2, "64MiB", &[]);
    let client = pool.client();
    let values: Vec<Vec<u8>> = (0..64).map(|n| pattern(2000 + n * 37, n as u64)).collect();
    put(&client, "k3", b"taken").unwrap();
    let keys: Vec<String> = (0..64).map(|n| format!("k{n}")).collect();
    let slices: Vec<[LocalSlice; 1]> = values
        .iter()
        // SAFETY: read only, alive until the put returned.
        .map(|v| [unsafe { LocalSlice::new(v.as_ptr().cast_mut(), v.len()) }])
        .collect();
    let mut requests: Vec<PutRequest<'_>> = keys
        .iter()
        .zip(&slices)
        .map(|(k, s)| PutRequest::new(k.as_bytes(), s))
        .collect();
    requests[5].key = b"";
    let outcomes = client.put(&requests, &PutOptions::default());
    for (n, outcome) in outcomes.iter().enumerate() {
        match n {
            3 => assert_eq!(outcome, &Ok(PutOutcome::Existed)),
            5 => assert!(matches!(outcome, Err(StoreError::InvalidKey { .. }))),
            _ => assert_eq!(outcome, &Ok(PutOutcome::Stored { replicas: 1 }), "{n}"),
        }
    }
    let mut buffers: Vec<Vec<u8>> = values.iter().map(|v| vec![0; v.len()]).collect();
    buffers[7].truncate(10);
    let targets: Vec<[LocalSlice; 1]> = buffers
        .iter_mut()
        // SAFETY: alive and untouched until the get returned.
        .map(|b| [unsafe { LocalSlice::new(b.as_mut_ptr(), b.len()) }])
        .collect();
    let requests: Vec<GetRequest<'_>> = keys
        .iter()
        .zip(&targets)
        .map(|(k, t)| GetRequest {
            key: k.as_bytes(),
            target: t,
        })
        .collect();
    let results = client.get_into(&requests);
    for (n, result) in results.into_iter().enumerate() {
        match n {
            3 => assert_eq!(result, Ok(5)),
            5 => assert_eq!(result, Err(StoreError::NotFound)),
            7 => assert!(matches!(result, Err(StoreError::BufferTooSmall { .. }))),
            _ => {
                assert_eq!(result, Ok(values[n].len() as u64), "{n}");
                assert!(buffers[n] == values[n]);
            }
        }
    }
}

#[test]
fn d1_d2_a_killed_master_loses_nothing_and_brings_nothing_back() {
    let mut pool = Pool::start(3, "64MiB", &[]);
    let client = pool.client();
    for n in 0..300u64 {
        let options = PutOptions {
            replicas: 1 + n as u32 % 2,
            hard_pin: n == 5,
            group: if n % 7 == 0 {
                "g".into()
            } else {
                String::new()
            },
            ..PutOptions::default()
        };
        client
            .put_bytes(format!("k{n}").as_bytes(), &pattern(3000, n), &options)
            .unwrap();
    }
    let gone: Vec<String> = (0..300).step_by(3).map(|n| format!("k{n}")).collect();
    let keys: Vec<&[u8]> = gone.iter().map(String::as_bytes).collect();
    assert!(
        client
            .remove(&keys, true)
            .unwrap()
            .iter()
            .all(Result::is_ok)
    );
    for round in 0..3 {
        pool.restart_master();
        // No hand: the same client, and a new one.
        for client in [&client, &pool.client()] {
            for n in 0..300u64 {
                let got = client.get(format!("k{n}").as_bytes()).map(Blob);
                if n % 3 == 0 {
                    assert_eq!(got, Err(StoreError::NotFound), "D2, round {round}, k{n}");
                } else {
                    assert_eq!(got, Ok(Blob(pattern(3000, n))), "D1, round {round}, k{n}");
                }
            }
        }
    }
    let five = client.stat(b"k5").unwrap();
    assert!(five.hard_pin, "attributes come back too");
    assert_eq!(client.stat(b"k7").unwrap().group, "g");
}

#[test]
fn d1_master_killed_under_load() {
    let rounds = std::env::var("MOONCAKE_TEST_ROUNDS")
        .ok()
        .and_then(|r| r.parse().ok())
        .unwrap_or(4u32);
    let mut pool = Pool::start(3, "256MiB", &[]);
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..3u64)
        .map(|w| {
            let (client, stop) = (pool.client(), stop.clone());
            std::thread::spawn(move || {
                let mut acknowledged = Vec::new();
                let mut n = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    let key = format!("w{w}-{n}");
                    let size = if n.is_multiple_of(10) { 100_000 } else { 700 };
                    let options = copies(1 + u32::from(n.is_multiple_of(5)));
                    if client
                        .put_bytes(key.as_bytes(), &pattern(size, w << 40 | n), &options)
                        .is_ok()
                    {
                        acknowledged.push((key, size, w << 40 | n));
                    }
                    n += 1;
                    if n.is_multiple_of(64) {
                        std::thread::sleep(Duration::from_millis(2));
                    }
                    // Well below the capacity: nothing is evicted, so everything must be found.
                    if n > 12_000 {
                        std::thread::sleep(Duration::from_millis(20));
                    }
                }
                acknowledged
            })
        })
        .collect();
    for _ in 0..rounds {
        std::thread::sleep(Duration::from_millis(400));
        pool.restart_master();
    }
    std::thread::sleep(Duration::from_millis(300));
    stop.store(true, Ordering::Relaxed);
    let reader = pool.client();
    let mut total = 0;
    for writer in writers {
        for (key, size, seed) in writer.join().unwrap() {
            assert_eq!(
                reader.get(key.as_bytes()).map(Blob),
                Ok(Blob(pattern(size, seed))),
                "D1: {key}"
            );
            total += 1;
        }
    }
    assert_eq!(reader.overview().unwrap().evicted_objects, 0);
    assert!(total > 300, "the load was a load: {total}");
    println!("{total} acknowledged puts over {rounds} kills of the master, all found");
}

#[test]
fn f1_a_killed_node_costs_no_wait_and_is_unmounted() {
    let mut pool = Pool::start(3, "64MiB", &["--client-ttl", "2s"]);
    let client = pool.client_over(TransportKind::Tcp);
    for n in 0..60u64 {
        client
            .put_bytes(format!("k{n}").as_bytes(), &pattern(5000, n), &copies(2))
            .unwrap();
        client
            .put_bytes(
                format!("s{n}").as_bytes(),
                &pattern(500, n),
                &PutOptions::default(),
            )
            .unwrap();
    }
    pool.nodes[0].kill();
    let start = Instant::now();
    for n in 0..60u64 {
        assert_eq!(
            client.get(format!("k{n}").as_bytes()).map(Blob),
            Ok(Blob(pattern(5000, n)))
        );
    }
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "failover without waiting: {:?}",
        start.elapsed()
    );
    // New puts do not fail either.
    for n in 0..30u64 {
        put(&client, &format!("n{n}"), &pattern(900, n)).unwrap();
        assert_eq!(
            client.get(format!("n{n}").as_bytes()).map(Blob),
            Ok(Blob(pattern(900, n)))
        );
    }
    let mut lost = 0;
    for n in 0..60u64 {
        match client.get(format!("s{n}").as_bytes()) {
            Ok(bytes) => assert_eq!(Blob(bytes), Blob(pattern(500, n))),
            Err(StoreError::NotFound | StoreError::TransferFailed { .. }) => lost += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert!(
        (1..60).contains(&lost),
        "single copies of that node are gone, the others are not: {lost}"
    );
    eventually("unmounted after client-ttl", Duration::from_secs(6), || {
        client.segments().unwrap().len() == 2
    });
    pool.add_node("64MiB");
    assert_eq!(client.segments().unwrap().len(), 3);
}

#[test]
fn a_stopped_node_comes_back_with_what_it_has() {
    let pool = Pool::start(2, "64MiB", &["--client-ttl", "1s"]);
    let client = pool.client_over(TransportKind::Tcp);
    for n in 0..40u64 {
        put(&client, &format!("k{n}"), &pattern(800, n)).unwrap();
    }
    pool.nodes[0].signal("-STOP");
    eventually("unmounted", Duration::from_secs(8), || {
        client.segments().unwrap().len() == 1
    });
    pool.nodes[0].signal("-CONT");
    eventually("mounted again", Duration::from_secs(8), || {
        client
            .segments()
            .unwrap()
            .iter()
            .filter(|s| s.state == "ok")
            .count()
            == 2
    });
    for n in 0..40u64 {
        assert_eq!(
            client.get(format!("k{n}").as_bytes()).map(Blob),
            Ok(Blob(pattern(800, n))),
            "k{n}"
        );
    }
}

#[test]
fn r2_a_killed_writer_leaves_nothing_readable_and_its_space_returns() {
    let pool = Pool::start(1, "256MiB", &[]);
    let client = pool.client();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("big");
    std::fs::write(&file, pattern(150 << 20, 1)).unwrap();
    let file = file.to_str().unwrap();
    for transport in ["tcp", "shm"] {
        let arguments = [
            "put",
            "big",
            file,
            "--master",
            &pool.address,
            "--transport",
            transport,
        ];
        let mut writer = Server::start(&arguments);
        eventually("the put began", Duration::from_secs(10), || {
            client.overview().unwrap().used_bytes > 100 << 20
        });
        writer.kill();
        if client.exist(&[b"big"]).unwrap()[0] {
            // It was done before the kill: then it must be whole.
            assert_eq!(
                client.get(b"big").map(Blob),
                Ok(Blob(pattern(150 << 20, 1)))
            );
            assert!(client.remove(&[b"big"], true).unwrap()[0].is_ok());
        } else {
            assert_eq!(client.get(b"big"), Err(StoreError::NotFound));
        }
        // Long before any timeout of 30 or 600 s.
        eventually("its space is free again", Duration::from_secs(10), || {
            client.overview().unwrap().used_bytes < 1 << 20
        });
    }
    // And the key is free for others at once.
    assert_eq!(
        put(&client, "big", b"small").unwrap(),
        PutOutcome::Stored { replicas: 1 }
    );
}

#[test]
fn q1_a_full_pool_takes_every_put_and_keeps_what_is_pinned() {
    let pool = Pool::start(2, "32MiB", &["--default-kv-lease-ttl", "100ms"]);
    let client = pool.client();
    let pinned = PutOptions {
        hard_pin: true,
        ..PutOptions::default()
    };
    let soft = PutOptions {
        soft_pin_ttl_ms: 600_000,
        ..PutOptions::default()
    };
    for n in 0..4u64 {
        client
            .put_bytes(format!("pin{n}").as_bytes(), &pattern(500_000, n), &pinned)
            .unwrap();
        client
            .put_bytes(format!("soft{n}").as_bytes(), &pattern(100_000, n), &soft)
            .unwrap();
    }
    for n in 0..600u64 {
        put(&client, &format!("k{n}"), &pattern(300_000 + n as usize, n)).unwrap();
    }
    let overview = client.overview().unwrap();
    assert!(overview.evicted_objects > 300, "{overview:?}");
    for n in 0..4u64 {
        assert_eq!(
            client.get(format!("pin{n}").as_bytes()).map(Blob),
            Ok(Blob(pattern(500_000, n))),
            "L1"
        );
        assert_eq!(
            client.get(format!("soft{n}").as_bytes()).map(Blob),
            Ok(Blob(pattern(100_000, n))),
            "soft pins go last"
        );
    }
    // What is still there is right.
    let mut left = 0;
    for n in 0..600u64 {
        if let Ok(bytes) = client.get(format!("k{n}").as_bytes()) {
            assert_eq!(Blob(bytes), Blob(pattern(300_000 + n as usize, n)));
            left += 1;
        }
    }
    assert!(left > 50, "{left}");
}

#[test]
fn l1_leased_objects_stay_and_a_put_without_space_ends_in_bounded_time() {
    let pool = Pool::start(1, "16MiB", &["--default-kv-lease-ttl", "60s"]);
    let mut config = pool.config();
    config.timeout = Duration::from_millis(700);
    let client = PoolClient::open(config).unwrap();
    let mut held = Vec::new();
    for n in 0..12u64 {
        let key = format!("k{n}");
        put(&client, &key, &pattern(1 << 20, n)).unwrap();
        assert!(client.exist(&[key.as_bytes()]).unwrap()[0]);
        held.push(key);
    }
    let start = Instant::now();
    let outcome = put(&client, "large", &pattern(8 << 20, 1));
    assert!(
        matches!(outcome, Err(StoreError::NoSpace { .. })),
        "{outcome:?}"
    );
    assert!(
        start.elapsed() < Duration::from_secs(3),
        "{:?}",
        start.elapsed()
    );
    for (n, key) in held.iter().enumerate() {
        assert_eq!(
            client.get(key.as_bytes()).map(Blob),
            Ok(Blob(pattern(1 << 20, n as u64)))
        );
    }
    let outcome = put(&client, "larger", &pattern(20 << 20, 1));
    assert!(
        matches!(outcome, Err(StoreError::TooLarge { .. })),
        "{outcome:?}"
    );
}

#[test]
fn r1_concurrent_writers_and_readers_of_one_key() {
    let pool = Pool::start(2, "128MiB", &[]);
    let stop = Arc::new(AtomicBool::new(false));
    let reads = Arc::new(AtomicU64::new(0));
    const SIZE: usize = 20_000;
    // Each value is one byte repeated: any mix is visible.
    let writers: Vec<_> = (1..4u8)
        .map(|w| {
            let kind = if w % 2 == 0 {
                TransportKind::Tcp
            } else {
                TransportKind::Shm
            };
            let (client, stop) = (pool.client_over(kind), stop.clone());
            std::thread::spawn(move || {
                let mut value = w;
                while !stop.load(Ordering::Relaxed) {
                    value = value.wrapping_add(3);
                    let upsert = PutOptions {
                        upsert: value % 2 == 0,
                        ..PutOptions::default()
                    };
                    client
                        .put_bytes(b"contended", &vec![value; SIZE], &upsert)
                        .unwrap();
                    if value % 16 == 0 {
                        let _ = client.remove(&[b"contended"], true).unwrap();
                    }
                }
            })
        })
        .collect();
    let readers: Vec<_> = [TransportKind::Tcp, TransportKind::Shm]
        .into_iter()
        .map(|kind| {
            let (client, stop, reads) = (pool.client_over(kind), stop.clone(), reads.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    match client.get(b"contended") {
                        Ok(bytes) => {
                            assert_eq!(bytes.len(), SIZE);
                            assert!(
                                bytes.iter().all(|b| *b == bytes[0]),
                                "R1: a mix of two puts"
                            );
                            reads.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(StoreError::NotFound) => {}
                        Err(other) => panic!("{other}"),
                    }
                }
            })
        })
        .collect();
    std::thread::sleep(Duration::from_secs(3));
    stop.store(true, Ordering::Relaxed);
    for thread in writers.into_iter().chain(readers) {
        thread.join().unwrap();
    }
    assert!(reads.load(Ordering::Relaxed) > 50, "{reads:?}");
}

#[test]
fn r1_readers_during_eviction_see_their_object_or_none() {
    let pool = Pool::start(1, "24MiB", &["--default-kv-lease-ttl", "1ms"]);
    let stop = Arc::new(AtomicBool::new(false));
    let newest = Arc::new(AtomicU64::new(0));
    let good = Arc::new(AtomicU64::new(0));
    let readers: Vec<_> = [TransportKind::Tcp, TransportKind::Shm]
        .into_iter()
        .map(|kind| {
            let (client, stop) = (pool.client_over(kind), stop.clone());
            let (newest, good) = (newest.clone(), good.clone());
            std::thread::spawn(move || {
                let mut step = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    step += 1;
                    // Around the edge where eviction is at work.
                    let n = newest.load(Ordering::Relaxed).saturating_sub(step % 400);
                    match client.get(format!("e{n}").as_bytes()) {
                        Ok(bytes) => {
                            assert_eq!(Blob(bytes), Blob(pattern(60_000, n)), "R1: e{n}");
                            good.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(StoreError::NotFound) => {}
                        Err(other) => panic!("{other}"),
                    }
                }
            })
        })
        .collect();
    let client = pool.client();
    let end = Instant::now() + Duration::from_secs(4);
    let mut n = 0u64;
    while Instant::now() < end {
        put(&client, &format!("e{n}"), &pattern(60_000, n)).unwrap();
        newest.store(n, Ordering::Relaxed);
        n += 1;
    }
    stop.store(true, Ordering::Relaxed);
    for reader in readers {
        reader.join().unwrap();
    }
    assert!(client.overview().unwrap().evicted_objects > 100);
    assert!(good.load(Ordering::Relaxed) > 100, "{good:?}");
}

#[test]
fn groups_tenants_upsert_preferred_segment() {
    let pool = Pool::start_on("127.0.0.1", 1, "32MiB", &[], &["--name", "left"]);
    let right = Server::start(&[
        "node",
        "--master",
        &pool.address,
        "--memory",
        "32MiB",
        "--name",
        "right",
    ]);
    right.line("in service");
    let client = pool.client();
    for n in 0..10 {
        let options = PutOptions {
            preferred_segments: vec!["right".into()],
            ..PutOptions::default()
        };
        client
            .put_bytes(format!("p{n}").as_bytes(), b"x", &options)
            .unwrap();
        assert_eq!(
            client.stat(format!("p{n}").as_bytes()).unwrap().replicas[0].segment_name,
            "right"
        );
    }
    let mut config = pool.config();
    config.tenant = "other".into();
    let other = PoolClient::open(config).unwrap();
    put(&other, "p1", b"theirs").unwrap();
    assert_eq!(client.get(b"p1").unwrap(), b"x");
    assert_eq!(other.get(b"p1").unwrap(), b"theirs");
    assert_eq!(other.list("", "", 0, 100).unwrap().objects.len(), 1);
    assert_eq!(other.remove_matching("", true).unwrap(), (1, 0));
    assert_eq!(client.get(b"p1").unwrap(), b"x");

    let upsert = PutOptions {
        upsert: true,
        ..PutOptions::default()
    };
    client
        .put_bytes(b"p1", &pattern(50_000, 3), &upsert)
        .unwrap();
    assert_eq!(client.get(b"p1").map(Blob), Ok(Blob(pattern(50_000, 3))));
    assert_eq!(client.list("p", "", 0, 100).unwrap().objects.len(), 10);
    assert_eq!(
        client.list("", "^p[0-4]$", 0, 100).unwrap().objects.len(),
        5
    );
    assert!(client.list("", "(", 0, 100).is_err());
    assert_eq!(client.remove_matching("^p[0-4]$", true).unwrap().0, 5);
}

#[test]
fn a_node_leaves_cleanly_on_sigterm() {
    let mut pool = Pool::start(2, "32MiB", &[]);
    let client = pool.client();
    for n in 0..50u64 {
        client
            .put_bytes(format!("k{n}").as_bytes(), &pattern(1000, n), &copies(2))
            .unwrap();
    }
    pool.nodes[0].signal("-TERM");
    let start = Instant::now();
    assert_eq!(pool.nodes[0].wait(), 0);
    assert!(start.elapsed() < Duration::from_secs(8));
    assert_eq!(client.segments().unwrap().len(), 1);
    for n in 0..50u64 {
        assert_eq!(
            client.get(format!("k{n}").as_bytes()).map(Blob),
            Ok(Blob(pattern(1000, n)))
        );
    }
}

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
            "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}\r\n"
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
    assert_eq!(
        stdout(&with_token(&["inspect", "segments"]))
            .lines()
            .count(),
        2
    );
}

#[test]
fn ipv6_end_to_end() {
    let pool = Pool::start_on("::1", 1, "32MiB", &[], &[]);
    assert!(pool.address.starts_with("[::1]:"), "{}", pool.address);
    let client = pool.client_over(TransportKind::Tcp);
    put(&client, "six", &pattern(100_000, 6)).unwrap();
    assert_eq!(client.get(b"six").map(Blob), Ok(Blob(pattern(100_000, 6))));
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

/// A few milliseconds per cell: that the measurements run, compare and print; the figures are nobody's.
#[test]
fn bench_runs_beside_redis() {
    let arguments = [
        "bench",
        "store",
        "--sizes",
        "4KiB,1MiB",
        "--batches",
        "1,8",
        "--rounds",
        "1",
        "--time",
        "10ms",
        "--memory",
        "512MiB",
        "--vs",
        "redis",
        "--output",
        "json",
    ];
    let out = call(&arguments);
    assert!(
        out.status.success(),
        "{} (redis-server installed?)",
        stderr(&out)
    );
    let text = stdout(&out);
    for word in [
        "\"redis\"",
        "\"memcpy\"",
        "\"tcp stream\"",
        "\"echo\"",
        "same-host",
        "local",
    ] {
        assert!(text.contains(word), "{word}");
    }
    let out = call(&["bench", "master", "--objects", "2000", "--rounds", "1"]);
    assert!(out.status.success(), "{}", stderr(&out));
    assert!(stdout(&out).contains(" 0 failed"), "{}", stdout(&out));
}
