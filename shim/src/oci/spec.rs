//! The parts of the OCI runtime specification that the shim reads. The shim passes all other fields to the guest as
//! JSON.
//!
//! Most fields have a default, even fields that OCI requires. If a required field is missing, [`crate::oci::bundle`]
//! later rejects the specification. The error of `bundle` is clearer than the parser's error.

use std::collections::HashMap;
use std::path::PathBuf;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::oci::annotations::Annotations;
use crate::oci::cpuset::CpuSet;
use crate::oci::id_mappings::IdMapping;

/// Deserializes `null` like an absent field, because some clients write an empty list as `null`.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// The parts of a `config.json` that the shim reads.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Spec {
    /// Version of the specification.
    pub oci_version: String,
    /// Init process of the container.
    pub process: Process,
    /// The root file system.
    pub root: Root,
    /// Host name of the container's UTS namespace. Empty if absent.
    #[serde(deserialize_with = "or_default")]
    pub hostname: String,
    /// Annotations.
    #[serde(deserialize_with = "or_default")]
    pub annotations: Annotations,
    /// OCI hooks.
    #[serde(deserialize_with = "or_default")]
    pub hooks: Hooks,
    /// Linux-specific configuration.
    #[serde(deserialize_with = "or_default")]
    pub linux: Linux,
    /// Mounts of the container.
    #[serde(deserialize_with = "or_default")]
    pub mounts: Vec<Mount>,
}

/// Init process of a container.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Process {
    /// Command line.
    #[serde(deserialize_with = "or_default")]
    pub args: Vec<String>,
    /// Working directory.
    pub cwd: String,
    /// SELinux label of the process.
    pub selinux_label: Option<String>,
    /// `oom_score_adj` of the process.
    pub oom_score_adj: Option<i32>,
    /// AppArmor profile of the process.
    pub apparmor_profile: Option<String>,
}

/// Root file system.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Root {
    /// Absolute path, or path relative to the bundle.
    pub path: String,
}

/// OCI hooks that the shim runs.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Hooks {
    /// Deprecated form of `createRuntime`.
    #[serde(deserialize_with = "or_default")]
    pub prestart: Vec<Hook>,
    /// Hooks that run after the namespaces are created and before pivot_root(2).
    #[serde(deserialize_with = "or_default")]
    pub create_runtime: Vec<Hook>,
    /// Hooks that run after the process was started.
    #[serde(deserialize_with = "or_default")]
    pub poststart: Vec<Hook>,
    /// Hooks that run after the container was deleted.
    #[serde(deserialize_with = "or_default")]
    pub poststop: Vec<Hook>,
}

/// A program that the shim runs on the host.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Hook {
    /// Absolute path.
    pub path: PathBuf,
    /// Arguments, beginning with `argv[0]`.
    #[serde(deserialize_with = "or_default")]
    pub args: Vec<String>,
    /// The complete environment.
    #[serde(deserialize_with = "or_default")]
    pub env: Vec<String>,
    /// Timeout in seconds.
    pub timeout: Option<u64>,
}

/// Linux-specific configuration.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Linux {
    /// Namespaces that are created or joined.
    #[serde(deserialize_with = "or_default")]
    pub namespaces: Vec<Namespace>,
    /// Path of the container's cgroup. Empty if absent.
    #[serde(deserialize_with = "or_default")]
    pub cgroups_path: String,
    /// Resource limits.
    #[serde(deserialize_with = "or_default")]
    pub resources: Resources,
    /// Sysctls of the container's namespaces.
    #[serde(deserialize_with = "or_default")]
    pub sysctl: HashMap<String, String>,
    /// SELinux label of the mounts.
    pub mount_label: Option<String>,
    /// Propagation of the root mount.
    pub rootfs_propagation: Option<String>,
    /// User id mappings of the user namespace.
    #[serde(deserialize_with = "or_default")]
    pub uid_mappings: Vec<IdMapping>,
    /// Group id mappings of the user namespace.
    #[serde(deserialize_with = "or_default")]
    pub gid_mappings: Vec<IdMapping>,
}

/// A namespace of the container. If `path` is set, the container joins the namespace at this path. Otherwise, the
/// namespace is new.
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
    /// Returns the path of the namespace to join, or `None` if the namespace is new.
    pub fn joined(&self) -> Option<&str> {
        self.path.as_deref().filter(|path| !path.is_empty())
    }
}

/// The network namespace that a specification requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// A new namespace, which the VMM process creates.
    New,
    /// An existing namespace, which CNI has configured.
    Path(PathBuf),
}

/// Resource limits that determine the size of a VM.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Resources {
    /// CPU limits.
    pub cpu: Option<Cpu>,
    /// Memory limit.
    pub memory: Option<Memory>,
    /// Huge page limits, one for each page size.
    #[serde(default, rename = "hugepageLimits", deserialize_with = "or_default")]
    pub hugepage_limits: Vec<HugepageLimit>,
}

/// A limit for huge pages of one size.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HugepageLimit {
    /// Size of the pages, such as `2MB`, which means 2 MiB (OCI runtime specification, config-linux, "Huge page
    /// limits").
    pub page_size: String,
    /// Limit in bytes.
    pub limit: u64,
}

/// CPU limits.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Cpu {
    /// Quota in microseconds per period. A negative value means unlimited. A value of 0 counts as absent.
    pub quota: Option<i64>,
    /// Period in microseconds.
    pub period: Option<u64>,
    /// Relative weight. Kubernetes sets 1024 for each requested CPU.
    pub shares: Option<u64>,
    /// Host CPUs on which the container may run.
    #[serde(default, deserialize_with = "cpu_list")]
    pub cpus: Option<CpuSet>,
}

/// Deserializes a list of CPUs. An empty list counts as absent.
fn cpu_list<'de, D: Deserializer<'de>>(from: D) -> Result<Option<CpuSet>, D::Error> {
    let text: Option<String> = Option::deserialize(from)?;
    text.filter(|text| !text.is_empty()).map(|text| text.parse().map_err(D::Error::custom)).transpose()
}

/// Memory limit.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Memory {
    /// Limit in bytes. A negative value means unlimited. A value of 0 counts as absent.
    pub limit: Option<i64>,
}

/// A mount of the container.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Mount {
    /// Path in the container.
    pub destination: String,
    /// File system type, or `bind` for bind mounts.
    #[serde(rename = "type", default)]
    pub kind: Option<String>,
    /// Device, directory or file. The source of a volume is a host path.
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
    /// Returns the options, or an empty list if the field is absent.
    pub fn options(&self) -> &[String] {
        self.options.as_deref().unwrap_or_default()
    }

    /// Returns whether the type or an option requests a bind mount.
    pub fn is_bind(&self) -> bool {
        self.kind.as_deref() == Some("bind")
            || self.options().iter().any(|option| option == "bind" || option == "rbind")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn parsing_never_panics(text: String) {
            let _ = serde_json::from_str::<Spec>(&text);
        }
    }
}
