//! How the pool commands find and reach the master.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Arg, ArgMatches, Command};

use super::print::Output;
use super::{UsageError, serve, settings};
use crate::base::mooncake_json::MooncakeJson;
use crate::base::telemetry::{self, LogFormat};
use crate::base::trace;
use crate::base::units::parse_duration;
use crate::engine::transport::{TransportKind, rdma};
use crate::store::client::{ClientConfig, PoolClient};

/// The flags that say which pool: `--master`, `--config`, `--token-file`.
pub(super) fn place() -> [Arg; 3] {
    [
        Arg::new("master")
            .long("master")
            .value_name("HOST:PORT")
            .help("Master [default: from mooncake.json or MOONCAKE_MASTER, else 127.0.0.1:50051]"),
        Arg::new("config")
            .long("config")
            .value_name("FILE")
            .value_parser(clap::value_parser!(PathBuf))
            .help("mooncake.json [default: MOONCAKE_CONFIG_PATH, else ./mooncake.json if it is there]"),
        Arg::new("token-file")
            .long("token-file")
            .value_name("FILE")
            .help("File with the cluster token (or MOONCAKE_TOKEN)"),
    ]
}

/// Adds the flags every pool command has.
pub(super) fn add(command: Command) -> Command {
    command
        .next_help_heading("Connection")
        .args(place())
        .arg(
            Arg::new("tenant").long("tenant").value_name("NAME").help(
                "Namespace of the keys [default: tenant_id of mooncake.json, else `default`]",
            ),
        )
        .arg(
            Arg::new("transport")
                .long("transport")
                .value_name("NAME")
                .value_parser(["shm", "rdma", "tcp"])
                .help("Use only this transport for data; rdma: TCP where RDMA fails"),
        )
        .arg(
            Arg::new("timeout")
                .long("timeout")
                .value_name("TIME")
                .default_value("30s")
                .help("Bound of one operation; a bare number is seconds"),
        )
        .arg(settings::output())
}

/// Output format asked for.
pub(super) fn output(matches: &ArgMatches) -> Output {
    matches.get_one("output").copied().unwrap_or(Output::Text)
}

/// The client's configuration as files, variables and flags say.
pub(super) fn config(matches: &ArgMatches) -> anyhow::Result<ClientConfig> {
    telemetry::init(LogFormat::Text, "warn");
    trace::init("mooncake-client");
    let given = |name: &str| matches.get_one::<String>(name).map(String::as_str);
    let file = matches.get_one::<PathBuf>("config");
    let json = MooncakeJson::find(file.map(PathBuf::as_path), |n| std::env::var(n).ok())?;
    let master = given("master")
        .map(str::to_owned)
        .or(json.master_server_address)
        .unwrap_or_else(|| "127.0.0.1:50051".to_owned());
    let timeout = given("timeout").unwrap_or("30s");
    let timeout = parse_duration(timeout, Duration::from_secs(1))
        .map_err(|e| UsageError(format!("--timeout: {e}")))?;
    if timeout < Duration::from_millis(1) {
        return Err(UsageError("--timeout: must be at least 1ms".to_owned()).into());
    }
    let mut config = ClientConfig::new(&master);
    config.token = serve::token(given("token-file"))?;
    config.tenant = given("tenant").unwrap_or(&json.tenant_id).to_owned();
    config.timeout = timeout;
    // A person is waiting: a master that is not there is said at once, one that restarts is waited for.
    config.master_patience = Duration::from_millis(500).min(timeout);
    config.checksum = true;
    match given("transport") {
        Some("shm") => config.transports = vec![TransportKind::Shm],
        Some("rdma") => {
            config.transports = vec![TransportKind::Rdma, TransportKind::Tcp];
            config.fabric = rdma::select("rdma", &json.device_name);
        }
        Some(_) => config.transports = vec![TransportKind::Tcp],
        None => config.fabric = rdma::select(&json.protocol, &json.device_name),
    }
    Ok(config)
}

/// Opens a client.
pub(super) fn client(matches: &ArgMatches) -> anyhow::Result<PoolClient> {
    Ok(PoolClient::open(config(matches)?)?)
}
