//! The machine as the checks see it: files below a root, programs that answer in time, work with a deadline.
//!
//! Owns every read of `/proc`, `/sys` and `/dev`, so that a test can put a tree of its own in their place. Judges nothing.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// Where `/proc`, `/sys` and the rest are found.
#[derive(Clone, Debug)]
pub(super) struct Root(PathBuf);

/// Most bytes read of one file: nothing here is larger, and a fixture may be anything.
const FILE_MAX: u64 = 4 << 20;

impl Root {
    pub(super) fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// Whether this is the machine itself.
    pub(super) fn is_real(&self) -> bool {
        self.0 == Path::new("/")
    }

    pub(super) fn at(&self, path: &str) -> PathBuf {
        self.0.join(path.trim_start_matches('/'))
    }

    /// A file's text without blanks around it; `None` when it cannot be read.
    pub(super) fn read(&self, path: &str) -> Option<String> {
        let mut text = String::new();
        let file = std::fs::File::open(self.at(path)).ok()?;
        file.take(FILE_MAX).read_to_string(&mut text).ok()?;
        Some(text.trim().to_owned())
    }

    pub(super) fn number(&self, path: &str) -> Option<u64> {
        self.read(path)?.parse().ok()
    }

    pub(super) fn exists(&self, path: &str) -> bool {
        self.at(path).exists()
    }

    /// Names in a directory, sorted; none when it is not there.
    pub(super) fn names(&self, path: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.at(path)) else {
            return Vec::new();
        };
        let mut names: Vec<String> = entries
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }

    /// The value of `Name:   123 kB` in a file of such lines, in bytes (or as is without a unit).
    pub(super) fn field(&self, path: &str, name: &str) -> Option<u64> {
        let text = self.read(path)?;
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
        let mut words = line.split_whitespace();
        let number: u64 = words.next()?.parse().ok()?;
        Some(if words.next() == Some("kB") {
            number.saturating_mul(1024)
        } else {
            number
        })
    }
}

/// Runs `work` in a thread and waits for at most `limit`. The thread is left behind then: it ends with the process.
pub(super) fn within<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let _ = sender.send(work());
    });
    receiver.recv_timeout(limit).ok()
}

/// What came of running a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ran {
    /// It printed this and was content.
    Text(String),
    /// It is not installed.
    Missing,
    /// It said no; its last line.
    Failed(String),
    /// It had to be stopped.
    TimedOut,
}

/// Runs a program without a terminal, for at most `limit`.
pub(super) fn run(program: &str, arguments: &[&str], limit: Duration) -> Ran {
    let started = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match started {
        Ok(child) => child,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ran::Missing,
        Err(e) => return Ran::Failed(e.to_string()),
    };
    let end = Instant::now() + limit;
    let out = collect(child.stdout.take());
    let err = collect(child.stderr.take());
    loop {
        match child.try_wait() {
            Ok(Some(status)) => {
                // A grandchild may hold the pipe: what it says is not waited for.
                let left = Duration::from_millis(200);
                let text = out.recv_timeout(left).unwrap_or_default();
                if status.success() {
                    return Ran::Text(text);
                }
                let said = err.recv_timeout(left).unwrap_or_default();
                let last = said.lines().rfind(|l| !l.trim().is_empty());
                return Ran::Failed(last.unwrap_or("no message").trim().to_owned());
            }
            Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                return Ran::TimedOut;
            }
        }
    }
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> std::sync::mpsc::Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(pipe) = pipe {
            let _ = pipe.take(FILE_MAX).read_to_end(&mut bytes);
        }
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_end_in_time() {
        let limit = Duration::from_millis(300);
        assert_eq!(run("echo", &["x"], limit), Ran::Text("x\n".to_owned()));
        assert_eq!(run("no-such-program-here", &[], limit), Ran::Missing);
        assert_eq!(run("sleep", &["9"], limit), Ran::TimedOut);
        assert!(matches!(
            run("ls", &["/nonexistent"], limit),
            Ran::Failed(_)
        ));
        assert_eq!(
            within(limit, || std::thread::sleep(Duration::from_secs(9))),
            None
        );
    }

    #[test]
    fn files_below_a_root() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("m"), "A:  3 kB\nB: 7\n").unwrap();
        let root = Root::new(dir.path());
        assert_eq!(root.field("/m", "A"), Some(3072));
        assert_eq!(root.field("/m", "B"), Some(7));
        assert_eq!(root.field("/m", "C"), None);
        assert!(!root.is_real());
    }
}
