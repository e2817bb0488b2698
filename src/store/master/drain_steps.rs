//! The steps of drain jobs: walks over the index, what goes where, and when a job is over.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;

use super::copies::{Copied, Copy};
use super::drain::{Candidate, Job, JobStatus, Stuck, Walk};
use super::object::{Object, Replica};
use super::segments::{DrainState, NodePhase, NodeState, SegmentState, SegmentsView};
use super::state::MasterState;
use crate::base::clock::{Millis, unix_ms};
use crate::store::model::error::StoreError;
use crate::store::model::header::footprint;
use crate::store::model::key;

/// What travels together: small objects would otherwise wait for a message each.
const BATCH_OBJECTS: usize = 256;
const BATCH_BYTES: u64 = 8 << 20;
/// Objects looked at together, and how often in one step: the thread has other things to do.
const LOOKED_AT: usize = 8192;
const LOOKS: usize = 8;
/// Attempts to move one object, and how much later each one comes: a put may have to end first.
const ATTEMPTS: u8 = 3;
const LATER_MS: u64 = 300;
/// Objects given up at most; then the job is.
const GIVEN_UP_MAX: usize = 100_000;
/// Between walks that begin nothing.
const REST: Duration = Duration::from_millis(200);
/// Such walks after which no more is evicted for a job, and a node that leaves waits for room no longer.
const IDLE_WALKS: u32 = 10;
/// Puts that saw the segments before the job began have their ranges by then.
const BEGINNING: Duration = Duration::from_millis(100);
/// A copy is given this long, and this much for its bytes, at least 16 MiB/s.
const COPY_PATIENCE: Duration = Duration::from_secs(30);
const COPY_BYTES_PER_MS: u64 = 16 << 10;
const EVERYWHERE: &str = "every other node has a replica already";
/// Objects named in a report.
const NAMED_MAX: usize = 20;

impl Job {
    fn says(&mut self, message: String) {
        self.report.message = message;
        self.report.updated_unix_ms = unix_ms();
    }

    /// Takes note of copies that have ended.
    fn account(&mut self, state: &MasterState, now: Millis) {
        for ended in state.copies.take_ended(self.id) {
            let Some(batch) = self.active.remove(&ended.version) else {
                continue;
            };
            if let Some(left) = self.batches.get_mut(&batch) {
                *left -= 1;
                if *left == 0 {
                    self.batches.remove(&batch);
                }
            }
            self.report.updated_unix_ms = unix_ms();
            match ended.outcome {
                Copied::Done => {
                    self.report.succeeded += 1;
                    self.report.moved_bytes += ended.size;
                    self.attempts.remove(&ended.version);
                }
                Copied::Busy => {}
                Copied::NotThere | Copied::Refused | Copied::Unsure => {
                    // Removed or evicted meanwhile: there is nothing to move.
                    let hash = key::hash(&ended.key);
                    let is_it = |o: &Object| o.version == ended.version;
                    if state.peek(hash, &ended.key, is_it) != Some(true) {
                        self.attempts.remove(&ended.version);
                        continue;
                    }
                    self.report.failed += 1;
                    let (attempts, later) = self.attempts.entry(ended.version).or_default();
                    *attempts += 1;
                    *later = Millis(now.0 + LATER_MS * u64::from(*attempts));
                    if *attempts >= ATTEMPTS {
                        self.attempts.remove(&ended.version);
                        self.given_up.insert(ended.version);
                    }
                }
            }
        }
    }

    /// The replica that is to go, if an object is this job's business.
    fn concerns(&self, view: &SegmentsView, object: &Object) -> Option<Replica> {
        let own = |r: &&Replica| self.slots.contains(&r.segment);
        let from = object.replicas.iter().find(own)?;
        let elsewhere = |r: &Replica| {
            let segment = view.get(r.segment as usize).and_then(Option::as_ref);
            !self.slots.contains(&r.segment)
                && segment.is_some_and(|s| s.node.phase() == NodePhase::Ok)
        };
        let enough = self.leaving.is_some() && object.replicas.iter().any(elsewhere);
        (!enough).then_some(*from)
    }
}

