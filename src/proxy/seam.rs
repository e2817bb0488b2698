//! Where two engines' streams meet in one answer: what must change in the second one's events so that the whole looks like one
//! engine's.
//!
//! Owns that: counts in `usage`, which in the second half take for prompt what the client has as answer already, and the answer's
//! name and time. Everything else of an event stays byte for byte. Refuses to know how events come and go (`behind`).

use bytes::Bytes;

use super::splice::{Edit, scan};

/// What the first half has told.
#[derive(Clone, Debug)]
pub(crate) struct Seam {
    /// `id` and `created`, as they are written.
    pub(crate) id: Bytes,
    pub(crate) created: Bytes,
    /// Tokens of the client's own prompt.
    pub(crate) prompt: u64,
    /// Tokens the client had before this stream began.
    pub(crate) before: u64,
    /// Prompt tokens that prefill had cached, where it tells.
    pub(crate) cached: Option<u64>,
}

fn number(value: u64) -> Bytes {
    value.to_string().into()
}

impl Seam {
    /// Appends whole events as the client is to see them. Says whether prefill's count of cached tokens is told in them.
    pub(crate) fn join(&self, events: &[u8], out: &mut Vec<u8>) -> bool {
        let mut merged = false;
        for line in events.split_inclusive(|b| *b == b'\n') {
            merged |= self.line(line, out);
        }
        merged
    }

    fn line(&self, line: &[u8], out: &mut Vec<u8>) -> bool {
        let changed = line.strip_prefix(b"data:").and_then(|rest| {
            let data = rest.trim_ascii();
            let members = scan(data).ok()?;
            let differs = |name, ours: &Bytes| {
                let theirs = members.get(data, name);
                theirs.is_some_and(|v| v != ours.as_ref())
            };
            let mut edits = Vec::new();
            if differs("id", &self.id) {
                edits.push(Edit::Replace("id", self.id.clone()));
            }
            if differs("created", &self.created) {
                edits.push(Edit::Replace("created", self.created.clone()));
            }
            let mut merged = false;
            if let Some(usage) = members.get(data, "usage").filter(|u| u.starts_with(b"{")) {
                let (usage, told) = self.usage(usage)?;
                edits.push(Edit::Replace("usage", usage.into()));
                merged = told;
            }
            if edits.is_empty() {
                return None;
            }
            // An error has none of these, and stays as it is.
            let start = line.len() - rest.trim_ascii_start().len();
            out.extend_from_slice(&line[..start]);
            for piece in members.apply(&Bytes::copy_from_slice(data), &edits) {
                out.extend_from_slice(&piece);
            }
            out.extend_from_slice(&line[start + data.len()..]);
            Some(merged)
        });
        if changed.is_none() {
            out.extend_from_slice(line);
        }
        changed.unwrap_or(false)
    }

    /// The same counts for the whole answer, and whether prefill's count of cached tokens is among them.
    fn usage(&self, usage: &[u8]) -> Option<(Vec<u8>, bool)> {
        let members = scan(usage).ok()?;
        let theirs = members.get(usage, "completion_tokens")?;
        let theirs: u64 = serde_json::from_slice(theirs).ok()?;
        let generated = theirs.saturating_add(self.before);
        let total = generated.saturating_add(self.prompt);
        let mut edits = vec![
            Edit::Replace("prompt_tokens", number(self.prompt)),
            Edit::Replace("completion_tokens", number(generated)),
            Edit::Replace("total_tokens", number(total)),
        ];
        let details = members.get(usage, "prompt_tokens_details");
        let details = details.zip(self.cached).and_then(|(d, cached)| {
            let inner = scan(d).ok()?;
            inner
                .get(d, "cached_tokens")
                .filter(|count| *count != b"null")?;
            let edit = Edit::Replace("cached_tokens", number(cached));
            let pieces = inner.apply(&Bytes::copy_from_slice(d), &[edit]);
            Some(Bytes::from(pieces.concat()))
        });
        let told = details.is_some();
        edits.extend(details.map(|d| Edit::Replace("prompt_tokens_details", d)));
        let pieces = members.apply(&Bytes::copy_from_slice(usage), &edits);
        Some((pieces.concat(), told))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seam() -> Seam {
        Seam {
            id: Bytes::from_static(b"\"cmpl-a\""),
            created: Bytes::from_static(b"7"),
            prompt: 9,
            before: 1,
            cached: Some(4096),
        }
    }

    fn joined(events: &str) -> (String, bool) {
        let mut out = Vec::new();
        let merged = seam().join(events.as_bytes(), &mut out);
        (String::from_utf8(out).unwrap(), merged)
    }

    #[test]
    fn counts_are_those_of_the_whole_answer() {
        let (out, merged) = joined(concat!(
            "data: {\"id\":\"cmpl-a\",\"created\":7,\"choices\":[{\"text\":\"\\\"usage\\\":{\"}]}\n\n",
            "data: {\"id\":\"cmpl-b\", \"created\":12,\"choices\":[],\"usage\":{\"prompt_tokens\":10,\"total_tokens\":19,\"completion_tokens\":9,\"more\":1}}\n\n",
            "data:{\"choices\":[],\"usage\":{\"prompt_tokens\":10,\"total_tokens\":12,\"completion_tokens\":2,\"prompt_tokens_details\":{\"cached_tokens\":8}}}\r\n\r\n",
            "data: [DONE]\n\n",
        ));
        assert!(merged);
        assert_eq!(
            out,
            concat!(
                "data: {\"id\":\"cmpl-a\",\"created\":7,\"choices\":[{\"text\":\"\\\"usage\\\":{\"}]}\n\n",
                "data: {\"id\":\"cmpl-a\", \"created\":7,\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"total_tokens\":19,\"completion_tokens\":10,\"more\":1}}\n\n",
                "data:{\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"total_tokens\":12,\"completion_tokens\":3,\"prompt_tokens_details\":{\"cached_tokens\":4096}}}\r\n\r\n",
                "data: [DONE]\n\n",
            )
        );
    }

    #[test]
    fn what_has_no_counts_stays() {
        for events in [
            "data: {\"error\":{\"message\":\"x\",\"code\":500}}\n\n",
            "data: {\"choices\":[],\"usage\":null}\n\n",
            "data: {\"choices\":[],\"usage\":{\"completion_tokens\":null}}\n\n",
            "data: {\"usage\":{\"completion_tokens\":-1}}\n\n",
            ": alive\n\n",
            "data: {\"id\":\n\n",
            "data:",
            "",
        ] {
            assert_eq!(joined(events), (events.to_owned(), false));
        }
        let (_, merged) = joined(
            "data: {\"usage\":{\"completion_tokens\":1,\"prompt_tokens_details\":{\"cached_tokens\":null}}}\n\n",
        );
        assert!(!merged);
    }
}
