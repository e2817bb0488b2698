//! Hosts that are not here: trees of `/proc`, `/sys` and `/dev` with one fault each.

use std::path::{Path, PathBuf};

use super::faults::fault;
use super::{Fault, Lab, Said, doctor};

pub(super) const IB: &str = "sys/class/infiniband";

/// A tree that a test bends before the doctor reads it.
pub(super) struct Tree(pub(super) PathBuf);

impl Tree {
    pub(super) fn write(&self, path: &str, text: &str) -> &Self {
        let path = self.0.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, format!("{text}\n")).unwrap();
        self
    }

    pub(super) fn remove(&self, path: &str) -> &Self {
        let path = self.0.join(path);
        if path.is_dir() {
            std::fs::remove_dir_all(path).unwrap();
        } else {
            std::fs::remove_file(path).unwrap();
        }
        self
    }

    /// A healthy host with 64 GiB and two NUMA nodes.
    pub(super) fn host(place: &Path) -> Self {
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
    pub(super) fn rdma(place: &Path) -> Self {
        let tree = Self::host(place);
        tree.write("usr/lib/x86_64-linux-gnu/libibverbs.so.1", "")
            .write("etc/libibverbs.d/mlx5.driver", "driver mlx5")
            .write("proc/sys/kernel/osrelease", "6.1.0-30-amd64")
            .write("proc/sys/vm/max_map_count", "65530")
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
                .write(&format!("{port}/gid_attrs/ndevs/3"), &interface)
                .write(&format!("sys/class/infiniband_verbs/uverbs{n}/ibdev"), name)
                .write(&format!("{IB}/{name}/device/uevent"), "DRIVER=mlx5_core")
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

    pub(super) fn gpu(place: &Path) -> Self {
        let tree = Self::host(place);
        tree.write("sys/bus/pci/devices/0000:17:00.0/vendor", "0x10de")
            .write("sys/bus/pci/devices/0000:17:00.0/class", "0x030200")
            .write("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19\nGCC version: 12")
            .write("usr/lib/x86_64-linux-gnu/libcuda.so.1", "")
            .write("dev/nvidia0", "");
        tree
    }

    /// Cards in their slots: a NIC and a GPU, each below a bridge of its own, and devices that point there.
    pub(super) fn slots(&self) -> &Self {
        let (nic, gpu) = (
            "devices/pci0000:16/0000:16:01.0/0000:17:00.0",
            "devices/pci0000:16/0000:16:02.0/0000:18:00.0",
        );
        let link = |from: &str, to: &str| {
            let from = self.0.join("sys").join(from);
            std::fs::create_dir_all(from.parent().unwrap()).unwrap();
            let _ = std::fs::remove_dir_all(&from);
            std::os::unix::fs::symlink(self.0.join("sys").join(to), from).unwrap();
        };
        for (path, class, vendor) in [(nic, "0x020000", "0x15b3"), (gpu, "0x030200", "0x10de")] {
            let bridge = path.rsplit_once('/').unwrap().0;
            let name = |p: &str| p.rsplit_once('/').unwrap().1.to_owned();
            self.write(&format!("sys/{path}/class"), class)
                .write(&format!("sys/{path}/vendor"), vendor)
                .write(&format!("sys/{path}/numa_node"), "0")
                .write(&format!("sys/{path}/uevent"), "DRIVER=mlx5_core")
                .write(&format!("sys/{bridge}/class"), "0x060400");
            self.bridge(bridge, 0);
            link(&format!("bus/pci/devices/{}", name(path)), path);
            link(&format!("bus/pci/devices/{}", name(bridge)), bridge);
        }
        link("class/infiniband/mlx5_0/device", nic);
        self
    }

    /// The configuration space of a bridge: AER, then ACS with this control word.
    pub(super) fn bridge(&self, path: &str, acs: u8) -> &Self {
        let mut config = vec![0_u8; 4096];
        config[0x100..0x104].copy_from_slice(&[0x01, 0x00, 0x81, 0x14]);
        config[0x148..0x150].copy_from_slice(&[0x0d, 0x00, 0x01, 0x00, 0, 0, acs, 0]);
        std::fs::write(self.0.join("sys").join(path).join("config"), config).unwrap();
        self
    }

    pub(super) fn examined(&self, lab: &Lab, more: &[&str]) -> Said {
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
    pub(super) fn configured(&self, lab: &Lab, more: &str) -> Said {
        let place = lab.place();
        let file = format!(
            r#"{{"local_hostname":"localhost","metadata_server":"P2PHANDSHAKE","master_server_address":"{}",{more}}}"#,
            lab.master
        );
        std::fs::write(place.join("mooncake.json"), file).unwrap();
        doctor(&["--root", self.0.to_str().unwrap()], &[], &place)
    }
}

/// What a node of some size asks for.
pub(super) const SIZE: &str = r#""global_segment_size":"40GB","local_buffer_size":"1GB""#;

pub(super) fn all() -> Vec<Fault> {
    let mut all = host();
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
            &["ssd_in_memory", "ssd_no_direct_io", "ssd_slow"],
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
