//! `mooncake master`: the index of a pool, and with `--memory` a whole pool.

use std::time::Duration;

use anyhow::Context;
use clap::{ArgMatches, Command};

use super::{ExitStatus, Outcome, print, serve, settings};
use crate::base::config::{Kind, Resolved, Setting};
use crate::base::trust::ClusterKeys;
use crate::base::units::ByteSize;
use crate::store::client::ClientConfig;
use crate::store::master::config::MasterConfig;
use crate::store::master::eviction::PolicyKind;
use crate::store::master::placement::PlacementStrategy;
use crate::store::master::{KvEventsConfig, Master, MasterServer};
use crate::store::node::{Commit, Node, NodeConfig};
use crate::store::rest;

const MS: Kind = Kind::Time(Duration::from_millis(1));
const SECONDS: Kind = Kind::Time(Duration::from_secs(1));

/// Names, defaults and units follow upstream's `mooncake_master` where it has the setting.
pub(super) static SETTINGS: &[Setting] = &[
    Setting::new(
        "port",
        &["rpc_port"],
        Kind::Integer(0, 65_535),
        "50051",
        "Port for gRPC, HTTP and control lanes; 0 = any free one",
    ),
    Setting::new(
        "bind",
        &["rpc_address"],
        Kind::Text,
        "127.0.0.1",
        "Address to listen on; beyond loopback only when told so",
    ),
    Setting::new(
        "token-file",
        &[],
        Kind::Text,
        "",
        "File with the cluster token (or MOONCAKE_TOKEN); required of everybody then",
    ),
    Setting::new(
        "memory",
        &[],
        Kind::SizeOrNone(1 << 20, 1 << 50),
        "0",
        "Also host an embedded node with this much memory",
    ),
    Setting::new(
        "node-port",
        &[],
        Kind::Integer(0, 65_535),
        "0",
        "Data port of the embedded node; 0 = any free one",
    ),
    Setting::new(
        "advertise",
        &[],
        Kind::Text,
        "",
        "HOST or HOST:PORT under which clients reach the embedded node, when it is not --bind",
    ),
    Setting::new(
        "metrics-port",
        &[],
        Kind::Text,
        "9003",
        "Second HTTP listener for tools that expect upstream's port; `off` = none",
    ),
    Setting::new(
        "metrics-host",
        &[],
        Kind::Text,
        "127.0.0.1",
        "Address of the second HTTP listener",
    ),
    Setting::new(
        "enable-metric-reporting",
        &[],
        Kind::Flag,
        "true",
        "Log a summary every 10 s",
    ),
    Setting::new(
        "default-kv-lease-ttl",
        &[],
        MS,
        "10s",
        "Lease granted by get and exist; a bare number is milliseconds",
    ),
    Setting::new(
        "max-kv-soft-pin-ttl",
        &[],
        MS,
        "24h",
        "Longest soft pin accepted; a bare number is milliseconds",
    ),
    Setting::new(
        "allow-evict-soft-pinned-objects",
        &[],
        Kind::Flag,
        "true",
        "Evict soft-pinned objects when nothing else is left",
    ),
    Setting::new(
        "eviction-high-watermark-ratio",
        &[],
        Kind::Ratio,
        "0.90",
        "Share of the capacity above which eviction runs",
    ),
    Setting::new(
        "eviction-ratio",
        &[],
        Kind::Ratio,
        "0.05",
        "Share of the capacity that a round of eviction frees",
    ),
    Setting::new(
        "enable-multi-tenants",
        &[],
        Kind::Flag,
        "false",
        "Let in only tenants that have a quota (/api/v1/tenant_quotas); quotas hold either way",
    ),
    Setting::new(
        "eviction-policy",
        &[],
        Kind::Choice(PolicyKind::NAMES),
        "sieve",
        "What is evicted first",
    ),
    Setting::new(
        "allocation-strategy",
        &[],
        Kind::Choice(PlacementStrategy::NAMES),
        "random",
        "Where replicas are placed",
    ),
    Setting::new(
        "client-ttl",
        &[],
        SECONDS,
        "10s",
        "A node silent for this long is unmounted; a bare number is seconds",
    ),
    Setting::new(
        "put-start-release-timeout",
        &["put_start_release_timeout_sec"],
        SECONDS,
        "600s",
        "An unfinished put is reclaimed after this; a bare number is seconds",
    ),
    Setting::new(
        "put-wait",
        &[],
        MS,
        "2s",
        "How long a put waits for space when its client names no deadline",
    ),
    Setting::new(
        "recovery-grace",
        &[],
        MS,
        "1s",
        "After the start, absence is not answered for this long: nodes may still be on their way",
    ),
    Setting::new(
        "kv-events",
        &["enable_kv_events"],
        Kind::Flag,
        "true",
        "Record what is stored and removed, for subscribers (GET /events, gRPC, --kv-events-endpoint)",
    ),
    Setting::new(
        "kv-events-queue-capacity",
        &[],
        Kind::Integer(1, 16_777_216),
        "65536",
        "Events kept for replay, and at most 256 bytes of key each on average",
    ),
    Setting::new(
        "kv-events-endpoint",
        &["kv_events_bind_endpoint"],
        Kind::Text,
        "",
        "Publish the events over ZeroMQ as well, PUB and replay on one port: tcp://HOST:PORT",
    ),
    Setting::new(
        "kv-events-backend-id",
        &[],
        Kind::Text,
        "mooncake",
        "This pool's name in published events",
    ),
    Setting::new(
        "kv-events-emit-legacy-compat",
        &[],
        Kind::Flag,
        "true",
        "Published events also carry the names engines use: type, block_hashes",
    ),
    Setting::new(
        "kv-events-emit-object-key",
        &[],
        Kind::Flag,
        "true",
        "Published events carry the key as text",
    ),
    Setting::new(
        "max-lanes",
        &[],
        Kind::Integer(1, 65_536),
        "4096",
        "Control lanes open at once; as many data lanes of the embedded node",
    ),
    Setting::new(
        "slow-log",
        &[],
        MS,
        "1s",
        "Log operations that take longer, with what they waited for; 0 = none",
    ),
    Setting::new(
        "log-format",
        &[],
        Kind::Choice(&["text", "json"]),
        "text",
        "How log lines look",
    ),
    settings::ignored("max-threads", &["rpc_thread_num"]),
    settings::ignored("rpc-conn-timeout-seconds", &[]),
    settings::ignored("rpc-enable-tcp-no-delay", &[]),
    settings::ignored("rpc-interface", &[]),
    settings::ignored("memory-allocator", &[]),
    settings::ignored("cluster-id", &[]),
    settings::ignored("default-kv-soft-pin-ttl", &[]),
    settings::ignored("put-start-discard-timeout-sec", &[]),
    settings::ignored("logtostderr", &[]),
    // `/metadata` is always there, on the master's port.
    settings::ignored("enable-http-metadata-server", &[]),
    settings::ignored("http-metadata-server-host", &[]),
    settings::ignored("http-metadata-server-port", &[]),
    settings::ignored("enable-metadata-cleanup-on-timeout", &[]),
    settings::ignored("enable-gc", &[]),
    settings::ignored("kv-events-model-name", &[]),
    settings::ignored("kv-events-tenant-id", &[]),
    settings::ignored("kv-events-additional-salt", &[]),
    settings::ignored("kv-events-lora-name", &[]),
    settings::ignored("kv-events-block-size", &[]),
    settings::ignored("kv-events-dp-rank", &[]),
    settings::ignored("v", &[]),
];

