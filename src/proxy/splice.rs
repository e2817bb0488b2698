//! Changes named top-level fields of a JSON object and nothing else, without parsing the rest.
//!
//! Owns finding the members of the outermost object and putting a body together from slices of the original: a 256 KB
//! prompt is walked over once and never copied. It checks the outermost object only; what is wrong deeper inside is the
//! worker's to refuse. Knows no field by name.

use std::borrow::Cow;

use bytes::Bytes;
use smallvec::SmallVec;

/// Most members of the outermost object.
const MEMBERS_MAX: usize = 1024;
/// Deepest nesting that is walked through.
const DEPTH_MAX: u32 = 512;

/// Why a body is not an object that can be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpliceError {
    /// No JSON object.
    #[error("the body is not a JSON object")]
    NotAnObject,
    /// Broken JSON at a byte.
    #[error("the body is not valid JSON at byte {0}")]
    Malformed(usize),
    /// More than can be handled.
    #[error("the body has too many fields or is nested too deeply")]
    TooMuch,
}

#[derive(Clone, Copy, Debug)]
struct Member {
    /// The key's quotes included.
    key: (usize, usize),
    value: (usize, usize),
}

/// Where the members of the outermost object lie.
#[derive(Clone, Debug)]
pub struct Members {
    members: SmallVec<[Member; 16]>,
    /// Position after `{`.
    open: usize,
    /// Position of `}`.
    close: usize,
}

/// What happens to a field.
#[derive(Clone, Debug)]
pub enum Edit {
    /// Takes this value, whether or not the field was there.
    Set(&'static str, Bytes),
    /// Takes this value if the field was there.
    Replace(&'static str, Bytes),
    /// Goes away.
    Remove(&'static str),
}

impl Edit {
    fn name(&self) -> &'static str {
        match self {
            Self::Set(name, _) | Self::Replace(name, _) | Self::Remove(name) => name,
        }
    }
}

/// A body in pieces, to be sent one after the other.
pub type Pieces = SmallVec<[Bytes; 8]>;

pub(super) struct Cursor<'a> {
    pub(super) text: &'a [u8],
    pub(super) at: usize,
}

impl Cursor<'_> {
    pub(super) fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    pub(super) fn wrong<T>(&self) -> Result<T, SpliceError> {
        Err(SpliceError::Malformed(self.at))
    }

