//! Who waits for an instance that is only busy, and in which order they look again when something has become free.
//!
//! Owns the order (that of `admission`) and who is called. What is free and whom it suits is the business of who looks: some
//! can use only a group's instances, so whoever finds nothing calls the next one that looks for something else. At most as many wait
//! as the gate lets in.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::admission::{Claim, Order, Turns};

#[derive(Debug)]
struct Waiter {
    order: Order,
    key: u64,
    kin: u64,
    call: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Queue {
    /// In order.
    waiters: Vec<Waiter>,
    turns: Turns,
}

/// A queue per role.
#[derive(Debug, Default)]
pub(crate) struct Line(Mutex<Queue>);

/// A place in the line, until it is dropped; then the next one looks.
#[derive(Debug)]
pub(crate) struct Waiting<'a> {
    line: &'a Line,
    order: Order,
    kin: u64,
    call: Arc<Notify>,
    served: bool,
}

impl Line {
    /// Whether nobody waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.lock().waiters.is_empty()
    }

    /// Joins the line. `kin`: who has the same needs has the same number, and finds nothing where this one found nothing.
    pub(crate) fn join(&self, claim: Claim, kin: u64) -> Waiting<'_> {
        let call = Arc::new(Notify::new());
        let mut queue = self.0.lock();
        let queue = &mut *queue;
        let waiting = queue.waiters.iter().map(|w| (w.key, w.order));
        let order = queue.turns.order(claim, waiting);
        let at = queue.waiters.partition_point(|w| w.order < order);
        // Who stands before it with the same needs is stuck; if nobody does it may look at once.
        if !queue.waiters[..at].iter().any(|w| w.kin == kin) {
            call.notify_one();
        }
        let waiter = Waiter {
            order,
            key: claim.key,
            kin,
            call: call.clone(),
        };
        queue.waiters.insert(at, waiter);
        Waiting {
            line: self,
            order,
            kin,
            call,
            served: false,
        }
    }

    fn call_after(&self, order: Order, suits: impl Fn(&Waiter) -> bool) {
        let queue = self.0.lock();
        let behind = queue.waiters.iter().skip_while(|w| w.order <= order);
        if let Some(next) = behind.into_iter().find(|w| suits(w)) {
            next.call.notify_one();
        }
    }
}

impl Waiting<'_> {
    fn is_first(&self) -> bool {
        let queue = self.line.0.lock();
        queue.waiters.first().is_some_and(|w| w.order == self.order)
    }

    /// Ends when it is time to look: something has `changed` and this one is the first, or it was called. Cancel-safe.
    pub(crate) async fn turn(&self, changed: impl Future<Output = ()>) {
        tokio::pin!(changed);
        let mut listens = self.is_first();
        loop {
            tokio::select! {
                () = self.call.notified() => return,
                () = &mut changed, if listens => {
                    if self.is_first() {
                        return;
                    }
                    // Somebody more urgent stands before it now, and listens.
                    listens = false;
                }
            }
        }
    }

    /// It has looked and found nothing.
    pub(crate) fn found_nothing(&self) {
        self.line.call_after(self.order, |w| w.kin != self.kin);
    }

    /// It has found something.
    pub(crate) fn served(mut self) {
        self.served = true;
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        {
            let mut queue = self.line.0.lock();
            queue.waiters.retain(|w| w.order != self.order);
            if self.served {
                queue.turns.called(self.order);
            }
        }
        // It may have been called and not have looked, and there may be more than it took.
        self.line.call_after(self.order, |_| true);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    /// Places of two kinds, and who got one in which order.
    struct Shop {
        line: Line,
        free: [AtomicUsize; 2],
        changed: Notify,
        got: Mutex<Vec<usize>>,
    }

    impl Shop {
        fn put(&self, kind: usize) {
            self.free[kind].fetch_add(1, Ordering::SeqCst);
            self.changed.notify_waiters();
        }

        async fn wait(&self, who: usize, claim: Claim, kind: usize) {
            let waiting = self.line.join(claim, kind as u64);
            loop {
                let changed = self.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                let taken = self.free[kind]
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
                if taken.is_ok() {
                    self.got.lock().push(who);
                    return waiting.served();
                }
                waiting.found_nothing();
                waiting.turn(changed).await;
            }
        }
    }

    async fn order(
        claims: &'static [(u64, i64, usize)],
        puts: &[usize],
        leaves: Option<usize>,
    ) -> Vec<usize> {
        let shop = Arc::new(Shop {
            line: Line::default(),
            free: Default::default(),
            changed: Notify::new(),
            got: Mutex::default(),
        });
        let mut tasks = Vec::new();
        for (who, (key, priority, kind)) in claims.iter().enumerate() {
            let (shop, claim) = (
                shop.clone(),
                Claim {
                    priority: *priority,
                    key: *key,
                },
            );
            tasks.push(tokio::spawn(
                async move { shop.wait(who, claim, *kind).await },
            ));
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        if let Some(at) = leaves {
            tasks[at].abort();
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        for kind in puts {
            shop.put(*kind);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let left = leaves.map_or(0, |_| 1);
        let got = shop.got.lock().clone();
        assert_eq!(got.len(), (claims.len() - left).min(puts.len()));
        if got.len() + left == claims.len() {
            assert!(shop.line.is_empty());
        }
        got
    }

    #[tokio::test]
    async fn by_priority_then_keys_in_turn() {
        let claims = &[(1, 0, 0), (1, 0, 0), (2, 0, 0), (3, 1, 0), (4, -1, 0)];
        assert_eq!(order(claims, &[0; 5], None).await, [4, 0, 2, 1, 3]);
        // The first leaves: the next one takes its place.
        assert_eq!(order(claims, &[0; 5], Some(4)).await, [0, 2, 1, 3]);
    }

    #[tokio::test]
    async fn who_needs_something_else_is_not_held_up() {
        let claims = &[(1, 0, 0), (1, 0, 0), (1, 0, 1), (1, 0, 0), (1, 0, 1)];
        assert_eq!(order(claims, &[1, 1, 0, 0, 0], None).await, [2, 4, 0, 1, 3]);
    }

    #[tokio::test]
    async fn several_places_at_once_call_several() {
        let shop = Shop {
            line: Line::default(),
            free: Default::default(),
            changed: Notify::new(),
            got: Mutex::default(),
        };
        let all = async {
            tokio::join!(
                shop.wait(0, Claim::default(), 0),
                shop.wait(1, Claim::default(), 0),
                shop.wait(2, Claim::default(), 0),
                async {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    shop.free[0].store(3, Ordering::SeqCst);
                    shop.changed.notify_waiters();
                }
            )
        };
        let done = tokio::time::timeout(Duration::from_secs(5), all).await;
        assert!(done.is_ok());
        assert_eq!(*shop.got.lock(), [0, 1, 2]);
    }
}
