//! What the two ends of a lane tell each other about RDMA: pure encoding and decoding (byte tables in docs/formats.md).
//!
//! Knows bytes only, and is there without the feature too. Everything here must survive any input.

/// Rails of one lane, at most.
pub const RAILS_MAX: usize = 16;
/// Length of one end in a join and its answer.
pub const END_BYTES: usize = 64;
/// Most bytes of a join.
pub const JOIN_BYTES_MAX: u64 = 4096;
/// Most bytes of the pieces of one frame.
pub const PIECES_BYTES_MAX: u64 = 8 << 20;
/// Most bytes of a reason.
const REASON_BYTES_MAX: usize = 512;

/// The reason of a node without RDMA.
pub const NOT_SERVED: &str = "it serves no RDMA";
/// Part of the reason of a node whose memory is not registered yet.
pub const NOT_YET: &str = "still being registered";

/// One end of a queue pair. A `qp` of 0 stands for a rail that is not there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct End {
    /// Address of the port.
    pub gid: [u8; 16],
    /// Queue pair number, 24 bits.
    pub qp: u32,
    /// First packet sequence number, 24 bits.
    pub psn: u32,
    /// Local identifier (InfiniBand).
    pub lid: u16,
    /// `ibv_mtu`: 1 = 256 … 5 = 4096.
    pub mtu: u8,
    /// Reads the end answers at once.
    pub reads: u8,
    /// Whether the port is Ethernet (RoCE).
    pub ethernet: bool,
    /// Name of the device, NUL-padded.
    pub device: [u8; 24],
}

impl End {
    /// The device's name.
    pub fn name(&self) -> String {
        let end = self.device.iter().position(|b| *b == 0).unwrap_or(24);
        String::from_utf8_lossy(&self.device[..end]).into_owned()
    }

    fn encode(&self, out: &mut Vec<u8>) {
        let mut b = [0u8; END_BYTES];
        b[..16].copy_from_slice(&self.gid);
        b[16..20].copy_from_slice(&self.qp.to_le_bytes());
        b[20..24].copy_from_slice(&self.psn.to_le_bytes());
        b[24..26].copy_from_slice(&self.lid.to_le_bytes());
        b[26] = self.mtu;
        b[27] = self.reads;
        b[28] = u8::from(self.ethernet);
        b[32..56].copy_from_slice(&self.device);
        out.extend_from_slice(&b);
    }

    fn decode(b: &[u8]) -> Self {
        let mut end = Self {
            qp: u32_at(b, 16) & 0xFF_FFFF,
            psn: u32_at(b, 20) & 0xFF_FFFF,
            lid: u16::from_le_bytes([b[24], b[25]]),
            mtu: b[26],
            reads: b[27],
            ethernet: b[28] != 0,
            ..Self::default()
        };
        end.gid.copy_from_slice(&b[..16]);
        end.device.copy_from_slice(&b[32..56]);
        end
    }
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}

/// A join or its answer: ends, and in an answer without any the reason.
pub fn encode_join(ends: &[End], reason: &str) -> Vec<u8> {
    let reason = &reason.as_bytes()[..reason.len().min(REASON_BYTES_MAX)];
    let mut out = Vec::with_capacity(8 + ends.len() * END_BYTES + reason.len());
    out.extend_from_slice(&(ends.len() as u32).to_le_bytes());
    out.extend_from_slice(&(reason.len() as u32).to_le_bytes());
    for end in ends {
        end.encode(&mut out);
    }
    out.extend_from_slice(reason);
    out
}

/// The other direction.
///
/// # Errors
/// What is wrong with it.
pub fn decode_join(bytes: &[u8]) -> Result<(Vec<End>, String), &'static str> {
    let wrong = "length of a join";
    if bytes.len() < 8 {
        return Err(wrong);
    }
    let (ends, reason) = (u32_at(bytes, 0) as usize, u32_at(bytes, 4) as usize);
    if ends > RAILS_MAX || reason > REASON_BYTES_MAX {
        return Err("too many rails");
    }
    if bytes.len() != 8 + ends * END_BYTES + reason {
        return Err(wrong);
    }
    let (of_ends, text) = bytes[8..].split_at(ends * END_BYTES);
    let ends = of_ends.chunks_exact(END_BYTES).map(End::decode).collect();
    Ok((ends, String::from_utf8_lossy(text).into_owned()))
}

