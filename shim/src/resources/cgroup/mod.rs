//! The sandbox's cgroup on the host. The cgroup contains the shim and its child processes, because containerd expects
//! the cgroup to account for the whole pod.

pub mod oom;
mod path;
mod remove;
mod v1;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::blocking;
use crate::systemd::{Scope, Unit, UnitError};

pub use crate::resources::cgroup::remove::remove;

/// Mount point of cgroup v2, or parent directory of the cgroup v1 mounts.
const MOUNT: &str = "/sys/fs/cgroup";

/// Maximum number of attempts to create a cgroup.
const ATTEMPTS: u32 = 10;

/// Maximum number of threads of a sandbox's processes on the host. The VMM has at most 64 vCPUs, 64 virtio-fs workers,
/// one thread for each disk, and 128 threads of vhost-net. It also has up to 1024 idle threads, whose ids the shim
/// reports as pids of containers. The shim has at most 64 threads for blocking calls, and a thread for each volume with
/// propagation.
pub const MAX_TASKS: u64 = 2048;
/// Timeout for the removal of the sandbox's cgroup when the sandbox ends.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(10);

/// Location of a sandbox's cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CgroupLocation {
    /// Directory in the cgroup v2 hierarchy.
    V2(PathBuf),
    /// One directory for each cgroup v1 hierarchy, with the names of the hierarchy's controllers.
    V1(Vec<(Vec<String>, PathBuf)>),
}

/// A cgroup that this process created and moved into.
#[derive(Debug)]
pub struct Cgroup {
    location: CgroupLocation,
    /// Original cgroups of this process, in the order of [`CgroupLocation::dirs`]. This process returns to these
    /// cgroups before it removes the sandbox's cgroup.
    origins: Vec<PathBuf>,
    namespace: String,
    /// The cgroup's systemd scope, if systemd created the cgroup.
    unit: Option<Unit>,
}

