//! `inspect events`: follows what is stored and removed, and goes on where it was when the master comes back.

use std::time::{Duration, Instant};

use clap::{Arg, ArgMatches, Command};
use serde_json::json;

use super::clock;
use crate::base::units::ByteSize;
use crate::cmd::api::{Api, number};
use crate::cmd::print::{self, Output};
use crate::cmd::{ExitStatus, UsageError, connect};
use crate::store::client::stream;
use crate::store::model::error::StoreError;
use crate::store::wire::{self, object_event::Kind, object_event::Reason};

pub(super) fn command() -> Command {
    Command::new("events")
        .about("Follow what is stored and removed, as it happens, also over a restart of the master; JSON is one event per line")
        .arg(
            Arg::new("from")
                .long("from")
                .value_name("N")
                .value_parser(clap::value_parser!(u64))
                .default_value("0")
                .help("Begin with this event; 1 = the oldest that is kept, 0 = those that happen from now on"),
        )
        .arg(super::prefix_argument())
        .arg(
            Arg::new("count")
                .long("count")
                .value_name("N")
                .value_parser(clap::value_parser!(u64).range(1..))
                .help("End after so many events"),
        )
        .arg(
            Arg::new("for")
                .long("for")
                .value_name("TIME")
                .help("End after this time; a bare number is seconds"),
        )
}

fn word(event: &wire::ObjectEvent) -> (&'static str, &'static str) {
    let reason = match event.reason() {
        Reason::None => "",
        Reason::ByRequest => "by request",
        Reason::Evicted => "evicted",
        Reason::Incomplete => "incomplete",
        Reason::NodeLost => "node lost",
    };
    let kind = match event.kind() {
        Kind::Stored => "stored",
        Kind::Removed => "removed",
        Kind::Cleared => "cleared",
    };
    (kind, reason)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn show(event: &wire::ObjectEvent, output: Output) -> std::io::Result<()> {
    let (kind, reason) = word(event);
    let key = String::from_utf8_lossy(&event.key);
    if output == Output::Json {
        let mut line = json!({
            "seq": event.seq, "event": kind, "reason": (!reason.is_empty()).then_some(reason), "tenant": event.tenant,
            "key": key, "size_bytes": event.size_bytes, "version": event.version.to_string(),
            "replicas": event.replicas, "unix_ms": event.unix_ms,
        });
        if std::str::from_utf8(&event.key).is_err() {
            line["key_hex"] = hex(&event.key).into();
        }
        return print::line(&line.to_string());
    }
    print::line(&format!(
        "{}  {kind:<8} {reason:<10} {:>10}  {}",
        clock(event.unix_ms),
        ByteSize(event.size_bytes).to_string(),
        print::shown(&key)
    ))
}

/// Where a follower is in the stream; what it needs to go on after the master was away.
struct Position {
    next: u64,
    epoch: u64,
}

/// Asks where the stream is now, so that nothing that happens before the first event is missed when the master goes away.
fn begin(matches: &ArgMatches, from: u64) -> anyhow::Result<Position> {
    let overview = Api::new(matches)?.get("overview")?;
    let events = overview.get("events").cloned().unwrap_or_default();
    if events.get("enabled") == Some(&serde_json::Value::Bool(false)) {
        let problem = "this master records no events: start it with --kv-events";
        return Err(UsageError(problem.to_owned()).into());
    }
    let (next, epoch) = (number(&events, "next_seq"), number(&events, "epoch"));
    if from > next {
        let problem = format!("--from {from}: the next event will be {next}");
        return Err(UsageError(problem).into());
    }
    Ok(Position {
        next: if from == 0 { next } else { from },
        epoch,
    })
}

/// What is missing before the events that follow.
fn show_gap(gap: &wire::EventGap, output: Output) -> std::io::Result<()> {
    let lost = gap.to_seq.saturating_sub(gap.from_seq);
    if output == Output::Json {
        let lost = (!gap.restarted).then_some(lost);
        let line = json!({"event": "gap", "restarted": gap.restarted, "lost": lost});
        return print::line(&line.to_string());
    }
    print::error_line(&if gap.restarted {
        "another master began: events before its start may be missing, and what was known may have changed".to_owned()
    } else {
        format!("{lost} events are no longer kept")
    });
    Ok(())
}

/// Pause before the master is asked again.
const PAUSE: Duration = Duration::from_millis(500);

/// Follows the stream, also over a restart of the master, until it is to end or the master stays away for longer than --timeout.
pub(super) fn run(matches: &ArgMatches, output: Output) -> anyhow::Result<ExitStatus> {
    let config = connect::config(matches)?;
    let number = |name: &str| matches.get_one::<u64>(name).copied();
    let mut left = number("count");
    let end = super::time(matches, "for")?.and_then(|t| Instant::now().checked_add(t));
    let mut position = begin(matches, number("from").unwrap_or(0))?;
    let prefix = matches
        .get_one::<String>("prefix")
        .cloned()
        .unwrap_or_default();
    let named = matches.get_one::<String>("tenant").is_some();
    let mut failed = None;
    let mut away: Option<Instant> = None;
    loop {
        let request = wire::EventsRequest {
            from_seq: position.next,
            epoch: position.epoch,
            prefix: prefix.clone().into(),
            tenant: named.then(|| config.tenant.clone()),
            ..wire::EventsRequest::default()
        };
        let patience = end.map_or(Duration::MAX, |e| {
            e.saturating_duration_since(Instant::now())
        });
        let ended = stream::events(&config, request, patience, |batch| {
            if away.take().is_some() {
                print::error_line("the master is back");
            }
            let mut shown = batch
                .gap
                .as_ref()
                .map_or(Ok(()), |gap| show_gap(gap, output));
            for event in &batch.events {
                shown = shown.and_then(|()| show(event, output));
                if let Some(n) = &mut left {
                    *n -= 1;
                    if *n == 0 {
                        break;
                    }
                }
            }
            position = Position {
                next: batch.next_seq,
                epoch: batch.epoch,
            };
            failed = shown.err();
            failed.is_none() && left != Some(0)
        });
        match ended {
            Ok(()) => break,
            Err(error @ StoreError::MasterUnreachable { .. }) => {
                let since = *away.get_or_insert_with(|| {
                    print::error_line(&format!("mooncake: {error}; asking again"));
                    Instant::now()
                });
                if since.elapsed() >= config.timeout {
                    return Err(error.into());
                }
                if end.is_some_and(|e| Instant::now() >= e) {
                    break;
                }
                std::thread::sleep(PAUSE);
            }
            Err(error) => return Err(error.into()),
        }
    }
    failed.map_or(Ok(ExitStatus::Ok), |e| Err(e.into()))
}
