//! What is known of instances' KV caches: who holds which beginning of a prompt.
//!
//! Rooms: `zmtp`, `msgpack` and `event` how engines tell it; `source` following one of them; `conductor` and `blocks` publishers
//! that others register and ask about; `master` following our master; `index` the table; `text` from
//! a prompt's text to its tokens; `worth` what a hit saves by tier. Owns the sources' bounds. Refuses to choose an instance (`policy`).

mod blocks;
pub(crate) mod conductor;
pub(crate) mod event;
mod generations;
pub(crate) mod index;
pub(crate) mod master;
pub(crate) mod msgpack;
pub(crate) mod source;
pub(crate) mod text;
pub(crate) mod worth;
pub(crate) mod zmtp;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::{Mutex, RwLock};
use smallvec::SmallVec;
use tokio::sync::Semaphore;

use conductor::Conductor;
use index::KvIndex;
use text::Texts;
use worth::Worth;

/// Questions for tokens under way at once.
const QUESTIONS_MAX: usize = 4;
/// Blocks stored lately that are remembered per instance.
const LATELY_MAX: usize = 4096;
/// Text blocks looked at per prompt.
const TEXT_BLOCKS_MAX: usize = 2048;

/// All of it.
#[derive(Debug)]
pub(crate) struct Kv {
    pub(crate) index: KvIndex,
    pub(crate) texts: Texts,
    pub(crate) worth: Worth,
    pub(crate) questions: Semaphore,
    pub(crate) conductor: Conductor,
    /// Instances tell what comes into the pool.
    instances_tell: AtomicBool,
    /// The master does.
    master_tells: AtomicBool,
    /// What keys of the pool call the model; `None`: no instance has told.
    model: RwLock<Option<String>>,
}

impl Default for Kv {
    fn default() -> Self {
        Self {
            index: KvIndex::default(),
            texts: Texts::default(),
            worth: Worth::default(),
            questions: Semaphore::new(QUESTIONS_MAX),
            conductor: Conductor::default(),
            instances_tell: AtomicBool::new(false),
            master_tells: AtomicBool::new(false),
            model: RwLock::default(),
        }
    }
}

impl Kv {
    /// Whether anybody tells what comes into the pool.
    pub(crate) fn has_pool(&self) -> bool {
        self.instances_tell.load(Ordering::Relaxed) || self.master_tells.load(Ordering::Relaxed)
    }

    /// An instance has told of the pool.
    pub(crate) fn set_pool(&self) {
        self.instances_tell.store(true, Ordering::Relaxed);
    }

    /// What keys of the pool call the model.
    pub(crate) fn model(&self) -> Option<String> {
        self.model.read().clone()
    }

    /// Instances have told what keys call the model.
    pub(crate) fn set_model(&self, name: &str) {
        if self.model.read().as_deref() != Some(name) {
            *self.model.write() = Some(name.to_owned());
        }
    }

    /// Whether the master is heard now; gives what it was before.
    pub(crate) fn set_master(&self, tells: bool) -> bool {
        self.master_tells.swap(tells, Ordering::Relaxed)
    }
}

/// How an instance's events are coming along.
#[derive(Debug, Default)]
pub(crate) struct Feed {
    live: AtomicBool,
    pub(crate) events: AtomicU64,
    pub(crate) gaps: AtomicU64,
    /// Engine hashes of blocks that were stored lately.
    lately: Mutex<VecDeque<(Instant, u64)>>,
}

impl Feed {
    /// Whether what the index says of this instance is up to date.
    pub(crate) fn is_live(&self) -> bool {
        self.live.load(Ordering::Relaxed)
    }

    pub(crate) fn set_live(&self, live: bool) {
        self.live.store(live, Ordering::Relaxed);
    }

    fn note(&self, hashes: &[u64]) {
        let now = Instant::now();
        let mut lately = self.lately.lock();
        for hash in hashes {
            if lately.len() >= LATELY_MAX {
                lately.pop_front();
            }
            lately.push_back((now, *hash));
        }
    }

    /// Engine hashes of blocks stored since a moment.
    pub(crate) fn since(&self, moment: Instant) -> Vec<u64> {
        let lately = self.lately.lock();
        let fresh = lately.iter().rev().take_while(|(at, _)| *at >= moment);
        fresh.map(|(_, hash)| *hash).collect()
    }
}

fn text_block_bytes(start: usize) -> usize {
    match start {
        0..8192 => 256,
        8192..65_536 => 1024,
        _ => 4096,
    }
}

/// End and chained hash of each whole block of a text. Blocks grow with their position, so that a long prompt costs few.
pub(crate) fn text_blocks(prompt: &[u8], seed: u64) -> SmallVec<[(usize, u64); 64]> {
    let mut found = SmallVec::new();
    let (mut at, mut hash) = (0, seed);
    while found.len() < TEXT_BLOCKS_MAX {
        let end = at + text_block_bytes(at);
        let Some(block) = prompt.get(at..end) else {
            break;
        };
        hash = xxhash_rust::xxh3::xxh3_64_with_seed(block, hash);
        found.push((end, hash));
        at = end;
    }
    found
}

/// For the fuzzer: no bytes of an engine panic.
pub(crate) fn fuzz(input: &[u8]) {
    let index = KvIndex::default();
    if let Ok(batch) = event::batch(input) {
        for event in &batch.events {
            index.apply(1, event);
        }
    }
    let _ = text::ids(input);
}
