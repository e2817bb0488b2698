//! Layered settings: built-in default < `--config` file < `MOONCAKE_*` variable < flag, each value with its origin.
//!
//! A program declares its settings once as a table of [`Setting`]; `cmd` makes flags of it, [`resolve`] reads file and
//! environment by the same names, and [`Resolved`] hands out typed values that were all checked before anything starts.
//! Knows nothing of clap.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::units::{ByteSize, parse_duration};

/// What a setting's text must be.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// Any text.
    Text,
    /// true/false, yes/no, 1/0; as a flag the value may be left out.
    Flag,
    /// A whole number in a range, both ends included.
    Integer(u64, u64),
    /// A number from 0 to 1.
    Ratio,
    /// A byte size in a range.
    Size(u64, u64),
    /// As `Size`, or 0 for none.
    SizeOrNone(u64, u64),
    /// A duration; a bare number counts in the given unit.
    Time(Duration),
    /// One of a few words.
    Choice(&'static [&'static str]),
}

/// One setting of a program.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Kebab-case name: the flag, and with underscores the file's key.
    pub name: &'static str,
    /// Other spellings, such as upstream's.
    pub aliases: &'static [&'static str],
    /// What the text must be.
    pub kind: Kind,
    /// Built-in value; empty = not set.
    pub default: &'static str,
    /// One line for `--help`.
    pub help: &'static str,
}

impl Setting {
    /// A setting by its parts.
    pub const fn new(
        name: &'static str,
        aliases: &'static [&'static str],
        kind: Kind,
        default: &'static str,
        help: &'static str,
    ) -> Self {
        Self {
            name,
            aliases,
            kind,
            default,
            help,
        }
    }

    /// The environment variable of this setting.
    pub fn variable(&self) -> String {
        format!(
            "MOONCAKE_{}",
            self.name.to_ascii_uppercase().replace('-', "_")
        )
    }

    fn answers_to(&self, key: &str) -> bool {
        let key = key.replace('_', "-");
        self.name == key || self.aliases.iter().any(|a| a.replace('_', "-") == key)
    }

    fn check(&self, text: &str) -> Result<(), String> {
        match self.kind {
            Kind::Text => Ok(()),
            Kind::Flag => parse_flag(text).map(|_| ()),
            Kind::Integer(min, max) => match text.parse::<u64>() {
                Ok(n) if (min..=max).contains(&n) => Ok(()),
                _ => Err(format!(
                    "`{text}` is not a whole number from {min} to {max}"
                )),
            },
            Kind::Ratio => match text.parse::<f64>() {
                Ok(n) if (0.0..=1.0).contains(&n) => Ok(()),
                _ => Err(format!("`{text}` is not a number from 0 to 1")),
            },
            Kind::SizeOrNone(..) if ByteSize::parse(text) == Ok(ByteSize::ZERO) => Ok(()),
            Kind::Size(min, max) | Kind::SizeOrNone(min, max) => {
                let size = ByteSize::parse(text).map_err(|e| e.to_string())?;
                if (min..=max).contains(&size.0) {
                    Ok(())
                } else {
                    let (min, max) = (ByteSize(min), ByteSize(max));
                    Err(format!("{size} is not between {min} and {max}"))
                }
            }
            Kind::Time(bare) => parse_duration(text, bare)
                .map(|_| ())
                .map_err(|e| e.to_string()),
            Kind::Choice(words) => {
                if words.contains(&text) {
                    Ok(())
                } else {
                    Err(format!("`{text}` is not one of {}", words.join(", ")))
                }
            }
        }
    }
}

fn parse_flag(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Ok(true),
        "false" | "no" | "off" | "0" => Ok(false),
        _ => Err(format!("`{text}` is not true or false")),
    }
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Built in.
    Default,
    /// A configuration file.
    File(PathBuf),
    /// An environment variable.
    Variable(String),
    /// The command line.
    Flag,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Variable(name) => write!(f, "variable {name}"),
            Self::Flag => f.write_str("flag"),
        }
    }
}

