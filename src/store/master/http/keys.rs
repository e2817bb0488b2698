//! Listings of keys in pages: as they lie, by key, or by size.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use axum::extract::{Query, State};
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::super::Master;
use super::super::events::Filter;
use super::super::object::Object;
use super::page::{hex, limit, unhex};
use super::pool::{filter, ok, set_key};
use super::{Params, Shared, invalid};
use crate::base::clock::Millis;
use crate::store::model::key;

fn object_json(master: &Master, object: &Object, now: Millis) -> Option<Value> {
    let (tenant, bytes) = key::split(&object.key)?;
    let mut map = Map::new();
    let tenant = if tenant.is_empty() {
        key::DEFAULT_TENANT
    } else {
        tenant
    };
    map.insert("tenant".to_owned(), tenant.into());
    set_key(&mut map, bytes);
    map.insert("size_bytes".to_owned(), object.size.into());
    map.insert("version".to_owned(), object.version.to_string().into());
    map.insert("replicas".to_owned(), object.replicas.len().into());
    let lease = object.leased_until().since(now);
    map.insert("lease_left_ms".to_owned(), lease.into());
    let unread = now.since(master.state.last_read(object));
    map.insert("unread_ms".to_owned(), unread.into());
    map.insert("was_read".to_owned(), object.read.into());
    map.insert("hard_pin".to_owned(), object.hard_pin.into());
    let soft = object.soft_pin_until.since(now);
    map.insert("soft_pin_left_ms".to_owned(), soft.into());
    Some(Value::Object(map))
}

/// Where an object stands in a sorted listing: the larger number first, then the smaller key.
type Rank = (Reverse<u64>, Vec<u8>);

fn rank(object: &Object, by_size: bool) -> Rank {
    let number = if by_size { object.size } else { 0 };
    (Reverse(number), object.key.to_vec())
}

/// The first `most` objects after `after`, sorted, and the rank of the last when there are more. Walks the whole index.
fn sorted(
    master: &Master,
    filter: &Filter,
    by_size: bool,
    after: Option<&Rank>,
    most: usize,
) -> (Vec<Value>, Option<Rank>) {
    let now = Millis::now();
    let mut best: BinaryHeap<(Rank, String)> = BinaryHeap::new();
    let mut more = false;
    master.state.walk(0, usize::MAX, |object| {
        if !wanted(filter, object) {
            return false;
        }
        let rank = rank(object, by_size);
        if after.is_some_and(|a| rank <= *a) {
            return false;
        }
        if best.len() >= most {
            more = true;
            if best.peek().is_some_and(|(worst, _)| rank >= *worst) {
                return false;
            }
            best.pop();
        }
        best.extend(object_json(master, object, now).map(|v| (rank, v.to_string())));
        false
    });
    let best = best.into_sorted_vec();
    let last = best.last().map(|(rank, _)| rank.clone());
    let values = best
        .into_iter()
        .map(|(_, text)| serde_json::from_str(&text).unwrap_or(Value::Null));
    (values.collect(), last.filter(|_| more))
}

fn wanted(filter: &Filter, object: &Object) -> bool {
    key::split(&object.key).is_some_and(|(tenant, bytes)| {
        let tenant = if tenant.is_empty() {
            key::DEFAULT_TENANT
        } else {
            tenant
        };
        filter.tenant.as_ref().is_none_or(|t| t == tenant) && bytes.starts_with(&filter.prefix)
    })
}

/// `sort`: none (cheap: a page costs a page), `key`, `size` (largest first; a page costs a walk over the index).
pub(super) async fn keys(State(master): Shared, Query(params): Params) -> Response {
    let limit = match limit(&params) {
        Ok(limit) => limit,
        Err(problem) => return *problem,
    };
    let filter = filter(&params);
    let cursor = params.get("cursor").cloned().unwrap_or_default();
    let by_size = match params.get("sort").map(String::as_str) {
        None | Some("") => return unsorted(master, filter, &cursor, limit).await,
        Some("key") => false,
        Some("size") => true,
        Some(_) => return invalid("sort: `key` or `size`"),
    };
    let after = match cursor.as_str() {
        "" => None,
        text => {
            let parsed = text
                .split_once('.')
                .and_then(|(n, key)| Some((Reverse(n.parse::<u64>().ok()?), unhex(key)?)));
            match parsed {
                None => return invalid("cursor: not one of this listing"),
                found => found,
            }
        }
    };
    let walked = tokio::task::spawn_blocking(move || {
        sorted(&master, &filter, by_size, after.as_ref(), limit)
    });
    let (objects, last) = walked.await.unwrap_or_default();
    let next = last.map(|(Reverse(n), key)| format!("{n}.{}", hex(&key)));
    ok(&json!({"keys": objects, "next_cursor": next}))
}

async fn unsorted(master: Arc<Master>, filter: Filter, cursor: &str, limit: usize) -> Response {
    let Ok(cursor) = (if cursor.is_empty() { "0" } else { cursor }).parse::<u64>() else {
        return invalid("cursor: not one of this listing");
    };
    let walked = tokio::task::spawn_blocking(move || {
        let now = Millis::now();
        let mut objects = Vec::new();
        let next = master.state.walk(cursor, limit, |object| {
            let take = wanted(&filter, object);
            if take {
                objects.extend(object_json(&master, object, now));
            }
            take
        });
        (objects, next)
    });
    let (objects, next) = walked.await.unwrap_or_default();
    let next = (next != 0).then(|| next.to_string());
    ok(&json!({"keys": objects, "next_cursor": next}))
}
