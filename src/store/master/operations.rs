//! Carries out batches of operations: decodes, asks the state, waits where an operation may wait, encodes.
//!
//! The one place where the contract meets the state, whichever way a batch came. Blocking: callers run it on threads
//! that may block (control lanes have their own, gRPC goes through the blocking pool).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::eviction::Access;
use super::metrics::Rpc;
use super::object::{Attributes, Object, Replica};
use super::puts::{Least, PutOptions, Written};
use super::segments::SegmentsView;
use super::state::{Presence, add};
use super::{Master, slow};
use crate::base::clock::{Millis, unix_ms};
use crate::base::id::Id128;
use crate::engine::grant::{Access as GrantAccess, Grant};
use crate::store::model::error::StoreError;
use crate::store::model::header::footprint;
use crate::store::model::key;
use crate::store::wire::{self, operation::Kind as Op, reply::Kind as Re};

/// Longest a write grant lives. Arenas outlive it by being asked for anew.
const WRITE_GRANT: Duration = Duration::from_secs(600);
/// A read grant outlives its lease by this: expiry is about leaked grants, staleness is the version's business.
const READ_GRANT_EXTRA: Duration = Duration::from_secs(60);
/// After this part of the wait for space, a put takes fewer replicas than asked for.
const PARTIAL_AFTER: Duration = Duration::from_millis(200);
/// How long an arena waits for room that is on its way to being free.
const ARENA_PATIENCE: Duration = Duration::from_millis(5);
/// How long a node is avoided after a client reported a failure.
const SUSPICION: Duration = Duration::from_secs(3);
/// Objects of one page of a listing.
const PAGE_MAX: u32 = 10_000;
/// Keys of a batch whose memory is asked for together.
const LOOKAHEAD: usize = 32;
/// Items of one operation.
const ITEMS_MAX: usize = 100_000;

/// One batch being carried out.
struct Call<'a> {
    master: &'a Master,
    view: SegmentsView,
    now: Millis,
    client: Id128,
    deadline: Instant,
    scratch: Vec<u8>,
    waits: slow::Waits,
}

