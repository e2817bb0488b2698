//! Best-fit allocator of offsets within one segment.
//!
//! Keeps free ranges only, by offset (to coalesce) and by size (to choose): allocating and freeing are logarithmic in
//! the number of *free* ranges, and any part of an allocated range may be freed on its own, which is how arenas dissolve.
//! Invariant A1: free ranges never overlap, never touch, and what is handed out was free.

use std::collections::{BTreeMap, BTreeSet};

use crate::store::model::header::ALIGNMENT;

/// Free ranges of one segment.
#[derive(Clone, Debug)]
pub struct OffsetAllocator {
    size: u64,
    free: u64,
    by_offset: BTreeMap<u64, u64>,
    by_size: BTreeSet<(u64, u64)>,
}

/// A range that was not allocated, or lies outside.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("range {offset}+{length} is not allocated")]
pub struct NotAllocated {
    /// Start.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

impl OffsetAllocator {
    /// All free. A tail shorter than the alignment is left unused.
    pub fn new(size: u64) -> Self {
        let size = size / ALIGNMENT * ALIGNMENT;
        let mut new = Self {
            size,
            free: 0,
            by_offset: BTreeMap::new(),
            by_size: BTreeSet::new(),
        };
        if size > 0 {
            new.insert(0, size);
        }
        new
    }

    fn insert(&mut self, offset: u64, length: u64) {
        self.by_offset.insert(offset, length);
        self.by_size.insert((length, offset));
        self.free += length;
    }

    fn take(&mut self, offset: u64, length: u64) {
        self.by_offset.remove(&offset);
        self.by_size.remove(&(length, offset));
        self.free -= length;
    }

    /// The smallest free range that fits, from its start. `length` is rounded up to the alignment.
    pub fn allocate(&mut self, length: u64) -> Option<u64> {
        let length = length.checked_next_multiple_of(ALIGNMENT)?.max(ALIGNMENT);
        let (found, offset) = self.by_size.range((length, 0)..).next().copied()?;
        self.take(offset, found);
        if found > length {
            self.insert(offset + length, found - length);
        }
        Some(offset)
    }

    /// Exactly this range, when all of it is free: to take over what a node already holds.
    pub fn allocate_at(&mut self, offset: u64, length: u64) -> bool {
        let Some(end) = length
            .checked_next_multiple_of(ALIGNMENT)
            .and_then(|l| offset.checked_add(l))
        else {
            return false;
        };
        if length == 0 || !offset.is_multiple_of(ALIGNMENT) {
            return false;
        }
        let Some((start, found)) = self
            .by_offset
            .range(..=offset)
            .next_back()
            .map(|(s, l)| (*s, *l))
        else {
            return false;
        };
        if start + found < end {
            return false;
        }
        self.take(start, found);
        if start < offset {
            self.insert(start, offset - start);
        }
        if end < start + found {
            self.insert(end, start + found - end);
        }
        true
    }

    /// Gives a range back and joins it with its free neighbours.
    ///
    /// # Errors
    /// When any of it is free already or outside: nothing is changed, and the caller has a defect to report.
    pub fn free(&mut self, offset: u64, length: u64) -> Result<(), NotAllocated> {
        let wrong = NotAllocated { offset, length };
        let length = length.checked_next_multiple_of(ALIGNMENT).ok_or(wrong)?;
        let end = offset.checked_add(length).ok_or(wrong)?;
        if length == 0 || end > self.size || !offset.is_multiple_of(ALIGNMENT) {
            return Err(wrong);
        }
        let before = self
            .by_offset
            .range(..=offset)
            .next_back()
            .map(|(s, l)| (*s, *l));
        let after = self.by_offset.range(offset..).next().map(|(s, l)| (*s, *l));
        if before.is_some_and(|(s, l)| s + l > offset) || after.is_some_and(|(s, _)| s < end) {
            return Err(wrong);
        }
        let (mut start, mut total) = (offset, length);
        if let Some((s, l)) = before.filter(|(s, l)| s + l == offset) {
            self.take(s, l);
            start = s;
            total += l;
        }
        if let Some((s, l)) = after.filter(|(s, _)| *s == end) {
            self.take(s, l);
            total += l;
        }
        self.insert(start, total);
        Ok(())
    }

