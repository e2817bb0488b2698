//! Emptying segments: what lies there is moved to others, a bounded number of transfers at once.
//!
//! A job walks the index, begins copies (`copies`) and walks again until a whole walk has found nothing. It decides what
//! goes where and when it is over. What outlives the master is kept by nodes (`drain_record`). A node that leaves is a job
//! too, of what lies nowhere else, with a deadline.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::object::Replica;
use super::segments::{DrainState, NodeState, SegmentState};
use super::state::MasterState;
use crate::base::clock::{Millis, unix_ms};
use crate::base::id::Id128;
use crate::store::model::error::StoreError;

/// Jobs remembered; of those, how many may run.
pub(super) const JOBS_MAX: usize = 64;
const RUNNING_MAX: usize = 16;
/// Transfers of one job at once.
pub(crate) const CONCURRENCY_MAX: usize = 64;
/// Of a node that leaves.
const LEAVING_CONCURRENCY: usize = 8;

/// Where a job stands; numbers and names are upstream's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum JobStatus {
    Created = 0,
    Running = 2,
    Succeeded = 3,
    Failed = 4,
    Canceled = 5,
}

impl JobStatus {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Created => "CREATED",
            Self::Running => "RUNNING",
            Self::Succeeded => "SUCCEEDED",
            Self::Failed => "FAILED",
            Self::Canceled => "CANCELED",
        }
    }

    pub(crate) fn from_number(number: u32) -> Option<Self> {
        let all = [
            Self::Created,
            Self::Running,
            Self::Succeeded,
            Self::Failed,
            Self::Canceled,
        ];
        all.into_iter().find(|s| *s as u32 == number)
    }

    pub(super) fn is_over(self) -> bool {
        !matches!(self, Self::Created | Self::Running)
    }
}

/// An object that was not moved, and why.
#[derive(Clone, Debug)]
pub(crate) struct Stuck {
    pub(crate) key: Box<[u8]>,
    pub(crate) size: u64,
    pub(crate) reason: &'static str,
}

/// What is known of a job.
#[derive(Clone, Debug)]
pub(crate) struct JobReport {
    pub(crate) status: JobStatus,
    pub(crate) created_unix_ms: u64,
    pub(crate) updated_unix_ms: u64,
    pub(crate) segments: Vec<String>,
    /// Objects moved, attempts that failed, objects without a place, objects on their way.
    pub(crate) succeeded: u64,
    pub(crate) failed: u64,
    pub(crate) blocked: u64,
    pub(crate) active: u64,
    pub(crate) moved_bytes: u64,
    pub(crate) message: String,
    pub(crate) stuck: Vec<Stuck>,
}

/// An object to be moved.
pub(super) struct Candidate {
    pub(super) key: Box<[u8]>,
    pub(super) hash: u64,
    pub(super) version: u64,
    pub(super) size: u64,
    pub(super) from: Replica,
}

/// One walk over the index.
#[derive(Default)]
pub(super) struct Walk {
    pub(super) cursor: u64,
    pub(super) begun: bool,
    /// Nobody could bring anything new to the segments when it began.
    pub(super) quiet: bool,
    pub(super) remaining: u64,
    pub(super) given_up: u64,
    pub(super) blocked: u64,
    pub(super) copies: u64,
    /// Payload of the largest object without a place.
    pub(super) wanted: u64,
    pub(super) stuck: Vec<Stuck>,
}

pub(super) struct Job {
    pub(super) id: Id128,
    /// When it was decided about last; 0: nobody keeps it.
    pub(super) version: u64,
    /// Of its segments, in the order of their names.
    pub(super) incarnations: Vec<u64>,
    /// Begun by an earlier master; its segments are waited for.
    pub(super) returning: bool,
    pub(super) slots: Vec<u32>,
    pub(super) targets: Vec<String>,
    pub(super) concurrency: usize,
    /// A node that leaves, until then at most.
    pub(super) leaving: Option<Millis>,
    pub(super) report: JobReport,
    pub(super) begun: Millis,
    pub(super) queue: VecDeque<Candidate>,
    /// Copies under way by version, with the number of their batch; and how many each batch has left.
    pub(super) active: HashMap<u64, u64>,
    pub(super) batches: HashMap<u64, usize>,
    pub(super) next_batch: u64,
    /// Attempts that failed, and before when there is no other.
    pub(super) attempts: HashMap<u64, (u8, Millis)>,
    pub(super) given_up: HashSet<u64>,
    pub(super) walk: Walk,
    pub(super) idle_walks: u32,
    pub(super) not_before: Millis,
}

