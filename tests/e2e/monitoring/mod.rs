//! Prometheus itself against a live pool, with the files of deploy/monitoring: it scrapes, every panel of the dashboard shows
//! something, so do upstream's panels, and an alert goes off when a node dies.
//!
//! Skipped by name where there is no `prometheus`; `tools/test` sees to it.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use mooncake::engine::transport::TransportKind;
use serde_json::Value;

use crate::pool::{Pool, eventually, pattern};
use crate::put;

/// A running Prometheus; killed when dropped.
struct Prometheus {
    child: Child,
    address: String,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Prometheus {
    /// With our configuration, but for the targets and the pace; `None` when it is not installed.
    fn start(master: &str, place: &Path) -> Option<Self> {
        let file = include_str!("../../../deploy/monitoring/prometheus.yml");
        assert!(file.contains("localhost:9003") && file.contains("_interval: 15s"));
        let file = file
            .replace("localhost:9003", master)
            .replace("_interval: 15s", "_interval: 1s")
            .replace("_interval: 5s", "_interval: 1s");
        std::fs::write(place.join("prometheus.yml"), file).unwrap();
        let rules = include_str!("../../../deploy/monitoring/alerts.yml");
        std::fs::write(place.join("alerts.yml"), rules).unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap().to_string();
        drop(free);
        let child = Command::new("prometheus")
            .arg(format!("--web.listen-address={address}"))
            .arg("--config.file=prometheus.yml")
            .arg("--storage.tsdb.path=data")
            .arg("--log.level=warn")
            .current_dir(place)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(place.join("log")).unwrap())
            .spawn();
        let started = Self {
            child: child.ok()?,
            address,
        };
        let log = || std::fs::read_to_string(place.join("log")).unwrap_or_default();
        eventually("prometheus is ready", Duration::from_secs(30), || {
            let ready = started.get("/-/ready").is_some();
            assert!(ready || !log().contains("level=error"), "{}", log());
            ready
        });
        Some(started)
    }

    fn get(&self, path: &str) -> Option<String> {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .proxy(None)
            .timeout_global(Some(Duration::from_secs(10)))
            .build()
            .into();
        let url = format!("http://{}{path}", self.address);
        agent.get(url).call().ok()?.body_mut().read_to_string().ok()
    }

    fn api(&self, path: &str) -> Value {
        let text = self.get(&format!("/api/v1/{path}"));
        let answer: Value = text
            .and_then(|t| serde_json::from_str(&t).ok())
            .unwrap_or_default();
        answer["data"].clone()
    }

    /// The values of a query's series now.
    fn query(&self, query: &str) -> Vec<String> {
        let escaped: String = query.bytes().map(|b| format!("%{b:02x}")).collect();
        let found = self.api(&format!("query?query={escaped}"));
        let series = found["result"].as_array().cloned().unwrap_or_default();
        let value = |s: &Value| s["value"][1].as_str().unwrap_or_default().to_owned();
        series.iter().map(value).collect()
    }

    fn alerts(&self) -> Vec<(String, String)> {
        let all = self.api("alerts")["alerts"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let text = |a: &Value| {
            (
                a["labels"]["alertname"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned(),
                a["state"].as_str().unwrap_or_default().to_owned(),
            )
        };
        all.iter().map(text).collect()
    }
}

/// Something of everything: puts beyond what fits, reads over sockets, misses, reads again.
fn work(pool: &Pool, round: u64) {
    let mut config = pool.config();
    config.location_cache = 0;
    config.transports = vec![TransportKind::Tcp];
    let client = mooncake::store::client::PoolClient::open(config).unwrap();
    for n in 0..12 {
        let key = format!("{round}/{n}");
        let _ = put(&client, &key, &pattern(1 << 20, n));
        for _ in 0..2 {
            let _ = client.get(key.as_bytes());
        }
        let _ = client.get(format!("absent/{key}").as_bytes());
    }
}

fn panels() -> Vec<(String, String)> {
    let board = include_str!("../../../deploy/monitoring/grafana/dashboards/mooncake.json");
    let board: Value = serde_json::from_str(board).unwrap();
    let panels = board["panels"].as_array().unwrap().iter();
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    panels
        .flat_map(|p| {
            let targets = p["targets"].as_array().cloned().unwrap_or_default();
            targets
                .into_iter()
                .map(move |t| (text(&p["title"]), text(&t["expr"])))
        })
        .collect()
}

#[test]
fn prometheus_finds_what_the_dashboards_ask_for() {
    let mut pool = Pool::start(2, "16MiB", &["--default-kv-lease-ttl", "10ms"]);
    let place = tempfile::tempdir().unwrap();
    let Some(prometheus) = Prometheus::start(&pool.address, place.path()) else {
        println!("skipped: prometheus is not installed (tools/prometheus has it)");
        return;
    };
    eventually("the master is scraped", Duration::from_secs(20), || {
        prometheus.query("up{job=\"mooncake-master\"}") == ["1"]
    });
    // A rate needs two scrapes between which something happened.
    let panels = panels();
    assert!(panels.len() >= 20, "{panels:?}");
    let mut empty = panels.clone();
    let mut round = 0;
    eventually(
        "every panel shows something",
        Duration::from_secs(60),
        || {
            work(&pool, round);
            round += 1;
            std::thread::sleep(Duration::from_millis(700));
            empty.retain(|(_, query)| prometheus.query(query).iter().all(|v| v == "NaN"));
            if round == 20 {
                println!("still empty: {empty:?}");
            }
            empty.is_empty()
        },
    );
    let upstream: Vec<&str> = include_str!("upstream_queries.txt")
        .lines()
        .filter(|l| !l.starts_with('#'))
        .collect();
    assert!(upstream.len() > 100);
    let missing: Vec<&&str> = upstream
        .iter()
        .filter(|q| prometheus.query(q).is_empty())
        .collect();
    assert!(missing.is_empty(), "no series for {missing:#?}");

    // The rules are evaluated without an error, and none is about a pool that is well but small.
    let groups = prometheus.api("rules")["groups"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let rules: Vec<&Value> = groups
        .iter()
        .flat_map(|g| g["rules"].as_array().unwrap())
        .collect();
    assert!(
        rules.len() >= 7 && rules.iter().all(|r| r["health"] == "ok"),
        "{rules:#?}"
    );
    let away = |state: &str| {
        prometheus
            .alerts()
            .contains(&("MooncakeNodeAway".to_owned(), state.to_owned()))
    };
    assert!(!away("pending") && !away("firing"));
    pool.nodes[0].kill();
    eventually("the alert of a lost node", Duration::from_secs(20), || {
        away("pending") || away("firing")
    });
}
