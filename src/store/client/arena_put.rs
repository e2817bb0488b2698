//! Puts into arenas: the commit leaves for the master while the bytes go to the node, and the put returns when both are
//! there. In memory that is mapped here the bytes are copied by this thread and the node is not asked at all. A node that
//! shares its process with the master commits what it is sent: then there is one exchange, with it alone.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use prost::Message;
use smallvec::SmallVec;

use super::PoolClient;
use super::arenas::{Arena, Place, Wanted, Wish};
use super::control::Sent;
use super::location_cache::ReplicaRef;
use super::put::{Header, PutOptions, PutOutcome, Writing, directory_entry, write_request};
use super::view::SegmentRef;
use crate::base::trace;
use crate::engine::batch::{Opcode, TransferRequest, TransferResult};
use crate::engine::copy;
use crate::engine::error::TransferError;
use crate::engine::grant::Grant;
use crate::engine::transport::TransportKind;
use crate::store::arena_table::ArenaTable;
use crate::store::model::error::StoreError;
use crate::store::model::header::{HEADER_BYTES, pending};
use crate::store::wire::{self, NodeNotify, node_notify, operation, reply};

/// How long a node may take to take note of an arena, and of its end.
const BEGIN_PATIENCE: Duration = Duration::from_secs(1);
const END_PATIENCE: Duration = Duration::from_millis(200);

