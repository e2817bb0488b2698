//! A client's connection from its first request to its last: who answers which path, and what a refusal looks like.
//!
//! Owns reading requests, the lines that go on to workers, and the race between an answer and a client that leaves. Refuses
//! to know how a request is carried out (`handoff`) and how an answer is passed on (`relay`).

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tokio::net::{TcpListener, TcpStream};

use super::App;
use super::access_log::Record;
use super::admin;
use super::admission::{Claim, Refusal};
use super::behind;
use super::client_params;
use super::config::{Role, UpstreamAuth};
use super::handoff::{self, Job, Owner, Route, Served};
use super::http::chunked::BodyScanner;
use super::http::downstream::{ClientLimits, Downstream, ReceiveError};
use super::http::head::{HeadError, RequestHead};
use super::openai::{self, Api, Facts};
use super::relay::{self, Asked, Ended};
use super::reply::LocalReply;
use super::splice;
use super::tunnel;

/// Longest request id that is taken over.
const REQUEST_ID_MAX: usize = 256;
/// Bodies up to this are read before a refusal.
const SHORT_BODY_BYTES: u64 = 64 << 10;

/// Accepts connections until the proxy stops.
pub(crate) async fn accept(app: Arc<App>, listener: TcpListener) {
    let places = app.connections.clone();
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = app.stopping() => return,
        };
        match accepted {
            Ok((stream, _)) => {
                let app = app.clone();
                tokio::spawn(async move {
                    serve(app, stream).await;
                    drop(place);
                });
            }
            Err(error) => {
                // Out of descriptors: those who have one will give it back.
                tracing::warn!(%error, "cannot accept");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        }
    }
}

async fn serve(app: Arc<App>, stream: TcpStream) {
    let limits = ClientLimits {
        keep_alive: std::time::Duration::from_secs(75),
        head: std::time::Duration::from_secs(10).min(app.config.client_timeout),
        stall: app.config.client_timeout,
        body_bytes_max: app.config.body_bytes_max,
    };
    let mut client = Downstream::new(stream, limits, app.bodies.clone());
    loop {
        let head = tokio::select! {
            biased;
            head = client.next_head() => head,
            () = app.stopping() => return client.finish().await,
        };
        let mut head = match head {
            Ok(head) => head,
            Err(error) => return refuse(client, &error).await,
        };
        match answer(&app, &mut client, &mut head).await {
            Ok(Ended::Whole) => {}
            Ok(Ended::Close | Ended::Cut) => return client.finish().await,
            Ok(Ended::ClientGone) => {
                app.metrics.clients_gone.add();
                return;
            }
            Err(error) => return refuse(client, &error).await,
        }
    }
}

/// Says why no request was understood, and closes: after a broken head or body nothing that follows can be trusted.
async fn refuse(mut client: Downstream, error: &ReceiveError) {
    let status = match error {
        ReceiveError::Gone => return,
        ReceiveError::Slow => 408,
        ReceiveError::Head(HeadError::TooLarge) => 431,
        ReceiveError::Head(HeadError::TransferCoding) => 501,
        ReceiveError::Head(_) | ReceiveError::Chunk => 400,
        ReceiveError::TooLarge => 413,
    };
    let asked = Asked {
        http11: true,
        keep_alive: false,
        request_id: "",
        debug_headers: false,
    };
    let reply = LocalReply::error(status, &error.to_string());
    if relay::local(&mut client, &reply, &asked, false).await != Ended::ClientGone {
        client.linger().await;
    }
}

fn request_id(head: &RequestHead) -> String {
    let given = head.headers.text("x-request-id").filter(|id| {
        !id.is_empty() && id.len() <= REQUEST_ID_MAX && id.bytes().all(|b| b.is_ascii_graphic())
    });
    given.map_or_else(
        || {
            format!(
                "{:016x}{:016x}",
                rand::random::<u64>(),
                rand::random::<u64>()
            )
        },
        str::to_owned,
    )
}

