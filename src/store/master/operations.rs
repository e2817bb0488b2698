//! Carries out batches of operations: decodes, asks the state, waits where an operation may wait, encodes.
//!
//! The one place where the contract meets the state, whichever way a batch came. Blocking: callers run it on threads
//! that may block (control lanes have their own, gRPC goes through the blocking pool).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::eviction::Access;
use super::listing::KeyFilter;
use super::metrics::Rpc;
use super::object::{Object, Replica};
use super::segments::SegmentsView;
use super::state::{Presence, add};
use super::{Master, slow};
use crate::base::clock::{Millis, unix_ms};
use crate::base::id::Id128;
use crate::base::trace::{self, Kind, Span};
use crate::engine::grant::{Access as GrantAccess, Grant};
use crate::store::model::error::StoreError;
use crate::store::model::header::footprint;
use crate::store::model::key;
use crate::store::wire::{self, operation::Kind as Op, reply::Kind as Re};

/// A read grant outlives its lease by this: expiry is about leaked grants, staleness is the version's business.
const READ_GRANT_EXTRA: Duration = Duration::from_secs(60);
/// How long a node is avoided after a client reported a failure.
const SUSPICION: Duration = Duration::from_secs(3);
/// Keys of a batch whose memory is asked for together.
const LOOKAHEAD: usize = 32;
/// Items of one operation.
const ITEMS_MAX: usize = 100_000;

/// One batch being carried out.
pub(super) struct Call<'a> {
    pub(super) master: &'a Master,
    pub(super) view: SegmentsView,
    pub(super) now: Millis,
    pub(super) client: Id128,
    pub(super) deadline: Instant,
    pub(super) scratch: Vec<u8>,
    pub(super) waits: slow::Waits,
}

/// Carries out a batch; replies come in the order of the operations.
pub(crate) fn execute(master: &Master, batch: wire::OperationBatch) -> wire::ReplyBatch {
    let state = &master.state;
    let started = Instant::now();
    if !batch.transfers.is_empty() {
        master.metrics.moved.told(&batch.transfers);
    }
    let mut span = Span::of("batch", Kind::Server, &batch.traceparent);
    span.note("operations", batch.operations.len() as u64);
    let mut call = Call {
        master,
        view: state.segments.view(),
        now: Millis::now(),
        client: wire::id(batch.client_high, batch.client_low),
        deadline: started + state.patience(batch.deadline_ms),
        scratch: Vec::new(),
        waits: slow::Waits::default(),
    };
    // One look at the clock per operation: each begins when the one before it ends.
    let mut begun = started;
    let mut replies = Vec::with_capacity(batch.operations.len());
    for operation in batch.operations {
        let slow = slow::Watch::new(master, &operation);
        let rpc = operation.kind.as_ref().map(Rpc::of);
        let mut span = Span::child(rpc.map_or("unknown", Rpc::name), Kind::Internal);
        let reply = call.one(operation);
        if let Some(Re::Refused(refusal)) = &reply.kind {
            span.fail(&refusal.reason);
        }
        let ended = Instant::now();
        if let Some(rpc) = rpc {
            let took = ended - begun;
            master.metrics.carried_out(rpc, took, &reply);
            slow.report(master, rpc, took, std::mem::take(&mut call.waits), &reply);
        }
        begun = ended;
        replies.push(reply);
    }
    master.metrics.batches.fetch_add(1, Ordering::Relaxed);
    let took = (begun - started).as_nanos() as u64;
    master.metrics.batch_nanoseconds.observe(took);
    wire::ReplyBatch {
        id: batch.id,
        term: state.term(),
        view_epoch: state.segments.epoch(),
        replies,
    }
}

fn refuse(error: &StoreError) -> wire::Reply {
    wire::Reply::refused(error.code(), error.to_string())
}

pub(super) fn code(result: Result<(), StoreError>) -> i32 {
    result.err().map_or(0, |e| e.code())
}

