//! Counts what a node holds: named things (processes, mounts, files …) and numbers (threads, inotify instances …).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use crate::leftovers::{Snapshot, records};

/// Directories of containerd with one entry for each sandbox and container.
const CONTAINERD_DIRS: [&str; 4] = [
    "/run/containerd/io.containerd.grpc.v1.cri/sandboxes",
    "/run/containerd/io.containerd.grpc.v1.cri/containers",
    "/var/lib/containerd/io.containerd.grpc.v1.cri/sandboxes",
    "/var/lib/containerd/io.containerd.grpc.v1.cri/containers",
];

/// Number of additional threads that do not count as leftovers. The runtimes of shims start threads on demand, and
/// these threads end only after some idle time.
const THREADS: u64 = 6;

/// What the node holds at one moment.
#[derive(Debug)]
pub struct Census {
    snapshot: Snapshot,
    /// Entries of [`CONTAINERD_DIRS`], containerd's records, sockets.
    more: BTreeSet<String>,
    /// What the processes hold, without containerd and this process.
    pub held: Held,
}

/// What all processes hold together, without containerd and this process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Held(pub BTreeMap<&'static str, u64>);

impl Census {
    /// Takes a census.
    pub fn take() -> Self {
        let mut more: BTreeSet<String> = records().into_iter().collect();
        for dir in CONTAINERD_DIRS {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                more.insert(format!("path {}", entry.path().display()));
            }
        }
        more.extend(sockets(&fs::read_to_string("/proc/net/unix").unwrap_or_default()));
        Self { snapshot: Snapshot::take(), more, held: Held::count() }
    }

    /// Returns what the node holds in addition to `base`.
    pub fn left_since(&self, base: &Self) -> Vec<String> {
        let mut left = self.snapshot.new_since(&base.snapshot);
        left.extend(self.more.difference(&base.more).cloned());
        for (what, count) in &self.held.0 {
            let before = base.held.0.get(what).copied().unwrap_or_default();
            if *count > before + if *what == "threads" { THREADS } else { 0 } {
                left.push(format!("{count} {what}, {before} before"));
            }
        }
        left
    }
}

/// Returns the sockets with a path under /run that a process has bound. The text is that of /proc/net/unix. Connections
/// to containerd's own sockets are left out, because their number varies.
fn sockets(text: &str) -> BTreeSet<String> {
    let paths = text.lines().filter_map(|line| line.split_whitespace().nth(7));
    let paths = paths.filter(|path| path.starts_with("/run/") && !path.starts_with("/run/containerd/containerd.sock"));
    paths.map(|path| format!("socket {path}")).collect()
}

impl Held {
    /// Counts what the processes hold.
    pub fn count() -> Self {
        let mut counts = BTreeMap::from(
            ["threads", "fds", "inotify instances", "memfds", "BPF links", "taps"].map(|name| (name, 0)),
        );
        let mut namespaces = BTreeSet::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            let dir = entry.path();
            if pid == std::process::id() || !is_counted(&dir) {
                continue;
            }
            let mut add = |what, count| *counts.entry(what).or_default() += count;
            add("threads", fs::read_dir(dir.join("task")).into_iter().flatten().count() as u64);
            if let Ok(namespace) = fs::read_link(dir.join("ns/net")) {
                namespaces.insert(namespace);
            }
            for fd in fs::read_dir(dir.join("fd")).into_iter().flatten().flatten() {
                add("fds", 1);
                let Ok(target) = fs::read_link(fd.path()) else { continue };
                match target.to_string_lossy().as_ref() {
                    "anon_inode:inotify" => add("inotify instances", 1),
                    "anon_inode:bpf_link" | "anon_inode:bpf-link" => add("BPF links", 1),
                    "/dev/net/tun" => add("taps", 1),
                    target if target.starts_with("/memfd:") => add("memfds", 1),
                    _ => {}
                }
            }
        }
        counts.insert("network namespaces of processes", namespaces.len() as u64);
        // The shims open and close fds all the time.
        counts.remove("fds");
        Self(counts)
    }
}

/// Returns whether what the process holds counts: it is no kernel thread, and not containerd.
fn is_counted(dir: &Path) -> bool {
    let comm = fs::read_to_string(dir.join("comm")).unwrap_or_default();
    let kernel = fs::read(dir.join("cmdline")).is_ok_and(|line| line.is_empty());
    !kernel && !matches!(comm.trim(), "containerd" | "ctr" | "sh" | "nsenter" | "ip")
}

/// Returns the number of cgroups that have been removed and that the kernel still keeps.
pub fn dying_cgroups() -> u64 {
    let text = fs::read_to_string("/sys/fs/cgroup/cgroup.stat").unwrap_or_default();
    let value = text.lines().find_map(|line| line.strip_prefix("nr_dying_descendants "));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_shims_are_listed() {
        let text = "Num RefCount Protocol Flags Type St Inode Path\n\
                    0: 2 0 00010000 0001 01 11 /run/containerd/s/abc\n0: 2 0 0 0001 03 12\n\
                    0: 2 0 0 0001 03 13 /run/containerd/containerd.sock.ttrpc\n0: 2 0 0 0001 01 14 @abstract\n";
        assert_eq!(sockets(text).into_iter().collect::<Vec<_>>(), ["socket /run/containerd/s/abc"]);
    }

    #[test]
    fn held_counts_the_threads_of_other_processes() {
        assert!(Held::count().0["threads"] > 0);
    }
}
