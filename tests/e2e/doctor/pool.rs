//! Faults of a pool: nodes that are gone or hang, room, eviction, failed puts, replicas that are missing, releases that differ.

use std::time::Duration;

use mooncake::store::client::{PoolClient, PutOptions};

use super::faults::fault;
use super::{Fault, Lab, Said, doctor, strangers};
use crate::pool::{Pool, eventually, pattern};
use crate::{copies, put};

pub(super) fn all() -> Vec<Fault> {
    let area = "Pool";
    vec![
        fault!(
            area,
            "a master without any node",
            ("nodes", "fail", "no_nodes"),
            &[],
            |lab| {
                let pool = Pool::start(0, "16MiB", &[]);
                doctor(&["--master", &pool.address], &[], &lab.place())
            }
        ),
        fault!(
            area,
            "a node was killed",
            ("nodes", "fail", "node_lost"),
            &["refused", "node_suspect", "under_replicated"],
            killed_node
        ),
        fault!(
            area,
            "objects whose only replica is on a killed node",
            ("objects at risk", "warn", "under_replicated"),
            &["refused", "node_lost", "node_suspect"],
            killed_node
        ),
        fault!(
            area,
            "puts find no space: everything is leased",
            ("failed puts", "warn", "puts_failed"),
            &["pool_full"],
            |lab| {
                let pool = Pool::start(1, "16MiB", &["--default-kv-lease-ttl", "60s"]);
                let mut config = pool.config();
                config.timeout = Duration::from_millis(700);
                let client = mooncake::store::client::PoolClient::open(config).unwrap();
                for n in 0..12u64 {
                    let key = format!("k{n}");
                    put(&client, &key, &pattern(1 << 20, n)).unwrap();
                    assert!(client.exist(&[key.as_bytes()]).unwrap()[0]);
                }
                assert!(put(&client, "large", &pattern(8 << 20, 1)).is_err());
                doctor(&["--master", &pool.address], &[], &lab.place())
            }
        ),
        fault!(
            area,
            "the working set is many times the pool",
            ("eviction", "warn", "eviction_thrash"),
            &[],
            |lab| {
                let pool = Pool::start(1, "16MiB", &["--default-kv-lease-ttl", "1ms"]);
                let client = pool.client();
                for n in 0..120u64 {
                    put(&client, &format!("k{n}"), &pattern(1 << 20, n)).unwrap();
                }
                doctor(&["--master", &pool.address], &[], &lab.place())
            }
        ),
        fault!(
            area,
            "a client found a node unreachable",
            ("nodes", "warn", "node_suspect"),
            &["refused", "under_replicated"],
            |lab| {
                strangers::FakeMaster {
                    state: "suspect",
                    ..strangers::FakeMaster::default()
                }
                .examined(lab)
            }
        ),
        fault!(
            area,
            "a node's directory is still read",
            ("nodes", "warn", "node_rebuilding"),
            &["rebuilding"],
            |lab| {
                strangers::FakeMaster {
                    state: "rebuilding",
                    rebuilding: true,
                    ..strangers::FakeMaster::default()
                }
                .examined(lab)
            }
        ),
        fault!(
            area,
            "the master rebuilds its index",
            ("index", "warn", "rebuilding"),
            &[],
            |lab| {
                strangers::FakeMaster {
                    rebuilding: true,
                    ..strangers::FakeMaster::default()
                }
                .examined(lab)
            }
        ),
        fault!(
            area,
            "the pool is full beyond the watermark",
            ("room", "warn", "pool_full"),
            &[],
            |lab| {
                strangers::FakeMaster {
                    used: 99,
                    ..strangers::FakeMaster::default()
                }
                .examined(lab)
            }
        ),
        fault!(
            area,
            "free space in small pieces",
            ("fragmentation", "warn", "fragmented"),
            &[],
            |lab| {
                strangers::FakeMaster {
                    largest_free: 4096,
                    ..strangers::FakeMaster::default()
                }
                .examined(lab)
            }
        ),
        fault!(
            area,
            "a node of another release",
            ("version", "warn", "version_mix"),
            &[],
            |lab| {
                strangers::FakeMaster {
                    node_build: "0.0.9",
                    ..strangers::FakeMaster::default()
                }
                .examined(lab)
            }
        ),
        fault!(
            area,
            "a master of another release",
            ("version", "warn", "version_mix"),
            &[],
            |lab| {
                strangers::FakeMaster {
                    build: "0.0.9",
                    ..strangers::FakeMaster::default()
                }
                .examined(lab)
            }
        ),
        fault!(
            area,
            "a node of another host announces loopback",
            ("data addresses", "fail", "loopback_node"),
            &[],
            |lab| {
                strangers::FakeMaster {
                    host: "another-host",
                    ..strangers::FakeMaster::default()
                }
                .examined(lab)
            }
        ),
        fault!(
            area,
            "the master shakes hands and answers nothing",
            ("pool", "fail", "master_mute"),
            &[],
            |lab| {
                strangers::FakeMaster {
                    mute: true,
                    ..strangers::FakeMaster::default()
                }
                .examined(lab)
            }
        ),
        fault!(
            area,
            "the master's lanes work and its HTTP answers nothing",
            ("HTTP of the master", "fail", "http_unanswered"),
            &[],
            |lab| {
                strangers::FakeMaster {
                    http_mute: true,
                    ..strangers::FakeMaster::default()
                }
                .examined(lab)
            }
        ),
        fault!(
            area,
            "free space in small pieces, made by removing every second object",
            ("fragmentation", "warn", "fragmented"),
            &["puts_failed"],
            fragmented
        ),
        fault!(
            area,
            "a node was unmounted, and took replicas with it",
            ("objects at risk", "warn", "under_replicated"),
            &[],
            |lab| {
                let mut pool = Pool::start(2, "16MiB", &["--client-ttl", "4s"]);
                let client = pool.client();
                for n in 0..40u64 {
                    let key = format!("k{n}");
                    client
                        .put_bytes(key.as_bytes(), &pattern(1000, n), &copies(2))
                        .unwrap();
                }
                pool.nodes[0].kill();
                let limit = Duration::from_secs(30);
                eventually("the master unmounts it", limit, || {
                    client.segments().is_ok_and(|all| all.len() == 1)
                });
                let said = doctor(&["--master", &pool.address], &[], &lab.place())?;
                let text = said.to_string();
                assert!(
                    text.contains("of 40: 0 only on lost nodes, 40 with fewer"),
                    "{text}"
                );
                Ok(said)
            }
        ),
        fault!(
            area,
            "one object of many lost its second replica",
            ("objects at risk", "warn", "under_replicated"),
            &[],
            |lab| {
                // More than anybody would look through: the master counts.
                let mut pool = Pool::start(2, "32MiB", &["--client-ttl", "4s"]);
                let client = pool.client();
                client
                    .put_bytes(b"twice", &pattern(1000, 1), &copies(2))
                    .unwrap();
                pool.nodes[1].kill();
                let limit = Duration::from_secs(30);
                eventually("the master unmounts it", limit, || {
                    client.segments().is_ok_and(|all| all.len() == 1)
                });
                for n in 0..3000u64 {
                    put(&client, &format!("k{n}"), &pattern(100, n)).unwrap();
                }
                let said = doctor(&["--master", &pool.address], &[], &lab.place())?;
                let text = said.to_string();
                assert!(
                    text.contains("of 3001: 0 only on lost nodes, 1 with fewer"),
                    "{text}"
                );
                Ok(said)
            }
        ),
        fault!(
            area,
            "a node hangs: its process is stopped",
            ("node ", "fail", "silent"),
            &["node_lost", "node_suspect", "under_replicated"],
            |lab| {
                let pool = Pool::start(2, "16MiB", &[]);
                pool.nodes[0].signal("-STOP");
                let said = doctor(&["--master", &pool.address], &[], &lab.place());
                pool.nodes[0].signal("-CONT");
                said
            }
        ),
        fault!(
            area,
            "the master hangs: its process is stopped",
            ("master", "fail", "silent"),
            &[],
            |lab| {
                let pool = Pool::start(1, "16MiB", &[]);
                pool.master.signal("-STOP");
                let said = doctor(&["--master", &pool.address], &[], &lab.place());
                pool.master.signal("-CONT");
                said
            }
        ),
        fault!(
            area,
            "puts of objects larger than any segment",
            ("failed puts", "warn", "puts_too_large"),
            &[],
            |lab| {
                let pool = Pool::start(1, "16MiB", &[]);
                let client = pool.client();
                assert!(put(&client, "large", &pattern(20 << 20, 1)).is_err());
                doctor(&["--master", &pool.address], &[], &lab.place())
            }
        ),
        fault!(
            area,
            "everything in a full pool is pinned",
            ("room", "warn", "pool_pinned"),
            &["puts_failed"],
            |lab| {
                let (pool, _) = pinned();
                doctor(&["--master", &pool.address], &[], &lab.place())
            }
        ),
        fault!(
            area,
            "everything in a full pool is leased",
            ("room", "warn", "pool_leased"),
            &["puts_failed"],
            |lab| {
                let pool = Pool::start(
                    1,
                    "16MiB",
                    &["--default-kv-lease-ttl", "60s", "--put-wait", "100ms"],
                );
                let client = hasty(&pool);
                let mut n = 0;
                while put(&client, &format!("k{n}"), &pattern(100 << 10, n)).is_ok() {
                    assert!(client.exist(&[format!("k{n}").as_bytes()]).unwrap()[0]);
                    n += 1;
                }
                doctor(&["--master", &pool.address], &[], &lab.place())
            }
        ),
        fault!(
            area,
            "every node is being emptied",
            ("nodes", "fail", "all_draining"),
            &[],
            |lab| {
                strangers::FakeMaster {
                    state: "draining",
                    ..strangers::FakeMaster::default()
                }
                .examined(lab)
            }
        ),
        fault!(
            area,
            "the master answers late",
            ("latency", "warn", "master_far"),
            &[],
            |lab| {
                strangers::FakeMaster {
                    late: Duration::from_millis(12),
                    ..strangers::FakeMaster::default()
                }
                .examined(lab)
            }
        ),
    ]
}