/// All jobs.
#[derive(Default)]
pub(crate) struct Drains {
    pub(super) jobs: Mutex<Vec<Job>>,
    running: AtomicUsize,
    pub(super) version: AtomicU64,
}

impl Drains {
    /// Whether any job is not over.
    pub(crate) fn running(&self) -> bool {
        self.running.load(Ordering::Acquire) > 0
    }

    /// How a job stands.
    pub(crate) fn report(&self, id: Id128) -> Option<JobReport> {
        let jobs = self.jobs.lock();
        jobs.iter().find(|j| j.id == id).map(Job::report)
    }

    /// Whether it has ended (or nobody knows it).
    pub(crate) fn is_over(&self, id: Id128) -> bool {
        let jobs = self.jobs.lock();
        let job = jobs.iter().find(|j| j.id == id);
        job.is_none_or(|j| j.report.status.is_over())
    }

    pub(super) fn count(&self, jobs: &[Job]) {
        let running = jobs.iter().filter(|j| !j.report.status.is_over()).count();
        self.running.store(running, Ordering::Release);
    }
}

impl Job {
    pub(super) fn new(
        id: Id128,
        incarnations: Vec<u64>,
        targets: Vec<String>,
        concurrency: usize,
        report: JobReport,
        now: Millis,
    ) -> Self {
        Self {
            id,
            version: 0,
            incarnations,
            returning: false,
            slots: Vec::new(),
            targets,
            concurrency: concurrency.clamp(1, CONCURRENCY_MAX),
            leaving: None,
            report,
            begun: now,
            queue: VecDeque::new(),
            active: HashMap::new(),
            batches: HashMap::new(),
            next_batch: 0,
            attempts: HashMap::new(),
            given_up: HashSet::new(),
            walk: Walk::default(),
            idle_walks: 0,
            not_before: now,
        }
    }

    pub(super) fn report(&self) -> JobReport {
        JobReport {
            active: self.active.len() as u64,
            ..self.report.clone()
        }
    }
}

impl MasterState {
    /// Begins to empty segments, by name; without `targets` (names of segments or nodes) everything goes wherever there is
    /// room. At most `concurrency` transfers at once, each of one object or of small ones together.
    ///
    /// # Errors
    /// Upstream's: a segment that is not there, one that is being emptied or whose node is not in service, a target that
    /// takes nothing or is among them, no segment, no concurrency; too many jobs.
    pub(crate) fn drain(
        &self,
        segments: &[String],
        targets: &[String],
        concurrency: u32,
        now: Millis,
    ) -> Result<Id128, StoreError> {
        let invalid = |what: &str| StoreError::InvalidParams {
            what: what.to_owned(),
        };
        let refused = |code: i32, reason: String| StoreError::Refused { code, reason };
        let distinct: HashSet<&String> = segments.iter().collect();
        if segments.is_empty() || distinct.len() != segments.len() || concurrency == 0 {
            return Err(invalid(
                "segments are named once each, max_concurrency is 1 or more",
            ));
        }
        let mut jobs = self.drains.jobs.lock();
        let view = self.segments.view();
        let mut chosen = Vec::new();
        for name in segments {
            let found = view.iter().flatten().find(|s| s.name == *name);
            let segment = found.ok_or(StoreError::SegmentNotFound)?;
            if !segment.placeable() {
                let state = segment.state_name(now);
                return Err(refused(-1010, format!("segment {name} is {state}")));
            }
            chosen.push(segment.clone());
        }
        for name in targets {
            let own = |s: &Arc<SegmentState>| s.name == *name || s.node.name == *name;
            let mut named = view.iter().flatten().filter(|s| own(s)).peekable();
            if named.peek().is_none() {
                return Err(StoreError::SegmentNotFound);
            }
            let takes = |s: &Arc<SegmentState>| s.placeable() && !distinct.contains(&s.name);
            if distinct.contains(name) {
                return Err(invalid("a target is among the segments to be emptied"));
            }
            if !named.any(takes) {
                return Err(refused(-1010, format!("target {name} takes nothing new")));
            }
        }
        let id = self.add_job(&mut jobs, &chosen, targets, concurrency as usize, None, now)?;
        for segment in &chosen {
            segment.set_drain(DrainState::Draining);
        }
        self.segments.changed();
        drop(jobs);
        self.close_arenas(&chosen.iter().map(|s| s.slot).collect::<Vec<_>>(), now);
        self.tell_of_jobs();
        self.nudge.give();
        Ok(id)
    }

