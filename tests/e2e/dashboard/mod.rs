//! The dashboard: what is served at `/`, that it names nobody else, and what feeds it. `tests/e2e/dashboard/run` drives it in
//! a browser.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mooncake::base::trust::Token;
use mooncake::store::client::{PoolClient, PutOptions};
use serde_json::Value;

use crate::pool::{Pool, pattern};
use crate::put;

const TOKEN: &str = "open sesame";

/// A request; what came within a second, or until the master closed.
fn ask(address: &str, path: &str, token: Option<&str>) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let bearer = token.map_or_else(String::new, |t| format!("Authorization: Bearer {t}\r\n"));
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n{bearer}Connection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut all = Vec::new();
    let end = Instant::now() + Duration::from_millis(1200);
    let mut piece = [0; 65536];
    while Instant::now() < end {
        match stream.read(&mut piece) {
            Ok(0) => break,
            Ok(n) => all.extend_from_slice(&piece[..n]),
            Err(_) => {}
        }
    }
    let text = String::from_utf8_lossy(&all).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.to_lowercase(), body.to_owned())
}

fn secured(directory: &std::path::Path, nodes: usize) -> Pool {
    let file = directory.join("token");
    std::fs::write(&file, TOKEN).unwrap();
    let arguments = ["--token-file", file.to_str().unwrap()];
    Pool::start_on("127.0.0.1", nodes, "16MiB", &arguments, &arguments)
}

