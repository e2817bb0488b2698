//! The tokens of a request's prompt: what is known of them, and asking a worker beside the request's way.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::timeout;

use super::super::http::upstream::LegError;
use super::super::kv::text::{self, Known};
use super::super::registry::Instance;
use super::super::usage::{self, Told};
use super::super::{openai, splice};
use super::HandOff;

/// Bound of a question for tokens.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest body that is sent to `/tokenize`.
const QUESTION_BYTES_MAX: usize = 1 << 20;
/// A prompt of which this many tokens more or less were cached than thought, and an eighth of it, is worth a question.
const WRONG_TOKENS_MIN: f64 = 320.0;
/// Largest answer that is read.
const ANSWER_BYTES_MAX: usize = 16 << 20;

impl HandOff {
    /// Takes in what prefill's reply counts.
    pub(super) fn told_counts(&self, reply: &[u8]) -> Told {
        let told = usage::told(reply);
        let prompt = self.prompt();
        self.app
            .metrics
            .tokens_told
            .add_all(told.cached.unwrap_or(0));
        // A list of token ids says nothing about texts.
        if !text::is_ids(prompt) {
            self.app.bytes_per_token.learn(prompt.len(), told.prompt);
        }
        told
    }

    /// The prompt as it is written in the body; of several the one this is about.
    pub(super) fn prompt(&self) -> &[u8] {
        let job = &self.job;
        let range = self.part.clone().unwrap_or(job.facts.prompt.clone());
        job.body.get(range).unwrap_or_default()
    }

    /// Its length in tokens, estimated.
    pub(super) fn tokens(&self) -> u64 {
        match self.part {
            Some(_) => openai::estimate(self.prompt(), true, self.app.bytes_per_token.get()),
            None => self.job.facts.tokens,
        }
    }

    /// What is known of the prompt's tokens.
    pub(super) fn known(&self) -> Option<&Known> {
        if !self.app.wants_tokens() {
            return None;
        }
        let (kv, job) = (&self.app.kv, &self.job);
        let look = || {
            kv.texts
                .known(&kv.index, self.prompt(), job.facts.seed, self.adapter())
        };
        self.known.get_or_init(look).as_ref()
    }

    /// The adapter a request names in the place of the model; its blocks are not the model's.
    fn adapter(&self) -> &[u8] {
        let model = self.job.facts.model.as_deref().unwrap_or_default();
        if super::super::health::same_model(&self.app.config.model, model) {
            return b"";
        }
        model.as_bytes()
    }

    /// Asks for the tokens of a text of which not as much was cached as thought (`uncached`: what was thought to be left to
    /// compute). As long as that is right nobody needs to know its tokens.
    pub(super) fn learn_if_wrong(&self, instance: &Arc<Instance>, uncached: u64, told: Told) {
        if !self.app.wants_tokens() || self.part.is_some() {
            return;
        }
        let (Some(cached), Some(prompt)) = (told.cached, told.prompt) else {
            return;
        };
        instance.tells_cached.store(true, Ordering::Relaxed);
        let estimated = self.tokens().max(1) as f64;
        let prompt = prompt as f64;
        let thought = (1.0 - uncached as f64 / estimated) * prompt;
        let error = (thought - cached as f64).abs();
        if error > WRONG_TOKENS_MIN.max(prompt / 8.0) {
            self.learn_tokens(instance);
        }
    }

    /// Asks a worker for the tokens of a text that is new, for the next request that begins alike. Nobody waits for it,
    /// and when enough questions are under way none is added.
    pub(super) fn learn_tokens(&self, instance: &Arc<Instance>) {
        let (app, job) = (&self.app, &self.job);
        // The other APIs' bodies are not what `/tokenize` reads.
        let path = job.target.split('?').next().unwrap_or_default();
        let is_asked = matches!(path, "/v1/completions" | "/v1/chat/completions")
            && app.config.tokenize
            && app.wants_tokens()
            && app.kv.index.knows_sizes()
            && !instance.is_mute.load(Ordering::Relaxed)
            && job.body.len() <= QUESTION_BYTES_MAX
            && self.part.is_none()
            && app.kv.texts.wants(self.prompt(), self.known());
        if !is_asked || app.kv.questions.available_permits() == 0 {
            return;
        }
        let (app, job) = (app.clone(), job.clone());
        let head = self.head_for("/tokenize", instance, std::slice::from_ref(&job.body), None);
        let (instance, adapter) = (instance.clone(), self.adapter().to_vec());
        tokio::spawn(async move {
            let Ok(_place) = app.kv.questions.try_acquire() else {
                return;
            };
            let asking = async {
                let body = std::slice::from_ref(&job.body);
                let (mut conn, mut reply) = instance
                    .pool
                    .ask(&instance.target, &head, body, false)
                    .await?;
                let mut kept = Vec::new();
                conn.read_body(&mut reply.body, &mut kept, ANSWER_BYTES_MAX)
                    .await?;
                if reply.keep_alive {
                    instance.pool.give(conn);
                }
                Ok::<_, LegError>((reply.status, kept))
            };
            let Ok(Ok((status, answer))) = timeout(QUESTION_TIMEOUT, asking).await else {
                return;
            };
            if matches!(status, 404 | 405 | 501) {
                instance.is_mute.store(true, Ordering::Relaxed);
            }
            let Ok(members) = splice::scan(&answer) else {
                return;
            };
            if let Some(tokens) = members.get(&answer, "tokens").and_then(text::ids) {
                let kv = &app.kv;
                let prompt = job.body.get(job.facts.prompt.clone());
                let prompt = prompt.unwrap_or_default();
                kv.texts
                    .learn(&kv.index, prompt, job.facts.seed, &adapter, &tokens);
                app.metrics.tokenized.add();
            }
        });
    }
}
