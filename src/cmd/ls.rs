//! `mooncake ls`: keys by prefix or regular expression.

use clap::{Arg, ArgMatches, Command};
use serde_json::{Value, json};

use super::print::{Columns, Output};
use super::{ExitStatus, Outcome, connect, print};
use crate::base::units::ByteSize;

/// Keys asked for at once.
const PAGE: u32 = 5000;

pub(super) fn command() -> Command {
    connect::add(
        Command::new("ls")
            .about("List keys, in no particular order")
            .arg(
                Arg::new("prefix")
                    .value_name("PREFIX")
                    .help("Only keys that begin with this"),
            )
            .arg(
                Arg::new("regex")
                    .long("regex")
                    .value_name("REGEX")
                    .conflicts_with("prefix")
                    .help("Only keys that match"),
            )
            .arg(
                Arg::new("long")
                    .long("long")
                    .short('l')
                    .action(clap::ArgAction::SetTrue)
                    .help("With size, replicas and version"),
            )
            .arg(
                Arg::new("limit")
                    .long("limit")
                    .value_name("N")
                    .value_parser(clap::value_parser!(u64).range(1..))
                    .help("Stop after this many"),
            ),
    )
}

pub(super) fn run(matches: &ArgMatches) -> Outcome {
    let client = connect::client(matches)?;
    let text = |name| matches.get_one::<String>(name).map_or("", String::as_str);
    let mut left = matches.get_one::<u64>("limit").copied().unwrap_or(u64::MAX);
    let json = connect::output(matches) == Output::Json;
    let long = matches.get_flag("long");
    let mut cursor = 0;
    let mut documents = Vec::new();
    let mut table = Columns::new(&[">SIZE", ">REPLICAS", ">VERSION", "KEY"]);
    loop {
        let page = client.list(text("prefix"), text("regex"), cursor, PAGE)?;
        for o in page.objects {
            if left == 0 {
                break;
            }
            left -= 1;
            let key = String::from_utf8_lossy(&o.key).into_owned();
            if json {
                documents.push(json!({
                    "key": key, "size_bytes": o.size_bytes, "replicas": o.replicas, "version": o.version.to_string(),
                }));
            } else if long {
                let size = ByteSize(o.size_bytes).to_string();
                let key = print::shown(&key);
                table.row(&[size, o.replicas.to_string(), o.version.to_string(), key]);
            } else {
                print::line(&print::shown(&key))?;
            }
        }
        cursor = page.next_cursor;
        if cursor == 0 || left == 0 {
            break;
        }
    }
    if json {
        print::json(&Value::Array(documents))?;
    } else if long {
        table.print()?;
    }
    Ok(ExitStatus::Ok)
}
