//! `mooncake bench` runs.

use crate::pool::{call, stderr, stdout};

/// A few milliseconds per cell: that the measurements run, compare and print; the figures are nobody's.
#[test]
fn bench_runs_beside_redis() {
    let arguments = [
        "bench",
        "store",
        "--sizes",
        "4KiB,1MiB",
        "--batches",
        "1,8",
        "--rounds",
        "1",
        "--time",
        "10ms",
        "--memory",
        "512MiB",
        "--vs",
        "redis",
        "--output",
        "json",
    ];
    let out = call(&arguments);
    assert!(
        out.status.success(),
        "{} (redis-server installed?)",
        stderr(&out)
    );
    let text = stdout(&out);
    for word in [
        "\"redis\"",
        "\"memcpy\"",
        "\"tcp stream\"",
        "\"echo\"",
        "same-host",
        "local",
    ] {
        assert!(text.contains(word), "{word}");
    }
    let out = call(&["bench", "master", "--objects", "2000", "--rounds", "1"]);
    assert!(out.status.success(), "{}", stderr(&out));
    assert!(stdout(&out).contains(" 0 failed"), "{}", stdout(&out));
}
