//! Which writes may go on: terms, ranges that were taken from their writers, and writes of the same bytes under way.
//!
//! Owns that decision and nothing else; `host` asks it under its lock. A frame of `n` ranges passes in `O(n log n)` steps,
//! whatever else is under way and however many ranges were taken.

use std::collections::{BTreeMap, HashMap};
use std::thread::ThreadId;

use smallvec::SmallVec;

use super::error::TransferError;
use super::grant::{CLOCK_SKEW_MS, Grant};

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

/// One range of a write, with what its grant says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Range {
    term: u64,
    expires: u64,
    segment: u32,
    start: u64,
    end: u64,
}

/// Where a range begins and ends: `(segment, start, end)`.
type Place = (u32, u64, u64);

impl Range {
    pub(super) fn new(grant: &Grant, offset: u64, length: u64) -> Self {
        Self {
            term: grant.term,
            expires: grant.expires_unix_ms,
            segment: grant.segment,
            start: offset,
            end: offset.saturating_add(length),
        }
    }

    fn place(&self) -> Place {
        (self.segment, self.start, self.end)
    }
}

impl RangeFence {
    fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }

    fn concerns(&self, w: &Range) -> bool {
        step();
        w.segment == self.segment
            && w.expires < self.expires_before_unix_ms
            && w.start < self.end()
            && self.offset < w.end
    }
}

/// The ranges of one frame; one by one where bytes come through a socket.
pub(super) type Ranges = SmallVec<[Range; 1]>;

/// A write: all the ranges of one frame.
pub(super) struct Write {
    ranges: Ranges,
    /// The thread that carries it out, when a NIC fetches the bytes.
    fetched_by: Option<ThreadId>,
    /// Sorted by segment and start; the number is the furthest end of it and those before it in the segment. Of writes
    /// that a NIC fetches.
    reach: Vec<(u32, u64, u64)>,
}

impl Write {
    pub(super) fn new(ranges: Ranges, fetched_by: Option<ThreadId>) -> Self {
        let mut reach = Vec::new();
        if fetched_by.is_some() {
            reach = ranges.iter().map(Range::place).collect();
            reach.sort_unstable();
            for at in 1..reach.len() {
                step();
                if reach[at - 1].0 == reach[at].0 {
                    reach[at].2 = reach[at].2.max(reach[at - 1].2);
                }
            }
        }
        Self {
            ranges,
            fetched_by,
            reach,
        }
    }

    /// Whether it has a byte in common with another one, which a NIC fetches.
    fn meets(&self, other: &Self) -> bool {
        // The shorter list is looked up in the longer one.
        let (few, many) = if self.fetched_by.is_none() || self.ranges.len() <= other.ranges.len() {
            (self, other)
        } else {
            (other, self)
        };
        few.ranges.iter().any(|r| many.touches(r.place()))
    }

    /// Whether a range touches a byte of this write, which a NIC fetches.
    fn touches(&self, (segment, start, end): Place) -> bool {
        let before = self.reach.partition_point(|(s, at, _)| {
            step();
            (*s, *at) < (segment, end)
        });
        before
            .checked_sub(1)
            .is_some_and(|last| self.reach[last].0 == segment && self.reach[last].2 > start)
    }
}

/// What decides about writes, and the writes under way. A fence refuses new ones at once and then waits for those it
/// concerns; it never holds up the others.
#[derive(Default)]
pub(super) struct Gate {
    /// Grants of older terms are refused.
    term: u64,
    fences: Fences,
    next: u64,
    /// By NICs, one frame per thread.
    fetched: HashMap<u64, Write>,
    /// By this process, one range per thread.
    copied: HashMap<u64, Write>,
}

impl Gate {
    /// Whether a range may be written at all.
    pub(super) fn admits(&self, range: &Range) -> Result<(), TransferError> {
        if range.term < self.term || self.fences.concern(range) {
            return Err(TransferError::GrantRefused);
        }
        Ok(())
    }

    /// Whether bytes of this write are being fetched by a NIC, or are to be fetched and being written, by another thread.
    pub(super) fn is_taken(&self, write: &Write) -> bool {
        let others = self.fetched.values();
        let mut others = others.filter(|w| w.fetched_by != write.fetched_by);
        if others.any(|other| write.meets(other)) {
            return true;
        }
        let mut copied = self.copied.values().flat_map(|w| &w.ranges);
        write.fetched_by.is_some() && copied.any(|r| write.touches(r.place()))
    }

    /// Lets a write in; the number is for [`Gate::leave`].
    pub(super) fn enter(&mut self, write: Write) -> u64 {
        let number = self.next;
        self.next += 1;
        if write.fetched_by.is_some() {
            self.fetched.insert(number, write);
        } else {
            self.copied.insert(number, write);
        }
        number
    }

