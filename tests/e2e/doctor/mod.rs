//! `mooncake doctor` against faults that are really there: each must be named as itself, by the right check with the right
//! cause, and nothing else may be called a fault. The table of docs/doctor.md is made from what was said:
//! `MOONCAKE_DOCTOR_DOC=write cargo test --test e2e doctor` writes it, without that the test checks that it is fresh.
//!
//! Faults that need root (network namespaces, mounts) or a program are skipped by name where those are missing.

mod faults;
mod fixtures;
mod hardware;
mod instances;
mod mesh;
mod network;
mod pool;
mod strangers;
mod unforeseen;

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;

use crate::pool::{BINARY, Pool};

/// What a doctor said, or why the fault could not be made here.
pub(crate) type Said = Result<Value, String>;

/// One fault and what must be said of it.
pub(crate) struct Fault {
    pub(crate) area: &'static str,
    /// The fault, as the table names it.
    pub(crate) what: &'static str,
    /// Start of the check's name, its status, its cause.
    pub(crate) expect: (&'static str, &'static str, &'static str),
    /// Other causes that the same fault rightly brings up.
    pub(crate) also: &'static [&'static str],
    pub(crate) make: fn(&Lab) -> Said,
}

/// What all faults share: a healthy pool to point at, so that nothing but the fault is wrong.
pub(crate) struct Lab {
    pub(crate) master: String,
    pub(crate) directory: tempfile::TempDir,
}