impl MasterState {
    /// One step of every job.
    pub(crate) fn drain_step(&self, now: Millis) {
        if !self.drains.running() {
            return;
        }
        let mut jobs = self.drains.jobs.lock();
        for job in jobs.iter_mut().filter(|j| !j.report.status.is_over()) {
            self.job_step(job, now);
        }
        let asking = jobs.iter().filter(|j| !j.report.status.is_over());
        self.copies
            .keep_ended(&asking.map(|j| j.id).collect::<Vec<_>>());
        self.drains.count(&jobs);
    }

    fn job_step(&self, job: &mut Job, now: Millis) {
        if !self.has_returned(job, now) {
            return;
        }
        job.account(self, now);
        let view = self.segments.view();
        let is_there = |slot: &u32| view.get(*slot as usize).is_some_and(Option::is_some);
        if !job.slots.iter().all(is_there) {
            let text = "Drain job failed: a segment was unmounted while it was being emptied";
            return self.finish_job(job, JobStatus::Failed, text.to_owned());
        }
        if job.leaving.is_some_and(|until| now >= until) {
            let text = "the time to move objects is over".to_owned();
            return self.finish_job(job, JobStatus::Failed, text);
        }
        if job.given_up.len() >= GIVEN_UP_MAX {
            let text = "Drain job failed: too many objects could not be moved".to_owned();
            return self.finish_job(job, JobStatus::Failed, text);
        }
        if job.report.status == JobStatus::Created {
            job.report.status = JobStatus::Running;
            job.says("Drain job running".to_owned());
        }
        if now < job.not_before {
            return;
        }
        let mut looks = 0;
        while job.batches.len() < job.concurrency {
            if job.queue.is_empty() {
                if looks == LOOKS {
                    return;
                }
                looks += 1;
                if !self.look_further(job, &view, now) {
                    return self.walked(job, now);
                }
            }
            self.begin_batch(job, &view, now);
        }
    }

    /// Looks at more of the index; false when the walk is at its end.
    fn look_further(&self, job: &mut Job, view: &SegmentsView, now: Millis) -> bool {
        if job.walk.begun && job.walk.cursor == 0 {
            return false;
        }
        if !job.walk.begun {
            let quiet = self.is_quiet(&job.slots);
            if !quiet {
                // One that was being opened when the job began.
                self.close_arenas(&job.slots, now);
            }
            job.walk = Walk {
                begun: true,
                quiet: quiet && now.since(job.begun) >= BEGINNING.as_millis() as u64,
                ..Walk::default()
            };
        }
        let mut found = Vec::new();
        let (mut remaining, mut given_up) = (0, 0);
        let mut stuck = Vec::new();
        let next = self.walk(job.walk.cursor, LOOKED_AT, |object| {
            let Some(from) = job.concerns(view, object) else {
                return true;
            };
            remaining += 1;
            if job.given_up.contains(&object.version) {
                given_up += 1;
                if stuck.len() < NAMED_MAX {
                    stuck.push(Stuck {
                        key: object.key.clone(),
                        size: object.size,
                        reason: "every attempt to copy it failed",
                    });
                }
            } else if !job.active.contains_key(&object.version)
                && job.attempts.get(&object.version).is_none_or(|a| a.1 <= now)
            {
                found.push(Candidate {
                    key: object.key.clone(),
                    hash: object.hash,
                    version: object.version,
                    size: object.size,
                    from,
                });
            }
            true
        });
        job.walk.cursor = next;
        job.walk.remaining += remaining;
        job.walk.given_up += given_up;
        stuck.truncate(NAMED_MAX.saturating_sub(job.walk.stuck.len()));
        job.walk.stuck.extend(stuck);
        job.queue.extend(found);
        true
    }

