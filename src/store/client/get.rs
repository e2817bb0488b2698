//! Reading: locate, choose a replica, transfer, check; on any fault the next replica, after the last an error that names
//! every attempt.

use std::sync::Arc;
use std::time::{Duration, Instant};

use smallvec::SmallVec;

use super::location_cache::{Location, ReplicaRef};
use super::{ObjectInfo, PoolClient};
use crate::base::trace::{Kind, Span};
use crate::engine::batch::{LocalSlice, Opcode, TransferRequest, Word};
use crate::engine::error::TransferError;
use crate::engine::memory::Memory;
use crate::store::model::error::StoreError;
use crate::store::model::header::{Checksum, HEADER_BYTES, ObjectHeader};
use crate::store::model::key;
use crate::store::wire::{self, operation, reply};

/// Pauses before looking again at an object that changed under the reader: its writer may be about to publish it.
const CHANGED_PAUSES: [Duration; 6] = [
    Duration::ZERO,
    Duration::from_micros(100),
    Duration::from_millis(1),
    Duration::from_millis(4),
    Duration::from_millis(10),
    Duration::from_millis(20),
];
/// How often a location whose segments are not in the view is asked for again.
const HOMELESS_ROUNDS: usize = 4;
/// Pause while the master rebuilds.
const REBUILDING_PAUSE: Duration = Duration::from_millis(25);

/// One object to read into the caller's memory.
pub struct GetRequest<'a> {
    /// The key.
    pub key: &'a [u8],
    /// Where its bytes go, in order; at least as large as the object.
    pub target: &'a [LocalSlice],
}

struct Reading<'a> {
    request: &'a GetRequest<'a>,
    qualified: Box<[u8]>,
    hash: u64,
    location: Option<Arc<Location>>,
    /// Replicas of this location tried so far.
    tried: usize,
    changes: usize,
    attempts: Vec<String>,
    outcome: Option<Result<u64, StoreError>>,
}

