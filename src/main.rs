//! The `mooncake` binary.
fn main() {}
