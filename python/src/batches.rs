//! Small operations of one kind that wait at the same time are carried out together: one exchange with the pool for many of
//! an event loop's calls.
//!
//! Nobody waits for company: the first begins at once, and what comes while it is under way makes the next batch. Knows no
//! stores; an operation says itself how several of its kind are carried out.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use mooncake::store::model::error::StoreError;
use parking_lot::Mutex;

use crate::mailbox::{Answer, Slot};
use crate::workers::{Job, Pace, TURN_MAX, Threads, Turn, broke};

/// Keys of one batch.
pub(crate) const KEYS_MAX: usize = 64;
/// Batches of one kind under way: while the answers of one are on their way the next is asked for.
const UNDER_WAY_MAX: usize = 2;

/// What came of an operation.
pub(crate) enum Done {
    Answer(Answer),
    /// It turned out to be large: it is carried out by itself.
    Alone(Job),
}

/// An operation that others of its kind may be joined with.
pub(crate) trait Small: Send + Sized + 'static {
    /// How many keys it is about, at most [`KEYS_MAX`].
    fn keys(&self) -> usize;
    /// Carries out several, at least one: what came of each, in order.
    fn together(several: Vec<Self>) -> Vec<Done>;
    /// The answer when it is not carried out.
    fn refused(self, why: StoreError) -> Answer;
}

struct Waiting<T> {
    what: T,
    to: Arc<Slot>,
    token: u64,
    queued: Instant,
}

struct State<T> {
    waiting: VecDeque<Waiting<T>>,
    under_way: usize,
}

/// Operations of one kind on one pool.
pub(crate) struct Batches<T> {
    state: Mutex<State<T>>,
}

impl<T> Default for Batches<T> {
    fn default() -> Self {
        Self {
            state: Mutex::new(State {
                waiting: VecDeque::new(),
                under_way: 0,
            }),
        }
    }
}

impl<T: Small> Batches<T> {
    /// Queues an operation: the number its answer will carry.
    pub(crate) fn add(self: &Arc<Self>, threads: &Arc<Threads>, to: &Arc<Slot>, what: T) -> u64 {
        let token = threads.next_token();
        let mut state = self.state.lock();
        state.waiting.push_back(Waiting {
            what,
            to: to.clone(),
            token,
            queued: Instant::now(),
        });
        if state.under_way < UNDER_WAY_MAX {
            state.under_way += 1;
            drop(state);
            self.next_batch_by(threads);
        }
        token
    }

    fn next_batch_by(self: &Arc<Self>, threads: &Arc<Threads>) {
        let (all, by) = (self.clone(), threads.clone());
        threads.queue(Pace::Short, Box::new(move |turn| all.next_batch(&by, turn)));
    }

    fn next_batch(self: &Arc<Self>, threads: &Arc<Threads>, turn: Turn) {
        // Each has waited for a time of its own: that the batch is late says nothing.
        if turn == Turn::Closed {
            while let Some(waiting) = self.pop() {
                waiting.refuse(turn);
            }
        } else {
            carry_out(self.batch(), threads);
        }
        let mut state = self.state.lock();
        if state.waiting.is_empty() {
            state.under_way -= 1;
        } else {
            drop(state);
            self.next_batch_by(threads);
        }
    }

    fn pop(&self) -> Option<Waiting<T>> {
        self.state.lock().waiting.pop_front()
    }

    /// What is carried out together, first come first served.
    fn batch(&self) -> Vec<Waiting<T>> {
        let mut state = self.state.lock();
        let mut keys = 0;
        let fits = |waiting: &&Waiting<T>| {
            keys += waiting.what.keys();
            keys <= KEYS_MAX
        };
        // One that is too large for any batch still goes by itself.
        let count = state.waiting.iter().take_while(fits).count().max(1);
        let count = count.min(state.waiting.len());
        state.waiting.drain(..count).collect()
    }
}

impl<T: Small> Waiting<T> {
    fn refuse(self, turn: Turn) {
        if let Some(why) = turn.refusal() {
            self.to.leave(self.token, self.what.refused(why));
        }
    }
}

fn carry_out<T: Small>(batch: Vec<Waiting<T>>, threads: &Arc<Threads>) {
    let (late, wanted): (Vec<_>, Vec<_>) = batch
        .into_iter()
        .partition(|w| w.queued.elapsed() >= TURN_MAX);
    for waiting in late {
        waiting.refuse(Turn::Late);
    }
    if wanted.is_empty() {
        return;
    }
    let split = wanted.into_iter().map(|w| ((w.to, w.token), w.what));
    let (places, several): (Vec<(Arc<Slot>, u64)>, Vec<T>) = split.unzip();
    let done = catch_unwind(AssertUnwindSafe(move || T::together(several)));
    let mut done = done.unwrap_or_default().into_iter();
    for (to, token) in places {
        match done.next() {
            Some(Done::Answer(answer)) => to.leave(token, answer),
            Some(Done::Alone(job)) => threads.begin_as(&to, token, job),
            None => to.leave(token, broke()),
        }
    }
}
