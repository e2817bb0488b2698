//! Operations without their caller: a bounded set of native threads that carries them out and leaves the answers in a
//! mailbox. The interpreter lock is not held while they work.
//!
//! Threads start when there is work for them and end when there has been none for a while. Knows no stores; what is to be
//! done comes as a closure that is told whether its turn has come in time.

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
const TURN_MAX: Duration = Duration::from_secs(10);
/// How long an idle thread stays.
const IDLE_MAX: Duration = Duration::from_secs(10);
/// Operations under way are waited for this long by `close`: their own bound and some.
const CLOSE_MAX: Duration = Duration::from_secs(12);
const THREADS_MAX: usize = 64;

/// Whether an operation is still wanted when its turn comes.
pub(crate) enum Turn {
    Now,
    /// Not any more: why.
    Refused(StoreError),
}

pub(crate) type Job = Box<dyn FnOnce(Turn) -> Answer + Send>;

struct Task {
    job: Job,
    to: Arc<Slot>,
    token: u64,
    queued: Instant,
}

impl Task {
    fn answer(self, turn: Turn) {
        let job = self.job;
        let answer = catch_unwind(AssertUnwindSafe(move || job(turn)));
        let answer = answer.unwrap_or_else(|_| {
            Box::new(|_| Err(PyRuntimeError::new_err("the operation broke: see the log")))
        });
        self.to.leave(self.token, answer);
    }

    fn carry_out(self) {
        let turn = if self.queued.elapsed() < TURN_MAX {
            Turn::Now
        } else {
            Turn::Refused(StoreError::Timeout {
                what: "a free thread: too many operations are under way".to_owned(),
            })
        };
        self.answer(turn);
    }
}

#[derive(Default)]
struct State {
    queue: VecDeque<Task>,
    threads: usize,
    idle: usize,
    busy: usize,
    /// Callers of `close`.
    closing: usize,
    last_token: u64,
}

/// The threads of one store.
#[derive(Default)]
pub(crate) struct Threads {
    most: usize,
    state: Mutex<State>,
    work: Condvar,
    quiet: Condvar,
}

impl Threads {
    fn next_token(&self) -> u64 {
        let mut state = self.state.lock();
        state.last_token += 1;
        state.last_token
    }

    /// Queues a job: the number its answer will carry. When no thread can be had it runs here and now.
    pub(crate) fn begin(self: &Arc<Self>, to: &Arc<Slot>, job: Job) -> u64 {
        let token = self.next_token();
        self.queue(to, token, job);
        token
    }

    fn queue(self: &Arc<Self>, to: &Arc<Slot>, token: u64, job: Job) {
        let mut state = self.state.lock();
        let task = Task {
            job,
            to: to.clone(),
            token,
            queued: Instant::now(),
        };
        if state.closing > 0 {
            drop(state);
            task.answer(Turn::Refused(closed()));
            return;
        }
        state.queue.push_back(task);
        if state.queue.len() > state.idle && state.threads < self.most {
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
            state.queue.pop_back()
        } else {
            None
        };
        drop(state);
        if let Some(task) = orphan {
            task.carry_out();
        }
    }

    fn run(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some(task) = state.queue.pop_front() {
                state.busy += 1;
                drop(state);
                task.carry_out();
                state = self.state.lock();
                state.busy -= 1;
                if state.busy == 0 && state.closing > 0 {
                    self.quiet.notify_all();
                }
                continue;
            }
            state.idle += 1;
            let waited = self.work.wait_for(&mut state, IDLE_MAX);
            state.idle -= 1;
            if waited.timed_out() && state.queue.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }

    /// Refuses what has not begun, waits for the rest; whether all have ended in time.
    fn close(&self) -> bool {
        let mut state = self.state.lock();
        state.closing += 1;
        let waiting: Vec<Task> = state.queue.drain(..).collect();
        drop(state);
        for task in waiting {
            task.answer(Turn::Refused(closed()));
        }
        let deadline = Instant::now() + CLOSE_MAX;
        let mut state = self.state.lock();
        while state.busy > 0 {
            if self.quiet.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        let ended = state.busy == 0;
        state.closing -= 1;
        ended
    }
}

fn closed() -> StoreError {
    StoreError::InvalidParams {
        what: "the store was closed".to_owned(),
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
        Self(Arc::new(Threads {
            most: most.clamp(1, THREADS_MAX),
            ..Threads::default()
        }))
    }

    /// Calls something of Python's on one of the threads: the number of its answer.
    fn call(&self, to: &Mailbox, what: Py<PyAny>) -> Begun {
        Begun {
            token: self.0.begin(&to.0, called(what)),
        }
    }

    /// The same on a thread of its own: for `close`, which waits for the others.
    fn call_apart(&self, to: &Mailbox, what: Py<PyAny>) -> Begun {
        let apart = Arc::new(Threads {
            most: 1,
            ..Threads::default()
        });
        // Its numbers must not be those of others in the mailbox.
        let token = self.0.next_token();
        apart.queue(&to.0, token, called(what));
        Begun { token }
    }

    /// Refuses what has not begun and waits for the rest, up to 12 s; whether all have ended.
    fn close(&self, py: Python<'_>) -> bool {
        py.detach(|| self.0.close())
    }
}

fn called(what: Py<PyAny>) -> Job {
    Box::new(move |turn| match turn {
        Turn::Now => {
            let outcome = Python::try_attach(|py| what.call0(py));
            Box::new(move |_| {
                outcome.unwrap_or_else(|| Err(PyRuntimeError::new_err("the interpreter is ending")))
            })
        }
        Turn::Refused(why) => {
            let text = why.to_string();
            Box::new(move |_| {
                drop(what);
                Err(PyRuntimeError::new_err(text))
            })
        }
    })
}
