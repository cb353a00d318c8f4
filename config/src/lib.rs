//! Husk's configuration file, `/etc/husk/config.toml`, and the start timeline that shim and operator share.

pub mod check;
mod load;
pub mod sandbox;
pub mod timeline;

pub use check::Problem;
pub use load::ConfigError;

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Where the configuration is read from unless the operator says otherwise.
pub const DEFAULT_PATH: &str = "/etc/husk/config.toml";

/// The annotations a pod may carry; [`Config::allowed_annotations`] chooses among them.
pub mod annotation {
    /// Number of vCPUs, a whole number.
    pub const VCPUS: &str = "io.husk.vcpus";
    /// The virtual machine's memory in MiB, overhead included.
    pub const MEMORY_MIB: &str = "io.husk.memory_mib";
    /// Appended to the guest kernel's parameters.
    pub const KERNEL_PARAMS: &str = "io.husk.kernel_params";
    /// What all of Husk's annotations start with.
    pub const PREFIX: &str = "io.husk.";
    /// Every annotation there is.
    pub const ALL: [&str; 3] = [VCPUS, MEMORY_MIB, KERNEL_PARAMS];
}

/// Everything an operator can set; each key is documented in `config.toml`, and absent keys have their defaults.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The guest kernel, an uncompressed x86-64 ELF image.
    pub kernel: PathBuf,
    /// The guest's initial RAM file system, with the agent in it.
    pub initrd: PathBuf,
    /// Appended to the guest kernel's parameters.
    pub kernel_params: String,
    /// vCPUs of a pod that has no CPU limit and requests no more.
    pub default_vcpus: u8,
    /// The most vCPUs a pod gets, however high its limit.
    pub max_vcpus: u8,
    /// vCPUs that a pod may get beyond those of its start.
    pub spare_vcpus: u8,
    /// Memory, in MiB, of the virtual machine of a pod that has no memory limit.
    pub default_memory_mib: u64,
    /// Added to a pod's memory limit for the guest's kernel and agent, in MiB.
    pub memory_overhead_mib: u64,
    /// A pod with a memory limit below this, in MiB, is refused.
    pub min_memory_mib: u64,
    /// Threads per pod that serve the shared file system.
    pub virtio_fs_workers: u8,
    /// Whether the guest gives memory it no longer uses back to the host.
    pub free_page_reporting: bool,
    /// Whether the host's kernel carries the guest's network frames, where it has vhost-net.
    pub vhost_net: bool,
    /// Seconds until the guest's agent must have answered.
    pub start_timeout_secs: u64,
    /// How much the shim logs.
    pub log_level: LogLevel,
    /// File that each start's [`timeline::Timeline`] is appended to; empty for none.
    pub timeline_log: PathBuf,
    /// The annotations of [`annotation`] that pods may use.
    pub allowed_annotations: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            kernel: "/usr/local/share/husk/vmlinux".into(),
            initrd: "/usr/local/share/husk/initrd.cpio".into(),
            kernel_params: String::new(),
            default_vcpus: 1,
            max_vcpus: 16,
            spare_vcpus: 2,
            default_memory_mib: 1024,
            memory_overhead_mib: 64,
            min_memory_mib: 8,
            virtio_fs_workers: 2,
            free_page_reporting: true,
            vhost_net: true,
            start_timeout_secs: 60,
            log_level: LogLevel::Info,
            timeline_log: PathBuf::new(),
            allowed_annotations: vec![annotation::VCPUS.into(), annotation::MEMORY_MIB.into()],
        }
    }
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Failures only.
    Error,
    /// And what looks wrong.
    Warn,
    /// And what happens to a pod.
    Info,
    /// And how.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    /// The level's name as `tracing` and the configuration file spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}
