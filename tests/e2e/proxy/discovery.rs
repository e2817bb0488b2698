//! Instances that come from a file or a name.

use super::Rig;
use super::mock::{Dialect, Worker};
use mooncake::proxy::config::Role;
use mooncake::proxy::discover::Discovery;

#[tokio::test]
async fn instances_come_and_go_with_a_file_and_a_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("instances.json");
    let other = Rig::new(Dialect::Store, 1, 1).await;
    let named = Worker::start(&other.world, Dialect::Store).await;
    let port = named.address.rsplit(':').next().unwrap().parse().unwrap();
    let list = |decode: &str| {
        format!(
            r#"{{"prefill":["{}"],"decode":[{decode}]}}"#,
            other.prefill[0].address
        )
    };
    std::fs::write(&path, list(&format!("\"{}\"", other.decode[0].address))).unwrap();
    // Ready without a single instance of its own.
    let rig = Rig::with(Dialect::Store, 0, 0, |c| {
        c.discover = vec![
            Discovery::File(path.clone()),
            Discovery::Dns {
                role: Role::Decode,
                name: "127.0.0.1".to_owned(),
                port,
            },
        ];
    })
    .await;
    rig.until("both decode instances work", async || {
        assert_eq!(rig.complete("").await.status, 200);
        other.decode[0].count() > 0 && named.count() > 0
    })
    .await;
    // A file that cannot be read takes nobody away; one that names fewer does.
    std::fs::write(&path, "{").unwrap();
    tokio::time::sleep(std::time::Duration::from_secs(6)).await;
    assert_eq!(rig.get("/status").await.json()["decode_node_count"], 2);
    std::fs::write(&path, list("")).unwrap();
    rig.until("gone", async || {
        rig.get("/status").await.json()["decode_node_count"] == 1
    })
    .await;
    assert_eq!(rig.complete("").await.status, 200);
}

/// What an administrator has changed is not undone by the next look.
#[tokio::test]
async fn looking_again_undoes_no_role_and_no_removal() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("instances.json");
    let other = Rig::new(Dialect::Store, 2, 2).await;
    let names = |workers: &[std::sync::Arc<Worker>]| {
        let all: Vec<_> = workers.iter().map(|w| w.address.clone()).collect();
        serde_json::json!(all)
    };
    let list = |decode: serde_json::Value| {
        serde_json::json!({"prefill": names(&other.prefill), "decode": decode}).to_string()
    };
    std::fs::write(&path, list(names(&other.decode))).unwrap();
    let rig = Rig::with(Dialect::Store, 0, 0, |c| {
        c.discover = vec![Discovery::File(path.clone())];
    })
    .await;
    let counts = async || {
        let status = rig.get("/status").await.json();
        let count = |name: &str| status[name].as_u64().unwrap();
        (count("prefill_node_count"), count("decode_node_count"))
    };
    rig.until("discovered", async || counts().await == (2, 2))
        .await;
    let moved = format!(
        r#"{{"instance":"{}","role":"decode"}}"#,
        other.prefill[1].address
    );
    assert_eq!(rig.post("/instances/role", &moved).await.status, 200);
    let taken = format!(r#"{{"instance":"{}"}}"#, other.decode[1].address);
    assert_eq!(rig.post("/instances/remove", &taken).await.status, 200);
    assert_eq!(counts().await, (1, 2));
    tokio::time::sleep(std::time::Duration::from_secs(6)).await;
    assert_eq!(counts().await, (1, 2));
    // Named no longer and named again, it is there again.
    std::fs::write(&path, list(names(&other.decode[..1]))).unwrap();
    tokio::time::sleep(std::time::Duration::from_secs(6)).await;
    std::fs::write(&path, list(names(&other.decode))).unwrap();
    rig.until("named again", async || counts().await == (1, 3))
        .await;
}
