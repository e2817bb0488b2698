//! Reading without waiting for anybody: objects whose place is remembered and whose memory is mapped into this process
//! already. For callers that must not be held up, like an event loop; everybody else gets the same by `get_into`.

use super::PoolClient;
use super::get::{GetRequest, read_request};
use crate::engine::batch::LocalSlice;
use crate::store::model::header::{HEADER_BYTES, ObjectHeader};
use crate::store::model::key;

impl PoolClient {
    /// Bytes of an object whose place is remembered. Asks nobody.
    pub fn remembered_size(&self, key: &[u8]) -> Option<u64> {
        let mut qualified = Vec::with_capacity(key.len() + 1);
        key::qualify(&self.config.tenant, key, &mut qualified).ok()?;
        let hash = key::hash(&qualified);
        let now = std::time::Instant::now();
        Some(self.locations.get(hash, &qualified, now)?.size)
    }

    /// Reads an object if that takes nothing but a copy: bytes read. `None` when its place is not remembered, its memory is
    /// not mapped here, the target is too small, or other bytes lie there by now; then `get_into` tells.
    pub fn get_nearby(&self, key: &[u8], target: &[LocalSlice]) -> Option<u64> {
        let mut qualified = Vec::with_capacity(key.len() + 1);
        key::qualify(&self.config.tenant, key, &mut qualified).ok()?;
        let hash = key::hash(&qualified);
        let now = std::time::Instant::now();
        let location = self.locations.get(hash, &qualified, now)?;
        let room: u64 = target.iter().map(|t| t.len() as u64).sum();
        let replica = location.replicas.first()?;
        if room < location.size {
            return None;
        }
        let mut header = [0; HEADER_BYTES as usize];
        let request = read_request(&location, replica, &mut header, target);
        self.engine.read_mapped(&request)?.ok()?;
        let expected = ObjectHeader {
            version: location.version,
            length: location.size,
            key_hash: hash,
            checksum: None,
        };
        if !expected.matches(&header) {
            return None;
        }
        self.verify(&location, target).ok()?;
        Some(location.size)
    }

    /// [`PoolClient::get_nearby`] for several objects: all of them, or `None`.
    pub fn get_all_nearby(&self, requests: &[GetRequest<'_>]) -> Option<Vec<u64>> {
        requests
            .iter()
            .map(|r| self.get_nearby(r.key, r.target))
            .collect()
    }
}
