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
