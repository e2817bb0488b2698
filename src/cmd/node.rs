//! `mooncake node`: contributes memory of this host to a pool.

use std::time::Duration;

use clap::{ArgMatches, Command};

use super::{ExitStatus, Outcome, UsageError, print, serve, settings};
use crate::base::config::{Kind, Resolved, Setting};
use crate::base::units::ByteSize;
use crate::engine::transport::rdma;
use crate::store::node::{Node, NodeConfig, NodePhase};

pub(super) static SETTINGS: &[Setting] = &[
    Setting::new(
        "master",
        &["master_server_address"],
        Kind::Text,
        "127.0.0.1:50051",
        "HOST:PORT of the master",
    ),
    Setting::new(
        "memory",
        &["global_segment_size"],
        Kind::Size(1 << 20, 1 << 50),
        "4GiB",
        "Memory to contribute",
    ),
    Setting::new(
        "segments",
        &[],
        Kind::Integer(1, 64),
        "1",
        "Number of segments the memory is split into",
    ),
    Setting::new(
        "bind",
        &["host"],
        Kind::Text,
        "127.0.0.1",
        "Address to listen on for data; beyond loopback only when told so",
    ),
    Setting::new(
        "port",
        &[],
        Kind::Integer(0, 65_535),
        "0",
        "Port for data; 0 = any free one",
    ),
    Setting::new(
        "advertise",
        &["local_hostname"],
        Kind::Text,
        "",
        "HOST or HOST:PORT that others connect to, when it is not --bind",
    ),
    Setting::new(
        "name",
        &[],
        Kind::Text,
        "",
        "Name of this node [default: its address]",
    ),
    Setting::new(
        "populate",
        &[],
        Kind::Flag,
        "true",
        "Touch all memory in the background after the start",
    ),
    Setting::new(
        "token-file",
        &[],
        Kind::Text,
        "",
        "File with the cluster token (or MOONCAKE_TOKEN)",
    ),
    Setting::new(
        "max-lanes",
        &[],
        Kind::Integer(1, 65_536),
        "4096",
        "Data lanes open at once",
    ),
    Setting::new(
        "drain-timeout",
        &[],
        Kind::Time(Duration::from_secs(1)),
        "10s",
        "How long a stop moves objects that lie only here to other nodes; 0 = not at all; a bare number is seconds",
    ),
    Setting::new(
        "log-format",
        &[],
        Kind::Choice(&["text", "json"]),
        "text",
        "How log lines look",
    ),
    Setting::new(
        "protocol",
        &[],
        Kind::Choice(&["auto", "rdma", "tcp"]),
        "auto",
        "Whether callers may have bytes moved by RDMA; auto = where there is a device",
    ),
    Setting::new(
        "device-name",
        &["device_names"],
        Kind::Text,
        "",
        "RDMA devices to use, a comma list [default: all]",
    ),
    // Of upstream's `mooncake_client`: no metadata service is needed, tenants are the users', and nothing is staged.
    settings::ignored("metadata-server", &[]),
    settings::ignored("threads", &[]),
    settings::ignored("tenant-id", &[]),
    settings::ignored("local-buffer-size", &[]),
    settings::ignored("logtostderr", &[]),
    settings::ignored("v", &[]),
];

pub(super) fn command() -> Command {
    let command = Command::new("node")
        .about("Run a node: lend memory of this host to a pool")
        .after_help(
            "On SIGTERM the node takes leave: what lies only here is moved to other nodes (--drain-timeout), puts under way \
             end, then its segments are unmounted. A second SIGTERM stops it at once.",
        );
    settings::add(command, SETTINGS)
}

pub(super) fn run(matches: &ArgMatches) -> Outcome {
    let resolved = settings::resolved(matches, SETTINGS)?;
    if settings::wants_print(matches) {
        settings::print_config(matches, &resolved)?;
        return Ok(ExitStatus::Ok);
    }
    serve::logging(&resolved, "mooncake-node");
    serve::runtime()?.block_on(serve_node(&resolved))
}

async fn serve_node(r: &Resolved) -> Outcome {
    let mut termination = serve::Termination::watch()?;
    let token = serve::token(r.text("token-file"))?;
    let count = r.integer("segments");
    let each = ByteSize(r.size("memory").0 / count / 4096 * 4096);
    if each.0 == 0 {
        return Err(UsageError("--segments: more segments than pages of memory".to_owned()).into());
    }
    let master = r.text("master").unwrap_or_default().to_owned();
    crate::base::net::split_host_port(&master, 50051)
        .map_err(|e| UsageError(format!("--master: {e}")))?;
    let listen = serve::listen(
        r.text("bind").unwrap_or("127.0.0.1"),
        r.integer("port") as u16,
    )?;
    let node = Node::start(NodeConfig {
        master: master.clone(),
        token: token.clone(),
        name: r.text("name").map(str::to_owned),
        listen,
        advertise: r.text("advertise").map(str::to_owned),
        segments: vec![each; count as usize],
        memories: Vec::new(),
        port: None,
        populate: r.flag("populate"),
        lanes_max: r.integer("max-lanes") as usize,
        fabric: rdma::select(
            r.text("protocol").unwrap_or_default(),
            r.text("device-name").unwrap_or_default(),
        ),
        commit: None,
    })?;
    let trust = serve::trust_line(listen, token.is_some());
    print::line(&format!(
        "mooncake node {} with {} in {count} segment(s), master {master} ({trust})",
        node.address(),
        ByteSize(each.0 * count),
    ))?;
    let announced = async {
        if node
            .wait_for(NodePhase::InService, Duration::from_secs(3600))
            .await
        {
            let _ = print::line("in service");
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = termination.asked() => {}
        () = announced => {}
    }
    let moves = r.time("drain-timeout", Duration::from_secs(1));
    let farewell = tokio::select! {
        farewell = node.leave(moves, serve::LEAVE_PATIENCE) => farewell,
        () = termination.asked() => {
            tracing::warn!("stopped at once: what lay only here is gone");
            return Ok(ExitStatus::Unreachable);
        }
    };
    Ok(serve::left(&farewell))
}
