//! The instances behind a proxy: with the admin key as the proxy sees them, without it as they answer from here.
//!
//! Owns what is asked of the proxy beyond its health, and what that means. Refuses to know how a proxy is found.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::http::{bearer, http};
use super::report::Finding;
use crate::base::trust::Token;

/// Instances asked from here; the proxy itself is asked about all of them at once.
const ASKED_MAX: usize = 32;

/// All findings; `target` is a proxy that is healthy.
pub(super) fn check(target: &str, key: Option<&Token>) -> Vec<Finding> {
    if let Some(key) = key {
        let header = bearer(Some(key));
        return match http(target, "GET", "/instances", &header, "") {
            Ok(a) if a.status == 200 => {
                let ready = http(target, "GET", "/ready", "", "");
                let aggregated = ready.is_ok_and(|r| r.body.contains("\"prefill\":true"));
                judge(&serde_json::from_str(&a.body).unwrap_or_default(), aggregated)
            }
            Ok(a) if a.status == 403 => vec![
                Finding::fail("instances", "admin_key", target, "the proxy refuses the admin key")
                    .remedy("give the key that the proxy was started with: --proxy-key-file or ADMIN_API_KEY"),
            ],
            Ok(a) if a.status == 500 && a.body.contains("configuration") => {
                let mut found = from_here(target);
                found.push(Finding::skipped("instances", "the proxy was started without an admin key"));
                found
            }
            Ok(a) => vec![Finding::skipped("instances", format!("the proxy answered HTTP {} to /instances", a.status))],
            Err(fault) => vec![fault.finding("instances", target)],
        };
    }
    from_here(target)
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value.get(name).and_then(Value::as_str).unwrap_or_default()
}

fn list(value: &Value, name: &str) -> Vec<String> {
    let all = value.get(name).and_then(Value::as_array);
    let texts = all.into_iter().flatten().filter_map(Value::as_str);
    texts.map(str::to_owned).collect()
}

/// What the proxy says of its instances; `prefills`: it says that it can prefill, without prefill instances if need be.
fn judge(said: &Value, prefills: bool) -> Vec<Finding> {
    let none = Vec::new();
    let instances = said
        .get("instances")
        .and_then(Value::as_array)
        .unwrap_or(&none);
    let model = text(said, "model");
    let mut found = Vec::new();
    let mut connectors: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut good = 0;
    for i in instances {
        let (name, role) = (text(i, "instance"), text(i, "role"));
        let kind = text(i, "connector");
        if !matches!(kind, "" | "unknown") {
            connectors.entry(kind).or_default().push(name);
        }
        match one(i, name, role, model) {
            Some(finding) => found.push(finding),
            None => good += 1,
        }
    }
    if connectors.len() > 1 {
        let shown: Vec<String> = connectors
            .iter()
            .map(|(kind, names)| format!("{kind}: {}", names.join(" ")))
            .collect();
        found.push(
            Finding::fail(
                "connectors",
                "connector_mismatch",
                shown.join("; "),
                "KV handed over by one connector cannot be fetched by another: requests between them fail",
            )
            .remedy("start all instances with the same kv_connector"),
        );
    }
    for (role, cause) in [("prefill", "no_prefill"), ("decode", "no_decode")] {
        let serves = |i: &Value| text(i, "role") == role || text(i, "role") == "both";
        let needed = role == "decode" || !prefills;
        if needed && !instances.iter().any(serves) {
            found.push(
                Finding::warn(
                    "instances",
                    cause,
                    format!("no {role} instance"),
                    format!("nobody does {role}"),
                )
                .remedy(format!(
                    "add one: mooncake proxy --{role} HOST:PORT, or POST /instances/add"
                )),
            );
        }
    }
    found.insert(
        0,
        Finding::ok(
            "instances",
            format!("{good} of {} well, model {model}", instances.len()),
        ),
    );
    found
}

fn one(i: &Value, name: &str, role: &str, model: &str) -> Option<Finding> {
    let check = format!("instance {name}");
    let last = text(i, "last_error");
    let because = if last.is_empty() {
        "it did not say why"
    } else {
        last
    };
    match text(i, "health") {
        "down" => Some(
            Finding::fail(
                check,
                "instance_down",
                role,
                format!("does not answer the proxy: {because}"),
            )
            .remedy("start it, or take it out of the proxy"),
        ),
        "wrong_model" => Some(
            Finding::fail(
                check,
                "model_mismatch",
                role,
                format!("serves another model than {model}: {because}"),
            )
            .remedy("correct the instance's address or the proxy's --model"),
        ),
        "wrong_role" => Some(
            Finding::fail(
                check,
                "role_mismatch",
                role,
                format!("is not what the proxy uses it for: {because}"),
            )
            .remedy("name it for its own role, or start it for this one"),
        ),
        "unknown" => Some(
            Finding::warn(
                check,
                "instance_unknown",
                role,
                "the proxy has not heard of it yet",
            )
            .remedy("wait for the next health check"),
        ),
        _ if text(i, "breaker") == "open" => Some(
            Finding::warn(
                check,
                "instance_breaker",
                role,
                format!("healthy, and its requests fail: {because}"),
            )
            .remedy("look at the instance's log"),
        ),
        _ => None,
    }
}

