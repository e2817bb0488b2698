//! What the proxy answers itself: status, health, metrics, and changes of the instances.
//!
//! Owns the paths, the texts of the demo proxy and the check of the key (constant time; never logged, wrong ones neither).
//! Refuses to know how requests are routed.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};

use super::App;
use super::address::RANKS_MAX;
use super::config::{ConnectorKind, EventsAddress, EventsRule, InstanceAddress, Role};
use super::health;
use super::http::head::RequestHead;
use super::kv::conductor::ConductorError;
use super::kv::index::POOL;
use super::metrics;
use super::registry::{Candidates, Instance, NewInstance, Origin};
use super::reply::LocalReply;
use super::role::{self, RoleError};
use crate::base::clock::Millis;

/// Answers if the path is one of the proxy's own.
pub(crate) async fn answer(app: &Arc<App>, head: &RequestHead, body: &[u8]) -> Option<LocalReply> {
    let path = head.path();
    let is_read = matches!(head.method.as_str(), "GET" | "HEAD");
    let read = |reply: LocalReply| {
        if is_read {
            reply
        } else {
            LocalReply::not_allowed("GET, HEAD")
        }
    };
    Some(match path {
        "/status" => read(LocalReply::json(200, &status(app))),
        "/health" | "/ping" => read(LocalReply::json(200, &json!({"status": "ok"}))),
        "/healthcheck" => read(LocalReply::json(200, &healthcheck(app))),
        "/ready" => read(ready(app)),
        "/metrics" => read(LocalReply::text(
            200,
            "text/plain; version=0.0.4; charset=utf-8",
            metrics::page(app),
        )),
        "/instances" => match authorized(app, head) {
            Err(reply) => reply,
            Ok(()) => read(LocalReply::json(200, &list(app))),
        },
        "/instances/add" | "/instances/remove" | "/instances/drain" | "/instances/role" => {
            if head.method != "POST" {
                return Some(LocalReply::not_allowed("POST"));
            }
            match authorized(app, head).and_then(|()| parse(body)) {
                Err(reply) => reply,
                Ok(request) => change(app, path, &request).await.unwrap_or_else(|e| e),
            }
        }
        "/register" | "/unregister" | "/query" | "/query_by_hash" => {
            if head.method != "POST" {
                return Some(LocalReply::not_allowed("POST"));
            }
            match authorized(app, head).and_then(|()| parse(body)) {
                Err(reply) => reply,
                Ok(request) => conduct(app, path, &request),
            }
        }
        _ => return None,
    })
}

/// The Conductor's API.
fn conduct(app: &Arc<App>, path: &str, request: &Value) -> LocalReply {
    let conductor = &app.kv.conductor;
    let done = match path {
        "/register" => conductor.register(app, request),
        "/unregister" => conductor.unregister(request),
        "/query" => conductor.query(request),
        _ => conductor.query_by_hash(request),
    };
    match done {
        Ok(value) => LocalReply::json(200, &value),
        Err(error) => {
            let status = match error {
                ConductorError::Field(_) => 400,
                ConductorError::Unknown => 404,
                ConductorError::Full => 503,
            };
            LocalReply::detail(status, &error.to_string())
        }
    }
}

fn authorized(app: &App, head: &RequestHead) -> Result<(), LocalReply> {
    let Some(keys) = &app.admin_keys else {
        return Err(LocalReply::detail(500, "Server configuration error."));
    };
    let bearer = match head.headers.get("x-api-key") {
        Some(key) => [b"Bearer ", key].concat(),
        None => head
            .headers
            .get("authorization")
            .map(<[u8]>::to_vec)
            .ok_or_else(|| LocalReply::detail(422, "The header X-API-Key is missing."))?,
    };
    if keys.bearer_matches(Some(&bearer)) {
        Ok(())
    } else {
        tracing::warn!("an admin request came with a wrong key");
        Err(LocalReply::detail(403, "Forbidden: Invalid API Key."))
    }
}

fn parse(body: &[u8]) -> Result<Value, LocalReply> {
    match serde_json::from_slice(body) {
        Ok(value @ Value::Object(_)) => Ok(value),
        _ => Err(LocalReply::detail(400, "The body is not a JSON object.")),
    }
}