async fn answer(
    app: &Arc<App>,
    client: &mut Downstream,
    head: &mut RequestHead,
) -> Result<Ended, ReceiveError> {
    let arrived = Instant::now();
    let id = request_id(head);
    let asked = Asked {
        http11: head.http11,
        keep_alive: head.keep_alive && !app.is_stopping(),
        request_id: &id,
        debug_headers: app.config.debug_headers,
    };
    let bodiless = head.method == "HEAD";
    if let Some(early) = early_refusal(app, head) {
        // The body is not read: the connection ends here.
        let asked = Asked {
            keep_alive: false,
            ..asked
        };
        app.metrics.answered(early.status);
        return Ok(relay::local(client, &early, &asked, bodiless).await);
    }
    let body = client.body(head).await?;
    let mut route = Route::default();
    let (status, ended) = match prepare(app, head, body, &id, arrived).await {
        Err(reply) => (
            reply.status,
            relay::local(client, &reply, &asked, bodiless).await,
        ),
        Ok(job) => match carry_out(app, client, job).await {
            Served::Local(reply) => (
                reply.status,
                relay::local(client, &reply, &asked, bodiless).await,
            ),
            Served::Answer(answer) if answer.head.status == 101 => {
                route = answer.route.clone();
                (101, tunnel::run(app, client, answer).await)
            }
            Served::Answer(answer) => {
                route = answer.route.clone();
                (
                    answer.head.status,
                    relay::relay(app, client, answer, &asked, bodiless).await,
                )
            }
            Served::Early(early) => {
                let ended;
                (ended, route) = behind::relay(app, client, early, &asked).await;
                (200, ended)
            }
            Served::Gone => (499, Ended::ClientGone),
        },
    };
    app.metrics.answered(status);
    app.metrics.request.record(arrived.elapsed());
    if let Some(log) = &app.access_log {
        log.write(&Record {
            method: &head.method,
            path: head.path(),
            request_id: &id,
            status,
            ended,
            route: &route,
            arrived,
        });
    }
    Ok(ended)
}

/// Runs the hand-off as long as the client is there, and without it where KV must be released.
async fn carry_out(app: &Arc<App>, client: &mut Downstream, job: Job) -> Served {
    let owner = Arc::new(Owner::default());
    let mut running = Box::pin(handoff::run(app.clone(), Arc::new(job), owner.clone()));
    tokio::select! {
        served = &mut running => return served,
        () = client.gone() => {}
    }
    if owner.leave() {
        let app = app.clone();
        tokio::spawn(async move {
            let _busy = app.releasing();
            running.await;
        });
    }
    Served::Gone
}

/// What is refused whatever the body says. A body that is short is read nevertheless, so that the connection may live.
fn early_refusal(app: &App, head: &RequestHead) -> Option<LocalReply> {
    if !head.target.starts_with('/') {
        return Some(LocalReply::error(400, "the request target must be a path"));
    }
    let is_long = match &head.body {
        BodyScanner::Length(length) => *length > SHORT_BODY_BYTES || head.expects_continue,
        _ => true,
    };
    if !is_long || !matches!(openai::api_of(head.path()), Some(Api::Generate { .. })) {
        return None;
    }
    if app.gate.is_full() {
        app.metrics.refused_busy.add();
        return Some(LocalReply::later(
            429,
            &format!("{}; try again later", Refusal::QueueFull),
            1,
        ));
    }
    if !app.registry.serves(Role::Decode) && !app.registry.expects(Role::Decode) {
        app.metrics.refused_none.add();
        return Some(LocalReply::later(503, "no decode instance is available", 2));
    }
    None
}

fn is_json(head: &RequestHead) -> bool {
    let kind = head.headers.text("content-type").unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    kind.eq_ignore_ascii_case("application/json")
}

