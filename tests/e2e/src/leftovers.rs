//! Finds leftovers of a test on the node: processes, mounts, directories, cgroups, interfaces, loop devices and
//! containerd's records.

use std::collections::{BTreeSet, HashSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::{KUBERNETES, NAMESPACE, containerd, node};

/// Directories in which runtimes keep per-container state, and the depth to which each directory is searched.
const STATE_DIRS: &[(&str, usize)] = &[
    ("/run/husk", 6),
    ("/run/containerd/s", 1),
    ("/run/containerd/fifo", 1),
    ("/run/containerd/io.containerd.runtime.v2.task", 2),
    ("/var/lib/containerd/io.containerd.runtime.v2.task", 2),
    ("/run/containerd/runc", 2),
    ("/run/netns", 1),
    ("/run/ipcns", 1),
    ("/dev/shm", 1),
    // Unit files of transient units. systemd removes each file when it unloads the unit.
    ("/run/systemd/transient", 2),
];

/// Cgroups that several containers share.
const SHARED_CGROUPS: [&str; 4] = [NAMESPACE, KUBERNETES, "kubepods", "kubepods.slice"];

/// Timeout for containerd to remove its records of containers and tasks. A [`Snapshot`] does not include these records.
/// Therefore, a record that a failed test leaves behind also makes all later tests fail. The timeout is short, because
/// each of these tests waits for its expiry.
const RECORDS_TIMEOUT: Duration = Duration::from_secs(2);

/// State of the node at one moment.
#[derive(Debug)]
pub struct Snapshot {
    things: BTreeSet<String>,
}

impl Snapshot {
    /// Records the node's current state.
    pub fn take() -> Self {
        let mut things = BTreeSet::new();
        let all = user_processes();
        processes(&all, &mut things);
        mounts(&all, &mut things);
        for (dir, depth) in STATE_DIRS {
            // Only the directory's entries are recorded. The directory itself is no leftover: it is created with the
            // first container after boot, and stays.
            entries(Path::new(dir), *depth, &mut things);
        }
        cgroups(Path::new("/sys/fs/cgroup"), &mut things);
        // CNI's bridge is no leftover: it is created with the first pod, and stays.
        for name in names("/sys/class/net").iter().filter(|name| *name != "cni0") {
            things.insert(format!("interface {name}"));
        }
        loops(&mut things);
        Self { things }
    }

    /// Returns what this snapshot contains in addition to `earlier`.
    pub fn new_since(&self, earlier: &Self) -> Vec<String> {
        self.things.difference(&earlier.things).cloned().collect()
    }

    /// Waits until the node's state contains nothing in addition to the snapshot, and containerd has neither containers
    /// nor tasks.
    ///
    /// # Errors
    /// The list of leftovers.
    pub fn compare_until_equal(&self, limit: Duration) -> Result<(), String> {
        let mut left: Vec<String> = Vec::new();
        node::eventually(limit, || {
            left = Self::take().new_since(self);
            left.is_empty().then_some(())
        });
        let mut listed = Vec::new();
        node::eventually(RECORDS_TIMEOUT, || {
            listed = records();
            listed.is_empty().then_some(())
        });
        left.extend(listed);
        let text = left.iter().fold(String::new(), |mut text, thing| {
            let _ = writeln!(text, "  {thing}");
            text
        });
        if text.is_empty() { Ok(()) } else { Err(text) }
    }
}

/// Returns the containers and tasks that containerd still has in the suites' namespaces.
pub fn records() -> Vec<String> {
    let mut all = Vec::new();
    for namespace in [NAMESPACE, KUBERNETES] {
        match containerd::containers(namespace) {
            Ok(ids) => all.extend(ids.iter().map(|id| format!("containerd still has the container {id}"))),
            Err(status) => all.push(format!("failed to list containerd's containers in {namespace}: {status}")),
        }
        match containerd::tasks(namespace) {
            Ok(tasks) => all.extend(tasks.iter().map(|task| format!("containerd still has the task {}", task.id))),
            Err(status) => all.push(format!("failed to list containerd's tasks in {namespace}: {status}")),
        }
    }
    all
}

/// A process that is not a kernel thread.
struct Process {
    pid: u32,
    comm: String,
    state: String,
    parent: String,
}

impl Process {
    /// Reads /proc/PID/stat. Returns `None` if the process has ended.
    fn read(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (before, after) = stat.rsplit_once(") ")?;
        let comm = before.split_once('(').map_or("", |(_, comm)| comm).to_owned();
        let mut fields = after.split_whitespace().map(str::to_owned);
        Some(Self { pid, comm, state: fields.next()?, parent: fields.next()? })
    }
}

/// Returns all processes except kernel threads.
fn user_processes() -> Vec<Process> {
    // Kernel threads, including KVM's `kvm-…` threads, are children of kthreadd, pid 2. Most pids of the node belong to
    // kernel threads. If the kernel provides kthreadd's file `children`, this file lists these pids. In this case, the
    // function need not read a file for each kernel thread.
    let kernel = fs::read_to_string("/proc/2/task/2/children").unwrap_or_default();
    let kernel: HashSet<&str> = kernel.split_whitespace().chain(["2"]).collect();
    let names = names("/proc");
    let others = names.iter().filter(|name| !kernel.contains(name.as_str())).filter_map(|name| name.parse().ok());
    others.filter_map(Process::read).filter(|process| process.parent != "2").collect()
}

/// Lists all processes except containerd, `ctr` and this process.
fn processes(all: &[Process], things: &mut BTreeSet<String>) {
    for Process { pid, comm, state, parent } in all {
        if *pid == std::process::id() || matches!(comm.as_str(), "ctr" | "containerd") {
            continue;
        }
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
        let zombie = if state == "Z" { ", zombie" } else { "" };
        things.insert(format!("process {pid} ({comm}, parent {parent}{zombie}): {arguments}"));
    }
}

/// Lists the mounts of the node and of containerd, which may have its own mount namespace.
fn mounts(all: &[Process], things: &mut BTreeSet<String>) {
    let containerds = all.iter().filter(|process| process.comm == "containerd").map(|process| process.pid);
    for pid in containerds.chain([std::process::id()]) {
        for line in fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default().lines() {
            if let Some(point) = line.split(' ').nth(4) {
                things.insert(format!("mount {point}"));
            }
        }
    }
}

fn entries(dir: &Path, depth: usize, things: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        // The directory of a containerd namespace is no leftover, because all containers of the namespace share it.
        if path.file_name().is_some_and(|name| name != NAMESPACE && name != KUBERNETES) {
            things.insert(format!("path {}", path.display()));
        }
        if is_dir && depth > 1 {
            entries(&path, depth - 1, things);
        }
    }
}

fn cgroups(dir: &Path, things: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            // Shared cgroups are not leftovers.
            if !SHARED_CGROUPS.iter().any(|parent| entry.file_name() == *parent) {
                things.insert(format!("cgroup {}", entry.path().display()));
            }
            cgroups(&entry.path(), things);
        }
    }
}

fn loops(things: &mut BTreeSet<String>) {
    for name in names("/sys/block") {
        if let Ok(file) = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")) {
            things.insert(format!("loop device {name} on {}", file.trim()));
        }
    }
}

fn names(dir: &str) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_processes_do_not_include_kernel_threads() {
        let found = user_processes();
        assert!(found.iter().any(|process| process.pid == std::process::id() && process.state != "Z"));
        assert!(found.iter().all(|process| process.pid != 2 && process.parent != "2"));
        let init = found.iter().find(|process| process.pid == 1).unwrap();
        assert_eq!(init.comm, fs::read_to_string("/proc/1/comm").unwrap().trim());
    }
}
