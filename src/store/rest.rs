//! Objects over HTTP: `/api/v1/objects/KEY` with PUT, GET (also parts), HEAD and DELETE, for scripts and tools.
//!
//! A client of the pool like any other, beside the master's own routes: the bytes pass through this process, which engines
//! should not do. Bodies are bounded, each and together.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use parking_lot::Mutex;
use serde_json::json;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use super::client::{ClientConfig, PoolClient, PutOptions, PutOutcome};
use super::model::error::{StoreError, code_name};
use super::model::key::DEFAULT_TENANT;

/// Largest body of a PUT.
const BODY_MAX: usize = 256 << 20;
/// All bodies being received, in MiB.
const BODIES_MAX: usize = 1024;
/// Answers being sent at once.
const READERS_MAX: usize = 64;
/// How long a request waits for its turn.
const TURN: Duration = Duration::from_secs(2);
/// A reader that takes nothing for this long is dropped; so is a body of which nothing comes.
const SILENCE: Duration = Duration::from_secs(30);
/// Bytes read from the pool in one step.
const PIECE: usize = 4 << 20;
/// Tenants with a client of their own.
const TENANTS_MAX: usize = 32;

type Params = Query<HashMap<String, String>>;

struct Rest {
    config: ClientConfig,
    clients: Mutex<HashMap<String, Arc<PoolClient>>>,
    /// MiB of bodies.
    bodies: Arc<Semaphore>,
    readers: Arc<Semaphore>,
}

/// The routes, over the pool that `config` names; its tenant is the one of requests that name none.
pub fn routes(config: ClientConfig) -> Router {
    let rest = Rest {
        config,
        clients: Mutex::default(),
        bodies: Arc::new(Semaphore::new(BODIES_MAX)),
        readers: Arc::new(Semaphore::new(READERS_MAX)),
    };
    let methods = get(get_object)
        .head(head_object)
        .put(put_object)
        .delete(delete_object);
    Router::new()
        .route("/api/v1/objects/{*key}", methods)
        .with_state(Arc::new(rest))
}

/// What goes wrong, as an answer.
#[derive(Debug)]
enum Problem {
    Store(StoreError),
    Status(StatusCode, &'static str),
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let (status, code, message) = match self {
            Self::Status(status, message) => (status, -600, message.to_owned()),
            Self::Store(error) => {
                let status = match &error {
                    StoreError::NotFound | StoreError::SegmentNotFound => StatusCode::NOT_FOUND,
                    StoreError::Exists => StatusCode::PRECONDITION_FAILED,
                    StoreError::Leased => StatusCode::CONFLICT,
                    // Also a tenant's quota that is used up.
                    StoreError::NoSpace { .. }
                    | StoreError::NoNode
                    | StoreError::Refused { code: -1700, .. } => StatusCode::INSUFFICIENT_STORAGE,
                    // A tenant that has no quota, where each needs one.
                    StoreError::Refused { code: -1701, .. } => StatusCode::FORBIDDEN,
                    StoreError::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
                    StoreError::InvalidKey { .. } | StoreError::InvalidParams { .. } => {
                        StatusCode::BAD_REQUEST
                    }
                    StoreError::Timeout { .. } => StatusCode::GATEWAY_TIMEOUT,
                    StoreError::MasterUnreachable { .. } | StoreError::Rebuilding => {
                        StatusCode::SERVICE_UNAVAILABLE
                    }
                    _ => StatusCode::INTERNAL_SERVER_ERROR,
                };
                (status, error.code(), error.to_string())
            }
        };
        let body = json!({
            "success": false, "error_code": code, "error_name": code_name(code), "error_message": message,
        });
        let kind = [(header::CONTENT_TYPE, "application/json; charset=utf-8")];
        (status, kind, format!("{body}\n")).into_response()
    }
}

const BUSY: Problem = Problem::Status(
    StatusCode::SERVICE_UNAVAILABLE,
    "too many requests at once: try again",
);
const LOST: Problem = Problem::Status(
    StatusCode::INTERNAL_SERVER_ERROR,
    "the request was not carried out",
);

impl Rest {
    fn client(&self, params: &HashMap<String, String>) -> Result<Arc<PoolClient>, StoreError> {
        let tenant = params.get("tenant").map_or("", String::as_str);
        // Percent-encoded bytes that are no UTF-8 would all become one name.
        if tenant.contains(char::REPLACEMENT_CHARACTER) {
            let what = "`tenant` is no UTF-8".to_owned();
            return Err(StoreError::InvalidParams { what });
        }
        let tenant = if tenant == DEFAULT_TENANT { "" } else { tenant };
        let mut clients = self.clients.lock();
        if let Some(client) = clients.get(tenant) {
            return Ok(client.clone());
        }
        let mut config = self.config.clone();
        if !tenant.is_empty() {
            config.tenant = tenant.to_owned();
        }
        let client = Arc::new(PoolClient::open(config)?);
        if clients.len() >= TENANTS_MAX {
            clients.clear();
        }
        clients.insert(tenant.to_owned(), client.clone());
        Ok(client)
    }
}

