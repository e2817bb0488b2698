//! The store's visibility barrier: prefill's puts are asynchronous, so its reply may come before the last block is readable,
//! and decode would compute what is about to be there.
//!
//! Waits, for a short time, until the pool is said to have the prompt's last block (by instances' or the master's events).
//! Where nobody tells what comes into the pool it does not wait.

use std::time::Instant;

use super::super::registry::Instance;
use super::HandOff;

/// Of a prompt that is covered this far by what is known (of 8 parts), the known part stands for the whole.
const COVERED: usize = 7;

impl HandOff {
    /// Waits until decode can read what `prefill` has computed since `began`, at most `--store-barrier`. Cancel-safe.
    pub(super) async fn wait_for_pool(&self, prefill: &Instance, began: Instant) {
        let (app, within) = (&self.app, self.app.config.barrier);
        if within.is_zero() || !app.kv.has_pool() {
            return;
        }
        let waited = Instant::now();
        let deadline = tokio::time::Instant::now() + within;
        let mut is_waiting = false;
        loop {
            let pooled = app.kv.index.pooled.notified();
            tokio::pin!(pooled);
            pooled.as_mut().enable();
            if self.is_pooled(prefill, began) {
                break;
            }
            is_waiting = true;
            if tokio::time::timeout_at(deadline, pooled).await.is_err() {
                app.metrics.barrier_timeouts.add();
                break;
            }
        }
        if is_waiting {
            app.metrics.barrier_waits.add();
            app.metrics.barrier.record(waited.elapsed());
        }
    }

    fn is_pooled(&self, prefill: &Instance, began: Instant) -> bool {
        let kv = &self.app.kv;
        let bytes = self.prompt().len();
        match self.known() {
            Some(known) if known.bytes >= bytes * COVERED / 8 => {
                kv.index.is_pooled(&known.chain, known.tokens)
            }
            _ if !prefill.feed.is_live() => true,
            _ => {
                // Of a new text the blocks that its prefill instance has stored meanwhile, which may be others' too.
                let stored = prefill.feed.since(began);
                !stored.is_empty() && kv.index.are_pooled(&stored)
            }
        }
    }
}
