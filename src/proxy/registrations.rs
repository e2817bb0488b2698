//! Instances that register themselves over ZeroMQ, as vLLM's P2pNcclConnector does with `proxy_ip` and `proxy_port`: every few
//! seconds each sends its role, its HTTP address and its KV address, and whoever falls silent has gone.
//!
//! Owns the socket (ROUTER) and the leases. Nobody is asked for a key: who reaches this port can have prompts sent to
//! itself, so it is opened only when told so, and the model is checked as with every instance. Refuses to know what instances do.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use foldhash::HashMap;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use super::App;
use super::config::{ConnectorKind, EventsRule, InstanceAddress, Role};
use super::kv::msgpack::{Reader, Value};
use super::kv::zmtp::{Socket, ZmtpError};
use super::named;
use super::registry::{INSTANCES_MAX, NewInstance, Origin};

/// Who was not heard for this long has gone. vLLM's instances send every 3 s.
const LEASE: Duration = Duration::from_secs(10);
/// Between two looks for those.
const LOOK: Duration = Duration::from_secs(1);
/// Connections at once.
const CONNECTIONS_MAX: usize = 1024;
/// Largest message.
const MESSAGE_BYTES_MAX: usize = 16 << 10;
/// A connection that says nothing for this long is closed.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// What an instance says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Said {
    role: Role,
    /// With the KV port as its bootstrap port.
    address: InstanceAddress,
}

/// Who has registered, and what came of it.
#[derive(Debug)]
struct Lease {
    said: Said,
    heard: Instant,
    /// The instance that was entered for it.
    number: Option<u64>,
    /// It was taken out by somebody else, and that has been logged.
    is_refused: bool,
}

#[derive(Debug, Default)]
struct Leases(Mutex<HashMap<String, Lease>>);

/// What a heartbeat asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Beat {
    /// To be entered: it is new, or says something else than it did.
    New,
    /// It could not be entered before, as something else stood in its place.
    Again,
    /// It was entered as this instance.
    Known(u64),
    /// There is no room.
    Full,
}

fn read(message: &[u8]) -> Option<Said> {
    let mut reader = Reader::new(message);
    let Value::Map(fields) = reader.next().ok()? else {
        return None;
    };
    let (mut role, mut http, mut kv) = (None, None, None);
    for _ in 0..fields {
        let Value::Bytes(name) = reader.next().ok()? else {
            return None;
        };
        let name = name.to_vec();
        let text = match reader.next().ok()? {
            Value::Bytes(text) => std::str::from_utf8(text).ok()?.to_owned(),
            _ => continue,
        };
        match name.as_slice() {
            b"type" => role = Some(text),
            b"http_address" => http = Some(text),
            b"zmq_address" => kv = Some(text),
            _ => {}
        }
    }
    let role = match role?.as_str() {
        "P" => Role::Prefill,
        "D" => Role::Decode,
        _ => return None,
    };
    let mut address = InstanceAddress::parse(&http?).ok()?;
    address.bootstrap = Some(InstanceAddress::parse(&kv?).ok()?.port);
    Some(Said { role, address })
}

impl Leases {
    /// Renews a lease.
    fn renew(&self, said: &Said, now: Instant) -> Beat {
        let mut all = self.0.lock();
        let name = said.address.authority();
        if let Some(lease) = all.get_mut(&name).filter(|l| l.said == *said) {
            lease.heard = now;
            return lease.number.map_or(Beat::Again, Beat::Known);
        }
        if all.len() >= INSTANCES_MAX && !all.contains_key(&name) {
            return Beat::Full;
        }
        let lease = Lease {
            said: said.clone(),
            heard: now,
            number: None,
            is_refused: false,
        };
        all.insert(name, lease);
        Beat::New
    }

    fn entered(&self, said: &Said, number: u64) {
        if let Some(lease) = self.0.lock().get_mut(&said.address.authority()) {
            lease.number = Some(number);
        }
    }

    /// It is not entered again. Says whether that is news.
    fn refuse(&self, said: &Said) -> bool {
        let mut all = self.0.lock();
        let lease = all.get_mut(&said.address.authority());
        lease.is_some_and(|lease| !std::mem::replace(&mut lease.is_refused, true))
    }

    fn expired(&self, now: Instant) -> Vec<Said> {
        let mut gone = Vec::new();
        self.0.lock().retain(|_, lease| {
            let is_there = now.duration_since(lease.heard) < LEASE;
            if !is_there {
                gone.push(lease.said.clone());
            }
            is_there
        });
        gone
    }
}

