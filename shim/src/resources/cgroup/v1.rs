//! cgroup v1: one hierarchy for each controller or group of controllers (Linux, Documentation/admin-guide/cgroup-v1).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::resources::cgroup::CgroupLocation;

/// Interval at which [`wait_until_empty`] reads the cgroup's files. Polling is needed because cgroup v1 has no
/// `cgroup.events`.
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// Files that are empty in a new cpuset cgroup.
const CPUSET: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];

/// For each hierarchy, returns the directory of the sandbox's cgroup, and the directory of this process's current
/// cgroup.
///
/// `mounts` is the text of `/proc/self/mountinfo`. `proc_cgroup` is the text of `/proc/self/cgroup`. `scope` is true if
/// the sandbox's cgroup is a systemd scope. The result then includes the cgroup v2 hierarchy, in which systemd tracks
/// processes.
pub fn locate(mounts: &str, proc_cgroup: &str, relative: &Path, scope: bool) -> (CgroupLocation, Vec<PathBuf>) {
    let (mut all, mut origins) = (Vec::new(), Vec::new());
    let unified = mounts.lines().find_map(|line| hierarchy(line, "cgroup2")).filter(|_| scope);
    if let Some(((point, _), path)) = unified.zip(proc_cgroup.lines().find_map(|line| line.strip_prefix("0::/"))) {
        all.push((Vec::new(), point.join(relative)));
        origins.push(point.join(path));
    }
    for (point, options) in mounts.lines().filter_map(|line| hierarchy(line, "cgroup")) {
        let has = |name: &str| options.split(',').any(|option| option == name);
        // A line has the form hierarchy-ID:controllers:path (cgroups(7)). If a hierarchy has no controllers, the second
        // field contains the hierarchy's name.
        let line = proc_cgroup.lines().find_map(|line| {
            let (names, path) = line.split_once(':')?.1.split_once(':')?;
            (!names.is_empty() && names.split(',').all(has)).then_some((names, path))
        });
        let Some((names, path)) = line else { continue };
        let names: Vec<String> = names.split(',').map(str::to_owned).collect();
        let dir = point.join(relative);
        // If a hierarchy is mounted more than once, use only its first mount.
        if all.iter().all(|(known, _)| *known != names) {
            all.push((names, dir));
            origins.push(point.join(path.trim_start_matches('/')));
        }
    }
    (CgroupLocation::V1(all), origins)
}

/// Returns the mount point and the super options of a mountinfo line. Returns `None` if the file system type is not
/// `kind`.
fn hierarchy<'a>(line: &'a str, kind: &str) -> Option<(PathBuf, &'a str)> {
    let (mount, system) = line.split_once(" - ")?;
    let mut system = system.split(' ');
    if system.next()? != kind {
        return None;
    }
    let options = system.nth(1)?;
    Some((mount.split(' ').nth(4)?.into(), options))
}

/// Copies the parent's CPUs and memory nodes to each new cpuset cgroup between `top` and `path`. Without CPUs and
/// memory nodes, no process can join the cgroup.
pub fn inherit_cpuset(top: &Path, path: &Path) {
    let mut parents: Vec<&Path> = path.ancestors().take_while(|dir| dir.starts_with(top) && *dir != top).collect();
    parents.reverse();
    for pair in parents.windows(2) {
        let [parent, child] = pair else { continue };
        for file in CPUSET {
            let read = |dir: &Path| fs::read_to_string(dir.join(file)).unwrap_or_default();
            if read(child).trim().is_empty() {
                let _ = fs::write(child.join(file), read(parent));
            }
        }
    }
}

/// Waits until the cgroup and the cgroups below it have no processes.
pub fn wait_until_empty(path: &Path, deadline: Instant) -> io::Result<()> {
    while is_populated(path) {
        if Instant::now() >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    Ok(())
}

fn is_populated(path: &Path) -> bool {
    let has_processes = fs::read_to_string(path.join("cgroup.procs")).is_ok_and(|text| !text.trim().is_empty());
    let below = || fs::read_dir(path).into_iter().flatten().flatten();
    has_processes
        || below()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .any(|dir| is_populated(&dir.path()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
30 23 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
32 30 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct
34 30 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
35 30 0:30 / /mnt rw - cgroup cgroup rw,memory";
    const OWN: &str = "4:memory:/\n3:cpu,cpuacct:/system.slice/x\n1:name=systemd:/system.slice/x\n0::/system.slice/x\n";

    #[test]
    fn locate_returns_a_directory_for_every_hierarchy() {
        let (location, origins) = locate(MOUNTS, OWN, Path::new("kubepods/pod"), false);
        let top = Path::new("/sys/fs/cgroup");
        assert_eq!(location.controller_dir("cpuacct"), Some(&*top.join("cpu,cpuacct/kubepods/pod")));
        assert_eq!(location.controller_dir("memory"), Some(&*top.join("memory/kubepods/pod")));
        assert_eq!(location.controller_dir("pids"), None);
        assert_eq!(location.dirs().count(), 3);
        let expected = ["systemd/system.slice/x", "cpu,cpuacct/system.slice/x", "memory/"];
        assert_eq!(origins, expected.map(|path| top.join(path)));
    }

    #[test]
    fn locate_includes_the_cgroup_v2_hierarchy_for_a_scope() {
        let (location, origins) = locate(MOUNTS, OWN, Path::new("a.slice/b.scope"), true);
        let first = (location.dirs().next(), origins.first().map(PathBuf::as_path));
        let top = Path::new("/sys/fs/cgroup/unified");
        assert_eq!(first, (Some(&*top.join("a.slice/b.scope")), Some(&*top.join("system.slice/x"))));
        assert_eq!((location.dirs().count(), origins.len(), location.controller_dir("")), (4, 4, None));
    }

    #[test]
    fn new_cpusets_inherit_from_their_parent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cpuset/a/b");
        fs::create_dir_all(&path).unwrap();
        for below in ["cpuset", "cpuset/a", "cpuset/a/b"] {
            for file in CPUSET {
                fs::write(dir.path().join(below).join(file), if below == "cpuset" { "0-3\n" } else { "\n" }).unwrap();
            }
        }
        inherit_cpuset(dir.path(), &path);
        assert_eq!(fs::read_to_string(path.join("cpuset.mems")).unwrap(), "0-3\n");
    }

    #[test]
    fn wait_until_empty_waits_only_for_processes() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("below")).unwrap();
        let deadline = Instant::now() + Duration::from_millis(20);
        wait_until_empty(dir.path(), deadline).unwrap();
        fs::write(dir.path().join("below/cgroup.procs"), "7\n").unwrap();
        assert!(wait_until_empty(dir.path(), deadline).is_err());
    }
}