#[test]
fn the_page_is_its_own_and_the_data_wants_the_token() {
    let directory = tempfile::tempdir().unwrap();
    let pool = secured(directory.path(), 1);
    let (head, page) = ask(&pool.address, "/", None);
    assert!(head.starts_with("http/1.1 200"), "{head}");
    let policy = head
        .lines()
        .find_map(|l| l.strip_prefix("content-security-policy: "))
        .unwrap();
    assert!(policy.contains("default-src 'none'"), "{policy}");
    assert!(
        !policy.contains("unsafe") && !policy.contains("http"),
        "{policy}"
    );
    let nonce = regex::Regex::new("script-src 'nonce-([0-9a-f]{32})'").unwrap();
    let nonce = nonce.captures(policy).unwrap()[1].to_owned();
    assert_eq!(page.matches(&format!("nonce=\"{nonce}\"")).count(), 2);
    assert_ne!(
        head,
        ask(&pool.address, "/", None).0,
        "a nonce is used once"
    );
    for header in [
        "x-content-type-options: nosniff",
        "referrer-policy: no-referrer",
        "x-frame-options: deny",
    ] {
        assert!(head.contains(header), "{header}: {head}");
    }
    // Nobody else is named: the namespace of SVG is no address.
    let named = page.replace("http://www.w3.org/2000/svg", "");
    assert!(
        !named.contains("http://") && !named.contains("https://") && !named.contains("src=\"//")
    );
    for banned in [
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "localStorage",
        "document.cookie",
        " style=\"",
    ] {
        assert!(!page.contains(banned), "{banned}");
    }
    assert!(
        !regex::Regex::new(r#"\son[a-z]+=["']"#)
            .unwrap()
            .is_match(&page),
        "inline handlers"
    );
    // What the page asks is there, for those who know the token.
    let asked = regex::Regex::new("(?:ask|follow)\\(\"(/[a-z0-9/_]+)[\"?]").unwrap();
    let mut paths: Vec<String> = asked
        .captures_iter(&page)
        .map(|c| c[1].to_owned())
        .collect();
    paths.sort();
    paths.dedup();
    assert_eq!(
        paths,
        [
            "/api/v1/events",
            "/api/v1/hot",
            "/dashboard/live",
            "/events",
            "/metrics"
        ]
    );
    for path in paths {
        let (head, body) = ask(&pool.address, &path, None);
        assert!(head.starts_with("http/1.1 401"), "{path}: {head}");
        assert!(!body.contains("capacity"), "{body}");
        let (head, _) = ask(&pool.address, &path, Some("wrong"));
        assert!(head.starts_with("http/1.1 401"), "{path}: {head}");
        let (head, _) = ask(&pool.address, &path, Some(TOKEN));
        assert!(head.starts_with("http/1.1 200"), "{path}: {head}");
    }
}

fn first_frame(address: &str) -> Value {
    let (_, body) = ask(address, "/dashboard/live", None);
    let data = body.lines().find_map(|l| l.strip_prefix("data: ")).unwrap();
    serde_json::from_str(data).unwrap()
}

#[test]
fn frames_say_what_is_there() {
    let pool = Pool::start(2, "16MiB", &[]);
    let client = pool.client();
    for n in 0..20 {
        put(&client, &format!("model/a/{n}"), &[1; 10_000]).unwrap();
    }
    put(&client, "<b>/x", &[1; 1000]).unwrap();
    assert!(client.get(b"absent").is_err());
    client.get(b"model/a/1").unwrap();
    let frame = first_frame(&pool.address);
    assert_eq!(frame["objects"], 21);
    assert_eq!(frame["nodes"], 2);
    assert_eq!(frame["capacity_bytes"], 32 << 20);
    assert!(frame["misses"].as_u64() > Some(0), "{frame}");
    assert_eq!(frame["by_replicas"][0], 21);
    assert_eq!(frame["prefixes"][0]["prefix"], "model/a/");
    assert_eq!(frame["prefixes"][0]["objects"], 20);
    assert_eq!(frame["prefixes"][0]["bytes"], 200_000);
    assert_eq!(frame["prefixes"][1]["prefix"], "<b>/");
    assert_eq!(frame["tenants"][0]["tenant"], "default");
    let segments = frame["segments"].as_array().unwrap();
    assert_eq!(segments.len(), 2);
    for segment in segments {
        assert_eq!(segment["build"], env!("CARGO_PKG_VERSION"));
        let map = segment["map"].as_str().unwrap();
        assert_eq!(map.len(), 2 * 96);
        assert!(map.chars().any(|c| c != '0') && map.contains("00"), "{map}");
    }
    // Viewers are bounded, and those who leave make room.
    let open = || {
        let mut stream = TcpStream::connect(&pool.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        stream
            .write_all(b"GET /dashboard/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .unwrap();
        let mut head = [0; 12];
        stream.read_exact(&mut head).unwrap();
        (stream, String::from_utf8_lossy(&head[9..]).into_owned())
    };
    let many: Vec<_> = (0..33).map(|_| open()).collect();
    assert!(many.iter().any(|(_, status)| status == "503"));
    drop(many);
    let end = Instant::now() + Duration::from_secs(10);
    while open().1 != "200" {
        assert!(Instant::now() < end, "viewers that left still count");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Engines at work: blocks of conversations are looked up, read as far as they are there, and the rest is written.
fn load(client: &PoolClient, model: &str, seed: u64, stop: &AtomicBool) {
    let bytes = pattern(96 << 10, seed);
    let mut state = seed;
    let mut random = move |below: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    while !stop.load(Ordering::Relaxed) {
        // Few conversations are asked for often.
        let conversation = random(40) * random(40) / 8;
        let blocks = 4 + random(12);
        let keys: Vec<String> = (0..blocks)
            .map(|block| {
                format!(
                    "{model}@0@{:016x}",
                    (conversation << 20 | block).wrapping_mul(0x9E37_79B9_7F4A_7C15)
                )
            })
            .collect();
        let names: Vec<&[u8]> = keys.iter().map(String::as_bytes).collect();
        let found = client.get_batch(&names);
        for (key, _) in keys.iter().zip(found).filter(|(_, f)| f.is_err()) {
            let size = (32 + random(64) as usize) << 10;
            let options = PutOptions {
                replicas: 1 + u32::from(random(5) == 0),
                ..PutOptions::default()
            };
            let _ = client.put_bytes(key.as_bytes(), &bytes[..size], &options);
        }
        std::thread::sleep(Duration::from_millis(2 + random(20)));
    }
}

#[test]
#[ignore = "needs chromium: tests/e2e/dashboard/run"]
fn in_a_browser() {
    let pool = Pool::start_on(
        "127.0.0.1",
        0,
        "1MiB",
        &["--eviction-high-watermark-ratio", "0.9"],
        &[],
    );
    let names = ["gpu-a1", "gpu-a2", "gpu-b1"];
    let nodes: Vec<_> = names
        .iter()
        .map(|name| {
            let mut arguments = vec![
                "node",
                "--master",
                &pool.address,
                "--name",
                name,
                "--bind",
                "127.0.0.1",
            ];
            arguments.extend(["--memory", "64MiB"]);
            let node = crate::pool::Server::start(&arguments);
            node.line("in service");
            node
        })
        .collect();
    let directory = tempfile::tempdir().unwrap();
    let other = secured(directory.path(), 1);
    let mut config = other.config();
    config.token = Token::new(TOKEN);
    put(&PoolClient::open(config).unwrap(), "k", b"v").unwrap();

    let kept = PutOptions {
        hard_pin: true,
        ..PutOptions::default()
    };
    let html = b"<img src=x onerror=document.title='owned'>/k";
    let stored = pool.client().put_bytes(html, &[1; 400_000], &kept);
    assert!(stored.is_ok(), "{stored:?}");
    let stop = Arc::new(AtomicBool::new(false));
    let engines = [
        ("llama-3.1-70b", ""),
        ("llama-3.1-70b", ""),
        ("qwen3-32b", ""),
        ("deepseek-v3", "batch"),
    ];
    let threads: Vec<_> = engines
        .into_iter()
        .zip(1..)
        .map(|((model, tenant), seed)| {
            let mut config = pool.config();
            tenant.clone_into(&mut config.tenant);
            config.location_cache = 0;
            let stop = stop.clone();
            std::thread::spawn(move || load(&PoolClient::open(config).unwrap(), model, seed, &stop))
        })
        .collect();
    let shots = std::env::var("DASHBOARD_SHOTS")
        .unwrap_or_else(|_| directory.path().to_str().unwrap().to_owned());
    let seconds = std::env::var("DASHBOARD_SECONDS").unwrap_or_else(|_| "0".to_owned());
    let drive = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/dashboard/drive.py");
    let plain = format!("http://{}/", pool.address);
    let wants_token = format!("http://{}/", other.address);
    let status = Command::new("python3")
        .args([drive, &plain, &wants_token, TOKEN, &shots, &seconds])
        .status()
        .unwrap();
    stop.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().unwrap();
    }
    drop(nodes);
    assert!(status.success());
}
