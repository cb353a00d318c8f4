//! The parts of the OCI runtime specification that the host has to look at; everything else passes through as JSON.

use super::cpuset::CpuSet;
use super::users::IdMapping;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;

/// `null` is as good as absent: that is how some engines write an empty list.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// What the shim reads of a `config.json`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Spec {
    /// Version of the specification.
    pub oci_version: String,
    /// The container's first process.
    pub process: Process,
    /// The root file system.
    pub root: Root,
    /// Host name of the container's UTS namespace.
    pub hostname: Option<String>,
    /// Arbitrary annotations.
    #[serde(default, deserialize_with = "or_default")]
    pub annotations: BTreeMap<String, String>,
    /// What is Linux's own.
    pub linux: Linux,
    /// Mounts below the root file system.
    #[serde(default, deserialize_with = "or_default")]
    pub mounts: Vec<Mount>,
}

/// A container's first process.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Process {
    /// Whether it has a terminal.
    #[serde(default)]
    pub terminal: bool,
    /// The command line.
    pub args: Vec<String>,
    /// The working directory.
    pub cwd: String,
    /// SELinux label of the process.
    pub selinux_label: Option<String>,
    /// AppArmor profile of the process.
    pub apparmor_profile: Option<String>,
}

/// The root file system.
#[derive(Debug, Clone, Deserialize)]
pub struct Root {
    /// Absolute, or relative to the bundle.
    pub path: String,
}

/// What is Linux's own.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Linux {
    /// The namespaces made or joined.
    #[serde(default, deserialize_with = "or_default")]
    pub namespaces: Vec<Namespace>,
    /// Limits.
    pub resources: Option<Resources>,
    /// SELinux label of the mounts.
    pub mount_label: Option<String>,
    /// Propagation of the root mount.
    pub rootfs_propagation: Option<String>,
    /// Users of its user namespace.
    #[serde(default, deserialize_with = "or_default")]
    pub uid_mappings: Vec<IdMapping>,
    /// Groups of its user namespace.
    #[serde(default, deserialize_with = "or_default")]
    pub gid_mappings: Vec<IdMapping>,
}

/// A namespace made, or joined where there is a path.
#[derive(Debug, Clone, Deserialize)]
pub struct Namespace {
    /// `network`, `pid`, …
    #[serde(rename = "type")]
    pub kind: String,
    /// The namespace to join.
    #[serde(default)]
    pub path: Option<String>,
}

impl Namespace {
    /// The path, where one is named.
    pub fn joined(&self) -> Option<&str> {
        self.path.as_deref().filter(|path| !path.is_empty())
    }
}

/// Limits that size a virtual machine.
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
    /// Such as `2MB`, which is 2 MiB (OCI runtime specification, config-linux, "Huge page limits").
    pub page_size: String,
    /// Bytes.
    pub limit: u64,
}

/// CPU time.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Cpu {
    /// Microseconds per period; 0 or less is no limit.
    pub quota: Option<i64>,
    /// Microseconds.
    pub period: Option<u64>,
    /// Relative weight: 1024 for each CPU that Kubernetes was asked for.
    pub shares: Option<u64>,
    /// The host's processors it may run on.
    #[serde(default, deserialize_with = "set")]
    pub cpus: Option<CpuSet>,
}

/// An empty list says nothing.
fn set<'de, D: Deserializer<'de>>(from: D) -> Result<Option<CpuSet>, D::Error> {
    let text: Option<String> = Option::deserialize(from)?;
    text.filter(|text| !text.is_empty()).map(|text| text.parse().map_err(D::Error::custom)).transpose()
}

/// Memory.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Memory {
    /// Bytes; 0 or less is no limit.
    pub limit: Option<i64>,
}

/// A mount below the root file system.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Mount {
    /// Where, in the container.
    pub destination: String,
    /// File system type; `bind` for bind mounts.
    #[serde(rename = "type", default)]
    pub kind: Option<String>,
    /// Device, directory or file.
    #[serde(default)]
    pub source: Option<String>,
    /// As in fstab.
    #[serde(default)]
    pub options: Option<Vec<String>>,
    /// Mapping of user ids, for idmapped mounts.
    #[serde(default, rename = "uidMappings", deserialize_with = "or_default")]
    pub uid_mappings: Vec<IdMapping>,
    /// Mapping of group ids, for idmapped mounts.
    #[serde(default, rename = "gidMappings", deserialize_with = "or_default")]
    pub gid_mappings: Vec<IdMapping>,
}

impl Mount {
    /// The options, none where the specification has none.
    pub fn options(&self) -> &[String] {
        self.options.as_deref().unwrap_or_default()
    }

    /// Whether this is a bind mount, by its type or its options.
    pub fn is_bind(&self) -> bool {
        self.kind.as_deref() == Some("bind")
            || self.options().iter().any(|option| option == "bind" || option == "rbind")
    }
}
