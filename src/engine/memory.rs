//! Memory that can be shared with other processes of this host: memfd mappings, huge pages where there are any.
//!
//! Owns mapping and unmapping; refuses to know what lies inside. The bytes are shared with other processes and threads
//! without locks, so no Rust reference into a mapping is ever formed here: only raw pointers and atomics.

use std::any::Any;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// What pages a mapping has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// Reserved 2 MiB pages.
    Huge,
    /// Ordinary pages, transparent huge pages advised.
    Small,
}

impl PageKind {
    /// As shown to people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Huge => "huge 2MiB",
            Self::Small => "4KiB",
        }
    }
}

/// How bytes get to and from memory that this process cannot address, an accelerator's.
pub trait DeviceCopies: Send + Sync + std::fmt::Debug {
    /// Copies from the device; returns when the bytes are there.
    ///
    /// # Errors
    /// From the driver.
    ///
    /// # Safety
    /// `target` has `length` writable bytes; the device's range is inside what this was made for.
    unsafe fn read(&self, address: usize, target: *mut u8, length: usize) -> io::Result<()>;

    /// Copies to the device; returns when the bytes are there.
    ///
    /// # Errors
    /// From the driver.
    ///
    /// # Safety
    /// `source` has `length` readable bytes; the device's range is inside what this was made for.
    unsafe fn write(&self, address: usize, source: *const u8, length: usize) -> io::Result<()>;

    /// A dma-buf of the range, and where the range begins within it, so that a NIC can reach it without this process.
    ///
    /// # Errors
    /// `Unsupported` where the driver or this memory cannot.
    fn export(&self, _address: usize, _length: usize) -> io::Result<(OwnedFd, u64)> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// What transports keep with a memory: it goes before the memory does.
#[derive(Default)]
struct Companions(Mutex<Vec<Arc<dyn Any + Send + Sync>>>);

impl std::fmt::Debug for Companions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} companions", self.0.lock().len())
    }
}

/// A shared mapping of a memfd, unmapped on drop; or memory of the caller's, borrowed, the host's or a device's.
#[derive(Debug)]
pub struct Memory {
    base: NonNull<u8>,
    length: usize,
    /// What peers of this host may map; none for memory of the caller's or of a file.
    fd: Option<OwnedFd>,
    /// Whether it is unmapped on drop.
    owned: bool,
    pages: PageKind,
    /// Chunks whose pages are in our page tables already: a fault per page costs more than copying it. Only for mappings
    /// of a peer's memory; whoever created memory touches all of it.
    touched: Box<[AtomicBool]>,
    /// Set for memory of a device: its addresses are not touched here.
    device: Option<Arc<dyn DeviceCopies>>,
    companions: Companions,
    /// What lay here is gone (a file that was cut): nothing is published here any more.
    lost: AtomicBool,
}

// SAFETY: a mapping is not tied to a thread; all access goes through raw pointers and atomics (module header).
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

const HUGE_PAGE: usize = 2 << 20;
/// Chunk in which page tables of a peer's memory are filled.
const CHUNK: usize = 2 << 20;

impl Memory {
    /// Creates `length` bytes of zeroed memory, untouched: pages come on first use or by [`Memory::populate`].
    ///
    /// Huge pages are taken when enough are reserved and `length` is a multiple of 2 MiB.
    ///
    /// # Errors
    /// From the kernel (no memory, limits).
    pub fn create(name: &str, length: usize) -> io::Result<Self> {
        if length.is_multiple_of(HUGE_PAGE)
            && let Ok(memory) = Self::create_with(name, length, PageKind::Huge)
        {
            return Ok(memory);
        }
        Self::create_with(name, length, PageKind::Small)
    }

    fn create_with(name: &str, length: usize, pages: PageKind) -> io::Result<Self> {
        let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        if pages == PageKind::Huge {
            flags |= MemfdFlags::HUGETLB;
        }
        let fd = rustix::fs::memfd_create(name, flags)?;
        rustix::fs::ftruncate(&fd, length as u64)?;
        // A peer that maps this must not be able to shrink it under us (SIGBUS).
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        let _ = rustix::fs::fcntl_add_seals(&fd, seals);
        Self::map(fd, length, pages)
    }

