//! The data lane's frames: pure encoding and decoding (byte tables in docs/formats.md).
//!
//! Knows bytes only: no sockets, no memory. Everything here must survive any input; the fuzz target drives it.

use std::sync::Arc;

use super::rdma;
use crate::base::id::Id128;
use crate::base::trust::MAC_BYTES;
use crate::engine::batch::{TransferRequest, Word};
use crate::engine::error::TransferError;
use crate::engine::grant::Grant;
use crate::engine::host::Segment;

/// First two bytes of every frame, "MK".
pub(crate) const FRAME_MAGIC: u16 = 0x4B4D;
/// Length of request and reply headers.
pub(crate) const HEADER_BYTES: usize = 32;
/// Length of one item of a request.
pub(crate) const ITEM_BYTES: usize = 104;
/// Most items of one request.
pub(crate) const ITEMS_MAX: usize = 1024;
/// Most bytes of items and notifies of one request.
pub(crate) const META_BYTES_MAX: usize = 8 << 20;
/// Most bytes a ping carries.
pub(crate) const PING_BYTES_MAX: u64 = 1 << 20;
/// Most bytes of one notify.
pub(crate) const NOTIFY_BYTES_MAX: usize = 64 << 10;

const FLAG_DATA: u32 = 1;
const FLAG_WORD: u32 = 2;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Copy out.
    Read = 1,
    /// Copy in, notify, publish.
    Write = 2,
    /// Nothing; answers. A payload is read and forgotten.
    Ping = 3,
    /// Hand over a segment's memory (Unix sockets only): item 0 names it.
    Attach = 4,
    /// List the registered segments with their addresses.
    Describe = 5,
    /// Bring up queue pairs for this lane: the payload names the caller's ends.
    Join = 6,
    /// A write whose bytes the node fetches by RDMA from the pieces that the payload names.
    Fetch = 7,
    /// A read whose bytes the node brings by RDMA.
    Bring = 8,
}

impl Operation {
    fn from_u8(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Read,
            2 => Self::Write,
            3 => Self::Ping,
            4 => Self::Attach,
            5 => Self::Describe,
            6 => Self::Join,
            7 => Self::Fetch,
            8 => Self::Bring,
            _ => return None,
        })
    }
}

/// Outcome of one item on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    Ok = 0,
    Stale = 1,
    GrantRefused = 2,
    OutOfBounds = 3,
    Changed = 4,
    NotifyRefused = 5,
    Malformed = 6,
    /// The bytes could not be moved this way; another one may do.
    PathFailed = 7,
    Existed = 8,
}

impl Status {
    /// For the wire.
    pub(crate) fn from_error(error: &TransferError) -> Self {
        match error {
            TransferError::Stale => Self::Stale,
            TransferError::GrantRefused => Self::GrantRefused,
            TransferError::OutOfBounds => Self::OutOfBounds,
            TransferError::Changed => Self::Changed,
            TransferError::NotifyRefused => Self::NotifyRefused,
            TransferError::Existed => Self::Existed,
            error if error.is_path_failure() => Self::PathFailed,
            _ => Self::Malformed,
        }
    }

    /// From the wire.
    pub(crate) fn result(byte: u8, peer: &str) -> Result<(), TransferError> {
        Err(match byte {
            0 => return Ok(()),
            1 => TransferError::Stale,
            2 => TransferError::GrantRefused,
            3 => TransferError::OutOfBounds,
            4 => TransferError::Changed,
            5 => TransferError::NotifyRefused,
            6 => TransferError::Invalid {
                what: "the peer found the frame malformed",
            },
            7 => TransferError::Broken {
                peer: peer.to_owned(),
                reason: "the bytes could not be moved this way".to_owned(),
            },
            8 => TransferError::Existed,
            _ => TransferError::Protocol {
                peer: peer.to_owned(),
                what: "unknown status",
            },
        })
    }
}

/// A decoded request header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestHeader {
    pub(crate) operation: Operation,
    pub(crate) items: usize,
    pub(crate) meta_bytes: usize,
    pub(crate) payload_bytes: u64,
    pub(crate) id: u64,
}

/// A decoded item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Item {
    pub(crate) grant: Grant,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) word: Option<Word>,
    pub(crate) has_data: bool,
    pub(crate) notify_bytes: usize,
}

/// A decoded reply header; `items` status bytes follow, then the payload, then (reads) `items` status bytes again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReplyHeader {
    pub(crate) status: u8,
    pub(crate) items: usize,
    pub(crate) payload_bytes: u64,
    pub(crate) id: u64,
}

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}
fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}
fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}

