//! Any bytes from a caller (and from a server) during the handshake.
#![no_main]
use mooncake::base::handshake::{LaneKind, accept, connect};
use mooncake::base::{id::Id128, trust::ClusterKeys};

struct Stream<'a>(&'a [u8]);
impl std::io::Read for Stream<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(out)
    }
}
impl std::io::Write for Stream<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let keys = ClusterKeys::derive(None);
    // Nobody who sends arbitrary bytes can know the nonce: a success would be a forged proof.
    assert!(accept(&mut Stream(bytes), LaneKind::Data, Id128::NONE, &keys, false).is_err());
    assert!(connect(&mut Stream(bytes), LaneKind::Data, Id128::NONE, &keys).is_err());
});
