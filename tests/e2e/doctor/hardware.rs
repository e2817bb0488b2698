//! RDMA devices and GPUs that are not here: trees of `/sys` with one fault each, one at least for every row that
//! `mooncake doctor` reads from files.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::faults::fault;
use super::fixtures::{IB, SIZE, Tree};
use super::{Fault, Lab, Said, doctor};

pub(super) fn all() -> Vec<Fault> {
    let mut all = rdma();
    all.extend(gpu());
    all
}

fn rdma() -> Vec<Fault> {
    let area = "RDMA, by fixture";
    vec![
        fault!(
            area,
            "protocol rdma on a host without a device",
            ("protocol", "fail", "rdma_without_device"),
            &["no_device"],
            |lab| Tree::host(&lab.place()).configured(lab, r#""protocol":"rdma""#)
        ),
        fault!(
            area,
            "protocol rdma, which this build does not have",
            ("protocol", "warn", "rdma_not_built"),
            &[],
            |lab| Tree::rdma(&lab.place()).configured(lab, r#""protocol":"rdma""#)
        ),
        fault!(
            area,
            "a device is named that is not there",
            ("device_name", "fail", "rdma_device_missing"),
            &["rdma_not_built"],
            |lab| {
                Tree::rdma(&lab.place())
                    .configured(lab, r#""protocol":"rdma","device_name":"mlx5_7""#)
            }
        ),
        fault!(
            area,
            "no device, and --rdma",
            ("devices", "fail", "no_device"),
            &[],
            |lab| Tree::host(&lab.place()).examined(lab, &["--rdma"])
        ),
        fault!(
            area,
            "libibverbs is not installed",
            ("library", "warn", "no_libibverbs"),
            &[],
            |lab| Tree::rdma(&lab.place())
                .remove("usr/lib/x86_64-linux-gnu/libibverbs.so.1")
                .examined(lab, &[])
        ),
        fault!(
            area,
            "ib_uverbs is not loaded",
            ("/dev/infiniband", "fail", "no_uverbs_module"),
            &[],
            |lab| Tree::rdma(&lab.place())
                .remove("sys/module/ib_uverbs")
                .remove("sys/class/infiniband_verbs")
                .remove("dev/infiniband")
                .examined(lab, &["--rdma"])
        ),
        fault!(
            area,
            "a container without /dev/infiniband",
            ("/dev/infiniband", "fail", "no_device_node"),
            &[],
            |lab| Tree::rdma(&lab.place())
                .remove("dev/infiniband")
                .examined(lab, &["--rdma"])
        ),
        fault!(
            area,
            "no link",
            ("mlx5_1 link", "fail", "link_down"),
            &[],
            |lab| {
                Tree::rdma(&lab.place())
                    .write(&format!("{IB}/mlx5_1/ports/1/state"), "1: DOWN")
                    .write(&format!("{IB}/mlx5_1/ports/1/phys_state"), "2: Polling")
                    .examined(lab, &[])
            }
        ),
        fault!(
            area,
            "the port is switched off",
            ("mlx5_0 link", "fail", "link_disabled"),
            &[],
            |lab| {
                Tree::rdma(&lab.place())
                    .write(&format!("{IB}/mlx5_0/ports/1/state"), "1: DOWN")
                    .write(&format!("{IB}/mlx5_0/ports/1/phys_state"), "3: Disabled")
                    .examined(lab, &[])
            }
        ),
        fault!(
            area,
            "InfiniBand without a subnet manager",
            ("mlx5_0 link", "fail", "link_init"),
            &[],
            |lab| {
                Tree::rdma(&lab.place())
                    .write(&format!("{IB}/mlx5_0/ports/1/link_layer"), "InfiniBand")
                    .write(&format!("{IB}/mlx5_0/ports/1/state"), "2: INIT")
                    .examined(lab, &[])
            }
        ),
        fault!(
            area,
            "InfiniBand port without a LID",
            ("mlx5_0 link", "fail", "no_lid"),
            &[],
            |lab| Tree::rdma(&lab.place())
                .write(&format!("{IB}/mlx5_0/ports/1/link_layer"), "InfiniBand")
                .examined(lab, &[])
        ),
        fault!(
            area,
            "an interface without an IP address",
            ("mlx5_0 GIDs", "warn", "gid_link_local"),
            &[],
            |lab| {
                let types = format!("{IB}/mlx5_0/ports/1/gid_attrs/types/0");
                Tree::rdma(&lab.place())
                    .remove(&format!("{IB}/mlx5_0/ports/1/gids/3"))
                    .write(&types, "RoCE v2")
                    .examined(lab, &[])
            }
        ),
        fault!(
            area,
            "RoCE v1 only",
            ("mlx5_0 GIDs", "warn", "gid_v1"),
            &[],
            |lab| Tree::rdma(&lab.place())
                .write(
                    &format!("{IB}/mlx5_0/ports/1/gid_attrs/types/3"),
                    "IB/RoCE v1"
                )
                .examined(lab, &[])
        ),
        fault!(
            area,
            "no GID at all",
            ("mlx5_0 GIDs", "fail", "no_gid"),
            &[],
            |lab| {
                Tree::rdma(&lab.place())
                    .remove(&format!("{IB}/mlx5_0/ports/1/gids"))
                    .examined(lab, &[])
            }
        ),
        fault!(
            area,
            "MC_GID_INDEX names an empty slot",
            ("mlx5_0 GIDs", "fail", "gid_index_empty"),
            &[],
            |lab| { variables(lab, &[("MC_GID_INDEX", "4")]) }
        ),
        fault!(
            area,
            "an interface with an MTU of 1500",
            ("mlx5_0 MTU", "warn", "rdma_mtu"),
            &["mtu_differs"],
            |lab| Tree::rdma(&lab.place())
                .write("sys/class/net/eth0/mtu", "1500")
                .examined(lab, &[])
        ),
        fault!(
            area,
            "one device slower than the other",
            ("rates", "warn", "rate_differs"),
            &[],
            |lab| Tree::rdma(&lab.place())
                .write(&format!("{IB}/mlx5_1/ports/1/rate"), "25 Gb/sec (1X EDR)")
                .examined(lab, &[])
        ),
        fault!(
            area,
            "a card in a narrow slot",
            ("mlx5_0 PCIe", "warn", "pcie_degraded"),
            &[],
            |lab| Tree::rdma(&lab.place())
                .write(&format!("{IB}/mlx5_0/device/current_link_width"), "8")
                .examined(lab, &[])
        ),
        fault!(
            area,
            "a card of unknown NUMA node",
            ("mlx5_0 NUMA", "warn", "numa_unknown"),
            &[],
            |lab| Tree::rdma(&lab.place())
                .write(&format!("{IB}/mlx5_0/device/numa_node"), "-1")
                .examined(lab, &[])
        ),
        fault!(
            area,
            "an IOMMU that translates",
            ("IOMMU", "warn", "iommu_translates"),
            &[],
            |lab| Tree::rdma(&lab.place())
                .write("sys/kernel/iommu_groups/7/type", "DMA-FQ")
                .examined(lab, &[])
        ),
        fault!(
            area,
            "several NICs and a strict reverse path filter",
            ("reverse path", "warn", "rp_filter"),
            &[],
            |lab| Tree::rdma(&lab.place())
                .write("proc/sys/net/ipv4/conf/eth1/rp_filter", "1")
                .examined(lab, &[])
        ),
        fault!(
            area,
            "a fabric that loses packets right now",
            ("losses", "warn", "fabric_loses"),
            &[],
            |lab| growing(lab, "out_of_sequence")
        ),
        fault!(
            area,
            "a device libibverbs has no provider for",
            ("providers", "fail", "no_provider"),
            &[],
            |lab| Tree::rdma(&lab.place())
                .write("etc/libibverbs.d/mlx5.driver", "driver mlx4")
                .examined(lab, &["--rdma"])
        ),
        fault!(
            area,
            "a card whose RDMA module is not loaded",
            ("devices", "fail", "nic_without_driver"),
            &[],
            |lab| Tree::host(&lab.place())
                .write("sys/bus/pci/devices/0000:17:00.0/vendor", "0x15b3")
                .write("sys/bus/pci/devices/0000:17:00.0/class", "0x020000")
                .examined(lab, &["--rdma"])
        ),
        fault!(
            area,
            "a container with the node of one device of two",
            ("/dev/infiniband", "fail", "device_node_missing"),
            &[],
            |lab| Tree::rdma(&lab.place())
                .remove("dev/infiniband/uverbs1")
                .examined(lab, &["--rdma"])
        ),
        fault!(
            area,
            "this user may not open the device",
            ("/dev/infiniband", "fail", "device_node_forbidden"),
            &["ssd_forbidden"],
            forbidden_node
        ),
        fault!(
            area,
            "GIDs of a container's bridge only",
            ("mlx5_0 GIDs", "warn", "gid_overlay"),
            &[],
            |lab| Tree::rdma(&lab.place())
                .write(&format!("{IB}/mlx5_0/ports/1/gid_attrs/ndevs/3"), "docker0")
                .examined(lab, &[])
        ),
        fault!(
            area,
            "NCCL_IB_GID_INDEX names a slot of RoCE v1",
            ("mlx5_0 GIDs", "warn", "gid_v1"),
            &[],
            |lab| variables(lab, &[("NCCL_IB_GID_INDEX", "0")])
        ),
        fault!(
            area,
            "rails of different MTUs",
            ("MTU of the rails", "warn", "mtu_differs"),
            &[],
            |lab| Tree::rdma(&lab.place())
                .write("sys/class/net/eth1/mtu", "4500")
                .examined(lab, &[])
        ),
        fault!(
            area,
            "memlock that is enough for one NIC of two",
            ("locked memory", "fail", "memlock"),
            &["rdma_not_built"],
            |lab| {
                let tree = Tree::rdma(&lab.place());
                let bytes = 50_u64 << 30;
                tree.write("proc/self/limits", &format!("Max processes 100000 100000 processes\nMax open files 65536 65536 files\nMax locked memory {bytes} {bytes} bytes"));
                tree.configured(lab, &format!(r#""protocol":"rdma",{SIZE}"#))
            }
        ),
        fault!(
            area,
            "a large segment on ordinary pages",
            ("huge pages", "warn", "hugepages_none"),
            &["rdma_not_built", "memory_short", "memory_too_small"],
            |lab| Tree::rdma(&lab.place())
                .write(
                    "proc/meminfo",
                    "MemTotal: 671088640 kB\nMemAvailable: 600000000 kB"
                )
                .configured(lab, r#""protocol":"rdma","global_segment_size":"128GB""#)
        ),
        fault!(
            area,
            "huge pages on the other NUMA node",
            ("huge pages", "warn", "hugepages_far"),
            &["rdma_not_built"],
            |lab| {
                let tree = Tree::rdma(&lab.place());
                let (all, node) = (
                    "sys/kernel/mm/hugepages/hugepages-2048kB",
                    "sys/devices/system/node",
                );
                for (file, pages) in [("nr_hugepages", "30000"), ("free_hugepages", "30000")] {
                    tree.write(&format!("{all}/{file}"), pages)
                        .write(
                            &format!("{node}/node0/hugepages/hugepages-2048kB/{file}"),
                            "0",
                        )
                        .write(
                            &format!("{node}/node1/hugepages/hugepages-2048kB/{file}"),
                            pages,
                        );
                }
                tree.configured(lab, &format!(r#""protocol":"rdma",{SIZE}"#))
            }
        ),
        fault!(
            area,
            "too few mappings for a large pool",
            ("mappings", "warn", "map_count"),
            &["rdma_not_built", "hugepages_none"],
            |lab| Tree::rdma(&lab.place())
                .write(
                    "proc/meminfo",
                    "MemTotal: 1342177280 kB\nMemAvailable: 1300000000 kB"
                )
                .configured(lab, r#""protocol":"rdma","global_segment_size":"512GB""#)
        ),
        fault!(
            area,
            "a NIC's own IOMMU group translates, others do not",
            ("IOMMU", "warn", "iommu_translates"),
            &[],
            |lab| Tree::rdma(&lab.place())
                .write("sys/kernel/iommu_groups/7/type", "identity")
                .write(&format!("{IB}/mlx5_1/device/iommu_group/type"), "DMA")
                .write("proc/cmdline", "ro quiet intel_iommu=on")
                .examined(lab, &[])
        ),
        fault!(
            area,
            "bridges send peer-to-peer traffic to the root (ACS)",
            ("PCI redirects", "warn", "acs_redirects"),
            &["no_gpudirect"],
            |lab| {
                let place = lab.place();
                Tree::gpu(&place);
                let tree = Tree::rdma(&place);
                tree.slots().bridge("devices/pci0000:16/0000:16:02.0", 0x1c);
                tree.examined(lab, &[])
            }
        ),
        fault!(
            area,
            "NICs of one network that answer for each other",
            ("one network", "warn", "arp_flux"),
            &[],
            |lab| Tree::rdma(&lab.place())
                .write("proc/net/route", ROUTES)
                .examined(lab, &[])
        ),
        fault!(
            area,
            "a fabric that marks packets right now",
            ("congestion", "warn", "fabric_congested"),
            &[],
            |lab| growing(lab, "np_cnp_sent")
        ),
        fault!(
            area,
            "a NIC that heeds no marks of congestion",
            ("mlx5_0 ECN", "warn", "ecn_off"),
            &[],
            |lab| {
                let tree = Tree::rdma(&lab.place());
                for p in 0..8 {
                    tree.write(&format!("sys/class/net/eth0/ecn/roce_np/enable/{p}"), "0")
                        .write(&format!("sys/class/net/eth0/ecn/roce_rp/enable/{p}"), "1");
                }
                tree.examined(lab, &[])
            }
        ),
        fault!(
            area,
            "a traffic class that is no byte",
            ("traffic class", "fail", "traffic_class"),
            &[],
            |lab| variables(lab, &[("MC_IB_TC", "1066")])
        ),
        fault!(
            area,
            "a traffic class without the bits of ECN",
            ("traffic class", "warn", "traffic_class_unmarked"),
            &[],
            |lab| variables(lab, &[("MC_IB_TC", "104")])
        ),
        fault!(
            area,
            "a kernel that leaves registered pages to the child",
            ("fork", "warn", "fork_unsafe"),
            &[],
            |lab| Tree::rdma(&lab.place())
                .write("proc/sys/kernel/osrelease", "5.4.0-190-generic")
                .examined(lab, &[])
        ),
    ]
}

/// Two interfaces in 10.0.0.0/24.
const ROUTES: &str = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT
eth0 0000000A 00000000 0001 0 0 0 00FFFFFF 0 0 0
eth1 0000000A 00000000 0001 0 0 0 00FFFFFF 0 0 0";

/// The healthy host with variables.
fn variables(lab: &Lab, variables: &[(&str, &str)]) -> Said {
    let tree = Tree::rdma(&lab.place());
    let arguments = ["--master", &lab.master, "--root", tree.0.to_str().unwrap()];
    doctor(&arguments, variables, &lab.place())
}

/// A counter of the first device grows while the doctor looks.
fn growing(lab: &Lab, counter: &str) -> Said {
    let tree = Tree::rdma(&lab.place());
    let path = tree
        .0
        .join(format!("{IB}/mlx5_0/ports/1/hw_counters/{counter}"));
    std::fs::write(&path, "17").unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let ended = stop.clone();
    let grow = std::thread::spawn(move || {
        let mut n = 17;
        while !ended.load(Ordering::Relaxed) {
            n += 1;
            // Renamed into place: a half-written file would read as no number.
            let next = path.with_extension("next");
            std::fs::write(&next, n.to_string()).unwrap();
            std::fs::rename(&next, &path).unwrap();
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let said = tree.examined(lab, &[]);
    stop.store(true, Ordering::Relaxed);
    grow.join().unwrap();
    said
}

/// As a user that owns nothing: root opens everything.
fn forbidden_node(lab: &Lab) -> Said {
    use std::os::unix::fs::PermissionsExt;
    if !rustix::process::getuid().is_root() {
        return Err("needs root, to become somebody else".to_owned());
    }
    let place = lab.place();
    let tree = Tree::rdma(&place);
    for n in 0..2 {
        let node = tree.0.join(format!("dev/infiniband/uverbs{n}"));
        std::fs::set_permissions(node, std::fs::Permissions::from_mode(0o600)).unwrap();
    }
    // The way there must be open to all.
    let mut way = Some(place.as_path());
    while let Some(path) = way.filter(|p| p.starts_with(lab.directory.path())) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
        way = path.parent();
    }
    let binary = place.join("mooncake");
    std::fs::copy(crate::pool::BINARY, &binary).unwrap();
    let out = std::process::Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&binary)
        .args([
            "doctor",
            "--output",
            "json",
            "--rdma",
            "--master",
            &lab.master,
            "--root",
        ])
        .arg(&tree.0)
        .current_dir("/")
        .output()
        .map_err(|e| format!("setpriv: {e}"))?;
    super::parse(&out.stdout, out.status.code())
}

fn gpu() -> Vec<Fault> {
    let area = "GPU, by fixture";
    vec![
        fault!(
            area,
            "a GPU without its driver",
            ("driver", "fail", "no_gpu_driver"),
            &[],
            |lab| Tree::gpu(&lab.place())
                .remove("proc/driver")
                .examined(lab, &[])
        ),
        fault!(
            area,
            "a container without libcuda",
            ("libcuda", "fail", "no_libcuda"),
            &[],
            |lab| Tree::gpu(&lab.place())
                .remove("usr/lib/x86_64-linux-gnu/libcuda.so.1")
                .examined(lab, &[])
        ),
        fault!(
            area,
            "a container without the GPU's device node",
            ("/dev/nvidia*", "fail", "no_gpu_node"),
            &[],
            |lab| Tree::gpu(&lab.place())
                .remove("dev/nvidia0")
                .examined(lab, &[])
        ),
        fault!(
            area,
            "RDMA and no GPUDirect",
            ("GPUDirect", "warn", "no_gpudirect"),
            &[],
            |lab| {
                let place = lab.place();
                Tree::gpu(&place);
                // Both trees lie in the same root.
                Tree::rdma(&place).examined(lab, &["--rdma"])
            }
        ),
    ]
}

/// Everything that is read is there and well: nothing may be said of it, and the choice of the GID is told with its reason.
#[test]
fn doctor_has_nothing_to_say_of_healthy_hardware() {
    let pool = crate::pool::Pool::start(1, "64MiB", &[]);
    let lab = Lab {
        master: pool.address.clone(),
        directory: tempfile::tempdir().unwrap(),
    };
    let place = lab.place();
    Tree::gpu(&place);
    let tree = Tree::rdma(&place);
    tree.slots()
        .write("sys/kernel/mm/memory_peers/nv_mem/version", "1.3-0")
        .write("sys/kernel/iommu_groups/7/type", "identity")
        .write("proc/net/route", ROUTES)
        .write("proc/sys/net/ipv4/conf/all/arp_ignore", "1");
    for p in 0..8 {
        tree.write(&format!("sys/class/net/eth0/ecn/roce_np/enable/{p}"), "1")
            .write(&format!("sys/class/net/eth0/ecn/roce_rp/enable/{p}"), "1");
    }
    let said = tree.examined(&lab, &["--rdma"]).unwrap();
    assert_eq!(super::faults_of(&said), []);
    let text = said.to_string();
    for part in [
        "index 3: 10.0.0.1, RoCE v2 on eth0 (private, best of 2)",
        "nv_mem 1.3-0",
        "notifies on 8 priorities",
        "off on 2 bridge(s)",
        "counters stand still for a second",
        "each interface answers for its own addresses only",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}
