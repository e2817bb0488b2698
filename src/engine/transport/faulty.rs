//! A wrapper that makes any transport fail in chosen ways: for tests of everything above it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{InFlight, Transport, TransportKind};
use crate::engine::batch::{Peer, TransferRequest, TransferResult};
use crate::engine::error::TransferError;
use crate::engine::memory::Memory;

/// What happens to one call of `start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing: it works.
    None,
    /// The requests never leave; the caller learns it at its deadline.
    Drop,
    /// They arrive late.
    Delay(Duration),
    /// Only the first `n` requests are carried out, then the connection breaks.
    Truncate(usize),
    /// They are carried out, but the connection breaks before the answer comes.
    Reset,
    /// The peer refuses the connection.
    Refuse,
}

/// `inner` with faults: each call takes the next of the script, and none when it has run out.
pub struct Faulty {
    inner: Arc<dyn Transport>,
    script: Mutex<std::collections::VecDeque<Fault>>,
}

impl Faulty {
    /// Wraps a transport.
    pub fn new(inner: Arc<dyn Transport>, script: impl IntoIterator<Item = Fault>) -> Self {
        Self {
            inner,
            script: Mutex::new(script.into_iter().collect()),
        }
    }
}

#[deny(
    clippy::missing_trait_methods,
    reason = "a new method must not bypass the faults"
)]
impl Transport for Faulty {
    fn kind(&self) -> TransportKind {
        self.inner.kind()
    }

    fn reaches(&self, peer: &Peer) -> bool {
        self.inner.reaches(peer)
    }

    fn start<'a>(
        &'a self,
        requests: &'a [TransferRequest],
        deadline: Instant,
    ) -> Result<Box<dyn InFlight + 'a>, TransferError> {
        let peer = requests[0].peer.name.clone();
        let fault = self.script.lock().pop_front().unwrap_or(Fault::None);
        let broken = TransferError::Broken {
            peer: peer.clone(),
            reason: "injected".to_owned(),
        };
        match fault {
            Fault::None => self.inner.start(requests, deadline),
            Fault::Drop => Ok(Box::new(Failing {
                inner: None,
                keep: 0,
                all: requests.len(),
                wait_until: Some(deadline),
                error: TransferError::Timeout { peer },
            })),
            Fault::Delay(delay) => {
                std::thread::sleep(delay.min(deadline.saturating_duration_since(Instant::now())));
                self.inner.start(requests, deadline)
            }
            Fault::Truncate(n) => {
                let n = n.min(requests.len());
                let inner = match &requests[..n] {
                    [] => None,
                    some => Some(self.inner.start(some, deadline)?),
                };
                Ok(Box::new(Failing {
                    inner,
                    keep: n,
                    all: requests.len(),
                    wait_until: None,
                    error: broken,
                }))
            }
            Fault::Reset => Ok(Box::new(Failing {
                inner: Some(self.inner.start(requests, deadline)?),
                keep: 0,
                all: requests.len(),
                wait_until: None,
                error: broken,
            })),
            Fault::Refuse => Err(TransferError::Unreachable {
                peer,
                reason: "injected".to_owned(),
            }),
        }
    }

    fn keep_only(&self, peers: &[Arc<Peer>]) {
        self.inner.keep_only(peers);
    }

    fn map(&self, peer: &Peer, segment: u32, incarnation: u64) -> Option<Arc<Memory>> {
        self.inner.map(peer, segment, incarnation)
    }

    fn mapped(&self, peer: &Peer, segment: u32, incarnation: u64) -> Option<Arc<Memory>> {
        // A read of mapped memory passes no `start`: only what has no faults left may skip it.
        if self.script.lock().is_empty() {
            self.inner.mapped(peer, segment, incarnation)
        } else {
            None
        }
    }

    fn lives(&self, peer: &Peer, segment: u32, incarnation: u64) -> bool {
        self.inner.lives(peer, segment, incarnation)
    }
}

/// Keeps the first `keep` results of `inner` and fails the rest.
struct Failing<'a> {
    inner: Option<Box<dyn InFlight + 'a>>,
    keep: usize,
    all: usize,
    wait_until: Option<Instant>,
    error: TransferError,
}

impl InFlight for Failing<'_> {
    fn finish(self: Box<Self>, results: &mut Vec<TransferResult>) {
        if let Some(until) = self.wait_until {
            std::thread::sleep(until.saturating_duration_since(Instant::now()));
        }
        let mut real = Vec::new();
        if let Some(inner) = self.inner {
            inner.finish(&mut real);
        }
        real.truncate(self.keep);
        let failed = self.all - real.len();
        results.extend(real);
        results.extend((0..failed).map(|_| Err(self.error.clone())));
    }
}
