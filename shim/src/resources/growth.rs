//! Computes the size that a pod's VM needs when containers are added, removed and updated.

use std::collections::HashMap;

use husk_config::Config;
use serde::Deserialize;

use crate::oci::cpuset::CpuSet;
use crate::oci::spec::{Cpu, Memory, Resources};
use crate::oci::update::HUGE_PAGE;

/// CPU shares that Kubernetes sets for each requested CPU (pkg/kubelet/cm/helpers_linux.go, `MilliCPUToShares`).
const SHARES_PER_CPU: u64 = 1024;
const MIB: u64 = 1 << 20;
/// CFS period in microseconds, for a quota without a period.
const DEFAULT_PERIOD: u64 = 100_000;
/// Host memory in MiB that a pod may use in addition to guest memory and page tables.
///
/// This memory covers the VMM and the shim (5 MiB), buffers and sockets of the host's kernel, and some page cache for
/// files that virtio-fs serves.
const HOST_MIB: u64 = 32;
/// Minimum host memory in MiB that a pod needs in addition to guest memory and page tables. The rest of
/// [`HOST_MIB`] is page cache.
const MIN_HOST_MIB: u64 = 12;
/// Guest memory divided by the size of the host's page tables for this memory. The VMM's page tables take 1/512 of the
/// guest memory in use. KVM's page tables take another 1/512.
const MEMORY_TO_PAGE_TABLES: u64 = 256;
/// CPU time in millicores that the VMM's device threads and the guest's kernel may use in addition to the containers'
/// quota.
const HOST_CPU_MILLIS: u64 = 250;

/// Resource limits of a container. `None` means unlimited.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// CPU quota in millicores.
    pub cpu_millis: Option<u64>,
    /// CPU request as cgroup shares. Used only if the container has neither a quota nor a cpuset.
    pub shares: u64,
    /// Host CPUs on which the container may run.
    pub cpus: Option<CpuSet>,
    /// Memory limit in bytes.
    pub memory: Option<u64>,
    /// Limit for huge pages in bytes. Zero if no limit is set, because a container without this limit requests no huge
    /// pages.
    pub huge_page_bytes: u64,
}

/// Size of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Number of vCPUs that are online.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u64,
}

/// Limits for the pod's processes on the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostLimits {
    /// Whether memory is limited. [`host_bytes`] computes the limit.
    pub has_memory_limit: bool,
    /// CPU quota in millicores.
    pub cpu_millis: Option<u64>,
    /// Host CPUs on which the processes may run.
    pub cpus: Option<CpuSet>,
}

/// Rules by which a pod's VM grows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Growth {
    /// Size at boot.
    pub boot: Size,
    /// Maximum size.
    pub max: Size,
    /// Size that all containers without a limit share.
    default: Size,
    overhead_mib: u64,
}

impl Limits {
    /// Returns the limits of a specification.
    pub fn from_resources(resources: &Resources) -> Self {
        let mut limits = Self::default();
        limits.apply(resources);
        limits
    }

    /// Applies an update request (OCI `LinuxResources` as JSON). A limit that the request does not name keeps its
    /// value.
    ///
    /// # Errors
    /// Fails if the request is not `LinuxResources`.
    pub fn with_update(mut self, raw: &[u8]) -> Result<Self, serde_json::Error> {
        #[derive(Deserialize)]
        struct UpdateRequest(Option<Resources>);
        if let UpdateRequest(Some(resources)) = serde_json::from_slice(raw)? {
            self.apply(&resources);
        }
        Ok(self)
    }

    fn apply(&mut self, resources: &Resources) {
        let Resources { cpu, memory, hugepage_limits } = resources;
        // A quota of 0 and a period without a quota count as unset. A quota of -1 means unlimited.
        if let Some(quota) = cpu.as_ref().and_then(|cpu| cpu.quota).filter(|&quota| quota != 0) {
            self.cpu_millis = millis(quota, cpu.as_ref().and_then(|cpu: &Cpu| cpu.period));
        }
        if let Some(shares) = cpu.as_ref().and_then(|cpu| cpu.shares).filter(|&shares| shares != 0) {
            self.shares = shares;
        }
        if let Some(cpus) = cpu.as_ref().and_then(|cpu| cpu.cpus.clone()) {
            self.cpus = Some(cpus);
        }
        if let Some(limit) = memory.as_ref().and_then(|memory: &Memory| memory.limit).filter(|&limit| limit != 0) {
            self.memory = u64::try_from(limit).ok();
        }
        if let Some(pages) = hugepage_limits.iter().find(|pages| pages.page_size == HUGE_PAGE) {
            self.huge_page_bytes = pages.limit;
        }
    }
}

