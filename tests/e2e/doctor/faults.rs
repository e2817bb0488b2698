//! Faults of the configuration, of names, and of this host's limits and disk.

use super::{Fault, Lab, Said, doctor, strangers};

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
    all.extend(disk());
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
            &["ssd_in_memory", "ssd_no_direct_io", "ssd_slow"],
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

/// Stands between the doctor and the C library: a disk without direct I/O, a slow one, one that does not answer.
const SHIM: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>
int open64(const char *path, int flags, ...) {
    va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more);
    if (getenv("NO_DIRECT") && (flags & O_DIRECT)) { errno = EINVAL; return -1; }
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open64");
    return real(path, flags, mode);
}
ssize_t pwrite64(int fd, const void *from, size_t count, off64_t at) {
    const char *pause = getenv("PAUSE_US");
    if (pause && count >= 1 << 19) usleep(atoi(pause));
    ssize_t (*real)(int, const void *, size_t, off64_t) = dlsym(RTLD_NEXT, "pwrite64");
    return real(fd, from, count, at);
}
"#;

/// The doctor, with an SSD path on a disk that is as the variable says.
fn on_disk(lab: &Lab, variable: (&str, &str)) -> Said {
    let place = lab.place();
    std::fs::write(place.join("shim.c"), SHIM).unwrap();
    let built = std::process::Command::new("cc")
        .args(["-shared", "-fPIC", "-o", "shim.so", "shim.c", "-ldl"])
        .current_dir(&place)
        .status();
    if !built.is_ok_and(|s| s.success()) {
        return Err("no cc".to_owned());
    }
    // Not below /tmp, which may lie in memory.
    let ssd = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = format!(
        r#"{{{FILE},"enable_ssd_offload":true,"ssd_offload_path":"{}"}}"#,
        ssd.path().display()
    );
    std::fs::write(
        place.join("mooncake.json"),
        file.replace("MASTER", &lab.master),
    )
    .unwrap();
    let shim = place.join("shim.so");
    doctor(
        &[],
        &[("LD_PRELOAD", shim.to_str().unwrap()), variable],
        &place,
    )
}

fn disk() -> Vec<Fault> {
    let area = "SSD path";
    vec![
        fault!(
            area,
            "a file system without direct I/O",
            ("SSD path", "warn", "ssd_no_direct_io"),
            &["ssd_slow"],
            |lab| on_disk(lab, ("NO_DIRECT", "1"))
        ),
        fault!(
            area,
            "a disk that writes 20 MB/s",
            ("SSD path", "warn", "ssd_slow"),
            &["ssd_no_direct_io"],
            |lab| on_disk(lab, ("PAUSE_US", "50000"))
        ),
        fault!(
            area,
            "a disk that does not answer",
            ("SSD path", "fail", "ssd_stuck"),
            &[],
            |lab| on_disk(lab, ("PAUSE_US", "900000"))
        ),
    ]
}
