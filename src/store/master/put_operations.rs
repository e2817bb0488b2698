//! Puts as the contract has them: decodes, asks the state, waits for space where a put may wait, encodes.

use std::time::{Duration, Instant};

use super::Master;
use super::arenas::Least;
use super::history::Failure;
use super::metrics::Rpc;
use super::object::Attributes;
use super::operations::{Call, bounded, code, codes};
use super::puts::{PutOptions, Written};
use crate::base::clock::{Millis, unix_ms};
use crate::base::id::Id128;
use crate::engine::grant::Access as GrantAccess;
use crate::store::model::error::StoreError;
use crate::store::model::header::footprint;
use crate::store::model::key;
use crate::store::wire::{self, reply::Kind as Re};

/// Longest a write grant lives. Arenas outlive it by being asked for anew.
const WRITE_GRANT: Duration = Duration::from_secs(600);
/// After this part of the wait for space, a put takes fewer replicas than asked for.
const PARTIAL_AFTER: Duration = Duration::from_millis(200);
/// How long an arena waits for room that is on its way to being free.
const ARENA_PATIENCE: Duration = Duration::from_millis(5);

impl Call<'_> {
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

    pub(super) fn put_start(&mut self, op: &wire::PutStart) -> Result<wire::Reply, StoreError> {
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
        // Since when there is no place, and whether space would help: else a node has yet to come.
        let mut lacking: Option<(Instant, bool)> = None;
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
            if let Some((since, for_space)) = lacking {
                self.waits.add(for_space, since);
            }
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
                    let for_space = matches!(error, StoreError::NoSpace { .. });
                    lacking = Some((Instant::now(), for_space));
                    if for_space {
                        state.make_room(size, now);
                    }
                    // Leases lapse without anybody telling: look again soon even if nothing was freed.
                    let soon = Instant::now() + Duration::from_millis(10);
                    let mut count = state.progress.count.lock();
                    if *count == seen {
                        state
                            .progress
                            .changed
                            .wait_until(&mut count, soon.min(self.deadline));
                    }
                }
                Err(error) => {
                    if error != StoreError::Exists {
                        state.counters.put_failed(&error);
                        let waited = begun.elapsed();
                        self.put_failed(&error, size, options.replica_num, waited);
                    }
                    return Err(error);
                }
            }
        }
    }

    /// Remembers why a put of the key in `scratch` failed.
    fn put_failed(&self, error: &StoreError, size: u64, replicas: usize, waited: Duration) {
        self.master.state.history.failed(Failure {
            hash: key::hash(&self.scratch),
            unix_ms: unix_ms(),
            code: error.code(),
            size,
            replicas: u32::try_from(replicas).unwrap_or(u32::MAX),
            waited_ms: waited.as_millis() as u64,
        });
    }

    pub(super) fn put_end(&mut self, op: &wire::PutEnd) -> wire::Reply {
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

    pub(super) fn put_revoke(&mut self, op: &wire::PutRevoke) -> wire::Reply {
        let state = &self.master.state;
        let revoke = |v: &u64| code(state.put_revoke(*v, !op.unsettled, self.now));
        codes(op.versions.iter().map(revoke).collect())
    }

    pub(super) fn arena_open(&mut self, op: &wire::ArenaOpen) -> wire::Reply {
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

    pub(super) fn arena_commit(
        &mut self,
        op: &wire::ArenaCommit,
    ) -> Result<wire::Reply, StoreError> {
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
            // Others are told to the writer, which puts elsewhere; a quota is the end of it.
            if let Err(error @ StoreError::Refused { .. }) = &result {
                self.master.state.counters.put_failed(error);
                self.put_failed(error, item.size_bytes, 1, Duration::ZERO);
            }
            results.push(code(result));
        }
        Ok(codes(results))
    }
}

impl Master {
    /// Commits an object that a client has written to a node of this process, into one of that client's arenas: what
    /// `ArenaCommit` does for one item, without a batch. An item whose key is taken is given up at once, since nobody writes
    /// there any more.
    ///
    /// # Errors
    /// As the operation answers.
    pub fn commit_written(
        &self,
        client: Id128,
        arena: u64,
        entry: &wire::DirectoryEntry,
    ) -> Result<(), StoreError> {
        let (begun, now, state) = (Instant::now(), Millis::now(), &self.state);
        let (size, at) = (entry.size_bytes, entry.offset);
        let attributes = Attributes {
            hard_pin: entry.hard_pin,
            soft_pin_ttl_ms: entry.soft_pin_ttl_ms,
            group: entry.group.clone(),
            data_type: u8::try_from(entry.data_type).unwrap_or(0),
            replicas: 0,
        };
        let written = Written {
            version: entry.version,
            checksum: entry.has_checksum.then_some(entry.checksum),
        };
        let key = &entry.key;
        let done = state.arena_commit(arena, client, key, at, size, &attributes, &written, now);
        match &done {
            Err(StoreError::Exists) => {
                state.arena_revoke(arena, client, key, at, size, written.version, true, now)?;
            }
            Err(error @ StoreError::Refused { .. }) => {
                state.counters.put_failed(error);
                state.history.failed(Failure {
                    hash: key::hash(key),
                    unix_ms: unix_ms(),
                    code: error.code(),
                    size,
                    replicas: 1,
                    waited_ms: 0,
                });
            }
            _ => {}
        }
        let reply = codes(vec![code(done.clone())]);
        self.metrics
            .carried_out(Rpc::ArenaCommit, begun.elapsed(), &reply);
        done
    }
}
