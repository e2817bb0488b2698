//! `mooncake.json`: the configuration that engines and tools share with upstream's `mooncake_config.py`.
//!
//! With a file its keys count, without one the variables do; never a mix, as upstream. Unknown keys are left alone: other
//! programs keep theirs in the same file.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::config::ConfigError;
use super::units::ByteSize;

/// Names the file.
pub const PATH_VARIABLE: &str = "MOONCAKE_CONFIG_PATH";
/// Read from the working directory when nothing else is named.
pub const DEFAULT_FILE: &str = "mooncake.json";

/// Values of the file or the variables, with upstream's defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MooncakeJson {
    /// Name of this host towards others.
    pub local_hostname: String,
    /// Where peers are found: `P2PHANDSHAKE`, `etcd://`, `redis://`, `http(s)://`.
    pub metadata_server: String,
    /// `host:port` of the master.
    pub master_server_address: Option<String>,
    /// Memory a client of this host contributes.
    pub global_segment_size: ByteSize,
    /// Staging memory of a client.
    pub local_buffer_size: ByteSize,
    /// `tcp` or `rdma`, lower case.
    pub protocol: String,
    /// RDMA devices, separated by commas.
    pub device_name: String,
    /// Namespace of keys.
    pub tenant_id: String,
    /// Where the values came from.
    pub source: Option<PathBuf>,
}

impl MooncakeJson {
    /// Finds the configuration: `path`, else `MOONCAKE_CONFIG_PATH`, else `./mooncake.json` if it is there, else variables.
    ///
    /// # Errors
    /// A file that is named and cannot be used, a value that is none.
    pub fn find(
        path: Option<&Path>,
        env: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigError> {
        let env = |name: &str| env(name).filter(|v| !v.is_empty());
        let named = path
            .map(Path::to_owned)
            .or_else(|| env(PATH_VARIABLE).map(PathBuf::from));
        let file = named.or_else(|| {
            let default = PathBuf::from(DEFAULT_FILE);
            default.is_file().then_some(default)
        });
        match file {
            Some(file) => Self::read(&file),
            None => Self::from_variables(env),
        }
    }

    fn read(path: &Path) -> Result<Self, ConfigError> {
        let wrong = |problem: String| ConfigError {
            place: path.display().to_string(),
            problem,
        };
        let text =
            std::fs::read_to_string(path).map_err(|e| wrong(format!("cannot be read: {e}")))?;
        let json: Value = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
        if !json.is_object() {
            return Err(wrong("is not a JSON object".to_owned()));
        }
        let text = |key: &str| match json.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(s)) => Ok(Some(s.clone())),
            Some(other) => Err(wrong(format!("`{key}` must be a text, not {other}"))),
        };
        let size = |key: &str| match json.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Number(n)) => n
                .as_u64()
                .map(|n| Some(ByteSize(n)))
                .ok_or_else(|| wrong(format!("`{key}`: `{n}` is not a number of bytes"))),
            Some(Value::String(s)) => ByteSize::parse(s)
                .map(Some)
                .map_err(|e| wrong(format!("`{key}`: {e}"))),
            Some(other) => Err(wrong(format!("`{key}` must be a size, not {other}"))),
        };
        for key in ["local_hostname", "metadata_server", "master_server_address"] {
            if text(key)?.is_none() {
                return Err(wrong(format!("`{key}` is missing")));
            }
        }
        let config = Self {
            local_hostname: text("local_hostname")?.unwrap_or_default(),
            metadata_server: text("metadata_server")?.unwrap_or_default(),
            master_server_address: text("master_server_address")?,
            global_segment_size: size("global_segment_size")?.unwrap_or(SEGMENT_DEFAULT),
            local_buffer_size: size("local_buffer_size")?.unwrap_or(BUFFER_DEFAULT),
            protocol: text("protocol")?.unwrap_or_default(),
            device_name: text("device_name")?.unwrap_or_default(),
            tenant_id: text("tenant_id")?.unwrap_or_else(|| "default".to_owned()),
            source: Some(path.to_owned()),
        };
        config.checked(&path.display().to_string())
    }

    fn from_variables(env: impl Fn(&str) -> Option<String>) -> Result<Self, ConfigError> {
        let text = |name: &str, default: &str| env(name).unwrap_or_else(|| default.to_owned());
        let size = |name: &str, default: ByteSize| match env(name) {
            None => Ok(default),
            Some(given) => ByteSize::parse(&given).map_err(|e| ConfigError {
                place: name.to_owned(),
                problem: e.to_string(),
            }),
        };
        Self {
            local_hostname: text("MOONCAKE_LOCAL_HOSTNAME", "localhost"),
            metadata_server: text("MOONCAKE_TE_META_DATA_SERVER", "P2PHANDSHAKE"),
            master_server_address: env("MOONCAKE_MASTER"),
            global_segment_size: size("MOONCAKE_GLOBAL_SEGMENT_SIZE", SEGMENT_DEFAULT)?,
            local_buffer_size: size("MOONCAKE_LOCAL_BUFFER_SIZE", BUFFER_DEFAULT)?,
            protocol: text("MOONCAKE_PROTOCOL", ""),
            device_name: text("MOONCAKE_DEVICE", ""),
            tenant_id: text("MOONCAKE_TENANT_ID", "default"),
            source: None,
        }
        .checked("environment")
    }

    fn checked(mut self, place: &str) -> Result<Self, ConfigError> {
        let wrong = |problem: String| {
            Err(ConfigError {
                place: place.to_owned(),
                problem,
            })
        };
        self.protocol = self.protocol.to_ascii_lowercase();
        let known = ["etcd://", "redis://", "http://", "https://"];
        let server = &self.metadata_server;
        if server != "P2PHANDSHAKE" && !known.iter().any(|k| server.starts_with(k)) {
            return wrong(format!(
                "`metadata_server`: `{server}` is none of P2PHANDSHAKE, etcd://…, redis://…, http(s)://…"
            ));
        }
        Ok(self)
    }
}