    pub(super) fn blank(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    pub(super) fn expect(&mut self, byte: u8) -> Result<(), SpliceError> {
        if self.peek() != Some(byte) {
            return self.wrong();
        }
        self.at += 1;
        Ok(())
    }

    fn string(&mut self) -> Result<(usize, usize), SpliceError> {
        let start = self.at;
        self.expect(b'"')?;
        loop {
            let rest = self.text.get(self.at..).unwrap_or_default();
            let Some(found) = memchr::memchr2(b'"', b'\\', rest) else {
                return self.wrong();
            };
            self.at += found + 1;
            if rest[found] == b'"' {
                return Ok((start, self.at));
            }
            // Whatever is escaped is skipped, a quote or a backslash included.
            self.at += 1;
        }
    }

    pub(super) fn value(&mut self) -> Result<(usize, usize), SpliceError> {
        let start = self.at;
        match self.peek() {
            Some(b'"') => return self.string(),
            Some(b'{' | b'[') => self.nested()?,
            _ => self.scalar()?,
        }
        Ok((start, self.at))
    }

    fn nested(&mut self) -> Result<(), SpliceError> {
        let mut depth = 0u32;
        loop {
            match self.peek() {
                Some(b'"') => {
                    self.string()?;
                    continue;
                }
                Some(b'{' | b'[') => depth += 1,
                Some(b'}' | b']') => depth -= 1,
                Some(_) => {}
                None => return self.wrong(),
            }
            if depth > DEPTH_MAX {
                return Err(SpliceError::TooMuch);
            }
            self.at += 1;
            if depth == 0 {
                return Ok(());
            }
        }
    }

    fn scalar(&mut self) -> Result<(), SpliceError> {
        let start = self.at;
        while matches!(self.peek(), Some(b) if b.is_ascii_alphanumeric() || matches!(b, b'-' | b'+' | b'.'))
        {
            self.at += 1;
        }
        let text = &self.text[start..self.at];
        let word = matches!(
            text,
            b"true" | b"false" | b"null" | b"NaN" | b"Infinity" | b"-Infinity"
        );
        let number = || serde_json::from_slice::<serde_json::Number>(text).is_ok();
        if word || number() {
            return Ok(());
        }
        self.at = start;
        self.wrong()
    }
}

/// Finds the members of the outermost object.
///
/// # Errors
/// When `body` is no object, or broken at its outermost level.
pub fn scan(body: &[u8]) -> Result<Members, SpliceError> {
    let mut cursor = Cursor { text: body, at: 0 };
    cursor.blank();
    if cursor.peek() != Some(b'{') {
        return Err(SpliceError::NotAnObject);
    }
    cursor.at += 1;
    let open = cursor.at;
    let mut members = SmallVec::new();
    cursor.blank();
    if cursor.peek() != Some(b'}') {
        loop {
            cursor.blank();
            let key = cursor.string()?;
            cursor.blank();
            cursor.expect(b':')?;
            cursor.blank();
            let value = cursor.value()?;
            if members.len() == MEMBERS_MAX {
                return Err(SpliceError::TooMuch);
            }
            members.push(Member { key, value });
            cursor.blank();
            match cursor.peek() {
                Some(b',') => cursor.at += 1,
                Some(b'}') => break,
                _ => return cursor.wrong(),
            }
        }
    }
    let close = cursor.at;
    cursor.at += 1;
    cursor.blank();
    if cursor.at != body.len() {
        return cursor.wrong();
    }
    Ok(Members {
        members,
        open,
        close,
    })
}

impl Members {
    fn is_named(member: &Member, body: &[u8], name: &str) -> bool {
        let key = &body[member.key.0..member.key.1];
        let inner = &key[1..key.len() - 1];
        if memchr::memchr(b'\\', inner).is_none() {
            return inner == name.as_bytes();
        }
        // `"max\u005ftokens"` is the same field to every JSON parser.
        serde_json::from_slice::<String>(key).is_ok_and(|k| k == name)
    }

    /// The value of a field as it is written. Of several with one name the last counts, as in Python.
    pub fn get<'a>(&self, body: &'a [u8], name: &str) -> Option<&'a [u8]> {
        let member = self
            .members
            .iter()
            .rev()
            .find(|m| Self::is_named(m, body, name))?;
        body.get(member.value.0..member.value.1)
    }

    /// The byte range of a field's value.
    pub fn range(&self, body: &[u8], name: &str) -> Option<std::ops::Range<usize>> {
        let member = self
            .members
            .iter()
            .rev()
            .find(|m| Self::is_named(m, body, name))?;
        Some(member.value.0..member.value.1)
    }

    /// Every field's name, escapes undone, and its value as it is written, in order; twice what is there twice.
    pub(crate) fn entries<'a>(
        &'a self,
        body: &'a [u8],
    ) -> impl Iterator<Item = (Cow<'a, str>, &'a [u8])> {
        self.members.iter().map(|member| {
            let key = &body[member.key.0..member.key.1];
            let plain = String::from_utf8_lossy(&key[1..key.len() - 1]);
            let name = match memchr::memchr(b'\\', key) {
                None => plain,
                Some(_) => serde_json::from_slice(key).map_or(plain, Cow::Owned),
            };
            (name, &body[member.value.0..member.value.1])
        })
    }

    /// Whether every field has one of these names.
    pub(crate) fn has_only(&self, body: &[u8], names: &[&str]) -> bool {
        let known = |m: &Member| names.iter().any(|name| Self::is_named(m, body, name));
        self.members.iter().all(known)
    }

    /// Applies edits; everything else stays byte for byte. Of a field that is there twice one is left.
    pub fn apply(&self, body: &Bytes, edits: &[Edit]) -> Pieces {
        let mut out = Output {
            body,
            pieces: Pieces::new(),
            run: (0, self.open),
            last: None,
            any: false,
        };
        let mut used: SmallVec<[bool; 8]> = SmallVec::from_elem(false, edits.len());
        for (index, member) in self.members.iter().enumerate() {
            let edit = edits
                .iter()
                .position(|e| Self::is_named(member, body, e.name()));
            match edit.map(|at| (at, &edits[at])) {
                None => out.keep(index, member, None),
                Some((_, Edit::Remove(_))) => {}
                Some((at, Edit::Set(_, value) | Edit::Replace(_, value))) => {
                    if !std::mem::replace(&mut used[at], true) {
                        out.keep(index, member, Some(value));
                    }
                }
            }
        }
        for (edit, used) in edits.iter().zip(used) {
            if let (Edit::Set(name, value), false) = (edit, used) {
                out.append(name, value);
            }
        }
        out.finish(self.close)
    }
}

