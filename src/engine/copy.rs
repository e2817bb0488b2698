//! Copies between memories of this host.
//!
//! Owns how bytes are moved by a processor: blocks that nobody reads again at once go past the caches. An ordinary store
//! first fetches the line it overwrites and pushes others out; a streaming one does neither, which is worth a fifth (hot
//! sources) to a factor of two (`docs/performance-notes.md`). Refuses to know what the bytes are.

/// Reads of objects from this size on are streamed: smaller ones may well be read from the cache right afterwards.
pub const STREAMED_READ: u64 = 64 << 10;
/// Slices below this are copied as usual: streaming a few lines costs more than it saves.
const STREAMED_SLICE: usize = 1 << 10;

/// Copies `length` bytes that the calling thread will not look at soon. Ordered before every later store of this thread,
/// as an ordinary copy is.
///
/// # Safety
/// As `ptr::copy_nonoverlapping::<u8>`: `length` readable bytes at `source`, as many writable ones at `target`, apart from
/// each other. The source may be changed by others meanwhile (shared memory); then the copy is torn.
pub unsafe fn stream(source: *const u8, target: *mut u8, length: usize) {
    if length < STREAMED_SLICE {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(source, target, length) };
        return;
    }
    // SAFETY: the caller's promise.
    unsafe { lines(source, target, length) };
}

#[cfg(target_arch = "x86_64")]
unsafe fn lines(source: *const u8, target: *mut u8, length: usize) {
    use std::arch::x86_64::{
        __m128i, _MM_HINT_NTA, _mm_loadu_si128, _mm_prefetch, _mm_sfence, _mm_stream_si128,
    };
    const LINE: usize = 64;
    const LANE: usize = size_of::<__m128i>();
    /// How far ahead of the copy its source is fetched.
    const AHEAD: usize = 512;

    let head = target.align_offset(LINE).min(length);
    let whole = (length - head) / LINE * LINE;
    // SAFETY: head + whole <= length, so all is inside what the caller promised; targets of streaming stores are aligned
    // to a line by `head`; a prefetch may name any address. SSE2 is part of x86-64.
    unsafe {
        std::ptr::copy_nonoverlapping(source, target, head);
        let (from, to) = (source.add(head), target.add(head));
        for at in (0..whole).step_by(LINE) {
            let (from, to) = (from.add(at).cast::<__m128i>(), to.add(at).cast::<__m128i>());
            _mm_prefetch::<_MM_HINT_NTA>(from.cast::<i8>().wrapping_add(AHEAD));
            let parts = [0, 1, 2, 3].map(|n| _mm_loadu_si128(from.add(n)));
            for (n, part) in parts.into_iter().enumerate() {
                _mm_stream_si128(to.add(n), part);
            }
        }
        let done = head + whole;
        std::ptr::copy_nonoverlapping(source.add(done), target.add(done), length - done);
        // Streaming stores are ordered by nothing else, not even by a release store.
        _mm_sfence();
    }
    const { assert!(LINE == 4 * LANE) };
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn lines(source: *const u8, target: *mut u8, length: usize) {
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(source, target, length) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_every_byte_and_no_other() {
        let source: Vec<u8> = (0..9000_u32).map(|n| (n * 7 % 251) as u8).collect();
        for length in [0, 1, 63, 1023, 1024, 1025, 1087, 4096, 8191] {
            for from in [0, 1, 17] {
                for to in [0, 1, 48, 63] {
                    let mut target = vec![0xEE_u8; 8191 + 128];
                    // SAFETY: both are larger than offset + length.
                    unsafe {
                        stream(source[from..].as_ptr(), target[to..].as_mut_ptr(), length);
                    }
                    assert_eq!(target[to..to + length], source[from..from + length]);
                    assert!(target[..to].iter().all(|b| *b == 0xEE));
                    assert!(target[to + length..].iter().all(|b| *b == 0xEE));
                }
            }
        }
    }
}
