//! Validates the configuration's values.

use std::path::Path;

use crate::{Config, RateLimit, TimeoutFactor, annotation, digest, host_sockets};

/// A key with an invalid value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidValue {
    /// The key.
    pub key: &'static str,
    /// What is wrong, and which values are valid.
    pub message: String,
}

/// Maximum number of vCPUs that the VMM supports.
const MAX_VCPUS: u8 = 64;
/// Minimum VM memory that the VMM accepts, in MiB.
const MIN_VM_MIB: u64 = 64;
/// Maximum VM memory, in MiB (64 TiB). No x86 host has more memory than that. Sums of sizes up to this maximum cannot
/// overflow.
const MAX_VM_MIB: u64 = 64 << 20;
/// Maximum grace period of a pod's orderly end, in seconds. After the grace period, the shim needs up to 37 s for the
/// pod's end, and the VMM waits 60 s for this end.
pub const MAX_SHUTDOWN_GRACE_SECS: u64 = 20;
/// Maximum length of additional kernel parameters, in bytes. An x86-64 kernel's command line has at most 2048 bytes
/// (COMMAND_LINE_SIZE), and the VMM needs a part of these bytes for its own parameters.
const MAX_PARAMS: usize = 1024;

/// Maximum time for which the guest caches names and attributes of volumes, in ms. The VMM has the same limit.
const MAX_VOLUME_CACHE_MS: u32 = 60_000;
/// Maximum age of templates in hours: a year.
const MAX_TEMPLATE_AGE: u64 = 24 * 365;

impl Config {
    /// Validates all values. Returns the first key that has an invalid value.
    pub fn check(&self) -> Result<(), InvalidValue> {
        check_absolute_path("kernel", &self.kernel)?;
        check_absolute_path("initrd", &self.initrd)?;
        check_digest("kernel_sha256", &self.kernel_sha256)?;
        check_digest("initrd_sha256", &self.initrd_sha256)?;
        check_kernel_params(&self.kernel_params).map_err(|message| InvalidValue { key: "kernel_params", message })?;
        check_range("max_vcpus", self.max_vcpus, 1, MAX_VCPUS)?;
        check_range("default_vcpus", self.default_vcpus, 1, self.max_vcpus)?;
        check_range("spare_vcpus", self.spare_vcpus, 0, MAX_VCPUS - 1)?;
        check_range("memory_overhead_mib", self.memory_overhead_mib, MIN_VM_MIB, MAX_VM_MIB)?;
        check_range("default_memory_mib", self.default_memory_mib, MIN_VM_MIB, MAX_VM_MIB)?;
        check_range("min_memory_mib", self.min_memory_mib, 1, MAX_VM_MIB)?;
        check_range("virtio_fs_workers", self.virtio_fs_workers, 1, 64)?;
        check_range("volume_cache_ms", self.volume_cache_ms, 0, MAX_VOLUME_CACHE_MS)?;
        for (key, limit) in self.rate_limits() {
            limit.check().map_err(|message| InvalidValue { key, message })?;
        }
        for entry in &self.host_sockets {
            host_sockets::check(entry).map_err(|message| InvalidValue { key: "host_sockets", message })?;
        }
        check_range("template_max_age_hours", self.template_max_age_hours, 1, MAX_TEMPLATE_AGE)?;
        check_range("start_timeout_secs", self.start_timeout_secs, 1, 3600)?;
        let (low, high) = TimeoutFactor::RANGE;
        check_range("timeout_factor", self.timeout_factor.0, low, high)?;
        check_range("shutdown_grace_secs", self.shutdown_grace_secs, 1, MAX_SHUTDOWN_GRACE_SECS)?;
        if !self.timeline_log.as_os_str().is_empty() {
            check_absolute_path("timeline_log", &self.timeline_log)?;
        }
        for name in &self.allowed_annotations {
            if !annotation::ALL.contains(&name.as_str()) {
                let message = format!("unknown annotation {name:?}: must be one of {}", annotation::ALL.join(", "));
                return Err(InvalidValue { key: "allowed_annotations", message });
            }
        }
        Ok(())
    }

