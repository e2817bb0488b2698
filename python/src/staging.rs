//! Device memory in calls that move host memory: its parts are exchanged for parts of pinned buffers, window by window, so
//! that the copy of one window runs while another is put or got. Knows no keys and no peers.

use std::ops::{Deref, Range};

use mooncake::engine::batch::LocalSlice;
use smallvec::SmallVec;

use crate::device::{Device, DeviceError, DevicePiece, Half, Lane, WINDOW, WINDOW_MAX};

pub(crate) type Slices = SmallVec<[LocalSlice; 2]>;
/// Ranges of the caller's memory, in order, and which of them are a device's.
pub(crate) struct Gathered {
    slices: Slices,
    devices: SmallVec<[Option<Device>; 2]>,
}

impl Deref for Gathered {
    type Target = [LocalSlice];
    fn deref(&self) -> &[LocalSlice] {
        &self.slices
    }
}

impl Gathered {
    /// Ranges with their devices.
    pub(crate) fn new(parts: impl Iterator<Item = (LocalSlice, Option<Device>)>) -> Self {
        let (slices, devices) = parts.unzip();
        Self { slices, devices }
    }

    /// Memory of the host only.
    pub(crate) fn host(slices: Slices) -> Self {
        Self::new(slices.into_iter().map(|s| (s, None)))
    }

    /// The first device among them.
    fn device(&self) -> Option<Device> {
        self.devices.iter().flatten().next().copied()
    }

    /// The ranges that are a device's.
    pub(crate) fn on_devices(&self) -> impl Iterator<Item = &LocalSlice> {
        let parts = self.slices.iter().zip(&self.devices);
        parts.filter_map(|(slice, device)| device.map(|_| slice))
    }

    fn device_bytes(&self) -> usize {
        let parts = self.slices.iter().zip(&self.devices);
        parts
            .filter(|(_, d)| d.is_some())
            .map(|(s, _)| s.len())
            .sum()
    }

    /// The same ranges with the devices' in a buffer from `at` on.
    fn placed(&self, half: &Half, at: &mut usize, pieces: &mut Vec<DevicePiece>) -> Slices {
        let parts = self.slices.iter().zip(&self.devices);
        let place = |(slice, device): (&LocalSlice, &Option<Device>)| {
            let Some(device) = *device else {
                return *slice;
            };
            pieces.push(DevicePiece {
                device,
                address: slice.as_ptr() as usize,
                offset: *at,
                length: slice.len(),
            });
            // SAFETY: the caller made room in the buffer, which outlives the use of the slices.
            let placed = unsafe { LocalSlice::new(half.at(*at), slice.len()) };
            *at += slice.len();
            placed
        };
        parts.map(place).collect()
    }
}

/// Whether any range is a device's.
pub(crate) fn any_on_device(all: &[&Gathered]) -> bool {
    all.iter().any(|g| g.device().is_some())
}

/// Consecutive requests that fit a window together; one that does not fit any is a window of its own.
fn windows(all: &[&Gathered]) -> Vec<Range<usize>> {
    let mut windows: Vec<Range<usize>> = Vec::new();
    let mut bytes = 0;
    for (index, gathered) in all.iter().enumerate() {
        let more = gathered.device_bytes();
        match windows.last_mut() {
            Some(last) if bytes + more <= WINDOW => {
                last.end = index + 1;
                bytes += more;
            }
            _ => {
                windows.push(index..index + 1);
                bytes = more;
            }
        }
    }
    windows
}

fn place(
    half: &mut Half,
    part: &[&Gathered],
) -> Result<(Vec<Slices>, Vec<DevicePiece>), DeviceError> {
    if let Some(device) = part.iter().find_map(|g| g.device()) {
        half.ensure(device, part.iter().map(|g| g.device_bytes()).sum())?;
    }
    let (mut at, mut pieces) = (0, Vec::new());
    let slices = part.iter().map(|g| g.placed(half, &mut at, &mut pieces));
    Ok((slices.collect(), pieces))
}

fn half(lane: &mut Lane, n: usize) -> Result<&mut Half, DeviceError> {
    lane.half(n).ok_or(DeviceError::Busy)
}

