//! `mooncake put`: stores a file, standard input, several files, or a directory.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Arg, ArgAction, ArgGroup, ArgMatches, Command};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use super::print::Output;
use super::{ExitStatus, Outcome, UsageError, connect, print};
use crate::base::units::{ByteSize, parse_duration};
use crate::engine::batch::LocalSlice;
use crate::store::client::{PoolClient, PutOptions, PutOutcome, PutRequest};
use crate::store::model::error::StoreError;

/// Bytes and files held in memory for one batch.
const BATCH_BYTES: u64 = 64 << 20;
const BATCH_FILES: usize = 256;

pub(super) fn command() -> Command {
    let number = clap::value_parser!(u32).range(1..=64);
    connect::add(
        Command::new("put")
            .about("Store a file or standard input under a key, or many files")
            .arg(
                Arg::new("key")
                    .value_name("KEY")
                    .help("Key to store it under, 1 to 4,096 bytes"),
            )
            .arg(
                Arg::new("file")
                    .value_name("FILE")
                    .requires("key")
                    .help("`-` or nothing: standard input"),
            )
            .arg(
                Arg::new("recursive")
                    .long("recursive")
                    .short('r')
                    .value_name("DIR")
                    .value_parser(clap::value_parser!(PathBuf))
                    .help("Store every file below DIR; keys are the paths below it"),
            )
            .arg(
                Arg::new("files")
                    .long("files")
                    .value_name("FILE")
                    .num_args(1..)
                    .value_parser(clap::value_parser!(PathBuf))
                    .help("Store several files; keys are the paths as given"),
            )
            .group(
                ArgGroup::new("what")
                    .args(["key", "recursive", "files"])
                    .required(true),
            )
            .arg(
                Arg::new("prefix")
                    .long("prefix")
                    .value_name("TEXT")
                    .help("Put this before every key"),
            )
            .arg(
                Arg::new("replicas")
                    .long("replicas")
                    .value_name("N")
                    .value_parser(number)
                    .default_value("1")
                    .help("Copies on distinct nodes, best effort"),
            )
            .arg(
                Arg::new("soft-pin")
                    .long("soft-pin")
                    .value_name("TIME")
                    .num_args(0..=1)
                    .require_equals(true)
                    .default_missing_value("30m")
                    .help("Keep until nothing else can be evicted, for TIME [default: 30m]"),
            )
            .arg(
                Arg::new("hard-pin")
                    .long("hard-pin")
                    .action(ArgAction::SetTrue)
                    .help("Never evict"),
            )
            .arg(
                Arg::new("preferred-segment")
                    .long("preferred-segment")
                    .value_name("NAME")
                    .action(ArgAction::Append)
                    .help("Place there if possible; may be repeated"),
            )
            .arg(
                Arg::new("group")
                    .long("group")
                    .value_name("NAME")
                    .help("Lease and evict together with the others of this group"),
            )
            .arg(
                Arg::new("upsert")
                    .long("upsert")
                    .action(ArgAction::SetTrue)
                    .help("Replace what is stored under the key (otherwise it is left as it is)"),
            ),
    )
}

fn options(matches: &ArgMatches) -> anyhow::Result<PutOptions> {
    let text = |name| matches.get_one::<String>(name).cloned().unwrap_or_default();
    let soft_pin_ttl_ms = match matches.get_one::<String>("soft-pin") {
        None => 0,
        Some(time) => parse_duration(time, std::time::Duration::from_millis(1))
            .map_err(|e| UsageError(format!("--soft-pin: {e}")))?
            .as_millis() as u64,
    };
    Ok(PutOptions {
        if_version: 0,
        replicas: matches.get_one("replicas").copied().unwrap_or(1),
        soft_pin_ttl_ms,
        hard_pin: matches.get_flag("hard-pin"),
        preferred_segments: matches
            .get_many::<String>("preferred-segment")
            .unwrap_or_default()
            .cloned()
            .collect(),
        group: text("group"),
        data_type: 0,
        upsert: matches.get_flag("upsert"),
    })
}

pub(super) fn run(matches: &ArgMatches) -> Outcome {
    let options = options(matches)?;
    let prefix = matches
        .get_one::<String>("prefix")
        .cloned()
        .unwrap_or_default();
    let output = connect::output(matches);
    if let Some(key) = matches.get_one::<String>("key") {
        let file = matches
            .get_one::<String>("file")
            .map_or("-", String::as_str);
        let bytes = read(file)?;
        let client = connect::client(matches)?;
        let key = format!("{prefix}{key}");
        let outcome = client.put_bytes(key.as_bytes(), &bytes, &options)?;
        say(output, &[(key, bytes.len() as u64, Ok(outcome))])?;
        return Ok(ExitStatus::Ok);
    }
    let sources = match matches.get_one::<PathBuf>("recursive") {
        Some(directory) => walk(directory)?,
        None => {
            let files = matches.get_many::<PathBuf>("files").unwrap_or_default();
            files
                .map(|f| (f.to_string_lossy().into_owned(), f.clone()))
                .collect()
        }
    };
    let client = connect::client(matches)?;
    let results = put_many(&client, &prefix, &sources, &options)?;
    let failed = results.iter().filter(|r| r.2.is_err()).count();
    say(output, &results)?;
    if let Some((key, _, Err(error))) = results.iter().find(|r| r.2.is_err()) {
        let error = anyhow::Error::new(error.clone()).context(format!(
            "{failed} of {} not stored, first {key}",
            results.len()
        ));
        return Err(error);
    }
    Ok(ExitStatus::Ok)
}

