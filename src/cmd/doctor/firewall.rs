//! This host's own firewall and sockets: rules that hit the ports in use, and who holds a port.
//!
//! Owns reading nftables' and iptables' listings and `/proc/net/tcp`. Judges what it understands for certain: a rule with
//! conditions it cannot evaluate is said to be conditional. Refuses to know what the ports are for.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use super::report::Finding;
use super::system::{self, Ran, Root};

const TOOL: Duration = Duration::from_millis(2_500);
/// Bound of looking for the process behind a socket: hosts have many processes.
const HOLDERS: Duration = Duration::from_millis(1_500);

/// A socket that takes connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listener {
    pub(super) ip: IpAddr,
    pub(super) port: u16,
    inode: u64,
    /// `name (pid N)`; empty when it cannot be seen.
    pub(super) holder: String,
}

/// What a port is used for here.
#[derive(Clone, Debug)]
pub(super) struct Port {
    pub(super) number: u16,
    pub(super) name: String,
    /// Others connect to it on this host; otherwise this host connects to it elsewhere.
    pub(super) incoming: bool,
}

/// Listeners of this machine on one port, with who holds them.
pub(super) fn listeners_on(port: u16) -> Vec<Listener> {
    let root = Root::new(std::path::Path::new("/"));
    let mut found: Vec<Listener> = listeners(&root)
        .into_iter()
        .filter(|l| l.port == port)
        .collect();
    name_holders(&root, &mut found);
    found
}

fn listeners(root: &Root) -> Vec<Listener> {
    let mut all = Vec::new();
    for path in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let Some(text) = root.read(path) else {
            continue;
        };
        all.extend(text.lines().skip(1).filter_map(listener));
    }
    all
}

/// One line of `/proc/net/tcp` in state LISTEN.
fn listener(line: &str) -> Option<Listener> {
    let words: Vec<&str> = line.split_whitespace().collect();
    if words.get(3) != Some(&"0A") {
        return None;
    }
    let (ip, port) = words.get(1)?.split_once(':')?;
    // Words of 32 bits in the machine's order.
    let word = |at: usize| {
        Some(
            u32::from_str_radix(ip.get(at * 8..at * 8 + 8)?, 16)
                .ok()?
                .to_ne_bytes(),
        )
    };
    let ip = if ip.len() == 8 {
        IpAddr::V4(Ipv4Addr::from(word(0)?))
    } else {
        let mut bytes = [0; 16];
        for at in 0..4 {
            bytes[at * 4..at * 4 + 4].copy_from_slice(&word(at)?);
        }
        let v6 = Ipv6Addr::from(bytes);
        v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
    };
    Some(Listener {
        ip,
        port: u16::from_str_radix(port, 16).ok()?,
        inode: words.get(9)?.parse().ok()?,
        holder: String::new(),
    })
}

/// Looks for the processes that have the sockets open.
fn name_holders(root: &Root, listeners: &mut [Listener]) {
    let end = Instant::now() + HOLDERS;
    let mut missing = listeners.len();
    for pid in root
        .names("/proc")
        .into_iter()
        .filter(|n| n.bytes().all(|b| b.is_ascii_digit()))
    {
        if missing == 0 || Instant::now() > end {
            return;
        }
        for fd in root.names(&format!("/proc/{pid}/fd")) {
            let Ok(target) = std::fs::read_link(root.at(&format!("/proc/{pid}/fd/{fd}"))) else {
                continue;
            };
            let Some(inode) = target.to_str().and_then(|t| {
                t.strip_prefix("socket:[")?
                    .strip_suffix(']')?
                    .parse::<u64>()
                    .ok()
            }) else {
                continue;
            };
            for l in listeners
                .iter_mut()
                .filter(|l| l.inode == inode && l.holder.is_empty())
            {
                let name = root.read(&format!("/proc/{pid}/comm")).unwrap_or_default();
                l.holder = format!("{name} (pid {pid})");
                missing -= 1;
            }
        }
    }
}

/// What a rule does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Accept,
    Drop,
    Reject,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// Ends here.
    End(Action),
    /// Goes to another chain.
    Chain(String),
}

/// One rule as far as it is understood.
#[derive(Clone, Debug)]
struct Rule {
    /// Ports it names; `None` = any.
    ports: Option<Vec<(u16, u16)>>,
    step: Step,
    /// It has other conditions: addresses, interfaces, states, rates.
    conditional: bool,
    text: String,
}