impl Call<'_> {
    fn one(&mut self, operation: wire::Operation) -> wire::Reply {
        let Some(kind) = operation.kind else {
            return wire::Reply::refused(
                -1012,
                "unknown operation: the client is newer than this master".into(),
            );
        };
        let result = match kind {
            Op::Exist(op) => self.exist(&op),
            Op::Locate(op) => self.locate(&op),
            Op::PutStart(op) => self.put_start(&op),
            Op::PutEnd(op) => Ok(self.put_end(&op)),
            Op::PutRevoke(op) => Ok(self.put_revoke(&op)),
            Op::ArenaOpen(op) => Ok(self.arena_open(&op)),
            Op::ArenaCommit(op) => self.arena_commit(&op),
            Op::ArenaClose(op) => {
                let closed =
                    self.master
                        .state
                        .arena_close(op.arena, self.client, op.unsettled, self.now);
                Ok(codes(vec![code(closed)]))
            }
            Op::Remove(op) => self.remove(&op),
            Op::RemoveMatching(op) => self.remove_matching(&op),
            Op::List(op) => self.list(&op),
            Op::Stat(op) => self.stat(&op),
            Op::View(op) => Ok(self.view(&op)),
            Op::ReportFailure(op) => Ok(self.report_failure(&op)),
            Op::Overview(_) => Ok(self.master.overview().into()),
        };
        result.unwrap_or_else(|error| refuse(&error))
    }

    pub(super) fn key(&mut self, tenant: &str, bytes: &[u8]) -> Result<u64, StoreError> {
        key::qualify(tenant, bytes, &mut self.scratch)?;
        Ok(key::hash(&self.scratch))
    }

    /// Calls `each` with the hash and the qualified bytes of every key, in order, their memory already on its way.
    fn for_each_key(
        &mut self,
        tenant: &str,
        keys: &[bytes::Bytes],
        mut each: impl FnMut(&Self, u64, &[u8], &Access),
    ) -> Result<(), StoreError> {
        bounded(keys.len())?;
        let mut access = Access {
            now: self.now,
            ..Access::default()
        };
        let mut hashes: Vec<u64> = Vec::with_capacity(LOOKAHEAD);
        let mut ends: Vec<usize> = Vec::with_capacity(LOOKAHEAD);
        let mut joined = Vec::new();
        for chunk in keys.chunks(LOOKAHEAD) {
            hashes.clear();
            ends.clear();
            joined.clear();
            for bytes in chunk {
                hashes.push(self.key(tenant, bytes)?);
                joined.extend_from_slice(&self.scratch);
                ends.push(joined.len());
            }
            // A single lookup is not worth asking ahead.
            if chunk.len() > 2 {
                self.master.state.prefetch(&hashes);
            }
            let mut start = 0;
            for (hash, end) in hashes.iter().zip(&ends) {
                each(self, *hash, &joined[start..*end], &access);
                access.depth += 1;
                access.parent = *hash;
                start = *end;
            }
        }
        Ok(())
    }

    fn exist(&mut self, op: &wire::Exist) -> Result<wire::Reply, StoreError> {
        let mut results = Vec::with_capacity(op.keys.len());
        self.for_each_key(&op.tenant, &op.keys, |call, hash, key, access| {
            results.push(call.master.state.exist(&call.view, hash, key, access) as u8);
        })?;
        Ok(Re::Exist(wire::ExistReply {
            results: results.into(),
        })
        .into())
    }

    fn locate(&mut self, op: &wire::Locate) -> Result<wire::Reply, StoreError> {
        let lease = self.master.state.config.lease_ttl;
        let expires = unix_ms() + (lease + READ_GRANT_EXTRA).as_millis() as u64;
        let mut locations = Vec::with_capacity(op.keys.len());
        let (mut hits, mut misses, mut hit_bytes) = (0, 0, 0);
        self.for_each_key(&op.tenant, &op.keys, |call, hash, key, access| {
            let state = &call.master.state;
            let found = state.locate(&call.view, hash, key, access, |o| {
                call.location(o, expires, lease)
            });
            let counter = if found.is_some() {
                &mut hits
            } else {
                &mut misses
            };
            *counter += 1;
            hit_bytes += found.as_ref().map_or(0, |l| l.size_bytes);
            locations.push(found.unwrap_or_else(|| wire::Location {
                code: match state.absence(call.now) {
                    Presence::Unknown => StoreError::Rebuilding.code(),
                    _ => StoreError::NotFound.code(),
                },
                ..wire::Location::default()
            }));
        })?;
        add(&self.master.state.counters.hits, hits);
        add(&self.master.state.counters.misses, misses);
        let metrics = &self.master.metrics;
        metrics.tenants.of(&op.tenant).add(hits, misses, hit_bytes);
        if let Some(head) = op.keys.first() {
            metrics.hot.asked(&op.tenant, head, hits, self.now);
        }
        Ok(Re::Locate(wire::LocateReply { locations }).into())
    }

    /// Replicas in the order in which to try them: suspects and lost nodes last.
    fn location(&self, object: &Object, expires: u64, lease: Duration) -> wire::Location {
        let length = footprint(object.size).unwrap_or(0);
        let mut replicas: Vec<(bool, wire::ReplicaLocation)> = object
            .replicas
            .iter()
            .filter_map(|r| {
                let segment = self.view.get(r.segment as usize)?.as_ref()?;
                let doubtful = segment.node.suspect(self.now) || !segment.node.readable();
                let granted = self.grant(*r, length, GrantAccess::Read, expires)?;
                Some((doubtful, granted))
            })
            .collect();
        replicas.sort_by_key(|(doubtful, _)| *doubtful);
        wire::Location {
            code: 0,
            size_bytes: object.size,
            version: object.version,
            checksum: object.checksum,
            has_checksum: object.put_with.has_checksum(),
            lease_ms: lease.as_millis() as u32,
            replicas: replicas.into_iter().map(|(_, r)| r).collect(),
        }
    }

    pub(super) fn grant(
        &self,
        replica: Replica,
        length: u64,
        access: GrantAccess,
        expires_unix_ms: u64,
    ) -> Option<wire::ReplicaLocation> {
        let segment = self.view.get(replica.segment as usize)?.as_ref()?;
        let grant = Grant {
            segment: segment.node_segment,
            incarnation: segment.incarnation,
            offset: replica.offset,
            length,
            term: self.master.state.term(),
            expires_unix_ms,
            mac: [0; 16],
        }
        .signed(access, &self.master.keys);
        Some(wire::ReplicaLocation::from_grant(replica.segment, &grant))
    }

    /// Waits until the nodes have forgotten what was removed (D2).
    pub(super) fn settle(&mut self) -> Result<(), StoreError> {
        let waiting = Instant::now();
        let settled = self.settled();
        self.waits.nodes += waiting.elapsed();
        settled
    }

    fn settled(&self) -> Result<(), StoreError> {
        let state = &self.master.state;
        let barrier = state.barrier();
        loop {
            let mut count = state.progress.count.lock();
            if barrier.reached() {
                return Ok(());
            }
            if state
                .progress
                .changed
                .wait_until(&mut count, self.deadline)
                .timed_out()
            {
                return Err(StoreError::Timeout {
                    what: format!(
                        "removed, but not confirmed by {}: it may come back if that node outlives this master",
                        barrier.awaited()
                    ),
                });
            }
        }
    }

    /// Nodes that are to forget something hear what for.
    fn trace_drops(&self) {
        let here = trace::traceparent();
        if !here.is_empty() {
            for node in self.master.state.segments.nodes() {
                node.drops_for.lock().clone_from(&here);
            }
        }
    }

    fn remove(&mut self, op: &wire::Remove) -> Result<wire::Reply, StoreError> {
        bounded(op.keys.len())?;
        self.trace_drops();
        let mut results = Vec::with_capacity(op.keys.len());
        for bytes in &op.keys {
            let result = self
                .key(&op.tenant, bytes)
                .and_then(|_| self.master.state.remove(&self.scratch, op.force, self.now));
            results.push(code(result));
        }
        if let Err(error) = self.settle() {
            for result in results.iter_mut().filter(|r| **r == 0) {
                *result = error.code();
            }
        }
        Ok(codes(results))
    }

    fn remove_matching(&mut self, op: &wire::RemoveMatching) -> Result<wire::Reply, StoreError> {
        let filter = KeyFilter::new(&op.tenant, "", &op.regex)?;
        self.trace_drops();
        if self.master.state.recovering(self.now) {
            return Err(StoreError::Rebuilding);
        }
        if op.regex.is_empty() && op.force {
            self.master.state.events.cleared(&filter.tenant);
        }
        let (count, kept) = self
            .master
            .state
            .remove_where(op.force, self.now, |o| filter.key_of(o).is_some());
        let settled = self.settle();
        Ok(Re::Removed(wire::Removed {
            code: code(settled),
            count,
            kept,
        })
        .into())
    }

    fn view(&mut self, op: &wire::View) -> wire::Reply {
        let state = &self.master.state;
        let epoch = state.segments.epoch();
        let changed = epoch != op.known_epoch;
        let segments = if changed {
            let view = state.segments.view();
            view.iter()
                .flatten()
                .map(|s| segment_view(s, self.now))
                .collect()
        } else {
            Vec::new()
        };
        Re::View(wire::ViewReply {
            epoch,
            changed,
            segments,
            host_id: self.master.host_id.clone(),
            control_socket: self
                .master
                .control_socket
                .get()
                .cloned()
                .unwrap_or_default(),
        })
        .into()
    }

    /// A client could not read or write there: the node is avoided for a while.
    fn report_failure(&mut self, op: &wire::ReportFailure) -> wire::Reply {
        let state = &self.master.state;
        let Some(segment) = state
            .segments
            .get(op.segment)
            .filter(|s| s.incarnation == op.incarnation)
        else {
            return codes(vec![StoreError::SegmentNotFound.code()]);
        };
        let until = self.now.plus(SUSPICION);
        if segment.node.suspect_until.swap(until.0, Ordering::Relaxed) < self.now.0 {
            state.segments.changed();
            tracing::info!(node = %segment.node.name, reason = %op.reason, "a client reported a failure");
        }
        codes(vec![0])
    }
}

