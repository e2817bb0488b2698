//! RDMA devices as programs use them: the library opened, memory registered, bytes moved from a device to itself.
//!
//! What sysfs says is `rdma`'s business; here a device is really opened, by the engine.

use std::time::Duration;

use super::report::Finding;
use super::system::Root;
use crate::engine::transport::rdma::{
    BUILT, DeviceCheck, RdmaConfig, RdmaError, check_device, device_names,
};

/// Rows for every device (or those wanted); none where sysfs has no device.
pub(super) fn check(root: &Root, wanted: bool, only: &[String]) -> Vec<Finding> {
    let present = root.names("/sys/class/infiniband");
    if present.is_empty() {
        return Vec::new();
    }
    if !BUILT {
        let reason = "this build has no RDMA: devices are not opened";
        return vec![Finding::skipped("verbs", reason)];
    }
    let seen = match device_names() {
        Ok(seen) => seen,
        // Said by the row about the library.
        Err(RdmaError::NoLibrary) => return Vec::new(),
        Err(error) => return vec![severe(wanted, "verbs", "verbs_unusable", &error)],
    };
    let mut found = vec![missing(&present, &seen, wanted)];
    let config = RdmaConfig::from_env(|name| std::env::var(name).ok());
    for device in &seen {
        if only.is_empty() || only.contains(device) || !only.iter().any(|o| seen.contains(o)) {
            found.extend(of_device(device, &check_device(device, &config), wanted));
        }
    }
    found
}

/// What sysfs has and the library does not.
fn missing(present: &[String], seen: &[String], wanted: bool) -> Finding {
    let unseen: Vec<&str> = present
        .iter()
        .filter(|d| !seen.contains(d))
        .map(String::as_str)
        .collect();
    if unseen.is_empty() {
        return Finding::ok("verbs", format!("libibverbs sees {}", seen.join(", ")));
    }
    let reason =
        "in sysfs, and libibverbs does not see it: its provider or its device node is missing";
    let finding = if wanted {
        Finding::fail("verbs", "no_provider", unseen.join(", "), reason)
    } else {
        Finding::warn("verbs", "no_provider", unseen.join(", "), reason)
    };
    finding
        .remedy("install the providers; in a container pass --device=/dev/infiniband")
        .command("apt-get install -y ibverbs-providers")
}

fn of_device(device: &str, outcome: &Result<DeviceCheck, RdmaError>, wanted: bool) -> Vec<Finding> {
    let row = |what: &str| format!("{device} {what}");
    let done = match outcome {
        Ok(done) => done,
        Err(error) => return vec![severe(wanted, &row("verbs"), "device_unusable", error)],
    };
    let timed = |took: &Duration| format!("1 MiB in {:.1} ms", took.as_secs_f64() * 1e3);
    let mut found = Vec::new();
    found.push(match &done.registration {
        Ok(took) => Finding::ok(row("registration"), timed(took)),
        Err(error) => severe(wanted, &row("registration"), "no_registration", error),
    });
    found.push(match &done.loopback {
        Ok(took) => Finding::ok(
            row("loopback"),
            format!("{} there and back, {}", timed(took), done.summary),
        ),
        Err(error) => severe(wanted, &row("loopback"), "no_loopback", error),
    });
    found.push(Finding::ok(
        row("GPU memory"),
        if done.gpu_memory {
            "can be registered (dma-buf)"
        } else {
            "cannot be registered (no dma-buf): it goes through host memory"
        },
    ));
    found
}

fn severe(wanted: bool, check: &str, cause: &'static str, error: &RdmaError) -> Finding {
    let text = error.to_string();
    let finding = if wanted {
        Finding::fail(check, cause, "failed", text.clone())
    } else {
        Finding::warn(check, cause, "failed", text.clone())
    };
    finding.remedy(if text.contains("memlock") {
        "LimitMEMLOCK=infinity in the service, container --ulimit memlock=-1"
    } else if text.contains("/dev/infiniband") {
        "start the container with --device=/dev/infiniband"
    } else {
        "look at the rows above; use \"protocol\": \"tcp\" until it works"
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(reason: &str) -> RdmaError {
        RdmaError::Device {
            device: "mlx5_0".to_owned(),
            reason: reason.to_owned(),
            code: 0,
        }
    }

    #[test]
    fn what_a_device_did_becomes_rows() {
        let good = DeviceCheck {
            summary: "mlx5_0 (GID 3 10.0.0.1)".to_owned(),
            gpu_memory: true,
            registration: Ok(Duration::from_micros(300)),
            loopback: Err(refused("transport retry counter exceeded")),
        };
        let found = of_device("mlx5_0", &Ok(good), true);
        assert_eq!(found[0].value, "1 MiB in 0.3 ms");
        assert_eq!((found[1].cause, found.len()), ("no_loopback", 3));
        assert!(found[1].reason.contains("retry counter"));
        let found = of_device("mlx5_0", &Err(refused("raise memlock")), false);
        assert_eq!(found[0].cause, "device_unusable");
        assert!(found[0].remedy.contains("LimitMEMLOCK"));
    }

    #[test]
    fn a_device_without_a_provider_is_named() {
        let both = ["a".to_owned(), "b".to_owned()];
        assert!(missing(&both, &both, true).cause.is_empty());
        let found = missing(&both, &both[..1], true);
        assert_eq!((found.cause, found.value.as_str()), ("no_provider", "b"));
    }
}