impl PoolClient {
    pub(super) fn put_by_arena(
        &self,
        writings: &mut [Writing<'_>],
        options: &PutOptions,
        deadline: Instant,
    ) {
        for w in writings.iter_mut().filter(|w| w.outcome.is_none()) {
            w.place = self.find_place(w, options, deadline);
        }
        let mut placed: Vec<usize> = (0..writings.len())
            .filter(|i| writings[*i].place.is_some())
            .collect();
        if placed.is_empty() {
            return;
        }
        // Items of one arena next to each other: one commit and one data frame each.
        let arena_of = |w: &Writing<'_>| w.place.as_ref().map_or(0, |p| p.arena);
        placed.sort_by_key(|i| arena_of(&writings[*i]));
        // What travels with its bytes needs no word to the master.
        let is_carried = |i: &usize| {
            let place = writings[*i].place.as_ref();
            place.is_some_and(|p| self.is_carried(p))
        };
        let carried: Vec<bool> = placed.iter().map(is_carried).collect();
        let apart: Vec<usize> = placed
            .iter()
            .zip(&carried)
            .filter_map(|(index, carried)| (!carried).then_some(*index))
            .collect();
        let sent = match self.send_commits(writings, &apart, options, deadline) {
            Ok(sent) => sent,
            Err(error) => {
                for index in placed {
                    writings[index].outcome = Some(Err(error.clone()));
                    // Nobody committed it: what its table says of it must not be found by a later master.
                    if let Some(place) = &writings[index].place {
                        place.table.iter().for_each(|table| take_back(place, table));
                        self.arenas.lost(place.arena);
                    }
                }
                return;
            }
        };
        let written = self.write_placed(writings, &placed, &carried, options, deadline);
        let mut committed = self.receive_commits(sent, apart.len()).into_iter();
        let codes = carried.iter().zip(&written).map(|(carried, data)| {
            if *carried {
                carried_code(data)
            } else {
                committed.next()
            }
        });
        let mut codes: Vec<Option<Result<i32, StoreError>>> = codes.collect();
        self.ask_why(writings, &placed, &mut codes, &written, options, deadline);
        let codes = codes.into_iter();
        let codes = codes.map(|code| code.unwrap_or_else(|| Err(self.control.surprise())));
        let codes = codes.collect();
        self.settle_arena(writings, &placed, options, &written, codes, deadline);
    }

    /// Whether the node of a place commits what is written there.
    fn is_carried(&self, place: &Place) -> bool {
        place.segment.commits && place.table.is_none() && !self.is_near(&place.segment)
    }

    /// Sends the commits of `apart`, and with them the closing of arenas that are over.
    fn send_commits(
        &self,
        writings: &[Writing<'_>],
        apart: &[usize],
        options: &PutOptions,
        deadline: Instant,
    ) -> Result<Option<SentCommits>, StoreError> {
        let mut operations = self.commits(writings, apart, options, None);
        let commits = operations.len();
        let ended = self.arenas.take_ended();
        operations.extend(ended.iter().map(close));
        if operations.is_empty() {
            return Ok(None);
        }
        match self.control.send(operations, deadline) {
            Ok(sent) => Ok(Some(SentCommits {
                sent,
                commits,
                ended,
            })),
            Err(error) => {
                self.arenas.ended(ended);
                Err(error)
            }
        }
    }

    /// A code per item.
    fn receive_commits(
        &self,
        sent: Option<SentCommits>,
        items: usize,
    ) -> Vec<Result<i32, StoreError>> {
        let Some(sent) = sent else {
            return Vec::new();
        };
        let received = self.control.receive(sent.sent);
        if received.is_err() {
            self.arenas.ended(sent.ended);
        }
        let codes = received.and_then(|batch| self.codes_of(batch.replies, sent.commits, items));
        match codes {
            Ok(codes) => codes.into_iter().map(Ok).collect(),
            Err(error) => vec![Err(error); items],
        }
    }

    /// The codes in the first `operations` replies, which are about this many items.
    fn codes_of(
        &self,
        replies: Vec<wire::Reply>,
        operations: usize,
        items: usize,
    ) -> Result<Vec<i32>, StoreError> {
        let mut codes = Vec::with_capacity(items);
        for reply in replies.into_iter().take(operations) {
            match self.control.kind(Some(reply))? {
                reply::Kind::Codes(c) => codes.extend(c.codes),
                _ => return Err(self.control.surprise()),
            }
        }
        if codes.len() == items {
            Ok(codes)
        } else {
            Err(self.control.surprise())
        }
    }

    /// A node says only that a commit was refused: the master says why.
    fn ask_why(
        &self,
        writings: &[Writing<'_>],
        placed: &[usize],
        codes: &mut [Option<Result<i32, StoreError>>],
        written: &[TransferResult],
        options: &PutOptions,
        deadline: Instant,
    ) {
        let refused: Vec<usize> = (0..placed.len())
            .filter(|at| codes[*at].is_none() && written[*at] == Err(TransferError::NotifyRefused))
            .collect();
        if refused.is_empty() {
            return;
        }
        let indices: Vec<usize> = refused.iter().map(|at| placed[*at]).collect();
        let operations = self.commits(writings, &indices, options, None);
        let count = operations.len();
        let called = self.control.call(operations, deadline);
        let told = called.and_then(|replies| self.codes_of(replies, count, indices.len()));
        for (position, at) in refused.into_iter().enumerate() {
            codes[at] = Some(match &told {
                Ok(codes) => Ok(codes[position]),
                Err(error) => Err(error.clone()),
            });
        }
    }

    /// Brings the bytes of all placed items to their places: far ones are sent first and near ones copied meanwhile.
    fn write_placed(
        &self,
        writings: &[Writing<'_>],
        placed: &[usize],
        carried: &[bool],
        options: &PutOptions,
        deadline: Instant,
    ) -> Vec<TransferResult> {
        let mut results: Vec<TransferResult> = placed.iter().map(|_| Ok(())).collect();
        let table = |index: usize| writings[index].place.as_ref().and_then(|p| p.table.clone());
        let far: Vec<usize> = (0..placed.len())
            .filter(|at| table(placed[*at]).is_none())
            .collect();
        let headers: Vec<Header> = far
            .iter()
            .map(|at| writings[placed[*at]].header())
            .collect();
        let requests: Vec<TransferRequest> = far
            .iter()
            .zip(&headers)
            .filter_map(|(at, header)| {
                let w = &writings[placed[*at]];
                let place = w.place.as_ref()?;
                let replica = ReplicaRef {
                    segment: place.segment.clone(),
                    grant: place.grant,
                };
                let (offset, version) = (place.offset, place.version);
                let arena = if carried[*at] { place.arena } else { 0 };
                Some(write_request(
                    w, &replica, offset, version, header, options, arena,
                ))
            })
            .collect();
        let attempt = deadline.min(Instant::now() + self.config.transfer_timeout);
        let begun = self.engine.begin(&requests, attempt);
        let near = |index: usize| {
            let w = &writings[index];
            let place = w.place.as_ref()?;
            Some((w, place, place.table.as_ref()?))
        };
        for (at, index) in placed.iter().enumerate() {
            if let Some((w, place, table)) = near(*index) {
                let begun = Instant::now();
                results[at] = copy_near(w, place, table);
                self.count_near(place, w.size, begun, results[at].is_ok());
            }
        }
        // Memory of a process that has died can still be written: nobody would read it there.
        let mut known: Option<(u64, bool)> = None;
        for (at, index) in placed.iter().enumerate() {
            let Some((_, place, _)) = near(*index) else {
                continue;
            };
            let alive = match known {
                Some((arena, alive)) if arena == place.arena => alive,
                _ => self.is_alive(place),
            };
            known = Some((place.arena, alive));
            if !alive {
                results[at] = Err(TransferError::Broken {
                    peer: place.segment.peer.shm_socket.clone(),
                    reason: "the node is gone".to_owned(),
                });
            }
        }
        for (at, result) in far.into_iter().zip(begun.finish()) {
            results[at] = result;
        }
        results
    }

    /// The engine sees nothing of what is copied here.
    fn count_near(&self, place: &Place, size: u64, begun: Instant, ok: bool) {
        if let Some(kind) = self.engine.path(&place.segment.peer).filter(|_| ok) {
            let (bytes, took) = (HEADER_BYTES + size, begun.elapsed());
            self.engine
                .counters()
                .count(kind, Opcode::Write, bytes, took);
        }
    }

    fn is_alive(&self, place: &Place) -> bool {
        let segment = &place.segment;
        self.engine
            .lives(&segment.peer, segment.node_segment, segment.incarnation)
    }

    fn find_place(
        &self,
        w: &Writing<'_>,
        options: &PutOptions,
        deadline: Instant,
    ) -> Option<Place> {
        let header = w.header();
        // Twice: the first wish may open an arena.
        for _ in 0..2 {
            let epoch = self.view().epoch;
            if epoch != self.control.epoch.load(Ordering::Acquire) || epoch == 0 {
                self.refresh_view(deadline).ok()?;
            }
            let view = self.view();
            let segment = view.home(w.hash)?;
            let wanted = Wanted {
                size: w.size,
                header: &header,
                entry: &|offset, version| {
                    directory_entry(w, segment.node_segment, offset, version, options)
                        .encode_to_vec()
                },
                near: self.is_near(segment),
            };
            match self.arenas.place(segment, &wanted) {
                Wish::Granted(place) => return Some(place),
                Wish::No => return None,
                Wish::Open(wanted_bytes) => self.open_arena(segment, wanted_bytes, deadline)?,
            }
        }
        None
    }

    fn is_near(&self, segment: &SegmentRef) -> bool {
        matches!(
            self.engine.path(&segment.peer),
            Some(TransportKind::Loopback | TransportKind::Shm)
        )
    }

    /// Has the master grant an arena, and its node keep a table for it where memory is shared. Two exchanges, and with them
    /// goes what is to be said of arenas that are over.
    fn open_arena(
        &self,
        segment: &Arc<SegmentRef>,
        wanted_bytes: u64,
        deadline: Instant,
    ) -> Option<()> {
        let mut opened = self.ask_for_arena(segment, wanted_bytes, deadline);
        if opened.is_none() && self.give_back_arenas(deadline) {
            // What was just given back may be the room that was missing.
            opened = self.ask_for_arena(segment, wanted_bytes, deadline);
        }
        let Some(opened) = opened else {
            self.arenas.refused(segment.slot);
            return None;
        };
        let grant = opened.range.as_ref()?.grant(segment.node_segment)?;
        let first = opened.first_version;
        let versions = first..first + u64::from(opened.version_count);
        let begin = wire::ArenaBegin {
            first_version: first,
            version_count: opened.version_count,
        };
        match self.begin_table(segment, grant, begin, deadline) {
            Ok(table) => {
                let segment = segment.clone();
                let id = opened.arena;
                self.arenas
                    .opened(id, segment, grant, versions, table, wanted_bytes);
                Some(())
            }
            Err(error) => {
                // Whether the node has a table now is unsure: nobody writes there before that is settled.
                tracing::debug!(%error, "an arena was not begun");
                self.arenas.refused(segment.slot);
                self.arenas.ended([(opened.arena, true)]);
                None
            }
        }
    }

    fn ask_for_arena(
        &self,
        segment: &SegmentRef,
        wanted_bytes: u64,
        deadline: Instant,
    ) -> Option<wire::ArenaOpened> {
        let open = operation::Kind::ArenaOpen(wire::ArenaOpen {
            segment: segment.slot,
            incarnation: segment.incarnation,
            wanted_bytes,
        });
        let ended = self.arenas.take_ended();
        // In this order: the room of what is closed can be granted at once.
        let mut operations: Vec<wire::Operation> = ended.iter().map(close).collect();
        operations.push(open.into());
        let sent = self.control.send(operations, deadline);
        let replies = sent.and_then(|sent| Ok(self.control.receive(sent)?.replies));
        if replies.is_err() {
            self.arenas.ended(ended);
        }
        match self.control.kind(replies.ok()?.pop()) {
            Ok(reply::Kind::ArenaOpened(opened)) if opened.code == 0 => Some(opened),
            _ => None,
        }
    }

    /// `Ok(None)`: the node takes no table, or the memory is not shared.
    fn begin_table(
        &self,
        segment: &SegmentRef,
        grant: Grant,
        begin: wire::ArenaBegin,
        deadline: Instant,
    ) -> Result<Option<ArenaTable>, TransferError> {
        let over = self.arenas.closable_at(segment.peer.node);
        // What was there before its node started anew cannot be reached, and must not spoil the rest.
        let view = self.view();
        let (over, gone): (Vec<Arena>, Vec<Arena>) = over
            .into_iter()
            .partition(|a| view.get(a.segment.slot, a.grant.incarnation).is_some());
        self.arenas.ended(left_behind(&gone, &[]));
        let table = if self.is_near(segment) {
            let (peer, index) = (&segment.peer, segment.node_segment);
            let memory = self.engine.map(peer, index, segment.incarnation);
            memory.and_then(|m| ArenaTable::new(m, grant.offset, grant.length))
        } else {
            None
        };
        let begin = node_notify::Kind::ArenaBegin(begin);
        let mut requests = vec![notice(segment, grant, grant.offset, grant.length, begin)];
        if table.is_none() {
            requests.clear();
        }
        let begins = requests.len();
        requests.extend(over.iter().filter_map(end_notice));
        let soon = deadline.min(Instant::now() + BEGIN_PATIENCE);
        let mut results = self.engine.transfer(&requests, soon);
        let ends = results.split_off(begins);
        self.arenas.ended(left_behind(&over, &ends));
        let Some(table) = table else { return Ok(None) };
        match results.pop() {
            Some(Ok(())) if table.is_open() => Ok(Some(table)),
            // Refused although it is open: begun, and the first answer was lost on its way.
            Some(Err(error)) if error.is_path_failure() || table.is_open() => Err(error),
            _ => Ok(None),
        }
    }

    /// Ends arenas nobody writes into any more at their nodes and closes them at the master; whether there were any. What
    /// fails on the way is settled between the two.
    pub(super) fn give_back_arenas(&self, deadline: Instant) -> bool {
        let over = self.arenas.closable();
        let ends: Vec<TransferRequest> = over.iter().filter_map(end_notice).collect();
        let soon = deadline.min(Instant::now() + END_PATIENCE);
        let ends = self.engine.transfer(&ends, soon);
        let mut closing = self.arenas.take_ended();
        closing.extend(left_behind(&over, &ends));
        closing.extend(self.arenas.left().into_iter().map(|id| (id, true)));
        if closing.is_empty() {
            return false;
        }
        let operations = closing.iter().map(close).collect();
        if let Err(error) = self.control.call(operations, deadline) {
            tracing::debug!(%error, "arenas were not given back yet");
            self.arenas.ended(closing);
        }
        true
    }

    /// Commit (or revoke, with `unsettled` per index) operations for placed items, grouped by arena.
    fn commits(
        &self,
        writings: &[Writing<'_>],
        indices: &[usize],
        options: &PutOptions,
        revoke: Option<&[bool]>,
    ) -> Vec<wire::Operation> {
        let mut operations: Vec<(u64, wire::ArenaCommit)> = Vec::new();
        for (position, index) in indices.iter().enumerate() {
            let w = &writings[*index];
            let Some(place) = &w.place else { continue };
            let item = wire::ArenaItem {
                key: bytes::Bytes::copy_from_slice(w.request.key),
                offset: place.offset,
                size_bytes: w.size,
                version: place.version,
                checksum: w.checksum.unwrap_or(0),
                has_checksum: w.checksum.is_some(),
                revoke: revoke.is_some(),
                unsettled: revoke.is_some_and(|u| u[position]),
                group: w.request.group.to_owned(),
            };
            match operations
                .last_mut()
                .filter(|(arena, _)| *arena == place.arena)
            {
                Some((_, commit)) => commit.items.push(item),
                None => {
                    let commit = wire::ArenaCommit {
                        arena: place.arena,
                        tenant: self.config.tenant.clone(),
                        config: Some(self.wire_config(options)),
                        items: vec![item],
                    };
                    operations.push((place.arena, commit));
                }
            }
        }
        let commits = operations.into_iter();
        commits
            .map(|(_, c)| operation::Kind::ArenaCommit(c).into())
            .collect()
    }

    fn settle_arena(
        &self,
        writings: &mut [Writing<'_>],
        placed: &[usize],
        options: &PutOptions,
        written: &[TransferResult],
        committed: Vec<Result<i32, StoreError>>,
        deadline: Instant,
    ) {
        let mut revoke = Vec::new();
        let mut unsettled = Vec::new();
        let mut discard = Vec::new();
        for (position, index) in placed.iter().enumerate() {
            let data = &written[position];
            let code = &committed[position];
            let w = &mut writings[*index];
            match (data, code) {
                (Ok(()), Ok(0)) => w.outcome = Some(Ok(PutOutcome::Stored { replicas: 1 })),
                // Taken, or more than its tenant may hold: the arena is as good as before.
                (data, Ok(c)) if *c == StoreError::Exists.code() || is_quota(*c) => {
                    w.outcome = Some(if is_quota(*c) {
                        Err(StoreError::from_code(*c))
                    } else {
                        Ok(PutOutcome::Existed)
                    });
                    if data.is_ok() {
                        match w.place.as_ref().and_then(|p| Some((p, p.table.as_ref()?))) {
                            Some((place, table)) => take_back(place, table),
                            None => discard.push(*index),
                        }
                    }
                    // Its node had the master give the item up with the answer.
                    if *data != Err(TransferError::Existed) {
                        revoke.push(*index);
                        unsettled.push(data.as_ref().is_err_and(TransferError::is_path_failure));
                    }
                }
                // The master does not know the arena (it was restarted, or the segment is gone): the two-phase path
                // begins anew. The bytes are under a version nobody committed; their node settles that.
                (_, Ok(c)) if *c != 0 => {
                    if let Some(place) = &w.place {
                        self.arenas.lost(place.arena);
                    }
                }
                (Err(error), Ok(_)) => {
                    if let (true, Some(place)) = (error.is_path_failure(), &w.place) {
                        self.report(&place.segment.clone(), &error.to_string());
                    }
                    // Dropped meanwhile, the arena is as good as before; sealed or unreachable, it is not.
                    let near = w.place.as_ref().and_then(|p| Some((p, p.table.as_ref()?)));
                    if let Some((place, table)) = near
                        && (error.is_path_failure() || !table.is_open())
                    {
                        self.arenas.lost(place.arena);
                    }
                    revoke.push(*index);
                    unsettled.push(error.is_path_failure());
                }
                // Nobody knows whether the master committed: ask.
                (_, Err(error)) => {
                    // Whatever is under way there is settled when this client leaves, not by closing the arena.
                    if let Some(place) = &w.place {
                        self.arenas.lost(place.arena);
                    }
                    let place = w.place.as_ref();
                    let stored = data.is_ok()
                        && self.committed(w.request.key, place.map_or(0, |p| p.version), deadline);
                    w.outcome = Some(if stored {
                        Ok(PutOutcome::Stored { replicas: 1 })
                    } else {
                        Err(StoreError::clone(error))
                    });
                }
                (Ok(()), Ok(_)) => {}
            }
        }
        self.discard_at_nodes(writings, &discard, deadline);
        if !revoke.is_empty() {
            let operations = self.commits(writings, &revoke, options, Some(&unsettled));
            if let Err(error) = self.taken_back(operations, deadline) {
                tracing::debug!(%error, "items were not taken back; the master settles them when this client leaves");
                for index in revoke {
                    let w = &mut writings[index];
                    // As long as the index may name bytes that never arrived, another attempt would find its own key.
                    if w.outcome.is_none() {
                        w.outcome = Some(Err(error.clone()));
                    }
                    if let Some(place) = &w.place {
                        self.arenas.lost(place.arena);
                    }
                }
            }
        }
        for index in placed {
            writings[*index].place = None;
        }
        // Given up by this put: its node waits for nobody else.
        let left = self.arenas.left();
        if !left.is_empty() {
            self.arenas.still_left(left);
            self.give_back_arenas(deadline);
        }
    }

    /// Carries out revocations; an error when any of them was not.
    fn taken_back(
        &self,
        operations: Vec<wire::Operation>,
        deadline: Instant,
    ) -> Result<(), StoreError> {
        let unknown = StoreError::InvalidWrite { what: "" }.code();
        for reply in self.control.call(operations, deadline)? {
            match self.control.kind(Some(reply))? {
                // A master that does not know the arena has nothing of it in its index either.
                reply::Kind::Codes(c) => {
                    if let Some(code) = c.codes.iter().find(|c| **c != 0 && **c != unknown) {
                        return Err(StoreError::from_code(*code));
                    }
                }
                _ => return Err(self.control.surprise()),
            }
        }
        Ok(())
    }

    /// Has the nodes forget items whose commit was refused, before the put returns (D2 for what was never stored).
    fn discard_at_nodes(&self, writings: &[Writing<'_>], indices: &[usize], deadline: Instant) {
        let requests: Vec<TransferRequest> = indices
            .iter()
            .filter_map(|index| {
                let w = &writings[*index];
                let place = w.place.as_ref()?;
                let discard = wire::DropItem {
                    segment: place.grant.segment,
                    offset: place.offset,
                    version: place.version,
                };
                let discard = node_notify::Kind::Discard(discard);
                let length = HEADER_BYTES + w.size;
                Some(notice(
                    &place.segment,
                    place.grant,
                    place.offset,
                    length,
                    discard,
                ))
            })
            .collect();
        if !requests.is_empty() {
            self.engine.transfer(&requests, deadline);
        }
    }
}

/// Commits on their way to the master, and the arenas that are closed with them.
struct SentCommits {
    sent: Sent,
    /// Operations that are commits.
    commits: usize,
    ended: Vec<(u64, bool)>,
}

/// What an answer of a node that commits says of the commit; nothing where the master has to be asked. What did not arrive
/// counts as committed, so that it is taken back.
fn carried_code(data: &TransferResult) -> Option<Result<i32, StoreError>> {
    match data {
        Err(TransferError::Existed) => Some(Ok(StoreError::Exists.code())),
        Err(TransferError::NotifyRefused) => None,
        _ => Some(Ok(0)),
    }
}

/// Whether a commit was refused for its tenant's quota.
fn is_quota(code: i32) -> bool {
    matches!(code, -1700 | -1701)
}

/// Tells the master that an arena is over; `true`: its node has not settled it yet.
fn close((arena, unsettled): &(u64, bool)) -> wire::Operation {
    let close = wire::ArenaClose {
        arena: *arena,
        unsettled: *unsettled,
    };
    operation::Kind::ArenaClose(close).into()
}

/// Tells a node that the table of an arena is complete.
fn end_notice(arena: &Arena) -> Option<TransferRequest> {
    let end = node_notify::Kind::ArenaEnd(wire::ArenaEnd {});
    let grant = arena.grant;
    arena.table.as_ref()?;
    Some(notice(
        &arena.segment,
        grant,
        grant.offset,
        grant.length,
        end,
    ))
}

/// Leaves arenas of which their nodes have been told (one result per table), and says which of them are unsettled.
fn left_behind(over: &[Arena], ends: &[TransferResult]) -> Vec<(u64, bool)> {
    let mut ends = ends.iter();
    let leave = |arena: &Arena| {
        let Some(table) = &arena.table else {
            return (arena.id, false);
        };
        let ended = ends.next().is_some_and(Result::is_ok);
        table.leave();
        (arena.id, !ended)
    };
    over.iter().map(leave).collect()
}

/// A message to a segment's node about a granted range.
fn notice(
    segment: &SegmentRef,
    grant: Grant,
    offset: u64,
    length: u64,
    kind: node_notify::Kind,
) -> TransferRequest {
    TransferRequest {
        opcode: Opcode::Write,
        peer: segment.peer.clone(),
        grant,
        offset,
        length,
        local: SmallVec::new(),
        word: None,
        notify: NodeNotify {
            kind: Some(kind),
            traceparent: trace::traceparent(),
            commit_arena: 0,
        }
        .encode_to_vec(),
    }
}

/// Copies a payload to where its table has it already, publishes it, and only then looks whether that still counts.
fn copy_near(w: &Writing<'_>, place: &Place, table: &ArenaTable) -> TransferResult {
    let memory = table.memory();
    let from = place.offset + HEADER_BYTES;
    let mut target = memory
        .range(from, w.size)
        .ok_or(TransferError::OutOfBounds)?;
    memory.touch(from, w.size);
    for source in w.request.source {
        // SAFETY: target: in bounds, this put's alone; source: promise of LocalSlice::new.
        unsafe {
            copy::stream(source.pointer, target, source.length);
            target = target.add(source.length);
        }
    }
    let (before, after) = (pending(place.version), place.version);
    let published = memory.word(place.offset).is_some_and(|word| {
        word.compare_exchange(before, after, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    });
    // Not published: it was removed meanwhile, or a later master has settled it.
    if published && table.is_open() {
        Ok(())
    } else {
        Err(TransferError::GrantRefused)
    }
}

/// Takes the word out of an object that is not to be found after all; unless a later master has been told of it already,
/// whose business it is then.
fn take_back(place: &Place, table: &ArenaTable) {
    let Some(word) = table.memory().word(place.offset) else {
        return;
    };
    let (there, on_its_way) = (place.version, pending(place.version));
    // In two steps, as it was published: with the word in between, whoever seals now does not take it for complete.
    let undone = word.compare_exchange(there, on_its_way, Ordering::SeqCst, Ordering::SeqCst);
    let told = undone.is_ok() && !table.is_open();
    let end = if told { there } else { 0 };
    let _ = word.compare_exchange(on_its_way, end, Ordering::SeqCst, Ordering::SeqCst);
}