/// Without the key: the names from /status, each asked for its models from this host.
fn from_here(target: &str) -> Vec<Finding> {
    let answer = match http(target, "GET", "/status", "", "") {
        Ok(a) if a.status == 200 => a,
        _ => {
            let reason = "the proxy has no /status: its instances are not looked at";
            return vec![Finding::skipped("instances", reason)];
        }
    };
    let said: Value = serde_json::from_str(&answer.body).unwrap_or_default();
    let roles = [("prefill", "prefill_nodes"), ("decode", "decode_nodes")];
    let all: Vec<(String, &str)> = roles
        .iter()
        .flat_map(|(role, field)| list(&said, field).into_iter().map(move |n| (n, *role)))
        .collect();
    let mut models = BTreeMap::new();
    let mut found = Vec::new();
    std::thread::scope(|s| {
        let asked: Vec<_> = all
            .iter()
            .take(ASKED_MAX)
            .map(|(name, role)| {
                (
                    name,
                    *role,
                    s.spawn(move || http(name, "GET", "/v1/models", "", "")),
                )
            })
            .collect();
        for (name, role, thread) in asked {
            let check = format!("instance {name}");
            match thread.join() {
                Ok(Ok(a)) if a.status == 200 => {
                    let answer: Value = serde_json::from_str(&a.body).unwrap_or_default();
                    let ids: BTreeSet<String> = answer
                        .get("data")
                        .and_then(Value::as_array)
                        .into_iter()
                        .flatten()
                        .map(|m| text(m, "id").to_owned())
                        .collect();
                    models
                        .entry(ids)
                        .or_insert_with(Vec::new)
                        .push(name.clone());
                }
                Ok(Ok(a)) => found.push(
                    Finding::fail(
                        check,
                        "instance_down",
                        role,
                        format!("answers HTTP {} to /v1/models", a.status),
                    )
                    .remedy("look at the instance's log"),
                ),
                Ok(Err(fault)) => found.push(
                    Finding::fail(
                        check,
                        "instance_down",
                        role,
                        format!("cannot be reached from here: {}", fault.reason),
                    )
                    .remedy("start it, or take it out of the proxy"),
                ),
                Err(_) => {}
            }
        }
    });
    if models.len() > 1 {
        let shown: Vec<String> = models
            .iter()
            .map(|(ids, names)| {
                let ids = ids.iter().cloned().collect::<Vec<_>>().join(" ");
                format!("{ids}: {}", names.join(" "))
            })
            .collect();
        found.push(
            Finding::fail(
                "models",
                "model_mismatch",
                shown.join("; "),
                "instances of one proxy serve different models",
            )
            .remedy("correct the instances' addresses"),
        );
    }
    if all.is_empty() {
        found.push(
            Finding::warn(
                "instances",
                "no_instances",
                "none",
                "the proxy has nobody to send requests to",
            )
            .remedy("add some: POST /instances/add"),
        );
    }
    let good: usize = models.values().map(Vec::len).sum();
    found.insert(
        0,
        Finding::ok(
            "instances",
            format!("{good} of {} answer from here", all.len()),
        ),
    );
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_the_proxy_says() {
        let instance = |name: &str, role: &str, health: &str, connector: &str| json!({"instance": name, "role": role, "health": health, "breaker": "closed", "connector": connector, "last_error": "refused"});
        let causes = |instances: Value| -> Vec<&'static str> {
            let found = judge(&json!({"model": "m", "instances": instances}), false);
            found
                .iter()
                .map(|f| f.cause)
                .filter(|c| !c.is_empty())
                .collect()
        };
        let good = [
            instance("a:1", "prefill", "up", "store"),
            instance("b:1", "decode", "up", "unknown"),
        ];
        assert_eq!(causes(json!(good)), Vec::<&str>::new());
        assert_eq!(causes(json!([])), ["no_prefill", "no_decode"]);
        let bad = [
            instance("a:1", "prefill", "down", "store"),
            instance("b:1", "decode", "wrong_model", "nixl"),
        ];
        assert_eq!(
            causes(json!(bad)),
            ["instance_down", "model_mismatch", "connector_mismatch"]
        );
        let role = [
            instance("a:1", "prefill", "wrong_role", "unknown"),
            instance("b:1", "decode", "up", "unknown"),
        ];
        assert_eq!(causes(json!(role)), ["role_mismatch"]);
        assert_eq!(causes(Value::Null), ["no_prefill", "no_decode"]);
    }
}
