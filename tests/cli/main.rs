//! The command line: help of every command, every usage error, and that what is generated from it is fresh.
//! After a deliberate change: `TRYCMD=overwrite cargo test --test cli` and `mooncake generate .`.

use std::path::Path;

#[test]
fn help_and_usage_errors() {
    // Neither the caller's configuration nor its terminal may show in snapshots.
    let cases = trycmd::TestCases::new();
    for variable in [
        "MOONCAKE_MASTER",
        "MOONCAKE_CONFIG_PATH",
        "MOONCAKE_TOKEN",
        "RUST_LOG",
    ] {
        cases.env(variable, "");
    }
    cases.env("COLUMNS", "100");
    cases.case("tests/cli/cases/*.trycmd");
}

#[test]
fn completions_and_man_pages_are_fresh() {
    let fresh = tempfile::tempdir().unwrap();
    let generated = std::process::Command::new(env!("CARGO_BIN_EXE_mooncake"))
        .arg("generate")
        .arg(fresh.path())
        .status()
        .unwrap();
    assert!(generated.success());
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for directory in ["completions", "man"] {
        let names = |at: &Path| {
            let mut names: Vec<_> = std::fs::read_dir(at.join(directory))
                .unwrap()
                .map(|e| e.unwrap().file_name())
                .collect();
            names.sort();
            names
        };
        let wanted = names(fresh.path());
        assert_eq!(names(root), wanted, "run `mooncake generate .`");
        assert!(wanted.len() >= 3);
        for name in wanted {
            let read = |at: &Path| std::fs::read_to_string(at.join(directory).join(&name)).unwrap();
            assert!(
                read(root) == read(fresh.path()),
                "{directory}/{name:?} is stale: run `mooncake generate .`"
            );
        }
    }
}
