//! One shard of the index: a hash table of slots, the objects in them, and their eviction order.
//!
//! Owns the consistency of the three; knows no segments and no other shard.

use super::eviction::{Access, EvictionPolicy, PolicyKind};
use super::object::Object;
use super::table::SlotTable;
use crate::base::clock::Millis;
use crate::base::prefetch::prefetch;

pub(crate) struct Shard {
    table: SlotTable,
    slots: Vec<Option<Object>>,
    free: Vec<u32>,
    policy: Box<dyn EvictionPolicy>,
}

impl Shard {
    pub(crate) fn new(policy: PolicyKind) -> Self {
        Self {
            table: SlotTable::default(),
            slots: Vec::new(),
            free: Vec::new(),
            policy: policy.build(),
        }
    }

    fn slot_of(&self, hash: u64, key: &[u8]) -> Option<u32> {
        self.table.find(hash, |s| {
            self.slots[s as usize]
                .as_ref()
                .is_some_and(|o| o.hash == hash && *o.key == *key)
        })
    }

    /// First step of a batched lookup: asks for the table's line.
    pub(crate) fn prefetch_entry(&self, hash: u64) {
        self.table.prefetch(hash);
    }

    /// Second step: asks for the object's lines.
    pub(crate) fn prefetch_object(&self, hash: u64) {
        self.table.find(hash, |s| {
            let object = &raw const self.slots[s as usize];
            prefetch(object);
            prefetch(object.cast::<u8>().wrapping_add(size_of::<Object>() - 1));
            true
        });
    }

    /// Third step: asks for the key's bytes.
    pub(crate) fn prefetch_key(&self, hash: u64) {
        self.table.find(hash, |s| {
            if let Some(object) = &self.slots[s as usize] {
                prefetch(object.key.as_ptr());
            }
            true
        });
    }

    pub(crate) fn get(&self, hash: u64, key: &[u8]) -> Option<&Object> {
        self.slots[self.slot_of(hash, key)? as usize].as_ref()
    }

    pub(crate) fn get_mut(&mut self, hash: u64, key: &[u8]) -> Option<&mut Object> {
        let slot = self.slot_of(hash, key)?;
        self.slots[slot as usize].as_mut()
    }

    /// A hit: for reading and with the policy told.
    pub(crate) fn hit(&mut self, hash: u64, key: &[u8], access: &Access) -> Option<&mut Object> {
        match self.slot_of(hash, key) {
            Some(slot) => {
                self.policy.accessed(slot, access);
                self.slots[slot as usize].as_mut()
            }
            None => {
                self.policy.missed(hash, access);
                None
            }
        }
    }

    /// Adds an object whose key is not there.
    pub(crate) fn insert(&mut self, object: Object, access: &Access) {
        debug_assert!(self.slot_of(object.hash, &object.key).is_none());
        let hash = object.hash;
        let slot = match self.free.pop() {
            Some(slot) => {
                self.slots[slot as usize] = Some(object);
                slot
            }
            None => {
                self.slots.push(Some(object));
                self.slots.len() as u32 - 1
            }
        };
        self.table.insert(hash, slot);
        self.policy.inserted(slot, access);
    }

    pub(crate) fn remove(&mut self, hash: u64, key: &[u8]) -> Option<Object> {
        let slot = self.slot_of(hash, key)?;
        self.remove_slot(slot)
    }

    fn remove_slot(&mut self, slot: u32) -> Option<Object> {
        let object = self.slots[slot as usize].take()?;
        self.table.remove(object.hash, slot);
        self.free.push(slot);
        self.policy.removed(slot);
        Some(object)
    }

    /// Removes the objects the predicate names.
    pub(crate) fn remove_where(
        &mut self,
        mut which: impl FnMut(&mut Object) -> bool,
    ) -> Vec<Object> {
        let mut removed = Vec::new();
        for slot in 0..self.slots.len() {
            if self.slots[slot].as_mut().is_some_and(&mut which) {
                removed.extend(self.remove_slot(slot as u32));
            }
        }
        removed
    }

    /// Removes the members of a group known by hash.
    pub(crate) fn remove_by_hash(
        &mut self,
        hash: u64,
        which: impl Fn(&Object) -> bool,
    ) -> Option<Object> {
        let slot = self.table.find(hash, |s| {
            self.slots[s as usize]
                .as_ref()
                .is_some_and(|o| o.hash == hash && which(o))
        });
        slot.and_then(|slot| self.remove_slot(slot))
    }

    /// Version of the object that eviction would look at first.
    pub(crate) fn rank(&self) -> Option<u64> {
        let slot = self.policy.next()?;
        self.slots[slot as usize].as_ref().map(|o| o.version)
    }

    /// Number of objects.
    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Evicts up to `most` objects, examining at most `budget`.
    pub(crate) fn evict(
        &mut self,
        now: Millis,
        soft_pinned_too: bool,
        most: usize,
        mut budget: u32,
        wanted: &mut u64,
    ) -> Vec<Object> {
        let mut victims = Vec::new();
        while victims.len() < most && *wanted > 0 {
            let Some(slot) = self.policy.candidate(&mut budget) else {
                break;
            };
            let object = self.slots[slot as usize].as_ref();
            if !object.is_some_and(|o| o.evictable(now, soft_pinned_too)) {
                if budget == 0 {
                    break;
                }
                continue;
            }
            if let Some(object) = self.remove_slot(slot) {
                let copies = object.replicas.len() as u64;
                *wanted = wanted.saturating_sub(object.size.saturating_mul(copies));
                victims.push(object);
            }
        }
        victims
    }

    /// Up to `count` slots from `from` on, and the next position.
    pub(crate) fn page(
        &self,
        from: usize,
        count: usize,
    ) -> (impl Iterator<Item = &Object>, Option<usize>) {
        let end = from.saturating_add(count).min(self.slots.len());
        let start = from.min(end);
        let next = (end < self.slots.len()).then_some(end);
        (self.slots[start..end].iter().flatten(), next)
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        let keys: usize = self.slots.iter().flatten().map(|o| o.key.len() + 16).sum();
        keys + self.slots.capacity() * size_of::<Option<Object>>()
            + self.table.heap_bytes()
            + self.free.capacity() * 4
            + self.policy.heap_bytes()
    }
}
