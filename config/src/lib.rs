//! Husk's configuration file, `/etc/husk/config.toml`, and the state files that the shim writes for the `husk` command.

#![deny(clippy::indexing_slicing)]
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation, clippy::cast_possible_wrap, clippy::cast_sign_loss))]

pub mod check;
pub mod digest;
pub mod host_sockets;
mod load;
pub mod rate_limit;
pub mod sandbox;
pub mod template;
pub mod timeline;
pub mod timeout_factor;

pub use check::InvalidValue;
pub use load::ConfigError;
pub use rate_limit::RateLimit;
pub use timeout_factor::{BaseTimeout, TimeoutFactor};

use std::path::PathBuf;
use std::time::Duration;

use husk_policy::Policy;
use serde::{Deserialize, Serialize};

/// Default path of the configuration file.
pub const DEFAULT_PATH: &str = "/etc/husk/config.toml";

/// Husk's pod annotations. [`Config::allowed_annotations`] selects the annotations that pods may use.
pub mod annotation {
    /// Number of vCPUs.
    pub const VCPUS: &str = "io.husk.vcpus";
    /// VM memory in MiB, overhead included.
    pub const MEMORY_MIB: &str = "io.husk.memory_mib";
    /// Parameters appended to the guest kernel's command line.
    pub const KERNEL_PARAMS: &str = "io.husk.kernel_params";
    /// Agent policy of the pod, in JSON.
    pub const POLICY: &str = "io.husk.policy";
    /// Rate limit of each disk.
    pub const DISK_RATE_LIMIT: &str = "io.husk.disk_rate_limit";
    /// Rate limit of the frames that each interface receives.
    pub const NET_RECEIVE_RATE_LIMIT: &str = "io.husk.net_receive_rate_limit";
    /// Rate limit of the frames that each interface transmits.
    pub const NET_TRANSMIT_RATE_LIMIT: &str = "io.husk.net_transmit_rate_limit";
    /// Rate limit of the share.
    pub const VIRTIO_FS_RATE_LIMIT: &str = "io.husk.virtio_fs_rate_limit";
    /// Rate limit of each direction of vsock.
    pub const VSOCK_RATE_LIMIT: &str = "io.husk.vsock_rate_limit";
    /// Common prefix of Husk's annotations.
    pub const PREFIX: &str = "io.husk.";
    /// All annotations.
    pub const ALL: [&str; 9] = [
        VCPUS,
        MEMORY_MIB,
        KERNEL_PARAMS,
        POLICY,
        DISK_RATE_LIMIT,
        NET_RECEIVE_RATE_LIMIT,
        NET_TRANSMIT_RATE_LIMIT,
        VIRTIO_FS_RATE_LIMIT,
        VSOCK_RATE_LIMIT,
    ];
}