impl Limits {
    /// Returns the CPU time that the container may use, in millicores. The result is the quota or 1000 millicores for
    /// each CPU of the cpuset, whichever is lower. Returns `None` if the container has neither a quota nor a cpuset.
    fn usable_millis(&self) -> Option<u64> {
        let set = self.cpus.as_ref().map(|cpus| cpus.count().saturating_mul(1000));
        self.cpu_millis.into_iter().chain(set).min()
    }
}

fn millis(quota: i64, period: Option<u64>) -> Option<u64> {
    let period = period.filter(|&period| period > 0).unwrap_or(DEFAULT_PERIOD);
    Some(u64::try_from(quota).ok()?.saturating_mul(1000).div_ceil(period))
}

impl Growth {
    /// Returns the rules for a VM that boots with size `boot` and may grow to size `max`.
    pub fn new(boot: Size, max: Size, config: &Config) -> Self {
        let max = Size { vcpus: max.vcpus.max(boot.vcpus), memory_mib: max.memory_mib.max(boot.memory_mib) };
        let default = Size { vcpus: config.default_vcpus, memory_mib: config.default_memory_mib };
        Self { boot, max, default, overhead_mib: config.memory_overhead_mib }
    }

    /// Returns the VM's size for these containers. If `start` is true, returns at least the boot size, which covers
    /// containers that are created later.
    ///
    /// Adds up the containers' limits. Adds the default size only once, because all containers without a limit share
    /// the default size.
    pub fn size<'a>(&self, containers: impl Iterator<Item = &'a Limits> + Clone, start: bool) -> Size {
        let vcpus = self.vcpus(containers.clone());
        let memory = containers.clone().map(|limits| limits.memory);
        let bytes = memory.clone().flatten().fold(0u64, u64::saturating_add);
        let (unlimited, none) = (memory.clone().any(|limit| limit.is_none()), memory.count() == 0);
        // The default size is the size of a whole VM. Therefore, its memory includes the overhead and the page
        // metadata.
        let free = if unlimited { self.default.memory_mib } else { self.overhead_mib };
        let free = free.saturating_add(page_metadata_mib(self.huge_mib(containers.clone())));
        let memory_mib = match none {
            true => self.boot.memory_mib,
            false => {
                let mib = bytes.div_ceil(MIB).saturating_add(free);
                mib.saturating_add(if unlimited { 0 } else { page_metadata_mib(mib) })
            }
        };
        let min_size = if start { self.boot } else { Size { vcpus: 1, memory_mib: 0 } };
        Size {
            vcpus: vcpus.max(min_size.vcpus).min(self.max.vcpus),
            memory_mib: memory_mib.max(min_size.memory_mib).min(self.max.memory_mib),
        }
    }

    /// Returns the number of vCPUs that these containers may use. The result can exceed the maximum size.
    pub fn vcpus<'a>(&self, containers: impl Iterator<Item = &'a Limits> + Clone) -> u8 {
        if containers.clone().next().is_none() {
            return self.boot.vcpus;
        }
        let millis = containers.clone().filter_map(Limits::usable_millis).fold(0u64, u64::saturating_add);
        let mut unlimited = containers.filter(|limits| limits.usable_millis().is_none()).map(|limits| limits.shares);
        let free = match unlimited.next() {
            // Together, containers without a limit get one vCPU for each requested CPU, but at least the default
            // number of vCPUs.
            Some(first) => {
                let shares = unlimited.fold(first, u64::saturating_add);
                cpus_of_shares(shares).max(u64::from(self.default.vcpus))
            }
            None => 0,
        };
        u8::try_from(millis.div_ceil(1000).saturating_add(free)).unwrap_or(u8::MAX)
    }

    /// Returns the huge pages that these containers may use, in MiB.
    pub fn huge_mib<'a>(&self, containers: impl Iterator<Item = &'a Limits>) -> u64 {
        containers.map(|limits| limits.huge_page_bytes).fold(0, u64::saturating_add).div_ceil(MIB)
    }

    /// Returns the limits that the host applies to the pod's processes. These are computed from the containers' limits.
    /// A resource has a limit only if every container has a limit for the resource.
    pub fn host_limits<'a>(&self, containers: impl Iterator<Item = &'a Limits> + Clone) -> HostLimits {
        let some = containers.clone().next().is_some();
        let all = containers
            .clone()
            .map(|limits| limits.cpu_millis)
            .try_fold(0u64, |sum, one| Some(sum.saturating_add(one?)));
        let mut sets = containers.clone().map(|limits| limits.cpus.clone());
        let first = sets.next().flatten();
        HostLimits {
            has_memory_limit: some && containers.clone().all(|limits| limits.memory.is_some()),
            cpus: first.and_then(|first| sets.try_fold(first, |all, one| Some(all.union(&one?)))),
            cpu_millis: all.filter(|_| some).map(|millis| millis.saturating_add(HOST_CPU_MILLIS)),
        }
    }
}

