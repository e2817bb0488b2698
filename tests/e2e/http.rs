//! What the master shows over HTTP: metrics as Prometheus reads them, upstream's admin endpoints, the pool as JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use mooncake::engine::transport::TransportKind;
use mooncake::store::client::{ClientConfig, PoolClient, PutOptions};

use crate::pool::{Pool, eventually};
use crate::put;

/// Status and body of a request.
pub(crate) fn request(address: &str, method: &str, path: &str) -> (u16, String) {
    request_with(address, method, path, "")
}

/// With further header lines.
fn request_with(address: &str, method: &str, path: &str, headers: &str) -> (u16, String) {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let head = format!(
        "{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Length: 0\r\n{headers}\r\n"
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body.to_owned())
}

fn json(address: &str, path: &str) -> Value {
    let (status, body) = request(address, "GET", path);
    assert_eq!(status, 200, "{path}: {body}");
    serde_json::from_str(&body).unwrap()
}

/// A parsed exposition: family → (type, series → value). Fails on anything a strict reader would refuse.
fn parsed(text: &str) -> BTreeMap<String, (String, BTreeMap<String, f64>)> {
    let mut families: BTreeMap<String, (String, BTreeMap<String, f64>)> = BTreeMap::new();
    let mut current = String::new();
    assert!(text.ends_with('\n'));
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            assert!(!help.is_empty(), "{line}");
            assert!(!families.contains_key(name), "{name} comes twice");
            current = name.to_owned();
            continue;
        }
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert_eq!(name, current, "TYPE follows its HELP");
            assert!(["counter", "gauge", "histogram"].contains(&kind));
            families.insert(current.clone(), (kind.to_owned(), BTreeMap::new()));
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap();
        let value: f64 = value.parse().unwrap();
        let name = series.split('{').next().unwrap();
        let (kind, all) = families.get_mut(&current).unwrap();
        let of_family = match kind.as_str() {
            "histogram" => ["_bucket", "_sum", "_count"]
                .iter()
                .any(|s| name == format!("{current}{s}")),
            _ => name == current,
        };
        assert!(of_family, "{line} stands under {current}");
        assert!(all.insert(series.to_owned(), value).is_none(), "{line}");
    }
    families
}

fn metrics(address: &str) -> BTreeMap<String, (String, BTreeMap<String, f64>)> {
    let (status, text) = request(address, "GET", "/metrics");
    assert_eq!(status, 200);
    parsed(&text)
}

fn value(families: &BTreeMap<String, (String, BTreeMap<String, f64>)>, series: &str) -> f64 {
    let name = series.split('{').next().unwrap();
    let family = families
        .get(name)
        .or_else(|| families.get(name.trim_end_matches("_count")))
        .unwrap();
    family.1[series]
}

#[test]
fn every_name_of_upstreams_is_there_from_the_start() {
    let pool = Pool::start(1, "32MiB", &[]);
    let families = metrics(&pool.address);
    let upstreams = include_str!("upstream_metrics.txt");
    for line in upstreams.lines().filter(|l| !l.starts_with('#')) {
        let words: Vec<&str> = line.split(' ').collect();
        let (kind, series) = families
            .get(words[0])
            .unwrap_or_else(|| panic!("{} is missing", words[0]));
        assert_eq!(kind, words[1], "{line}");
        let labelled = words.len() > 2;
        assert!(labelled || !series.is_empty(), "{line} has no series");
    }
    assert_eq!(
        value(&families, "master_total_capacity_bytes"),
        f64::from(32 << 20)
    );
    // Histograms are cumulative and end with everything.
    for (name, (kind, series)) in &families {
        if kind == "histogram" {
            let infinite = series.iter().filter(|(s, _)| s.contains("le=\"+Inf\""));
            for (label, count) in infinite {
                let labels = label.split_once('{').unwrap().1.replace("le=\"+Inf\"}", "");
                let labels = labels.trim_end_matches(',');
                let total = if labels.is_empty() {
                    format!("{name}_count")
                } else {
                    format!("{name}_count{{{labels}}}")
                };
                assert_eq!(series[&total], *count, "{name}");
            }
        }
    }
}