/// The operator's settings. `config.toml` documents each key. Absent keys have their defaults.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Guest kernel, an uncompressed x86-64 ELF image.
    pub kernel: PathBuf,
    /// Initrd of the guest, which contains the agent.
    pub initrd: PathBuf,
    /// SHA-256 digest of the guest kernel, as 64 hexadecimal digits. If the text is empty, the file is not checked.
    pub kernel_sha256: String,
    /// SHA-256 digest of the initrd. If the text is empty, the file is not checked.
    pub initrd_sha256: String,
    /// Parameters appended to the guest kernel's command line.
    pub kernel_params: String,
    /// Number of vCPUs of a pod that has no CPU limit. If the pod requests more CPUs, it gets the requested number.
    pub default_vcpus: u8,
    /// Maximum number of vCPUs of a pod, even if its CPU limit is higher.
    pub max_vcpus: u8,
    /// Number of vCPUs that can be hot-plugged into a running pod.
    pub spare_vcpus: u8,
    /// VM memory of a pod that has no memory limit, in MiB.
    pub default_memory_mib: u64,
    /// VM memory for the guest kernel and the agent, in MiB. It is added to the pod's memory limit.
    pub memory_overhead_mib: u64,
    /// Minimum memory limit of a pod, in MiB.
    pub min_memory_mib: u64,
    /// Number of virtio-fs threads per pod. More threads run only while requests hang.
    pub virtio_fs_workers: u8,
    /// How long the guest caches names and attributes of volumes that others can change, in ms.
    pub volume_cache_ms: u32,
    /// Whether the guest returns unused memory to the host (virtio-balloon).
    pub free_page_reporting: bool,
    /// Whether Husk uses vhost-net, if the host supports it. With vhost-net, the host's kernel forwards the frames of
    /// an interface once the interface's traffic is high.
    pub vhost_net: bool,
    /// Rate limit of each disk.
    pub disk_rate_limit: RateLimit,
    /// Rate limit of the frames that each interface receives.
    pub net_receive_rate_limit: RateLimit,
    /// Rate limit of the frames that each interface transmits.
    pub net_transmit_rate_limit: RateLimit,
    /// Rate limit of the share.
    pub virtio_fs_rate_limit: RateLimit,
    /// Rate limit of each direction of vsock.
    pub vsock_rate_limit: RateLimit,
    /// Sockets of the node to which containers may connect. An entry for all sockets below a directory ends with a
    /// slash.
    pub host_sockets: Vec<String>,
    /// Whether guests are made from templates.
    pub template: Templates,
    /// Which pods share a template.
    pub template_share: TemplateShare,
    /// Age in hours at which a template is made again.
    pub template_max_age_hours: u64,
    /// What happens when the VMM or the shim makes a system call that its seccomp filter does not allow.
    pub seccomp: Seccomp,
    /// Whether a pod fails to start if the host's kernel cannot restrict the VMM's access to files with landlock.
    pub require_landlock: bool,
    /// Timeout for the agent's first answer, in seconds.
    pub start_timeout_secs: u64,
    /// Factor for the timeouts after which the shim kills the VM of a pod that does not end.
    pub timeout_factor: TimeoutFactor,
    /// How long containers may take to exit after their stop signals when the shim or the VMM gets SIGTERM, in seconds.
    pub shutdown_grace_secs: u64,
    /// Log level of the shim.
    pub log_level: LogLevel,
    /// File to which the [`timeline::Timeline`] of each start is appended. If the path is empty, no timeline is
    /// appended.
    pub timeline_log: PathBuf,
    /// The annotations from [`annotation`] that pods may use.
    pub allowed_annotations: Vec<String>,
    /// Agent policy of all pods. A pod's annotation can only forbid more.
    pub policy: Policy,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            kernel: "/usr/local/share/husk/vmlinux".into(),
            initrd: "/usr/local/share/husk/initrd.cpio".into(),
            kernel_sha256: String::new(),
            initrd_sha256: String::new(),
            kernel_params: String::new(),
            default_vcpus: 1,
            max_vcpus: 16,
            spare_vcpus: 2,
            default_memory_mib: 1024,
            memory_overhead_mib: 64,
            min_memory_mib: 8,
            virtio_fs_workers: 2,
            volume_cache_ms: 1000,
            free_page_reporting: true,
            vhost_net: true,
            disk_rate_limit: RateLimit::default(),
            net_receive_rate_limit: RateLimit::default(),
            net_transmit_rate_limit: RateLimit::default(),
            virtio_fs_rate_limit: RateLimit::default(),
            vsock_rate_limit: RateLimit::default(),
            host_sockets: Vec::new(),
            template: Templates::Off,
            template_share: TemplateShare::Node,
            template_max_age_hours: 24,
            seccomp: Seccomp::Enforce,
            require_landlock: false,
            start_timeout_secs: 60,
            timeout_factor: TimeoutFactor::default(),
            shutdown_grace_secs: 10,
            log_level: LogLevel::Info,
            timeline_log: PathBuf::new(),
            allowed_annotations: [annotation::VCPUS, annotation::MEMORY_MIB, annotation::POLICY].map(Into::into).into(),
            policy: Policy::default(),
        }
    }
}

impl Config {
    /// Returns the age at which a template is made again.
    pub fn template_max_age(&self) -> Duration {
        Duration::from_secs(self.template_max_age_hours.saturating_mul(3600))
    }
}

/// Whether guests are made from templates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Templates {
    /// A template is made after the first boot of a guest, and the next guests of the same class are made from it.
    Auto,
    /// Guests are made from the templates that `husk template build` has made. Other guests boot.
    Manual,
    /// All guests boot.
    Off,
}

/// Which pods share a template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TemplateShare {
    /// All pods of the node.
    Node,
    /// The pods of a Kubernetes namespace.
    Namespace,
}

/// What happens when the VMM or the shim makes a system call that its seccomp filter does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Seccomp {
    /// The VM ends. The shim's log and the errors of later requests to the shim name the thread and the call.
    Enforce,
    /// The host's kernel logs the call and allows it.
    Log,
}

/// Log level. Each level includes the levels that are listed before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Failures only.
    Error,
    /// Suspicious conditions.
    Warn,
    /// Events in a pod's life.
    Info,
    /// Details of each event.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    /// Returns the level's name in `tracing` and in the configuration file.
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
