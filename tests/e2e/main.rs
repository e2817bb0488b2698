//! The pool as real processes: one master, three nodes, clients over tcp and shared memory, and `kill -9` of each part.
//! The names in the tests are those of docs/invariants.md.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

mod bench;
mod capacity;
mod dashboard;
mod doctor;
mod doors;
mod drain;
mod events;
mod http;
mod inspect;
mod monitoring;
mod objects;
mod one_process;
mod pool;
mod quotas;
mod recovery;
mod rest;

use mooncake::store::client::{PoolClient, PutOptions, PutOutcome};
use mooncake::store::model::error::StoreError;

pub(crate) fn put(client: &PoolClient, key: &str, bytes: &[u8]) -> Result<PutOutcome, StoreError> {
    client.put_bytes(key.as_bytes(), bytes, &PutOptions::default())
}

pub(crate) fn copies(replicas: u32) -> PutOptions {
    PutOptions {
        replicas,
        ..PutOptions::default()
    }
}
