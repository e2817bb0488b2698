//! Reads MessagePack, a value at a time, without building a tree.
//!
//! Owns the grammar. Bounded by its input: every value takes at least a byte, nothing is allocated, nothing recurses.

/// Bytes that are no MessagePack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed MessagePack")]
pub(crate) struct Malformed;

/// A value; of arrays and maps the number of items that follow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Value<'a> {
    Nil,
    Bool(bool),
    /// Negative ones in two's complement, as hashes come that were signed on their way.
    Int(u64),
    Float(f64),
    /// Text or bytes: both occur for the same thing.
    Bytes(&'a [u8]),
    Array(usize),
    Map(usize),
    Extension,
}

/// A position in the input.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(input: &'a [u8]) -> Self {
        Self { rest: input }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(Malformed)?;
        self.rest = rest;
        Ok(taken)
    }

    /// A big-endian number of `width` bytes.
    fn number(&mut self, width: usize) -> Result<u64, Malformed> {
        let bytes = self.take(width)?;
        Ok(bytes.iter().fold(0, |n, b| n << 8 | u64::from(*b)))
    }

    fn length(&mut self, width: usize) -> Result<usize, Malformed> {
        usize::try_from(self.number(width)?).map_err(|_| Malformed)
    }

    fn bytes(&mut self, width: usize) -> Result<Value<'a>, Malformed> {
        let length = self.length(width)?;
        Ok(Value::Bytes(self.take(length)?))
    }

    fn extension(&mut self, length: usize) -> Result<Value<'a>, Malformed> {
        self.take(length.checked_add(1).ok_or(Malformed)?)?;
        Ok(Value::Extension)
    }

    /// The next value.
    ///
    /// # Errors
    /// When the input ends or holds no such value.
    pub(crate) fn next(&mut self) -> Result<Value<'a>, Malformed> {
        let tag = self.take(1)?[0];
        Ok(match tag {
            0x00..=0x7f => Value::Int(u64::from(tag)),
            0x80..=0x8f => Value::Map(usize::from(tag & 0x0f)),
            0x90..=0x9f => Value::Array(usize::from(tag & 0x0f)),
            0xa0..=0xbf => Value::Bytes(self.take(usize::from(tag & 0x1f))?),
            0xc0 => Value::Nil,
            0xc1 => return Err(Malformed),
            0xc2 | 0xc3 => Value::Bool(tag == 0xc3),
            0xc4 | 0xd9 => self.bytes(1)?,
            0xc5 | 0xda => self.bytes(2)?,
            0xc6 | 0xdb => self.bytes(4)?,
            0xc7 => {
                let length = self.length(1)?;
                self.extension(length)?
            }
            0xc8 => {
                let length = self.length(2)?;
                self.extension(length)?
            }
            0xc9 => {
                let length = self.length(4)?;
                self.extension(length)?
            }
            0xca => Value::Float(f64::from(f32::from_bits(self.number(4)? as u32))),
            0xcb => Value::Float(f64::from_bits(self.number(8)?)),
            0xcc => Value::Int(self.number(1)?),
            0xcd => Value::Int(self.number(2)?),
            0xce => Value::Int(self.number(4)?),
            0xcf | 0xd3 => Value::Int(self.number(8)?),
            0xd0 => Value::Int(i64::from(self.number(1)? as i8) as u64),
            0xd1 => Value::Int(i64::from(self.number(2)? as i16) as u64),
            0xd2 => Value::Int(i64::from(self.number(4)? as i32) as u64),
            0xd4..=0xd8 => self.extension(1 << (tag - 0xd4))?,
            0xdc => Value::Array(self.length(2)?),
            0xdd => Value::Array(self.length(4)?),
            0xde => Value::Map(self.length(2)?),
            0xdf => Value::Map(self.length(4)?),
            0xe0..=0xff => Value::Int(i64::from(tag as i8) as u64),
        })
    }

    /// Passes over a value with all that is in it, and gives the bytes it took.
    ///
    /// # Errors
    /// When the input ends before the value does.
    pub(crate) fn skip(&mut self) -> Result<&'a [u8], Malformed> {
        let before = self.rest;
        let mut left = 1u64;
        while left > 0 {
            left -= 1;
            left += match self.next()? {
                Value::Array(items) => items as u64,
                Value::Map(items) => 2 * items as u64,
                _ => 0,
            };
        }
        Ok(&before[..before.len() - self.rest.len()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values() {
        let all = [
            0x07, 0xff, 0xa2, b'h', b'i', 0xc4, 1, 9, 0xc0, 0xc3, 0xcf, 0, 0, 0, 0, 0, 0, 1, 0,
            0xd3, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe, 0x92, 0x81, 0xd4, 1, 2,
        ];
        let mut reader = Reader::new(&all);
        for wanted in [
            Value::Int(7),
            Value::Int(u64::MAX),
            Value::Bytes(b"hi"),
            Value::Bytes(&[9]),
            Value::Nil,
            Value::Bool(true),
            Value::Int(256),
            Value::Int(u64::MAX - 1),
            Value::Array(2),
            Value::Map(1),
            Value::Extension,
        ] {
            assert_eq!(reader.next(), Ok(wanted));
        }
        assert_eq!(reader.next(), Err(Malformed));
    }

    #[test]
    fn skips_whole_values_and_ends_at_broken_ones() {
        let nested = [0x92, 0x81, 0xa1, b'k', 0x93, 1, 2, 3, 0xc0, 0x05];
        let mut reader = Reader::new(&nested);
        assert_eq!(reader.skip().map(<[u8]>::len), Ok(9));
        assert_eq!(reader.next(), Ok(Value::Int(5)));
        for bad in [
            &b"\x92\x01"[..],
            b"\xc6\xff\xff\xff\xff",
            b"\xdf\xff\xff\xff\xff",
            b"\xc1",
            b"",
            b"\xc9\xff\xff\xff\xff",
        ] {
            assert_eq!(Reader::new(bad).skip(), Err(Malformed), "{bad:?}");
        }
    }
}
