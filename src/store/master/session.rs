//! One node's session: registration with its directory, then heartbeats and acknowledgements one way, drops and
//! reconciliations the other. What they mean is the state's business.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tonic::{Status, Streaming};

use super::Master;
use super::copies::{Copied, Copy};
use super::drain::JobStatus;
use super::drain_record::KeptJob;
use super::object::Attributes;
use super::puts::Written;
use super::quotas::{Policies, Policy};
use super::rebuild::{Registration, Reported};
use super::segments::{NodePhase, NodeState, Offer};
use crate::base::clock::Millis;
use crate::base::id::Id128;
use crate::engine::grant::{Access, Grant};
use crate::store::model::header::footprint;
use crate::store::wire::{self, master_message::Kind as Out, node_message::Kind as In};

/// How often a node is to say that it lives.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Bound on the silence between messages of a registration.
const REGISTRATION_SILENCE: Duration = Duration::from_secs(10);
/// Write grants live for 600 s: those that expire within this were issued until now. One issued later in this very
/// millisecond may be refused too: its writer then takes another range.
const FENCED_GRANTS_MS: u64 = 600_000 + 1;
/// A write grant of a copy lives as long as any.
const COPY_GRANT: Duration = Duration::from_secs(600);
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
    let (name, address) = (&register.name, &register.address);
    if let Some(reason) = master.state.name_taken(id, name, address, &offers) {
        tracing::warn!(node = %register.name, address = %register.address, %reason, "registration refused");
        let refusal = wire::Refusal { code: -102, reason };
        send(&outbox, Out::Refused(refusal)).await;
        return;
    }
    master.state.raise_term_for(id, register.last_term);
    let registration = master.state.register(
        id,
        &register.name,
        &register.address,
        &register.host_id,
        &register.shm_socket,
        register.port,
        &offers,
        Millis::now(),
    );
    let node = registration.node.clone();
    node.copier.store(register.copies, Ordering::Release);
    node.commits.store(register.commits, Ordering::Release);
    // What it keeps may be later than what is known here, or earlier: it is sent the whole.
    let told = register.quotas.map(|q| q.tenants).unwrap_or_default();
    if master.state.quotas.merge(told.into_iter().map(policy)) {
        master.state.segments.nodes().iter().for_each(|n| n.wake());
    }
    node.quotas_sent.store(0, Ordering::Release);
    let told = register.drains.map(|d| d.jobs).unwrap_or_default();
    let told = told.into_iter().filter_map(kept_job).collect();
    tokio::task::block_in_place(|| master.state.merge_jobs(told, Millis::now()));
    node.drains_sent.store(0, Ordering::Release);
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
        master.state.lost(&node, Millis::now());
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
            replicas: entry.replicas_wanted.min(u32::from(u8::MAX)) as u8,
        },
        pending: entry.pending.then_some(client),
        arena_versions: entry.arena_versions,
    }
}

/// Copies from this node to another, with a grant for each.
fn copy_message(master: &Master, sequence: u64) -> Option<wire::Copy> {
    let batch = master.state.copies.batch(sequence);
    let target = batch.first()?.target().node.clone();
    let expires_unix_ms = crate::base::clock::unix_ms() + COPY_GRANT.as_millis() as u64;
    let item = |copy: &Arc<Copy>| {
        let segment = copy.target();
        let source = master.state.segments.get(copy.from.segment)?;
        let grant = Grant {
            segment: segment.node_segment,
            incarnation: segment.incarnation,
            offset: copy.to.offset,
            length: footprint(copy.size)?,
            term: master.state.term(),
            expires_unix_ms,
            mac: [0; 16],
        }
        .signed(Access::Write, &master.keys);
        Some(wire::CopyItem {
            segment: source.node_segment,
            offset: copy.from.offset,
            size_bytes: copy.size,
            version: copy.version,
            target_segment: segment.node_segment,
            target: Some(wire::ReplicaLocation::from_grant(segment.slot, &grant)),
        })
    };
    let items: Option<Vec<wire::CopyItem>> = batch.iter().map(item).collect();
    let left = batch.iter().map(|c| c.expires.since(Millis::now())).min()?;
    Some(wire::Copy {
        sequence,
        node_high: target.id.high,
        node_low: target.id.low,
        node: target.name.clone(),
        address: target.address.clone(),
        items: items?,
        patience_ms: u32::try_from(left).unwrap_or(u32::MAX),
    })
}

async fn in_service(
    master: &Arc<Master>,
    node: &Arc<NodeState>,
    session: u64,
    inbox: &mut Streaming<wire::NodeMessage>,
    outbox: &Outbox,
    woken: &Notify,
) {
    let mut leaving: Option<Leaving> = None;
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
                    In::CopyReport(report) => {
                        let outcomes: Vec<Copied> = report.outcomes.iter().map(outcome).collect();
                        tokio::task::block_in_place(|| {
                            master.state.copies_reported(report.sequence, &outcomes, now);
                        });
                    }
                    In::Quotas(table) => node.quotas_kept.store(table.version, Ordering::Release),
                    In::Drains(table) => node.drains_kept.store(table.version, Ordering::Release),
                    In::Drain(drain) if leaving.is_none() => {
                        tracing::info!(node = %node.name, move_ms = drain.move_ms, "node leaves");
                        leaving = Some(Leaving::begin(master, node, drain.move_ms, now));
                    }
                    _ => {}
                }
            }
            () = woken.notified() => {}
            _ = tick.tick() => {}
        }
        let mut unmounted = wire::Unmounted::default();
        if let Some(leaving) = &mut leaving
            && leaving.may_go(master, node, Millis::now())
        {
            unmounted = tokio::task::block_in_place(|| leaving.unmount(master, node));
        }
        if node.phase() == NodePhase::Gone {
            send(outbox, Out::Unmounted(unmounted)).await;
            return;
        }
    }
}

