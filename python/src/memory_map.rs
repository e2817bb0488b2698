//! Whether addresses given as integers are memory of this process, so that a wrong one becomes an error code and not a
//! signal.
//!
//! Asks the kernel for the mappings that cover a range: by `PROCMAP_QUERY` (Linux 6.11, a microsecond), else by reading
//! `/proc/self/maps`.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

const READABLE: u64 = 1;
const WRITABLE: u64 = 2;

/// `struct procmap_query` of `linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct ProcmapQuery {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

/// `_IOWR('f', 17, struct procmap_query)`.
const PROCMAP_QUERY: u64 =
    (3 << 30) | ((size_of::<ProcmapQuery>() as u64) << 16) | (0x66 << 8) | 17;

/// The mapping that covers `address`: its end and flags.
fn query(file: &File, address: u64) -> Result<Option<(u64, u64)>, i32> {
    let mut query = ProcmapQuery {
        size: size_of::<ProcmapQuery>() as u64,
        query_addr: address,
        ..ProcmapQuery::default()
    };
    // SAFETY: the structure is as the kernel's and outlives the call.
    let code = unsafe { libc::ioctl(file.as_raw_fd(), PROCMAP_QUERY as _, &raw mut query) };
    if code == 0 {
        return Ok(Some((query.vma_end, query.vma_flags)));
    }
    match std::io::Error::last_os_error().raw_os_error() {
        Some(libc::ENOENT) => Ok(None),
        other => Err(other.unwrap_or(0)),
    }
}

fn from_text(address: u64) -> Option<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/self/maps").ok()?;
    text.lines().find_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let start = u64::from_str_radix(start, 16).ok()?;
        let end = u64::from_str_radix(end, 16).ok()?;
        let mut flags = 0;
        for c in rest.chars().take(4) {
            match c {
                'r' => flags |= READABLE,
                'w' => flags |= WRITABLE,
                _ => {}
            }
        }
        (start..end).contains(&address).then_some((end, flags))
    })
}

fn covering(address: u64) -> Option<(u64, u64)> {
    // A forked child must ask about itself.
    static MAPS: OnceLock<(u32, Option<File>)> = OnceLock::new();
    let (generation, maps) = MAPS.get_or_init(|| {
        let opened = File::open("/proc/self/maps").ok();
        let usable = opened.filter(|f| query(f, 0).is_ok());
        (super::process::generation(), usable)
    });
    match maps {
        Some(file) if *generation == super::process::generation() => {
            query(file, address).unwrap_or(None)
        }
        _ => from_text(address),
    }
}

/// Whether `length` bytes at `address` are mapped readable (and writable).
pub(crate) fn usable(address: usize, length: usize, write: bool) -> bool {
    let wanted = if write { READABLE | WRITABLE } else { READABLE };
    let Some(end) = (address as u64).checked_add(length as u64) else {
        return false;
    };
    let mut at = address as u64;
    loop {
        match covering(at) {
            Some((vma_end, flags)) if flags & wanted == wanted && vma_end > at => at = vma_end,
            _ => return false,
        }
        if at >= end {
            return true;
        }
    }
}
