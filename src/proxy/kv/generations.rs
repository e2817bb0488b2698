//! A map with a bound that forgets what is old: two halves, of which the older one goes as a whole.

use std::hash::Hash;

use foldhash::{HashMap, HashMapExt};

/// A map that forgets what was not entered again in the time of half its capacity.
#[derive(Debug)]
pub(super) struct Generations<K, V> {
    halves: [HashMap<K, V>; 2],
    max: usize,
}

impl<K: Hash + Eq, V> Generations<K, V> {
    pub(super) fn new(max: usize) -> Self {
        Self {
            halves: [HashMap::new(), HashMap::new()],
            max,
        }
    }

    pub(super) fn get(&self, key: &K) -> Option<&V> {
        self.halves[0].get(key).or_else(|| self.halves[1].get(key))
    }

    pub(super) fn insert(&mut self, key: K, value: V) {
        if self.halves[0].len() >= self.max && !self.halves[0].contains_key(&key) {
            self.rotate();
        }
        self.halves[0].insert(key, value);
    }

    /// Entries of both halves.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.halves[0].len() + self.halves[1].len()
    }

    /// Forgets the older half and begins a new one.
    pub(super) fn rotate(&mut self) {
        self.halves.swap(0, 1);
        self.halves[0] = HashMap::new();
    }
}
