//! What a proxy is told at its start, and how an instance is written.
//!
//! Owns the settings as plain values (addresses are `address`'s). Refuses to know flags and files (`cmd`) and what an
//! instance is doing (`registry`).

use std::path::PathBuf;
use std::time::Duration;

pub use super::address::{AddressError, EventsAddress, EventsRule, InstanceAddress};
use super::discover::Discovery;
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
    /// vLLM's P2pNcclConnector: the request id names both ends.
    P2p,
    /// SGLang: both legs at once, with the address of prefill's bootstrap server and a room.
    Sglang,
    /// Not at all: decode does everything.
    None,
}

impl ConnectorKind {
    /// Every one.
    pub const ALL: [Self; 6] = [
        Self::Store,
        Self::Mooncake,
        Self::Nixl,
        Self::P2p,
        Self::Sglang,
        Self::None,
    ];

    /// As written in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Store => "store",
            Self::Mooncake => "mooncake",
            Self::Nixl => "nixl",
            Self::P2p => "p2p",
            Self::Sglang => "sglang",
            Self::None => "none",
        }
    }

    /// From a setting; `auto` and unknown words are `None`.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|k| k.name() == text)
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
    /// Data-parallel ranks of instances that are found or added without saying so; 1 = none are told apart.
    pub ranks: u32,
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
    /// Pass on what clients say about where KV is or goes.
    pub trust_kv_params: bool,
    /// Where instances of the flags publish their KV events.
    pub kv_events: Vec<EventsRule>,
    /// Ask workers for the tokens of new texts (policy `kv`).
    pub tokenize: bool,
    /// Go on with a streamed completion elsewhere when its decode instance dies.
    pub resume: bool,
    /// Pass prefill's token on before decode is asked, where the store hands over.
    pub early: bool,
    /// Hand-offs under way per prefill instance; 0 = any number.
    pub handoffs_max: usize,
    /// The same per pair of a prefill and a decode instance.
    pub pair_handoffs_max: usize,
    /// Our master, for its object events.
    pub master: Option<(String, u16)>,
    /// The cluster token, for the master.
    pub master_token: Option<Token>,
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
            ranks: 1,
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
            trust_kv_params: false,
            kv_events: Vec::new(),
            tokenize: true,
            resume: false,
            early: false,
            handoffs_max: 0,
            pair_handoffs_max: 0,
            master: None,
            master_token: None,
            discover: Vec::new(),
            barrier: Duration::from_millis(20),
        }
    }
}

/// What is behind the last `/` of a model's name or path.
pub(crate) fn last_part(name: &str) -> &str {
    let name = name.trim_end_matches('/');
    name.rsplit('/').next().unwrap_or_default()
}
