//! The command line: one file per subcommand. The only home of clap, anyhow, comfy-table and indicatif.
//!
//! stdout is the result (text, or JSON with `--output json`), stderr is logs and progress.

mod api;
mod bench;
mod connect;
mod doctor;
mod drain;
mod exist;
mod generate;
mod get;
mod inspect;
mod ls;
mod master;
mod node;
mod print;
mod proxy;
mod proxy_settings;
mod put;
mod rm;
mod serve;
mod settings;
mod stat;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{ArgMatches, Command};

use crate::base::config::ConfigError;
use crate::base::trace;
use crate::store::model::error::StoreError;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// Done.
    Ok = 0,
    /// The answer is no: key absent, no space.
    Negative = 1,
    /// Wrong arguments or configuration.
    Usage = 2,
    /// Master or node not reachable, or it turned us away.
    Unreachable = 3,
    /// A defect of this program.
    Bug = 70,
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status as u8)
    }
}

/// A mistake in what was asked for, as opposed to an answer.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(pub(crate) String);

type Outcome = anyhow::Result<ExitStatus>;

struct Verb {
    name: &'static str,
    command: fn() -> Command,
    run: fn(&ArgMatches) -> Outcome,
}

const VERBS: &[Verb] = &[
    Verb {
        name: "master",
        command: master::command,
        run: master::run,
    },
    Verb {
        name: "node",
        command: node::command,
        run: node::run,
    },
    Verb {
        name: "proxy",
        command: proxy::command,
        run: proxy::run,
    },
    Verb {
        name: "put",
        command: put::command,
        run: put::run,
    },
    Verb {
        name: "get",
        command: get::command,
        run: get::run,
    },
    Verb {
        name: "exist",
        command: exist::command,
        run: exist::run,
    },
    Verb {
        name: "ls",
        command: ls::command,
        run: ls::run,
    },
    Verb {
        name: "rm",
        command: rm::command,
        run: rm::run,
    },
    Verb {
        name: "stat",
        command: stat::command,
        run: stat::run,
    },
    Verb {
        name: "inspect",
        command: inspect::command,
        run: inspect::run,
    },
    Verb {
        name: "drain",
        command: drain::command,
        run: drain::run,
    },
    Verb {
        name: "doctor",
        command: doctor::command,
        run: doctor::run,
    },
    Verb {
        name: "bench",
        command: bench::command,
        run: bench::run,
    },
    Verb {
        name: "generate",
        command: generate::command,
        run: generate::run,
    },
];

/// The `MOONCAKE_*` variables of all settings of `master` and `node`.
fn setting_variables() -> impl Iterator<Item = String> {
    let all = master::SETTINGS.iter().chain(node::SETTINGS);
    all.map(crate::base::config::Setting::variable)
}

/// As `--version` says it: which of the things that can be left out this build has. Not in the manual, which is the same
/// for all builds.
const VERSION: &str = if crate::engine::transport::rdma::BUILT {
    concat!(env!("CARGO_PKG_VERSION"), " (with RDMA)")
} else {
    concat!(env!("CARGO_PKG_VERSION"), " (without RDMA)")
};

/// The whole command line.
pub(crate) fn cli() -> Command {
    Command::new("mooncake")
        .version(env!("CARGO_PKG_VERSION"))
        .about("A shared KV-cache pool for LLM inference")
        .after_help(
            "Exit codes: 0 ok, 1 the answer is no, 2 usage or configuration, 3 unreachable.\n\
             Start with `mooncake master --memory 4GiB`, then `mooncake put KEY FILE`.",
        )
        .subcommand_required(true)
        .arg_required_else_help(true)
        .max_term_width(100)
        .subcommands(VERBS.iter().map(|v| (v.command)()))
}

/// Runs a command line.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitStatus {
    let matches = match cli().long_version(VERSION).try_get_matches_from(arguments) {
        Ok(matches) => matches,
        Err(error) => {
            // Help and version are results; clap knows the stream.
            let _ = error.print();
            return if error.use_stderr() {
                ExitStatus::Usage
            } else {
                ExitStatus::Ok
            };
        }
    };
    let Some((name, matches)) = matches.subcommand() else {
        return ExitStatus::Usage;
    };
    let Some(verb) = VERBS.iter().find(|v| v.name == name) else {
        return ExitStatus::Bug;
    };
    let status = match (verb.run)(matches) {
        Ok(status) => status,
        Err(error) => report(&error),
    };
    trace::flush();
    status
}

/// Prints an error in one line and chooses the exit code.
fn report(error: &anyhow::Error) -> ExitStatus {
    if print::is_broken_pipe(error) {
        return ExitStatus::Ok;
    }
    let line = format!("{error:#}").replace('\n', " ");
    print::error_line(&format!("mooncake: {line}"));
    status_of(error)
}

fn status_of(error: &anyhow::Error) -> ExitStatus {
    for cause in error.chain() {
        if let Some(error) = cause.downcast_ref::<StoreError>() {
            return match error {
                StoreError::MasterUnreachable { .. }
                | StoreError::Timeout { .. }
                | StoreError::Rebuilding
                | StoreError::TransferFailed { .. } => ExitStatus::Unreachable,
                StoreError::InvalidKey { .. } | StoreError::InvalidParams { .. } => {
                    ExitStatus::Usage
                }
                StoreError::Refused {
                    code: -400 | -600, ..
                } => ExitStatus::Usage,
                _ => ExitStatus::Negative,
            };
        }
        if cause.is::<ConfigError>() || cause.is::<UsageError>() || cause.is::<std::io::Error>() {
            return ExitStatus::Usage;
        }
    }
    ExitStatus::Negative
}
