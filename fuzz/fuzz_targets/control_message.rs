//! Any bytes as a message of a control lane, a notify, a node session.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mooncake::store::wire::fuzz(bytes));
