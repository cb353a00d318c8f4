//! Finds the processes and the cgroup of the victim: everything of Husk that does not belong to the witness.

use std::fs;
use std::path::{Path, PathBuf};

use crate::vm;

/// Processes of Husk that do not belong to the witness.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Targets {
    /// Shims.
    pub shims: Vec<i32>,
    /// Launchers of these shims.
    pub launchers: Vec<i32>,
    /// VMMs.
    pub vmms: Vec<i32>,
}

/// Returns the victim's processes. `witness` is the sandbox id of the witness.
pub fn of_victim(witness: &str) -> Targets {
    let mut found = Targets::default();
    let (mut spared, mut vmms) = (Vec::new(), Vec::new());
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        if words.first().is_some_and(|word| *word == b"husk-vmm") {
            vmms.push(pid);
        } else if words.first().is_some_and(|word| word.windows(21).any(|part| part == b"containerd-shim-husk-")) {
            if words.contains(&witness.as_bytes()) {
                spared.push(pid);
            } else if fs::read_to_string(entry.path().join("comm")).is_ok_and(|name| name.trim() == "husk-launcher") {
                found.launchers.push(pid);
            } else {
                found.shims.push(pid);
            }
        }
    }
    found.vmms = vmms.into_iter().filter(|pid| vm::parent(*pid).is_none_or(|of| !spared.contains(&of))).collect();
    found
}

/// Returns the directory of the cgroup in which a process runs. `None` if the process has ended, or runs in the root
/// cgroup.
pub fn cgroup(pid: i32) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    (!path.is_empty()).then(|| Path::new("/sys/fs/cgroup").join(path))
}

/// Returns the sockets of the shims.
pub fn sockets() -> Vec<PathBuf> {
    fs::read_dir("/run/containerd/s").into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Returns the network namespaces under /run/netns.
pub fn network_namespaces() -> Vec<PathBuf> {
    fs::read_dir("/run/netns").into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}