#[test]
fn promtool_accepts_them() {
    let pool = Pool::start(1, "32MiB", &[]);
    put(&pool.client(), "k", b"value").unwrap();
    let (_, text) = request(&pool.address, "GET", "/metrics");
    let started = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut promtool) = started else {
        eprintln!("promtool is not installed: the exposition was checked by the other test only");
        return;
    };
    let mut input = promtool.stdin.take().unwrap();
    input.write_all(text.as_bytes()).unwrap();
    drop(input);
    let done = promtool.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
    // 3: it can be read, and names are not as they are recommended; upstream's are as they are.
    assert!(matches!(done.status.code(), Some(0 | 3)), "{said}");
    let upstreams: BTreeSet<&str> = include_str!("upstream_metrics.txt")
        .lines()
        .filter_map(|l| l.split(' ').next())
        .collect();
    for line in said.lines().filter(|l| !l.trim().is_empty()) {
        let name = line.split(' ').next().unwrap();
        let ours = !upstreams.contains(name);
        assert!(
            !ours || name == "mooncake_master_eviction_hold_max_nanoseconds",
            "{line}"
        );
    }
}

#[test]
fn metrics_follow_what_happens() {
    let pool = Pool::start(1, "32MiB", &["--default-kv-lease-ttl", "10ms"]);
    let mut config: ClientConfig = pool.config();
    // Every look goes to the master: one for the size, one for the bytes.
    config.location_cache = 0;
    let client = PoolClient::open(config.clone()).unwrap();
    for n in 0..4 {
        put(&client, &format!("k{n}"), &[1; 5000]).unwrap();
    }
    client.get(b"k0").unwrap();
    client.get(b"k0").unwrap();
    assert!(client.get(b"absent").is_err());
    let keys: Vec<&[u8]> = vec![b"k0", b"k1", b"nope"];
    client.exist(&keys).unwrap();
    client.get_batch(&keys);
    client.remove(&[b"k3"], true).unwrap();
    config.tenant = "acme".to_owned();
    let other = PoolClient::open(config).unwrap();
    assert!(other.get(b"k0").is_err());
    let families = metrics(&pool.address);
    for (series, expected) in [
        ("master_key_count", 3.0),
        ("master_put_start_requests_total", 4.0),
        ("master_put_end_requests_total", 4.0),
        ("master_put_start_failures_total", 0.0),
        ("master_remove_requests_total", 1.0),
        ("master_batch_exist_key_requests_total", 1.0),
        ("master_batch_exist_key_items_total", 3.0),
        ("mem_cache_hit_nums_", 8.0),
        ("valid_get_nums_", 8.0),
        ("mem_cache_hit_bytes_total", 40_000.0),
        ("mooncake_master_removed_total", 1.0),
        ("mooncake_tenant_hits_total{tenant_id=\"default\"}", 8.0),
        ("mooncake_tenant_hits_total{tenant_id=\"acme\"}", 0.0),
        ("master_mount_segment_requests_total", 1.0),
        ("master_value_size_bytes_count", 4.0),
        ("mooncake_rpc_seconds_count{operation=\"remove\"}", 1.0),
        ("mooncake_lease_age_seconds_count", 7.0),
    ] {
        assert_eq!(value(&families, series), expected, "{series}");
    }
    assert!(
        value(
            &families,
            "mooncake_tenant_misses_total{tenant_id=\"acme\"}"
        ) >= 1.0
    );
    // Eviction: what goes first has been read by nobody.
    for n in 0..40 {
        put(&client, &format!("big{n}"), &vec![2; 1 << 20]).unwrap();
    }
    // The sweeper may still be at it, and figures are read one after the other.
    let settled = || {
        let families = metrics(&pool.address);
        let evicted = value(&families, "master_evicted_key_count");
        (value(&families, "mooncake_eviction_age_seconds_count") == evicted).then_some(families)
    };
    let end = Instant::now() + Duration::from_secs(5);
    let families = std::iter::repeat_with(settled).take_while(|_| Instant::now() < end);
    let families = families
        .flatten()
        .next()
        .expect("an age for every evicted object");
    assert!(value(&families, "master_evicted_key_count") >= 10.0);
    assert!(value(&families, "master_successful_evictions_total") >= 1.0);
    assert!(value(&families, "mooncake_master_evicted_unread_total") >= 10.0);
}