    /// Maps a descriptor received from a peer.
    ///
    /// # Errors
    /// When it is smaller than `length` or cannot be mapped.
    pub fn from_fd(fd: OwnedFd, length: usize) -> io::Result<Self> {
        let stat = rustix::fs::fstat(&fd)?;
        if (stat.st_size as u64) < length as u64 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the shared memory is smaller than announced",
            ));
        }
        let seals = rustix::fs::fcntl_get_seals(&fd)?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the shared memory is not sealed against shrinking",
            ));
        }
        let mut memory = Self::map(fd, length, PageKind::Small)?;
        let chunks = length.div_ceil(CHUNK);
        memory.touched = (0..chunks).map(|_| AtomicBool::new(false)).collect();
        Ok(memory)
    }

    /// Maps part of a file, whose blocks are all allocated first: a page without one would be a signal. It is not handed to
    /// other processes, since nothing keeps a file from being cut. Touching what was cut off is SIGBUS: whoever lends files and
    /// wants to survive that handles the signal, maps something else and calls [`Memory::mark_lost`].
    ///
    /// # Errors
    /// `InvalidInput` for what is not a regular file, a range outside of it or not on page boundaries; from the kernel.
    pub fn from_file(file: &std::fs::File, offset: u64, length: usize) -> io::Result<Self> {
        let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        let about = file.metadata()?;
        if !about.is_file() {
            return Err(wrong("not a regular file"));
        }
        let end = offset.checked_add(length as u64);
        if length == 0 || end.is_none_or(|end| end > about.len()) {
            return Err(wrong("the range does not lie inside the file"));
        }
        if !offset.is_multiple_of(4096) || !length.is_multiple_of(4096) {
            return Err(wrong("the range is not on page boundaries"));
        }
        let keep = rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(file, keep, offset, length as u64)?;
        let mut memory = Self::map_at(
            file.as_fd().try_clone_to_owned()?,
            offset,
            length,
            PageKind::Small,
        )?;
        memory.fd = None;
        Ok(memory)
    }

    fn map(fd: OwnedFd, length: usize, pages: PageKind) -> io::Result<Self> {
        Self::map_at(fd, 0, length, pages)
    }

    fn map_at(fd: OwnedFd, offset: u64, length: usize, pages: PageKind) -> io::Result<Self> {
        // Huge pages are reserved now or the mapping fails: a touch without a page would be a SIGBUS.
        let reserve = match pages {
            PageKind::Huge => MapFlags::empty(),
            PageKind::Small => MapFlags::NORESERVE,
        };
        let map_at = |base: *mut u8, fixed: MapFlags| {
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            let flags = MapFlags::SHARED | reserve | fixed;
            // SAFETY: at an address of the kernel's choice, or over a reservation that nobody else knows of.
            unsafe { rustix::mm::mmap(base.cast(), length, protection, flags, &fd, offset) }
        };
        let aligned = if pages == PageKind::Small && length >= HUGE_PAGE {
            // Where this fails the reservation may be gone already: it is not touched again.
            let base = reserve_aligned(length)?;
            map_at(base, MapFlags::FIXED).ok()
        } else {
            None
        };
        // Reserved huge pages, of whatever size, are aligned by the kernel.
        let base = match aligned {
            Some(base) => base,
            None => map_at(std::ptr::null_mut(), MapFlags::empty())?,
        };
        let base = NonNull::new(base.cast::<u8>())
            .ok_or_else(|| io::Error::other("mmap returned the null page"))?;
        let memory = Self {
            base,
            length,
            fd: Some(fd),
            owned: true,
            pages,
            touched: Box::default(),
            device: None,
            companions: Companions::default(),
            lost: AtomicBool::new(false),
        };
        if pages == PageKind::Small {
            // SAFETY: advice on our own mapping changes no contents.
            let _ =
                unsafe { rustix::mm::madvise(base.as_ptr().cast(), length, Advice::LinuxHugepage) };
        }
        Ok(memory)
    }

    /// Names memory of the caller's. It cannot be handed to other processes and is left alone on drop.
    ///
    /// # Safety
    /// Mapped readable and writable for as long as this lives.
    pub unsafe fn borrowed(base: NonNull<u8>, length: usize) -> Self {
        Self {
            base,
            length,
            fd: None,
            owned: false,
            pages: PageKind::Small,
            touched: Box::default(),
            device: None,
            companions: Companions::default(),
            lost: AtomicBool::new(false),
        }
    }

    /// Names memory of a device, reached through `copies`. Words in it cannot be read or written.
    pub fn on_device(base: NonNull<u8>, length: usize, copies: Arc<dyn DeviceCopies>) -> Self {
        Self {
            base,
            length,
            fd: None,
            owned: false,
            pages: PageKind::Small,
            touched: Box::default(),
            device: Some(copies),
            companions: Companions::default(),
            lost: AtomicBool::new(false),
        }
    }

    /// How to copy, when this is memory of a device: then pointers into it are only to be handed there.
    pub fn device(&self) -> Option<&Arc<dyn DeviceCopies>> {
        self.device.as_ref()
    }

    /// What a transport keeps with this memory: the one that `is_mine` says yes to, else what `make` makes. It goes with the
    /// memory.
    pub fn keep<T: Any + Send + Sync>(
        &self,
        is_mine: impl Fn(&T) -> bool,
        make: impl FnOnce() -> Arc<T>,
    ) -> Arc<T> {
        let mut kept = self.companions.0.lock();
        let all = kept.iter().filter_map(|k| k.clone().downcast::<T>().ok());
        if let Some(found) = all.into_iter().find(|k| is_mine(k)) {
            return found;
        }
        let made = make();
        kept.push(made.clone());
        made
    }

    /// Touches every page of a range so that later access does not fault. Blocking; changes no byte.
    ///
    /// # Errors
    /// From the kernel (no memory left).
    pub fn populate(&self, offset: usize, length: usize) -> io::Result<()> {
        let end = offset.saturating_add(length).min(self.length);
        let start = offset.min(end) & !4095;
        // SAFETY: populating writes nothing and stays inside this mapping.
        unsafe {
            rustix::mm::madvise(
                self.base.as_ptr().add(start).cast(),
                end - start,
                Advice::LinuxPopulateWrite,
            )?;
        }
        Ok(())
    }

    /// Fills the page tables of the chunks a copy is about to touch, once each.
    pub fn touch(&self, offset: u64, length: u64) {
        if self.touched.is_empty() {
            return;
        }
        let last = (offset + length.max(1) - 1) as usize / CHUNK;
        let first = offset as usize / CHUNK;
        for chunk in first..=last {
            let touched = self.touched.get(chunk);
            if touched.is_some_and(|t| !t.swap(true, Ordering::Relaxed)) {
                // An error means only that the copy faults page by page.
                let _ = self.populate(chunk * CHUNK, CHUNK);
            }
        }
    }

    /// First byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }
    /// Bytes mapped.
    pub fn len(&self) -> usize {
        self.length
    }
    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
    /// What pages it has.
    pub fn pages(&self) -> PageKind {
        self.pages
    }
    /// The memfd, to be handed to a same-host peer; none for borrowed memory.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    /// Pointer to `length` bytes at `offset`; `None` when they do not lie inside.
    pub fn range(&self, offset: u64, length: u64) -> Option<*mut u8> {
        let end = offset.checked_add(length)?;
        // SAFETY: offset <= end <= length of the mapping.
        (end <= self.length as u64).then(|| unsafe { self.as_ptr().add(offset as usize) })
    }

    /// The aligned word at `offset`, shared with every process that maps this.
    pub fn word(&self, offset: u64) -> Option<&AtomicU64> {
        if !offset.is_multiple_of(8) || self.device.is_some() {
            return None;
        }
        let pointer = self.range(offset, 8)?.cast::<AtomicU64>();
        // SAFETY: in bounds, 8-aligned (mappings are page-aligned), valid while `self` lives; concurrent access to it
        // from anywhere is atomic or tolerated as a torn data copy that the word check detects.
        Some(unsafe { &*pointer })
    }

    /// Whether the word at `offset` holds `value` now, ordered after every earlier read of this thread.
    pub fn word_is(&self, offset: u64, value: u64) -> bool {
        std::sync::atomic::fence(Ordering::Acquire);
        self.word(offset)
            .is_some_and(|w| w.load(Ordering::Acquire) == value)
    }

    /// Says that the bytes are gone. Async-signal-safe.
    pub fn mark_lost(&self) {
        self.lost.store(true, Ordering::SeqCst);
    }

    /// Whether the bytes are gone.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }

    /// Publishes `value` at `offset` after every earlier write of this thread; not in memory that is lost, where part of
    /// what was written may be gone.
    pub fn publish(&self, offset: u64, value: u64) {
        if self.is_lost() {
            return;
        }
        if let Some(word) = self.word(offset) {
            word.store(value, Ordering::Release);
        }
    }
}

