//! Keys: bytes under a tenant. Inside the pool a key is always *qualified*: `len(tenant) u8 | tenant | key`, so that
//! tenants are namespaces by construction; the tenant `default` has length 0.

use xxhash_rust::xxh3::xxh3_64;

use super::error::StoreError;

/// Longest key, in bytes.
pub const KEY_BYTES_MAX: usize = 4096;
/// Longest tenant name, in bytes.
pub const TENANT_BYTES_MAX: usize = 255;

/// The name of the unnamed tenant.
pub const DEFAULT_TENANT: &str = "default";

/// Writes the qualified key into `out`, replacing what is there.
///
/// # Errors
/// `InvalidKey`, `InvalidParams` (tenant).
pub fn qualify(tenant: &str, key: &[u8], out: &mut Vec<u8>) -> Result<(), StoreError> {
    if key.is_empty() || key.len() > KEY_BYTES_MAX {
        return Err(StoreError::InvalidKey { length: key.len() });
    }
    let tenant = if tenant == DEFAULT_TENANT { "" } else { tenant };
    let Ok(length) = u8::try_from(tenant.len()) else {
        return Err(StoreError::InvalidParams {
            what: format!("a tenant has at most {TENANT_BYTES_MAX} bytes"),
        });
    };
    out.clear();
    out.push(length);
    out.extend_from_slice(tenant.as_bytes());
    out.extend_from_slice(key);
    Ok(())
}

/// Tenant and key of a qualified key; `None` when it is malformed.
pub fn split(qualified: &[u8]) -> Option<(&str, &[u8])> {
    let (length, rest) = qualified.split_first()?;
    let (tenant, key) = rest.split_at_checked(usize::from(*length))?;
    if key.is_empty() || key.len() > KEY_BYTES_MAX {
        return None;
    }
    Some((std::str::from_utf8(tenant).ok()?, key))
}

/// Stable hash of a qualified key: shard, header field, rendezvous placement. Never changes between versions.
pub fn hash(qualified: &[u8]) -> u64 {
    xxh3_64(qualified)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qualified_keys_do_not_collide() {
        let mut out = Vec::new();
        qualify("a", b"bc", &mut out).unwrap();
        let first = out.clone();
        qualify("ab", b"c", &mut out).unwrap();
        assert_ne!(first, out);
        assert_eq!(split(&first), Some(("a", &b"bc"[..])));
        qualify("default", b"k", &mut out).unwrap();
        assert_eq!(out, b"\0k");
        assert!(qualify("", b"", &mut out).is_err());
        assert!(qualify("", &[0; 4097], &mut out).is_err());
        assert!(qualify(&"t".repeat(256), b"k", &mut out).is_err());
        assert_eq!(split(b""), None);
        assert_eq!(split(b"\x05ab"), None);
    }
}