#[test]
fn a_master_that_rebuilds_does_not_call_a_key_absent() {
    let mut pool = Pool::start(1, "32MiB", &["--recovery-grace", "20s"]);
    put(&pool.client(), "a", b"value").unwrap();
    pool.nodes[0].signal("-STOP");
    pool.restart_master();
    let at = pool.address.as_str();
    assert_eq!(json(at, "/health")["service_ready"], false);
    let (status, text) = request(at, "GET", "/query_key?key=a");
    assert!(
        status == 503 && text.contains("UNAVAILABLE_IN_CURRENT_STATUS"),
        "{status} {text}"
    );
    let several = json(at, "/batch_query_keys?keys=a");
    assert_eq!(
        several["data"]["a"]["error"],
        "UNAVAILABLE_IN_CURRENT_STATUS"
    );
    let (_, summary) = request(at, "GET", "/metrics/summary");
    assert!(summary.contains("service_ready=false"), "{summary}");
    pool.nodes[0].signal("-CONT");
    let found = || request(at, "GET", "/query_key?key=a").0 == 200;
    eventually("the node brings it", Duration::from_secs(15), found);
}

#[test]
fn upstreams_admin_endpoints() {
    let pool = Pool::start(1, "32MiB", &[]);
    let at = pool.address.as_str();
    put(&pool.client(), "a", b"value").unwrap();
    let ready = || json(at, "/health")["service_ready"] == true;
    eventually(
        "the grace after the start is over",
        Duration::from_secs(5),
        ready,
    );
    assert_eq!(json(at, "/health")["status"], "ok");
    let (_, summary) = request(at, "GET", "/metrics/summary");
    assert!(summary.contains("Keys: 1"), "{summary}");
    let several = json(at, "/batch_query_keys?keys=a,b");
    assert_eq!(several["data"]["a"]["ok"], true);
    assert_eq!(several["data"]["a"]["values"][0]["size_"], 5);
    assert_eq!(several["data"]["b"]["ok"], false);
    // It grants no lease: the key can go without force.
    assert!(pool.client().remove(&[b"a"], false).unwrap()[0].is_ok());
    assert_eq!(request(at, "GET", "/batch_query_keys").0, 400);
    let (_, segments) = request(at, "GET", "/get_all_segments");
    let segment = segments.lines().next().unwrap();
    let status = json(at, &format!("/api/v1/segments/status?segment={segment}"));
    assert_eq!(
        (&status["status"], &status["status_name"]),
        (&1.into(), &"OK".into())
    );
    assert_eq!(request(at, "GET", "/api/v1/segments/status").0, 400);
    let (code, text) = request(at, "GET", "/api/v1/segments/status?segment=x");
    assert!(code == 404 && text.contains("SEGMENT_NOT_FOUND"), "{text}");
    assert_eq!(json(at, "/api/v1/tenant_quotas")["success"], true);
    assert_eq!(
        request(at, "PUT", "/api/v1/tenant_quotas?tenant_id=a").0,
        400
    );
    put(&pool.client(), "c", b"value").unwrap();
    let page = "Origin: http://127.0.0.1\r\n";
    let (code, text) = request_with(at, "POST", "/api/v1/remove_all?force=true", page);
    assert!(code == 403 && text.contains("web page"), "{text}");
    let (code, text) = request(at, "POST", "/api/v1/remove_all?force=true");
    assert_eq!(
        (code, text.as_str()),
        (200, "{\"success\":true,\"removed_count\":1}")
    );
}

