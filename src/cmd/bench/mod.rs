//! `mooncake bench`: measures this machine's pool beside what bounds it and what competes with it.
//!
//! Every cell runs its sides in turn within each round, so that drift of the machine hits all of them; figures are medians
//! over rounds with minimum and maximum, ratios are taken round by round.

mod limits;
mod master;
mod redis_side;
mod region;
mod report;
mod rig;
mod sample;
mod store;

use clap::{ArgMatches, Command};

use super::{ExitStatus, Outcome};

pub(super) fn command() -> Command {
    Command::new("bench")
        .about(
            "Measure: put, get and exist beside the machine's limits and Redis; the master alone",
        )
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(store::command())
        .subcommand(master::command())
        .subcommand(limits::peer_command())
}

pub(super) fn run(matches: &ArgMatches) -> Outcome {
    match matches.subcommand() {
        Some(("store", matches)) => store::run(matches),
        Some(("master", matches)) => master::run(matches),
        Some(("peer", matches)) => limits::run_peer(matches),
        _ => Ok(ExitStatus::Usage),
    }
}
