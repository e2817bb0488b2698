//! Processes that die, stop, leave and come back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mooncake::engine::transport::TransportKind;
use mooncake::store::client::{PutOptions, PutOutcome};
use mooncake::store::model::error::StoreError;

use crate::pool::{Blob, Pool, Server, eventually, pattern};
use crate::{copies, put};

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
            // Two through shared memory, one over TCP.
            let client = if w == 2 {
                pool.client_over(TransportKind::Tcp)
            } else {
                pool.client()
            };
            let stop = stop.clone();
            std::thread::spawn(move || {
                let mut acknowledged = Vec::new();
                let mut n = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    let key = format!("w{w}-{n}");
                    let size = match n {
                        n if n % 200 == 7 => 600_000,
                        n if n.is_multiple_of(10) => 100_000,
                        _ => 700,
                    };
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

/// A client that lives on through a restart of the master: what it had acknowledged stays, and the arena it had open is kept
/// whole until it has left it, then given back.
#[test]
fn an_arena_of_an_earlier_master_is_kept_and_then_given_back() {
    let mut pool = Pool::start(1, "256MiB", &[]);
    let client = pool.client();
    let put =
        |key: &str, seed| client.put_bytes(key.as_bytes(), &pattern(300_000, seed), &copies(1));
    put("before", 1).unwrap();
    let arenas = || pool.client().overview().unwrap().arenas;
    assert_eq!(arenas(), 1);
    pool.restart_master();
    let end = Instant::now() + Duration::from_secs(10);
    let found = || pool.client().get(b"before").map(Blob);
    while found() != Ok(Blob(pattern(300_000, 1))) {
        assert!(Instant::now() < end, "D1");
        std::thread::sleep(Duration::from_millis(50));
    }
    let arenas = || pool.client().overview().unwrap().arenas;
    assert_eq!(arenas(), 1, "its writer has not left it");
    put("after", 2).unwrap();
    // The next put of this client leaves the old one and may open a new one.
    put("after that", 3).unwrap();
    while arenas() > 1 {
        assert!(
            Instant::now() < end + Duration::from_secs(10),
            "it is given back"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    for (key, seed) in [("before", 1), ("after", 2), ("after that", 3)] {
        assert_eq!(
            client.get(key.as_bytes()).map(Blob),
            Ok(Blob(pattern(300_000, seed)))
        );
    }
    client.remove_matching("", true).unwrap();
    drop(client);
    let used = || pool.client().overview().unwrap().used_bytes;
    while used() > 0 {
        assert!(Instant::now() < end + Duration::from_secs(20), "all of it");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn two_nodes_do_not_share_a_name() {
    let mut pool = Pool::start_on("127.0.0.1", 1, "32MiB", &[], &["--name", "one"]);
    let arguments = [
        "node",
        "--master",
        &pool.address,
        "--memory",
        "32MiB",
        "--name",
        "one",
    ];
    let mut second = std::process::Command::new(crate::pool::BINARY)
        .args(arguments)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(pool.client().segments().unwrap().len(), 1, "refused");
    // Started anew it may come back under its name, from another port: the first has lost its session.
    pool.nodes[0].kill();
    eventually(
        "the other one takes its place",
        Duration::from_secs(15),
        || {
            let all = pool.client().segments().unwrap();
            all.iter().any(|s| s.state == "ok" && s.name == "one")
        },
    );
    let _ = second.kill();
    let mut said = String::new();
    std::io::Read::read_to_string(&mut second.stderr.take().unwrap(), &mut said).unwrap();
    let _ = second.wait();
    assert!(
        said.contains("a node called one is in service at"),
        "{said}"
    );
    assert!(said.contains("--name"), "{said}");
}
