//! A batch on the rails of one lane: cut in slices, spread, waited for, and sent again over another rail when one fails.
//!
//! Owns a batch from its first request to the moment nothing of it is under way: a rail that fails or stalls is destroyed
//! before its slices go elsewhere, and when `run` returns no device touches memory of the batch any more. A slice is
//! idempotent: whatever follows the last confirmed one is unknown and sent again.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::endpoint::Endpoint;
use super::fabric::Fabric;
use super::rail::{Direction, Job, LIST_MAX, Rail, Request, Slice};

/// Bytes under way on one rail: several times what a fast network holds.
const WINDOW: u64 = 8 << 20;
/// How long completions are polled for before the thread sleeps.
const SPIN: Duration = Duration::from_micros(50);
/// How long a batch may take in all, per 64 MiB, up to sixty times that: it holds up fences.
const WHOLE: Duration = Duration::from_secs(10);
/// About how many slices a batch is cut into at most.
const SLICES_MAX: u64 = 1 << 16;
/// How long a thread sleeps at most.
const TICK: Duration = Duration::from_millis(100);
/// How often it looks whether a rail has stalled.
const LOOK: Duration = Duration::from_millis(20);
/// Largest slice, whatever is asked for: progress is judged by slices.
const SLICE_MAX: u64 = 1 << 20;

/// What became of a batch.
#[derive(Debug)]
pub(super) struct Outcome {
    /// Bit per rail that failed.
    pub(super) lost: u64,
    /// Items of which something did not arrive.
    pub(super) failed: BTreeSet<usize>,
    /// What the first failing rail said.
    pub(super) reason: Option<String>,
}

/// The rails of one lane; one that has failed is gone.
pub(super) struct Rails {
    rails: Vec<Option<Rail>>,
    depth: usize,
    slice: u64,
    stall: Duration,
    fabric: Arc<Fabric>,
}

impl Rails {
    pub(super) fn new(ends: Vec<Option<Endpoint>>, fabric: &Arc<Fabric>) -> Self {
        let config = &fabric.config;
        Self {
            rails: ends.into_iter().map(|end| end.map(Rail::new)).collect(),
            depth: config.depth as usize,
            slice: config.slice,
            stall: config.slice_timeout,
            fabric: fabric.clone(),
        }
    }

    /// Rails that the lane was joined with.
    pub(super) fn count(&self) -> usize {
        self.rails.len()
    }

