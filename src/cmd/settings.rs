//! From a table of settings to flags, and from flags to resolved values.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command};

use super::print::{self, Columns, Output};
use crate::base::config::{ConfigError, Kind, Resolved, Setting, resolve};

/// Adds `--config`, `--print-config`, `--output` and a flag per setting.
pub(crate) fn add(command: Command, settings: &'static [Setting]) -> Command {
    let command = command
        .arg(
            Arg::new("config")
                .long("config")
                .alias("config_path")
                .value_name("FILE")
                .value_parser(clap::value_parser!(PathBuf))
                .help("Read settings from a TOML or JSON file"),
        )
        .arg(
            Arg::new("print-config")
                .long("print-config")
                .action(ArgAction::SetTrue)
                .help("Print every setting with its value and where it came from, and stop"),
        )
        .arg(output());
    settings
        .iter()
        .fold(command, |command, setting| command.arg(flag(setting)))
}

/// An upstream flag that has no meaning here; taken so that start scripts keep working.
pub(crate) const fn ignored(name: &'static str, aliases: &'static [&'static str]) -> Setting {
    Setting::new(name, aliases, Kind::Text, "", "")
}

/// `--output text|json`.
pub(crate) fn output() -> Arg {
    Arg::new("output")
        .long("output")
        .value_parser(clap::value_parser!(Output))
        .default_value("text")
        .help("How to print the result")
}

fn flag(setting: &'static Setting) -> Arg {
    let value_name = match setting.kind {
        Kind::Text => "TEXT",
        Kind::Flag => "BOOL",
        Kind::Integer(..) => "N",
        Kind::Ratio => "RATIO",
        Kind::Size(..) | Kind::SizeOrNone(..) => "SIZE",
        Kind::Time(_) => "TIME",
        Kind::Choice(_) => "NAME",
    };
    let mut help = setting.help.to_owned();
    if let Kind::Choice(words) = setting.kind {
        help = format!("{help}: {}", words.join(", "));
    }
    if !setting.default.is_empty() {
        help = format!("{help} [default: {}]", setting.default);
    }
    let mut arg = Arg::new(setting.name)
        .long(setting.name)
        .value_name(value_name)
        .help(help)
        .hide(setting.help.is_empty());
    if setting.name.contains('-') {
        arg = arg.alias(setting.name.replace('-', "_"));
    }
    for alias in setting.aliases {
        arg = arg.alias(*alias);
    }
    if matches!(setting.kind, Kind::Flag) {
        arg = arg
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true");
    }
    arg
}

/// Lays file, environment and flags over the defaults.
pub(crate) fn resolved(
    matches: &ArgMatches,
    settings: &'static [Setting],
) -> Result<Resolved, ConfigError> {
    let flags: Vec<(&str, String)> = settings
        .iter()
        .filter_map(|s| {
            // A flag that takes several values is a list separated by blanks, as in a file.
            let values: Vec<&str> = matches
                .get_many::<String>(s.name)?
                .map(String::as_str)
                .collect();
            Some((s.name, values.join(" ")))
        })
        .collect();
    let file = matches.get_one::<PathBuf>("config");
    resolve(
        settings,
        file.map(PathBuf::as_path),
        |n| std::env::var(n).ok(),
        &flags,
    )
}

/// Whether `--print-config` was given.
pub(crate) fn wants_print(matches: &ArgMatches) -> bool {
    matches.get_flag("print-config")
}

/// Prints every setting with its origin.
pub(crate) fn print_config(matches: &ArgMatches, resolved: &Resolved) -> std::io::Result<()> {
    if matches.get_one::<Output>("output") == Some(&Output::Json) {
        let all = resolved.all().map(|(name, value, origin)| {
            let entry = serde_json::json!({"value": value, "origin": origin.to_string()});
            (name.to_owned(), entry)
        });
        return print::json(&serde_json::Value::Object(all.collect()));
    }
    let mut table = Columns::new(&["SETTING", "VALUE", "ORIGIN"]);
    for (name, value, origin) in resolved.all() {
        table.row(&[name.to_owned(), value.to_owned(), origin.to_string()]);
    }
    table.print()
}
