//! The `mooncake` binary: parse, dispatch, exit code; nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    mooncake::cmd::run(std::env::args_os()).into()
}
