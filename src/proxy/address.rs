//! Where instances and their KV events are, and how that is written.
//!
//! Owns the grammar of addresses. Refuses to know what an instance is doing (`registry`).

use crate::base::net::join_host_port;

/// Most data-parallel ranks of a server.
pub const RANKS_MAX: u32 = 1024;

fn rank_of(text: &str) -> Option<u32> {
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|r| digits && *r < RANKS_MAX)
}

/// Where an instance is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct InstanceAddress {
    /// Name or IP address, without brackets.
    pub host: String,
    /// Port of its HTTP server.
    pub port: u16,
    /// Port of its bootstrap server, if told; with the connector `p2p` the port of its KV engine.
    pub bootstrap: Option<u16>,
    /// One data-parallel rank of a server; `None`: the server as a whole.
    pub rank: Option<u32>,
}

impl std::fmt::Display for InstanceAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.authority())?;
        match self.rank {
            Some(rank) => write!(f, "@{rank}"),
            None => Ok(()),
        }
    }
}

/// An address that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not an instance: write HOST:PORT, HOST:PORT:BOOTSTRAP, [IPV6]:PORT or http://HOST:PORT, with @RANK for one data-parallel rank"
)]
pub struct AddressError(pub String);

impl InstanceAddress {
    /// Reads `HOST:PORT`, `HOST:PORT:BOOTSTRAP`, `[IPV6]:PORT…`, each with or without `http://` and `@RANK`.
    ///
    /// # Errors
    /// When it is none of them.
    pub fn parse(text: &str) -> Result<Self, AddressError> {
        let wrong = || AddressError(text.to_owned());
        let plain = text.trim().strip_prefix("http://").unwrap_or(text.trim());
        let plain = plain.strip_suffix('/').unwrap_or(plain);
        let (plain, rank) = match plain.rsplit_once('@') {
            Some((plain, rank)) => (plain, Some(rank_of(rank).ok_or_else(wrong)?)),
            None => (plain, None),
        };
        let (host, ports) = match plain.strip_prefix('[') {
            Some(rest) => {
                let (host, ports) = rest.split_once("]:").ok_or_else(wrong)?;
                host.parse::<std::net::Ipv6Addr>().map_err(|_| wrong())?;
                (host, ports)
            }
            None => plain.split_once(':').ok_or_else(wrong)?,
        };
        let named = !host.is_empty()
            && host
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b".-_:".contains(&b));
        if !named {
            return Err(wrong());
        }
        let number = |text: &str| match text.parse::<u16>() {
            Ok(port) if port > 0 && text.bytes().all(|b| b.is_ascii_digit()) => Ok(port),
            _ => Err(wrong()),
        };
        let (port, bootstrap) = match ports.split_once(':') {
            Some((port, bootstrap)) => (number(port)?, Some(number(bootstrap)?)),
            None => (number(ports)?, None),
        };
        Ok(Self {
            host: host.to_owned(),
            port,
            bootstrap,
            rank,
        })
    }

    /// `HOST:PORT` without a rank.
    pub fn authority(&self) -> String {
        join_host_port(&self.host, self.port)
    }

    /// Reads a list; a bare number after an address is its bootstrap port, as vLLM's own proxy writes it.
    ///
    /// # Errors
    /// The first that is no address.
    pub fn parse_list(text: &str) -> Result<Vec<Self>, AddressError> {
        let mut found: Vec<Self> = Vec::new();
        for word in text.split([',', ' ']).filter(|w| !w.is_empty()) {
            match (word.parse::<u16>(), found.last_mut()) {
                (Ok(port), Some(last)) if port > 0 => last.bootstrap = Some(port),
                (Err(_), Some(_)) if word == "none" => {}
                _ => found.push(Self::parse(word)?),
            }
        }
        Ok(found)
    }

    /// Whether two addresses are the same instance: server and rank.
    pub fn is_same(&self, other: &Self) -> bool {
        self.is_same_server(other) && self.rank == other.rank
    }

    /// Whether two addresses are the same server.
    pub fn is_same_server(&self, other: &Self) -> bool {
        self.port == other.port && self.host.eq_ignore_ascii_case(&other.host)
    }

    /// Whether this names `other`: the same instance, or the server whose rank it is.
    pub fn covers(&self, other: &Self) -> bool {
        self.is_same_server(other) && (self.rank.is_none() || self.rank == other.rank)
    }

    /// The ranks of a server that has `count`; itself where there is one, or where it names a rank already.
    pub fn ranks(&self, count: u32) -> Vec<Self> {
        if count <= 1 || self.rank.is_some() {
            return vec![self.clone()];
        }
        let of = |rank| Self {
            rank: Some(rank),
            ..self.clone()
        };
        (0..count.min(RANKS_MAX)).map(of).collect()
    }
}