impl Size {
    /// Returns the larger number of vCPUs and the larger memory.
    pub fn max(self, other: Self) -> Self {
        Self { vcpus: self.vcpus.max(other.vcpus), memory_mib: self.memory_mib.max(other.memory_mib) }
    }
}

/// Returns the size, in MiB, of the page metadata (`struct page` array) for `mib` MiB of guest memory.
///
/// The guest's kernel needs 64 bytes for each page, and allocates the metadata for blocks of 128 MiB.
pub fn page_metadata_mib(mib: u64) -> u64 {
    mib.div_ceil(128).saturating_mul(2)
}

/// Returns the memory limit in bytes that the host applies to a pod whose guest has `guest_mib` MiB of memory.
///
/// The limit covers all memory that the guest can use. Therefore, the guest's memory use never makes the host's kernel
/// kill the VMM.
pub fn host_bytes(guest_mib: u64) -> u64 {
    guest_mib.saturating_add(guest_mib / MEMORY_TO_PAGE_TABLES).saturating_add(HOST_MIB).saturating_mul(MIB)
}

/// Returns the maximum guest memory, in MiB, for a host limit of `bytes`. The limit must also cover page tables, the
/// VMM and the shim.
pub fn guest_mib(bytes: u64) -> u64 {
    (bytes / MIB).saturating_sub(MIN_HOST_MIB).saturating_mul(MEMORY_TO_PAGE_TABLES) / (MEMORY_TO_PAGE_TABLES + 1)
}

/// Resource limits of a pod's containers, by container id.
pub type PodLimits = HashMap<String, Limits>;

