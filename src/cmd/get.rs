//! `mooncake get`: writes an object to a file or standard output, in pieces of bounded size.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Arg, ArgMatches, Command};
use serde_json::json;

use super::print::Output;
use super::{ExitStatus, Outcome, connect, print, put};
use crate::store::client::ObjectReader;

/// Bytes read at once.
const PIECE: u64 = 16 << 20;

pub(super) fn command() -> Command {
    connect::add(
        Command::new("get")
            .about("Write an object to a file or standard output")
            .arg(Arg::new("key").value_name("KEY").required(true))
            .arg(
                Arg::new("file")
                    .long("out")
                    .short('o')
                    .value_name("FILE")
                    .value_parser(clap::value_parser!(PathBuf))
                    .help("Where to; replaced only when everything has arrived [default: standard output]"),
            ),
    )
}

pub(super) fn run(matches: &ArgMatches) -> Outcome {
    let key = matches.get_one::<String>("key").map_or("", String::as_str);
    let path = matches.get_one::<PathBuf>("file");
    // Before asking for gigabytes: can they be written?
    let target = path.map(|p| Target::create(p)).transpose()?;
    let client = connect::client(matches)?;
    let reader = client
        .reader(key.as_bytes())
        .with_context(|| format!("cannot get `{key}`"))?;
    let size = reader.info().size;
    match target {
        Some(mut target) => {
            copy(reader, &mut target.file, true).with_context(|| format!("cannot get `{key}`"))?;
            let path = target.commit()?;
            if connect::output(matches) == Output::Json {
                print::json(
                    &json!({"key": key, "size_bytes": size, "file": path.to_string_lossy()}),
                )?;
            }
        }
        None => {
            let mut out = std::io::stdout().lock();
            copy(reader, &mut out, false).with_context(|| format!("cannot get `{key}`"))?;
            out.flush()?;
        }
    }
    Ok(ExitStatus::Ok)
}

fn copy(mut reader: ObjectReader<'_>, out: &mut impl Write, show: bool) -> anyhow::Result<()> {
    let size = reader.info().size;
    let bar = put::progress(if show { size } else { 0 });
    let mut piece = vec![0; size.min(PIECE) as usize];
    let mut done = 0;
    while done < size {
        let n = (size - done).min(PIECE) as usize;
        reader.read_at(done, &mut piece[..n])?;
        out.write_all(&piece[..n])?;
        done += n as u64;
        bar.set_position(done);
    }
    bar.finish_and_clear();
    Ok(())
}

/// Where an object goes. A regular file (or the one a symbolic link names) is replaced only when everything has arrived;
/// devices and pipes are written into.
struct Target {
    file: std::fs::File,
    path: PathBuf,
    /// Written first, then renamed over `path`.
    temporary: Option<PathBuf>,
}

impl Target {
    fn create(path: &Path) -> anyhow::Result<Self> {
        let cannot = || format!("cannot write {}", path.display());
        let shown = path.to_owned();
        // Through symbolic links, so that what they name is replaced and not the link.
        let real = match std::fs::canonicalize(path) {
            Ok(real) => real,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => path.to_owned(),
            Err(e) => return Err(e).with_context(cannot),
        };
        let existing = std::fs::metadata(&real).ok();
        if existing.as_ref().is_some_and(|m| !m.is_file()) {
            let file = std::fs::OpenOptions::new()
                .write(true)
                .open(&real)
                .with_context(cannot)?;
            return Ok(Self {
                file,
                path: shown,
                temporary: None,
            });
        }
        let mut name = real.file_name().unwrap_or_default().to_owned();
        name.push(format!(".part-{}", std::process::id()));
        let temporary = real.with_file_name(name);
        let file = std::fs::File::create(&temporary).with_context(cannot)?;
        if let Some(metadata) = existing {
            file.set_permissions(metadata.permissions())
                .with_context(cannot)?;
        }
        Ok(Self {
            file,
            path: real,
            temporary: Some(temporary),
        })
    }

    fn commit(mut self) -> anyhow::Result<PathBuf> {
        if let Some(temporary) = &self.temporary {
            std::fs::rename(temporary, &self.path)
                .with_context(|| format!("cannot write {}", self.path.display()))?;
        }
        self.temporary = None;
        Ok(self.path.clone())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _ = std::fs::remove_file(temporary);
        }
    }
}
