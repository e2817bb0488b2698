//! Writing. Single-copy objects go into arenas where they fit (`arena_put`); everything else goes in two phases.

use std::time::Instant;

use prost::Message;
use smallvec::SmallVec;

use super::PoolClient;
use super::arenas::Place;
use super::location_cache::ReplicaRef;
use crate::base::trace::{self, Kind, Span};
use crate::engine::batch::{LocalSlice, Opcode, TransferRequest, TransferResult, Word};
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
    /// With `upsert`: only this version is replaced, and only as long as it is there; 0 = whatever is there.
    pub if_version: u64,
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
            if_version: 0,
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

pub(super) type PutResult = Result<PutOutcome, StoreError>;
pub(super) type Header = [u8; HEADER_BYTES as usize];

/// One object on its way, with what both paths need.
pub(super) struct Writing<'a> {
    pub(super) request: &'a PutRequest<'a>,
    pub(super) qualified: Vec<u8>,
    pub(super) hash: u64,
    pub(super) size: u64,
    pub(super) checksum: Option<u32>,
    pub(super) place: Option<Place>,
    pub(super) outcome: Option<PutResult>,
}

impl Writing<'_> {
    pub(super) fn header(&self) -> Header {
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
        let mut span = Span::begin("put", Kind::Client);
        span.note("keys", requests.len() as u64);
        let deadline = self.deadline();
        let mut writings: Vec<Writing<'_>> = requests.iter().map(|r| self.prepare(r)).collect();
        let small =
            options.replicas <= 1 && options.preferred_segments.is_empty() && !options.upsert;
        if small && self.config.arenas {
            self.put_by_arena(&mut writings, options, deadline);
        }
        self.put_in_two_phases(&mut writings, options, deadline);
        span.note("bytes", writings.iter().map(|w| w.size).sum());
        let finished = writings.into_iter();
        let outcomes: Vec<PutResult> = finished
            .map(|w| w.outcome.unwrap_or(Err(StoreError::NotFound)))
            .collect();
        if let Some(error) = outcomes.iter().find_map(|o| o.as_ref().err()) {
            span.fail(error);
        }
        outcomes
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

    /// Whether the index has this very version of a key, as far as can be told by `deadline`.
    pub(super) fn committed(&self, key: &[u8], version: u64, deadline: Instant) -> bool {
        let found = self.locate(&[key], deadline);
        matches!(found.as_deref(), Ok([Ok(location)]) if location.version == version)
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
            if_version: options.if_version,
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
                write_request(&writings[*index], replica, at, *version, header, options, 0)
            })
            .collect();
        let results = {
            let _span = Span::child("transfer", Kind::Client);
            self.engine.transfer(&requests, deadline)
        };
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

impl PutOptions {
    /// As nodes keep it: one is what goes without saying.
    pub(super) fn replicas_told(&self) -> u32 {
        if self.replicas > 1 { self.replicas } else { 0 }
    }
}

pub(super) fn write_request(
    w: &Writing<'_>,
    replica: &ReplicaRef,
    offset: u64,
    version: u64,
    header: &Header,
    options: &PutOptions,
    commit_arena: u64,
) -> TransferRequest {
    // SAFETY: only read from; the headers live until the transfer has returned.
    let head = unsafe { LocalSlice::new(header.as_ptr().cast_mut(), header.len()) };
    let mut local: SmallVec<[LocalSlice; 2]> = [head].into_iter().collect();
    local.extend(w.request.source.iter().copied().filter(|s| !s.is_empty()));
    let entry = directory_entry(w, replica.grant.segment, offset, version, options);
    let notify = NodeNotify {
        kind: Some(node_notify::Kind::Record(entry)),
        traceparent: trace::traceparent(),
        commit_arena,
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

/// What the node is to know of an object.
pub(super) fn directory_entry(
    w: &Writing<'_>,
    segment: u32,
    offset: u64,
    version: u64,
    options: &PutOptions,
) -> wire::DirectoryEntry {
    wire::DirectoryEntry {
        key: bytes::Bytes::copy_from_slice(&w.qualified),
        segment,
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
        replicas_wanted: options.replicas_told(),
        ..wire::DirectoryEntry::default()
    }
}
