//! One node's session: registration with its directory, then heartbeats and acknowledgements one way, drops and
//! reconciliations the other. What they mean is the state's business.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tonic::{Status, Streaming};

use super::Master;
use super::object::Attributes;
use super::puts::Written;
use super::rebuild::{Registration, Reported};
use super::segments::{NodePhase, NodeState, Offer};
use crate::base::clock::Millis;
use crate::store::wire::{self, master_message::Kind as Out, node_message::Kind as In};

/// How often a node is to say that it lives.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Bound on the silence between messages of a registration.
const REGISTRATION_SILENCE: Duration = Duration::from_secs(10);
/// Write grants live for 600 s: those that expire within this were issued until now. One issued later in this very
/// millisecond may be refused too: its writer then takes another range.
const FENCED_GRANTS_MS: u64 = 600_000 + 1;
/// Segments of one node.
const SEGMENTS_MAX: usize = 64;

type Outbox = mpsc::Sender<Result<wire::MasterMessage, Status>>;

async fn send(outbox: &Outbox, kind: Out) -> bool {
    let message = wire::MasterMessage { kind: Some(kind) };
    outbox.send(Ok(message)).await.is_ok()
}

/// Runs a session to its end.
pub(crate) async fn serve(
    master: Arc<Master>,
    mut inbox: Streaming<wire::NodeMessage>,
    outbox: Outbox,
) {
    let first = tokio::time::timeout(REGISTRATION_SILENCE, inbox.message()).await;
    let Ok(Ok(Some(wire::NodeMessage {
        kind: Some(In::Register(register)),
    }))) = first
    else {
        return;
    };
    let offers = match check(&register) {
        Ok(offers) => offers,
        Err(reason) => {
            tracing::warn!(node = %register.name, %reason, "registration refused");
            let refusal = wire::Refusal { code: -600, reason };
            send(&outbox, Out::Refused(refusal)).await;
            return;
        }
    };
    let id = wire::id(register.node_high, register.node_low);
    master.state.raise_term_for(id, register.last_term);
    let registration = master.state.register(
        id,
        &register.name,
        &register.address,
        &register.host_id,
        &register.shm_socket,
        &offers,
        Millis::now(),
    );
    let node = registration.node.clone();
    if !register.build.is_empty() {
        let _ = node.build.set(register.build.chars().take(64).collect());
    }
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let session = NEXT.fetch_add(1, Ordering::Relaxed);
    let woken = Arc::new(Notify::new());
    let waker = woken.clone();
    node.attach(session, Box::new(move || waker.notify_one()));
    let welcome = wire::Welcome {
        term: master.state.term(),
        heartbeat_ms: HEARTBEAT.as_millis() as u32,
        client_ttl_ms: master.state.config.client_ttl.as_millis() as u32,
    };
    if send(&outbox, Out::Welcome(welcome)).await
        && directory(&master, registration, &mut inbox).await
    {
        tracing::info!(node = %node.name, address = %node.address, "node in service");
        if send(&outbox, Out::Ready(wire::Ready {})).await {
            in_service(&master, &node, session, &mut inbox, &outbox, &woken).await;
        }
    }
    if node.detach(session) {
        master.state.lost(&node);
        if node.phase() == NodePhase::Lost {
            tracing::info!(node = %node.name, "node session ended");
        }
    }
}

fn check(register: &wire::Register) -> Result<Vec<Offer>, String> {
    if register.protocol_version != wire::SESSION_VERSION {
        return Err(format!(
            "the node speaks session version {}, this master {}: use the same release on both",
            register.protocol_version,
            wire::SESSION_VERSION
        ));
    }
    if register.segments.is_empty() || register.segments.len() > SEGMENTS_MAX {
        return Err(format!("a node has 1 to {SEGMENTS_MAX} segments"));
    }
    let offer = |s: &wire::SegmentOffer| {
        if s.size_bytes < 1024 || s.size_bytes > 1 << 50 {
            return Err("a segment has 1 KiB to 1 PiB".to_owned());
        }
        Ok(Offer {
            incarnation: s.incarnation,
            name: s.name.clone(),
            size: s.size_bytes,
            page_kind: s.page_kind.clone(),
        })
    };
    register.segments.iter().map(offer).collect()
}

/// Indexes the directory; false when the session broke before its end.
async fn directory(
    master: &Arc<Master>,
    mut registration: Registration,
    inbox: &mut Streaming<wire::NodeMessage>,
) -> bool {
    let node = registration.node.clone();
    loop {
        let message = tokio::time::timeout(REGISTRATION_SILENCE, inbox.message()).await;
        let Ok(Ok(Some(wire::NodeMessage { kind: Some(kind) }))) = message else {
            master.state.registration_failed(&node);
            return false;
        };
        let now = Millis::now();
        node.last_seen.store(now.0, Ordering::Relaxed);
        match kind {
            In::Directory(chunk) => {
                // Thousands of insertions: leave the runtime's other tasks to another thread meanwhile.
                tokio::task::block_in_place(|| {
                    for entry in chunk.entries {
                        master.state.adopt(&mut registration, reported(entry), now);
                    }
                });
            }
            In::DirectoryEnd(end) => {
                let in_service =
                    tokio::task::block_in_place(|| master.state.registered(registration));
                tracing::info!(node = %node.name, entries = end.entries, "directory indexed");
                return in_service;
            }
            _ => {}
        }
    }
}

