//! What was configured, and whether it makes sense: the file, its keys and values, the variables, contradictions.
//!
//! Owns the list of keys. Reads the file itself rather than through `base::mooncake_json`, which stops at the first fault;
//! a doctor names them all. Refuses to know whether anything configured can be reached.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::report::Finding;
use super::system::Root;
use super::values::{contradictions, token, values};
use crate::base::config::edit_distance;
use crate::base::mooncake_json::{DEFAULT_FILE, PATH_VARIABLE};
use crate::base::trust::Token;
use crate::base::units::ByteSize;

/// What the rest of the checks need of the configuration.
#[derive(Clone, Debug, Default)]
pub(super) struct Wanted {
    /// `host:port` of the master; `None` = nobody named one.
    pub(super) master: Option<String>,
    pub(super) hostname: Option<String>,
    pub(super) metadata: Option<String>,
    /// Memory to contribute, when somebody chose a size.
    pub(super) segment: Option<ByteSize>,
    pub(super) buffer: Option<ByteSize>,
    pub(super) rdma: bool,
    pub(super) devices: Vec<String>,
    pub(super) ssd: Option<PathBuf>,
    pub(super) tenant: String,
    pub(super) token: Option<Token>,
}

/// Keys of `mooncake.json` with the variable that stands for each without a file.
const KEYS: &[(&str, &str)] = &[
    ("local_hostname", "MOONCAKE_LOCAL_HOSTNAME"),
    ("metadata_server", "MOONCAKE_TE_META_DATA_SERVER"),
    ("master_server_address", "MOONCAKE_MASTER"),
    ("global_segment_size", "MOONCAKE_GLOBAL_SEGMENT_SIZE"),
    ("local_buffer_size", "MOONCAKE_LOCAL_BUFFER_SIZE"),
    ("protocol", "MOONCAKE_PROTOCOL"),
    ("device_name", "MOONCAKE_DEVICE"),
    ("tenant_id", "MOONCAKE_TENANT_ID"),
    ("enable_ssd_offload", "MOONCAKE_OFFLOAD_ENABLED"),
    ("ssd_offload_path", "MOONCAKE_OFFLOAD_FILE_STORAGE_PATH"),
    (
        "enable_client_http_server",
        "MOONCAKE_ENABLE_CLIENT_HTTP_SERVER",
    ),
    ("client_http_port", "MOONCAKE_CLIENT_HTTP_PORT"),
];

/// Keys that engines keep in the same file.
const OTHERS: &[&str] = &[
    "master_metrics_port",
    "check_server",
    "standalone_storage",
    "client_server_address",
    "storage_root_dir",
    "transfer_timeout",
    "prefer_alloc_in_same_node",
    "replica_num",
    "use_ascend_direct",
    "mooncake_config_path",
];

/// Variables that begin with `MOONCAKE_` and mean something, here or to an engine.
const VARIABLES: &[&str] = &[
    "MOONCAKE_CONFIG_PATH",
    "MOONCAKE_TOKEN",
    "MOONCAKE_CLIENT",
    "MOONCAKE_STANDALONE_STORAGE",
    "MOONCAKE_MASTER_METRICS_PORT",
    "MOONCAKE_CHECK_SERVER",
    "MOONCAKE_ENABLE_SSD_OFFLOAD",
    "MOONCAKE_TEST_LOGS",
];

const REQUIRED: [&str; 3] = ["local_hostname", "metadata_server", "master_server_address"];

/// Reads and judges everything. `variables` are all of the environment.
pub(super) fn check(
    file: Option<&Path>,
    token_file: Option<&Path>,
    variables: &[(String, String)],
    root: &Root,
) -> (Vec<Finding>, Wanted) {
    let mut found = Vec::new();
    let env = |name: &str| {
        let set = variables.iter().find(|(n, v)| n == name && !v.is_empty());
        set.map(|(_, v)| v.clone())
    };
    let named = file
        .map(Path::to_owned)
        .or_else(|| env(PATH_VARIABLE).map(PathBuf::from));
    let path = named.or_else(|| {
        Path::new(DEFAULT_FILE)
            .is_file()
            .then(|| DEFAULT_FILE.into())
    });
    let map = match &path {
        Some(path) => read(path, &mut found),
        None => Some(from_variables(&env, &mut found)),
    };
    let mut wanted = Wanted::default();
    if let Some(map) = &map {
        if path.is_some() {
            keys(map, &mut found);
            ignored_variables(map, &env, &mut found);
        }
        wanted = values(map, path.is_some(), &mut found);
        contradictions(map, &wanted, root, &mut found);
    }
    unknown_variables(variables, &mut found);
    wanted.token = token(token_file, &env, &mut found);
    (found, wanted)
}

