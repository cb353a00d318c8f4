//! Reads the metrics of a cgroup (cgroup v2) in the form of containerd's `io.containerd.cgroups.v2.Metrics`.
//!
//! The cgroup belongs to a container in the guest, or to a sandbox on the host.

use std::collections::BTreeMap;
use std::path::Path;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats, PidsStat,
};
use protobuf::MessageField;

/// A cgroup, identified by its directory.
struct Cgroup<'a>(&'a Path);

impl Cgroup<'_> {
    fn read(&self, file: &str) -> Option<String> {
        std::fs::read_to_string(self.0.join(file)).ok()
    }

    /// Reads a file that holds a single number. Returns `None` if the file is missing or holds anything else, such as
    /// `max`.
    fn number(&self, file: &str) -> Option<u64> {
        self.read(file)?.trim().parse().ok()
    }

    /// Reads a limit. Returns `u64::MAX` if the cgroup has no limit, like containerd's own reader.
    fn limit(&self, file: &str) -> u64 {
        self.number(file).unwrap_or(u64::MAX)
    }

    /// Reads a flat keyed file (`key value` lines). Other lines are skipped.
    fn table(&self, file: &str) -> BTreeMap<String, u64> {
        let text = self.read(file).unwrap_or_default();
        let pairs = text.lines().filter_map(|line| line.split_once(' '));
        pairs.filter_map(|(key, value)| Some((key.to_owned(), value.trim().parse().ok()?))).collect()
    }
}

/// Type URL of the metrics in containerd's API.
pub const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// Reads the metrics of the cgroup at `path`. If a controller is absent, its values are zero. If the memory
/// controller is absent, its limits are `u64::MAX` instead. The call is cheap, because it reads only a few files.
pub fn read(path: &Path) -> Metrics {
    let cgroup = &Cgroup(path);
    Metrics {
        pids: MessageField::some(PidsStat {
            current: cgroup.number("pids.current").unwrap_or(0),
            // As in containerd's own reader, "no limit" is 0 for tasks but `u64::MAX` for memory and huge pages.
            limit: cgroup.number("pids.max").unwrap_or(0),
            ..Default::default()
        }),
        cpu: MessageField::some(cpu(cgroup)),
        memory: MessageField::some(memory(cgroup)),
        io: MessageField::some(IOStat {
            usage: parse_io(&cgroup.read("io.stat").unwrap_or_default()),
            psi: psi(cgroup, "io.pressure"),
            ..Default::default()
        }),
        hugetlb: huge_pages(cgroup),
        memory_events: MessageField::some(memory_events(cgroup)),
        ..Default::default()
    }
}

fn cpu(cgroup: &Cgroup<'_>) -> CPUStat {
    let table = cgroup.table("cpu.stat");
    let get = |key| value(&table, key);
    CPUStat {
        usage_usec: get("usage_usec"),
        user_usec: get("user_usec"),
        system_usec: get("system_usec"),
        nr_periods: get("nr_periods"),
        nr_throttled: get("nr_throttled"),
        throttled_usec: get("throttled_usec"),
        nr_bursts: get("nr_bursts"),
        burst_usec: get("burst_usec"),
        psi: psi(cgroup, "cpu.pressure"),
        ..Default::default()
    }
}

