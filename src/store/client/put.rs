//! Writing. Small single-copy objects go into arenas: the commit leaves for the master and the bytes for the node at the
//! same time, and the put returns when both have answered. Everything else goes in two phases.

use std::time::Instant;

use prost::Message;
use smallvec::SmallVec;

use super::PoolClient;
use super::arenas::{Place, Wish};
use super::location_cache::ReplicaRef;
use crate::engine::batch::{LocalSlice, Opcode, TransferRequest, TransferResult, Word};
use crate::engine::error::TransferError;
use crate::store::model::error::StoreError;
use crate::store::model::header::{Checksum, HEADER_BYTES, ObjectHeader, footprint};
use crate::store::model::key;
use crate::store::wire::{self, NodeNotify, node_notify, operation, reply};

/// How objects are stored. The defaults are upstream's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PutOptions {
    /// Copies on distinct nodes, best effort, 1..=64.
    pub replicas: u32,
    /// Preferred by eviction to stay for this long; 0 = not pinned.
    pub soft_pin_ttl_ms: u64,
    /// Never evicted.
    pub hard_pin: bool,
    /// Segments (or nodes) by name, tried first.
    pub preferred_segments: Vec<String>,
    /// Objects of a group are leased and evicted together; empty = none.
    pub group: String,
    /// Upstream's `ObjectDataType`.
    pub data_type: u8,
    /// Replace an existing object instead of leaving it.
    pub upsert: bool,
}

impl Default for PutOptions {
    fn default() -> Self {
        Self {
            replicas: 1,
            soft_pin_ttl_ms: 0,
            hard_pin: false,
            preferred_segments: Vec::new(),
            group: String::new(),
            data_type: 0,
            upsert: false,
        }
    }
}

/// One object to write.
pub struct PutRequest<'a> {
    /// The key.
    pub key: &'a [u8],
    /// Its bytes, in order.
    pub source: &'a [LocalSlice],
    /// Its group, where that is not the one of the options; empty = that one.
    pub group: &'a str,
}

impl<'a> PutRequest<'a> {
    /// An object of the options' group.
    pub fn new(key: &'a [u8], source: &'a [LocalSlice]) -> Self {
        Self {
            key,
            source,
            group: "",
        }
    }
}

/// What a put did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutOutcome {
    /// Stored, with this many replicas.
    Stored {
        /// Replicas written and acknowledged.
        replicas: u32,
    },
    /// The key was there already; nothing was written.
    Existed,
}

type PutResult = Result<PutOutcome, StoreError>;
type Header = [u8; HEADER_BYTES as usize];

/// One object on its way, with what both paths need.
struct Writing<'a> {
    request: &'a PutRequest<'a>,
    qualified: Vec<u8>,
    hash: u64,
    size: u64,
    checksum: Option<u32>,
    place: Option<Place>,
    outcome: Option<PutResult>,
}

impl Writing<'_> {
    fn header(&self) -> Header {
        // Version 0: the word is published when everything is in place.
        ObjectHeader {
            version: 0,
            length: self.size,
            key_hash: self.hash,
            checksum: self.checksum,
        }
        .encode(0)
    }
}

impl PoolClient {
    /// Stores objects; one outcome per request, in order. Objects given in one call are a prefix chain, heads first.
    pub fn put(&self, requests: &[PutRequest<'_>], options: &PutOptions) -> Vec<PutResult> {
        let deadline = self.deadline();
        let mut writings: Vec<Writing<'_>> = requests.iter().map(|r| self.prepare(r)).collect();
        let small =
            options.replicas <= 1 && options.preferred_segments.is_empty() && !options.upsert;
        if small && self.config.arenas {
            self.put_by_arena(&mut writings, options, deadline);
        }
        self.put_in_two_phases(&mut writings, options, deadline);
        let finished = writings.into_iter();
        finished
            .map(|w| w.outcome.unwrap_or(Err(StoreError::NotFound)))
            .collect()
    }

    /// Stores one object from memory.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn put_bytes(&self, key: &[u8], bytes: &[u8], options: &PutOptions) -> PutResult {
        // SAFETY: only read from, and borrowed for the whole call.
        let source = [unsafe { LocalSlice::new(bytes.as_ptr().cast_mut(), bytes.len()) }];
        self.put(&[PutRequest::new(key, &source)], options)
            .pop()
            .unwrap_or(Err(StoreError::NotFound))
    }

