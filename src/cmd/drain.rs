//! `mooncake drain`: empties segments, so that their node can be stopped without losing what lies there.

use std::time::{Duration, Instant};

use clap::{Arg, ArgAction, ArgMatches, Command};
use serde_json::{Value, json};

use super::api::{Api, escaped, list, number, text};
use super::print::Output;
use super::{ExitStatus, Outcome, UsageError, connect, print};
use crate::base::units::{ByteSize, parse_duration};

/// How long a master that has gone while we wait may take to be back, with the job.
const NEXT_MASTER: Duration = Duration::from_secs(20);
/// Between two looks at a job.
const PAUSE: Duration = Duration::from_millis(200);

pub(super) fn command() -> Command {
    connect::add(
        Command::new("drain")
            .about("Move everything off segments; they take nothing new, readers notice nothing")
            .arg(
                Arg::new("segments")
                    .value_name("SEGMENT")
                    .num_args(1..)
                    .help("Names of segments or of nodes (all of their segments)"),
            )
            .arg(
                Arg::new("to")
                    .long("to")
                    .value_name("NAME")
                    .action(ArgAction::Append)
                    .help("Segments or nodes that take it [default: any]"),
            )
            .arg(
                Arg::new("concurrency")
                    .long("concurrency")
                    .value_name("N")
                    .default_value("4")
                    .value_parser(clap::value_parser!(u32).range(1..=64))
                    .help("Transfers at once; small objects travel together"),
            )
            .arg(
                Arg::new("wait")
                    .long("wait")
                    .value_name("TIME")
                    .default_value("10m")
                    .help("How long to wait for the end; 0 = print the job and return; a bare number is seconds"),
            )
            .arg(
                Arg::new("job")
                    .long("job")
                    .value_name("ID")
                    .conflicts_with("segments")
                    .required_unless_present("segments")
                    .help("Look at a job that was begun before, and wait for it"),
            )
            .arg(
                Arg::new("cancel")
                    .long("cancel")
                    .action(ArgAction::SetTrue)
                    .requires("job")
                    .help("Cancel it: what was moved stays moved, the segments take new objects again"),
            )
            .after_help(
                "Exit codes: 0 emptied, 1 not emptied (what stays is named), 3 unreachable or not done in time.",
            ),
    )
}

pub(super) fn run(matches: &ArgMatches) -> Outcome {
    let api = Api::new(matches)?;
    let output = connect::output(matches);
    let wait = matches.get_one::<String>("wait").map_or("", String::as_str);
    let wait = parse_duration(wait, Duration::from_secs(1))
        .map_err(|e| UsageError(format!("--wait: {e}")))?;
    let job = match matches.get_one::<String>("job") {
        Some(job) => job.clone(),
        None => begin(&api, matches)?,
    };
    if matches.get_flag("cancel") {
        let canceled = api.post(
            &format!("drain_jobs/cancel?job_id={}", escaped(&job)),
            &json!({}),
        )?;
        show(&canceled, output, &format!("job {job} canceled"))?;
        return Ok(ExitStatus::Ok);
    }
    let end = Instant::now() + wait;
    let mut told: Option<Instant> = None;
    loop {
        let state = match api.get(&format!("drain_jobs/query?job_id={}", escaped(&job))) {
            Ok(state) => state,
            // The job goes on under the next master.
            Err(_) if told.is_some_and(|at| at.elapsed() < NEXT_MASTER) && Instant::now() < end => {
                std::thread::sleep(PAUSE);
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        told = Some(Instant::now());
        let status = text(&state, "status_name");
        let over = matches!(status, "SUCCEEDED" | "FAILED" | "CANCELED");
        if over || wait.is_zero() || Instant::now() >= end {
            show(&state, output, &summary(&job, &state))?;
            return Ok(match status {
                "SUCCEEDED" => ExitStatus::Ok,
                _ if over => ExitStatus::Negative,
                _ if wait.is_zero() => ExitStatus::Ok,
                _ => ExitStatus::Unreachable,
            });
        }
        std::thread::sleep(PAUSE);
    }
}

fn begin(api: &Api, matches: &ArgMatches) -> anyhow::Result<String> {
    let names = |id: &str| -> Vec<String> {
        let all = matches.get_many::<String>(id);
        all.map_or_else(Vec::new, |all| all.cloned().collect())
    };
    // A node's name stands for its segments.
    let known = api.all("segments", "segments")?;
    let mut segments = Vec::new();
    for name in names("segments") {
        let of = |s: &&Value| text(s, "name") == name || text(s, "node") == name;
        let named: Vec<&Value> = list(&known, "segments").iter().filter(of).collect();
        if named.is_empty() {
            let what = format!("no segment or node is called `{}`", print::shown(&name));
            return Err(UsageError(what).into());
        }
        segments.extend(named.iter().map(|s| text(s, "name").to_owned()));
    }
    segments.sort_unstable();
    segments.dedup();
    let body = json!({
        "segments": segments, "target_segments": names("to"),
        "max_concurrency": matches.get_one::<u32>("concurrency").copied().unwrap_or(4),
    });
    let created = api.post("drain_jobs", &body)?;
    Ok(text(&created, "job_id").to_owned())
}

fn show(value: &Value, output: Output, line: &str) -> std::io::Result<()> {
    if output == Output::Json {
        return print::json(value);
    }
    print::line(line)
}

fn summary(job: &str, state: &Value) -> String {
    let mut lines = vec![format!(
        "{} {}: {} objects moved ({}), {} on their way, {} without a place, {} failed attempts",
        text(state, "status_name").to_lowercase(),
        list(state, "segments")
            .iter()
            .filter_map(Value::as_str)
            .collect::<Vec<_>>()
            .join(", "),
        number(state, "succeeded_units"),
        ByteSize(number(state, "migrated_bytes")),
        number(state, "active_units"),
        number(state, "blocked_units"),
        number(state, "failed_units"),
    )];
    if text(state, "status_name") != "SUCCEEDED" {
        lines.push(format!("{} (job {job})", text(state, "message")));
    }
    for stuck in list(state, "blocked") {
        lines.push(format!(
            "  stays: {} ({}): {}",
            print::shown(text(stuck, "key")),
            ByteSize(number(stuck, "size_bytes")),
            text(stuck, "reason"),
        ));
    }
    lines.join("\n")
}
