//! Any bytes from a client or a worker of the proxy: bodies, heads, chunks.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mooncake::proxy::fuzz(bytes));