/// A setting that cannot be used: where it stands, what is wrong.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {problem}")]
pub struct ConfigError {
    /// File and key, variable, or flag.
    pub place: String,
    /// What is wrong, with the allowed range.
    pub problem: String,
}

/// Checked values of all settings of a program.
#[derive(Clone, Debug)]
pub struct Resolved {
    values: BTreeMap<&'static str, (String, Origin)>,
}

/// Lays file, environment and flags over the defaults and checks every value.
///
/// `flags` are `(name, text)` pairs as typed; `env` looks up a variable.
///
/// # Errors
/// The first unusable value, or a file that cannot be read or has an unknown key.
pub fn resolve(
    settings: &'static [Setting],
    file: Option<&Path>,
    env: impl Fn(&str) -> Option<String>,
    flags: &[(&str, String)],
) -> Result<Resolved, ConfigError> {
    let mut values = BTreeMap::new();
    for setting in settings {
        values.insert(setting.name, (setting.default.to_owned(), Origin::Default));
    }
    if let Some(path) = file {
        for (key, text) in read_file(path)? {
            let place = || format!("{}: `{key}`", path.display());
            let Some(setting) = settings.iter().find(|s| s.answers_to(&key)) else {
                let hint = closest(&key, settings)
                    .map_or_else(String::new, |name| format!("; did you mean `{name}`?"));
                return Err(ConfigError {
                    place: place(),
                    problem: format!("unknown setting{hint}"),
                });
            };
            setting.check(&text).map_err(|problem| ConfigError {
                place: place(),
                problem,
            })?;
            values.insert(setting.name, (text, Origin::File(path.to_owned())));
        }
    }
    for setting in settings {
        let name = setting.variable();
        if let Some(text) = env(&name).filter(|t| !t.is_empty()) {
            setting.check(&text).map_err(|problem| ConfigError {
                place: name.clone(),
                problem,
            })?;
            values.insert(setting.name, (text, Origin::Variable(name)));
        }
    }
    for (name, text) in flags {
        if let Some(setting) = settings.iter().find(|s| s.answers_to(name)) {
            setting.check(text).map_err(|problem| ConfigError {
                place: format!("--{}", setting.name),
                problem,
            })?;
            values.insert(setting.name, (text.clone(), Origin::Flag));
        }
    }
    Ok(Resolved { values })
}

/// Flattens a TOML or JSON object of scalars.
fn read_file(path: &Path) -> Result<Vec<(String, String)>, ConfigError> {
    let wrong = |problem: String| ConfigError {
        place: path.display().to_string(),
        problem,
    };
    let text = std::fs::read_to_string(path).map_err(|e| wrong(format!("cannot be read: {e}")))?;
    let json: serde_json::Value = if path.extension().is_some_and(|e| e == "json") {
        serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?
    } else {
        toml::from_str(&text).map_err(|e| wrong(e.to_string().trim_end().replace('\n', " ")))?
    };
    let serde_json::Value::Object(map) = json else {
        return Err(wrong("is not a table of settings".to_owned()));
    };
    map.into_iter()
        .map(|(key, value)| match value {
            serde_json::Value::String(s) => Ok((key, s)),
            serde_json::Value::Number(n) => Ok((key, n.to_string())),
            serde_json::Value::Bool(b) => Ok((key, b.to_string())),
            _ => Err(wrong(format!("`{key}` must be a text, number or boolean"))),
        })
        .collect()
}

fn closest(key: &str, settings: &[Setting]) -> Option<&'static str> {
    let key = key.replace('_', "-");
    settings
        .iter()
        .map(|s| (edit_distance(&key, s.name), s.name))
        .min()
        .filter(|(distance, _)| *distance <= 3)
        .map(|(_, name)| name)
}

/// Levenshtein distance, for "did you mean".
pub fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

