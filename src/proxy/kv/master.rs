//! What is in the pool, as our own master tells it: its stream of object events (`GET /events`), beginning with a snapshot.
//!
//! A key of vLLM's MooncakeStoreConnector ends in the block's hash, so the index knows which tokens it holds as soon as an
//! engine has named them. Owns the connection and the form of keys. After a gap it begins anew with a snapshot.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use serde_json::Value;
use tokio::time::timeout;

use super::super::App;
use super::super::config::last_part;
use super::super::http::upstream::{ConnPool, LegError};
use super::index::POOL;
use crate::base::net::join_host_port;

/// Between two tries, growing up to the second.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// A master says that all is quiet every 5 s.
const QUIET_MAX: Duration = Duration::from_secs(20);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest line.
const LINE_BYTES_MAX: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
enum MasterError {
    #[error("{0}")]
    Leg(#[from] LegError),
    #[error("HTTP {0}")]
    Status(u16),
    #[error("its stream of events ended")]
    Ended,
    #[error("it has missed events")]
    Gap,
    #[error("the model's keys are called otherwise than was thought")]
    Model,
    #[error("a line is too long")]
    Line,
}

/// One line of the stream that matters.
#[derive(Debug, PartialEq)]
enum Said {
    Event(String),
    Data(Value),
    Nothing,
}

fn said(line: &[u8]) -> Said {
    if let Some(name) = line.strip_prefix(b"event: ") {
        return Said::Event(String::from_utf8_lossy(name).trim().to_owned());
    }
    let data = line.strip_prefix(b"data: ");
    data.and_then(|d| serde_json::from_slice(d).ok())
        .map_or(Said::Nothing, Said::Data)
}

/// A block's part in the pool: the last 64 bits of its hash, and how many parts (ranks) it has at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    engine: u64,
    parts: u32,
}

/// Reads `[PREFIX@]MODEL@tp_rank:N@…@pp_rank:N@group:N@HASH`. `None`: another model's, another cache group's, or no block.
fn part_of(key: &str, model: &str) -> Option<Part> {
    let model = last_part(model);
    let mut segments = key.rsplit('@');
    let hash = segments.next()?;
    let tail = hash.get(hash.len().checked_sub(16)?..)?;
    if !hash.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let (mut ranks, mut is_ours) = ([1, 1], false);
    for segment in segments {
        is_ours = is_ours || segment == model;
        if let Some(group) = segment.strip_prefix("group:") {
            if group != "0" {
                return None;
            }
        } else if let Some(rank) = segment.strip_prefix("tp_rank:") {
            ranks[0] = rank.parse::<u16>().ok().map_or(1, |r| u32::from(r) + 1);
        } else if let Some(rank) = segment.strip_prefix("pp_rank:") {
            ranks[1] = rank.parse::<u16>().ok().map_or(1, |r| u32::from(r) + 1);
        }
    }
    let part = Part {
        engine: u64::from_str_radix(tail, 16).ok()?,
        parts: ranks[0] * ranks[1],
    };
    is_ours.then_some(part)
}

/// Follows the master until the proxy stops.
pub(crate) async fn watch(app: Arc<App>, target: (String, u16)) {
    let mut pause = PAUSE.0;
    loop {
        let error = tokio::select! {
            error = follow(&app, &target) => error,
            () = app.stopping() => return,
        };
        if app.kv.set_master(false) {
            pause = PAUSE.0;
        }
        app.kv.index.forget(POOL);
        tracing::warn!(master = %join_host_port(&target.0, target.1), error = %error, "its events are not heard; trying again");
        let jitter = pause.mul_f64(0.2 * rand::random::<f64>());
        tokio::select! {
            () = tokio::time::sleep(pause + jitter) => {}
            () = app.stopping() => return,
        }
        pause = (pause * 2).min(PAUSE.1);
    }
}

async fn follow(app: &App, target: &(String, u16)) -> MasterError {
    match try_follow(app, target).await {
        Err(error) => error,
        Ok(never) => match never {},
    }
}

