//! Writing an object piece by piece: its place is taken at the start, pieces follow in any order, and the end publishes
//! it. For writers that produce a block layer by layer.

use std::time::Instant;

use prost::Message;
use smallvec::SmallVec;

use super::location_cache::ReplicaRef;
use super::{Piece, PoolClient, PutOptions, PutOutcome};
use crate::engine::batch::{LocalSlice, Opcode, TransferRequest, Word};
use crate::store::model::error::StoreError;
use crate::store::model::header::{HEADER_BYTES, ObjectHeader};
use crate::store::model::key;
use crate::store::wire::{self, NodeNotify, node_notify, operation, reply};

/// An object being written. Dropped without an end it stays unreadable; the master takes its place back when the client
/// leaves or the discard time of unfinished puts is over.
pub struct PutSession {
    key: Box<[u8]>,
    qualified: Box<[u8]>,
    size: u64,
    version: u64,
    /// Replica number, place; those that failed are gone.
    replicas: SmallVec<[(usize, ReplicaRef); 1]>,
    /// Replica numbers whose last write was not answered.
    unsettled: u64,
}

impl PutSession {
    /// Bytes of the payload.
    pub fn size(&self) -> u64 {
        self.size
    }
    /// The key.
    pub fn key(&self) -> &[u8] {
        &self.key
    }

    fn request(&self, replica: &ReplicaRef, local: Option<LocalSlice>) -> TransferRequest {
        TransferRequest {
            opcode: Opcode::Write,
            peer: replica.segment.peer.clone(),
            grant: replica.grant,
            offset: replica.grant.offset,
            length: local.map_or(HEADER_BYTES + self.size, |l| l.len() as u64),
            local: local.into_iter().collect(),
            word: None,
            notify: Vec::new(),
        }
    }
}

impl PoolClient {
    /// Takes places for objects of the given sizes; `Exists` for a key that is there already.
    pub fn put_sessions(
        &self,
        items: &[(&[u8], u64)],
        options: &PutOptions,
    ) -> Vec<Result<PutSession, StoreError>> {
        let deadline = self.deadline();
        let mut outcomes: Vec<Result<PutSession, StoreError>> = Vec::with_capacity(items.len());
        for (key, size) in items {
            outcomes.push(
                match self.put_sessions_started(key, *size, options, deadline) {
                    Ok(session) => self.record(session, options, deadline),
                    Err(error) => Err(error),
                },
            );
        }
        outcomes
    }

    fn put_sessions_started(
        &self,
        key: &[u8],
        size: u64,
        options: &PutOptions,
        deadline: Instant,
    ) -> Result<PutSession, StoreError> {
        let mut qualified = Vec::with_capacity(key.len() + 1);
        key::qualify(&self.config.tenant, key, &mut qualified)?;
        if size == 0 {
            return Err(StoreError::InvalidParams {
                what: "an object has at least 1 byte".to_owned(),
            });
        }
        let start = operation::Kind::PutStart(wire::PutStart {
            tenant: self.config.tenant.clone(),
            config: Some(self.wire_config(options)),
            upsert: options.upsert,
            if_version: 0,
            items: vec![wire::PutItem {
                key: bytes::Bytes::copy_from_slice(key),
                size_bytes: size,
                group: String::new(),
            }],
        });
        let reply::Kind::PutStart(started) = self.control.ask(start, deadline)? else {
            return Err(self.control.surprise());
        };
        let slot = started
            .slots
            .first()
            .ok_or_else(|| self.control.surprise())?;
        if slot.code != 0 {
            return Err(self.explain(slot.code, size, deadline));
        }
        self.refresh_view(deadline)?;
        let view = self.view();
        let replicas = slot.replicas.iter().enumerate().filter_map(|(number, r)| {
            let segment = view.get(r.segment, r.incarnation)?.clone();
            let grant = r.grant(segment.node_segment)?;
            Some((number, ReplicaRef { segment, grant }))
        });
        Ok(PutSession {
            key: key.into(),
            qualified: qualified.into_boxed_slice(),
            size,
            version: slot.version,
            replicas: replicas.collect(),
            unsettled: 0,
        })
    }

    /// Tells the nodes whose range it is, before any byte goes there.
    fn record(
        &self,
        mut session: PutSession,
        options: &PutOptions,
        deadline: Instant,
    ) -> Result<PutSession, StoreError> {
        let requests: Vec<TransferRequest> = session
            .replicas
            .iter()
            .map(|(_, replica)| {
                let entry = wire::DirectoryEntry {
                    key: bytes::Bytes::copy_from_slice(&session.qualified),
                    segment: replica.grant.segment,
                    offset: replica.grant.offset,
                    size_bytes: session.size,
                    version: session.version,
                    hard_pin: options.hard_pin,
                    soft_pin_ttl_ms: options.soft_pin_ttl_ms,
                    group: options.group.clone(),
                    data_type: u32::from(options.data_type),
                    replicas_wanted: options.replicas_told(),
                    ..wire::DirectoryEntry::default()
                };
                let notify = NodeNotify {
                    kind: Some(node_notify::Kind::Record(entry)),
                    traceparent: crate::base::trace::traceparent(),
                    commit_arena: 0,
                };
                TransferRequest {
                    notify: notify.encode_to_vec(),
                    ..session.request(replica, None)
                }
            })
            .collect();
        self.write_all(&mut session, &requests, 1, deadline);
        if session.replicas.is_empty() {
            self.end_sessions(vec![session]);
            return Err(StoreError::TransferFailed {
                attempts: "no node took the place".to_owned(),
            });
        }
        Ok(session)
    }