struct Output<'a> {
    body: &'a Bytes,
    pieces: Pieces,
    /// A stretch of the original that is still growing.
    run: (usize, usize),
    /// The member that was put out last.
    last: Option<usize>,
    any: bool,
}

impl Output<'_> {
    fn flush(&mut self) {
        if self.run.0 < self.run.1 {
            self.pieces.push(self.body.slice(self.run.0..self.run.1));
        }
        self.run = (0, 0);
    }

    fn keep(&mut self, index: usize, member: &Member, value: Option<&Bytes>) {
        let follows = if index == 0 {
            self.last.is_none()
        } else {
            self.last == Some(index - 1)
        };
        if !follows {
            self.flush();
            if self.any {
                self.pieces.push(Bytes::from_static(b","));
            }
            self.run = (member.key.0, member.key.0);
        }
        self.any = true;
        self.last = Some(index);
        match value {
            None => self.run.1 = member.value.1,
            Some(value) => {
                self.run.1 = member.value.0;
                self.flush();
                self.pieces.push(value.clone());
                self.run = (member.value.1, member.value.1);
            }
        }
    }

    fn append(&mut self, name: &'static str, value: &Bytes) {
        self.flush();
        let comma = if self.any { "," } else { "" };
        self.any = true;
        self.pieces.push(Bytes::from(format!("{comma}\"{name}\":")));
        self.pieces.push(value.clone());
    }

    fn finish(mut self, close: usize) -> Pieces {
        self.flush();
        self.pieces.push(self.body.slice(close..));
        self.pieces
    }
}

