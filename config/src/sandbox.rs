//! What a sandbox is, as its shim notes it for `husk ps`: `/run/husk/<namespace>/<sandbox>/sandbox.json`.

use serde::{Deserialize, Serialize};

/// A sandbox and its virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Its id.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// The Kubernetes pod it is the sandbox of, as `namespace/name`; empty for a container by itself.
    pub pod: String,
    /// vCPUs that it has by now.
    pub vcpus: u8,
    /// Guest memory that it has by now, in MiB.
    pub memory_mib: u64,
    /// When it was started, in seconds since the epoch.
    pub started: u64,
    /// The VMM's process.
    pub vmm_pid: u32,
    /// The shim's process.
    pub shim_pid: u32,
}
