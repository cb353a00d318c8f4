//! The limits of the sandbox's cgroup on the host, which follow the size of its virtual machine.

use std::path::Path;

use crate::bundle::growth::{HostLimits, guest_mib, host_bytes};

/// Period of the CPU limit in microseconds.
const PERIOD: u64 = 100_000;

/// The most memory, in MiB, that the guest may have within the cgroup above: kubelet's for the pod, whose limit changes
/// with the pod. A guest with more would have its VMM killed for using it.
pub fn room(path: &Path) -> u64 {
    let limit = path.parent().and_then(|parent| std::fs::read_to_string(parent.join("memory.max")).ok());
    match limit.and_then(|text| text.trim().parse::<u64>().ok()) {
        Some(bytes) => guest_mib(bytes),
        None => u64::MAX,
    }
}

/// The most tasks that there may be in the cgroups above: the pod's, by the kubelet's `podPidsLimit`, and those above it.
/// None where there is no limit. On the host it holds for the VMM's threads, which are few, and for no process of the pod's.
pub fn pids(path: &Path) -> Option<u64> {
    let limit = |path: &Path| std::fs::read_to_string(path.join("pids.max")).ok()?.trim().parse().ok();
    path.ancestors().skip(1).filter_map(limit).min()
}

/// Sets the limits for a guest that has so much memory now. Lowering a limit may take a while.
///
/// Memory is limited by what the guest has, not by what the pod may use: a guest at its limit is at an end in its own
/// kernel, which kills one of its processes, and not on the host, which would kill the VMM.
pub fn set(path: &Path, limits: &HostLimits, guest_mib: u64) {
    let memory = if limits.memory { host_bytes(guest_mib).to_string() } else { "max".to_owned() };
    let quota = limits.millis.map(|millis| millis.saturating_mul(PERIOD) / 1000);
    let cpu = quota.map_or("max".to_owned(), |quota| quota.to_string());
    // Without a list it has the processors of the cgroup above. A line of nothing is one, nothing at all is no write.
    let cpus = limits.cpus.as_ref().map_or("\n".to_owned(), ToString::to_string);
    for (file, value) in [("memory.max", memory), ("cpu.max", format!("{cpu} {PERIOD}")), ("cpuset.cpus", cpus)] {
        if limits.cpus.is_none() && file == "cpuset.cpus" && !path.join(file).exists() {
            continue;
        }
        if let Err(error) = std::fs::write(path.join(file), &value) {
            tracing::warn!(%error, file, value, "the host's limit is not set");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_narrowest_limit_of_tasks_above_counts() {
        let dir = tempfile::tempdir().unwrap();
        let sandbox = dir.path().join("kubepods/pod/sandbox");
        std::fs::create_dir_all(&sandbox).unwrap();
        let limit = |name: &str, text: &str| std::fs::write(dir.path().join(name).join("pids.max"), text).unwrap();
        limit("kubepods/pod/sandbox", "7\n");
        assert_eq!(pids(&sandbox), None);
        limit("kubepods/pod", "max\n");
        limit("kubepods", "5000\n");
        assert_eq!(pids(&sandbox), Some(5000));
        limit("kubepods/pod", "100\n");
        assert_eq!(pids(&sandbox), Some(100));
    }

    #[test]
    fn a_set_of_processors_comes_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        let cpus = || std::fs::read_to_string(dir.path().join("cpuset.cpus")).ok();
        set(dir.path(), &HostLimits::default(), 100);
        assert_eq!(cpus(), None);
        set(dir.path(), &HostLimits { cpus: Some("1-3".parse().unwrap()), ..HostLimits::default() }, 100);
        assert_eq!(cpus().as_deref(), Some("1-3"));
        // Without the line break nothing would be written, and the kernel keep the set.
        set(dir.path(), &HostLimits::default(), 100);
        assert_eq!(cpus().as_deref(), Some("\n"));
    }
}
