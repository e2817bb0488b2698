//! The segments this process lends to others, and the gate every access passes (S1).
//!
//! Owns the decision "may this request touch this memory"; transports only carry it out. Knows no keys: what a notify
//! means is the [`NotifySink`]'s business.

use std::collections::HashMap;
use std::sync::Arc;
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, RwLock};

use super::batch::{Opcode, Word};
use super::error::TransferError;
use super::grant::{CLOCK_SKEW_MS, Grant};
use super::memory::Memory;
use crate::base::id::Id128;
use crate::base::trust::ClusterKeys;

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

/// What decides about writes, and the writes under way. A fence refuses new ones at once and then waits for those it
/// concerns; it never holds up the others.
#[derive(Default)]
struct Gate {
    /// Grants of older terms are refused.
    term: u64,
    fences: Vec<RangeFence>,
    next: u64,
    under_way: HashMap<u64, Write>,
}

/// A range taken from its writer: grants that expire before `expires_before_unix_ms` were issued before that.
#[derive(Clone, Copy, Debug)]
pub struct RangeFence {
    /// Segment index.
    pub segment: u32,
    /// Start of the range.
    pub offset: u64,
    /// Its length.
    pub length: u64,
    /// Grants with an earlier expiry are refused there.
    pub expires_before_unix_ms: u64,
}

#[derive(Clone, Copy)]
struct Write {
    term: u64,
    segment: u32,
    offset: u64,
    length: u64,
    expires: u64,
    /// The thread that carries it out, when a NIC fetches the bytes.
    fetched_by: Option<ThreadId>,
}

impl RangeFence {
    /// Whether this one makes another of the same range superfluous.
    fn replaces(&self, other: &Self) -> bool {
        (self.segment, self.offset, self.length) == (other.segment, other.offset, other.length)
            && self.expires_before_unix_ms >= other.expires_before_unix_ms
    }

    fn concerns(&self, w: &Write) -> bool {
        w.segment == self.segment
            && w.expires < self.expires_before_unix_ms
            && w.offset < self.offset.saturating_add(self.length)
            && self.offset < w.offset.saturating_add(w.length)
    }
}

impl Write {
    /// Whether one of two writes is fetched by a NIC and touches a byte of the other, of another thread.
    fn meets(&self, other: &Self) -> bool {
        self.fetched_by != other.fetched_by
            && self.segment == other.segment
            && self.offset < other.offset.saturating_add(other.length)
            && other.offset < self.offset.saturating_add(self.length)
    }
}

/// A write that has passed the gate; fences wait for its end.
pub struct WritePass<'a> {
    host: &'a SegmentHost,
    number: u64,
}

impl Drop for WritePass<'_> {
    fn drop(&mut self) {
        self.host.gate.lock().under_way.remove(&self.number);
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
        self.enter(grant, offset, length, None)
    }

    /// [`SegmentHost::enter_write`] for bytes that a NIC fetches. Passes of one thread do not wait for each other.
    ///
    /// # Errors
    /// As there.
    pub fn enter_fetched_write(
        &self,
        grant: &Grant,
        offset: u64,
        length: u64,
    ) -> Result<WritePass<'_>, TransferError> {
        self.enter(grant, offset, length, Some(std::thread::current().id()))
    }

    fn enter(
        &self,
        grant: &Grant,
        offset: u64,
        length: u64,
        fetched_by: Option<ThreadId>,
    ) -> Result<WritePass<'_>, TransferError> {
        let write = Write {
            term: grant.term,
            segment: grant.segment,
            offset,
            length,
            expires: grant.expires_unix_ms,
            fetched_by,
        };
        let mut gate = self.gate.lock();
        let mut until = None;
        loop {
            if write.term < gate.term || gate.fences.iter().any(|f| f.concerns(&write)) {
                return Err(TransferError::GrantRefused);
            }
            if !gate.under_way.values().any(|w| w.meets(&write)) {
                break;
            }
            let until = *until.get_or_insert_with(|| Instant::now() + OVERLAP_PATIENCE);
            if self.ended.wait_until(&mut gate, until).timed_out() {
                return Err(TransferError::Timeout {
                    peer: "an earlier write of the same range".to_owned(),
                });
            }
        }
        let number = gate.next;
        gate.next += 1;
        gate.under_way.insert(number, write);
        Ok(WritePass { host: self, number })
    }

    /// Refuses writes of terms before `term` from now on. Returns whether those under way had ended by `deadline`.
    pub fn fence_writes(&self, term: u64, deadline: Instant) -> bool {
        let mut gate = self.gate.lock();
        gate.term = gate.term.max(term);
        self.await_end(gate, deadline, |w| w.term < term)
    }

    /// Takes a range from its writer. Returns whether its writes under way had ended by `deadline`.
    pub fn fence_range(&self, fence: RangeFence, deadline: Instant) -> bool {
        let mut gate = self.gate.lock();
        // A fence whose grants have all expired has done its work.
        let now = crate::base::clock::unix_ms();
        gate.fences
            .retain(|f| f.expires_before_unix_ms + 2 * CLOCK_SKEW_MS > now && !fence.replaces(f));
        gate.fences.push(fence);
        self.await_end(gate, deadline, |w| fence.concerns(w))
    }

    fn await_end(
        &self,
        mut gate: parking_lot::MutexGuard<'_, Gate>,
        deadline: Instant,
        concerned: impl Fn(&Write) -> bool,
    ) -> bool {
        while gate.under_way.values().any(&concerned) {
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
        let fetching = host.enter_fetched_write(&grant, 0, 100).unwrap();
        // Of the same frame.
        drop(host.enter_fetched_write(&grant, 50, 100).unwrap());
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