    /// A walk has seen everything.
    fn walked(&self, job: &mut Job, now: Millis) {
        if !job.active.is_empty() {
            return;
        }
        let walk = std::mem::take(&mut job.walk);
        job.report.blocked = walk.blocked;
        job.report.stuck = walk.stuck;
        if walk.remaining == 0 {
            if walk.quiet && self.is_quiet(&job.slots) {
                let text = "Drain job finished successfully".to_owned();
                return self.finish_job(job, JobStatus::Succeeded, text);
            }
            job.not_before = now.plus(REST / 4);
            return;
        }
        if walk.copies > 0 {
            job.idle_walks = 0;
            return;
        }
        if walk.given_up == walk.remaining {
            let n = walk.remaining;
            let text =
                format!("Drain job failed: {n} objects could not be moved and stay where they are");
            return self.finish_job(job, JobStatus::Failed, text);
        }
        job.idle_walks += 1;
        job.not_before = now.plus(REST);
        let n = walk.blocked;
        let text = if n == 0 {
            "Drain job running: what is left could not be copied yet".to_owned()
        } else {
            format!("{n} objects have no place to go: add memory, or cancel the job")
        };
        if job.leaving.is_some() && (job.idle_walks > IDLE_WALKS || self.takers(job).is_empty()) {
            return self.finish_job(job, JobStatus::Failed, text);
        }
        job.says(text);
        if walk.wanted > 0 && job.idle_walks <= IDLE_WALKS {
            self.make_room(walk.wanted, now);
        }
    }

    /// Whether nothing new can come to these segments any more.
    fn is_quiet(&self, slots: &[u32]) -> bool {
        let there = |r: &Replica| slots.contains(&r.segment);
        let pending = |p: &Mutex<std::collections::HashMap<u64, super::puts::PendingPut, _>>| {
            p.lock().values().any(|put| put.replicas.iter().any(there))
        };
        let committing = self.arenas.lock().values().any(|a| {
            let a = a.lock();
            slots.contains(&a.segment) && (a.committing > 0 || !a.closed)
        });
        !committing && !self.pending.iter().any(pending)
    }

    /// Segments that may take what a job moves, those with the largest share of free space first.
    fn takers(&self, job: &Job) -> Vec<Arc<SegmentState>> {
        let view = self.segments.view();
        let wanted = |s: &Arc<SegmentState>| {
            let named = |t: &String| *t == s.name || *t == s.node.name;
            s.placeable()
                && !job.slots.contains(&s.slot)
                && (job.targets.is_empty() || job.targets.iter().any(named))
        };
        let mut takers: Vec<_> = view
            .iter()
            .flatten()
            .filter(|s| wanted(s))
            .cloned()
            .collect();
        takers.sort_by_cached_key(|s| {
            let allocator = s.allocator.lock();
            allocator.used() * 1000 / allocator.size().max(1)
        });
        takers
    }

    /// Begins one transfer with the first object of the queue, and small ones that can go the same way.
    fn begin_batch(&self, job: &mut Job, view: &SegmentsView, now: Millis) {
        let Some(first) = job.queue.pop_front() else {
            return;
        };
        let takers = self.takers(job);
        let source = view
            .get(first.from.segment as usize)
            .and_then(Option::as_ref);
        let Some(source) = source.map(|s| s.node.clone()) else {
            return;
        };
        if !source.copier.load(Ordering::Acquire) {
            return Self::blocked(job, first, 0, "the release of its node cannot copy");
        }
        let mut batch = Vec::new();
        let mut to = None;
        let mut reason = "no other node takes anything";
        let mut wanted = 0;
        for target in &takers {
            if self.has_replica_at(&first, &target.node) {
                reason = EVERYWHERE;
                continue;
            }
            match self.begin(job, &first, target, now) {
                Ok(copy) => {
                    batch.push(copy);
                    to = Some(target.clone());
                    break;
                }
                Err(StoreError::NoSpace { wanted_bytes }) if wanted_bytes <= target.size => {
                    (reason, wanted) = ("no free range is large enough", first.size);
                }
                Err(StoreError::NoSpace { .. }) => {
                    reason = "no other segment is that large";
                }
                // Gone, or on its way already.
                Err(_) => return,
            }
        }
        let Some(target) = to else {
            if reason == EVERYWHERE && self.leave_to_others(job, view, &first) {
                job.report.succeeded += 1;
                job.walk.copies += 1;
                return;
            }
            return Self::blocked(job, first, wanted, reason);
        };
        let mut bytes = first.size;
        let node_of = |c: &Candidate| {
            let segment = view.get(c.from.segment as usize).and_then(Option::as_ref);
            segment.map(|s| s.node.id)
        };
        while batch.len() < BATCH_OBJECTS
            && let Some(next) = job.queue.front()
            && bytes + next.size <= BATCH_BYTES
            && node_of(next) == Some(source.id)
            && !self.has_replica_at(next, &target.node)
        {
            let Some(next) = job.queue.pop_front() else {
                break;
            };
            match self.begin(job, &next, &target, now) {
                Ok(copy) => {
                    bytes += next.size;
                    batch.push(copy);
                }
                Err(StoreError::NoSpace { .. }) => {
                    job.queue.push_front(next);
                    break;
                }
                Err(_) => {}
            }
        }
        job.walk.copies += batch.len() as u64;
        job.batches.insert(job.next_batch, batch.len());
        job.next_batch += 1;
        self.send_copies(batch);
    }