fn text<'a>(request: &'a Value, name: &str) -> &'a str {
    request
        .get(name)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

fn address(request: &Value) -> Result<InstanceAddress, LocalReply> {
    let given = text(request, "instance");
    if !given.contains(':') {
        return Err(LocalReply::detail(400, "Invalid instance format."));
    }
    let mut address = InstanceAddress::parse(given)
        .map_err(|_| LocalReply::detail(400, "Invalid instance address."))?;
    if let Some(port) = request.get("bootstrap_port").filter(|p| !p.is_null()) {
        let port = port
            .as_u64()
            .and_then(|p| u16::try_from(p).ok())
            .filter(|p| *p > 0);
        let port = port.ok_or_else(|| LocalReply::detail(400, "Invalid bootstrap port."))?;
        address.bootstrap = Some(port);
    }
    Ok(address)
}

/// `kv_events` of a request: an endpoint, or an object as vLLM's `--kv-events-config` has it.
pub(crate) fn read_events(value: Option<&Value>, host: &str) -> Option<EventsAddress> {
    let value = value?;
    if let Some(endpoint) = value.as_str() {
        return EventsAddress::parse(endpoint, None, host);
    }
    let replay = value.get("replay_endpoint").and_then(Value::as_str);
    let mut events = EventsAddress::parse(text(value, "endpoint"), replay, host)?;
    events.topic = text(value, "topic").chars().take(256).collect();
    Some(events)
}

/// The instances a request names, and how it does: one, or all ranks of a server.
fn known(app: &App, request: &Value) -> Result<(Candidates, String), LocalReply> {
    let address = address(request)?;
    let found = app.registry.named(&address);
    if found.is_empty() {
        return Err(LocalReply::detail(404, "No such instance."));
    }
    Ok((found, address.to_string()))
}

fn deadline(request: &Value) -> Result<Duration, LocalReply> {
    let seconds = request.get("deadline_s").map_or(Some(60.0), Value::as_f64);
    let seconds = seconds.filter(|s| (0.0..=86_400.0).contains(s));
    let seconds = seconds.ok_or_else(|| LocalReply::detail(400, "Invalid deadline."))?;
    Ok(Duration::from_secs_f64(seconds))
}

async fn change(app: &Arc<App>, path: &str, request: &Value) -> Result<LocalReply, LocalReply> {
    match path {
        "/instances/add" => add(app, request).await,
        "/instances/remove" => {
            let (found, name) = known(app, request)?;
            found.iter().for_each(|i| app.remove(i));
            let inflight: usize = found.iter().map(|i| i.inflight_all()).sum();
            let text = format!("Removed {name}.");
            Ok(LocalReply::json(
                200,
                &json!({"message": text, "inflight": inflight}),
            ))
        }
        "/instances/drain" => {
            let (found, name) = known(app, request)?;
            let deadline = deadline(request)?;
            found.iter().for_each(|i| drain(app, i, deadline));
            let inflight: usize = found.iter().map(|i| i.inflight_all()).sum();
            let text = format!("Draining {name}.");
            Ok(LocalReply::json(
                202,
                &json!({"message": text, "inflight": inflight}),
            ))
        }
        _ => {
            let (found, name) = known(app, request)?;
            let wanted = Role::parse(text(request, "role"));
            let wanted = wanted.ok_or_else(|| LocalReply::detail(400, "Invalid role."))?;
            let told = role::change(app, &found, wanted, deadline(request)?).await;
            let told = told.map_err(|error| {
                let status = match error {
                    RoleError::Both | RoleError::Rank => 400,
                    RoleError::Underway | RoleError::Busy(_) | RoleError::Refused(_) => 409,
                    RoleError::Unasked(_) | RoleError::Broken(_) => 502,
                    RoleError::Unknown(_) => 504,
                };
                LocalReply::detail(status, &error.to_string())
            })?;
            let text = format!("{name} is {} now.", wanted.name());
            Ok(LocalReply::json(
                200,
                &json!({"message": text, "engine_switched": told}),
            ))
        }
    }
}