#[test]
fn without_a_token_only_this_host_may_destroy() {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    // Sends nothing: asks which address would be used.
    let outward = socket
        .connect("192.0.2.1:9")
        .and_then(|()| socket.local_addr());
    let Some(outward) = outward.ok().filter(|a| !a.ip().is_loopback()) else {
        eprintln!("this host has a loopback only: not checked");
        return;
    };
    let pool = Pool::start_on("0.0.0.0", 0, "32MiB", &[], &[]);
    let port = pool.address.rsplit_once(':').unwrap().1;
    let near = format!("127.0.0.1:{port}");
    let far = format!("{}:{port}", outward.ip());
    let remove = "/api/v1/remove_all?force=true";
    let (code, text) = request(&far, "POST", remove);
    assert!(code == 403 && text.contains("--token-file"), "{text}");
    assert_eq!(request(&far, "GET", "/get_all_keys").0, 200);
    assert_ne!(request(&near, "POST", remove).0, 403);
}

#[test]
fn the_pool_as_json() {
    let pool = Pool::start(2, "32MiB", &["--recovery-grace", "0s"]);
    let at = pool.address.as_str();
    let client = pool.client();
    for n in 0..250usize {
        put(&client, &format!("k{n:03}"), &vec![1; 100 + n]).unwrap();
    }
    client
        .put_bytes(
            b"pinned",
            b"x",
            &PutOptions {
                hard_pin: true,
                ..crate::copies(2)
            },
        )
        .unwrap();
    client.get(b"k007").unwrap();
    let overview = json(at, "/api/v1/overview");
    assert_eq!(overview["objects"], 251);
    assert_eq!(overview["nodes"], 2);
    assert_eq!(overview["hits"], 1);
    assert_eq!(overview["hit_rate"], 1.0);
    let nodes = json(at, "/api/v1/nodes");
    assert_eq!(nodes["nodes"][0]["state"], "ok");
    assert_eq!(nodes["nodes"][0]["size_bytes"], 32 << 20);
    let segments = json(at, "/api/v1/segments");
    let counted: u64 = segments["segments"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["objects"].as_u64().unwrap())
        .sum();
    assert_eq!(counted, 252);
    let name = segments["segments"][0]["name"].as_str().unwrap();
    let map = json(at, &format!("/api/v1/segments/map?segment={name}&cells=16"));
    let cells = map["cells"].as_array().unwrap();
    assert_eq!((cells.len(), &map["complete"]), (16, &true.into()));
    let used: f64 = cells.iter().map(|c| c.as_f64().unwrap()).sum();
    let told = segments["segments"][0]["used_bytes"].as_f64().unwrap();
    assert!(
        (used * 2.0 * 1048576.0 - told).abs() < 100_000.0,
        "{used} {told}"
    );
    // Pages: unsorted, by key, by size; each key once.
    for sort in ["", "&sort=key", "&sort=size"] {
        let mut seen = Vec::new();
        let mut cursor = String::new();
        loop {
            let page = json(at, &format!("/api/v1/keys?prefix=k&limit=40{sort}{cursor}"));
            for entry in page["keys"].as_array().unwrap() {
                seen.push((
                    entry["key"].as_str().unwrap().to_owned(),
                    entry["size_bytes"].as_u64().unwrap(),
                ));
            }
            let Some(next) = page["next_cursor"].as_str() else {
                break;
            };
            cursor = format!("&cursor={next}");
        }
        if sort == "&sort=key" {
            assert!(seen.is_sorted_by_key(|(key, _)| key.clone()));
        }
        if sort == "&sort=size" {
            assert!(seen.is_sorted_by(|a, b| a.1 >= b.1));
        }
        let all: BTreeSet<&String> = seen.iter().map(|(key, _)| key).collect();
        assert_eq!((all.len(), seen.len()), (250, 250), "{sort}");
    }
    for bad in ["sort=x", "limit=x", "cursor=x", "sort=key&cursor=zz"] {
        assert_eq!(
            request(at, "GET", &format!("/api/v1/keys?{bad}")).0,
            400,
            "{bad}"
        );
    }
    let one = json(at, "/api/v1/key?key=pinned");
    assert_eq!(one["hard_pin"], true);
    assert_eq!(one["replicas"].as_array().unwrap().len(), 2);
    assert_eq!(json(at, "/api/v1/key?key_hex=70696e6e6564"), one);
    // Versions are larger than a browser's numbers: text, and everywhere the same.
    let version = one["version"].as_str().unwrap();
    assert!(version.parse::<u64>().unwrap() > 1 << 53, "{version}");
    let listed = json(at, "/api/v1/keys?prefix=pinned");
    assert_eq!(listed["keys"][0]["version"], version);
    let told = json(at, "/api/v1/events?limit=1");
    assert_eq!(told["events"][0]["version"], version);
    assert_eq!(request(at, "GET", "/api/v1/key?key=absent").0, 404);
    assert_eq!(request(at, "GET", "/api/v1/key").0, 400);
    let tenants = json(at, "/api/v1/tenants");
    assert_eq!(tenants["tenants"][0]["tenant"], "default");
    assert_eq!(tenants["tenants"][0]["objects"], 251);
    let hot = json(at, "/api/v1/hot?limit=1");
    assert_eq!(hot["prefixes"][0]["key"], "k007");
    let histograms = json(at, "/api/v1/histograms");
    let all = histograms["histograms"].as_array().unwrap();
    let commits = all
        .iter()
        .find(|h| h["labels"]["operation"] == "arena_commit")
        .unwrap();
    assert!(commits["count"].as_u64().unwrap() >= 250 && commits["p99"].as_f64().unwrap() > 0.0);
    let events = json(at, "/api/v1/events?limit=3");
    let shown = events["events"].as_array().unwrap();
    assert_eq!(shown.len(), 3);
    assert_eq!(shown[2]["key"], "pinned");
    assert_eq!(events["next_seq"], 252);
    for n in 0..7 {
        crate::quotas::tenant(&pool, &format!("t{n}"), &[TransportKind::Tcp])
            .put_bytes(b"k", b"v", &PutOptions::default())
            .unwrap();
    }
    let counted = || {
        json(at, "/api/v1/tenants")["tenants"]
            .as_array()
            .map(Vec::len)
            == Some(8)
    };
    eventually("all are counted", Duration::from_secs(10), counted);
    for (listing, name, count) in [
        ("tenants", "tenant", 8),
        ("nodes", "node", 2),
        ("segments", "name", 2),
    ] {
        let (mut seen, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = json(at, &format!("/api/v1/{listing}?limit=3{cursor}"));
            let items = page[listing].as_array().unwrap();
            assert!(items.len() <= 3, "{listing}");
            seen.extend(items.iter().map(|i| i[name].as_str().unwrap().to_owned()));
            let Some(next) = page["next_cursor"].as_str() else {
                break;
            };
            cursor = format!("&cursor={next}");
        }
        let all: BTreeSet<&String> = seen.iter().collect();
        assert_eq!(
            (all.len(), seen.len()),
            (count, count),
            "{listing}: {seen:?}"
        );
        assert_eq!(
            request(at, "GET", &format!("/api/v1/{listing}?cursor=x")).0,
            400
        );
    }
}

