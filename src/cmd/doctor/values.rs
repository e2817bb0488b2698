//! Values of the configuration: of the right type, in range, of known words, and not at odds with each other or with this host.
//!
//! Owns what each key may say. Refuses to know where the values were written.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::address::misspelt;
use super::config::{Wanted, closest};
use super::report::Finding;
use super::system::Root;
use crate::base::config::edit_distance;
use crate::base::trust::Token;
use crate::base::units::ByteSize;

const SCHEMES: [&str; 3] = ["etcd://", "redis://", "http://"];

pub(super) fn values(map: &Map<String, Value>, in_file: bool, found: &mut Vec<Finding>) -> Wanted {
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
        if let Some((reason, meant)) = misspelt(address) {
            let f = Finding::fail("master_server_address", "bad_address", address, reason);
            found.push(f.remedy(format!("write \"master_server_address\": \"{meant}\"")));
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
            .filter(|m| misspelt(m).is_none()),
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

pub(super) fn contradictions(
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

pub(super) fn token(
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
    fn secrets_are_cut_out_of_urls() {
        assert_eq!(without_secret("redis://:p@ss@h:1/0"), "redis://…@h:1/0");
        assert_eq!(without_secret("http://h/metadata"), "http://h/metadata");
        assert_eq!(without_secret("P2PHANDSHAKE"), "P2PHANDSHAKE");
    }
}
