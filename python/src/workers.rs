//! Operations without their caller: a bounded set of native threads that carries them out and leaves the answers in a
//! mailbox. The interpreter lock is not held while they work.
//!
//! Threads start when there is work for them and end when there has been none for a while. What is short has threads that
//! nothing long can take, and the other way round. Knows no stores; what is to be done comes as a closure that is told
//! whether its turn has come in time.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mooncake::store::model::error::StoreError;
use parking_lot::{Condvar, Mutex};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::mailbox::{Answer, Mailbox, Slot};

/// How long an operation may wait for a thread: as long as it may take itself.
pub(crate) const TURN_MAX: Duration = Duration::from_secs(10);
/// How long an idle thread stays.
const IDLE_MAX: Duration = Duration::from_secs(10);
/// Operations under way are waited for this long by `close`: their own bound and some.
const CLOSE_MAX: Duration = Duration::from_secs(12);
const THREADS_MAX: usize = 64;

/// Whether what was queued is still wanted when its turn comes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    Now,
    /// It has waited longer than it may take.
    Late,
    /// The store was closed meanwhile.
    Closed,
}

impl Turn {
    /// Why an operation is not carried out.
    pub(crate) fn refusal(self) -> Option<StoreError> {
        match self {
            Self::Now => None,
            Self::Late => Some(StoreError::Timeout {
                what: "a free thread: too many operations are under way".to_owned(),
            }),
            Self::Closed => Some(StoreError::InvalidParams {
                what: "the store was closed".to_owned(),
            }),
        }
    }
}

/// How long something holds a thread. Neither kind can take all of them: what is short does not wait behind large objects.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pace {
    /// One exchange of few bytes.
    Short,
    /// Anything else.
    Long,
}

/// An operation: gets its turn, and gives its answer.
pub(crate) type Job = Box<dyn FnOnce(Turn) -> Answer + Send>;
/// Something a thread does, answers included.
pub(crate) type Chore = Box<dyn FnOnce(Turn) + Send>;

struct Task {
    chore: Chore,
    queued: Instant,
}

impl Task {
    fn carry_out(self) {
        let late = self.queued.elapsed() >= TURN_MAX;
        (self.chore)(if late { Turn::Late } else { Turn::Now });
    }
}

/// The answer of an operation that panicked.
pub(crate) fn broke() -> Answer {
    Box::new(|_| Err(PyRuntimeError::new_err("the operation broke: see the log")))
}

fn answering(to: &Arc<Slot>, token: u64, job: Job) -> Chore {
    let to = to.clone();
    Box::new(move |turn| {
        let answer = catch_unwind(AssertUnwindSafe(move || job(turn)));
        to.leave(token, answer.unwrap_or_else(|_| broke()));
    })
}

/// What waits at one pace, and how many threads are at it.
#[derive(Default)]
struct Line {
    queue: VecDeque<Task>,
    busy: usize,
    most: usize,
}

impl Line {
    /// When the first was queued that may be taken.
    fn next(&self) -> Option<Instant> {
        let first = self.queue.front().filter(|_| self.busy < self.most);
        first.map(|t| t.queued)
    }

    /// How many may be taken now.
    fn takeable(&self) -> usize {
        self.queue.len().min(self.most.saturating_sub(self.busy))
    }
}

#[derive(Default)]
struct State {
    short: Line,
    long: Line,
    threads: usize,
    idle: usize,
    /// Callers of `close`.
    closing: usize,
    last_token: u64,
}

impl State {
    fn line(&mut self, pace: Pace) -> &mut Line {
        match pace {
            Pace::Short => &mut self.short,
            Pace::Long => &mut self.long,
        }
    }

    /// What has waited longest of what may be taken.
    fn take(&mut self) -> Option<(Task, Pace)> {
        let pace = match (self.short.next(), self.long.next()) {
            (Some(short), Some(long)) if long < short => Pace::Long,
            (Some(_), _) => Pace::Short,
            (None, Some(_)) => Pace::Long,
            (None, None) => return None,
        };
        let line = self.line(pace);
        line.busy += 1;
        Some((line.queue.pop_front()?, pace))
    }

    fn takeable(&self) -> usize {
        self.short.takeable() + self.long.takeable()
    }

    fn busy(&self) -> usize {
        self.short.busy + self.long.busy
    }
}

/// The threads of one store.
pub(crate) struct Threads {
    most: usize,
    state: Mutex<State>,
    work: Condvar,
    quiet: Condvar,
}

impl Threads {
    fn new(most: usize) -> Self {
        let mut state = State::default();
        state.short.most = most.div_ceil(2);
        state.long.most = (most - most.div_ceil(4)).max(1);
        Self {
            most,
            state: Mutex::new(state),
            work: Condvar::new(),
            quiet: Condvar::new(),
        }
    }

    /// A number that no other answer carries.
    pub(crate) fn next_token(&self) -> u64 {
        let mut state = self.state.lock();
        state.last_token += 1;
        state.last_token
    }

