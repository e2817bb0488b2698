//! The log of slow operations: one line each, with what it waited for. Rate-limited, so that a pool in trouble does not
//! drown in its own log.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;

use super::Master;
use super::metrics::{self, Rpc};
use crate::store::model::error::code_name;
use crate::store::wire::{self, operation};

/// Lines within one [`WINDOW`].
const LINES_MAX: u32 = 20;
const WINDOW: Duration = Duration::from_secs(1);
/// Characters of a key that are shown.
const KEY_SHOWN: usize = 200;

/// What an operation has waited for.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Waits {
    /// For space, from the first time there was none: evicting, sleeping, trying again.
    pub(super) space: Duration,
    /// For nodes to acknowledge, or to come.
    pub(super) nodes: Duration,
}

impl Waits {
    pub(super) fn add(&mut self, for_space: bool, since: Instant) {
        let waited = if for_space {
            &mut self.space
        } else {
            &mut self.nodes
        };
        *waited += since.elapsed();
    }
}

/// How much has been logged lately.
#[derive(Debug, Default)]
pub(crate) struct SlowLog {
    window: Mutex<Option<(Instant, u32)>>,
}

impl SlowLog {
    /// Whether another line may be written; with how many were left out before it.
    fn allows(&self, now: Instant) -> Option<u32> {
        let mut window = self.window.lock();
        let (lines, left_out) = match *window {
            Some((begun, lines)) if now.duration_since(begun) < WINDOW => (lines, 0),
            Some((_, lines)) => {
                *window = Some((now, 0));
                (0, lines.saturating_sub(LINES_MAX))
            }
            None => (0, 0),
        };
        let begun = window.map_or(now, |(begun, _)| begun);
        *window = Some((begun, lines.saturating_add(1)));
        (lines < LINES_MAX).then_some(left_out)
    }
}

/// What is remembered of an operation before it is carried out; nothing when nobody wants to know.
pub(super) struct Watch(Option<(String, Bytes)>);

impl Watch {
    pub(super) fn new(master: &Master, operation: &wire::Operation) -> Self {
        if master.slow_log.is_zero() {
            return Self(None);
        }
        Self(operation.kind.as_ref().map(about))
    }

    /// Logs the operation if it took too long.
    pub(super) fn report(
        self,
        master: &Master,
        rpc: Rpc,
        took: Duration,
        waits: Waits,
        reply: &wire::Reply,
    ) {
        let Some((tenant, key)) = self.0.filter(|_| took >= master.slow_log) else {
            return;
        };
        master.metrics.slow.fetch_add(1, Ordering::Relaxed);
        let Some(left_out) = master.slow_lines.allows(Instant::now()) else {
            return;
        };
        let outcome = metrics::outcome(reply);
        let ms = |d: Duration| format!("{:.1}", d.as_secs_f64() * 1e3);
        let key: String = String::from_utf8_lossy(&key)
            .chars()
            .take(KEY_SHOWN)
            .collect();
        tracing::warn!(
            operation = rpc.name(),
            %tenant,
            %key,
            took_ms = ms(took),
            waited_for_space_ms = ms(waits.space),
            waited_for_nodes_ms = ms(waits.nodes),
            rest_ms = ms(took.saturating_sub(waits.space + waits.nodes)),
            items = outcome.items,
            failed_items = outcome.failed,
            error = if outcome.failed > 0 { code_name(outcome.code) } else { "" },
            left_out,
            "slow operation"
        );
    }
}

/// Tenant and first key (or pattern) of an operation.
fn about(kind: &operation::Kind) -> (String, Bytes) {
    use operation::Kind as Op;
    let first = |keys: &[Bytes]| keys.first().cloned().unwrap_or_default();
    match kind {
        Op::Exist(op) => (op.tenant.clone(), first(&op.keys)),
        Op::Locate(op) => (op.tenant.clone(), first(&op.keys)),
        Op::Remove(op) => (op.tenant.clone(), first(&op.keys)),
        Op::PutStart(op) => {
            let key = op.items.first().map(|i| i.key.clone());
            (op.tenant.clone(), key.unwrap_or_default())
        }
        Op::ArenaCommit(op) => {
            let key = op.items.first().map(|i| i.key.clone());
            (op.tenant.clone(), key.unwrap_or_default())
        }
        Op::Stat(op) => (op.tenant.clone(), op.key.clone()),
        Op::RemoveMatching(op) => (op.tenant.clone(), op.regex.clone().into()),
        Op::List(op) => (op.tenant.clone(), op.regex.clone().into()),
        _ => (String::new(), Bytes::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let log = SlowLog::default();
        let start = Instant::now();
        let written = (0..50).filter(|_| log.allows(start).is_some()).count();
        assert_eq!(written, LINES_MAX as usize);
        let later = start + WINDOW;
        assert_eq!(log.allows(later), Some(30));
        assert_eq!(log.allows(later), Some(0));
    }
}
