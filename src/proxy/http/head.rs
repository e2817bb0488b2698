//! Heads of requests and replies, and what they say about the body.
//!
//! Owns the rules of framing (RFC 9112, section 6.3, without its leniency) and which headers end at this hop. Keeps a
//! head as the bytes that came and offsets into them.

use bytes::Bytes;
use smallvec::SmallVec;

use super::chunked::{BodyScanner, ChunkScanner};
use super::{HEAD_BYTES_MAX, HEADERS_MAX};

/// Why a head was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HeadError {
    #[error("malformed HTTP head")]
    Malformed,
    #[error("the header fields are too large")]
    TooLarge,
    #[error("ambiguous body length")]
    Ambiguous,
    #[error("unsupported transfer coding")]
    TransferCoding,
}

type Span = (u32, u32);

/// Header lines as they came.
#[derive(Clone, Debug, Default)]
pub(crate) struct Headers {
    bytes: Bytes,
    lines: SmallVec<[(Span, Span); 16]>,
}

impl Headers {
    fn slice(&self, span: Span) -> &[u8] {
        self.bytes
            .get(span.0 as usize..span.1 as usize)
            .unwrap_or_default()
    }

    /// Name and value of every line, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.lines
            .iter()
            .map(|(name, value)| (self.slice(*name), self.slice(*value)))
    }

    /// The first value of a name.
    pub(crate) fn get(&self, name: &str) -> Option<&[u8]> {
        self.iter()
            .find(|(n, _)| n.eq_ignore_ascii_case(name.as_bytes()))
            .map(|(_, v)| v)
    }

    /// The first value of a name, if it is text.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        std::str::from_utf8(self.get(name)?).ok()
    }

    fn count(&self, name: &str) -> usize {
        self.iter()
            .filter(|(n, _)| n.eq_ignore_ascii_case(name.as_bytes()))
            .count()
    }

    /// Whether a comma-separated header names `token`.
    pub(crate) fn lists(&self, name: &str, token: &str) -> bool {
        self.iter()
            .filter(|(n, _)| n.eq_ignore_ascii_case(name.as_bytes()))
            .flat_map(|(_, v)| v.split(|b| *b == b','))
            .any(|t| t.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
    }

    /// Whether a header ends at this hop: by its nature, or because `Connection` names it.
    pub(crate) fn ends_here(&self, name: &[u8]) -> bool {
        if HOP_BY_HOP
            .iter()
            .any(|h| name.eq_ignore_ascii_case(h.as_bytes()))
        {
            return true;
        }
        let named = |value: &[u8]| {
            let mut tokens = value.split(|b| *b == b',');
            tokens.any(|t| t.trim_ascii().eq_ignore_ascii_case(name))
        };
        self.iter()
            .any(|(n, value)| n.eq_ignore_ascii_case(b"connection") && named(value))
    }

    /// Whether the connection ends after this message.
    fn keeps_alive(&self, http11: bool) -> bool {
        if http11 {
            !self.lists("connection", "close")
        } else {
            self.lists("connection", "keep-alive")
        }
    }

    /// The one length or coding of a body: `None` when neither is given.
    fn framing(&self, http11: bool) -> Result<Option<BodyScanner>, HeadError> {
        let (codings, lengths) = (
            self.count("transfer-encoding"),
            self.count("content-length"),
        );
        if codings > 0 && lengths > 0 || codings > 1 || lengths > 1 {
            return Err(HeadError::Ambiguous);
        }
        if let Some(coding) = self.get("transfer-encoding") {
            if !http11 || !coding.eq_ignore_ascii_case(b"chunked") {
                return Err(HeadError::TransferCoding);
            }
            return Ok(Some(BodyScanner::Chunked(ChunkScanner::new())));
        }
        let Some(length) = self.get("content-length") else {
            return Ok(None);
        };
        let digits =
            !length.is_empty() && length.len() < 19 && length.iter().all(u8::is_ascii_digit);
        if !digits {
            return Err(HeadError::Ambiguous);
        }
        let value = length
            .iter()
            .fold(0u64, |n, d| n * 10 + u64::from(d - b'0'));
        Ok(Some(BodyScanner::Length(value)))
    }
}