impl PoolClient {
    /// Reads objects into the caller's memory: bytes read per object, in order.
    pub fn get_into(&self, requests: &[GetRequest<'_>]) -> Vec<Result<u64, StoreError>> {
        self.get_into_by(requests, self.deadline())
    }

    fn get_into_by(
        &self,
        requests: &[GetRequest<'_>],
        deadline: Instant,
    ) -> Vec<Result<u64, StoreError>> {
        let mut span = Span::begin("get", Kind::Client);
        span.note("keys", requests.len() as u64);
        let now = Instant::now();
        let mut readings: Vec<Reading<'_>> = requests
            .iter()
            .map(|request| {
                let mut qualified = Vec::with_capacity(request.key.len() + 1);
                let valid = key::qualify(&self.config.tenant, request.key, &mut qualified);
                let hash = key::hash(&qualified);
                Reading {
                    request,
                    location: self.locations.get(hash, &qualified, now),
                    qualified: qualified.into_boxed_slice(),
                    hash,
                    tried: 0,
                    changes: 0,
                    attempts: Vec::new(),
                    outcome: valid.err().map(Err),
                }
            })
            .collect();
        while readings.iter().any(|r| r.outcome.is_none()) {
            self.locate_missing(&mut readings, deadline);
            self.transfer_round(&mut readings, deadline);
            if Instant::now() >= deadline {
                for r in readings.iter_mut().filter(|r| r.outcome.is_none()) {
                    r.outcome = Some(Err(StoreError::Timeout {
                        what: format!("reading; {}", r.attempts.join("; ")),
                    }));
                }
            }
        }
        let outcomes: Vec<Result<u64, StoreError>> = readings
            .into_iter()
            .map(|r| r.outcome.unwrap_or(Err(StoreError::NotFound)))
            .collect();
        span.note("bytes", outcomes.iter().flatten().sum());
        if let Some(error) = outcomes.iter().find_map(|o| o.as_ref().err()) {
            span.fail(error);
        }
        outcomes
    }

    fn locate_missing(&self, readings: &mut [Reading<'_>], deadline: Instant) {
        let missing: Vec<usize> = (0..readings.len())
            .filter(|i| readings[*i].outcome.is_none() && readings[*i].location.is_none())
            .collect();
        if missing.is_empty() {
            return;
        }
        let keys: Vec<&[u8]> = missing.iter().map(|i| readings[*i].request.key).collect();
        match self.locate(&keys, deadline) {
            Ok(found) => {
                for (index, found) in missing.iter().zip(found) {
                    let r = &mut readings[*index];
                    match found {
                        Ok(location) => {
                            self.remember(r.hash, &r.qualified, &location);
                            r.location = Some(location);
                            r.tried = 0;
                        }
                        Err(error) => r.outcome = Some(Err(error)),
                    }
                }
            }
            Err(error) => {
                for index in missing {
                    readings[index].outcome = Some(Err(error.clone()));
                }
            }
        }
    }

    /// Asks the master where objects lie, with patience while it rebuilds.
    pub(super) fn locate(
        &self,
        keys: &[&[u8]],
        deadline: Instant,
    ) -> Result<Vec<Result<Arc<Location>, StoreError>>, StoreError> {
        let mut rounds = 0;
        loop {
            let operation = operation::Kind::Locate(wire::Locate {
                tenant: self.config.tenant.clone(),
                keys: keys
                    .iter()
                    .map(|k| bytes::Bytes::copy_from_slice(k))
                    .collect(),
            });
            let asked = Instant::now();
            let reply::Kind::Locate(found) = self.control.ask(operation, deadline)? else {
                return Err(self.control.surprise());
            };
            if found.locations.len() != keys.len() {
                return Err(self.control.surprise());
            }
            let rebuilding = StoreError::Rebuilding.code();
            if found.locations.iter().any(|l| l.code == rebuilding)
                && Instant::now() + REBUILDING_PAUSE < deadline
            {
                std::thread::sleep(REBUILDING_PAUSE);
                continue;
            }
            self.refresh_view(deadline)?;
            let locations: Vec<_> = found
                .locations
                .iter()
                .map(|l| self.location(l, asked))
                .collect();
            // A segment left between the answer and the view: the next answer knows.
            let homeless =
                |l: &Result<Arc<Location>, _>| l.as_ref().is_ok_and(|l| l.replicas.is_empty());
            if rounds < HOMELESS_ROUNDS && locations.iter().any(homeless) {
                rounds += 1;
                std::thread::sleep(REBUILDING_PAUSE);
                continue;
            }
            return Ok(locations);
        }
    }

    fn location(&self, l: &wire::Location, asked: Instant) -> Result<Arc<Location>, StoreError> {
        if l.code != 0 {
            return Err(StoreError::from_code(l.code));
        }
        let view = self.view();
        let mut replicas: SmallVec<[ReplicaRef; 1]> = l
            .replicas
            .iter()
            .filter_map(|r| {
                let segment = view.get(r.segment, r.incarnation)?.clone();
                let grant = r.grant(segment.node_segment)?;
                Some(ReplicaRef { segment, grant })
            })
            .collect();
        // The master sorts doubtful ones to the end; among the rest, the nearest first. Stable.
        if replicas.len() > 1 {
            let healthy = replicas.iter().filter(|r| r.segment.in_service).count();
            replicas[..healthy].sort_by_key(|r| self.engine.path(&r.segment.peer));
        }
        Ok(Arc::new(Location {
            size: l.size_bytes,
            version: l.version,
            checksum: l.has_checksum.then_some(l.checksum),
            lease_until: asked + Duration::from_millis(u64::from(l.lease_ms)),
            replicas,
        }))
    }

    /// One attempt for everything still open.
    fn transfer_round(&self, readings: &mut [Reading<'_>], deadline: Instant) {
        let mut open: SmallVec<[usize; 4]> = SmallVec::new();
        for (index, r) in readings.iter_mut().enumerate() {
            let Some(location) = r.location.as_ref().filter(|_| r.outcome.is_none()) else {
                continue;
            };
            let room: u64 = r.request.target.iter().map(|t| t.len() as u64).sum();
            if room < location.size {
                r.outcome = Some(Err(StoreError::BufferTooSmall {
                    size_bytes: location.size,
                    buffer_bytes: room,
                }));
            } else if r.tried >= location.replicas.len() {
                r.outcome = Some(Err(StoreError::TransferFailed {
                    attempts: r.attempts.join("; "),
                }));
            } else {
                open.push(index);
            }
        }
        let mut headers: Vec<[u8; HEADER_BYTES as usize]> =
            vec![[0; HEADER_BYTES as usize]; open.len()];
        let mut batch: Vec<(usize, TransferRequest)> = Vec::with_capacity(open.len());
        for (index, header) in open.iter().zip(&mut headers) {
            let r = &readings[*index];
            if let Some(location) = &r.location {
                let replica = &location.replicas[r.tried];
                batch.push((
                    *index,
                    read_request(location, replica, header, r.request.target),
                ));
            }
        }
        // Requests for one peer next to each other go out as one frame.
        batch.sort_by_key(|(_, r)| r.peer.node);
        let (owners, requests): (Vec<usize>, Vec<TransferRequest>) = batch.into_iter().unzip();
        // One slow node must not eat the time of the other replicas.
        let attempt = deadline.min(Instant::now() + self.config.transfer_timeout);
        let results = {
            let _span = Span::child("transfer", Kind::Client);
            self.engine.transfer(&requests, attempt)
        };
        drop(requests);
        for (index, result) in owners.into_iter().zip(results) {
            // `open` is ascending, one header each.
            if let Ok(position) = open.binary_search(&index) {
                self.settle_read(&mut readings[index], result, &headers[position], deadline);
            }
        }
    }

    fn settle_read(
        &self,
        r: &mut Reading<'_>,
        result: Result<(), TransferError>,
        header: &[u8; HEADER_BYTES as usize],
        deadline: Instant,
    ) {
        let Some(location) = r.location.clone() else {
            return;
        };
        let replica = &location.replicas[r.tried];
        let result = result.and_then(|()| {
            let expected = ObjectHeader {
                version: location.version,
                length: location.size,
                key_hash: r.hash,
                checksum: None,
            };
            if expected.matches(header) {
                Ok(())
            } else {
                Err(TransferError::Changed)
            }
        });
        match result {
            Ok(()) => {
                let verified = self.verify(&location, r.request.target);
                match verified {
                    Ok(()) => r.outcome = Some(Ok(location.size)),
                    Err(error) => {
                        r.attempts
                            .push(format!("{}: {error}", replica.segment.name));
                        r.tried += 1;
                        if r.tried >= location.replicas.len() {
                            r.outcome = Some(Err(error));
                        }
                    }
                }
            }
            // Other bytes lie there: the object was replaced, removed, evicted, or is not published yet. Ask again.
            Err(
                error @ (TransferError::Changed
                | TransferError::Stale
                | TransferError::GrantRefused),
            ) if r.tried + 1 >= location.replicas.len() => {
                self.locations.forget(r.hash, &r.qualified);
                r.location = None;
                r.attempts
                    .push(format!("{}: {error}", replica.segment.name));
                match CHANGED_PAUSES.get(r.changes) {
                    Some(pause) if Instant::now() + *pause < deadline => {
                        std::thread::sleep(*pause);
                        r.changes += 1;
                    }
                    _ => r.outcome = Some(Err(StoreError::NotFound)),
                }
            }
            Err(error) => {
                r.attempts
                    .push(format!("{}: {error}", replica.segment.name));
                if error.is_path_failure() {
                    self.report(&replica.segment, &error.to_string());
                    self.locations.forget(r.hash, &r.qualified);
                }
                r.tried += 1;
            }
        }
    }

    pub(super) fn verify(
        &self,
        location: &Location,
        target: &[LocalSlice],
    ) -> Result<(), StoreError> {
        let Some(expected) = location.checksum.filter(|_| self.config.verify) else {
            return Ok(());
        };
        let mut sum = Checksum::default();
        let mut left = location.size as usize;
        for slice in target {
            let n = slice.length.min(left);
            // SAFETY: the caller vouched for the slice (LocalSlice::new), and the transfer into it has ended.
            sum.update(unsafe { std::slice::from_raw_parts(slice.pointer, n) });
            left -= n;
        }
        let actual = sum.finish();
        if actual == expected {
            return Ok(());
        }
        Err(StoreError::Checksum { expected, actual })
    }

    /// The whole object in new memory.
    ///
    /// # Errors
    /// `NotFound`, and whatever keeps it from being read.
    pub fn get(&self, key: &[u8]) -> Result<Vec<u8>, StoreError> {
        let deadline = self.deadline();
        loop {
            let found = self.locate_cached(key, deadline)?;
            let size = usize::try_from(found.size).map_err(|_| StoreError::NotFound)?;
            let mut bytes = vec![0u8; size];
            // SAFETY: `bytes` outlives the call below.
            let target = [unsafe { LocalSlice::new(bytes.as_mut_ptr(), size) }];
            let request = GetRequest {
                key,
                target: &target,
            };
            match self.get_into_by(&[request], deadline).pop() {
                // Replaced by a larger or smaller one in between.
                Some(Err(StoreError::BufferTooSmall { .. })) if Instant::now() < deadline => {}
                Some(Ok(read)) => {
                    bytes.truncate(read as usize);
                    return Ok(bytes);
                }
                Some(Err(error)) => return Err(error),
                None => return Err(StoreError::NotFound),
            }
        }
    }

    /// Reads several objects into new memory.
    pub fn get_batch(&self, keys: &[&[u8]]) -> Vec<Result<Vec<u8>, StoreError>> {
        let mut found: Vec<Result<Vec<u8>, StoreError>> = self
            .sizes(keys)
            .into_iter()
            .map(|size| {
                let size = usize::try_from(size?).map_err(|_| StoreError::NotFound)?;
                Ok(vec![0u8; size])
            })
            .collect();
        let mut owners = Vec::with_capacity(keys.len());
        let mut targets = Vec::with_capacity(keys.len());
        for (index, bytes) in found.iter_mut().enumerate() {
            if let Ok(bytes) = bytes {
                owners.push(index);
                // SAFETY: the bytes are not moved or touched before the call below has returned.
                targets.push([unsafe { LocalSlice::new(bytes.as_mut_ptr(), bytes.len()) }]);
            }
        }
        let requests: Vec<GetRequest<'_>> = owners
            .iter()
            .zip(&targets)
            .map(|(index, target)| GetRequest {
                key: keys[*index],
                target,
            })
            .collect();
        let outcomes = self.get_into(&requests);
        for (index, outcome) in owners.into_iter().zip(outcomes) {
            match (outcome, &mut found[index]) {
                (Ok(read), Ok(bytes)) => bytes.truncate(read as usize),
                // Replaced by a larger one in between.
                (Err(StoreError::BufferTooSmall { .. }), place) => *place = self.get(keys[index]),
                (Err(error), place) => *place = Err(error),
                (Ok(_), Err(_)) => {}
            }
        }
        found
    }

    /// Payload sizes of objects, with a lease each: the first half of a get whose memory is still to be found.
    pub fn sizes(&self, keys: &[&[u8]]) -> Vec<Result<u64, StoreError>> {
        let located = self.locate_all(keys, self.deadline());
        located.into_iter().map(|l| l.map(|l| l.size)).collect()
    }

    /// Where objects lie, by memory or from the master in one batch.
    pub(super) fn locate_all(
        &self,
        keys: &[&[u8]],
        deadline: Instant,
    ) -> Vec<Result<Arc<Location>, StoreError>> {
        let now = Instant::now();
        let mut unknown = Vec::new();
        let mut found: Vec<Result<Arc<Location>, StoreError>> = Vec::with_capacity(keys.len());
        for (index, key) in keys.iter().enumerate() {
            let mut qualified = Vec::with_capacity(key.len() + 1);
            found.push(
                match key::qualify(&self.config.tenant, key, &mut qualified) {
                    Ok(()) => {
                        let known = self.locations.get(key::hash(&qualified), &qualified, now);
                        if known.is_none() {
                            unknown.push((index, qualified));
                        }
                        known.ok_or(StoreError::NotFound)
                    }
                    Err(error) => Err(error),
                },
            );
        }
        if unknown.is_empty() {
            return found;
        }
        let asked: Vec<&[u8]> = unknown.iter().map(|(index, _)| keys[*index]).collect();
        match self.locate(&asked, deadline) {
            Ok(locations) => {
                for ((index, qualified), location) in unknown.into_iter().zip(locations) {
                    if let Ok(location) = &location {
                        self.remember(key::hash(&qualified), &qualified, location);
                    }
                    found[index] = location;
                }
            }
            Err(error) => {
                for (index, _) in unknown {
                    found[index] = Err(error.clone());
                }
            }
        }
        found
    }

    fn locate_cached(&self, key: &[u8], deadline: Instant) -> Result<Arc<Location>, StoreError> {
        let mut qualified = Vec::new();
        key::qualify(&self.config.tenant, key, &mut qualified)?;
        let hash = key::hash(&qualified);
        if let Some(found) = self.locations.get(hash, &qualified, Instant::now()) {
            return Ok(found);
        }
        let found = self
            .locate(&[key], deadline)?
            .pop()
            .unwrap_or(Err(StoreError::NotFound))?;
        self.remember(hash, &qualified, &found);
        Ok(found)
    }

    /// Remembers a location, unless its segments have just left the view: it would hide the object for a lease.
    fn remember(&self, hash: u64, qualified: &[u8], location: &Arc<Location>) {
        if !location.replicas.is_empty() {
            self.locations.put(hash, qualified, location.clone());
        }
    }

    /// Opens an object for reading in pieces.
    ///
    /// # Errors
    /// `NotFound`, and whatever keeps it from being located.
    pub fn reader(&self, key: &[u8]) -> Result<ObjectReader<'_>, StoreError> {
        let mut span = Span::begin("open", Kind::Client);
        let located = self.locate(&[key], self.deadline());
        let location = located.and_then(|mut all| all.pop().unwrap_or(Err(StoreError::NotFound)));
        let location = location.inspect_err(|error| span.fail(error))?;
        Ok(ObjectReader {
            client: self,
            location,
            checksum: Checksum::default(),
            checked: 0,
            replica: 0,
        })
    }

    /// The bytes of an object where they lie, when that is in this process or on this host.
    ///
    /// # Errors
    /// `NotFound`; `TransferFailed` when no replica is on this host.
    pub fn borrow(&self, key: &[u8]) -> Result<Borrowed, StoreError> {
        let deadline = self.deadline();
        let mut qualified = Vec::new();
        key::qualify(&self.config.tenant, key, &mut qualified)?;
        let hash = key::hash(&qualified);
        for pause in CHANGED_PAUSES {
            std::thread::sleep(pause);
            let location = self.locate_cached(key, deadline)?;
            for replica in &location.replicas {
                let (segment, grant) = (&replica.segment, &replica.grant);
                let mapped = self
                    .engine
                    .map(&segment.peer, grant.segment, grant.incarnation);
                let Some(memory) = mapped else { continue };
                let borrowed = Borrowed {
                    memory,
                    offset: grant.offset,
                    size: location.size,
                    version: location.version,
                };
                if borrowed.is_valid() {
                    return Ok(borrowed);
                }
            }
            self.locations.forget(hash, &qualified);
        }
        Err(StoreError::TransferFailed {
            attempts: "no replica lies on this host".to_owned(),
        })
    }
}

pub(super) fn read_request(
    location: &Location,
    replica: &ReplicaRef,
    header: &mut [u8; HEADER_BYTES as usize],
    target: &[LocalSlice],
) -> TransferRequest {
    // SAFETY: the header buffer lives until the transfer has returned.
    let mut local: SmallVec<[LocalSlice; 2]> =
        [unsafe { LocalSlice::new(header.as_mut_ptr(), header.len()) }]
            .into_iter()
            .collect();
    let mut left = location.size as usize;
    for slice in target {
        let n = slice.length.min(left);
        if n > 0 {
            // SAFETY: a part of a slice the caller vouched for.
            local.push(unsafe { LocalSlice::new(slice.pointer, n) });
        }
        left -= n;
    }
    TransferRequest {
        opcode: Opcode::Read,
        peer: replica.segment.peer.clone(),
        grant: replica.grant,
        offset: replica.grant.offset,
        length: HEADER_BYTES + location.size,
        local,
        word: Some(Word {
            offset: replica.grant.offset,
            value: location.version,
        }),
        notify: Vec::new(),
    }
}

/// Reads one version of an object in pieces, with bounded memory.
pub struct ObjectReader<'a> {
    client: &'a PoolClient,
    location: Arc<Location>,
    checksum: Checksum,
    checked: u64,
    replica: usize,
}

impl ObjectReader<'_> {
    /// What is being read.
    pub fn info(&self) -> ObjectInfo {
        ObjectInfo {
            size: self.location.size,
            version: self.location.version,
            checksum: self.location.checksum,
        }
    }

    /// Fills `buffer` from `offset` on. The pieces of one reader are of one version, or an error.
    ///
    /// # Errors
    /// `NotFound` when the object is gone or replaced; `TransferFailed`; `Checksum` after the last piece when they were
    /// read in order and do not add up to what was put.
    pub fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        let deadline = self.client.deadline();
        let mut attempts = Vec::new();
        while let Some(replica) = self.location.replicas.get(self.replica) {
            let at = replica.grant.offset;
            // SAFETY: `buffer` is borrowed for the whole call.
            let slice = unsafe { LocalSlice::new(buffer.as_mut_ptr(), buffer.len()) };
            let request = TransferRequest {
                opcode: Opcode::Read,
                peer: replica.segment.peer.clone(),
                grant: replica.grant,
                offset: at + HEADER_BYTES + offset,
                length: buffer.len() as u64,
                local: [slice].into_iter().collect(),
                word: Some(Word {
                    offset: at,
                    value: self.location.version,
                }),
                notify: Vec::new(),
            };
            let limit = deadline.min(Instant::now() + self.client.config.transfer_timeout);
            match self.client.engine.transfer(&[request], limit).pop() {
                Some(Ok(())) => return self.account(offset, buffer),
                Some(Err(error)) => {
                    if error.is_path_failure() {
                        self.client.report(&replica.segment, &error.to_string());
                    }
                    attempts.push(format!("{}: {error}", replica.segment.name));
                }
                None => {}
            }
            self.replica += 1;
        }
        Err(StoreError::TransferFailed {
            attempts: attempts.join("; "),
        })
    }

