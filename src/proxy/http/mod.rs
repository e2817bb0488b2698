//! HTTP/1.1 as a proxy needs it: strict about what frames a message, lazy about everything else.
//!
//! Owns parsing of heads (by `httparse`), body framing, the client's connection and the workers' connections. A reply's
//! body is relayed as the bytes that came, chunk framing included; a stock client and server would take every chunk
//! apart and put it together again through two tasks and a channel. Knows nothing of OpenAI, roles or policies.

pub(crate) mod bodies;
pub(crate) mod chunked;
pub(crate) mod downstream;
pub(crate) mod head;
pub(crate) mod upstream;

/// Most bytes of a request's or reply's head.
pub(crate) const HEAD_BYTES_MAX: usize = 64 << 10;
/// Most header lines of a head.
pub(crate) const HEADERS_MAX: usize = 128;
