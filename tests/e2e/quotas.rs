//! Quotas of tenants: held, told, and remembered by the nodes.

use std::time::Duration;

use mooncake::engine::transport::TransportKind;
use mooncake::store::client::{PoolClient, PutOptions};
use mooncake::store::model::error::StoreError;
use serde_json::{Value, json};

use crate::drain::send;
use crate::http::request;
use crate::pool::{Blob, Pool, call, eventually, pattern, stdout};
use crate::put;

const QUOTAS: &str = "/api/v1/tenant_quotas";

pub(crate) fn tenant(pool: &Pool, name: &str, kinds: &[TransportKind]) -> PoolClient {
    let mut config = pool.config();
    config.tenant = name.to_owned();
    config.transports = kinds.to_vec();
    PoolClient::open(config).unwrap()
}

pub(crate) fn set(pool: &Pool, tenant: &str, bytes: u64) -> Value {
    let body = json!({"requested_quota_bytes": bytes}).to_string();
    let path = format!("{QUOTAS}?tenant_id={tenant}");
    // Refused while nodes may still come that know of other decisions.
    let mut answer = (0, Value::Null);
    eventually("the quota is set", Duration::from_secs(10), || {
        answer = send(&pool.address, "PUT", &path, &body);
        answer.0 != 409
    });
    assert_eq!(answer.0, 200, "{answer:?}");
    answer.1
}

fn row(pool: &Pool, tenant: &str) -> Value {
    let (status, answer) = send(
        &pool.address,
        "GET",
        &format!("{QUOTAS}?tenant_id={tenant}"),
        "",
    );
    assert_eq!(status, 200, "{answer}");
    answer["data"].clone()
}

const NEAR: &[TransportKind] = &[TransportKind::Shm, TransportKind::Tcp];
const FAR: &[TransportKind] = &[TransportKind::Tcp];

