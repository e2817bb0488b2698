//! What goes in comes out: paths, batches, concurrent writers, attributes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use mooncake::engine::batch::LocalSlice;
use mooncake::engine::transport::TransportKind;
use mooncake::store::client::{GetRequest, PoolClient, PutOptions, PutOutcome, PutRequest};
use mooncake::store::model::error::StoreError;

use crate::pool::{Blob, Pool, Server, pattern};
use crate::{copies, put};

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
fn ipv6_end_to_end() {
    let pool = Pool::start_on("::1", 1, "32MiB", &[], &[]);
    assert!(pool.address.starts_with("[::1]:"), "{}", pool.address);
    let client = pool.client_over(TransportKind::Tcp);
    put(&client, "six", &pattern(100_000, 6)).unwrap();
    assert_eq!(client.get(b"six").map(Blob), Ok(Blob(pattern(100_000, 6))));
}
