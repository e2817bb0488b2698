//! RDMA devices of this host, read from sysfs: there, and can programs open them. Ports are in `rdma_ports`, slots in `pci`,
//! the network between them in `fabric`.
//!
//! Works on any tree below the root, so that fixtures stand for hardware. Opens and registers nothing.

use super::report::Finding;
use super::system::Root;
use super::{fabric, gpu, pci, rdma_ports as ports};

pub(super) const CLASS: &str = "/sys/class/infiniband";
/// Where `libibverbs.so.1` is looked for.
const LIBRARIES: [&str; 8] = [
    "/usr/lib/x86_64-linux-gnu",
    "/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/lib64",
    "/usr/lib",
    "/usr/local/lib",
];
/// A port of a device.
pub(super) struct Port {
    pub(super) device: String,
    number: String,
    pub(super) path: String,
}

impl Port {
    pub(super) fn name(&self) -> String {
        if self.number == "1" {
            self.device.clone()
        } else {
            format!("{} port {}", self.device, self.number)
        }
    }
}

/// What the configuration and the environment want of RDMA.
#[derive(Clone, Debug, Default)]
pub(super) struct Asked {
    /// Its absence is a fault.
    pub(super) wanted: bool,
    /// Devices named; empty = all.
    pub(super) devices: Vec<String>,
    /// The variable that names an index of the GID table, and its value.
    pub(super) gid_index: Option<(String, String)>,
    /// `MC_IB_TC`.
    pub(super) traffic_class: Option<String>,
    /// A variable asks libibverbs to protect registered memory from forks.
    pub(super) fork_safe: bool,
}

impl Asked {
    pub(super) fn new(wanted: bool, devices: &[String], variables: &[(String, String)]) -> Self {
        let value = |name: &str| {
            let set = variables.iter().find(|(n, v)| n == name && !v.is_empty());
            set.map(|(_, v)| v.clone())
        };
        let first = |names: [&str; 2]| {
            names
                .iter()
                .find_map(|n| Some(((*n).to_owned(), value(n)?)))
        };
        let safe = ["RDMAV_FORK_SAFE", "IBV_FORK_SAFE"];
        Self {
            wanted,
            devices: devices.to_vec(),
            gid_index: first(["MC_GID_INDEX", "NCCL_IB_GID_INDEX"]),
            traffic_class: value("MC_IB_TC"),
            fork_safe: first(safe).is_some(),
        }
    }
}

/// All checks; one line when there is no device and none is wanted.
pub(super) fn check(root: &Root, asked: &Asked) -> Vec<Finding> {
    let mut devices = root.names(CLASS);
    if devices.is_empty() {
        return vec![no_device(root, asked.wanted)];
    }
    if devices.iter().any(|d| asked.devices.contains(d)) {
        devices.retain(|d| asked.devices.contains(d));
    }
    let mut found = vec![Finding::ok("devices", devices.join(", "))];
    found.push(library(root, asked.wanted));
    found.extend(providers(root, asked.wanted, &devices));
    found.push(nodes_of_devices(root, asked.wanted, &devices));
    let ports: Vec<Port> = devices.iter().flat_map(|d| ports_of(root, d)).collect();
    for port in &ports {
        let link = ports::link(root, port);
        let up = link.cause.is_empty();
        found.push(link);
        if up {
            found.extend(ports::gids(root, port, asked.gid_index.as_ref()));
            found.extend(ports::mtu(root, port));
        }
    }
    found.extend(ports::rates(root, &ports));
    found.extend(ports::mtus(root, &ports));
    for device in &devices {
        found.extend(pci::place(root, device));
    }
    found.push(pci::iommu(root, &devices));
    found.extend(pci::redirects(root, &devices, &gpu::cards(root)));
    found.extend(fabric::reverse_path(root, &ports));
    found.extend(fabric::one_network(root, &ports));
    found.extend(fabric::marks(root, &ports, asked.traffic_class.as_deref()));
    found.extend(fabric::counters(root, &ports));
    found.extend(fork(root, asked));
    found
}

