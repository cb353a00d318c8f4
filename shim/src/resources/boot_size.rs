//! Computes the size with which a pod's VM boots.

use husk_config::{Config, annotation, check};
use husk_proto::annotations;

use crate::oci::spec::{Cpu, Memory, Spec};
use crate::resources::growth::{Growth, Size, cpus_of_shares, page_metadata_mib};

const MIB: u64 = 1 << 20;
/// CFS period in microseconds, for a quota without a period.
const DEFAULT_PERIOD: u64 = 100_000;
/// Minimum memory in MiB that the VMM accepts for a VM.
const MIN_VM_MIB: u64 = 64;

/// Size of a VM at boot, its additional kernel parameters, and the rules for its growth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootSize {
    /// vCPUs at boot, at least 1.
    pub vcpus: u8,
    /// Guest memory at boot in MiB.
    pub memory_mib: u64,
    /// The largest size of a VM that boots with this number of vCPUs. Without annotations, the VM can grow to it.
    pub largest: Size,
    /// Kernel parameters that the pod adds.
    pub kernel_params: String,
    /// Rules by which the VM grows.
    pub growth: Growth,
}

/// Why the boot size cannot be computed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BootSizeError {
    /// The pod's memory limit is below the configured minimum.
    #[error(
        "the memory limit of {limit} bytes is too low: at least {min_mib} MiB are needed (min_memory_mib in the \
         configuration)"
    )]
    MemoryTooLow {
        /// Memory limit of the pod, in bytes.
        limit: u64,
        /// Minimum limit in MiB.
        min_mib: u64,
    },
    /// An annotation has an invalid value.
    #[error("invalid annotation {key}={value:?}: {message}")]
    Annotation {
        /// Key of the annotation.
        key: String,
        /// Value of the annotation.
        value: String,
        /// Reason why the value is invalid.
        message: String,
    },
    /// The operator does not allow pods to use this annotation.
    #[error("annotation {0} is not allowed on this node; add it to allowed_annotations in the configuration")]
    Forbidden(String),
}

/// Computes the boot size of a sandbox's VM from `spec`, the specification of the sandbox's first container.
///
/// `max_guest_mib` is the maximum guest memory, in MiB, that fits into the parent cgroup's memory limit.
///
/// # Errors
/// [`BootSizeError`] if a limit is too low, or an annotation is invalid or not allowed.
pub fn boot_size(spec: &Spec, config: &Config, max_guest_mib: u64) -> Result<BootSize, BootSizeError> {
    let host = Host { cpus: online_cpus(), memory_mib: total_memory_mib(), max_guest_mib };
    size(spec, config, &host)
}

/// Resources of the host. If a pod's limit exceeds these resources, the excess has no effect.
struct Host {
    cpus: u64,
    memory_mib: u64,
    /// Maximum guest memory, in MiB, that fits into the parent cgroup's memory limit.
    max_guest_mib: u64,
}

fn size(spec: &Spec, config: &Config, host: &Host) -> Result<BootSize, BootSizeError> {
    for key in spec.annotations.0.keys().filter(|key| key.starts_with(annotation::PREFIX)) {
        if !config.allowed_annotations.contains(key) {
            return Err(BootSizeError::Forbidden(key.clone()));
        }
    }
    let (cpu, memory) = limits(spec)?;
    let vcpus = match number(spec, annotation::VCPUS, 1, u64::from(config.max_vcpus))? {
        Some(vcpus) => vcpus,
        None => match vcpus(&cpu) {
            Some(limit) => limit.min(host.cpus.max(1)).min(u64::from(config.max_vcpus)),
            // Without a CPU limit, the VM gets a vCPU for each requested CPU, but at least default_vcpus vCPUs.
            None => cpus_of_shares(cpu.shares.unwrap_or(0))
                .max(config.default_vcpus.into())
                .min(host.cpus.max(config.default_vcpus.into()))
                .min(u64::from(config.max_vcpus)),
        },
    };
    let memory_mib = match number(spec, annotation::MEMORY_MIB, MIN_VM_MIB, host.memory_mib.max(MIN_VM_MIB))? {
        Some(mib) => mib,
        None => match memory.limit.and_then(|limit| u64::try_from(limit).ok()).filter(|&limit| limit > 0) {
            Some(limit) if limit / MIB < config.min_memory_mib => {
                return Err(BootSizeError::MemoryTooLow { limit, min_mib: config.min_memory_mib });
            }
            Some(limit) => limited_mib(limit.div_ceil(MIB), config).min(host.memory_mib.max(MIN_VM_MIB)),
            None => config.default_memory_mib,
        },
    };
    let kernel_params = spec.annotations.get(annotation::KERNEL_PARAMS).unwrap_or_default().to_owned();
    check::check_kernel_params(&kernel_params).map_err(|message| BootSizeError::Annotation {
        key: annotation::KERNEL_PARAMS.into(),
        value: kernel_params.clone(),
        message,
    })?;
    let vcpus = u8::try_from(vcpus).unwrap_or(config.max_vcpus);
    let memory_mib = memory_mib.min(host.max_guest_mib).max(MIN_VM_MIB);
    let boot = Size { vcpus, memory_mib };
    // If an annotation sets the vCPUs or the memory, the VM does not grow beyond this value.
    let fixed = |key: &str| spec.annotations.get(key).is_some();
    let host_vcpus = u8::try_from(host.cpus.max(1)).unwrap_or(u8::MAX);
    // At boot, the guest's kernel allocates per-CPU data for every possible vCPU. Therefore, spare_vcpus limits the
    // growth.
    let grown_vcpus = vcpus.saturating_add(config.spare_vcpus).min(host_vcpus).min(config.max_vcpus);
    let largest = Size { vcpus: grown_vcpus, memory_mib: host.memory_mib }.max(boot);
    let max = Size {
        vcpus: if fixed(annotation::VCPUS) { vcpus } else { largest.vcpus },
        memory_mib: if fixed(annotation::MEMORY_MIB) { memory_mib } else { largest.memory_mib },
    };
    Ok(BootSize { vcpus, memory_mib, largest, kernel_params, growth: Growth::new(boot, max, config) })
}