    /// Queues an operation: the number its answer will carry. When no thread can be had it runs here and now.
    pub(crate) fn begin(self: &Arc<Self>, to: &Arc<Slot>, job: Job) -> u64 {
        let token = self.next_token();
        self.begin_as(to, token, job);
        token
    }

    /// [`Threads::begin`] with a number that is given out already.
    pub(crate) fn begin_as(self: &Arc<Self>, to: &Arc<Slot>, token: u64, job: Job) {
        self.queue(Pace::Long, answering(to, token, job));
    }

    /// Queues a chore.
    pub(crate) fn queue(self: &Arc<Self>, pace: Pace, chore: Chore) {
        let mut state = self.state.lock();
        if state.closing > 0 {
            drop(state);
            chore(Turn::Closed);
            return;
        }
        let queued = Instant::now();
        state.line(pace).queue.push_back(Task { chore, queued });
        if state.takeable() > state.idle && state.threads < self.most {
            state.threads += 1;
            drop(state);
            self.start();
        } else {
            drop(state);
            self.work.notify_one();
        }
    }

    fn start(self: &Arc<Self>) {
        let threads = self.clone();
        let spawned = std::thread::Builder::new()
            .name("mooncake-async".into())
            .stack_size(2 << 20)
            .spawn(move || threads.run());
        if spawned.is_ok() {
            return;
        }
        let mut state = self.state.lock();
        state.threads -= 1;
        // The others will get to it; without others it is done here.
        let orphan = if state.threads == 0 {
            state.take()
        } else {
            None
        };
        drop(state);
        if let Some((task, pace)) = orphan {
            task.carry_out();
            self.ended(&mut self.state.lock(), pace);
        }
    }

    fn run(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some((task, pace)) = state.take() {
                // What this one may not take any more another may.
                let more = state.idle > 0 && state.takeable() > 0;
                drop(state);
                if more {
                    self.work.notify_one();
                }
                task.carry_out();
                state = self.state.lock();
                self.ended(&mut state, pace);
                continue;
            }
            state.idle += 1;
            let waited = self.work.wait_for(&mut state, IDLE_MAX);
            state.idle -= 1;
            if waited.timed_out() && state.takeable() == 0 {
                state.threads -= 1;
                return;
            }
        }
    }

    fn ended(&self, state: &mut State, pace: Pace) {
        state.line(pace).busy -= 1;
        if state.busy() == 0 && state.closing > 0 {
            self.quiet.notify_all();
        }
    }

    /// Refuses what has not begun, waits for the rest; whether all have ended in time.
    fn close(&self) -> bool {
        let mut state = self.state.lock();
        state.closing += 1;
        let mut waiting: Vec<Task> = state.short.queue.drain(..).collect();
        waiting.extend(state.long.queue.drain(..));
        drop(state);
        for task in waiting {
            (task.chore)(Turn::Closed);
        }
        let deadline = Instant::now() + CLOSE_MAX;
        let mut state = self.state.lock();
        while state.busy() > 0 {
            if self.quiet.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        let ended = state.busy() == 0;
        state.closing -= 1;
        ended
    }
}

/// A number to wait for.
#[pyclass(module = "mooncake._native", frozen, get_all)]
pub(crate) struct Begun {
    pub(crate) token: u64,
}

/// The threads of one store, as Python holds them.
#[pyclass(module = "mooncake._native", frozen)]
pub(crate) struct Workers(pub(crate) Arc<Threads>);

#[pymethods]
impl Workers {
    #[new]
    fn new(most: usize) -> Self {
        Self(Arc::new(Threads::new(most.clamp(1, THREADS_MAX))))
    }

    /// Calls something of Python's on one of the threads: the number of its answer.
    fn call(&self, to: &Mailbox, what: Py<PyAny>) -> Begun {
        Begun {
            token: self.0.begin(&to.0, called(what)),
        }
    }

    /// The same on a thread of its own: for `close`, which waits for the others.
    fn call_apart(&self, to: &Mailbox, what: Py<PyAny>) -> Begun {
        // Its numbers must not be those of others in the mailbox.
        let token = self.0.next_token();
        Arc::new(Threads::new(1)).begin_as(&to.0, token, called(what));
        Begun { token }
    }

    /// Refuses what has not begun and waits for the rest, up to 12 s; whether all have ended.
    fn close(&self, py: Python<'_>) -> bool {
        py.detach(|| self.0.close())
    }
}

fn called(what: Py<PyAny>) -> Job {
    Box::new(move |turn| match turn.refusal() {
        None => {
            let outcome = Python::try_attach(|py| what.call0(py));
            Box::new(move |_| {
                outcome.unwrap_or_else(|| Err(PyRuntimeError::new_err("the interpreter is ending")))
            })
        }
        Some(why) => {
            let text = why.to_string();
            Box::new(move |_| {
                drop(what);
                Err(PyRuntimeError::new_err(text))
            })
        }
    })
}
