//! What a user came upon that no list of faults had: found by breaking pools in ways that were not looked for, and seeing
//! whether the doctor named the cause.

use std::net::{TcpListener, TcpStream};
use std::process::Command;

use super::faults::fault;
use super::fixtures::Tree;
use super::{Fault, Lab, Said, doctor, strangers};
use crate::pool::{BINARY, Pool, Server};
use crate::put;

const FILE: &str = r#""local_hostname":"localhost","metadata_server":"P2PHANDSHAKE","master_server_address":"MASTER""#;

/// The doctor under a shell's limit, with a segment of 8 GB wanted.
fn limited(lab: &Lab, limit: &str) -> Said {
    let place = lab.place();
    let file = format!(r#"{{{FILE},"global_segment_size":"8GB"}}"#).replace("MASTER", &lab.master);
    std::fs::write(place.join("mooncake.json"), file).unwrap();
    let line = format!("{limit} && exec {BINARY} doctor --output json");
    let out = Command::new("bash")
        .args(["-c", &line])
        .current_dir(place)
        .output()
        .unwrap();
    super::parse(&out.stdout, out.status.code())
}

/// A control group's file, as a fixture.
fn group(lab: &Lab, file: &str, text: &str) -> Said {
    Tree::host(&lab.place())
        .write(&format!("sys/fs/cgroup/pod/x/{file}"), text)
        .examined(lab, &[])
}

pub(super) fn all() -> Vec<Fault> {
    let area = "Unforeseen";
    vec![
        fault!(
            area,
            "ulimit -v below the segment",
            ("address space", "fail", "address_space"),
            &["memory_short"],
            |lab| limited(lab, "ulimit -v 6000000")
        ),
        fault!(
            area,
            "ulimit -f below the segment",
            ("file size", "fail", "file_size"),
            &["memory_short"],
            |lab| limited(lab, "ulimit -f 100000")
        ),
        fault!(
            area,
            "the tenant's name is misspelt",
            ("tenant", "warn", "tenant_empty"),
            &[],
            |lab| {
                let pool = Pool::start(1, "16MiB", &[]);
                let mut config = pool.config();
                config.tenant = "team-a".to_owned();
                put(
                    &mooncake::store::client::PoolClient::open(config).unwrap(),
                    "k",
                    b"v",
                )
                .unwrap();
                let place = lab.place();
                let file =
                    format!(r#"{{{FILE},"tenant_id":"taem-a"}}"#).replace("MASTER", &pool.address);
                std::fs::write(place.join("mooncake.json"), file).unwrap();
                doctor(&[], &[], &place)
            }
        ),
        fault!(
            area,
            "a node with another token asks again and again",
            ("wrong tokens", "warn", "token_refused"),
            &[],
            |lab| {
                let place = lab.place();
                let token = |name: &str, text: &str| {
                    use std::os::unix::fs::PermissionsExt;
                    let path = place.join(name);
                    std::fs::write(&path, text).unwrap();
                    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))
                        .unwrap();
                    path.to_str().unwrap().to_owned()
                };
                let (right, wrong) = (token("right", "open sesame"), token("wrong", "open barley"));
                let with = ["--token-file", &right];
                let pool = Pool::start_on("127.0.0.1", 1, "16MiB", &with, &with);
                let stray = [
                    "node",
                    "--master",
                    &pool.address,
                    "--bind",
                    "127.0.0.1",
                    "--memory",
                    "16MiB",
                    "--token-file",
                    &wrong,
                ];
                let _stray = Server::start(&stray);
                std::thread::sleep(std::time::Duration::from_secs(2));
                doctor(
                    &["--master", &pool.address, "--token-file", &right],
                    &[],
                    &place,
                )
            }
        ),
        fault!(
            area,
            "the master's port is taken by an outgoing connection",
            ("master", "fail", "port_taken"),
            &[],
            |lab| {
                let server = TcpListener::bind("127.0.0.1:0").unwrap();
                let stream = TcpStream::connect(server.local_addr().unwrap()).unwrap();
                let taken = stream.local_addr().unwrap().to_string();
                doctor(&["--master", &taken], &[], &lab.place())
            }
        ),
        fault!(
            area,
            "a key is in the file twice",
            ("key protocol", "warn", "key_twice"),
            &[],
            |lab| lab.with_file(
                &format!(r#"{{{FILE},"protocol":"tcp","protocol":"tcp"}}"#),
                &[]
            )
        ),
        fault!(
            area,
            "http_proxy is set, and the metadata service is inside",
            ("variable HTTP_PROXY", "warn", "http_proxy"),
            &[],
            |lab| {
                let place = lab.place();
                let file = r#"{"local_hostname":"localhost","metadata_server":"http://MASTER/metadata","master_server_address":"MASTER"}"#;
                std::fs::write(
                    place.join("mooncake.json"),
                    file.replace("MASTER", &lab.master),
                )
                .unwrap();
                doctor(
                    &[],
                    &[("HTTP_PROXY", "http://user:hidden@10.1.2.3:3128")],
                    &place,
                )
            }
        ),
        fault!(
            area,
            "a container that is held back by its CPU limit",
            ("CPU", "warn", "cpu_throttled"),
            &[],
            |lab| group(
                lab,
                "cpu.stat",
                "usage_usec 1\nnr_periods 2000\nnr_throttled 700\nthrottled_usec 9"
            )
        ),
        fault!(
            area,
            "processes of this container were killed for want of memory",
            ("memory kills", "warn", "oom_kills"),
            &[],
            |lab| group(
                lab,
                "memory.events",
                "low 0\nhigh 0\nmax 12\noom 2\noom_kill 2"
            )
        ),
        fault!(
            area,
            "a host that waits for memory",
            ("memory pressure", "warn", "memory_pressure"),
            &[],
            |lab| {
                Tree::host(&lab.place())
                .write("proc/pressure/memory", "some avg10=50.00 avg60=41.50 avg300=9.00 total=1\nfull avg10=1.00 avg60=1.00 avg300=1.00 total=1")
                .examined(lab, &[])
            }
        ),
        fault!(
            area,
            "the firewall's table of connections is full",
            ("connection tracking", "fail", "conntrack_full"),
            &[],
            |lab| Tree::host(&lab.place())
                .write("proc/sys/net/netfilter/nf_conntrack_count", "65530")
                .write("proc/sys/net/netfilter/nf_conntrack_max", "65536")
                .examined(lab, &[])
        ),
        fault!(
            area,
            "a node in another network namespace of this host",
            ("shared memory", "warn", "same_host_tcp"),
            &[],
            |lab| super::network::run(lab, "master far; doctor --master 10.9.0.2:50051")
        ),
        fault!(
            area,
            "this host's name is 127.0.1.1 in /etc/hosts",
            ("local_hostname", "fail", "loopback_name"),
            &["loopback_node", "same_host_tcp"],
            |lab| {
                super::network::run(
                    lab,
                    r#"master far; printf '127.0.0.1 localhost\n127.0.1.1 gpu-a1\n' > "$D/hosts"; mount --bind "$D/hosts" /etc/hosts; echo '{"local_hostname":"gpu-a1","metadata_server":"P2PHANDSHAKE","master_server_address":"10.9.0.2:50051"}' > "$D/mooncake.json"; doctor"#,
                )
            }
        ),
        fault!(
            area,
            "an empty token file",
            ("token", "fail", "token_unreadable"),
            &[],
            |lab| {
                let token = lab.place().join("token");
                std::fs::write(&token, "\n").unwrap();
                lab.doctor(&["--token-file", token.to_str().unwrap()], &[])
            }
        ),
        fault!(
            area,
            "a directory where mooncake.json should be",
            ("file", "fail", "file_unreadable"),
            &[],
            |lab| {
                let place = lab.place();
                lab.doctor(&["--config", place.to_str().unwrap()], &[])
            }
        ),
        fault!(
            area,
            "a load balancer for HTTP in front of the master",
            ("master", "fail", "something_else"),
            &[],
            |lab| strangers::as_master(
                lab,
                &strangers::answering(
                    b"HTTP/1.1 400 Bad Request\r\nServer: nginx\r\nConnection: close\r\n\r\n"
                )
            )
        ),
        fault!(
            area,
            "an IPv6 address with a port, and no brackets",
            ("master's name", "fail", "bad_address"),
            &[],
            |lab| doctor(&["--master", "::1:50872"], &[], &lab.place())
        ),
        fault!(
            area,
            "--master with a path",
            ("master's name", "fail", "bad_address"),
            &[],
            |lab| doctor(
                &["--master", &format!("{}/", lab.master)],
                &[],
                &lab.place()
            )
        ),
        fault!(
            area,
            "--master with port 0",
            ("master's name", "fail", "bad_address"),
            &[],
            |lab| doctor(&["--master", "127.0.0.1:0"], &[], &lab.place())
        ),
        fault!(
            area,
            "mooncake.json begins with a byte order mark",
            ("file", "fail", "file_byte_order_mark"),
            &[],
            |lab| lab.with_file(&format!("\u{feff}{{{FILE}}}"), &["--master", &lab.master])
        ),
        fault!(
            area,
            "the SSD path lies in memory",
            ("SSD path", "warn", "ssd_in_memory"),
            &[],
            |lab| on_tmpfs(lab, "size=64m", "true")
        ),
        fault!(
            area,
            "the file system of the SSD path has no inodes left",
            ("SSD files", "fail", "ssd_no_inodes"),
            &[],
            |lab| on_tmpfs(
                lab,
                "size=64m,nr_inodes=100",
                r#"touch "$D"/ssd/{1..99} 2>/dev/null || true"#
            )
        ),
    ]
}

/// An SSD path on a file system of its own, filled by a line of shell.
fn on_tmpfs(lab: &Lab, options: &str, fill: &str) -> Said {
    let script = format!(
        r#"
A=127.0.0.1 master env
mkdir "$D/ssd"; mount -t tmpfs -o {options} none "$D/ssd"; {fill}
echo '{{"local_hostname":"127.0.0.1","metadata_server":"P2PHANDSHAKE","master_server_address":"127.0.0.1:50051","enable_ssd_offload":true,"ssd_offload_path":"'"$D/ssd"'"}}' > "$D/mooncake.json"
doctor
"#
    );
    super::network::run(lab, &script)
}