/// Most bytes of a description.
pub(crate) const DESCRIPTION_BYTES_MAX: u64 = 64 << 20;
const REGION_BYTES: usize = 32;

/// A segment as a peer sees it that names memory by address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) segment: u32,
    pub(crate) incarnation: u64,
    /// In the peer's address space.
    pub(crate) address: u64,
    pub(crate) length: u64,
}

/// A node's identity and its regions.
pub(crate) fn encode_description(node: Id128, about: &str, segments: &[Arc<Segment>]) -> Vec<u8> {
    let about = &about.as_bytes()[..about.len().min(ABOUT_BYTES_MAX)];
    let mut out = Vec::with_capacity(24 + about.len() + segments.len() * REGION_BYTES);
    out.extend_from_slice(&node.high.to_le_bytes());
    out.extend_from_slice(&node.low.to_le_bytes());
    out.extend_from_slice(&(about.len() as u64).to_le_bytes());
    out.extend_from_slice(about);
    for s in segments.iter().filter(|s| !s.memory.is_empty()) {
        out.extend_from_slice(&u64::from(s.index).to_le_bytes());
        out.extend_from_slice(&s.incarnation.to_le_bytes());
        out.extend_from_slice(&(s.memory.as_ptr() as u64).to_le_bytes());
        out.extend_from_slice(&(s.memory.len() as u64).to_le_bytes());
    }
    out
}

/// Longest text a peer says of itself.
const ABOUT_BYTES_MAX: usize = 1024;

/// What a peer says of itself: who it is, a text (a node: its master), its regions.
#[derive(Debug)]
pub(crate) struct Description {
    pub(crate) node: Id128,
    pub(crate) about: String,
    pub(crate) regions: Vec<Region>,
}

/// The other direction.
pub(crate) fn decode_description(bytes: &[u8]) -> Result<Description, &'static str> {
    let wrong = "length of the description";
    if bytes.len() < 24 {
        return Err(wrong);
    }
    let node = Id128 {
        high: u64_at(bytes, 0),
        low: u64_at(bytes, 8),
    };
    let length = usize::try_from(u64_at(bytes, 16)).map_err(|_| wrong)?;
    let (about, rest) = bytes[24..].split_at_checked(length).ok_or(wrong)?;
    if !rest.len().is_multiple_of(REGION_BYTES) || length > ABOUT_BYTES_MAX {
        return Err(wrong);
    }
    let about = String::from_utf8_lossy(about).into_owned();
    let regions = rest.chunks_exact(REGION_BYTES).map(|b| Region {
        segment: u32_at(b, 0),
        incarnation: u64_at(b, 8),
        address: u64_at(b, 16),
        length: u64_at(b, 24),
    });
    Ok(Description {
        node,
        about,
        regions: regions.collect(),
    })
}

/// Appends a request frame without its payload.
pub(crate) fn encode_request(
    out: &mut Vec<u8>,
    operation: Operation,
    id: u64,
    requests: &[TransferRequest],
    with_data: bool,
    with_word: bool,
) {
    let payload: u64 = if operation == Operation::Write && with_data {
        requests
            .iter()
            .filter(|r| r.has_data())
            .map(|r| r.length)
            .sum()
    } else {
        0
    };
    let notifies: usize = requests.iter().map(|r| r.notify.len()).sum();
    let meta = requests.len() * ITEM_BYTES + notifies;
    encode_header(out, operation, requests.len(), meta, payload, id);
    for r in requests {
        encode_item(out, r, with_data, with_word);
    }
    for r in requests {
        out.extend_from_slice(&r.notify);
    }
}

/// Appends a request frame whose bytes go by RDMA: its payload names the caller's memory.
#[cfg(feature = "rdma")]
pub(crate) fn encode_remote(
    out: &mut Vec<u8>,
    operation: Operation,
    id: u64,
    requests: &[&TransferRequest],
    pieces: &[u8],
) {
    let notifies: usize = requests.iter().map(|r| r.notify.len()).sum();
    let meta = requests.len() * ITEM_BYTES + notifies;
    let payload = pieces.len() as u64;
    out.reserve(HEADER_BYTES + meta + pieces.len());
    encode_header(out, operation, requests.len(), meta, payload, id);
    for r in requests {
        encode_item(out, r, true, true);
    }
    for r in requests {
        out.extend_from_slice(&r.notify);
    }
    out.extend_from_slice(pieces);
}

