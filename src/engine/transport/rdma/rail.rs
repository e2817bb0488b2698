//! One rail of a lane, as the node uses it: requests posted as linked lists, completions taken.
//!
//! Owns what is under way on its queue pair; what is sent, and what becomes of it after an error, is `post`'s business.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use rdma_sys::{ibv_send_flags, ibv_send_wr, ibv_sge, ibv_wc, ibv_wc_status, ibv_wr_opcode};

use super::endpoint::Endpoint;
use super::registration::Registration;
use super::verbs::status_name;
use super::wire::Piece;

/// Requests of one list: one doorbell.
pub(super) const LIST_MAX: usize = 16;
/// Bytes after which a request of a list is signalled, too: what has no completion is no progress.
const SIGNALLED: u64 = 1 << 20;
/// Completions taken with one call.
const REAP_MAX: usize = 16;

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

/// A part of a job that one request moves.
#[derive(Clone, Copy)]
pub(super) struct Slice {
    pub(super) item: usize,
    pub(super) job: usize,
    pub(super) piece: usize,
    pub(super) local: u64,
    pub(super) remote: u64,
    pub(super) length: u32,
}

pub(super) struct Sent {
    pub(super) number: u64,
    pub(super) slice: Slice,
}

/// One rail with what is under way on it, oldest first.
pub(super) struct Rail {
    pub(super) end: Endpoint,
    pub(super) sent: VecDeque<Sent>,
    pub(super) next: u64,
    /// How long it has been waited for since it last moved.
    pub(super) waited: Duration,
    /// Where the last bytes went that have not been flushed.
    pub(super) unflushed: Option<(u64, u32, usize)>,
}

/// A slice with its keys.
pub(super) struct Request {
    pub(super) slice: Slice,
    pub(super) lkey: u32,
    pub(super) rkey: u32,
    /// Copied into the request by this thread.
    pub(super) inline: bool,
}

impl Rail {
    pub(super) fn new(end: Endpoint) -> Self {
        Self {
            end,
            sent: VecDeque::new(),
            next: 0,
            waited: Duration::ZERO,
            unflushed: None,
        }
    }

    /// Posts slices as one list.
    pub(super) fn post(
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

    /// One linked list, the last of it signalled, and of large slices more.
    pub(super) fn post_requests(
        &mut self,
        requests: &[Request],
        direction: Direction,
    ) -> Result<(), String> {
        if self.sent.is_empty() {
            self.waited = Duration::ZERO;
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
        let mut silent = 0;
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
            silent += u64::from(r.slice.length);
            if n + 1 == requests.len() || silent >= SIGNALLED {
                silent = 0;
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

    /// Takes completions; whether there were any.
    pub(super) fn reap(&mut self) -> Result<bool, String> {
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
            self.waited = Duration::ZERO;
        }
        Ok(n > 0)
    }
}