/// From a request to a job for the workers, or the proxy's own answer.
async fn prepare(
    app: &Arc<App>,
    head: &RequestHead,
    body: Bytes,
    id: &str,
    arrived: Instant,
) -> Result<Job, LocalReply> {
    let path = head.path();
    if let Some(reply) = admin::answer(app, head, &body).await {
        return Err(reply);
    }
    let Some(api) = openai::api_of(path) else {
        return Err(LocalReply::detail(404, "Not Found"));
    };
    if !app.config.trust_kv_params {
        let mut checked = client_params::check_head(head);
        if api == Api::Single {
            checked = checked.and_then(|()| client_params::check_any(head, &body));
        }
        checked.map_err(|refused| refused.reply())?;
    }
    let is_post = head.method == "POST";
    let mut job = Job {
        method: head.method.clone(),
        target: head.target.clone(),
        lines: lines(app, head),
        request_id: id.to_owned(),
        body,
        members: None,
        facts: Facts::default(),
        limit: None,
        session: session(head),
        claim: claim(head),
        upgrades: false,
        arrived,
    };
    match api {
        Api::Single if tunnel::is_asked(head) => {
            job.upgrades = true;
            job.lines.extend_from_slice(tunnel::LINES);
        }
        Api::Single if matches!(head.method.as_str(), "GET" | "HEAD" | "POST") => {}
        Api::Single => return Err(LocalReply::not_allowed("GET, HEAD, POST")),
        Api::Generate { .. } if !is_post => return Err(LocalReply::not_allowed("POST")),
        Api::Generate { limit } => understand(app, head, &mut job, limit)?,
    }
    Ok(job)
}

fn understand(
    app: &App,
    head: &RequestHead,
    job: &mut Job,
    limit: &'static str,
) -> Result<(), LocalReply> {
    if !is_json(head) {
        let text = "Unsupported Media Type: Only 'application/json' is allowed";
        return Err(LocalReply::detail(415, text));
    }
    let members = splice::scan(&job.body).map_err(|e| LocalReply::error(400, &e.to_string()))?;
    if !app.config.trust_kv_params {
        client_params::check(&job.body, &members).map_err(|refused| refused.reply())?;
    }
    let facts = openai::facts(&job.body, &members, limit, app.bytes_per_token.get());
    if let Some(model) = &facts.model
        && !app.serves_model(model)
    {
        // Cut short: the name is the client's and may be anything.
        let shown: String = model.chars().take(128).collect();
        return Err(LocalReply::error(
            404,
            &format!("The model `{shown}` does not exist."),
        ));
    }
    job.session = job.session.or(facts.session);
    if head.headers.get("x-priority").is_none() {
        job.claim.priority = facts.priority;
    }
    job.facts = facts;
    job.members = Some(members);
    job.limit = Some(limit);
    Ok(())
}

/// Place in the queue: `x-priority`, and the client's key to be fair between keys.
fn claim(head: &RequestHead) -> Claim {
    let priority = head.headers.text("x-priority");
    Claim {
        priority: priority.and_then(|p| p.trim().parse().ok()).unwrap_or(0),
        key: head
            .headers
            .get("authorization")
            .map_or(0, xxhash_rust::xxh3::xxh3_64),
    }
}

/// What names a session in the headers.
fn session(head: &RequestHead) -> Option<u64> {
    [
        "x-session-id",
        "session-id",
        "x-conversation-id",
        "x-user-id",
    ]
    .into_iter()
    .find_map(|name| head.headers.get(name))
    .map(xxhash_rust::xxh3::xxh3_64)
}

/// Header lines for workers: the client's end-to-end headers, and authorization as configured.
fn lines(app: &App, head: &RequestHead) -> Vec<u8> {
    let mut out = Vec::with_capacity(512);
    let mut line = |name: &[u8], value: &[u8]| {
        for part in [name, b": ", value, b"\r\n"] {
            out.extend_from_slice(part);
        }
    };
    let mut has_authorization = false;
    let is = |name: &[u8], other: &str| name.eq_ignore_ascii_case(other.as_bytes());
    for (name, value) in head.headers.iter() {
        let ours = [
            "host",
            "expect",
            "x-api-key",
            "x-request-id",
            "x-data-parallel-rank",
        ];
        if head.headers.ends_here(name) || ours.iter().any(|o| is(name, o)) {
            continue;
        }
        if is(name, "authorization") {
            if !matches!(app.config.upstream_auth, UpstreamAuth::Passthrough(_)) {
                continue;
            }
            has_authorization = true;
        }
        line(name, value);
    }
    if let (false, Some(token)) = (has_authorization, app.config.upstream_auth.own()) {
        line(b"authorization", token.bearer().as_bytes());
    }
    out
}
