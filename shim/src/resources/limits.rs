//! Sets the limits of the sandbox's cgroup on the host. The limits depend on the size of the VM.

use std::path::Path;

use crate::oci::cpuset::CpuSet;
use crate::resources::cgroup::CgroupLocation;
use crate::resources::growth::{HostLimits, guest_mib, host_bytes};
use crate::systemd::{Property, Unit, Value};

/// Period of the CPU limit in microseconds.
const PERIOD: u64 = 100_000;
/// Distance in bytes between the limit at which the sandbox is throttled and the limit at which it is killed.
///
/// In addition to the guest's memory, the limit at which the sandbox is killed includes the minimum memory for the VMM
/// and the shim. The distance is a third of this minimum.
const THROTTLE_MARGIN: u64 = 4 << 20;
/// Memory in bytes that a pod may use in addition to the memory of [`host_bytes`], if it has a container without a
/// memory limit. The host's kernel uses about 2 KiB for each file that the VMM has open for the guest, and the VMM can
/// open a million files.
const UNLIMITED_EXTRA: u64 = 2 << 30;
/// A limit of this value or above means that no limit is set. Without a limit, cgroup v1 shows the largest multiple of
/// the page size below 2^63, or a value that is one page lower.
const NO_LIMIT: u64 = 1 << 62;

/// Returns the maximum guest memory, in MiB, that fits into the parent cgroup's memory limit. The kubelet sets this
/// limit for the pod.
///
/// If a guest used more memory than this, the kernel would kill the VMM. The limit can change while the pod runs.
pub fn max_guest_mib(location: &CgroupLocation) -> u64 {
    parent_limit(location, "memory", ["memory.max", "memory.limit_in_bytes"]).map_or(u64::MAX, guest_mib)
}

/// Returns the pod's limit of 2 MiB huge pages in the parent cgroup, in MiB. Returns zero if no limit is set.
///
/// The pod's limit is used, because the kubelet sets a limit for every pod, but containerd by default does not set a
/// limit for containers (`disable_hugetlb_controller`).
pub fn huge_mib(location: &CgroupLocation) -> u64 {
    parent_limit(location, "hugetlb", ["hugetlb.2MB.max", "hugetlb.2MB.limit_in_bytes"]).unwrap_or(0) >> 20
}

/// Reads a limit of the parent cgroup. The array has the name of the limit's file in cgroup v2, then the name in cgroup
/// v1. Returns `None` if no limit is set.
fn parent_limit(location: &CgroupLocation, controller: &str, [v2_file, v1_file]: [&str; 2]) -> Option<u64> {
    let file = if matches!(location, CgroupLocation::V2(_)) { v2_file } else { v1_file };
    let text = std::fs::read_to_string(location.controller_dir(controller)?.parent()?.join(file)).ok()?;
    text.trim().parse::<u64>().ok().filter(|&limit| limit < NO_LIMIT)
}

/// Returns the lowest task limit of the parent cgroups, or `None` if no limit is set. The parent cgroups are the pod's
/// cgroup and its ancestors. The kubelet sets the limit of the pod's cgroup (`podPidsLimit`).
///
/// On the host, the pod's cgroup contains only the few threads of the VMM and the shim, and not the pod's processes.
/// Therefore, the guest enforces the limit.
pub fn pids_max(location: &CgroupLocation) -> Option<u64> {
    let limit = |path: &Path| std::fs::read_to_string(path.join("pids.max")).ok()?.trim().parse().ok();
    location.controller_dir("pids")?.ancestors().skip(1).filter_map(limit).min()
}

/// Returns the number of bytes above which the kernel reclaims memory of the sandbox. Returns `None` if no limit is
/// set.
pub fn reclaim_threshold(location: &CgroupLocation) -> Option<u64> {
    let is_v1 = matches!(location, CgroupLocation::V1(_));
    let file = if is_v1 { "memory.limit_in_bytes" } else { "memory.high" };
    let text = std::fs::read_to_string(location.controller_dir("memory")?.join(file)).ok()?;
    let limit = text.trim().parse().ok().filter(|&limit| limit < NO_LIMIT)?;
    let parent = parent_limit(location, "memory", ["memory.max", "memory.limit_in_bytes"]).filter(|_| is_v1);
    Some(parent.map_or(limit, |parent| limit.min(parent)))
}

