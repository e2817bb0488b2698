//! Who may come in, and how often something is tried again.
//!
//! Owns the bound on requests under way, the queue before it with its deadline, and the retry budget. Refusals come before
//! any prefill has begun.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// Why a request was turned away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("too many requests are waiting")]
    QueueFull,
    #[error("no place became free in time")]
    Waited,
}

/// The door.
#[derive(Debug)]
pub(crate) struct Gate {
    places: Arc<Semaphore>,
    waiting: AtomicUsize,
    waiting_max: usize,
    patience: Duration,
}

struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Gate {
    pub(crate) fn new(places: usize, waiting_max: usize, patience: Duration) -> Self {
        Self {
            places: Arc::new(Semaphore::new(places)),
            waiting: AtomicUsize::new(0),
            waiting_max,
            patience,
        }
    }

    /// Takes a place, first come first served. Cancel-safe.
    pub(crate) async fn enter(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        if let Ok(permit) = self.places.clone().try_acquire_owned() {
            return Ok(permit);
        }
        let before = self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.waiting);
        if before >= self.waiting_max {
            return Err(Refusal::QueueFull);
        }
        match timeout(self.patience, self.places.clone().acquire_owned()).await {
            Ok(Ok(permit)) => Ok(permit),
            _ => Err(Refusal::Waited),
        }
    }

    /// Requests waiting.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
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
        let first = gate.enter().await.unwrap();
        let (second, third) = tokio::join!(gate.enter(), gate.enter());
        assert_eq!(second.unwrap_err(), Refusal::Waited);
        assert_eq!(third.unwrap_err(), Refusal::QueueFull);
        assert_eq!(gate.waiting(), 0);
        drop(first);
        assert!(gate.enter().await.is_ok());
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
