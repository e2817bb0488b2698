//! `mooncake doctor`: finds the cause when parts of a pool cannot work together, and says the fix.
//!
//! Owns the order of the checks and their running side by side; each file beside this one owns a subject. Changes nothing,
//! here or elsewhere (`--fix` prints commands, it runs none). Every wait has a deadline, so that the whole ends within ten
//! seconds even when every packet is dropped.

mod address;
mod config;
mod disk;
mod environment;
mod fabric;
mod firewall;
mod gpu;
mod host;
mod http;
mod instances;
mod load;
mod memory;
mod mesh;
mod mesh_judge;
mod mesh_speed;
mod metadata;
mod pci;
mod pool;
mod pressure;
mod python;
mod rdma;
mod rdma_ports;
mod reach;
mod report;
mod rules;
mod servers;
mod sockets;
mod stranger;
mod system;
mod values;
mod verbs;
mod way;

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Command};

use self::config::Wanted;
use self::firewall::Port;
use self::report::{Finding, Report};
use self::servers::MasterSeen;
use self::system::Root;
use super::print::Output;
use super::{ExitStatus, Outcome, UsageError, connect, settings};
use crate::base::net::{host_id, join_host_port, split_host_port};
use crate::base::telemetry::{self, LogFormat};
use crate::base::trust::{ClusterKeys, Token};
use crate::base::units::parse_duration;
use crate::store::client::{ClientConfig, PoolClient};

/// The master's port unless set.
const MASTER_PORT: u16 = 50_051;
/// Nodes probed; a pool of thousands is not met from one host within seconds.
const NODES_MAX: usize = 64;
/// Bound of a call to the pool.
const CALL: Duration = Duration::from_secs(2);

pub(super) fn command() -> Command {
    Command::new("doctor")
        .about("Find out why parts of a pool do not work together, and say the fix")
        .after_help(
            "Looks at the configuration, names, connections, firewall, this host's limits, RDMA, GPUs, Python and the pool.\n\
             Changes nothing. Exit code 0 when no check failed, 1 when one did. docs/doctor.md lists the faults it knows.",
        )
        .args(connect::place())
        .arg(
            Arg::new("proxy")
                .long("proxy")
                .value_name("URL")
                .help("Also check this proxy"),
        )
        .arg(
            Arg::new("proxy-key-file")
                .long("proxy-key-file")
                .value_name("FILE")
                .help("File with the proxy's admin key (or ADMIN_API_KEY): what it knows of its instances"),
        )
        .arg(
            Arg::new("peer")
                .long("peer")
                .value_name("HOST:PORT")
                .action(ArgAction::Append)
                .help("Also check this data port of a node; may be given several times"),
        )
        .arg(
            Arg::new("mesh")
                .long("mesh")
                .action(ArgAction::SetTrue)
                .help("Also have every node test the way to every other: latency, bandwidth, what is odd"),
        )
        .arg(
            Arg::new("mesh-timeout")
                .long("mesh-timeout")
                .value_name("TIME")
                .default_value("60s")
                .help("Bound of --mesh; a bare number is seconds"),
        )
        .arg(
            Arg::new("rdma")
                .long("rdma")
                .action(ArgAction::SetTrue)
                .help("RDMA is wanted: its absence is a fault"),
        )
        .arg(
            Arg::new("fix")
                .long("fix")
                .action(ArgAction::SetTrue)
                .help("Print the commands that mend what was found, and nothing else; none is run"),
        )
        .arg(settings::output())
        .arg(
            // For tests: a tree with other /proc, /sys and /dev.
            Arg::new("root")
                .long("root")
                .value_name("DIR")
                .value_parser(clap::value_parser!(PathBuf))
                .default_value("/")
                .hide(true),
        )
}

pub(super) fn run(matches: &ArgMatches) -> Outcome {
    telemetry::init(LogFormat::Text, "error");
    let asked = Asked {
        mesh: mesh_time(matches)?,
        proxy_key: super::proxy::admin_key(
            matches
                .get_one::<String>("proxy-key-file")
                .map(String::as_str),
        )?,
    };
    let report = examine(matches, &asked);
    if matches.get_flag("fix") {
        report.print_commands()?;
    } else if matches.get_one::<Output>("output") == Some(&Output::Json) {
        report.print_json()?;
    } else {
        report.print_text()?;
    }
    Ok(if report.failed() {
        ExitStatus::Negative
    } else {
        ExitStatus::Ok
    })
}

/// What was asked for beyond the usual.
struct Asked {
    mesh: Option<Duration>,
    proxy_key: Option<Token>,
}

/// Bound of the mesh test; `None` when none is wanted.
fn mesh_time(matches: &ArgMatches) -> anyhow::Result<Option<Duration>> {
    let given = matches.get_one::<String>("mesh-timeout");
    let time = parse_duration(given.map_or("60s", String::as_str), Duration::from_secs(1))
        .map_err(|e| UsageError(format!("--mesh-timeout: {e}")))?;
    Ok(matches
        .get_flag("mesh")
        .then(|| time.clamp(Duration::from_secs(1), Duration::from_secs(600))))
}

