//! This host's own firewall against the ports in use, and who holds those ports.
//!
//! Owns running the tools and the conclusions; `rules` reads what they print. Refuses to know what the ports are for.

use std::time::Duration;

use super::report::Finding;
use super::rules::{Action, Fate, Table, fate, parse_iptables, parse_nft};
use super::sockets::{Listener, listeners, name_holders};
use super::system::{self, Ran, Root};

const TOOL: Duration = Duration::from_millis(2_500);

/// What a port is used for here.
#[derive(Clone, Debug)]
pub(super) struct Port {
    pub(super) number: u16,
    pub(super) name: String,
    /// Others connect to it on this host; otherwise this host connects to it elsewhere.
    pub(super) incoming: bool,
}

/// The listings of this machine's firewalls.
pub(super) struct Listings {
    pub(super) nft: Ran,
    pub(super) iptables: Ran,
}

/// Asks the tools; both at once.
pub(super) fn listings() -> Listings {
    let legacy = std::thread::spawn(|| match system::run("iptables-legacy-save", &[], TOOL) {
        // With one backend only, it is called so.
        Ran::Missing => system::run("iptables-save", &[], TOOL),
        other => other,
    });
    let nft = system::run("nft", &["list", "ruleset"], TOOL);
    Listings {
        nft,
        iptables: legacy.join().unwrap_or(Ran::TimedOut),
    }
}

/// Judges the ports in use against the listings, and says who holds those of this host.
pub(super) fn check(root: &Root, listings: &Listings, ports: &[Port]) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut tables: Vec<(String, Table)> = Vec::new();
    match &listings.nft {
        Ran::Text(text) => tables.extend(
            parse_nft(text)
                .into_iter()
                .map(|(n, t)| (format!("nftables {n}"), t)),
        ),
        Ran::Missing => {}
        Ran::Failed(why) => found.push(Finding::skipped(
            "nftables",
            format!("cannot be read: {why}"),
        )),
        Ran::TimedOut => found.push(Finding::skipped("nftables", "nft did not answer")),
    }
    match &listings.iptables {
        Ran::Text(text) => tables.push(("iptables".to_owned(), parse_iptables(text))),
        Ran::Missing => {}
        Ran::Failed(why) => found.push(Finding::skipped(
            "iptables",
            format!("cannot be read: {why}"),
        )),
        Ran::TimedOut => found.push(Finding::skipped("iptables", "iptables-save did not answer")),
    }
    let rules: usize = tables
        .iter()
        .flat_map(|(_, t)| t.values())
        .map(|c| c.rules.len())
        .sum();
    if listings.nft == Ran::Missing && listings.iptables == Ran::Missing {
        found.push(Finding::skipped(
            "rules",
            "neither nft nor iptables-save is installed",
        ));
    } else if !tables.is_empty() {
        let before = found.len();
        for port in ports {
            found.extend(
                tables
                    .iter()
                    .filter_map(|(name, table)| judge(name, table, port)),
            );
        }
        if found.len() == before {
            found.push(Finding::ok(
                "rules",
                format!(
                    "{rules} rules; none stops the {} port(s) in use",
                    ports.len()
                ),
            ));
        }
    }
    found.extend(holders(root, ports));
    found
}

fn judge(name: &str, table: &Table, port: &Port) -> Option<Finding> {
    let (hook, way) = if port.incoming {
        ("input", "to")
    } else {
        ("output", "from here to")
    };
    let check = format!("port {} ({})", port.number, port.name);
    let (action, rule, certain) = match fate(table, hook, port.number) {
        Fate::Passes => return None,
        Fate::Hit(action, rule) => (action, rule, true),
        Fate::Perhaps(action, rule) => (action, rule, false),
    };
    let does = if action == Action::Drop {
        "drops"
    } else {
        "rejects"
    };
    let cause = match (certain, rule.contains("has policy drop"), action) {
        (false, ..) => "firewall_perhaps",
        (_, true, _) => "firewall_policy",
        (_, _, Action::Drop) => "firewall_drop",
        _ => "firewall_reject",
    };
    let direction = if port.incoming { "input" } else { "output" };
    let command = if name.starts_with("iptables") {
        let (chain, flag) = if port.incoming {
            ("INPUT", "")
        } else {
            ("OUTPUT", "")
        };
        format!(
            "iptables -I {chain} -p tcp --dport {} -j ACCEPT{flag}",
            port.number
        )
    } else {
        let family = name.trim_start_matches("nftables ");
        let chain = table
            .iter()
            .find(|(_, c)| c.hook.as_deref() == Some(direction))
            .map_or("input", |(n, _)| n.as_str());
        format!(
            "nft insert rule {family} {chain} tcp dport {} accept",
            port.number
        )
    };
    let remedy = format!("let TCP port {} pass", port.number);
    let value = format!("{name}: {rule}");
    Some(if certain {
        Finding::fail(
            check,
            cause,
            value,
            format!("this rule {does} connections {way} the port"),
        )
        .remedy(remedy)
        .command(command)
    } else {
        Finding::warn(check, cause, value, format!("this rule {does} some connections {way} the port; its conditions were not evaluated")).remedy(remedy).command(command)
    })
}

fn holders(root: &Root, ports: &[Port]) -> Vec<Finding> {
    let wanted: Vec<&Port> = ports.iter().filter(|p| p.incoming).collect();
    let mut all: Vec<Listener> = listeners(root)
        .into_iter()
        .filter(|l| wanted.iter().any(|p| p.number == l.port))
        .collect();
    name_holders(root, &mut all);
    let mut found = Vec::new();
    for port in wanted {
        let mut words: Vec<String> = all
            .iter()
            .filter(|l| l.port == port.number)
            .map(|l| {
                let holder = if l.holder.is_empty() {
                    "a process that this user cannot see"
                } else {
                    &l.holder
                };
                format!("{holder} on {}", l.ip)
            })
            .collect();
        words.dedup();
        if !words.is_empty() {
            found.push(Finding::ok(
                format!("port {} ({})", port.number, port.name),
                format!("held by {}", words.join(", ")),
            ));
        }
    }
    found
}