fn policy(told: wire::TenantQuota) -> (String, Policy) {
    let policy = Policy {
        version: told.version,
        quota_bytes: told.quota_bytes,
    };
    (told.tenant, policy)
}

fn table(policies: &Policies) -> wire::QuotaTable {
    let tenants = policies
        .tenants
        .iter()
        .map(|(tenant, p)| wire::TenantQuota {
            tenant: tenant.clone(),
            quota_bytes: p.quota_bytes,
            version: p.version,
        });
    wire::QuotaTable {
        version: policies.version,
        tenants: tenants.collect(),
    }
}

fn kept_job(told: wire::DrainJob) -> Option<KeptJob> {
    let segments = told.segments.into_iter();
    Some(KeptJob {
        id: wire::id(told.id_high, told.id_low),
        version: told.version,
        status: JobStatus::from_number(told.status)?,
        segments: segments.map(|s| (s.incarnation, s.name)).collect(),
        targets: told.targets,
        concurrency: told.max_concurrency as usize,
        created_unix_ms: told.created_unix_ms,
        updated_unix_ms: told.updated_unix_ms,
        message: told.message,
        succeeded: told.succeeded,
        failed: told.failed,
        moved_bytes: told.moved_bytes,
    })
}

fn told_job(job: KeptJob) -> wire::DrainJob {
    let segments = job.segments.into_iter();
    let segments = segments.map(|(incarnation, name)| wire::DrainSegment { incarnation, name });
    wire::DrainJob {
        id_high: job.id.high,
        id_low: job.id.low,
        version: job.version,
        status: job.status as u32,
        segments: segments.collect(),
        targets: job.targets,
        max_concurrency: job.concurrency as u32,
        created_unix_ms: job.created_unix_ms,
        updated_unix_ms: job.updated_unix_ms,
        message: job.message,
        succeeded: job.succeeded,
        failed: job.failed,
        moved_bytes: job.moved_bytes,
    }
}

fn outcome(byte: &u8) -> Copied {
    match byte {
        0 => Copied::Done,
        1 => Copied::NotThere,
        2 => Copied::Refused,
        3 => Copied::Busy,
        _ => Copied::Unsure,
    }
}

/// A node that takes leave: first what lies only there is moved, then puts under way end.
struct Leaving {
    job: Option<Id128>,
    /// Once nothing more is moved: how long puts may take.
    until: Option<Millis>,
}

/// How long puts to a node that leaves may take to end.
const LAST_PUTS: Duration = Duration::from_secs(2);

impl Leaving {
    fn begin(master: &Master, node: &Arc<NodeState>, move_ms: u64, now: Millis) -> Self {
        node.set_phase(NodePhase::Draining);
        master.state.segments.changed();
        let until = now.plus(Duration::from_millis(move_ms.min(MOVE_MS_MAX)));
        let state = &master.state;
        let job =
            (move_ms > 0).then(|| tokio::task::block_in_place(|| state.leave(node, until, now)));
        Self {
            job: job.flatten(),
            until: None,
        }
    }

    fn may_go(&mut self, master: &Master, node: &NodeState, now: Millis) -> bool {
        if self
            .job
            .is_some_and(|job| !master.state.drains.is_over(job))
        {
            return false;
        }
        let until = *self.until.get_or_insert(now.plus(LAST_PUTS));
        now >= until || !master.state.writing_to(node)
    }

    fn unmount(&self, master: &Master, node: &Arc<NodeState>) -> wire::Unmounted {
        let moved = self.job.and_then(|job| master.state.drains.report(job));
        let before = master.state.counters.lost_objects.load(Ordering::Relaxed);
        master.state.unmount(node, Millis::now());
        let after = master.state.counters.lost_objects.load(Ordering::Relaxed);
        wire::Unmounted {
            moved_objects: moved.as_ref().map_or(0, |m| m.succeeded),
            moved_bytes: moved.as_ref().map_or(0, |m| m.moved_bytes),
            left_objects: after - before,
        }
    }
}

/// Longest time a node may ask for.
const MOVE_MS_MAX: u64 = 86_400_000;

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
        let drop = wire::Drop {
            sequence,
            items,
            traceparent: std::mem::take(&mut *node.drops_for.lock()),
        };
        if !send(outbox, Out::Drop(drop)).await {
            return false;
        }
    }
    for probe in master.mesh.due(node.id) {
        if !send(outbox, Out::Probe(probe)).await {
            return false;
        }
    }
    let policies = master.state.quotas.version();
    if node.quotas_sent.swap(policies, Ordering::AcqRel) < policies
        && !send(outbox, Out::Quotas(table(&master.state.quotas.policies()))).await
    {
        return false;
    }
    let jobs = master.state.drains.version();
    if node.drains_sent.swap(jobs, Ordering::AcqRel) < jobs {
        let (version, jobs) = master.state.drains.kept();
        let jobs = jobs.into_iter().map(told_job).collect();
        if !send(outbox, Out::Drains(wire::DrainTable { version, jobs })).await {
            return false;
        }
    }
    let copies = std::mem::take(&mut *node.copies.lock());
    for sequence in copies {
        if let Some(copy) = copy_message(master, sequence)
            && !send(outbox, Out::Copy(copy)).await
        {
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