/// Returns the number of CPUs for a request of `shares`, rounded up.
pub fn cpus_of_shares(shares: u64) -> u64 {
    shares.div_ceil(SHARES_PER_CPU)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn growth() -> Growth {
        let config =
            Config { default_vcpus: 1, default_memory_mib: 1024, memory_overhead_mib: 64, ..Config::default() };
        let (boot, max) = (Size { vcpus: 1, memory_mib: 264 }, Size { vcpus: 8, memory_mib: 8192 });
        Growth::new(boot, max, &config)
    }

    fn limits(millis: impl Into<Option<u64>>, mib: impl Into<Option<u64>>) -> Limits {
        Limits { cpu_millis: millis.into(), memory: mib.into().map(|mib| mib << 20), ..Limits::default() }
    }

    fn size(containers: &[Limits], start: bool) -> (u8, u64) {
        let size = growth().size(containers.iter(), start);
        (size.vcpus, size.memory_mib)
    }

    #[test]
    fn size_adds_up_limits_and_adds_the_default_size_once() {
        assert_eq!(size(&[], true), (1, 264));
        assert_eq!(size(&[], false), (1, 264));
        assert_eq!(size(&[limits(500, 100)], true), (1, 264));
        assert_eq!(size(&[limits(500, 100)], false), (1, 164 + 4));
        assert_eq!(size(&[limits(500, 100), limits(1000, 300)], true), (2, 464 + 8));
        assert_eq!(size(&[limits(500, 100), limits(None, None), limits(None, None)], true), (2, 1124));
        assert_eq!(size(&[limits(u64::MAX, None), limits(1, 8 << 10)], true), (8, 8192));
        assert_eq!(size(&[limits(0, 0)], false), (1, 64 + 2));
    }

    #[test]
    fn cpu_shares_count_only_without_a_quota() {
        let asks = |shares: u64, millis: Option<u64>| Limits { shares, ..limits(millis, 1) };
        let vcpus = |containers: &[Limits]| growth().vcpus(containers.iter());
        assert_eq!(vcpus(&[asks(2, None), asks(2, None)]), 1);
        assert_eq!(vcpus(&[asks(1536, None), asks(1024, None)]), 3);
        assert_eq!(vcpus(&[asks(1536, None), asks(8192, Some(1000))]), 3);
        assert_eq!(vcpus(&[asks(u64::MAX, None), asks(1024, None)]), u8::MAX);
    }

    #[test]
    fn host_limits_apply_only_if_every_container_has_a_limit() {
        let host = |containers: &[Limits]| growth().host_limits(containers.iter());
        assert_eq!(host(&[]), HostLimits::default());
        assert_eq!(
            host(&[limits(500, 1), limits(1000, 1)]),
            HostLimits { has_memory_limit: true, cpu_millis: Some(1750), cpus: None }
        );
        assert_eq!(host(&[limits(500, None), limits(None, 1)]), HostLimits::default());
        assert_eq!(host_bytes(256), (256 + 1 + 32) << 20);
        assert_eq!(host_bytes(u64::MAX), u64::MAX);
        // The example RuntimeClass has an overhead of 80 MiB. The guest gets 64 MiB of this overhead.
        assert!((320..=324).contains(&guest_mib((256 + 80) << 20)));
        assert_eq!(guest_mib(1), 0);
        assert!(guest_mib(u64::MAX) > 1 << 30);
    }

    #[test]
    fn cpusets_limit_the_vcpus_and_host_limits_contain_the_union_of_cpusets() {
        let on = |cpus: &str, millis| Limits {
            cpu_millis: millis,
            cpus: Some(cpus.parse().unwrap()),
            memory: Some(1),
            ..Limits::default()
        };
        assert_eq!(size(&[on("0-3", None)], true).0, 4);
        assert_eq!(size(&[on("0-3", Some(1500))], true).0, 2);
        assert_eq!(size(&[on("2", Some(1500)), on("2", None)], true).0, 2);
        let host = |containers: &[Limits]| growth().host_limits(containers.iter()).cpus.map(|set| set.to_string());
        assert_eq!(host(&[on("0-3", None), on("6", None)]).as_deref(), Some("0-3,6"));
        assert_eq!(host(&[on("0-3", None), limits(1000, 1)]), None);
        assert_eq!(host(&[limits(1000, 1), on("0-3", None)]), None);
    }

    #[test]
    fn huge_pages_add_up_with_their_page_metadata() {
        let huge = |mib: u64| Limits { huge_page_bytes: mib << 20, ..limits(1, 100) };
        let growth = growth();
        assert_eq!(growth.huge_mib([huge(6), huge(2), limits(1, 1)].iter()), 8);
        assert_eq!(size(&[huge(8)], false).1, 164 + 2 + 4);
        assert_eq!(size(&[huge(1024)], false).1, 164 + 16 + 4);
        let update =
            json!({"hugepageLimits": [{"pageSize": "1GB", "limit": 0}, {"pageSize": "2MB", "limit": 4 << 20}]});
        assert_eq!(limits(1, 100).with_update(update.to_string().as_bytes()).unwrap(), huge(4));
    }

    #[test]
    fn update_changes_only_limits_in_the_request() {
        let update = |before: Limits, raw: Value| before.with_update(raw.to_string().as_bytes()).unwrap();
        let before = limits(1000, 100);
        let update = |limits: &Limits, raw: Value| update(limits.clone(), raw);
        assert_eq!(update(&before, json!({})), before);
        assert_eq!(update(&before, Value::Null), before);
        let more = Limits { shares: 7, ..before.clone() };
        assert_eq!(update(&before, json!({"cpu": {"shares": 7, "quota": 0}, "memory": {}})), more);
        assert_eq!(update(&before, json!({"cpu": {"quota": 50_000, "period": 100_000}})), limits(500, 100));
        assert_eq!(update(&before, json!({"cpu": {"quota": -1}, "memory": {"limit": -1}})), limits(None, None));
        assert_eq!(update(&before, json!({"memory": {"limit": 209_715_200}})), limits(1000, 200));
        let on = |cpus: &str| Limits { cpus: Some(cpus.parse().unwrap()), ..before.clone() };
        assert_eq!(update(&before, json!({"cpu": {"cpus": "1-2"}})), on("1-2"));
        assert_eq!(update(&on("1-2"), json!({"cpu": {"cpus": ""}})), on("1-2"));
        assert!(before.clone().with_update(br#"{"cpu": {"cpus": "x"}}"#).is_err());
        assert!(before.clone().with_update(b"[1").is_err());
    }
}
