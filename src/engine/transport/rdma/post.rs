//! The node's requests on the rails of one lane: cut, posted as linked lists, reaped, and sent again over another rail
//! when one fails.
//!
//! Owns a batch from its first request to the moment nothing of it is under way: a rail that fails or stalls is destroyed
//! before its slices go elsewhere, and when `run` returns no device touches memory of the batch any more. A slice is
//! idempotent: whatever follows the last confirmed one is unknown and sent again.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdma_sys::{ibv_send_flags, ibv_send_wr, ibv_sge, ibv_wc, ibv_wc_status, ibv_wr_opcode};
use rustix::event::{PollFd, PollFlags};

use super::endpoint::Endpoint;
use super::fabric::Fabric;
use super::registration::Registration;
use super::verbs::status_name;
use super::wire::Piece;

/// Requests of one list: one doorbell, and at least one of them signalled.
const LIST_MAX: usize = 16;
/// Completions taken with one call.
const REAP_MAX: usize = 16;
/// How long completions are polled for before the thread sleeps.
const SPIN: Duration = Duration::from_micros(50);
/// How often a sleeping thread looks whether a rail has stalled.
const TICK: Duration = Duration::from_millis(100);
/// Largest slice, whatever is asked for: progress is judged by slices.
const SLICE_MAX: u64 = 1 << 20;

/// Seen from the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the caller's memory into ours (RDMA READ).
    Fetch,
    /// From our memory into the caller's (RDMA WRITE).
    Bring,
}

/// Bytes of one item.
pub(super) struct Job<'a> {
    pub(super) item: usize,
    pub(super) local: u64,
    pub(super) memory: &'a Arc<Registration>,
    pub(super) remote: &'a [Piece],
    /// Whether this process can read the memory by itself.
    pub(super) addressable: bool,
}

/// What became of a batch.
#[derive(Debug)]
pub(super) struct Outcome {
    /// Bit per rail that failed.
    pub(super) lost: u64,
    /// Items of which something did not arrive.
    pub(super) failed: Vec<usize>,
    /// What the first failing rail said.
    pub(super) reason: Option<String>,
}

#[derive(Clone, Copy)]
struct Slice {
    item: usize,
    job: usize,
    piece: usize,
    local: u64,
    remote: u64,
    length: u32,
}

struct Sent {
    number: u64,
    slice: Slice,
}

