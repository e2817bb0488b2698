//! Who may come in, and how often something is tried again.
//!
//! Owns the bound on requests under way, the queue before it with its order and deadline, and the retry budget. Refusals come before
//! any prefill has begun.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// Why a request was turned away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("too many requests are waiting")]
    QueueFull,
    #[error("no place became free in time")]
    Waited,
}

/// Who waits: order of the queue.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Claim {
    /// Smaller comes first, as with vLLM's `priority`.
    pub(crate) priority: i64,
    /// Requests of one key take turns with those of others.
    pub(crate) key: u64,
}

/// Where in a queue somebody stands: by priority, then keys in turn, then arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Order {
    priority: i64,
    /// Turn within the priority: what a key has waiting stands one behind the other, and keys stand side by side.
    turn: u64,
    number: u64,
}

/// Hands out places in a queue.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    numbers: u64,
    /// Turn of who was called last.
    turn: u64,
}

impl Turns {
    /// The place of a newcomer behind its own among `waiting` (keys and places).
    pub(crate) fn order(
        &mut self,
        claim: Claim,
        waiting: impl Iterator<Item = (u64, Order)>,
    ) -> Order {
        let number = self.numbers;
        self.numbers += 1;
        let own = waiting.filter(|(key, o)| *key == claim.key && o.priority == claim.priority);
        let turn = own.map(|(_, o)| o.turn + 1).max().unwrap_or(0);
        Order {
            priority: claim.priority,
            turn: turn.max(self.turn),
            number,
        }
    }

    /// Somebody has left the queue for what it waited for.
    pub(crate) fn called(&mut self, order: Order) {
        self.turn = self.turn.max(order.turn);
    }
}

#[derive(Debug)]
struct Waiter {
    order: Order,
    key: u64,
    call: oneshot::Sender<Place>,
}

#[derive(Debug, Default)]
struct Queue {
    free: usize,
    waiters: Vec<Waiter>,
    turns: Turns,
}

/// The door.
#[derive(Clone, Debug)]
pub(crate) struct Gate {
    queue: Arc<Mutex<Queue>>,
    waiting_max: usize,
    patience: Duration,
}

/// A place; dropping it calls the next.
#[derive(Debug)]
pub(crate) struct Place {
    queue: Arc<Mutex<Queue>>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut queue = self.queue.lock();
        queue.free += 1;
        let called = queue.call(&self.queue);
        drop(queue);
        if let Some((call, place)) = called {
            // One that has gone meanwhile drops the place, which calls the next.
            drop(call.send(place));
        }
    }
}

impl Queue {
    fn call(&mut self, all: &Arc<Mutex<Self>>) -> Option<(oneshot::Sender<Place>, Place)> {
        if self.free == 0 {
            return None;
        }
        let waiting = self.waiters.iter().enumerate();
        let (next, _) = waiting.min_by_key(|(_, w)| w.order)?;
        let waiter = self.waiters.swap_remove(next);
        self.turns.called(waiter.order);
        self.free -= 1;
        let queue = all.clone();
        Some((waiter.call, Place { queue }))
    }
}

/// Takes a waiter out of the queue when it stops waiting.
struct Waiting<'a>(&'a Gate, Order);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut queue = self.0.queue.lock();
        queue.waiters.retain(|w| w.order != self.1);
    }
}

impl Gate {
    pub(crate) fn new(places: usize, waiting_max: usize, patience: Duration) -> Self {
        let queue = Queue {
            free: places,
            ..Queue::default()
        };
        Self {
            queue: Arc::new(Mutex::new(queue)),
            waiting_max,
            patience,
        }
    }