impl Lab {
    /// A fresh directory.
    pub(crate) fn place(&self) -> std::path::PathBuf {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = self.directory.path().join(format!("case{n}"));
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    /// The doctor with arguments and variables, pointed at the healthy pool.
    pub(crate) fn doctor(&self, arguments: &[&str], variables: &[(&str, &str)]) -> Said {
        let mut all = vec!["--master", &self.master];
        all.extend_from_slice(arguments);
        doctor(&all, variables, &self.place())
    }

    /// The same with a `mooncake.json`.
    pub(crate) fn with_file(&self, text: &str, arguments: &[&str]) -> Said {
        let place = self.place();
        std::fs::write(
            place.join("mooncake.json"),
            text.replace("MASTER", &self.master),
        )
        .unwrap();
        doctor(arguments, &[], &place)
    }
}

pub(crate) fn command(place: &Path) -> Command {
    let mut command = Command::new(BINARY);
    command.current_dir(place).stdin(Stdio::null());
    for (name, _) in std::env::vars() {
        if name.starts_with("MOONCAKE_")
            || name.starts_with("MC_")
            || name == "PYTHONPATH"
            || name.to_lowercase().ends_with("_proxy")
        {
            command.env_remove(name);
        }
    }
    command
}

/// Runs it; the exit code must agree with what it says, and it must end in time.
pub(crate) fn doctor(arguments: &[&str], variables: &[(&str, &str)], place: &Path) -> Said {
    let start = std::time::Instant::now();
    let mut command = command(place);
    command.args(["doctor", "--output", "json"]).args(arguments);
    let output = command.envs(variables.iter().copied()).output().unwrap();
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    parse(&output.stdout, output.status.code())
}

pub(crate) fn parse(stdout: &[u8], code: Option<i32>) -> Said {
    let text = String::from_utf8_lossy(stdout);
    let said: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let failed = said["fail"].as_u64() > Some(0);
    assert_eq!(code, Some(i32::from(failed)), "{text}");
    Ok(said)
}

/// Every check that is not well: group, and the check.
fn faults_of(said: &Value) -> Vec<(String, Value)> {
    let groups = said["groups"].as_array().cloned().unwrap_or_default();
    groups
        .iter()
        .flat_map(|g| {
            let name = g["group"].as_str().unwrap_or_default().to_owned();
            let checks = g["checks"].as_array().cloned().unwrap_or_default();
            checks.into_iter().map(move |c| (name.clone(), c))
        })
        .filter(|(_, c)| matches!(c["status"].as_str(), Some("warn" | "fail")))
        .collect()
}

/// What differs from run to run and machine to machine.
fn redacted(text: &str) -> String {
    let rules = [
        (r"(/\S*)?/\.tmp\w+(/case\d+)?", "DIR"),
        (r"(case|port |sport = |dport |:)\d{4,5}\b", "${1}PORT"),
        (r"\(pid \d+\)", "(pid N)"),
        (r"(held by|of) e2e-\w+", "$1 PROGRAM"),
        (r"\d+ of \d+ TCP segments", "N of N TCP segments"),
        (r"for \d+ questions", "for N questions"),
        (r"\d+ refusals", "N refusals"),
        (r"MiB used \(\d+ %\), \d+ objects", "MiB used, N objects"),
        (r"about \d+ needed", "about N needed"),
        (r"of \d+: \d+ only on lost", "of N: N only on lost"),
        (
            r"[\d.]+ MiB free, largest range [\d.]+ KiB",
            "SIZE free, largest range SIZE",
        ),
        (r"[\d.]+ MiB of 16 MiB used", "SIZE of 16 MiB used"),
        (r"\d+ objects, [\d.]+ \w+ since", "N objects, SIZE since"),
        (r"\d+ since the master", "N since the master"),
        (r"replaced every \w+", "replaced every TIME"),
        (r"\d+(\.\d+)? [KMG]iB/s", "RATE"),
        (r"counter packets \d+ bytes \d+ ", ""),
        (r"(out_of_sequence|np_cnp_sent) \+\d+", "$1 +N"),
        (r"[\d.]+ (B|KiB|MiB|GiB) (write|are under way)", "SIZE $2"),
        (r"\b\d+(\.\d+)? (us|ms|s)\b", "TIME"),
        (
            r"\d+(\.\d+)? (B|KiB|MiB|GiB|TiB) (of \d+(\.\d+)? \w+ )?available",
            "SIZE available",
        ),
        (r"at most \d+(\.\d+)? (B|KiB|MiB|GiB|TiB)\b", "at most SIZE"),
        (r"\d+ MB/s", "RATE"),
        (r"\|", "\\|"),
    ];
    let mut text = text.to_owned();
    for (pattern, with) in rules {
        text = regex::Regex::new(pattern)
            .unwrap()
            .replace_all(&text, with)
            .into_owned();
    }
    text
}

fn row(fault: &Fault, check: &Value) -> String {
    let text = |name: &str| check[name].as_str().unwrap_or_default();
    let name = redacted(text("check"));
    let said = redacted(&format!("{}: {}", text("value"), text("reason")));
    format!(
        "| {} | {name}: **{}** `{}` | {said} | {} |",
        fault.what,
        text("status"),
        text("cause"),
        redacted(text("remedy"))
    )
}

#[test]
fn doctor_names_every_fault_as_itself() {
    let pool = Pool::start(1, "64MiB", &[]);
    let lab = Lab {
        master: pool.address.clone(),
        directory: tempfile::tempdir().unwrap(),
    };
    let all: Vec<Fault> = [
        faults::all(),
        fixtures::all(),
        hardware::all(),
        pool::all(),
        unforeseen::all(),
        strangers::all(),
        instances::all(),
        network::all(),
        mesh::all(),
    ]
    .into_iter()
    .flatten()
    .collect();
    let only = std::env::var("MOONCAKE_DOCTOR_ONLY").unwrap_or_default();
    let rows: Vec<Mutex<Option<String>>> = all.iter().map(|_| Mutex::new(None)).collect();
    let wrong = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(fault) = all.get(at) else { return };
                    if !fault.what.contains(&only) && !fault.area.contains(&only) {
                        continue;
                    }
                    let said = match std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                        (fault.make)(&lab)
                    })) {
                        Ok(Ok(said)) => said,
                        Err(_) => {
                            wrong
                                .lock()
                                .unwrap()
                                .push(format!("{}: panicked", fault.what));
                            continue;
                        }
                        Ok(Err(why)) => {
                            println!("skipped: {} ({why})", fault.what);
                            continue;
                        }
                    };
                    let (check, status, cause) = fault.expect;
                    let found = faults_of(&said);
                    let as_itself = found.iter().find(|(_, c)| {
                        c["check"].as_str().is_some_and(|n| n.starts_with(check))
                            && c["status"] == status
                            && c["cause"] == cause
                    });
                    // Hosts that are namespaces share a kernel, and no shared memory.
                    let one_kernel = fault.area.contains("namespaces");
                    let strange: Vec<_> = found
                        .iter()
                        .filter(|(_, c)| !one_kernel || c["cause"] != "same_host_tcp")
                        // A busy machine is slow here and there; what is about speed is looked for by name.
                        .filter(|(_, c)| {
                            let found = c["cause"].as_str().unwrap_or_default();
                            let of_speed =
                                |c: &str| c.starts_with("mesh_slow") || c.starts_with("mesh_far");
                            of_speed(cause) || !of_speed(found)
                        })
                        .filter(|(_, c)| {
                            c["cause"] != cause && !fault.also.iter().any(|a| c["cause"] == *a)
                        })
                        .collect();
                    match as_itself {
                        Some((_, check)) if strange.is_empty() => {
                            let told =
                                |name: &str| check[name].as_str().is_some_and(|t| !t.is_empty());
                            if !told("reason") || !told("remedy") {
                                wrong.lock().unwrap().push(format!(
                                    "{}: no reason or no remedy: {check}",
                                    fault.what
                                ));
                            }
                            *rows[at].lock().unwrap() = Some(row(fault, check));
                        }
                        _ => wrong.lock().unwrap().push(format!(
                            "{}: {:?} wanted, said {found:#?}",
                            fault.what, fault.expect
                        )),
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(
        wrong.is_empty(),
        "{} of {} faults:\n{}",
        wrong.len(),
        all.len(),
        wrong.join("\n")
    );
    let rows: Vec<Option<String>> = rows.into_iter().map(|r| r.into_inner().unwrap()).collect();
    println!(
        "{} of {} faults made and named",
        rows.iter().flatten().count(),
        all.len()
    );
    if only.is_empty() {
        document(&all, &rows);
    }
}

