//! The servers of a pool: the master's port, data ports of nodes, a proxy.
//!
//! Owns what each must answer. Refuses to know how a connection fails.

use std::time::{Duration, Instant};

use super::address;
use super::http::{Unanswered, bearer, http, http_date, request};
use super::instances;
use super::reach::{Lane, lane, ms, with_port};
use super::report::Finding;
use super::values::without_secret;
use crate::base::handshake::LaneKind;
use crate::base::trust::{ClusterKeys, Token};

/// Larger than any packet: a request of this size needs several full ones.
const PADDING: usize = 12_000;
/// A connection that ended after this has been waited for, by one side or the other.
const GIVES_UP: Duration = Duration::from_millis(500);

/// What `reach` found out about the master, for the checks that build on it.
pub(super) struct MasterSeen {
    pub(super) findings: Vec<Finding>,
    pub(super) lane: Option<Lane>,
    /// Seconds this host's clock is ahead of the master's.
    pub(super) skew: Option<i64>,
}

/// The master: a control lane, then HTTP on the same port.
pub(super) fn master(target: &str, keys: &ClusterKeys, token: Option<&Token>) -> MasterSeen {
    let mut findings = Vec::new();
    let check = "master";
    if address::misspelt(target).is_some() {
        return MasterSeen {
            findings: vec![Finding::skipped(check, "its address is none")],
            lane: None,
            skew: None,
        };
    }
    let lane = match lane(target, LaneKind::Control, keys) {
        Ok(lane) => lane,
        Err(fault) => {
            findings.push(fault.finding(check, target));
            return MasterSeen {
                findings,
                lane: None,
                skew: None,
            };
        }
    };
    findings.push(Finding::ok(
        check,
        format!(
            "{target}: lane protocol {}, {} round trip",
            lane.version,
            ms(lane.rtt)
        ),
    ));
    let mut skew = None;
    match request(target, "GET", "/role", &bearer(token), "") {
        Ok(answer) => {
            let sent = std::time::SystemTime::now();
            skew = answer.header("date").and_then(http_date).map(|theirs| {
                let now = sent
                    .duration_since(std::time::UNIX_EPOCH)
                    .map_or(0, |d| d.as_secs() as i64);
                now - theirs
            });
            let role = answer.body.trim().trim_matches('"').to_ascii_lowercase();
            match answer.status {
                200 if role == "leader" => findings.push(Finding::ok("role", "leader")),
                200 => {
                    let shown: String = role.chars().take(30).collect();
                    findings.push(
                        Finding::fail(
                            "role",
                            "not_leader",
                            shown,
                            "this master does not lead: it takes no writes",
                        )
                        .remedy("give the leader's address, or all masters' addresses"),
                    );
                }
                401 | 403 => findings.push(
                    Finding::fail(
                        "role",
                        "token",
                        format!("HTTP {}", answer.status),
                        "HTTP on the master's port refuses our token",
                    )
                    .remedy("give the same --token-file or MOONCAKE_TOKEN on both sides"),
                ),
                _ => findings.push(Finding::skipped(
                    "role",
                    format!("the master answered HTTP {} to /role", answer.status),
                )),
            }
            if !lane.address.ip().is_loopback() {
                findings.push(large_packets(target));
            }
        }
        Err(Unanswered::Fault(fault)) => findings.push(fault.finding("HTTP of the master", target)),
        // The lane has shown that it is a master: what its HTTP does says nothing about who listens.
        Err(Unanswered::Connected(_, _, how)) => findings.push(
            Finding::fail(
                "HTTP of the master",
                "http_unanswered",
                target,
                format!("its lanes work, and a request over HTTP met a connection that was {how}"),
            )
            .remedy("look at the master's log and load, and at proxies between here and there"),
        ),
    }
    MasterSeen {
        findings,
        lane: Some(lane),
        skew,
    }
}

