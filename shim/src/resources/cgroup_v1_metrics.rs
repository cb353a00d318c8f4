//! Reads a sandbox's cgroup v1 metrics, and converts them to cgroup v2 metrics.
//!
//! The conversion is needed because the shim sends cgroup v2 metrics to containerd on every host.

use husk_proto::containerd::cgroups_v2::metrics::{CPUStat, MemoryStat, Metrics, PidsStat};
use protobuf::MessageField;

use crate::resources::cgroup::CgroupLocation;

/// A memory limit of at least this value counts as no limit. If no limit is set, cgroup v1 shows a very large number.
const NO_LIMIT: u64 = 1 << 62;

/// Reads the cgroup's metrics. The values of an absent controller are zero. Without the memory controller, the memory
/// limit is `u64::MAX`.
pub fn read(location: &CgroupLocation) -> Metrics {
    let text = |controller: &str, file: &str| {
        let Some(dir) = location.controller_dir(controller) else { return String::new() };
        std::fs::read_to_string(dir.join(file)).unwrap_or_default()
    };
    let number = |controller: &str, file: &str| text(controller, file).trim().parse::<u64>().ok();
    let (cpu, memory) = (text("cpu", "cpu.stat"), text("memory", "memory.stat"));
    let used = |file: &str| number("cpuacct", file).unwrap_or(0) / 1000;
    Metrics {
        pids: MessageField::some(PidsStat {
            current: number("pids", "pids.current").unwrap_or(0),
            limit: number("pids", "pids.max").unwrap_or(0),
            ..Default::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: used("cpuacct.usage"),
            user_usec: used("cpuacct.usage_user"),
            system_usec: used("cpuacct.usage_sys"),
            nr_periods: value(&cpu, "nr_periods"),
            nr_throttled: value(&cpu, "nr_throttled"),
            throttled_usec: value(&cpu, "throttled_time") / 1000,
            ..Default::default()
        }),
        memory: MessageField::some(MemoryStat {
            anon: value(&memory, "total_rss"),
            file: value(&memory, "total_cache"),
            inactive_file: value(&memory, "total_inactive_file"),
            pgfault: value(&memory, "total_pgfault"),
            pgmajfault: value(&memory, "total_pgmajfault"),
            usage: number("memory", "memory.usage_in_bytes").unwrap_or(0),
            usage_limit: number("memory", "memory.limit_in_bytes")
                .filter(|&limit| limit < NO_LIMIT)
                .unwrap_or(u64::MAX),
            max_usage: number("memory", "memory.max_usage_in_bytes").unwrap_or(0),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Returns the number after `key` in the line that begins with `key`. Returns zero if the table has no such line.
fn value(table: &str, key: &str) -> u64 {
    let found = table.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok());
    found.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_converts_cgroup_v1_values() {
        let dir = tempfile::tempdir().unwrap();
        for (file, text) in [
            ("cpuacct.usage", "5000\n"),
            ("cpu.stat", "nr_periods 3\nnr_throttled 1\nthrottled_time 2000\n"),
            ("memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory.stat", "rss 1\ntotal_rss 7\n"),
        ] {
            std::fs::write(dir.path().join(file), text).unwrap();
        }
        let names = ["cpu", "cpuacct", "memory"].map(str::to_owned).to_vec();
        let metrics = read(&CgroupLocation::V1(vec![(names, dir.path().into())]));
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.throttled_usec, metrics.memory.anon), (5, 2, 7));
        assert_eq!((metrics.memory.usage_limit, metrics.pids.current), (u64::MAX, 0));
    }
}
