//! `mooncake generate` (hidden): writes `completions/` and `man/` from the command line's definition. A test proves that
//! what is checked in is fresh.

use std::path::{Path, PathBuf};

use clap::{Arg, ArgMatches, Command};
use clap_complete::Shell;

use super::{ExitStatus, Outcome, cli};

pub(super) fn command() -> Command {
    Command::new("generate")
        .about("Write shell completions and man pages")
        .hide(true)
        .arg(
            Arg::new("directory")
                .value_name("DIR")
                .required(true)
                .value_parser(clap::value_parser!(PathBuf)),
        )
}

pub(super) fn run(matches: &ArgMatches) -> Outcome {
    let Some(directory) = matches.get_one::<PathBuf>("directory") else {
        return Ok(ExitStatus::Usage);
    };
    completions(&directory.join("completions"))?;
    man(&directory.join("man"))?;
    Ok(ExitStatus::Ok)
}

fn completions(directory: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(directory)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut cli(), "mooncake", directory)?;
    }
    Ok(())
}

fn man(directory: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(directory)?;
    // mangen makes one page per command.
    let mut command = cli().disable_help_subcommand(true);
    command.build();
    pages(directory, "mooncake", &command)
}

fn pages(directory: &Path, name: &str, command: &Command) -> std::io::Result<()> {
    let page = clap_mangen::Man::new(command.clone().name(name.to_owned()));
    let mut text = Vec::new();
    page.render(&mut text)?;
    std::fs::write(directory.join(format!("{name}.1")), text)?;
    for sub in command.get_subcommands().filter(|s| !s.is_hide_set()) {
        pages(directory, &format!("{name}-{}", sub.get_name()), sub)?;
    }
    Ok(())
}
