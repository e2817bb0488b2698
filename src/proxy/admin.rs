//! What the proxy answers itself: status, health, metrics, and changes of the instances.
//!
//! Owns the paths, the texts of the demo proxy and the check of the key (constant time; never logged, wrong ones neither).
//! Refuses to know how requests are routed.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};

use super::App;
use super::config::{ConnectorKind, EventsAddress, EventsRule, InstanceAddress, Role};
use super::health;
use super::http::head::RequestHead;
use super::kv::index::POOL;
use super::metrics;
use super::registry::{Instance, NewInstance, Origin};
use super::reply::LocalReply;
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
        _ => return None,
    })
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

fn known(app: &App, request: &Value) -> Result<Arc<Instance>, LocalReply> {
    let address = address(request)?;
    app.registry
        .find(&address)
        .ok_or_else(|| LocalReply::detail(404, "No such instance."))
}

async fn change(app: &Arc<App>, path: &str, request: &Value) -> Result<LocalReply, LocalReply> {
    match path {
        "/instances/add" => add(app, request).await,
        "/instances/remove" => {
            let instance = known(app, request)?;
            app.remove(&instance);
            let text = format!("Removed {}.", instance.name);
            Ok(LocalReply::json(
                200,
                &json!({"message": text, "inflight": instance.inflight_all()}),
            ))
        }
        "/instances/drain" => {
            let instance = known(app, request)?;
            let seconds = request.get("deadline_s").map_or(Some(60.0), Value::as_f64);
            let seconds = seconds.filter(|s| (0.0..=86_400.0).contains(s));
            let seconds = seconds.ok_or_else(|| LocalReply::detail(400, "Invalid deadline."))?;
            drain(app, &instance, Duration::from_secs_f64(seconds));
            let text = format!("Draining {}.", instance.name);
            Ok(LocalReply::json(
                202,
                &json!({"message": text, "inflight": instance.inflight_all()}),
            ))
        }
        _ => {
            let instance = known(app, request)?;
            let role = Role::parse(text(request, "role"));
            let role = role.ok_or_else(|| LocalReply::detail(400, "Invalid role."))?;
            instance.set_role(role);
            app.changed();
            let text = format!("{} is {} now.", instance.name, role.name());
            Ok(LocalReply::json(200, &json!({"message": text})))
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
    if app
        .registry
        .find(&address)
        .is_some_and(|i| i.role().does(role))
    {
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
    let events = match request.get("kv_events").filter(|e| !e.is_null()) {
        None => EventsRule::of(&app.config.kv_events, &address),
        given => Some(read_events(given, &address.host).ok_or_else(|| bad("Invalid kv_events."))?),
    };
    let name = address.to_string();
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
    Ok(LocalReply::json(
        200,
        &json!({"message": format!("Added {name} to {}_instances.", role.name())}),
    ))
}

/// Sends nobody there any more and takes the instance out when it is idle, or at the deadline.
fn drain(app: &Arc<App>, instance: &Arc<Instance>, deadline: Duration) {
    instance.set_draining(true);
    app.changed();
    let (app, instance) = (app.clone(), instance.clone());
    tokio::spawn(async move {
        let end = tokio::time::Instant::now() + deadline;
        while instance.inflight_all() > 0 && tokio::time::Instant::now() < end {
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
                "prefill_inflight": i.inflight(Role::Prefill),
                "decode_inflight": i.inflight(Role::Decode),
                "tokens_inflight": i.tokens(),
                "prefill_tokens_per_s": i.rate.load(Ordering::Relaxed),
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
    json!({"model": app.config.model, "pool_blocks": app.kv.index.count(POOL), "kv_left_out": app.kv.index.left_out(), "waiting": app.gate.waiting(), "instances": instances})
}