    /// A write has ended.
    pub(super) fn leave(&mut self, number: u64) {
        if self.copied.remove(&number).is_none() {
            self.fetched.remove(&number);
        }
    }

    /// Refuses writes of terms before `term` from now on.
    pub(super) fn fence_term(&mut self, term: u64) {
        self.term = self.term.max(term);
    }

    /// Takes a range from its writer.
    pub(super) fn fence_range(&mut self, fence: RangeFence, now_unix_ms: u64) {
        self.fences.forget(now_unix_ms);
        self.fences.insert(&fence);
    }

    /// Whether a write of a term before `term` is under way.
    pub(super) fn has_older(&self, term: u64) -> bool {
        self.under_way().any(|w| w.term < term)
    }

    /// Whether a write is under way that a fence concerns.
    pub(super) fn has_fenced(&self, fence: &RangeFence) -> bool {
        self.under_way().any(|w| fence.concerns(w))
    }

    fn under_way(&self) -> impl Iterator<Item = &Range> {
        let all = self.copied.values().chain(self.fetched.values());
        all.flat_map(|w| &w.ranges)
    }
}

/// Ranges taken from their writers, cut into pieces that do not overlap: from `(segment, start)`, the end and the latest
/// expiry that is refused there.
#[derive(Default)]
struct Fences {
    pieces: BTreeMap<(u32, u64), (u64, u64)>,
    /// Pieces that were left when outdated ones were looked for last.
    swept: usize,
}

/// Pieces that are not worth looking through.
const FEW: usize = 16;

impl Fences {
    fn concern(&self, w: &Range) -> bool {
        // The piece that begins at or before the range, and those that begin within it.
        let before = self
            .pieces
            .range(..=(w.segment, w.start))
            .next_back()
            .filter(|((segment, _), (end, _))| *segment == w.segment && *end > w.start);
        step();
        if before.is_some_and(|(_, (_, expires_before))| w.expires < *expires_before) {
            return true;
        }
        let from = (w.segment, w.start.saturating_add(1));
        if from >= (w.segment, w.end) {
            return false;
        }
        self.pieces
            .range(from..(w.segment, w.end))
            .any(|(_, (_, expires_before))| {
                step();
                w.expires < *expires_before
            })
    }

    fn insert(&mut self, fence: &RangeFence) {
        let (segment, end) = (fence.segment, fence.end());
        if fence.offset >= end {
            return;
        }
        self.split(segment, fence.offset);
        self.split(segment, end);
        let there: Vec<(u64, u64, u64)> = self
            .pieces
            .range((segment, fence.offset)..(segment, end))
            .map(|((_, start), (end, expires))| (*start, *end, *expires))
            .collect();
        let mut at = fence.offset;
        // What is there and later stays; the gaps and the rest are this fence's.
        for (start, piece_end, expires) in there {
            step();
            if expires >= fence.expires_before_unix_ms {
                self.fill(segment, at, start, fence.expires_before_unix_ms);
                at = piece_end;
            } else {
                self.pieces.remove(&(segment, start));
            }
        }
        self.fill(segment, at, end, fence.expires_before_unix_ms);
    }

    fn fill(&mut self, segment: u32, start: u64, end: u64, expires: u64) {
        if start < end {
            self.pieces.insert((segment, start), (end, expires));
        }
    }

    /// Makes `at` a boundary.
    fn split(&mut self, segment: u32, at: u64) {
        let piece = self.pieces.range_mut(..(segment, at)).next_back();
        if let Some(((s, _), (end, expires))) = piece
            && *s == segment
            && *end > at
        {
            let right = (*end, *expires);
            *end = at;
            self.pieces.insert((segment, at), right);
        }
    }

    /// A fence whose grants have all expired has done its work. Looked for when there are twice as many as last time.
    fn forget(&mut self, now_unix_ms: u64) {
        if self.pieces.len() < FEW.max(2 * self.swept) {
            return;
        }
        self.pieces
            .retain(|_, (_, expires_before)| *expires_before + 2 * CLOCK_SKEW_MS > now_unix_ms);
        self.swept = self.pieces.len();
    }
}

#[cfg(not(test))]
fn step() {}