    fn rate_limits(&self) -> [(&'static str, RateLimit); 5] {
        [
            ("disk_rate_limit", self.disk_rate_limit),
            ("net_receive_rate_limit", self.net_receive_rate_limit),
            ("net_transmit_rate_limit", self.net_transmit_rate_limit),
            ("virtio_fs_rate_limit", self.virtio_fs_rate_limit),
            ("vsock_rate_limit", self.vsock_rate_limit),
        ]
    }
}

/// Validates text that is to be appended to the guest kernel's command line. If the text is invalid, returns the
/// reason.
pub fn check_kernel_params(text: &str) -> Result<(), String> {
    if text.len() > MAX_PARAMS {
        return Err(format!("{} bytes exceed the limit of {MAX_PARAMS}", text.len()));
    }
    match text.chars().find(|&c| !(c == ' ' || c.is_ascii_graphic())) {
        Some(c) => Err(format!("{c:?} is not a printable ASCII character")),
        None => Ok(()),
    }
}

fn check_absolute_path(key: &'static str, path: &Path) -> Result<(), InvalidValue> {
    if path.is_absolute() {
        return Ok(());
    }
    Err(InvalidValue { key, message: format!("{:?} is not an absolute path", path.display().to_string()) })
}

fn check_digest(key: &'static str, text: &str) -> Result<(), InvalidValue> {
    if text.is_empty() || digest::is_sha256(text) {
        return Ok(());
    }
    let message = format!("{text:?} is not a SHA-256 digest: must be 64 lower-case hexadecimal digits, or empty");
    Err(InvalidValue { key, message })
}

fn check_range<T: PartialOrd + std::fmt::Display>(
    key: &'static str,
    value: T,
    low: T,
    high: T,
) -> Result<(), InvalidValue> {
    if value < low || value > high {
        return Err(InvalidValue { key, message: format!("{value} is out of range: must be {low} to {high}") });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(change: impl FnOnce(&mut Config)) -> String {
        let mut config = Config::default();
        change(&mut config);
        let problem = config.check().unwrap_err();
        format!("{}: {}", problem.key, problem.message)
    }

    #[test]
    fn check_names_the_key_with_an_invalid_value() {
        assert_eq!(Config::default().check(), Ok(()));
        assert_eq!(problem(|c| c.kernel = "vmlinux".into()), "kernel: \"vmlinux\" is not an absolute path");
        assert_eq!(problem(|c| c.max_vcpus = 65), "max_vcpus: 65 is out of range: must be 1 to 64");
        assert_eq!(problem(|c| c.default_vcpus = 17), "default_vcpus: 17 is out of range: must be 1 to 16");
        assert_eq!(problem(|c| c.default_vcpus = 0), "default_vcpus: 0 is out of range: must be 1 to 16");
        assert!(
            problem(|c| c.default_memory_mib = 63).starts_with("default_memory_mib: 63 is out of range: must be 64")
        );
        assert!(problem(|c| c.memory_overhead_mib = 1).starts_with("memory_overhead_mib: "));
        assert!(problem(|c| c.min_memory_mib = 0).starts_with("min_memory_mib: "));
        assert!(problem(|c| c.virtio_fs_workers = 0).starts_with("virtio_fs_workers: "));
        let expected = "volume_cache_ms: 60001 is out of range: must be 0 to 60000";
        assert_eq!(problem(|c| c.volume_cache_ms = 60_001), expected);
        assert!(problem(|c| c.start_timeout_secs = 0).starts_with("start_timeout_secs: "));
        for factor in [0, 11] {
            let expected = format!("timeout_factor: {factor} is out of range: must be 1 to 10");
            assert_eq!(problem(|c| c.timeout_factor = TimeoutFactor(factor)), expected);
        }
        for secs in [0, 21] {
            let expected = format!("shutdown_grace_secs: {secs} is out of range: must be 1 to 20");
            assert_eq!(problem(|c| c.shutdown_grace_secs = secs), expected);
        }
        let burst = RateLimit { burst_ops: 1, ..RateLimit::default() };
        assert_eq!(
            problem(|c| c.vsock_rate_limit = burst),
            "vsock_rate_limit: burst_ops has no effect without ops_per_sec: set ops_per_sec, or remove burst_ops"
        );
        assert_eq!(
            problem(|c| c.host_sockets = vec!["/run/a".into(), "run/b".into()]),
            "host_sockets: \"run/b\" is not an absolute path"
        );
        assert!(problem(|c| c.timeline_log = "x".into()).starts_with("timeline_log: "));
        assert_eq!(
            problem(|c| c.kernel_sha256 = "00".into()),
            "kernel_sha256: \"00\" is not a SHA-256 digest: must be 64 lower-case hexadecimal digits, or empty"
        );
        assert!(problem(|c| c.initrd_sha256 = "0F".repeat(32)).starts_with("initrd_sha256: "));
        assert!(problem(|c| c.kernel_params = "a\nb".into()).starts_with("kernel_params: '\\n'"));
        assert!(problem(|c| c.kernel_params = "a".repeat(1025)).starts_with("kernel_params: 1025 bytes"));
        assert!(
            problem(|c| c.allowed_annotations = vec!["io.husk.x".into()]).contains("unknown annotation \"io.husk.x\"")
        );
    }
}