fn read(file: &str) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if file == "-" {
        std::io::stdin()
            .lock()
            .read_to_end(&mut bytes)
            .context("cannot read standard input")?;
    } else {
        bytes = std::fs::read(file).with_context(|| format!("cannot read {file}"))?;
    }
    if bytes.is_empty() {
        let name = if file == "-" { "standard input" } else { file };
        return Err(UsageError(format!("{name} is empty: an object has at least 1 byte")).into());
    }
    Ok(bytes)
}

/// Regular files below a directory, by path below it, sorted.
fn walk(directory: &Path) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(at) = open.pop() {
        let entries =
            std::fs::read_dir(&at).with_context(|| format!("cannot read {}", at.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("cannot read {}", at.display()))?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                open.push(entry.path());
            } else if kind.is_file() {
                let path = entry.path();
                let key = path.strip_prefix(directory).unwrap_or(&path);
                found.push((key.to_string_lossy().into_owned(), path));
            }
        }
    }
    found.sort();
    Ok(found)
}

type Said = (String, u64, Result<PutOutcome, StoreError>);

fn put_many(
    client: &PoolClient,
    prefix: &str,
    sources: &[(String, PathBuf)],
    options: &PutOptions,
) -> anyhow::Result<Vec<Said>> {
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |m| m.len());
    let bar = progress(sources.iter().map(|(_, p)| size(p)).sum());
    let mut said = Vec::with_capacity(sources.len());
    let filled: Vec<(String, PathBuf)> = sources
        .iter()
        .filter(|(_, path)| size(path) > 0)
        .cloned()
        .collect();
    let mut rest = filled.as_slice();
    while !rest.is_empty() {
        let mut bytes = 0;
        let count = rest
            .iter()
            .take(BATCH_FILES)
            .take_while(|(_, path)| {
                let first = bytes == 0;
                bytes += size(path);
                first || bytes <= BATCH_BYTES
            })
            .count();
        let (batch, after) = rest.split_at(count.max(1));
        rest = after;
        said.extend(put_batch(client, prefix, batch, options)?);
        bar.set_position(said.iter().map(|s| s.1).sum());
    }
    bar.finish_and_clear();
    // An object has at least one byte: an empty file is said, not tried.
    for (key, _) in sources.iter().filter(|(_, path)| size(path) == 0) {
        print::error_line(&format!("mooncake: {key} is empty and was not stored"));
    }
    Ok(said)
}

fn put_batch(
    client: &PoolClient,
    prefix: &str,
    batch: &[(String, PathBuf)],
    options: &PutOptions,
) -> anyhow::Result<Vec<Said>> {
    let mut contents = Vec::with_capacity(batch.len());
    for (key, path) in batch {
        let bytes =
            std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        contents.push((format!("{prefix}{key}"), bytes));
    }
    let slices: Vec<[LocalSlice; 1]> = contents
        .iter()
        // SAFETY: only read from; `contents` lives until the put has returned.
        .map(|(_, b)| [unsafe { LocalSlice::new(b.as_ptr().cast_mut(), b.len()) }])
        .collect();
    let requests: Vec<PutRequest<'_>> = contents
        .iter()
        .zip(&slices)
        .map(|((key, _), source)| PutRequest::new(key.as_bytes(), source))
        .collect();
    let outcomes = client.put(&requests, options);
    drop(requests);
    let sizes: Vec<u64> = contents.iter().map(|(_, b)| b.len() as u64).collect();
    let keys = contents.into_iter().map(|(key, _)| key);
    Ok(keys
        .zip(sizes)
        .zip(outcomes)
        .map(|((k, s), o)| (k, s, o))
        .collect())
}

/// A progress bar on a terminal, nothing elsewhere.
pub(super) fn progress(total: u64) -> ProgressBar {
    let target = if std::io::IsTerminal::is_terminal(&std::io::stderr()) {
        ProgressDrawTarget::stderr_with_hz(8)
    } else {
        ProgressDrawTarget::hidden()
    };
    let bar = ProgressBar::with_draw_target(Some(total), target);
    if let Ok(style) =
        ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {bytes_per_sec}")
    {
        bar.set_style(style);
    }
    bar
}

fn say(output: Output, results: &[Said]) -> std::io::Result<()> {
    let word = |outcome: &Result<PutOutcome, StoreError>| match outcome {
        Ok(PutOutcome::Stored { replicas }) => format!("stored, {replicas} replica(s)"),
        Ok(PutOutcome::Existed) => "existed, left as it is".to_owned(),
        Err(error) => error.to_string(),
    };
    if output == Output::Json {
        let all: Vec<Value> = results
            .iter()
            .map(|(key, size, outcome)| {
                let replicas = match outcome {
                    Ok(PutOutcome::Stored { replicas }) => *replicas,
                    _ => 0,
                };
                json!({
                    "key": key, "size_bytes": size, "stored": replicas > 0, "replicas": replicas,
                    "existed": matches!(outcome, Ok(PutOutcome::Existed)),
                    "error": outcome.as_ref().err().map(ToString::to_string),
                })
            })
            .collect();
        return print::json(&Value::Array(all));
    }
    for (key, size, outcome) in results {
        print::line(&format!("{key}: {} ({})", word(outcome), ByteSize(*size)))?;
    }
    Ok(())
}