#[derive(Clone, Debug, Default)]
struct Chain {
    /// `input` or `output` when the kernel enters here.
    hook: Option<String>,
    policy_drop: bool,
    rules: Vec<Rule>,
}

/// Chains of one table, by name.
type Table = BTreeMap<String, Chain>;

/// What happens to new connections of a port, as far as a table says.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Passes,
    /// By this rule or policy.
    Hit(Action, String),
    /// By this rule, depending on conditions that are not evaluated.
    Perhaps(Action, String),
}

/// `nft list ruleset`, by table.
fn parse_nft(text: &str) -> Vec<(String, Table)> {
    let mut tables: Vec<(String, Table)> = Vec::new();
    let mut chain = String::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = line
            .strip_prefix("table ")
            .and_then(|l| l.strip_suffix('{'))
        {
            tables.push((name.trim().to_owned(), Table::new()));
            continue;
        }
        if let Some(name) = line
            .strip_prefix("chain ")
            .and_then(|l| l.strip_suffix('{'))
        {
            name.trim().clone_into(&mut chain);
            if let Some((_, table)) = tables.last_mut() {
                table.insert(chain.clone(), Chain::default());
            }
            continue;
        }
        if line == "}" {
            chain.clear();
            continue;
        }
        let Some(current) = tables.last_mut().and_then(|(_, t)| t.get_mut(&chain)) else {
            continue;
        };
        if line.starts_with("type ") {
            if line.contains("type filter") || line.contains("type route") {
                current.hook = line
                    .split_whitespace()
                    .skip_while(|w| *w != "hook")
                    .nth(1)
                    .map(str::to_owned);
            }
            current.policy_drop = line.contains("policy drop");
        } else if let Some(rule) = nft_rule(line) {
            current.rules.push(rule);
        }
    }
    tables
}

fn nft_rule(line: &str) -> Option<Rule> {
    let mut words: Vec<&str> = line.split_whitespace().collect();
    let mut step = None;
    let mut kept = Vec::new();
    let mut ports = None;
    let mut at = 0;
    let mut conditional = false;
    while at < words.len() {
        let word = words[at];
        match word {
            "accept" => step = Some(Step::End(Action::Accept)),
            "drop" => step = Some(Step::End(Action::Drop)),
            "reject" => {
                step = Some(Step::End(Action::Reject));
                break;
            }
            "jump" | "goto" => {
                step = words.get(at + 1).map(|c| Step::Chain((*c).to_owned()));
                at += 1;
            }
            "tcp" if words.get(at + 1) == Some(&"dport") => {
                let rest = words.split_off(at + 2).join(" ");
                let (set, after, inverted) = set_of(&rest);
                ports = set;
                conditional |= inverted || ports.is_none();
                let after: Vec<&str> = after.split_whitespace().collect();
                // The rest of the rule is looked at by itself: it borrows from `line` no longer.
                let more = after.join(" ");
                let tail = tail_of(&more);
                conditional |= tail.1;
                step = tail.0.or(step);
                break;
            }
            "udp" | "icmp" | "icmpv6" | "sctp" => return None,
            "counter" | "packets" | "bytes" | "log" | "prefix" | "level" | "meta" | "comment" => {}
            "l4proto" => match words.get(at + 1) {
                Some(&"tcp") | Some(&"6") => at += 1,
                _ => return None,
            },
            _ if word.bytes().all(|b| b.is_ascii_digit())
                || word.starts_with('"')
                || word.ends_with('"') => {}
            _ => kept.push(word),
        }
        at += 1;
    }
    conditional |= !kept.is_empty();
    Some(Rule {
        ports,
        step: step?,
        conditional,
        text: line.to_owned(),
    })
}

/// Verdict and conditions of what follows the ports in a rule.
fn tail_of(text: &str) -> (Option<Step>, bool) {
    match nft_rule(text) {
        Some(rule) => (Some(rule.step), rule.conditional),
        None => (None, true),
    }
}

/// `50051`, `1-5`, `{ 1, 2-3 }` or `!= …` at the start of a text, and what follows.
fn set_of(text: &str) -> (Option<Vec<(u16, u16)>>, &str, bool) {
    let (text, inverted) = text
        .strip_prefix("!= ")
        .map_or((text, false), |t| (t, true));
    let (set, after) = match text.strip_prefix('{') {
        Some(rest) => rest.split_once('}').unwrap_or((rest, "")),
        None => text.split_once(' ').unwrap_or((text, "")),
    };
    let ranges: Option<Vec<(u16, u16)>> = set.split(',').map(|r| range(r.trim(), '-')).collect();
    (ranges, after, inverted)
}

