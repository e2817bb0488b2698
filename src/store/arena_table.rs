//! The table at the end of an arena that its writer fills through shared memory: what the node would otherwise be told of
//! every object in a message of its own.
//!
//! ```text
//! objects ──►                                        ◄── records, newest first │ control, 64 bytes │ end of the arena
//!
//! control   0  u64  state    "MKA1" and 1 = open, 2 = sealed by the node, 3 = left by the writer
//!           8  u64  filled   bytes of records, published after each of them
//! record    protobuf DirectoryEntry, zeros up to a multiple of 8, then u64 length of the protobuf
//! ```
//! The writer marks an object's word as pending, appends its record, copies the payload, publishes the word, and only then
//! looks whether the table is still open. The node seals first and reads afterwards. Whatever their order, an object whose
//! writer saw the table open is found complete by the node. Nothing here is trusted: records are checked where they are read.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::engine::memory::Memory;
use crate::store::model::header::ALIGNMENT;

/// Length of the control block.
pub const CONTROL_BYTES: u64 = 64;
/// Longest record: a key of 4 KiB with its group.
const RECORD_MAX: u64 = 16 << 10;

const MAGIC: u64 = (u32::from_le_bytes(*b"MKA1") as u64) << 32;
const OPEN: u64 = MAGIC | 1;
const SEALED: u64 = MAGIC | 2;
const LEFT: u64 = MAGIC | 3;

/// The table of one arena.
#[derive(Clone, Debug)]
pub struct ArenaTable {
    memory: Arc<Memory>,
    /// Start of the arena.
    offset: u64,
    /// Start of the control block.
    control: u64,
}

impl ArenaTable {
    /// The table of an arena in mapped memory; `None` for a range that can hold none.
    pub fn new(memory: Arc<Memory>, offset: u64, length: u64) -> Option<Self> {
        let aligned = offset.is_multiple_of(ALIGNMENT) && length.is_multiple_of(ALIGNMENT);
        memory.range(offset, length)?;
        let control = (offset + length).checked_sub(CONTROL_BYTES)?;
        (aligned && control > offset).then_some(Self {
            memory,
            offset,
            control,
        })
    }

    /// Makes the table empty and open. The node does this before the writer knows of it.
    pub fn open(&self) {
        self.memory.publish(self.control + 8, 0);
        self.memory.publish(self.control, OPEN);
    }

    /// The memory it lies in.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    fn word(&self, offset: u64) -> &AtomicU64 {
        static NOTHING: AtomicU64 = AtomicU64::new(0);
        self.memory.word(offset).unwrap_or(&NOTHING)
    }

    /// Whether the writer may go on; ordered after everything this thread has published.
    pub fn is_open(&self) -> bool {
        fence(Ordering::SeqCst);
        self.word(self.control).load(Ordering::SeqCst) == OPEN
    }

    /// Ends the writer's right to acknowledge; ordered before everything this thread reads.
    pub fn seal(&self) {
        // One that its writer has left stays so.
        let word = self.word(self.control);
        let _ = word.compare_exchange(OPEN, SEALED, Ordering::SeqCst, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The writer promises to touch the arena no more.
    pub fn leave(&self) {
        self.word(self.control).store(LEFT, Ordering::SeqCst);
    }

    /// Whether the writer has promised that.
    pub fn is_left(&self) -> bool {
        self.word(self.control).load(Ordering::SeqCst) == LEFT
    }

    /// Lowest offset the records take now.
    pub fn low(&self) -> u64 {
        let filled = self.word(self.control + 8).load(Ordering::Acquire);
        self.control.saturating_sub(filled).max(self.offset)
    }

    /// Bytes a record of `length` takes.
    pub fn record_bytes(length: usize) -> u64 {
        8 + (length as u64).next_multiple_of(8)
    }

    /// Appends a record; false when it would reach below `floor`. One writer at a time: the caller holds its lock.
    pub fn append(&self, record: &[u8], floor: u64) -> bool {
        let bytes = Self::record_bytes(record.len());
        let high = self.low();
        let Some(low) = high.checked_sub(bytes).filter(|low| *low >= floor) else {
            return false;
        };
        let Some(target) = self.memory.range(low, bytes) else {
            return false;
        };
        if record.len() as u64 > RECORD_MAX {
            return false;
        }
        // SAFETY: in bounds; the table belongs to this writer, and readers look only at what `filled` has published.
        unsafe { std::ptr::copy_nonoverlapping(record.as_ptr(), target, record.len()) };
        self.word(high - 8)
            .store(record.len() as u64, Ordering::Relaxed);
        let filled = self.control - low;
        self.word(self.control + 8).store(filled, Ordering::Release);
        true
    }

    /// The records from `done` bytes on, oldest first, and how far that was. Stops at the first that makes no sense.
    pub fn records(&self, done: u64) -> (Vec<Vec<u8>>, u64) {
        let mut records = Vec::new();
        let mut at = self.control.saturating_sub(done);
        let low = self.low();
        while at > low && at >= self.offset + 8 {
            let length = self.word(at - 8).load(Ordering::Relaxed);
            if length == 0 || length > RECORD_MAX {
                break;
            }
            let Some(start) = at
                .checked_sub(Self::record_bytes(length as usize))
                .filter(|s| *s >= low)
            else {
                break;
            };
            let Some(source) = self.memory.range(start, length) else {
                break;
            };
            let mut record = vec![0; length as usize];
            // SAFETY: in bounds. A lying writer may change it under the copy; what is read is checked afterwards.
            unsafe { std::ptr::copy_nonoverlapping(source, record.as_mut_ptr(), record.len()) };
            records.push(record);
            at = start;
        }
        (records, self.control.saturating_sub(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> ArenaTable {
        let memory = Arc::new(Memory::create("t", 1 << 16).unwrap());
        let table = ArenaTable::new(memory, 4096, 8192).unwrap();
        table.open();
        table
    }

    #[test]
    fn records_come_back_in_order_and_stop_at_the_floor() {
        let t = table();
        assert!(t.is_open());
        let (mut wrote, floor) = (Vec::new(), 4096 + 4000);
        for n in 0..1000usize {
            let record = vec![n as u8; n % 90 + 1];
            if !t.append(&record, floor) {
                break;
            }
            wrote.push(record);
        }
        assert!(wrote.len() > 40 && t.low() >= floor);
        let (first, done) = t.records(0);
        assert_eq!(first, wrote);
        assert_eq!(t.records(done), (Vec::new(), done));
        t.seal();
        assert!(!t.is_open() && !t.is_left());
        t.leave();
        t.seal();
        assert!(t.is_left());
    }

    #[test]
    fn lies_are_bounded() {
        assert!(ArenaTable::new(Arc::new(Memory::create("t", 4096).unwrap()), 0, 8192).is_none());
        assert!(ArenaTable::new(Arc::new(Memory::create("t", 4096).unwrap()), 0, 64).is_none());
        let t = table();
        assert!(t.append(b"good", 4096));
        // A record as long as memory, a table that reaches beyond its arena.
        t.memory.publish(t.low() - 8, u64::MAX);
        t.memory.publish(t.control + 8, u64::MAX);
        assert_eq!(t.records(0).0, [b"good".to_vec()]);
        t.memory.publish(t.low(), 0);
        assert!(t.records(0).0.len() < 8192 / 8);
        assert!(!t.append(b"more", 4096), "no room");
    }
}
