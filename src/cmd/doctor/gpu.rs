//! GPUs as far as the pool cares: is there one, can programs reach it, can a NIC read its memory.
//!
//! Loads no driver and calls none: reads `/proc`, `/sys`, `/dev` and library directories below the root.

use super::pci::PCI;
use super::rdma::has_library;
use super::report::Finding;
use super::system::Root;

/// PCI addresses of NVIDIA's GPUs.
pub(super) fn cards(root: &Root) -> Vec<String> {
    let read = |d: &str, f: &str| root.read(&format!("{PCI}/{d}/{f}")).unwrap_or_default();
    let is_gpu = |d: &String| read(d, "vendor") == "0x10de" && read(d, "class").starts_with("0x03");
    root.names(PCI).into_iter().filter(is_gpu).collect()
}

/// What reads GPU memory for NICs, beside the driver itself: the names of its users, with versions.
fn memory_peers(root: &Root) -> Vec<String> {
    const PEERS: &str = "/sys/kernel/mm/memory_peers";
    let peers = root
        .names(PEERS)
        .into_iter()
        .filter(|n| n.starts_with("nv_mem"));
    peers
        .map(|n| {
            let version = root
                .read(&format!("{PEERS}/{n}/version"))
                .unwrap_or_default();
            format!("{n} {version}").trim_end().to_owned()
        })
        .collect()
}

pub(super) fn check(root: &Root, rdma: bool) -> Vec<Finding> {
    let cards = cards(root).len();
    let driver = root.read("/proc/driver/nvidia/version");
    if cards == 0 && driver.is_none() {
        return vec![Finding::skipped("GPU", "no NVIDIA GPU")];
    }
    let Some(driver) = driver else {
        let f = Finding::fail(
            "driver",
            "no_gpu_driver",
            format!("{cards} GPU(s), no driver"),
            "the nvidia module is not loaded",
        );
        return vec![
            f.remedy("install or load the driver")
                .command("modprobe nvidia"),
        ];
    };
    let first = driver.lines().next().unwrap_or_default();
    let version = first
        .split_whitespace()
        .find(|w| w.contains('.') && w.bytes().all(|b| b.is_ascii_digit() || b == b'.'));
    let mut found = vec![Finding::ok(
        "driver",
        format!(
            "{}, {cards} GPU(s)",
            version.unwrap_or("of unknown version")
        ),
    )];
    let library = has_library(root, "libcuda.so.1").or_else(|| {
        root.exists("/usr/local/cuda/compat/libcuda.so.1")
            .then(|| "/usr/local/cuda/compat/libcuda.so.1".to_owned())
    });
    found.push(match library {
        Some(path) => Finding::ok("libcuda", path),
        None => Finding::fail(
            "libcuda",
            "no_libcuda",
            "libcuda.so.1 not found",
            "programs cannot use the GPU; in a container the driver's libraries were not passed in",
        )
        .remedy("start the container with the NVIDIA runtime: --gpus all"),
    });
    let nodes = root
        .names("/dev")
        .into_iter()
        .filter(|n| {
            n.strip_prefix("nvidia")
                .is_some_and(|r| r.parse::<u32>().is_ok())
        })
        .count();
    found.push(if nodes == 0 {
        Finding::fail(
            "/dev/nvidia*",
            "no_gpu_node",
            "none",
            "the GPUs cannot be opened; in a container they were not passed in",
        )
        .remedy("start the container with --gpus all")
    } else {
        Finding::ok("/dev/nvidia*", format!("{nodes} GPU(s) can be opened"))
    });
    let peermem = root.exists("/sys/module/nvidia_peermem");
    let open = driver.contains("Open Kernel Module");
    let peers = memory_peers(root);
    found.push(if peermem {
        Finding::ok("GPUDirect", "nvidia_peermem is loaded")
    } else if !peers.is_empty() {
        Finding::ok("GPUDirect", peers.join(", "))
    } else if open {
        Finding::ok("GPUDirect", "the open kernel module exports dma-buf")
    } else if rdma {
        let shown = "neither nvidia_peermem nor the open kernel module";
        let reason = "NICs cannot read GPU memory: data goes through host memory";
        Finding::warn("GPUDirect", "no_gpudirect", shown, reason)
            .remedy("load nvidia_peermem, or install the open kernel module")
            .command("modprobe nvidia_peermem")
    } else {
        Finding::ok("GPUDirect", "not there, and not needed without RDMA")
    });
    found
}
