//! `mooncake proxy`: the OpenAI-compatible front for prefill and decode instances.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{ArgAction, ArgMatches, Command};

use super::proxy_settings::SETTINGS;
use super::{ExitStatus, Outcome, UsageError, print, serve, settings};
use crate::base::config::Resolved;
use crate::base::net::split_host_port;
use crate::base::trust::Token;
use crate::proxy::config::{
    ConnectorKind, EventsRule, InstanceAddress, PolicyChoice, PrefillDown, ProxyConfig,
    UpstreamAuth,
};
use crate::proxy::discover::Discovery;
use crate::proxy::{Proxy, listen, policy};

const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

pub(super) fn command() -> Command {
    let command = Command::new("proxy")
        .about("Run an OpenAI-compatible front for prefill and decode instances (XpYd)")
        .after_help(
            "On SIGTERM no new connection is taken and requests under way end. On SIGHUP --config is read again:\n\
             instances named there come and go. /instances needs the key of --admin-key-file or ADMIN_API_KEY.",
        );
    let several =
        |arg: clap::Arg, short: char| arg.short(short).num_args(1..).action(ArgAction::Append);
    settings::add(command, SETTINGS)
        .mut_arg("model", |a| a.short('m'))
        .mut_arg("prefill", |a| several(a, 'p').value_name("INSTANCE"))
        .mut_arg("decode", |a| several(a, 'd').value_name("INSTANCE"))
}

pub(super) fn run(matches: &ArgMatches) -> Outcome {
    let resolved = settings::resolved(matches, SETTINGS)?;
    if settings::wants_print(matches) {
        settings::print_config(matches, &resolved)?;
        return Ok(ExitStatus::Ok);
    }
    serve::logging(&resolved, "mooncake-proxy");
    let config = config(&resolved)?;
    let threads = resolved.integer("threads") as usize;
    // One thread per core that shares nothing with others wakes nobody: cheaper than one runtime of several threads.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve_proxy(matches, &resolved, config, threads))
}

fn instances(r: &Resolved, name: &str) -> Result<Vec<InstanceAddress>, UsageError> {
    let ranks = r.integer("data-parallel-size") as u32;
    let named = InstanceAddress::parse_list(r.text(name).unwrap_or_default())
        .map_err(|e| UsageError(format!("--{name}: {e}")))?;
    Ok(named.iter().flat_map(|i| i.ranks(ranks)).collect())
}

fn policy_of(r: &Resolved, name: &str) -> Result<&'static str, UsageError> {
    let both = r.text("scheduling").unwrap_or("round_robin");
    let wanted = r.text(name).unwrap_or(both);
    policy::NAMES
        .iter()
        .find(|n| **n == wanted)
        .copied()
        .ok_or_else(|| {
            UsageError(format!(
                "--{name}: `{wanted}` is not one of {}",
                policy::NAMES.join(", ")
            ))
        })
}

/// The key of `/instances` requests: from a file, else `ADMIN_API_KEY`.
pub(super) fn admin_key(file: Option<&str>) -> anyhow::Result<Option<Token>> {
    if let Some(path) = file {
        let key = Token::read(std::path::Path::new(path));
        return Ok(Some(
            key.with_context(|| format!("cannot read the key file {path}"))?,
        ));
    }
    Ok(std::env::var("ADMIN_API_KEY")
        .ok()
        .and_then(|k| Token::new(&k)))
}

fn config(r: &Resolved) -> anyhow::Result<ProxyConfig> {
    let Some(model) = r.text("model") else {
        return Err(UsageError(
            "--model is missing: the model that the instances serve".to_owned(),
        )
        .into());
    };
    let own = std::env::var("OPENAI_API_KEY")
        .ok()
        .and_then(|k| Token::new(&k));
    let path = |name: &str| r.text(name).map(PathBuf::from);
    let time = |name: &str| r.time(name, SECOND).max(Duration::from_millis(1));
    let config = ProxyConfig {
        prefill: instances(r, "prefill")?,
        decode: instances(r, "decode")?,
        ranks: r.integer("data-parallel-size") as u32,
        connector: r.text("connector").and_then(ConnectorKind::parse),
        policy: PolicyChoice {
            prefill: policy_of(r, "prefill-scheduling")?,
            decode: policy_of(r, "decode-scheduling")?,
        },
        aggregated: r.flag("agg"),
        prefill_down: match r.text("prefill-down") {
            Some("decode") => PrefillDown::Decode,
            _ => PrefillDown::Refuse,
        },
        prefill_min_tokens: r.integer("prefill-min-tokens"),
        admin_key: admin_key(r.text("admin-key-file"))?,
        upstream_auth: match r.text("upstream-auth") {
            Some("env") => UpstreamAuth::Own(own),
            Some("none") => UpstreamAuth::Nothing,
            _ => UpstreamAuth::Passthrough(own),
        },
        prefill_timeout: time("prefill-timeout"),
        first_token_timeout: time("first-token-timeout"),
        idle_timeout: time("idle-timeout"),
        client_timeout: time("client-timeout"),
        queue_timeout: time("queue-timeout"),
        inflight_max: r.integer("max-inflight") as usize,
        queue_max: r.integer("max-queue") as usize,
        instance_max: r.integer("max-per-instance") as usize,
        connections_max: r.integer("max-connections") as usize,
        body_bytes_max: r.size("max-body").0 as usize,
        retries: r.integer("retries") as u32,
        health_interval: time("health-interval"),
        state_file: path("state-file"),
        access_log: path("access-log"),
        debug_headers: r.flag("debug-headers"),
        trust_kv_params: r.flag("trust-kv-params"),
        kv_events: EventsRule::parse_list(r.text("kv-events").unwrap_or_default())
            .map_err(|e| UsageError(format!("--kv-events: {e}")))?,
        resume: r.flag("continue"),
        early: r.flag("early-first-token"),
        handoffs_max: r.integer("max-handoffs") as usize,
        pair_handoffs_max: r.integer("max-handoffs-per-pair") as usize,
        discover: Discovery::parse_list(r.text("discover").unwrap_or_default())
            .map_err(|e| UsageError(format!("--discover: {e}")))?,
        master: r
            .text("master")
            .map(|m| split_host_port(m, 50_051))
            .transpose()
            .map_err(|e| UsageError(format!("--master: {e}")))?,
        master_token: serve::token(r.text("token-file"))?,
        tokenize: r.text("tokenize") != Some("off"),
        barrier: r.time("store-barrier", MILLISECOND),
        ..ProxyConfig::new(model)
    };
    check(r, &config)?;
    Ok(config)
}