/// Appends a request header.
pub(crate) fn encode_header(
    out: &mut Vec<u8>,
    operation: Operation,
    items: usize,
    meta: usize,
    payload: u64,
    id: u64,
) {
    out.extend_from_slice(&FRAME_MAGIC.to_le_bytes());
    out.extend_from_slice(&[operation as u8, 0]);
    out.extend_from_slice(&(items as u32).to_le_bytes());
    out.extend_from_slice(&(meta as u32).to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&payload.to_le_bytes());
    out.extend_from_slice(&id.to_le_bytes());
}

fn encode_item(out: &mut Vec<u8>, r: &TransferRequest, with_data: bool, with_word: bool) {
    let word = r.word.filter(|_| with_word);
    let mut flags = 0;
    if r.has_data() && with_data {
        flags |= FLAG_DATA;
    }
    if word.is_some() {
        flags |= FLAG_WORD;
    }
    let g = &r.grant;
    let mut item = [0u8; ITEM_BYTES];
    item[0..4].copy_from_slice(&g.segment.to_le_bytes());
    item[4..8].copy_from_slice(&flags.to_le_bytes());
    item[8..16].copy_from_slice(&g.incarnation.to_le_bytes());
    item[16..24].copy_from_slice(&g.offset.to_le_bytes());
    item[24..32].copy_from_slice(&g.length.to_le_bytes());
    item[32..40].copy_from_slice(&g.term.to_le_bytes());
    item[40..48].copy_from_slice(&g.expires_unix_ms.to_le_bytes());
    item[48..64].copy_from_slice(&g.mac);
    item[64..72].copy_from_slice(&r.offset.to_le_bytes());
    item[72..80].copy_from_slice(&r.length.to_le_bytes());
    if let Some(w) = word {
        item[80..88].copy_from_slice(&w.offset.to_le_bytes());
        item[88..96].copy_from_slice(&w.value.to_le_bytes());
    }
    item[96..100].copy_from_slice(&(r.notify.len() as u32).to_le_bytes());
    out.extend_from_slice(&item);
}

/// Decodes a request header and checks every length against its bound.
pub(crate) fn decode_request(bytes: &[u8; HEADER_BYTES]) -> Result<RequestHeader, &'static str> {
    if u16_at(bytes, 0) != FRAME_MAGIC {
        return Err("frame magic");
    }
    let operation = Operation::from_u8(bytes[2]).ok_or("operation")?;
    let header = RequestHeader {
        operation,
        items: u32_at(bytes, 4) as usize,
        meta_bytes: u32_at(bytes, 8) as usize,
        payload_bytes: u64_at(bytes, 16),
        id: u64_at(bytes, 24),
    };
    if header.items > ITEMS_MAX {
        return Err("too many items");
    }
    if header.meta_bytes > META_BYTES_MAX || header.meta_bytes < header.items * ITEM_BYTES {
        return Err("length of items");
    }
    let most = match operation {
        Operation::Write => u64::MAX,
        Operation::Ping => PING_BYTES_MAX,
        Operation::Join => rdma::wire::JOIN_BYTES_MAX,
        Operation::Fetch | Operation::Bring => rdma::wire::PIECES_BYTES_MAX,
        _ => 0,
    };
    if header.payload_bytes > most {
        return Err("payload on an operation without one");
    }
    Ok(header)
}

/// Decodes the items of a request; the notifies follow them, in order, in the rest of `meta`.
pub(crate) fn decode_items(
    header: &RequestHeader,
    meta: &[u8],
    items: &mut Vec<Item>,
) -> Result<(), &'static str> {
    items.clear();
    let mut notifies = 0usize;
    let mut payload = 0u64;
    for at in 0..header.items {
        let b = meta
            .get(at * ITEM_BYTES..(at + 1) * ITEM_BYTES)
            .ok_or("length of items")?;
        let mut mac = [0; MAC_BYTES];
        mac.copy_from_slice(&b[48..64]);
        let flags = u32_at(b, 4);
        let item = Item {
            grant: Grant {
                segment: u32_at(b, 0),
                incarnation: u64_at(b, 8),
                offset: u64_at(b, 16),
                length: u64_at(b, 24),
                term: u64_at(b, 32),
                expires_unix_ms: u64_at(b, 40),
                mac,
            },
            offset: u64_at(b, 64),
            length: u64_at(b, 72),
            word: (flags & FLAG_WORD != 0).then(|| Word {
                offset: u64_at(b, 80),
                value: u64_at(b, 88),
            }),
            has_data: flags & FLAG_DATA != 0,
            notify_bytes: u32_at(b, 96) as usize,
        };
        if item.notify_bytes > NOTIFY_BYTES_MAX {
            return Err("length of a notify");
        }
        notifies += item.notify_bytes;
        if item.has_data && header.operation == Operation::Write {
            payload = payload.checked_add(item.length).ok_or("payload length")?;
        }
        items.push(item);
    }
    if header.items * ITEM_BYTES + notifies != meta.len() {
        return Err("length of notifies");
    }
    let counted = matches!(
        header.operation,
        Operation::Read | Operation::Write | Operation::Attach | Operation::Describe
    );
    if counted && payload != header.payload_bytes {
        return Err("payload length");
    }
    Ok(())
}

