//! What nftables and iptables say, read from their listings: the fate of a packet to a port.
//!
//! Judges what it understands for certain: a rule with conditions it cannot evaluate is said to be conditional.

use std::collections::BTreeMap;

/// What a rule does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Accept,
    Drop,
    Reject,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Ends here.
    End(Action),
    /// Goes to another chain.
    Chain(String),
}

/// One rule as far as it is understood.
#[derive(Clone, Debug)]
pub(super) struct Rule {
    /// Ports it names; `None` = any.
    ports: Option<Vec<(u16, u16)>>,
    step: Step,
    /// It has other conditions: addresses, interfaces, states, rates.
    conditional: bool,
    text: String,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Chain {
    /// `input` or `output` when the kernel enters here.
    pub(super) hook: Option<String>,
    policy_drop: bool,
    pub(super) rules: Vec<Rule>,
}

/// Chains of one table, by name.
pub(super) type Table = BTreeMap<String, Chain>;

/// What happens to new connections of a port, as far as a table says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Passes,
    /// By this rule or policy.
    Hit(Action, String),
    /// By this rule, depending on conditions that are not evaluated.
    Perhaps(Action, String),
}

/// `nft list ruleset`, by table.
pub(super) fn parse_nft(text: &str) -> Vec<(String, Table)> {
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
pub(super) fn parse_iptables(text: &str) -> Table {
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
pub(super) fn fate(table: &Table, hook: &str, port: u16) -> Fate {
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
}
