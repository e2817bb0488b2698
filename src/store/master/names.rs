//! The metadata service of upstream's transfer engines, `/metadata?key=…`: a small map from text to bytes, in memory.
//!
//! Knows nothing of the pool; engines that use `http://MASTER/metadata` find each other through it. Bounded, since anybody
//! who may reach the port can write.

use std::collections::HashMap;

use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use parking_lot::RwLock;

type Answer = (StatusCode, Bytes);
type Shared = State<std::sync::Arc<super::Master>>;
type Params = Query<HashMap<String, String>>;

const KEYS_MAX: usize = 65_536;
const KEY_BYTES_MAX: usize = 4096;
const BYTES_MAX: usize = 256 << 20;
/// One value: an engine with very many registered buffers describes each of them.
pub(crate) const VALUE_BYTES_MAX: usize = 32 << 20;

/// See the module header.
#[derive(Default)]
pub(crate) struct Names {
    values: RwLock<(HashMap<String, Bytes>, usize)>,
}

impl Names {
    fn put(&self, key: String, value: Bytes) -> bool {
        let mut values = self.values.write();
        let (map, bytes) = &mut *values;
        let replaced = map.get(&key).map(Bytes::len);
        let after = *bytes - replaced.unwrap_or(0) + value.len();
        if after > BYTES_MAX || (replaced.is_none() && map.len() >= KEYS_MAX) {
            return false;
        }
        *bytes = after;
        map.insert(key, value);
        true
    }

    fn remove(&self, key: &str) -> bool {
        let mut values = self.values.write();
        let removed = values.0.remove(key);
        values.1 -= removed.as_ref().map_or(0, Bytes::len);
        removed.is_some()
    }
}

fn words(status: StatusCode, text: &'static str) -> Answer {
    (status, Bytes::from_static(text.as_bytes()))
}

fn key(params: &HashMap<String, String>) -> Result<&String, Answer> {
    let key = params
        .get("key")
        .filter(|k| !k.is_empty() && k.len() <= KEY_BYTES_MAX);
    key.ok_or_else(|| words(StatusCode::BAD_REQUEST, "`key` must have 1 to 4096 bytes\n"))
}

const MISSING: (StatusCode, &str) = (StatusCode::NOT_FOUND, "metadata not found");

pub(crate) async fn get(State(master): Shared, Query(params): Params) -> Answer {
    match key(&params) {
        Ok(key) => match master.names.values.read().0.get(key) {
            Some(value) => (StatusCode::OK, value.clone()),
            None => words(MISSING.0, MISSING.1),
        },
        Err(refused) => refused,
    }
}

pub(crate) async fn put(State(master): Shared, Query(params): Params, body: Bytes) -> Answer {
    match key(&params) {
        // A copy of its own: the body may be a part of a larger buffer.
        Ok(key) if master.names.put(key.clone(), Bytes::copy_from_slice(&body)) => {
            words(StatusCode::OK, "metadata updated")
        }
        Ok(_) => words(
            StatusCode::INSUFFICIENT_STORAGE,
            "no more metadata fits here: remove some keys\n",
        ),
        Err(refused) => refused,
    }
}

pub(crate) async fn delete(State(master): Shared, Query(params): Params) -> Answer {
    match key(&params) {
        Ok(key) if master.names.remove(key) => words(StatusCode::OK, "metadata deleted"),
        Ok(_) => words(MISSING.0, MISSING.1),
        Err(refused) => refused,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_what_it_holds() {
        let names = Names::default();
        let half = Bytes::from(vec![0; BYTES_MAX / 2]);
        assert!(names.put("a".into(), half.clone()) && names.put("b".into(), half.clone()));
        assert!(!names.put("c".into(), Bytes::from_static(b"x")), "full");
        assert!(names.put("a".into(), Bytes::new()), "replaced");
        assert!(names.put("c".into(), Bytes::from_static(b"x")));
        assert!(names.remove("b") && !names.remove("b"));
        assert_eq!(names.values.read().1, 1);
    }
}
