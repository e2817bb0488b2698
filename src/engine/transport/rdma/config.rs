//! What can be chosen about RDMA, with upstream's variables for it.

use std::time::Duration;

/// Settings of the RDMA transport.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RdmaConfig {
    /// Names of devices to use; none = all (`MC_TE_FILTERS`).
    pub devices: Vec<String>,
    /// Names of devices that are left out whatever is asked for (`MC_TE_FILTERS_EXCLUDE`).
    pub excluded: Vec<String>,
    /// Whether a node's memory is registered when it starts rather than when the first caller comes.
    pub at_once: bool,
    /// Port, from 1 (`MC_IB_PORT`).
    pub port: u8,
    /// Index into the port's GID table; none = the best is chosen (`MC_GID_INDEX`, else `NCCL_IB_GID_INDEX`).
    pub gid_index: Option<u8>,
    /// Largest path MTU as `ibv_mtu`: 1 = 256 … 5 = 4096 (`MC_MTU`, in bytes).
    pub mtu: u8,
    /// Index of the partition key (`MC_PKEY_INDEX`).
    pub pkey_index: u16,
    /// Traffic class of RoCE packets: DSCP = class >> 2 (`MC_IB_TC`).
    pub traffic_class: u8,
    /// Service level, 0..=15 (`MC_IB_SL`).
    pub service_level: u8,
    /// Time until a packet without an answer is sent again: 4.096 us * 2^n (`MC_IB_TIMEOUT`).
    pub timeout: u8,
    /// How often it is sent again, 0..=6; 7 stands for ever with some devices (`MC_IB_RETRY_CNT`).
    pub retries: u8,
    /// Requests under way per queue pair (`MC_MAX_WR`).
    pub depth: u32,
    /// Largest registration, bytes; the device's own bound holds, too (`MC_MAX_MR_SIZE`).
    pub registration: u64,
    /// Smallest slice a transfer is cut into, bytes (`MC_SLICE_SIZE`).
    pub slice: u64,
    /// How long a rail may stand still with requests under way (`MC_SLICE_TIMEOUT`, seconds).
    pub slice_timeout: Duration,
    /// How long a rail or peer that failed is left alone (`MC_RDMA_RAIL_PAUSE_SECONDS`).
    pub pause: Duration,
}

impl Default for RdmaConfig {
    fn default() -> Self {
        Self {
            devices: Vec::new(),
            excluded: Vec::new(),
            at_once: false,
            port: 1,
            gid_index: None,
            mtu: 5,
            pkey_index: 0,
            traffic_class: 0,
            service_level: 0,
            timeout: 14,
            retries: 6,
            depth: 128,
            registration: 1 << 40,
            slice: 64 << 10,
            slice_timeout: Duration::from_secs(2),
            pause: Duration::from_secs(30),
        }
    }
}

impl RdmaConfig {
    /// Defaults with upstream's variables; a value out of range counts as not given.
    pub fn from_env(variable: impl Fn(&str) -> Option<String>) -> Self {
        let number = |name: &str, least: u64, most: u64| {
            let n: u64 = variable(name)?.trim().parse().ok()?;
            (least..=most).contains(&n).then_some(n)
        };
        let small = |name: &str, least: u64, most: u64, default: u8| {
            number(name, least, most).map_or(default, |n| n as u8)
        };
        let d = Self::default();
        let gid = number("MC_GID_INDEX", 0, 255).or_else(|| number("NCCL_IB_GID_INDEX", 0, 255));
        let mtu = number("MC_MTU", 256, 4096).map_or(d.mtu, |bytes| match bytes {
            256..512 => 1,
            512..1024 => 2,
            1024..2048 => 3,
            2048..4096 => 4,
            _ => 5,
        });
        let list = |name: &str| variable(name).map_or_else(Vec::new, |text| names(&text));
        Self {
            devices: list("MC_TE_FILTERS"),
            excluded: list("MC_TE_FILTERS_EXCLUDE"),
            port: small("MC_IB_PORT", 1, 255, d.port),
            gid_index: gid.map(|n| n as u8),
            mtu,
            pkey_index: number("MC_PKEY_INDEX", 0, 65_535).map_or(d.pkey_index, |n| n as u16),
            traffic_class: small("MC_IB_TC", 0, 255, d.traffic_class),
            service_level: small("MC_IB_SL", 0, 15, d.service_level),
            timeout: small("MC_IB_TIMEOUT", 1, 31, d.timeout),
            retries: small("MC_IB_RETRY_CNT", 0, 7, d.retries),
            depth: number("MC_MAX_WR", 16, 1024).map_or(d.depth, |n| n as u32),
            registration: number("MC_MAX_MR_SIZE", 1 << 20, 1 << 50).unwrap_or(d.registration),
            slice: number("MC_SLICE_SIZE", 4096, 64 << 20).unwrap_or(d.slice),
            slice_timeout: number("MC_SLICE_TIMEOUT", 1, 600)
                .map_or(d.slice_timeout, Duration::from_secs),
            pause: number("MC_RDMA_RAIL_PAUSE_SECONDS", 0, 3600)
                .map_or(d.pause, Duration::from_secs),
            ..d
        }
    }

    /// With a comma list of device names, as in `device_name`; an empty one changes nothing.
    #[must_use]
    pub fn with_devices(mut self, list: &str) -> Self {
        let given = names(list);
        if !given.is_empty() {
            self.devices = given;
        }
        self
    }

    /// Whether a device may be used.
    pub fn wants(&self, device: &str) -> bool {
        let named = |list: &[String]| list.iter().any(|d| d == device);
        (self.devices.is_empty() || named(&self.devices)) && !named(&self.excluded)
    }
}

fn names(list: &str) -> Vec<String> {
    let names = list.split(',').map(str::trim).filter(|n| !n.is_empty());
    names.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_and_lists() {
        let given = |name: &str| {
            let value = match name {
                "MC_MTU" => "1024",
                "NCCL_IB_GID_INDEX" => "3",
                "MC_IB_TC" => "106",
                "MC_IB_SL" => "16",
                "MC_IB_RETRY_CNT" => "x",
                "MC_TE_FILTERS" => "mlx5_7",
                "MC_TE_FILTERS_EXCLUDE" => "mlx5_1",
                _ => return None,
            };
            Some(value.to_owned())
        };
        let c = RdmaConfig::from_env(given).with_devices("mlx5_0, mlx5_1,");
        assert_eq!((c.mtu, c.gid_index, c.traffic_class), (3, Some(3), 106));
        assert_eq!((c.service_level, c.retries), (0, 6), "nonsense is ignored");
        assert_eq!(c.devices, ["mlx5_0", "mlx5_1"]);
        assert!(c.wants("mlx5_0") && !c.wants("mlx5_1") && !c.wants("mlx5_2"));
        let c = RdmaConfig::from_env(given).with_devices("");
        assert!(c.wants("mlx5_7") && !c.wants("mlx5_0"));
        assert!(RdmaConfig::default().wants("anything"));
    }
}