/// Takes registrations until the proxy stops. Tries again when the port cannot be had.
pub(crate) async fn listen(app: Arc<App>, address: SocketAddr) {
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) => tracing::error!(%address, %error, "cannot listen for registrations"),
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(5)) => {}
            () = app.stopping() => return,
        }
    };
    let (leases, places) = (
        Arc::new(Leases::default()),
        Arc::new(Semaphore::new(CONNECTIONS_MAX)),
    );
    let mut look = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (Ok((stream, _)), Ok(place)) = (accepted, places.clone().try_acquire_owned()) else {
                    // Out of descriptors or places: those who have one will give it back.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                };
                let (app, leases) = (app.clone(), leases.clone());
                tokio::spawn(async move {
                    let _ = hear(&app, &leases, stream).await;
                    drop(place);
                });
            }
            _ = look.tick() => {
                leases.expired(Instant::now()).iter().for_each(|said| leave(&app, said));
            }
            () = app.stopping() => return,
        }
    }
}

async fn hear(app: &Arc<App>, leases: &Leases, stream: TcpStream) -> Result<(), ZmtpError> {
    let mut socket = Socket::accept(stream, MESSAGE_BYTES_MAX).await?;
    loop {
        let message = tokio::select! {
            message = timeout(SILENCE_MAX, socket.receive()) => message,
            () = app.stopping() => return Ok(()),
        };
        let message = message.map_err(|_| ZmtpError::Timeout)??;
        let Some(said) = message.last().and_then(|m| read(m)) else {
            tracing::debug!("a registration that is none");
            continue;
        };
        beat(app, leases, &said);
    }
}

/// A heartbeat. Whom an administrator has taken out stays out for as long as it keeps saying the same: it would be back
/// within seconds else. It comes in again after it was silent for [`LEASE`] (a restart), or by `/instances/add`.
fn beat(app: &Arc<App>, leases: &Leases, said: &Said) {
    match leases.renew(said, Instant::now()) {
        Beat::New => {
            leave(app, said);
            enter(app, leases, said);
        }
        Beat::Again => enter(app, leases, said),
        Beat::Known(number) => {
            let is_there = app.registry.all().iter().any(|i| i.number == number);
            if !is_there && leases.refuse(said) {
                tracing::warn!(instance = %said.address, "it registers, but was taken out: it stays out until it has been silent for 10 s, or is added");
            }
        }
        Beat::Full => {
            tracing::debug!(instance = %said.address, "not registered: there are too many")
        }
    }
}

fn enter(app: &Arc<App>, leases: &Leases, said: &Said) {
    let mut new = NewInstance::plain(said.address.clone(), said.role);
    new.connector = Some(ConnectorKind::P2p);
    new.events = EventsRule::of(&app.config.kv_events, &said.address);
    new.origin = Origin::Registered;
    if let Ok(instance) = app.add(new) {
        leases.entered(said, instance.number);
        tracing::info!(instance = %said.address, role = said.role.name(), "registered");
    }
}

fn leave(app: &Arc<App>, said: &Said) {
    let found = app.registry.find(&said.address);
    if let Some(instance) = found.filter(|i| i.origin == Origin::Registered) {
        tracing::info!(instance = %instance.name, "no longer registered");
        app.remove(&instance);
        named::come_back(app, &said.address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(fields: &[(&str, &str)]) -> Vec<u8> {
        let mut out = vec![0x80 | fields.len() as u8];
        for (name, value) in fields {
            for text in [name, value] {
                out.extend_from_slice(&[0xd9, text.len() as u8]);
                out.extend_from_slice(text.as_bytes());
            }
        }
        out
    }

    #[test]
    fn what_vllm_sends() {
        let all = [
            ("type", "P"),
            ("http_address", "10.0.0.1:20001"),
            ("zmq_address", "10.0.0.1:21001"),
        ];
        let said = read(&message(&all)).unwrap();
        assert_eq!(said.role, Role::Prefill);
        let wanted = InstanceAddress::parse("10.0.0.1:20001:21001").unwrap();
        assert_eq!(said.address, wanted);
        for at in 0..3 {
            let mut some = all;
            some[at].1 = "x";
            assert_eq!(read(&message(&some)), None);
            assert_eq!(read(&message(&all[..at])), None);
        }
        assert_eq!(read(b"\xc0"), None);
    }

    #[test]
    fn who_falls_silent_has_gone() {
        let leases = Leases::default();
        let said = |port: u16, kv: u16| Said {
            role: Role::Decode,
            address: InstanceAddress::parse(&format!("h:{port}:{kv}")).unwrap(),
        };
        let now = Instant::now();
        assert_eq!(leases.renew(&said(1, 7), now), Beat::New);
        assert_eq!(leases.renew(&said(1, 7), now), Beat::Again, "not entered");
        leases.entered(&said(1, 7), 42);
        assert_eq!(leases.renew(&said(1, 7), now), Beat::Known(42));
        assert!(leases.refuse(&said(1, 7)) && !leases.refuse(&said(1, 7)));
        let moved = leases.renew(&said(1, 8), now);
        assert_eq!(moved, Beat::New, "restarted with another KV port");
        assert_eq!(leases.renew(&said(2, 7), now + LEASE / 2), Beat::New);
        assert_eq!(leases.expired(now + LEASE), [said(1, 8)]);
        assert!(leases.expired(now + LEASE).is_empty());
    }
}
