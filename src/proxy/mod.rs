//! The OpenAI-compatible front for prefill and decode groups (XpYd).
//!
//! A client sees one endpoint; prefill and decode instances come and go behind it. Rooms: [`config`] what it is told;
//! `http` the wire; `server` a client's connection; `admin` its own answers; `registry`, `breaker`, `health` the instances;
//! `policy` who gets a request; `client_params` what clients may say of KV; `kv` what their caches hold; `openai` and [`splice`] what is read and changed of a body; `connector` how KV is handed
//! over; `handoff` a request's way; `relay` the answer's, `behind` that of one which begins with prefill's token. Depends on `base` alone; knows no command line.

mod access_log;
pub mod address;
mod admin;
mod admission;
mod behind;
mod breaker;
mod client_params;
pub mod config;
mod connector;
pub mod discover;
pub mod fuzz;
mod handoff;
mod health;
mod http;
mod kv;
mod line;
mod links;
mod list;
mod load;
mod mask;
mod merge;
mod metrics;
mod named;
mod openai;
mod pace;
pub mod policy;
mod registrations;
mod registry;
mod relay;
mod reply;
mod role;
mod seam;
mod server;
pub mod splice;
mod state_file;
mod tunnel;
mod usage;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore};

use crate::base::trust::ClusterKeys;
use access_log::AccessLog;
use admission::{Gate, RetryBudget};
use config::{InstanceAddress, ProxyConfig, Role};
use handoff::places::Handoffs;
use http::bodies::Bodies;
use kv::Kv;
use line::Line;
use metrics::{CacheCounts, Metrics};
use policy::Policy;
use registry::{AddError, Instance, NewInstance, Origin, Registry};
pub use state_file::StateFileError;
use usage::BytesPerToken;

/// Everything the rooms share.
pub(crate) struct App {
    pub(crate) config: ProxyConfig,
    pub(crate) registry: Registry,
    pub(crate) metrics: Metrics,
    pub(crate) gate: Gate,
    pub(crate) budget: RetryBudget,
    pub(crate) bytes_per_token: BytesPerToken,
    pub(crate) connections: Arc<Semaphore>,
    pub(crate) bodies: Arc<Bodies>,
    pub(crate) access_log: Option<AccessLog>,
    pub(crate) kv: Arc<Kv>,
    pub(crate) handoffs: Arc<Handoffs>,
    /// Who waits for a busy instance, per role.
    lines: [Line; 2],
    pub(crate) admin_keys: Option<ClusterKeys>,
    /// What flags and files said last.
    pub(crate) named: parking_lot::Mutex<named::Named>,
    prefill_policy: Box<dyn Policy>,
    decode_policy: Box<dyn Policy>,
    stop: AtomicBool,
    stopped: Notify,
    releases: AtomicUsize,
}

impl App {
    pub(crate) fn policy(&self, role: Role) -> &dyn Policy {
        match role {
            Role::Decode => self.decode_policy.as_ref(),
            _ => self.prefill_policy.as_ref(),
        }
    }

    /// What the policies found cached, per role that has one.
    pub(crate) fn cache_counts(&self) -> [(Role, &'static str, &CacheCounts); 2] {
        let [prefill, decode] = &self.metrics.caches;
        let names = &self.config.policy;
        [
            (Role::Prefill, names.prefill, prefill),
            (Role::Decode, names.decode, decode),
        ]
    }

    pub(crate) fn line(&self, role: Role) -> &Line {
        &self.lines[usize::from(role == Role::Decode)]
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Ends when the proxy stops. Cancel-safe.
    pub(crate) async fn stopping(&self) {
        loop {
            let stopped = self.stopped.notified();
            if self.is_stopping() {
                return;
            }
            stopped.await;
        }
    }

    /// Whether tokens of prompts matter to anybody.
    pub(crate) fn wants_tokens(&self) -> bool {
        self.config.policy.prefill == "kv"
            || self.config.policy.decode == "kv"
            || self.kv.has_pool()
    }

    /// Counts a hand-off that outlives its client, until it is dropped.
    pub(crate) fn releasing(&self) -> Releasing<'_> {
        self.releases.fetch_add(1, Ordering::Relaxed);
        Releasing(self)
    }

    pub(crate) fn serves_model(&self, model: &str) -> bool {
        model == self.config.model || self.registry.knows_model(model)
    }

    pub(crate) fn has(&self, instance: &Arc<Instance>) -> bool {
        self.registry.all().iter().any(|i| Arc::ptr_eq(i, instance))
    }

    pub(crate) fn add(self: &Arc<Self>, new: NewInstance) -> Result<Arc<Instance>, AddError> {
        let before = self.registry.find(&new.address);
        let instance = self.registry.add(new)?;
        if before.is_none() {
            tokio::spawn(health::watch(self.clone(), instance.clone()));
            if let Some(events) = instance.events.clone() {
                let told = kv::source::Told {
                    app: self.clone(),
                    instance: instance.clone(),
                };
                tokio::spawn(kv::source::watch(self.clone(), Arc::new(told), events));
            }
        }
        self.changed();
        Ok(instance)
    }

    pub(crate) fn remove(&self, instance: &Arc<Instance>) {
        if self.has(instance) {
            self.registry.remove(&instance.address);
            self.forget_cache(instance.number);
            self.changed();
        }
    }

    pub(crate) fn forget_cache(&self, number: u64) {
        self.prefill_policy.forget(number);
        self.decode_policy.forget(number);
    }

    /// The table has changed: wakes who waits for an instance and writes the state file.
    pub(crate) fn changed(&self) {
        self.registry.changed.notify_waiters();
        let Some(path) = &self.config.state_file else {
            return;
        };
        // One writer at a time, each with all that had changed before it.
        static SAVING: parking_lot::Mutex<()> = parking_lot::Mutex::new(());
        let _alone = SAVING.lock();
        let all = self.registry.all();
        let added: Vec<_> = all
            .iter()
            .filter(|i| i.origin == Origin::Added && !i.is_draining())
            .map(|i| state_file::entry(i))
            .collect();
        if let Err(error) = state_file::save(path, &added) {
            tracing::error!(%error, "the state file was not written");
        }
    }
}

/// See [`App::releasing`].
pub(crate) struct Releasing<'a>(&'a App);