/// A client that gives up soon.
fn hasty(pool: &Pool) -> PoolClient {
    let mut config = pool.config();
    config.timeout = Duration::from_millis(300);
    PoolClient::open(config).unwrap()
}

/// A pool filled with pinned objects until nothing fits, and how many there are.
fn pinned() -> (Pool, u64) {
    let pool = Pool::start(1, "16MiB", &[]);
    let client = hasty(&pool);
    let options = PutOptions {
        hard_pin: true,
        ..PutOptions::default()
    };
    let mut n = 0;
    while client
        .put_bytes(format!("k{n}").as_bytes(), &pattern(100 << 10, n), &options)
        .is_ok()
    {
        n += 1;
    }
    (pool, n)
}

fn fragmented(lab: &Lab) -> Said {
    let (pool, count) = pinned();
    let client = pool.client();
    for n in (0..count).step_by(2) {
        client.remove(&[format!("k{n}").as_bytes()], true).unwrap();
    }
    doctor(&["--master", &pool.address], &[], &lab.place())
}

fn killed_node(lab: &Lab) -> Said {
    let mut pool = Pool::start(2, "16MiB", &["--client-ttl", "60s"]);
    let client = pool.client();
    for n in 0..40u64 {
        client
            .put_bytes(format!("k{n}").as_bytes(), &pattern(1000, n), &copies(1))
            .unwrap();
    }
    pool.nodes[0].kill();
    eventually("the master misses it", Duration::from_secs(10), || {
        client
            .segments()
            .is_ok_and(|all| all.iter().any(|s| s.state == "lost"))
    });
    doctor(&["--master", &pool.address], &[], &lab.place())
}