fn read(path: &Path, found: &mut Vec<Finding>) -> Option<Map<String, Value>> {
    let name = path.display().to_string();
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) => {
            let (cause, remedy) = match e.kind() {
                std::io::ErrorKind::NotFound => (
                    "file_missing",
                    "correct --config or MOONCAKE_CONFIG_PATH, or write the file",
                ),
                std::io::ErrorKind::PermissionDenied => {
                    ("file_unreadable", "let this user read the file")
                }
                _ => ("file_unreadable", "name a readable file with --config"),
            };
            found.push(
                Finding::fail("file", cause, name, format!("cannot be read: {e}")).remedy(remedy),
            );
            return None;
        }
    };
    match serde_json::from_str::<Value>(&text) {
        Ok(Value::Object(map)) => {
            found.push(Finding::ok("file", name));
            found.extend(said_twice(&text));
            Some(map)
        }
        Ok(_) => {
            let reason = "is JSON, but not an object of settings";
            found.push(
                Finding::fail("file", "file_not_json", name, reason)
                    .remedy("write { \"key\": value, … }"),
            );
            None
        }
        Err(_) if text.starts_with('\u{feff}') => {
            let reason =
                "begins with a byte order mark, which some editors write and no JSON reader takes";
            found.push(
                Finding::fail("file", "file_byte_order_mark", name.clone(), reason)
                    .remedy("save it as UTF-8 without a byte order mark")
                    .command(format!("sed -i '1s/^\\xef\\xbb\\xbf//' {name}")),
            );
            None
        }
        Err(e) => {
            let reason = format!("is not JSON: {e}");
            found.push(
                Finding::fail("file", "file_not_json", name, reason)
                    .remedy("correct the file at that line"),
            );
            None
        }
    }
}

/// Keys that a file has more than once; the last of each counts, and nobody says so.
fn said_twice(text: &str) -> Vec<Finding> {
    struct Keys;
    impl<'de> serde::de::Visitor<'de> for Keys {
        type Value = Vec<String>;
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("an object")
        }
        fn visit_map<A: serde::de::MapAccess<'de>>(
            self,
            mut map: A,
        ) -> Result<Self::Value, A::Error> {
            let mut keys = Vec::new();
            while let Some((key, _)) = map.next_entry::<String, serde::de::IgnoredAny>()? {
                keys.push(key);
            }
            Ok(keys)
        }
    }
    let mut reader = serde_json::Deserializer::from_str(text);
    let mut keys = serde::Deserializer::deserialize_map(&mut reader, Keys).unwrap_or_default();
    keys.sort();
    let mut twice: Vec<String> = keys
        .windows(2)
        .filter(|w| w[0] == w[1])
        .map(|w| w[0].clone())
        .collect();
    twice.dedup();
    twice
        .into_iter()
        .map(|key| {
            let reason = "is in the file more than once: the last one counts, and some readers take the first";
            Finding::warn(format!("key {key}"), "key_twice", key, reason).remedy("leave one")
        })
        .collect()
}

/// The variables as a file would say it.
fn from_variables(
    env: &dyn Fn(&str) -> Option<String>,
    found: &mut Vec<Finding>,
) -> Map<String, Value> {
    let map: Map<String, Value> = KEYS
        .iter()
        .filter_map(|(key, variable)| Some(((*key).to_owned(), Value::String(env(variable)?))))
        .collect();
    let value = match map.len() {
        0 => "none; built-in defaults".to_owned(),
        n => format!("none; {n} MOONCAKE_* variables"),
    };
    found.push(Finding::ok("file", value));
    map
}

