//! Random identities: processes, nodes, clients. Knows nothing of what they name.

use std::fmt;

/// 128 random bits that name a process (node or client) for its lifetime; printed `a-b` as upstream prints UUIDs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Id128 {
    /// Upper half.
    pub high: u64,
    /// Lower half.
    pub low: u64,
}

impl Id128 {
    /// Nobody: one-shot callers that own nothing.
    pub const NONE: Self = Self { high: 0, low: 0 };

    /// A fresh random identity.
    pub fn random() -> Self {
        Self {
            high: random_u64(),
            low: random_u64() | 1,
        }
    }

    /// Whether this is [`Id128::NONE`].
    pub fn is_none(self) -> bool {
        self == Self::NONE
    }
}

impl fmt::Display for Id128 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{:016x}", self.high, self.low)
    }
}

/// 64 bits from the kernel's generator.
///
/// # Panics
/// When the kernel has no random source, which leaves nothing to run on.
pub fn random_u64() -> u64 {
    let mut bytes = [0u8; 8];
    random_bytes(&mut bytes);
    u64::from_le_bytes(bytes)
}

/// Fills `bytes` from the kernel's generator.
///
/// # Panics
/// When the kernel has no random source.
pub fn random_bytes(bytes: &mut [u8]) {
    #[expect(
        clippy::expect_used,
        reason = "no random source means no secrets: stop"
    )]
    getrandom::fill(bytes).expect("the kernel has a random source");
}
