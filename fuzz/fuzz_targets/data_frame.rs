//! Any bytes on a data lane.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mooncake::engine::transport::fuzz_frame(bytes));
