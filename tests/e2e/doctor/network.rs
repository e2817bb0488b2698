//! Faults of the network, made in namespaces: two hosts (`near`, where the doctor runs, and `far`) joined by a link, with
//! nftables, routes, MTUs and resolvers of their own. Everything is private to the process and gone with it. Needs root,
//! `ip` and `nft`.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::faults::fault;
use super::{Fault, Lab, Said};
use crate::pool::BINARY;

/// near 10.9.0.1 — 10.9.0.2 far, and words for the faults. `M` is the binary.
const SETUP: &str = r#"
set -e
mkdir -p /run/netns; mount -t tmpfs none /run/netns
ip link set lo up
ip netns add far
far() { ip netns exec far "$@"; }
ip link add near type veth peer name there
ip link set there netns far
ip addr add 10.9.0.1/24 dev near; ip link set near up
far ip addr add 10.9.0.2/24 dev there; far ip link set there up; far ip link set lo up
open() { for i in $(seq 100); do (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null && return; sleep 0.1; done; echo "no server on $1" >&2; exit 9; }
master() { "$@" "$M" master --bind "$A" --port 50051 --metrics-port off --memory 16MiB >/dev/null 2>&1 & open "$A" 50051; }
filter() { nft add table inet f; nft add chain inet f "$1" "{ type filter hook $1 priority 0; policy $2; }"; }
doctor() { cd "$D"; set +e; timeout 30 "$M" doctor --output json "$@"; code=$?; kill $(jobs -p) 2>/dev/null; exit $code; }
"#;

pub(super) fn run(lab: &Lab, script: &str) -> Said {
    if !rustix::process::getuid().is_root() {
        return Err("needs root".to_owned());
    }
    for (tool, argument) in [("ip", "-V"), ("nft", "-v"), ("unshare", "-V")] {
        if Command::new(tool).arg(argument).output().is_err() {
            return Err(format!("needs {tool}"));
        }
    }
    let start = Instant::now();
    let output = Command::new("unshare")
        .args([
            "-n",
            "-m",
            "-p",
            "-f",
            "--kill-child",
            "--mount-proc",
            "bash",
            "-c",
            &format!("{SETUP}{script}"),
        ])
        .env("M", BINARY)
        .env("D", lab.place())
        .env("A", "10.9.0.2")
        .env_remove("PYTHONPATH")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.stdout.is_empty(), "{script}: {said}");
    // Ten seconds are what a person waits; the rest is the machine that runs the tests.
    assert!(
        start.elapsed() < Duration::from_secs(40),
        "{:?}",
        start.elapsed()
    );
    super::parse(&output.stdout, output.status.code())
}