fn ports_of(root: &Root, device: &str) -> Vec<Port> {
    let numbers = root.names(&format!("{CLASS}/{device}/ports")).into_iter();
    let port = |number: String| Port {
        device: device.to_owned(),
        path: format!("{CLASS}/{device}/ports/{number}"),
        number,
    };
    numbers.map(port).collect()
}

/// Why there is no device, and whether that matters.
fn no_device(root: &Root, wanted: bool) -> Finding {
    let idle = pci::idle_cards(root);
    if let Some((card, module)) = idle.first() {
        let shown = format!("{} card(s), the first at {card}", idle.len());
        let reason = format!("{module} is not loaded: the cards make no RDMA devices");
        let f = severe(wanted, "devices", "nic_without_driver", &shown, &reason);
        return f.remedy("load it").command(format!("modprobe {module}"));
    }
    let why = if root.exists("/sys/module/ib_core") {
        "ib_core is loaded, and no driver has made a device"
    } else {
        "no RDMA driver is loaded"
    };
    if !wanted {
        return Finding::skipped("devices", format!("none: {why}"));
    }
    let reason = format!("RDMA is wanted: {why}");
    Finding::fail("devices", "no_device", "none", reason)
        .remedy("load the NIC's driver, or use TCP")
        .command("modprobe mlx5_ib")
}

/// Whether a library is in one of the usual directories.
pub(super) fn has_library(root: &Root, name: &str) -> Option<String> {
    let mut places = LIBRARIES.iter().map(|d| format!("{d}/{name}"));
    places.find(|p| root.exists(p))
}

fn severe(wanted: bool, check: &str, cause: &'static str, value: &str, reason: &str) -> Finding {
    if wanted {
        Finding::fail(check, cause, value, reason)
    } else {
        Finding::warn(check, cause, value, reason)
    }
}

fn library(root: &Root, wanted: bool) -> Finding {
    match has_library(root, "libibverbs.so.1") {
        Some(path) => Finding::ok("library", path),
        None => severe(
            wanted,
            "library",
            "no_libibverbs",
            "libibverbs.so.1 not found",
            "programs cannot use the devices",
        )
        .remedy("install it")
        .command("apt-get install -y libibverbs1 ibverbs-providers"),
    }
}

/// libibverbs finds the code for a device by the files in this directory.
const PROVIDERS: &str = "/etc/libibverbs.d";
/// Beginnings of device names, and the provider each wants, where the driver is not told.
const BY_NAME: [(&str, &str); 8] = [
    ("mlx5", "mlx5"),
    ("mlx4", "mlx4"),
    ("bnxt_re", "bnxt_re"),
    ("irdma", "irdma"),
    ("efa", "efa"),
    ("erdma", "erdma"),
    ("hns", "hns"),
    ("rxe", "rxe"),
];

/// The provider that a device wants: by its kernel driver, since names may be changed.
fn provider_of(root: &Root, device: &str) -> Option<&'static str> {
    let text = root
        .read(&format!("{CLASS}/{device}/device/uevent"))
        .unwrap_or_default();
    let driver = text.lines().find_map(|l| l.strip_prefix("DRIVER="));
    let by = |name: &str| BY_NAME.iter().find(|(start, _)| name.starts_with(start));
    driver
        .and_then(by)
        .or_else(|| by(device))
        .map(|(_, provider)| *provider)
}

/// Devices that the kernel has and libibverbs would pass over.
fn providers(root: &Root, wanted: bool, devices: &[String]) -> Option<Finding> {
    let files = root.names(PROVIDERS);
    if files.is_empty() {
        // A libibverbs with its providers built in, or none, which was said.
        return None;
    }
    let has = |provider: &str| {
        let text = |f: &String| root.read(&format!("{PROVIDERS}/{f}")).unwrap_or_default();
        files.iter().any(|f| {
            text(f)
                .lines()
                .any(|l| l.split_whitespace().eq(["driver", provider]))
        })
    };
    let mut missing: Vec<&str> = devices
        .iter()
        .filter_map(|d| provider_of(root, d))
        .filter(|p| !has(p))
        .collect();
    missing.sort_unstable();
    missing.dedup();
    if missing.is_empty() {
        return Some(Finding::ok(
            "providers",
            format!("{} known to libibverbs", files.len()),
        ));
    }
    let shown = format!("none for {}", missing.join(", "));
    let reason =
        "the kernel has the device, and libibverbs does not know it: programs see no device";
    let f = severe(wanted, "providers", "no_provider", &shown, reason);
    Some(
        f.remedy("install the providers")
            .command("apt-get install -y ibverbs-providers"),
    )
}

