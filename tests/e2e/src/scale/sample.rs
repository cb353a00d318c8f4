//! What the pods of a node take from it: processes, descriptors, memory, kernel objects.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The values of all quantities at one moment, by name.
pub type Values = BTreeMap<&'static str, f64>;

/// File names of the shim's program.
const SHIMS: [&str; 2] = ["containerd-shim-husk-v2", "husk-scale-shim"];
/// Name of the launcher's process.
const LAUNCHER: &str = "husk-launcher";

/// A kind of process that is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A shim.
    Shim,
    /// A shim's launcher.
    Launcher,
    /// A shim's VMM.
    Vmm,
    /// containerd.
    Containerd,
    /// Any other process.
    Other,
}

/// The names of the quantities of one kind of process: descriptors, threads, and PSS in KiB.
const fn names(kind: Kind) -> Option<[&'static str; 3]> {
    match kind {
        Kind::Shim => Some(["fds of the shims", "threads of the shims", "PSS of the shims"]),
        Kind::Launcher => Some(["fds of the launchers", "threads of the launchers", "PSS of the launchers"]),
        Kind::Vmm => Some(["fds of the VMMs", "threads of the VMMs", "PSS of the VMMs"]),
        Kind::Containerd => Some(["fds of containerd", "threads of containerd", "PSS of containerd"]),
        Kind::Other => None,
    }
}

/// The kinds of namespaces, with the names of their quantities.
const NAMESPACES: [(&str, &str); 7] = [
    ("mnt", "mount namespaces"),
    ("pid", "PID namespaces"),
    ("net", "network namespaces"),
    ("ipc", "IPC namespaces"),
    ("uts", "UTS namespaces"),
    ("cgroup", "cgroup namespaces"),
    ("user", "user namespaces"),
];

/// The kinds of open files that are counted: the target of the link in `/proc/PID/fd`, and the quantity.
const FILES: [(&str, &str); 6] = [
    ("anon_inode:inotify", "inotify instances"),
    ("anon_inode:bpf-prog", "BPF programs"),
    ("anon_inode:bpf-map", "BPF maps"),
    ("anon_inode:bpf_link", "BPF links"),
    ("anon_inode:bpf-link", "BPF links"),
    ("/dev/net/tun", "taps"),
];

/// Fields of `/proc/meminfo` whose sum is the kernel's memory.
const KERNEL: [&str; 4] = ["SUnreclaim", "KernelStack", "PageTables", "Percpu"];

/// A process.
#[derive(Debug)]
pub struct Process {
    /// `/proc/PID`.
    pub dir: PathBuf,
    /// What the process is.
    pub kind: Kind,
}

impl Process {
    /// Returns all processes except kernel threads and this process.
    pub fn all() -> Vec<Self> {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|pid| *pid != std::process::id())
            .filter_map(|pid| Self::read(format!("/proc/{pid}").into()))
            .collect()
    }

    fn read(dir: PathBuf) -> Option<Self> {
        // The link of a kernel thread cannot be read.
        let exe = fs::read_link(dir.join("exe")).ok()?;
        let exe = exe.file_name()?.to_string_lossy().trim_end_matches(" (deleted)").to_owned();
        let kind = if SHIMS.contains(&exe.as_str()) {
            let vmm = fs::read(dir.join("cmdline")).unwrap_or_default().starts_with(b"husk-vmm\0");
            let launcher = text(dir.join("comm")).trim() == LAUNCHER;
            if vmm {
                Kind::Vmm
            } else if launcher {
                Kind::Launcher
            } else {
                Kind::Shim
            }
        } else if exe == "containerd" {
            Kind::Containerd
        } else {
            Kind::Other
        };
        Some(Self { dir, kind })
    }

    /// Returns the soft limit of open files.
    pub fn fd_limit(&self) -> Option<f64> {
        let limits = text(self.dir.join("limits"));
        let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
        line.split_whitespace().next()?.parse().ok()
    }
}

/// Measures all quantities.
pub fn take() -> Values {
    let mut values = Values::new();
    processes(&Process::all(), &mut values);
    node(&mut values);
    values
}

/// Counts what these processes hold.
pub fn processes(all: &[Process], values: &mut Values) {
    let kinds = [Kind::Shim, Kind::Launcher, Kind::Vmm, Kind::Containerd];
    let own = kinds.into_iter().filter_map(names).flatten();
    let kernel = FILES.map(|(_, name)| name).into_iter().chain(["inotify watches", "epoll watches"]);
    for name in own.chain(kernel).chain(["most fds of a shim", "most mounts of a shim", "most mounts of a VMM"]) {
        values.insert(name, 0.0);
    }
    let mut namespaces = NAMESPACES.map(|_| HashSet::new());
    // A shim has two descriptors of its inotify instance. Descriptors of one process with the same watches count once.
    let mut instances = BTreeSet::new();
    for process in all {
        let mut fds = 0.0;
        for fd in fs::read_dir(process.dir.join("fd")).into_iter().flatten().flatten() {
            fds += 1.0;
            let Ok(target) = fs::read_link(fd.path()) else { continue };
            let target = target.to_string_lossy();
            let info = || text(process.dir.join("fdinfo").join(fd.file_name()));
            if let Some((_, name)) = FILES.iter().find(|(file, _)| *file == target) {
                if *name == "inotify instances" {
                    let info = info();
                    let watches: Vec<&str> = info.lines().filter(|line| line.starts_with("inotify ")).collect();
                    if !instances.insert((process.dir.clone(), watches.join("\n"))) {
                        continue;
                    }
                    add(values, "inotify watches", watches.len() as f64);
                }
                add(values, name, 1.0);
            } else if target == "anon_inode:[eventpoll]" {
                let watches = info().lines().filter(|line| line.starts_with("tfd:")).count();
                add(values, "epoll watches", watches as f64);
            }
        }
        for ((kind, _), found) in NAMESPACES.iter().zip(&mut namespaces) {
            found.extend(fs::read_link(process.dir.join("ns").join(kind)));
        }
        let Some([fd_name, thread_name, pss_name]) = names(process.kind) else { continue };
        add(values, fd_name, fds);
        add(values, thread_name, fs::read_dir(process.dir.join("task")).into_iter().flatten().count() as f64);
        add(values, pss_name, field(&text(process.dir.join("smaps_rollup")), "Pss"));
        let mounts = || text(process.dir.join("mountinfo")).lines().count() as f64;
        match process.kind {
            Kind::Shim => {
                most(values, "most fds of a shim", fds);
                most(values, "most mounts of a shim", mounts());
            }
            Kind::Vmm => most(values, "most mounts of a VMM", mounts()),
            Kind::Launcher | Kind::Containerd | Kind::Other => {}
        }
    }
    for ((_, name), found) in NAMESPACES.iter().zip(&namespaces) {
        values.insert(name, found.len() as f64);
    }
}

