//! A request id that workers see and clients must not, replaced in what passes without changing the length of anything.
//!
//! Owns the replacement and what must be held back because it may be the beginning of the id.

use memchr::memmem;

/// What is replaced and by what; both are of one length.
#[derive(Clone, Debug)]
pub(crate) struct Mask {
    wire: Vec<u8>,
    shown: Vec<u8>,
}

impl Mask {
    /// Shows `client` where workers write `wire`, filled up or cut to its length.
    pub(crate) fn new(wire: &str, client: &str) -> Self {
        let mut shown = client.as_bytes().to_vec();
        // What could end a JSON string early has no place in it.
        shown.retain(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(b));
        shown.resize(wire.len(), b'_');
        Self {
            wire: wire.as_bytes().to_vec(),
            shown,
        }
    }

    /// Replaces every occurrence.
    pub(crate) fn apply(&self, piece: &mut [u8]) {
        let mut from = 0;
        while let Some(at) = memmem::find(&piece[from..], &self.wire) {
            let start = from + at;
            from = start + self.wire.len();
            piece[start..from].copy_from_slice(&self.shown);
        }
    }

    /// Bytes at the end of a piece that may be the beginning of the id.
    pub(crate) fn tail(&self, piece: &[u8]) -> usize {
        let longest = piece.len().min(self.wire.len() - 1);
        (1..=longest)
            .rev()
            .find(|n| piece.ends_with(&self.wire[..*n]))
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_occurrence_and_no_length() {
        let mask = Mask::new("___p_1:2___d_3:4_x", "me\"-1");
        let mut piece = b"{\"id\":\"cmpl-___p_1:2___d_3:4_x\"} ___p_1:2___d_3:4_x ___p_1".to_vec();
        let before = piece.len();
        assert_eq!(mask.tail(&piece), 6);
        assert_eq!(mask.tail(b"nothing"), 0);
        mask.apply(&mut piece);
        let text = String::from_utf8(piece).unwrap();
        assert!(
            text.starts_with("{\"id\":\"cmpl-me-1______________\"} me-1____"),
            "{text}"
        );
        assert_eq!(text.len(), before);
        assert!(!text.contains("___p_1:2___d"));
    }
}