/// The nodes of `/dev/infiniband` that belong to the devices: `uverbs0` and so on.
fn nodes_wanted(root: &Root, devices: &[String]) -> Vec<String> {
    const VERBS: &str = "/sys/class/infiniband_verbs";
    let of = |n: &String| {
        root.read(&format!("{VERBS}/{n}/ibdev"))
            .is_some_and(|d| devices.contains(&d))
    };
    root.names(VERBS).into_iter().filter(of).collect()
}

fn nodes_of_devices(root: &Root, wanted: bool, devices: &[String]) -> Finding {
    let check = "/dev/infiniband";
    let fault = |cause, value: &str, reason: &str| severe(wanted, check, cause, value, reason);
    let there: Vec<String> = root
        .names("/dev/infiniband")
        .into_iter()
        .filter(|n| n.starts_with("uverbs"))
        .collect();
    // A module that is built in has no directory of its own.
    if there.is_empty()
        && !root.exists("/sys/module/ib_uverbs")
        && !root.exists("/sys/class/infiniband_verbs")
    {
        return fault(
            "no_uverbs_module",
            "ib_uverbs is not loaded",
            "programs cannot open the devices",
        )
        .remedy("load it")
        .command("modprobe ib_uverbs");
    }
    if there.is_empty() {
        let reason = "the devices cannot be opened; in a container they were not passed in";
        return fault("no_device_node", "no uverbs node", reason)
            .remedy("start the container with --device=/dev/infiniband");
    }
    let missing: Vec<String> = nodes_wanted(root, devices)
        .into_iter()
        .filter(|n| !there.contains(n))
        .collect();
    if !missing.is_empty() {
        let shown = format!(
            "{} of {} missing",
            missing.join(", "),
            missing.len() + there.len()
        );
        return fault(
            "device_node_missing",
            &shown,
            "these devices cannot be opened; in a container they were not passed in",
        )
        .remedy("start the container with --device=/dev/infiniband, the whole directory");
    }
    let forbidden = |n: &&String| {
        let path = root.at(&format!("/dev/infiniband/{n}"));
        let opened = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path);
        opened.is_err_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied)
    };
    match there.iter().find(forbidden) {
        Some(node) => fault("device_node_forbidden", node, "this user may not open it")
            .remedy("add the user to the group that owns it")
            .command("ls -l /dev/infiniband"),
        None => Finding::ok(check, there.join(", ")),
    }
}

/// The first kernel that copies registered pages when a process forks, instead of leaving them to the child.
const COPIES_ON_FORK: (u32, u32) = (5, 12);

/// Engines fork workers: on old kernels the NIC and the parent then write to different pages.
fn fork(root: &Root, asked: &Asked) -> Option<Finding> {
    let release = root.read("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return None;
    };
    let shown = format!("Linux {major}.{minor}");
    if (major, minor) >= COPIES_ON_FORK {
        return Some(Finding::ok(
            "fork",
            format!("{shown} copies registered pages"),
        ));
    }
    if asked.fork_safe {
        return Some(Finding::ok(
            "fork",
            format!("{shown}, and libibverbs is told to protect registered pages"),
        ));
    }
    let reason = "after a fork the NIC may write to pages that only the child still sees";
    let f = severe(asked.wanted, "fork", "fork_unsafe", &shown, reason);
    Some(
        f.remedy("set RDMAV_FORK_SAFE=1 (and RDMAV_HUGEPAGES_SAFE=1 with huge pages), or use Linux 5.12 or newer")
            .command("export RDMAV_FORK_SAFE=1 RDMAV_HUGEPAGES_SAFE=1"),
    )
}
