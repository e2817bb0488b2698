//! What a proxy is told at its start, and how an instance is written.
//!
//! Owns the settings as plain values and the grammar of addresses. Refuses to know flags and files (`cmd`) and what an
//! instance is doing (`registry`).

use std::path::PathBuf;
use std::time::Duration;

use super::discover::Discovery;
use crate::base::net::join_host_port;
use crate::base::trust::Token;

/// What an instance is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Computes prompts.
    Prefill,
    /// Generates.
    Decode,
    /// Either.
    Both,
}

impl Role {
    /// As written in requests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Both => "both",
        }
    }

    /// From a request.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Prefill, Self::Decode, Self::Both]
            .into_iter()
            .find(|r| r.name() == text)
    }

    /// Whether an instance of this role can do `job`.
    pub fn does(self, job: Self) -> bool {
        self == job || self == Self::Both
    }
}

/// How KV gets from prefill to decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectorKind {
    /// Through a shared store: no parameters.
    Store,
    /// Mooncake's push: bootstrap server, transfer ids, both legs at once.
    Mooncake,
    /// NIXL: parameters of the prefill reply go into the decode request.
    Nixl,
    /// Not at all: decode does everything.
    None,
}

impl ConnectorKind {
    /// As written in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Store => "store",
            Self::Mooncake => "mooncake",
            Self::Nixl => "nixl",
            Self::None => "none",
        }
    }

    /// From a setting; `auto` and unknown words are `None`.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Store, Self::Mooncake, Self::Nixl, Self::None]
            .into_iter()
            .find(|k| k.name() == text)
    }
}

/// Where an instance is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct InstanceAddress {
    /// Name or IP address, without brackets.
    pub host: String,
    /// Port of its HTTP server.
    pub port: u16,
    /// Port of its bootstrap server, if told.
    pub bootstrap: Option<u16>,
}

impl std::fmt::Display for InstanceAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&join_host_port(&self.host, self.port))
    }
}

/// An address that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not an instance: write HOST:PORT, HOST:PORT:BOOTSTRAP, [IPV6]:PORT or http://HOST:PORT"
)]
pub struct AddressError(pub String);

impl InstanceAddress {
    /// Reads `HOST:PORT`, `HOST:PORT:BOOTSTRAP`, `[IPV6]:PORT…`, each with or without `http://`.
    ///
    /// # Errors
    /// When it is none of them.
    pub fn parse(text: &str) -> Result<Self, AddressError> {
        let wrong = || AddressError(text.to_owned());
        let plain = text.trim().strip_prefix("http://").unwrap_or(text.trim());
        let plain = plain.strip_suffix('/').unwrap_or(plain);
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
        })
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

    /// Whether two addresses are the same server.
    pub fn is_same(&self, other: &Self) -> bool {
        self.port == other.port && self.host.eq_ignore_ascii_case(&other.host)
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
            .find(|r| r.instance.as_ref().is_some_and(|i| i.is_same(instance)));
        let rule = named.or_else(|| rules.iter().find(|r| r.instance.is_none()))?;
        EventsAddress::parse(&rule.endpoint, rule.replay.as_deref(), &instance.host)
    }
}

/// Which policy chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyChoice {
    /// For prefill.
    pub prefill: &'static str,
    /// For decode.
    pub decode: &'static str,
}

/// What happens when no prefill instance can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefillDown {
    /// 503.
    Refuse,
    /// Decode computes the prompt itself.
    Decode,
}

/// Where the authorization that workers see comes from.
#[derive(Clone, Debug)]
pub enum UpstreamAuth {
    /// The client's own, else the proxy's.
    Passthrough(Option<Token>),
    /// Always the proxy's.
    Own(Option<Token>),
    /// None.
    Nothing,
}

impl UpstreamAuth {
    /// The proxy's own key, for probes.
    pub fn own(&self) -> Option<&Token> {
        match self {
            Self::Passthrough(token) | Self::Own(token) => token.as_ref(),
            Self::Nothing => None,
        }
    }
}