async fn add(app: &Arc<App>, request: &Value) -> Result<LocalReply, LocalReply> {
    let bad = |text: &str| LocalReply::detail(400, text);
    let kind = if text(request, "type").is_empty() {
        text(request, "role")
    } else {
        text(request, "type")
    };
    let role = Role::parse(kind).ok_or_else(|| bad("Invalid instance type."))?;
    let address = address(request)?;
    let model = text(request, "model");
    if !model.is_empty() && !health::same_model(&app.config.model, model) {
        return Err(bad("Instance validation failed."));
    }
    let weight = request.get("weight").map_or(Some(1.0), Value::as_f64);
    let weight = weight
        .filter(|w| (0.001..=1000.0).contains(w))
        .ok_or_else(|| bad("Invalid weight."))?;
    let connector = match text(request, "connector") {
        "" | "auto" => app.config.connector,
        word => Some(ConnectorKind::parse(word).ok_or_else(|| bad("Invalid connector."))?),
    };
    if connector == Some(ConnectorKind::P2p) && address.bootstrap.is_none() {
        return Err(bad("Invalid bootstrap port."));
    }
    let ranks = request
        .get("data_parallel_size")
        .map_or(Some(u64::from(app.config.ranks)), Value::as_u64);
    let ranks = ranks.and_then(|n| u32::try_from(n).ok());
    let ranks = ranks.filter(|n| (1..=RANKS_MAX).contains(n));
    let ranks = ranks.ok_or_else(|| bad("Invalid data_parallel_size."))?;
    let addresses = address.ranks(ranks);
    let there = |a: &InstanceAddress| {
        let found = app.registry.find(a);
        found.is_some_and(|i| i.role().does(role))
    };
    if addresses.iter().any(there) {
        return Err(bad("Instance already exists."));
    }
    let target = (address.host.clone(), address.port);
    let served = match health::models(app, &target).await {
        Ok(served) => served,
        Err(error) => {
            tracing::info!(instance = %address, %error, "not added");
            return Err(bad("Instance validation failed."));
        }
    };
    let others = app.registry.all();
    let longest = others
        .iter()
        .map(|i| i.model_len.load(Ordering::Relaxed))
        .max();
    if served.model_len > 0 && longest.is_some_and(|l| l > served.model_len) {
        tracing::info!(instance = %address, max_model_len = served.model_len, others = longest, "not added: it takes shorter prompts");
        return Err(bad("Instance validation failed."));
    }
    let given = request.get("kv_events").filter(|e| !e.is_null());
    let events_of = |rank: &InstanceAddress| match given {
        None => Ok(EventsRule::of(&app.config.kv_events, rank)),
        Some(_) => read_events(given, &rank.host)
            .and_then(|e| e.of_rank(rank.rank))
            .map(Some)
            .ok_or_else(|| bad("Invalid kv_events.")),
    };
    let events: Vec<_> = addresses.iter().map(events_of).collect::<Result<_, _>>()?;
    for (address, events) in addresses.into_iter().zip(events) {
        let new = NewInstance {
            address,
            role,
            weight,
            group: text(request, "group").chars().take(128).collect(),
            connector,
            origin: Origin::Added,
            events,
        };
        app.add(new).map_err(|e| bad(&e.to_string()))?;
    }
    Ok(LocalReply::json(
        200,
        &json!({"message": format!("Added {address} to {}_instances.", role.name())}),
    ))
}

/// Sends nobody there any more and takes the instance out when it is idle, or at the deadline. The last deadline counts.
fn drain(app: &Arc<App>, instance: &Arc<Instance>, deadline: Duration) {
    instance.set_draining(true);
    app.changed();
    let end = tokio::time::Instant::now() + deadline;
    if instance.drained_by.lock().replace(end).is_some() {
        return;
    }
    let (app, instance) = (app.clone(), instance.clone());
    tokio::spawn(async move {
        let is_late = || {
            let end = *instance.drained_by.lock();
            end.is_none_or(|end| tokio::time::Instant::now() >= end)
        };
        // A hand-off needs what prefill computed until decode has it.
        let busy = || instance.inflight_all() + app.handoffs.of(instance.number);
        while busy() > 0 && app.has(&instance) && !is_late() {
            let changed = app.registry.changed.notified();
            // Looked at again now and then: a leg may have ended just before.
            let _ = tokio::time::timeout(Duration::from_millis(200), changed).await;
        }
        tracing::info!(instance = %instance.name, left = instance.inflight_all(), "drained");
        app.remove(&instance);
    });
}