pub(super) fn command() -> Command {
    let command = Command::new("master")
        .about("Run the master: the index of a pool (with --memory, a whole pool)")
        .after_help(
            "Every setting can also stand in the --config file (with underscores) or in MOONCAKE_<NAME>.\n\
             A flag wins over a variable, a variable over the file. Upstream's spellings are accepted.",
        );
    settings::add(command, SETTINGS)
}

fn config(r: &Resolved) -> MasterConfig {
    let ms = Duration::from_millis(1);
    let seconds = Duration::from_secs(1);
    MasterConfig {
        lease_ttl: r.time("default-kv-lease-ttl", ms),
        soft_pin_ttl_max: r.time("max-kv-soft-pin-ttl", ms),
        evict_soft_pinned: r.flag("allow-evict-soft-pinned-objects"),
        high_watermark: r.ratio("eviction-high-watermark-ratio"),
        eviction_ratio: r.ratio("eviction-ratio"),
        client_ttl: r.time("client-ttl", seconds),
        put_release: r.time("put-start-release-timeout", seconds),
        put_wait: r.time("put-wait", ms),
        recovery_grace: r.time("recovery-grace", ms),
        slow_log: r.time("slow-log", ms),
        events_max: if r.flag("kv-events") {
            r.integer("kv-events-queue-capacity") as usize
        } else {
            0
        },
        placement: PlacementStrategy::by_name(r.text("allocation-strategy").unwrap_or("random")),
        strict_tenants: r.flag("enable-multi-tenants"),
        policy: PolicyKind::by_name(r.text("eviction-policy").unwrap_or("sieve")),
    }
}

