//! The mesh test: every node tests the way to every other, asked over its session.
//!
//! Owns the order (first whether anybody answers, all at once; then bytes, in rounds in which
//! nobody has two partners), the bounds, and the way of reports back to whoever asked. Judges nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::Status;

use super::Master;
use super::segments::{NodePhase, NodeState};
use crate::base::clock::Millis;
use crate::base::id::Id128;
use crate::store::wire::{self, mesh_item::Kind};

/// Nodes of one test: 64 are 4,032 pairs.
const NODES_MAX: usize = 64;
/// Bound of the whole unless asked otherwise, and at most.
const TIME: Duration = Duration::from_secs(60);
const TIME_MAX: Duration = Duration::from_secs(600);
/// A node tests 16 addresses at once, each within ten seconds.
const FIRST_LOOK: Duration = Duration::from_secs(12);
/// One pair with its bytes.
const ROUND: Duration = Duration::from_secs(11);
/// Most bytes of a pair.
const BYTES_MAX: u64 = 64 << 20;
/// Probes that wait for one node's session.
const QUEUED_MAX: usize = 8;

/// Who waits for whose report.
struct Waiting {
    node: Id128,
    reports: mpsc::Sender<(Id128, wire::ProbeReport)>,
}

/// Probes on their way to nodes, and reports on their way back.
#[derive(Default)]
pub(crate) struct Mesh {
    running: AtomicBool,
    next: AtomicU64,
    queued: Mutex<HashMap<Id128, Vec<wire::Probe>>>,
    waiting: Mutex<HashMap<u64, Waiting>>,
}

impl Mesh {
    /// Probes to be sent to a node.
    pub(crate) fn due(&self, node: Id128) -> Vec<wire::Probe> {
        self.queued.lock().remove(&node).unwrap_or_default()
    }

    /// A node's report. One that nobody waits for, or for another node, is dropped.
    pub(crate) fn report(&self, node: Id128, report: wire::ProbeReport) {
        let waiting = self.waiting.lock();
        if let Some(w) = waiting.get(&report.sequence).filter(|w| w.node == node) {
            let _ = w.reports.try_send((node, report));
        }
    }

    fn ask(
        &self,
        node: &NodeState,
        addresses: Vec<String>,
        transfer_bytes: u64,
        reports: &mpsc::Sender<(Id128, wire::ProbeReport)>,
    ) -> u64 {
        let sequence = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        let waiting = Waiting {
            node: node.id,
            reports: reports.clone(),
        };
        self.waiting.lock().insert(sequence, waiting);
        let probe = wire::Probe {
            sequence,
            addresses,
            transfer_bytes,
        };
        let mut queued = self.queued.lock();
        let queue = queued.entry(node.id).or_default();
        if queue.len() < QUEUED_MAX {
            queue.push(probe);
        }
        drop(queued);
        node.wake();
        sequence
    }
}

/// Frees the mesh for the next test, however this one ends.
struct Running(Arc<Master>);

impl Drop for Running {
    fn drop(&mut self) {
        let mesh = &self.0.mesh;
        mesh.waiting.lock().clear();
        mesh.queued.lock().clear();
        mesh.running.store(false, Ordering::Release);
    }
}

type Items = mpsc::Sender<Result<wire::MeshItem, Status>>;

/// Begins a test; it ends when `items` is no longer read.
///
/// # Errors
/// `RESOURCE_EXHAUSTED` while another one runs.
pub(crate) fn start(
    master: Arc<Master>,
    request: wire::MeshRequest,
    items: Items,
) -> Result<(), Status> {
    if master.mesh.running.swap(true, Ordering::AcqRel) {
        return Err(Status::resource_exhausted(
            "another mesh test is running: wait until it has ended",
        ));
    }
    let running = Running(master.clone());
    let time = match request.timeout_ms {
        0 => TIME,
        ms => Duration::from_millis(u64::from(ms)).min(TIME_MAX),
    };
    tokio::spawn(async move {
        let _running = running;
        let (reports, inbox) = mpsc::channel(NODES_MAX * NODES_MAX);
        let abandoned = items.clone();
        let mut test = Test {
            nodes: taking_part(&master),
            master: master.clone(),
            asked: HashMap::new(),
            reports,
            inbox,
            items,
            end: Instant::now() + time,
        };
        tokio::select! {
            _ = test.run(request.transfer_bytes.min(BYTES_MAX)) => {}
            // A caller that went away does not keep the nodes busy.
            () = abandoned.closed() => {}
        }
    });
    Ok(())
}

/// All nodes in the order in which they are shown.
fn taking_part(master: &Master) -> Vec<Arc<NodeState>> {
    let mut nodes = master.state.segments.nodes();
    nodes.sort_by(|a, b| (&a.name, &a.address).cmp(&(&b.name, &b.address)));
    nodes
}

struct Test {
    master: Arc<Master>,
    nodes: Vec<Arc<NodeState>>,
    /// What a report's sequence and target stand for: from, and to whom.
    asked: HashMap<u64, (u32, Vec<u32>)>,
    reports: mpsc::Sender<(Id128, wire::ProbeReport)>,
    inbox: mpsc::Receiver<(Id128, wire::ProbeReport)>,
    items: Items,
    end: Instant,
}