/// Why the cgroup cannot be created or entered.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The specification's `cgroupsPath` is empty, malformed or outside the hierarchy.
    #[error("invalid cgroupsPath {0:?}: expected a path within the cgroup hierarchy, or slice:prefix:name")]
    Path(String),
    /// systemd could not create the scope.
    #[error("failed to create the cgroup through systemd")]
    Unit(#[from] UnitError),
    /// The host has no cgroup hierarchy.
    #[error("no cgroup hierarchy is mounted below {MOUNT}")]
    None,
    /// The directory cannot be created.
    #[error("failed to create the cgroup {path}")]
    Create {
        /// Path of the cgroup.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// The process cannot be moved into the cgroup.
    #[error("failed to move the shim into the cgroup {path}")]
    Enter {
        /// Path of the cgroup.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
}

/// Returns whether the host uses cgroup v2.
pub fn is_cgroup_v2() -> bool {
    Path::new(MOUNT).join("cgroup.controllers").exists()
}

/// A cgroup that does not exist yet.
#[derive(Debug)]
pub struct PlannedCgroup {
    cgroup: Cgroup,
    scope: Option<Scope>,
}

impl PlannedCgroup {
    /// Determines where the cgroup will be. Changes nothing.
    ///
    /// # Errors
    /// [`CgroupError::Path`] or [`CgroupError::None`].
    pub fn new(cgroups_path: &str, namespace: &str) -> Result<Self, CgroupError> {
        let path::CgroupsPath { relative, scope } = path::parse(cgroups_path)?;
        let proc_cgroup = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let (location, origins) = if is_cgroup_v2() {
            let proc_cgroup = proc_cgroup.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
            (CgroupLocation::V2(Path::new(MOUNT).join(relative)), vec![Path::new(MOUNT).join(proc_cgroup)])
        } else {
            let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
            v1::locate(&mounts, &proc_cgroup, &relative, scope.is_some())
        };
        if location.dirs().next().is_none() {
            return Err(CgroupError::None);
        }
        let unit = scope.as_ref().map(|scope| scope.unit.clone());
        let cgroup = Cgroup { location, origins, namespace: namespace.to_owned(), unit };
        Ok(Self { cgroup, scope })
    }

    /// Returns the directories of the cgroup, and its systemd scope. A caller records them before [`Self::enter`], so
    /// that the cgroup can be removed whatever happens to this process.
    pub fn parts(&self) -> (&CgroupLocation, Option<&Unit>) {
        (&self.cgroup.location, self.cgroup.unit.as_ref())
    }

    /// Creates the cgroup, directly or through systemd, and moves this process into the cgroup. Blocks until systemd
    /// has created the scope.
    ///
    /// # Errors
    /// [`CgroupError`]. After an error, stops the systemd scope and removes the cgroup's directories.
    pub fn enter(self) -> Result<Cgroup, CgroupError> {
        let Self { cgroup, scope } = self;
        if let Some(scope) = &scope {
            scope.start(std::process::id())?;
        }
        let made = cgroup.make();
        if made.is_err() {
            // With cgroup v1, this process may already have entered the sandbox's cgroup in some hierarchies.
            cgroup.leave();
            cgroup.unit.iter().for_each(stop_scope);
            cgroup.location.dirs().for_each(|path| drop(std::fs::remove_dir(path)));
        }
        made.map(|()| cgroup)
    }
}

impl Cgroup {
    /// Returns the cgroup's systemd scope, if systemd created the cgroup.
    pub fn unit(&self) -> Option<&Unit> {
        self.unit.as_ref()
    }

    fn make(&self) -> Result<(), CgroupError> {
        for path in self.location.dirs() {
            create(path).map_err(|source| CgroupError::Create { path: path.to_owned(), source })?;
        }
        // Set up the controllers before this process enters the cgroup, because the memory controller does not charge
        // memory that was allocated before the controller was enabled.
        match &self.location {
            CgroupLocation::V2(path) => delegate(Path::new(MOUNT), path),
            CgroupLocation::V1(_) => {
                if let Some(path) = self.location.controller_dir("cpuset") {
                    v1::inherit_cpuset(Path::new(MOUNT), path);
                }
            }
        }
        self.location.set_max_tasks();
        for path in self.location.dirs() {
            std::fs::write(path.join("cgroup.procs"), "0")
                .map_err(|source| CgroupError::Enter { path: path.to_owned(), source })?;
        }
        Ok(())
    }

    /// Opens the files with which a process can enter the cgroup.
    ///
    /// # Errors
    /// The error of open(2).
    pub fn open_procs(&self) -> std::io::Result<Vec<OwnedFd>> {
        let open = |dir: &Path| std::fs::File::options().write(true).open(dir.join("cgroup.procs")).map(OwnedFd::from);
        self.location.dirs().map(open).collect()
    }

    /// Opens the directory of a cgroup v2, for CLONE_INTO_CGROUP. Returns `None` for cgroup v1.
    ///
    /// # Errors
    /// The error of open(2).
    pub fn open_directory(&self) -> std::io::Result<Option<OwnedFd>> {
        match &self.location {
            CgroupLocation::V2(path) => Ok(Some(std::fs::File::open(path)?.into())),
            CgroupLocation::V1(_) => Ok(None),
        }
    }

    /// Returns the location of the cgroup.
    pub fn location(&self) -> &CgroupLocation {
        &self.location
    }

    /// Moves this process back to its original cgroups.
    pub fn leave(&self) {
        for (path, origin) in self.location.dirs().zip(&self.origins) {
            if std::fs::write(origin.join("cgroup.procs"), "0").is_err() {
                // The original cgroup no longer exists. Move the process to the root of the hierarchy, which always
                // exists.
                let root = path.ancestors().skip(1).take_while(|parents| parents.join("cgroup.procs").exists()).last();
                let _ = root.map(|root| std::fs::write(root.join("cgroup.procs"), "0"));
            }
        }
    }

    /// Moves this process back to its original cgroups. Then removes the sandbox's cgroup as [`remove()`] does.
    pub async fn leave_and_remove(&self) {
        self.leave();
        let (location, namespace, unit) = (self.location.clone(), self.namespace.clone(), self.unit.clone());
        // Use a blocking task, because the removal waits until the last process has left the cgroup.
        let removed = blocking::spawn(move || {
            let dirs: Vec<&Path> = location.dirs().collect();
            remove(&dirs, unit.as_ref(), &namespace);
        });
        // The removal itself has shorter timeouts. But it may find no thread, if all of them hang in file systems.
        match tokio::time::timeout(REMOVAL_TIMEOUT, removed).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!("the task that removes the sandbox's cgroup failed: {error}"),
            Err(_) => tracing::warn!("failed to remove the sandbox's cgroup in time"),
        }
    }
}

impl CgroupLocation {
    /// Returns the directory that contains the controller's files. Returns `None` if no cgroup v1 hierarchy has the
    /// controller.
    pub fn controller_dir(&self, controller: &str) -> Option<&Path> {
        match self {
            Self::V2(path) => Some(path),
            Self::V1(all) => {
                all.iter().find(|(names, _)| names.iter().any(|name| name == controller)).map(|(_, path)| &**path)
            }
        }
    }

    /// Limits the number of threads of the sandbox's processes to [`MAX_TASKS`].
    ///
    /// Best effort, because the pids controller may be unavailable.
    fn set_max_tasks(&self) {
        let Some(dir) = self.controller_dir("pids") else { return };
        if let Err(error) = std::fs::write(dir.join("pids.max"), MAX_TASKS.to_string()) {
            tracing::warn!(%error, "failed to limit the number of the sandbox's threads on the host");
        }
    }

    /// Returns all directories of the cgroup.
    pub fn dirs(&self) -> impl Iterator<Item = &Path> {
        let (one, all): (Option<&Path>, &[_]) = match self {
            Self::V2(path) => (Some(path), &[]),
            Self::V1(all) => (None, all),
        };
        one.into_iter().chain(all.iter().map(|(_, path): &(Vec<String>, PathBuf)| path.as_path()))
    }
}

fn stop_scope(unit: &Unit) {
    if let Err(error) = unit.stop() {
        tracing::warn!(error = %crate::chain(&error), "failed to stop the systemd scope of the sandbox");
    }
}

/// Creates a directory and its parents. Retries, because another sandbox's shim may remove an empty parent at the same
/// time.
fn create(path: &Path) -> std::io::Result<()> {
    for _ in 1..ATTEMPTS {
        match std::fs::create_dir_all(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            result => return result,
        }
    }
    std::fs::create_dir_all(path)
}

/// Enables all controllers in all ancestors of `path`, as runc does. Without controllers, the cgroup at `path` would
/// not account for resources.
///
/// Ignores errors. The kernel does not let an ancestor that itself has processes enable a domain controller
/// (cgroup-v2.rst, "No Internal Process Constraint").
fn delegate(mount: &Path, path: &Path) {
    let mut parents: Vec<&Path> = path.ancestors().skip(1).take_while(|parent| parent.starts_with(mount)).collect();
    parents.reverse();
    for parent in parents {
        let read = |name| std::fs::read_to_string(parent.join(name)).unwrap_or_default();
        let (has, on) = (read("cgroup.controllers"), read("cgroup.subtree_control"));
        let on: Vec<&str> = on.split_whitespace().collect();
        for controller in has.split_whitespace().filter(|controller| !on.contains(controller)) {
            let _ = std::fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_max_tasks_writes_the_limit_in_the_hierarchy_with_the_pids_controller() {
        let dir = tempfile::tempdir().unwrap();
        let [memory, pids] = ["memory", "pids"].map(|name| {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            (vec![name.to_owned()], dir.path().join(name))
        });
        let limit = |path: &Path| std::fs::read_to_string(path.join("pids.max")).ok();
        CgroupLocation::V1(vec![memory.clone(), pids.clone()]).set_max_tasks();
        assert_eq!((limit(&memory.1), limit(&pids.1).as_deref()), (None, Some("2048")));
        CgroupLocation::V2(memory.1.clone()).set_max_tasks();
        assert_eq!(limit(&memory.1).as_deref(), Some("2048"));
    }

    #[test]
    fn delegate_enables_controllers_in_all_parents() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pods/one/sandbox");
        std::fs::create_dir_all(&path).unwrap();
        let control = |parent: &str| dir.path().join(parent).join("cgroup.subtree_control");
        for parent in ["", "pods", "pods/one", "pods/one/sandbox"] {
            std::fs::write(dir.path().join(parent).join("cgroup.controllers"), "memory\n").unwrap();
            std::fs::write(control(parent), "").unwrap();
        }
        std::fs::write(control(""), "cpu memory\n").unwrap();
        delegate(dir.path(), &path);
        let text = |parent| std::fs::read_to_string(control(parent)).unwrap();
        assert_eq!([text(""), text("pods"), text("pods/one")], ["cpu memory\n", "+memory", "+memory"]);
        assert_eq!(text("pods/one/sandbox"), "");
    }
}
