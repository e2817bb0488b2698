//! Traces as a collector sees them: one put and one removal, from the command through the master to the node.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::Value;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

/// One span, with the service that told it.
#[derive(Clone, Debug)]
struct Span {
    service: String,
    name: String,
    trace: String,
    id: String,
    parent: String,
    failed: bool,
    length_ns: u128,
}

/// Takes what is posted to `/v1/traces`.
fn sink() -> (String, Receiver<Vec<Span>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let sender = sender.clone();
            std::thread::spawn(move || {
                let mut stream = BufReader::new(stream.unwrap());
                loop {
                    let mut length = 0;
                    let mut first = String::new();
                    if stream.read_line(&mut first).unwrap_or(0) == 0 {
                        return;
                    }
                    assert!(first.starts_with("POST /v1/traces "), "{first}");
                    loop {
                        let mut line = String::new();
                        stream.read_line(&mut line).unwrap();
                        let line = line.trim().to_ascii_lowercase();
                        if let Some(n) = line.strip_prefix("content-length:") {
                            length = n.trim().parse().unwrap();
                        }
                        if line.is_empty() {
                            break;
                        }
                    }
                    let mut body = vec![0; length];
                    stream.read_exact(&mut body).unwrap();
                    let _ = sender.send(spans(&serde_json::from_slice(&body).unwrap()));
                    let answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";
                    stream.get_mut().write_all(answer).unwrap();
                }
            });
        }
    });
    (endpoint, receiver)
}

fn spans(body: &Value) -> Vec<Span> {
    let resource = &body["resourceSpans"][0];
    let attributes = resource["resource"]["attributes"].as_array().unwrap();
    let service = attributes
        .iter()
        .find(|a| a["key"] == "service.name")
        .unwrap();
    let service = service["value"]["stringValue"].as_str().unwrap();
    let all = resource["scopeSpans"][0]["spans"].as_array().unwrap();
    all.iter()
        .map(|s| {
            let text = |name: &str| s[name].as_str().unwrap_or_default().to_owned();
            let nanoseconds = |name: &str| text(name).parse::<u128>().unwrap();
            Span {
                service: service.to_owned(),
                name: text("name"),
                trace: text("traceId"),
                id: text("spanId"),
                parent: text("parentSpanId"),
                failed: s["status"]["code"] == 2,
                length_ns: nanoseconds("endTimeUnixNano") - nanoseconds("startTimeUnixNano"),
            }
        })
        .collect()
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn mooncake(endpoint: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mooncake"));
    let variables = std::env::vars().map(|(name, _)| name);
    for name in variables.filter(|n| n.starts_with("MOONCAKE_") || n.starts_with("OTEL_")) {
        command.env_remove(name);
    }
    command
        .args(arguments)
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint);
    command
}

fn server(endpoint: &str, arguments: &[&str], until: &str) -> (Server, String) {
    let mut command = mooncake(endpoint, arguments);
    let command = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let stdout = child.stdout.take().unwrap();
    let server = Server(child);
    let lines = BufReader::new(stdout).lines().map_while(Result::ok);
    let line = lines.into_iter().find(|l| l.contains(until)).unwrap();
    (server, line)
}

fn run(endpoint: &str, span: &str, arguments: &[&str]) -> bool {
    let mut command = mooncake(endpoint, arguments);
    command.env("TRACEPARENT", format!("00-{TRACE}-{span}-01"));
    command.output().unwrap().status.success()
}