/// Runs what blocks; `LOST` when it did not come back.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Problem> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(LOST),
    }
}

/// A version as an entity tag.
fn tag(version: u64) -> HeaderValue {
    HeaderValue::from_str(&format!("\"{version:x}\"")).unwrap_or(HeaderValue::from_static("\"\""))
}

async fn head_object(
    State(rest): State<Arc<Rest>>,
    Path(key): Path<String>,
    Query(params): Params,
) -> Result<Response, Problem> {
    let client = rest.client(&params)?;
    let info = blocking(move || Ok(client.reader(key.as_bytes())?.info())).await?;
    let mut response = Response::new(Body::empty());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_LENGTH, info.size.into());
    headers.insert(header::ETAG, tag(info.version));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    Ok(response)
}

/// The one range that is asked for; `None`: all of it. Several, and other units, count as all, as they may.
fn wanted(headers: &HeaderMap, size: u64) -> Result<Option<Range<u64>>, Problem> {
    let Some(text) = headers
        .get(header::RANGE)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.strip_prefix("bytes="))
        .filter(|v| !v.contains(','))
    else {
        return Ok(None);
    };
    let Some((first, last)) = text.trim().split_once('-') else {
        return Ok(None);
    };
    let range = match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), Ok(last)) if first <= last => first..last.saturating_add(1).min(size),
        (Ok(first), Err(_)) if last.is_empty() => first..size,
        (Err(_), Ok(suffix)) if first.is_empty() => size.saturating_sub(suffix)..size,
        _ => return Ok(None),
    };
    if range.start >= range.end {
        return Err(Problem::Status(
            StatusCode::RANGE_NOT_SATISFIABLE,
            "the range lies outside the object",
        ));
    }
    Ok(Some(range))
}

/// What the reading thread tells before the first byte.
type Begun = Result<(u64, u64, Option<Range<u64>>), Problem>;

async fn get_object(
    State(rest): State<Arc<Rest>>,
    Path(key): Path<String>,
    Query(params): Params,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let client = rest.client(&params)?;
    let turn = tokio::time::timeout(TURN, rest.readers.clone().acquire_owned()).await;
    let Ok(Ok(turn)) = turn else { return Err(BUSY) };
    let (begin, begun) = tokio::sync::oneshot::channel::<Begun>();
    let (sender, receiver) = mpsc::channel::<Result<Bytes, std::io::Error>>(2);
    let runtime = Handle::current();
    tokio::task::spawn_blocking(move || {
        let _turn = turn;
        let mut reader = match client.reader(key.as_bytes()) {
            Ok(reader) => reader,
            Err(error) => return drop(begin.send(Err(error.into()))),
        };
        let info = reader.info();
        let range = match wanted(&headers, info.size) {
            Ok(range) => range,
            Err(problem) => return drop(begin.send(Err(problem))),
        };
        let all = range.clone().unwrap_or(0..info.size);
        let mut begin = Some(begin);
        let mut at = all.start;
        while at < all.end {
            let mut piece = vec![0; PIECE.min((all.end - at) as usize)];
            let read = reader.read_at(at, &mut piece);
            // Until the first piece is there, what goes wrong is still an answer of its own.
            if let Some(begin) = begin.take() {
                let told = match &read {
                    Ok(()) => Ok((info.size, info.version, range.clone())),
                    Err(error) => Err(error.clone().into()),
                };
                if begin.send(told).is_err() {
                    return;
                }
            }
            at += piece.len() as u64;
            let failed = read.is_err();
            let next = read.map(|()| piece.into()).map_err(std::io::Error::other);
            let sent = runtime.block_on(sender.send_timeout(next, SILENCE));
            if failed || sent.is_err() {
                return;
            }
        }
    });
    let (size, version, range) = begun.await.unwrap_or(Err(LOST))?;
    let mut response = Response::new(Body::from_stream(ReceiverStream::new(receiver)));
    let length = range.as_ref().map_or(size, |r| r.end - r.start);
    if let Some(range) = range {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        let text = format!("bytes {}-{}/{size}", range.start, range.end - 1);
        if let Ok(value) = HeaderValue::from_str(&text) {
            response.headers_mut().insert(header::CONTENT_RANGE, value);
        }
    }
    let headers = response.headers_mut();
    let kind = HeaderValue::from_static("application/octet-stream");
    headers.insert(header::CONTENT_TYPE, kind);
    headers.insert(header::CONTENT_LENGTH, length.into());
    headers.insert(header::ETAG, tag(version));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    Ok(response)
}

/// A parameter that is true or false; absent = false.
fn flag(params: &HashMap<String, String>, name: &str) -> Option<bool> {
    match params.get(name).map(String::as_str) {
        None | Some("false" | "0") => Some(false),
        Some("true" | "1") => Some(true),
        Some(_) => None,
    }
}