/// Where an instance publishes its KV events, as vLLM's `--kv-events-config` names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventsAddress {
    /// Of the publisher.
    pub target: (String, u16),
    /// Of the replay socket, if there is one.
    pub replay: Option<(String, u16)>,
    /// What the topics to hear begin with.
    pub topic: String,
}

impl std::fmt::Display for EventsAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "tcp://{}", join_host_port(&self.target.0, self.target.1))
    }
}

impl EventsAddress {
    /// Reads endpoints as an engine on `host` has them: `tcp://*:5557`, `tcp://HOST:PORT`, `HOST:PORT` or a port.
    pub fn parse(endpoint: &str, replay: Option<&str>, host: &str) -> Option<Self> {
        let one = |text: &str| {
            let plain = text.trim().strip_prefix("tcp://").unwrap_or(text.trim());
            let (there, port) = plain.rsplit_once(':').unwrap_or(("", plain));
            let there = there.trim_start_matches('[').trim_end_matches(']');
            let is_any = matches!(there, "" | "*" | "0.0.0.0" | "::");
            let port = port.parse::<u16>().ok().filter(|p| *p > 0)?;
            let is_host = there
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b".-_:".contains(&b));
            let named = if is_any {
                Some(host)
            } else {
                Some(there).filter(|_| is_host)
            };
            Some((named?.to_owned(), port))
        };
        Some(Self {
            target: one(endpoint)?,
            replay: match replay {
                None | Some("") => None,
                Some(text) => Some(one(text)?),
            },
            topic: String::new(),
        })
    }

    /// That of a data-parallel rank: engines count ports up from the one they were told.
    #[must_use]
    pub fn of_rank(mut self, rank: Option<u32>) -> Option<Self> {
        let rank = u16::try_from(rank.unwrap_or(0)).ok()?;
        self.target.1 = self.target.1.checked_add(rank)?;
        if let Some((_, port)) = &mut self.replay {
            *port = port.checked_add(rank)?;
        }
        Some(self)
    }
}

/// Where KV events of instances of the flags are: of one instance, or of all that are not named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventsRule {
    /// `None`: all others.
    pub instance: Option<InstanceAddress>,
    /// Endpoint as written.
    pub endpoint: String,
    /// Replay endpoint as written.
    pub replay: Option<String>,
}

impl EventsRule {
    /// Reads a list of `[INSTANCE=]ENDPOINT[/REPLAY]`, an endpoint being a port, `HOST:PORT` or `tcp://HOST:PORT`.
    ///
    /// # Errors
    /// The first word that is none.
    pub fn parse_list(text: &str) -> Result<Vec<Self>, String> {
        let one = |word: &str| {
            let (instance, rest) = match word.split_once('=') {
                Some((name, rest)) => (Some(InstanceAddress::parse(name).ok()?), rest),
                None => (None, word),
            };
            let rest = rest.replace("tcp://", "");
            let (endpoint, replay) = match rest.split_once('/') {
                Some((endpoint, replay)) => (endpoint, Some(replay.to_owned())),
                None => (rest.as_str(), None),
            };
            EventsAddress::parse(endpoint, replay.as_deref(), "host")?;
            Some(Self {
                instance,
                endpoint: endpoint.to_owned(),
                replay,
            })
        };
        let words = text.split([',', ' ']).filter(|w| !w.is_empty());
        words
            .map(|w| one(w).ok_or_else(|| format!("`{w}` is not [INSTANCE=]PORT[/REPLAY_PORT]")))
            .collect()
    }

