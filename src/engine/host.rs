//! The segments this process lends to others, and the gate every access passes (S1).
//!
//! Owns the decision "may this request touch this memory"; transports only carry it out. Knows no keys: what a notify
//! means is the [`NotifySink`]'s business.

use std::sync::Arc;
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, RwLock};
use smallvec::{SmallVec, smallvec};

use super::batch::{Opcode, Word};
use super::error::TransferError;
use super::gate::{Gate, Range, Ranges, Write};
use super::grant::Grant;
use super::memory::Memory;
use crate::base::id::Id128;
use crate::base::trust::ClusterKeys;

pub use super::gate::RangeFence;

/// How long a write waits for an earlier one of the same bytes.
const OVERLAP_PATIENCE: Duration = Duration::from_secs(10);

/// Registered memory that others may reach under grants.
#[derive(Debug)]
pub struct Segment {
    /// Index within this host.
    pub index: u32,
    /// Random per mapped memory.
    pub incarnation: u64,
    /// Name for people.
    pub name: String,
    /// The bytes.
    pub memory: Arc<Memory>,
}

/// Who wrote what range, as verified by the gate.
#[derive(Clone, Copy, Debug)]
pub struct NotifyOrigin {
    /// The writer's identity from its handshake.
    pub client: Id128,
    /// Segment index.
    pub segment: u32,
    /// Start of the request's range (verified against the grant).
    pub offset: u64,
    /// Its length.
    pub length: u64,
    /// Term of the grant.
    pub term: u64,
    /// How near the writer is.
    pub reach: Reach,
}

/// What a writer can do besides sending requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// It is in this process.
    Process,
    /// It may have our memory mapped.
    Host,
    /// Nothing.
    Network,
}

/// What became of a notify.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Noted {
    /// Taken; the word is to be published now.
    Taken,
    /// Taken, and whoever took it has published the word itself.
    Published,
    /// Not taken: what it tells of is there already, from another write.
    Existed,
    /// Not taken.
    Refused,
}

/// Takes the notifies that come with writes.
pub trait NotifySink: Send + Sync {
    /// Accepts or refuses; called after the data is in place and before its word is published. Must not block long.
    fn notify(&self, origin: NotifyOrigin, payload: &[u8]) -> Noted;

    /// A same-host writer came (`+1`) or went (`-1`): while it is there it may still write memory it has mapped.
    fn shared_writer(&self, client: Id128, change: i32);
}

/// Segments of one node with their gate.
pub struct SegmentHost {
    /// The node's identity.
    pub node: Id128,
    /// The cluster's keys.
    pub keys: ClusterKeys,
    /// What is said to those who ask who is here.
    about: RwLock<String>,
    segments: RwLock<Vec<Arc<Segment>>>,
    sink: Arc<dyn NotifySink>,
    gate: Mutex<Gate>,
    /// A write has ended.
    ended: Condvar,
}

/// What the gate says to each range.
type Entered = SmallVec<[Result<(), TransferError>; 1]>;

/// A write that has passed the gate; fences wait for its end.
pub struct WritePass<'a> {
    host: &'a SegmentHost,
    number: u64,
}

impl Drop for WritePass<'_> {
    fn drop(&mut self) {
        self.host.gate.lock().leave(self.number);
        self.host.ended.notify_all();
    }
}

impl SegmentHost {
    /// A host without segments.
    pub fn new(node: Id128, keys: ClusterKeys, sink: Arc<dyn NotifySink>) -> Self {
        Self {
            node,
            keys,
            about: RwLock::default(),
            segments: RwLock::default(),
            sink,
            gate: Mutex::default(),
            ended: Condvar::new(),
        }
    }

    /// Sets what is said to those who ask who is here; a node names its master.
    pub fn set_about(&self, text: &str) {
        text.clone_into(&mut self.about.write());
    }

    /// What is said.
    pub fn about(&self) -> String {
        self.about.read().clone()
    }

    /// Adds memory as the next segment.
    pub fn add(&self, name: String, incarnation: u64, memory: Arc<Memory>) -> Arc<Segment> {
        let mut segments = self.segments.write();
        // The place of one that was taken away, if there is any.
        let free = segments.iter().position(|s| s.memory.is_empty());
        let segment = Arc::new(Segment {
            index: free.unwrap_or(segments.len()) as u32,
            incarnation,
            name,
            memory,
        });
        match free {
            Some(at) => segments[at] = segment.clone(),
            None => segments.push(segment.clone()),
        }
        segment
    }