#[cfg(test)]
fn step() {
    tests::STEPS.with(|steps| steps.set(steps.get() + 1));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use smallvec::smallvec;
    use std::cell::Cell;

    thread_local! {
        pub(super) static STEPS: Cell<u64> = const { Cell::new(0) };
    }

    fn range(start: u64, length: u64) -> Range {
        Range {
            term: 1,
            expires: 100,
            segment: 0,
            start,
            end: start + length,
        }
    }

    fn another_thread() -> ThreadId {
        let other = std::thread::spawn(|| std::thread::current().id());
        other.join().unwrap()
    }

    fn steps(work: impl FnOnce()) -> u64 {
        STEPS.set(0);
        work();
        STEPS.get()
    }

    #[test]
    fn many_ranges_take_few_steps() {
        const RANGES: u64 = 100_000;
        let mut gate = Gate::default();
        // Ranges taken from their writers, in pieces beside those that are written.
        for n in 0..RANGES {
            let fence = RangeFence {
                segment: 0,
                offset: 1000 * n + 500,
                length: 100,
                expires_before_unix_ms: u64::MAX / 2,
            };
            gate.fence_range(fence, 1);
        }
        let (me, other) = (std::thread::current().id(), another_thread());
        let theirs: Ranges = (0..RANGES).map(|n| range(1000 * n, 100)).collect();
        let mut ours: Ranges = (0..RANGES).map(|n| range(1000 * n + 100, 100)).collect();
        gate.enter(Write::new(theirs, Some(other)));
        let taken = steps(|| {
            assert!(ours.iter().all(|r| gate.admits(r).is_ok()));
            let write = Write::new(ours.clone(), Some(me));
            assert!(!gate.is_taken(&write));
            gate.enter(write);
        });
        // About log2 of the ranges each; to look at every pair would be 10^10.
        assert!(taken < 40 * RANGES, "{taken}");
        let small = steps(|| {
            assert!(!gate.is_taken(&Write::new(smallvec![range(300, 100)], None)));
        });
        assert!(small < 100, "{small}");
        // The last byte of one of theirs.
        ours[77_777].start -= 1;
        let one = smallvec![ours[77_777]];
        assert!(gate.is_taken(&Write::new(ours.clone(), Some(me))));
        assert!(gate.is_taken(&Write::new(one, None)));
        assert!(gate.admits(&range(550, 10)).is_err() && gate.admits(&range(400, 101)).is_err());
        gate.leave(0);
        assert!(!gate.is_taken(&Write::new(ours, Some(me))));
    }

    #[test]
    fn fences_do_not_pile_up() {
        let mut gate = Gate::default();
        for n in 0..100_000u64 {
            let fence = RangeFence {
                segment: 0,
                offset: 64 * n,
                length: 64,
                expires_before_unix_ms: n,
            };
            gate.fence_range(fence, n);
        }
        let kept = gate.fences.pieces.len() as u64;
        assert!(kept < 4 * (2 * CLOCK_SKEW_MS + 100), "{kept}");
    }

    proptest! {
        /// Against looking at every pair.
        #[test]
        fn decides_as_every_pair_would(
            fences in proptest::collection::vec((0u32..2, 0u64..60, 0u64..20, 0u64..8), 0..12),
            theirs in proptest::collection::vec((0u32..2, 0u64..60, 0u64..12), 1..8),
            ours in proptest::collection::vec((0u32..2, 0u64..60, 1u64..12, 0u64..8), 1..8),
            copied in proptest::collection::vec((0u32..2, 0u64..60, 0u64..12), 0..3),
            fetching in any::<bool>(),
        ) {
            let mut gate = Gate::default();
            let mut all = Vec::new();
            for (segment, offset, length, expires_before_unix_ms) in fences {
                let fence = RangeFence { segment, offset, length, expires_before_unix_ms };
                gate.fence_range(fence, 0);
                all.push(fence);
            }
            let make = |(segment, start, length): (u32, u64, u64)| Range {
                segment, start, end: start + length, term: 1, expires: 0,
            };
            let theirs: Ranges = theirs.into_iter().map(make).collect();
            let copied: Ranges = copied.into_iter().map(make).collect();
            gate.enter(Write::new(theirs.clone(), Some(another_thread())));
            for c in &copied {
                gate.enter(Write::new(smallvec![*c], None));
            }
            let ours: Ranges = ours
                .into_iter()
                .map(|(s, o, l, expires)| Range { expires, ..make((s, o, l)) })
                .collect();
            for r in &ours {
                // A fence of no bytes takes nothing.
                let refused = all.iter().any(|f| f.length > 0 && f.concerns(r));
                prop_assert_eq!(gate.admits(r).is_err(), refused);
            }
            let meets = |a: &Range, b: &Range| {
                a.segment == b.segment && a.start < b.end && b.start < a.end
            };
            let me = fetching.then(|| std::thread::current().id());
            let against = theirs.iter().chain(copied.iter().filter(|_| fetching));
            let taken = against.into_iter().any(|t| ours.iter().any(|o| meets(o, t)));
            prop_assert_eq!(gate.is_taken(&Write::new(ours, me)), taken);
        }
    }
}