/// Returns the guest memory of a pod whose containers have a limit of `mib` MiB together.
fn limited_mib(mib: u64, config: &Config) -> u64 {
    let mib = mib.saturating_add(config.memory_overhead_mib);
    mib.saturating_add(page_metadata_mib(mib))
}

/// Returns the guest memory, in MiB, of a pod with the lowest memory limit that the configuration allows.
pub fn smallest_limited_mib(config: &Config) -> u64 {
    limited_mib(config.min_memory_mib, config).max(MIN_VM_MIB)
}

/// Returns the limits that determine the VM's size. For a Kubernetes sandbox, the annotations contain the limits. For a
/// container without a pod, the resources contain the limits.
fn limits(spec: &Spec) -> Result<(Cpu, Memory), BootSizeError> {
    if spec.annotations.is_sandbox() {
        let cpu = Cpu {
            quota: parse(spec, annotations::CPU_QUOTA)?,
            period: parse(spec, annotations::CPU_PERIOD)?,
            shares: parse(spec, annotations::CPU_SHARES)?,
            cpus: None,
        };
        return Ok((cpu, Memory { limit: parse(spec, annotations::MEMORY)? }));
    }
    let resources = spec.linux.resources.clone();
    Ok((resources.cpu.unwrap_or_default(), resources.memory.unwrap_or_default()))
}

/// Returns the CPU limit in whole CPUs, rounded up, or `None` if no limit is set.
fn vcpus(cpu: &Cpu) -> Option<u64> {
    let quota = cpu.quota.and_then(|quota| u64::try_from(quota).ok()).filter(|&quota| quota > 0)?;
    let period = cpu.period.filter(|&period| period > 0).unwrap_or(DEFAULT_PERIOD);
    Some(quota.div_ceil(period))
}

fn parse<T: std::str::FromStr>(spec: &Spec, key: &str) -> Result<Option<T>, BootSizeError> {
    let Some(value) = spec.annotations.get(key) else { return Ok(None) };
    value.parse().map(Some).map_err(|_| BootSizeError::Annotation {
        key: key.into(),
        value: value.into(),
        message: "must be a whole number".into(),
    })
}

fn number(spec: &Spec, key: &str, low: u64, high: u64) -> Result<Option<u64>, BootSizeError> {
    match parse::<u64>(spec, key)? {
        Some(number) if number < low || number > high => Err(BootSizeError::Annotation {
            key: key.into(),
            value: number.to_string(),
            message: format!("must be in the range {low} to {high}"),
        }),
        other => Ok(other),
    }
}

fn online_cpus() -> u64 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u64)
}

