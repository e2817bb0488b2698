//! Permission to touch a range of a segment: issued by the master, checked by the node on every request (S1).

use crate::base::clock::unix_ms;
use crate::base::trust::{ClusterKeys, MAC_BYTES};

/// What a grant allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Copy bytes out.
    Read = 1,
    /// Copy bytes in and notify.
    Write = 2,
}

/// How far two hosts' clocks may be apart before a live grant is refused.
pub(crate) const CLOCK_SKEW_MS: u64 = 30_000;

/// A granted range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Index of the segment within its node. Not signed: the incarnation names the memory.
    pub segment: u32,
    /// Random per mapped memory; a restarted segment has another one.
    pub incarnation: u64,
    /// First byte, within the segment.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// The term of the master that issued it; writes of older terms are fenced off.
    pub term: u64,
    /// Last moment of validity, unix milliseconds by the master's clock.
    pub expires_unix_ms: u64,
    /// Keyed code over all of it, the access included.
    pub mac: [u8; MAC_BYTES],
}

impl Grant {
    fn body(&self, access: Access) -> [u8; 48] {
        let mut body = [0; 48];
        body[..8].copy_from_slice(&self.incarnation.to_le_bytes());
        body[8..16].copy_from_slice(&self.offset.to_le_bytes());
        body[16..24].copy_from_slice(&self.length.to_le_bytes());
        body[24..32].copy_from_slice(&self.term.to_le_bytes());
        body[32..40].copy_from_slice(&self.expires_unix_ms.to_le_bytes());
        body[40] = access as u8;
        body
    }

    /// Signs the grant.
    #[must_use]
    pub fn signed(mut self, access: Access, keys: &ClusterKeys) -> Self {
        self.mac = keys.grant_mac(&self.body(access));
        self
    }

    /// Whether it is genuine, of this access, and not expired.
    pub fn allows(&self, access: Access, keys: &ClusterKeys) -> bool {
        self.expires_unix_ms.saturating_add(CLOCK_SKEW_MS) > unix_ms()
            && keys.grant_matches(&self.body(access), &self.mac)
    }

    /// Whether `length` bytes at `offset` lie within.
    pub fn covers(&self, offset: u64, length: u64) -> bool {
        offset >= self.offset
            && offset
                .checked_add(length)
                .zip(self.offset.checked_add(self.length))
                .is_some_and(|(end, limit)| end <= limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::trust::Token;

    #[test]
    fn bound_to_every_field() {
        let keys = ClusterKeys::derive(Token::new("t").as_ref());
        let grant = Grant {
            segment: 0,
            incarnation: 7,
            offset: 64,
            length: 128,
            term: 3,
            expires_unix_ms: unix_ms() + 1000,
            mac: [0; MAC_BYTES],
        }
        .signed(Access::Read, &keys);
        assert!(grant.allows(Access::Read, &keys));
        assert!(!grant.allows(Access::Write, &keys));
        for change in [
            Grant {
                incarnation: 8,
                ..grant
            },
            Grant { offset: 0, ..grant },
            Grant {
                length: 256,
                ..grant
            },
            Grant { term: 4, ..grant },
            Grant {
                expires_unix_ms: u64::MAX / 2,
                ..grant
            },
        ] {
            assert!(!change.allows(Access::Read, &keys), "{change:?}");
        }
        let old = Grant {
            expires_unix_ms: unix_ms() - 60_000,
            ..grant
        }
        .signed(Access::Read, &keys);
        assert!(!old.allows(Access::Read, &keys));
        assert!(grant.covers(64, 128) && grant.covers(100, 1));
        assert!(!grant.covers(63, 1) && !grant.covers(64, 129) && !grant.covers(u64::MAX, 2));
    }
}
