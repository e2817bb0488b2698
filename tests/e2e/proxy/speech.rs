//! Completions as vLLM writes them, to the byte: events, usage, token ids. A text's tokens are " t0", " t1" and so on, and a prompt
//! that holds some of them, as text or as ids, is gone on with where it stops: so two engines together say what one would.

use serde_json::{Value, json};

use crate::mock::{MODEL, Seen, tokens_of};

/// Ids of the tokens that are generated.
const GENERATED: u64 = 4_000_000_000;

/// How a worker speaks.
#[derive(Clone, Debug)]
pub(crate) struct Manner {
    /// It knows `return_token_ids`.
    pub(crate) tells_ids: bool,
    /// The number of the token that ends a text.
    pub(crate) ends_at: Option<u64>,
    /// The number of the token that is half a character.
    pub(crate) half_at: Option<u64>,
    pub(crate) created: u64,
    pub(crate) cached: Option<u64>,
    pub(crate) model_len: u64,
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            tells_ids: true,
            ends_at: None,
            half_at: None,
            created: 1_700_000_000,
            cached: None,
            model_len: 4096,
        }
    }
}

/// One answer.
pub(crate) struct Speech {
    manner: Manner,
    body: Value,
    id: String,
    prompt: Vec<u64>,
    /// The number of its first token.
    first: u64,
    most: u64,
}

impl Speech {
    /// `Err`: refused, with this text.
    pub(crate) fn of(manner: &Manner, seen: &Seen) -> Result<Self, String> {
        let body = &seen.body;
        let prompt = &body["prompt"];
        // A list of one prompt is that prompt.
        let prompt = match &prompt[0] {
            one if one.is_string() || one.is_array() => one,
            _ => prompt,
        };
        let (prompt, said): (Vec<u64>, usize) = match prompt {
            Value::String(text) => (
                tokens_of(text).into_iter().map(u64::from).collect(),
                text.matches(" t").count(),
            ),
            list => {
                let list = list.as_array().ok_or("no prompt")?;
                let list = list.iter().filter_map(Value::as_u64);
                (list.collect(), 0)
            }
        };
        let generated = prompt.iter().filter(|id| **id >= GENERATED).count();
        let most = body["max_tokens"].as_u64().unwrap_or(16);
        if prompt.len() as u64 + most > manner.model_len {
            return Err("longer than the model's context".to_owned());
        }
        if body["min_tokens"].as_u64().unwrap_or(0) > most {
            return Err("min_tokens above max_tokens".to_owned());
        }
        let line = |l: &str| l.strip_prefix("x-request-id: ").map(str::to_owned);
        let id = seen.head.lines().find_map(line).unwrap_or_default();
        Ok(Self {
            manner: manner.clone(),
            body: body.clone(),
            id: format!("cmpl-{id}"),
            first: (generated + said) as u64,
            prompt,
            most,
        })
    }

    fn is_end(&self, n: u64) -> bool {
        let least = self.body["min_tokens"].as_u64().unwrap_or(0);
        self.manner.ends_at == Some(self.first + n) && n >= least
    }

    /// How many tokens it has.
    pub(crate) fn count(&self) -> u64 {
        let end = (0..self.most).find(|n| self.is_end(*n));
        end.map_or(self.most, |n| n + 1)
    }

    fn text(&self, n: u64) -> String {
        let number = self.first + n;
        let half = self.manner.half_at;
        match number {
            _ if self.is_end(n) || half == Some(number) => String::new(),
            // The other half makes it whole.
            _ if number > 0 && half == Some(number - 1) => format!("é t{number}"),
            _ => format!(" t{number}"),
        }
    }

    fn reason(&self, n: u64) -> Value {
        match n + 1 == self.count() {
            true if self.is_end(n) => json!("stop"),
            true => json!("length"),
            false => Value::Null,
        }
    }

    fn usage(&self, generated: u64) -> Value {
        let prompt = self.prompt.len() as u64;
        json!({"prompt_tokens": prompt, "total_tokens": prompt + generated, "completion_tokens": generated})
    }

    fn last_usage(&self) -> Value {
        let mut usage = self.usage(self.count());
        if let Some(cached) = self.manner.cached {
            usage["prompt_tokens_details"] = json!({"cached_tokens": cached});
        }
        usage
    }

    fn asks_usage(&self) -> (bool, bool) {
        let options = &self.body["stream_options"];
        let usage = options["include_usage"] == true;
        (usage, usage && options["continuous_usage_stats"] == true)
    }

    fn object(&self, choices: Value) -> Value {
        json!({"id": self.id, "object": "text_completion", "created": self.manner.created, "model": MODEL, "choices": choices})
    }

    fn ids(&self, choice: &mut Value, prompt: Value, tokens: Value) {
        if self.manner.tells_ids {
            choice["prompt_token_ids"] = prompt;
            choice["token_ids"] = tokens;
        }
    }

    /// The event of a token.
    pub(crate) fn event(&self, n: u64) -> String {
        let mut choice = json!({"index": 0, "text": self.text(n), "logprobs": null, "finish_reason": self.reason(n), "stop_reason": null});
        self.ids(&mut choice, Value::Null, Value::Null);
        let mut event = self.object(json!([choice]));
        if self.asks_usage().1 {
            event["usage"] = self.usage(n + 1);
        }
        format!("data: {event}\n\n")
    }

    /// What comes behind the last token.
    pub(crate) fn ending(&self) -> Vec<String> {
        let mut ending = Vec::new();
        if self.asks_usage().0 {
            let mut event = self.object(json!([]));
            event["usage"] = self.last_usage();
            ending.push(format!("data: {event}\n\n"));
        }
        ending.push("data: [DONE]\n\n".to_owned());
        ending
    }

    /// Without a stream.
    pub(crate) fn whole(&self) -> String {
        let all = || 0..self.count();
        let text: String = all().map(|n| self.text(n)).collect();
        let reason = self.reason(self.count().saturating_sub(1));
        let mut choice = json!({"index": 0, "text": text, "logprobs": null, "finish_reason": reason, "stop_reason": null});
        if self.body["return_token_ids"] == true {
            let tokens: Vec<u64> = all().map(|n| GENERATED + self.first + n).collect();
            self.ids(&mut choice, json!(self.prompt), json!(tokens));
        }
        let mut reply = self.object(json!([choice]));
        reply["usage"] = self.last_usage();
        if self.manner.cached.is_none() {
            reply["usage"]["prompt_tokens_details"] = Value::Null;
        }
        reply.to_string()
    }
}
