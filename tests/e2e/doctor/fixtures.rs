//! Hosts that are not here: trees of `/proc`, `/sys` and `/dev` with one fault each.

use std::path::{Path, PathBuf};

use super::faults::fault;
use super::{Fault, Lab, Said, doctor};

const IB: &str = "sys/class/infiniband";

/// A tree that a test bends before the doctor reads it.
struct Tree(PathBuf);

impl Tree {
    fn write(&self, path: &str, text: &str) -> &Self {
        let path = self.0.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, format!("{text}\n")).unwrap();
        self
    }

    fn remove(&self, path: &str) -> &Self {
        let path = self.0.join(path);
        if path.is_dir() {
            std::fs::remove_dir_all(path).unwrap();
        } else {
            std::fs::remove_file(path).unwrap();
        }
        self
    }

    /// A healthy host with 64 GiB and two NUMA nodes.
    fn host(place: &Path) -> Self {
        let tree = Self(place.join("root"));
        tree.write("proc/meminfo", "MemTotal: 67108864 kB\nMemAvailable: 60000000 kB\nCommitLimit: 30000000 kB\nCommitted_AS: 20000000 kB")
            .write("proc/self/limits", "Limit Soft Hard Units\nMax processes             100000               100000               processes\nMax open files            65536                65536                files\nMax locked memory         unlimited            unlimited            bytes")
            .write("proc/self/status", "Name: x\nCapEff:\t0000000000000000\nMems_allowed_list:\t0-1")
            .write("proc/self/cgroup", "0::/pod/x")
            .write("proc/sys/vm/overcommit_memory", "0")
            .write("proc/sys/kernel/io_uring_disabled", "0")
            .write("sys/devices/system/node/online", "0-1")
            .write("sys/devices/system/node/node0/meminfo", "Node 0 MemTotal: 33554432 kB")
            .write("sys/devices/system/node/node1/meminfo", "Node 1 MemTotal: 33554432 kB")
            .write("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "0")
            .write("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "0")
            .write("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never");
        tree
    }

    /// The same with two RoCE devices, up and of one speed.
    fn rdma(place: &Path) -> Self {
        let tree = Self::host(place);
        tree.write("usr/lib/x86_64-linux-gnu/libibverbs.so.1", "")
            .write("sys/module/ib_uverbs/refcnt", "1");
        for (n, name) in ["mlx5_0", "mlx5_1"].iter().enumerate() {
            let port = format!("{IB}/{name}/ports/1");
            let interface = format!("eth{n}");
            tree.write(&format!("dev/infiniband/uverbs{n}"), "")
                .write(&format!("{port}/state"), "4: ACTIVE")
                .write(&format!("{port}/phys_state"), "5: LinkUp")
                .write(&format!("{port}/rate"), "100 Gb/sec (4X EDR)")
                .write(&format!("{port}/link_layer"), "Ethernet")
                .write(&format!("{port}/lid"), "0x0")
                .write(
                    &format!("{port}/gids/0"),
                    "fe80:0000:0000:0000:0000:0000:0000:0001",
                )
                .write(
                    &format!("{port}/gids/3"),
                    "0000:0000:0000:0000:0000:ffff:0a00:0001",
                )
                .write(
                    &format!("{port}/gids/4"),
                    "0000:0000:0000:0000:0000:0000:0000:0000",
                )
                .write(&format!("{port}/gid_attrs/types/0"), "IB/RoCE v1")
                .write(&format!("{port}/gid_attrs/types/3"), "RoCE v2")
                .write(&format!("{port}/gid_attrs/ndevs/0"), &interface)
                .write(&format!("{port}/hw_counters/out_of_sequence"), "17")
                .write(&format!("{port}/counters/symbol_error"), "0")
                .write(&format!("{IB}/{name}/device/numa_node"), "0")
                .write(&format!("{IB}/{name}/device/current_link_width"), "16")
                .write(&format!("{IB}/{name}/device/max_link_width"), "16")
                .write(
                    &format!("{IB}/{name}/device/current_link_speed"),
                    "16.0 GT/s PCIe",
                )
                .write(
                    &format!("{IB}/{name}/device/max_link_speed"),
                    "16.0 GT/s PCIe",
                )
                .write(&format!("sys/class/net/{interface}/mtu"), "9000")
                .write(
                    &format!("proc/sys/net/ipv4/conf/{interface}/rp_filter"),
                    "2",
                );
        }
        tree
    }

    fn gpu(place: &Path) -> Self {
        let tree = Self::host(place);
        tree.write("sys/bus/pci/devices/0000:17:00.0/vendor", "0x10de")
            .write("sys/bus/pci/devices/0000:17:00.0/class", "0x030200")
            .write("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19\nGCC version: 12")
            .write("usr/lib/x86_64-linux-gnu/libcuda.so.1", "")
            .write("dev/nvidia0", "");
        tree
    }

    fn examined(&self, lab: &Lab, more: &[&str]) -> Said {
        let mut arguments = vec![
            "--master",
            lab.master.as_str(),
            "--root",
            self.0.to_str().unwrap(),
        ];
        arguments.extend_from_slice(more);
        doctor(&arguments, &[], &lab.place())
    }

    /// With a `mooncake.json` of one more line.
    fn configured(&self, lab: &Lab, more: &str) -> Said {
        let place = lab.place();
        let file = format!(
            r#"{{"local_hostname":"localhost","metadata_server":"P2PHANDSHAKE","master_server_address":"{}",{more}}}"#,
            lab.master
        );
        std::fs::write(place.join("mooncake.json"), file).unwrap();
        doctor(&["--root", self.0.to_str().unwrap()], &[], &place)
    }
}

const SIZE: &str = r#""global_segment_size":"40GB","local_buffer_size":"1GB""#;

pub(super) fn all() -> Vec<Fault> {
    let mut all = host();
    all.extend(rdma());
    all.extend(gpu());
    all.extend(python());
    all
}

fn host() -> Vec<Fault> {
    let area = "Host, by fixture";
    vec![
        fault!(
            area,
            "more memory configured than is free",
            ("memory", "warn", "memory_short"),
            &["loopback_node"],
            |lab| {
                // A node of the healthy pool runs here, which would excuse it: another host's pool is asked.
                let fake = super::strangers::FakeMaster {
                    host: "another-host",
                    ..Default::default()
                };
                let tree = Tree::host(&lab.place());
                tree.write(
                    "proc/meminfo",
                    "MemTotal: 67108864 kB\nMemAvailable: 10000000 kB",
                );
                let file = format!(
                    r#"{{"local_hostname":"localhost","metadata_server":"P2PHANDSHAKE","master_server_address":"{}",{SIZE}}}"#,
                    fake.start()
                );
                let place = lab.place();
                std::fs::write(place.join("mooncake.json"), file).unwrap();
                doctor(&["--root", tree.0.to_str().unwrap()], &[], &place)
            }
        ),
        fault!(
            area,
            "a container's memory limit below the segment",
            ("cgroup memory", "fail", "cgroup_memory"),
            &[],
            |lab| {
                Tree::host(&lab.place())
                    .write("sys/fs/cgroup/pod/memory.max", "17179869184")
                    .write("sys/fs/cgroup/pod/memory.current", "0")
                    .configured(lab, SIZE)
            }
        ),
        fault!(
            area,
            "the same with version 1 of control groups",
            ("cgroup memory", "fail", "cgroup_memory"),
            &[],
            |lab| {
                Tree::host(&lab.place())
                    .write("proc/self/cgroup", "4:memory:/job")
                    .write(
                        "sys/fs/cgroup/memory/job/memory.limit_in_bytes",
                        "17179869184",
                    )
                    .configured(lab, SIZE)
            }
        ),
        fault!(
            area,
            "a container's limit of processes",
            ("threads", "fail", "threads"),
            &[],
            |lab| {
                Tree::host(&lab.place())
                    .write("sys/fs/cgroup/pod/x/pids.max", "40")
                    .examined(lab, &[])
            }
        ),
        fault!(
            area,
            "too few huge pages reserved",
            ("huge pages", "warn", "hugepages_too_few"),
            &[],
            |lab| {
                let base = "sys/kernel/mm/hugepages/hugepages-2048kB";
                Tree::host(&lab.place())
                    .write(&format!("{base}/nr_hugepages"), "1024")
                    .write(&format!("{base}/free_hugepages"), "1024")
                    .configured(lab, SIZE)
            }
        ),
        fault!(
            area,
            "huge pages, and a segment of an odd size",
            ("huge pages", "warn", "hugepages_odd_size"),
            &[],
            |lab| {
                let base = "sys/kernel/mm/hugepages/hugepages-2048kB";
                Tree::host(&lab.place())
                    .write(&format!("{base}/nr_hugepages"), "9000")
                    .write(&format!("{base}/free_hugepages"), "9000")
                    .configured(lab, r#""global_segment_size":3355443201"#)
            }
        ),
        fault!(
            area,
            "strict overcommit",
            ("overcommit", "fail", "overcommit"),
            &[],
            |lab| Tree::host(&lab.place())
                .write("proc/sys/vm/overcommit_memory", "2")
                .configured(lab, SIZE)
        ),
        fault!(
            area,
            "bound to one NUMA node that is too small",
            ("NUMA", "fail", "numa_bound"),
            &[],
            |lab| {
                Tree::host(&lab.place())
                    .write("proc/self/status", "CapEff:\t0\nMems_allowed_list:\t1")
                    .configured(lab, SIZE)
            }
        ),
        fault!(
            area,
            "io_uring is switched off, and an SSD configured",
            ("io_uring", "warn", "io_uring_off"),
            &["ssd_no_direct_io", "ssd_slow"],
            |lab| {
                let ssd = lab.place();
                Tree::host(&lab.place())
                    .write("proc/sys/kernel/io_uring_disabled", "2")
                    .configured(
                        lab,
                        &format!(
                            r#""enable_ssd_offload":true,"ssd_offload_path":"{}""#,
                            ssd.display()
                        ),
                    )
            }
        ),
        fault!(
            area,
            "memlock of 64 KiB with RDMA",
            ("locked memory", "fail", "memlock"),
            &["rdma_not_built"],
            |lab| {
                let tree = Tree::rdma(&lab.place());
                tree.write("proc/self/limits", "Max processes             100000               100000               processes\nMax open files            65536                65536                files\nMax locked memory         65536                65536                bytes");
                tree.configured(lab, &format!(r#""protocol":"rdma",{SIZE}"#))
            }
        ),
    ]
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
            |lab| {
                let tree = Tree::rdma(&lab.place());
                doctor(
                    &["--master", &lab.master, "--root", tree.0.to_str().unwrap()],
                    &[("MC_GID_INDEX", "4")],
                    &lab.place(),
                )
            }
        ),
        fault!(
            area,
            "an interface with an MTU of 1500",
            ("mlx5_0 MTU", "warn", "rdma_mtu"),
            &[],
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
            |lab| {
                let tree = Tree::rdma(&lab.place());
                let counter = tree
                    .0
                    .join(format!("{IB}/mlx5_0/ports/1/hw_counters/out_of_sequence"));
                let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
                let ended = stop.clone();
                let grow = std::thread::spawn(move || {
                    let mut n = 17;
                    while !ended.load(std::sync::atomic::Ordering::Relaxed) {
                        n += 1;
                        // Renamed into place: a half-written file would read as no number.
                        let next = counter.with_extension("next");
                        std::fs::write(&next, n.to_string()).unwrap();
                        std::fs::rename(&next, &counter).unwrap();
                        std::thread::sleep(std::time::Duration::from_millis(20));
                    }
                });
                let said = tree.examined(lab, &[]);
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
                grow.join().unwrap();
                said
            }
        ),
    ]
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

/// The doctor with a directory before all others on Python's path.
fn with_modules(lab: &Lab, fill: impl FnOnce(&Tree)) -> Said {
    if std::process::Command::new("python3")
        .arg("-V")
        .output()
        .is_err()
    {
        return Err("no python3".to_owned());
    }
    let place = lab.place();
    let tree = Tree(place.join("modules"));
    fill(&tree);
    doctor(
        &["--master", &lab.master],
        &[("PYTHONPATH", tree.0.to_str().unwrap())],
        &place,
    )
}

fn python() -> Vec<Fault> {
    let area = "Python";
    vec![
        fault!(
            area,
            "a plain directory `mooncake` is imported",
            ("mooncake module", "fail", "module_shadowed"),
            &[],
            |lab| {
                with_modules(lab, |t| {
                    t.write("mooncake/readme.txt", "no module");
                })
            }
        ),
        fault!(
            area,
            "another package of that name",
            ("mooncake module", "fail", "module_foreign"),
            &[],
            |lab| {
                with_modules(lab, |t| {
                    t.write("mooncake/__init__.py", "");
                })
            }
        ),
        fault!(
            area,
            "upstream's wheel and this one, both installed",
            ("mooncake module", "fail", "module_twice"),
            &[],
            |lab| {
                with_modules(lab, |t| {
                    t.write("mooncake/__init__.py", "")
                        .write("mooncake/store.py", "")
                        .write(
                            "mooncake_rs-0.1.0.dist-info/METADATA",
                            "Metadata-Version: 2.1\nName: mooncake-rs\nVersion: 0.1.0",
                        )
                        .write(
                            "mooncake_transfer_engine-0.3.7.dist-info/METADATA",
                            "Metadata-Version: 2.1\nName: mooncake-transfer-engine\nVersion: 0.3.7",
                        );
                })
            }
        ),
        fault!(
            area,
            "a library that the module wants is missing",
            ("module's libraries", "fail", "library_missing"),
            &[],
            |lab| {
                let place = lab.place();
                let cc = |arguments: &[&str]| {
                    let made = std::process::Command::new("cc")
                        .args(arguments)
                        .current_dir(&place)
                        .status();
                    made.is_ok_and(|s| s.success())
                };
                let built = cc(&[
                    "-shared",
                    "-x",
                    "c",
                    "/dev/null",
                    "-o",
                    "libibverbs_absent.so.1",
                ]) && cc(&[
                    "-shared",
                    "-x",
                    "c",
                    "/dev/null",
                    "-o",
                    "engine.so",
                    "-Wl,--no-as-needed",
                    "-L.",
                    "-l:libibverbs_absent.so.1",
                ]);
                if !built {
                    return Err("no cc".to_owned());
                }
                with_modules(lab, |t| {
                    t.write("mooncake/__init__.py", "")
                        .write("mooncake/store.py", "");
                    std::fs::copy(place.join("engine.so"), t.0.join("mooncake/engine.so")).unwrap();
                })
            }
        ),
        fault!(
            area,
            "a vLLM without connectors",
            ("vllm", "warn", "vllm_without_connector"),
            &[],
            |lab| {
                with_modules(lab, |t| {
                    t.write("vllm/__init__.py", "").write(
                        "vllm-0.4.0.dist-info/METADATA",
                        "Metadata-Version: 2.1\nName: vllm\nVersion: 0.4.0",
                    );
                })
            }
        ),
    ]
}
