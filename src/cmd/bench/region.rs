//! Memory that is measured with: touched, and on huge pages where the system gives any, for memcpy as for our client.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};

use crate::engine::batch::LocalSlice;

const HUGE_PAGE: usize = 2 << 20;

/// Bytes of one size side by side.
pub(super) struct Region {
    base: *mut u8,
    layout: Layout,
}

impl Region {
    /// `length` bytes of `0x5A`.
    pub(super) fn new(length: usize) -> anyhow::Result<Self> {
        let length = length.max(1).next_multiple_of(HUGE_PAGE);
        let layout = Layout::from_size_align(length, HUGE_PAGE)?;
        // SAFETY: the layout is not empty; advice on our own memory changes no byte; it is written inside its length, for the
        // first time after the advice.
        unsafe {
            let base = alloc(layout);
            if base.is_null() {
                handle_alloc_error(layout);
            }
            let _ = rustix::mm::madvise(base.cast(), length, rustix::mm::Advice::LinuxHugepage);
            base.write_bytes(0x5A, length);
            Ok(Self { base, layout })
        }
    }

    pub(super) fn len(&self) -> usize {
        self.layout.size()
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: initialised, and borrowed as `self` is.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.layout.size()) }
    }

    /// The first `count` blocks of `size` bytes, which the caller promises to fit.
    pub(super) fn slices(&self, size: usize, count: usize) -> Vec<[LocalSlice; 1]> {
        assert!(count * size <= self.len(), "blocks beyond their region");
        // SAFETY: in bounds; whoever uses them holds the region.
        (0..count)
            .map(|n| [unsafe { LocalSlice::new(self.base.add(n * size), size) }])
            .collect()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.base, self.layout) };
    }
}
