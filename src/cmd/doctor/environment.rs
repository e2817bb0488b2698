//! Proxies for the web that the environment names: engines and upstream's clients send what is meant for the pool to them.

use super::report::Finding;
use crate::base::net::split_host_port;

/// Variables that most HTTP clients follow for `http://`.
const VARIABLES: [&str; 4] = ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"];

/// The host of an `http://` URL.
fn host(url: &str) -> Option<String> {
    let rest = url.strip_prefix("http://")?;
    let (host, _) = split_host_port(rest.split('/').next()?, 80).ok()?;
    Some(host)
}

/// Whether a list like `localhost,.example.com,10.0.0.1` names a host.
fn excepted(list: &str, host: &str) -> bool {
    list.split(',').map(str::trim).any(|part| {
        let bare = part.trim_start_matches('.');
        part == "*" || (!bare.is_empty() && (host == bare || host.ends_with(&format!(".{bare}"))))
    })
}

/// `urls`: what is asked over HTTP, the metadata service and the proxy.
pub(super) fn check(variables: &[(String, String)], urls: &[&str]) -> Vec<Finding> {
    let value = |name: &&str| {
        let set = variables.iter().find(|(n, v)| n == name && !v.is_empty());
        set.map(|(n, v)| (n.clone(), v.clone()))
    };
    let Some((name, proxy)) = VARIABLES.iter().find_map(value) else {
        return Vec::new();
    };
    let except = ["no_proxy", "NO_PROXY"]
        .iter()
        .find_map(value)
        .map_or_else(String::new, |(_, v)| v);
    let missed: Vec<String> = urls
        .iter()
        .filter_map(|u| host(u))
        .filter(|h| !excepted(&except, h))
        .collect();
    let Some(first) = missed.first() else {
        return Vec::new();
    };
    let reason = format!(
        "mooncake does not heed it, and most HTTP clients do: they ask that proxy for what is at {first}"
    );
    vec![
        Finding::warn(
            format!("variable {name}"),
            "http_proxy",
            super::values::without_secret(&proxy),
            reason,
        )
        .remedy(format!(
            "put the pool's hosts into no_proxy: {}",
            missed.join(",")
        ))
        .command(format!(
            "export no_proxy=\"$no_proxy,{}\"",
            missed.join(",")
        )),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exceptions() {
        for list in [
            "*",
            "a,meta",
            ".example.com",
            "example.com",
            "x, meta.example.com",
        ] {
            assert!(
                excepted(list, "meta.example.com") || list == "a,meta",
                "{list}"
            );
        }
        assert!(
            !excepted("", "meta")
                && !excepted("eta", "meta")
                && !excepted("meta.example.com", "example.com")
        );
        assert_eq!(host("http://[::1]:8080/x"), Some("::1".to_owned()));
        assert_eq!(host("redis://h"), None);
    }
}