fn names(app: &App, role: Role) -> Vec<String> {
    let all = app.registry.all();
    all.iter()
        .filter(|i| i.role().does(role))
        .map(|i| i.name.clone())
        .collect()
}

fn status(app: &App) -> Value {
    let (prefill, decode) = (names(app, Role::Prefill), names(app, Role::Decode));
    let barrier = if app.config.barrier.is_zero() {
        "off"
    } else if app.kv.has_pool() {
        "on"
    } else {
        "no source"
    };
    json!({
        "store_barrier": barrier,
        "prefill_node_count": prefill.len(),
        "decode_node_count": decode.len(),
        "prefill_nodes": prefill,
        "decode_nodes": decode,
    })
}

fn healthcheck(app: &App) -> Value {
    let (prefill, decode) = (names(app, Role::Prefill), names(app, Role::Decode));
    json!({"status": "ok", "prefill_instances": prefill.len(), "decode_instances": decode.len()})
}

fn ready(app: &App) -> LocalReply {
    let prefill = app.config.aggregated || app.registry.serves(Role::Prefill);
    let decode = app.registry.serves(Role::Decode);
    let is_ready = prefill && decode && !app.is_stopping();
    let value = json!({"ready": is_ready, "prefill": prefill, "decode": decode, "stopping": app.is_stopping()});
    LocalReply::json(if is_ready { 200 } else { 503 }, &value)
}

fn list(app: &App) -> Value {
    let now = Millis::now();
    let all = app.registry.all();
    let instances: Vec<Value> = all
        .iter()
        .map(|i| {
            let link = i.link.read();
            json!({
                "instance": i.name,
                "role": i.role().name(),
                "health": i.health().name(),
                "breaker": i.breaker.state(now),
                "draining": i.is_draining(),
                "switching": i.switching.load(Ordering::Relaxed),
                "aside": i.aside().text(),
                "prefill_inflight": i.inflight(Role::Prefill),
                "decode_inflight": i.inflight(Role::Decode),
                "tokens_inflight": i.tokens(),
                "prefill_tokens_per_s": i.rate.load(Ordering::Relaxed),
                "prefill_waiting": i.pace.fit().map(|f| f.waiting),
                "served": i.served.load(Ordering::Relaxed),
                "failed": i.failed.load(Ordering::Relaxed),
                "connector": link.kind.map_or("unknown", ConnectorKind::name),
                "engines": link.engines.len(),
                "weight": i.weight,
                "group": i.group,
                "origin": i.origin.name(),
                "max_model_len": i.model_len.load(Ordering::Relaxed),
                "handoffs": app.handoffs.of(i.number),
                "others_requests": i.others.load(Ordering::Relaxed),
                "kv_usage": i.kv_usage.load(Ordering::Relaxed) as f64 / 1000.0,
                "kv_events": i.events.as_ref().map(|e| json!({
                    "endpoint": e.to_string(),
                    "live": i.feed.is_live(),
                    "events": i.feed.events.load(Ordering::Relaxed),
                    "gaps": i.feed.gaps.load(Ordering::Relaxed),
                    "blocks": app.kv.index.count(i.number),
                })),
                "models": *i.models.read(),
                "last_error": *i.last_error.lock(),
            })
        })
        .collect();
    let caches = app.cache_counts().map(|(role, policy, counts)| {
        let [query, matched, selected] = counts.all().map(|(_, count)| count);
        json!({"role": role.name(), "policy": policy, "query_tokens": query, "matched_tokens": matched, "selected_tokens": selected})
    });
    json!({"model": app.config.model, "caches": caches, "pool_blocks": app.kv.index.count(POOL), "kv_left_out": app.kv.index.left_out(), "waiting": app.gate.waiting(), "publishers": app.kv.conductor.list(), "instances": instances})
}