/// The settings of a proxy.
#[derive(Clone, Debug)]
pub struct ProxyConfig {
    /// Model the instances serve.
    pub model: String,
    /// Prefill instances at the start.
    pub prefill: Vec<InstanceAddress>,
    /// Decode instances at the start.
    pub decode: Vec<InstanceAddress>,
    /// Told connector; `None` finds out per instance.
    pub connector: Option<ConnectorKind>,
    /// Policies per role.
    pub policy: PolicyChoice,
    /// No prefill leg at all.
    pub aggregated: bool,
    /// When no prefill instance can be used.
    pub prefill_down: PrefillDown,
    /// Prompts with fewer uncached tokens than this skip prefill; 0 = never.
    pub prefill_min_tokens: u64,
    /// Key of the admin requests; without one they are refused.
    pub admin_key: Option<Token>,
    /// What workers see as authorization.
    pub upstream_auth: UpstreamAuth,
    /// Whole prefill leg.
    pub prefill_timeout: Duration,
    /// Decode until its first byte.
    pub first_token_timeout: Duration,
    /// Silence of a running answer.
    pub idle_timeout: Duration,
    /// Without progress of a client.
    pub client_timeout: Duration,
    /// Waiting for a place.
    pub queue_timeout: Duration,
    /// Requests under way.
    pub inflight_max: usize,
    /// Requests waiting for a place.
    pub queue_max: usize,
    /// Requests under way per instance and role; 0 = no limit.
    pub instance_max: usize,
    /// Client connections.
    pub connections_max: usize,
    /// Largest request body.
    pub body_bytes_max: usize,
    /// Retries per leg.
    pub retries: u32,
    /// Between health checks.
    pub health_interval: Duration,
    /// Where added instances are remembered.
    pub state_file: Option<PathBuf>,
    /// A JSON line per request; `-` is standard error.
    pub access_log: Option<PathBuf>,
    /// Name the chosen instances in reply headers.
    pub debug_headers: bool,
    /// Where instances of the flags publish their KV events.
    pub kv_events: Vec<EventsRule>,
    /// Ask workers for the tokens of new texts (policy `kv`).
    pub tokenize: bool,
    /// Hand-offs under way per prefill instance; 0 = any number.
    pub handoffs_max: usize,
    /// The same per pair of a prefill and a decode instance.
    pub pair_handoffs_max: usize,
    /// Where instances are looked for.
    pub discover: Vec<Discovery>,
    /// Longest wait for the last block to be readable in the pool before decode starts; 0 = none.
    pub barrier: Duration,
}

impl ProxyConfig {
    /// Defaults for a model.
    pub fn new(model: &str) -> Self {
        Self {
            model: model.to_owned(),
            prefill: Vec::new(),
            decode: Vec::new(),
            connector: None,
            policy: PolicyChoice {
                prefill: "round_robin",
                decode: "round_robin",
            },
            aggregated: false,
            prefill_down: PrefillDown::Refuse,
            prefill_min_tokens: 0,
            admin_key: None,
            upstream_auth: UpstreamAuth::Passthrough(None),
            prefill_timeout: Duration::from_secs(600),
            first_token_timeout: Duration::from_secs(600),
            idle_timeout: Duration::from_secs(300),
            client_timeout: Duration::from_secs(30),
            queue_timeout: Duration::from_secs(10),
            inflight_max: 4096,
            queue_max: 1024,
            instance_max: 0,
            connections_max: 16_384,
            body_bytes_max: 64 << 20,
            retries: 2,
            health_interval: Duration::from_secs(2),
            state_file: None,
            access_log: None,
            debug_headers: false,
            kv_events: Vec::new(),
            tokenize: true,
            handoffs_max: 0,
            pair_handoffs_max: 0,
            discover: Vec::new(),
            barrier: Duration::from_millis(20),
        }
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
        ] {
            assert!(InstanceAddress::parse(bad).is_err(), "{bad}");
        }
        let rules = EventsRule::parse_list("5557/5558, a:1=tcp://b:7").unwrap();
        let of = |i: &str| EventsRule::of(&rules, &parse(i)).unwrap();
        assert_eq!(of("h:1").target, ("h".to_owned(), 5557));
        assert_eq!(of("h:1").replay, Some(("h".to_owned(), 5558)));
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
        let list = InstanceAddress::parse_list("http://a:1 8998 b:2,c:3").unwrap();
        assert_eq!(list.len(), 3);
        assert_eq!((list[0].bootstrap, list[1].bootstrap), (Some(8998), None));
    }
}