    fn begin(
        &self,
        job: &mut Job,
        c: &Candidate,
        target: &Arc<SegmentState>,
        now: Millis,
    ) -> Result<Arc<Copy>, StoreError> {
        // With what travels in the same message.
        let bytes_ms = (c.size + BATCH_BYTES) / COPY_BYTES_PER_MS;
        let expires = now.plus(COPY_PATIENCE + Duration::from_millis(bytes_ms));
        let copy = self.begin_copy(&c.key, c.hash, c.version, c.from, target, job.id, expires)?;
        job.active.insert(c.version, job.next_batch);
        Ok(copy)
    }

    /// Where every node that could take it has a replica already, those have to do.
    fn leave_to_others(&self, job: &Job, view: &SegmentsView, c: &Candidate) -> bool {
        let enough = |r: &Replica| {
            let segment = view.get(r.segment as usize).and_then(Option::as_ref);
            !job.slots.contains(&r.segment) && segment.is_some_and(|s| s.placeable())
        };
        self.drop_spare_replica(&c.key, c.hash, c.version, c.from, enough)
    }

    fn has_replica_at(&self, c: &Candidate, node: &NodeState) -> bool {
        let there = |o: &Object| o.replicas.iter().any(|r| node.slots.contains(&r.segment));
        self.peek(c.hash, &c.key, there) == Some(true)
    }

    fn blocked(job: &mut Job, c: Candidate, wanted: u64, reason: &'static str) {
        job.walk.blocked += 1;
        if footprint(wanted).is_some() {
            job.walk.wanted = job.walk.wanted.max(wanted);
        }
        if job.walk.stuck.len() < NAMED_MAX {
            job.walk.stuck.push(Stuck {
                key: c.key,
                size: c.size,
                reason,
            });
        }
    }

    pub(super) fn finish_job(&self, job: &mut Job, status: JobStatus, message: String) {
        job.report.status = status;
        job.says(message);
        job.returning = false;
        self.drains.decided(job);
        self.tell_of_jobs();
        job.queue.clear();
        job.active.clear();
        job.batches.clear();
        job.given_up.clear();
        job.attempts.clear();
        if job.leaving.is_none() {
            let drain = match status {
                JobStatus::Succeeded => DrainState::Drained,
                _ => DrainState::None,
            };
            // Also those that are not back yet.
            let view = self.segments.view();
            let own = |s: &&Arc<SegmentState>| job.incarnations.contains(&s.incarnation);
            for segment in view.iter().flatten().filter(own) {
                segment.set_drain(drain);
            }
            self.segments.changed();
        }
        let report = job.report();
        tracing::info!(
            segments = %report.segments.join(", "), status = status.name(), moved = report.succeeded,
            bytes = report.moved_bytes, blocked = report.blocked, "{}", report.message
        );
    }
}