/// Small packets passed: do large ones?
fn large_packets(target: &str) -> Finding {
    let padding = format!("X-Padding: {}\r\n", "x".repeat(PADDING));
    let begun = Instant::now();
    // Small questions would be answered: what is there is not asked again.
    let answered = request(target, "GET", "/health", &padding, "");
    // A server that waits for the rest of a request may give up before we do.
    let waited = begun.elapsed() >= GIVES_UP;
    match answered {
        Ok(answer) => Finding::ok("large packets", format!("{PADDING} bytes answered in {}", ms(answer.took))),
        Err(Unanswered::Connected(_, _, how)) if how == "silent" || waited => Finding::fail(
            "large packets",
            "mtu_black_hole",
            format!("{PADDING} bytes"),
            "small requests are answered, large ones vanish: a link on the way has a smaller MTU, and the ICMP that would tell is dropped",
        )
        .remedy("set the same MTU on all links, or let ICMP type 3 code 4 (IPv6: type 2) pass")
        .command("sysctl -w net.ipv4.tcp_mtu_probing=1"),
        Err(Unanswered::Fault(fault)) => fault.finding("large packets", target),
        // It is a master, as its lanes have shown.
        Err(Unanswered::Connected(_, _, how)) => Finding::fail(
            "large packets",
            "http_unanswered",
            target,
            format!("small requests are answered, and one of {PADDING} bytes met a connection that was {how}"),
        )
        .remedy("look for a proxy between here and there that takes no large requests"),
    }
}

/// The data port of a node.
pub(super) fn data_port(check: &str, target: &str, keys: &ClusterKeys) -> Finding {
    match lane(target, LaneKind::Data, keys) {
        Ok(lane) => Finding::ok(check, format!("{target}: {} round trip", ms(lane.rtt))),
        Err(fault) => fault.finding(check, target),
    }
}

/// The proxy, and the instances it names.
pub(super) fn proxy(url: &str, key: Option<&Token>) -> Vec<Finding> {
    let check = "proxy";
    let Some(rest) = url.strip_prefix("http://") else {
        let reason = if url.starts_with("https://") {
            "this build speaks no TLS"
        } else {
            "is not a URL"
        };
        return vec![
            Finding::fail(check, "bad_address", without_secret(url), reason)
                .remedy("write --proxy http://HOST:PORT"),
        ];
    };
    let target = with_port(rest.split('/').next().unwrap_or(rest), 80);
    let answer = match http(&target, "GET", "/health", "", "") {
        Ok(a) => a,
        Err(fault) => return vec![fault.finding(check, target)],
    };
    let line = || {
        answer
            .body
            .lines()
            .next()
            .unwrap_or_default()
            .chars()
            .take(80)
            .collect::<String>()
    };
    match answer.status {
        200 if answer.body.contains("\"ha_state\"") => vec![
            Finding::fail(check, "wrong_kind", target, "is a master, not a proxy")
                .remedy("give the proxy's URL: mooncake proxy prints it at its start"),
        ],
        200 => {
            let shown = format!("{target}: healthy, answered in {}", ms(answer.took));
            let mut found = vec![Finding::ok(check, shown)];
            found.extend(instances::check(&target, key));
            found
        }
        503 => vec![
            Finding::fail(
                check,
                "proxy_unhealthy",
                target,
                format!("answers, and says it cannot serve: {}", line()),
            )
            .remedy("start its prefill and decode instances, or correct their addresses"),
        ],
        status => {
            // A router without /health still lists its models.
            let models = http(&target, "GET", "/v1/models", "", "");
            match models {
                Ok(m) if m.status == 200 && m.body.contains("\"data\"") => {
                    vec![Finding::ok(check, format!("{target}: lists its models"))]
                }
                _ => {
                    let server = answer
                        .header("server")
                        .map_or_else(String::new, |s| format!(" by {s}"));
                    let reason = format!(
                        "an HTTP server{server} answers, and it is no proxy: HTTP {status} to /health, no /v1/models"
                    );
                    vec![
                        Finding::fail(check, "something_else", target, reason)
                            .remedy("correct --proxy"),
                    ]
                }
            }
        }
    }
}
