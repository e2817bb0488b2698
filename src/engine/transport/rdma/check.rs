//! Trying a device by itself, for those who look for faults: a registration that is timed, and a queue pair whose both
//! ends are here, over the way that transfers take.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::fabric::Fabric;
use super::registration::Access;
use super::served::{Moved, ServedRails};
use super::verbs::{last_error, verbs};
use super::wire::{Piece, decode_join, encode_join};
use super::{DeviceCheck, RdmaConfig, RdmaError};
use crate::engine::memory::Memory;

/// Bytes registered and moved.
const BYTES: usize = 1 << 20;

/// Names of the devices that the library sees.
///
/// # Errors
/// No library, or one that is too old.
pub fn device_names() -> Result<Vec<String>, RdmaError> {
    let verbs = verbs()?;
    let mut count = 0;
    // SAFETY: writes the count; the list is freed below.
    let list = unsafe { (verbs.ibv_get_device_list)(&raw mut count) };
    if list.is_null() {
        return Err(last_error("libibverbs", "list devices"));
    }
    let name = |at: usize| {
        // SAFETY: `count` entries, each with a terminated name that lives as long as the list.
        let name = unsafe { std::ffi::CStr::from_ptr((verbs.ibv_get_device_name)(*list.add(at))) };
        name.to_string_lossy().into_owned()
    };
    let names = (0..count.max(0) as usize).map(name).collect();
    // SAFETY: of the call above; the names were copied.
    unsafe { (verbs.ibv_free_device_list)(list) };
    Ok(names)
}

/// Tries one device.
///
/// # Errors
/// When it cannot be opened; what fails later is in the answer.
pub fn check_device(device: &str, config: &RdmaConfig) -> Result<DeviceCheck, RdmaError> {
    let fabric = Fabric::open(&config.clone().with_devices(device))?;
    Ok(DeviceCheck {
        summary: fabric.summary(),
        gpu_memory: fabric.can_dmabuf(),
        registration: registration(&fabric),
        loopback: loopback(&fabric),
    })
}

fn registration(fabric: &Fabric) -> Result<Duration, RdmaError> {
    let mut buffer = vec![1u8; BYTES];
    let start = Instant::now();
    let made = fabric.register(buffer.as_mut_ptr(), BYTES, Access::Both)?;
    let took = start.elapsed();
    drop(made);
    Ok(took)
}

fn loopback(fabric: &Arc<Fabric>) -> Result<Duration, RdmaError> {
    let failed = |reason: String| RdmaError::Device {
        device: fabric.devices[0].name.clone(),
        reason,
        code: 0,
    };
    let ends = fabric.passive_ends(|_| false);
    let mine: Result<Vec<_>, _> = ends.iter().map(|e| e.describe(&fabric.config)).collect();
    let memory = Memory::create("mooncake-check", BYTES).map_err(|e| failed(e.to_string()))?;
    let memory = Arc::new(memory);
    let until = Instant::now() + Duration::from_secs(5);
    let request = encode_join(&mine?, "");
    let memories = std::slice::from_ref(&memory);
    let (rails, answer) = ServedRails::join(fabric, memories, &request, 0, until);
    let (theirs, reason) = decode_join(&answer).map_err(|what| failed(what.to_owned()))?;
    let mut rails = rails.ok_or_else(|| failed(reason))?;
    for (end, their) in ends.iter().zip(&theirs) {
        end.accept(their, &fabric.config)?;
    }
    let pattern: Vec<u8> = (0..BYTES).map(|n| (n * 31 + (n >> 8)) as u8).collect();
    let mut buffer = pattern.clone();
    let registration = fabric.register(buffer.as_mut_ptr(), BYTES, Access::Both)?;
    let address = buffer.as_ptr() as u64;
    let keys = (0..ends.len()).map(|at| registration.rkey(at, address).unwrap_or(0));
    let pieces = [Piece {
        address,
        length: BYTES as u64,
        keys: keys.collect(),
    }];
    let ready = rails.ready(&memory)?;
    let lane = UnixStream::pair().map_err(|e| failed(e.to_string()))?;
    let mut carry = |into_ours| {
        let moved = Moved {
            item: 0,
            pointer: memory.as_ptr(),
            memory: &ready,
            addressable: true,
            pieces: &pieces,
        };
        let outcome = rails.carry(into_ours, &[moved], lane.0.as_fd());
        match outcome.reason {
            Some(reason) => Err(failed(reason)),
            None if outcome.failed.is_empty() => Ok(()),
            None => Err(failed("nothing arrived".to_owned())),
        }
    };
    let start = Instant::now();
    carry(true)?;
    buffer.fill(0);
    carry(false)?;
    let took = start.elapsed();
    // The device lets go of the buffer before it is read.
    drop(ends);
    drop(registration);
    if buffer == pattern {
        Ok(took)
    } else {
        Err(failed(
            "the bytes that came back are not those sent".to_owned(),
        ))
    }
}
