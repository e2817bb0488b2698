//! What became of keys lately, beyond what the events tell: why one was evicted, why a put of it failed.
//!
//! Two rings of fixed size, by hash of the key: the last of each kind, however many keys there are.

use std::collections::VecDeque;

use parking_lot::Mutex;

use super::object::Object;
use crate::base::clock::{Millis, unix_ms};

/// Remembered of each kind.
const REMEMBERED: usize = 8192;

/// Why an object had to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The pool was above its watermark, or a put found no room.
    Space,
    /// Its tenant was above its quota.
    Quota,
}

/// An object that was evicted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Eviction {
    pub(crate) hash: u64,
    pub(crate) version: u64,
    pub(crate) unix_ms: u64,
    pub(crate) cause: Cause,
    /// How long nobody had read it; since it was stored, if nobody ever did.
    pub(crate) unread_ms: u64,
    pub(crate) was_read: bool,
    pub(crate) soft_pinned: bool,
    pub(crate) size: u64,
}

/// A put that failed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Failure {
    pub(crate) hash: u64,
    pub(crate) unix_ms: u64,
    pub(crate) code: i32,
    pub(crate) size: u64,
    pub(crate) replicas: u32,
    /// How long it had waited for space.
    pub(crate) waited_ms: u64,
}

/// See the module header.
#[derive(Default)]
pub(crate) struct History {
    evictions: Mutex<VecDeque<Eviction>>,
    failures: Mutex<VecDeque<Failure>>,
}

fn push<T>(ring: &Mutex<VecDeque<T>>, one: T) {
    let mut ring = ring.lock();
    if ring.len() == REMEMBERED {
        ring.pop_front();
    }
    ring.push_back(one);
}

impl History {
    /// An object is evicted that was last read then.
    pub(crate) fn evicted(&self, object: &Object, last_read: Millis, cause: Cause, now: Millis) {
        let one = Eviction {
            hash: object.hash,
            version: object.version,
            unix_ms: unix_ms(),
            cause,
            unread_ms: now.since(last_read),
            was_read: object.read,
            soft_pinned: object.soft_pin_until > now,
            size: object.size,
        };
        push(&self.evictions, one);
    }

    /// A put has failed.
    pub(crate) fn failed(&self, failure: Failure) {
        push(&self.failures, failure);
    }

    /// What is remembered of a key, oldest first.
    pub(crate) fn of(&self, hash: u64) -> (Vec<Eviction>, Vec<Failure>) {
        let evictions = self.evictions.lock();
        let evictions = evictions.iter().filter(|e| e.hash == hash).copied();
        let evictions = evictions.collect();
        let failures = self.failures.lock();
        let failures = failures.iter().filter(|f| f.hash == hash).copied();
        (evictions, failures.collect())
    }
}
