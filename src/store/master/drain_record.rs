//! What of drain jobs outlives the master: every node keeps the table, and a new master takes the latest word on each job from
//! its nodes. A job that was not over goes on once its segments are back.
//!
//! Owns what is kept and what a new master makes of it. Segments are known by their incarnation, which is the same under every
//! master. Nodes that leave say so themselves again, and have no place here.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::drain::{Drains, JOBS_MAX, Job, JobReport, JobStatus};
use super::segments::{DrainState, NodePhase, SegmentState};
use super::state::MasterState;
use crate::base::clock::{Millis, unix_ms};
use crate::base::id::Id128;

/// How long the segments of a job may take to come back.
const RETURN: Duration = Duration::from_secs(60);
/// Segments and targets of one job, as told.
const NAMES_MAX: usize = 10_000;

/// A job as nodes keep it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeptJob {
    pub(crate) id: Id128,
    /// When this was decided: the latest word counts.
    pub(crate) version: u64,
    pub(crate) status: JobStatus,
    /// Incarnation and name.
    pub(crate) segments: Vec<(u64, String)>,
    pub(crate) targets: Vec<String>,
    pub(crate) concurrency: usize,
    pub(crate) created_unix_ms: u64,
    pub(crate) updated_unix_ms: u64,
    pub(crate) message: String,
    pub(crate) succeeded: u64,
    pub(crate) failed: u64,
    pub(crate) moved_bytes: u64,
}

impl KeptJob {
    fn of(job: &Job) -> Self {
        let report = &job.report;
        let names = report.segments.iter().cloned();
        Self {
            id: job.id,
            version: job.version,
            status: report.status,
            segments: job.incarnations.iter().copied().zip(names).collect(),
            targets: job.targets.clone(),
            concurrency: job.concurrency,
            created_unix_ms: report.created_unix_ms,
            updated_unix_ms: report.updated_unix_ms,
            message: report.message.clone(),
            succeeded: report.succeeded,
            failed: report.failed,
            moved_bytes: report.moved_bytes,
        }
    }

    fn job(self, now: Millis) -> Job {
        let (incarnations, names) = self.segments.into_iter().unzip();
        let is_over = self.status.is_over();
        let report = JobReport {
            status: if is_over {
                self.status
            } else {
                JobStatus::Created
            },
            created_unix_ms: self.created_unix_ms,
            updated_unix_ms: self.updated_unix_ms,
            segments: names,
            succeeded: self.succeeded,
            failed: self.failed,
            blocked: 0,
            active: 0,
            moved_bytes: self.moved_bytes,
            message: if is_over {
                self.message
            } else {
                "Drain job goes on under another master: its segments are waited for".to_owned()
            },
            stuck: Vec::new(),
        };
        let mut job = Job::new(
            self.id,
            incarnations,
            self.targets,
            self.concurrency,
            report,
            now,
        );
        job.version = self.version;
        job.returning = !is_over;
        job
    }
}

impl Drains {
    /// The version of the table, and every job that nodes keep.
    pub(crate) fn kept(&self) -> (u64, Vec<KeptJob>) {
        let jobs = self.jobs.lock();
        let kept = jobs.iter().filter(|j| j.leaving.is_none());
        (self.version(), kept.map(KeptJob::of).collect())
    }

    /// Increases with every decision; 0 = there never was one.
    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// A decision about a job that nodes are to keep.
    pub(super) fn decided(&self, job: &mut Job) {
        if job.leaving.is_none() {
            job.version = (self.version() + 1).max(unix_ms());
            self.version.fetch_max(job.version, Ordering::AcqRel);
        }
    }
}

impl MasterState {
    /// Tells every node of a decision.
    pub(super) fn tell_of_jobs(&self) {
        for node in self.segments.nodes() {
            node.wake();
        }
    }

    /// Adopts what is later than what is known.
    pub(crate) fn merge_jobs(&self, told: Vec<KeptJob>, now: Millis) {
        let mut changed = false;
        let mut jobs = self.drains.jobs.lock();
        for kept in told {
            if kept.segments.len() > NAMES_MAX || kept.targets.len() > NAMES_MAX {
                continue;
            }
            let known = jobs.iter().position(|j| j.id == kept.id);
            if known.is_some_and(|at| jobs[at].version >= kept.version) {
                continue;
            }
            self.drains
                .version
                .fetch_max(kept.version, Ordering::AcqRel);
            changed = true;
            match known {
                Some(at) => {
                    let job = &mut jobs[at];
                    // One that another master has begun is never later than one it has ended.
                    if kept.status.is_over() && !job.report.status.is_over() {
                        self.finish_job(job, kept.status, kept.message);
                    }
                    job.version = kept.version;
                }
                None => {
                    if jobs.len() >= JOBS_MAX {
                        let over = |j: &&mut Job| j.report.status.is_over();
                        let oldest = jobs.iter_mut().filter(over).map(|j| j.version).min();
                        // Nor is one taken in that would be the first to go.
                        let Some(oldest) = oldest.filter(|v| *v < kept.version) else {
                            continue;
                        };
                        jobs.retain(|j| j.version != oldest || !j.report.status.is_over());
                    }
                    let job = kept.job(now);
                    if job.returning {
                        let segments = job.report.segments.join(", ");
                        tracing::info!(job = %job.id, segments, "a drain job goes on");
                    }
                    jobs.push(job);
                }
            }
        }
        self.drains.count(&jobs);
        drop(jobs);
        if changed {
            self.tell_of_jobs();
        }
        self.mark_drained();
    }

