//! Full pools: eviction, pins, leases.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mooncake::engine::transport::TransportKind;
use mooncake::store::client::{PoolClient, PutOptions};
use mooncake::store::model::error::StoreError;

use crate::pool::{Blob, Pool, pattern};
use crate::put;

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