/// For the fuzzer: no input panics, and what was put together is scanned again.
pub fn fuzz(input: &[u8]) {
    let body = Bytes::copy_from_slice(input);
    let Ok(members) = scan(&body) else { return };
    let edits = [
        Edit::Set("max_tokens", Bytes::from_static(b"1")),
        Edit::Replace("stream", Bytes::from_static(b"false")),
        Edit::Remove("stream_options"),
    ];
    let joined = members.apply(&body, &edits).concat();
    let again = scan(&joined);
    debug_assert!(again.is_ok(), "{joined:?}");
    if let Ok(again) = again {
        debug_assert_eq!(again.get(&joined, "max_tokens"), Some(&b"1"[..]));
        debug_assert_eq!(again.get(&joined, "stream_options"), None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Map, Value};

    fn spliced(text: &str, edits: &[Edit]) -> String {
        let body = Bytes::copy_from_slice(text.as_bytes());
        let pieces = scan(&body).unwrap().apply(&body, edits);
        String::from_utf8(pieces.concat()).unwrap()
    }

    fn set(name: &'static str, value: &'static str) -> Edit {
        Edit::Set(name, Bytes::from_static(value.as_bytes()))
    }

    #[test]
    fn examples() {
        let one = [set("m", "1")];
        assert_eq!(spliced("{}", &one), r#"{"m":1}"#);
        assert_eq!(spliced(" { } ", &one), r#" {"m":1} "#);
        assert_eq!(
            spliced(r#"{"m" : 5, "a":"}"}"#, &one),
            r#"{"m" : 1, "a":"}"}"#
        );
        assert_eq!(spliced(r#"{"m":5,"m":6}"#, &one), r#"{"m":1}"#);
        assert_eq!(spliced(r#"{"\u006d":5}"#, &one), r#"{"\u006d":1}"#);
        assert_eq!(spliced(r#"{"a":{"m":5}}"#, &one), r#"{"a":{"m":5},"m":1}"#);
        let gone = [Edit::Remove("a")];
        assert_eq!(
            spliced(r#"{"a":1, "b":2, "c":3}"#, &gone),
            r#"{"b":2, "c":3}"#
        );
        assert_eq!(
            spliced(r#"{"b":2, "a":1, "c":3}"#, &gone),
            r#"{"b":2,"c":3}"#
        );
        assert_eq!(spliced(r#"{"b":2, "a":1}"#, &gone), r#"{"b":2}"#);
        assert_eq!(spliced(r#"{"a":1,"a":2}"#, &gone), r"{}");
    }

    #[test]
    fn refuses_what_is_no_object() {
        for bad in ["", "[]", "1", "\"a\"", "null"] {
            assert_eq!(
                scan(bad.as_bytes()).unwrap_err(),
                SpliceError::NotAnObject,
                "{bad}"
            );
        }
        for bad in [
            "{",
            "{\"a\"}",
            "{\"a\":}",
            "{\"a\":1,}",
            "{\"a\":1}x",
            "{\"a\":1 2}",
            "{a:1}",
            "{\"a\":tru}",
            "{\"a\":01}",
            "{\"a\":[}",
            "{\"a",
            "{\"a\\",
            "{,}",
            "{\"a\":1}{}",
        ] {
            assert!(scan(bad.as_bytes()).is_err(), "{bad}");
        }
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(1000), "]".repeat(1000));
        assert_eq!(scan(deep.as_bytes()).unwrap_err(), SpliceError::TooMuch);
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (-1e12..1e12f64).prop_map(Value::from),
            ".{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::vec((".{0,6}", inner), 0..5)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    fn any_object() -> impl Strategy<Value = Map<String, Value>> {
        let key = prop_oneof![
            Just("max_tokens".to_owned()),
            Just("stream".to_owned()),
            Just("stream_options".to_owned()),
            ".{0,8}",
        ];
        prop::collection::vec((key, any_value()), 0..9).prop_map(|m| m.into_iter().collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
        #[test]
        fn only_the_named_fields_change(object in any_object(), pretty in any::<bool>()) {
            let text = if pretty {
                serde_json::to_string_pretty(&object).unwrap()
            } else {
                serde_json::to_string(&object).unwrap()
            };
            let edits = [
                set("max_tokens", "1"),
                Edit::Replace("stream", Bytes::from_static(b"false")),
                Edit::Remove("stream_options"),
            ];
            let result = spliced(&text, &edits);
            // Not `object`: reading a number back need not give the last bit again.
            let mut wanted: Map<String, Value> = serde_json::from_str(&text).unwrap();
            wanted.insert("max_tokens".into(), 1.into());
            if wanted.contains_key("stream") {
                wanted.insert("stream".into(), false.into());
            }
            wanted.shift_remove("stream_options");
            let got: Map<String, Value> = serde_json::from_str(&result).unwrap();
            prop_assert_eq!(&got, &wanted);
            // Byte for byte: every other value is written as it was.
            let (before, after) = (scan(text.as_bytes()).unwrap(), scan(result.as_bytes()).unwrap());
            for name in object.keys().filter(|k| !["max_tokens", "stream", "stream_options"].contains(&k.as_str())) {
                prop_assert_eq!(before.get(text.as_bytes(), name), after.get(result.as_bytes(), name));
            }
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            fuzz(&bytes);
        }

        #[test]
        fn near_json_does_not_panic(text in "[\\{\\}\\[\\]\",:\\\\ a1nul]{0,24}") {
            fuzz(text.as_bytes());
        }
    }
}