    /// Carries out a batch. `watch` becomes readable when the caller hangs up; then everything is given up at once.
    pub(super) fn run(
        &mut self,
        direction: Direction,
        jobs: &[Job<'_>],
        watch: BorrowedFd<'_>,
    ) -> Outcome {
        let total: u64 = jobs.iter().flat_map(|j| j.remote).map(|p| p.length).sum();
        let mut batch = Batch {
            until: Instant::now() + WHOLE * (1 + (total >> 26).min(59) as u32),
            direction,
            jobs,
            queue: VecDeque::new(),
            outcome: Outcome {
                lost: 0,
                failed: BTreeSet::new(),
                reason: None,
            },
        };
        for rail in self.rails.iter_mut().flatten() {
            rail.waited = Duration::ZERO;
            rail.unflushed = None;
        }
        loop {
            let lost = batch.outcome.lost;
            batch.queue = self.cut(jobs);
            self.drive(&mut batch, watch);
            if direction == Direction::Fetch {
                break;
            }
            if !batch.outcome.failed.is_empty() {
                // What did arrive was not flushed.
                batch.fail_all();
                break;
            }
            if batch.outcome.lost == lost && self.flush(&mut batch, watch) {
                break;
            }
            // What a lost rail had brought was not flushed: everything again over those that are left, fewer each time.
            if self.rails.iter().all(Option::is_none) {
                batch.fail_all();
                break;
            }
        }
        batch.outcome
    }

    fn cut(&self, jobs: &[Job<'_>]) -> VecDeque<Slice> {
        let live = self.rails.iter().flatten().count().max(1) as u64;
        let total: u64 = jobs.iter().flat_map(|j| j.remote).map(|p| p.length).sum();
        // Large transfers in larger slices, as long as every rail gets several.
        let most = (total / (8 * live)).clamp(self.slice, SLICE_MAX.max(self.slice));
        // Nobody makes us keep millions of slices by naming terabytes.
        let most = most.max((total / SLICES_MAX).min(1 << 30));
        let mut queue = VecDeque::new();
        for (job, j) in jobs.iter().enumerate() {
            let mut local = j.local;
            for (piece, p) in j.remote.iter().enumerate() {
                let mut done = 0;
                while done < p.length {
                    let n = most.min(p.length - done).min(j.memory.run(local));
                    queue.push_back(Slice {
                        item: j.item,
                        job,
                        piece,
                        local,
                        remote: p.address + done,
                        length: n as u32,
                    });
                    done += n;
                    local += n;
                }
            }
        }
        queue
    }

    /// Until nothing is left to do and nothing is under way.
    fn drive(&mut self, batch: &mut Batch<'_>, watch: BorrowedFd<'_>) {
        let mut idle_since: Option<Instant> = None;
        let mut looked = Instant::now();
        loop {
            // A list for each rail in turn, until none has room.
            let mut posted = true;
            while posted {
                posted = false;
                for at in 0..self.rails.len() {
                    posted |= self.fill(at, batch);
                }
            }
            if self.rails.iter().all(Option::is_none) {
                batch.give_up();
            }
            let under_way = self.rails.iter().flatten().any(|r| !r.sent.is_empty());
            if !under_way && batch.queue.is_empty() {
                return;
            }
            let mut progress = false;
            for at in 0..self.rails.len() {
                progress |= self.reap(at, batch);
            }
            let now = Instant::now();
            if now >= batch.until {
                self.lose_all(batch, "it took too long");
                batch.give_up();
                return;
            }
            // One that stands still is found beside others that move.
            looked = self.lose_stalled(batch, looked, now);
            if progress {
                idle_since = None;
                continue;
            }
            if now.duration_since(*idle_since.get_or_insert(now)) < SPIN {
                std::thread::yield_now();
                continue;
            }
            if self.sleep(batch, watch) {
                self.lose_all(batch, "the caller hung up");
                batch.give_up();
                return;
            }
        }
    }

    /// Loses the rails that have been waited for in vain for too long. What counts is the time in which somebody looked: a
    /// thread that gets no processor has not waited, and where there is none for it there may be none for the device's
    /// software either. `looked`: when it was called last; returns when it is to be called as last.
    fn lose_stalled(&mut self, batch: &mut Batch<'_>, looked: Instant, now: Instant) -> Instant {
        let passed = now.duration_since(looked);
        if passed < LOOK {
            return looked;
        }
        for at in 0..self.rails.len() {
            let Some(rail) = self.rails[at].as_mut().filter(|r| !r.sent.is_empty()) else {
                continue;
            };
            rail.waited += passed.min(2 * TICK);
            if rail.waited > self.stall {
                self.lose(at, batch, "nothing moved in time".to_owned());
            }
        }
        now
    }

    fn lose_all(&mut self, batch: &mut Batch<'_>, reason: &str) {
        for at in 0..self.rails.len() {
            self.lose(at, batch, reason.to_owned());
        }
    }

    /// Waits for a completion, at most a tick. Whether the caller has hung up.
    fn sleep(&mut self, batch: &mut Batch<'_>, watch: BorrowedFd<'_>) -> bool {
        for rail in self.rails.iter_mut().flatten() {
            if let Some(c) = rail.end.completions.as_mut() {
                c.quiet();
                c.arm();
            }
        }
        // What came before the queues were armed wakes nobody.
        let mut progress = false;
        for at in 0..self.rails.len() {
            progress |= self.reap(at, batch);
        }
        if progress {
            return false;
        }
        let channels = self.rails.iter().flatten();
        let mut fds: Vec<PollFd<'_>> = channels
            .filter_map(|r| r.end.completions.as_ref())
            .map(|c| PollFd::from_borrowed_fd(c.fd(), PollFlags::IN))
            .collect();
        fds.push(PollFd::from_borrowed_fd(watch, PollFlags::RDHUP));
        let tick = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: TICK.subsec_nanos().into(),
        };
        let _ = rustix::event::poll(&mut fds, Some(&tick));
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        fds.last().is_some_and(|f| f.revents().intersects(gone))
    }

    /// Posts a list if the rail has room for one; whether it had.
    fn fill(&mut self, at: usize, batch: &mut Batch<'_>) -> bool {
        let live = self.rails.iter().flatten().count().max(1);
        let Some(rail) = self.rails[at].as_mut() else {
            return false;
        };
        let share = batch.queue.len().div_ceil(live);
        let room = self.depth.saturating_sub(rail.sent.len()).min(LIST_MAX);
        let most = room.min(share);
        // Nothing is gained by lists of one while many are under way.
        if most == 0 || (most < LIST_MAX && most < share && rail.sent.len() > 1) {
            return false;
        }
        // What is not posted yet can still go by whichever rail is faster.
        let mut bytes: u64 = rail.sent.iter().map(|s| u64::from(s.slice.length)).sum();
        let mut count = 0;
        for slice in batch.queue.iter().take(most) {
            bytes += u64::from(slice.length);
            if bytes > WINDOW && !(count == 0 && rail.sent.is_empty()) {
                break;
            }
            count += 1;
        }
        if count == 0 {
            return false;
        }
        let slices: Vec<Slice> = batch.queue.drain(..count).collect();
        let posted = rail.post(at, &slices, batch.direction, batch.jobs);
        if let Err(reason) = posted {
            self.lose(at, batch, reason);
        }
        true
    }

    /// Takes completions of one rail; whether there were any.
    fn reap(&mut self, at: usize, batch: &mut Batch<'_>) -> bool {
        let Some(rail) = self.rails[at].as_mut() else {
            return false;
        };
        if rail.sent.is_empty() {
            return false;
        }
        match rail.reap() {
            Ok(any) => any,
            Err(reason) => {
                self.lose(at, batch, reason);
                true
            }
        }
    }

    /// Destroys a rail; what was under way on it is to be sent again.
    fn lose(&mut self, at: usize, batch: &mut Batch<'_>, reason: String) {
        let Some(mut rail) = self.rails[at].take() else {
            return;
        };
        let device = rail.end.device.name.clone();
        let again: Vec<Slice> = rail.sent.drain(..).map(|s| s.slice).collect();
        // Nothing may reach memory by it any more before others get to.
        drop(rail);
        for slice in again.into_iter().rev() {
            batch.queue.push_front(slice);
        }
        batch.outcome.lost |= 1 << at;
        tracing::debug!(device, reason, "rdma: a rail failed");
        batch
            .outcome
            .reason
            .get_or_insert(format!("{device}: {reason}"));
    }

    /// Reads the last bytes written by each rail: the answer pushes all that went before into the caller's memory, where a
    /// mere acknowledgement says only that its device has it. Whether all rails did.
    fn flush(&mut self, batch: &mut Batch<'_>, watch: BorrowedFd<'_>) -> bool {
        let fabric = self.fabric.clone();
        let lost = batch.outcome.lost;
        for at in 0..self.rails.len() {
            let Some(rail) = self.rails[at].as_mut() else {
                continue;
            };
            let Some((remote, rkey, item)) = rail.unflushed.take() else {
                continue;
            };
            let (local, scratch) = fabric.scratch(at);
            let slice = Slice {
                item,
                job: 0,
                piece: 0,
                local,
                remote,
                length: 1,
            };
            let posted = match scratch.lkey(rail.end.index, local) {
                Some(lkey) => {
                    let request = Request {
                        slice,
                        lkey,
                        rkey,
                        inline: false,
                    };
                    rail.post_requests(&[request], Direction::Fetch)
                }
                None => Err("no memory to flush to".to_owned()),
            };
            if let Err(reason) = posted {
                self.lose(at, batch, reason);
            }
        }
        self.wait_out(batch, watch);
        // A flush means something on its own rail only: it is not sent again.
        batch.queue.clear();
        batch.outcome.lost == lost
    }

    /// Waits for what is under way, sending nothing.
    fn wait_out(&mut self, batch: &mut Batch<'_>, watch: BorrowedFd<'_>) {
        let mut idle_since = Instant::now();
        let mut looked = idle_since;
        while self.rails.iter().flatten().any(|r| !r.sent.is_empty()) {
            let mut progress = false;
            for at in 0..self.rails.len() {
                progress |= self.reap(at, batch);
            }
            let now = Instant::now();
            looked = self.lose_stalled(batch, looked, now);
            if now >= batch.until {
                self.lose_all(batch, "it took too long");
            } else if progress {
                idle_since = now;
            } else if now.duration_since(idle_since) < SPIN {
                std::thread::yield_now();
            } else if self.sleep(batch, watch) {
                self.lose_all(batch, "the caller hung up");
            }
        }
    }
}

struct Batch<'a> {
    /// When it is given up whatever moves.
    until: Instant,
    direction: Direction,
    jobs: &'a [Job<'a>],
    queue: VecDeque<Slice>,
    outcome: Outcome,
}

impl Batch<'_> {
    /// What is left will not be sent.
    fn give_up(&mut self) {
        let left = self.queue.drain(..).map(|slice| slice.item);
        self.outcome.failed.extend(left);
    }

    fn fail_all(&mut self) {
        self.queue.clear();
        self.outcome.failed = self.jobs.iter().map(|j| j.item).collect();
    }
}
