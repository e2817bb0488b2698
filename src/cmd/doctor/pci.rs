//! Where devices sit: slot, NUMA node, IOMMU, and bridges that send what goes from card to card through the processor.

use std::path::{Path, PathBuf};

use super::rdma::CLASS;
use super::report::Finding;
use super::system::Root;

pub(super) const PCI: &str = "/sys/bus/pci/devices";

pub(super) fn place(root: &Root, device: &str) -> Vec<Finding> {
    let base = format!("{CLASS}/{device}/device");
    if !root.exists(&base) {
        // Software devices have no PCI parent.
        return Vec::new();
    }
    let mut found = Vec::new();
    let check = format!("{device} PCIe");
    let read = |name: &str| root.read(&format!("{base}/{name}")).unwrap_or_default();
    let (width, most_width) = (read("current_link_width"), read("max_link_width"));
    let (speed, most_speed) = (read("current_link_speed"), read("max_link_speed"));
    let number = |t: &str| {
        t.split_whitespace()
            .next()
            .and_then(|n| n.parse::<f64>().ok())
            .unwrap_or(0.0)
    };
    if number(&width) < number(&most_width) || number(&speed) < number(&most_speed) {
        found.push(
            Finding::warn(
                check,
                "pcie_degraded",
                format!("x{width} at {speed}, of x{most_width} at {most_speed}"),
                "the slot gives less than the device can take",
            )
            .remedy("seat the card in a slot with all lanes, and look at the BIOS settings"),
        );
    } else if !width.is_empty() {
        found.push(Finding::ok(check, format!("x{width} at {speed}")));
    }
    let nodes = root
        .names("/sys/devices/system/node")
        .iter()
        .filter(|n| {
            n.strip_prefix("node")
                .is_some_and(|r| r.parse::<u32>().is_ok())
        })
        .count();
    match read("numa_node").parse::<i64>() {
        Ok(-1) if nodes > 1 => found.push(
            Finding::warn(format!("{device} NUMA"), "numa_unknown", "-1", "the firmware does not say which node the device belongs to: memory may be far from it").remedy("update the BIOS, or bind the process: numactl --cpunodebind=N --membind=N"),
        ),
        Ok(n) if n >= 0 => found.push(Finding::ok(format!("{device} NUMA"), format!("node {n}"))),
        _ => {}
    }
    found
}

/// Whether what the devices read and write is looked up page by page.
pub(super) fn iommu(root: &Root, devices: &[String]) -> Finding {
    const GROUPS: &str = "/sys/kernel/iommu_groups";
    let own = |d: &String| root.read(&format!("{CLASS}/{d}/device/iommu_group/type"));
    let mut kinds: Vec<String> = devices.iter().filter_map(own).collect();
    if kinds.is_empty() {
        let groups = root.names(GROUPS).into_iter();
        kinds = groups
            .filter_map(|g| root.read(&format!("{GROUPS}/{g}/type")))
            .collect();
    }
    if kinds.is_empty() {
        return Finding::ok("IOMMU", "off");
    }
    if let Some(kind) = kinds.iter().find(|k| k.starts_with("DMA")) {
        let line = root.read("/proc/cmdline").unwrap_or_default();
        let asked = line.split_whitespace().find(|w| w.contains("iommu"));
        let shown = match asked {
            Some(word) => {
                format!("{kind}: DMA is translated ({word} on the kernel's command line)")
            }
            None => format!("{kind}: DMA is translated"),
        };
        let reason =
            "each transfer of the NIC is looked up: slower, and peer-to-peer with GPUs may fail";
        return Finding::warn("IOMMU", "iommu_translates", shown, reason)
            .remedy("boot with iommu=pt");
    }
    Finding::ok("IOMMU", "pass-through")
}

/// Bits of ACS control that send requests, completions, or all that goes up, to the root.
const ACS_REDIRECTS: u16 = 0b1_1100;
/// The extended capability ACS.
const ACS: u16 = 0x0d;
/// Capabilities followed at most: a broken list may go in circles.
const CAPABILITIES_MAX: usize = 64;

/// A device's `0000:17:00.0` and those of the bridges above it, itself last.
fn chain(root: &Root, path: &str) -> Vec<String> {
    let Ok(real) = std::fs::canonicalize(root.at(path)) else {
        return Vec::new();
    };
    let parts = real.iter().filter_map(|p| p.to_str());
    parts.filter(|p| is_address(p)).map(str::to_owned).collect()
}

/// `dddd:bb:dd.f`.
fn is_address(part: &str) -> bool {
    let pattern = "....:..:..";
    part.len() == pattern.len() + 2
        && part.bytes().enumerate().all(|(n, b)| match n {
            4 | 7 => b == b':',
            10 => b == b'.',
            _ => b.is_ascii_hexdigit(),
        })
}

