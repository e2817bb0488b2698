//! What listens where something else was meant: closed ports, other programs, masters and metadata services with a fault.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use mooncake::base::handshake::{self, HELLO_BYTES, LaneKind, MAGIC};
use mooncake::base::id::Id128;
use mooncake::base::trust::ClusterKeys;
use mooncake::store::wire::{self, operation, reply};
use prost::Message;

use super::faults::fault;
use super::{Fault, Lab, Said, doctor};
use crate::pool::Pool;

/// A port where nothing listens.
pub(super) fn closed_port() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

/// Serves every connection in a thread for as long as the tests run.
fn serve(on: impl Fn(TcpStream) + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let on = Arc::new(on);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let on = on.clone();
            std::thread::spawn(move || on(stream));
        }
    });
    address
}

/// Reads something, then answers the same to everybody.
pub(super) fn answering(answer: &'static [u8]) -> String {
    serve(move |mut stream| {
        let _ = stream.read(&mut [0; 4096]);
        let _ = stream.write_all(answer);
    })
}

/// A program of the system; killed when dropped.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a program and waits until its port is open.
fn program(name: &str, arguments: &[&str], port: &str) -> Result<Program, String> {
    let child = Command::new(name)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let program = Program(child.map_err(|e| format!("{name}: {e}"))?);
    let end = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(format!("127.0.0.1:{port}")).is_err() {
        if Instant::now() > end {
            return Err(format!("{name} does not listen"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(program)
}

fn free_port() -> String {
    closed_port().rsplit_once(':').unwrap().1.to_owned()
}

/// A master that says what a test wants.
#[derive(Clone)]
pub(super) struct FakeMaster {
    pub(super) clients: u64,
    /// Seconds its clock is off.
    pub(super) clock: i64,
    pub(super) role: &'static str,
    pub(super) build: &'static str,
    pub(super) node_build: &'static str,
    pub(super) state: &'static str,
    pub(super) rebuilding: bool,
    /// Percent of its capacity in use.
    pub(super) used: u64,
    pub(super) largest_free: u64,
    pub(super) host: &'static str,
    pub(super) mute: bool,
    /// Takes HTTP requests and says nothing.
    pub(super) http_mute: bool,
    /// Pause before each answer on a lane.
    pub(super) late: Duration,
}

impl Default for FakeMaster {
    fn default() -> Self {
        Self {
            clients: 1,
            clock: 0,
            role: "leader",
            build: env!("CARGO_PKG_VERSION"),
            node_build: env!("CARGO_PKG_VERSION"),
            state: "ok",
            rebuilding: false,
            used: 10,
            largest_free: 90 << 20,
            host: "",
            mute: false,
            http_mute: false,
            late: Duration::ZERO,
        }
    }
}

impl FakeMaster {
    pub(super) fn examined(self, lab: &Lab) -> Said {
        let address = self.start();
        doctor(&["--master", &address], &[], &lab.place())
    }

    /// Listens; a node's data port is faked beside it.
    pub(super) fn start(self) -> String {
        let node = serve(|mut stream| {
            let keys = ClusterKeys::derive(None);
            let _ = handshake::accept(&mut stream, LaneKind::Data, Id128::random(), &keys, false);
            let _ = stream.read(&mut [0; 64]);
        });
        serve(move |mut stream| {
            let mut first = [0; 1];
            let _ = stream.peek(&mut first);
            if &first == b"G" {
                self.http(&mut stream);
            } else {
                self.lane(&mut stream, &node);
            }
        })
    }

    fn http(&self, stream: &mut TcpStream) {
        let mut request = [0; 4096];
        let n = stream.read(&mut request).unwrap_or(0);
        if self.http_mute {
            std::thread::sleep(Duration::from_secs(5));
            return;
        }
        let request = String::from_utf8_lossy(&request[..n]).into_owned();
        let body = match request.split(' ').nth(1) {
            Some("/role") => self.role.to_owned(),
            Some("/metrics") => "master_put_start_alloc_failures_total 0\n".to_owned(),
            _ => String::new(),
        };
        let now = SystemTime::now();
        let off = Duration::from_secs(self.clock.unsigned_abs());
        let date = httpdate::fmt_http_date(if self.clock < 0 { now - off } else { now + off });
        // In one piece: `write!` on a socket sends every part by itself.
        let length = body.len();
        let answer =
            format!("HTTP/1.1 200 OK\r\nDate: {date}\r\nContent-Length: {length}\r\n\r\n{body}");
        let _ = stream.write_all(answer.as_bytes());
    }

    fn lane(&self, stream: &mut TcpStream, node: &str) {
        let keys = ClusterKeys::derive(None);
        if handshake::accept(stream, LaneKind::Control, Id128::random(), &keys, false).is_err() {
            return;
        }
        loop {
            let mut length = [0; 4];
            if stream.read_exact(&mut length).is_err() {
                return;
            }
            let mut bytes = vec![0; u32::from_le_bytes(length) as usize];
            if stream.read_exact(&mut bytes).is_err() || self.mute {
                std::thread::sleep(Duration::from_secs(5));
                return;
            }
            std::thread::sleep(self.late);
            let batch = wire::OperationBatch::decode(bytes.as_slice()).unwrap();
            let replies = batch
                .operations
                .into_iter()
                .map(|o| self.reply(o, node).into())
                .collect();
            let answer = wire::ReplyBatch {
                id: batch.id,
                term: 1,
                view_epoch: 1,
                replies,
            };
            let mut framed = (answer.encoded_len() as u32).to_le_bytes().to_vec();
            answer.encode(&mut framed).unwrap();
            if stream.write_all(&framed).is_err() {
                return;
            }
        }
    }

    fn reply(&self, operation: wire::Operation, node: &str) -> reply::Kind {
        const CAPACITY: u64 = 100 << 20;
        match operation.kind {
            Some(operation::Kind::Overview(_)) => reply::Kind::Overview(wire::OverviewReply {
                build: self.build.to_owned(),
                uptime_ms: 60_000,
                capacity_bytes: CAPACITY,
                used_bytes: CAPACITY / 100 * self.used,
                clients: self.clients,
                rebuilding: self.rebuilding,
                ..wire::OverviewReply::default()
            }),
            Some(operation::Kind::View(_)) => reply::Kind::View(wire::ViewReply {
                epoch: 1,
                changed: true,
                segments: vec![wire::SegmentView {
                    name: "node-a/0".to_owned(),
                    node: "node-a".to_owned(),
                    node_high: 1,
                    node_low: 1,
                    size_bytes: CAPACITY,
                    used_bytes: CAPACITY / 100 * self.used,
                    largest_free_bytes: self.largest_free,
                    address: node.to_owned(),
                    state: self.state.to_owned(),
                    host_id: if self.host.is_empty() {
                        mooncake::base::net::host_id()
                    } else {
                        self.host.to_owned()
                    },
                    build: self.node_build.to_owned(),
                    ..wire::SegmentView::default()
                }],
                ..wire::ViewReply::default()
            }),
            _ => reply::Kind::Listing(wire::Listing::default()),
        }
    }
}

pub(super) fn as_master(lab: &Lab, address: &str) -> Said {
    doctor(&["--master", address], &[], &lab.place())
}

fn with_metadata(lab: &Lab, server: &str) -> Said {
    lab.with_file(&format!(r#"{{"local_hostname":"localhost","metadata_server":"{server}","master_server_address":"MASTER"}}"#), &[])
}

pub(super) fn all() -> Vec<Fault> {
    let mut all = listeners();
    all.extend(metadata());
    all
}

fn reset(stream: TcpStream) {
    let socket = socket2::Socket::from(stream);
    let _ = socket.set_linger(Some(Duration::ZERO));
}

fn listeners() -> Vec<Fault> {
    let area = "Connections";
    vec![
        fault!(
            area,
            "nothing listens on the master's port",
            ("master", "fail", "refused"),
            &[],
            |lab| as_master(lab, &closed_port())
        ),
        fault!(
            area,
            "the port takes connections and says nothing",
            ("master", "fail", "silent"),
            &[],
            |lab| {
                as_master(
                    lab,
                    &serve(|stream| {
                        std::thread::sleep(Duration::from_secs(12));
                        drop(stream);
                    }),
                )
            }
        ),
        fault!(
            area,
            "the port resets every connection",
            ("master", "fail", "reset"),
            &[],
            |lab| {
                as_master(
                    lab,
                    &serve(|mut stream| {
                        let _ = stream.read(&mut [0; 64]);
                        reset(stream);
                    }),
                )
            }
        ),
        fault!(
            area,
            "the port closes every connection",
            ("master", "fail", "closed"),
            &[],
            |lab| {
                as_master(
                    lab,
                    &serve(|mut stream| {
                        let _ = stream.read(&mut [0; 64]);
                    }),
                )
            }
        ),
        fault!(
            area,
            "a TLS server on the master's port",
            ("master", "fail", "tls"),
            &[],
            |lab| {
                let place = lab.place();
                let (key, certificate) = (place.join("key"), place.join("cert"));
                let (key, certificate) = (key.to_str().unwrap(), certificate.to_str().unwrap());
                let made = Command::new("openssl")
                    .args([
                        "req",
                        "-x509",
                        "-newkey",
                        "rsa:2048",
                        "-nodes",
                        "-days",
                        "1",
                        "-subj",
                        "/CN=x",
                        "-keyout",
                        key,
                        "-out",
                        certificate,
                    ])
                    .stderr(Stdio::null())
                    .status();
                made.map_err(|e| format!("openssl: {e}"))?;
                let port = free_port();
                let _server = program(
                    "openssl",
                    &[
                        "s_server",
                        "-quiet",
                        "-accept",
                        &port,
                        "-key",
                        key,
                        "-cert",
                        certificate,
                    ],
                    &port,
                )?;
                as_master(lab, &format!("127.0.0.1:{port}"))
            }
        ),
        fault!(
            area,
            "Redis on the master's port",
            ("master", "fail", "something_else"),
            &[],
            |lab| {
                let port = free_port();
                let _redis = program("redis-server", &["--port", &port, "--save", ""], &port)?;
                as_master(lab, &format!("127.0.0.1:{port}"))
            }
        ),
        fault!(
            area,
            "a web server on the master's port",
            ("master", "fail", "something_else"),
            &[],
            |lab| {
                as_master(lab, &answering(b"HTTP/1.1 400 Bad Request\r\nServer: nginx/1.22.1\r\nContent-Length: 0\r\n\r\n"))
            }
        ),
        fault!(
            area,
            "an SSH server on the master's port",
            ("master", "fail", "something_else"),
            &[],
            |lab| {
                as_master(
                    lab,
                    &serve(|mut stream| {
                        let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.2p1\r\n");
                        let _ = stream.read(&mut [0; 512]);
                    }),
                )
            }
        ),
        fault!(
            area,
            "a program that answers gibberish",
            ("master", "fail", "something_else"),
            &[],
            |lab| as_master(lab, &answering(b"what?\n"))
        ),
        fault!(
            area,
            "a master of a newer protocol",
            ("master", "fail", "version"),
            &[],
            |lab| {
                as_master(
                    lab,
                    &serve(|mut stream| {
                        let _ = stream.read_exact(&mut [0; HELLO_BYTES]);
                        let mut answer = [0; HELLO_BYTES];
                        answer[..8].copy_from_slice(&MAGIC);
                        answer[8..10].copy_from_slice(&[1, 9]);
                        let _ = stream.write_all(&answer);
                    }),
                )
            }
        ),
        fault!(
            area,
            "the cluster has a token, and none was given",
            ("master", "fail", "token"),
            &[],
            |lab| secured(lab, None)
        ),
        fault!(
            area,
            "another token than the cluster's",
            ("master", "fail", "token"),
            &[],
            |lab| secured(lab, Some("another"))
        ),
        fault!(
            area,
            "a node's data port given as the master",
            ("master", "fail", "wrong_kind"),
            &[],
            |lab| {
                let pool = Pool::start(1, "16MiB", &[]);
                let node = pool.client().segments().unwrap()[0].address.clone();
                as_master(lab, &node)
            }
        ),
        fault!(
            area,
            "a master's port given as a node's",
            ("peer", "fail", "wrong_kind"),
            &[],
            |lab| lab.doctor(&["--peer", &lab.master], &[])
        ),
        fault!(
            area,
            "a peer where nothing listens",
            ("peer", "fail", "refused"),
            &[],
            |lab| lab.doctor(&["--peer", &closed_port()], &[])
        ),
        fault!(
            area,
            "the master has no free lane",
            ("master", "fail", "no_free_lane"),
            &[],
            |lab| {
                let pool = Pool::start(0, "16MiB", &["--max-lanes", "1"]);
                let mut held = TcpStream::connect(&pool.address).unwrap();
                handshake::connect(
                    &mut held,
                    LaneKind::Control,
                    Id128::random(),
                    &ClusterKeys::derive(None),
                )
                .unwrap();
                as_master(lab, &pool.address)
            }
        ),
        fault!(
            area,
            "a master that does not lead",
            ("role", "fail", "not_leader"),
            &[],
            |lab| FakeMaster {
                role: "standby",
                ..FakeMaster::default()
            }
            .examined(lab)
        ),
        fault!(
            area,
            "a proxy that is not there",
            ("proxy", "fail", "refused"),
            &[],
            |lab| lab.doctor(&["--proxy", &format!("http://{}", closed_port())], &[])
        ),
        fault!(
            area,
            "a proxy without a living instance",
            ("proxy", "fail", "proxy_unhealthy"),
            &[],
            |lab| {
                let proxy = answering(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 21\r\n\r\nno prefill instance\r\n");
                lab.doctor(&["--proxy", &format!("http://{proxy}")], &[])
            }
        ),
        fault!(
            area,
            "a web server given as the proxy",
            ("proxy", "fail", "something_else"),
            &[],
            |lab| {
                let server = answering(
                    b"HTTP/1.1 404 Not Found\r\nServer: nginx/1.22.1\r\nContent-Length: 0\r\n\r\n",
                );
                lab.doctor(&["--proxy", &format!("http://{server}")], &[])
            }
        ),
        fault!(
            area,
            "the master given as the proxy",
            ("proxy", "fail", "wrong_kind"),
            &[],
            |lab| lab.doctor(&["--proxy", &format!("http://{}", lab.master)], &[])
        ),
    ]
}

fn secured(lab: &Lab, token: Option<&str>) -> Said {
    let place = lab.place();
    let right = place.join("token");
    std::fs::write(&right, "correct horse").unwrap();
    let right = ["--token-file", right.to_str().unwrap()];
    let pool = Pool::start_on("127.0.0.1", 0, "16MiB", &right, &right);
    let variables: Vec<(&str, &str)> = token.map(|t| ("MOONCAKE_TOKEN", t)).into_iter().collect();
    doctor(&["--master", &pool.address], &variables, &place)
}

fn metadata() -> Vec<Fault> {
    let area = "Metadata services";
    vec![
        fault!(
            area,
            "Redis is not there",
            ("metadata (redis)", "fail", "refused"),
            &[],
            |lab| with_metadata(lab, &format!("redis://{}", closed_port()))
        ),
        fault!(
            area,
            "Redis wants a password",
            ("metadata (redis)", "fail", "metadata_auth"),
            &[],
            |lab| redis(lab, "")
        ),
        fault!(
            area,
            "the password for Redis is wrong",
            ("metadata (redis)", "fail", "metadata_auth"),
            &[],
            |lab| redis(lab, ":wrong@")
        ),
        fault!(
            area,
            "a web server where Redis was meant",
            ("metadata (redis)", "fail", "something_else"),
            &[],
            |lab| {
                with_metadata(
                    lab,
                    &format!("redis://{}", answering(b"HTTP/1.1 400 Bad Request\r\n\r\n")),
                )
            }
        ),
        fault!(
            area,
            "etcd is not there",
            ("metadata (etcd)", "fail", "refused"),
            &[],
            |lab| with_metadata(lab, &format!("etcd://{}", closed_port()))
        ),
        fault!(
            area,
            "etcd wants a user",
            ("metadata (etcd)", "fail", "metadata_auth"),
            &[],
            |lab| {
                let place = lab.place();
                let (port, peers) = (free_port(), free_port());
                let url = format!("http://127.0.0.1:{port}");
                let peer = format!("http://127.0.0.1:{peers}");
                let _etcd = program(
                    "etcd",
                    &[
                        "--data-dir",
                        place.join("e").to_str().unwrap(),
                        "--listen-client-urls",
                        &url,
                        "--advertise-client-urls",
                        &url,
                        "--listen-peer-urls",
                        &peer,
                        "--initial-advertise-peer-urls",
                        &peer,
                        "--initial-cluster",
                        &format!("default={peer}"),
                    ],
                    &port,
                )?;
                let post = |path: &str, body: &str| -> Result<(), String> {
                    let end = Instant::now() + Duration::from_secs(10);
                    loop {
                        let mut stream = TcpStream::connect(format!("127.0.0.1:{port}"))
                            .map_err(|e| e.to_string())?;
                        write!(stream, "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len()).map_err(|e| e.to_string())?;
                        let mut answer = String::new();
                        let _ = stream.read_to_string(&mut answer);
                        if answer.starts_with("HTTP/1.1 200") {
                            return Ok(());
                        }
                        if Instant::now() > end {
                            return Err(format!("etcd {path}: {answer}"));
                        }
                        std::thread::sleep(Duration::from_millis(100));
                    }
                };
                post("/v3/auth/user/add", r#"{"name":"root","password":"p"}"#)?;
                post("/v3/auth/user/grant", r#"{"user":"root","role":"root"}"#)?;
                post("/v3/auth/enable", "{}")?;
                with_metadata(lab, &format!("etcd://127.0.0.1:{port}"))
            }
        ),
        fault!(
            area,
            "a web server where etcd was meant",
            ("metadata (etcd)", "fail", "something_else"),
            &[],
            |lab| {
                with_metadata(
                    lab,
                    &format!(
                        "etcd://{}",
                        answering(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                    ),
                )
            }
        ),
        fault!(
            area,
            "a web server where HTTP metadata was meant",
            ("metadata (http)", "fail", "something_else"),
            &[],
            |lab| {
                let server = answering(
                    b"HTTP/1.1 404 Not Found\r\nServer: nginx/1.22.1\r\nContent-Length: 0\r\n\r\n",
                );
                with_metadata(lab, &format!("http://{server}/metadata"))
            }
        ),
        fault!(
            area,
            "HTTP metadata behind a login",
            ("metadata (http)", "fail", "metadata_auth"),
            &[],
            |lab| {
                let server = answering(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n");
                with_metadata(lab, &format!("http://{server}/metadata"))
            }
        ),
    ]
}

fn redis(lab: &Lab, login: &str) -> Said {
    let port = free_port();
    let _redis = program(
        "redis-server",
        &["--port", &port, "--save", "", "--requirepass", "right"],
        &port,
    )?;
    with_metadata(lab, &format!("redis://{login}127.0.0.1:{port}"))
}