fn range(text: &str, between: char) -> Option<(u16, u16)> {
    match text.split_once(between) {
        Some((from, to)) => Some((from.trim().parse().ok()?, to.trim().parse().ok()?)),
        None => text.parse().ok().map(|p| (p, p)),
    }
}

/// `iptables-save`: the filter table.
fn parse_iptables(text: &str) -> Table {
    let mut table = Table::new();
    let mut filter = false;
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('*') {
            filter = name == "filter";
        } else if let Some(rest) = line.strip_prefix(':').filter(|_| filter) {
            let mut words = rest.split_whitespace();
            let (Some(name), Some(policy)) = (words.next(), words.next()) else {
                continue;
            };
            let chain = table.entry(name.to_owned()).or_default();
            chain.hook = matches!(name, "INPUT" | "OUTPUT").then(|| name.to_ascii_lowercase());
            chain.policy_drop = policy == "DROP";
        } else if let Some(rest) = line.strip_prefix("-A ").filter(|_| filter)
            && let Some((name, rule)) = iptables_rule(rest, line)
        {
            table.entry(name).or_default().rules.push(rule);
        }
    }
    table
}

fn iptables_rule(rest: &str, line: &str) -> Option<(String, Rule)> {
    let mut words = rest.split_whitespace();
    let name = words.next()?.to_owned();
    let (mut ports, mut step, mut conditional) = (None, None, false);
    while let Some(word) = words.next() {
        match word {
            "-p" => {
                if words.next() != Some("tcp") {
                    return None;
                }
            }
            // Matches that only announce options, and options that decide nothing.
            "-m" => match words.next() {
                Some("tcp" | "multiport" | "comment") => {}
                _ => conditional = true,
            },
            "--dport" | "--dports" => {
                let set = words.next()?;
                ports = set.split(',').map(|r| range(r, ':')).collect();
                conditional |= ports.is_none();
            }
            "-j" | "-g" => {
                step = match words.next()? {
                    "ACCEPT" => Some(Step::End(Action::Accept)),
                    "DROP" => Some(Step::End(Action::Drop)),
                    "REJECT" => Some(Step::End(Action::Reject)),
                    "LOG" | "RETURN" => return None,
                    chain => Some(Step::Chain(chain.to_owned())),
                };
            }
            "--reject-with" | "--comment" => drop(words.next()),
            _ => conditional = true,
        }
    }
    Some((
        name,
        Rule {
            ports,
            step: step?,
            conditional,
            text: line.to_owned(),
        },
    ))
}

/// What a table does with new TCP connections to a port at a hook.
fn fate(table: &Table, hook: &str, port: u16) -> Fate {
    for (name, chain) in table
        .iter()
        .filter(|(_, c)| c.hook.as_deref() == Some(hook))
    {
        let policy = || {
            if chain.policy_drop {
                Fate::Hit(
                    Action::Drop,
                    format!("chain {name} has policy drop, and no rule lets port {port} pass"),
                )
            } else {
                Fate::Passes
            }
        };
        let fate = walk(table, chain, port, 0).unwrap_or_else(policy);
        if fate != Fate::Passes {
            return fate;
        }
    }
    Fate::Passes
}

