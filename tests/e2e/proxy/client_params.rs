//! What clients say of KV: places are refused wherever engines would read them, everything else is passed on as it came.

use super::mock::Dialect;
use super::{Rig, request};
use serde_json::json;

const PATHS: [&str; 4] = [
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
];
/// A field, and where it names a place.
const PLACES: [(&str, &str); 8] = [
    (
        r#""kv_transfer_params":{"do_remote_prefill":true,"remote_host":"evil"}"#,
        "kv_transfer_params.do_remote_prefill",
    ),
    (
        r#""kv_transfer_params":{"lmcache.skip_save":true,"disagg_spec":{"receiver_host":"evil"}}"#,
        "kv_transfer_params.disagg_spec",
    ),
    (
        r#""kv_transfer_params":{"transfer_id":"another's"}"#,
        "kv_transfer_params.transfer_id",
    ),
    (r#""bootstrap_host":"evil""#, "bootstrap_host"),
    (r#""bootstrap_room":[1]"#, "bootstrap_room"),
    (
        r#""vllm_xargs":{"kv_transfer_params":{"remote_port":1}}"#,
        "vllm_xargs.kv_transfer_params.remote_port",
    ),
    (
        r#""request_id":"___prefill_addr_evil:1___decode_addr_evil:2_x""#,
        "request_id",
    ),
    (
        r#""\u0062ootstrap_port":1,"bootstrap_port":null"#,
        "bootstrap_port",
    ),
];

fn body(field: &str) -> String {
    format!(r#"{{"prompt":"a","messages":[],"input":"a",{field}}}"#)
}

fn all_counts(rig: &Rig) -> usize {
    rig.prefill
        .iter()
        .chain(&rig.decode)
        .map(|w| w.count())
        .sum()
}

#[tokio::test]
async fn places_are_refused_by_their_names_whatever_the_connector() {
    for (dialect, prefill, aggregated) in [
        (Dialect::Store, 1, false),
        (Dialect::Store, 0, true),
        (Dialect::Nixl, 1, false),
        (Dialect::Mooncake, 1, false),
        (Dialect::Sglang, 1, false),
        (Dialect::P2p, 1, false),
    ] {
        let rig = Rig::with(dialect, prefill, 1, |c| c.aggregated = aggregated).await;
        for (field, name) in PLACES {
            for path in PATHS {
                let reply = rig.post(path, &body(field)).await;
                assert_eq!(reply.status, 400, "{path} {field}");
                let error = reply.json()["error"].clone();
                assert_eq!(error["param"], name, "{error}");
                assert!(error["message"].as_str().unwrap().contains(name), "{error}");
            }
            // Prompts of a list, and what takes one leg.
            let list = format!(r#"{{"prompt":["a","b"],{field}}}"#);
            assert_eq!(rig.post("/v1/completions", &list).await.status, 400);
            assert_eq!(rig.post("/v1/embeddings", &body(field)).await.status, 400);
            let requests = format!(r#"{{"requests":[{{"input":"a"}},{}]}}"#, body(field));
            assert_eq!(rig.post("/v1/embeddings", &requests).await.status, 400);
            let bare = format!("[{}]", body(field));
            assert_eq!(rig.post("/v1/score", &bare).await.status, 400);
        }
        let text = String::from_utf8(request("/v1/completions", &body(r#""n":1"#))).unwrap();
        for line in [
            "x-request-id: ___prefill_addr_evil:1___decode_addr_evil:2_00",
            "X-Request-ID: cmpl-___decode_addr_evil:2_",
            "x-prefiller-host-port: evil:1",
        ] {
            let text = text.replace("host: x", &format!("host: x\r\n{line}"));
            let reply = rig.raw(text.as_bytes()).await;
            let name = line.split(':').next().unwrap().to_ascii_lowercase();
            assert_eq!(
                (reply.status, reply.json()["error"]["param"].as_str()),
                (400, Some(name.as_str()))
            );
        }
        assert_eq!(all_counts(&rig), 0, "no engine was asked");
        assert_eq!(
            rig.post("/v1/completions", &body(r#""n":1"#)).await.status,
            200
        );
    }
}

#[tokio::test]
async fn a_body_with_two_readings_is_refused_where_it_is_passed_on_unread() {
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    let evil = r#"{"input":"a","bootstrap_host":"evil"}"#;
    let wide: Vec<u8> = evil.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let marked = [b"\xef\xbb\xbf", evil.as_bytes()].concat();
    for body in [wide, marked] {
        for kind in [
            "content-type: application/json",
            "x: y",
            "content-type: a/b+json",
        ] {
            let head = format!(
                "POST /v1/embeddings HTTP/1.1\r\nhost: x\r\n{kind}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            let reply = rig.raw(&[head.as_bytes(), &body].concat()).await;
            assert_eq!(reply.status, 400, "{kind}");
        }
    }
    assert_eq!(all_counts(&rig), 0);
    // What is no JSON goes on as it is.
    let audio = b"--x\r\ncontent-disposition: form-data; name=file\r\n\r\n\0\xff\r\n--x--";
    let head = format!(
        "POST /v1/audio/transcriptions HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        audio.len()
    );
    let reply = rig.raw(&[head.as_bytes(), &audio[..]].concat()).await;
    assert_eq!(reply.status, 200);
    assert_eq!(rig.decode[0].last().raw, audio);
}

#[tokio::test]
async fn what_names_no_place_stays_byte_for_byte() {
    let rig = Rig::new(Dialect::Store, 1, 1).await;
    rig.complete("").await;
    let body = r#"{"prompt":"a", "kv_transfer_params": { "lmcache.skip_save" : true, "lmcache.tag.host":"\u0068", "x":[1.50,{"y":null}] }, "cache_salt":"remote_host","max_tokens":2}"#;
    assert_eq!(rig.post("/v1/completions", body).await.status, 200);
    assert_eq!(rig.decode[0].last().raw, body.as_bytes());
    let raw = String::from_utf8(rig.prefill[0].last().raw).unwrap();
    assert_eq!(raw, body.replace(r#""max_tokens":2"#, r#""max_tokens":1"#));
    assert_eq!(rig.post("/v1/embeddings", body).await.status, 200);
    assert_eq!(rig.decode[0].last().raw, body.as_bytes());
    // Beside what a connector sets.
    for dialect in [Dialect::Nixl, Dialect::Mooncake] {
        let rig = Rig::new(dialect, 1, 1).await;
        assert_eq!(rig.post("/v1/completions", body).await.status, 200);
        for (worker, name) in [
            (&rig.prefill[0], "do_remote_decode"),
            (&rig.decode[0], "do_remote_prefill"),
        ] {
            let params = worker.last().body["kv_transfer_params"].clone();
            assert_eq!(params["lmcache.skip_save"], true, "{params}");
            assert_eq!(params["x"], json!([1.5, {"y": null}]));
            assert_eq!(params[name], true, "{params}");
        }
        rig.settled().await;
    }
}

#[tokio::test]
async fn who_is_trusted_may_name_places() {
    let rig = Rig::with(Dialect::Store, 0, 1, |c| {
        c.aggregated = true;
        c.trust_kv_params = true;
    })
    .await;
    for (field, _) in PLACES {
        let body = body(field);
        assert_eq!(rig.post("/v1/completions", &body).await.status, 200);
        assert_eq!(rig.decode[0].last().raw, body.as_bytes());
    }
    // A connector's own word counts all the same.
    let rig = Rig::with(Dialect::Nixl, 1, 1, |c| c.trust_kv_params = true).await;
    assert_eq!(
        rig.post("/v1/completions", &body(PLACES[0].0)).await.status,
        200
    );
    let p = rig.prefill[0].last().body["kv_transfer_params"].clone();
    assert_eq!(
        (p["do_remote_prefill"].as_bool(), p["remote_host"].is_null()),
        (Some(false), true),
        "{p}"
    );
    let d = rig.decode[0].last().body["kv_transfer_params"].clone();
    assert_eq!(
        d["remote_engine_id"],
        *rig.prefill[0].engine.lock().unwrap()
    );
    rig.settled().await;
}
