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

/// Sets the limits for a guest that has so much memory now. Lowering a limit may take a while.
///
/// Memory is limited by what the guest has, not by what the pod may use: a guest at its limit is at an end in its own
/// kernel, which kills one of its processes, and not on the host, which would kill the VMM.
pub fn set(path: &Path, limits: &HostLimits, guest_mib: u64) {
    let memory = if limits.memory { host_bytes(guest_mib).to_string() } else { "max".to_owned() };
    let quota = limits.millis.map(|millis| millis.saturating_mul(PERIOD) / 1000);
    let cpu = quota.map_or("max".to_owned(), |quota| quota.to_string());
    // Without a list it has the processors of the cgroup above.
    let cpus = limits.cpus.as_ref().map(ToString::to_string).unwrap_or_default();
    for (file, value) in [("memory.max", memory), ("cpu.max", format!("{cpu} {PERIOD}")), ("cpuset.cpus", cpus)] {
        if value.is_empty() && !path.join(file).exists() {
            continue;
        }
        if let Err(error) = std::fs::write(path.join(file), &value) {
            tracing::warn!(%error, file, value, "the host's limit is not set");
        }
    }
}