    /// What the rules say of an instance.
    pub fn of(rules: &[Self], instance: &InstanceAddress) -> Option<EventsAddress> {
        let named = rules
            .iter()
            .find(|r| r.instance.as_ref().is_some_and(|i| i.covers(instance)));
        let rule = named.or_else(|| rules.iter().find(|r| r.instance.is_none()))?;
        // A rule for one rank names that rank's own port.
        let counted = rule.instance.as_ref().is_none_or(|i| i.rank.is_none());
        EventsAddress::parse(&rule.endpoint, rule.replay.as_deref(), &instance.host)?
            .of_rank(instance.rank.filter(|_| counted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let parse = |t: &str| InstanceAddress::parse(t).unwrap();
        assert_eq!(parse("h:1").to_string(), "h:1");
        assert_eq!(
            parse("http://a.b-c.local:8100/").to_string(),
            "a.b-c.local:8100"
        );
        assert_eq!(parse("[::1]:5:8998").to_string(), "[::1]:5");
        assert_eq!(parse("[::1]:5:8998").bootstrap, Some(8998));
        assert_eq!(parse("10.0.0.1:8100:8998").bootstrap, Some(8998));
        assert_eq!(parse("[::1]:5:8998@3").to_string(), "[::1]:5@3");
        for bad in [
            "",
            "h",
            ":1",
            "h:",
            "h:0",
            "h:x",
            "h:70000",
            "h:1:2:3",
            "::1:5",
            "[::1]",
            "https://h:1",
            "h:1/v1",
            "a b:1",
            "h:+1",
            "user@h:1",
            "[zz]:1",
            "h:1@",
            "h:1@-1",
            "h:1@1024",
            "h:1@0@1",
        ] {
            assert!(InstanceAddress::parse(bad).is_err(), "{bad}");
        }
        let list = InstanceAddress::parse_list("http://a:1 8998 b:2,c:3").unwrap();
        assert_eq!(list.len(), 3);
        assert_eq!((list[0].bootstrap, list[1].bootstrap), (Some(8998), None));
    }

    #[test]
    fn ranks_of_a_server() {
        let server = InstanceAddress::parse("h:1:8998").unwrap();
        let names = |count| {
            server
                .ranks(count)
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        };
        assert_eq!(names(1), ["h:1"]);
        assert_eq!(names(2), ["h:1@0", "h:1@1"]);
        let ranks = server.ranks(2);
        assert!(
            server.covers(&ranks[1]) && !ranks[1].covers(&server) && !ranks[0].covers(&ranks[1])
        );
        assert!(ranks[0].is_same_server(&ranks[1]) && !ranks[0].is_same(&ranks[1]));
        assert_eq!(
            ranks[1].ranks(5),
            [ranks[1].clone()],
            "it names a rank already"
        );
    }

    #[test]
    fn where_events_are() {
        let parse = |t: &str| InstanceAddress::parse(t).unwrap();
        let rules = EventsRule::parse_list("5557/5567, a:1=tcp://b:7, c:1@1=9").unwrap();
        let of = |i: &str| EventsRule::of(&rules, &parse(i)).unwrap();
        assert_eq!(of("h:1").target, ("h".to_owned(), 5557));
        assert_eq!(of("h:1").replay, Some(("h".to_owned(), 5567)));
        // Rank after rank, as vLLM counts them.
        assert_eq!(of("h:1@2").target, ("h".to_owned(), 5559));
        assert_eq!(of("h:1@2").replay, Some(("h".to_owned(), 5569)));
        assert_eq!(of("a:1@1").target, ("b".to_owned(), 8));
        assert_eq!((of("c:1@1").target.1, of("c:1@0").target.1), (9, 5557));
        assert_eq!(
            (of("a:1").target, of("a:1").replay),
            (("b".to_owned(), 7), None)
        );
        let any = EventsAddress::parse("tcp://*:5557", Some("tcp://[::1]:9"), "h").unwrap();
        assert_eq!(
            (any.target.0.as_str(), any.replay),
            ("h", Some(("::1".to_owned(), 9)))
        );
        for bad in ["x", "a:1=", "5557/x", "ipc:///tmp/x", "0"] {
            assert!(EventsRule::parse_list(bad).is_err(), "{bad}");
        }
        let last = EventsRule::parse_list("65535").unwrap();
        assert_eq!(EventsRule::of(&last, &parse("h:1@1")), None);
    }
}