/// Reserves `length` bytes of addresses from a multiple of a huge page on: only so can huge pages of a file be mapped.
fn reserve_aligned(length: usize) -> io::Result<*mut u8> {
    let pages = length.checked_next_multiple_of(rustix::param::page_size());
    let pages = pages.ok_or(io::ErrorKind::InvalidInput)?;
    let reserved = pages
        .checked_add(HUGE_PAGE)
        .ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: a fresh mapping; what sticks out on either side is unmapped again, and nobody else knows of it.
    unsafe {
        let prot = ProtFlags::empty();
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let start = rustix::mm::mmap_anonymous(std::ptr::null_mut(), reserved, prot, flags)?;
        let before = start.cast::<u8>().align_offset(HUGE_PAGE).min(HUGE_PAGE);
        let base = start.cast::<u8>().add(before);
        let after = reserved - before - pages;
        let _ = (before > 0).then(|| rustix::mm::munmap(start, before));
        let _ = (after > 0).then(|| rustix::mm::munmap(base.add(pages).cast(), after));
        Ok(base)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.companions.0.lock().clear();
        if !self.owned {
            return;
        }
        // SAFETY: mapped by us with this length; nobody holds a pointer longer than the Arc that owns this.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_mapped_where_it_is_whole() {
        use std::io::{Read, Seek, SeekFrom};
        use std::os::fd::AsRawFd;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("segment");
        let mut file = std::fs::OpenOptions::new();
        let file = file.read(true).write(true).create_new(true);
        let mut file = file.open(&path).unwrap();
        file.set_len(16 << 10).unwrap();
        let memory = Memory::from_file(&file, 4096, 8192).unwrap();
        memory.publish(8, 42);
        assert!(memory.fd().is_none(), "nobody else maps it");
        file.seek(SeekFrom::Start(4096 + 8)).unwrap();
        let mut word = [0; 8];
        file.read_exact(&mut word).unwrap();
        assert_eq!(u64::from_ne_bytes(word), 42);
        drop(memory);
        for (offset, length) in [
            (0, 0),
            (0, 20 << 10),
            (100, 4096),
            (u64::MAX, 4096),
            (0, 100),
        ] {
            let refused = Memory::from_file(&file, offset, length).unwrap_err();
            assert_eq!(refused.kind(), std::io::ErrorKind::InvalidInput);
        }
        let null = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/null");
        let null = null.unwrap();
        assert!(null.as_raw_fd() >= 0 && Memory::from_file(&null, 0, 4096).is_err());
    }

    #[test]
    fn maps_shares_and_bounds() {
        let memory = Memory::create("test", 1 << 20).unwrap();
        memory.populate(0, 1 << 20).unwrap();
        assert!(memory.range(1 << 20, 1).is_none());
        assert!(memory.range(u64::MAX, 2).is_none());
        assert!(memory.word(4).is_none());
        memory.publish(8, 42);
        let fd = memory.fd().unwrap().try_clone_to_owned().unwrap();
        let other = Memory::from_fd(fd, 1 << 20).unwrap();
        assert!(other.word_is(8, 42));
        let fd = memory.fd().unwrap().try_clone_to_owned().unwrap();
        assert!(Memory::from_fd(fd, 2 << 20).is_err());
        assert!(
            rustix::fs::ftruncate(memory.fd().unwrap(), 0).is_err(),
            "sealed"
        );
    }
}
