//! Batches submitted now and collected later: a table of ids that detect reuse, and the threads that carry them out.

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::TransferEngine;
use super::batch::{TransferRequest, TransferResult};

/// Names a submitted batch: slot and generation, so that an id used after its release is an error and never another
/// batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BatchId {
    slot: u32,
    generation: u32,
}

/// Why a batch was not taken or not found.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum BatchError {
    /// As many batches as allowed are waiting.
    #[error("too many batches are waiting: collect some first")]
    Full,
    /// No such batch, or collected already.
    #[error("no such batch")]
    Unknown,
    /// Not done by the deadline; it goes on.
    #[error("the batch is not done yet")]
    NotDone,
}

enum Slot {
    Free,
    Running,
    Done(Vec<TransferResult>),
}

struct Table {
    slots: Vec<(u32, Slot)>,
}

struct Job {
    id: BatchId,
    requests: Vec<TransferRequest>,
    deadline: Instant,
}

/// Runs batches of one engine on its own threads.
pub struct Submitter {
    table: Arc<(Mutex<Table>, Condvar)>,
    jobs: SyncSender<Job>,
    most: usize,
}

impl Submitter {
    /// `threads` workers, at most `most` batches submitted and not collected.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn new(engine: Arc<TransferEngine>, threads: usize, most: usize) -> std::io::Result<Self> {
        let (jobs, queue) = sync_channel::<Job>(most);
        let queue = Arc::new(Mutex::new(queue));
        let table = Arc::new((Mutex::new(Table { slots: Vec::new() }), Condvar::new()));
        for _ in 0..threads.max(1) {
            let (engine, queue, table) = (engine.clone(), queue.clone(), table.clone());
            std::thread::Builder::new()
                .name("transfer".into())
                .spawn(move || {
                    loop {
                        let job = queue.lock().recv();
                        let Ok(job) = job else { return };
                        let results = engine.transfer(&job.requests, job.deadline);
                        let mut locked = table.0.lock();
                        if let Some(slot) = locked.slots.get_mut(job.id.slot as usize) {
                            slot.1 = Slot::Done(results);
                        }
                        table.1.notify_all();
                    }
                })?;
        }
        Ok(Self { table, jobs, most })
    }

    /// Queues a batch.
    ///
    /// # Errors
    /// `Full`.
    pub fn submit(
        &self,
        requests: Vec<TransferRequest>,
        deadline: Instant,
    ) -> Result<BatchId, BatchError> {
        let mut table = self.table.0.lock();
        let free = table
            .slots
            .iter()
            .position(|(_, s)| matches!(s, Slot::Free));
        let slot = match free {
            Some(slot) => slot,
            None if table.slots.len() < self.most => {
                table.slots.push((0, Slot::Free));
                table.slots.len() - 1
            }
            None => return Err(BatchError::Full),
        };
        let entry = &mut table.slots[slot];
        entry.0 += 1;
        let id = BatchId {
            slot: slot as u32,
            generation: entry.0,
        };
        match self.jobs.try_send(Job {
            id,
            requests,
            deadline,
        }) {
            Ok(()) => {
                entry.1 = Slot::Running;
                Ok(id)
            }
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => Err(BatchError::Full),
        }
    }

    /// Takes the results of a batch and frees its id, waiting until `deadline`.
    ///
    /// # Errors
    /// `Unknown`, `NotDone`.
    pub fn collect(
        &self,
        id: BatchId,
        deadline: Instant,
    ) -> Result<Vec<TransferResult>, BatchError> {
        let mut table = self.table.0.lock();
        loop {
            let entry = table
                .slots
                .get_mut(id.slot as usize)
                .filter(|(generation, _)| *generation == id.generation)
                .ok_or(BatchError::Unknown)?;
            match std::mem::replace(&mut entry.1, Slot::Free) {
                Slot::Done(results) => return Ok(results),
                Slot::Free => return Err(BatchError::Unknown),
                Slot::Running => entry.1 = Slot::Running,
            }
            if self.table.1.wait_until(&mut table, deadline).timed_out() {
                return Err(BatchError::NotDone);
            }
        }
    }
}
