//! Copies objects of this node to another one when the master asks, and reports what became of each.
//!
//! An object is written as a client would write it, under the version it has: first the bytes, then - if the object is
//! still here - record and word. The master drops nothing that is being copied, so what is published is what was read.
//! Owns the bounds: messages under way, objects of one. Knows nothing of why.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use prost::Message;
use smallvec::SmallVec;
use tokio::sync::mpsc;

use super::Shared;
use crate::base::id::Id128;
use crate::base::trust::ClusterKeys;
use crate::engine::batch::{LocalSlice, Opcode, Peer, TransferRequest, Word};
use crate::engine::error::TransferError;
use crate::engine::grant::Grant;
use crate::engine::host::Segment;
use crate::engine::transport::TransportKind;
use crate::engine::{EngineConfig, TransferEngine};
use crate::store::model::header::{HEADER_BYTES, ObjectHeader};
use crate::store::model::key;
use crate::store::wire::{self, DirectoryEntry, NodeMessage, NodeNotify, node_notify};

/// Messages under way; more are answered `busy`.
const UNDER_WAY_MAX: usize = 64;
/// Objects of one message.
const ITEMS_MAX: usize = 4096;
/// Before the master stops waiting, the report is to have left.
const MARGIN: Duration = Duration::from_secs(2);

/// As a report says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Done = 0,
    NotHere = 1,
    Refused = 2,
    Busy = 3,
    Unsure = 4,
}

/// What copies of a node share.
pub(super) struct Mover {
    engine: Arc<TransferEngine>,
    under_way: AtomicUsize,
}

impl Mover {
    pub(super) fn new(node: Id128, keys: &ClusterKeys) -> Self {
        let mut config = EngineConfig::new(node, keys.clone());
        // By TCP also on this host: no memory of others is mapped, so nobody has to wait for it to be let go.
        config.transports = vec![TransportKind::Tcp];
        Self {
            engine: TransferEngine::open(config),
            under_way: AtomicUsize::new(0),
        }
    }
}

/// One object on its way.
struct Item {
    at: usize,
    memory: Arc<Segment>,
    entry: DirectoryEntry,
    header: [u8; HEADER_BYTES as usize],
    peer: Arc<Peer>,
    grant: Grant,
}

/// Begins to copy in the background; the report leaves through `out`.
pub(super) fn start(shared: &Arc<Shared>, ask: wire::Copy, out: &mpsc::Sender<NodeMessage>) {
    let (shared, out) = (shared.clone(), out.clone());
    let busy = shared.mover.under_way.fetch_add(1, Ordering::AcqRel) >= UNDER_WAY_MAX;
    tokio::task::spawn_blocking(move || {
        let outcomes = if busy || ask.items.len() > ITEMS_MAX {
            vec![Outcome::Busy; ask.items.len()]
        } else {
            copy(&shared, &ask)
        };
        shared.mover.under_way.fetch_sub(1, Ordering::AcqRel);
        let outcomes: Vec<u8> = outcomes.into_iter().map(|o| o as u8).collect();
        let report = wire::CopyReport {
            sequence: ask.sequence,
            outcomes: outcomes.into(),
        };
        let kind = Some(wire::node_message::Kind::CopyReport(report));
        // A session that has ended needs no report: the master settles what it asked for.
        let _ = out.blocking_send(NodeMessage { kind });
    });
}

fn copy(shared: &Shared, ask: &wire::Copy) -> Vec<Outcome> {
    let patience = Duration::from_millis(u64::from(ask.patience_ms));
    let deadline = Instant::now() + patience.saturating_sub(MARGIN);
    let peer = Arc::new(Peer {
        node: wire::id(ask.node_high, ask.node_low),
        name: ask.node.clone(),
        address: ask.address.clone(),
        host_id: String::new(),
        shm_socket: String::new(),
    });
    let mut outcomes = vec![Outcome::NotHere; ask.items.len()];
    let found = ask.items.iter().enumerate();
    let items: Vec<Item> = found
        .filter_map(|(at, item)| find(shared, at, item, &peer))
        .collect();
    let written = shared
        .mover
        .engine
        .transfer(&requests(&items, true), deadline);
    let mut complete = Vec::new();
    for (item, result) in items.into_iter().zip(written) {
        match result {
            Ok(()) if item.is_here() => complete.push(item),
            Ok(()) => {}
            Err(error) => outcomes[item.at] = failed(&error),
        }
    }
    let published = shared
        .mover
        .engine
        .transfer(&requests(&complete, false), deadline);
    for (item, result) in complete.iter().zip(published) {
        outcomes[item.at] = match result {
            Ok(()) => Outcome::Done,
            Err(error) => failed(&error),
        };
    }
    outcomes
}

fn failed(error: &TransferError) -> Outcome {
    tracing::debug!(%error, "an object was not copied");
    if error.is_path_failure() {
        Outcome::Unsure
    } else {
        Outcome::Refused
    }
}

fn find(shared: &Shared, at: usize, item: &wire::CopyItem, peer: &Arc<Peer>) -> Option<Item> {
    let (memory, entry) =
        shared
            .directory
            .complete_object(item.segment, item.offset, item.version)?;
    if entry.size_bytes != item.size_bytes {
        return None;
    }
    let grant = item.target.as_ref()?.grant(item.target_segment)?;
    let header = ObjectHeader {
        version: entry.version,
        length: entry.size_bytes,
        key_hash: key::hash(&entry.key),
        checksum: entry.has_checksum.then_some(entry.checksum),
    };
    Some(Item {
        at,
        memory,
        entry,
        header: header.encode(0),
        peer: peer.clone(),
        grant,
    })
}

impl Item {
    fn is_here(&self) -> bool {
        let memory = &self.memory.memory;
        memory.word_is(self.entry.offset, self.entry.version)
    }

    /// Header and payload as they are sent.
    fn bytes(&self) -> Option<SmallVec<[LocalSlice; 2]>> {
        let from = self.entry.offset + HEADER_BYTES;
        let payload = self.memory.memory.range(from, self.entry.size_bytes)?;
        let length = usize::try_from(self.entry.size_bytes).ok()?;
        // SAFETY: both live as long as `self`, which outlives the transfer, and are only read from; what others write into
        // the segment meanwhile is noticed by the word and never published.
        unsafe {
            let header = LocalSlice::new(self.header.as_ptr().cast_mut(), self.header.len());
            let payload = LocalSlice::new(payload, length);
            Some([header, payload].into_iter().collect())
        }
    }

    fn record(&self) -> Vec<u8> {
        let entry = DirectoryEntry {
            segment: self.grant.segment,
            offset: self.grant.offset,
            pending: false,
            client_high: 0,
            client_low: 0,
            ..self.entry.clone()
        };
        let kind = Some(node_notify::Kind::Record(entry));
        NodeNotify {
            kind,
            ..NodeNotify::default()
        }
        .encode_to_vec()
    }
}

/// Either the bytes of all items, or what makes them objects.
fn requests(items: &[Item], data: bool) -> Vec<TransferRequest> {
    let request = |item: &Item| TransferRequest {
        opcode: Opcode::Write,
        peer: item.peer.clone(),
        grant: item.grant,
        offset: item.grant.offset,
        length: HEADER_BYTES + item.entry.size_bytes,
        local: if data {
            item.bytes().unwrap_or_default()
        } else {
            SmallVec::new()
        },
        word: (!data).then_some(Word {
            offset: item.grant.offset,
            value: item.entry.version,
        }),
        notify: if data { Vec::new() } else { item.record() },
    };
    items.iter().map(request).collect()
}
