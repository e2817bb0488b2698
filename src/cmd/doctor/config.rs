//! What was configured, and whether it makes sense: the file, its keys and values, the variables, contradictions.
//!
//! Owns the list of keys. Reads the file itself rather than through `base::mooncake_json`, which stops at the first fault;
//! a doctor names them all. Refuses to know whether anything configured can be reached.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::report::Finding;
use super::system::Root;
use crate::base::config::edit_distance;
use crate::base::mooncake_json::{DEFAULT_FILE, PATH_VARIABLE};
use crate::base::net::split_host_port;
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
const SCHEMES: [&str; 3] = ["etcd://", "redis://", "http://"];

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
fn closest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
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

fn values(map: &Map<String, Value>, in_file: bool, found: &mut Vec<Finding>) -> Wanted {
    let mut text = |key: &str| match map.get(key) {
        None | Some(Value::Null) => None,
        Some(Value::String(s)) => Some(s.trim().to_owned()).filter(|s| !s.is_empty()),
        Some(other) => {
            let f = Finding::fail(key, "wrong_type", other.to_string(), "must be a text");
            found.push(f.remedy(format!("write \"{key}\": \"…\"")));
            None
        }
    };
    let hostname = text("local_hostname");
    let metadata = text("metadata_server");
    let master = text("master_server_address");
    let protocol = text("protocol").map(|p| p.to_ascii_lowercase());
    let devices = text("device_name").unwrap_or_default();
    let tenant = text("tenant_id").unwrap_or_else(|| "default".to_owned());
    let ssd = text("ssd_offload_path").map(PathBuf::from);
    let mut size = |key: &str, least: u64| {
        let parsed = match map.get(key)? {
            Value::Null => return None,
            Value::Number(n) => n
                .as_u64()
                .ok_or_else(|| "is not a number of bytes".to_owned())
                .map(ByteSize),
            Value::String(s) => ByteSize::parse(s).map_err(|e| e.to_string()),
            other => Err(format!("`{other}` is not a size")),
        };
        let shown = map
            .get(key)
            .map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned))
            .unwrap_or_default();
        match parsed {
            Err(reason) => {
                let f = Finding::fail(key, "bad_size", shown, reason);
                found.push(f.remedy(format!("write \"{key}\": \"4GB\"")));
                None
            }
            Ok(s) if s.0 != 0 && s.0 < least => {
                let reason = format!(
                    "is less than the {} that make sense: was a unit forgotten?",
                    ByteSize(least)
                );
                found.push(
                    Finding::fail(key, "out_of_range", shown, reason)
                        .remedy(format!("write \"{key}\": \"4GB\"")),
                );
                None
            }
            Ok(s) if s.0 > 1 << 50 => {
                let f = Finding::fail(
                    key,
                    "out_of_range",
                    shown,
                    "is more than 1 PiB: was a unit too many?",
                );
                found.push(f.remedy(format!("write \"{key}\": \"4GB\"")));
                None
            }
            Ok(s) => Some(s),
        }
    };
    let segment = size("global_segment_size", 1 << 20);
    let buffer = size("local_buffer_size", 1 << 20);
    if let Some(server) = &metadata {
        found.push(metadata_server(server));
    }
    match protocol.as_deref() {
        None | Some("tcp" | "rdma") => {}
        Some(other) => {
            let f = Finding::fail(
                "protocol",
                "unknown_protocol",
                other,
                "is not a protocol of this build: shared memory and TCP would be used",
            );
            found.push(f.remedy(match closest(other, ["tcp", "rdma"].into_iter()) {
                Some(meant) => format!("did you mean \"protocol\": \"{meant}\"?"),
                None => "write \"protocol\": \"tcp\"".to_owned(),
            }));
        }
    }
    let embedded = matches!(master.as_deref(), Some("embedded"));
    if let Some(address) = master.as_deref().filter(|_| !embedded) {
        if let Err(reason) = split_host_port(address, 50_051) {
            let f = Finding::fail("master_server_address", "bad_address", address, reason);
            found.push(f.remedy("write \"master_server_address\": \"HOST:50051\""));
        } else if address.contains("://") {
            let f = Finding::fail(
                "master_server_address",
                "bad_address",
                address,
                "is a URL; the master is given as HOST:PORT",
            );
            found.push(f.remedy("write \"master_server_address\": \"HOST:50051\""));
        } else if in_file {
            found.push(Finding::ok("master_server_address", address));
        }
    }
    Wanted {
        hostname,
        metadata,
        segment,
        buffer,
        rdma: protocol.as_deref() == Some("rdma"),
        devices: devices
            .split(',')
            .map(|d| d.trim().to_owned())
            .filter(|d| !d.is_empty())
            .collect(),
        ssd,
        tenant,
        token: None,
        master: master
            .filter(|_| !embedded)
            .filter(|m| split_host_port(m, 50_051).is_ok() && !m.contains("://")),
    }
}