const BEGIN: &str = "<!-- faults: made by tests/e2e/doctor -->\n";
const END: &str = "<!-- end of faults -->\n";

/// Writes or checks the table. A fault that could not be made here keeps its row.
fn document(all: &[Fault], rows: &[Option<String>]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/doctor.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (head, rest) = text
        .split_once(BEGIN)
        .expect("docs/doctor.md has the mark where the table begins");
    let (old, tail) = rest
        .split_once(END)
        .expect("docs/doctor.md has the mark where the table ends");
    let mut table = format!("\n{} faults.\n", all.len());
    let mut area = "";
    for (fault, row) in all.iter().zip(rows) {
        if fault.area != area {
            area = fault.area;
            table.push_str(&format!("\n### {area}\n\n| fault | check | what doctor says | remedy |\n| --- | --- | --- | --- |\n"));
        }
        let start = format!("| {} |", fault.what);
        let kept = || {
            old.lines()
                .find(|l| l.starts_with(&start))
                .map(str::to_owned)
        };
        let line = row
            .clone()
            .or_else(kept)
            .unwrap_or_else(|| panic!("{}: made nowhere yet", fault.what));
        table.push_str(&line);
        table.push('\n');
    }
    table.push('\n');
    if std::env::var("MOONCAKE_DOCTOR_DOC").is_ok_and(|v| v == "write") {
        std::fs::write(&path, format!("{head}{BEGIN}{table}{END}{tail}")).unwrap();
        return;
    }
    let stale: Vec<_> = table
        .lines()
        .filter(|l| !old.lines().any(|o| o == *l))
        .collect();
    assert!(
        old == table,
        "docs/doctor.md is stale: MOONCAKE_DOCTOR_DOC=write cargo test --test e2e doctor\n{}",
        stale.join("\n")
    );
}

