//! Rules the compiler does not hold: the direction of dependencies between rooms, and where clap, printing and unsafe
//! code may be.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

use std::path::{Path, PathBuf};

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// Every source file with its path below `src` and its code without comments and tests.
fn code() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    sources(&root, &mut found);
    assert!(found.len() > 40, "the sources were found");
    let read = |path: PathBuf| {
        let name = path
            .strip_prefix(&root)
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        let code = text
            .split("#[cfg(test)]\nmod tests")
            .next()
            .unwrap_or_default();
        let code: Vec<&str> = code
            .lines()
            .filter(|l| !l.trim_start().starts_with("//"))
            .collect();
        (name, code.join("\n"))
    };
    found.into_iter().map(read).collect()
}

fn violations(rule: impl Fn(&str, &str) -> Option<String>) -> Vec<String> {
    let all = code();
    all.iter()
        .filter_map(|(name, text)| Some(format!("{name}: {}", rule(name, text)?)))
        .collect()
}

#[test]
fn dependencies_point_one_way() {
    // Room (longest prefix first) → rooms it may not name.
    let forbidden: &[(&str, &[&str])] = &[
        (
            "base/",
            &[
                "crate::engine",
                "crate::store",
                "crate::proxy",
                "crate::cmd",
            ],
        ),
        ("engine/", &["crate::store", "crate::proxy", "crate::cmd"]),
        (
            "store/master/",
            &[
                "store::client",
                "store::node",
                "crate::proxy",
                "crate::cmd",
                "engine::batch",
            ],
        ),
        (
            "store/client/",
            &["store::master", "store::node", "crate::proxy", "crate::cmd"],
        ),
        (
            "store/node/",
            &[
                "store::master",
                "store::client",
                "crate::proxy",
                "crate::cmd",
            ],
        ),
        (
            "store/model/",
            &[
                "store::master",
                "store::node",
                "store::client",
                "crate::engine",
            ],
        ),
        (
            "store/alloc/",
            &[
                "store::master",
                "store::node",
                "store::client",
                "crate::engine",
            ],
        ),
        (
            "store/rest.rs",
            &[
                "store::master",
                "super::master",
                "store::node",
                "super::node",
            ],
        ),
        ("store/", &["crate::proxy", "crate::cmd"]),
        (
            "proxy/",
            &[
                "crate::cmd",
                "crate::engine",
                "store::master",
                "store::node",
                "store::alloc",
            ],
        ),
    ];
    let found = violations(|name, text| {
        let (room, banned) = forbidden.iter().find(|(room, _)| name.starts_with(room))?;
        let named = banned.iter().find(|b| text.contains(*b))?;
        Some(format!("{room} must not know {named}"))
    });
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn the_masters_state_does_no_io_and_reads_no_clock() {
    let pure = [
        "object",
        "shard",
        "segments",
        "placement",
        "state",
        "puts",
        "removal",
        "rebuild",
        "eviction",
        "events",
        "arenas",
        "index",
        "copies",
        "drain",
        "drain_record",
        "quotas",
        "history",
        "reconcile",
    ];
    let found = violations(|name, text| {
        let file = name.strip_prefix("store/master/")?;
        if !pure.iter().any(|p| file.starts_with(p)) {
            return None;
        }
        let banned = [
            "tokio",
            "std::net",
            "std::fs",
            "Millis::now",
            "async fn",
            "thread::sleep",
        ];
        banned
            .iter()
            .find(|b| text.contains(*b))
            .map(|b| format!("uses {b}"))
    });
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn command_line_crates_stay_in_cmd() {
    let found = violations(|name, text| {
        if name.starts_with("cmd/") {
            return None;
        }
        let banned = [
            "clap::",
            "anyhow",
            "comfy_table",
            "indicatif",
            "println!",
            "process::exit",
        ];
        banned
            .iter()
            .find(|b| text.contains(*b))
            .map(|b| format!("uses {b}"))
    });
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn unsafe_code_is_where_memory_is_shared() {
    let allowed = [
        "base/prefetch.rs",
        "engine/",
        "store/arena_table.rs",
        "store/client/arena_put.rs",
        "store/client/arenas.rs",
        "store/client/get.rs",
        "store/client/mod.rs",
        "store/client/put.rs",
        "store/client/put_session.rs",
        "store/client/replicas.rs",
        "store/node/mover.rs",
        "cmd/put.rs",
        "cmd/bench/",
    ];
    let found = violations(|name, text| {
        let needs =
            text.contains("unsafe {") || text.contains("unsafe fn") || text.contains("unsafe impl");
        (needs && !allowed.iter().any(|a| name.starts_with(a)))
            .then(|| "has unsafe code".to_owned())
    });
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn every_module_says_what_it_owns() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    sources(&root, &mut found);
    let bare: Vec<PathBuf> = found
        .into_iter()
        .filter(|p| !std::fs::read_to_string(p).unwrap().starts_with("//! "))
        .collect();
    assert!(bare.is_empty(), "{bare:?}");
}
