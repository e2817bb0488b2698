//! What has to happen without anybody asking: eviction above the watermark, silent nodes, vanished clients, puts that
//! never ended. One thread.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::Master;
use super::segments::NodePhase;
use super::state::Nudge;
use crate::base::clock::Millis;

const TICK: Duration = Duration::from_millis(20);
/// Between two looks.
const NUDGE_PAUSE: Duration = Duration::from_millis(1);
/// A client whose last lane closed may reconnect for this long.
const CLIENT_GRACE: Duration = Duration::from_secs(2);

/// Starts the thread; it ends with the master.
pub(crate) fn start(master: &Arc<Master>) -> std::io::Result<()> {
    let weak = Arc::downgrade(master);
    let nudge = master.state.nudge.clone();
    std::thread::Builder::new()
        .name("sweeper".into())
        .spawn(move || run(&weak, &nudge))?;
    Ok(())
}

fn run(master: &Weak<Master>, nudge: &Nudge) {
    let mut ticks = 0u64;
    let mut next = Instant::now() + TICK;
    loop {
        nudge.wait_until(next);
        let Some(master) = master.upgrade() else {
            return;
        };
        let now = Millis::now();
        let due = Instant::now() >= next;
        let need = master.state.eviction_need();
        let evicted = if need > 0 {
            master.state.evict(need, now)
        } else {
            0
        };
        master.state.drain_step(now);
        if due {
            next = Instant::now() + TICK;
            ticks += 1;
            round(&master, ticks, now);
        }
        drop(master);
        // Nudges come with every arena. Where nothing could go, nothing will until the next tick.
        let pause = if need > 0 && evicted == 0 {
            next.saturating_duration_since(Instant::now())
        } else {
            NUDGE_PAUSE
        };
        std::thread::sleep(pause);
    }
}

/// What does not have to be done each time.
fn round(master: &Master, ticks: u64, now: Millis) {
    if ticks.is_multiple_of(5) {
        master.state.send_reconciles(now);
        master.state.overdue_copies(now);
        nodes(master, now);
        clients(master, now);
    }
    if ticks.is_multiple_of(50) {
        let release = master.state.config.put_release.as_millis() as u64;
        master
            .state
            .abandon(now, |put| now.since(put.started) >= release);
    }
}

fn nodes(master: &Master, now: Millis) {
    let ttl = master.state.config.client_ttl.as_millis() as u64;
    for node in master.state.segments.nodes() {
        let silent = now.since(Millis(node.last_seen.load(Ordering::Relaxed)));
        if silent >= ttl && node.phase() != NodePhase::Gone {
            tracing::warn!(node = %node.name, silent_ms = silent, "node unmounted: it was silent for too long");
            master.state.unmount(&node, now);
            node.wake();
        }
    }
}

fn clients(master: &Master, now: Millis) {
    let grace = CLIENT_GRACE.as_millis() as u64;
    let mut gone = Vec::new();
    master.clients.lock().retain(|id, lanes| {
        let leaves = lanes.open == 0 && now.since(lanes.left) >= grace;
        if leaves {
            gone.push(*id);
        }
        !leaves
    });
    for client in gone {
        master.state.client_gone(client, now);
    }
}
