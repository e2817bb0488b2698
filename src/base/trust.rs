//! The cluster token and what is derived from it: handshake proofs and the key that signs grants.
//!
//! Owns the only comparisons of secrets (constant time) and never prints one. Everybody who holds the token derives
//! the same keys, so a restarted master's grants stay valid; without a token the keys are public and protect nothing,
//! which is why servers then stay on loopback (`base::net`).

use std::fmt;
use std::io;
use std::path::Path;

/// The shared secret of a cluster.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// Takes the trimmed text; empty is no token.
    pub fn new(text: &str) -> Option<Self> {
        let text = text.trim();
        (!text.is_empty()).then(|| Self(text.to_owned()))
    }

    /// Reads the first line of a file.
    ///
    /// # Errors
    /// When the file cannot be read or holds nothing.
    pub fn read(path: &Path) -> io::Result<Self> {
        let text = std::fs::read_to_string(path)?;
        Self::new(text.lines().next().unwrap_or_default())
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the token file is empty"))
    }

    /// For the `authorization` header of gRPC and HTTP.
    pub fn bearer(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Length of a handshake nonce and proof.
pub const PROOF_BYTES: usize = 32;
/// Length of a grant's message authentication code.
pub const MAC_BYTES: usize = 16;

/// Keys of one cluster.
#[derive(Clone)]
pub struct ClusterKeys {
    handshake: [u8; 32],
    grant: [u8; 32],
    bearer: Option<[u8; 32]>,
}

impl fmt::Debug for ClusterKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterKeys(secured: {})", self.secured())
    }
}

impl ClusterKeys {
    /// Derives the keys; `None` gives the public ones of an open cluster.
    pub fn derive(token: Option<&Token>) -> Self {
        let secret = token.map_or("", |t| t.0.as_str()).as_bytes();
        Self {
            handshake: blake3::derive_key("mooncake 2026 handshake v1", secret),
            grant: blake3::derive_key("mooncake 2026 grant v1", secret),
            bearer: token.map(|t| *blake3::hash(t.bearer().as_bytes()).as_bytes()),
        }
    }

    /// Whether a token protects this cluster.
    pub fn secured(&self) -> bool {
        self.bearer.is_some()
    }

    /// Proof of knowing the token, bound to both nonces and the prover's role.
    pub fn proof(&self, role: &[u8], nonces: [&[u8; PROOF_BYTES]; 2]) -> [u8; PROOF_BYTES] {
        let mut hasher = blake3::Hasher::new_keyed(&self.handshake);
        hasher.update(role).update(nonces[0]).update(nonces[1]);
        *hasher.finalize().as_bytes()
    }

    /// Compares a proof in constant time.
    pub fn proof_matches(expected: &[u8; PROOF_BYTES], got: &[u8; PROOF_BYTES]) -> bool {
        // blake3::Hash compares in constant time.
        blake3::Hash::from_bytes(*expected) == blake3::Hash::from_bytes(*got)
    }

    /// Authentication code over the bytes of a grant.
    pub fn grant_mac(&self, body: &[u8]) -> [u8; MAC_BYTES] {
        let full = blake3::keyed_hash(&self.grant, body);
        let mut mac = [0; MAC_BYTES];
        mac.copy_from_slice(&full.as_bytes()[..MAC_BYTES]);
        mac
    }

    /// Checks a grant's code in constant time.
    pub fn grant_matches(&self, body: &[u8], mac: &[u8; MAC_BYTES]) -> bool {
        let expected = u128::from_le_bytes(self.grant_mac(body));
        // One comparison of two registers: no early exit on a matching prefix.
        std::hint::black_box(expected ^ u128::from_le_bytes(*mac)) == 0
    }

    /// Checks an `authorization` header value; an open cluster accepts anything.
    pub fn bearer_matches(&self, header: Option<&[u8]>) -> bool {
        match (&self.bearer, header) {
            (None, _) => true,
            (Some(_), None) => false,
            // Equal length through the hash: the comparison leaks neither content nor length.
            (Some(expected), Some(got)) => blake3::Hash::from_bytes(*expected) == blake3::hash(got),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_not_printed() {
        let token = Token::new(" s3cret\n").unwrap();
        assert!(!format!("{token:?}").contains("s3cret"));
        assert!(!format!("{:?}", ClusterKeys::derive(Some(&token))).contains("s3cret"));
        assert_eq!(Token::new("  \n"), None);
    }

    #[test]
    fn keys_differ_by_token_and_purpose() {
        let one = ClusterKeys::derive(Token::new("one").as_ref());
        let two = ClusterKeys::derive(Token::new("two").as_ref());
        let nonces = [&[1; 32], &[2; 32]];
        assert_ne!(one.proof(b"client", nonces), two.proof(b"client", nonces));
        assert_ne!(one.proof(b"client", nonces), one.proof(b"server", nonces));
        assert!(one.grant_matches(b"body", &one.grant_mac(b"body")));
        assert!(!two.grant_matches(b"body", &one.grant_mac(b"body")));
        assert!(!one.grant_matches(b"Body", &one.grant_mac(b"body")));
    }

    #[test]
    fn bearer() {
        let keys = ClusterKeys::derive(Token::new("one").as_ref());
        assert!(keys.bearer_matches(Some(b"Bearer one")));
        assert!(!keys.bearer_matches(Some(b"Bearer two")));
        assert!(!keys.bearer_matches(None));
        assert!(ClusterKeys::derive(None).bearer_matches(None));
    }
}
