//! Any bytes from a client or a worker of the proxy: heads, chunk framing, a metrics page.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mooncake::proxy::fuzz::http(bytes));