/// Encodes a reply header.
pub(crate) fn encode_reply(out: &mut Vec<u8>, status: Status, items: usize, payload: u64, id: u64) {
    out.extend_from_slice(&FRAME_MAGIC.to_le_bytes());
    out.extend_from_slice(&[0x80, status as u8]);
    out.extend_from_slice(&(items as u32).to_le_bytes());
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(&payload.to_le_bytes());
    out.extend_from_slice(&id.to_le_bytes());
}

/// Decodes a reply header.
pub(crate) fn decode_reply(bytes: &[u8; HEADER_BYTES]) -> Result<ReplyHeader, &'static str> {
    if u16_at(bytes, 0) != FRAME_MAGIC || bytes[2] != 0x80 {
        return Err("reply magic");
    }
    let header = ReplyHeader {
        status: bytes[3],
        items: u32_at(bytes, 4) as usize,
        payload_bytes: u64_at(bytes, 16),
        id: u64_at(bytes, 24),
    };
    if header.items > ITEMS_MAX {
        return Err("too many items");
    }
    Ok(header)
}

/// Drives every decoder with arbitrary bytes; for the fuzz target and its corpus test.
#[doc(hidden)]
pub fn fuzz(bytes: &[u8]) {
    rdma::wire::fuzz(bytes);
    let Some((head, meta)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return;
    };
    let _ = decode_reply(head);
    if let Ok(header) = decode_request(head) {
        let mut items = Vec::new();
        if decode_items(&header, meta, &mut items).is_ok() {
            assert_eq!(items.len(), header.items);
            assert!(meta.len() >= items.len() * ITEM_BYTES);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::id::Id128;
    use crate::engine::batch::{LocalSlice, Opcode, Peer};
    use proptest::prelude::*;
    use smallvec::smallvec;
    use std::sync::Arc;

    fn request(notify: Vec<u8>) -> TransferRequest {
        let peer = Peer {
            node: Id128::NONE,
            name: String::new(),
            address: String::new(),
            host_id: String::new(),
            shm_socket: String::new(),
        };
        // SAFETY: never transferred.
        let local = unsafe { LocalSlice::new(std::ptr::dangling_mut(), 100) };
        TransferRequest {
            opcode: Opcode::Write,
            peer: Arc::new(peer),
            grant: Grant {
                segment: 1,
                incarnation: 2,
                offset: 3,
                length: 4,
                term: 5,
                expires_unix_ms: 6,
                mac: [7; 16],
            },
            offset: 8,
            length: 100,
            local: smallvec![local],
            word: Some(Word {
                offset: 16,
                value: 9,
            }),
            notify,
        }
    }

    #[test]
    fn round_trip() {
        let mut out = Vec::new();
        let requests = [request(vec![1, 2, 3]), request(vec![])];
        encode_request(&mut out, Operation::Write, 77, &requests, true, true);
        let (head, meta) = out.split_first_chunk().unwrap();
        let header = decode_request(head).unwrap();
        assert_eq!(
            (header.items, header.payload_bytes, header.id),
            (2, 200, 77)
        );
        let mut items = Vec::new();
        decode_items(&header, meta, &mut items).unwrap();
        assert_eq!(items[0].grant, requests[0].grant);
        assert_eq!(items[0].word, requests[0].word);
        assert_eq!((items[0].notify_bytes, items[1].notify_bytes), (3, 0));
        assert!(decode_items(&header, &meta[..meta.len() - 1], &mut items).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), fix in any::<bool>()) {
            if fix && bytes.len() > 12 {
                bytes[..3].copy_from_slice(&[0x4D, 0x4B, 2]);
                bytes[4..8].copy_from_slice(&[1, 0, 0, 0]);
            }
            fuzz(&bytes);
        }
    }
}