/// Carries out a batch; replies come in the order of the operations.
pub(crate) fn execute(master: &Master, batch: wire::OperationBatch) -> wire::ReplyBatch {
    let state = &master.state;
    let started = Instant::now();
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
        let reply = call.one(operation);
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

fn code(result: Result<(), StoreError>) -> i32 {
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

    fn key(&mut self, tenant: &str, bytes: &[u8]) -> Result<u64, StoreError> {
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

    fn grant(
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

    fn options(config: Option<&wire::PutConfig>) -> Result<PutOptions, StoreError> {
        let config = config.cloned().unwrap_or_default();
        Ok(PutOptions {
            replica_num: config.replica_num.max(1) as usize,
            attributes: Attributes {
                hard_pin: config.hard_pin,
                soft_pin_ttl_ms: config.soft_pin_ttl_ms,
                group: config.group,
                data_type: u8::try_from(config.data_type).map_err(|_| {
                    StoreError::InvalidParams {
                        what: "data_type is 0 to 255".to_owned(),
                    }
                })?,
                replicas: 0,
            },
            preferred: config.preferred_segments,
            host_id: config.host_id,
            if_version: 0,
        })
    }

    fn put_start(&mut self, op: &wire::PutStart) -> Result<wire::Reply, StoreError> {
        bounded(op.items.len())?;
        let mut options = Self::options(op.config.as_ref())?;
        options.if_version = op.if_version;
        let group = options.attributes.group.clone();
        let mut slots = Vec::with_capacity(op.items.len());
        for item in &op.items {
            let own = if item.group.is_empty() {
                &group
            } else {
                &item.group
            };
            options.attributes.group.clone_from(own);
            let slot = match self.key(&op.tenant, &item.key) {
                Ok(_) => self.allocate(item.size_bytes, &options, op.upsert),
                Err(error) => Err(error),
            };
            slots.push(slot.unwrap_or_else(|error| wire::PutSlot {
                code: error.code(),
                ..wire::PutSlot::default()
            }));
        }
        Ok(Re::PutStart(wire::PutStartReply { slots }).into())
    }

    /// Allocates for the key in `scratch`, evicting and waiting until the deadline.
    fn allocate(
        &mut self,
        size: u64,
        options: &PutOptions,
        upsert: bool,
    ) -> Result<wire::PutSlot, StoreError> {
        let state = &self.master.state;
        let begun = Instant::now();
        loop {
            let seen = *state.progress.count.lock();
            let now = Millis::now();
            let partial = begun.elapsed() >= PARTIAL_AFTER || Instant::now() >= self.deadline;
            let allocated = state.put_start(
                &self.scratch,
                size,
                options,
                upsert,
                partial,
                self.client,
                now,
            );
            match allocated {
                Ok((version, replicas)) => {
                    // The view may have grown since the batch began.
                    self.view = state.segments.view();
                    let length = footprint(size).unwrap_or(0);
                    let expires = unix_ms() + WRITE_GRANT.as_millis() as u64;
                    let replicas = replicas
                        .iter()
                        .map(|r| {
                            // A place even for one that is gone: the client answers by position.
                            self.grant(*r, length, GrantAccess::Write, expires)
                                .unwrap_or_default()
                        })
                        .collect();
                    return Ok(wire::PutSlot {
                        code: 0,
                        version,
                        replicas,
                    });
                }
                Err(
                    error @ (StoreError::NoSpace { .. }
                    | StoreError::Rebuilding
                    | StoreError::SegmentNotFound),
                ) if Instant::now() < self.deadline => {
                    if matches!(error, StoreError::NoSpace { .. }) {
                        state.make_room(size, now);
                    }
                    // Leases lapse without anybody telling: look again soon even if nothing was freed.
                    let soon = Instant::now() + Duration::from_millis(10);
                    let waiting = Instant::now();
                    let mut count = state.progress.count.lock();
                    if *count == seen {
                        state
                            .progress
                            .changed
                            .wait_until(&mut count, soon.min(self.deadline));
                    }
                    self.waits.space += waiting.elapsed();
                }
                Err(error) => {
                    if error != StoreError::Exists {
                        state.counters.put_failed(&error);
                    }
                    return Err(error);
                }
            }
        }
    }

    fn put_end(&mut self, op: &wire::PutEnd) -> wire::Reply {
        let state = &self.master.state;
        let mut replaced = false;
        let end = |item: &wire::PutFinish| {
            let checksum = item.has_checksum.then_some(item.checksum);
            let ended = state.put_end(
                item.version,
                checksum,
                item.written,
                item.unsettled,
                self.now,
            );
            replaced |= ended == Ok(true);
            code(ended.map(|_| ()))
        };
        let results = op.items.iter().map(end).collect();
        if replaced && let Err(error) = self.settle() {
            // The new object is there; some reader may still see the old one for a moment.
            tracing::warn!(%error, "an upsert");
        }
        codes(results)
    }

    fn put_revoke(&mut self, op: &wire::PutRevoke) -> wire::Reply {
        let state = &self.master.state;
        let revoke = |v: &u64| code(state.put_revoke(*v, !op.unsettled, self.now));
        codes(op.versions.iter().map(revoke).collect())
    }

    fn arena_open(&mut self, op: &wire::ArenaOpen) -> wire::Reply {
        let state = &self.master.state;
        let open = |least| {
            let (slot, incarnation, wanted) = (op.segment, op.incarnation, op.wanted_bytes);
            state.arena_open(slot, incarnation, wanted, least, self.client)
        };
        let patience = self.deadline.min(Instant::now() + ARENA_PATIENCE);
        let mut opened = open(Least::Half);
        // In a full pool the free ranges are what eviction left: a shorter arena is better than none, once what is on its way
        // to being free has come.
        if let Err(StoreError::NoSpace { wanted_bytes }) = opened
            && state.make_room_for_arena(op.segment, wanted_bytes, self.now)
        {
            loop {
                let seen = *state.progress.count.lock();
                opened = open(Least::Half);
                let full = matches!(opened, Err(StoreError::NoSpace { .. }));
                if !full || Instant::now() >= patience || state.leaving_bytes(op.segment) == 0 {
                    break;
                }
                let mut count = state.progress.count.lock();
                if *count == seen {
                    state.progress.changed.wait_until(&mut count, patience);
                }
            }
        }
        if matches!(opened, Err(StoreError::NoSpace { .. })) {
            opened = open(Least::Anything);
        }
        // An arena is taken in one piece: the next one needs room before the sweeper's next round.
        state.keep_below_watermark();
        let reply = match opened {
            Ok((arena, replica, length, versions)) => {
                let expires = unix_ms() + WRITE_GRANT.as_millis() as u64;
                wire::ArenaOpened {
                    code: 0,
                    arena,
                    range: self.grant(replica, length, GrantAccess::Write, expires),
                    first_version: versions.start,
                    version_count: (versions.end - versions.start) as u32,
                }
            }
            Err(error) => wire::ArenaOpened {
                code: error.code(),
                ..wire::ArenaOpened::default()
            },
        };
        Re::ArenaOpened(reply).into()
    }

    fn arena_commit(&mut self, op: &wire::ArenaCommit) -> Result<wire::Reply, StoreError> {
        bounded(op.items.len())?;
        let mut attributes = Self::options(op.config.as_ref())?.attributes;
        let group = attributes.group.clone();
        let mut results = Vec::with_capacity(op.items.len());
        for item in &op.items {
            let own = if item.group.is_empty() {
                &group
            } else {
                &item.group
            };
            attributes.group.clone_from(own);
            let result = self.key(&op.tenant, &item.key).and_then(|_| {
                let state = &self.master.state;
                if item.revoke {
                    return state.arena_revoke(
                        op.arena,
                        self.client,
                        &self.scratch,
                        item.offset,
                        item.size_bytes,
                        item.version,
                        !item.unsettled,
                        self.now,
                    );
                }
                let written = Written {
                    version: item.version,
                    checksum: item.has_checksum.then_some(item.checksum),
                };
                state.arena_commit(
                    op.arena,
                    self.client,
                    &self.scratch,
                    item.offset,
                    item.size_bytes,
                    &attributes,
                    &written,
                    self.now,
                )
            });
            results.push(code(result));
        }
        Ok(codes(results))
    }

    /// Waits until the nodes have forgotten what was removed (D2).
    fn settle(&mut self) -> Result<(), StoreError> {
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

    fn remove(&mut self, op: &wire::Remove) -> Result<wire::Reply, StoreError> {
        bounded(op.keys.len())?;
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

    fn list(&mut self, op: &wire::List) -> Result<wire::Reply, StoreError> {
        let filter = KeyFilter::new(&op.tenant, &op.prefix, &op.regex)?;
        let limit = op.limit.clamp(1, PAGE_MAX) as usize;
        let mut objects = Vec::new();
        let next_cursor = self.master.state.walk(op.cursor, limit, |o| {
            let Some(bytes) = filter.key_of(o) else {
                return false;
            };
            objects.push(wire::ListedObject {
                key: bytes::Bytes::copy_from_slice(bytes),
                size_bytes: o.size,
                version: o.version,
                replicas: o.replicas.len() as u32,
                lease_left_ms: o.leased_until().since(self.now),
            });
            true
        });
        Ok(Re::Listing(wire::Listing {
            code: 0,
            objects,
            next_cursor,
        })
        .into())
    }

    fn stat(&mut self, op: &wire::Stat) -> Result<wire::Reply, StoreError> {
        let hash = self.key(&op.tenant, &op.key)?;
        let found = self
            .master
            .state
            .peek(hash, &self.scratch, |o| self.describe(o));
        match found {
            Some(description) => Ok(Re::Description(description).into()),
            None if self.master.state.recovering(self.now) => Err(StoreError::Rebuilding),
            None => Err(StoreError::NotFound),
        }
    }

    fn describe(&self, o: &Object) -> wire::Description {
        let replicas = o
            .replicas
            .iter()
            .filter_map(|r| {
                let segment = self.view.get(r.segment as usize)?.as_ref()?;
                Some(wire::ReplicaState {
                    segment: r.segment,
                    segment_name: segment.name.clone(),
                    node: segment.node.name.clone(),
                    offset: r.offset,
                    state: if segment.node.readable() {
                        "complete"
                    } else {
                        "lost"
                    }
                    .to_owned(),
                })
            })
            .collect();
        let group = o.group.as_ref().and_then(|g| key::split(&g.name));
        wire::Description {
            code: 0,
            size_bytes: o.size,
            version: o.version,
            checksum: o.checksum().unwrap_or(0),
            has_checksum: o.put_with.has_checksum(),
            lease_left_ms: o.leased_until().since(self.now),
            soft_pin_left_ms: o.soft_pin_until.since(self.now),
            hard_pin: o.hard_pin,
            group: group.map_or_else(String::new, |(_, g)| {
                String::from_utf8_lossy(g).into_owned()
            }),
            data_type: u32::from(o.data_type),
            replicas,
        }
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
        state: s.node.state_name(now).to_owned(),
        objects: s.objects.load(Ordering::Relaxed),
        node_segment: s.node_segment,
        page_kind: s.page_kind.clone(),
        build: s.node.build.get().cloned().unwrap_or_default(),
        served: s.node.served.lock().bytes.clone(),
    }
}

fn bounded(items: usize) -> Result<(), StoreError> {
    if items <= ITEMS_MAX {
        return Ok(());
    }
    Err(StoreError::InvalidParams {
        what: format!("at most {ITEMS_MAX} keys in one operation"),
    })
}

fn codes(codes: Vec<i32>) -> wire::Reply {
    Re::Codes(wire::Codes { codes }).into()
}

/// Which keys of one tenant are meant.
struct KeyFilter {
    tenant: String,
    prefix: Vec<u8>,
    regex: Option<regex::bytes::Regex>,
}

impl KeyFilter {
    fn new(tenant: &str, prefix: &str, regex: &str) -> Result<Self, StoreError> {
        let regex = match regex {
            "" => None,
            pattern => Some(
                regex::bytes::RegexBuilder::new(pattern)
                    .size_limit(1 << 20)
                    .build()
                    .map_err(|e| StoreError::InvalidParams {
                        what: format!("regex: {}", e.to_string().replace('\n', " ")),
                    })?,
            ),
        };
        let tenant = if tenant == key::DEFAULT_TENANT {
            ""
        } else {
            tenant
        };
        Ok(Self {
            tenant: tenant.to_owned(),
            prefix: prefix.as_bytes().to_vec(),
            regex,
        })
    }

    fn key_of<'o>(&self, object: &'o Object) -> Option<&'o [u8]> {
        let (tenant, bytes) = key::split(&object.key)?;
        let matches = tenant == self.tenant
            && bytes.starts_with(&self.prefix)
            && self.regex.as_ref().is_none_or(|r| r.is_match(bytes));
        matches.then_some(bytes)
    }
}
