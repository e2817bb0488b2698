//! What one subscriber is to be told next: the table of keys if it asked for it, then the events as they come.
//!
//! The table is read while the index changes; the events from before the first page on follow it, so that whoever applies
//! both in order ends up with what is there. Polls the ring: recording an event wakes nobody.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::Master;
use super::super::events::{Event, Filter};

/// How long an event may lie in the ring before a subscriber sees it.
const POLL: Duration = Duration::from_millis(10);
/// After this long without an event a subscriber is told that all is quiet.
const QUIET: Duration = Duration::from_secs(5);
/// Events looked at in one step.
const EXAMINED: usize = 256;
/// Objects of one page of the table, at least; a page of the longest keys stays below the 4 MiB of a gRPC message.
const PAGE: usize = 256;

/// What a subscriber asks for.
#[derive(Clone, Debug, Default)]
pub(super) struct Wish {
    /// The first event; 0 = those that happen from now on.
    pub(super) from: u64,
    /// The epoch that number belongs to; 0 = this one.
    pub(super) epoch: u64,
    /// The table of keys first.
    pub(super) table: bool,
    pub(super) filter: Filter,
}

/// The next thing to tell.
#[derive(Debug)]
pub(super) enum Chunk {
    /// A page of the table of keys.
    Table { events: Vec<Event>, last: bool },
    /// Events in order, at least one.
    Events(Vec<Event>),
    /// Events from the one to before the other are no longer known.
    Gap { from: u64, to: u64, restarted: bool },
    /// Nothing happened for a while.
    Quiet,
}

/// A position in the stream of events.
pub(super) struct Feed {
    master: Arc<Master>,
    filter: Filter,
    next: u64,
    table: Option<u64>,
    restarted_from: Option<u64>,
    last: Instant,
}

impl Feed {
    pub(super) fn new(master: Arc<Master>, wish: Wish) -> Self {
        let ring = &master.state.events;
        let elsewhere = wish.epoch != 0 && wish.epoch != ring.epoch();
        let (next, restarted_from) = match wish {
            Wish { table: true, .. } => (ring.next(), None),
            Wish { from, .. } if elsewhere => (ring.oldest(), Some(from)),
            Wish { from: 0, .. } => (ring.next(), None),
            Wish { from, .. } => (from, None),
        };
        Self {
            next,
            table: wish.table.then_some(0),
            restarted_from,
            filter: wish.filter,
            last: Instant::now(),
            master,
        }
    }

    /// The number to go on from after what was told so far.
    pub(super) fn next_seq(&self) -> u64 {
        self.next
    }

    /// Waits for the next thing to tell. Not cancel-safe while a page of the table is read: that page is lost.
    pub(super) async fn next(&mut self) -> Chunk {
        if let Some(from) = self.restarted_from.take() {
            let to = self.next;
            return self.told(Chunk::Gap {
                from,
                to,
                restarted: true,
            });
        }
        if let Some(cursor) = self.table {
            return self.page(cursor).await;
        }
        loop {
            let ring = &self.master.state.events;
            match ring.read(self.next, EXAMINED, &self.filter) {
                Err(gap) => {
                    let from = std::mem::replace(&mut self.next, gap.oldest);
                    return self.told(Chunk::Gap {
                        from,
                        to: gap.oldest,
                        restarted: from > gap.oldest,
                    });
                }
                Ok((events, next)) => {
                    let advanced = next > self.next;
                    self.next = next;
                    if !events.is_empty() {
                        return self.told(Chunk::Events(events));
                    }
                    if advanced {
                        tokio::task::yield_now().await;
                        continue;
                    }
                }
            }
            if self.last.elapsed() >= QUIET {
                return self.told(Chunk::Quiet);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn told(&mut self, chunk: Chunk) -> Chunk {
        self.last = Instant::now();
        chunk
    }

    /// Walks the index on a thread that may take its time.
    async fn page(&mut self, cursor: u64) -> Chunk {
        let (master, filter) = (self.master.clone(), self.filter.clone());
        let read = tokio::task::spawn_blocking(move || {
            let mut events = Vec::new();
            let next = master.state.walk(cursor, PAGE, |object| {
                let wanted = Event::of(object).filter(|e| filter.wants(e));
                let found = wanted.is_some();
                events.extend(wanted);
                found
            });
            (events, next)
        });
        let (events, next) = read.await.unwrap_or_default();
        let last = next == 0;
        self.table = (!last).then_some(next);
        self.told(Chunk::Table { events, last })
    }
}
