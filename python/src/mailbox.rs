//! Answers on their way to an event loop: the threads that carry out operations leave them here, and one eventfd tells the
//! loop, which takes what has come since. Knows no stores and no loops.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use parking_lot::Mutex;
use pyo3::prelude::*;
use pyo3::types::PyList;
use rustix::event::{EventfdFlags, eventfd};

/// What an operation came to, still to be turned into Python's objects.
pub(crate) type Answer = Box<dyn FnOnce(Python<'_>) -> PyResult<Py<PyAny>> + Send>;

/// Answers taken at once: a loop with much to take still looks at its other events in between.
const TAKEN_MAX: usize = 256;

/// The side that answers are left at.
pub(crate) struct Slot {
    event: OwnedFd,
    answers: Mutex<VecDeque<(u64, Answer)>>,
}

impl Slot {
    /// Leaves an answer. Needs no interpreter lock, and does not wait.
    pub(crate) fn leave(&self, token: u64, answer: Answer) {
        let mut answers = self.answers.lock();
        let first = answers.is_empty();
        answers.push_back((token, answer));
        drop(answers);
        if first {
            self.ring();
        }
    }

    fn ring(&self) {
        // Fails only when the counter is full, and then it is readable.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

/// The answers of one event loop.
#[pyclass(module = "mooncake._native", frozen)]
pub(crate) struct Mailbox(pub(crate) Arc<Slot>);

#[pymethods]
impl Mailbox {
    #[new]
    fn new() -> PyResult<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(std::io::Error::from)?;
        Ok(Self(Arc::new(Slot {
            event,
            answers: Mutex::default(),
        })))
    }

    /// Readable when there is something to take.
    fn fileno(&self) -> i32 {
        self.0.event.as_raw_fd()
    }

    /// What has come: `(number, value, None)` or `(number, None, exception)` each. Does not wait.
    fn take<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.0.event, &mut count);
        let mut answers = self.0.answers.lock();
        let number = answers.len().min(TAKEN_MAX);
        let taken: Vec<(u64, Answer)> = answers.drain(..number).collect();
        let more = !answers.is_empty();
        drop(answers);
        if more {
            self.0.ring();
        }
        let list = PyList::empty(py);
        for (token, answer) in taken {
            match answer(py) {
                Ok(value) => list.append((token, value, py.None()))?,
                Err(error) => list.append((token, py.None(), error.into_value(py)))?,
            }
        }
        Ok(list)
    }
}
