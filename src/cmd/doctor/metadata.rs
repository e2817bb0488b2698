//! The metadata service that a configuration names: http, etcd, redis.

use std::io::{self, Read, Write};
use std::time::Instant;

use super::http::http;
use super::reach::{connect, ms, with_port};
use super::report::Finding;
use super::stranger::stranger;
use super::values::without_secret;

/// The metadata service a configuration names.
pub(super) fn check(server: &str) -> Vec<Finding> {
    if let Some(rest) = server.strip_prefix("http://") {
        return vec![http_metadata(rest, server)];
    }
    if let Some(rest) = server.strip_prefix("etcd://") {
        return vec![etcd(rest)];
    }
    match server.strip_prefix("redis://") {
        Some(rest) => vec![redis(rest, server)],
        None => Vec::new(),
    }
}

fn http_metadata(rest: &str, url: &str) -> Finding {
    let check = "metadata (http)";
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let path = format!("/{path}?key=mooncake/doctor/absent");
    match http(&with_port(host, 80), "GET", &path, "", "") {
        Err(fault) => fault.finding(check, url),
        Ok(a) if a.status == 200 => {
            Finding::ok(check, format!("{url}: answered in {}", ms(a.took)))
        }
        // Every implementation of this protocol says so of a key that is not there; other servers say other things.
        Ok(a) if a.status == 404 && a.body.contains("metadata not found") => {
            Finding::ok(check, format!("{url}: answered in {}", ms(a.took)))
        }
        Ok(a) if matches!(a.status, 401 | 403) => {
            let reason = format!("refused the request (HTTP {})", a.status);
            Finding::fail(check, "metadata_auth", url, reason)
                .remedy("use a metadata service without a login, or P2PHANDSHAKE")
        }
        Ok(a) => {
            let server = a
                .header("server")
                .map_or_else(String::new, |s| format!(" by {s}"));
            let reason = format!(
                "an HTTP server{server} answers, and it is no metadata service (HTTP {})",
                a.status
            );
            Finding::fail(check, "something_else", url, reason)
                .remedy("correct the URL: the master serves http://MASTER:50051/metadata")
        }
    }
}

fn etcd(rest: &str) -> Finding {
    let check = "metadata (etcd)";
    let target = with_port(rest.trim_end_matches('/'), 2379);
    let answer = match http(&target, "GET", "/version", "", "") {
        Ok(answer) => answer,
        Err(fault) => return fault.finding(check, target),
    };
    let version: Option<String> = serde_json::from_str::<serde_json::Value>(&answer.body)
        .ok()
        .and_then(|v| v.get("etcdserver")?.as_str().map(str::to_owned));
    let Some(version) = version.filter(|_| answer.status == 200) else {
        let reason = format!(
            "an HTTP server answers, and it is not etcd (HTTP {})",
            answer.status
        );
        return Finding::fail(check, "something_else", target, reason)
            .remedy("correct the address: etcd's client port is 2379");
    };
    // bW9vbmNha2U= is `mooncake`: a key that nobody writes.
    let asked = http(
        &target,
        "POST",
        "/v3/kv/range",
        "Content-Type: application/json\r\n",
        r#"{"key":"bW9vbmNha2U="}"#,
    );
    match asked {
        Err(fault) => fault.finding(check, target),
        Ok(a) if a.status == 200 => Finding::ok(
            check,
            format!("{target}: etcd {version}, answered in {}", ms(a.took)),
        ),
        Ok(a)
            if a.body.contains("user name is empty")
                || a.body.contains("permission denied")
                || matches!(a.status, 401 | 403) =>
        {
            let reason = "etcd wants a user, and mooncake gives none";
            Finding::fail(check, "metadata_auth", target, reason)
                .remedy("disable auth in etcd, or use another metadata service")
                .command("etcdctl auth disable")
        }
        Ok(a) if a.status == 404 => {
            let reason = format!("etcd {version} has no JSON gateway at /v3");
            Finding::fail(check, "version", target, reason).remedy("run etcd 3.4 or newer")
        }
        Ok(a) => {
            let reason = format!("etcd {version} answered HTTP {} to a read", a.status);
            Finding::fail(check, "metadata_broken", target, reason)
                .remedy("look at etcd's log: it may have lost its quorum")
        }
    }
}

fn redis(rest: &str, url: &str) -> Finding {
    let check = "metadata (redis)";
    let (login, place) = rest
        .rsplit_once('@')
        .map_or((None, rest), |(l, p)| (Some(l), p));
    let target = with_port(place.split('/').next().unwrap_or(place), 6379);
    let shown = without_secret(url);
    let mut met = match connect(&target) {
        Ok(met) => met,
        Err(fault) => return fault.finding(check, shown),
    };
    let mut say = |words: &[&str]| -> io::Result<String> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        met.stream.write_all(request.as_bytes())?;
        let mut piece = [0; 8192];
        let n = met.stream.read(&mut piece)?;
        Ok(String::from_utf8_lossy(&piece[..n]).into_owned())
    };
    let login = login.map(|l| l.split_once(':').unwrap_or(("", l)));
    let (mut greeted, start) = (Ok("+OK".to_owned()), Instant::now());
    if let Some((user, password)) = login {
        greeted = if user.is_empty() {
            say(&["AUTH", password])
        } else {
            say(&["AUTH", user, password])
        };
    }
    let ping = greeted.and_then(|g| {
        if g.starts_with('+') {
            say(&["PING"])
        } else {
            Ok(g)
        }
    });
    let took = start.elapsed();
    let first = ping
        .as_deref()
        .ok()
        .and_then(|p| p.lines().next())
        .unwrap_or_default()
        .to_owned();
    if first.starts_with("-NOAUTH") {
        return Finding::fail(
            check,
            "metadata_auth",
            shown,
            "Redis wants a password, and the URL has none",
        )
        .remedy("write redis://:PASSWORD@HOST:PORT");
    }
    if first.starts_with("-WRONGPASS")
        || first.starts_with("-ERR AUTH")
        || first.starts_with("-ERR invalid password")
    {
        return Finding::fail(
            check,
            "metadata_auth",
            shown,
            "Redis refused the password of the URL",
        )
        .remedy("correct the password: redis://:PASSWORD@HOST:PORT");
    }
    if first.starts_with("-DENIED") {
        return Finding::fail(
            check,
            "metadata_protected",
            shown,
            "Redis is in protected mode and takes local connections only",
        )
        .remedy("set a password in Redis, and write it in the URL");
    }
    if first.starts_with("-LOADING") {
        return Finding::warn(
            check,
            "metadata_loading",
            shown,
            "Redis is reading its data from disk",
        )
        .remedy("wait until it has");
    }
    if !first.starts_with("+PONG") {
        let how = match &ping {
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
                ) =>
            {
                "silent"
            }
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => "reset",
            _ => "closed",
        };
        let saw = if first.is_empty() {
            String::new()
        } else {
            format!("`{first}`")
        };
        return stranger(met.address, &saw, how).finding(check, shown);
    }
    let info = say(&["INFO", "server"]).unwrap_or_default();
    let version = info
        .lines()
        .find_map(|l| l.strip_prefix("redis_version:"))
        .unwrap_or("of unknown version");
    Finding::ok(
        check,
        format!(
            "{shown}: Redis {}, answered in {}",
            version.trim(),
            ms(took)
        ),
    )
}