#[test]
fn doctor_has_nothing_to_say_of_a_healthy_pool() {
    let pool = Pool::start(2, "64MiB", &[]);
    let place = tempfile::tempdir().unwrap();
    let file = format!(
        r#"{{"local_hostname":"localhost","metadata_server":"http://{0}/metadata","master_server_address":"{0}",
            "global_segment_size":"64MB","local_buffer_size":"16MB","protocol":"tcp"}}"#,
        pool.address
    );
    std::fs::write(place.path().join("mooncake.json"), file).unwrap();
    let node = pool.client().segments().unwrap()[0].address.clone();
    for arguments in [&["--peer", node.as_str()][..], &[]] {
        let said = doctor(arguments, &[], place.path()).unwrap();
        assert_eq!(faults_of(&said), [], "no warning and no failure");
        assert!(said["ok"].as_u64() > Some(20), "{said}");
    }
    // As text: short lines, the sum last; with --fix no command.
    let run = |arguments: &[&str]| {
        let out = command(place.path())
            .arg("doctor")
            .args(arguments)
            .output()
            .unwrap();
        assert_eq!(out.status.code(), Some(0));
        String::from_utf8_lossy(&out.stdout).into_owned()
    };
    let text = run(&[]);
    assert!(
        text.lines()
            .last()
            .is_some_and(|l| l.contains("0 failed, 0 warnings")),
        "{text}"
    );
    assert!(text.lines().all(|l| l.chars().count() <= 130), "{text}");
    let commands = run(&["--fix"]);
    assert!(
        commands.lines().all(|l| l.starts_with("# no command")),
        "{commands}"
    );
}

#[test]
fn doctor_prints_commands_and_no_secret() {
    let place = tempfile::tempdir().unwrap();
    let token = place.path().join("token");
    std::fs::write(&token, "open sesame").unwrap();
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o644)).unwrap();
    let token = token.to_str().unwrap();
    let master = strangers::closed_port();
    let file = format!(
        r#"{{"local_hostname":"localhost","metadata_server":"redis://u:hidden@{master}/0","master_server_address":"{master}"}}"#
    );
    std::fs::write(place.path().join("mooncake.json"), file).unwrap();
    for more in [&["--fix"][..], &["--output", "json"], &[]] {
        let out = command(place.path())
            .args(["doctor", "--token-file", token])
            .args(more)
            .output()
            .unwrap();
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
        assert_eq!(out.status.code(), Some(1), "{text}");
        assert!(
            !text.contains("sesame") && !text.contains("hidden"),
            "{text}"
        );
        if more == ["--fix"] {
            assert!(text.contains(&format!("chmod 640 {token}\n")), "{text}");
            assert!(
                text.lines().filter(|l| !l.starts_with('#')).count() >= 2,
                "{text}"
            );
        }
    }
}

/// Numbers of a mesh: every pair of three nodes, with a token, there and in JSON.
#[test]
fn a_sound_mesh_is_a_full_matrix() {
    let place = tempfile::tempdir().unwrap();
    let token = place.path().join("token");
    std::fs::write(&token, "open sesame").unwrap();
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o600)).unwrap();
    let token = token.to_str().unwrap();
    let pool = Pool::start_on(
        "127.0.0.1",
        3,
        "16MiB",
        &["--token-file", token],
        &["--token-file", token],
    );
    let arguments = ["--master", &pool.address, "--token-file", token, "--mesh"];
    let said = doctor(&arguments, &[], place.path()).unwrap();
    assert_eq!(faults_of(&said), []);
    let pairs = said["mesh"]["pairs"].as_array().unwrap();
    assert_eq!(pairs.len(), 6, "{said}");
    for pair in pairs {
        assert_eq!(pair["status"], "ok", "{pair}");
        assert!(pair["moved_bytes"].as_u64() >= Some(1 << 20), "{pair}");
        assert!(pair["bytes_per_second"].as_u64() > Some(1 << 20), "{pair}");
        assert!(pair["round_trip_us"].as_u64() > Some(0), "{pair}");
    }
    assert_eq!(said["mesh"]["complete"], true);
    let out = command(place.path())
        .arg("doctor")
        .args(arguments)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let rows: Vec<&str> = text.lines().filter(|l| l.contains('│')).collect();
    let rates: usize = rows.iter().map(|r| r.matches("/s").count()).sum();
    assert_eq!((rows.len(), rates), (4, 6), "{text}");
    // Without the token nobody starts one.
    let without = doctor(&["--master", &pool.address, "--mesh"], &[], place.path()).unwrap();
    assert!(without["mesh"].is_null() && without["fail"].as_u64() > Some(0));
}
