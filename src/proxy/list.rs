//! Where the elements of a JSON list lie, without parsing them. What [`super::splice`] does for objects.

use std::ops::Range;

use super::splice::{Cursor, SpliceError};

/// Finds the elements of a list, at most `max`.
///
/// # Errors
/// When `text` is no list, broken at its outermost level, or longer.
pub(crate) fn elements(text: &[u8], max: usize) -> Result<Vec<Range<usize>>, SpliceError> {
    let mut cursor = Cursor { text, at: 0 };
    let mut found = Vec::new();
    cursor.blank();
    cursor.expect(b'[')?;
    cursor.blank();
    if cursor.peek() == Some(b']') {
        cursor.at += 1;
    } else {
        loop {
            cursor.blank();
            let (start, end) = cursor.value()?;
            if found.len() == max {
                return Err(SpliceError::TooMuch);
            }
            found.push(start..end);
            cursor.blank();
            match cursor.peek() {
                Some(b',') => cursor.at += 1,
                Some(b']') => {
                    cursor.at += 1;
                    break;
                }
                _ => return cursor.wrong(),
            }
        }
    }
    cursor.blank();
    if cursor.at == text.len() {
        Ok(found)
    } else {
        cursor.wrong()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(text: &str) -> Option<Vec<&str>> {
        let found = elements(text.as_bytes(), 4).ok()?;
        Some(found.into_iter().map(|r| &text[r]).collect())
    }

    #[test]
    fn elements_as_they_are_written() {
        assert_eq!(of(" [ ] "), Some(vec![]));
        assert_eq!(
            of(r#"[ "a,]" , [1, 2],{"x":[]}, -1.5e3 ]"#),
            Some(vec![r#""a,]""#, "[1, 2]", r#"{"x":[]}"#, "-1.5e3"])
        );
        for bad in [
            "",
            "{}",
            "[1",
            "[1,]",
            "[,1]",
            "[1 2]",
            "[1]x",
            "[1,2,3,4,5]",
        ] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_list_is_found_and_no_bytes_panic(list in prop::collection::vec(".{0,5}", 0..5), bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let text = serde_json::to_string(&list).unwrap();
            let found = elements(text.as_bytes(), 5).unwrap();
            let back: Vec<String> = found.into_iter().map(|r| serde_json::from_str(&text[r]).unwrap()).collect();
            prop_assert_eq!(back, list);
            let _ = elements(&bytes, 8);
        }
    }
}