fn memory(cgroup: &Cgroup<'_>) -> MemoryStat {
    let table = cgroup.table("memory.stat");
    let get = |key| value(&table, key);
    MemoryStat {
        anon: get("anon"),
        file: get("file"),
        kernel_stack: get("kernel_stack"),
        slab: get("slab"),
        sock: get("sock"),
        shmem: get("shmem"),
        file_mapped: get("file_mapped"),
        file_dirty: get("file_dirty"),
        file_writeback: get("file_writeback"),
        anon_thp: get("anon_thp"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        slab_reclaimable: get("slab_reclaimable"),
        slab_unreclaimable: get("slab_unreclaimable"),
        pgfault: get("pgfault"),
        pgmajfault: get("pgmajfault"),
        // Since Linux 5.9, the kernel counts these events separately for anonymous memory and for files.
        workingset_refault: get("workingset_refault_anon") + get("workingset_refault_file"),
        workingset_activate: get("workingset_activate_anon") + get("workingset_activate_file"),
        workingset_nodereclaim: get("workingset_nodereclaim"),
        pgrefill: get("pgrefill"),
        pgscan: get("pgscan"),
        pgsteal: get("pgsteal"),
        pgactivate: get("pgactivate"),
        pgdeactivate: get("pgdeactivate"),
        pglazyfree: get("pglazyfree"),
        pglazyfreed: get("pglazyfreed"),
        thp_fault_alloc: get("thp_fault_alloc"),
        thp_collapse_alloc: get("thp_collapse_alloc"),
        usage: cgroup.number("memory.current").unwrap_or(0),
        usage_limit: cgroup.limit("memory.max"),
        swap_usage: cgroup.number("memory.swap.current").unwrap_or(0),
        swap_limit: cgroup.limit("memory.swap.max"),
        max_usage: cgroup.number("memory.peak").unwrap_or(0),
        swap_max_usage: cgroup.number("memory.swap.peak").unwrap_or(0),
        psi: psi(cgroup, "memory.pressure"),
        ..Default::default()
    }
}

fn memory_events(cgroup: &Cgroup<'_>) -> MemoryEvents {
    let table = cgroup.table("memory.events");
    let get = |key| value(&table, key);
    MemoryEvents {
        low: get("low"),
        high: get("high"),
        max: get("max"),
        oom: get("oom"),
        oom_kill: get("oom_kill"),
        oom_group_kill: get("oom_group_kill"),
        ..Default::default()
    }
}

fn huge_pages(cgroup: &Cgroup<'_>) -> Vec<HugeTlbStat> {
    let Ok(entries) = std::fs::read_dir(cgroup.0) else { return Vec::new() };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let size = |name: String| Some(name.strip_prefix("hugetlb.")?.strip_suffix(".current")?.to_owned());
    names
        .filter_map(size)
        .filter(|size| !size.contains("rsvd"))
        .map(|size| HugeTlbStat {
            current: cgroup.number(&format!("hugetlb.{size}.current")).unwrap_or(0),
            max: cgroup.limit(&format!("hugetlb.{size}.max")),
            failcnt: value(&cgroup.table(&format!("hugetlb.{size}.events")), "max"),
            pagesize: size,
            ..Default::default()
        })
        .collect()
}

fn value(table: &BTreeMap<String, u64>, key: &str) -> u64 {
    table.get(key).copied().unwrap_or(0)
}

fn parse_io(text: &str) -> Vec<IOEntry> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (major, minor) = words.next()?.split_once(':')?;
            let mut entry = IOEntry { major: major.parse().ok()?, minor: minor.parse().ok()?, ..Default::default() };
            for (key, value) in words.filter_map(|word| word.split_once('=')) {
                let Ok(value) = value.parse() else { continue };
                match key {
                    "rbytes" => entry.rbytes = value,
                    "wbytes" => entry.wbytes = value,
                    "rios" => entry.rios = value,
                    "wios" => entry.wios = value,
                    _ => {}
                }
            }
            Some(entry)
        })
        .collect()
}

fn psi(cgroup: &Cgroup<'_>, file: &str) -> MessageField<PSIStats> {
    cgroup.read(file).map(|text| parse_psi(&text)).into()
}

fn parse_psi(text: &str) -> PSIStats {
    let mut stats = PSIStats::new();
    for line in text.lines() {
        let mut data = PSIData::new();
        for (key, value) in line.split(' ').filter_map(|word| word.split_once('=')) {
            match key {
                "avg10" => data.avg10 = value.parse().unwrap_or(0.0),
                "avg60" => data.avg60 = value.parse().unwrap_or(0.0),
                "avg300" => data.avg300 = value.parse().unwrap_or(0.0),
                "total" => data.total = value.parse().unwrap_or(0),
                _ => {}
            }
        }
        if line.starts_with("some ") {
            stats.some = MessageField::some(data);
        } else if line.starts_with("full ") {
            stats.full = MessageField::some(data);
        }
    }
    stats
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_io_and_parse_psi_decode_the_kernel_format() {
        let io = parse_io("254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\nnonsense\n");
        assert_eq!((io.len(), io[0].major, io[0].wios), (1, 254, 4));
        let psi = parse_psi("some avg10=1.50 avg60=0.00 avg300=0.00 total=42\nfull avg10=0.00 total=7\n");
        assert_eq!((psi.some.avg10, psi.some.total, psi.full.total), (1.5, 42, 7));
    }

    #[test]
    fn absent_files_and_keys_are_read_as_zero() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("cpu.stat", "usage_usec 12\nuser_usec 7\nsystem_usec x\n");
        write("memory.max", "max\n");
        write("memory.swap.current", "4096\n");
        write("io.stat", "8:0 rbytes=5 wbytes=6 rios=1 wios=2\n");
        write("hugetlb.2MB.current", "2097152\n");
        write("memory.events", "oom 3\noom_kill 2\n");
        let metrics = read(dir.path());
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.user_usec, metrics.cpu.system_usec), (12, 7, 0));
        assert_eq!((metrics.memory.usage, metrics.memory.usage_limit, metrics.pids.limit), (0, u64::MAX, 0));
        assert_eq!((metrics.memory.swap_usage, metrics.io.usage[0].wbytes), (4096, 6));
        assert_eq!((metrics.hugetlb[0].pagesize.as_str(), metrics.hugetlb[0].current), ("2MB", 2 << 20));
        assert_eq!((metrics.memory_events.oom, metrics.memory_events.oom_kill), (3, 2));
    }
}
