//! Python as an engine on this host would find it: which `mooncake` is imported, whether its libraries load, which vLLM.
//!
//! Imports nothing of them (vLLM takes seconds and opens GPUs): asks the import system where it would look.

use std::time::Duration;

use serde_json::Value;

use super::report::Finding;
use super::system::{self, Ran};

const LIMIT: Duration = Duration::from_secs(4);

/// Prints one JSON object. Only the standard library.
const SCRIPT: &str = r#"
import importlib.util, importlib.metadata as m, json, os, sys
out = {"python": sys.executable, "version": sys.version.split()[0]}
def spec(name):
    try:
        return importlib.util.find_spec(name)
    except Exception:
        return None
s = spec("mooncake")
if s:
    places = list(s.submodule_search_locations or [])
    out["origin"] = s.origin or (places[0] if places else "")
    out["namespace"] = s.origin is None or s.loader is None
    out["libraries"] = [os.path.join(p, f) for p in places if os.path.isdir(p) for f in sorted(os.listdir(p)) if ".so" in f][:16]
    out["store"] = any(os.path.exists(os.path.join(p, f)) for p in places if os.path.isdir(p) for f in os.listdir(p) if f.split(".")[0] == "store")
try:
    # A distribution that is found twice is installed twice.
    out["wheels"] = sorted({"%s %s" % (d.metadata["Name"], d.version) for d in m.distributions() if (d.metadata["Name"] or "").lower().replace("_", "-") in ("mooncake", "mooncake-rs", "mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda")})
except Exception:
    out["wheels"] = []
for name in ("vllm", "sglang", "lmcache"):
    try:
        out[name] = m.version(name)
    except Exception:
        pass
v = spec("vllm")
if v and v.submodule_search_locations:
    base = os.path.join(list(v.submodule_search_locations)[0], "distributed", "kv_transfer", "kv_connector", "v1")
    out["connectors"] = [n for n in ("mooncake_connector.py", "mooncake", "lmcache_connector.py") if os.path.exists(os.path.join(base, n))]
print(json.dumps(out))
"#;

pub(super) fn check() -> Vec<Finding> {
    let text = match system::run("python3", &["-c", SCRIPT], LIMIT) {
        Ran::Text(text) => text,
        Ran::Missing => return vec![Finding::skipped("python", "no python3 in PATH")],
        Ran::TimedOut => {
            return vec![
                Finding::warn(
                    "python",
                    "python_slow",
                    "python3",
                    "did not start within 4 s",
                )
                .remedy("look at PYTHONPATH and the disk it is on"),
            ];
        }
        Ran::Failed(why) => {
            return vec![
                Finding::warn(
                    "python",
                    "python_broken",
                    "python3",
                    format!("does not run: {why}"),
                )
                .remedy("mend the Python environment"),
            ];
        }
    };
    let said = text
        .lines()
        .last()
        .and_then(|l| serde_json::from_str::<Value>(l).ok());
    said.map_or_else(
        || vec![Finding::skipped("python", "it answered something else")],
        |v| judge(&v),
    )
}