pub(super) fn run(matches: &ArgMatches) -> Outcome {
    let resolved = settings::resolved(matches, SETTINGS)?;
    if settings::wants_print(matches) {
        settings::print_config(matches, &resolved)?;
        return Ok(ExitStatus::Ok);
    }
    serve::logging(&resolved, "mooncake-master");
    serve::runtime()?.block_on(serve_master(&resolved))
}

async fn serve_master(r: &Resolved) -> Outcome {
    let mut termination = serve::Termination::watch()?;
    if r.time("client-ttl", Duration::from_secs(1)) < Duration::from_secs(1) {
        let problem = "--client-ttl: nodes beat once a second, so it is at least 1s";
        return Err(super::UsageError(problem.to_owned()).into());
    }
    let token = serve::token(r.text("token-file"))?;
    let keys = ClusterKeys::derive(token.as_ref());
    let secured = token.is_some();
    let host = r.text("bind").unwrap_or("127.0.0.1");
    let wanted = serve::listen(host, r.integer("port") as u16)?;
    let listener = tokio::net::TcpListener::bind(wanted)
        .await
        .with_context(|| {
            format!("cannot listen on {wanted}: choose another --port or stop what holds it")
        })?;
    let address = listener.local_addr()?;
    let master = Master::new(config(r), keys);
    let lanes_max = r.integer("max-lanes") as usize;
    let mut objects = ClientConfig::new(&serve::reach(address).to_string());
    objects.token.clone_from(&token);
    let server = MasterServer::with_routes(master, lanes_max, rest::routes(objects))?;
    tokio::spawn(server.clone().serve(listener));
    metrics_listener(r, &server).await?;
    let published = publish_events(r, &server).await?;
    let node = match r.size("memory") {
        ByteSize(0) => None,
        memory => Some(embedded(r, &server, address, memory, token, lanes_max).await?),
    };
    let trust = serve::trust_line(address, secured);
    print::line(&format!(
        "mooncake master {} listening on {address} ({trust})",
        env!("CARGO_PKG_VERSION")
    ))?;
    if let Some(published) = published {
        print::line(&format!("kv events on tcp://{published} (no token there)"))?;
    }
    if let Some(node) = &node {
        print::line(&format!(
            "embedded node {} with {}",
            node.address(),
            r.size("memory")
        ))?;
    }
    if r.flag("enable-metric-reporting") {
        tokio::spawn(report(server.clone()));
    }
    termination.asked().await;
    tracing::info!("master stops");
    drop(node);
    Ok(ExitStatus::Ok)
}

