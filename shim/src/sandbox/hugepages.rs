//! The node's pool of huge pages of 2 MiB (Documentation/admin-guide/mm/hugetlbpage.rst).

use std::path::Path;

/// MiB of a page.
pub const PAGE_MIB: u64 = 2;

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// All there are, in MiB: what a pod can get at most. None on a node without.
pub fn pool_mib() -> u64 {
    pages("nr_hugepages") * PAGE_MIB
}

/// Those nobody has and nobody was promised, in MiB.
pub fn free_mib() -> u64 {
    pages("free_hugepages").saturating_sub(pages("resv_hugepages")) * PAGE_MIB
}

fn pages(name: &str) -> u64 {
    let text = std::fs::read_to_string(Path::new(POOL).join(name)).unwrap_or_default();
    // No machine has so many that the sum in MiB overflows.
    text.trim().parse::<u32>().unwrap_or(0).into()
}
