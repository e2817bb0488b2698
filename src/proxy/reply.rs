//! Answers the proxy makes itself: OpenAI's error object, and the demo proxy's `detail` texts.
//!
//! Owns their form; knows neither sockets nor instances, and no answer names an address.

use serde_json::{Value, json};

/// A complete answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LocalReply {
    pub(crate) status: u16,
    pub(crate) content_type: &'static str,
    pub(crate) body: Vec<u8>,
    /// Seconds for `Retry-After`.
    pub(crate) retry_after: Option<u32>,
    /// For `Allow`.
    pub(crate) allow: Option<&'static str>,
}

/// Text of a status.
pub(crate) fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        413 => "Content Too Large",
        415 => "Unsupported Media Type",
        422 => "Unprocessable Content",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        _ => "Unknown",
    }
}

fn kind_of(status: u16) -> &'static str {
    match status {
        404 => "NotFoundError",
        429 => "rate_limit_exceeded",
        400..=499 => "BadRequestError",
        503 => "service_unavailable",
        504 => "timeout",
        _ => "bad_gateway",
    }
}

impl LocalReply {
    pub(crate) fn json(status: u16, value: &Value) -> Self {
        Self {
            status,
            content_type: "application/json",
            body: value.to_string().into_bytes(),
            retry_after: None,
            allow: None,
        }
    }

    pub(crate) fn text(status: u16, content_type: &'static str, body: String) -> Self {
        Self {
            status,
            content_type,
            body: body.into_bytes(),
            retry_after: None,
            allow: None,
        }
    }

    /// OpenAI's error object.
    pub(crate) fn error(status: u16, message: &str) -> Self {
        Self::json(status, &error_object(status, message))
    }

    /// The same about a field.
    pub(crate) fn of_field(status: u16, message: &str, field: &str) -> Self {
        let mut value = error_object(status, message);
        value["error"]["param"] = field.into();
        Self::json(status, &value)
    }

    /// An error with the demo proxy's `detail` beside OpenAI's object.
    pub(crate) fn detail(status: u16, message: &str) -> Self {
        let mut value = error_object(status, message);
        value["detail"] = message.into();
        Self::json(status, &value)
    }

    /// Come again later.
    pub(crate) fn later(status: u16, message: &str, seconds: u32) -> Self {
        Self {
            retry_after: Some(seconds),
            ..Self::error(status, message)
        }
    }

    pub(crate) fn not_allowed(allow: &'static str) -> Self {
        Self {
            allow: Some(allow),
            ..Self::detail(405, "Method Not Allowed")
        }
    }
}

/// `{"error": …}` as OpenAI clients read it.
pub(crate) fn error_object(status: u16, message: &str) -> Value {
    json!({"error": {"message": message, "type": kind_of(status), "param": null, "code": status}})
}