    /// Capacity.
    pub fn size(&self) -> u64 {
        self.size
    }
    /// Bytes allocated.
    pub fn used(&self) -> u64 {
        self.size - self.free
    }
    /// Largest single range that could be allocated.
    pub fn largest_free(&self) -> u64 {
        self.by_size.last().map_or(0, |(length, _)| *length)
    }
    /// Free ranges as `(offset, length)`, the largest first, and whether that is all of them: at most 100,000.
    pub fn largest_free_ranges(&self) -> (Vec<(u64, u64)>, bool) {
        const RANGES_MAX: usize = 100_000;
        let largest = self.by_size.iter().rev().take(RANGES_MAX);
        let ranges = largest.map(|(length, offset)| (*offset, *length)).collect();
        (ranges, self.by_size.len() <= RANGES_MAX)
    }
    /// Number of free ranges.
    pub fn free_ranges(&self) -> usize {
        self.by_offset.len()
    }
}

/// How full each of `cells` equal parts of a segment is, given its free ranges: 0 = free, 255 = full.
pub fn map_of(size: u64, free_ranges: &[(u64, u64)], cells: usize) -> Vec<u8> {
    let mut free = vec![0u64; cells];
    let scaled =
        |n: u64, by: u64, to: u64| (u128::from(n) * u128::from(by) / u128::from(to.max(1))) as u64;
    let start_of = |cell: usize| scaled(size, cell as u64, cells as u64);
    for (offset, length) in free_ranges {
        let end = offset + length;
        // Rounding may name the part before the one in which the range begins.
        let first = scaled(*offset, cells as u64, size) as usize;
        for (cell, free) in free.iter_mut().enumerate().skip(first.saturating_sub(1)) {
            let (from, to) = (start_of(cell), start_of(cell + 1));
            if from >= end {
                break;
            }
            *free += to.min(end).saturating_sub(from.max(*offset));
        }
    }
    let filled = |(cell, free): (usize, &u64)| {
        let whole = start_of(cell + 1) - start_of(cell);
        let used = u128::from(whole.saturating_sub(*free)) * 255;
        // A part with anything in it is not shown as free.
        used.div_ceil(u128::from(whole.max(1))) as u8
    };
    free.iter().enumerate().map(filled).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn coalesces_and_refuses_double_free() {
        let mut a = OffsetAllocator::new(1024);
        let x = a.allocate(100).unwrap();
        let y = a.allocate(100).unwrap();
        assert_eq!((x, y, a.used()), (0, 128, 256));
        a.free(x, 100).unwrap();
        assert!(a.free(x, 100).is_err());
        a.free(y, 100).unwrap();
        assert_eq!((a.free_ranges(), a.largest_free()), (1, 1024));
        assert!(a.allocate(1025).is_none());
        assert!(a.allocate_at(512, 64));
        assert!(!a.allocate_at(448, 128));
        assert_eq!(a.free_ranges(), 2);
        assert!(a.free(0, 64).is_err(), "it is free");
        assert!(a.free(1024, 64).is_err(), "outside");
    }

    #[test]
    fn the_map_of_a_segment() {
        let map = |a: &OffsetAllocator, cells| map_of(a.size(), &a.largest_free_ranges().0, cells);
        let mut a = OffsetAllocator::new(64 * 100);
        assert_eq!(map(&a, 4), [0; 4]);
        assert!(a.allocate_at(0, 64 * 25) && a.allocate_at(64 * 60, 64));
        assert_eq!(map(&a, 4), [255, 0, 11, 0]);
        assert!(map(&a, 0).is_empty());
        assert_eq!(map(&a, 1), [67]);
        assert_eq!(map(&OffsetAllocator::new(0), 2), [0, 0]);
        for cells in [3, 7, 64, 1000] {
            assert_eq!(map(&a, cells).len(), cells);
        }
    }

    proptest! {
        /// A1 against a bitmap: no overlap, exact accounting, neighbours joined.
        #[test]
        fn against_a_bitmap(ops in proptest::collection::vec((0u8..3, 0u64..64, 1u64..12), 1..200)) {
            const CELLS: usize = 64;
            let mut a = OffsetAllocator::new(CELLS as u64 * 64);
            let mut used = [false; CELLS];
            let mut live: Vec<(u64, u64)> = Vec::new();
            for (kind, at, cells) in ops {
                match kind {
                    0 => if let Some(offset) = a.allocate(cells * 64) {
                        for c in 0..cells {
                            let i = (offset / 64 + c) as usize;
                            prop_assert!(!used[i]);
                            used[i] = true;
                        }
                        live.push((offset, cells));
                    } else {
                        let longest = used.split(|u| *u).map(<[bool]>::len).max().unwrap_or(0);
                        prop_assert!((longest as u64) < cells);
                    },
                    1 => {
                        let fits = at + cells <= CELLS as u64
                            && used[at as usize..(at + cells) as usize].iter().all(|u| !u);
                        prop_assert_eq!(a.allocate_at(at * 64, cells * 64), fits);
                        if fits {
                            used[at as usize..(at + cells) as usize].fill(true);
                            live.push((at * 64, cells));
                        }
                    }
                    _ => if !live.is_empty() {
                        let (offset, cells) = live.swap_remove(at as usize % live.len());
                        prop_assert!(a.free(offset, cells * 64).is_ok());
                        prop_assert!(a.free(offset, cells * 64).is_err());
                        let i = (offset / 64) as usize;
                        used[i..i + cells as usize].fill(false);
                    }
                }
                prop_assert_eq!(a.used(), used.iter().filter(|u| **u).count() as u64 * 64);
                let runs = used.split(|u| *u).filter(|r| !r.is_empty()).count();
                prop_assert_eq!(a.free_ranges(), runs);
            }
        }
    }
}