    /// A node wants to leave: what lies only there is moved, until `until`.
    pub(crate) fn leave(&self, node: &NodeState, until: Millis, now: Millis) -> Option<Id128> {
        let mut jobs = self.drains.jobs.lock();
        let view = self.segments.view();
        let own = view.iter().flatten().filter(|s| s.node.id == node.id);
        let own: Vec<Arc<SegmentState>> = own.cloned().collect();
        let added = self.add_job(&mut jobs, &own, &[], LEAVING_CONCURRENCY, Some(until), now);
        drop(jobs);
        self.close_arenas(&node.slots, now);
        self.nudge.give();
        added.ok()
    }

    fn add_job(
        &self,
        jobs: &mut Vec<Job>,
        segments: &[Arc<SegmentState>],
        targets: &[String],
        concurrency: usize,
        leaving: Option<Millis>,
        now: Millis,
    ) -> Result<Id128, StoreError> {
        let running = jobs.iter().filter(|j| !j.report.status.is_over()).count();
        // Nodes that leave are not held up by jobs somebody asked for.
        let most = if leaving.is_some() {
            JOBS_MAX
        } else {
            RUNNING_MAX
        };
        if running >= most {
            return Err(StoreError::Refused {
                code: -1401,
                reason: format!("{running} drain jobs are running already"),
            });
        }
        if jobs.len() >= JOBS_MAX
            && let Some(oldest) = jobs.iter().position(|j| j.report.status.is_over())
        {
            jobs.remove(oldest);
        }
        let id = Id128::random();
        let unix = unix_ms();
        let report = JobReport {
            status: JobStatus::Created,
            created_unix_ms: unix,
            updated_unix_ms: unix,
            segments: segments.iter().map(|s| s.name.clone()).collect(),
            succeeded: 0,
            failed: 0,
            blocked: 0,
            active: 0,
            moved_bytes: 0,
            message: "Drain job created".to_owned(),
            stuck: Vec::new(),
        };
        let incarnations = segments.iter().map(|s| s.incarnation).collect();
        let mut job = Job::new(id, incarnations, targets.to_vec(), concurrency, report, now);
        job.slots = segments.iter().map(|s| s.slot).collect();
        job.leaving = leaving;
        self.drains.decided(&mut job);
        jobs.push(job);
        self.drains.count(jobs);
        Ok(id)
    }

    /// Ends a job: nothing more is begun, what is on its way arrives or not. Its segments take new objects again.
    ///
    /// # Errors
    /// −1402 when there is none, −1010 when it is over.
    pub(crate) fn cancel_drain(&self, id: Id128) -> Result<(), StoreError> {
        let mut jobs = self.drains.jobs.lock();
        let job = jobs.iter_mut().find(|j| j.id == id && j.leaving.is_none());
        let job = job.ok_or_else(|| StoreError::Refused {
            code: -1402,
            reason: "no such job".to_owned(),
        })?;
        if job.report.status.is_over() {
            let reason = format!("the job is {} already", job.report.status.name());
            return Err(StoreError::Refused {
                code: -1010,
                reason,
            });
        }
        self.finish_job(job, JobStatus::Canceled, "Drain job canceled".to_owned());
        self.drains.count(&jobs);
        Ok(())
    }
}
