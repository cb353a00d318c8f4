//! Sets the limits of the sandbox's cgroup on the host. Reads the limits that the kubelet sets in the parent cgroups.

use std::path::Path;

use crate::oci::cpuset::CpuSet;
use crate::resources::cgroup::CgroupLocation;
use crate::resources::growth::{HostLimits, guest_mib, host_bytes};
use crate::systemd::{Property, Unit, Value};

/// Period of the CPU limit in microseconds.
const PERIOD: u64 = 100_000;
/// Distance in bytes between `memory.high` and the limit at which the kernel kills the VMM.
///
/// Above `memory.high`, the kernel only throttles the sandbox. The memory limit includes at least 12 MiB for the VMM
/// and the shim. The distance is a third of these 12 MiB.
const THROTTLE_MARGIN: u64 = 4 << 20;
/// Memory in bytes by which the memory limit is higher if a container has no memory limit. The host's kernel uses about
/// 2 KiB for each file that the VMM has open for the guest, and the VMM can open a million files.
const UNLIMITED_EXTRA: u64 = 2 << 30;
/// Limits of at least this value count as no limit. If no limit is set, cgroup v1 shows a value slightly below 2^63.
const NO_LIMIT: u64 = 1 << 62;

/// Returns the maximum guest memory, in MiB, that fits into the parent cgroup's memory limit. Returns `u64::MAX` if no
/// limit is set.
///
/// The kubelet sets the parent cgroup's limit for the pod, and can change the limit while the pod runs. If the guest
/// used more memory than this maximum, the host's kernel would kill the VMM.
pub fn max_guest_mib(location: &CgroupLocation) -> u64 {
    parent_limit(location, "memory", ["memory.max", "memory.limit_in_bytes"]).map_or(u64::MAX, guest_mib)
}

/// Returns the parent cgroup's limit for 2 MiB huge pages, in MiB, or 0 if no limit is set.
///
/// This function ignores the containers' limits, because containerd does not set huge page limits for containers by
/// default (`disable_hugetlb_controller`). The kubelet sets the parent cgroup's limit for every pod.
pub fn huge_mib(location: &CgroupLocation) -> u64 {
    parent_limit(location, "hugetlb", ["hugetlb.2MB.max", "hugetlb.2MB.limit_in_bytes"]).unwrap_or(0) >> 20
}

/// Reads a limit of the parent cgroup from `v2_file` (cgroup v2) or `v1_file` (cgroup v1). Returns `None` if no limit
/// is set.
fn parent_limit(location: &CgroupLocation, controller: &str, [v2_file, v1_file]: [&str; 2]) -> Option<u64> {
    let file = if matches!(location, CgroupLocation::V2(_)) { v2_file } else { v1_file };
    let text = std::fs::read_to_string(location.controller_dir(controller)?.parent()?.join(file)).ok()?;
    text.trim().parse::<u64>().ok().filter(|&limit| limit < NO_LIMIT)
}

/// Returns the lowest `pids.max` of the pod's cgroup and its ancestors, or `None` if no limit is set. The kubelet sets
/// `pids.max` of the pod's cgroup (`podPidsLimit`).
///
/// The guest must enforce this limit, because the host's kernel does not see the processes in the guest.
pub fn pids_max(location: &CgroupLocation) -> Option<u64> {
    let limit = |path: &Path| std::fs::read_to_string(path.join("pids.max")).ok()?.trim().parse().ok();
    location.controller_dir("pids")?.ancestors().skip(1).filter_map(limit).min()
}

/// Returns the memory usage, in bytes, above which the kernel reclaims the sandbox's memory. Returns `None` if no limit
/// is set.
pub fn reclaim_threshold(location: &CgroupLocation) -> Option<u64> {
    let is_v1 = matches!(location, CgroupLocation::V1(_));
    let file = if is_v1 { "memory.limit_in_bytes" } else { "memory.high" };
    let text = std::fs::read_to_string(location.controller_dir("memory")?.join(file)).ok()?;
    let limit = text.trim().parse().ok().filter(|&limit| limit < NO_LIMIT)?;
    let parent = parent_limit(location, "memory", ["memory.max", "memory.limit_in_bytes"]).filter(|_| is_v1);
    Some(parent.map_or(limit, |parent| limit.min(parent)))
}

