//! State file of a sandbox, which the shim writes for `husk ps`: `/run/husk/<namespace>/<sandbox>/sandbox.json`.

use serde::{Deserialize, Serialize};

use crate::Seccomp;

/// A sandbox and its VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Sandbox id.
    pub id: String,
    /// containerd namespace.
    pub namespace: String,
    /// The sandbox's Kubernetes pod, as `namespace/name`. Empty if the sandbox has no pod.
    pub pod: String,
    /// Current number of vCPUs.
    pub vcpus: u8,
    /// Current guest memory, in MiB.
    pub memory_mib: u64,
    /// Start time, in seconds since the epoch.
    pub started: u64,
    /// PID of the VMM.
    pub vmm_pid: u32,
    /// PID of the shim.
    pub shim_pid: u32,
    /// The configuration's `seccomp` at the start of the VM. `None` in the file of a shim that does not record it.
    #[serde(default)]
    pub configured_seccomp: Option<Seccomp>,
}