    /// Takes a place: by priority, then keys in turn, then first come first served. Cancel-safe.
    pub(crate) async fn enter(&self, claim: Claim) -> Result<Place, Refusal> {
        let (called, _waiting) = {
            let mut queue = self.queue.lock();
            if queue.free > 0 && queue.waiters.is_empty() {
                queue.free -= 1;
                let queue = self.queue.clone();
                return Ok(Place { queue });
            }
            if queue.waiters.len() >= self.waiting_max {
                return Err(Refusal::QueueFull);
            }
            let (call, called) = oneshot::channel();
            let queue = &mut *queue;
            let waiting = queue.waiters.iter().map(|w| (w.key, w.order));
            let order = queue.turns.order(claim, waiting);
            queue.waiters.push(Waiter {
                order,
                key: claim.key,
                call,
            });
            (called, Waiting(self, order))
        };
        match timeout(self.patience, called).await {
            Ok(Ok(place)) => Ok(place),
            _ => Err(Refusal::Waited),
        }
    }

    /// Whether a request that comes now would be turned away.
    pub(crate) fn is_full(&self) -> bool {
        let queue = self.queue.lock();
        queue.free == 0 && queue.waiters.len() >= self.waiting_max
    }

    /// Requests waiting.
    pub(crate) fn waiting(&self) -> usize {
        self.queue.lock().waiters.len()
    }
}

/// Tenths of a retry: each request earns one, each retry takes ten.
#[derive(Debug)]
pub(crate) struct RetryBudget(AtomicI64);

const BUDGET_START: i64 = 200;
const BUDGET_MAX: i64 = 1000;

impl RetryBudget {
    pub(crate) fn new() -> Self {
        Self(AtomicI64::new(BUDGET_START))
    }

    /// A request came.
    pub(crate) fn earn(&self) {
        if self.0.load(Ordering::Relaxed) < BUDGET_MAX {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether something may be tried again.
    pub(crate) fn take(&self) -> bool {
        let enough = self.0.load(Ordering::Relaxed) >= 10;
        if enough {
            self.0.fetch_sub(10, Ordering::Relaxed);
        }
        enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bounded_with_a_deadline() {
        let gate = Gate::new(1, 1, Duration::from_millis(30));
        let claim = Claim::default();
        let first = gate.enter(claim).await.unwrap();
        let (second, third) = tokio::join!(gate.enter(claim), gate.enter(claim));
        assert_eq!(second.unwrap_err(), Refusal::Waited);
        assert_eq!(third.unwrap_err(), Refusal::QueueFull);
        assert_eq!(gate.waiting(), 0);
        drop(first);
        assert!(gate.enter(claim).await.is_ok());
    }

    #[tokio::test]
    async fn by_priority_and_keys_in_turn() {
        let gate = Gate::new(1, 100, Duration::from_secs(5));
        let first = gate.enter(Claim::default()).await.unwrap();
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut all = tokio::task::JoinSet::new();
        let claims = [(1, 0), (1, 0), (1, 0), (2, 0), (2, 0), (3, -1), (3, 1)];
        for (at, (key, priority)) in claims.into_iter().enumerate() {
            let (waits, order) = (gate.clone(), order.clone());
            all.spawn(async move {
                let place = waits.enter(Claim { priority, key }).await.unwrap();
                order.lock().push(at);
                drop(place);
            });
            while gate.waiting() <= at {
                tokio::task::yield_now().await;
            }
        }
        // Whoever leaves the queue is not called.
        let left = timeout(Duration::from_millis(5), gate.enter(Claim::default())).await;
        assert!(left.is_err());
        drop(first);
        all.join_all().await;
        assert_eq!(*order.lock(), [5, 0, 3, 1, 4, 2, 6]);
        assert!(!gate.is_full() && gate.waiting() == 0);
        assert!(gate.enter(Claim::default()).await.is_ok());
    }

    #[test]
    fn one_retry_in_ten() {
        let budget = RetryBudget::new();
        for _ in 0..20 {
            assert!(budget.take());
        }
        assert!(!budget.take());
        (0..10).for_each(|_| budget.earn());
        assert!(budget.take() && !budget.take());
    }
}
