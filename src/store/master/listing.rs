//! Looking at the index: listings, and everything known of one key. Grants no lease.

use super::object::Object;
use super::operations::Call;
use crate::store::model::error::StoreError;
use crate::store::model::key;
use crate::store::wire::{self, reply::Kind as Re};

/// Objects of one page of a listing.
const PAGE_MAX: u32 = 10_000;

impl Call<'_> {
    pub(super) fn list(&mut self, op: &wire::List) -> Result<wire::Reply, StoreError> {
        let filter = KeyFilter::new(&op.tenant, &op.prefix, &op.regex)?;
        let limit = op.limit.clamp(1, PAGE_MAX) as usize;
        let mut objects = Vec::new();
        let next_cursor = self.master.state.walk(op.cursor, limit, |o| {
            let Some(bytes) = filter.key_of(o) else {
                return false;
            };
            objects.push(wire::ListedObject {
                key: bytes::Bytes::copy_from_slice(bytes),
                size_bytes: o.size,
                version: o.version,
                replicas: o.replicas.len() as u32,
                lease_left_ms: o.leased_until().since(self.now),
            });
            true
        });
        Ok(Re::Listing(wire::Listing {
            code: 0,
            objects,
            next_cursor,
        })
        .into())
    }

    pub(super) fn stat(&mut self, op: &wire::Stat) -> Result<wire::Reply, StoreError> {
        let hash = self.key(&op.tenant, &op.key)?;
        let found = self
            .master
            .state
            .peek(hash, &self.scratch, |o| self.describe(o));
        match found {
            Some(description) => Ok(Re::Description(description).into()),
            None if self.master.state.recovering(self.now) => Err(StoreError::Rebuilding),
            None => Err(StoreError::NotFound),
        }
    }

    fn describe(&self, o: &Object) -> wire::Description {
        let replicas = o
            .replicas
            .iter()
            .filter_map(|r| {
                let segment = self.view.get(r.segment as usize)?.as_ref()?;
                Some(wire::ReplicaState {
                    segment: r.segment,
                    segment_name: segment.name.clone(),
                    node: segment.node.name.clone(),
                    offset: r.offset,
                    state: if segment.node.readable() {
                        "complete"
                    } else {
                        "lost"
                    }
                    .to_owned(),
                })
            })
            .collect();
        let group = o.group.as_ref().and_then(|g| key::split(&g.name));
        wire::Description {
            code: 0,
            size_bytes: o.size,
            version: o.version,
            checksum: o.checksum().unwrap_or(0),
            has_checksum: o.put_with.has_checksum(),
            lease_left_ms: o.leased_until().since(self.now),
            soft_pin_left_ms: o.soft_pin_until.since(self.now),
            hard_pin: o.hard_pin,
            group: group.map_or_else(String::new, |(_, g)| {
                String::from_utf8_lossy(g).into_owned()
            }),
            data_type: u32::from(o.data_type),
            replicas,
        }
    }
}

/// Which keys of one tenant are meant.
pub(super) struct KeyFilter {
    pub(super) tenant: String,
    prefix: Vec<u8>,
    regex: Option<regex::bytes::Regex>,
}

impl KeyFilter {
    pub(super) fn new(tenant: &str, prefix: &str, regex: &str) -> Result<Self, StoreError> {
        let regex = match regex {
            "" => None,
            pattern => Some(
                regex::bytes::RegexBuilder::new(pattern)
                    .size_limit(1 << 20)
                    .build()
                    .map_err(|e| StoreError::InvalidParams {
                        what: format!("regex: {}", e.to_string().replace('\n', " ")),
                    })?,
            ),
        };
        let tenant = if tenant == key::DEFAULT_TENANT {
            ""
        } else {
            tenant
        };
        Ok(Self {
            tenant: tenant.to_owned(),
            prefix: prefix.as_bytes().to_vec(),
            regex,
        })
    }

    pub(super) fn key_of<'o>(&self, object: &'o Object) -> Option<&'o [u8]> {
        let (tenant, bytes) = key::split(&object.key)?;
        let matches = tenant == self.tenant
            && bytes.starts_with(&self.prefix)
            && self.regex.as_ref().is_none_or(|r| r.is_match(bytes));
        matches.then_some(bytes)
    }
}