/// One rail with what is under way on it, oldest first.
struct Rail {
    end: Endpoint,
    sent: VecDeque<Sent>,
    next: u64,
    moved: Instant,
    /// Where the last bytes went that have not been flushed.
    unflushed: Option<(u64, u32, usize)>,
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
        let rail = |end| Rail {
            end,
            sent: VecDeque::new(),
            next: 0,
            moved: Instant::now(),
            unflushed: None,
        };
        let config = &fabric.config;
        Self {
            rails: ends.into_iter().map(|end| end.map(rail)).collect(),
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
        let mut batch = Batch {
            direction,
            jobs,
            queue: VecDeque::new(),
            outcome: Outcome {
                lost: 0,
                failed: Vec::new(),
                reason: None,
            },
        };
        let now = Instant::now();
        for rail in self.rails.iter_mut().flatten() {
            rail.moved = now;
            rail.unflushed = None;
        }
        loop {
            let lost = batch.outcome.lost;
            batch.queue = self.cut(jobs);
            self.drive(&mut batch, watch);
            if direction == Direction::Fetch || !batch.outcome.failed.is_empty() {
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
        loop {
            for at in 0..self.rails.len() {
                self.fill(at, batch);
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
            if progress {
                idle_since = None;
                continue;
            }
            if now.duration_since(*idle_since.get_or_insert(now)) < SPIN {
                std::thread::yield_now();
                continue;
            }
            if self.sleep(batch, watch) {
                for at in 0..self.rails.len() {
                    self.lose(at, batch, "the caller hung up".to_owned());
                }
                batch.give_up();
                return;
            }
            for at in 0..self.rails.len() {
                let stalled = |r: &Rail| !r.sent.is_empty() && r.moved.elapsed() > self.stall;
                if self.rails[at].as_ref().is_some_and(stalled) {
                    self.lose(at, batch, "nothing moved in time".to_owned());
                }
            }
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

    /// Posts what the rail has room for.
    fn fill(&mut self, at: usize, batch: &mut Batch<'_>) {
        loop {
            let Some(rail) = self.rails[at].as_mut() else {
                return;
            };
            let room = self.depth.saturating_sub(rail.sent.len()).min(LIST_MAX);
            let count = room.min(batch.queue.len());
            // Nothing is gained by lists of one while many are under way.
            if count == 0 || (count < LIST_MAX && count < batch.queue.len() && rail.sent.len() > 1)
            {
                return;
            }
            let slices: Vec<Slice> = batch.queue.drain(..count).collect();
            let posted = rail.post(at, &slices, batch.direction, batch.jobs);
            if let Err(reason) = posted {
                self.lose(at, batch, reason);
                return;
            }
        }
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
        let mut start = Instant::now();
        loop {
            if self.rails.iter().flatten().all(|r| r.sent.is_empty()) {
                return;
            }
            let mut progress = false;
            for at in 0..self.rails.len() {
                progress |= self.reap(at, batch);
            }
            if progress {
                start = Instant::now();
            } else if start.elapsed() < SPIN {
                std::thread::yield_now();
            } else if self.sleep(batch, watch) || start.elapsed() > self.stall {
                for at in 0..self.rails.len() {
                    if self.rails[at].as_ref().is_some_and(|r| !r.sent.is_empty()) {
                        self.lose(at, batch, "nothing moved in time".to_owned());
                    }
                }
                return;
            }
        }
    }
}

struct Batch<'a> {
    direction: Direction,
    jobs: &'a [Job<'a>],
    queue: VecDeque<Slice>,
    outcome: Outcome,
}

impl Batch<'_> {
    /// What is left will not be sent.
    fn give_up(&mut self) {
        for slice in self.queue.drain(..) {
            if !self.outcome.failed.contains(&slice.item) {
                self.outcome.failed.push(slice.item);
            }
        }
    }

    fn fail_all(&mut self) {
        self.queue.clear();
        self.outcome.failed = self.jobs.iter().map(|j| j.item).collect();
    }
}

struct Request {
    slice: Slice,
    lkey: u32,
    rkey: u32,
    /// Copied into the request by this thread.
    inline: bool,
}

impl Rail {
    fn post(
        &mut self,
        at: usize,
        slices: &[Slice],
        direction: Direction,
        jobs: &[Job<'_>],
    ) -> Result<(), String> {
        let (index, inline) = (self.end.index, self.end.inline);
        let request = |slice: &Slice| {
            let job = &jobs[slice.job];
            Some(Request {
                slice: *slice,
                lkey: job.memory.lkey(index, slice.local)?,
                rkey: *job.remote.get(slice.piece)?.keys.get(at)?,
                // Memory of a device is not for this thread to read.
                inline: direction == Direction::Bring && job.addressable && slice.length <= inline,
            })
        };
        let requests: Option<Vec<Request>> = slices.iter().map(request).collect();
        let Some(requests) = requests else {
            // They count as sent, so that they are sent again elsewhere.
            self.keep(slices);
            return Err("memory without a key".to_owned());
        };
        if let (Direction::Bring, Some(last)) = (direction, requests.last()) {
            self.unflushed = Some((last.slice.remote, last.rkey, last.slice.item));
        }
        self.post_requests(&requests, direction)
    }

    fn keep(&mut self, slices: &[Slice]) {
        for slice in slices {
            let number = self.next;
            self.next += 1;
            self.sent.push_back(Sent {
                number,
                slice: *slice,
            });
        }
    }

    /// One linked list, the last of it signalled.
    fn post_requests(&mut self, requests: &[Request], direction: Direction) -> Result<(), String> {
        if self.sent.is_empty() {
            self.moved = Instant::now();
        }
        let first = self.next;
        let mut parts: smallvec::SmallVec<[ibv_sge; LIST_MAX]> = requests
            .iter()
            .map(|r| ibv_sge {
                addr: r.slice.local,
                length: r.slice.length,
                lkey: r.lkey,
            })
            .collect();
        let mut list: smallvec::SmallVec<[ibv_send_wr; LIST_MAX]> = smallvec::SmallVec::new();
        for (n, r) in requests.iter().enumerate() {
            // SAFETY: plain numbers and null pointers, for which zero is a value.
            let mut wr: ibv_send_wr = unsafe { std::mem::zeroed() };
            wr.wr_id = first + n as u64;
            wr.sg_list = &raw mut parts[n];
            wr.num_sge = 1;
            wr.opcode = match direction {
                Direction::Fetch => ibv_wr_opcode::IBV_WR_RDMA_READ,
                Direction::Bring => ibv_wr_opcode::IBV_WR_RDMA_WRITE,
            };
            if n + 1 == requests.len() {
                wr.send_flags |= ibv_send_flags::IBV_SEND_SIGNALED.0;
            }
            if r.inline {
                wr.send_flags |= ibv_send_flags::IBV_SEND_INLINE.0;
            }
            wr.wr.rdma.remote_addr = r.slice.remote;
            wr.wr.rdma.rkey = r.rkey;
            list.push(wr);
        }
        for n in 1..list.len() {
            list[n - 1].next = &raw mut list[n];
        }
        for r in requests {
            self.keep(&[r.slice]);
        }
        let mut bad = std::ptr::null_mut();
        // SAFETY: a started queue pair; the list and what it points to live through the call, which copies them. The
        // memory stays registered and granted until `run` has returned.
        let code =
            unsafe { rdma_sys::ibv_post_send(self.end.pointer(), list.as_mut_ptr(), &raw mut bad) };
        if code == 0 {
            Ok(())
        } else {
            Err(format!("post: {}", std::io::Error::from_raw_os_error(code)))
        }
    }

    fn take(&self, found: &mut [ibv_wc; REAP_MAX]) -> Result<usize, String> {
        let Some(c) = &self.end.completions else {
            return Err("no completion queue".to_owned());
        };
        // SAFETY: our queue; room for REAP_MAX entries.
        let n = unsafe { rdma_sys::ibv_poll_cq(c.queue, REAP_MAX as i32, found.as_mut_ptr()) };
        usize::try_from(n).map_err(|_| "the completion queue failed".to_owned())
    }

    fn reap(&mut self) -> Result<bool, String> {
        // SAFETY: plain numbers, for which zero is a value.
        let mut found: [ibv_wc; REAP_MAX] = unsafe { std::mem::zeroed() };
        let n = self.take(&mut found)?;
        for wc in &found[..n] {
            if wc.status != ibv_wc_status::IBV_WC_SUCCESS {
                // The first error is the cause; those behind it were only flushed.
                let what = status_name(self.end.device.verbs, wc.status);
                return Err(format!("{what} (vendor error {:#x})", wc.vendor_err));
            }
            while self.sent.front().is_some_and(|s| s.number <= wc.wr_id) {
                self.sent.pop_front();
            }
        }
        if n > 0 {
            self.moved = Instant::now();
        }
        Ok(n > 0)
    }
}
