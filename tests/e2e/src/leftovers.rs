//! Says what a test left in the node: processes, mounts, directories, cgroups, interfaces, containerd's own records.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::{KUBERNETES, NAMESPACE, node};

/// Directories in which runtimes keep per-container state, with how deep to look.
const STATE: &[(&str, usize)] = &[
    ("/run/husk", 6),
    ("/run/containerd/s", 1),
    ("/run/containerd/fifo", 1),
    ("/run/containerd/io.containerd.runtime.v2.task", 2),
    ("/var/lib/containerd/io.containerd.runtime.v2.task", 2),
    ("/run/containerd/runc", 2),
    ("/run/netns", 1),
    ("/run/ipcns", 1),
    ("/dev/shm", 1),
    // The files of units that were made by asking systemd: they go when systemd forgets the unit.
    ("/run/systemd/transient", 2),
];

/// Cgroups that are not a container's own.
const PARENTS: [&str; 4] = [NAMESPACE, KUBERNETES, "kubepods", "kubepods.slice"];

/// What there was at one moment.
#[derive(Debug)]
pub struct Snapshot {
    things: BTreeSet<String>,
}

impl Snapshot {
    /// Looks at everything.
    pub fn take() -> Self {
        let mut things = BTreeSet::new();
        processes(&mut things);
        mounts(&mut things);
        for (dir, depth) in STATE {
            // The directory itself comes with the first container of a boot and stays.
            entries(Path::new(dir), *depth, &mut things);
        }
        cgroups(Path::new("/sys/fs/cgroup"), &mut things);
        // CNI's bridge comes with the first pod and stays.
        for name in names("/sys/class/net").iter().filter(|name| *name != "cni0") {
            things.insert(format!("interface {name}"));
        }
        loops(&mut things);
        Self { things }
    }

    /// Waits until nothing is there that was not there before.
    ///
    /// # Errors
    /// The list of what is left, and of containerd's records of containers and snapshots if there are any.
    pub fn compare_until_equal(&self, limit: Duration) -> Result<(), String> {
        let mut left = Vec::new();
        let clean = node::eventually(limit, || {
            left = Self::take().things.difference(&self.things).cloned().collect();
            left.is_empty().then_some(())
        });
        let mut text = left.into_iter().fold(String::new(), |mut text, thing| {
            let _ = writeln!(text, "  {thing}");
            text
        });
        for (namespace, kind) in [NAMESPACE, KUBERNETES].into_iter().flat_map(|n| [(n, "containers"), (n, "tasks")]) {
            let output = Command::new("ctr").args(["-n", namespace, kind, "ls", "-q"]).output();
            for id in String::from_utf8_lossy(&output.map(|output| output.stdout).unwrap_or_default()).lines() {
                let _ = writeln!(text, "  containerd still has {kind} {id}");
            }
        }
        if clean.is_some() && text.is_empty() { Ok(()) } else { Err(text) }
    }
}

/// All processes but kernel threads and the suite's own children.
fn processes(things: &mut BTreeSet<String>) {
    for name in names("/proc") {
        let Ok(pid) = name.parse::<u32>() else { continue };
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        let Some((before, after)) = stat.rsplit_once(") ") else { continue };
        let comm = before.split_once('(').map_or("", |(_, comm)| comm);
        let mut fields = after.split_whitespace();
        let (state, parent) = (fields.next().unwrap_or(""), fields.next().unwrap_or(""));
        // Kernel threads are children of kthreadd, pid 2; KVM's own, `kvm-…`, too.
        if parent == "2" || pid == 2 || pid == std::process::id() {
            continue;
        }
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
        if matches!(comm, "ctr" | "containerd") {
            continue;
        }
        things.insert(format!("process {pid} ({comm}, parent {parent}{}): {arguments}", zombie(state)));
    }
}

fn zombie(state: &str) -> &'static str {
    if state == "Z" { ", zombie" } else { "" }
}

/// The mounts of the node and of containerd, whose mount namespace may be its own.
fn mounts(things: &mut BTreeSet<String>) {
    let mut pids = vec!["self".to_owned()];
    for name in names("/proc") {
        if fs::read_to_string(format!("/proc/{name}/comm")).is_ok_and(|comm| comm.trim() == "containerd") {
            pids.push(name);
        }
    }
    for pid in pids {
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
        // A directory per containerd namespace is shared by all containers.
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
            // Those that all containers of a namespace or all pods share stay.
            if !PARENTS.iter().any(|parent| entry.file_name() == *parent) {
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
