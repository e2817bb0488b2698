//! The SSD path that a configuration names: there, writable, with room, fast, and past the page cache.
//!
//! Writes a probe file there and removes it.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use super::report::Finding;
use super::system::{self, Root};
use crate::base::units::ByteSize;

pub(super) fn io_uring(root: &Root) -> Finding {
    let check = "io_uring";
    match root.number("/proc/sys/kernel/io_uring_disabled") {
        Some(2) => Finding::warn(
            check,
            "io_uring_off",
            "kernel.io_uring_disabled = 2",
            "the SSD tier falls back to plain reads and writes",
        )
        .remedy("allow it")
        .command("sysctl -w kernel.io_uring_disabled=0"),
        Some(1) => Finding::warn(
            check,
            "io_uring_off",
            "kernel.io_uring_disabled = 1",
            "only a group of users may use it; others fall back to plain reads and writes",
        )
        .remedy("allow it, or join the group of kernel.io_uring_group")
        .command("sysctl -w kernel.io_uring_disabled=0"),
        Some(_) => Finding::ok(check, "allowed"),
        None => Finding::ok(check, "this kernel has no switch against it"),
    }
}

const BLOCK: usize = 1 << 20;
/// Enough for a figure, little enough for any disk.
const BLOCKS: u64 = 16;

pub(super) fn check(path: &Path) -> Vec<Finding> {
    let check = "SSD path";
    let name = path.display().to_string();
    let Ok(meta) = std::fs::metadata(path) else {
        return vec![
            Finding::fail(check, "ssd_missing", name.clone(), "no such directory")
                .remedy("make it")
                .command(format!("mkdir -p {name}")),
        ];
    };
    if !meta.is_dir() {
        return vec![
            Finding::fail(check, "ssd_no_directory", name, "is not a directory")
                .remedy("name a directory in ssd_offload_path"),
        ];
    }
    let mut found = Vec::new();
    if let Ok(stat) = rustix::fs::statvfs(path) {
        let (free, all) = (
            stat.f_bavail.saturating_mul(stat.f_frsize),
            stat.f_blocks.saturating_mul(stat.f_frsize),
        );
        let shown = format!("{} of {} free", ByteSize(free), ByteSize(all));
        // File systems that make them as needed say 0.
        if stat.f_files > 0 && stat.f_favail < stat.f_files / 50 {
            let shown = format!(
                "{} of {} files may still be made",
                stat.f_favail, stat.f_files
            );
            let reason =
                "the file system has no room for more files (inodes), whatever space is free";
            found.push(
                Finding::fail("SSD files", "ssd_no_inodes", shown, reason)
                    .remedy("remove small files there, or name a directory of another file system")
                    .command(format!("df -i {name}")),
            );
        }
        // The share at which file systems become slow.
        if free < all / 20 {
            found.push(
                Finding::fail(
                    "SSD space",
                    "ssd_full",
                    shown,
                    "less than a twentieth is free",
                )
                .remedy("free some, or name another directory in ssd_offload_path"),
            );
        } else {
            found.push(Finding::ok("SSD space", shown));
        }
    }
    let place = path.to_owned();
    let probed = system::within(Duration::from_secs(4), move || write_probe(&place));
    found.insert(0, match probed {
        None => Finding::fail(check, "ssd_stuck", name, "a write of 16 MiB did not end within 4 s").remedy("look at the disk: dmesg"),
        Some(Err(e)) if e.kind() == std::io::ErrorKind::ReadOnlyFilesystem => {
            Finding::fail(check, "ssd_readonly", name, format!("cannot be written: {e}"))
                .remedy("mount it for writing; a disk that fails is mounted read-only by itself: dmesg")
        }
        // Said with the space, or with the files.
        Some(Err(e)) if e.kind() == std::io::ErrorKind::StorageFull && found.iter().any(|f| !f.cause.is_empty()) => Finding::skipped(check, format!("not written to: {e}")),
        Some(Err(e)) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            Finding::fail(check, "ssd_forbidden", name.clone(), format!("cannot be written: {e}"))
                .remedy("let this user write there").command(format!("chown $(id -u) {name}"))
        }
        Some(Err(e)) => Finding::fail(check, "ssd_broken", name, format!("cannot be written: {e}")).remedy("look at the disk: dmesg"),
        Some(Ok((direct, rate))) => {
            let shown = format!("{name}: {:.0} MB/s written{}", rate / 1e6, if direct { ", direct I/O" } else { "" });
            if in_memory(path) {
                Finding::warn(check, "ssd_in_memory", shown, "this file system lies in memory: what is moved there from memory takes the same memory again").remedy("name a directory on an SSD in ssd_offload_path")
            } else if !direct {
                Finding::warn(check, "ssd_no_direct_io", shown, "this file system has no direct I/O: data would be cached twice").remedy("use a directory on ext4 or xfs")
            } else if rate < 50e6 {
                Finding::warn(check, "ssd_slow", shown, "slower than a network of 1 Gbit/s: reading back would cost more than it saves").remedy("name a directory on an SSD in ssd_offload_path")
            } else {
                Finding::ok(check, shown)
            }
        }
    });
    found
}

/// Whether a file system keeps its files in memory: tmpfs or ramfs.
fn in_memory(path: &Path) -> bool {
    const TMPFS: u32 = 0x0102_1994;
    const RAMFS: u32 = 0x8584_58F6;
    rustix::fs::statfs(path).is_ok_and(|s| matches!(s.f_type as u32, TMPFS | RAMFS))
}

/// Writes a file past the page cache and removes it: whether that was possible, and bytes per second.
fn write_probe(directory: &Path) -> std::io::Result<(bool, f64)> {
    let path = directory.join(format!(".mooncake-doctor-{}", std::process::id()));
    let open = |flags: i32| {
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .custom_flags(flags)
            .open(&path)
    };
    let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
    // Direct I/O wants memory that begins at a block.
    let memory = vec![0x5A_u8; BLOCK + 4096];
    let at = memory.as_ptr().align_offset(4096).min(4096);
    let outcome = (|| {
        let (file, is_direct) = match open(direct) {
            Ok(file) => (file, true),
            Err(e) if e.raw_os_error() == Some(22) => {
                let _ = std::fs::remove_file(&path);
                (open(0)?, false)
            }
            Err(e) => return Err(e),
        };
        let start = Instant::now();
        for n in 0..BLOCKS {
            file.write_all_at(&memory[at..at + BLOCK], n * BLOCK as u64)?;
        }
        file.sync_data()?;
        let rate = (BLOCKS * BLOCK as u64) as f64 / start.elapsed().as_secs_f64().max(1e-6);
        Ok((is_direct, rate))
    })();
    let _ = std::fs::remove_file(&path);
    outcome
}