/// The options among the parameters.
fn options(params: &HashMap<String, String>, headers: &HeaderMap) -> Result<PutOptions, Problem> {
    let number = |name: &str, default: u64| match params.get(name) {
        None => Ok(default),
        Some(text) => text.parse::<u64>().map_err(|_| {
            Problem::Status(StatusCode::BAD_REQUEST, "a parameter that is not a number")
        }),
    };
    let wrong = |what| Problem::Status(StatusCode::BAD_REQUEST, what);
    let hard_pin = flag(params, "hard_pin").ok_or(wrong("`hard_pin` is true or false"))?;
    let replicas = number("replicas", 1)?;
    if !(1..=64).contains(&replicas) {
        return Err(wrong("`replicas` is 1 to 64"));
    }
    Ok(PutOptions {
        replicas: replicas as u32,
        soft_pin_ttl_ms: number("soft_pin_ms", 0)?,
        hard_pin,
        group: params.get("group").cloned().unwrap_or_default(),
        upsert: headers.get(header::IF_NONE_MATCH).is_none_or(|v| v != "*"),
        ..PutOptions::default()
    })
}

const TOO_LARGE: Problem = Problem::Status(
    StatusCode::PAYLOAD_TOO_LARGE,
    "a body has at most 256 MiB: use the client library",
);

/// A body and the room it takes, which grows with what has come and not with what was announced.
async fn received(rest: &Rest, body: Body) -> Result<(Vec<u8>, OwnedSemaphorePermit), Problem> {
    let late = Problem::Status(StatusCode::REQUEST_TIMEOUT, "the body did not come in time");
    let begun = Instant::now();
    let mut room = more_room(rest, 1).await?;
    let mut bytes: Vec<u8> = Vec::new();
    let mut frames = body.into_data_stream();
    loop {
        let Ok(frame) = tokio::time::timeout(SILENCE, frames.next()).await else {
            return Err(late);
        };
        let Some(frame) = frame else { break };
        // Fewer bytes than announced, or no HTTP any more.
        let frame = frame.map_err(|_| {
            Problem::Status(StatusCode::BAD_REQUEST, "the body broke off before its end")
        })?;
        if bytes.len() + frame.len() > BODY_MAX {
            return Err(TOO_LARGE);
        }
        bytes.extend_from_slice(&frame);
        let share = (bytes.capacity() >> 20) + 1;
        if share > room.num_permits() {
            room.merge(more_room(rest, share - room.num_permits()).await?);
        }
        // A line of 1 MiB/s is fast enough.
        if begun.elapsed() > SILENCE + Duration::from_secs(share as u64) {
            return Err(late);
        }
    }
    Ok((bytes, room))
}

async fn more_room(rest: &Rest, mib: usize) -> Result<OwnedSemaphorePermit, Problem> {
    let wanted = rest.bodies.clone().acquire_many_owned(mib as u32);
    match tokio::time::timeout(TURN, wanted).await {
        Ok(Ok(room)) => Ok(room),
        _ => Err(BUSY),
    }
}

async fn put_object(
    State(rest): State<Arc<Rest>>,
    Path(key): Path<String>,
    Query(params): Params,
    request: Request,
) -> Result<Response, Problem> {
    let client = rest.client(&params)?;
    let options = options(&params, request.headers())?;
    let announced = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|n| n > BODY_MAX as u64) {
        return Err(TOO_LARGE);
    }
    let (body, room) = received(&rest, request.into_body()).await?;
    let outcome = blocking(move || {
        let _room = room;
        client.put_bytes(key.as_bytes(), &body, &options)
    })
    .await?;
    match outcome {
        PutOutcome::Stored { replicas } => {
            let body = json!({"success": true, "replicas": replicas});
            let kind = [(header::CONTENT_TYPE, "application/json; charset=utf-8")];
            Ok((StatusCode::CREATED, kind, format!("{body}\n")).into_response())
        }
        PutOutcome::Existed => Err(StoreError::Exists.into()),
    }
}

async fn delete_object(
    State(rest): State<Arc<Rest>>,
    Path(key): Path<String>,
    Query(params): Params,
) -> Result<Response, Problem> {
    let client = rest.client(&params)?;
    let force = flag(&params, "force").ok_or(Problem::Status(
        StatusCode::BAD_REQUEST,
        "`force` is true or false",
    ))?;
    blocking(move || {
        let mut results = client.remove(&[key.as_bytes()], force)?;
        results.pop().unwrap_or(Err(StoreError::NotFound))
    })
    .await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        let ask = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RANGE, HeaderValue::from_static(text));
            wanted(&headers, 10).map_err(|_| ())
        };
        assert_eq!(ask("bytes=0-3"), Ok(Some(0..4)));
        assert_eq!(ask("bytes=7-"), Ok(Some(7..10)));
        assert_eq!(ask("bytes=-4"), Ok(Some(6..10)));
        assert_eq!(ask("bytes=-40"), Ok(Some(0..10)));
        assert_eq!(ask("bytes=5-18446744073709551615"), Ok(Some(5..10)));
        assert_eq!(ask("bytes=10-"), Err(()));
        assert_eq!(ask("bytes=-0"), Err(()));
        for all in [
            "bytes=3-1",
            "bytes=a-b",
            "bytes=0-1,3-4",
            "lines=1-2",
            "bytes=-",
        ] {
            assert_eq!(ask(all), Ok(None), "{all}");
        }
    }
}
