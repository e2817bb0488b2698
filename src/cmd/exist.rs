//! `mooncake exist`: whether keys are there.

use clap::{Arg, ArgMatches, Command};
use serde_json::json;

use super::print::Output;
use super::{ExitStatus, Outcome, connect, print};

pub(super) fn command() -> Command {
    connect::add(
        Command::new("exist")
            .about("Say whether keys are in the pool (exit code 1 when one is not)")
            .arg(
                Arg::new("keys")
                    .value_name("KEY")
                    .required(true)
                    .num_args(1..),
            ),
    )
}

pub(super) fn run(matches: &ArgMatches) -> Outcome {
    let client = connect::client(matches)?;
    let keys: Vec<&String> = matches.get_many("keys").unwrap_or_default().collect();
    let bytes: Vec<&[u8]> = keys.iter().map(|k| k.as_bytes()).collect();
    let found = client.exist(&bytes)?;
    if connect::output(matches) == Output::Json {
        let all = keys
            .iter()
            .zip(&found)
            .map(|(k, f)| ((*k).clone(), json!(f)));
        print::json(&serde_json::Value::Object(all.collect()))?;
    } else {
        for (key, found) in keys.iter().zip(&found) {
            print::line(&format!(
                "{}  {}",
                if *found { "yes" } else { "no " },
                print::shown(key)
            ))?;
        }
    }
    let all = found.iter().all(|f| *f);
    Ok(if all {
        ExitStatus::Ok
    } else {
        ExitStatus::Negative
    })
}
