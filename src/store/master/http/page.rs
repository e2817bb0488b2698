//! Listings in pages: how long one is, and where the next one begins.

use std::collections::HashMap;

use axum::response::Response;

use super::invalid;

/// Items of one page.
const PAGE_MAX: usize = 1000;

pub(super) type Given = HashMap<String, String>;

/// A number among the parameters; `Err` is the answer to one that is none.
pub(super) fn number(params: &Given, name: &str, default: u64) -> Result<u64, Box<Response>> {
    match params.get(name) {
        None => Ok(default),
        Some(text) => text
            .parse()
            .map_err(|_| Box::new(invalid(&format!("{name}: `{text}` is not a number")))),
    }
}

pub(super) fn limit(params: &Given) -> Result<usize, Box<Response>> {
    let wanted = number(params, "limit", 100)?;
    Ok(usize::try_from(wanted)
        .unwrap_or(PAGE_MAX)
        .clamp(1, PAGE_MAX))
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub(super) fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}

/// The page that is asked for, in the order of `rank`, which no two items share, and the cursor of the next. What comes or goes
/// between two pages moves nothing else.
pub(super) fn page<T>(
    params: &Given,
    mut all: Vec<T>,
    rank: impl Fn(&T) -> Vec<u8>,
) -> Result<(Vec<T>, Option<String>), Box<Response>> {
    let limit = limit(params)?;
    all.sort_by_cached_key(&rank);
    let cursor = params.get("cursor").filter(|c| !c.is_empty());
    if let Some(cursor) = cursor {
        let Some(after) = unhex(cursor) else {
            return Err(Box::new(invalid("cursor: not one of this listing")));
        };
        let seen = all.partition_point(|item| rank(item) <= after);
        all.drain(..seen);
    }
    let more = all.len() > limit;
    all.truncate(limit);
    let last = all.last().filter(|_| more);
    let next = last.map(|item| hex(&rank(item)));
    Ok((all, next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_once_and_in_order() {
        let given = |limit: &str, cursor: &str| {
            let pairs = [("limit", limit), ("cursor", cursor)];
            Given::from(pairs.map(|(name, value)| (name.to_owned(), value.to_owned())))
        };
        let all = || vec!["c", "a", "b"];
        let ask = |limit: &str, cursor: &str| {
            page(&given(limit, cursor), all(), |s| s.as_bytes().to_vec()).map_err(|_| ())
        };
        assert_eq!(ask("2", ""), Ok((vec!["a", "b"], Some("62".to_owned()))));
        assert_eq!(ask("2", "62"), Ok((vec!["c"], None)));
        assert_eq!(ask("3", ""), Ok((vec!["a", "b", "c"], None)));
        assert_eq!(ask("1", "6161"), Ok((vec!["b"], Some("62".to_owned()))));
        assert_eq!(ask("2", "6"), Err(()));
        assert_eq!(ask("x", ""), Err(()));
    }
}
