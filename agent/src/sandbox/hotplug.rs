//! Guest side of CPU and memory hot-plug, and of reclaim.

use std::io;
use std::path::Path;

/// sysfs directory of the CPUs.
const CPUS: &str = "/sys/devices/system/cpu";
/// Directory of the kernel parameters for hot-plugged memory.
const MEMORY_HOTPLUG: &str = "/sys/module/memory_hotplug/parameters";
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";

/// File with the number of 2 MiB huge pages in the kernel's pool (Documentation/admin-guide/mm/hugetlbpage.rst).
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Reason why bringing CPUs online or taking CPUs offline failed.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// Failed to read the kernel's CPU lists.
    #[error("failed to read the lists of present and online CPUs")]
    List(#[source] io::Error),
    /// Fewer CPUs are present than requested.
    #[error("failed to bring {requested} CPUs online: only {present} are present")]
    TooMany {
        /// Requested number of online CPUs.
        requested: u32,
        /// Number of present CPUs.
        present: u32,
    },
    /// Failed to bring a CPU online or to take it offline.
    #[error("failed to write the online state of CPU {number}")]
    SetOnline {
        /// CPU number.
        number: u32,
        #[source]
        source: io::Error,
    },
}

/// Brings the first `count` CPUs online and takes the others offline. Returns the number of online CPUs. Blocks for
/// some milliseconds per CPU. Must not be called on the async runtime's thread.
///
/// # Errors
/// The CPUs that changed state before the error occurred keep the new state.
pub fn set_online_cpus(count: u32) -> Result<u32, CpuError> {
    let read = |name: &str| std::fs::read_to_string(Path::new(CPUS).join(name)).map_err(CpuError::List);
    let (present, online) = (parse_cpu_list(&read("present")?), parse_cpu_list(&read("online")?));
    let count = count.max(1);
    if count as usize > present.len() {
        return Err(CpuError::TooMany { requested: count, present: number(&present) });
    }
    for (position, &number) in present.iter().enumerate() {
        let online_after = position < count as usize;
        if online_after != online.contains(&number) {
            std::fs::write(format!("{CPUS}/cpu{number}/online"), if online_after { "1" } else { "0" })
                .map_err(|source| CpuError::SetOnline { number, source })?;
        }
    }
    Ok(number(&parse_cpu_list(&read("online")?)))
}

fn number(cpus: &[u32]) -> u32 {
    u32::try_from(cpus.len()).unwrap_or(u32::MAX)
}

/// Sets the policy that puts most of the hot-plugged memory into ZONE_MOVABLE. Memory in this zone can be unplugged
/// again (Documentation/admin-guide/mm/memory-hotplug.rst, "auto-movable"). Must be called before memory is
/// hot-plugged.
pub fn set_movable_policy() {
    for (name, value) in [("online_policy", "auto-movable"), ("auto_movable_ratio", "400")] {
        if let Err(error) = std::fs::write(Path::new(MEMORY_HOTPLUG).join(name), value) {
            tracing::debug!("failed to set memory_hotplug.{name}: {error}");
        }
    }
}

/// Drops unused dentries and inodes. If `pages` is true, also drops the page cache
/// (Documentation/admin-guide/sysctl/vm.rst). Blocks while the kernel walks all these objects. Must not be called on
/// the async runtime's thread.
pub fn drop_caches(pages: bool) -> io::Result<()> {
    std::fs::write(DROP_CACHES, if pages { "3" } else { "2" })
}

/// Sets the number of 2 MiB huge pages in the kernel's pool. Returns the number of pages that the pool then has, which
/// can differ from `count`. Blocks while the kernel searches all memory and migrates pages that are in the way. Must
/// not be called on the async runtime's thread.
pub fn set_huge_pages(count: u64) -> io::Result<u64> {
    std::fs::write(HUGE_PAGES, count.to_string())?;
    let text = std::fs::read_to_string(HUGE_PAGES)?;
    text.trim().parse().map_err(io::Error::other)
}

/// Parses a CPU list like `0-3,7` into CPU numbers.
fn parse_cpu_list(list: &str) -> Vec<u32> {
    let range = |part: &str| {
        let (low, high) = part.split_once('-').unwrap_or((part, part));
        Some(low.parse::<u32>().ok()?..=high.parse().ok()?)
    };
    list.trim().split(',').filter_map(range).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_cpu_list_expands_ranges() {
        assert_eq!(parse_cpu_list("0-2,5\n"), [0, 1, 2, 5]);
        assert_eq!(parse_cpu_list("0\n"), [0]);
        assert!(parse_cpu_list("\n").is_empty() && parse_cpu_list("x-1").is_empty());
    }
}