    /// Takes a segment away: no new access passes the gate. Returns whether those under way had ended by `deadline`; the
    /// memory may go once it is true.
    pub fn remove(&self, segment: Arc<Segment>, deadline: Instant) -> bool {
        {
            let mut segments = self.segments.write();
            let at = segment.index as usize;
            if !segments.get(at).is_some_and(|s| Arc::ptr_eq(s, &segment)) {
                return false;
            }
            // SAFETY: of length 0, nothing is ever touched there.
            let nothing = unsafe { Memory::borrowed(std::ptr::NonNull::dangling(), 0) };
            segments[at] = Arc::new(Segment {
                index: segment.index,
                incarnation: 0,
                name: String::new(),
                memory: Arc::new(nothing),
            });
        }
        // Every access holds the segment for as long as it lasts.
        while Arc::strong_count(&segment) > 1 {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        true
    }

    /// All segments.
    pub fn segments(&self) -> Vec<Arc<Segment>> {
        self.segments.read().clone()
    }

    /// One segment, if it is still the incarnation asked for.
    ///
    /// # Errors
    /// `Stale`.
    pub fn segment(&self, index: u32, incarnation: u64) -> Result<Arc<Segment>, TransferError> {
        match self.segments.read().get(index as usize) {
            Some(s) if s.incarnation == incarnation => Ok(s.clone()),
            _ => Err(TransferError::Stale),
        }
    }

    /// The gate: a genuine, live grant for this access that covers range and word, inside a live segment.
    ///
    /// # Errors
    /// `Stale`, `GrantRefused`, `OutOfBounds`.
    pub fn check(
        &self,
        opcode: Opcode,
        grant: &Grant,
        offset: u64,
        length: u64,
        word: Option<Word>,
    ) -> Result<Arc<Segment>, TransferError> {
        let segment = self.segment(grant.segment, grant.incarnation)?;
        if !grant.allows(opcode.access(), &self.keys) {
            return Err(TransferError::GrantRefused);
        }
        if segment.memory.is_lost() {
            return Err(TransferError::Stale);
        }
        let word_fits =
            word.is_none_or(|w| w.offset.is_multiple_of(8) && grant.covers(w.offset, 8));
        if !grant.covers(offset, length)
            || !word_fits
            || segment.memory.range(grant.offset, grant.length).is_none()
        {
            return Err(TransferError::OutOfBounds);
        }
        Ok(segment)
    }

    /// Enters the write gate; the pass is held until the bytes are in place and published. Where the same bytes are being
    /// fetched by a NIC, that is waited for: a writer that gave RDMA up comes again by TCP, and the first may not have
    /// ended here.
    ///
    /// # Errors
    /// `GrantRefused` when a newer master has fenced this grant's term off, or its range was taken from its writer;
    /// `Timeout` when the earlier write does not end.
    pub fn enter_write(
        &self,
        grant: &Grant,
        offset: u64,
        length: u64,
    ) -> Result<WritePass<'_>, TransferError> {
        let (pass, mut results) = self.enter(smallvec![Range::new(grant, offset, length)], None);
        results.pop().unwrap_or(Ok(())).map(|()| pass)
    }

    /// [`SegmentHost::enter_write`] for the ranges of one frame, whose bytes a NIC fetches: a result for each, and one pass for
    /// those that may go on. They enter together or not at all. Passes of one thread do not wait for each other.
    pub fn enter_fetched_write(&self, ranges: &[(Grant, u64, u64)]) -> (WritePass<'_>, Entered) {
        let ranges = ranges.iter().map(|(g, o, l)| Range::new(g, *o, *l));
        self.enter(ranges.collect(), Some(std::thread::current().id()))
    }

