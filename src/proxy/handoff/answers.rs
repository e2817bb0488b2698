//! What a client asks about its prompt (`echo`, `prompt_logprobs`): prefill computes it, so prefill is asked, decode is not, and
//! the two answers become one. Only where prefill comes first; what the two replies must hold is `merge`'s.
//!
//! A reply in one piece is read to its end and measured anew; of a stream the first event is changed, and nothing else.

use bytes::{Bytes, BytesMut};
use tokio::time::timeout;

use super::super::config::ConnectorKind;
use super::super::http::chunked::{BodyScanner, ChunkScanner};
use super::super::http::upstream::LegError;
use super::super::merge::PromptPart;
use super::super::reply::LocalReply;
use super::super::splice::Edit;
use super::{Answer, HandOff, Served};

/// Largest answer of decode that is read.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Largest first chunk of a stream.
const CHUNK_BYTES_MAX: usize = 1 << 20;

impl HandOff {
    /// Whether prefill's reply is wanted for more than its usage.
    pub(super) fn asks_of_prompt(&self) -> bool {
        let special = self.job.facts.special;
        self.part.is_none() && (special.echo || special.prompt_logprobs)
    }

    /// What else changes in prefill's body.
    pub(super) fn prompt_edits(&self, kind: Option<ConnectorKind>, edits: &mut Vec<Edit>) {
        if kind == Some(ConnectorKind::Store) {
            edits.push(Edit::Replace("n", Bytes::from_static(b"1")));
            edits.push(Edit::Remove("best_of"));
        }
        if let Some(part) = self.part.clone() {
            edits.push(Edit::Set("prompt", self.job.body.slice(part)));
        }
        if self.job.facts.special.echo && self.part.is_none() {
            // The prompt and nothing else; engines compute one token all the same.
            edits.retain(|edit| !matches!(edit, Edit::Set("max_tokens", _)));
            edits.push(Edit::Set("max_tokens", Bytes::from_static(b"0")));
        }
    }

    /// What prefill's reply tells about the prompt.
    pub(super) fn prompt_part(&self, reply: &Bytes) -> Option<PromptPart> {
        if !self.asks_of_prompt() {
            return None;
        }
        let special = self.job.facts.special;
        PromptPart::of(reply, special.echo, special.prompt_logprobs)
    }

    /// Decode is not asked again what prefill has told.
    pub(super) fn untold_edits(&self) -> Vec<Edit> {
        match self.told {
            Some(_) => vec![Edit::Remove("echo"), Edit::Remove("prompt_logprobs")],
            None => Vec::new(),
        }
    }

    /// Puts what prefill has told into decode's answer.
    pub(super) async fn with_prompt_part(&self, served: Served) -> Served {
        let Some(told) = &self.told else {
            return served;
        };
        let Served::Answer(mut answer) = served else {
            return served;
        };
        if answer.head.status >= 300 {
            return Served::Answer(answer);
        }
        let idle = self.app.config.idle_timeout;
        let merging = async {
            let merging = timeout(idle, merge(&mut answer, told, self.job.facts.stream));
            merging.await.unwrap_or(Err(LegError::Timeout))
        };
        tokio::select! {
            merged = merging => match merged {
                Ok(()) => Served::Answer(answer),
                Err(error) => {
                    answer.leg.failed(&error);
                    let text = "the decode instance gave no valid answer";
                    Served::local(LocalReply::error(502, text))
                }
            },
            () = self.owner.left() => Served::Gone,
        }
    }
}

async fn merge(answer: &mut Answer, told: &PromptPart, streams: bool) -> Result<(), LegError> {
    match &answer.head.body {
        BodyScanner::Chunked(_) if streams => merge_first_event(answer, told).await,
        _ => merge_whole(answer, told).await,
    }
}

async fn merge_whole(answer: &mut Answer, told: &PromptPart) -> Result<(), LegError> {
    let mut body = Vec::new();
    let (conn, head) = (&mut answer.conn, &mut answer.head);
    conn.read_body(&mut head.body, &mut body, ANSWER_BYTES_MAX)
        .await?;
    let merged = told.merged_with(&Bytes::from(body));
    let merged = merged.ok_or(LegError::Malformed)?;
    head.body = BodyScanner::Length(merged.len() as u64);
    conn.inbox = BytesMut::from(merged.as_slice());
    Ok(())
}

/// Length of a whole first chunk: its head, and its payload.
fn first_chunk(inbox: &[u8]) -> Result<Option<(usize, usize)>, LegError> {
    let Some(end) = memchr::memmem::find(inbox, b"\r\n") else {
        return Ok(None);
    };
    let digits = inbox[..end].split(|b| *b == b';').next();
    let digits = digits.and_then(|d| std::str::from_utf8(d).ok());
    let size = digits.and_then(|d| usize::from_str_radix(d, 16).ok());
    let size = size.ok_or(LegError::Malformed)?;
    if size == 0 || size > CHUNK_BYTES_MAX {
        return Err(LegError::Malformed);
    }
    let head = end + 2;
    Ok((inbox.len() >= head + size + 2).then_some((head, size)))
}

async fn merge_first_event(answer: &mut Answer, told: &PromptPart) -> Result<(), LegError> {
    let conn = &mut answer.conn;
    let (head, size) = loop {
        if let Some(found) = first_chunk(&conn.inbox)? {
            break found;
        }
        if conn.inbox.len() > CHUNK_BYTES_MAX || conn.read().await.map_err(LegError::Lost)? == 0 {
            return Err(LegError::Malformed);
        }
    };
    let chunk = conn.inbox.split_to(head + size + 2).freeze();
    let payload = chunk.slice(head..head + size);
    let event = payload.strip_prefix(b"data: ").ok_or(LegError::Malformed)?;
    let length = memchr::memchr(b'\n', event).unwrap_or(event.len());
    let merged = told.merged_with(&payload.slice(6..6 + length));
    let merged = merged.ok_or(LegError::Malformed)?;
    let after = &payload[6 + length..];
    let mut fresh = BytesMut::with_capacity(merged.len() + conn.inbox.len() + 64);
    let new_size = 6 + merged.len() + after.len();
    fresh.extend_from_slice(format!("{new_size:x}\r\ndata: ").as_bytes());
    for part in [merged.as_slice(), after, b"\r\n", &conn.inbox] {
        fresh.extend_from_slice(part);
    }
    conn.inbox = fresh;
    answer.head.body = BodyScanner::Chunked(ChunkScanner::new());
    Ok(())
}
