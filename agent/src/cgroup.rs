//! The guest's cgroup v2 hierarchy: its root, and the files of each container's cgroup.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// Mount point of the hierarchy.
pub const MOUNT: &str = "/sys/fs/cgroup";
/// Parent cgroup of all containers.
const PARENT: &str = "husk";

/// The kernel's default for the number of PIDs (`PID_MAX_DEFAULT` in include/linux/threads.h).
const DEFAULT_PID_MAX: u64 = 32768;
/// Directory with the kernel's limits of PIDs and threads.
const LIMITS: &str = "/proc/sys/kernel";
/// Maximum number of the guest's processes and threads that containers cannot use.
const MAX_RESERVED_PIDS: u64 = 1024;

/// Creates the parent cgroup of all containers and enables all controllers for it and its children. Limits the number
/// of processes and threads in all containers, so that the agent can always start threads and helpers. The async
/// runtime panics if it cannot start the first thread of its blocking pool.
pub fn init_root() -> io::Result<()> {
    let limits = Path::new(LIMITS);
    if let Err(error) = add_reserve(limits) {
        tracing::warn!("failed to raise kernel.threads-max: {error}");
    }
    init_hierarchy(Path::new(MOUNT), pids_for_containers(limits))
}

fn init_hierarchy(root: &Path, pids_max: u64) -> io::Result<()> {
    let parent = root.join(PARENT);
    let controllers = fs::read_to_string(root.join("cgroup.controllers"))?;
    let all: String = controllers.split_whitespace().flat_map(|name| ["+", name, " "]).collect();
    fs::write(root.join("cgroup.subtree_control"), &all)?;
    fs::create_dir_all(&parent)?;
    fs::write(parent.join("cgroup.subtree_control"), &all)?;
    fs::write(parent.join("pids.max"), pids_max.to_string())
}

/// Limits the total number of processes and threads in all containers.
pub fn limit_pids(max: u64) -> io::Result<()> {
    fs::write(
        Path::new(MOUNT).join(PARENT).join("pids.max"),
        max.min(pids_for_containers(Path::new(LIMITS))).to_string(),
    )
}

/// Raises the kernel's limit of threads by the reserve of the agent, so that containers keep what they would have
/// without the reserve. The kernel derives its limit from the guest's memory. A small guest has about 1000 threads.
fn add_reserve(limits: &Path) -> io::Result<()> {
    let path = limits.join("threads-max");
    let max: u64 = fs::read_to_string(&path)?.trim().parse().map_err(io::Error::other)?;
    fs::write(path, max.saturating_add((max / 4).min(MAX_RESERVED_PIDS)).to_string())
}

/// Returns the number of processes and threads that containers can use.
fn pids_for_containers(limits: &Path) -> u64 {
    let limit = |name: &str| fs::read_to_string(limits.join(name)).ok()?.trim().parse().ok();
    let limits = ["threads-max", "pid_max"].into_iter().filter_map(limit);
    without_reserve(limits.min().unwrap_or(DEFAULT_PID_MAX))
}

/// Subtracts the reserve of the agent from the kernel's limit. This is the inverse of [`add_reserve`].
fn without_reserve(limit: u64) -> u64 {
    limit - (limit / 5).min(MAX_RESERVED_PIDS)
}

/// Cgroup of one container.
#[derive(Debug, Clone)]
pub struct Cgroup {
    root: PathBuf,
    name: PathBuf,
    path: PathBuf,
}

impl Cgroup {
    /// Returns the cgroup of container `id` in the hierarchy with the root `root`. The cgroup need not exist. Tests
    /// pass an ordinary directory.
    pub fn below(root: &Path, id: &str) -> Self {
        let name = Path::new("/").join(PARENT).join(id);
        Self { path: root.join(PARENT).join(id), name, root: root.to_owned() }
    }

    /// Creates the cgroup. Also succeeds if the cgroup already exists.
    pub fn create(&self) -> io::Result<()> {
        match fs::create_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }

    /// Root directory of the hierarchy.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Path of the cgroup below the hierarchy's root, in the form of OCI's `cgroupsPath`.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// Directory of the cgroup.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads a file of the cgroup.
    pub fn read(&self, file: &str) -> io::Result<String> {
        fs::read_to_string(self.path.join(file))
    }

