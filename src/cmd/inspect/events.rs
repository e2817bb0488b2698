//! `inspect events`: follows what is stored and removed.

use std::time::Duration;

use clap::{Arg, ArgMatches, Command};
use serde_json::json;

use super::clock;
use crate::base::units::ByteSize;
use crate::cmd::print::{self, Output};
use crate::cmd::{ExitStatus, connect};
use crate::store::client::stream;
use crate::store::wire::{self, object_event::Kind, object_event::Reason};

pub(super) fn command() -> Command {
    Command::new("events")
        .about("Follow what is stored and removed, as it happens; JSON is one event per line")
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

fn show(event: &wire::ObjectEvent, output: Output) -> std::io::Result<()> {
    let (kind, reason) = word(event);
    let key = String::from_utf8_lossy(&event.key);
    if output == Output::Json {
        let line = json!({
            "seq": event.seq, "event": kind, "reason": (!reason.is_empty()).then_some(reason), "tenant": event.tenant,
            "key": key, "size_bytes": event.size_bytes, "version": event.version.to_string(),
            "replicas": event.replicas, "unix_ms": event.unix_ms,
        });
        return print::line(&line.to_string());
    }
    print::line(&format!(
        "{}  {kind:<8} {reason:<10} {:>10}  {}",
        clock(event.unix_ms),
        ByteSize(event.size_bytes).to_string(),
        print::shown(&key)
    ))
}

pub(super) fn run(matches: &ArgMatches, output: Output) -> anyhow::Result<ExitStatus> {
    let config = connect::config(matches)?;
    let number = |name: &str| matches.get_one::<u64>(name).copied();
    let mut left = number("count");
    let time = super::time(matches, "for")?;
    let request = wire::EventsRequest {
        from_seq: number("from").unwrap_or(0),
        prefix: matches
            .get_one::<String>("prefix")
            .cloned()
            .unwrap_or_default()
            .into(),
        tenant: matches
            .get_one::<String>("tenant")
            .map(|_| config.tenant.clone()),
        ..wire::EventsRequest::default()
    };
    let mut failed = None;
    stream::events(&config, request, time.unwrap_or(Duration::MAX), |batch| {
        if let Some(gap) = &batch.gap {
            let lost = gap.to_seq.saturating_sub(gap.from_seq);
            print::error_line(&if gap.restarted {
                "another master began: what was known may have changed".to_owned()
            } else {
                format!("{lost} events are no longer kept")
            });
        }
        for event in &batch.events {
            if let Err(error) = show(event, output) {
                failed = Some(error);
                return false;
            }
            if let Some(n) = &mut left {
                *n -= 1;
                if *n == 0 {
                    return false;
                }
            }
        }
        true
    })?;
    failed.map_or(Ok(ExitStatus::Ok), |e| Err(e.into()))
}
