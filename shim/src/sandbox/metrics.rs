//! What a sandbox uses of the host: `io.containerd.cgroups.v2.Metrics` of its cgroup there, which is the VMM's and the
//! shim's. What containers use of the guest is the agent's to tell.

use std::path::Path;

use husk_proto::containerd::cgroups_v2::metrics::{CPUStat, MemoryStat, Metrics, PidsStat};
use protobuf::MessageField;

/// The type URL containerd knows the metrics by.
pub const URL: &str = "io.containerd.cgroups.v2.Metrics";

/// Reads the cgroup at `path`; a controller that is absent leaves its part at zero. Reads a handful of small files.
pub fn read(path: &Path) -> Metrics {
    let text = |file: &str| std::fs::read_to_string(path.join(file)).unwrap_or_default();
    let number = |file: &str| text(file).trim().parse().ok();
    let (cpu, memory) = (text("cpu.stat"), text("memory.stat"));
    Metrics {
        pids: MessageField::some(PidsStat {
            current: number("pids.current").unwrap_or(0),
            // No limit is zero here, and the largest number below, as containerd's own reader has them.
            limit: number("pids.max").unwrap_or(0),
            ..Default::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: value(&cpu, "usage_usec"),
            user_usec: value(&cpu, "user_usec"),
            system_usec: value(&cpu, "system_usec"),
            nr_periods: value(&cpu, "nr_periods"),
            nr_throttled: value(&cpu, "nr_throttled"),
            throttled_usec: value(&cpu, "throttled_usec"),
            ..Default::default()
        }),
        memory: MessageField::some(MemoryStat {
            anon: value(&memory, "anon"),
            file: value(&memory, "file"),
            inactive_file: value(&memory, "inactive_file"),
            pgfault: value(&memory, "pgfault"),
            pgmajfault: value(&memory, "pgmajfault"),
            usage: number("memory.current").unwrap_or(0),
            usage_limit: number("memory.max").unwrap_or(u64::MAX),
            max_usage: number("memory.peak").unwrap_or(0),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The number after `key` on a line of its own.
pub(super) fn value(table: &str, key: &str) -> u64 {
    let found = table.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok());
    found.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_absent_is_zero() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("cpu.stat"), "usage_usec 12\nuser_usec 7\nsystem_usec x\n").unwrap();
        std::fs::write(dir.path().join("memory.max"), "max\n").unwrap();
        let metrics = read(dir.path());
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.user_usec, metrics.cpu.system_usec), (12, 7, 0));
        assert_eq!((metrics.memory.usage, metrics.memory.usage_limit, metrics.pids.limit), (0, u64::MAX, 0));
    }
}
