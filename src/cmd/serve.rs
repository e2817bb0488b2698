//! What `master` and `node` have in common: runtime, token, listeners, signals.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;

use super::{ExitStatus, UsageError};
use crate::base::config::Resolved;
use crate::base::telemetry::{self, LogFormat};
use crate::base::trace;
use crate::base::trust::Token;
use crate::store::node::Farewell;

/// The cluster token: `--token-file`, else `MOONCAKE_TOKEN`.
pub(crate) fn token(file: Option<&str>) -> anyhow::Result<Option<Token>> {
    if let Some(path) = file {
        let token = Token::read(Path::new(path))
            .with_context(|| format!("cannot read the token file {path}"))?;
        return Ok(Some(token));
    }
    Ok(std::env::var("MOONCAKE_TOKEN")
        .ok()
        .and_then(|t| Token::new(&t)))
}

/// Sets up logging as configured, and traces if the environment asks for them.
pub(crate) fn logging(resolved: &Resolved, service: &str) {
    let format = match resolved.text("log-format") {
        Some("json") => LogFormat::Json,
        _ => LogFormat::Text,
    };
    telemetry::init(format, "info");
    trace::init(service);
}

/// An address to listen on.
pub(crate) fn listen(host: &str, port: u16) -> anyhow::Result<SocketAddr> {
    let text = crate::base::net::join_host_port(host.trim_matches(['[', ']']), port);
    let address = crate::base::net::resolve_one(&text)
        .map_err(|e| UsageError(format!("--bind {host}: {e}")))?;
    Ok(address)
}

/// Under which address a listener is reached from this host.
pub(crate) fn reach(mut listener: SocketAddr) -> SocketAddr {
    if listener.ip().is_unspecified() {
        listener.set_ip(if listener.is_ipv4() {
            std::net::Ipv4Addr::LOCALHOST.into()
        } else {
            std::net::Ipv6Addr::LOCALHOST.into()
        });
    }
    listener
}

/// Says who may connect: part of the start line.
pub(crate) fn trust_line(address: SocketAddr, secured: bool) -> String {
    match (secured, address.ip().is_loopback()) {
        (true, _) => "token required".to_owned(),
        (false, true) => "no token, loopback only".to_owned(),
        (false, false) => {
            "NO TOKEN: anybody who reaches this address can read and write the pool".to_owned()
        }
    }
}

/// The runtime of a server process: few workers, since data and control lanes have threads of their own.
pub(crate) fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(
            std::thread::available_parallelism()
                .map_or(2, usize::from)
                .clamp(2, 4),
        )
        .enable_all()
        .build()
}

/// How long a node that moves nothing (more) may take to leave.
pub(crate) const LEAVE_PATIENCE: Duration = Duration::from_secs(10);

/// Says what became of the objects of a node that has left.
pub(crate) fn left(farewell: &Farewell) -> ExitStatus {
    if !farewell.confirmed {
        tracing::warn!(
            "the master did not confirm in time; it unmounts this node when its silence has lasted client-ttl"
        );
        return ExitStatus::Unreachable;
    }
    if farewell.left_objects > 0 {
        tracing::warn!(
            objects = farewell.left_objects,
            "unmounted; objects that lay only here are gone: no room elsewhere, or no time (--drain-timeout)"
        );
    }
    tracing::info!(
        moved_objects = farewell.moved_objects,
        moved_bytes = farewell.moved_bytes,
        "unmounted"
    );
    ExitStatus::Ok
}

/// SIGTERM and SIGINT, caught from `watch` on: made before a server says that it is there, so that whoever
/// stops it as soon as it has spoken gets a clean end.
pub(crate) struct Termination {
    term: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
}

impl Termination {
    /// Fails when the system has no room for a handler.
    pub(crate) fn watch() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for the next of them. Cancel-safe.
    pub(crate) async fn asked(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}