    /// Segments that the latest job about them empties, or has emptied, take nothing new; those that came back, too.
    fn mark_drained(&self) {
        let jobs = self.drains.jobs.lock();
        if jobs.is_empty() {
            return;
        }
        let mut marked = false;
        for segment in self.segments.view().iter().flatten() {
            let about = |j: &&Job| j.incarnations.contains(&segment.incarnation);
            let latest = jobs.iter().filter(about).max_by_key(|j| j.version);
            let state = match latest.map(|j| j.report.status) {
                Some(JobStatus::Succeeded) => DrainState::Drained,
                Some(status) if !status.is_over() => DrainState::Draining,
                _ => continue,
            };
            if segment.drain() == DrainState::None {
                segment.set_drain(state);
                marked = true;
            }
        }
        drop(jobs);
        if marked {
            self.segments.changed();
        }
    }

    /// Whether a job's segments are back; then it goes on like a new one.
    pub(super) fn has_returned(&self, job: &mut Job, now: Millis) -> bool {
        if !job.returning {
            return true;
        }
        let view = self.segments.view();
        let back = |incarnation: &u64| {
            let is_it =
                |s: &&std::sync::Arc<SegmentState>| s.incarnation == *incarnation && s.is_back();
            view.iter().flatten().find(is_it).map(|s| s.slot)
        };
        job.slots = job.incarnations.iter().filter_map(back).collect();
        if job.slots.len() == job.incarnations.len() {
            job.returning = false;
            job.begun = now;
            self.close_arenas(&job.slots, now);
            return true;
        }
        if now.since(job.begun) > RETURN.as_millis() as u64 && !self.recovering(now) {
            let text =
                "Drain job failed: a segment did not come back after the master was restarted";
            self.finish_job(job, JobStatus::Failed, text.to_owned());
        }
        false
    }

    /// Nodes in service that keep this version or a later one, and how many there are.
    pub(crate) fn drain_keepers(&self, version: u64) -> (usize, usize) {
        let nodes = self.segments.nodes();
        let here = nodes.iter().filter(|n| n.phase() == NodePhase::Ok);
        let kept = here
            .clone()
            .filter(|n| n.drains_kept.load(Ordering::Acquire) >= version);
        (kept.count(), here.count())
    }
}

impl SegmentState {
    fn is_back(&self) -> bool {
        self.node.phase() == NodePhase::Ok
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::MasterConfig;
    use super::*;

    fn told(id: u64, version: u64, status: JobStatus) -> KeptJob {
        KeptJob {
            id: Id128 { high: 0, low: id },
            version,
            status,
            segments: vec![(77, "gone".to_owned())],
            targets: Vec::new(),
            concurrency: 4,
            created_unix_ms: 1,
            updated_unix_ms: 1,
            message: "as it was".to_owned(),
            succeeded: 5,
            failed: 0,
            moved_bytes: 500,
        }
    }

    fn state() -> MasterState {
        let config = MasterConfig {
            recovery_grace: Duration::ZERO,
            ..MasterConfig::default()
        };
        MasterState::new(config, Millis(0))
    }

    fn status(state: &MasterState, id: u64) -> JobStatus {
        let id = Id128 { high: 0, low: id };
        state.drains.report(id).unwrap().status
    }

    #[test]
    fn the_latest_word_on_a_job_counts() {
        let state = state();
        state.merge_jobs(vec![told(1, 10, JobStatus::Running)], Millis(0));
        assert_eq!(status(&state, 1), JobStatus::Created);
        assert!(state.drains.running());
        let earlier = told(1, 9, JobStatus::Canceled);
        let later = told(1, 11, JobStatus::Succeeded);
        state.merge_jobs(vec![earlier], Millis(0));
        assert_eq!(status(&state, 1), JobStatus::Created);
        state.merge_jobs(
            vec![later.clone(), told(1, 10, JobStatus::Running)],
            Millis(0),
        );
        assert_eq!(status(&state, 1), JobStatus::Succeeded);
        assert!(!state.drains.running());
        // As another master is told of it.
        let (version, jobs) = state.drains.kept();
        assert!(version >= 11);
        assert_eq!(jobs[0].version, 11);
        assert_eq!(jobs[0].segments, later.segments);
    }

    #[test]
    fn a_segment_that_does_not_come_back_fails_its_job_in_the_end() {
        let state = state();
        state.merge_jobs(vec![told(1, 10, JobStatus::Running)], Millis(0));
        let return_ms = RETURN.as_millis() as u64;
        state.drain_step(Millis(return_ms - 1));
        assert_eq!(status(&state, 1), JobStatus::Created);
        state.drain_step(Millis(return_ms + 1));
        assert_eq!(status(&state, 1), JobStatus::Failed);
        let (version, jobs) = state.drains.kept();
        assert!(jobs[0].version > 10 && version == jobs[0].version);
        assert_eq!((jobs[0].succeeded, jobs[0].moved_bytes), (5, 500));
    }

    #[test]
    fn no_more_jobs_are_remembered_than_of_ones_own() {
        let state = state();
        let jobs = (1..500).map(|n| told(n, n, JobStatus::Succeeded));
        state.merge_jobs(jobs.collect(), Millis(0));
        let (_, kept) = state.drains.kept();
        assert_eq!(kept.len(), JOBS_MAX);
        assert!(kept.iter().all(|j| j.version > 400), "the latest");
        // Those that run are not given up for others.
        let running = (1000..1100).map(|n| told(n, n, JobStatus::Running));
        state.merge_jobs(running.collect(), Millis(0));
        assert_eq!(state.drains.kept().1.len(), JOBS_MAX);
    }
}