#[test]
fn slow_operations_are_logged_with_their_waits() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let file = std::fs::File::create(&log).unwrap();
    let mut master = Command::new(crate::pool::BINARY)
        .args([
            "master",
            "--port",
            "0",
            "--metrics-port",
            "off",
            "--memory",
            "16MiB",
        ])
        .args(["--slow-log", "50ms", "--log-format", "json"])
        .env_remove("RUST_LOG")
        .stdout(Stdio::piped())
        .stderr(file)
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut out = std::io::BufReader::new(master.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut out, &mut line).unwrap();
    let address = line
        .split(" on ")
        .nth(1)
        .unwrap()
        .split(' ')
        .next()
        .unwrap();
    let mut config = ClientConfig::new(address);
    config.timeout = Duration::from_millis(400);
    let client = PoolClient::open(config).unwrap();
    let pinned = PutOptions {
        hard_pin: true,
        ..PutOptions::default()
    };
    eventually("the pool is full", Duration::from_secs(20), || {
        client
            .put_bytes(
                format!("k{}", rand_key()).as_bytes(),
                &vec![0; 3 << 20],
                &pinned,
            )
            .is_err()
    });
    drop(client);
    master.kill().unwrap();
    master.wait().unwrap();
    let text = std::fs::read_to_string(&log).unwrap();
    let slow: Vec<Value> = text
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .filter(|v: &Value| v["fields"]["message"] == "slow operation")
        .collect();
    let fields = &slow.first().expect("a slow operation is logged")["fields"];
    assert_eq!(fields["operation"], "put_start");
    assert!(fields["key"].as_str().unwrap().starts_with('k'));
    let ms = |name: &str| fields[name].as_str().unwrap().parse::<f64>().unwrap();
    assert!(ms("waited_for_space_ms") > 40.0 && ms("took_ms") >= ms("waited_for_space_ms"));
    assert!(ms("rest_ms") < 0.5 * ms("took_ms"), "{fields}");
    let failed = slow
        .iter()
        .map(|s| &s["fields"])
        .find(|f| f["failed_items"] == 1);
    let failed = failed.expect("the put that found no place");
    assert_eq!(
        (&failed["items"], &failed["error"]),
        (&1.into(), &"NO_AVAILABLE_HANDLE".into())
    );
}

