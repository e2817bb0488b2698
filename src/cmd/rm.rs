//! `mooncake rm`: removes keys.

use clap::{Arg, ArgAction, ArgGroup, ArgMatches, Command};
use serde_json::json;

use super::print::Output;
use super::{ExitStatus, Outcome, connect, print};

pub(super) fn command() -> Command {
    connect::add(
        Command::new("rm")
            .about("Remove keys; returns when the nodes have forgotten them")
            .arg(Arg::new("keys").value_name("KEY").num_args(1..))
            .arg(
                Arg::new("regex")
                    .long("regex")
                    .value_name("REGEX")
                    .help("Remove every key that matches"),
            )
            .arg(
                Arg::new("all")
                    .long("all")
                    .action(ArgAction::SetTrue)
                    .help("Remove every key of the tenant"),
            )
            .group(
                ArgGroup::new("what")
                    .args(["keys", "regex", "all"])
                    .required(true),
            )
            .arg(
                Arg::new("force")
                    .long("force")
                    .action(ArgAction::SetTrue)
                    .help("Remove leased objects too"),
            ),
    )
}

pub(super) fn run(matches: &ArgMatches) -> Outcome {
    let client = connect::client(matches)?;
    let force = matches.get_flag("force");
    let output = connect::output(matches);
    if let Some(keys) = matches.get_many::<String>("keys") {
        let keys: Vec<&String> = keys.collect();
        let bytes: Vec<&[u8]> = keys.iter().map(|k| k.as_bytes()).collect();
        let results = client.remove(&bytes, force)?;
        let said = |r: &Result<(), _>| match r {
            Ok(()) => "removed".to_owned(),
            Err(e) => format!("{e}"),
        };
        if output == Output::Json {
            let all = keys
                .iter()
                .zip(&results)
                .map(|(k, r)| ((*k).clone(), json!(said(r))));
            print::json(&serde_json::Value::Object(all.collect()))?;
        } else {
            for (key, result) in keys.iter().zip(&results) {
                print::line(&format!("{}: {}", print::shown(key), said(result)))?;
            }
        }
        let all = results.iter().all(Result::is_ok);
        return Ok(if all {
            ExitStatus::Ok
        } else {
            ExitStatus::Negative
        });
    }
    let regex = matches
        .get_one::<String>("regex")
        .map_or("", String::as_str);
    if regex.is_empty() && !matches.get_flag("all") {
        return Err(
            super::UsageError("--regex: empty; use --all to remove everything".to_owned()).into(),
        );
    }
    let (removed, kept) = client.remove_matching(regex, force)?;
    if output == Output::Json {
        print::json(&json!({"removed": removed, "kept_leased": kept}))?;
    } else if kept > 0 {
        print::line(&format!(
            "{removed} removed, {kept} kept: leased by readers (--force removes them too)"
        ))?;
    } else {
        print::line(&format!("{removed} removed"))?;
    }
    Ok(if kept == 0 {
        ExitStatus::Ok
    } else {
        ExitStatus::Negative
    })
}
