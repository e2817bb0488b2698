//! Which NICs are near which memory, read from sysfs below a given root.
//!
//! Owns the distance between devices; opens none, so that fixture trees stand for hardware. The answer has upstream's
//! form: per location the NICs to prefer and the others.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

const NICS: &str = "sys/class/infiniband";
const PCI: &str = "sys/bus/pci/devices";
const NODES: &str = "sys/devices/system/node";

struct Place {
    name: String,
    /// NUMA node; -1 = not told.
    node: i64,
    /// Parts of its path on the PCI tree.
    path: Vec<String>,
}

fn names(directory: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return Vec::new();
    };
    let mut names: Vec<String> = entries
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

fn text(path: PathBuf) -> String {
    std::fs::read_to_string(path).map_or_else(|_| String::new(), |t| t.trim().to_owned())
}

fn place(name: String, device: &Path) -> Place {
    let real = std::fs::canonicalize(device).unwrap_or_default();
    Place {
        name,
        node: text(device.join("numa_node")).parse().unwrap_or(-1),
        path: real
            .iter()
            .map(|p| p.to_string_lossy().into_owned())
            .collect(),
    }
}

/// Parts of two paths that are not shared.
fn distance(a: &Place, b: &Place) -> usize {
    let shared = a.path.iter().zip(&b.path).take_while(|(x, y)| x == y);
    let shared = shared.count();
    a.path.len() + b.path.len() - 2 * shared
}

fn split<'a>(nics: &'a [Place], is_near: impl Fn(&Place) -> bool) -> Value {
    let (near, far): (Vec<&'a Place>, Vec<&'a Place>) = nics.iter().partition(|n| is_near(n));
    let list = |of: Vec<&'a Place>| of.into_iter().map(|n| n.name.clone()).collect::<Vec<_>>();
    json!([list(near), list(far)])
}

/// `{"cpu:0": [[preferred], [others]], "cuda:0": …}`. NICs are those `wanted` says yes to; GPUs are in the order of their
/// PCI addresses.
pub fn matrix(root: &Path, wanted: impl Fn(&str) -> bool) -> Value {
    let nics: Vec<Place> = names(&root.join(NICS))
        .into_iter()
        .filter(|n| wanted(n))
        .map(|n| {
            let device = root.join(NICS).join(&n).join("device");
            place(n, &device)
        })
        .collect();
    let mut all = Map::new();
    let nodes = names(&root.join(NODES)).into_iter();
    let mut nodes: Vec<i64> = nodes
        .filter_map(|n| n.strip_prefix("node")?.parse().ok())
        .collect();
    nodes.sort_unstable();
    if nodes.is_empty() {
        nodes.push(0);
    }
    for node in nodes {
        // What does not tell its node is as near as anything.
        let near = |n: &Place| n.node == node || n.node < 0;
        all.insert(format!("cpu:{node}"), split(&nics, near));
    }
    let is_gpu = |device: &Path| {
        text(device.join("vendor")) == "0x10de" && text(device.join("class")).starts_with("0x03")
    };
    let cards = names(&root.join(PCI)).into_iter();
    let cards = cards.map(|name| {
        let device = root.join(PCI).join(&name);
        (name, device)
    });
    for (number, (name, device)) in cards.filter(|(_, d)| is_gpu(d)).enumerate() {
        let card = place(name, &device);
        let of_node = |n: &&Place| n.node == card.node || n.node < 0 || card.node < 0;
        let shortest = nics
            .iter()
            .filter(of_node)
            .map(|n| distance(n, &card))
            .min();
        let near = |n: &Place| of_node(&n) && Some(distance(n, &card)) == shortest;
        all.insert(format!("cuda:{number}"), split(&nics, near));
    }
    Value::Object(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(root: &Path, path: &str, node: &str, files: &[(&str, &str)]) -> PathBuf {
        let at = root.join("sys/devices").join(path);
        std::fs::create_dir_all(&at).unwrap();
        std::fs::write(at.join("numa_node"), node).unwrap();
        for (name, text) in files {
            std::fs::write(at.join(name), text).unwrap();
        }
        at
    }

    #[test]
    fn near_and_far() {
        let temporary = tempfile::tempdir().unwrap();
        let root = temporary.path();
        for directory in [NICS, PCI, NODES] {
            std::fs::create_dir_all(root.join(directory)).unwrap();
        }
        for node in ["node0", "node1", "possible"] {
            std::fs::create_dir_all(root.join(NODES).join(node)).unwrap();
        }
        let link = |target: PathBuf, at: PathBuf| std::os::unix::fs::symlink(target, at).unwrap();
        for (name, path, node) in [
            ("mlx5_0", "pci0000:00/0000:00:01.0/0000:01:00.0", "0"),
            ("mlx5_1", "pci0000:00/0000:00:02.0/0000:02:00.0", "0"),
            ("mlx5_2", "pci0000:80/0000:80:01.0/0000:81:00.0", "1"),
        ] {
            let at = root.join(NICS).join(name);
            std::fs::create_dir_all(&at).unwrap();
            link(device(root, path, node, &[]), at.join("device"));
        }
        let gpu = [("vendor", "0x10de\n"), ("class", "0x030200\n")];
        for (name, path, node) in [
            ("0000:02:01.0", "pci0000:00/0000:00:02.0/0000:02:01.0", "0"),
            ("0000:82:00.0", "pci0000:80/0000:80:02.0/0000:82:00.0", "1"),
        ] {
            link(device(root, path, node, &gpu), root.join(PCI).join(name));
        }
        let expected = json!({
            "cpu:0": [["mlx5_0", "mlx5_1"], ["mlx5_2"]],
            "cpu:1": [["mlx5_2"], ["mlx5_0", "mlx5_1"]],
            "cuda:0": [["mlx5_1"], ["mlx5_0", "mlx5_2"]],
            "cuda:1": [["mlx5_2"], ["mlx5_0", "mlx5_1"]],
        });
        assert_eq!(matrix(root, |_| true), expected);
        let some = matrix(root, |n| n != "mlx5_1");
        assert_eq!(some["cuda:0"], json!([["mlx5_0"], ["mlx5_2"]]));
        let nothing = tempfile::tempdir().unwrap();
        assert_eq!(matrix(nothing.path(), |_| true), json!({"cpu:0": [[], []]}));
    }
}