/// Brings device memory to the host, window by window; `run` gets the numbers of a window's requests and their ranges, or
/// why they could not be had.
pub(crate) fn download(
    all: &[&Gathered],
    mut run: impl FnMut(Range<usize>, Result<&[Slices], DeviceError>),
) {
    let windows = windows(all);
    let mut lane = match Lane::take() {
        Ok(lane) => lane,
        Err(error) => return run(0..all.len(), Err(error)),
    };
    let begin = |lane: &mut Lane, n: usize| {
        let half = half(lane, n)?;
        let (slices, pieces) = place(half, &all[windows[n].clone()])?;
        half.download(&pieces)?;
        Ok(slices)
    };
    let mut ready = if windows.is_empty() {
        return;
    } else {
        begin(&mut lane, 0)
    };
    for (n, window) in windows.iter().enumerate() {
        let waited = half(&mut lane, n).and_then(Half::wait);
        let slices = ready.and_then(|slices| waited.map(|()| slices));
        // The next one is on its way while this one is used.
        ready = if n + 1 < windows.len() {
            begin(&mut lane, n + 1)
        } else {
            Ok(Vec::new())
        };
        run(window.clone(), slices.as_deref().map_err(|e| *e));
    }
}

/// Brings what `run` wrote to device memory, window by window; `run` returns the bytes it wrote per request, `None` for
/// those that failed. Returns the requests whose bytes did not reach the device.
pub(crate) fn upload(
    all: &[&Gathered],
    mut run: impl FnMut(Range<usize>, &[Slices]) -> Vec<Option<u64>>,
) -> Vec<(Range<usize>, DeviceError)> {
    let windows = windows(all);
    let mut failed = Vec::new();
    let mut lane = match Lane::take() {
        Ok(lane) => lane,
        Err(error) => return vec![(0..all.len(), error)],
    };
    let mut one = |lane: &mut Lane, n: usize| {
        let half = half(lane, n)?;
        let part = &all[windows[n].clone()];
        let (slices, _) = place(half, part)?;
        let written = run(windows[n].clone(), &slices);
        let (mut at, mut pieces) = (0, Vec::new());
        for (gathered, bytes) in part.iter().zip(written) {
            let mut left = bytes.unwrap_or(0) as usize;
            for (slice, device) in gathered.slices.iter().zip(&gathered.devices) {
                let length = slice.len().min(left);
                left -= length;
                let Some(device) = *device else { continue };
                if length > 0 {
                    pieces.push(DevicePiece {
                        device,
                        address: slice.as_ptr() as usize,
                        offset: at,
                        length,
                    });
                }
                at += slice.len();
            }
        }
        half.upload(&pieces)
    };
    for (n, window) in windows.iter().enumerate() {
        // What this half held two windows ago: an error is that window's.
        let before = n.checked_sub(2).map(|before| windows[before].clone());
        if let (Some(before), Err(error)) = (before, half(&mut lane, n).and_then(Half::wait)) {
            failed.push((before, error));
        }
        if let Err(error) = one(&mut lane, n) {
            failed.push((window.clone(), error));
        }
    }
    // Without the copies the objects are not there: the last two windows may still be under way.
    let last = windows.len().saturating_sub(2);
    for (n, window) in windows.iter().enumerate().skip(last) {
        if let Err(error) = half(&mut lane, n).and_then(Half::wait) {
            failed.push((window.clone(), error));
        }
    }
    failed
}

/// Everything at once, for calls of small pieces: `run` gets the ranges; what it says it wrote is brought to the device.
pub(crate) fn at_once<R>(
    all: &[&Gathered],
    writes: bool,
    run: impl FnOnce(&[Slices]) -> R,
) -> Result<R, DeviceError> {
    if !any_on_device(all) {
        let slices: Vec<Slices> = all.iter().map(|g| g.slices.clone()).collect();
        return Ok(run(&slices));
    }
    let total: usize = all.iter().map(|g| g.device_bytes()).sum();
    if total > WINDOW_MAX {
        return Err(DeviceError::TooLarge);
    }
    let mut lane = Lane::take()?;
    let half = half(&mut lane, 0)?;
    let (slices, pieces) = place(half, all)?;
    if !writes {
        half.download(&pieces)?;
        half.wait()?;
        return Ok(run(&slices));
    }
    // Parts that `run` does not write must come back as they were.
    half.download(&pieces)?;
    half.wait()?;
    let outcome = run(&slices);
    half.upload(&pieces)?;
    half.wait()?;
    Ok(outcome)
}
