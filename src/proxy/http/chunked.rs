//! The end of a body: by length, by chunks, or by the connection's end.
//!
//! Owns the scanner that walks over a body's bytes without keeping them and says where the last whole chunk ended. Strict:
//! two readings of one framing are how requests are smuggled. Refuses to know what the bytes mean.

/// A chunk size, extension or trailer that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed chunk framing")]
pub(crate) struct ChunkError;

/// Most bytes of one chunk's extension.
const EXTENSION_BYTES_MAX: u32 = 256;
/// Most bytes of all trailers.
const TRAILER_BYTES_MAX: u32 = 8 << 10;
/// Most digits of a chunk size: 2^60 is beyond any body.
const SIZE_DIGITS_MAX: u32 = 15;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    SizeFirst,
    Size,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    TrailerFirst,
    Trailer,
    TrailerLf,
    EndLf,
    Done,
}

/// Walks over chunked bytes.
#[derive(Clone, Debug)]
pub(crate) struct ChunkScanner {
    state: State,
    left: u64,
    digits: u32,
    overhead: u32,
}

/// How far a scan came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Bytes that belong to this body.
    pub(crate) consumed: usize,
    /// Where the last whole chunk ended, 0 when none did.
    pub(crate) boundary: usize,
    /// The body is complete.
    pub(crate) done: bool,
}

impl ChunkScanner {
    pub(crate) fn new() -> Self {
        Self {
            state: State::SizeFirst,
            left: 0,
            digits: 0,
            overhead: 0,
        }
    }

    /// Walks over `input`, handing payload to `data`.
    pub(crate) fn advance(
        &mut self,
        input: &[u8],
        mut data: impl FnMut(&[u8]),
    ) -> Result<Progress, ChunkError> {
        let mut at = 0;
        let mut boundary = 0;
        while at < input.len() && self.state != State::Done {
            if self.state == State::Data {
                let here = (input.len() - at).min(usize::try_from(self.left).unwrap_or(usize::MAX));
                data(&input[at..at + here]);
                at += here;
                self.left -= here as u64;
                if self.left == 0 {
                    self.state = State::DataCr;
                }
                continue;
            }
            self.step(input[at])?;
            at += 1;
            if self.state == State::SizeFirst {
                boundary = at;
            }
        }
        let done = self.state == State::Done;
        Ok(Progress {
            consumed: at,
            boundary: if done { at } else { boundary },
            done,
        })
    }

    fn step(&mut self, byte: u8) -> Result<(), ChunkError> {
        self.state = match (self.state, byte) {
            (State::SizeFirst | State::Size, b) if b.is_ascii_hexdigit() => self.digit(b)?,
            (State::Size, b';') => {
                self.overhead = 0;
                State::Extension
            }
            (State::Size | State::Extension, b'\r') => State::SizeLf,
            (State::Extension, b) if b != b'\n' => {
                self.count(EXTENSION_BYTES_MAX, State::Extension)?
            }
            (State::SizeLf, b'\n') if self.left > 0 => State::Data,
            (State::SizeLf, b'\n') => {
                self.overhead = 0;
                State::TrailerFirst
            }
            (State::DataCr, b'\r') => State::DataLf,
            (State::DataLf, b'\n') => {
                self.digits = 0;
                State::SizeFirst
            }
            (State::TrailerFirst, b'\r') => State::EndLf,
            (State::TrailerFirst | State::Trailer, b) if b != b'\n' && b != b'\r' => {
                self.count(TRAILER_BYTES_MAX, State::Trailer)?
            }
            (State::Trailer, b'\r') => State::TrailerLf,
            (State::TrailerLf, b'\n') => State::TrailerFirst,
            (State::EndLf, b'\n') => State::Done,
            _ => return Err(ChunkError),
        };
        Ok(())
    }

    fn digit(&mut self, byte: u8) -> Result<State, ChunkError> {
        let value = char::from(byte).to_digit(16).ok_or(ChunkError)?;
        self.digits += 1;
        if self.digits > SIZE_DIGITS_MAX {
            return Err(ChunkError);
        }
        self.left = self.left << 4 | u64::from(value);
        Ok(State::Size)
    }

    fn count(&mut self, max: u32, next: State) -> Result<State, ChunkError> {
        self.overhead += 1;
        if self.overhead > max {
            return Err(ChunkError);
        }
        Ok(next)
    }
}

/// What ends a body.
#[derive(Clone, Debug)]
pub(crate) enum BodyScanner {
    /// Bytes still to come.
    Length(u64),
    /// Chunks.
    Chunked(ChunkScanner),
    /// The end of the connection.
    UntilClose,
}

impl BodyScanner {
    /// Whether nothing is to come at all.
    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, Self::Length(0))
    }

    /// Walks over `input`, handing payload to `data`.
    pub(crate) fn advance(
        &mut self,
        input: &[u8],
        mut data: impl FnMut(&[u8]),
    ) -> Result<Progress, ChunkError> {
        match self {
            Self::Chunked(scanner) => scanner.advance(input, data),
            Self::UntilClose => {
                data(input);
                Ok(Progress {
                    consumed: input.len(),
                    boundary: input.len(),
                    done: false,
                })
            }
            Self::Length(left) => {
                let here = input
                    .len()
                    .min(usize::try_from(*left).unwrap_or(usize::MAX));
                data(&input[..here]);
                *left -= here as u64;
                Ok(Progress {
                    consumed: here,
                    boundary: here,
                    done: *left == 0,
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(input: &[u8], step: usize) -> Result<(Vec<u8>, usize, bool), ChunkError> {
        let mut scanner = ChunkScanner::new();
        let (mut out, mut consumed, mut done) = (Vec::new(), 0, false);
        for piece in input.chunks(step) {
            let progress = scanner.advance(piece, |d| out.extend_from_slice(d))?;
            consumed += progress.consumed;
            done = progress.done;
            if done {
                break;
            }
        }
        Ok((out, consumed, done))
    }

    #[test]
    fn whole_and_byte_by_byte() {
        let text = b"4;name=x\r\nabcd\r\n1\r\ne\r\n0\r\nTrailer: 1\r\n\r\nGET /";
        for step in 1..text.len() {
            let (out, consumed, done) = decode(text, step).unwrap();
            assert_eq!((out.as_slice(), done), (&b"abcde"[..], true), "{step}");
            assert_eq!(&text[consumed..], b"GET /");
        }
    }

    #[test]
    fn says_where_the_last_whole_chunk_ended() {
        let mut scanner = ChunkScanner::new();
        let progress = scanner.advance(b"1\r\na\r\n5\r\nab", |_| ()).unwrap();
        assert_eq!((progress.boundary, progress.consumed), (6, 11));
    }

    #[test]
    fn refuses_what_has_two_readings() {
        for bad in [
            &b"-1\r\n"[..],
            b" 4\r\nabcd\r\n",
            b"0x4\r\nabcd\r\n",
            b"4\nabcd\r\n",
            b"4\r\nabcdX\r\n",
            b"4 \r\nabcd",
            b"\r\n",
            b"4;a\nb\r\n",
            b"1111111111111111\r\n",
            b"0\r\nA: b\n\r\n",
        ] {
            assert_eq!(decode(bad, 64), Err(ChunkError), "{bad:?}");
        }
    }
}
