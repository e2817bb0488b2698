//! Several prompts in one request, with the store: each is prefilled by itself, wherever its policy sends it, and decode gets the
//! client's own body and finds all of them in the pool.

use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use tokio::task::JoinSet;

use super::super::config::Role;
use super::super::connector::store;
use super::super::registry::{Instance, Leg};
use super::super::reply::LocalReply;
use super::{HandOff, Served, parts};

/// Prompts of one request under way at once.
const AT_ONCE_MAX: usize = 4;

impl HandOff {
    /// A prefill per prompt, then decode. `prefill` has been chosen for the first of them.
    pub(super) async fn batch(&mut self, prefill: Leg, decode: Leg, limit: &'static str) -> Served {
        let started = Instant::now();
        self.about_all();
        self.route.prefill = Some(prefill.instance.clone());
        let from = prefill.instance.clone();
        if let Err(served) = self.prefill_all(prefill, limit).await {
            return served;
        }
        self.app.metrics.prefill.record(started.elapsed());
        let decode = match self.still_usable(decode, &from).await {
            Ok(leg) => leg,
            Err(served) => return served,
        };
        let body = store::decode_body(&self.job.body);
        self.decode(decode, &body, false).await.0
    }

    async fn prefill_all(&self, first: Leg, limit: &'static str) -> Result<(), Served> {
        let mut first = Some(first);
        // Dropped with the client: what is under way ends.
        let mut running = JoinSet::new();
        let mut left = parts(&self.job).into_iter();
        loop {
            while running.len() < AT_ONCE_MAX
                && let Some(part) = left.next()
            {
                let one = self.about(part);
                let (leg, from) = (first.take(), self.route.prefill.clone());
                running.spawn(async move { one.prefill_one(leg, from, limit).await });
            }
            match running.join_next().await {
                None => return Ok(()),
                Some(Ok(Ok(()))) => {}
                Some(Ok(Err(served))) => return Err(served),
                Some(Err(_)) => {
                    let text = "a prompt of the list could not be prefilled";
                    return Err(Served::local(LocalReply::error(502, text)));
                }
            }
        }
    }

    /// A hand-off of one of the prompts.
    fn about(&self, part: Range<usize>) -> Self {
        let mut one = self.beside();
        one.part = Some(part);
        one.is_beside = true;
        one.known = OnceLock::new();
        one
    }

    async fn prefill_one(
        mut self,
        leg: Option<Leg>,
        with: Option<Arc<Instance>>,
        limit: &'static str,
    ) -> Result<(), Served> {
        let leg = match leg {
            Some(leg) => leg,
            None => match self.pick(Role::Prefill, &[], with.as_deref()).await {
                Ok(Some(leg)) => leg,
                // Decode computes this one itself: the batch holds what others may be waiting for.
                _ => return Ok(()),
            },
        };
        let began = Instant::now();
        let (_, from) = self.prefill(leg, limit).await?;
        self.wait_for_pool(&from, began).await;
        Ok(())
    }
}
