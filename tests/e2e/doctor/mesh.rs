//! Faults between nodes, for `doctor --mesh`: hosts of their own on one bridge, each with a node, and the master beside
//! them. What one node's host drops, delays or slows must be told as that node's, that direction's, or that pair's.

use std::process::Command;

use super::faults::fault;
use super::network::run;
use super::{Fault, Lab, Said};

/// Nodes n1 … nN at 10.9.1.N:7000, the master at 10.9.1.254:50051. `at N …` runs on that host; `drops N CHAIN RULE…` adds
/// rules there; `mesh` looks once all nodes are in service. N comes as `$COUNT`; `$ADVERTISE2` is what n2 announces.
const HOSTS: &str = r#"
ip link add bridge type bridge; ip addr add 10.9.1.254/24 dev bridge; ip link set bridge up
at() { local n=$1; shift; ip netns exec "n$n" "$@"; }
for n in $(seq "$COUNT"); do
  ip netns add "n$n"; ip link add "b$n" type veth peer name eth netns "n$n"
  ip link set "b$n" master bridge; ip link set "b$n" up
  at "$n" ip link set lo up; at "$n" ip addr add "10.9.1.$n/24" dev eth; at "$n" ip link set eth up
done
A=10.9.1.254 "$M" master --bind 10.9.1.254 --port 50051 --metrics-port off >/dev/null 2>&1 & open 10.9.1.254 50051
for n in $(seq "$COUNT"); do
  more=(); if [ "$n" = 2 ] && [ -n "$ADVERTISE2" ]; then more=(--advertise "$ADVERTISE2"); fi
  at "$n" "$M" node --master 10.9.1.254:50051 --bind "10.9.1.$n" --port 7000 --name "n$n" --memory 4MiB "${more[@]}" >/dev/null 2>&1 &
done
for i in $(seq 100); do [ "$("$M" inspect segments --master 10.9.1.254:50051 2>/dev/null | grep -c ' ok ')" = "$COUNT" ] && break; sleep 0.1; done
drops() { local n=$1 chain=$2; shift 2; printf 'add table inet f\nadd chain inet f %s { type filter hook %s priority 0; }\n' "$chain" "$chain" | at "$n" nft -f -
  for rule in "$@"; do at "$n" nft add rule inet f "$chain" $rule; done; }
mesh() { doctor --master 10.9.1.254:50051 --mesh --mesh-timeout 25s; }
"#;

fn mesh(lab: &Lab, count: usize, script: &str) -> Said {
    let script = format!("COUNT={count}\nADVERTISE2=${{ADVERTISE2:-}}\n{HOSTS}{script}; mesh");
    run(lab, &script)
}

fn shaped(lab: &Lab, count: usize, script: &str) -> Said {
    if Command::new("tc").arg("-V").output().is_err() {
        return Err("needs tc".to_owned());
    }
    mesh(lab, count, script)
}

pub(super) fn all() -> Vec<Fault> {
    let area = "Between nodes: `--mesh`, in namespaces";
    vec![
        fault!(
            area,
            "a node's firewall drops what comes to its data port",
            ("node n2", "fail", "mesh_incoming"),
            &["timeout"],
            |lab| mesh(
                lab,
                3,
                "drops 2 input 'iifname lo accept' 'tcp dport 7000 drop'"
            )
        ),
        fault!(
            area,
            "a node's firewall rejects what comes to its data port",
            ("node n2", "fail", "mesh_incoming"),
            &["refused"],
            |lab| mesh(
                lab,
                4,
                "drops 2 input 'iifname lo accept' 'tcp dport 7000 reject with tcp reset'"
            )
        ),
        fault!(
            area,
            "a node's firewall drops what it sends to others",
            ("node n3", "fail", "mesh_outgoing"),
            &[],
            |lab| mesh(
                lab,
                3,
                "drops 3 output 'oifname lo accept' 'tcp dport 7000 drop'"
            )
        ),
        fault!(
            area,
            "a node's host is cut off from the other nodes, not from the master",
            ("node n1", "fail", "mesh_cut_off"),
            &[],
            |lab| mesh(
                lab,
                4,
                "drops 1 input 'ip saddr { 10.9.1.2, 10.9.1.3, 10.9.1.4 } drop'"
            )
        ),
        fault!(
            area,
            "two nodes cannot reach each other",
            ("n1 ↔ n2", "fail", "mesh_pair"),
            &[],
            |lab| mesh(lab, 3, "drops 1 input 'ip saddr 10.9.1.2 drop'")
        ),
        fault!(
            area,
            "a rule of one node names another: one direction only",
            ("n3 → n1", "fail", "mesh_one_way"),
            &[],
            |lab| mesh(
                lab,
                3,
                "drops 1 input 'ip saddr 10.9.1.3 tcp dport 7000 drop'"
            )
        ),
        fault!(
            area,
            "of two nodes one does not reach the other",
            ("n2 → n1", "fail", "mesh_one_way"),
            &[],
            |lab| mesh(
                lab,
                2,
                "drops 1 input 'ip saddr 10.9.1.2 tcp dport 7000 drop'"
            )
        ),
        fault!(
            area,
            "the network between two groups of nodes is down",
            ("groups", "fail", "mesh_split"),
            &[],
            |lab| mesh(
                lab,
                4,
                "for n in 1 2; do drops $n input 'ip saddr { 10.9.1.3, 10.9.1.4 } drop'; done"
            )
        ),
        fault!(
            area,
            "a node announces an address that is not its own",
            ("node n2", "fail", "mesh_address"),
            &["host_unreachable", "rejected", "timeout"],
            |lab| {
                let script = format!("COUNT=3\nADVERTISE2=10.9.1.77:7000\n{HOSTS}mesh");
                run(lab, &script)
            }
        ),
        fault!(
            area,
            "large packets to a node vanish",
            ("node n2", "fail", "mesh_mtu"),
            &[],
            |lab| mesh(
                lab,
                3,
                "drops 2 input 'iifname eth tcp dport 7000 meta length > 1000 drop'"
            )
        ),
        fault!(
            area,
            "what a node sends is slow",
            ("node n2", "warn", "mesh_slow_outgoing"),
            &[],
            |lab| shaped(
                lab,
                3,
                "at 2 tc qdisc add dev eth root tbf rate 100mbit burst 64kb latency 50ms"
            )
        ),
    ]
}