/// Counts what the kernel reports for the whole node.
fn node(values: &mut Values) {
    let meminfo = text("/proc/meminfo");
    let kernel: f64 = KERNEL.iter().map(|name| field(&meminfo, name)).sum();
    values.insert("kernel memory", kernel);
    values.insert("memory in use", field(&meminfo, "MemTotal") - field(&meminfo, "MemAvailable"));
    values.insert("mounts of the node", text("/proc/self/mountinfo").lines().count() as f64);
    // Number of tasks: the second number of the fourth field.
    let tasks = text("/proc/loadavg");
    let tasks = tasks.split_whitespace().nth(3).and_then(|field| field.split_once('/')?.1.parse().ok());
    values.insert("threads of the node", tasks.unwrap_or_default());
    values.insert("open files of the node", number_at("/proc/sys/fs/file-nr", 0));
    values.insert("asynchronous I/O requests", number_at("/proc/sys/fs/aio-nr", 0));
    values.insert("Unix sockets", text("/proc/net/unix").lines().count().saturating_sub(1) as f64);
    values.insert("interfaces of the node", fs::read_dir("/sys/class/net").into_iter().flatten().count() as f64);
    values
        .insert("ports of CNI's bridge", fs::read_dir("/sys/class/net/cni0/brif").into_iter().flatten().count() as f64);
    values.insert("IPv4 neighbours", neighbours("/proc/net/stat/arp_cache"));
    values.insert("IPv6 neighbours", neighbours("/proc/net/stat/ndisc_cache"));
    let keys = text("/proc/key-users");
    let keys = keys.lines().find_map(|line| line.trim_start().strip_prefix("0:")?.split_whitespace().nth(1));
    let keys = keys.and_then(|keys| keys.split_once('/')?.0.parse().ok());
    values.insert("keys of root", keys.unwrap_or_default());
    let cgroups = text("/proc/cgroups");
    let memory = cgroups.lines().find_map(|line| line.strip_prefix("memory\t")?.split_whitespace().nth(1));
    values.insert("memory cgroups", memory.and_then(|number| number.parse().ok()).unwrap_or_default());
    values.insert("cgroups", directories(Path::new("/sys/fs/cgroup")));
    values.insert("tasks of kubepods", number_at("/sys/fs/cgroup/kubepods/pids.current", 0));
}

fn add(values: &mut Values, name: &'static str, value: f64) {
    *values.entry(name).or_default() += value;
}

fn most(values: &mut Values, name: &'static str, value: f64) {
    let most = values.entry(name).or_default();
    *most = most.max(value);
}

fn text(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Returns a field of a text such as `/proc/meminfo`, in KiB.
fn field(text: &str, name: &str) -> f64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.and_then(|value| value.split_whitespace().next()?.parse().ok()).unwrap_or_default()
}

/// Returns the number at a position of a file of numbers. 0 if the file is missing or has another text, such as `max`.
pub fn number_at(path: &str, position: usize) -> f64 {
    text(path).split_whitespace().nth(position).and_then(|number| number.parse().ok()).unwrap_or_default()
}

/// Returns the number of entries in a neighbour table. The kernel has one table for all network namespaces.
fn neighbours(path: &str) -> f64 {
    let entries = text(path);
    let entries = entries.lines().nth(1).and_then(|line| line.split_whitespace().next());
    entries.and_then(|entries| u64::from_str_radix(entries, 16).ok()).unwrap_or_default() as f64
}

/// Returns the number of directories below `dir` on the same file system.
fn directories(dir: &Path) -> f64 {
    fn count(dir: &Path, device: u64) -> f64 {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let directories =
            entries.filter(|entry| entry.metadata().is_ok_and(|data| data.is_dir() && data.dev() == device));
        directories.map(|entry| 1.0 + count(&entry.path(), device)).sum()
    }
    fs::metadata(dir).map_or(0.0, |data| count(dir, data.dev()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_quantity_of_a_line_is_measured() {
        let values = take();
        for name in super::super::QUANTITIES.iter().map(|quantity| quantity.name) {
            assert!(values.contains_key(name), "{name} is not measured");
        }
        assert!(values["threads of the node"] > 1.0 && values["mounts of the node"] > 0.0);
        assert!(values["memory in use"] > 0.0 && values["network namespaces"] >= 1.0);
    }

    #[test]
    fn process_of_this_machine_is_classified() {
        let this = Process::read("/proc/self".into()).unwrap();
        assert_eq!(this.kind, Kind::Other);
        assert!(this.fd_limit().is_none_or(|limit| limit > 0.0));
    }
}
