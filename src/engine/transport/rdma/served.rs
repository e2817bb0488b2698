//! The node's side of a lane with RDMA: joins the caller's ends, and moves the bytes of a frame.
//!
//! Decides nothing about grants, versions or notifies; those are the lane's business (`server/remote.rs`).

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use super::RdmaError;
use super::endpoint::Endpoint;
use super::fabric::Fabric;
use super::post::Rails;
use super::rail::{Direction, Job};
use super::registration::{Access, Registration};
use super::wire::{End, Piece, decode_join, encode_join};
use crate::engine::memory::Memory;

/// The rails of one lane.
pub(crate) struct ServedRails {
    fabric: Arc<Fabric>,
    rails: Rails,
}

/// One item: a range of memory that is served, and the caller's pieces.
pub(crate) struct Moved<'a> {
    pub(crate) item: usize,
    pub(crate) pointer: *mut u8,
    pub(crate) memory: &'a Ready,
    pub(crate) addressable: bool,
    pub(crate) pieces: &'a [Piece],
}

/// Memory that the devices may reach.
pub(crate) struct Ready(Arc<Registration>);

/// What became of a frame.
pub(crate) struct MovedOutcome {
    /// Bit per rail that failed.
    pub(crate) lost: u64,
    /// Items that did not arrive whole.
    pub(crate) failed: Vec<usize>,
    /// What the first failing rail said.
    pub(crate) reason: Option<String>,
}

impl ServedRails {
    /// Answers a join: the rails, if any, and the answer. `number` spreads lanes over devices.
    pub(crate) fn join(
        fabric: &Arc<Fabric>,
        memories: &[Arc<Memory>],
        request: &[u8],
        number: u64,
        until: Instant,
    ) -> (Option<Self>, Vec<u8>) {
        match Self::try_join(fabric, memories, request, number, until) {
            Ok((rails, answer)) => (Some(rails), answer),
            Err(reason) => (None, encode_join(&[], &reason)),
        }
    }

    fn try_join(
        fabric: &Arc<Fabric>,
        memories: &[Arc<Memory>],
        request: &[u8],
        number: u64,
        until: Instant,
    ) -> Result<(Self, Vec<u8>), String> {
        let (theirs, _) = decode_join(request)?;
        // Memory of devices may have its own reasons, and is asked for when it is used.
        for memory in memories.iter().filter(|m| m.device().is_none()) {
            fabric
                .served(memory, Access::Own, until)
                .map_err(|e| e.to_string())?;
        }
        let mut reason = "no port is up".to_owned();
        let mut ends = Vec::with_capacity(theirs.len());
        let mut answers = Vec::with_capacity(theirs.len());
        for (rail, their) in theirs.iter().enumerate() {
            match connect(fabric, their, rail as u64 + number) {
                Ok((end, mine)) => {
                    ends.push(Some(end));
                    answers.push(mine);
                }
                Err(error) => {
                    reason = error.to_string();
                    ends.push(None);
                    answers.push(End::default());
                }
            }
        }
        if ends.iter().all(Option::is_none) {
            return Err(reason);
        }
        let rails = Self {
            fabric: fabric.clone(),
            rails: Rails::new(ends, fabric),
        };
        Ok((rails, encode_join(&answers, "")))
    }

    /// Rails that the lane was joined with: as many keys has each piece.
    pub(crate) fn count(&self) -> usize {
        self.rails.count()
    }

    /// Memory as the devices know it.
    ///
    /// # Errors
    /// Why they do not (yet).
    pub(crate) fn ready(&self, memory: &Arc<Memory>) -> Result<Ready, RdmaError> {
        let now = Instant::now();
        self.fabric.served(memory, Access::Own, now).map(Ready)
    }

    /// Fetches (`into_ours`) or brings the bytes of a frame. When it returns, nothing of it is under way. `watch` is the
    /// lane: a caller that hangs up ends it.
    pub(crate) fn carry(
        &mut self,
        into_ours: bool,
        moved: &[Moved<'_>],
        watch: BorrowedFd<'_>,
    ) -> MovedOutcome {
        let jobs: Vec<Job<'_>> = moved
            .iter()
            .map(|m| Job {
                item: m.item,
                local: m.pointer as u64,
                memory: &m.memory.0,
                remote: m.pieces,
                addressable: m.addressable,
            })
            .collect();
        let direction = if into_ours {
            Direction::Fetch
        } else {
            Direction::Bring
        };
        let outcome = self.rails.run(direction, &jobs, watch);
        MovedOutcome {
            lost: outcome.lost,
            failed: outcome.failed.into_iter().collect(),
            reason: outcome.reason,
        }
    }
}

/// Our end of one rail: on the device of the same name, else spread over those that are up.
fn connect(fabric: &Arc<Fabric>, their: &End, number: u64) -> Result<(Endpoint, End), RdmaError> {
    let up: Vec<usize> = (0..fabric.devices.len())
        .filter(|at| fabric.devices[*at].is_up())
        .filter(|at| fabric.devices[*at].ethernet == their.ethernet)
        .collect();
    let name = their.name();
    let same = up.iter().find(|at| fabric.devices[**at].name == name);
    let spread = || up.get((number % up.len().max(1) as u64) as usize);
    let at = same.or_else(spread).ok_or_else(|| RdmaError::Device {
        device: "rdma".to_owned(),
        reason: "no port is up".to_owned(),
        code: 0,
    })?;
    let at = *at;
    let device = &fabric.devices[at];
    let attempt = || {
        let end = Endpoint::active(device, at, fabric.config.depth)?;
        let mine = end.describe(&fabric.config)?;
        end.accept(their, &fabric.config)?;
        end.start(their, &fabric.config)?;
        Ok((end, mine))
    };
    attempt().or_else(|_: RdmaError| {
        // The address may have changed since it was chosen.
        device.choose_gid()?;
        attempt()
    })
}