/// A URL without the secret in it.
pub(super) fn without_secret(url: &str) -> String {
    match url
        .split_once("://")
        .and_then(|(scheme, rest)| Some((scheme, rest.rsplit_once('@')?.1)))
    {
        Some((scheme, rest)) => format!("{scheme}://…@{rest}"),
        None => url.to_owned(),
    }
}

fn metadata_server(server: &str) -> Finding {
    let shown = without_secret(server);
    let name = "metadata_server";
    if server == "P2PHANDSHAKE" || server.is_empty() {
        return Finding::ok(name, "P2PHANDSHAKE (no service needed)");
    }
    if server.starts_with("https://") {
        let f = Finding::fail(
            name,
            "https_metadata",
            shown,
            "this build speaks no TLS to metadata services",
        );
        return f.remedy("use http:// inside the cluster, or P2PHANDSHAKE");
    }
    if !SCHEMES.iter().any(|k| server.starts_with(k)) {
        let f = Finding::fail(
            name,
            "unknown_metadata",
            shown,
            "is none of P2PHANDSHAKE, etcd://…, redis://…, http://…",
        );
        let meant = server.eq_ignore_ascii_case("P2PHANDSHAKE")
            || edit_distance(&server.to_ascii_uppercase(), "P2PHANDSHAKE") <= 3;
        return f.remedy(if meant {
            "did you mean \"P2PHANDSHAKE\"?"
        } else {
            "write \"metadata_server\": \"P2PHANDSHAKE\""
        });
    }
    let path = server
        .strip_prefix("http://")
        .map(|rest| rest.split_once('/').map_or("", |(_, path)| path));
    if path.is_some_and(|p| p.trim_end_matches('/').is_empty()) {
        let reason = "has no path: the service would be asked at `/`, where it does not answer";
        return Finding::fail(name, "metadata_path", shown.clone(), reason)
            .remedy(format!("write {}/metadata", shown.trim_end_matches('/')));
    }
    Finding::ok(name, shown)
}

fn truth(value: Option<&Value>) -> bool {
    match value {
        Some(Value::Bool(b)) => *b,
        Some(Value::String(s)) => matches!(
            s.trim().to_ascii_lowercase().as_str(),
            "1" | "true" | "yes" | "on"
        ),
        Some(Value::Number(n)) => n.as_u64() != Some(0),
        _ => false,
    }
}

