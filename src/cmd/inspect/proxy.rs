//! `mooncake inspect proxy`: the instances of a running proxy as it sees them. Changes nothing.

use anyhow::Context;
use clap::{Arg, ArgMatches, Command};
use serde_json::Value;

use crate::cmd::print::{Columns, Output};
use crate::cmd::{ExitStatus, Outcome, UsageError, print, settings};

pub(super) fn command() -> Command {
    Command::new("proxy")
        .about("Instances of a running proxy: state, load, last error")
        .arg(
            Arg::new("address")
                .value_name("HOST:PORT")
                .default_value("127.0.0.1:8000")
                .help("Where the proxy listens"),
        )
        .arg(
            Arg::new("admin-key-file")
                .long("admin-key-file")
                .value_name("FILE")
                .help("File with the proxy's admin key (or ADMIN_API_KEY)"),
        )
        .arg(settings::output())
}

fn cell(value: &Value) -> String {
    let text = value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned);
    print::shown(&text)
}

/// What a role's policy found cached; nothing of one that does not look.
fn cache_line(cache: &Value) -> Option<String> {
    let tokens = |name: &str| cache.get(name).and_then(Value::as_u64);
    let query = tokens("query_tokens").filter(|q| *q > 0)?;
    let matched = tokens("matched_tokens").filter(|m| *m > 0)?;
    let share = |count: u64| 100.0 * count as f64 / query as f64;
    let name = |name: &str| cache.get(name).map_or_else(String::new, cell);
    let selected = tokens("selected_tokens").unwrap_or(0);
    Some(format!(
        "{} by {}: {query} prompt tokens, {:.1} % cached at the best instance, {:.1} % at the chosen one",
        name("role"),
        name("policy"),
        share(matched),
        share(selected)
    ))
}

pub(super) fn run(matches: &ArgMatches) -> Outcome {
    let given = |name: &str| matches.get_one::<String>(name).map(String::as_str);
    let address = given("address").unwrap_or("127.0.0.1:8000");
    let address = address
        .strip_prefix("http://")
        .unwrap_or(address)
        .trim_end_matches('/');
    let (host, port) = crate::base::net::split_host_port(address, 8000).map_err(UsageError)?;
    let key = crate::cmd::proxy::admin_key(given("admin-key-file"))?.ok_or_else(|| {
        UsageError("the proxy's admin key is missing: --admin-key-file or ADMIN_API_KEY".to_owned())
    })?;
    let url = format!(
        "http://{}/instances",
        crate::base::net::join_host_port(&host, port)
    );
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .proxy(None)
        .timeout_global(Some(std::time::Duration::from_secs(5)))
        .http_status_as_error(false)
        .build()
        .into();
    let asked = agent.get(&url).header("authorization", key.bearer()).call();
    let mut reply = match asked {
        Ok(reply) => reply,
        Err(error) => {
            print::error_line(&format!("mooncake: proxy {address}: {error}"));
            return Ok(ExitStatus::Unreachable);
        }
    };
    let text = reply
        .body_mut()
        .read_to_string()
        .context("read the proxy's answer")?;
    let value: Value = serde_json::from_str(&text).context("the answer is not a proxy's")?;
    let Some(instances) = value.get("instances").and_then(Value::as_array) else {
        let why = match value.get("detail").map_or_else(String::new, cell) {
            // As the demo proxies say it.
            why if reply.status().as_u16() == 500 && why.contains("configuration") => {
                "it was started without an admin key: restart it with --admin-key-file or ADMIN_API_KEY"
                    .to_owned()
            }
            why => why,
        };
        print::error_line(&format!(
            "mooncake: proxy {address}: {} {why}",
            reply.status()
        ));
        return Ok(ExitStatus::Unreachable);
    };
    if matches.get_one::<Output>("output") == Some(&Output::Json) {
        print::json(&value)?;
        return Ok(ExitStatus::Ok);
    }
    let columns = [
        ("INSTANCE", "instance"),
        ("ROLE", "role"),
        ("HEALTH", "health"),
        ("BREAKER", "breaker"),
        ("CONNECTOR", "connector"),
        (">PREFILL", "prefill_inflight"),
        (">DECODE", "decode_inflight"),
        (">SERVED", "served"),
        (">FAILED", "failed"),
        ("LAST ERROR", "last_error"),
    ];
    let mut table = Columns::new(&columns.map(|(heading, _)| heading));
    for instance in instances {
        let mut row = columns.map(|(_, name)| instance.get(name).map_or_else(String::new, cell));
        if instance.get("aside").is_some_and(Value::is_string) {
            row[2].push_str(", set aside");
        }
        if instance.get("draining") == Some(&Value::Bool(true)) {
            row[2].push_str(", draining");
        }
        table.row(&row);
    }
    table.print()?;
    let caches = value.get("caches").and_then(Value::as_array);
    for cache in caches.into_iter().flatten() {
        if let Some(line) = cache_line(cache) {
            print::line(&line)?;
        }
    }
    Ok(ExitStatus::Ok)
}
