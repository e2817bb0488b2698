//! Reading parts of objects: several pieces of many objects in one batch, for readers that go layer by layer.

use std::sync::Arc;
use std::time::Instant;

use super::PoolClient;
use super::location_cache::Location;
use crate::engine::batch::{LocalSlice, Opcode, TransferRequest, Word};
use crate::store::model::error::StoreError;
use crate::store::model::header::HEADER_BYTES;
use crate::store::model::key;

/// A piece of an object's payload and where it goes.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// First byte within the payload.
    pub offset: u64,
    /// Where its bytes go; the length of the piece is the length of the slice.
    pub target: LocalSlice,
}

/// Pieces of one object.
pub struct RangesRequest<'a> {
    /// The key.
    pub key: &'a [u8],
    /// Wanted pieces, in any order.
    pub pieces: &'a [Piece],
    /// The version they must be of; `None` = whatever is there (all pieces of one call are of one version).
    pub version: Option<u64>,
}

impl PoolClient {
    /// Version and size of objects, with a lease each.
    pub fn versions(&self, keys: &[&[u8]]) -> Vec<Result<(u64, u64), StoreError>> {
        let located = self.locate_all(keys, self.deadline());
        let found = located.into_iter();
        found.map(|l| l.map(|l| (l.version, l.size))).collect()
    }

    /// Reads pieces of objects: bytes read per object, in order. Pieces are not covered by the object's checksum.
    pub fn get_ranges(&self, requests: &[RangesRequest<'_>]) -> Vec<Result<u64, StoreError>> {
        let deadline = self.deadline();
        let mut outcomes: Vec<Option<Result<u64, StoreError>>> = vec![None; requests.len()];
        // Twice: a location that was remembered may be of an object that has moved.
        for attempt in 0..2 {
            let open: Vec<usize> = (0..requests.len())
                .filter(|i| outcomes[*i].is_none())
                .collect();
            if open.is_empty() {
                break;
            }
            let keys: Vec<&[u8]> = open.iter().map(|i| requests[*i].key).collect();
            let located = self.locate_all(&keys, deadline);
            for (index, location) in open.into_iter().zip(located) {
                let request = &requests[index];
                let result = location.and_then(|l| self.read_pieces(request, &l, deadline));
                match result {
                    Err(StoreError::NotFound) if attempt == 0 => self.forget(request.key),
                    other => outcomes[index] = Some(other),
                }
            }
        }
        let outcomes = outcomes.into_iter();
        outcomes
            .map(|o| o.unwrap_or(Err(StoreError::NotFound)))
            .collect()
    }

    fn forget(&self, key: &[u8]) {
        let mut qualified = Vec::new();
        if key::qualify(&self.config.tenant, key, &mut qualified).is_ok() {
            self.locations.forget(key::hash(&qualified), &qualified);
        }
    }

    fn read_pieces(
        &self,
        request: &RangesRequest<'_>,
        location: &Arc<Location>,
        deadline: Instant,
    ) -> Result<u64, StoreError> {
        if request.version.is_some_and(|v| v != location.version) {
            return Err(StoreError::NotFound);
        }
        let mut total = 0;
        for piece in request.pieces {
            let length = piece.target.len() as u64;
            if piece
                .offset
                .checked_add(length)
                .is_none_or(|end| end > location.size)
            {
                return Err(StoreError::InvalidParams {
                    what: format!(
                        "{length} bytes from {} on do not lie in an object of {} bytes",
                        piece.offset, location.size
                    ),
                });
            }
            total += length;
        }
        let mut attempts = Vec::new();
        let mut changed = false;
        for replica in &location.replicas {
            let at = replica.grant.offset;
            let word = Some(Word {
                offset: at,
                value: location.version,
            });
            let wanted: Vec<TransferRequest> = request
                .pieces
                .iter()
                .filter(|p| !p.target.is_empty())
                .map(|p| TransferRequest {
                    opcode: Opcode::Read,
                    peer: replica.segment.peer.clone(),
                    grant: replica.grant,
                    offset: at + HEADER_BYTES + p.offset,
                    length: p.target.len() as u64,
                    local: [p.target].into_iter().collect(),
                    word,
                    notify: Vec::new(),
                })
                .collect();
            let limit = deadline.min(Instant::now() + self.config.transfer_timeout);
            let results = self.engine.transfer(&wanted, limit);
            let Some(error) = results.into_iter().find_map(Result::err) else {
                return Ok(total);
            };
            if error.is_path_failure() {
                self.report(&replica.segment, &error.to_string());
            } else {
                changed = true;
            }
            attempts.push(format!("{}: {error}", replica.segment.name));
        }
        if changed {
            return Err(StoreError::NotFound);
        }
        Err(StoreError::TransferFailed {
            attempts: attempts.join("; "),
        })
    }
}
