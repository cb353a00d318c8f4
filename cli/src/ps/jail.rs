//! The restrictions of a VMM process (jail) or shim process (confinement), as /proc shows them.

use std::{fs, path::Path};

use caps::Capability;
use procfs::{
    FromRead, ProcResult,
    process::{LimitValue, MountInfos, Process, Status},
};
use serde::Serialize;

/// Kinds of namespaces, by their names in /proc/PID/ns.
const NAMESPACES: [&str; 7] = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"];

/// What confines a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Jail {
    /// Kinds of namespaces that the process does not share with this command.
    own_namespaces: Vec<&'static str>,
    /// Path of the process's root directory within the file system that contains it (field `root` of mountinfo).
    root: Option<String>,
    /// The source of the mount at the process's root directory (field `mount source` of mountinfo).
    root_source: Option<String>,
    /// Number of mounts that the process can see.
    mounts: usize,
    /// Maximum size of a core dump in bytes. `None` means no limit.
    core_limit: Option<u64>,
    /// The threads, ordered by id.
    threads: Vec<Thread>,
}

/// What confines a thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Thread {
    /// Name of the thread. The main thread has the name of the process.
    name: String,
    /// Whether `no_new_privs` is set.
    no_new_privs: bool,
    /// Whether a seccomp filter is set.
    seccomp_filter: bool,
    /// Effective capabilities.
    capabilities: Vec<String>,
}

/// Returns the jail of process `pid`. Returns `None` if the process has ended, or if this command cannot read the
/// process's files in /proc.
pub fn of(proc: &Path, pid: u32) -> Option<Jail> {
    inspect(proc, pid).ok()
}

fn inspect(proc: &Path, pid: u32) -> ProcResult<Jail> {
    let process = Process::new_with_root(proc.join(pid.to_string()))?;
    let dir = proc.join(pid.to_string());
    let namespace = |dir: &Path, kind: &str| fs::read_link(dir.join("ns").join(kind));
    let mut own_namespaces = Vec::new();
    for kind in NAMESPACES {
        if namespace(&dir, kind)? != namespace(&proc.join("self"), kind)? {
            own_namespaces.push(kind);
        }
    }
    let MountInfos(mounts) = process.mountinfo()?;
    let root = mounts.iter().find(|mount| mount.mount_point == Path::new("/"));
    let root_source = root.and_then(|mount| mount.mount_source.clone());
    let root = root.map(|mount| mount.root.clone());
    let core_limit = match process.limits()?.max_core_file_size.soft_limit {
        LimitValue::Unlimited => None,
        LimitValue::Value(bytes) => Some(bytes),
    };
    let mut ids: Vec<u32> =
        fs::read_dir(dir.join("task"))?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    ids.sort_unstable();
    // A thread that has ended in the meantime is left out.
    let threads = ids.iter().filter_map(|id| thread(&dir.join("task").join(id.to_string())).ok()).collect();
    Ok(Jail { own_namespaces, root, root_source, mounts: mounts.len(), core_limit, threads })
}

fn thread(dir: &Path) -> ProcResult<Thread> {
    let status = Status::from_file(dir.join("status"))?;
    let mut capabilities: Vec<Capability> = caps::all().into_iter().collect();
    capabilities.retain(|capability| status.capeff & capability.bitmask() != 0);
    capabilities.sort_by_key(Capability::index);
    Ok(Thread {
        name: status.name,
        no_new_privs: status.nonewprivs == Some(1),
        // SECCOMP_MODE_FILTER of linux/seccomp.h
        seccomp_filter: status.seccomp == Some(2),
        capabilities: capabilities.iter().map(ToString::to_string).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unconfined_process_has_the_namespaces_of_this_command() {
        let jail = of(Path::new("/proc"), std::process::id()).unwrap();
        assert!(jail.own_namespaces.is_empty(), "this process has separate namespaces: {jail:?}");
        assert!(jail.mounts > 0 && jail.root.is_some(), "the jail has no mounts or no root: {jail:?}");
        assert!(!jail.threads.is_empty(), "the jail has no threads: {jail:?}");
        assert!(jail.threads.iter().all(|thread| !thread.seccomp_filter), "a thread has a filter: {jail:?}");
    }

    #[test]
    fn process_that_does_not_exist_has_no_jail() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(of(dir.path(), 12), None);
    }
}
