//! The master's port: gives a connection to control lanes, or to gRPC and HTTP behind the token.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::linux::net::SocketAddrExt;
use std::os::unix;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderValue, StatusCode, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Router};
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream, UnixListener};

use super::connections::{self, Connections, Place, Protocol};
use super::lanes::ControlLanes;
use super::service::PoolService;
use super::{Master, http, sweeper};
use crate::base::id::Id128;
use crate::store::wire::{BATCH_BYTES_MAX, pool_server::PoolServer};

/// Who sent a request.
#[derive(Clone, Copy)]
struct Peer(SocketAddr);

/// A running master.
pub struct MasterServer {
    master: Arc<Master>,
    router: Router,
    lanes: Arc<ControlLanes>,
    connections: Connections,
    /// For control lanes of this host, until it is served.
    local: Mutex<Option<unix::net::UnixListener>>,
}

impl MasterServer {
    /// Prepares the services and starts the sweeper.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn new(master: Arc<Master>, lanes_max: usize) -> io::Result<Arc<Self>> {
        Self::with_routes(master, lanes_max, Router::new())
    }

    /// The same with routes `beside` the master's own, behind the same token.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn with_routes(
        master: Arc<Master>,
        lanes_max: usize,
        beside: Router,
    ) -> io::Result<Arc<Self>> {
        sweeper::start(&master)?;
        let service = PoolServer::new(PoolService {
            master: master.clone(),
        })
        .max_decoding_message_size(BATCH_BYTES_MAX)
        .max_encoding_message_size(BATCH_BYTES_MAX);
        let grpc = tonic::service::Routes::new(service)
            .into_axum_router()
            .reset_fallback();
        let router = http::router(master.clone())
            .layer(axum::middleware::from_fn(connections::timely_body))
            .merge(grpc)
            .merge(beside)
            .layer(axum::middleware::from_fn_with_state(
                master.clone(),
                authorize,
            ));
        let lanes = ControlLanes::new(master.clone(), lanes_max);
        let local = local_listener()
            .inspect_err(
                |error| tracing::warn!(%error, "no socket for clients of this host: they use TCP"),
            )
            .ok();
        let local = local.map(|(listener, name)| {
            let _ = master.control_socket.set(name);
            listener
        });
        Ok(Arc::new(Self {
            master,
            router,
            lanes,
            connections: Connections::default(),
            local: Mutex::new(local),
        }))
    }

    /// What it serves.
    pub fn master(&self) -> &Arc<Master> {
        &self.master
    }

    /// Accepts connections until the task is dropped. Cancel-safe: a connection being set up is served or closed.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        let local = self.local.lock().take().map(UnixListener::from_std);
        let local = self.clone().serve_local(local.and_then(Result::ok));
        tokio::join!(local, self.serve_tcp(listener));
    }

    /// Lanes of this host: without TCP an exchange costs a fifth less.
    async fn serve_local(self: Arc<Self>, listener: Option<UnixListener>) {
        let Some(listener) = listener else { return };
        loop {
            match listener.accept().await.map(|(stream, _)| stream.into_std()) {
                Ok(Ok(stream)) => self.lanes.serve_unix(stream),
                Ok(Err(_)) => {}
                Err(error) => {
                    tracing::warn!(%error, "a local connection was not accepted");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
    }

    async fn serve_tcp(self: Arc<Self>, listener: TcpListener) {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    let Some(place) = self.connections.stranger() else {
                        tracing::debug!(%peer, "too many connections that say nothing");
                        continue;
                    };
                    let server = self.clone();
                    tokio::spawn(async move { server.connection(stream, peer, place).await });
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection was not accepted");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
    }

    async fn connection(self: Arc<Self>, stream: TcpStream, peer: SocketAddr, place: Place) {
        let Ok(protocol) = connections::protocol(&stream).await else {
            return;
        };
        drop(place);
        if protocol == Protocol::Lane {
            if let Ok(stream) = stream.into_std() {
                self.lanes.serve(stream);
            }
            return;
        }
        let router = self.router.clone().layer(Extension(Peer(peer)));
        self.connections.serve(stream, protocol, router).await;
    }
}

/// An abstract Unix socket under a name that nobody can have taken before: clients are told it over the connection they
/// trust already.
fn local_listener() -> io::Result<(unix::net::UnixListener, String)> {
    let name = format!("mooncake-master-{}", Id128::random());
    let address = unix::net::SocketAddr::from_abstract_name(&name)?;
    let listener = unix::net::UnixListener::bind_addr(&address)?;
    listener.set_nonblocking(true)?;
    Ok((listener, name))
}

/// What says nothing of the pool: whether it lives, and the page that asks for the token.
fn is_open(path: &str) -> bool {
    matches!(path, "/health" | "/")
}

/// What removes or changes objects over HTTP, for which a browser or a script anywhere in the network would do.
fn is_destructive(request: &Request) -> bool {
    let path = request.uri().path();
    path.starts_with("/api/") && !matches!(request.method().as_str(), "GET" | "HEAD")
}

/// Browsers say where a page is from that changes something; no page has any business here. Scripts say nothing.
fn is_from_a_page(request: &Request) -> bool {
    let reads = matches!(request.method().as_str(), "GET" | "HEAD");
    !reads && request.headers().contains_key(header::ORIGIN)
}

/// Whether a request over HTTP/1 from this host names this host. A page of another site whose name was made to lead here
/// says that name; gRPC is HTTP/2, which no page speaks without TLS.
fn names_this_host(request: &Request) -> bool {
    let given = request.headers().get(header::HOST);
    let Some(given) = given.filter(|_| request.version() < Version::HTTP_2) else {
        return true;
    };
    let Ok(given) = given.to_str() else {
        return false;
    };
    let Ok(authority) = given.parse::<Authority>() else {
        return false;
    };
    let host = authority.host().trim_matches(['[', ']']);
    let own = |name: &str| host.eq_ignore_ascii_case(name);
    let host_name = rustix::system::uname();
    let host_name = host_name.nodename().to_str().unwrap_or("localhost");
    host.parse::<IpAddr>().is_ok()
        || own("localhost")
        || host.to_ascii_lowercase().ends_with(".localhost")
        || own(host_name)
        || host_name.split('.').next().is_some_and(own)
}

/// The token guards everything else. Without one, what is destructive is for this host only.
async fn authorize(State(master): State<Arc<Master>>, request: Request, next: Next) -> Response {
    let given = request
        .headers()
        .get(header::AUTHORIZATION)
        .map(HeaderValue::as_bytes);
    if is_open(request.uri().path()) || master.keys.bearer_matches(given) {
        let local = request
            .extensions()
            .get::<Peer>()
            .is_some_and(|p| p.0.ip().to_canonical().is_loopback());
        if !master.keys.secured() && !local && is_destructive(&request) {
            let text = "without a cluster token this is for clients on the master's own host: set --token-file\n";
            return (StatusCode::FORBIDDEN, text).into_response();
        }
        if !master.keys.secured() && local && !names_this_host(&request) {
            let text = "without a cluster token this host answers to its own name or address only, which a web page of \
                        another site cannot use (Host header): set --token-file\n";
            return (StatusCode::FORBIDDEN, text).into_response();
        }
        if !master.keys.secured() && is_from_a_page(&request) {
            let text =
                "without a cluster token no web page may change anything: set --token-file\n";
            return (StatusCode::FORBIDDEN, text).into_response();
        }
        return next.run(request).await;
    }
    let peer = request.extensions().get::<Peer>();
    master.refused.note(peer.map(|p| p.0.ip()));
    let is_grpc = request
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|t| t.as_bytes().starts_with(b"application/grpc"));
    if is_grpc {
        return tonic::Status::unauthenticated("the cluster token is missing or wrong")
            .into_http::<Body>()
            .into_response();
    }
    let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
    let text = "the cluster token is missing or wrong: send it as `Authorization: Bearer TOKEN`\n";
    (StatusCode::UNAUTHORIZED, challenge, text).into_response()
}