/// `None`: nothing in the chain decides.
fn walk(table: &Table, chain: &Chain, port: u16, depth: usize) -> Option<Fate> {
    let mut perhaps = None;
    for rule in &chain.rules {
        if rule
            .ports
            .as_ref()
            .is_some_and(|p| !p.iter().any(|(from, to)| (*from..=*to).contains(&port)))
        {
            continue;
        }
        let outcome = match &rule.step {
            Step::End(Action::Accept) => Some(Fate::Passes),
            Step::End(action) => Some(Fate::Hit(*action, rule.text.clone())),
            // Chains call each other; the kernel forbids loops, a listing may lie.
            Step::Chain(name) if depth < 16 => table
                .get(name)
                .and_then(|c| walk(table, c, port, depth + 1)),
            Step::Chain(_) => None,
        };
        match outcome {
            None => {}
            // Conditions that are not evaluated: only a rule that names the port is meant for it, and what it does
            // not catch goes on.
            Some(fate) if rule.conditional => {
                let fate = match fate {
                    Fate::Hit(action, text) => Fate::Perhaps(action, text),
                    other => other,
                };
                perhaps = perhaps.or_else(|| rule.ports.is_some().then_some(fate));
            }
            Some(decided) => return Some(perhaps.unwrap_or(decided)),
        }
    }
    perhaps
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

#[cfg(test)]
mod tests {
    use super::*;

    fn nft(rules: &str) -> Table {
        let text = format!(
            "table inet f {{\n\tchain in {{\n\t\ttype filter hook input priority filter; policy {rules}\n\t}}\n\tchain sub {{\n\t\ttcp dport 9 drop\n\t}}\n}}\n"
        );
        parse_nft(&text).remove(0).1
    }

    #[test]
    fn nft_rules() {
        let hit = |t: &Table, port| fate(t, "input", port);
        assert_eq!(
            hit(
                &nft("accept;\n tcp dport 5 counter packets 1 bytes 2 drop"),
                6
            ),
            Fate::Passes
        );
        assert!(matches!(
            hit(
                &nft("accept;\n tcp dport 5 counter packets 1 bytes 2 drop"),
                5
            ),
            Fate::Hit(Action::Drop, _)
        ));
        assert!(matches!(
            hit(
                &nft("accept;\n tcp dport { 1, 4-6 } reject with tcp reset"),
                5
            ),
            Fate::Hit(Action::Reject, _)
        ));
        assert!(
            matches!(hit(&nft("drop;\n iifname \"lo\" accept\n ct state established,related accept"), 5), Fate::Hit(Action::Drop, p) if p.contains("policy"))
        );
        assert_eq!(
            hit(
                &nft("drop;\n iifname \"lo\" accept\n tcp dport 5 accept"),
                5
            ),
            Fate::Passes
        );
        assert_eq!(
            hit(&nft("drop;\n ip saddr 10.0.0.0/8 tcp dport 5 accept"), 5),
            Fate::Passes
        );
        assert!(matches!(
            hit(&nft("accept;\n ip saddr 10.0.0.1 tcp dport 5 drop"), 5),
            Fate::Perhaps(..)
        ));
        assert!(matches!(
            hit(&nft("accept;\n jump sub"), 9),
            Fate::Hit(Action::Drop, _)
        ));
        assert_eq!(hit(&nft("accept;\n udp dport 5 drop"), 5), Fate::Passes);
        assert_eq!(
            hit(&nft("accept;\n meta l4proto tcp drop"), 7),
            Fate::Hit(Action::Drop, "meta l4proto tcp drop".to_owned())
        );
        assert_eq!(hit(&nft("accept;\n tcp dport != 5 drop"), 9), Fate::Passes);
    }

    #[test]
    fn iptables_rules() {
        let table = parse_iptables(
            "*filter\n:INPUT DROP [0:0]\n:X - [0:0]\n-A INPUT -i lo -j ACCEPT\n-A INPUT -p tcp -m multiport --dports 5,7:9 -j X\n-A INPUT -p udp -j DROP\n-A X -j REJECT --reject-with tcp-reset\n-A INPUT -p tcp -m tcp --dport 4 -j ACCEPT\nCOMMIT\n",
        );
        assert!(matches!(
            fate(&table, "input", 8),
            Fate::Hit(Action::Reject, _)
        ));
        assert_eq!(fate(&table, "input", 4), Fate::Passes);
        assert!(
            matches!(fate(&table, "input", 3), Fate::Hit(Action::Drop, p) if p.contains("policy"))
        );
        assert_eq!(fate(&table, "output", 3), Fate::Passes);
    }

    #[test]
    fn sockets_of_proc() {
        let line = "   0: 0100007F:C383 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 41 1 0";
        let l = listener(line).unwrap();
        assert_eq!(
            (l.ip, l.port, l.inode),
            ("127.0.0.1".parse().unwrap(), 50_051, 41)
        );
        let line = "   0: 00000000000000000000000000000000:0050 0:0 0A 0:0 0:0 0 0 0 42 1 0";
        assert_eq!(listener(line).unwrap().ip, "::".parse::<IpAddr>().unwrap());
        assert_eq!(listener("garbage"), None);
        assert_eq!(listener("0: xx:yy 0 0A"), None);
    }
}
