//! A request over HTTP/1.1, and how it ended when it was not answered.
//!
//! Own code, since a library says "error sending request" where a doctor must tell refused, silent, reset and closed apart.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::reach::{ANSWER, Fault, connect};
use super::stranger::stranger;
use crate::base::trust::Token;

/// Most bytes read of an answer.
const ANSWER_MAX: u64 = 1 << 20;

/// An answer over HTTP.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) head: String,
    pub(super) body: String,
    pub(super) took: Duration,
}

pub(super) fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|l| {
        let (n, value) = l.split_once(':')?;
        n.trim().eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

impl Answer {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }
}

/// Why a request was not answered.
pub(super) enum Unanswered {
    /// No connection.
    Fault(Fault),
    /// A connection, and then: what was said, how it ended.
    Connected(SocketAddr, String, &'static str),
}

/// One request, `Connection: close`. `more` are header lines, each with its line end.
pub(super) fn http(
    target: &str,
    method: &str,
    path: &str,
    more: &str,
    body: &str,
) -> Result<Answer, Fault> {
    request(target, method, path, more, body).map_err(|why| match why {
        Unanswered::Fault(fault) => fault,
        Unanswered::Connected(address, saw, how) => stranger(address, &saw, how),
    })
}

pub(super) fn request(
    target: &str,
    method: &str,
    path: &str,
    more: &str,
    body: &str,
) -> Result<Answer, Unanswered> {
    let mut met = connect(target).map_err(Unanswered::Fault)?;
    let start = Instant::now();
    let length = if body.is_empty() {
        String::new()
    } else {
        format!("Content-Length: {}\r\n", body.len())
    };
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n{length}{more}\r\n{body}"
    );
    let mut bytes = Vec::new();
    let read = met.stream.write_all(request.as_bytes()).and_then(|()| {
        let mut piece = [0; 16_384];
        loop {
            let left = (start + ANSWER).saturating_duration_since(Instant::now());
            met.stream
                .set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            let n = met.stream.read(&mut piece)?;
            bytes.extend_from_slice(&piece[..n]);
            if n == 0 || bytes.len() as u64 > ANSWER_MAX {
                return Ok(());
            }
        }
    });
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.get(2..5)?.parse().ok());
    if let Some(status) = status {
        return Ok(Answer {
            status,
            head: head.to_owned(),
            body: body.to_owned(),
            took: start.elapsed(),
        });
    }
    let how = match &read {
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
            ) =>
        {
            "silent"
        }
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
            ) =>
        {
            "reset"
        }
        _ => "closed",
    };
    let saw = text.chars().take(40).collect::<String>();
    let saw = if saw.is_empty() {
        saw
    } else {
        format!("`{saw}`")
    };
    Err(Unanswered::Connected(met.address, saw, how))
}

/// The header that proves the token; empty without one.
pub(super) fn bearer(token: Option<&Token>) -> String {
    token.map_or_else(String::new, |t| {
        format!("Authorization: {}\r\n", t.bearer())
    })
}

/// Seconds since 1970 of `Sun, 06 Nov 1994 08:49:37 GMT`.
pub(super) fn http_date(text: &str) -> Option<i64> {
    const MONTHS: &str = "JanFebMarAprMayJunJulAugSepOctNovDec";
    let mut words = text.split_once(", ")?.1.split_whitespace();
    let day: i64 = words.next()?.parse().ok()?;
    let month = MONTHS.find(words.next()?)? as i64 / 3 + 1;
    let year: i64 = words
        .next()?
        .parse()
        .ok()
        .filter(|y| (1970..10_000).contains(y))?;
    let mut time = words.next()?.split(':').map(|n| n.parse::<i64>().ok());
    let (h, m, s) = (time.next()??, time.next()??, time.next()??);
    // Days from the civil calendar, years that begin in March.
    let y = if month <= 2 { year - 1 } else { year };
    let era = y.div_euclid(400);
    let of_era = y.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
    Some(days * 86_400 + h * 3600 + m * 60 + s)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_by_name() {
        assert_eq!(
            header("HTTP/1.1 200 OK\r\nDate: x: y\r\n", "date"),
            Some("x: y")
        );
        assert_eq!(header("", "date"), None);
    }

    #[test]
    fn dates() {
        assert_eq!(
            http_date("Sun, 06 Nov 1994 08:49:37 GMT"),
            Some(784_111_777)
        );
        assert_eq!(
            http_date("Thu, 29 Feb 2024 00:00:00 GMT"),
            Some(1_709_164_800)
        );
        for bad in [
            "",
            "x, 1",
            "Sun, 06 Foo 1994 08:49:37 GMT",
            "Sun, 06 Nov 1994",
        ] {
            assert_eq!(http_date(bad), None, "{bad}");
        }
    }
}
