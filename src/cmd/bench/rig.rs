//! Processes a measurement needs: masters, nodes, Redis. Stopped when dropped.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::base::units::ByteSize;

/// A child process with the first line it printed.
pub(super) struct Process {
    child: Child,
    pub(super) first_line: String,
}

impl Process {
    fn start(mut command: Command) -> anyhow::Result<Self> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let name = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let stdout = child.stdout.take().context("no stdout")?;
        let mut lines = BufReader::new(stdout);
        let mut first_line = String::new();
        lines.read_line(&mut first_line)?;
        // Keep the pipe read, or the child blocks on it.
        std::thread::spawn(move || {
            let mut sink = String::new();
            while lines.read_line(&mut sink).is_ok_and(|n| n > 0) {
                sink.clear();
            }
        });
        Ok(Self { child, first_line })
    }

    /// Resident memory now.
    pub(super) fn resident_bytes(&self) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(path).unwrap_or_default();
        status
            .lines()
            .find_map(|l| l.strip_prefix("VmRSS:"))
            .and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok())
            .unwrap_or(0)
            << 10
    }

    fn words(&self, after: &str) -> anyhow::Result<String> {
        let words: Vec<&str> = self.first_line.split_whitespace().collect();
        let at = words
            .iter()
            .position(|w| *w == after)
            .context("unexpected first line")?;
        Ok(words
            .get(at + 1)
            .context("unexpected first line")?
            .to_string())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ourselves(arguments: &[&str]) -> anyhow::Result<Process> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(arguments).env("RUST_LOG", "warn");
    // The measurement's pool is its own, whatever the caller's environment says.
    for (name, _) in std::env::vars() {
        if name.starts_with("MOONCAKE_") {
            command.env_remove(name);
        }
    }
    Process::start(command)
}

/// A master of our own; with memory it is a whole pool.
pub(super) struct MasterProcess {
    pub(super) process: Process,
    pub(super) address: String,
    /// From spawn to the line that says it listens.
    pub(super) ready_after: Duration,
}

impl MasterProcess {
    pub(super) fn start(memory: ByteSize, more: &[&str]) -> anyhow::Result<Self> {
        let memory = memory.0.to_string();
        let mut arguments = vec![
            "master",
            "--port",
            "0",
            "--metrics-port",
            "off",
            "--memory",
            &memory,
        ];
        arguments.extend_from_slice(&[
            "--recovery-grace",
            "0ms",
            "--enable-metric-reporting=false",
        ]);
        arguments.extend_from_slice(more);
        let begun = Instant::now();
        let process = ourselves(&arguments)?;
        let ready_after = begun.elapsed();
        let address = process.words("on")?;
        Ok(Self {
            process,
            address,
            ready_after,
        })
    }
}

/// A node of our own; returns when it is in service, with the time that took.
pub(super) fn node(master: &str, memory: ByteSize, more: &[&str]) -> anyhow::Result<Process> {
    let memory = memory.0.to_string();
    let mut arguments = vec!["node", "--master", master, "--memory", &memory];
    arguments.extend_from_slice(more);
    ourselves(&arguments)
}

/// The other end of the bare TCP figures, as a process of its own.
pub(super) fn peer() -> anyhow::Result<(Process, String)> {
    let process = ourselves(&["bench", "peer"])?;
    let address = process.first_line.trim().to_owned();
    Ok((process, address))
}

/// A Redis server: a given one, or one found on the machine, on a free loopback port.
pub(super) fn redis(url: &str, memory: ByteSize) -> anyhow::Result<(Option<Process>, String)> {
    if let Some(address) = url.strip_prefix("redis://") {
        return Ok((None, format!("redis://{address}")));
    }
    let port = std::net::TcpListener::bind("127.0.0.1:0")?
        .local_addr()?
        .port();
    let mut command = Command::new("redis-server");
    command.args([
        "--port",
        &port.to_string(),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        "no",
    ]);
    command.args([
        "--maxmemory",
        &memory.0.to_string(),
        "--maxmemory-policy",
        "allkeys-lru",
    ]);
    let process = Process::start(command).context(
        "--vs redis: no redis-server was found; install it (Debian: redis-server) or give --vs redis://HOST:PORT",
    )?;
    Ok((Some(process), format!("redis://127.0.0.1:{port}")))
}