fn reported(entry: wire::DirectoryEntry) -> Reported {
    let client = wire::id(entry.client_high, entry.client_low);
    Reported {
        key: entry.key.as_ref().into(),
        node_segment: entry.segment,
        offset: entry.offset,
        size: entry.size_bytes,
        written: Written {
            version: entry.version,
            checksum: entry.has_checksum.then_some(entry.checksum),
        },
        attributes: Attributes {
            hard_pin: entry.hard_pin,
            soft_pin_ttl_ms: entry.soft_pin_ttl_ms,
            group: entry.group,
            data_type: entry.data_type as u8,
            replicas: 0,
        },
        pending: entry.pending.then_some(client),
        arena_versions: entry.arena_versions,
    }
}

async fn in_service(
    master: &Arc<Master>,
    node: &Arc<NodeState>,
    session: u64,
    inbox: &mut Streaming<wire::NodeMessage>,
    outbox: &Outbox,
    woken: &Notify,
) {
    let mut drain_deadline = None;
    let mut tick = tokio::time::interval(Duration::from_millis(100));
    loop {
        if !flush(master, node, session, outbox).await {
            return;
        }
        tokio::select! {
            message = inbox.message() => {
                let Ok(Some(wire::NodeMessage { kind: Some(kind) })) = message else { return };
                if !node.is_current(session) {
                    return;
                }
                let now = Millis::now();
                node.last_seen.store(now.0, Ordering::Relaxed);
                match kind {
                    In::DropAck(ack) => master.state.drops_acked(node, ack.sequence),
                    In::ProbeReport(report) => master.mesh.report(node.id, report),
                    In::ReconcileReport(r) => {
                        tokio::task::block_in_place(|| {
                            master.state.reconciled(r.sequence, r.busy, &r.missing, now);
                        });
                    }
                    In::Heartbeat(beat) => {
                        master.state.counters.pings.fetch_add(1, Ordering::Relaxed);
                        *node.served.lock() = beat;
                        if !send(outbox, Out::HeartbeatAck(wire::HeartbeatAck {})).await {
                            return;
                        }
                    }
                    In::Drain(_) => {
                        tracing::info!(node = %node.name, "node drains");
                        node.set_phase(NodePhase::Draining);
                        master.state.segments.changed();
                        drain_deadline = Some(now.plus(Duration::from_secs(2)));
                    }
                    _ => {}
                }
            }
            () = woken.notified() => {}
            _ = tick.tick() => {}
        }
        let drained = drain_deadline
            .is_some_and(|deadline| Millis::now() >= deadline || !master.state.writing_to(node));
        if drained {
            tokio::task::block_in_place(|| master.state.unmount(node, Millis::now()));
        }
        if node.phase() == NodePhase::Gone {
            send(outbox, Out::Unmounted(wire::Unmounted {})).await;
            return;
        }
    }
}

/// Sends queued drops and reconciliations.
async fn flush(master: &Master, node: &NodeState, session: u64, outbox: &Outbox) -> bool {
    loop {
        let Ok(batch) = node.take_drops(session) else {
            return false;
        };
        let Some((sequence, drops)) = batch else {
            break;
        };
        let items = drops
            .into_iter()
            .map(|d| wire::DropItem {
                segment: d.node_segment,
                offset: d.offset,
                version: d.version,
            })
            .collect();
        if !send(outbox, Out::Drop(wire::Drop { sequence, items })).await {
            return false;
        }
    }
    for probe in master.mesh.due(node.id) {
        if !send(outbox, Out::Probe(probe)).await {
            return false;
        }
    }
    let due = std::mem::take(&mut *node.reconciles.lock());
    for sequence in due {
        let job = master.state.reconciles.lock().get(&sequence).cloned();
        let Some(job) = job else { continue };
        let kept = tokio::task::block_in_place(|| master.state.kept(&job));
        let Some((versions, keep)) = kept else {
            // With the next tick.
            node.reconciles.lock().push(sequence);
            continue;
        };
        let message = wire::Reconcile {
            sequence,
            segment: job.node_segment,
            offset: job.offset,
            length_bytes: job.length,
            client_high: job.client.high,
            client_low: job.client.low,
            keep,
            version_from: versions.start,
            version_to: versions.end,
            fence_expires_unix_ms: crate::base::clock::unix_ms() + FENCED_GRANTS_MS,
        };
        if !send(outbox, Out::Reconcile(message)).await {
            return false;
        }
    }
    true
}