    fn enter(&self, ranges: Ranges, fetched_by: Option<ThreadId>) -> (WritePass<'_>, Entered) {
        let mut results: Entered = ranges.iter().map(|_| Ok(())).collect();
        let mut write = Write::new(ranges.clone(), fetched_by);
        let mut gate = self.gate.lock();
        let mut until = None;
        loop {
            // Fences may have come while it waited.
            let mut refused = false;
            for (range, result) in ranges.iter().zip(&mut results) {
                if result.is_ok() {
                    *result = gate.admits(range);
                    refused |= result.is_err();
                }
            }
            if refused {
                let open = ranges.iter().zip(&results).filter(|(_, r)| r.is_ok());
                write = Write::new(open.map(|(range, _)| *range).collect(), fetched_by);
            }
            if !gate.is_taken(&write) {
                break;
            }
            let until = *until.get_or_insert_with(|| Instant::now() + OVERLAP_PATIENCE);
            if self.ended.wait_until(&mut gate, until).timed_out() {
                for result in results.iter_mut().filter(|r| r.is_ok()) {
                    *result = Err(TransferError::Timeout {
                        peer: "an earlier write of the same range".to_owned(),
                    });
                }
                write = Write::new(Ranges::new(), fetched_by);
                break;
            }
        }
        let number = gate.enter(write);
        (WritePass { host: self, number }, results)
    }

    /// Refuses writes of terms before `term` from now on. Returns whether those under way had ended by `deadline`.
    pub fn fence_writes(&self, term: u64, deadline: Instant) -> bool {
        let mut gate = self.gate.lock();
        gate.fence_term(term);
        self.await_end(gate, deadline, |gate| gate.has_older(term))
    }

    /// Takes a range from its writer. Returns whether its writes under way had ended by `deadline`.
    pub fn fence_range(&self, fence: RangeFence, deadline: Instant) -> bool {
        let mut gate = self.gate.lock();
        gate.fence_range(fence, crate::base::clock::unix_ms());
        self.await_end(gate, deadline, |gate| gate.has_fenced(&fence))
    }

    fn await_end(
        &self,
        mut gate: parking_lot::MutexGuard<'_, Gate>,
        deadline: Instant,
        concerned: impl Fn(&Gate) -> bool,
    ) -> bool {
        while concerned(&gate) {
            if self.ended.wait_until(&mut gate, deadline).timed_out() {
                return false;
            }
        }
        true
    }

    /// Hands a notify to the owner. Whether the write's word is still to be published.
    ///
    /// # Errors
    /// `NotifyRefused`, `Existed`.
    pub fn notify(&self, origin: NotifyOrigin, payload: &[u8]) -> Result<bool, TransferError> {
        if payload.is_empty() {
            return Ok(true);
        }
        match self.sink.notify(origin, payload) {
            Noted::Taken => Ok(true),
            Noted::Published => Ok(false),
            Noted::Existed => Err(TransferError::Existed),
            Noted::Refused => Err(TransferError::NotifyRefused),
        }
    }

    /// See [`NotifySink::shared_writer`].
    pub fn shared_writer(&self, client: Id128, change: i32) {
        self.sink.shared_writer(client, change);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::clock::unix_ms;

    struct Nobody;
    impl NotifySink for Nobody {
        fn notify(&self, _: NotifyOrigin, _: &[u8]) -> Noted {
            Noted::Taken
        }
        fn shared_writer(&self, _: Id128, _: i32) {}
    }

    #[test]
    fn a_write_waits_for_a_nic_that_still_fetches_the_same_bytes() {
        let keys = ClusterKeys::derive(None);
        let host = SegmentHost::new(Id128::random(), keys, Arc::new(Nobody));
        let grant = Grant {
            segment: 0,
            incarnation: 1,
            offset: 0,
            length: 4096,
            term: 1,
            expires_unix_ms: unix_ms() + 60_000,
            mac: [0; 16],
        };
        let (fetching, results) = host.enter_fetched_write(&[(grant, 0, 100), (grant, 50, 40)]);
        assert_eq!(results[..], [Ok(()), Ok(())]);
        // Of the same thread.
        drop(host.enter_fetched_write(&[(grant, 50, 100)]));
        std::thread::scope(|s| {
            let start = Instant::now();
            let other = s.spawn(|| drop(host.enter_write(&grant, 100, 100).unwrap()));
            other.join().unwrap();
            assert!(start.elapsed() < Duration::from_secs(5), "other bytes");
            let same = s.spawn(|| host.enter_write(&grant, 99, 1).map(|_| Instant::now()));
            std::thread::sleep(Duration::from_millis(100));
            assert!(!same.is_finished());
            let ended = Instant::now();
            drop(fetching);
            assert!(same.join().unwrap().unwrap() >= ended);
        });
        // Two writers of one range over TCP are not held up by each other.
        let _one = host.enter_write(&grant, 0, 100).unwrap();
        drop(host.enter_write(&grant, 0, 100).unwrap());
    }
}