async fn try_follow(
    app: &App,
    target: &(String, u16),
) -> Result<std::convert::Infallible, MasterError> {
    let model = model_of(app);
    let mut head = format!(
        "GET /events?snapshot=true HTTP/1.1\r\nhost: {}\r\naccept: text/event-stream\r\n",
        join_host_port(&target.0, target.1)
    );
    if let Some(token) = &app.config.master_token {
        head.push_str("authorization: ");
        head.push_str(&token.bearer());
        head.push_str("\r\n");
    }
    head.push_str("\r\n");
    let (none, pool): ([Bytes; 0], _) = ([], ConnPool::default());
    let asking = pool.ask(target, head.as_bytes(), &none, false);
    let asked = timeout(CONNECT_TIMEOUT, asking).await;
    let (mut conn, mut reply) = asked.unwrap_or(Err(LegError::Timeout))?;
    if reply.status != 200 {
        return Err(MasterError::Status(reply.status));
    }
    let (mut text, mut name) = (Vec::new(), String::new());
    loop {
        let progress = reply
            .body
            .advance(&conn.inbox, |data| text.extend_from_slice(data))
            .map_err(|_| LegError::Malformed)?;
        conn.inbox.advance(progress.consumed);
        let mut start = 0;
        for end in memchr::memchr_iter(b'\n', &text) {
            match said(&text[start..end]) {
                Said::Event(event) => name = event,
                Said::Data(data) => take(app, &model, &name, &data)?,
                Said::Nothing => {}
            }
            start = end + 1;
        }
        text.drain(..start);
        if progress.done {
            return Err(MasterError::Ended);
        }
        if text.len() > LINE_BYTES_MAX {
            return Err(MasterError::Line);
        }
        // What was passed over under another name comes again with the snapshot.
        if model_of(app) != model {
            return Err(MasterError::Model);
        }
        let read = timeout(QUIET_MAX, conn.read()).await;
        let read = read.map_err(|_| LegError::Timeout)?;
        if read.map_err(LegError::Lost)? == 0 {
            return Err(MasterError::Ended);
        }
    }
}

/// What keys call the model: as the instances say, else as this proxy was told.
fn model_of(app: &App) -> String {
    app.kv.model().unwrap_or_else(|| app.config.model.clone())
}

fn take(app: &App, model: &str, name: &str, data: &Value) -> Result<(), MasterError> {
    let is_there = match name {
        "stored" | "snapshot" => true,
        // Each key is told as well when a tenant is cleared.
        "removed" => false,
        "gap" => return Err(MasterError::Gap),
        "snapshot_end" => {
            tracing::info!("following the master's events");
            app.kv.set_master(true);
            return Ok(());
        }
        _ => return Ok(()),
    };
    let key = data.get("key").and_then(Value::as_str).unwrap_or_default();
    if let Some(part) = part_of(key, model) {
        app.kv.index.pool(part.engine, part.parts, is_there);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_blocks() {
        let hash = "00ff".repeat(16);
        let key = |model: &str, tail: &str| {
            format!("pre@{model}@tp_rank:3@pcp0@dcp0@pp_rank:1@{tail}@{hash}")
        };
        let engine = 0x00ff_00ff_00ff_00ff;
        let found = part_of(&key("Qwen3-8B", "group:0"), "Qwen/Qwen3-8B/");
        assert_eq!(found, Some(Part { engine, parts: 8 }));
        assert_eq!(part_of(&key("Qwen3-8B", "group:1"), "Qwen3-8B"), None);
        assert_eq!(part_of(&key("other", "group:0"), "Qwen3-8B"), None);
        for bad in [
            "",
            "abc",
            "Qwen3-8B@tp_rank:0@xyz",
            "Qwen3-8B@é",
            "Qwen3-8B@00ff",
        ] {
            assert_eq!(part_of(bad, "Qwen3-8B"), None, "{bad}");
        }
    }

    #[test]
    fn lines() {
        assert_eq!(said(b"event: stored"), Said::Event("stored".to_owned()));
        assert_eq!(
            said(b"data: {\"key\":1}"),
            Said::Data(serde_json::json!({"key": 1}))
        );
        for other in [&b": quiet"[..], b"", b"id: 1-2", b"data: {"] {
            assert_eq!(said(other), Said::Nothing);
        }
    }
}
