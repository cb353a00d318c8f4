//! The parts of the OCI runtime specification that the host reads. Everything else is passed to the guest as JSON.

use super::cpuset::CpuSet;
use super::users::IdMapping;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;

/// Deserializes `null` like an absent field: some engines write an empty list as `null`.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// The parts of a `config.json` that the shim reads.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Spec {
    /// Version of the specification.
    pub oci_version: String,
    /// Init process of the container.
    pub process: Process,
    /// The root file system.
    pub root: Root,
    /// Host name of the container's UTS namespace.
    pub hostname: Option<String>,
    /// Annotations.
    #[serde(default, deserialize_with = "or_default")]
    pub annotations: BTreeMap<String, String>,
    /// Linux-specific configuration.
    pub linux: Linux,
    /// Mounts of the container.
    #[serde(default, deserialize_with = "or_default")]
    pub mounts: Vec<Mount>,
}

/// Init process of a container.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Process {
    /// Whether the process has a terminal.
    #[serde(default)]
    pub terminal: bool,
    /// Command line.
    pub args: Vec<String>,
    /// Working directory.
    pub cwd: String,
    /// SELinux label of the process.
    pub selinux_label: Option<String>,
    /// AppArmor profile of the process.
    pub apparmor_profile: Option<String>,
}

/// Root file system.
#[derive(Debug, Clone, Deserialize)]
pub struct Root {
    /// Path; absolute, or relative to the bundle.
    pub path: String,
}

/// Linux-specific configuration.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Linux {
    /// Namespaces that are created or joined.
    #[serde(default, deserialize_with = "or_default")]
    pub namespaces: Vec<Namespace>,
    /// Resource limits.
    pub resources: Option<Resources>,
    /// SELinux label of the mounts.
    pub mount_label: Option<String>,
    /// Propagation of the root mount.
    pub rootfs_propagation: Option<String>,
    /// User id mappings of the user namespace.
    #[serde(default, deserialize_with = "or_default")]
    pub uid_mappings: Vec<IdMapping>,
    /// Group id mappings of the user namespace.
    #[serde(default, deserialize_with = "or_default")]
    pub gid_mappings: Vec<IdMapping>,
}

/// A namespace that is created, or joined if it has a path.
#[derive(Debug, Clone, Deserialize)]
pub struct Namespace {
    /// Type, such as `network` or `pid`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Path of the namespace to join.
    #[serde(default)]
    pub path: Option<String>,
}

impl Namespace {
    /// Returns the path of the namespace to join, or `None` if the namespace is created.
    pub fn joined(&self) -> Option<&str> {
        self.path.as_deref().filter(|path| !path.is_empty())
    }
}

/// Resource limits that determine the size of a VM.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Resources {
    /// CPU time.
    pub cpu: Option<Cpu>,
    /// Memory.
    pub memory: Option<Memory>,
    /// Huge pages.
    #[serde(default, rename = "hugepageLimits", deserialize_with = "or_default")]
    pub huge: Vec<HugePages>,
}

/// A limit of huge pages of one size.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HugePages {
    /// Size of the pages, such as `2MB`, which means 2 MiB (OCI runtime specification, config-linux, "Huge page
    /// limits").
    pub page_size: String,
    /// Limit in bytes.
    pub limit: u64,
}

/// CPU time.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Cpu {
    /// Quota in microseconds per period; 0 or less means unlimited.
    pub quota: Option<i64>,
    /// Period in microseconds.
    pub period: Option<u64>,
    /// Relative weight: 1024 for each CPU requested in Kubernetes.
    pub shares: Option<u64>,
    /// CPUs of the host that the container may run on.
    #[serde(default, deserialize_with = "cpu_list")]
    pub cpus: Option<CpuSet>,
}

/// Deserializes a list of CPUs; an empty list counts as absent.
fn cpu_list<'de, D: Deserializer<'de>>(from: D) -> Result<Option<CpuSet>, D::Error> {
    let text: Option<String> = Option::deserialize(from)?;
    text.filter(|text| !text.is_empty()).map(|text| text.parse().map_err(D::Error::custom)).transpose()
}

/// Memory.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Memory {
    /// Limit in bytes; 0 or less means unlimited.
    pub limit: Option<i64>,
}

/// A mount of the container.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Mount {
    /// Path in the container.
    pub destination: String,
    /// File system type; `bind` for bind mounts.
    #[serde(rename = "type", default)]
    pub kind: Option<String>,
    /// Device, directory or file; for a volume, a host path.
    #[serde(default)]
    pub source: Option<String>,
    /// Options, as in fstab(5).
    #[serde(default)]
    pub options: Option<Vec<String>>,
    /// User id mappings of an id-mapped mount.
    #[serde(default, rename = "uidMappings", deserialize_with = "or_default")]
    pub uid_mappings: Vec<IdMapping>,
    /// Group id mappings of an id-mapped mount.
    #[serde(default, rename = "gidMappings", deserialize_with = "or_default")]
    pub gid_mappings: Vec<IdMapping>,
}

impl Mount {
    /// Returns the options; empty if the specification has none.
    pub fn options(&self) -> &[String] {
        self.options.as_deref().unwrap_or_default()
    }

    /// Returns whether this is a bind mount, by its type or its options.
    pub fn is_bind(&self) -> bool {
        self.kind.as_deref() == Some("bind")
            || self.options().iter().any(|option| option == "bind" || option == "rbind")
    }
}
