//! Any bytes from a client or a worker of the proxy: an engine's KV events and the frames they come in.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mooncake::proxy::fuzz::events(bytes));
