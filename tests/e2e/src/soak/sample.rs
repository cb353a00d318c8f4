//! What a soak measures after each life.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::chaos::census::{Held, dying_cgroups};
use crate::cri::restart;

/// Directories whose files are counted.
const DIRS: [(&str, &str); 8] = [
    ("files in /run/husk", "/run/husk"),
    ("files in /run/containerd", "/run/containerd"),
    ("files of containerd's CRI", "/var/lib/containerd/io.containerd.grpc.v1.cri"),
    ("files of containerd's tasks", "/var/lib/containerd/io.containerd.runtime.v2.task"),
    ("files in /run/netns", "/run/netns"),
    ("files in /dev/shm", "/dev/shm"),
    ("files in /tmp", "/tmp"),
    ("files of CNI", "/var/lib/cni"),
];

/// Fields of /proc/meminfo that together are the memory in use, except for the page cache.
const MEMORY: [&str; 6] = ["AnonPages", "SUnreclaim", "KernelStack", "PageTables", "Percpu", "Shmem"];

/// Size of a page.
const PAGE_KIB: u64 = 4;

/// The integer resources and the memory of the node, in KiB, after one life.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sample {
    /// Integer resources.
    pub numbers: BTreeMap<String, u64>,
    /// Memory in KiB.
    pub memory: BTreeMap<String, u64>,
    /// Memory of each slab cache, in KiB. It is not judged, and shows what the slab consists of.
    pub slabs: BTreeMap<String, u64>,
}

impl Sample {
    /// Measures. `dying` is the last number of dying cgroups that [`after_reclaim`] has returned.
    pub fn take(dying: u64) -> Self {
        let mut numbers: BTreeMap<String, u64> = BTreeMap::new();
        numbers.extend(Held::count().0.into_iter().map(|(name, count)| (name.to_owned(), count)));
        numbers.insert("dying cgroups".to_owned(), dying);
        numbers.insert("cgroups".to_owned(), directories(Path::new("/sys/fs/cgroup")));
        numbers.insert("mounts".to_owned(), lines("/proc/self/mountinfo"));
        numbers.insert("interfaces".to_owned(), entries("/sys/class/net"));
        numbers.insert("loop devices in use".to_owned(), loops());
        numbers.insert("processes".to_owned(), processes());
        numbers.insert("bound Unix sockets".to_owned(), bound_sockets());
        numbers.insert("tracked connections".to_owned(), number("/proc/sys/net/netfilter/nf_conntrack_count"));
        for (name, dir) in DIRS {
            numbers.insert(name.to_owned(), files(Path::new(dir)));
        }
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let field = |name: &str| field(&meminfo, name);
        let own: u64 = [Some(std::process::id().cast_signed()), restart::containerd_pid()]
            .into_iter()
            .flatten()
            .map(anonymous)
            .sum();
        let used: u64 = MEMORY.iter().map(|name| field(name)).sum();
        let memory = BTreeMap::from([
            ("memory in use without containerd and page cache".to_owned(), used.saturating_sub(own)),
            ("unreclaimable slab".to_owned(), field("SUnreclaim")),
            ("unevictable".to_owned(), field("Unevictable")),
        ]);
        let slabs = slabs(&fs::read_to_string("/proc/slabinfo").unwrap_or_default());
        Self { numbers, memory, slabs }
    }
}

/// Drops caches, and returns the number of dying cgroups afterwards. The kernel keeps a removed cgroup as long as the
/// page cache has pages that were charged to it.
pub fn after_reclaim() -> u64 {
    if let Err(error) = fs::write("/proc/sys/vm/drop_caches", "3") {
        eprintln!("failed to drop caches: {error}");
    }
    dying_cgroups()
}

/// Returns a field of /proc/meminfo or /proc/PID/status, in KiB.
fn field(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.and_then(|value| value.split_whitespace().next()?.parse().ok()).unwrap_or_default()
}

/// Anonymous memory of a process, in KiB.
fn anonymous(pid: i32) -> u64 {
    field(&fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default(), "RssAnon")
}

/// Returns the memory of each slab cache in KiB, from /proc/slabinfo.
fn slabs(text: &str) -> BTreeMap<String, u64> {
    let of_line = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
        // `<pagesperslab>` and `<num_slabs>` of proc(5).
        Some((fields.first()?.to_string(), number(5)? * number(14)? * PAGE_KIB))
    };
    text.lines().filter_map(of_line).collect()
}

fn lines(path: &str) -> u64 {
    fs::read_to_string(path).unwrap_or_default().lines().count() as u64
}

fn number(path: &str) -> u64 {
    fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or_default()
}

fn entries(dir: &str) -> u64 {
    fs::read_dir(dir).into_iter().flatten().count() as u64
}

fn directories(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    directories.map(|entry| 1 + self::directories(&entry.path())).sum()
}

fn files(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| if entry.file_type().is_ok_and(|kind| kind.is_dir()) { 1 + files(&entry.path()) } else { 1 })
        .sum()
}

fn loops() -> u64 {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    devices.filter(|device| device.path().join("loop/backing_file").exists()).count() as u64
}

/// Number of processes, without kernel threads. The kernel starts and ends its threads as it needs them.
fn processes() -> u64 {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter(|entry| fs::read(entry.path().join("cmdline")).is_ok_and(|line| !line.is_empty())).count() as u64
}

/// Number of bound Unix sockets in the file system. Abstract and unbound sockets are mostly containerd's connections.
fn bound_sockets() -> u64 {
    let text = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    text.lines().filter(|line| line.split_whitespace().nth(7).is_some_and(|path| path.starts_with("/run/husk"))).count()
        as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read() {
        assert_eq!(field("MemTotal:  6 kB\nSlab: 12 kB\n", "Slab"), 12);
        assert_eq!(field("Slabs: 12 kB\n", "Slab"), 0);
    }

    #[test]
    fn slabs_are_read() {
        let text = "slabinfo - version: 2.1\n# name <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab> : \
                    tunables <limit> <batchcount> <sharedfactor> : slabdata <active_slabs> <num_slabs> <sharedavail>\n\
                    kmalloc-1k 900 960 1024 32 8 : tunables 0 0 0 : slabdata 30 30 0\n";
        assert_eq!(slabs(text), BTreeMap::from([("kmalloc-1k".to_owned(), 960)]));
    }

    #[test]
    fn sample_has_the_resources_of_this_machine() {
        let sample = Sample::take(0);
        assert!(sample.numbers["processes"] > 0 && sample.numbers["mounts"] > 0);
        assert!(sample.memory["memory in use without containerd and page cache"] > 0);
    }
}