/// What is learned over the network.
struct Network {
    master: MasterSeen,
    nodes: Vec<Finding>,
    pool: Vec<Finding>,
    /// Hosts that reach each other: other nodes and clients.
    peers: u64,
    /// Data addresses of nodes on this host.
    here: Vec<(String, u16)>,
}

fn examine(matches: &ArgMatches, asked: &Asked) -> Report {
    let path = |name: &str| matches.get_one::<PathBuf>(name).map(PathBuf::as_path);
    let token = matches.get_one::<String>("token-file").map(Path::new);
    let root = Root::new(path("root").unwrap_or(Path::new("/")));
    let variables: Vec<(String, String)> = std::env::vars_os()
        .filter_map(|(n, v)| Some((n.into_string().ok()?, v.into_string().ok()?)))
        .collect();
    let (mut configuration, mut wanted) = config::check(path("config"), token, &variables, &root);
    wanted.rdma |= matches.get_flag("rdma");
    let named = matches
        .get_one::<String>("master")
        .cloned()
        .or_else(|| wanted.master.clone());
    // An address that is none was named by `config`, or is by `address`.
    let master = named.unwrap_or_else(|| format!("127.0.0.1:{MASTER_PORT}"));
    let master = match split_host_port(&master, MASTER_PORT) {
        Ok((host, port)) if address::misspelt(&master).is_none() => join_host_port(&host, port),
        _ => master,
    };
    let keys = ClusterKeys::derive(wanted.token.as_ref());
    let peers: Vec<String> = matches
        .get_many::<String>("peer")
        .unwrap_or_default()
        .cloned()
        .collect();
    let proxy_url = matches.get_one::<String>("proxy").cloned();

    let fabric = rdma::Asked::new(wanted.rdma, &wanted.devices, &variables);

    let mut report = Report::default();
    std::thread::scope(|s| {
        let names = s.spawn(|| address::check(&wanted, &master));
        let network = s.spawn(|| network(&wanted, &master, &keys));
        let metadata = s.spawn(|| {
            wanted
                .metadata
                .as_deref()
                .map_or_else(Vec::new, metadata::check)
        });
        let proxy = s.spawn(|| {
            let key = asked.proxy_key.as_ref();
            proxy_url
                .as_deref()
                .map_or_else(Vec::new, |url| servers::proxy(url, key))
        });
        let keys = &keys;
        let peers: Vec<_> = peers
            .iter()
            .map(|p| s.spawn(move || vec![servers::data_port("peer", p, keys)]))
            .collect();
        let engines = s.spawn(|| {
            if root.is_real() {
                python::check()
            } else {
                Vec::new()
            }
        });
        let fabric = s.spawn(|| {
            let mut found = rdma::check(&root, &fabric);
            if root.is_real() {
                found.extend(verbs::check(&root, wanted.rdma, &wanted.devices));
            }
            found
        });
        let listings = s.spawn(|| root.is_real().then(firewall::listings));

        let network = network.join().ok();
        let mut reached = Vec::new();
        let mut need = host::Need::default();
        let mut ports = Vec::new();
        let mut in_pool = Vec::new();
        if let Some(network) = network {
            need = needs(&network);
            ports = ports_in_use(&master, &network, &wanted);
            reached.extend(network.master.findings);
            reached.extend(network.nodes);
            in_pool = network.pool;
            if let Some(time) = asked.mesh.filter(|_| network.master.lane.is_some()) {
                let (found, matrix) = mesh::check(&pool_client(&wanted, &master), time);
                report.add("mesh", found);
                report.mesh = matrix;
            }
        } else {
            let reason = "these checks ended in a defect of mooncake doctor";
            reached.push(
                Finding::fail("doctor", "bug", "", reason)
                    .remedy("report it with the message above"),
            );
        }
        reached.extend(join(metadata));
        reached.extend(join(proxy));
        reached.extend(peers.into_iter().flat_map(join));
        let urls: Vec<&str> = wanted
            .metadata
            .as_deref()
            .into_iter()
            .chain(proxy_url.as_deref())
            .collect();
        configuration.extend(environment::check(&variables, &urls));
        report.add("configuration", configuration);
        report.add("names and addresses", join(names));
        report.add("connections", reached);
        if let Some(listings) = listings.join().ok().flatten() {
            report.add("firewall", firewall::check(&root, &listings, &ports));
        }
        let mut on_host = host::check(&root, &wanted, &need);
        on_host.extend(pressure::check(&root));
        report.add("host", on_host);
        report.add("RDMA", join(fabric));
        report.add("GPU", gpu::check(&root, wanted.rdma));
        report.add("Python", join(engines));
        report.add("pool", in_pool);
    });
    report
}