#[test]
fn a_tenant_stays_within_its_quota_at_the_cost_of_its_own_objects() {
    let pool = Pool::start(2, "64MiB", &["--default-kv-lease-ttl", "50ms"]);
    let (a, b) = (tenant(&pool, "a", NEAR), tenant(&pool, "b", FAR));
    for n in 0..200u64 {
        put(&b, &format!("b{n}"), &pattern(20_000, n)).unwrap();
    }
    let told = set(&pool, "a", 2 << 20);
    assert_eq!(told["data"]["requested_quota_bytes"], 2 << 20);
    assert_eq!(told["data"]["effective_quota_bytes"], 2 << 20);
    assert_eq!(told["data"]["has_explicit_policy"], true);
    assert_eq!(
        (&told["kept_by_nodes"], &told["nodes"]),
        (&json!(2), &json!(2))
    );
    // Small ones by arena, large ones in two phases: three times what is allowed.
    for n in 0..500u64 {
        let size = if n % 20 == 0 { 100_000 } else { 8_000 };
        put(&a, &format!("a{n}"), &pattern(size, n)).unwrap();
        let held = row(&pool, "a")["charged_bytes"].as_u64().unwrap();
        assert!(held <= 2 << 20, "{held} after {n}");
    }
    assert_eq!(a.get(b"a499").map(Blob), Ok(Blob(pattern(8_000, 499))));
    assert_eq!(a.get(b"a0"), Err(StoreError::NotFound), "the oldest went");
    let stays = (0..200).all(|n| b.exist(&[format!("b{n}").as_bytes()]).unwrap()[0]);
    assert!(stays, "nobody else paid for it");
    assert_eq!(row(&pool, "b")["has_explicit_policy"], false);
    // What may not go does not: then the put fails, with upstream's code, and the tenant is closed.
    let c = tenant(&pool, "c", NEAR);
    set(&pool, "c", 1 << 20);
    let pinned = PutOptions {
        hard_pin: true,
        ..PutOptions::default()
    };
    let mut stored = 0;
    let refused = loop {
        let key = format!("c{stored}");
        match c.put_bytes(key.as_bytes(), &pattern(30_000, stored), &pinned) {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
        assert!(stored < 100);
    };
    assert_eq!(refused.code(), -1700, "{refused}");
    assert!(refused.to_string().contains("quota"), "{refused}");
    assert!(stored > 25, "{stored}");
    let far = tenant(&pool, "c", FAR);
    let refused = far
        .put_bytes(b"more", &pattern(200_000, 1), &pinned)
        .unwrap_err();
    assert_eq!(refused.code(), -1700, "in two phases too");
    for n in 0..stored {
        assert_eq!(
            c.get(format!("c{n}").as_bytes()).map(Blob),
            Ok(Blob(pattern(30_000, n)))
        );
    }
    let (_, metrics) = request(&pool.address, "GET", "/metrics");
    let value = |series: &str| -> u64 {
        let line = metrics.lines().find(|l| l.starts_with(series));
        let line = line.unwrap_or_else(|| panic!("{series} is missing"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert_eq!(
        value("mooncake_tenant_quota_requested_bytes{tenant_id=\"a\"}"),
        2 << 20
    );
    assert_eq!(value("mooncake_tenant_quota_requested_bytes_sum"), 3 << 20);
    assert_eq!(
        value("mooncake_tenant_quota_explicit_policy{tenant_id=\"c\"}"),
        1
    );
    assert!(value("mooncake_tenant_quota_charged_bytes{tenant_id=\"b\"}") >= 200 * 20_000);
    assert!(value("mooncake_tenant_evict_bytes_total{tenant_id=\"a\"}") > 2 << 20);
    assert!(
        value("mooncake_tenant_quota_reject_total{tenant_id=\"c\",reason=\"quota_exceeded\"}") >= 2
    );
    // Why it failed and why others went is remembered by key.
    let shown = call(&[
        "inspect",
        "key",
        "more",
        "--tenant",
        "c",
        "--master",
        &pool.address,
    ]);
    assert!(
        stdout(&shown).contains("put failed") && stdout(&shown).contains("quota"),
        "{}",
        stdout(&shown)
    );
    let shown = call(&[
        "inspect",
        "key",
        "a0",
        "--tenant",
        "a",
        "--master",
        &pool.address,
    ]);
    assert!(
        stdout(&shown).contains("above its quota"),
        "{}",
        stdout(&shown)
    );
    assert!(
        stdout(&shown).contains("never read in"),
        "{}",
        stdout(&shown)
    );
    // Removed, it is free again.
    c.remove_matching("", true).unwrap();
    assert_eq!(row(&pool, "c")["charged_bytes"], 0);
    put(&c, "again", &pattern(500_000, 1)).unwrap();
}

#[test]
fn quotas_survive_the_master_and_the_latest_word_counts() {
    let mut pool = Pool::start(2, "64MiB", &[]);
    set(&pool, "a", 3 << 20);
    set(&pool, "b", 1 << 20);
    set(&pool, "default", 4 << 20);
    let gone = send(
        &pool.address,
        "DELETE",
        &format!("{QUOTAS}?tenant_id=b"),
        "",
    );
    assert_eq!(gone.0, 200, "{gone:?}");
    let a = tenant(&pool, "a", FAR);
    put(&a, "k", &pattern(400_000, 1)).unwrap();
    pool.restart_master();
    eventually("the nodes are back", Duration::from_secs(10), || {
        let (status, answer) = send(&pool.address, "GET", &format!("{QUOTAS}?tenant_id=a"), "");
        status == 200 && answer["data"]["charged_bytes"].as_u64().unwrap() >= 400_000
    });
    assert_eq!(row(&pool, "a")["requested_quota_bytes"], 3 << 20);
    assert_eq!(row(&pool, "default")["requested_quota_bytes"], 4 << 20);
    assert_eq!(
        send(&pool.address, "GET", &format!("{QUOTAS}?tenant_id=b"), "").0,
        404
    );
    // A node that was away does not bring an old word back, and is told the new one.
    pool.nodes[0].signal("-STOP");
    eventually(
        "the stopped node is missed",
        Duration::from_secs(15),
        || pool.client().segments().unwrap().len() == 1,
    );
    set(&pool, "a", 5 << 20);
    pool.nodes[0].signal("-CONT");
    eventually("it is back", Duration::from_secs(10), || {
        pool.client()
            .segments()
            .unwrap()
            .iter()
            .filter(|s| s.state == "ok")
            .count()
            == 2
    });
    assert_eq!(row(&pool, "a")["requested_quota_bytes"], 5 << 20);
    pool.nodes[1].kill();
    std::thread::sleep(Duration::from_millis(1200));
    pool.restart_master();
    eventually(
        "the first node alone remembers",
        Duration::from_secs(10),
        || {
            let (status, answer) = send(&pool.address, "GET", &format!("{QUOTAS}?tenant_id=a"), "");
            status == 200 && answer["data"]["requested_quota_bytes"] == 5 << 20
        },
    );
}

#[test]
fn quotas_are_checked_and_scaled_and_may_be_required() {
    let pool = Pool::start(1, "64MiB", &["--enable-multi-tenants=true"]);
    let at = &pool.address;
    for (method, path, body, status, code) in [
        (
            "PUT",
            QUOTAS.to_owned(),
            "{\"requested_quota_bytes\":1}",
            400,
            -600,
        ),
        (
            "PUT",
            format!("{QUOTAS}?tenant_id=_a"),
            "{\"requested_quota_bytes\":1}",
            400,
            -600,
        ),
        ("PUT", format!("{QUOTAS}?tenant_id=a"), "", 400, -600),
        (
            "PUT",
            format!("{QUOTAS}?tenant_id=a"),
            "{\"requested_quota_bytes\":0}",
            400,
            -600,
        ),
        (
            "PUT",
            format!("{QUOTAS}?tenant_id=a"),
            "{\"requested_quota_bytes\":9223372036854775808}",
            400,
            -600,
        ),
        (
            "DELETE",
            format!("{QUOTAS}?tenant_id=nobody"),
            "",
            404,
            -704,
        ),
        ("GET", format!("{QUOTAS}?tenant_id=nobody"), "", 404, -704),
    ] {
        eventually("no longer rebuilding", Duration::from_secs(10), || {
            send(at, method, &path, body).0 != 409
        });
        let (got, answer) = send(at, method, &path, body);
        assert_eq!(
            (got, &answer["error_code"]),
            (status, &json!(code)),
            "{method} {path} {body}: {answer}"
        );
    }
    // Nobody without a quota.
    let a = tenant(&pool, "a", NEAR);
    for size in [100, 3_000_000] {
        let refused = put(&a, "k", &pattern(size, 1)).unwrap_err();
        assert_eq!(refused.code(), -1701, "{refused}");
    }
    set(&pool, "a", 1 << 30);
    put(&a, "k", b"value").unwrap();
    // More is promised than there is: each gets its share.
    set(&pool, "b", 1 << 30);
    assert_eq!(row(&pool, "a")["effective_quota_bytes"], 32 << 20);
    let full = send(at, "DELETE", &format!("{QUOTAS}?tenant_id=a"), "");
    assert_eq!((full.0, &full.1["error_code"]), (409, &json!(-1702)));
    a.remove(&[b"k"], true).unwrap();
    let gone = send(at, "DELETE", &format!("{QUOTAS}?tenant_id=a"), "");
    assert_eq!(
        (gone.0, &gone.1["success"]),
        (200, &json!(true)),
        "{gone:?}"
    );
    assert_eq!(put(&a, "k", b"value").unwrap_err().code(), -1701);
}