/// What the master tells of one segment.
pub(crate) fn segment_view(
    s: &Arc<super::segments::SegmentState>,
    now: Millis,
) -> wire::SegmentView {
    let allocator = s.allocator.lock();
    wire::SegmentView {
        segment: s.slot,
        incarnation: s.incarnation,
        name: s.name.clone(),
        size_bytes: s.size,
        used_bytes: allocator.used(),
        largest_free_bytes: allocator.largest_free(),
        free_ranges: allocator.free_ranges() as u64,
        node: s.node.name.clone(),
        node_high: s.node.id.high,
        node_low: s.node.id.low,
        address: s.node.address.clone(),
        host_id: s.node.host_id.clone(),
        shm_socket: s.node.shm_socket.clone(),
        state: s.state_name(now).to_owned(),
        objects: s.objects.load(Ordering::Relaxed),
        node_segment: s.node_segment,
        page_kind: s.page_kind.clone(),
        build: s.node.build.get().cloned().unwrap_or_default(),
        served: s.node.served.lock().bytes.clone(),
        commits: s.node.commits.load(Ordering::Acquire),
    }
}

pub(super) fn bounded(items: usize) -> Result<(), StoreError> {
    if items <= ITEMS_MAX {
        return Ok(());
    }
    Err(StoreError::InvalidParams {
        what: format!("at most {ITEMS_MAX} keys in one operation"),
    })
}

pub(super) fn codes(codes: Vec<i32>) -> wire::Reply {
    Re::Codes(wire::Codes { codes }).into()
}