    /// Writes a file of the cgroup.
    pub fn write(&self, file: &str, value: &str) -> io::Result<()> {
        fs::write(self.path.join(file), value)
    }

    /// Reads a file of `key value` lines. Returns an empty map if the file cannot be read.
    pub fn table(&self, file: &str) -> BTreeMap<String, u64> {
        self.read(file).map(|text| parse_table(&text)).unwrap_or_default()
    }

    /// Number of processes of this cgroup that the OOM killer has killed.
    pub fn oom_kills(&self) -> u64 {
        self.table("memory.events").get("oom_kill").copied().unwrap_or(0)
    }

    /// Returns the PIDs in this cgroup and in its descendants. A container can create descendants.
    pub fn pids(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        self.for_each_cgroup(&mut |path| {
            if let Ok(text) = fs::read_to_string(path.join("cgroup.procs")) {
                pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0));
            }
        });
        pids
    }

    /// Kills all processes of the cgroup.
    pub fn kill(&self) -> io::Result<()> {
        self.write("cgroup.kill", "1")
    }

    /// Starts to freeze or to thaw all processes. `cgroup.events` reports when all processes are frozen or thawed.
    pub fn freeze(&self, frozen: bool) -> io::Result<()> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })
    }

    /// Whether all processes are frozen.
    pub fn is_frozen(&self) -> bool {
        self.table("cgroup.events").get("frozen") == Some(&1)
    }

    /// Whether the cgroup or a descendant contains a process.
    pub fn is_populated(&self) -> bool {
        self.table("cgroup.events").get("populated") == Some(&1)
    }

    /// Removes the cgroup and its descendants. Fails with EBUSY while any of these cgroups contains a process.
    pub fn remove(&self) -> io::Result<()> {
        let mut groups = Vec::new();
        self.for_each_cgroup(&mut |path| groups.push(path.to_owned()));
        for path in groups.iter().rev() {
            match fs::remove_dir(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Calls `visit` for this cgroup and all descendants, parents first.
    fn for_each_cgroup(&self, visit: &mut dyn FnMut(&Path)) {
        let mut queue = vec![self.path.clone()];
        while let Some(path) = queue.pop() {
            visit(&path);
            let Ok(entries) = fs::read_dir(&path) else { continue };
            queue.extend(
                entries.flatten().filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()),
            );
        }
    }
}

/// Parses lines of the form `key value`. Skips other lines.
pub fn parse_table(text: &str) -> BTreeMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_hierarchy_reserves_pids_for_the_agent() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("cgroup.controllers"), "memory pids\n").unwrap();
        init_hierarchy(root.path(), without_reserve(32768)).unwrap();
        let parent = root.path().join(PARENT);
        assert_eq!(fs::read_to_string(parent.join("cgroup.subtree_control")).unwrap(), "+memory +pids ");
        assert_eq!(fs::read_to_string(parent.join("pids.max")).unwrap(), "31744");
        assert_eq!(without_reserve(0), 0);
        let kernel: u64 = fs::read_to_string("/proc/sys/kernel/pid_max").unwrap().trim().parse().unwrap();
        assert!(pids_for_containers(Path::new(LIMITS)) < kernel);
    }

    #[test]
    fn reserve_does_not_take_threads_from_the_containers_of_a_small_guest() {
        let limits = tempfile::tempdir().unwrap();
        let threads = limits.path().join("threads-max");
        fs::write(limits.path().join("pid_max"), "32768\n").unwrap();
        for (at_boot, raised, containers) in [
            ("1003\n", "1253", 1003),
            ("1024\n", "1280", 1024),
            ("4100\n", "5124", 4100),
            ("7000\n", "8024", 7000),
            ("63000\n", "64024", 31744),
        ] {
            fs::write(&threads, at_boot).unwrap();
            add_reserve(limits.path()).unwrap();
            assert_eq!(fs::read_to_string(&threads).unwrap(), raised);
            assert_eq!(pids_for_containers(limits.path()), containers);
        }
    }

    #[test]
    fn parse_table_skips_malformed_lines() {
        let table = parse_table("anon 12\nfile 0\nbroken\nmax max\n");
        assert_eq!(table.get("anon"), Some(&12));
        assert_eq!(table.len(), 2);
    }
}
