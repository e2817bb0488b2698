//! Changing what a server is for while it runs.
//!
//! Owns the order: no new requests, those under way end, the engine is told (`POST /pd_role_switch`, SGLang with
//! `--enable-pd-role-switch`), and then it is looked at as if it had just come. An engine without that path (404, 501) does either
//! by itself, so only the table changes, at once. One that could not be asked keeps its role; one of which it is not known
//! what became of it is set aside until it says what it is. Refuses to know how that is asked for (`admin`).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

use super::App;
use super::config::Role;
use super::connector::sglang;
use super::health;
use super::http::upstream::LegError;
use super::registry::{Aside, Health, Instance};

const PATH: &str = "/pd_role_switch";
/// Asking whether the path is there.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(2);
/// The switch itself: structures are taken down and built anew.
const SWITCH_TIMEOUT: Duration = Duration::from_secs(120);
/// Health intervals for which an engine that was told to switch must say that it has not, to be believed: it may be at it.
const STEADY_INTERVALS: u32 = 15;

/// Why a role was not changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RoleError {
    #[error("This engine is prefill or decode, not both.")]
    Both,
    #[error("The ranks of a server change their role together: name it without @RANK.")]
    Rank,
    #[error("Its role is being changed already.")]
    Underway,
    #[error("It still had {0} requests at the deadline; nothing was changed.")]
    Busy(usize),
    #[error("The engine did not say whether it can change its role ({0}); nothing was changed.")]
    Unasked(String),
    #[error("The engine refused: {0}")]
    Refused(String),
    #[error(
        "Whether its role has changed is not known ({0}); it gets no requests until it says what it is."
    )]
    Unknown(String),
    #[error("The switch failed, and it gets no requests until it has been restarted: {0}")]
    Broken(String),
}

/// No new requests for these as long as it lives.
struct Pause<'a>(&'a [Arc<Instance>]);

impl<'a> Pause<'a> {
    fn of(instances: &'a [Arc<Instance>]) -> Result<Self, RoleError> {
        for (at, instance) in instances.iter().enumerate() {
            if instance.switching.swap(true, Ordering::Relaxed) {
                drop(Self(&instances[..at]));
                return Err(RoleError::Underway);
            }
        }
        Ok(Self(instances))
    }
}

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        for instance in self.0 {
            instance.switching.store(false, Ordering::Relaxed);
        }
    }
}

/// Gives the instances of one server another role. Says whether the engine was told; `deadline`: for requests under way.
pub(crate) async fn change(
    app: &App,
    instances: &[Arc<Instance>],
    role: Role,
    deadline: Duration,
) -> Result<bool, RoleError> {
    let Some(first) = instances.first() else {
        return Ok(false);
    };
    let is_so = |i: &Arc<Instance>| i.role() == role && i.aside() == Aside::No;
    if instances.iter().all(is_so) {
        return Ok(false);
    }
    if !is_offered(app, first).await? {
        let own = mode(app, &first.target).await;
        if let Some(own) = own.filter(|own| *own != role && *own != Role::Both) {
            let text = format!("it is {} and offers no change", own.name());
            return Err(RoleError::Refused(text));
        }
        if own == Some(role) && first.aside() != Aside::No {
            // It says itself that it is what is wanted: whatever was broken is over.
            begin_anew(app, instances, role);
            app.changed();
        } else {
            enter(app, instances, role);
        }
        return Ok(false);
    }
    if role == Role::Both {
        return Err(RoleError::Both);
    }
    let all = app.registry.all();
    let mut of_server = all
        .iter()
        .filter(|i| i.address.is_same_server(&first.address));
    if !of_server.all(|i| instances.iter().any(|n| n.number == i.number)) {
        return Err(RoleError::Rank);
    }
    let pause = Pause::of(instances)?;
    let result = switch(app, instances, role, deadline).await;
    drop(pause);
    app.changed();
    result
}

/// Changes the table alone.
fn enter(app: &App, instances: &[Arc<Instance>], role: Role) {
    instances.iter().for_each(|i| i.set_role(role));
    app.changed();
}

/// Whether the engine has the path: whoever knows it only for another method says so.
async fn is_offered(app: &App, instance: &Instance) -> Result<bool, RoleError> {
    let target = &instance.target;
    let asked = health::ask(app, target, "GET", PATH, Bytes::new(), QUESTION_TIMEOUT);
    match asked.await {
        Ok((404 | 501, _)) => Ok(false),
        Ok((status @ 500.., _)) => Err(RoleError::Unasked(format!("HTTP {status}"))),
        Ok(_) => Ok(true),
        Err(error) => Err(RoleError::Unasked(error.to_string())),
    }
}

async fn idle(app: &App, instances: &[Arc<Instance>], deadline: Duration) -> Result<(), RoleError> {
    let end = Instant::now() + deadline;
    loop {
        let under_way = |i: &Arc<Instance>| i.inflight_all() + app.handoffs.of(i.number);
        let busy: usize = instances.iter().map(under_way).sum();
        if busy == 0 {
            return Ok(());
        }
        if Instant::now() >= end || app.is_stopping() {
            return Err(RoleError::Busy(busy));
        }
        // Looked at again now and then: a leg may have ended just before.
        let changed = app.registry.changed.notified();
        let _ = timeout(Duration::from_millis(50), changed).await;
    }
}