#[test]
fn a_trace_goes_from_the_command_through_the_master_to_the_node() {
    let (endpoint, told) = sink();
    let arguments = ["master", "--port", "0", "--metrics-port", "off"];
    let (_master, line) = server(&endpoint, &arguments, "listening on");
    let words: Vec<&str> = line.split_whitespace().collect();
    let at = words.iter().position(|w| *w == "on").unwrap();
    let address = words[at + 1].to_owned();
    let arguments = ["node", "--master", &address, "--memory", "64MiB"];
    let (_node, _) = server(&endpoint, &arguments, "in service");
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("value");
    std::fs::write(&file, vec![7; 3_000_000]).unwrap();
    let file = file.to_str().unwrap();
    let over = ["--master", &address, "--transport", "tcp"];
    fn with<'a>(arguments: &[&'a str], over: &[&'a str]) -> Vec<&'a str> {
        [arguments, over].concat()
    }
    assert!(run(
        &endpoint,
        "1111111111111111",
        &with(&["put", "k", file], &over)
    ));
    assert!(run(
        &endpoint,
        "2222222222222222",
        &with(&["rm", "k", "--force"], &over)
    ));
    assert!(!run(
        &endpoint,
        "3333333333333333",
        &with(&["get", "k"], &over)
    ));
    let mut all: Vec<Span> = Vec::new();
    let end = Instant::now() + Duration::from_secs(15);
    let found = |all: &[Span], service: &str, name: &str| -> Option<Span> {
        all.iter()
            .find(|s| s.service == service && s.name == name)
            .cloned()
    };
    while found(&all, "mooncake-node", "drop").is_none()
        || found(&all, "mooncake-node", "record").is_none()
        || !all.iter().any(|s| s.failed)
        || found(&all, "mooncake-master", "remove").is_none()
    {
        let left = end.saturating_duration_since(Instant::now());
        let more = told.recv_timeout(left);
        all.extend(more.unwrap_or_else(|_| panic!("what was told: {all:#?}")));
    }
    while let Ok(more) = told.recv_timeout(Duration::from_millis(1500)) {
        all.extend(more);
    }
    assert!(
        all.iter().all(|s| s.trace == TRACE),
        "one trace, and nothing that nobody asked for: {all:#?}"
    );
    let by_id: BTreeMap<&str, &Span> = all.iter().map(|s| (s.id.as_str(), s)).collect();
    assert_eq!(by_id.len(), all.len(), "every span has an id of its own");
    // Every way leads to what the commands were started for.
    let way = |from: &Span| -> Vec<String> {
        let mut way = Vec::new();
        let mut at = from;
        loop {
            way.push(format!("{}:{}", at.service, at.name));
            match by_id.get(at.parent.as_str()) {
                Some(parent) => at = parent,
                None => return [way, vec![at.parent.clone()]].concat(),
            }
        }
    };
    let put = found(&all, "mooncake-node", "record").unwrap();
    let put = way(&put);
    assert_eq!(put.last().unwrap(), "1111111111111111", "{put:?}");
    assert!(put.contains(&"mooncake-client:put".to_owned()), "{put:?}");
    let dropped = way(&found(&all, "mooncake-node", "drop").unwrap());
    let expected = [
        "mooncake-node:drop",
        "mooncake-master:remove",
        "mooncake-master:batch",
        "mooncake-client:remove",
        "2222222222222222",
    ];
    assert_eq!(dropped, expected);
    let missed = all
        .iter()
        .find(|s| s.failed && s.service == "mooncake-client");
    assert_eq!(way(missed.unwrap()).last().unwrap(), "3333333333333333");
    assert!(all.iter().all(|s| s.length_ns < 60_000_000_000), "{all:#?}");
}

#[test]
fn a_collector_that_is_not_there_costs_nobody_anything() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    for endpoint in [
        // Nobody listens; somebody listens and never answers; a kind of address that is not spoken here.
        "http://127.0.0.1:9".to_owned(),
        format!("http://{}", silent.local_addr().unwrap()),
        "https://127.0.0.1:9".to_owned(),
    ] {
        let arguments = [
            "master",
            "--port",
            "0",
            "--metrics-port",
            "off",
            "--memory",
            "32MiB",
        ];
        let (_master, line) = server(&endpoint, &arguments, "listening on");
        let words: Vec<&str> = line.split_whitespace().collect();
        let at = words.iter().position(|w| *w == "on").unwrap();
        let begun = Instant::now();
        let over = ["--master", words[at + 1], "--timeout", "10s"];
        let exist = [&["exist", "k"][..], &over].concat();
        assert!(!run(&endpoint, "1111111111111111", &exist), "absent");
        // The last spans of a process are waited for, a few seconds at most.
        assert!(
            begun.elapsed() < Duration::from_secs(6),
            "{endpoint}: {:?}",
            begun.elapsed()
        );
    }
}