/// Sets `limits` in the sandbox's cgroup. The memory limit allows a guest with `guest_mib` MiB of memory. If the memory
/// limit is lowered, blocks while the kernel reclaims memory.
///
/// The memory limit depends on the guest's current memory, not on the pod's maximum memory. Therefore, the guest runs
/// out of memory before the sandbox reaches the memory limit. The guest's kernel then kills a process in the guest, and
/// the host's kernel does not kill the VMM.
///
/// This function first writes the limits to the cgroup's files, and may block during this write. If the cgroup is a
/// systemd scope, this function then sends the same limits to systemd. systemd does not block, because the kernel has
/// already reclaimed the memory.
pub fn set(location: &CgroupLocation, unit: Option<&Unit>, limits: &HostLimits, guest_mib: u64) {
    let cpu_millis = limits.cpu_millis.map(|millis| round_cpu_millis(unit, millis));
    let cpus = limits.cpus.clone().or_else(|| all_cpus(location));
    let limits = &HostLimits { cpu_millis, cpus, ..limits.clone() };
    write(location, limits, guest_mib);
    if let Some(unit) = unit
        && let Err(error) = unit.set(&properties(location, limits, guest_mib))
    {
        tracing::warn!(error = %crate::chain(&error), "failed to send the sandbox's limits to systemd");
    }
}

/// If systemd manages the cgroup, rounds a CPU limit up to hundredths of a CPU, as systemd does.
fn round_cpu_millis(unit: Option<&Unit>, millis: u64) -> u64 {
    if unit.is_some() { millis.div_ceil(10).saturating_mul(10) } else { millis }
}

/// Returns the parent cgroup's CPUs. If the new limits have no list of CPUs, the sandbox gets the parent cgroup's CPUs.
/// Returns `None` in cgroup v1, or if the sandbox's cgroup has no list of CPUs.
///
/// The sandbox's list cannot be reset to an empty list. The kernel rejects an empty list with ENOSPC if the cgroup has
/// processes (kernel/cgroup/cpuset.c, validate_change).
fn all_cpus(location: &CgroupLocation) -> Option<CpuSet> {
    let CgroupLocation::V2(path) = location else { return None };
    let read = |path: &Path, file: &str| std::fs::read_to_string(path.join(file)).ok()?.parse().ok();
    read(path, "cpuset.cpus").and_then(|_: CpuSet| read(path.parent()?, "cpuset.cpus.effective"))
}

/// Converts the limits to properties of a systemd scope (org.freedesktop.systemd1(5), systemd.resource-control(5)).
fn properties(location: &CgroupLocation, limits: &HostLimits, guest_mib: u64) -> Vec<Property> {
    let number = |value: Option<u64>| Value::U64(value.unwrap_or(u64::MAX));
    let memory = memory_max(limits, guest_mib);
    let quota = limits.cpu_millis.map(|millis| millis.saturating_mul(1000));
    let mut all = vec![("CPUQuotaPerSecUSec", number(quota))];
    match location {
        CgroupLocation::V2(_) => {
            all.push(("MemoryMax", Value::U64(memory)));
            all.push(("MemoryHigh", Value::U64(memory_high(location, memory))));
            // systemd supports `AllowedCPUs` since version 244.
            all.extend(limits.cpus.as_ref().map(|cpus| ("AllowedCPUs", Value::Bytes(cpus.mask()))));
        }
        // systemd does not support cpusets in cgroup v1.
        CgroupLocation::V1(_) => all.push(("MemoryLimit", Value::U64(memory))),
    }
    all
}

fn write(location: &CgroupLocation, limits: &HostLimits, guest_mib: u64) {
    let memory = memory_max(limits, guest_mib);
    let quota = limits.cpu_millis.map(|millis| (millis.saturating_mul(PERIOD) / 1000).to_string());
    let cpus = limits.cpus.as_ref().map(ToString::to_string);
    let write = |dir: Option<&Path>, file: &str, value: &str| {
        let Some(dir) = dir else { return };
        if let Err(error) = std::fs::write(dir.join(file), value) {
            tracing::warn!(%error, file, value, "failed to set a limit of the sandbox's cgroup");
        }
    };
    let cpuset = location.controller_dir("cpuset");
    match location {
        CgroupLocation::V2(path) => {
            write(Some(path), "memory.max", &memory.to_string());
            write(Some(path), "memory.high", &memory_high(location, memory).to_string());
            write(Some(path), "cpu.max", &format!("{} {PERIOD}", quota.as_deref().unwrap_or("max")));
            // A cgroup without a list of CPUs can use all CPUs of its parent.
            if let Some(cpus) = cpus {
                write(cpuset, "cpuset.cpus", &cpus);
            }
        }
        CgroupLocation::V1(_) => {
            write(location.controller_dir("memory"), "memory.limit_in_bytes", &memory.to_string());
            write(location.controller_dir("cpu"), "cpu.cfs_period_us", &PERIOD.to_string());
            write(location.controller_dir("cpu"), "cpu.cfs_quota_us", quota.as_deref().unwrap_or("-1"));
            let all = || std::fs::read_to_string(cpuset?.parent()?.join("cpuset.cpus")).ok();
            if let Some(cpus) = cpus.or_else(all) {
                write(cpuset, "cpuset.cpus", &cpus);
            }
        }
    }
}