fn rand_key() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Names of metrics in an expression.
fn names(expression: &str) -> BTreeSet<String> {
    let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    let prefixes = [
        "mooncake_",
        "master_",
        "segment_",
        "mem_",
        "valid_",
        "total_",
        "file_",
    ];
    words
        .filter(|w| prefixes.iter().any(|p| w.starts_with(p)))
        .map(str::to_owned)
        .collect()
}

#[test]
fn rules_and_dashboard_name_what_there_is() {
    let pool = Pool::start(1, "32MiB", &[]);
    let families = metrics(&pool.address);
    let rules = include_str!("../../deploy/monitoring/alerts.yml");
    let board: Value = serde_json::from_str(include_str!(
        "../../deploy/monitoring/grafana/dashboards/mooncake.json"
    ))
    .unwrap();
    let mut wanted: BTreeSet<String> = BTreeSet::new();
    let mut lines = rules.lines();
    while let Some(line) = lines.next() {
        let Some(expression) = line.trim().strip_prefix("expr: ") else {
            continue;
        };
        wanted.extend(names(expression));
        if expression.trim() == ">" {
            wanted.extend(lines.next().into_iter().flat_map(names));
            wanted.extend(lines.next().into_iter().flat_map(names));
        }
    }
    for panel in board["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            wanted.extend(names(target["expr"].as_str().unwrap()));
        }
    }
    assert!(wanted.len() > 20, "{wanted:?}");
    for name in &wanted {
        let family = ["_bucket", "_count", "_sum"]
            .iter()
            .find_map(|s| name.strip_suffix(s).filter(|f| families.contains_key(*f)));
        let known = families.contains_key(name) || family.is_some();
        assert!(known, "{name} is not a metric of the master");
    }
}