/// Sets the limits for a guest that now has `guest_mib` MiB of memory. May block while the kernel reclaims memory for a
/// lower limit.
///
/// The memory limit depends on the memory that the guest has now, not on the memory that the pod may use. Therefore, if
/// the guest's memory runs out, the guest's kernel kills a process in the guest before the host's kernel kills the VMM.
///
/// If the cgroup is a systemd scope, this function first writes the limits itself. Then it sends the same limits to
/// systemd, which writes them again. Therefore, only this process, and not systemd, waits until memory is reclaimed.
pub fn set(location: &CgroupLocation, unit: Option<&Unit>, limits: &HostLimits, guest_mib: u64) {
    let cpu_millis = limits.cpu_millis.map(|millis| round_cpu_millis(unit, millis));
    let cpus = limits.cpus.clone().or_else(|| all_cpus(location));
    let limits = &HostLimits { cpu_millis, cpus, ..limits.clone() };
    write(location, limits, guest_mib);
    if let Some(unit) = unit
        && let Err(error) = unit.set(&properties(location, limits, guest_mib))
    {
        tracing::warn!(error = %crate::chain(&error), "failed to send the limits to systemd; systemd may revert them");
    }
}

/// Rounds a CPU limit up as systemd does, because systemd stores a quota in hundredths of a CPU.
fn round_cpu_millis(unit: Option<&Unit>, millis: u64) -> u64 {
    if unit.is_some() { millis.div_ceil(10).saturating_mul(10) } else { millis }
}

/// If the sandbox's cgroup has a list of CPUs, returns all CPUs of the parent cgroup, to which the list must be reset.
///
/// The kernel does not accept an empty list for a cgroup that has processes (kernel/cgroup/cpuset.c, validate_change:
/// ENOSPC).
fn all_cpus(location: &CgroupLocation) -> Option<CpuSet> {
    let CgroupLocation::V2(path) = location else { return None };
    let read = |path: &Path, file: &str| std::fs::read_to_string(path.join(file)).ok()?.parse().ok();
    read(path, "cpuset.cpus").and_then(|_: CpuSet| read(path.parent()?, "cpuset.cpus.effective"))
}

/// Returns the limits as properties of a scope (org.freedesktop.systemd1(5), systemd.resource-control(5)).
fn properties(location: &CgroupLocation, limits: &HostLimits, guest_mib: u64) -> Vec<Property> {
    let number = |value: Option<u64>| Value::U64(value.unwrap_or(u64::MAX));
    let memory = memory_max(limits, guest_mib);
    let quota = limits.cpu_millis.map(|millis| millis.saturating_mul(1000));
    let mut all = vec![("CPUQuotaPerSecUSec", number(quota))];
    match location {
        CgroupLocation::V2(_) => {
            all.push(("MemoryMax", Value::U64(memory)));
            all.push(("MemoryHigh", Value::U64(memory_high(location, memory))));
            // systemd has this property since version 244. The property is set only if the limits name CPUs.
            all.extend(limits.cpus.as_ref().map(|cpus| ("AllowedCPUs", Value::Bytes(cpus.mask()))));
        }
        // systemd does not have properties for all controllers of cgroup v1.
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
            // Without a list, the cgroup has the CPUs of its parent.
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

/// Returns the memory limit of the sandbox for a guest that has `guest_mib` MiB of memory.
///
/// There is always a limit, because a guest's memory is only a part of what the VMM and the host's kernel need for the
/// pod.
fn memory_max(limits: &HostLimits, guest_mib: u64) -> u64 {
    let extra = if limits.has_memory_limit { 0 } else { UNLIMITED_EXTRA };
    host_bytes(guest_mib).saturating_add(extra)
}

/// Returns the memory limit at which the kernel throttles the sandbox. This limit is lower than the limits at which the
/// kernel kills processes of the sandbox or of the pod. The distance gives the guest time to free memory.
fn memory_high(location: &CgroupLocation, max: u64) -> u64 {
    let parent = parent_limit(location, "memory", ["memory.max", "memory.limit_in_bytes"]);
    parent.map_or(max, |parent| max.min(parent)).saturating_sub(THROTTLE_MARGIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pids_max_returns_the_lowest_limit_of_the_parents() {
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
    fn parent_limits_are_read_in_cgroup_v1_and_v2() {
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
