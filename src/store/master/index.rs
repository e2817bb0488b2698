//! What enters the index and what leaves it, with the bookkeeping on both ways: counts per segment, groups, events, the
//! order of eviction.

use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::eviction::Access;
use super::object::{Attributes, Group, Object, PutWith, Replica, Replicas};
use super::puts::{Replaces, Written};
use super::quotas::bytes_of;
use super::segments::{SegmentState, SegmentsView};
use super::state::{MasterState, add};
use crate::base::clock::Millis;
use crate::store::model::error::StoreError;
use crate::store::model::key;

impl MasterState {
    /// Makes an object readable; returns whether it replaced another. `Exists`: the key is taken, and the ranges are the
    /// caller's to give up.
    #[expect(clippy::too_many_arguments, reason = "the parts of an object, once")]
    pub(crate) fn complete(
        &self,
        qualified: Box<[u8]>,
        size: u64,
        replicas: Replicas,
        attributes: &Attributes,
        written: &Written,
        replaces: Replaces,
        now: Millis,
    ) -> Result<bool, StoreError> {
        self.counters.value_bytes.observe(size);
        let hash = key::hash(&qualified);
        let object = self.object(qualified, hash, size, replicas, attributes, written, now);
        let mut shard = self.shard(hash);
        let view = self.segments.view();
        let mut object = object;
        // A node unmounted meanwhile takes its replica along; checked under the shard's lock, which the purge takes
        // after the segment has left the view.
        object.replicas.retain(|r| is_mounted(&view, *r));
        if object.replicas.is_empty() {
            drop(shard);
            self.forget(&object);
            return Err(StoreError::SegmentNotFound);
        }
        let taken = shard
            .get(hash, &object.key)
            .map(|o| (o.version, Self::readable(&view, o)));
        match taken {
            // The same put again, over another lane or after a restart of the master that has it from the node.
            Some((version, _)) if version == written.version => {
                drop(shard);
                self.forget(&object);
                Ok(false)
            }
            Some((version, readable)) if !replaces.allows(version, readable) => {
                drop(shard);
                self.forget(&object);
                Err(StoreError::Exists)
            }
            Some(_) => {
                let old = shard.remove(hash, &object.key);
                self.insert(&mut shard, &view, object, now);
                drop(shard);
                if let Some(old) = old {
                    self.gone(&view, &old);
                    self.dismiss_replicas(&old.replicas, old.size, old.version);
                    self.note_gone(hash);
                }
                add(&self.counters.puts, 1);
                Ok(true)
            }
            // What was removed meanwhile must not come back (D2).
            None if matches!(replaces, Replaces::Version(_)) => {
                drop(shard);
                self.forget(&object);
                Err(StoreError::NotFound)
            }
            None => {
                self.insert(&mut shard, &view, object, now);
                // A node that is away may hold an older object of this key.
                self.note_gone(hash);
                add(&self.counters.puts, 1);
                Ok(false)
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of an object, once")]
    pub(crate) fn object(
        &self,
        qualified: Box<[u8]>,
        hash: u64,
        size: u64,
        replicas: Replicas,
        attributes: &Attributes,
        written: &Written,
        now: Millis,
    ) -> Object {
        let ttl = attributes
            .soft_pin_ttl_ms
            .min(self.config.soft_pin_ttl_max.as_millis() as u64);
        Object {
            group: self.join_group(&qualified, hash, attributes),
            key: qualified,
            hash,
            size,
            version: written.version,
            lease_until: now,
            soft_pin_until: if ttl == 0 {
                Millis(0)
            } else {
                Millis(now.0 + ttl)
            },
            replicas,
            checksum: written.checksum.unwrap_or(0),
            put_with: PutWith::new(attributes.replicas, written.checksum.is_some()),
            hard_pin: attributes.hard_pin,
            read: false,
            data_type: attributes.data_type,
        }
    }

    pub(crate) fn insert(
        &self,
        shard: &mut super::shard::Shard,
        view: &SegmentsView,
        object: Object,
        now: Millis,
    ) {
        for r in &object.replicas {
            if let Some(segment) = mounted(view, *r) {
                segment.objects.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.objects.fetch_add(1, Ordering::Relaxed);
        let bytes = bytes_of(object.size, object.replicas.len());
        self.quotas.charge(&object.key, bytes);
        if object.soft_pin_until > Millis(0) {
            add(&self.counters.soft_pinned, 1);
        }
        let access = Access {
            now,
            ..Access::default()
        };
        let (hash, version) = (object.hash, object.version);
        self.events.stored(&object);
        shard.insert(object, &access);
        if shard.len() == 1 {
            self.eviction_order.list(Self::shard_number(hash), version);
        }
    }

    /// Bookkeeping for an object that has left the index; its ranges are the caller's business.
    pub(crate) fn gone(&self, view: &SegmentsView, object: &Object) {
        for r in &object.replicas {
            if let Some(segment) = mounted(view, *r) {
                segment.objects.fetch_sub(1, Ordering::Relaxed);
            }
        }
        self.objects.fetch_sub(1, Ordering::Relaxed);
        let bytes = bytes_of(object.size, object.replicas.len());
        self.quotas.refund(&object.key, bytes);
        if object.soft_pin_until > Millis(0) {
            self.counters.soft_pinned.fetch_sub(1, Ordering::Relaxed);
        }
        self.forget(object);
    }

    /// Leaves the group of an object that is not (or no longer) in the index.
    pub(crate) fn forget(&self, object: &Object) {
        let Some(group) = &object.group else { return };
        if object.hard_pin {
            group.hard_pins.fetch_sub(1, Ordering::Relaxed);
        }
        let mut groups = self.groups.lock();
        let mut members = group.members.lock();
        if let Some(count) = members.get_mut(&object.hash) {
            *count -= 1;
            if *count == 0 {
                members.remove(&object.hash);
            }
        }
        if members.is_empty()
            && groups
                .get(&group.name)
                .is_some_and(|g| Arc::ptr_eq(g, group))
        {
            groups.remove(&group.name);
        }
    }

    fn join_group(
        &self,
        qualified: &[u8],
        hash: u64,
        attributes: &Attributes,
    ) -> Option<Arc<Group>> {
        if attributes.group.is_empty() {
            return None;
        }
        let tenant_length = usize::from(*qualified.first()?) + 1;
        let mut name = qualified.get(..tenant_length)?.to_vec();
        name.extend_from_slice(attributes.group.as_bytes());
        let mut groups = self.groups.lock();
        let group = match groups.entry(name.into_boxed_slice()) {
            Entry::Occupied(found) => found.get().clone(),
            Entry::Vacant(vacant) => {
                let group = Arc::new(Group {
                    name: vacant.key().clone(),
                    ..Group::default()
                });
                vacant.insert(group).clone()
            }
        };
        *group.members.lock().entry(hash).or_default() += 1;
        if attributes.hard_pin {
            group.hard_pins.fetch_add(1, Ordering::Relaxed);
        }
        Some(group)
    }
}

pub(crate) fn mounted(view: &SegmentsView, replica: Replica) -> Option<&Arc<SegmentState>> {
    view.get(replica.segment as usize)?.as_ref()
}

fn is_mounted(view: &SegmentsView, replica: Replica) -> bool {
    mounted(view, replica).is_some()
}