/// Headers that belong to one connection, in lower case.
const HOP_BY_HOP: &[&str] = &[
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "content-length",
];

/// A client's request without its body.
#[derive(Clone, Debug)]
pub(crate) struct RequestHead {
    pub(crate) method: String,
    /// Path and query as they came.
    pub(crate) target: String,
    pub(crate) http11: bool,
    pub(crate) headers: Headers,
    pub(crate) body: BodyScanner,
    pub(crate) keep_alive: bool,
    pub(crate) expects_continue: bool,
}

impl RequestHead {
    /// The path without its query.
    pub(crate) fn path(&self) -> &str {
        self.target.split(['?', '#']).next().unwrap_or_default()
    }
}

/// A worker's reply without its body.
#[derive(Clone, Debug)]
pub(crate) struct ReplyHead {
    pub(crate) status: u16,
    pub(crate) reason: String,
    pub(crate) headers: Headers,
    pub(crate) body: BodyScanner,
    pub(crate) keep_alive: bool,
}

/// Length of a complete head at the beginning of `bytes`.
pub(crate) fn head_length(bytes: &[u8], searched: usize) -> Result<Option<usize>, HeadError> {
    let from = searched.saturating_sub(3);
    let found = memchr::memmem::find(bytes.get(from..).unwrap_or_default(), b"\r\n\r\n");
    match found {
        Some(at) if from + at + 4 <= HEAD_BYTES_MAX => Ok(Some(from + at + 4)),
        None if bytes.len() < HEAD_BYTES_MAX => Ok(None),
        _ => Err(HeadError::TooLarge),
    }
}

