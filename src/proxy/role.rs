//! Changing what a server is for while it runs.
//!
//! Owns the order: no new requests, those under way end, the engine is told (`POST /pd_role_switch`, SGLang with
//! `--enable-pd-role-switch`), and then it is looked at as if it had just come. An engine without that path does either by
//! itself, so only the table changes, at once. Refuses to know how that is asked for (`admin`).

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
use super::registry::{Health, Instance};

const PATH: &str = "/pd_role_switch";
/// Asking whether the path is there.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(2);
/// The switch itself: structures are taken down and built anew.
const SWITCH_TIMEOUT: Duration = Duration::from_secs(120);

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
    #[error("The engine refused: {0}")]
    Refused(String),
    #[error("The switch failed, and it is not used any more; restart it: {0}")]
    Lost(String),
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
    if instances.iter().all(|i| i.role() == role) {
        return Ok(false);
    }
    if !is_offered(app, first).await {
        instances.iter().for_each(|i| i.set_role(role));
        app.changed();
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
    result.map(|()| true)
}

/// Whether the engine has the path: whoever knows it only for another method says so.
async fn is_offered(app: &App, instance: &Instance) -> bool {
    let asked = health::ask(
        app,
        &instance.target,
        "GET",
        PATH,
        Bytes::new(),
        QUESTION_TIMEOUT,
    );
    matches!(asked.await, Ok((status, _)) if !matches!(status, 404 | 501))
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

async fn switch(
    app: &App,
    instances: &[Arc<Instance>],
    role: Role,
    deadline: Duration,
) -> Result<(), RoleError> {
    idle(app, instances, deadline).await?;
    let target = &instances[0].target;
    let body = Bytes::from(json!({"new_role": role.name()}).to_string());
    let asked = health::ask(app, target, "POST", PATH, body, SWITCH_TIMEOUT).await;
    let (answer, message) = match &asked {
        Ok((status, body)) => {
            let answer: Value = serde_json::from_slice(body).unwrap_or_default();
            let message = answer.get("message").and_then(Value::as_str);
            let message = message.map_or_else(|| format!("HTTP {status}"), str::to_owned);
            (answer, message)
        }
        Err(error) => (Value::Null, error.to_string()),
    };
    let message: String = message.chars().take(200).collect();
    let told = |name: &str| answer.get(name).and_then(Value::as_bool);
    let is_done = matches!(&asked, Ok((200..=299, _))) && told("success") == Some(true);
    if is_done {
        begin_anew(app, instances, role);
        return Ok(());
    }
    let safe = match told("safe_to_restore") {
        Some(safe) => safe,
        // It does not say: what it is now decides.
        None => match mode(app, target).await.as_deref() {
            Some(now) if now == role.name() => {
                begin_anew(app, instances, role);
                return Ok(());
            }
            Some(_) => true,
            None => false,
        },
    };
    instances.iter().for_each(|i| i.note(&message));
    if safe {
        return Err(RoleError::Refused(message));
    }
    instances.iter().for_each(|i| i.set_draining(true));
    tracing::error!(instance = %instances[0].name, message, "its role could not be changed; it is not used any more");
    Err(RoleError::Lost(message))
}

async fn mode(app: &App, target: &(String, u16)) -> Option<String> {
    let info: Value = serde_json::from_slice(&health::server_info(app, target).await?).ok()?;
    sglang::mode(&info).map(str::to_owned)
}

/// As if it had just come: what is known of it belongs to its old role.
fn begin_anew(app: &App, instances: &[Arc<Instance>], role: Role) {
    for instance in instances {
        health::forget(app, instance);
        instance.set_health(Health::Unknown);
        instance.set_draining(false);
        instance.set_role(role);
        tracing::info!(instance = %instance.name, role = role.name(), "its role has changed");
    }
}