/// The control word of ACS in a device's configuration space; `Err` when only its first part may be read.
fn acs(config: &[u8]) -> Result<Option<u16>, ()> {
    let half = |at: usize| Some(u16::from_le_bytes([*config.get(at)?, *config.get(at + 1)?]));
    if config.len() <= 64 {
        return Err(());
    }
    let mut at = 0x100;
    for _ in 0..CAPABILITIES_MAX {
        let (Some(kind), Some(more)) = (half(at), half(at + 2)) else {
            return Ok(None);
        };
        if kind == ACS {
            return Ok(half(at + 6));
        }
        at = usize::from(more >> 4);
        if at < 0x100 {
            return Ok(None);
        }
    }
    Ok(None)
}

/// Bridges above NICs and GPUs that send peer-to-peer traffic up to the root, as rdma-core's `rdma_topo` looks for them.
pub(super) fn redirects(root: &Root, devices: &[String], gpus: &[String]) -> Option<Finding> {
    let check = "PCI redirects (ACS)";
    if devices.is_empty() || gpus.is_empty() {
        return None;
    }
    let nics = devices.iter().map(|d| format!("{CLASS}/{d}/device"));
    let cards = gpus.iter().map(|g| format!("{PCI}/{g}"));
    let mut bridges: Vec<String> = nics
        .chain(cards)
        .flat_map(|path| {
            let mut above = chain(root, &path);
            above.pop();
            above
        })
        .collect();
    bridges.sort();
    bridges.dedup();
    if bridges.is_empty() {
        return None;
    }
    let mut bad = Vec::new();
    for bridge in &bridges {
        let path: PathBuf = root.at(&format!("{PCI}/{bridge}/config"));
        match read_config(&path).map(|c| acs(&c)) {
            Some(Ok(Some(control))) if control & ACS_REDIRECTS != 0 => bad.push(bridge.clone()),
            Some(Err(())) => {
                return Some(Finding::skipped(
                    check,
                    "the configuration of bridges may only be read by root",
                ));
            }
            _ => {}
        }
    }
    if bad.is_empty() {
        return Some(Finding::ok(
            check,
            format!("off on {} bridge(s) between NICs and GPUs", bridges.len()),
        ));
    }
    let reason =
        "what a NIC reads from a GPU takes the way through the processor: slow, or refused";
    let command = bad
        .iter()
        .map(|b| format!("setpci -s {b} ECAP_ACS+6.w=0:{ACS_REDIRECTS:x}"))
        .collect::<Vec<_>>()
        .join("; ");
    Some(
        Finding::warn(check, "acs_redirects", bad.join(", "), reason)
            .remedy("switch ACS off in the BIOS, or at these bridges after each boot (not in a host that gives devices to virtual machines)")
            .command(command),
    )
}

/// All of the configuration space that this user may read; 4 KiB at most.
fn read_config(path: &Path) -> Option<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).ok()?;
    file.take(4096).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// Network cards that can do RDMA: maker as PCI says it, and the module that makes a device of them.
const MAKERS: [(&str, &str); 1] = [("0x15b3", "mlx5_ib")];

/// Cards of this host that would be RDMA devices if their module were loaded.
pub(super) fn idle_cards(root: &Root) -> Vec<(String, &'static str)> {
    let read = |d: &str, f: &str| root.read(&format!("{PCI}/{d}/{f}")).unwrap_or_default();
    let module = |d: &String| {
        let (maker, class) = (read(d, "vendor"), read(d, "class"));
        let known = MAKERS.iter().find(|(m, _)| *m == maker)?;
        class.starts_with("0x02").then_some(known.1)
    };
    let all = root.names(PCI).into_iter();
    all.filter_map(|d| Some((d.clone(), module(&d)?)))
        .filter(|(_, module)| !root.exists(&format!("/sys/module/{module}")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acs_is_found_among_capabilities() {
        let mut config = vec![0_u8; 4096];
        assert_eq!(acs(&config[..64]), Err(()));
        assert_eq!(acs(&config), Ok(None));
        // AER at 0x100, then ACS at 0x148 with redirects on.
        config[0x100..0x104].copy_from_slice(&[0x01, 0x00, 0x81, 0x14]);
        config[0x148..0x150].copy_from_slice(&[0x0d, 0x00, 0x01, 0x00, 0, 0, 0x1c, 0x00]);
        assert_eq!(acs(&config), Ok(Some(0x1c)));
        // A list in a circle ends.
        config[0x148] = 0x02;
        config[0x14a..0x14c].copy_from_slice(&[0x01, 0x10]);
        assert_eq!(acs(&config), Ok(None));
        assert!(
            is_address("0000:17:00.0") && !is_address("pci0000:00") && !is_address("0000:17:00")
        );
    }
}
