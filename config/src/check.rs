//! Whether the configuration's values can be.

use crate::{Config, annotation};
use std::path::Path;

/// A key whose value cannot be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The key.
    pub key: &'static str,
    /// What is wrong and what would be right.
    pub message: String,
}

/// The most vCPUs the VMM can give a virtual machine.
const MAX_VCPUS: u8 = 64;
/// The least memory, in MiB, that the VMM accepts for a virtual machine.
const MIN_VM_MIB: u64 = 64;
/// More than any x86 host has, and far from overflow: 64 TiB in MiB.
const MAX_VM_MIB: u64 = 64 << 20;
/// The longest command line an x86-64 kernel takes is 2048 bytes, and the VMM needs some of it.
const MAX_PARAMS: usize = 1024;

impl Config {
    /// Checks every value.
    ///
    /// # Errors
    /// The first key whose value cannot be.
    pub fn check(&self) -> Result<(), Problem> {
        absolute("kernel", &self.kernel)?;
        absolute("initrd", &self.initrd)?;
        params(&self.kernel_params).map_err(|message| Problem { key: "kernel_params", message })?;
        range("max_vcpus", self.max_vcpus, 1, MAX_VCPUS)?;
        range("default_vcpus", self.default_vcpus, 1, self.max_vcpus)?;
        range("spare_vcpus", self.spare_vcpus, 0, MAX_VCPUS - 1)?;
        range("memory_overhead_mib", self.memory_overhead_mib, MIN_VM_MIB, MAX_VM_MIB)?;
        range("default_memory_mib", self.default_memory_mib, MIN_VM_MIB, MAX_VM_MIB)?;
        range("min_memory_mib", self.min_memory_mib, 1, MAX_VM_MIB)?;
        range("virtio_fs_workers", self.virtio_fs_workers, 1, 64)?;
        range("start_timeout_secs", self.start_timeout_secs, 1, 3600)?;
        if !self.timeline_log.as_os_str().is_empty() {
            absolute("timeline_log", &self.timeline_log)?;
        }
        for name in &self.allowed_annotations {
            if !annotation::ALL.contains(&name.as_str()) {
                let message = format!("{name:?} is none of {}", annotation::ALL.join(", "));
                return Err(Problem { key: "allowed_annotations", message });
            }
        }
        Ok(())
    }
}

/// Checks text to be appended to the guest kernel's parameters.
///
/// # Errors
/// Says why the kernel could not take it.
pub fn params(text: &str) -> Result<(), String> {
    if text.len() > MAX_PARAMS {
        return Err(format!("{} bytes are too many, at most {MAX_PARAMS}", text.len()));
    }
    match text.chars().find(|&c| !(c == ' ' || c.is_ascii_graphic())) {
        Some(c) => Err(format!("{c:?} cannot be in kernel parameters: printable ASCII only")),
        None => Ok(()),
    }
}

fn absolute(key: &'static str, path: &Path) -> Result<(), Problem> {
    if path.is_absolute() {
        return Ok(());
    }
    Err(Problem { key, message: format!("{:?} is not an absolute path", path.display().to_string()) })
}

fn range<T: PartialOrd + std::fmt::Display>(key: &'static str, value: T, low: T, high: T) -> Result<(), Problem> {
    if value < low || value > high {
        return Err(Problem { key, message: format!("{value} is not in {low} to {high}") });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(change: impl FnOnce(&mut Config)) -> String {
        let mut config = Config::default();
        change(&mut config);
        let problem = config.check().unwrap_err();
        format!("{}: {}", problem.key, problem.message)
    }

    #[test]
    fn impossible_values_are_named() {
        assert_eq!(Config::default().check(), Ok(()));
        assert_eq!(broken(|c| c.kernel = "vmlinux".into()), "kernel: \"vmlinux\" is not an absolute path");
        assert_eq!(broken(|c| c.max_vcpus = 65), "max_vcpus: 65 is not in 1 to 64");
        assert_eq!(broken(|c| c.default_vcpus = 17), "default_vcpus: 17 is not in 1 to 16");
        assert_eq!(broken(|c| c.default_vcpus = 0), "default_vcpus: 0 is not in 1 to 16");
        assert!(broken(|c| c.default_memory_mib = 63).starts_with("default_memory_mib: 63 is not in 64"));
        assert!(broken(|c| c.memory_overhead_mib = 1).starts_with("memory_overhead_mib: "));
        assert!(broken(|c| c.min_memory_mib = 0).starts_with("min_memory_mib: "));
        assert!(broken(|c| c.virtio_fs_workers = 0).starts_with("virtio_fs_workers: "));
        assert!(broken(|c| c.start_timeout_secs = 0).starts_with("start_timeout_secs: "));
        assert!(broken(|c| c.timeline_log = "x".into()).starts_with("timeline_log: "));
        assert!(broken(|c| c.kernel_params = "a\nb".into()).starts_with("kernel_params: '\\n'"));
        assert!(broken(|c| c.kernel_params = "a".repeat(1025)).starts_with("kernel_params: 1025 bytes"));
        assert!(broken(|c| c.allowed_annotations = vec!["io.husk.x".into()]).contains("\"io.husk.x\" is none of"));
    }
}