fn judge(v: &Value) -> Vec<Finding> {
    let text = |name: &str| v.get(name).and_then(Value::as_str).unwrap_or_default();
    let list = |name: &str| -> Vec<String> {
        v.get(name)
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(|x| x.as_str().map(str::to_owned))
            .collect()
    };
    let mut found = vec![Finding::ok(
        "python",
        format!("{} ({})", text("version"), text("python")),
    )];
    let wheels = list("wheels");
    let origin = text("origin");
    if v.get("origin").is_none() {
        found.push(Finding::skipped(
            "mooncake module",
            "not installed in this Python",
        ));
    } else if v.get("namespace") == Some(&Value::Bool(true)) {
        let reason = "a plain directory of that name is imported instead of the module";
        found.push(
            Finding::fail("mooncake module", "module_shadowed", origin, reason)
                .remedy("run from another directory, or take the parent out of PYTHONPATH"),
        );
    } else if v.get("store") != Some(&Value::Bool(true)) {
        let reason = "another package of that name: it has no mooncake.store";
        found.push(
            Finding::fail("mooncake module", "module_foreign", origin, reason)
                .remedy("uninstall it, and install the wheel of this release")
                .command("python3 -m pip uninstall mooncake"),
        );
    } else if wheels.len() > 1 {
        let reason = "two wheels write the same module: what is imported is a mix";
        found.push(
            Finding::fail("mooncake module", "module_twice", wheels.join(", "), reason)
                .remedy("uninstall both, and install the one that is meant")
                .command(format!("python3 -m pip uninstall {}", names(&wheels))),
        );
    } else {
        let wheel = wheels
            .first()
            .map_or_else(|| "no wheel".to_owned(), Clone::clone);
        found.push(Finding::ok("mooncake module", format!("{wheel}, {origin}")));
        found.extend(libraries(&list("libraries")));
    }
    for engine in ["vllm", "sglang", "lmcache"] {
        if !text(engine).is_empty() {
            if engine == "vllm" && list("connectors").is_empty() {
                let reason = "it has no connector to mooncake or LMCache";
                found.push(
                    Finding::warn(engine, "vllm_without_connector", text(engine), reason)
                        .remedy("upgrade vLLM")
                        .command("python3 -m pip install -U vllm"),
                );
                continue;
            }
            let connectors = if engine == "vllm" {
                format!("; connectors: {}", list("connectors").join(", "))
            } else {
                String::new()
            };
            found.push(Finding::ok(engine, format!("{}{connectors}", text(engine))));
        }
    }
    if text("vllm").is_empty() {
        found.push(Finding::skipped("vllm", "not installed in this Python"));
    }
    found
}

fn names(wheels: &[String]) -> String {
    wheels
        .iter()
        .filter_map(|w| w.split(' ').next())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Shared libraries that the module's own ones want and the loader does not find.
fn libraries(all: &[String]) -> Option<Finding> {
    let mut missing = Vec::new();
    for path in all {
        let Ran::Text(text) = system::run("ldd", &[path], Duration::from_secs(2)) else {
            continue;
        };
        missing.extend(
            text.lines()
                .filter(|l| l.contains("=> not found"))
                .filter_map(|l| l.split_whitespace().next().map(str::to_owned)),
        );
    }
    missing.sort();
    missing.dedup();
    if all.is_empty() {
        return None;
    }
    if missing.is_empty() {
        return Some(Finding::ok(
            "module's libraries",
            format!("{} found with all they want", all.len()),
        ));
    }
    Some(
        Finding::fail(
            "module's libraries",
            "library_missing",
            missing.join(", "),
            "the module cannot be imported without them",
        )
        .remedy("install what has them, or use this release's wheel, which needs none"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_import_system_says() {
        let causes = |text: &str| -> Vec<&'static str> {
            judge(&serde_json::from_str(text).unwrap())
                .iter()
                .map(|f| f.cause)
                .filter(|c| !c.is_empty())
                .collect()
        };
        assert_eq!(causes("{}"), Vec::<&str>::new());
        assert_eq!(
            causes(r#"{"origin":"/x","namespace":true}"#),
            ["module_shadowed"]
        );
        assert_eq!(
            causes(r#"{"origin":"/x/__init__.py","namespace":false,"store":false}"#),
            ["module_foreign"]
        );
        assert_eq!(
            causes(r#"{"origin":"/x/__init__.py","store":true,"wheels":["a 1","b 2"]}"#),
            ["module_twice"]
        );
        assert_eq!(
            causes(
                r#"{"origin":"/x/__init__.py","store":true,"wheels":["a 1"],"vllm":"0.1","connectors":[]}"#
            ),
            ["vllm_without_connector"]
        );
    }
}
