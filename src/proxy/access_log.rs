//! A JSON line per request.
//!
//! Owns a thread that writes and a bounded queue before it: when the disk is slower than the traffic, lines are lost and
//! counted, and no request waits. Knows no header and no prompt.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use super::handoff::Route;
use super::registry::Instance;
use super::relay::Ended;

const QUEUE_MAX: usize = 4096;

/// The way to the log.
#[derive(Debug)]
pub(crate) struct AccessLog {
    queue: SyncSender<String>,
    lost: AtomicU64,
}

impl AccessLog {
    /// Opens a file to append to; `-` is standard error.
    pub(crate) fn open(path: &Path) -> std::io::Result<Self> {
        let out: Box<dyn Write + Send> = if path == Path::new("-") {
            Box::new(std::io::stderr())
        } else {
            Box::new(
                std::fs::OpenOptions::new()
                    .create(true)
                    .append(true)
                    .open(path)?,
            )
        };
        let (queue, lines) = sync_channel(QUEUE_MAX);
        std::thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || write(out, &lines))?;
        Ok(Self {
            queue,
            lost: AtomicU64::new(0),
        })
    }

    /// Lines that were lost.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    pub(crate) fn write(&self, record: &Record<'_>) {
        if self.queue.try_send(record.json().to_string()).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn write(mut out: Box<dyn Write + Send>, lines: &Receiver<String>) {
    for line in lines {
        if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
            return;
        }
    }
}

/// A line of the access log.
pub(crate) struct Record<'a> {
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    pub(crate) request_id: &'a str,
    pub(crate) status: u16,
    pub(crate) ended: Ended,
    pub(crate) route: &'a Route,
    pub(crate) arrived: Instant,
}

impl Record<'_> {
    pub(crate) fn json(&self) -> serde_json::Value {
        let name = |i: &Option<Arc<Instance>>| i.as_ref().map(|i| i.name.clone());
        serde_json::json!({
            "time_ms": crate::base::clock::unix_ms(),
            "method": self.method,
            "path": self.path,
            "request_id": self.request_id,
            "status": self.status,
            "ended": match self.ended {
                Ended::Whole | Ended::Close => "whole",
                Ended::Cut => "cut",
                Ended::ClientGone => "client_gone",
            },
            "prefill": name(&self.route.prefill),
            "decode": name(&self.route.decode),
            "reason": self.route.reason,
            "retries": self.route.retries,
            "elapsed_ms": self.arrived.elapsed().as_secs_f64() * 1e3,
        })
    }
}