impl Drop for Releasing<'_> {
    fn drop(&mut self) {
        self.0.releases.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Why a proxy did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state file.
    #[error("cannot use the state file: {0}")]
    StateFile(#[from] StateFileError),
    /// The access log.
    #[error("cannot open the access log: {0}")]
    AccessLog(#[source] io::Error),
    /// An instance is named twice.
    #[error("instance {0} is named twice")]
    Twice(InstanceAddress),
}

/// A running proxy.
#[derive(Clone)]
pub struct Proxy {
    app: Arc<App>,
}

impl std::fmt::Debug for Proxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Proxy({} instances)", self.app.registry.all().len())
    }
}

impl Proxy {
    /// Takes up the instances and starts watching them; serves nobody yet. Within a tokio runtime.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start(config: ProxyConfig) -> Result<Self, StartError> {
        let access_log = config.access_log.as_deref().map(AccessLog::open);
        let remembered = match &config.state_file {
            Some(path) => state_file::load(path)?,
            None => Vec::new(),
        };
        let kv = Arc::new(Kv::default());
        let app = Arc::new(App {
            registry: Registry::default(),
            metrics: Metrics::default(),
            gate: Gate::new(config.inflight_max, config.queue_max, config.queue_timeout),
            budget: RetryBudget::new(),
            bytes_per_token: BytesPerToken::default(),
            connections: Arc::new(Semaphore::new(config.connections_max)),
            bodies: Arc::default(),
            access_log: access_log.transpose().map_err(StartError::AccessLog)?,
            admin_keys: config
                .admin_key
                .as_ref()
                .map(|k| ClusterKeys::derive(Some(k))),
            prefill_policy: policy::build(config.policy.prefill, &kv),
            decode_policy: policy::build(config.policy.decode, &kv),
            stop: AtomicBool::new(false),
            stopped: Notify::new(),
            releases: AtomicUsize::new(0),
            kv,
            handoffs: Arc::default(),
            lines: Default::default(),
            named: parking_lot::Mutex::default(),
            config,
        });
        let proxy = Self { app };
        named::begin(&proxy.app)?;
        if let Some(master) = proxy.app.config.master.clone() {
            tokio::spawn(kv::master::watch(proxy.app.clone(), master));
        }
        if !proxy.app.config.discover.is_empty() {
            tokio::spawn(discover::watch(proxy.app.clone()));
        }
        for new in remembered {
            // Named by a flag too by now: the flag's is the same instance, and what the flag says of it counts.
            if proxy.app.registry.find(&new.address).is_none() {
                let _ = proxy.app.add(new);
            }
        }
        Ok(proxy)
    }

    /// Serves clients of a listener until the proxy stops.
    pub async fn serve(&self, listener: TcpListener) {
        server::accept(self.app.clone(), listener).await;
    }

    /// Requests under way at instances, hand-offs that outlived their clients included.
    pub fn inflight(&self) -> usize {
        self.app.registry.inflight()
    }

    /// Takes instances of flags and files as they are now: new ones come in, missing ones are taken out of the table (what is
    /// under way there ends by itself). Whoever is there otherwise stays as it is; a role that was changed since changes
    /// only when the files say another than they did. Within a tokio runtime.
    pub fn reload(&self, prefill: &[InstanceAddress], decode: &[InstanceAddress]) {
        named::reload(&self.app, prefill, decode);
    }

    /// Stops: no new connections, connections close after the request they are at, requests under way end. Returns
    /// whether all did within `deadline`.
    pub async fn stop(&self, deadline: Duration) -> bool {
        self.app.stop.store(true, Ordering::Release);
        self.app.stopped.notify_waiters();
        let end = tokio::time::Instant::now() + deadline;
        loop {
            let busy = self.app.config.connections_max - self.app.connections.available_permits();
            if busy == 0 && self.inflight() == 0 && self.app.releases.load(Ordering::Relaxed) == 0 {
                return true;
            }
            if tokio::time::Instant::now() >= end {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// A listener whose port several threads may share.
///
/// # Errors
/// From the system.
pub fn listen(address: SocketAddr, shared: bool) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        tokio::net::TcpSocket::new_v4()?
    } else {
        tokio::net::TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(shared)?;
    socket.bind(address)?;
    socket.listen(4096)
}