/// What an engine made of it.
enum Outcome {
    Done,
    /// It has no such path after all.
    NotOffered,
    Refused(String),
    /// It is not sound any more.
    Broken(String),
    Unknown(String),
}

async fn switch(
    app: &App,
    instances: &[Arc<Instance>],
    role: Role,
    deadline: Duration,
) -> Result<bool, RoleError> {
    idle(app, instances, deadline).await?;
    let target = &instances[0].target;
    let body = Bytes::from(json!({"new_role": role.name()}).to_string());
    let asked = health::ask(app, target, "POST", PATH, body, SWITCH_TIMEOUT).await;
    let outcome = match asked {
        // It never had the request.
        Err(error @ LegError::Connect(_)) => return Err(RoleError::Unasked(error.to_string())),
        Err(error) => without_answer(app, target, role, error.to_string()).await,
        Ok((404 | 405 | 501, _)) => Outcome::NotOffered,
        Ok((status, body)) => judge(app, target, role, status, &body).await,
    };
    match outcome {
        Outcome::Done => {
            begin_anew(app, instances, role);
            Ok(true)
        }
        Outcome::NotOffered => {
            enter(app, instances, role);
            Ok(false)
        }
        Outcome::Refused(message) => {
            instances.iter().for_each(|i| i.note(&message));
            Err(RoleError::Refused(message))
        }
        Outcome::Broken(message) => {
            put_aside(instances, Aside::Broken, None, &message);
            Err(RoleError::Broken(message))
        }
        Outcome::Unknown(message) => {
            put_aside(instances, Aside::Unsure, Some(role), &message);
            Err(RoleError::Unknown(message))
        }
    }
}

/// It had the request and gave no answer: it may have switched, and may be at it.
async fn without_answer(app: &App, target: &(String, u16), role: Role, message: String) -> Outcome {
    match mode(app, target).await {
        Some(now) if now == role => Outcome::Done,
        _ => Outcome::Unknown(message),
    }
}

async fn judge(app: &App, target: &(String, u16), role: Role, status: u16, body: &[u8]) -> Outcome {
    let answer: Value = serde_json::from_slice(body).unwrap_or_default();
    let message = ["message", "detail"]
        .iter()
        .find_map(|name| answer.get(name)?.as_str());
    let message = message.map_or_else(|| format!("HTTP {status}"), str::to_owned);
    let message: String = message.chars().take(200).collect();
    let told = |name: &str| answer.get(name).and_then(Value::as_bool);
    match (told("success"), told("safe_to_restore")) {
        (Some(true), _) if (200..300).contains(&status) => Outcome::Done,
        (_, Some(true)) => Outcome::Refused(message),
        (_, Some(false)) => Outcome::Broken(message),
        // It does not say: what it is now decides.
        _ => match mode(app, target).await {
            Some(now) if now == role => Outcome::Done,
            Some(_) => Outcome::Refused(message),
            None => Outcome::Unknown(message),
        },
    }
}

/// `told`: the role it was told to take.
fn put_aside(instances: &[Arc<Instance>], aside: Aside, told: Option<Role>, message: &str) {
    for instance in instances {
        instance.note(&message);
        *instance.told.lock() = told.map(|role| (role, Instant::now()));
        instance.set_aside(aside);
    }
    let state = aside.text();
    tracing::error!(instance = %instances[0].name, message, state, "it gets no requests");
}

/// What an engine says it is.
async fn mode(app: &App, target: &(String, u16)) -> Option<Role> {
    let info = health::server_info(app, target).await.ok()??;
    sglang::role(&info)
}

/// Whether what it says it is will stay so: it is what it was told to become, or has had the time to.
fn is_steady(app: &App, instance: &Instance, role: Role) -> bool {
    let told = *instance.told.lock();
    let wait = app.config.health_interval * STEADY_INTERVALS;
    told.is_none_or(|(wanted, since)| wanted == role || since.elapsed() >= wait)
}

/// Asks an instance that is set aside what it is, and uses it as that. Called with every health check.
pub(crate) async fn look_again(app: &App, instance: &Arc<Instance>) {
    let is_wanted =
        || instance.aside() == Aside::Unsure && !instance.switching.load(Ordering::SeqCst);
    if !is_wanted() {
        return;
    }
    let mode = mode(app, &instance.target).await;
    if let Some(role) = mode.filter(|role| is_wanted() && is_steady(app, instance, *role)) {
        begin_anew(app, std::slice::from_ref(instance), role);
        app.changed();
    }
}

/// As if it had just come: what is known of it belongs to its old role.
fn begin_anew(app: &App, instances: &[Arc<Instance>], role: Role) {
    for instance in instances {
        health::forget(app, instance);
        instance.set_health(Health::Unknown);
        instance.set_aside(Aside::No);
        *instance.told.lock() = None;
        instance.set_role(role);
        tracing::info!(instance = %instance.name, role = role.name(), "its role has changed");
    }
}