const SEGMENT_DEFAULT: ByteSize = ByteSize(3_355_443_200);
const BUFFER_DEFAULT: ByteSize = ByteSize(1_073_741_824);

#[cfg(test)]
mod tests {
    use super::*;

    fn find(text: &str) -> Result<MooncakeJson, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mooncake.json");
        std::fs::write(&path, text).unwrap();
        MooncakeJson::find(Some(&path), |_| None)
    }

    #[test]
    fn file_with_sizes_as_text_and_number() {
        let config = find(
            r#"{"local_hostname":"h","metadata_server":"P2PHANDSHAKE","master_server_address":"m:1",
               "global_segment_size":"4GB","local_buffer_size":512,"protocol":"RDMA","others":1}"#,
        )
        .unwrap();
        assert_eq!(config.global_segment_size, ByteSize::gib(4));
        assert_eq!(config.local_buffer_size, ByteSize(512));
        assert_eq!(config.protocol, "rdma");
        assert_eq!(config.tenant_id, "default");
    }

    #[test]
    fn wrong_files_name_the_key() {
        for (text, expected) in [
            ("{", "EOF"),
            ("[]", "not a JSON object"),
            (r#"{"local_hostname":"h"}"#, "`metadata_server` is missing"),
            (
                r#"{"local_hostname":1,"metadata_server":"x","master_server_address":"m"}"#,
                "`local_hostname` must be a text",
            ),
            (
                r#"{"local_hostname":"h","metadata_server":"ftp://x","master_server_address":"m"}"#,
                "ftp://x",
            ),
            (
                r#"{"local_hostname":"h","metadata_server":"P2PHANDSHAKE","master_server_address":"m","global_segment_size":"4 GBB"}"#,
                "unknown unit `gbb`",
            ),
        ] {
            let error = find(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn variables_without_a_file() {
        let env = |n: &str| (n == "MOONCAKE_MASTER").then(|| "host:7".to_owned());
        let config = MooncakeJson::find(None, env).unwrap();
        assert_eq!(config.master_server_address.as_deref(), Some("host:7"));
        assert_eq!(config.global_segment_size, ByteSize(3_355_443_200));
    }
}