/// A thread's findings; a defect in one group must neither hide the others nor pass unseen.
fn join(thread: std::thread::ScopedJoinHandle<'_, Vec<Finding>>) -> Vec<Finding> {
    thread.join().unwrap_or_else(|_| {
        let reason = "this group of checks ended in a defect of mooncake doctor";
        vec![Finding::fail("doctor", "bug", "", reason).remedy("report it with the message above")]
    })
}

fn network(wanted: &Wanted, master: &str, keys: &ClusterKeys) -> Network {
    let mut seen = Network {
        master: servers::master(master, keys, wanted.token.as_ref()),
        nodes: Vec::new(),
        pool: Vec::new(),
        peers: 0,
        here: Vec::new(),
    };
    if seen.master.lane.is_none() {
        seen.pool
            .push(Finding::skipped("pool", "the master could not be asked"));
        return seen;
    }
    let client = match PoolClient::open(pool_client(wanted, master)) {
        Ok(client) => client,
        Err(error) => {
            seen.pool.push(Finding::skipped("pool", error.to_string()));
            return seen;
        }
    };
    let asked = match pool::look(&client) {
        Ok(asked) => asked,
        Err(error) => {
            let f = Finding::fail(
                "pool",
                "master_mute",
                master,
                format!("the master shook hands and does not answer: {error}"),
            );
            seen.pool
                .push(f.remedy("look at the master's log and load"));
            return seen;
        }
    };
    let port = split_host_port(master, MASTER_PORT).map_or(MASTER_PORT, |(_, p)| p);
    seen.master.findings.extend(way::check(&client, port));
    let own = host_id();
    let nodes = pool::nodes(&asked.segments);
    seen.peers = nodes.len() as u64 + asked.overview.clients;
    seen.here = nodes
        .iter()
        .filter(|(_, _, host)| *host == own)
        .filter_map(|(name, address, _)| Some((name.clone(), split_host_port(address, 0).ok()?.1)))
        .collect();
    std::thread::scope(|s| {
        let probes: Vec<_> = nodes
            .iter()
            .take(NODES_MAX)
            .map(|(name, address, _)| {
                s.spawn(move || vec![servers::data_port(&format!("node {name}"), address, keys)])
            })
            .collect();
        let told = load::ask(master, wanted.token.as_ref());
        seen.pool = pool::check(&client, &asked, &told, &own, &wanted.tenant);
        seen.nodes = probes.into_iter().flat_map(join).collect();
    });
    if nodes.len() > NODES_MAX {
        seen.nodes.push(Finding::skipped(
            "more nodes",
            format!("{} nodes were not tried", nodes.len() - NODES_MAX),
        ));
    }
    seen
}

/// How the pool is asked.
fn pool_client(wanted: &Wanted, master: &str) -> ClientConfig {
    let mut client = ClientConfig::new(master);
    client.token.clone_from(&wanted.token);
    client.tenant.clone_from(&wanted.tenant);
    client.timeout = CALL;
    client.connect_timeout = CALL;
    client.master_patience = Duration::ZERO;
    client
}

fn needs(network: &Network) -> host::Need {
    let far = network
        .master
        .lane
        .as_ref()
        .filter(|l| !l.address.ip().is_loopback());
    host::Need {
        peers: network.peers,
        node_here: !network.here.is_empty(),
        skew: network.master.skew,
        rtt: far.map(|l| l.rtt),
        // An address of this host is reached over loopback, whose packets are large.
        mtu: far
            .filter(|l| l.local.is_none_or(|a| a.ip() != l.address.ip()))
            .and_then(|l| l.mtu),
    }
}

/// The ports that rules of this host's firewall may hit.
fn ports_in_use(master: &str, network: &Network, wanted: &Wanted) -> Vec<Port> {
    let mut ports = Vec::new();
    if let Ok((host, number)) = split_host_port(master, MASTER_PORT) {
        let here = address::resolve(&join_host_port(&host, number))
            .is_ok_and(|all| all.iter().any(|a| address::is_local(a.ip())));
        ports.push(Port {
            number,
            name: "master".to_owned(),
            incoming: here,
        });
    }
    for (name, number) in &network.here {
        ports.push(Port {
            number: *number,
            // Most nodes are named by their address.
            name: if name.ends_with(&format!(":{number}")) {
                "node".to_owned()
            } else {
                format!("node {name}")
            },
            incoming: true,
        });
    }
    let server = wanted.metadata.as_deref().unwrap_or_default();
    let known = [("etcd://", 2379), ("redis://", 6379), ("http://", 80)];
    if let Some((scheme, port)) = known.iter().find(|(s, _)| server.starts_with(s)) {
        let rest = server.trim_start_matches(scheme);
        let rest = rest.rsplit_once('@').map_or(rest, |(_, place)| place);
        if let Ok((_, number)) = split_host_port(rest.split('/').next().unwrap_or(rest), *port)
            && ports.iter().all(|p| p.number != number)
        {
            ports.push(Port {
                number,
                name: "metadata".to_owned(),
                incoming: false,
            });
        }
    }
    ports
}
