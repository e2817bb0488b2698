//! `mooncake stat`: one object.

use anyhow::Context;
use clap::{Arg, ArgMatches, Command};
use serde_json::{Value, json};

use super::print::{Columns, Output};
use super::{ExitStatus, Outcome, connect, print};
use crate::base::units::ByteSize;
use crate::store::wire::Description;

pub(super) fn command() -> Command {
    connect::add(
        Command::new("stat")
            .about("Show size, version, checksum, lease, pins and replicas of a key")
            .arg(Arg::new("key").value_name("KEY").required(true)),
    )
}

pub(super) fn run(matches: &ArgMatches) -> Outcome {
    let client = connect::client(matches)?;
    let key = matches.get_one::<String>("key").map_or("", String::as_str);
    let found = client
        .stat(key.as_bytes())
        .with_context(|| format!("cannot stat `{}`", print::shown(key)))?;
    show(key, &found, connect::output(matches))?;
    Ok(ExitStatus::Ok)
}

/// Prints what is known of one object; also the view of `inspect key`.
pub(super) fn show(key: &str, d: &Description, output: Output) -> std::io::Result<()> {
    if output == Output::Json {
        return print::json(&document(key, d));
    }
    let checksum = if d.has_checksum {
        format!("crc32c {:08x}", d.checksum)
    } else {
        "none".to_owned()
    };
    let left = |ms: u64| {
        if ms == 0 {
            "no".to_owned()
        } else {
            format!("{:.1} s left", ms as f64 / 1000.0)
        }
    };
    let pin = if d.hard_pin {
        "hard".to_owned()
    } else {
        left(d.soft_pin_left_ms)
    };
    for (name, value) in [
        ("key", print::shown(key)),
        (
            "size",
            format!("{} ({} bytes)", ByteSize(d.size_bytes), d.size_bytes),
        ),
        ("version", d.version.to_string()),
        ("checksum", checksum),
        ("lease", left(d.lease_left_ms)),
        ("pin", pin),
        (
            "group",
            if d.group.is_empty() {
                "none".to_owned()
            } else {
                d.group.clone()
            },
        ),
    ] {
        print::line(&format!("{name:<9} {value}"))?;
    }
    let mut table = Columns::new(&["REPLICA", "SEGMENT", ">OFFSET", "STATE"]);
    for (number, r) in d.replicas.iter().enumerate() {
        let number = number.to_string();
        table.row(&[
            number,
            r.segment_name.clone(),
            r.offset.to_string(),
            r.state.clone(),
        ]);
    }
    table.print()
}

/// The same for programs.
pub(super) fn document(key: &str, d: &Description) -> Value {
    let replicas: Vec<Value> = d
        .replicas
        .iter()
        .map(|r| {
            json!({
                "segment": r.segment_name, "node": r.node, "offset": r.offset, "state": r.state,
            })
        })
        .collect();
    json!({
        "key": key,
        "size_bytes": d.size_bytes,
        "version": d.version.to_string(),
        "checksum_crc32c": d.has_checksum.then(|| format!("{:08x}", d.checksum)),
        "lease_left_ms": d.lease_left_ms,
        "soft_pin_left_ms": d.soft_pin_left_ms,
        "hard_pin": d.hard_pin,
        "group": (!d.group.is_empty()).then_some(&d.group),
        "data_type": d.data_type,
        "replicas": replicas,
    })
}
