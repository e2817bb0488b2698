//! Memory for long request bodies, used again.
//!
//! A fresh piece of that size is pages which the kernel must clear and map, and takes back when the request is over: a sixth of
//! what a prompt of 256 KB cost. Owns a few pieces and their bound. A piece comes back while its body is still being sent,
//! and serves again once nobody holds any of it.

use std::collections::VecDeque;

use bytes::BytesMut;
use parking_lot::Mutex;

/// Bodies of this length are worth it. Shorter ones the allocator keeps by itself.
pub(crate) const LONG_BYTES: usize = 64 << 10;
/// Longer ones get their memory as they come.
pub(crate) const LONG_BYTES_MAX: usize = 1 << 20;
/// Pieces kept.
const SPARE_MAX: usize = 8;

/// Pieces of memory.
#[derive(Debug, Default)]
pub(crate) struct Bodies(Mutex<VecDeque<BytesMut>>);

impl Bodies {
    /// Empty memory with room for `wanted` bytes, at most [`LONG_BYTES_MAX`].
    pub(super) fn take(&self, wanted: usize) -> BytesMut {
        let mut spare = self.0.lock();
        let free = spare.iter_mut().position(|s| s.try_reclaim(wanted));
        free.and_then(|at| spare.remove(at))
            .unwrap_or_else(|| BytesMut::with_capacity(wanted.next_multiple_of(LONG_BYTES)))
    }

    /// Keeps what is left after the body was split off.
    pub(super) fn give(&self, rest: BytesMut) {
        let mut spare = self.0.lock();
        if spare.len() >= SPARE_MAX {
            spare.pop_front();
        }
        spare.push_back(rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_serves_again_when_nobody_holds_it() {
        let bodies = Bodies::default();
        let body = |length| {
            let mut memory = bodies.take(length);
            assert!(memory.is_empty() && memory.capacity() >= length);
            memory.resize(length, 7);
            let body = memory.split_to(length).freeze();
            bodies.give(memory);
            body
        };
        let (first, second) = (body(256 << 10), body(256 << 10));
        assert_ne!(
            first.as_ptr(),
            second.as_ptr(),
            "the first is still being sent"
        );
        let place = first.as_ptr();
        drop(first);
        assert_eq!(body(200 << 10).as_ptr(), place);
        assert_ne!(body(512 << 10).as_ptr(), place, "too small");
        assert!(second.iter().all(|b| *b == 7));
        for _ in 0..40 {
            body(LONG_BYTES);
        }
        assert!(bodies.0.lock().len() <= SPARE_MAX);
    }
}
