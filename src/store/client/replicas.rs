//! Where an object's replicas lie, changed afterwards: copies on further segments, moves, single replicas given up.
//!
//! The object is read and put anew under a new version with its replicas where they are wanted; it takes the place of the
//! version that was read, or of nothing: a put or a removal in between wins. Knows nothing of tasks.

use super::{Piece, PoolClient, PutOptions, PutOutcome, PutRequest, RangesRequest};
use crate::engine::batch::LocalSlice;
use crate::store::model::error::StoreError;
use crate::store::wire::Description;

impl PoolClient {
    /// Adds replicas of an object on segments (or nodes), by name. Those that have one already are left.
    ///
    /// # Errors
    /// `NotFound`, `SegmentNotFound` for a name, `NoSpace` when a target took none, `Exists` when the object was replaced
    /// meanwhile; from the transfer.
    pub fn copy_replicas(&self, key: &[u8], targets: &[String]) -> Result<(), StoreError> {
        let about = self.stat(key)?;
        let mut wanted = places(&about);
        for target in targets {
            if !holds(&about, target) {
                wanted.push(target.clone());
            }
        }
        if wanted.len() == about.replicas.len() {
            return Ok(());
        }
        self.known(targets)?;
        self.place_anew(key, &about, wanted)
    }

    /// Moves the replica on one segment to another.
    ///
    /// # Errors
    /// As [`PoolClient::copy_replicas`]; `ReplicaNotFound` when there is none on `source`.
    pub fn move_replica(&self, key: &[u8], source: &str, target: &str) -> Result<(), StoreError> {
        let about = self.stat(key)?;
        if !holds(&about, source) {
            return Err(StoreError::from_code(REPLICA_NOT_FOUND));
        }
        let target = target.to_owned();
        self.known(std::slice::from_ref(&target))?;
        let mut wanted = remaining(&about, source);
        if !holds(&about, &target) {
            wanted.push(target);
        }
        self.place_anew(key, &about, wanted)
    }

    /// Gives up the replica on one segment; the object goes when that was its last.
    ///
    /// # Errors
    /// As [`PoolClient::move_replica`]; `Leased` while the object is read.
    pub fn clear_replica(&self, key: &[u8], segment: &str) -> Result<(), StoreError> {
        let about = self.stat(key)?;
        if !holds(&about, segment) {
            return Err(StoreError::from_code(REPLICA_NOT_FOUND));
        }
        if about.lease_left_ms > 0 {
            return Err(StoreError::Leased);
        }
        let wanted = remaining(&about, segment);
        if wanted.is_empty() {
            let mut removed = self.remove(&[key], false)?;
            return removed.pop().unwrap_or(Err(StoreError::NotFound));
        }
        self.place_anew(key, &about, wanted)
    }

    fn known(&self, names: &[String]) -> Result<(), StoreError> {
        let segments = self.segments()?;
        let known = |n: &String| segments.iter().any(|s| s.name == *n || s.node == *n);
        if names.iter().all(known) {
            Ok(())
        } else {
            Err(StoreError::SegmentNotFound)
        }
    }

    fn place_anew(
        &self,
        key: &[u8],
        about: &Description,
        wanted: Vec<String>,
    ) -> Result<(), StoreError> {
        let size = usize::try_from(about.size_bytes).map_err(|_| StoreError::NotFound)?;
        let mut bytes = vec![0u8; size];
        // SAFETY: `bytes` outlives the calls below and is not touched meanwhile.
        let slice = unsafe { LocalSlice::new(bytes.as_mut_ptr(), size) };
        let piece = Piece {
            offset: 0,
            target: slice,
        };
        let read = self.get_ranges(&[RangesRequest {
            key,
            pieces: &[piece],
            version: Some(about.version),
        }]);
        read.into_iter()
            .next()
            .unwrap_or(Err(StoreError::NotFound))?;
        let count = wanted.len();
        let options = PutOptions {
            replicas: count as u32,
            soft_pin_ttl_ms: about.soft_pin_left_ms,
            hard_pin: about.hard_pin,
            preferred_segments: wanted.clone(),
            group: about.group.clone(),
            data_type: about.data_type as u8,
            upsert: true,
            if_version: about.version,
        };
        let put = self.put(&[PutRequest::new(key, &[slice])], &options);
        match put.into_iter().next() {
            Some(Ok(PutOutcome::Stored { .. })) => {}
            Some(Ok(PutOutcome::Existed)) => return Err(StoreError::Exists),
            Some(Err(error)) => return Err(error),
            None => return Err(StoreError::NotFound),
        }
        // Placement prefers what it was told; whether every target had room shows here.
        let now = self.stat(key)?;
        if wanted.iter().all(|name| holds(&now, name)) {
            Ok(())
        } else {
            Err(StoreError::NoSpace {
                wanted_bytes: about.size_bytes,
            })
        }
    }
}

/// Upstream's `REPLICA_NOT_FOUND`.
const REPLICA_NOT_FOUND: i32 = -710;

fn places(about: &Description) -> Vec<String> {
    let names = about.replicas.iter().map(|r| r.segment_name.clone());
    names.collect()
}

fn holds(about: &Description, name: &str) -> bool {
    let named = |r: &crate::store::wire::ReplicaState| r.segment_name == name || r.node == name;
    about.replicas.iter().any(named)
}

fn remaining(about: &Description, without: &str) -> Vec<String> {
    let others = about.replicas.iter();
    others
        .filter(|r| r.segment_name != without && r.node != without)
        .map(|r| r.segment_name.clone())
        .collect()
}