    fn account(&mut self, offset: u64, buffer: &[u8]) -> Result<(), StoreError> {
        let Some(expected) = self.location.checksum.filter(|_| offset == self.checked) else {
            return Ok(());
        };
        self.checksum.update(buffer);
        self.checked += buffer.len() as u64;
        let actual = self.checksum.finish();
        if self.checked == self.location.size && actual != expected {
            return Err(StoreError::Checksum { expected, actual });
        }
        Ok(())
    }
}

/// The bytes of an object in shared memory, not copied. They stay mapped as long as this lives; whether they are still
/// this object is told by [`Borrowed::is_valid`], which must be asked *after* the bytes were used. The lease obtained with
/// it keeps eviction away for its time.
pub struct Borrowed {
    memory: Arc<Memory>,
    offset: u64,
    size: u64,
    version: u64,
}

impl Borrowed {
    /// First byte of the payload. Other processes may write there once the object is gone: copy or use, then ask
    /// [`Borrowed::is_valid`].
    pub fn as_ptr(&self) -> *const u8 {
        self.memory
            .range(self.offset + HEADER_BYTES, self.size)
            .map_or(std::ptr::null(), |p| p.cast_const())
    }
    /// Bytes of the payload.
    pub fn len(&self) -> u64 {
        self.size
    }
    /// Whether it is empty; never so for an object of the pool.
    pub fn is_empty(&self) -> bool {
        self.size == 0
    }
    /// Whether everything read through the pointer so far was this object.
    pub fn is_valid(&self) -> bool {
        self.memory
            .range(self.offset, HEADER_BYTES + self.size)
            .is_some()
            && self.memory.word_is(self.offset, self.version)
    }
}
