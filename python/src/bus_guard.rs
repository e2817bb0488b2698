//! Files that are cut while their memory is lent: touching what is no longer there raises SIGBUS, which would end the
//! process. Here the memory becomes empty memory instead, as a whole, and is marked as lost.
//!
//! As a whole, so that nobody reads half an object: whoever copies looks at the object's version afterwards, and finds none.
//! A file that is cut while nobody touches it is found by [`Watch::look`], which asks the file: also one that was grown
//! again since, by the blocks it lost. What happens wholly between two looks, and is touched by nobody in between, is not
//! found. Knows no nodes. What is not about watched memory goes to whoever handled the signal before.

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use mooncake::engine::memory::Memory;

/// Files lent at the same time that are watched; more are refused.
const PLACES: usize = 256;

/// A watched range; read by the signal handler, so without locks. Empty when `memory` is null, which is written last and
/// cleared first.
struct Place {
    start: AtomicUsize,
    length: AtomicUsize,
    memory: AtomicPtr<Memory>,
}

static WATCHED: [Place; PLACES] = [const {
    Place {
        start: AtomicUsize::new(0),
        length: AtomicUsize::new(0),
        memory: AtomicPtr::new(null_mut()),
    }
}; PLACES];
/// Who handled the signal before; set once, before the handler is there.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Memory of a file; what guards it stays for as long as anybody holds the memory.
pub(crate) struct Watch {
    memory: Arc<Memory>,
    place: &'static Place,
    file: File,
    /// Where the memory ends in the file.
    end: u64,
    /// Whether every byte of the range had a block when it was lent, and some of them can be missed.
    counts_blocks: bool,
}

/// A taken place; goes with the memory, before it is unmapped.
struct Taken(&'static Place);

impl Drop for Taken {
    fn drop(&mut self) {
        self.0.length.store(0, Ordering::Release);
        self.0.memory.store(null_mut(), Ordering::Release);
    }
}

impl Watch {
    /// Watches memory that a file has from `offset` on; `None` when too much is watched already. Once for a memory.
    pub(crate) fn new(memory: Arc<Memory>, file: File, offset: u64) -> Option<Self> {
        install();
        let pointer = Arc::as_ptr(&memory).cast_mut();
        let taken = |place: &&Place| {
            // Half a place: the handler passes over a range of no length.
            let (order, failed) = (Ordering::AcqRel, Ordering::Acquire);
            let swapped = place
                .memory
                .compare_exchange(null_mut(), pointer, order, failed);
            swapped.is_ok()
        };
        let place = WATCHED.iter().find(taken)?;
        place
            .start
            .store(memory.as_ptr() as usize, Ordering::Release);
        place.length.store(memory.len(), Ordering::Release);
        memory.keep(|_: &Taken| false, || Arc::new(Taken(place)));
        let length = memory.len() as u64;
        let counts_blocks = file
            .metadata()
            .is_ok_and(|about| allocated(&about) >= length);
        Some(Self {
            end: offset + length,
            memory,
            place,
            file,
            counts_blocks,
        })
    }

    /// Asks the file; whether the memory is lost, now or since earlier.
    pub(crate) fn look(&self) -> bool {
        if self.memory.is_lost() {
            return true;
        }
        let Ok(about) = self.file.metadata() else {
            return false;
        };
        let holes = self.counts_blocks && allocated(&about) < self.memory.len() as u64;
        if about.len() < self.end || holes {
            self.place.replace();
        }
        self.memory.is_lost()
    }
}

/// Bytes of a file that have a block.
fn allocated(about: &std::fs::Metadata) -> u64 {
    about.blocks().saturating_mul(512)
}

fn install() {
    static INSTALLED: std::sync::Once = std::sync::Once::new();
    INSTALLED.call_once(|| {
        BEFORE.get_or_init(|| {
            // SAFETY: a structure of integers and pointers, filled by the call.
            unsafe {
                let mut before: libc::sigaction = std::mem::zeroed();
                libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut before);
                before
            }
        });
        // SAFETY: structures of integers and pointers; the handler is of the kind that SA_SIGINFO announces.
        unsafe {
            let mut ours: libc::sigaction = std::mem::zeroed();
            ours.sa_sigaction = on_bus as *const () as usize;
            ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            libc::sigemptyset(&raw mut ours.sa_mask);
            libc::sigaction(libc::SIGBUS, &raw const ours, null_mut());
        }
    });
}

/// Only system calls and atomics: it may interrupt anything.
extern "C" fn on_bus(number: c_int, about: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel's, for the time of the call.
    let address = unsafe { (*about).si_addr() } as usize;
    if !WATCHED.iter().any(|place| place.replaced(address)) {
        pass_on(number, about, context);
    }
}

impl Place {
    /// Whether the address is in this range; then the range is empty memory now.
    fn replaced(&self, address: usize) -> bool {
        let (start, length) = (
            self.start.load(Ordering::Acquire),
            self.length.load(Ordering::Acquire),
        );
        let memory = self.memory.load(Ordering::Acquire);
        if memory.is_null() || !(start..start + length).contains(&address) {
            return false;
        }
        self.replace()
    }

    /// Makes the range empty memory; whether it is. Only system calls and atomics.
    fn replace(&self) -> bool {
        let (start, length) = (
            self.start.load(Ordering::Acquire),
            self.length.load(Ordering::Acquire),
        );
        let memory = self.memory.load(Ordering::Acquire);
        // SAFETY: whoever accesses the range keeps its memory; the mark comes before the mapping, so that nobody who has
        // written to what is gone publishes it.
        unsafe { (*memory).mark_lost() };
        let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: over the watched mapping, at its place and of its length.
        let mapped = unsafe { libc::mmap(start as *mut c_void, length, access, flags, -1, 0) };
        mapped != libc::MAP_FAILED
    }
}

fn pass_on(number: c_int, about: *mut libc::siginfo_t, context: *mut c_void) {
    let before = BEFORE.get();
    let handler = before.map_or(libc::SIG_DFL, |b| b.sa_sigaction);
    if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
        // SAFETY: the kernel's, for the time of the call.
        let was_sent = unsafe { (*about).si_code } <= 0;
        if was_sent && handler == libc::SIG_IGN {
            return;
        }
        // An access is repeated on return, and the process ends as it would have without us; a signal that was sent is sent again.
        // SAFETY: sets the default.
        unsafe {
            libc::signal(number, libc::SIG_DFL);
            if was_sent {
                libc::raise(number);
            }
        }
        return;
    }
    let has_more = before.is_some_and(|b| b.sa_flags & libc::SA_SIGINFO != 0);
    // SAFETY: it was registered as a handler of this kind.
    unsafe {
        if has_more {
            type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);
            std::mem::transmute::<usize, Handler>(handler)(number, about, context);
        } else {
            std::mem::transmute::<usize, extern "C" fn(c_int)>(handler)(number);
        }
    }
}
