//! What comes and goes while the pod runs: processors and memory.

use std::io;
use std::path::Path;

/// Where the kernel keeps its processors.
const PROCESSORS: &str = "/sys/devices/system/cpu";
/// Settings of memory that is plugged in.
const MEMORY: &str = "/sys/module/memory_hotplug/parameters";
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";

/// How many huge pages of 2 MiB the kernel keeps (Documentation/admin-guide/mm/hugetlbpage.rst).
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Why processors did not come or go.
#[derive(Debug, thiserror::Error)]
pub enum ProcessorError {
    /// The kernel's list cannot be read.
    #[error("cannot read which processors are online")]
    List(#[source] io::Error),
    /// There are not so many.
    #[error("{wanted} processors wanted, the machine has {present}")]
    TooMany {
        /// What was asked for.
        wanted: u32,
        /// How many there are.
        present: u32,
    },
    /// One does not come up, or does not go.
    #[error("cannot switch processor {number}")]
    Switch {
        /// Which.
        number: u32,
        #[source]
        source: io::Error,
    },
}

/// Brings the first `count` processors online and takes the others offline; returns how many are online. It takes some
/// milliseconds for each: not for the executor's thread.
///
/// # Errors
/// [`ProcessorError`]; those switched before stay switched.
pub fn processors(count: u32) -> Result<u32, ProcessorError> {
    let read = |name: &str| std::fs::read_to_string(Path::new(PROCESSORS).join(name)).map_err(ProcessorError::List);
    let (present, online) = (numbers(&read("present")?), numbers(&read("online")?));
    let count = count.max(1);
    if count as usize > present.len() {
        return Err(ProcessorError::TooMany { wanted: count, present: present.len() as u32 });
    }
    for (position, &number) in present.iter().enumerate() {
        let wanted = position < count as usize;
        if wanted != online.contains(&number) {
            std::fs::write(format!("{PROCESSORS}/cpu{number}/online"), if wanted { "1" } else { "0" })
                .map_err(|source| ProcessorError::Switch { number, source })?;
        }
    }
    Ok(numbers(&read("online")?).len() as u32)
}

/// Has most of the memory that is plugged in go where the kernel puts nothing that it cannot move, so that it can be
/// given back (Documentation/admin-guide/mm/memory-hotplug.rst, "auto-movable"). To be called before any comes.
pub fn prefer_movable() {
    for (name, value) in [("online_policy", "auto-movable"), ("auto_movable_ratio", "400")] {
        if let Err(error) = std::fs::write(Path::new(MEMORY).join(name), value) {
            tracing::debug!("memory_hotplug.{name}: {error}");
        }
    }
}

/// Has the kernel forget files that nobody uses, and with `pages` what it has read of files before
/// (Documentation/admin-guide/sysctl/vm.rst). It goes through all of them: not for the executor's thread.
pub fn forget(pages: bool) -> io::Result<()> {
    std::fs::write(DROP_CACHES, if pages { "3" } else { "2" })
}

/// Has the kernel keep so many huge pages of 2 MiB; returns how many it has. It looks for them in all of its memory, and
/// moves what is in the way: not for the executor's thread.
pub fn huge_pages(count: u64) -> io::Result<u64> {
    std::fs::write(HUGE_PAGES, count.to_string())?;
    let text = std::fs::read_to_string(HUGE_PAGES)?;
    text.trim().parse().map_err(io::Error::other)
}

/// The numbers of a list like `0-3,7`, ascending.
fn numbers(list: &str) -> Vec<u32> {
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
    fn the_kernels_lists() {
        assert_eq!(numbers("0-2,5\n"), [0, 1, 2, 5]);
        assert_eq!(numbers("0\n"), [0]);
        assert!(numbers("\n").is_empty() && numbers("x-1").is_empty());
    }
}
