//! `usage.prompt_tokens_details.cached_tokens`: decode counts what prefill has just computed for it as cached, so clients are
//! told prefill's count instead.
//!
//! Owns finding the number in a reply and writing another in its place without changing the length of anything: a shorter
//! number is followed by blanks, which JSON allows; a longer one is not written. Every other byte stays.

use super::splice::scan;

const NAME: &[u8] = b"\"cached_tokens\":";

/// The number in a complete reply of prefill.
pub(crate) fn cached_tokens(reply: &[u8]) -> Option<u64> {
    let usage = scan(reply).ok()?.get(reply, "usage")?;
    let details = scan(usage).ok()?.get(usage, "prompt_tokens_details")?;
    let number = scan(details).ok()?.get(details, "cached_tokens")?;
    serde_json::from_slice(number).ok()
}

/// The length of the prompt in a complete reply of prefill.
pub(crate) fn prompt_tokens(reply: &[u8]) -> Option<u64> {
    let usage = scan(reply).ok()?.get(reply, "usage")?;
    let number = scan(usage).ok()?.get(usage, "prompt_tokens")?;
    serde_json::from_slice(number).ok()
}

/// Replaces the number in a piece of a reply that holds the whole usage object. Says whether it did.
pub(crate) fn patch(piece: &mut [u8], cached: u64) -> bool {
    let Some(usage) = memchr::memmem::rfind(piece, b"\"usage\":") else {
        return false;
    };
    // Within a text of the answer the quotes would be escaped.
    let Some(found) = memchr::memmem::find(&piece[usage..], NAME) else {
        return false;
    };
    let mut start = usage + found + NAME.len();
    while piece.get(start) == Some(&b' ') {
        start += 1;
    }
    let digits = piece[start..]
        .iter()
        .take_while(|b| b.is_ascii_digit())
        .count();
    let is_whole = piece
        .get(start + digits)
        .is_some_and(|b| matches!(b, b'}' | b',' | b' '));
    let number = cached.to_string();
    if digits == 0 || !is_whole || number.len() > digits {
        return false;
    }
    let room = &mut piece[start..start + digits];
    room.fill(b' ');
    room[..number.len()].copy_from_slice(number.as_bytes());
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patched(text: &str, cached: u64) -> String {
        let mut bytes = text.as_bytes().to_vec();
        patch(&mut bytes, cached);
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn only_the_number_changes_and_no_length() {
        let reply = r#"{"choices":[{"text":"say \"usage\": {\"cached_tokens\": 9}"}],"usage":{"prompt_tokens":5,"prompt_tokens_details":{"cached_tokens":1024}}}"#;
        assert_eq!(cached_tokens(reply.as_bytes()), Some(1024));
        assert_eq!(prompt_tokens(reply.as_bytes()), Some(5));
        let wanted = reply.replace("1024", "16  ");
        assert_eq!(patched(reply, 16), wanted);
        assert_eq!(cached_tokens(wanted.as_bytes()), Some(16));
        assert_eq!(patched(reply, 99_999), reply, "no room");
        for other in [
            "{}",
            r#"{"usage":null}"#,
            r#"{"usage":{"prompt_tokens_details":null}}"#,
            r#"{"usage":{"prompt_tokens_details":{"cached_tokens":null}}}"#,
            r#"{"usage":{"prompt_tokens_details":{"cached_tokens":12"#,
            r#"{"choices":[{"text":"\"cached_tokens\": 12"}]}"#,
        ] {
            assert_eq!(patched(other, 1), other);
        }
    }
}