async fn embedded(
    r: &Resolved,
    server: &std::sync::Arc<MasterServer>,
    master: std::net::SocketAddr,
    memory: ByteSize,
    token: Option<crate::base::trust::Token>,
    lanes_max: usize,
) -> anyhow::Result<Node> {
    let reach = serve::reach(master);
    let listen = std::net::SocketAddr::new(master.ip(), r.integer("node-port") as u16);
    let index = server.master().clone();
    let node = Node::start(NodeConfig {
        master: reach.to_string(),
        token,
        name: None,
        listen,
        advertise: r.text("advertise").map(str::to_owned),
        segments: vec![memory],
        memories: Vec::new(),
        port: None,
        populate: true,
        lanes_max,
        fabric: crate::engine::transport::rdma::select("auto", ""),
        commit: Some(Commit::new(move |client, arena, entry| {
            index.commit_written(client, arena, entry)
        })),
    })?;
    let ready = node
        .wait_for(
            crate::store::node::NodePhase::InService,
            Duration::from_secs(10),
        )
        .await;
    anyhow::ensure!(ready, "the embedded node did not register within 10 s");
    Ok(node)
}

/// Publishes events over ZeroMQ when asked to; returns where.
async fn publish_events(
    r: &Resolved,
    server: &std::sync::Arc<MasterServer>,
) -> anyhow::Result<Option<std::net::SocketAddr>> {
    let Some(endpoint) = r.text("kv-events-endpoint") else {
        return Ok(None);
    };
    let wrong = |problem: &str| super::UsageError(format!("--kv-events-endpoint: {problem}"));
    if !r.flag("kv-events") {
        return Err(wrong("needs --kv-events").into());
    }
    let parts = endpoint
        .strip_prefix("tcp://")
        .and_then(|rest| rest.rsplit_once(':'))
        .and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
    let Some((host, port)) = parts else {
        return Err(wrong(&format!("`{endpoint}` is not tcp://HOST:PORT")).into());
    };
    let host = if host == "*" { "0.0.0.0" } else { host };
    let config = KvEventsConfig {
        listen: serve::listen(host, port)?,
        backend_id: r.text("kv-events-backend-id").unwrap_or("").to_owned(),
        legacy: r.flag("kv-events-emit-legacy-compat"),
        object_key: r.flag("kv-events-emit-object-key"),
    };
    let published = server.master().publish_kv_events(config).await;
    let address =
        published.with_context(|| format!("cannot listen on {endpoint} (--kv-events-endpoint)"))?;
    Ok(Some(address))
}

async fn metrics_listener(
    r: &Resolved,
    server: &std::sync::Arc<MasterServer>,
) -> anyhow::Result<()> {
    let port = r.text("metrics-port").unwrap_or("off");
    if port == "off" {
        return Ok(());
    }
    let port: u16 = port.parse().map_err(|_| {
        super::UsageError(format!(
            "--metrics-port: `{port}` is neither a port nor `off`"
        ))
    })?;
    let address = serve::listen(r.text("metrics-host").unwrap_or("127.0.0.1"), port)?;
    match tokio::net::TcpListener::bind(address).await {
        Ok(listener) => {
            tokio::spawn(server.clone().serve(listener));
            Ok(())
        }
        Err(error) if r.is_set("metrics-port") => {
            Err(error).with_context(|| format!("cannot listen on {address} (--metrics-port)"))
        }
        Err(error) => {
            tracing::info!(%address, %error, "no second HTTP listener; set --metrics-port to another port or off");
            Ok(())
        }
    }
}

async fn report(server: std::sync::Arc<MasterServer>) {
    let mut tick = tokio::time::interval(Duration::from_secs(10));
    tick.tick().await;
    loop {
        tick.tick().await;
        let o = server.master().summary();
        tracing::info!(
            objects = o.objects,
            used = %ByteSize(o.used_bytes),
            capacity = %ByteSize(o.capacity_bytes),
            clients = o.clients,
            hits = o.hits,
            misses = o.misses,
            evicted = o.evicted_objects,
            "summary"
        );
    }
}
