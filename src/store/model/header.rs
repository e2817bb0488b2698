//! The 64 bytes in front of every object in a segment, and the sizes that follow from them.
//!
//! ```text
//!  0  u64  version      written last; 0 = no object here; with bit 63 = being copied through shared memory
//!  8  u64  length       bytes of the payload
//! 16  u64  key hash     of the qualified key
//! 24  u32  checksum     CRC-32C of the payload, when flag 0 is set
//! 28  u32  flags
//! 32  u32  format       "MKO1"
//! 36  0…
//! ```
//! Little-endian. A reader compares all of it with what it was told, so memory that has been reused is detected.

/// Length of the header.
pub const HEADER_BYTES: u64 = 64;
/// Objects begin on multiples of this.
pub const ALIGNMENT: u64 = 64;

const FORMAT: u32 = u32::from_le_bytes(*b"MKO1");
const FLAG_CHECKSUM: u32 = 1;

/// Set in the word of an object whose bytes are still being copied through shared memory; no version has it.
const PENDING: u64 = 1 << 63;

/// The word of an object of `version` on its way: no reader accepts it.
pub fn pending(version: u64) -> u64 {
    version | PENDING
}

/// Bytes an object of `length` payload bytes takes in a segment; `None` when that is beyond any segment.
pub fn footprint(length: u64) -> Option<u64> {
    length
        .checked_add(HEADER_BYTES)?
        .checked_next_multiple_of(ALIGNMENT)
        .filter(|n| *n < 1 << 56)
}

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObjectHeader {
    /// Unique per put, increasing.
    pub version: u64,
    /// Bytes of the payload.
    pub length: u64,
    /// Hash of the qualified key.
    pub key_hash: u64,
    /// CRC-32C of the payload, if it was computed.
    pub checksum: Option<u32>,
}

impl ObjectHeader {
    /// The bytes; with `version` 0 as it is written before the data is in place.
    pub fn encode(&self, version: u64) -> [u8; HEADER_BYTES as usize] {
        let mut out = [0; HEADER_BYTES as usize];
        out[0..8].copy_from_slice(&version.to_le_bytes());
        out[8..16].copy_from_slice(&self.length.to_le_bytes());
        out[16..24].copy_from_slice(&self.key_hash.to_le_bytes());
        out[24..28].copy_from_slice(&self.checksum.unwrap_or(0).to_le_bytes());
        let flags = if self.checksum.is_some() {
            FLAG_CHECKSUM
        } else {
            0
        };
        out[28..32].copy_from_slice(&flags.to_le_bytes());
        out[32..36].copy_from_slice(&FORMAT.to_le_bytes());
        out
    }

    /// Whether these bytes are this object's header. The checksum is not compared: it may have been unknown to the asker.
    pub fn matches(&self, bytes: &[u8; HEADER_BYTES as usize]) -> bool {
        let expected = self.encode(self.version);
        bytes[..24] == expected[..24] && bytes[32..36] == expected[32..36]
    }
}

/// CRC-32C of a payload.
pub fn checksum(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// Incremental CRC-32C.
pub struct Checksum(crc_fast::Digest);

impl Default for Checksum {
    fn default() -> Self {
        Self(crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi))
    }
}

impl Checksum {
    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }
    /// The result.
    pub fn finish(&self) -> u32 {
        self.0.finalize() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout() {
        let header = ObjectHeader {
            version: 7,
            length: 9,
            key_hash: 11,
            checksum: Some(13),
        };
        let bytes = header.encode(header.version);
        assert!(header.matches(&bytes));
        assert!(
            !ObjectHeader {
                version: 8,
                ..header
            }
            .matches(&bytes)
        );
        assert!(
            !ObjectHeader {
                key_hash: 12,
                ..header
            }
            .matches(&bytes)
        );
        assert!(!header.matches(&header.encode(0)));
        assert_eq!(footprint(1), Some(128));
        assert_eq!(footprint(64), Some(128));
        assert_eq!(footprint(u64::MAX - 3), None);
        // Test vector of RFC 3720, B.4: 32 bytes of zeroes.
        assert_eq!(checksum(&[0; 32]), 0x8a91_36aa);
        let mut parts = Checksum::default();
        parts.update(&[0; 5]);
        parts.update(&[0; 27]);
        assert_eq!(parts.finish(), 0x8a91_36aa);
    }
}