    fn prepare<'a>(&self, request: &'a PutRequest<'a>) -> Writing<'a> {
        let mut qualified = Vec::with_capacity(request.key.len() + 1);
        let size: u64 = request.source.iter().map(|s| s.len() as u64).sum();
        let mut outcome = key::qualify(&self.config.tenant, request.key, &mut qualified)
            .err()
            .map(Err);
        if size == 0 {
            outcome = Some(Err(StoreError::InvalidParams {
                what: "an object has at least 1 byte".to_owned(),
            }));
        }
        let checksum = self.config.checksum.then(|| {
            let mut sum = Checksum::default();
            for slice in request.source.iter().filter(|s| !s.is_empty()) {
                // SAFETY: the caller vouched for the slice (LocalSlice::new).
                sum.update(unsafe { std::slice::from_raw_parts(slice.pointer, slice.length) });
            }
            sum.finish()
        });
        Writing {
            request,
            hash: key::hash(&qualified),
            qualified,
            size,
            checksum,
            place: None,
            outcome,
        }
    }

    // ------------------------------------------------------------------ arenas

    fn put_by_arena(&self, writings: &mut [Writing<'_>], options: &PutOptions, deadline: Instant) {
        for w in writings.iter_mut().filter(|w| w.outcome.is_none()) {
            w.place = self.find_place(w.hash, w.size, deadline);
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
        let commits = self.commits(writings, &placed, options, None);
        let sent = match self.control.send(commits, deadline) {
            Ok(sent) => sent,
            Err(error) => {
                for index in placed {
                    writings[index].outcome = Some(Err(error.clone()));
                }
                return;
            }
        };
        let headers: Vec<Header> = placed.iter().map(|i| writings[*i].header()).collect();
        let requests: Vec<TransferRequest> = placed
            .iter()
            .zip(&headers)
            .filter_map(|(index, header)| {
                let w = &writings[*index];
                let place = w.place.as_ref()?;
                let replica = ReplicaRef {
                    segment: place.segment.clone(),
                    grant: place.grant,
                };
                Some(write_request(
                    w,
                    &replica,
                    place.offset,
                    place.version,
                    header,
                    options,
                ))
            })
            .collect();
        let attempt = deadline.min(Instant::now() + self.config.transfer_timeout);
        let written = self.engine.begin(&requests, attempt).finish();
        let committed = self.control.receive(sent).and_then(|batch| {
            let mut codes = Vec::with_capacity(placed.len());
            for reply in batch.replies {
                match self.control.kind(Some(reply))? {
                    reply::Kind::Codes(c) => codes.extend(c.codes),
                    _ => return Err(self.control.surprise()),
                }
            }
            if codes.len() == placed.len() {
                Ok(codes)
            } else {
                Err(self.control.surprise())
            }
        });
        self.settle_arena(writings, &placed, options, &written, committed, deadline);
    }

    fn find_place(&self, hash: u64, size: u64, deadline: Instant) -> Option<Place> {
        // Twice: the first wish may open an arena.
        for _ in 0..2 {
            if self.view().epoch
                != self
                    .control
                    .epoch
                    .load(std::sync::atomic::Ordering::Acquire)
                || self.view().epoch == 0
            {
                self.refresh_view(deadline).ok()?;
            }
            let view = self.view();
            let segment = view.home(hash)?;
            match self.arenas.place(segment, size) {
                Wish::Granted(place) => return Some(place),
                Wish::No => return None,
                Wish::Open(wanted_bytes) => {
                    let mut operations: Vec<wire::Operation> = self
                        .arenas
                        .closable()
                        .into_iter()
                        .map(|arena| operation::Kind::ArenaClose(wire::ArenaClose { arena }).into())
                        .collect();
                    let open = wire::ArenaOpen {
                        segment: segment.slot,
                        incarnation: segment.incarnation,
                        wanted_bytes,
                    };
                    operations.push(operation::Kind::ArenaOpen(open).into());
                    let reply = self.control.call(operations, deadline).ok()?.pop();
                    match self.control.kind(reply) {
                        Ok(reply::Kind::ArenaOpened(opened)) if opened.code == 0 => {
                            let grant = opened.range.as_ref()?.grant(segment.node_segment)?;
                            let first = opened.first_version;
                            let versions = first..first + u64::from(opened.version_count);
                            self.arenas
                                .opened(opened.arena, segment.clone(), grant, versions);
                        }
                        _ => {
                            self.arenas.refused(segment.slot);
                            return None;
                        }
                    }
                }
            }
        }
        None
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
        committed: Result<Vec<i32>, StoreError>,
        deadline: Instant,
    ) {
        let mut revoke = Vec::new();
        let mut unsettled = Vec::new();
        let mut discard = Vec::new();
        for (position, index) in placed.iter().enumerate() {
            let data = &written[position];
            let code = committed.as_ref().map(|codes| codes[position]);
            let w = &mut writings[*index];
            match (data, &code) {
                (Ok(()), Ok(0)) => w.outcome = Some(Ok(PutOutcome::Stored { replicas: 1 })),
                (data, Ok(c)) if *c == StoreError::Exists.code() => {
                    w.outcome = Some(Ok(PutOutcome::Existed));
                    if data.is_ok() {
                        discard.push(*index);
                    }
                    revoke.push(*index);
                    unsettled.push(data.as_ref().is_err_and(TransferError::is_path_failure));
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

    /// Whether the index has this very version of a key, as far as can be told by `deadline`.
    pub(super) fn committed(&self, key: &[u8], version: u64, deadline: Instant) -> bool {
        let found = self.locate(&[key], deadline);
        matches!(found.as_deref(), Ok([Ok(location)]) if location.version == version)
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
                let notify = NodeNotify {
                    kind: Some(node_notify::Kind::Discard(discard)),
                };
                Some(TransferRequest {
                    opcode: Opcode::Write,
                    peer: place.segment.peer.clone(),
                    grant: place.grant,
                    offset: place.offset,
                    length: HEADER_BYTES + w.size,
                    local: SmallVec::new(),
                    word: None,
                    notify: notify.encode_to_vec(),
                })
            })
            .collect();
        if !requests.is_empty() {
            self.engine.transfer(&requests, deadline);
        }
    }

    // ------------------------------------------------------------------ two phases

    fn put_in_two_phases(
        &self,
        writings: &mut [Writing<'_>],
        options: &PutOptions,
        deadline: Instant,
    ) {
        // A replica that cannot be written makes its node suspect; the next attempt is placed elsewhere.
        for _ in 0..3 {
            let open: Vec<usize> = (0..writings.len())
                .filter(|i| writings[*i].outcome.is_none())
                .collect();
            if open.is_empty() {
                return;
            }
            if let Err(error) = self.two_phase_round(writings, &open, options, deadline) {
                for index in open {
                    if writings[index].outcome.is_none() {
                        writings[index].outcome = Some(Err(error.clone()));
                    }
                }
            }
        }
        for w in writings.iter_mut().filter(|w| w.outcome.is_none()) {
            w.outcome = Some(Err(StoreError::TransferFailed {
                attempts: "no node could be written to".to_owned(),
            }));
        }
    }

    fn two_phase_round(
        &self,
        writings: &mut [Writing<'_>],
        open: &[usize],
        options: &PutOptions,
        deadline: Instant,
    ) -> Result<(), StoreError> {
        let items = open
            .iter()
            .map(|index| wire::PutItem {
                key: bytes::Bytes::copy_from_slice(writings[*index].request.key),
                size_bytes: writings[*index].size,
                group: writings[*index].request.group.to_owned(),
            })
            .collect();
        let start = operation::Kind::PutStart(wire::PutStart {
            tenant: self.config.tenant.clone(),
            config: Some(self.wire_config(options)),
            upsert: options.upsert,
            items,
        });
        let reply::Kind::PutStart(started) = self.control.ask(start, deadline)? else {
            return Err(self.control.surprise());
        };
        if started.slots.len() != open.len() {
            return Err(self.control.surprise());
        }
        if let Err(error) = self.refresh_view(deadline) {
            let versions = started
                .slots
                .iter()
                .filter(|s| s.code == 0)
                .map(|s| s.version)
                .collect();
            let revoke = wire::PutRevoke {
                versions,
                unsettled: false,
            };
            let _ = self
                .control
                .ask(operation::Kind::PutRevoke(revoke), deadline);
            return Err(error);
        }
        let view = self.view();

        // (index, slot's version, replica number) of every request.
        let mut targets: Vec<(usize, u64, usize, ReplicaRef)> = Vec::new();
        for (index, slot) in open.iter().zip(&started.slots) {
            let w = &mut writings[*index];
            match slot.code {
                0 => {}
                c if c == StoreError::Exists.code() => w.outcome = Some(Ok(PutOutcome::Existed)),
                c => w.outcome = Some(Err(self.explain(c, w.size, deadline))),
            }
            for (number, r) in slot.replicas.iter().enumerate() {
                let segment = view.get(r.segment, r.incarnation);
                let Some((segment, grant)) =
                    segment.and_then(|s| Some((s, r.grant(s.node_segment)?)))
                else {
                    continue;
                };
                let replica = ReplicaRef {
                    segment: segment.clone(),
                    grant,
                };
                targets.push((*index, slot.version, number, replica));
            }
        }
        targets.sort_by_key(|(_, _, _, r)| r.segment.peer.node);
        let headers: Vec<Header> = targets
            .iter()
            .map(|(i, ..)| writings[*i].header())
            .collect();
        let requests: Vec<TransferRequest> = targets
            .iter()
            .zip(&headers)
            .map(|((index, version, _, replica), header)| {
                let at = replica.grant.offset;
                write_request(&writings[*index], replica, at, *version, header, options)
            })
            .collect();
        let results = self.engine.transfer(&requests, deadline);
        drop(requests);
        self.finish_puts(writings, open, &started, &targets, &results, deadline)
    }

    fn finish_puts(
        &self,
        writings: &mut [Writing<'_>],
        open: &[usize],
        started: &wire::PutStartReply,
        targets: &[(usize, u64, usize, ReplicaRef)],
        results: &[TransferResult],
        deadline: Instant,
    ) -> Result<(), StoreError> {
        let mut ends: Vec<(usize, wire::PutFinish)> = Vec::new();
        for (index, slot) in open.iter().zip(&started.slots).filter(|(_, s)| s.code == 0) {
            let mut end = wire::PutFinish {
                version: slot.version,
                checksum: writings[*index].checksum.unwrap_or(0),
                has_checksum: writings[*index].checksum.is_some(),
                written: 0,
                unsettled: 0,
            };
            let own = targets
                .iter()
                .zip(results)
                .filter(|((_, v, ..), _)| *v == slot.version);
            for ((_, _, number, replica), result) in own {
                match result {
                    Ok(()) => end.written |= 1 << number,
                    Err(error) if error.is_path_failure() => {
                        end.unsettled |= 1 << number;
                        self.report(&replica.segment, &error.to_string());
                    }
                    Err(_) => {}
                }
            }
            ends.push((*index, end));
        }
        if ends.is_empty() {
            return Ok(());
        }
        let items: Vec<wire::PutFinish> = ends.iter().map(|(_, e)| *e).collect();
        let reply::Kind::Codes(codes) = self
            .control
            .ask(operation::Kind::PutEnd(wire::PutEnd { items }), deadline)?
        else {
            return Err(self.control.surprise());
        };
        for ((index, end), code) in ends.into_iter().zip(codes.codes) {
            let w = &mut writings[index];
            let replicas = end.written.count_ones();
            w.outcome = match code {
                0 => Some(Ok(PutOutcome::Stored { replicas })),
                c if c == StoreError::Exists.code() => Some(Ok(PutOutcome::Existed)),
                // The end was repeated, or another master has taken over what the nodes have: look. When it is not
                // there, and when no replica was written, once more from the start.
                _ if end.written != 0 && self.committed(w.request.key, end.version, deadline) => {
                    Some(Ok(PutOutcome::Stored { replicas }))
                }
                _ => None,
            };
        }
        Ok(())
    }

    /// An error with the figures a person needs.
    pub(super) fn explain(&self, code: i32, size: u64, deadline: Instant) -> StoreError {
        if code != -200 && code != StoreError::SegmentNotFound.code() {
            return StoreError::from_code(code);
        }
        let wanted_bytes = footprint(size).unwrap_or(u64::MAX);
        let segments = self.segments_by(deadline).unwrap_or_default();
        let largest_bytes = segments.iter().map(|s| s.size_bytes).max().unwrap_or(0);
        if segments.iter().all(|s| s.state != "ok") {
            StoreError::NoNode
        } else if wanted_bytes > largest_bytes {
            StoreError::TooLarge {
                wanted_bytes,
                largest_bytes,
            }
        } else {
            StoreError::NoSpace { wanted_bytes }
        }
    }

    pub(super) fn wire_config(&self, options: &PutOptions) -> wire::PutConfig {
        wire::PutConfig {
            replica_num: options.replicas,
            soft_pin_ttl_ms: options.soft_pin_ttl_ms,
            hard_pin: options.hard_pin,
            preferred_segments: options.preferred_segments.clone(),
            group: options.group.clone(),
            data_type: u32::from(options.data_type),
            host_id: self.host_id.clone(),
        }
    }
}

fn write_request(
    w: &Writing<'_>,
    replica: &ReplicaRef,
    offset: u64,
    version: u64,
    header: &Header,
    options: &PutOptions,
) -> TransferRequest {
    // SAFETY: only read from; the headers live until the transfer has returned.
    let head = unsafe { LocalSlice::new(header.as_ptr().cast_mut(), header.len()) };
    let mut local: SmallVec<[LocalSlice; 2]> = [head].into_iter().collect();
    local.extend(w.request.source.iter().copied().filter(|s| !s.is_empty()));
    let entry = wire::DirectoryEntry {
        key: bytes::Bytes::copy_from_slice(&w.qualified),
        segment: replica.grant.segment,
        offset,
        size_bytes: w.size,
        version,
        checksum: w.checksum.unwrap_or(0),
        has_checksum: w.checksum.is_some(),
        hard_pin: options.hard_pin,
        soft_pin_ttl_ms: options.soft_pin_ttl_ms,
        group: if w.request.group.is_empty() {
            options.group.clone()
        } else {
            w.request.group.to_owned()
        },
        data_type: u32::from(options.data_type),
        ..wire::DirectoryEntry::default()
    };
    let notify = NodeNotify {
        kind: Some(node_notify::Kind::Record(entry)),
    };
    TransferRequest {
        opcode: Opcode::Write,
        peer: replica.segment.peer.clone(),
        grant: replica.grant,
        offset,
        length: HEADER_BYTES + w.size,
        local,
        word: Some(Word {
            offset,
            value: version,
        }),
        notify: notify.encode_to_vec(),
    }
}
