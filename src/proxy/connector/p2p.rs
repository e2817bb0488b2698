//! `p2p` (vLLM's P2pNcclConnector): the request id names the KV ports of both ends, and prefill pushes the KV to that decode
//! instance while it computes. So both must be chosen before, and the KV serves there only.
//!
//! Without such an id a decode engine cannot even begin: no request goes to decode alone. What the id says is for
//! the workers; clients see their own (`mask`).

use super::super::config::InstanceAddress;
use crate::base::net::join_host_port;

/// A request id for a pair; `None` when the KV port of one is not known.
pub(crate) fn request_id(prefill: &InstanceAddress, decode: &InstanceAddress) -> Option<String> {
    let of = |i: &InstanceAddress| i.bootstrap.map(|port| join_host_port(&i.host, port));
    let (p, d) = (of(prefill)?, of(decode)?);
    let unique = rand::random::<u128>();
    Some(format!(
        "___prefill_addr_{p}___decode_addr_{d}_{unique:032x}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_vllm_reads_it() {
        let of = |text: &str| InstanceAddress::parse(text).unwrap();
        let id = request_id(&of("10.0.0.1:8100:14579"), &of("10.0.0.2:8200:14580")).unwrap();
        let d = regex::Regex::new(r"___decode_addr_(.*):(\d+)").unwrap();
        let p = regex::Regex::new(r"___prefill_addr_(.*):(\d+)___").unwrap();
        let (d, p) = (d.captures(&id).unwrap(), p.captures(&id).unwrap());
        assert_eq!((&d[1], &d[2]), ("10.0.0.2", "14580"));
        assert_eq!((&p[1], &p[2]), ("10.0.0.1", "14579"));
        assert_eq!(request_id(&of("a:1"), &of("b:1:2")), None);
    }
}
