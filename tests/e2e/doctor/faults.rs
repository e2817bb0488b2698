//! Faults of the configuration, of names, of this host's limits, and of a real pool.

use std::time::Duration;

use super::{Fault, Lab, Said, doctor, strangers};
use crate::pool::{Pool, eventually, pattern};
use crate::{copies, put};

macro_rules! fault {
    ($area:expr, $what:expr, $expect:expr, $also:expr, $make:expr) => {
        Fault {
            area: $area,
            what: $what,
            expect: $expect,
            also: $also,
            make: $make,
        }
    };
}
pub(super) use fault;

const FILE: &str = r#""local_hostname":"localhost","metadata_server":"P2PHANDSHAKE","master_server_address":"MASTER""#;

fn with(lab: &Lab, more: &str) -> Said {
    lab.with_file(&format!("{{{FILE},{more}}}"), &[])
}

pub(super) fn all() -> Vec<Fault> {
    let mut all = configuration();
    all.extend(limits());
    all.extend(pool());
    all
}

fn configuration() -> Vec<Fault> {
    let area = "Configuration";
    vec![
        fault!(
            area,
            "the file that is named is not there",
            ("file", "fail", "file_missing"),
            &[],
            |lab| lab.doctor(&["--config", "/nonexistent/mooncake.json"], &[])
        ),
        fault!(
            area,
            "the file is not JSON",
            ("file", "fail", "file_not_json"),
            &[],
            |lab| {
                let place = lab.place();
                std::fs::write(place.join("mooncake.json"), "{\"protocol\": tcp}").unwrap();
                doctor(&["--master", &lab.master], &[], &place)
            }
        ),
        fault!(
            area,
            "the file is a list",
            ("file", "fail", "file_not_json"),
            &[],
            |lab| {
                let place = lab.place();
                std::fs::write(place.join("mooncake.json"), "[]").unwrap();
                doctor(&["--master", &lab.master], &[], &place)
            }
        ),
        fault!(
            area,
            "a key is misspelt",
            ("key protocl", "warn", "unknown_key"),
            &[],
            |lab| with(lab, r#""protocl":"tcp""#)
        ),
        fault!(
            area,
            "a key that nothing reads",
            ("key colour", "warn", "unknown_key"),
            &[],
            |lab| with(lab, r#""colour":"blue""#)
        ),
        fault!(
            area,
            "a required key is missing",
            ("key metadata_server", "fail", "missing_key"),
            &[],
            |lab| {
                lab.with_file(
                    r#"{"local_hostname":"localhost","master_server_address":"MASTER"}"#,
                    &[],
                )
            }
        ),
        fault!(
            area,
            "a text is a number",
            ("protocol", "fail", "wrong_type"),
            &[],
            |lab| with(lab, r#""protocol":7"#)
        ),
        fault!(
            area,
            "a size has an unknown unit",
            ("global_segment_size", "fail", "bad_size"),
            &[],
            |lab| with(lab, r#""global_segment_size":"4 GBB""#)
        ),
        fault!(
            area,
            "a size lost its unit",
            ("global_segment_size", "fail", "out_of_range"),
            &[],
            |lab| with(lab, r#""global_segment_size":4"#)
        ),
        fault!(
            area,
            "a port is beyond 65535",
            ("client_http_port", "fail", "out_of_range"),
            &[],
            |lab| with(lab, r#""client_http_port":70000"#)
        ),
        fault!(
            area,
            "the protocol is misspelt",
            ("protocol", "fail", "unknown_protocol"),
            &[],
            |lab| with(lab, r#""protocol":"tpc""#)
        ),
        fault!(
            area,
            "P2PHANDSHAKE is misspelt",
            ("metadata_server", "fail", "unknown_metadata"),
            &[],
            |lab| {
                lab.with_file(r#"{"local_hostname":"localhost","metadata_server":"P2PHANDSHAK","master_server_address":"MASTER"}"#, &[])
            }
        ),
        fault!(
            area,
            "a metadata service over https",
            ("metadata_server", "fail", "https_metadata"),
            &[],
            |lab| {
                lab.with_file(r#"{"local_hostname":"localhost","metadata_server":"https://meta.example/metadata","master_server_address":"MASTER"}"#, &[])
            }
        ),
        fault!(
            area,
            "a metadata URL without its path",
            ("metadata_server", "fail", "metadata_path"),
            &["something_else"],
            |lab| {
                lab.with_file(r#"{"local_hostname":"localhost","metadata_server":"http://MASTER","master_server_address":"MASTER"}"#, &[])
            }
        ),
        fault!(
            area,
            "the master is given as a URL",
            ("master_server_address", "fail", "bad_address"),
            &[],
            |lab| {
                let file = r#"{"local_hostname":"localhost","metadata_server":"P2PHANDSHAKE","master_server_address":"http://10.0.0.1:50051"}"#;
                lab.with_file(file, &["--master", &lab.master])
            }
        ),
        fault!(
            area,
            "the master's port is no number",
            ("master_server_address", "fail", "bad_address"),
            &[],
            |lab| {
                let file = r#"{"local_hostname":"localhost","metadata_server":"P2PHANDSHAKE","master_server_address":"master:high"}"#;
                lab.with_file(file, &["--master", &lab.master])
            }
        ),
        fault!(
            area,
            "an embedded pool without memory",
            ("global_segment_size", "fail", "embedded_without_memory"),
            &[],
            |lab| {
                let file = r#"{"local_hostname":"localhost","metadata_server":"P2PHANDSHAKE","master_server_address":"embedded","global_segment_size":0}"#;
                lab.with_file(file, &["--master", &lab.master])
            }
        ),
        fault!(
            area,
            "offload to SSD without a path",
            ("ssd_offload_path", "fail", "offload_without_path"),
            &[],
            |lab| with(lab, r#""enable_ssd_offload":true"#)
        ),
        fault!(
            area,
            "an SSD path that is not used",
            ("ssd_offload_path", "warn", "path_without_offload"),
            &["ssd_no_direct_io", "ssd_slow"],
            |lab| {
                let path = lab.place();
                with(lab, &format!(r#""ssd_offload_path":"{}""#, path.display()))
            }
        ),
        fault!(
            area,
            "an RDMA device is named and the protocol is tcp",
            ("device_name", "warn", "device_without_rdma"),
            &[],
            |lab| with(lab, r#""device_name":"mlx5_0""#)
        ),
        fault!(
            area,
            "a variable beside a file",
            ("variable MOONCAKE_PROTOCOL", "warn", "variable_ignored"),
            &[],
            |lab| {
                let place = lab.place();
                std::fs::write(
                    place.join("mooncake.json"),
                    format!("{{{FILE}}}").replace("MASTER", &lab.master),
                )
                .unwrap();
                doctor(&[], &[("MOONCAKE_PROTOCOL", "rdma")], &place)
            }
        ),
        fault!(
            area,
            "a variable is misspelt",
            ("variable MOONCAKE_PROTOCL", "warn", "unknown_variable"),
            &[],
            |lab| lab.doctor(&[], &[("MOONCAKE_PROTOCL", "tcp")])
        ),
        fault!(
            area,
            "the token file is not there",
            ("token", "fail", "token_unreadable"),
            &[],
            |lab| lab.doctor(&["--token-file", "/nonexistent/token"], &[])
        ),
        fault!(
            area,
            "every user can read the token file",
            ("token", "warn", "token_readable_by_all"),
            &["token"],
            |lab| {
                use std::os::unix::fs::PermissionsExt;
                let token = lab.place().join("token");
                std::fs::write(&token, "t").unwrap();
                std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o644)).unwrap();
                lab.doctor(&["--token-file", token.to_str().unwrap()], &[])
            }
        ),
        fault!(
            area,
            "local_hostname is another host's address",
            ("local_hostname", "fail", "foreign_address"),
            &[],
            |lab| {
                lab.with_file(r#"{"local_hostname":"192.0.2.9","metadata_server":"P2PHANDSHAKE","master_server_address":"MASTER"}"#, &[])
            }
        ),
    ]
}

/// The doctor under a shell's limits, pointed at a master that tells of many clients.
fn limited(lab: &Lab, limit: &str, clients: u64) -> Said {
    let fake = strangers::FakeMaster {
        clients,
        ..strangers::FakeMaster::default()
    };
    let address = fake.start();
    let place = lab.place();
    let binary = crate::pool::BINARY;
    let line = format!("{limit} && exec {binary} doctor --output json --master {address}");
    let out = std::process::Command::new("sh")
        .args(["-c", &line])
        .current_dir(place)
        .output()
        .unwrap();
    super::parse(&out.stdout, out.status.code())
}

fn limits() -> Vec<Fault> {
    let area = "Host";
    vec![
        fault!(
            area,
            "ulimit -n 256 in a pool of 100 clients",
            ("open files", "fail", "nofile"),
            &[],
            |lab| limited(lab, "ulimit -n 256", 100)
        ),
        fault!(
            area,
            "ulimit -u 300 in a pool of 100 clients",
            ("threads", "fail", "threads"),
            &[],
            |lab| limited(lab, "prlimit --nproc=300 --pid $$", 100)
        ),
        fault!(
            area,
            "a segment larger than the machine's memory",
            ("memory", "fail", "memory_too_small"),
            &[],
            |lab| with(lab, r#""global_segment_size":"900TB""#)
        ),
        fault!(
            area,
            "the SSD path is not there",
            ("SSD path", "fail", "ssd_missing"),
            &[],
            |lab| {
                with(
                    lab,
                    r#""enable_ssd_offload":true,"ssd_offload_path":"/nonexistent/ssd""#,
                )
            }
        ),
        fault!(
            area,
            "the SSD path is a file",
            ("SSD path", "fail", "ssd_no_directory"),
            &[],
            |lab| {
                let file = lab.place().join("file");
                std::fs::write(&file, "x").unwrap();
                with(
                    lab,
                    &format!(
                        r#""enable_ssd_offload":true,"ssd_offload_path":"{}""#,
                        file.display()
                    ),
                )
            }
        ),
        fault!(
            area,
            "this host's clock is an hour ahead of the master's",
            ("clock", "fail", "clock_skew"),
            &[],
            |lab| {
                strangers::FakeMaster {
                    clock: -3600,
                    ..strangers::FakeMaster::default()
                }
                .examined(lab)
            }
        ),
        fault!(
            area,
            "this host's clock is ten seconds behind",
            ("clock", "warn", "clock_skew"),
            &[],
            |lab| {
                strangers::FakeMaster {
                    clock: 10,
                    ..strangers::FakeMaster::default()
                }
                .examined(lab)
            }
        ),
    ]
}

fn pool() -> Vec<Fault> {
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
    ]
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