    /// Writes requests, `each` per replica in order; replicas that fail are dropped from the session.
    fn write_all(
        &self,
        session: &mut PutSession,
        requests: &[TransferRequest],
        each: usize,
        deadline: Instant,
    ) {
        let results = self.engine.transfer(requests, deadline);
        let mut results = results.chunks(each.max(1));
        let mut unsettled = session.unsettled;
        session.replicas.retain(|(number, replica)| {
            let mut own = results.next().unwrap_or_default().iter();
            let Some(error) = own.find_map(|r| r.as_ref().err()) else {
                return true;
            };
            if error.is_path_failure() {
                unsettled |= 1 << *number;
                self.report(&replica.segment, &error.to_string());
            }
            false
        });
        session.unsettled = unsettled;
    }

    /// Writes pieces of an object's payload.
    ///
    /// # Errors
    /// `InvalidParams` for a piece outside of the object; `TransferFailed` when no replica is left.
    pub fn put_pieces(
        &self,
        session: &mut PutSession,
        pieces: &[Piece],
    ) -> Result<u64, StoreError> {
        let mut total = 0;
        for piece in pieces {
            let length = piece.target.len() as u64;
            if piece
                .offset
                .checked_add(length)
                .is_none_or(|end| end > session.size)
            {
                return Err(StoreError::InvalidParams {
                    what: format!(
                        "{length} bytes from {} on do not lie in an object of {} bytes",
                        piece.offset, session.size
                    ),
                });
            }
            total += length;
        }
        let wanted: Vec<&Piece> = pieces.iter().filter(|p| !p.target.is_empty()).collect();
        let mut requests = Vec::with_capacity(wanted.len() * session.replicas.len());
        for (_, replica) in &session.replicas {
            requests.extend(wanted.iter().map(|p| TransferRequest {
                offset: replica.grant.offset + HEADER_BYTES + p.offset,
                ..session.request(replica, Some(p.target))
            }));
        }
        let deadline = self.deadline();
        self.write_all(session, &requests, wanted.len(), deadline);
        if session.replicas.is_empty() {
            return Err(StoreError::TransferFailed {
                attempts: "no replica is left".to_owned(),
            });
        }
        Ok(total)
    }

    /// Publishes objects: one outcome per session, in order.
    pub fn end_sessions(&self, sessions: Vec<PutSession>) -> Vec<Result<PutOutcome, StoreError>> {
        let deadline = self.deadline();
        let mut finishes = Vec::with_capacity(sessions.len());
        for mut session in sessions {
            // Version 0: the word is published after the rest of the header.
            let header = ObjectHeader {
                version: 0,
                length: session.size,
                key_hash: key::hash(&session.qualified),
                checksum: None,
            }
            .encode(0);
            // SAFETY: only read from, and `header` outlives the transfer.
            let head = unsafe { LocalSlice::new(header.as_ptr().cast_mut(), header.len()) };
            let requests: Vec<TransferRequest> = session
                .replicas
                .iter()
                .map(|(_, replica)| TransferRequest {
                    word: Some(Word {
                        offset: replica.grant.offset,
                        value: session.version,
                    }),
                    ..session.request(replica, Some(head))
                })
                .collect();
            self.write_all(&mut session, &requests, 1, deadline);
            let written = session.replicas.iter().fold(0, |w, (n, _)| w | 1 << n);
            finishes.push((session, written));
        }
        let items = finishes.iter().map(|(session, written)| wire::PutFinish {
            version: session.version,
            checksum: 0,
            has_checksum: false,
            written: *written,
            unsettled: session.unsettled,
        });
        let end = operation::Kind::PutEnd(wire::PutEnd {
            items: items.collect(),
        });
        let codes = match self.control.ask(end, deadline) {
            Ok(reply::Kind::Codes(codes)) => codes.codes,
            Ok(_) => vec![self.control.surprise().code(); finishes.len()],
            Err(error) => return finishes.iter().map(|_| Err(error.clone())).collect(),
        };
        let outcome = |((session, written), code): ((PutSession, u64), i32)| match code {
            0 if written != 0 => Ok(PutOutcome::Stored {
                replicas: written.count_ones(),
            }),
            c if c == StoreError::Exists.code() => Ok(PutOutcome::Existed),
            _ if written != 0 && self.committed(&session.key, session.version, deadline) => {
                Ok(PutOutcome::Stored {
                    replicas: written.count_ones(),
                })
            }
            0 => Err(StoreError::TransferFailed {
                attempts: "no replica is left".to_owned(),
            }),
            c => Err(StoreError::from_code(c)),
        };
        finishes.into_iter().zip(codes).map(outcome).collect()
    }

    /// Gives the places of unfinished objects back.
    ///
    /// # Errors
    /// Master unreachable: it takes them back by itself later.
    pub fn revoke_sessions(&self, sessions: &[PutSession]) -> Result<(), StoreError> {
        let deadline = self.deadline();
        for unsettled in [false, true] {
            let versions: Vec<u64> = sessions
                .iter()
                .filter(|s| (s.unsettled != 0) == unsettled)
                .map(|s| s.version)
                .collect();
            if !versions.is_empty() {
                let revoke = wire::PutRevoke {
                    versions,
                    unsettled,
                };
                self.control
                    .ask(operation::Kind::PutRevoke(revoke), deadline)?;
            }
        }
        Ok(())
    }
}
