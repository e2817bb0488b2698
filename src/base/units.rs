//! Byte sizes and durations as people write them.
//!
//! Owns parsing and printing of quantities with units; knows nothing of where a value came from (see `config`).

use std::fmt;
use std::time::Duration;

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// Why a quantity was not understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum QuantityError {
    /// Nothing there.
    #[error("empty value")]
    Empty,
    /// The part before the unit is not a number.
    #[error("`{0}` is not a number with an optional unit")]
    Number(String),
    /// The unit is not known.
    #[error("unknown unit `{unit}`: use {expected}")]
    Unit {
        /// What was typed.
        unit: String,
        /// What would have been right.
        expected: &'static str,
    },
    /// The result does not fit in 64 bits.
    #[error("`{0}` is too large")]
    Overflow(String),
}

const SIZE_UNITS: &str = "B, KB/KiB, MB/MiB, GB/GiB or TB/TiB (all powers of 1024)";
const TIME_UNITS: &str = "us, ms, s, m or h";

fn split(text: &str) -> Result<(f64, String), QuantityError> {
    let text = text.trim();
    if text.is_empty() {
        return Err(QuantityError::Empty);
    }
    let digits = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(text.len());
    let number: f64 = text[..digits]
        .parse()
        .map_err(|_| QuantityError::Number(text.to_owned()))?;
    Ok((number, text[digits..].trim().to_ascii_lowercase()))
}

impl ByteSize {
    /// Zero bytes.
    pub const ZERO: Self = Self(0);

    /// `n` KiB.
    pub const fn kib(n: u64) -> Self {
        Self(n << 10)
    }
    /// `n` MiB.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }
    /// `n` GiB.
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }

    /// Parses `4096`, `64KiB`, `4 GB`, `1.5g`. As in upstream's configuration every unit is a power of 1024.
    ///
    /// # Errors
    /// See [`QuantityError`].
    pub fn parse(text: &str) -> Result<Self, QuantityError> {
        let (number, unit) = split(text)?;
        let shift = match unit.as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => {
                return Err(QuantityError::Unit {
                    unit,
                    expected: SIZE_UNITS,
                });
            }
        };
        // Whole numbers stay exact; a fraction goes through f64.
        if let Ok(whole) = text.trim()[..text.trim().len() - raw_unit_len(text)].parse::<u64>() {
            return whole
                .checked_mul(1u64 << shift)
                .map(Self)
                .ok_or_else(|| QuantityError::Overflow(text.to_owned()));
        }
        let bytes = number * (1u64 << shift) as f64;
        if bytes >= u64::MAX as f64 {
            return Err(QuantityError::Overflow(text.to_owned()));
        }
        Ok(Self(bytes as u64))
    }
}

fn raw_unit_len(text: &str) -> usize {
    let text = text.trim();
    text.len()
        - text
            .find(|c: char| !(c.is_ascii_digit() || c == '.'))
            .unwrap_or(text.len())
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
        let mut shift = 0;
        while shift < 4 && self.0 >> (10 * (shift + 1)) > 0 {
            shift += 1;
        }
        let unit = 1u64 << (10 * shift);
        if self.0.is_multiple_of(unit) {
            write!(f, "{} {}", self.0 / unit, NAMES[shift])
        } else {
            write!(f, "{:.1} {}", self.0 as f64 / unit as f64, NAMES[shift])
        }
    }
}

/// Parses `250ms`, `10s`, `1.5m`; a bare number is counted in `bare` (upstream's flags are milliseconds or seconds).
///
/// # Errors
/// See [`QuantityError`].
pub fn parse_duration(text: &str, bare: Duration) -> Result<Duration, QuantityError> {
    let (number, unit) = split(text)?;
    let unit = match unit.as_str() {
        "" => bare.as_secs_f64(),
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => {
            return Err(QuantityError::Unit {
                unit,
                expected: TIME_UNITS,
            });
        }
    };
    Duration::try_from_secs_f64(number * unit).map_err(|_| QuantityError::Overflow(text.to_owned()))
}

/// Prints a duration the way [`parse_duration`] reads it.
pub fn format_duration(duration: Duration) -> String {
    let ms = duration.as_millis();
    if !duration.subsec_micros().is_multiple_of(1000) {
        format!("{}us", duration.as_micros())
    } else if ms.is_multiple_of(1000) && ms > 0 {
        format!("{}s", ms / 1000)
    } else {
        format!("{ms}ms")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(ByteSize::parse("4GB"), Ok(ByteSize::gib(4)));
        assert_eq!(ByteSize::parse("4 GiB"), Ok(ByteSize::gib(4)));
        assert_eq!(ByteSize::parse("1.5k"), Ok(ByteSize(1536)));
        assert_eq!(ByteSize::parse("3355443200"), Ok(ByteSize(3_355_443_200)));
        assert_eq!(
            ByteSize::parse("18446744073709551615"),
            Ok(ByteSize(u64::MAX))
        );
        assert!(matches!(
            ByteSize::parse("4 GBB"),
            Err(QuantityError::Unit { .. })
        ));
        assert!(matches!(
            ByteSize::parse("-1"),
            Err(QuantityError::Number(_))
        ));
        assert!(matches!(
            ByteSize::parse("17179869184 GiB"),
            Err(QuantityError::Overflow(_))
        ));
        assert_eq!(ByteSize::parse(""), Err(QuantityError::Empty));
    }

    #[test]
    fn sizes_print_and_parse() {
        for size in [0, 1, 1023, 1024, 1 << 20, 3 << 30] {
            assert_eq!(
                ByteSize::parse(&ByteSize(size).to_string()),
                Ok(ByteSize(size))
            );
        }
        assert_eq!(ByteSize(1536).to_string(), "1.5 KiB");
    }

    #[test]
    fn durations() {
        let ms = Duration::from_millis(1);
        assert_eq!(parse_duration("10000", ms), Ok(Duration::from_secs(10)));
        assert_eq!(parse_duration("10s", ms), Ok(Duration::from_secs(10)));
        assert_eq!(parse_duration("1.5m", ms), Ok(Duration::from_secs(90)));
        assert!(parse_duration("5 parsecs", ms).is_err());
        assert_eq!(format_duration(Duration::from_millis(250)), "250ms");
        assert_eq!(format_duration(Duration::from_secs(600)), "600s");
    }
}
