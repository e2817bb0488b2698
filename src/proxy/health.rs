//! Is an instance there, does it serve our model, and how does it hand KV over?
//!
//! Owns a task per instance that asks `GET /health` and, after a start or restart, `/v1/models` and the bootstrap server.
//! Never asks for tokens: a decode instance without KV to fetch must not be made to compute. Judging answers to real
//! requests is the breaker's.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use super::App;
use super::config::{ConnectorKind, Role, last_part};
use super::connector::{mooncake, sglang};
use super::http::upstream::{ConnPool, LegError};
use super::load;
use super::policy;
use super::registry::{Health, Instance};
use super::role;

/// Failures in a row until an instance is down.
const DOWN_AFTER: u32 = 3;
/// Successes in a row until it is up again.
const UP_AFTER: u32 = 2;
/// Questions whether it is SGLang that may go without an answer before an instance is used nevertheless.
const UNANSWERED_MAX: u32 = 3;
/// Bound of one question.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// Largest answer that is read.
const ANSWER_MAX: usize = 1 << 20;

/// Why an instance was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProbeError {
    #[error("{0}")]
    Leg(#[from] LegError),
    #[error("HTTP {0} from {1}")]
    Status(u16, &'static str),
    #[error("no list of models")]
    NoModels,
    #[error("serves {0}")]
    OtherModel(String),
    #[error("says that it is {0}")]
    OtherRole(&'static str),
}

impl ProbeError {
    /// What an instance is that answers, and with which nothing can be done.
    fn wrong(&self) -> Option<Health> {
        match self {
            Self::NoModels | Self::OtherModel(_) | Self::Status(_, "/v1/models") => {
                Some(Health::Wrong)
            }
            Self::OtherRole(_) => Some(Health::WrongRole),
            _ => None,
        }
    }
}

/// A GET outside the instance's pool of connections: a probe must not find a dead connection, nor leave one.
async fn get(app: &App, target: &(String, u16), path: &str) -> Result<(u16, Vec<u8>), LegError> {
    ask(app, target, "GET", path, Bytes::new(), PROBE_TIMEOUT).await
}

/// The same with a method and a body.
pub(crate) async fn ask(
    app: &App,
    target: &(String, u16),
    method: &str,
    path: &str,
    body: Bytes,
    within: Duration,
) -> Result<(u16, Vec<u8>), LegError> {
    let name = crate::base::net::join_host_port(&target.0, target.1);
    let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {name}\r\nconnection: close\r\n");
    if !body.is_empty() {
        let length = body.len();
        head.push_str(&format!(
            "content-type: application/json\r\ncontent-length: {length}\r\n"
        ));
    }
    if let Some(token) = app.config.upstream_auth.own() {
        head.push_str("authorization: ");
        head.push_str(&token.bearer());
        head.push_str("\r\n");
    }
    head.push_str("\r\n");
    let asking = async {
        let body = [body];
        let (mut conn, mut reply) = ConnPool::default()
            .ask(target, head.as_bytes(), &body, false)
            .await?;
        let mut kept = Vec::new();
        conn.read_body(&mut reply.body, &mut kept, ANSWER_MAX)
            .await?;
        Ok((reply.status, kept))
    };
    timeout(within, asking)
        .await
        .unwrap_or(Err(LegError::Timeout))
}

/// Whether two names mean the same model: equal, or equal after the last `/` as the demo proxy has it.
pub(crate) fn same_model(wanted: &str, listed: &str) -> bool {
    wanted == listed || last_part(wanted) == last_part(listed)
}

/// What a server serves.
pub(crate) struct Served {
    pub(crate) models: Vec<String>,
    /// `max_model_len` of our model; 0 = not told.
    pub(crate) model_len: u64,
    /// Where its weights come from (vLLM's `root`): what keys of the pool name it by.
    pub(crate) root: Option<String>,
}

/// Asks an instance which models it serves.
pub(crate) async fn check_models(app: &App, instance: &Instance) -> Result<(), ProbeError> {
    let served = models(app, &instance.target).await?;
    *instance.models.write() = served.models;
    instance
        .model_len
        .store(served.model_len, Ordering::Relaxed);
    *instance.root.write() = served.root;
    name_pool_model(app, instance);
    Ok(())
}

/// The models of a server, if ours is among them.
pub(crate) async fn models(app: &App, target: &(String, u16)) -> Result<Served, ProbeError> {
    let (status, body) = get(app, target, "/v1/models").await?;
    if status != 200 {
        return Err(ProbeError::Status(status, "/v1/models"));
    }
    let list: serde_json::Value =
        serde_json::from_slice(&body).map_err(|_| ProbeError::NoModels)?;
    let data = list.get("data").and_then(|d| d.as_array());
    let data = data.ok_or(ProbeError::NoModels)?;
    let id = |m: &serde_json::Value| m.get("id")?.as_str().map(str::to_owned);
    let models: Vec<String> = data.iter().filter_map(id).take(1024).collect();
    let ours = data
        .iter()
        .find(|m| id(m).is_some_and(|id| same_model(&app.config.model, &id)));
    let Some(ours) = ours else {
        return Err(models.first().map_or(ProbeError::NoModels, |id| {
            ProbeError::OtherModel(id.chars().take(128).collect())
        }));
    };
    let length = ours
        .get("max_model_len")
        .and_then(serde_json::Value::as_u64);
    Ok(Served {
        models,
        model_len: length.unwrap_or(0),
        root: root(ours),
    })
}

/// The path of a model's weights, as an entry of `/v1/models` tells it.
fn root(entry: &serde_json::Value) -> Option<String> {
    let root = entry.get("root")?.as_str()?;
    (!root.is_empty() && root.len() <= 1024).then(|| root.to_owned())
}

/// Which model the pool's keys name: what the first of the instances says, as all that share a pool must agree.
fn name_pool_model(app: &App, instance: &Instance) {
    let all = app.registry.all();
    let told = all
        .iter()
        .find_map(|i| Some((i.name.clone(), i.root.read().clone()?)));
    let Some((first, root)) = told else {
        return;
    };
    app.kv.set_model(last_part(&root));
    let own = instance.root.read().clone().unwrap_or_default();
    if !own.is_empty() && last_part(&own) != last_part(&root) {
        tracing::warn!(%first, %root, instance = %instance.name, root_here = %own, "instances have their model from different places: of the pool's keys only the first one's count");
    }
}

/// Reads an instance's own gauges: what it runs beyond this proxy's requests.
async fn read_gauges(app: &App, instance: &Instance) {
    if instance.has_no_gauges.load(Ordering::Relaxed) || !policy::weighs_load(app) {
        return;
    }
    let own = instance.inflight_all() as f64;
    let page = match get(app, &instance.target, "/metrics").await {
        Ok((200, page)) => page,
        Ok(_) => return instance.has_no_gauges.store(true, Ordering::Relaxed),
        Err(_) => return,
    };
    // Requests that came or went while the page was made are no others'.
    let own = own.max(instance.inflight_all() as f64);
    let gauges = load::gauges(&String::from_utf8_lossy(&page), instance.address.rank);
    let others = gauges.requests.map_or(0.0, |r| (r - own).max(0.0));
    instance.others.store(others as u64, Ordering::Relaxed);
    let usage = gauges.kv_usage.unwrap_or(0.0).min(1.0);
    instance
        .kv_usage
        .store((usage * 1000.0) as u64, Ordering::Relaxed);
    let cache = gauges.cache_tokens.unwrap_or(0);
    instance.cache_tokens.store(cache, Ordering::Relaxed);
}

async fn is_alive(app: &App, instance: &Instance) -> Result<(), ProbeError> {
    match get(app, &instance.target, "/health").await? {
        // Servers without /health are judged by their models.
        (200..=299 | 404 | 405, _) => Ok(()),
        (status, _) => Err(ProbeError::Status(status, "/health")),
    }
}

/// Looks for a bootstrap server: told port, else the usual one when no other prefill instance shares the host.
pub(crate) async fn find_bootstrap(app: &App, instance: &Instance) {
    let told = app
        .config
        .connector
        .is_some_and(|c| c != ConnectorKind::Mooncake);
    let (known, generation) = {
        let link = instance.link.read();
        (link.kind, link.generation)
    };
    if told
        || !instance.role().does(Role::Prefill)
        || !matches!(known, None | Some(ConnectorKind::Mooncake))
    {
        return;
    }
    let all = app.registry.all();
    let alone = !all.iter().any(|other| {
        other.number != instance.number
            && other.role().does(Role::Prefill)
            && other.address.host == instance.address.host
            && !other.address.is_same_server(&instance.address)
    });
    let port = match instance.address.bootstrap {
        Some(port) => port,
        None if alone => mooncake::BOOTSTRAP_PORT,
        None => return,
    };
    let target = (instance.address.host.clone(), port);
    let Ok((200, body)) = get(app, &target, "/query").await else {
        return;
    };
    let Some(engines) = mooncake::engines(&body) else {
        return;
    };
    let mut link = instance.link.write();
    if link.generation != generation {
        return;
    }
    // The same engine may have been out of reach for a while: its kind was forgotten then.
    if link.engines.as_ref() != engines.as_slice() || link.kind.is_none() {
        tracing::info!(instance = %instance.name, engines = engines.len(), "engine ids read from the bootstrap server");
        link.engines = engines.into();
        link.bootstrap_port = port;
        link.kind = Some(ConnectorKind::Mooncake);
    }
}

/// Whether it is an SGLang server, of the role it is used for, and where its bootstrap server is. Asked until it is answered: without an answer
/// the first requests would take it for another's, and be lost there. Who gives none three times is used meanwhile.
async fn find_sglang(app: &App, instance: &Instance) -> Result<(), ProbeError> {
    let link = instance.link.read().clone();
    let told_other = link.told && link.kind != Some(ConnectorKind::Sglang);
    if link.is_asked || told_other {
        return Ok(());
    }
    let asked = server_info(app, &instance.target).await;
    let generation = link.generation;
    let mut link = instance.link.write();
    if link.generation != generation {
        return Ok(());
    }
    let info = match asked {
        Ok(info) => info,
        Err(error) => {
            link.unanswered += 1;
            return if link.unanswered < UNANSWERED_MAX {
                Err(error)
            } else {
                Ok(())
            };
        }
    };
    let role = instance.role();
    let own = info.as_deref().and_then(sglang::role);
    if let Some(own) = own.filter(|own| *own != Role::Both && !role.does(*own)) {
        return Err(ProbeError::OtherRole(own.name()));
    }
    link.is_asked = true;
    let Some(server) = info.and_then(|info| sglang::server(&info)) else {
        return Ok(());
    };
    if link.kind != Some(ConnectorKind::Sglang) {
        tracing::info!(instance = %instance.name, "an SGLang prefill server");
    }
    link.kind = Some(ConnectorKind::Sglang);
    link.bootstrap_port = instance.address.bootstrap.unwrap_or(server.bootstrap_port);
    link.ranks = server.ranks;
    Ok(())
}

/// What an SGLang server says of itself; `None`: it is none.
///
/// # Errors
/// When it is not known whether it is one: it did not answer, or with a fault.
pub(crate) async fn server_info(
    app: &App,
    target: &(String, u16),
) -> Result<Option<Vec<u8>>, ProbeError> {
    for path in ["/server_info", "/get_server_info"] {
        match get(app, target, path).await? {
            (200, body) => return Ok(Some(body)),
            (status @ (500 | 502..), _) => return Err(ProbeError::Status(status, path)),
            _ => {}
        }
    }
    Ok(None)
}

/// Whatever is known about an instance belongs to a process that has gone.
pub(crate) fn forget(app: &App, instance: &Instance) {
    instance.pace.forget();
    instance.links.forget();
    instance.pool.clear();
    let told = app.config.connector;
    let mut link = instance.link.write();
    if told.is_none() && !link.told {
        link.before = link.kind.take().or(link.before);
    }
    link.generation += 1;
    (link.is_asked, link.unanswered) = (false, 0);
    drop(link);
    instance.is_mute.store(false, Ordering::Relaxed);
    instance.has_no_gauges.store(false, Ordering::Relaxed);
    instance.tells_cached.store(false, Ordering::Relaxed);
    instance.others.store(0, Ordering::Relaxed);
    app.forget_cache(instance.number);
}

async fn check(app: &App, instance: &Instance) -> Result<(), ProbeError> {
    instance.pool.prune();
    is_alive(app, instance).await?;
    if instance.health() != Health::Up {
        check_models(app, instance).await?;
    }
    find_sglang(app, instance).await?;
    find_bootstrap(app, instance).await;
    read_gauges(app, instance).await;
    Ok(())
}

fn set(app: &App, instance: &Instance, health: Health) {
    if instance.health() == health {
        return;
    }
    tracing::info!(instance = %instance.name, role = instance.role().name(), health = health.name(), "instance changed");
    instance.set_health(health);
    app.registry.changed.notify_waiters();
}

/// Watches an instance until it is removed.
pub(crate) async fn watch(app: Arc<App>, instance: Arc<Instance>) {
    let (mut good, mut bad) = (0, 0);
    loop {
        let result = check(&app, &instance).await;
        if !app.has(&instance) {
            return;
        }
        match result {
            Ok(()) => {
                good += 1;
                bad = 0;
                let first = matches!(
                    instance.health(),
                    Health::Unknown | Health::Wrong | Health::WrongRole
                );
                if instance.health() != Health::Up && (first || good >= UP_AFTER) {
                    instance.breaker.reset();
                    set(&app, &instance, Health::Up);
                }
            }
            Err(error) => {
                good = 0;
                bad += 1;
                instance.note(&error);
                if matches!(error, ProbeError::Leg(LegError::Connect(_))) || bad >= DOWN_AFTER {
                    instance.has_ended();
                }
                if let Some(wrong) = error.wrong() {
                    if instance.health() != wrong {
                        tracing::warn!(instance = %instance.name, %error, health = wrong.name(), "not used");
                        set(&app, &instance, wrong);
                    }
                } else if instance.health() != Health::Up || bad >= DOWN_AFTER {
                    if instance.health() == Health::Up {
                        forget(&app, &instance);
                    }
                    set(&app, &instance, Health::Down);
                }
            }
        }
        role::look_again(&app, &instance).await;
        // A tenth of jitter: checks of many proxies do not fall on one moment.
        let interval = app.config.health_interval;
        let pause = if instance.health() == Health::Up || bad > 10 {
            interval
        } else {
            interval / 4
        };
        let jitter = pause.mul_f64(0.1 * rand::random::<f64>());
        tokio::select! {
            () = tokio::time::sleep(pause + jitter) => {}
            () = app.stopping() => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::same_model;

    #[test]
    fn model_names() {
        assert!(same_model("/models/Qwen/Qwen3-8B/", "Qwen3-8B"));
        assert!(same_model("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"));
        assert!(!same_model("Qwen3-8B", "Qwen3-14B"));
    }
}