/// A piece of the caller's memory, with the key of each rail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First byte, in the caller's address space.
    pub address: u64,
    /// Bytes.
    pub length: u64,
    /// One key per rail of the lane.
    pub keys: smallvec::SmallVec<[u32; 4]>,
}

/// Appends the pieces of one item.
pub fn encode_pieces(out: &mut Vec<u8>, pieces: &[Piece]) {
    out.extend_from_slice(&(pieces.len() as u32).to_le_bytes());
    for piece in pieces {
        out.extend_from_slice(&piece.address.to_le_bytes());
        out.extend_from_slice(&piece.length.to_le_bytes());
        for key in &piece.keys {
            out.extend_from_slice(&key.to_le_bytes());
        }
    }
}

/// The pieces of every item of a frame; `lengths` are the items' lengths, which the pieces of an item add up to unless it
/// has none.
///
/// # Errors
/// What is wrong with it.
pub fn decode_pieces(
    bytes: &[u8],
    lengths: &[u64],
    rails: usize,
) -> Result<Vec<Vec<Piece>>, &'static str> {
    let wrong = "length of the pieces";
    let each = 16 + 4 * rails;
    let mut rest = bytes;
    let mut all = Vec::with_capacity(lengths.len());
    for length in lengths {
        let (count, after) = rest.split_first_chunk::<4>().ok_or(wrong)?;
        let count = u32::from_le_bytes(*count) as usize;
        let size = count.checked_mul(each).ok_or(wrong)?;
        let (mine, after) = after.split_at_checked(size).ok_or(wrong)?;
        rest = after;
        let piece = |b: &[u8]| Piece {
            address: u64_at(b, 0),
            length: u64_at(b, 8),
            keys: (0..rails).map(|rail| u32_at(b, 16 + 4 * rail)).collect(),
        };
        let pieces: Vec<Piece> = mine.chunks_exact(each).map(piece).collect();
        let mut sum = 0u64;
        for p in &pieces {
            sum = sum.checked_add(p.length).ok_or("length of a piece")?;
            if p.length == 0 || p.address.checked_add(p.length).is_none() {
                return Err("length of a piece");
            }
        }
        if count > 0 && sum != *length {
            return Err("pieces and range differ in length");
        }
        all.push(pieces);
    }
    if rest.is_empty() { Ok(all) } else { Err(wrong) }
}

/// Drives every decoder with arbitrary bytes; for the fuzz target and its corpus test.
#[doc(hidden)]
pub fn fuzz(bytes: &[u8]) {
    let _ = decode_join(bytes);
    for rails in [1, 2, RAILS_MAX] {
        if let Ok(all) = decode_pieces(bytes, &[1, 64], rails) {
            assert_eq!(all.len(), 2);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn round_trip() {
        let mut end = End {
            qp: 17,
            psn: 0xFF_FFFF,
            lid: 3,
            mtu: 5,
            reads: 16,
            ethernet: true,
            ..End::default()
        };
        end.gid[15] = 9;
        end.device[..6].copy_from_slice(b"mlx5_0");
        let bytes = encode_join(&[end, End::default()], "");
        assert_eq!(
            decode_join(&bytes),
            Ok((vec![end, End::default()], String::new()))
        );
        assert_eq!(end.name(), "mlx5_0");
        let bytes = encode_join(&[], "no device");
        assert_eq!(decode_join(&bytes), Ok((vec![], "no device".to_owned())));
        let pieces = vec![
            Piece {
                address: 4096,
                length: 60,
                keys: smallvec::smallvec![7, 8],
            },
            Piece {
                address: 1,
                length: 4,
                keys: smallvec::smallvec![9, 10],
            },
        ];
        let mut out = Vec::new();
        encode_pieces(&mut out, &pieces);
        encode_pieces(&mut out, &[]);
        assert_eq!(
            decode_pieces(&out, &[64, 5], 2),
            Ok(vec![pieces.clone(), vec![]])
        );
        assert!(decode_pieces(&out, &[63, 5], 2).is_err());
        assert!(decode_pieces(&out, &[64, 5], 1).is_err());
        assert!(decode_pieces(&out[..out.len() - 1], &[64, 5], 2).is_err());
    }

    proptest! {
        #[test]
        fn survives_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            fuzz(&bytes);
        }
    }
}
