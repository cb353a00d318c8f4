//! Templates: what the shim, the process that makes templates, and the `husk` command agree on.

use serde::{Deserialize, Serialize};

/// The directory of the templates. A template is a directory in it with the files below.
pub const STORE: &str = "/run/husk-templates";
/// The file with the state of a template's VM.
pub const STATE: &str = "state";
/// The file with the memory of a template's VM.
pub const MEMORY: &str = "memory";
/// The file with the template's [`Class`], in JSON.
pub const CLASS: &str = "class";
/// Value of `argv[0]` that makes the shim's program make a template. The argument is a [`Class`] in JSON. Without an
/// argument, the program makes the templates of all sizes of memory for pods with the default number of vCPUs.
pub const ARGV0: &str = "husk-template";

/// Guests of one class can be made from one template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Class {
    /// Number of vCPUs at boot.
    pub vcpus: u8,
    /// Maximum number of vCPUs.
    pub max_vcpus: u8,
    /// Memory at boot in MiB.
    pub memory_mib: u64,
    /// Maximum memory in MiB.
    pub max_memory_mib: u64,
    /// Maximum hot-plugged memory in MiB that consists of huge pages.
    pub huge_mib: u64,
    /// The Kubernetes namespace, if only pods of one namespace share a template. Otherwise empty.
    pub namespace: String,
}

/// Returns whether the name of a directory in [`STORE`] is that of a complete template.
pub fn is_complete(name: &str) -> bool {
    crate::digest::is_sha256(name)
}
