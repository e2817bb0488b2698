//! The master's JSON (`/api/v1/…`, docs/http.md), asked with a deadline.
//!
//! Owns the request and what its failures mean for the exit code. Knows no view.

use std::time::Duration;

use clap::ArgMatches;
use serde_json::Value;

use super::{UsageError, connect};
use crate::base::net::{join_host_port, split_host_port};
use crate::base::trust::Token;
use crate::store::model::error::StoreError;

/// Most bytes of one answer.
const ANSWER_MAX: u64 = 64 << 20;

/// Pages of 1,000 items of one listing.
const PAGES_MAX: usize = 100;

/// One master's HTTP.
pub(super) struct Api {
    agent: ureq::Agent,
    master: String,
    token: Option<Token>,
    patience: Duration,
}

/// A text as part of a query.
pub(super) fn escaped(text: &str) -> String {
    text.bytes()
        .map(|b| {
            if b.is_ascii_alphanumeric() || b"-_.~".contains(&b) {
                char::from(b).to_string()
            } else {
                format!("%{b:02X}")
            }
        })
        .collect()
}

impl Api {
    pub(super) fn new(matches: &ArgMatches) -> anyhow::Result<Self> {
        let config = connect::config(matches)?;
        let (host, port) = split_host_port(&config.master, 50051).map_err(UsageError)?;
        let patience = config.timeout.min(Duration::from_secs(60));
        // A proxy that the environment names is for the world outside.
        let agent = ureq::Agent::config_builder()
            .proxy(None)
            .timeout_connect(Some(config.connect_timeout.min(config.timeout)))
            .http_status_as_error(false)
            .build();
        Ok(Self {
            agent: agent.into(),
            master: join_host_port(&host, port),
            token: config.token,
            patience,
        })
    }

    fn unreachable(&self, reason: impl ToString) -> StoreError {
        StoreError::MasterUnreachable {
            master: self.master.clone(),
            reason: reason.to_string(),
        }
    }

    /// `GET /api/v1/PATH`.
    ///
    /// # Errors
    /// `NotFound` for what is not there; unreachable, refused, or an answer that is none.
    pub(super) fn get(&self, path: &str) -> Result<Value, StoreError> {
        self.get_within(path, self.patience)
    }

    /// The same with a bound of its own, if that is shorter.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub(super) fn get_within(&self, path: &str, patience: Duration) -> Result<Value, StoreError> {
        let mut request = self
            .agent
            .get(self.url(path))
            .config()
            .timeout_global(Some(patience.min(self.patience)))
            .build();
        if let Some(token) = &self.token {
            request = request.header("authorization", token.bearer());
        }
        let reply = request.call().map_err(|e| self.unreachable(said(&e)))?;
        self.answer(reply)
    }

    /// A listing with all its pages together under `field`. `next_cursor` is null unless that is not all.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub(super) fn all(&self, listing: &str, field: &str) -> Result<Value, StoreError> {
        let mut whole = self.get(&format!("{listing}?limit=1000"))?;
        for _ in 1..PAGES_MAX {
            let next = text(&whole, "next_cursor").to_owned();
            if next.is_empty() {
                break;
            }
            let mut more = self.get(&format!("{listing}?limit=1000&cursor={next}"))?;
            whole["next_cursor"] = more["next_cursor"].take();
            if let (Some(all), Value::Array(more)) =
                (whole[field].as_array_mut(), more[field].take())
            {
                all.extend(more);
            }
        }
        Ok(whole)
    }

    /// `POST /api/v1/PATH`.
    ///
    /// # Errors
    /// As [`Api::get`], and `Refused` with the master's code and words.
    pub(super) fn post(&self, path: &str, body: &Value) -> Result<Value, StoreError> {
        let mut request = self
            .agent
            .post(self.url(path))
            .config()
            .timeout_global(Some(self.patience))
            .build();
        if let Some(token) = &self.token {
            request = request.header("authorization", token.bearer());
        }
        let request = request.header("content-type", "application/json");
        let reply = request
            .send(body.to_string())
            .map_err(|e| self.unreachable(said(&e)))?;
        self.answer(reply)
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}/api/v1/{path}", self.master)
    }

    fn answer(&self, mut reply: ureq::http::Response<ureq::Body>) -> Result<Value, StoreError> {
        let status = reply.status().as_u16();
        let text = reply
            .body_mut()
            .with_config()
            .limit(ANSWER_MAX)
            .read_to_string()
            .map_err(|e| self.unreachable(said(&e)))?;
        let value: Option<Value> = serde_json::from_str(&text).ok();
        match (status, value) {
            (200, Some(Value::Object(fields))) if !fields.is_empty() => Ok(Value::Object(fields)),
            (200, _) => Err(self.unreachable("what it answers is no master's: another program listens there")),
            (401, _) => Err(self.unreachable(
                "the cluster token was refused: give the same token on both sides (--token-file or MOONCAKE_TOKEN)",
            )),
            (404, Some(value)) => Err(refusal(&value).unwrap_or(StoreError::NotFound)),
            (404, None) => Err(self.unreachable("it is of a release that does not tell this")),
            (503, Some(_)) => Err(StoreError::Rebuilding),
            (400 | 403 | 409, Some(value)) if refusal(&value).is_some() => {
                Err(refusal(&value).unwrap_or(StoreError::NotFound))
            }
            (status, value) => {
                let said = value.as_ref().and_then(|v| v.get("error_message"));
                // What guards the port answers in plain text.
                let plain = text.lines().next().filter(|l| !l.is_empty());
                let said = said.and_then(Value::as_str).or(plain);
                let said = said.unwrap_or("no reason given");
                Err(self.unreachable(format!("HTTP {status}: {said}")))
            }
        }
    }
}

/// What kept a request from being answered, in words that say what to look at.
fn said(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Timeout(ureq::Timeout::Connect) => "it takes no connection in time".to_owned(),
        ureq::Error::Timeout(_) => "it does not answer in time".to_owned(),
        ureq::Error::HostNotFound => "no such name".to_owned(),
        ureq::Error::Protocol(_) => {
            "what it answers is no HTTP: another program listens there".to_owned()
        }
        ureq::Error::Io(error) => error.to_string(),
        other => other.to_string(),
    }
}

/// What a master refused, with its code; nothing for what is just not there.
fn refusal(value: &Value) -> Option<StoreError> {
    let code = value.get("error_code").and_then(Value::as_i64)?;
    let code = i32::try_from(code).ok()?;
    let reason = text(value, "error_message").to_owned();
    (code != StoreError::NotFound.code()).then_some(StoreError::Refused { code, reason })
}

/// A number of an object, 0 when it is not there.
pub(super) fn number(value: &Value, name: &str) -> u64 {
    value.get(name).and_then(Value::as_u64).unwrap_or(0)
}

/// A text of an object, empty when it is not there.
pub(super) fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value.get(name).and_then(Value::as_str).unwrap_or_default()
}

/// A list of an object.
pub(super) fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    let all = value.get(name).and_then(Value::as_array);
    all.map_or(&[], Vec::as_slice)
}

#[cfg(test)]
mod tests {
    use super::escaped;

    #[test]
    fn queries() {
        assert_eq!(escaped("a/b c&d=ä"), "a%2Fb%20c%26d%3D%C3%A4");
        assert_eq!(escaped("plain-_.~9"), "plain-_.~9");
    }
}
