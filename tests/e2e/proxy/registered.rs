//! Instances that register themselves: who falls silent, who was taken out, and what is not theirs to change.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::mock::{Dialect, Worker};
use super::publisher::{dealer, send_map};
use super::{Rig, address};
use mooncake::proxy::discover::Discovery;
use tokio::net::{TcpListener, TcpStream};

/// A proxy with a port for registrations, and two workers it has not been told of.
async fn listening() -> (Rig, SocketAddr) {
    let probe = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = probe.local_addr().unwrap();
    drop(probe);
    let rig = Rig::with(Dialect::P2p, 1, 1, |c| {
        c.discover = Discovery::parse_list(&format!("zmq:{at}")).unwrap();
    })
    .await;
    (rig, at)
}

struct Engine {
    socket: TcpStream,
    fields: [(&'static str, String); 3],
}

impl Engine {
    async fn new(at: SocketAddr, kind: &str, worker: &Worker) -> Self {
        let kv = format!("127.0.0.1:{}", worker.bootstrap.load(Ordering::SeqCst));
        Self {
            socket: dealer(at).await,
            fields: [
                ("type", kind.to_owned()),
                ("http_address", worker.address.clone()),
                ("zmq_address", kv),
            ],
        }
    }

    async fn beat(&mut self) {
        let fields: Vec<(&str, &str)> = self.fields.iter().map(|(n, v)| (*n, v.as_str())).collect();
        send_map(&mut self.socket, &fields).await;
    }
}

async fn role(rig: &Rig, worker: &Worker) -> Option<(String, String)> {
    let list = rig.get("/instances").await.json();
    let all = list["instances"].as_array().unwrap().clone();
    let found = all.iter().find(|i| i["instance"] == *worker.address)?;
    let text = |name: &str| found[name].as_str().unwrap().to_owned();
    Some((text("role"), text("origin")))
}

fn is(role: Option<(String, String)>, wanted: (&str, &str)) -> bool {
    role.is_some_and(|(r, o)| (r.as_str(), o.as_str()) == wanted)
}

#[tokio::test]
async fn who_was_taken_out_stays_out_and_who_falls_silent_has_gone() {
    let (rig, at) = listening().await;
    let new = Worker::start(&rig.world, Dialect::P2p).await;
    let mut engine = Engine::new(at, "D", &new).await;
    engine.beat().await;
    let registered = ("decode", "registered");
    rig.until("registered", async || {
        is(role(&rig, &new).await, registered)
    })
    .await;
    // Taken out: the next heartbeats do not bring it back.
    let body = format!(r#"{{"instance":"{}"}}"#, new.address);
    assert_eq!(rig.post("/instances/remove", &body).await.status, 200);
    for _ in 0..5 {
        engine.beat().await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(role(&rig, &new).await, None);
    }
    // Restarted with another KV port it is another.
    new.bootstrap.store(29_999, Ordering::SeqCst);
    let mut engine = Engine::new(at, "D", &new).await;
    engine.beat().await;
    rig.until("registered anew", async || {
        is(role(&rig, &new).await, registered)
    })
    .await;
    // Silent for 10 s: gone; and heard again: there again.
    let heard = Instant::now();
    while role(&rig, &new).await.is_some() {
        assert!(heard.elapsed() < Duration::from_secs(15));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(heard.elapsed() > Duration::from_secs(9));
    engine.beat().await;
    rig.until("heard again", async || {
        is(role(&rig, &new).await, registered)
    })
    .await;
    // Who is named is not theirs: neither its role nor its end.
    let named = &rig.prefill[0];
    let mut other = Engine::new(at, "D", named).await;
    other.beat().await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(is(role(&rig, named).await, ("prefill", "named")));
}

/// A reload says what the files say, and only where they say something else than before.
#[tokio::test]
async fn a_reload_widens_no_role() {
    let (rig, at) = listening().await;
    let (p, d) = (
        address(&rig.prefill[0].spec()),
        address(&rig.decode[0].spec()),
    );
    let new = Worker::start(&rig.world, Dialect::P2p).await;
    let mut engine = Engine::new(at, "D", &new).await;
    engine.beat().await;
    let registered = ("decode", "registered");
    rig.until("registered", async || {
        is(role(&rig, &new).await, registered)
    })
    .await;
    // The files name it for the other role: it stays what it registered as.
    let n = address(&new.spec());
    rig.proxy
        .reload(&[p.clone(), n.clone()], std::slice::from_ref(&d));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(is(role(&rig, &new).await, registered));
    // A role that was changed while it ran survives a file that says what it said.
    let body = format!(
        r#"{{"instance":"{}","role":"both"}}"#,
        rig.prefill[0].address
    );
    assert_eq!(rig.post("/instances/role", &body).await.status, 200);
    let body = body.replace("both", "decode");
    assert_eq!(rig.post("/instances/role", &body).await.status, 200);
    rig.proxy
        .reload(std::slice::from_ref(&p), std::slice::from_ref(&d));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(is(role(&rig, &rig.prefill[0]).await, ("decode", "named")));
    // A file that says something else is followed.
    rig.proxy
        .reload(std::slice::from_ref(&p), &[p.clone(), d.clone()]);
    rig.until("both", async || {
        is(role(&rig, &rig.prefill[0]).await, ("both", "named"))
    })
    .await;
    rig.proxy
        .reload(std::slice::from_ref(&p), std::slice::from_ref(&d));
    rig.until("prefill again", async || {
        is(role(&rig, &rig.prefill[0]).await, ("prefill", "named"))
    })
    .await;
    // Named and registered: when it falls silent it is the files'.
    rig.proxy.reload(&[p, n], &[d]);
    let begun = Instant::now();
    while !is(role(&rig, &new).await, ("prefill", "named")) {
        assert!(begun.elapsed() < Duration::from_secs(15));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