/// Returns the sandbox's memory limit in bytes. `guest_mib` is the guest's memory in MiB.
///
/// The sandbox has a limit even if its containers have none, because the VMM and the host's kernel need memory for the
/// pod in addition to the guest's memory.
fn memory_max(limits: &HostLimits, guest_mib: u64) -> u64 {
    let extra = if limits.has_memory_limit { 0 } else { UNLIMITED_EXTRA };
    host_bytes(guest_mib).saturating_add(extra)
}

/// Returns the value of `memory.high`, above which the kernel throttles the sandbox. The value is below `max` and below
/// the parent cgroup's limit. Therefore, the guest has time to free memory before the kernel kills the VMM.
fn memory_high(location: &CgroupLocation, max: u64) -> u64 {
    let parent = parent_limit(location, "memory", ["memory.max", "memory.limit_in_bytes"]);
    parent.map_or(max, |parent| max.min(parent)).saturating_sub(THROTTLE_MARGIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pids_max_returns_the_lowest_limit_of_the_ancestors() {
        let dir = tempfile::tempdir().unwrap();
        let sandbox = dir.path().join("kubepods/pod/sandbox");
        std::fs::create_dir_all(&sandbox).unwrap();
        let limit = |name: &str, text: &str| std::fs::write(dir.path().join(name).join("pids.max"), text).unwrap();
        limit("kubepods/pod/sandbox", "7\n");
        assert_eq!(pids_max(&CgroupLocation::V2(sandbox.clone())), None);
        limit("kubepods/pod", "max\n");
        limit("kubepods", "5000\n");
        assert_eq!(pids_max(&CgroupLocation::V2(sandbox.clone())), Some(5000));
        limit("kubepods/pod", "100\n");
        assert_eq!(pids_max(&CgroupLocation::V2(sandbox.clone())), Some(100));
    }

    #[test]
    fn memory_has_a_limit_on_the_host_even_if_the_containers_have_none() {
        let dir = tempfile::tempdir().unwrap();
        let pod = dir.path().join("pod");
        std::fs::create_dir(&pod).unwrap();
        let location = CgroupLocation::V2(pod.clone());
        let read = |file: &str| std::fs::read_to_string(pod.join(file)).unwrap().parse::<u64>().unwrap();
        for (has_memory_limit, extra) in [(false, 2 << 30), (true, 0)] {
            set(&location, None, &HostLimits { has_memory_limit, ..HostLimits::default() }, 1024);
            assert_eq!(read("memory.max"), host_bytes(1024) + extra);
            assert_eq!(read("memory.high"), host_bytes(1024) + extra - THROTTLE_MARGIN);
        }
    }

    #[test]
    fn set_writes_and_resets_the_cpuset() {
        let dir = tempfile::tempdir().unwrap();
        let pod = dir.path().join("pod");
        std::fs::create_dir(&pod).unwrap();
        let location = CgroupLocation::V2(pod.clone());
        let cpus = || std::fs::read_to_string(pod.join("cpuset.cpus")).ok();
        std::fs::write(dir.path().join("cpuset.cpus.effective"), "0-7\n").unwrap();
        set(&location, None, &HostLimits::default(), 100);
        assert_eq!(cpus(), None);
        // A cgroup whose list of CPUs was never set shows an empty list.
        std::fs::write(pod.join("cpuset.cpus"), "\n").unwrap();
        set(&location, None, &HostLimits::default(), 100);
        assert_eq!(cpus().as_deref(), Some("\n"));
        set(&location, None, &HostLimits { cpus: Some("1-3".parse().unwrap()), ..HostLimits::default() }, 100);
        assert_eq!(cpus().as_deref(), Some("1-3"));
        set(&location, None, &HostLimits::default(), 100);
        assert_eq!(cpus().as_deref(), Some("0-7"));
    }

    #[test]
    fn max_guest_mib_reads_the_parent_limit_in_cgroup_v1_and_v2() {
        let dir = tempfile::tempdir().unwrap();
        let pod = dir.path().join("pod");
        let v1 = CgroupLocation::V1(vec![(vec!["memory".to_owned()], pod.clone())]);
        std::fs::write(dir.path().join("memory.max"), "max\n").unwrap();
        std::fs::write(dir.path().join("memory.limit_in_bytes"), "9223372036854771712\n").unwrap();
        assert_eq!((max_guest_mib(&CgroupLocation::V2(pod.clone())), max_guest_mib(&v1)), (u64::MAX, u64::MAX));
        std::fs::write(dir.path().join("memory.max"), "1073741824\n").unwrap();
        std::fs::write(dir.path().join("memory.limit_in_bytes"), "536870912\n").unwrap();
        assert_eq!(
            (max_guest_mib(&CgroupLocation::V2(pod)), max_guest_mib(&v1)),
            (guest_mib(1 << 30), guest_mib(512 << 20))
        );
        assert_eq!(huge_mib(&v1), 0);
    }

    #[test]
    fn set_writes_cgroup_v1_files() {
        let dir = tempfile::tempdir().unwrap();
        let names = ["cpu", "cpuset", "memory"].map(str::to_owned).to_vec();
        let (pod, location) = (dir.path().join("pod"), CgroupLocation::V1(vec![(names, dir.path().join("pod"))]));
        std::fs::create_dir(&pod).unwrap();
        std::fs::write(dir.path().join("cpuset.cpus"), "0-7").unwrap();
        let read = |file: &str| std::fs::read_to_string(pod.join(file)).unwrap();
        set(
            &location,
            None,
            &HostLimits { has_memory_limit: true, cpu_millis: Some(1500), cpus: Some("1-3".parse().unwrap()) },
            100,
        );
        assert_eq!([read("cpu.cfs_quota_us"), read("cpuset.cpus")], ["150000", "1-3"]);
        assert_eq!(read("memory.limit_in_bytes"), host_bytes(100).to_string());
        set(&location, None, &HostLimits::default(), 100);
        assert_eq!([read("cpu.cfs_quota_us"), read("cpuset.cpus")], ["-1", "0-7"]);
        assert_eq!(read("memory.limit_in_bytes"), (host_bytes(100) + UNLIMITED_EXTRA).to_string());
    }

    #[test]
    fn properties_match_the_written_limits() {
        let dir = tempfile::tempdir().unwrap();
        let pod = dir.path().join("pod");
        std::fs::create_dir(&pod).unwrap();
        std::fs::write(dir.path().join("memory.max"), (100u64 << 20).to_string()).unwrap();
        let (location, unit) = (CgroupLocation::V2(pod.clone()), Unit::new("a.scope"));
        let limits =
            HostLimits { has_memory_limit: true, cpu_millis: Some(1505), cpus: Some("1-3,9".parse().unwrap()) };
        assert_eq!((round_cpu_millis(Some(&unit), 1505), round_cpu_millis(None, 1505)), (1510, 1505));
        let expected = vec![
            ("CPUQuotaPerSecUSec", Value::U64(1_505_000)),
            ("MemoryMax", Value::U64(host_bytes(128))),
            ("MemoryHigh", Value::U64(96 << 20)),
            ("AllowedCPUs", Value::Bytes(vec![0b1110, 0b10])),
        ];
        assert_eq!(properties(&location, &limits, 128), expected);
        let expected = vec![
            ("CPUQuotaPerSecUSec", Value::U64(u64::MAX)),
            ("MemoryMax", Value::U64(host_bytes(128) + UNLIMITED_EXTRA)),
            ("MemoryHigh", Value::U64(96 << 20)),
        ];
        assert_eq!(properties(&location, &HostLimits::default(), 128), expected);
        let v1 = properties(&CgroupLocation::V1(Vec::new()), &limits, 128);
        assert_eq!(v1.last(), Some(&("MemoryLimit", Value::U64(host_bytes(128)))));
    }
}