fn spans(bytes: Bytes, parsed: &[httparse::Header<'_>]) -> Headers {
    let base = bytes.as_ptr() as usize;
    let span = |part: &[u8]| {
        let start = (part.as_ptr() as usize).saturating_sub(base);
        (start as u32, (start + part.len()) as u32)
    };
    let lines = parsed
        .iter()
        .map(|h| {
            let value = span(h.value.trim_ascii());
            // A trimmed empty value may point anywhere: an empty span is all it is.
            let value = if h.value.is_empty() { (0, 0) } else { value };
            (span(h.name.as_bytes()), value)
        })
        .collect();
    Headers { bytes, lines }
}

fn error_of(error: httparse::Error) -> HeadError {
    match error {
        httparse::Error::TooManyHeaders => HeadError::TooLarge,
        _ => HeadError::Malformed,
    }
}

/// Parses a request's head; `bytes` is exactly the head.
pub(crate) fn request(bytes: Bytes) -> Result<RequestHead, HeadError> {
    let mut lines = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut parsed = httparse::Request::new(&mut lines);
    let shared = bytes.clone();
    let complete = parsed.parse(&shared).map_err(error_of)?;
    // A head that ends earlier than at its CRLF CRLF ended with bare line feeds: two readings, so none.
    if complete != httparse::Status::Complete(bytes.len()) || has_bare_line_feed(&bytes) {
        return Err(HeadError::Malformed);
    }
    let (Some(method), Some(target), Some(version)) = (parsed.method, parsed.path, parsed.version)
    else {
        return Err(HeadError::Malformed);
    };
    let headers = spans(bytes, parsed.headers);
    let http11 = version == 1;
    let body = headers.framing(http11)?.unwrap_or(BodyScanner::Length(0));
    Ok(RequestHead {
        method: method.to_owned(),
        target: target.to_owned(),
        http11,
        body,
        keep_alive: headers.keeps_alive(http11),
        expects_continue: http11 && headers.lists("expect", "100-continue"),
        headers,
    })
}

fn has_bare_line_feed(bytes: &[u8]) -> bool {
    memchr::memchr_iter(b'\n', bytes).any(|at| at == 0 || bytes[at - 1] != b'\r')
}

/// Parses a reply's head; `bytes` is exactly the head. `bodiless`: the request was a HEAD.
pub(crate) fn reply(bytes: Bytes, bodiless: bool) -> Result<ReplyHead, HeadError> {
    let mut lines = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut parsed = httparse::Response::new(&mut lines);
    let shared = bytes.clone();
    let complete = parsed.parse(&shared).map_err(error_of)?;
    if !complete.is_complete() {
        return Err(HeadError::Malformed);
    }
    let (Some(status), Some(version)) = (parsed.code, parsed.version) else {
        return Err(HeadError::Malformed);
    };
    let reason = parsed.reason.unwrap_or_default().to_owned();
    let headers = spans(bytes, parsed.headers);
    let http11 = version == 1;
    let framing = headers.framing(http11)?;
    let body = if bodiless || status < 200 || status == 204 || status == 304 {
        BodyScanner::Length(0)
    } else {
        framing.unwrap_or(BodyScanner::UntilClose)
    };
    let keep_alive = headers.keeps_alive(http11) && !matches!(body, BodyScanner::UntilClose);
    Ok(ReplyHead {
        status,
        reason,
        headers,
        body,
        keep_alive,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<RequestHead, HeadError> {
        request(Bytes::copy_from_slice(text.as_bytes()))
    }

    #[test]
    fn framing_is_one_or_none() {
        let ok =
            parse("POST /a?b HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\nE:\r\n\r\n").unwrap();
        assert!(matches!(ok.body, BodyScanner::Length(12)));
        assert_eq!((ok.path(), ok.headers.get("e")), ("/a", Some(&b""[..])));
        for (bad, why) in [
            (
                "Content-Length: 1\r\nContent-Length: 1\r\n",
                HeadError::Ambiguous,
            ),
            (
                "Content-Length: 1\r\nContent-Length: 2\r\n",
                HeadError::Ambiguous,
            ),
            ("Content-Length: 1, 1\r\n", HeadError::Ambiguous),
            ("Content-Length: +1\r\n", HeadError::Ambiguous),
            ("Content-Length: 0x1\r\n", HeadError::Ambiguous),
            (
                "Content-Length: 99999999999999999999\r\n",
                HeadError::Ambiguous,
            ),
            ("Content-Length:\r\n", HeadError::Ambiguous),
            (
                "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
                HeadError::Ambiguous,
            ),
            (
                "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
                HeadError::Ambiguous,
            ),
            (
                "Transfer-Encoding: gzip, chunked\r\n",
                HeadError::TransferCoding,
            ),
            ("Transfer-Encoding: xchunked\r\n", HeadError::TransferCoding),
            ("Transfer-Encoding : chunked\r\n", HeadError::Malformed),
            ("A: b\nContent-Length: 3\r\n", HeadError::Malformed),
            ("A: b\r\n folded: 3\r\n", HeadError::Malformed),
        ] {
            let text = format!("POST / HTTP/1.1\r\nHost: x\r\n{bad}\r\n");
            assert_eq!(parse(&text).err(), Some(why), "{bad:?}");
        }
    }

    #[test]
    fn heads_are_bounded() {
        assert_eq!(head_length(b"GET / HTTP/1.1\r\n\r\nx", 0), Ok(Some(18)));
        assert_eq!(head_length(b"GET / HTTP/1.1\r\n\r", 0), Ok(None));
        assert_eq!(head_length(b"GET / HTTP/1.1\r\n\r\n", 17), Ok(Some(18)));
        assert_eq!(
            head_length(&vec![b'a'; HEAD_BYTES_MAX], 0),
            Err(HeadError::TooLarge)
        );
    }
}
