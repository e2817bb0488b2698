//! How good the way to the master is, once there is one: distance, and packets lost on it.
//!
//! Asks the master the same small question many times. Refuses to know why there is no way.

use std::time::{Duration, Instant};

use super::report::Finding;
use super::system::{self, Ran};
use crate::store::client::PoolClient;

/// Questions asked: few enough for a second, enough for one packet in fifty to be missed.
const QUESTIONS: usize = 100;
/// All of them together take no longer than this.
const PATIENCE: Duration = Duration::from_secs(3);
/// A small operation is one exchange: beyond this, reading from the pool costs more than it saves for short prompts.
const FAR: Duration = Duration::from_millis(5);
/// Share of segments sent again that a sound network stays far below.
const LOST: f64 = 0.005;
/// Fewer than this may be chance.
const LOST_LEAST: u64 = 2;

/// Segments that connections of this process to one port have sent, and those they have sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sent {
    all: u64,
    again: u64,
}

/// Reads lines of `ss -HtinpO`; those of one process, to one port.
fn sent(text: &str, pid: u32, port: u16) -> Sent {
    let (owner, port) = (format!("pid={pid},"), format!(":{port}"));
    let number = |line: &str, name: &str| -> u64 {
        let word = line
            .split_whitespace()
            .find_map(|w| w.strip_prefix(name))
            .unwrap_or("0");
        // `retrans:0/3`: now and in all.
        word.rsplit('/')
            .next()
            .and_then(|n| n.parse().ok())
            .unwrap_or(0)
    };
    let ours = text.lines().filter(|l| l.contains(&owner));
    let to_port = ours.filter(|l| {
        l.split_whitespace()
            .nth(4)
            .is_some_and(|peer| peer.ends_with(&port))
    });
    to_port.fold(Sent { all: 0, again: 0 }, |sum, line| Sent {
        all: sum.all + number(line, "segs_out:"),
        again: sum.again + number(line, "retrans:"),
    })
}

pub(super) fn check(client: &PoolClient, port: u16) -> Vec<Finding> {
    let (end, mut least, mut most) = (Instant::now() + PATIENCE, Duration::MAX, Duration::ZERO);
    let mut asked = 0;
    while asked < QUESTIONS && Instant::now() < end {
        let start = Instant::now();
        if client.overview().is_err() {
            break;
        }
        let took = start.elapsed();
        (least, most) = (least.min(took), most.max(took));
        asked += 1;
    }
    if asked == 0 {
        return vec![Finding::skipped(
            "latency",
            "the master did not answer again",
        )];
    }
    let mut found = vec![latency(least, most, asked)];
    // While the lanes are open: the kernel forgets what it counted with them.
    if let Ran::Text(text) = system::run("ss", &["-HtinpO"], Duration::from_secs(1)) {
        let sent = sent(&text, std::process::id(), port);
        // To a master of this host they are no TCP.
        found.extend((sent.all > 0).then(|| losses(sent)));
    }
    found
}

fn ms(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

/// Judged by the fastest answer: the others may have waited for a processor.
fn latency(least: Duration, most: Duration, asked: usize) -> Finding {
    let shown = format!("{} to {} for {asked} questions", ms(least), ms(most));
    if least < FAR {
        return Finding::ok("latency", shown);
    }
    let reason = "even the fastest answer of the master took long: it is far away, or something on the way delays";
    Finding::warn("latency", "master_far", shown, reason).remedy(
        "put the master near its clients, and look at tunnels, queues and limits (tc) on the way",
    )
}

fn losses(sent: Sent) -> Finding {
    let shown = format!(
        "{} of {} TCP segments to the master were sent again",
        sent.again, sent.all
    );
    if sent.again < LOST_LEAST || (sent.again as f64) < sent.all as f64 * LOST {
        return Finding::ok("losses", shown);
    }
    let reason = "packets are lost on the way: every loss costs a fifth of a second";
    Finding::warn("losses", "packets_lost", shown, reason)
        .remedy(
            "look at errors and drops of the interfaces on both sides and at the switch between",
        )
        .command("ip -s link; nstat -az TcpRetransSegs")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_losses_are_chance() {
        let of = |all, again| losses(Sent { all, again }).cause;
        assert_eq!((of(200, 1), of(100_000, 20)), ("", ""));
        assert_eq!(of(200, 2), "packets_lost");
        let (near, far) = (Duration::from_micros(80), Duration::from_millis(40));
        assert_eq!(latency(near, far, 9).cause, "");
        assert_eq!(latency(far, far, 9).cause, "master_far");
    }

    #[test]
    fn what_ss_says_of_this_process() {
        let text = r#"ESTAB 0 0 10.9.0.1:41 10.9.0.2:50051 users:(("mooncake",pid=7,fd=9)) cubic rto:204 segs_out:110 segs_in:9 retrans:0/3 lost:0
ESTAB 0 0 10.9.0.1:42 10.9.0.2:50051 users:(("mooncake",pid=7,fd=8)) cubic rto:204 segs_out:20 segs_in:9
ESTAB 0 0 10.9.0.1:43 10.9.0.2:9003 users:(("mooncake",pid=7,fd=7)) cubic segs_out:500 retrans:0/9
ESTAB 0 0 10.9.0.1:44 10.9.0.2:50051 users:(("other",pid=77,fd=7)) cubic segs_out:500 retrans:0/9"#;
        assert_eq!(sent(text, 7, 50_051), Sent { all: 130, again: 3 });
        assert_eq!(sent("", 7, 50_051), Sent { all: 0, again: 0 });
    }
}
