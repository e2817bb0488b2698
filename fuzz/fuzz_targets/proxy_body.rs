//! Any bytes from a client or a worker of the proxy: a request's or a reply's body.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mooncake::proxy::fuzz::body(bytes));
