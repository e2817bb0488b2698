//! The node's side of its session with a master: register, stream the directory, beat, drop what is asked.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Streaming};

use super::{NodePhase, Shared};
use crate::base::histogram::Histogram;
use crate::base::net::{join_host_port, split_host_port};
use crate::base::trace::{Kind, Span};
use crate::engine::host::RangeFence;
use crate::engine::transport::server::WAYS;
use crate::store::wire::{
    self, BATCH_BYTES_MAX, MasterMessage, NodeMessage, master_message::Kind as In,
    node_message::Kind as Out, pool_client::PoolClient,
};

/// Pause before trying a master again. Short: a restarted master answers nothing about us until we are back.
const RETRY: Duration = Duration::from_millis(150);
/// How long writes that are fenced off may take to end; then it is tried again.
const FENCE_PATIENCE: Duration = Duration::from_secs(5);
/// How long a node that leaves waits for a master that is being restarted.
const MASTER_PATIENCE: Duration = Duration::from_secs(5);
/// Entries of one directory message.
const PAGE: usize = 4096;

/// Keeps a session with the master until told to stop.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut failures = 0u32;
    loop {
        match session(&shared).await {
            Ok(()) => failures = 0,
            Err(reason) => {
                failures += 1;
                // Once, and then now and then: a master that is down for an hour is not 24,000 lines.
                if failures == 1 || failures.is_multiple_of(200) {
                    tracing::warn!(master = %shared.config.master, %reason, failures, "no session with the master; trying on");
                }
            }
        }
        if shared.phase() == NodePhase::Unmounted {
            return;
        }
        let moves_until = *shared.moves_until.lock();
        if shared.phase() == NodePhase::Draining && !may_wait(&shared, moves_until) {
            // Nobody to take leave of.
            shared.set_phase(NodePhase::Unmounted);
            return;
        }
        shared.set_phase(NodePhase::Connecting);
        // A master that comes back in time is asked again.
        if moves_until.is_some() {
            shared.drain.notify_one();
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Whether a node that leaves tries once more to find its master: as long as it has something to move, for a short time.
fn may_wait(shared: &Shared, moves_until: Option<Instant>) -> bool {
    let now = Instant::now();
    let left_at = *shared.last_session.lock();
    let soon = left_at.is_some_and(|at| now < at + MASTER_PATIENCE);
    soon && moves_until.is_some_and(|until| now < until) && !shared.directory.is_empty()
}

async fn connect(shared: &Shared) -> Result<PoolClient<Channel>, String> {
    let (host, port) = split_host_port(&shared.config.master, 50051)?;
    let channel = Endpoint::from_shared(format!("http://{}", join_host_port(&host, port)))
        .map_err(|e| e.to_string())?
        .connect_timeout(Duration::from_secs(1))
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(2))
        .keep_alive_timeout(Duration::from_secs(4))
        .keep_alive_while_idle(true)
        .connect()
        .await
        .map_err(|e| chain(&e))?;
    Ok(PoolClient::new(channel)
        .max_decoding_message_size(BATCH_BYTES_MAX)
        .max_encoding_message_size(BATCH_BYTES_MAX))
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

async fn session(shared: &Arc<Shared>) -> Result<(), String> {
    let mut client = connect(shared).await?;
    let (out, receiver) = mpsc::channel(64);
    send(&out, Out::Register(shared.registration())).await?;
    let mut request = Request::new(ReceiverStream::new(receiver));
    if let Some(token) = &shared.config.token {
        let value = token
            .bearer()
            .parse()
            .map_err(|_| "the token is not printable ASCII")?;
        request.metadata_mut().insert("authorization", value);
    }
    let mut inbox = client
        .node_session(request)
        .await
        .map_err(|status| status.message().to_owned())?
        .into_inner();
    let welcome = match next(&mut inbox).await? {
        In::Welcome(welcome) => welcome,
        In::Refused(refusal) => return Err(format!("refused: {}", refusal.reason)),
        _ => return Err("the master did not welcome this node".to_owned()),
    };
    let last = shared.term.load(Ordering::Acquire);
    if welcome.term < last {
        return Err(format!(
            "an old master (term {}) after term {last}",
            welcome.term
        ));
    }
    // Writes that an earlier master granted end here: the new one may give their ranges to others.
    let host = shared.host.clone();
    let fenced = tokio::task::block_in_place(|| {
        host.fence_writes(welcome.term, Instant::now() + FENCE_PATIENCE)
    });
    if !fenced {
        return Err("writes granted by an earlier master are still under way".to_owned());
    }
    shared.directory.seal_before(welcome.term);
    shared.term.store(welcome.term, Ordering::Release);
    stream_directory(shared, &out).await?;
    serve(
        shared,
        &mut inbox,
        &out,
        Duration::from_millis(u64::from(welcome.heartbeat_ms)),
    )
    .await
}

async fn next(inbox: &mut Streaming<MasterMessage>) -> Result<In, String> {
    match inbox.message().await {
        Ok(Some(MasterMessage { kind: Some(kind) })) => Ok(kind),
        Ok(_) => Err("the master closed the session".to_owned()),
        Err(status) => Err(status.message().to_owned()),
    }
}

async fn send(out: &mpsc::Sender<NodeMessage>, kind: Out) -> Result<(), String> {
    out.send(NodeMessage { kind: Some(kind) })
        .await
        .map_err(|_| "the session ended".to_owned())
}

async fn stream_directory(shared: &Shared, out: &mpsc::Sender<NodeMessage>) -> Result<(), String> {
    let mut total = 0;
    for segment in shared.host.segments() {
        let unaccounted = tokio::task::block_in_place(|| shared.directory.gather(segment.index));
        if !unaccounted.is_empty() {
            let entries = unaccounted;
            send(out, Out::Directory(wire::DirectoryChunk { entries })).await?;
        }
        let mut from = Some(0);
        while let Some(at) = from {
            let (entries, next) =
                tokio::task::block_in_place(|| shared.directory.page(segment.index, at, PAGE));
            total += entries.len() as u64;
            if !entries.is_empty() {
                send(out, Out::Directory(wire::DirectoryChunk { entries })).await?;
            }
            from = next;
        }
    }
    send(
        out,
        Out::DirectoryEnd(wire::DirectoryEnd { entries: total }),
    )
    .await
}

async fn serve(
    shared: &Arc<Shared>,
    inbox: &mut Streaming<MasterMessage>,
    out: &mpsc::Sender<NodeMessage>,
    heartbeat: Duration,
) -> Result<(), String> {
    let mut beat = tokio::time::interval(heartbeat.max(Duration::from_millis(50)));
    let (mut ready, mut drain_sent) = (false, false);
    loop {
        *shared.last_session.lock() = Some(Instant::now());
        let message = tokio::select! {
            message = next(inbox) => message?,
            _ = beat.tick() => {
                send(out, Out::Heartbeat(beat_of(shared))).await?;
                continue;
            }
            () = shared.drain.notified(), if ready && !drain_sent => {
                drain_sent = true;
                let until = *shared.moves_until.lock();
                let left = until.map(|u| u.saturating_duration_since(Instant::now()));
                let move_ms = left.map_or(0, |l| l.as_millis() as u64);
                send(out, Out::Drain(wire::Drain { move_ms })).await?;
                continue;
            }
        };
        match message {
            In::Ready(_) => {
                ready = true;
                shared.set_phase(NodePhase::InService);
            }
            In::Quotas(table) => {
                let version = table.version;
                *shared.quotas.lock() = Some(table);
                let kept = wire::QuotaTable {
                    version,
                    tenants: Vec::new(),
                };
                send(out, Out::Quotas(kept)).await?;
            }
            In::Drains(table) => {
                let version = table.version;
                *shared.drains.lock() = Some(table);
                let kept = wire::DrainTable {
                    version,
                    jobs: Vec::new(),
                };
                send(out, Out::Drains(kept)).await?;
            }
            In::Copy(copy) => super::mover::start(shared, copy, out),
            In::Drop(drop) => {
                tokio::task::block_in_place(|| {
                    let mut span = Span::of("drop", Kind::Server, &drop.traceparent);
                    span.note("objects", drop.items.len() as u64);
                    for item in &drop.items {
                        shared
                            .directory
                            .drop_object(item.segment, item.offset, item.version);
                    }
                });
                let sequence = drop.sequence;
                send(out, Out::DropAck(wire::DropAck { sequence })).await?;
            }
            In::Reconcile(r) => {
                let report = tokio::task::block_in_place(|| reconcile(shared, &r));
                send(out, Out::ReconcileReport(report)).await?;
            }
            In::Probe(probe) => super::probe::start(shared, probe, out),
            In::Unmounted(farewell) => {
                if drain_sent {
                    *shared.farewell.lock() = Some(farewell);
                    shared.set_phase(NodePhase::Unmounted);
                }
                return Ok(());
            }
            _ => {}
        }
    }
}

/// A sign of life, with what the data lanes have done.
fn beat_of(shared: &Shared) -> wire::Heartbeat {
    let counters = shared.serving.counters();
    let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
    let times = |operation: &str, of: &[Histogram; 3]| {
        let one = |(histogram, transport): (&Histogram, &str)| {
            let now = histogram.now();
            (now.count() > 0).then(|| wire::ServedTimes {
                transport: transport.to_owned(),
                operation: operation.to_owned(),
                counts: now.counts,
                sum_ns: now.sum,
            })
        };
        of.iter().zip(WAYS).filter_map(one).collect::<Vec<_>>()
    };
    let bytes = |operation: &str, of: &[AtomicU64; 3]| {
        let one = |(bytes, transport): (&AtomicU64, &str)| {
            (load(bytes) > 0).then(|| wire::ServedBytes {
                transport: transport.to_owned(),
                operation: operation.to_owned(),
                bytes: load(bytes),
            })
        };
        of.iter().zip(WAYS).filter_map(one).collect::<Vec<_>>()
    };
    let mut all = times("read", &counters.reads);
    all.extend(times("write", &counters.writes));
    let mut ways = bytes("read", &counters.way_read_bytes);
    ways.extend(bytes("write", &counters.way_written_bytes));
    wire::Heartbeat {
        read_bytes: load(&counters.read_bytes),
        written_bytes: load(&counters.written_bytes),
        refused: load(&counters.refused),
        lanes_refused: load(&counters.lanes_refused),
        lanes: shared.serving.server().lanes() as u64,
        times: all,
        bytes: ways,
    }
}

/// Takes a range from its writer: late writes are refused, those under way have ended, nobody has it mapped. Only then is
/// it settled.
fn reconcile(shared: &Shared, r: &wire::Reconcile) -> wire::ReconcileReport {
    let client = wire::id(r.client_high, r.client_low);
    let fence = RangeFence {
        segment: r.segment,
        offset: r.offset,
        length: r.length_bytes,
        expires_before_unix_ms: r.fence_expires_unix_ms,
    };
    let ended = shared
        .host
        .fence_range(fence, Instant::now() + Duration::from_millis(200));
    let busy = !ended
        || shared
            .directory
            .may_write(client, r.segment, r.offset, r.length_bytes);
    let missing = if busy {
        Vec::new()
    } else {
        shared.directory.settle(r)
    };
    wire::ReconcileReport {
        sequence: r.sequence,
        busy,
        missing,
    }
}