fn contradictions(
    map: &Map<String, Value>,
    wanted: &Wanted,
    root: &Root,
    found: &mut Vec<Finding>,
) {
    let present = root.names("/sys/class/infiniband");
    if wanted.rdma {
        if present.is_empty() {
            let f = Finding::fail(
                "protocol",
                "rdma_without_device",
                "rdma",
                "this host has no RDMA device",
            );
            found.push(f.remedy("write \"protocol\": \"tcp\", or install the NIC's driver"));
        } else if !crate::engine::transport::rdma::BUILT {
            let f = Finding::warn(
                "protocol",
                "rdma_not_built",
                "rdma",
                "this build has no RDMA: shared memory and TCP are used",
            );
            found.push(f.remedy("write \"protocol\": \"tcp\" to say so"));
        }
        for device in wanted
            .devices
            .iter()
            .filter(|d| !present.is_empty() && !present.contains(d))
        {
            let f = Finding::fail(
                "device_name",
                "rdma_device_missing",
                device,
                format!("no such device; this host has {}", present.join(", ")),
            );
            found.push(f.remedy(format!("write \"device_name\": \"{}\"", present.join(","))));
        }
    } else if !wanted.devices.is_empty() {
        let f = Finding::warn(
            "device_name",
            "device_without_rdma",
            wanted.devices.join(","),
            "is not used: the protocol is not rdma",
        );
        found.push(f.remedy("take device_name out"));
    }
    let embedded = map.get("master_server_address").and_then(Value::as_str) == Some("embedded");
    if embedded && wanted.segment == Some(ByteSize::ZERO) {
        let reason = "an embedded pool lives in this process's memory, and it is given none: every put would fail";
        found.push(
            Finding::fail(
                "global_segment_size",
                "embedded_without_memory",
                "0",
                reason,
            )
            .remedy("write \"global_segment_size\": \"4GB\""),
        );
    }
    let offload = truth(map.get("enable_ssd_offload"));
    if offload && wanted.ssd.is_none() {
        let reason = "enable_ssd_offload is on, and there is no path to offload to";
        found.push(
            Finding::fail("ssd_offload_path", "offload_without_path", "empty", reason)
                .remedy("set \"ssd_offload_path\" to a directory on an SSD"),
        );
    }
    if !offload && let Some(path) = &wanted.ssd {
        let reason = "is not used: enable_ssd_offload is off";
        found.push(
            Finding::warn(
                "ssd_offload_path",
                "path_without_offload",
                path.display().to_string(),
                reason,
            )
            .remedy("set \"enable_ssd_offload\": true, or take the path out"),
        );
    }
    if let Some(port) = map.get("client_http_port") {
        let number = port.as_u64().or_else(|| port.as_str()?.trim().parse().ok());
        if number.is_none_or(|n| n == 0 || n > 65_535) {
            found.push(
                Finding::fail(
                    "client_http_port",
                    "out_of_range",
                    port.to_string(),
                    "a port is 1 to 65535",
                )
                .remedy("write \"client_http_port\": 9300"),
            );
        }
    }
}

fn token(
    file: Option<&Path>,
    env: &dyn Fn(&str) -> Option<String>,
    found: &mut Vec<Finding>,
) -> Option<Token> {
    let Some(path) = file else {
        let token = env("MOONCAKE_TOKEN").and_then(|t| Token::new(&t));
        found.push(Finding::ok(
            "token",
            if token.is_some() {
                "from MOONCAKE_TOKEN"
            } else {
                "none"
            },
        ));
        return token;
    };
    let name = path.display().to_string();
    match Token::read(path) {
        Ok(token) => {
            use std::os::unix::fs::PermissionsExt;
            let mode = std::fs::metadata(path).map_or(0, |m| m.permissions().mode() & 0o777);
            if mode & 0o004 != 0 {
                let f = Finding::warn(
                    "token",
                    "token_readable_by_all",
                    format!("{name} (mode {mode:o})"),
                    "every user of this host can read the cluster's secret",
                );
                found.push(
                    f.remedy("take the right to read from others")
                        .command(format!("chmod 640 {name}")),
                );
            } else {
                found.push(Finding::ok("token", format!("from {name}")));
            }
            Some(token)
        }
        Err(e) => {
            let f = Finding::fail(
                "token",
                "token_unreadable",
                name,
                format!("cannot be used: {e}"),
            );
            found.push(f.remedy("put the token in the first line of that file"));
            None
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
    fn secrets_are_cut_out_of_urls() {
        assert_eq!(without_secret("redis://:p@ss@h:1/0"), "redis://…@h:1/0");
        assert_eq!(without_secret("http://h/metadata"), "http://h/metadata");
        assert_eq!(without_secret("P2PHANDSHAKE"), "P2PHANDSHAKE");
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