impl Resolved {
    fn text_of(&self, name: &str) -> &str {
        let found = self.values.get(name);
        debug_assert!(found.is_some(), "setting `{name}` is not in the table");
        found.map_or("", |(text, _)| text.as_str())
    }

    /// Text; `None` when not set.
    pub fn text(&self, name: &str) -> Option<&str> {
        Some(self.text_of(name)).filter(|t| !t.is_empty())
    }
    /// True or false.
    pub fn flag(&self, name: &str) -> bool {
        parse_flag(self.text_of(name)).unwrap_or(false)
    }
    /// A whole number.
    pub fn integer(&self, name: &str) -> u64 {
        self.text_of(name).parse().unwrap_or(0)
    }
    /// A number from 0 to 1.
    pub fn ratio(&self, name: &str) -> f64 {
        self.text_of(name).parse().unwrap_or(0.0)
    }
    /// A byte size.
    pub fn size(&self, name: &str) -> ByteSize {
        ByteSize::parse(self.text_of(name)).unwrap_or_default()
    }
    /// A duration; a bare number counts in `bare`, which must be the unit the table declares.
    pub fn time(&self, name: &str, bare: Duration) -> Duration {
        parse_duration(self.text_of(name), bare).unwrap_or_default()
    }
    /// Whether somebody set it (rather than the default).
    pub fn is_set(&self, name: &str) -> bool {
        self.origin(name) != &Origin::Default
    }
    /// Where the value came from.
    pub fn origin(&self, name: &str) -> &Origin {
        self.values.get(name).map_or(&Origin::Default, |(_, o)| o)
    }
    /// `(name, value, origin)` of every setting.
    pub fn all(&self) -> impl Iterator<Item = (&'static str, &str, &Origin)> {
        self.values.iter().map(|(n, (t, o))| (*n, t.as_str(), o))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static TABLE: [Setting; 3] = [
        Setting {
            name: "port",
            aliases: &["rpc_port"],
            kind: Kind::Integer(0, 65_535),
            default: "50051",
            help: "",
        },
        Setting {
            name: "default-kv-lease-ttl",
            aliases: &[],
            kind: Kind::Time(Duration::from_millis(1)),
            default: "10s",
            help: "",
        },
        Setting {
            name: "memory",
            aliases: &[],
            kind: Kind::Size(0, 1 << 50),
            default: "0",
            help: "",
        },
    ];

    fn no_env(_: &str) -> Option<String> {
        None
    }

    #[test]
    fn layers_win_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.toml");
        std::fs::write(
            &path,
            "rpc_port = 1\nmemory = \"1GiB\"\ndefault_kv_lease_ttl = 5\n",
        )
        .unwrap();
        let env = |n: &str| (n == "MOONCAKE_MEMORY").then(|| "2GiB".to_owned());
        let flags = [("default-kv-lease-ttl", "7s".to_owned())];
        let r = resolve(&TABLE, Some(&path), env, &flags).unwrap();
        assert_eq!(r.integer("port"), 1);
        assert_eq!(r.origin("port"), &Origin::File(path));
        assert_eq!(r.size("memory"), ByteSize::gib(2));
        let ms = Duration::from_millis(1);
        assert_eq!(r.time("default-kv-lease-ttl", ms), Duration::from_secs(7));
        assert_eq!(r.origin("default-kv-lease-ttl"), &Origin::Flag);
    }

    #[test]
    fn errors_name_the_place() {
        let flags = [("memory", "4 GBB".to_owned())];
        let e = resolve(&TABLE, None, no_env, &flags).unwrap_err();
        assert!(
            e.to_string().starts_with("--memory: unknown unit `gbb`"),
            "{e}"
        );
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.json");
        std::fs::write(&path, r#"{"prot": 1}"#).unwrap();
        let e = resolve(&TABLE, Some(&path), no_env, &[]).unwrap_err();
        assert!(e.to_string().contains("did you mean `port`?"), "{e}");
        std::fs::write(&path, "{").unwrap();
        assert!(resolve(&TABLE, Some(&path), no_env, &[]).is_err());
    }
}
