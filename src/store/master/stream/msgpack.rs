//! The little of MessagePack that events need; writing only.

/// Appends values to a buffer.
#[derive(Default)]
pub(super) struct Writer(pub(super) Vec<u8>);

impl Writer {
    pub(super) fn array(&mut self, length: usize) {
        self.head(length, 0x90, 15, 0xdc);
    }

    pub(super) fn map(&mut self, length: usize) {
        self.head(length, 0x80, 15, 0xde);
    }

    /// A length: in the first byte up to `most`, else in 16 or 32 bits behind `wide` or the one after it.
    fn head(&mut self, length: usize, fixed: u8, most: usize, wide: u8) {
        if length <= most {
            self.0.push(fixed | length as u8);
        } else if let Ok(length) = u16::try_from(length) {
            self.0.push(wide);
            self.0.extend(length.to_be_bytes());
        } else {
            self.0.push(wide + 1);
            self.0.extend((length as u32).to_be_bytes());
        }
    }

    pub(super) fn nil(&mut self) {
        self.0.push(0xc0);
    }

    pub(super) fn text(&mut self, text: &str) {
        match text.len() {
            length @ 32..=255 => self.0.extend([0xd9, length as u8]),
            length => self.head(length, 0xa0, 31, 0xda),
        }
        self.0.extend_from_slice(text.as_bytes());
    }

    /// `nil` when empty.
    pub(super) fn text_or_nil(&mut self, text: &str) {
        if text.is_empty() {
            self.nil();
        } else {
            self.text(text);
        }
    }

    pub(super) fn unsigned(&mut self, n: u64) {
        if n < 128 {
            self.0.push(n as u8);
        } else if let Ok(n) = u32::try_from(n) {
            self.0.push(0xce);
            self.0.extend(n.to_be_bytes());
        } else {
            self.0.push(0xcf);
            self.0.extend(n.to_be_bytes());
        }
    }

    pub(super) fn signed(&mut self, n: i64) {
        if let Ok(n) = u64::try_from(n) {
            self.unsigned(n);
        } else {
            self.0.push(0xd3);
            self.0.extend(n.to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shortest_forms() {
        let mut w = Writer::default();
        w.array(2);
        w.map(16);
        w.text("ab");
        w.text(&"x".repeat(40));
        w.unsigned(127);
        w.unsigned(128);
        w.unsigned(u64::MAX);
        w.signed(-1);
        w.text_or_nil("");
        let mut expected = vec![0x92, 0xde, 0, 16, 0xa2, b'a', b'b', 0xd9, 40];
        expected.extend([b'x'; 40]);
        expected.extend([0x7f, 0xce, 0, 0, 0, 128, 0xcf]);
        expected.extend([0xff; 8]);
        expected.push(0xd3);
        expected.extend([0xff; 8]);
        expected.push(0xc0);
        assert_eq!(w.0, expected);
        let mut long = Writer::default();
        long.text(&"y".repeat(70_000));
        assert_eq!(long.0[..5], [0xdb, 0, 1, 0x11, 0x70]);
    }
}