impl Test {
    /// `None` when the caller went away.
    async fn run(&mut self, bytes: u64) -> Option<()> {
        let left_out = self.nodes.len().saturating_sub(NODES_MAX);
        self.nodes.truncate(NODES_MAX);
        let now = Millis::now();
        let nodes = self.nodes.iter().map(|n| wire::MeshNode {
            name: n.name.clone(),
            address: n.address.clone(),
            host_id: n.host_id.clone(),
            build: n.build.get().cloned().unwrap_or_default(),
            state: n.state_name(now).to_owned(),
            probes: probes(n),
        });
        let nodes = nodes.collect();
        self.say(Kind::Nodes(wire::MeshNodes { nodes })).await?;
        let count = self.nodes.len() as u32;
        // Each reaches for itself as well: whether its address is its own tells a firewall from a wrong address.
        let all: Vec<u32> = (0..count).collect();
        for from in 0..count {
            self.ask(from, &all, 0);
        }
        let reached = self.collect(FIRST_LOOK).await?;
        if bytes > 0 {
            for round in rounds(count) {
                for pair in round.into_iter().filter(|p| reached.contains(p)) {
                    self.ask(pair.0, &[pair.1], bytes);
                }
                self.collect(ROUND).await?;
            }
        }
        let left_out = left_out as u32;
        self.say(Kind::End(wire::MeshEnd { left_out })).await
    }

    async fn say(&self, kind: Kind) -> Option<()> {
        let item = wire::MeshItem { kind: Some(kind) };
        self.items.send(Ok(item)).await.ok()
    }

    fn ask(&mut self, from: u32, to: &[u32], bytes: u64) {
        let node = &self.nodes[from as usize];
        if !probes(node) || Instant::now() >= self.end {
            return;
        }
        let address = |n: &u32| self.nodes[*n as usize].address.clone();
        let addresses = to.iter().map(address).collect();
        let mesh = &self.master.mesh;
        let sequence = mesh.ask(node, addresses, bytes, &self.reports);
        self.asked.insert(sequence, (from, to.to_vec()));
    }

    /// Waits for what was asked and passes it on; the pairs that worked.
    async fn collect(&mut self, patience: Duration) -> Option<Vec<(u32, u32)>> {
        let until = self.end.min(Instant::now() + patience);
        let mut missing: usize = self.asked.values().map(|(_, to)| to.len()).sum();
        let mut reached = Vec::new();
        while missing > 0 {
            let Ok(Some((_, report))) = tokio::time::timeout_at(until, self.inbox.recv()).await
            else {
                break;
            };
            let pair = self.asked.get(&report.sequence).and_then(|(from, to)| {
                let to = to.get(report.target as usize)?;
                Some((*from, *to))
            });
            let (Some((from, to)), Some(result)) = (pair, report.result) else {
                continue;
            };
            missing -= 1;
            if result.cause.is_empty() {
                reached.push((from, to));
            }
            let result = Some(bounded(result));
            self.say(Kind::Pair(wire::MeshPair { from, to, result }))
                .await?;
        }
        for sequence in self.asked.drain().map(|(s, _)| s) {
            self.master.mesh.waiting.lock().remove(&sequence);
        }
        Some(reached)
    }
}

/// All ordered pairs of `count`, in rounds in which nobody has two of them: what one direction carries does not delay the
/// other. A tournament by the circle method, each round played there and back.
fn rounds(count: u32) -> Vec<Vec<(u32, u32)>> {
    let seats = count.next_multiple_of(2);
    let mut all = Vec::new();
    for round in 0..seats.saturating_sub(1) {
        let turn = |seat: u32| (round + seat) % (seats - 1);
        let pairs = (1..seats / 2).map(|s| (turn(s), turn(seats - 1 - s)));
        let pairs: Vec<_> = std::iter::once((turn(0), seats - 1))
            .chain(pairs)
            .filter(|(a, b)| *a < count && *b < count)
            .collect();
        all.push(pairs.iter().map(|(a, b)| (*b, *a)).collect());
        all.push(pairs);
    }
    all
}

/// Whether the node can be asked: older releases break off at a message they do not know.
fn probes(node: &NodeState) -> bool {
    node.build.get().is_some() && matches!(node.phase(), NodePhase::Ok | NodePhase::Draining)
}

/// What a node says is passed on cut to size.
fn bounded(mut result: wire::ProbeResult) -> wire::ProbeResult {
    let cut = |text: &mut String, most: usize| *text = text.chars().take(most).collect();
    cut(&mut result.cause, 24);
    cut(&mut result.reason, 200);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_has_its_round_and_nobody_two_partners() {
        for count in 0..20u32 {
            let all = rounds(count);
            let mut pairs: Vec<_> = all.iter().flatten().copied().collect();
            pairs.sort_unstable();
            let wanted: Vec<_> = (0..count)
                .flat_map(|a| (0..count).map(move |b| (a, b)))
                .filter(|(a, b)| a != b)
                .collect();
            assert_eq!(pairs, wanted);
            for round in all {
                let mut nodes: Vec<_> = round.iter().flat_map(|(a, b)| [*a, *b]).collect();
                nodes.sort_unstable();
                let busy = nodes.len();
                nodes.dedup();
                assert_eq!(nodes.len(), busy);
            }
        }
    }
}
