//! KV that prefill keeps for a decode request that was refused: a smaller request fetches it, so that it is let go.
//!
//! Without it nixl's prefill keeps the blocks until its own timeout (480 s in vLLM). The request has the prompt and nothing
//! that a worker could have refused, and is dropped at its first byte.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use super::super::config::Role;
use super::super::registry::Instance;
use super::HandOff;
use super::leg::Tried;

/// Fields that decide what the prompt's tokens are.
const KEPT: &[&str] = &[
    "model",
    "prompt",
    "messages",
    "input",
    "tools",
    "chat_template",
    "chat_template_kwargs",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "cache_salt",
    "mm_processor_kwargs",
];
/// How long that may take.
const RELEASE_MAX: Duration = Duration::from_secs(60);
/// Decode instances that are asked to fetch.
const TRIES: usize = 2;

impl HandOff {
    fn smallest_body(&self, limit: &str, params: Option<&Bytes>) -> Vec<u8> {
        let mut body = vec![b'{'];
        let mut field = |name: &str, value: &[u8]| {
            let comma = if body.len() > 1 { "," } else { "" };
            body.extend_from_slice(format!("{comma}\"{name}\":").as_bytes());
            body.extend_from_slice(value);
        };
        if let Some(members) = &self.job.members {
            for name in KEPT {
                if let Some(value) = members.get(&self.job.body, name) {
                    field(name, value);
                }
            }
        }
        field(limit, b"1");
        if let Some(params) = params {
            field("kv_transfer_params", params);
        }
        body.push(b'}');
        body
    }

    /// Lets go of what `prefill` keeps, or of what it has sent to the decode instance `at`, beside everything else. Counts as
    /// released or as orphaned.
    pub(super) fn release(
        &self,
        prefill: &Arc<Instance>,
        limit: &'static str,
        params: Option<&Bytes>,
        at: Option<&Arc<Instance>>,
    ) {
        let body = Bytes::from(self.smallest_body(limit, params));
        let other = self.beside();
        let (prefill, at) = (prefill.clone(), at.cloned());
        let app = self.app.clone();
        let fetching = async move {
            let metrics = &other.app.metrics;
            let mut tried = Vec::new();
            for _ in 0..TRIES {
                // An instance that has refused the request may well take this one.
                let found = match &at {
                    Some(at) => other.app.registry.enter(at, Role::Decode, 0),
                    None => {
                        let picked = other.pick(Role::Decode, &tried, Some(&prefill)).await;
                        picked.ok().flatten()
                    }
                };
                let Some(leg) = found else { break };
                tried.push(leg.instance.number);
                let body = std::slice::from_ref(&body);
                if let Tried::Answer(answer) = other.decode_once(leg, body).await
                    && answer.head.status < 300
                {
                    metrics.released.add();
                    return true;
                }
            }
            false
        };
        tokio::spawn(async move {
            let _busy = app.releasing();
            if !timeout(RELEASE_MAX, fetching).await.unwrap_or(false) {
                app.metrics.orphans.add();
            }
        });
    }
}
