//! Real processes for the tests: a master, nodes, command-line calls. Everything is killed when dropped.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use mooncake::engine::transport::TransportKind;
use mooncake::store::client::{ClientConfig, PoolClient};

pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_mooncake");

/// A server process of ours and the lines it prints.
pub(crate) struct Server {
    pub(crate) child: Child,
    lines: Receiver<String>,
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command.args(arguments);
    for (name, _) in std::env::vars().filter(|(n, _)| n.starts_with("MOONCAKE_")) {
        command.env_remove(name);
    }
    command.env("RUST_LOG", "info").env_remove("RUST_BACKTRACE");
    command
}

/// Where servers log: a file per process below `MOONCAKE_TEST_LOGS`, else nowhere.
fn log() -> Stdio {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let Ok(directory) = std::env::var("MOONCAKE_TEST_LOGS") else {
        return Stdio::null();
    };
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = format!("{directory}/{}-{number}.log", std::process::id());
    std::fs::File::create(path).map_or_else(|_| Stdio::null(), Stdio::from)
}

impl Server {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let mut child = command(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log())
            .spawn()
            .unwrap();
        let stdout = child.stdout.take().unwrap();
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Self { child, lines }
    }

    /// Waits for a line that contains `text`.
    pub(crate) fn line(&self, text: &str) -> String {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let line = self
                .lines
                .recv_timeout(left)
                .unwrap_or_else(|_| panic!("no line with {text:?}"));
            if line.contains(text) {
                return line;
            }
        }
    }

    /// The lines that have come and were not waited for.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.lines.try_iter().collect()
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub(crate) fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .args([signal, &pid])
                .status()
                .unwrap()
                .success()
        );
    }

    pub(crate) fn wait(&mut self) -> i32 {
        self.child.wait().unwrap().code().unwrap_or(-1)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A pool of one master and some nodes.
pub(crate) struct Pool {
    pub(crate) master: Server,
    pub(crate) nodes: Vec<Server>,
    pub(crate) address: String,
    master_arguments: Vec<String>,
}

impl Pool {
    /// A master on a free port and `nodes` nodes with `memory` each.
    pub(crate) fn start(nodes: usize, memory: &str, master_arguments: &[&str]) -> Self {
        Self::start_on("127.0.0.1", nodes, memory, master_arguments, &[])
    }

    pub(crate) fn start_on(
        host: &str,
        nodes: usize,
        memory: &str,
        master_arguments: &[&str],
        node_arguments: &[&str],
    ) -> Self {
        let mut arguments: Vec<String> = ["--metrics-port", "off", "--bind", host]
            .iter()
            .map(|s| (*s).to_owned())
            .collect();
        arguments.extend(master_arguments.iter().map(|s| (*s).to_owned()));
        let (master, address) = start_master("0", &arguments);
        let mut pool = Self {
            master,
            nodes: Vec::new(),
            address,
            master_arguments: arguments,
        };
        for _ in 0..nodes {
            pool.add_node_with(host, memory, node_arguments);
        }
        pool
    }

    pub(crate) fn add_node(&mut self, memory: &str) {
        self.add_node_with("127.0.0.1", memory, &[]);
    }

    fn add_node_with(&mut self, host: &str, memory: &str, more: &[&str]) {
        let mut arguments = vec![
            "node",
            "--master",
            &self.address,
            "--memory",
            memory,
            "--bind",
            host,
        ];
        arguments.extend_from_slice(more);
        let node = Server::start(&arguments);
        node.line("in service");
        self.nodes.push(node);
    }

    /// `kill -9` of the master, and a new one on the same port.
    pub(crate) fn restart_master(&mut self) {
        self.master.kill();
        let port = self.address.rsplit_once(':').unwrap().1.to_owned();
        let (master, address) = start_master(&port, &self.master_arguments);
        assert_eq!(address, self.address);
        self.master = master;
    }

    pub(crate) fn config(&self) -> ClientConfig {
        ClientConfig::new(&self.address)
    }

    pub(crate) fn client(&self) -> PoolClient {
        PoolClient::open(self.config()).unwrap()
    }

    pub(crate) fn client_over(&self, kind: TransportKind) -> PoolClient {
        let mut config = self.config();
        config.transports = vec![kind];
        PoolClient::open(config).unwrap()
    }

    /// A command-line call against this pool.
    pub(crate) fn call(&self, arguments: &[&str]) -> Output {
        let mut all = arguments.to_vec();
        all.extend_from_slice(&["--master", &self.address]);
        call(&all)
    }
}

fn start_master(port: &str, arguments: &[String]) -> (Server, String) {
    let mut all = vec!["master", "--port", port];
    all.extend(arguments.iter().map(String::as_str));
    let master = Server::start(&all);
    let line = master.line("listening on");
    let words: Vec<&str> = line.split_whitespace().collect();
    let at = words.iter().position(|w| *w == "on").unwrap();
    let address = words[at + 1].to_owned();
    (master, address)
}

/// A command-line call.
pub(crate) fn call(arguments: &[&str]) -> Output {
    command(arguments).stdin(Stdio::null()).output().unwrap()
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Bytes that print short.
#[derive(PartialEq, Eq)]
pub(crate) struct Blob(pub(crate) Vec<u8>);

impl std::fmt::Debug for Blob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let head = &self.0[..self.0.len().min(8)];
        write!(f, "{} bytes {head:02x?}…", self.0.len())
    }
}

/// Bytes that depend on every position and on the seed.
pub(crate) fn pattern(size: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

/// Polls until `check` holds.
pub(crate) fn eventually(what: &str, limit: Duration, mut check: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !check() {
        assert!(Instant::now() < end, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
