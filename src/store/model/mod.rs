//! Plain data that master, node and client share: keys, headers, errors. No I/O, no time.

pub mod error;
pub mod header;
pub mod key;