pub(super) fn all() -> Vec<Fault> {
    let area = "Network, in namespaces";
    vec![
        fault!(
            area,
            "the master's host drops packets to its port",
            ("master", "fail", "timeout"),
            &[],
            |lab| {
                run(
                    lab,
                    "master far; far nft -f - <<< 'table inet f { chain input { type filter hook input priority 0; tcp dport 50051 drop; }; }'; doctor --master 10.9.0.2:50051",
                )
            }
        ),
        fault!(
            area,
            "a firewall rejects with ICMP",
            ("master", "fail", "rejected"),
            &[],
            |lab| {
                run(
                    lab,
                    "far nft -f - <<< 'table inet f { chain input { type filter hook input priority 0; tcp dport 50051 reject with icmpx type admin-prohibited; }; }'; doctor --master 10.9.0.2:50051",
                )
            }
        ),
        fault!(
            area,
            "a firewall rejects with a TCP reset",
            ("master", "fail", "refused"),
            &[],
            |lab| {
                run(
                    lab,
                    "master far; far nft -f - <<< 'table inet f { chain input { type filter hook input priority 0; tcp dport 50051 reject with tcp reset; }; }'; doctor --master 10.9.0.2:50051",
                )
            }
        ),
        fault!(
            area,
            "no host has the master's address",
            ("master", "fail", "host_unreachable"),
            &[],
            |lab| run(lab, "doctor --master 10.9.0.77:50051")
        ),
        fault!(
            area,
            "no route to the master",
            ("source address", "fail", "no_route"),
            &[],
            |lab| run(lab, "doctor --master 10.88.0.1:50051")
        ),
        fault!(
            area,
            "the route says unreachable",
            ("master", "fail", "rejected"),
            &["no_route"],
            |lab| {
                run(
                    lab,
                    "ip route add unreachable 10.88.0.0/24; doctor --master 10.88.0.1:50051",
                )
            }
        ),
        fault!(
            area,
            "this host's firewall drops what goes to the master",
            ("port 50051", "fail", "firewall_drop"),
            &["timeout", "forbidden_here"],
            |lab| {
                run(
                    lab,
                    "master far; filter output accept; nft add rule inet f output tcp dport 50051 counter drop; doctor --master 10.9.0.2:50051",
                )
            }
        ),
        fault!(
            area,
            "this host's firewall drops what comes to the master",
            ("port 50051", "fail", "firewall_drop"),
            &[],
            |lab| {
                run(
                    lab,
                    "A=127.0.0.1 master env; filter input accept; nft add rule inet f input iifname lo accept; nft add rule inet f input tcp dport '{ 22, 50000-50100 }' drop; doctor --master 127.0.0.1:50051",
                )
            }
        ),
        fault!(
            area,
            "this host's firewall drops by policy",
            ("port 50051", "fail", "firewall_policy"),
            &[],
            |lab| {
                run(
                    lab,
                    "A=127.0.0.1 master env; filter input drop; nft add rule inet f input iifname lo accept; nft add rule inet f input ct state established,related accept; doctor --master 127.0.0.1:50051",
                )
            }
        ),
        fault!(
            area,
            "a rule of this host drops some networks",
            ("port 50051", "warn", "firewall_perhaps"),
            &[],
            |lab| {
                run(
                    lab,
                    "A=127.0.0.1 master env; filter input accept; nft add rule inet f input ip saddr 10.0.0.0/8 tcp dport 50051 drop; doctor --master 127.0.0.1:50051",
                )
            }
        ),
        fault!(
            area,
            "iptables of this host reject the master's port",
            ("port 50051", "fail", "firewall_reject"),
            &["refused"],
            |lab| {
                let tool = "iptables-legacy";
                if Command::new(tool).arg("-V").output().is_err() {
                    return Err(format!("needs {tool}"));
                }
                run(
                    lab,
                    "A=127.0.0.1 master env; iptables-legacy -A INPUT -p tcp --dport 50051 -j REJECT; doctor --master 127.0.0.1:50051",
                )
            }
        ),
        fault!(
            area,
            "the master listens on loopback only",
            ("master", "fail", "refused_other_address"),
            &[],
            |lab| {
                run(
                    lab,
                    "A=127.0.0.1 master env; doctor --master 10.9.0.1:50051",
                )
            }
        ),
        fault!(
            area,
            "local_hostname is loopback, the master on another host",
            ("local_hostname", "fail", "loopback_name"),
            &["loopback_node"],
            |lab| {
                run(
                    lab,
                    r#"master far; echo '{"local_hostname":"127.0.0.1","metadata_server":"P2PHANDSHAKE","master_server_address":"10.9.0.2:50051"}' > "$D/mooncake.json"; doctor"#,
                )
            }
        ),
        fault!(
            area,
            "the first address of the master's name is dead",
            ("master's name", "fail", "first_address_dead"),
            &["refused"],
            |lab| {
                run(
                    lab,
                    "master far; far ip addr add 10.9.0.3/24 dev there; printf '10.9.0.3 pool\n10.9.0.2 pool\n' > \"$D/hosts\"; mount --bind \"$D/hosts\" /etc/hosts; doctor --master pool:50051",
                )
            }
        ),
        fault!(
            area,
            "nobody knows the master's name",
            ("master's name", "fail", "name_unknown"),
            &[],
            |lab| {
                run(
                    lab,
                    "echo 'hosts: files' > \"$D/nss\"; mount --bind \"$D/nss\" /etc/nsswitch.conf; doctor --master no-such-host:50051",
                )
            }
        ),
        fault!(
            area,
            "no name server answers",
            ("master's name", "fail", "resolver_silent"),
            &[],
            |lab| {
                run(
                    lab,
                    "printf 'nameserver 10.9.0.2\n' > \"$D/resolv\"; mount --bind \"$D/resolv\" /etc/resolv.conf; far nft -f - <<< 'table inet f { chain input { type filter hook input priority 0; udp dport 53 drop; }; }'; doctor --master some-host.example:50051",
                )
            }
        ),
        fault!(
            area,
            "a small MTU on the interface",
            ("path MTU", "warn", "mtu_low"),
            &[],
            |lab| {
                run(
                    lab,
                    "master far; ip link set near mtu 1000; doctor --master 10.9.0.2:50051",
                )
            }
        ),
        fault!(
            area,
            "a link with a smaller MTU, and ICMP is dropped",
            ("large packets", "fail", "mtu_black_hole"),
            &["no_nodes"],
            |lab| {
                // near — router — far, where the router's way to far carries 1000 bytes and tells nobody.
                let script = r#"
ip netns add router; router() { ip netns exec router "$@"; }
router ip link set lo up
ip link add up1 type veth peer name r1; ip link set r1 netns router
ip link add r2 netns router type veth peer name f1 netns far
ip addr add 10.7.1.1/24 dev up1; ip link set up1 up
router ip addr add 10.7.1.254/24 dev r1; router ip link set r1 up
router ip addr add 10.7.2.254/24 dev r2; router ip link set r2 up
far ip addr add 10.7.2.2/24 dev f1; far ip link set f1 up
ip route add 10.7.2.0/24 via 10.7.1.254; far ip route add 10.7.1.0/24 via 10.7.2.254
router sysctl -qw net.ipv4.ip_forward=1
router nft -f - <<< 'table inet f { chain output { type filter hook output priority 0; icmp type destination-unreachable drop; }; }'
export A=10.7.2.2
far "$M" master --bind $A --port 50051 --metrics-port off >/dev/null 2>&1 & open $A 50051
router ip link set r2 mtu 1000
doctor --master $A:50051
"#;
                run(lab, script)
            }
        ),
        fault!(
            area,
            "TCP buffers too small for link and distance",
            ("TCP buffers", "warn", "tcp_buffers"),
            &[],
            |lab| {
                if Command::new("tc").arg("-V").output().is_err() {
                    return Err("needs tc".to_owned());
                }
                run(
                    lab,
                    "mount -t sysfs none /sys; master far; sysctl -qw net.ipv4.tcp_rmem='4096 4096 4096'; doctor --master 10.9.0.2:50051",
                )
            }
        ),
        fault!(
            area,
            "the disk of the SSD path is full",
            ("SSD space", "fail", "ssd_full"),
            &["ssd_in_memory"],
            |lab| {
                let script = r#"
A=127.0.0.1 master env
mkdir "$D/ssd"; mount -t tmpfs -o size=64m none "$D/ssd"; head -c 62M /dev/zero > "$D/ssd/full"
echo '{"local_hostname":"127.0.0.1","metadata_server":"P2PHANDSHAKE","master_server_address":"127.0.0.1:50051","enable_ssd_offload":true,"ssd_offload_path":"'"$D/ssd"'"}' > "$D/mooncake.json"
doctor
"#;
                run(lab, script)
            }
        ),
        fault!(
            area,
            "the SSD path is mounted read-only",
            ("SSD path", "fail", "ssd_readonly"),
            &[],
            |lab| {
                let script = r#"
A=127.0.0.1 master env
mkdir "$D/ssd"; mount -t tmpfs -o ro none "$D/ssd"
echo '{"local_hostname":"127.0.0.1","metadata_server":"P2PHANDSHAKE","master_server_address":"127.0.0.1:50051","enable_ssd_offload":true,"ssd_offload_path":"'"$D/ssd"'"}' > "$D/mooncake.json"
doctor
"#;
                run(lab, script)
            }
        ),
        fault!(
            area,
            "packets are lost on the way to the master",
            ("losses", "warn", "packets_lost"),
            &["mtu_black_hole", "http_unanswered"],
            |lab| {
                // Every 16th packet, from the tenth on: the first ones make the connection.
                let script = "master far; far nft -f - <<< 'table inet f { chain input { type filter hook input priority 0; tcp dport 50051 numgen inc mod 16 == 9 drop; }; }'; doctor --master 10.9.0.2:50051";
                run(lab, script)
            }
        ),
    ]
}