/// The known word that was probably meant.
pub(super) fn closest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_ascii_lowercase();
    let limit = (word.chars().count() / 3).clamp(1, 4);
    known
        .map(|k| (edit_distance(&word, &k.to_ascii_lowercase()), k))
        .min()
        .filter(|(distance, _)| *distance <= limit)
        .map(|(_, k)| k)
}

fn keys(map: &Map<String, Value>, found: &mut Vec<Finding>) {
    let known = || KEYS.iter().map(|(k, _)| *k).chain(OTHERS.iter().copied());
    for key in map.keys().filter(|key| known().all(|k| k != key.as_str())) {
        let f = Finding::warn(
            format!("key {key}"),
            "unknown_key",
            key.clone(),
            "nothing reads this key, so its value has no effect",
        );
        found.push(f.remedy(match closest(key, known()) {
            Some(meant) => format!("did you mean `{meant}`?"),
            None => "take it out, or correct its name".to_owned(),
        }));
    }
    for key in REQUIRED {
        if map.get(key).is_none_or(Value::is_null) {
            let f = Finding::fail(
                format!("key {key}"),
                "missing_key",
                "not there",
                "clients refuse a file without it",
            );
            found.push(f.remedy(match key {
                "local_hostname" => {
                    "add \"local_hostname\": the name or address under which others reach this host"
                }
                "metadata_server" => "add \"metadata_server\": \"P2PHANDSHAKE\"",
                _ => "add \"master_server_address\": \"HOST:50051\"",
            }));
        }
    }
}

/// A file is used whole: variables beside it do nothing, which surprises people.
fn ignored_variables(
    map: &Map<String, Value>,
    env: &dyn Fn(&str) -> Option<String>,
    found: &mut Vec<Finding>,
) {
    for (key, variable) in KEYS {
        let Some(value) = env(variable) else { continue };
        let same = map
            .get(*key)
            .is_some_and(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned) == value);
        if !same {
            let reason =
                "a configuration file is in use, and with a file the variables are not read";
            let remedy = format!("set \"{key}\" in the file, or unset {variable}");
            found.push(
                Finding::warn(
                    format!("variable {variable}"),
                    "variable_ignored",
                    value,
                    reason,
                )
                .remedy(remedy)
                .command(format!("unset {variable}")),
            );
        }
    }
}

fn unknown_variables(variables: &[(String, String)], found: &mut Vec<Finding>) {
    let known = || {
        let settings = super::super::setting_variables();
        KEYS.iter()
            .map(|(_, v)| (*v).to_owned())
            .chain(VARIABLES.iter().map(|v| (*v).to_owned()))
            .chain(settings)
    };
    for (name, _) in variables.iter().filter(|(n, _)| n.starts_with("MOONCAKE_")) {
        if known().any(|k| k == *name) {
            continue;
        }
        // Engines have variables of their own; only what looks like a slip is worth a warning.
        let all: Vec<String> = known().collect();
        if let Some(meant) =
            closest(name, all.iter().map(String::as_str)).filter(|m| edit_distance(m, name) <= 3)
        {
            let reason = "nothing reads this variable";
            found.push(
                Finding::warn(
                    format!("variable {name}"),
                    "unknown_variable",
                    name.clone(),
                    reason,
                )
                .remedy(format!("did you mean {meant}?")),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_close_to_known_ones() {
        let known = || KEYS.iter().map(|(k, _)| *k);
        assert_eq!(closest("protocl", known()), Some("protocol"));
        assert_eq!(
            closest("globel_segment_sise", known()),
            Some("global_segment_size")
        );
        assert_eq!(closest("colour", known()), None);
    }

    #[test]
    fn all_faults_of_a_file_are_named_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mooncake.json");
        let text = r#"{"metadata_server":"p2phandshak","protocl":"rdma","global_segment_size":"4 GBB",
            "local_buffer_size":16,"master_server_address":"a:b","client_http_port":70000}"#;
        std::fs::write(&path, text).unwrap();
        let (found, _) = check(Some(&path), None, &[], &Root::new(dir.path()));
        let causes: Vec<&str> = found.iter().map(|f| f.cause).collect();
        for cause in [
            "unknown_key",
            "missing_key",
            "unknown_metadata",
            "bad_size",
            "out_of_range",
            "bad_address",
        ] {
            assert!(causes.contains(&cause), "{cause}: {causes:?}");
        }
    }
}
