//! Counts and times of operations, by kind, as upstream counts its calls: an operation on one key is a call, one on
//! several keys a batch.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::base::histogram::{Histogram, NANOSECONDS};
use crate::store::wire::{self, operation, reply};

/// The kinds of operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rpc {
    Exist,
    Locate,
    PutStart,
    PutEnd,
    PutRevoke,
    ArenaOpen,
    ArenaCommit,
    ArenaClose,
    Remove,
    RemoveAll,
    RemoveMatching,
    List,
    ListMatching,
    Stat,
    View,
    ReportFailure,
    Overview,
}

impl Rpc {
    /// In the order of their numbers.
    pub(super) const ALL: [(Self, &'static str); 17] = [
        (Self::Exist, "exist"),
        (Self::Locate, "locate"),
        (Self::PutStart, "put_start"),
        (Self::PutEnd, "put_end"),
        (Self::PutRevoke, "put_revoke"),
        (Self::ArenaOpen, "arena_open"),
        (Self::ArenaCommit, "arena_commit"),
        (Self::ArenaClose, "arena_close"),
        (Self::Remove, "remove"),
        (Self::RemoveAll, "remove_all"),
        (Self::RemoveMatching, "remove_matching"),
        (Self::List, "list"),
        (Self::ListMatching, "list_matching"),
        (Self::Stat, "stat"),
        (Self::View, "view"),
        (Self::ReportFailure, "report_failure"),
        (Self::Overview, "overview"),
    ];

    pub(crate) fn of(operation: &operation::Kind) -> Self {
        use operation::Kind as Op;
        match operation {
            Op::Exist(_) => Self::Exist,
            Op::Locate(_) => Self::Locate,
            Op::PutStart(_) => Self::PutStart,
            Op::PutEnd(_) => Self::PutEnd,
            Op::PutRevoke(_) => Self::PutRevoke,
            Op::ArenaOpen(_) => Self::ArenaOpen,
            Op::ArenaCommit(_) => Self::ArenaCommit,
            Op::ArenaClose(_) => Self::ArenaClose,
            Op::Remove(_) => Self::Remove,
            Op::RemoveMatching(op) if op.regex.is_empty() => Self::RemoveAll,
            Op::RemoveMatching(_) => Self::RemoveMatching,
            Op::List(op) if op.regex.is_empty() => Self::List,
            Op::List(_) => Self::ListMatching,
            Op::Stat(_) => Self::Stat,
            Op::View(_) => Self::View,
            Op::ReportFailure(_) => Self::ReportFailure,
            Op::Overview(_) => Self::Overview,
        }
    }

    /// For texts.
    pub(crate) fn name(self) -> &'static str {
        Self::ALL[self as usize].1
    }
}

/// What became of the operations of one kind.
#[derive(Debug)]
pub(super) struct RpcStats {
    pub(super) nanoseconds: Histogram,
    pub(super) calls: AtomicU64,
    pub(super) failed_calls: AtomicU64,
    pub(super) batches: AtomicU64,
    /// Nothing of it was carried out.
    pub(super) failed_batches: AtomicU64,
    /// Some of it was not.
    pub(super) partial_batches: AtomicU64,
    pub(super) items: AtomicU64,
    pub(super) failed_items: AtomicU64,
}

impl RpcStats {
    pub(super) fn new() -> Self {
        Self {
            nanoseconds: Histogram::new(NANOSECONDS),
            calls: AtomicU64::new(0),
            failed_calls: AtomicU64::new(0),
            batches: AtomicU64::new(0),
            failed_batches: AtomicU64::new(0),
            partial_batches: AtomicU64::new(0),
            items: AtomicU64::new(0),
            failed_items: AtomicU64::new(0),
        }
    }

    pub(super) fn count(&self, took: Duration, reply: &wire::Reply) {
        self.nanoseconds.observe(took.as_nanos() as u64);
        let Outcome { items, failed, .. } = outcome(reply);
        let add = |counter: &AtomicU64, n: usize| {
            if n > 0 {
                counter.fetch_add(n as u64, Ordering::Relaxed);
            }
        };
        if items <= 1 {
            add(&self.calls, 1);
            add(&self.failed_calls, failed);
            return;
        }
        add(&self.batches, 1);
        add(&self.items, items);
        add(&self.failed_items, failed);
        add(&self.failed_batches, usize::from(failed == items));
        let partial = failed > 0 && failed < items;
        add(&self.partial_batches, usize::from(partial));
    }
}

/// What a reply says of the items of its operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) items: usize,
    pub(crate) failed: usize,
    /// Code of the first that failed; 0 = none.
    pub(crate) code: i32,
}

pub(crate) fn outcome(reply: &wire::Reply) -> Outcome {
    use reply::Kind as Re;
    let of = |codes: &mut dyn Iterator<Item = i32>| {
        codes.fold(Outcome::default(), |o, code| Outcome {
            items: o.items + 1,
            failed: o.failed + usize::from(code != 0),
            code: if o.code == 0 { code } else { o.code },
        })
    };
    let one = |code: i32| of(&mut std::iter::once(code));
    match &reply.kind {
        Some(Re::Exist(r)) => of(&mut r.results.iter().map(|_| 0)),
        Some(Re::Locate(r)) => of(&mut r.locations.iter().map(|l| l.code)),
        Some(Re::PutStart(r)) => of(&mut r.slots.iter().map(|s| s.code)),
        Some(Re::Codes(r)) => of(&mut r.codes.iter().copied()),
        Some(Re::ArenaOpened(r)) => one(r.code),
        Some(Re::Removed(r)) => one(r.code),
        Some(Re::Refused(r)) => one(r.code),
        None => one(-1),
        Some(_) => one(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_positions() {
        for (i, (rpc, _)) in Rpc::ALL.iter().enumerate() {
            assert_eq!(*rpc as usize, i);
        }
    }

    #[test]
    fn calls_and_batches() {
        let stats = RpcStats::new();
        let codes = |codes: &[i32]| {
            let kind = reply::Kind::Codes(wire::Codes {
                codes: codes.to_vec(),
            });
            kind.into()
        };
        for reply in [
            codes(&[0]),
            codes(&[-1]),
            codes(&[0, -1]),
            codes(&[-1, -1, -1]),
            wire::Reply::refused(-1, String::new()),
        ] {
            stats.count(Duration::from_micros(3), &reply);
        }
        let all = [
            &stats.calls,
            &stats.failed_calls,
            &stats.batches,
            &stats.failed_batches,
            &stats.partial_batches,
            &stats.items,
            &stats.failed_items,
        ];
        let now: Vec<u64> = all.iter().map(|c| c.load(Ordering::Relaxed)).collect();
        assert_eq!(now, [3, 2, 2, 1, 1, 5, 4]);
        assert_eq!(stats.nanoseconds.now().counts[1], 5);
    }
}