fn check(r: &Resolved, config: &ProxyConfig) -> Result<(), UsageError> {
    if config.aggregated && !config.prefill.is_empty() {
        return Err(UsageError(
            "--agg goes without --prefill: name the instances with --decode".to_owned(),
        ));
    }
    if config.connector == Some(ConnectorKind::P2p) {
        let named = || config.prefill.iter().chain(&config.decode);
        if let Some(portless) = named().find(|i| i.bootstrap.is_none()) {
            return Err(UsageError(format!(
                "--connector p2p needs the KV port of every instance: write {portless}:KV_PORT"
            )));
        }
    }
    // Without an admin key nobody could ever add one.
    let may_come =
        config.admin_key.is_some() || r.text("state-file").is_some() || !config.discover.is_empty();
    let no_prefill = config.prefill.is_empty() && !config.aggregated;
    if (no_prefill || config.decode.is_empty()) && !may_come {
        return Err(UsageError(
            "at least one --prefill and one --decode instance are needed, or a key to add them later \
             (ADMIN_API_KEY), or --agg with --decode alone"
                .to_owned(),
        ));
    }
    Ok(())
}

async fn serve_proxy(
    matches: &ArgMatches,
    r: &Resolved,
    config: ProxyConfig,
    threads: usize,
) -> Outcome {
    let mut termination = serve::Termination::watch()?;
    let address = serve::listen(
        r.text("bind").unwrap_or("127.0.0.1"),
        r.integer("port") as u16,
    )?;
    let taken =
        || format!("cannot listen on {address}: choose another --port or stop what holds it");
    let listener = listen(address, threads > 1).with_context(taken)?;
    let address = listener.local_addr()?;
    let model = config.model.clone();
    if config.admin_key.is_none() {
        tracing::info!("/instances is closed: --admin-key-file or ADMIN_API_KEY opens it");
    }
    let proxy = Proxy::start(config).map_err(|e| UsageError(e.to_string()))?;
    for _ in 1..threads {
        serve_thread(&proxy, address)?;
    }
    print::line(&format!(
        "mooncake proxy {} for {model} listening on http://{address}",
        env!("CARGO_PKG_VERSION")
    ))?;
    let serving = tokio::spawn({
        let proxy = proxy.clone();
        async move { proxy.serve(listener).await }
    });
    tokio::select! {
        () = termination.asked() => {}
        () = reloads(matches, &proxy) => {}
    }
    tracing::info!("proxy stops");
    let drained = proxy.stop(r.time("drain-timeout", SECOND)).await;
    serving.abort();
    if !drained {
        tracing::warn!("some requests did not end in time");
    }
    Ok(ExitStatus::Ok)
}

/// A further thread with its own listener on the same port.
fn serve_thread(proxy: &Proxy, address: std::net::SocketAddr) -> anyhow::Result<()> {
    let proxy = proxy.clone();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let guard = runtime.enter();
    let listener = listen(address, true)?;
    drop(guard);
    std::thread::Builder::new()
        .name("proxy".to_owned())
        .spawn(move || {
            runtime.block_on(async move {
                proxy.serve(listener).await;
                // Requests under way end on this thread; the process ends when they have.
                std::future::pending::<()>().await;
            });
        })?;
    Ok(())
}

/// Reads the configuration again on every SIGHUP.
async fn reloads(matches: &ArgMatches, proxy: &Proxy) {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut hangups) = signal(SignalKind::hangup()) else {
        return std::future::pending().await;
    };
    while hangups.recv().await.is_some() {
        let read = || -> anyhow::Result<(Vec<InstanceAddress>, Vec<InstanceAddress>)> {
            let r = settings::resolved(matches, SETTINGS)?;
            Ok((instances(&r, "prefill")?, instances(&r, "decode")?))
        };
        match read() {
            Ok((prefill, decode)) => proxy.reload(&prefill, &decode),
            Err(error) => tracing::error!(error = %format!("{error:#}"), "not reloaded"),
        }
    }
}