fn total_memory_mib() -> u64 {
    nix::sys::sysinfo::sysinfo().map_or(u64::MAX, |info| info.ram_total() / MIB)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::oci::bundle::tests::bundle;

    const HOST: Host = Host { cpus: 8, memory_mib: 16 << 10, max_guest_mib: u64::MAX };

    fn sized(change: impl FnOnce(&mut Value)) -> Result<(u8, u64), BootSizeError> {
        let config = Config { allowed_annotations: annotation::ALL.map(String::from).to_vec(), ..Config::default() };
        size(&bundle(change).unwrap().spec, &config, &HOST).map(|s| (s.vcpus, s.memory_mib))
    }

    #[test]
    fn defaults_apply_without_limits() {
        assert_eq!(sized(|_| ()), Ok((1, 1024)));
        let unlimited = json!({ "cpu": { "quota": -1, "period": 0, "shares": 2 }, "memory": { "limit": -1 } });
        assert_eq!(sized(|v| v["linux"]["resources"] = unlimited), Ok((1, 1024)));
    }

    #[test]
    fn size_rounds_limits_up_and_adds_the_memory_overhead() {
        let limit = |quota: i64, period: u64, memory: i64| {
            let resources = json!({ "cpu": { "quota": quota, "period": period }, "memory": { "limit": memory } });
            sized(|v| v["linux"]["resources"] = resources)
        };
        assert_eq!(limit(150_000, 100_000, 256 << 20), Ok((2, 326)));
        assert_eq!(limit(100_000, 0, (256 << 20) + 1), Ok((1, 327)));
        assert_eq!(limit(10_000, 100_000, 8 << 20), Ok((1, 74)));
        assert_eq!(limit(10_000, 100_000, 8 << 30), Ok((1, 8386)));
        // Limits above the host's resources have no effect, and extreme values do not overflow.
        assert_eq!(limit(i64::MAX, 1, i64::MAX), Ok((8, 16 << 10)));
        let error = limit(0, 0, 4 << 20).unwrap_err();
        assert_eq!(error, BootSizeError::MemoryTooLow { limit: 4 << 20, min_mib: 8 });
        assert!(error.to_string().starts_with("the memory limit of 4194304 bytes is too low: at least 8 MiB"));
    }

    #[test]
    fn kubernetes_sandbox_is_sized_by_its_annotations() {
        let pod = json!({
            "io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-cpu-period": "100000",
            "io.kubernetes.cri.sandbox-cpu-quota": "250000", "io.kubernetes.cri.sandbox-memory": "536870912"
        });
        assert_eq!(sized(|v| v["annotations"] = pod.clone()), Ok((3, 586)));
        let config = Config::default();
        let tight = Host { max_guest_mib: 580, ..HOST };
        let sandbox = bundle(|v| v["annotations"] = pod.clone()).unwrap();
        let sized_tight = size(&sandbox.spec, &config, &tight).unwrap();
        assert_eq!((sized_tight.memory_mib, sized_tight.growth.boot.memory_mib), (580, 580));
        let mut none = pod.clone();
        none["io.kubernetes.cri.sandbox-memory"] = "0".into();
        none["io.kubernetes.cri.sandbox-cpu-quota"] = "0".into();
        assert_eq!(sized(|v| v["annotations"] = none), Ok((1, 1024)));
        let mut bad = pod;
        bad["io.kubernetes.cri.sandbox-memory"] = "much".into();
        assert!(matches!(sized(|v| v["annotations"] = bad), Err(BootSizeError::Annotation { .. })));
    }

    #[test]
    fn cpu_request_sets_the_vcpus_only_without_a_cpu_limit() {
        let pod = |quota: &str, shares: &str| {
            let pod = json!({
                "io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-cpu-period": "100000",
                "io.kubernetes.cri.sandbox-cpu-quota": quota, "io.kubernetes.cri.sandbox-cpu-shares": shares,
            });
            sized(|v| v["annotations"] = pod).map(|(vcpus, _)| vcpus)
        };
        assert_eq!(pod("0", "2"), Ok(1));
        assert_eq!(pod("0", "2048"), Ok(2));
        assert_eq!(pod("-1", "2500"), Ok(3));
        assert_eq!(pod("0", "262144"), Ok(8), "the VM has more vCPUs than the host has CPUs");
        assert_eq!(pod("100000", "2048"), Ok(1), "the CPU request takes precedence over the CPU limit");
        assert!(pod("0", "x").is_err());
        let alone = sized(|v| v["linux"]["resources"] = json!({ "cpu": { "shares": 4096 } }));
        assert_eq!(alone, Ok((4, 1024)));
    }

    #[test]
    fn growth_is_limited_by_spare_vcpus_and_by_fixed_sizes() {
        let max = |annotations: Value, spare_vcpus: u8| {
            let config = Config { max_vcpus: 12, spare_vcpus, ..Config::default() };
            let bundle = bundle(|v| v["annotations"] = annotations).unwrap();
            let max = size(&bundle.spec, &config, &HOST).unwrap().growth.max;
            (max.vcpus, max.memory_mib)
        };
        assert_eq!(max(json!({}), 3), (4, 16 << 10));
        assert_eq!(max(json!({}), 0), (1, 16 << 10));
        assert_eq!(max(json!({}), 63), (8, 16 << 10), "the VM can grow to more vCPUs than the host has CPUs");
        assert_eq!(max(json!({ annotation::VCPUS: "3" }), 3), (3, 16 << 10));
        assert_eq!(max(json!({ annotation::MEMORY_MIB: "512" }), 3), (4, 512));
    }

    #[test]
    fn size_annotations_override_the_defaults_and_are_checked() {
        let with = |key: &str, value: &str| sized(|v| v["annotations"] = json!({ key: value }));
        assert_eq!(with(annotation::VCPUS, "16"), Ok((16, 1024)));
        assert_eq!(with(annotation::MEMORY_MIB, "2048"), Ok((1, 2048)));
        for (key, value) in [(annotation::VCPUS, "17"), (annotation::VCPUS, "0"), (annotation::MEMORY_MIB, "63")] {
            assert!(matches!(with(key, value), Err(BootSizeError::Annotation { .. })), "{key}={value}");
        }
        assert!(matches!(with(annotation::KERNEL_PARAMS, "a\nb"), Err(BootSizeError::Annotation { .. })));
        assert!(matches!(with("io.husk.other", "x"), Err(BootSizeError::Forbidden(_))));
    }
}
