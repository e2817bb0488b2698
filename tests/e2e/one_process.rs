//! A master with memory of its own: one process, and puts over a network that need one exchange.

use mooncake::engine::transport::TransportKind;
use mooncake::store::client::{PoolClient, PutOptions, PutOutcome};

use crate::http::request;
use crate::pool::{Blob, Pool, pattern};
use crate::put;
use crate::quotas;

const STORED: PutOutcome = PutOutcome::Stored { replicas: 1 };

fn pool(arguments: &[&str]) -> Pool {
    let mut all = vec!["--memory", "64MiB"];
    all.extend_from_slice(arguments);
    Pool::start(0, "", &all)
}

/// Batches of operations that the master has carried out.
fn batches(pool: &Pool) -> u64 {
    let (_, text) = request(&pool.address, "GET", "/metrics");
    let count = text
        .lines()
        .find_map(|l| l.strip_prefix("mooncake_master_batch_seconds_count "));
    count.unwrap().parse().unwrap()
}

#[test]
fn a_small_put_by_tcp_is_one_exchange() {
    let pool = pool(&[]);
    let client = pool.client_over(TransportKind::Tcp);
    assert_eq!(put(&client, "first", b"opens an arena"), Ok(STORED));
    let before = batches(&pool);
    for n in 0..200_u64 {
        let value = pattern(4096, n);
        assert_eq!(put(&client, &format!("k{n}"), &value), Ok(STORED));
    }
    // Arenas were opened; the puts themselves went to the node alone.
    let more = batches(&pool) - before;
    assert!(more < 20, "{more} batches at the master for 200 puts");
    let other = pool.client();
    for n in 0..200_u64 {
        let got = other.get(format!("k{n}").as_bytes()).unwrap();
        assert_eq!(Blob(got), Blob(pattern(4096, n)));
    }
    // Taken: nothing is stored, nothing is lost, and the next put is as good as before.
    assert_eq!(put(&client, "k7", b"other"), Ok(PutOutcome::Existed));
    assert_eq!(put(&client, "k7", b"other"), Ok(PutOutcome::Existed));
    assert_eq!(Blob(other.get(b"k7").unwrap()), Blob(pattern(4096, 7)));
    assert_eq!(put(&client, "k200", b"new"), Ok(STORED));
    assert_eq!(other.get(b"k200").unwrap(), b"new");
}

#[test]
fn a_refused_commit_says_why_and_leaves_nothing() {
    let pool = pool(&[]);
    quotas::set(&pool, "c", 64 << 10);
    let client = quotas::tenant(&pool, "c", &[TransportKind::Tcp]);
    let pinned = PutOptions {
        hard_pin: true,
        ..PutOptions::default()
    };
    let put = |n: u64| client.put_bytes(format!("q{n}").as_bytes(), &pattern(4096, n), &pinned);
    let stored = (0..64).take_while(|n| put(*n).is_ok()).count() as u64;
    assert!((12..=16).contains(&stored), "{stored} of 4 KiB in 64 KiB");
    let refused = put(stored).unwrap_err();
    assert_eq!(refused.code(), -1700, "{refused}");
    for n in 0..64 {
        let got = client.get(format!("q{n}").as_bytes()).map(Blob);
        assert_eq!(got.is_ok(), n < stored, "q{n}");
        assert!(got.is_err() || got == Ok(Blob(pattern(4096, n))));
    }
    // With room again the same arena serves.
    assert!(client.remove(&[b"q0"], true).unwrap()[0].is_ok());
    assert_eq!(put(stored), Ok(STORED));
}

#[test]
fn many_writers_of_the_same_keys_agree() {
    let pool = pool(&[]);
    let clients: Vec<PoolClient> = (0..4)
        .map(|_| pool.client_over(TransportKind::Tcp))
        .collect();
    let won: Vec<Vec<bool>> = std::thread::scope(|s| {
        let writers: Vec<_> = clients
            .iter()
            .enumerate()
            .map(|(writer, client)| {
                s.spawn(move || {
                    (0..300_u64)
                        .map(|n| {
                            let value = pattern(2000, n * 10 + writer as u64);
                            put(client, &format!("r{n}"), &value).unwrap() == STORED
                        })
                        .collect()
                })
            })
            .collect();
        writers.into_iter().map(|w| w.join().unwrap()).collect()
    });
    let reader = pool.client_over(TransportKind::Tcp);
    for n in 0..300_u64 {
        let winners: Vec<u64> = (0..4).filter(|w| won[*w as usize][n as usize]).collect();
        assert_eq!(winners.len(), 1, "r{n}: {winners:?}");
        let got = reader.get(format!("r{n}").as_bytes()).unwrap();
        assert_eq!(Blob(got), Blob(pattern(2000, n * 10 + winners[0])));
    }
    assert!(crate::pool::stdout(&pool.call(&["inspect"])).contains("objects    300"));
}
