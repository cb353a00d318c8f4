//! Reads the node's pool of 2 MiB huge pages (Documentation/admin-guide/mm/hugetlbpage.rst).

use std::path::Path;

/// Size of a huge page in MiB.
pub const PAGE_MIB: u64 = 2;

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Returns the size of the pool in MiB, or 0 if the node has no huge pages.
pub fn pool_mib() -> u64 {
    pages("nr_hugepages") * PAGE_MIB
}

/// Returns the size, in MiB, of the huge pages that are neither in use nor reserved.
pub fn free_mib() -> u64 {
    pages("free_hugepages").saturating_sub(pages("resv_hugepages")) * PAGE_MIB
}

fn pages(name: &str) -> u64 {
    let text = std::fs::read_to_string(Path::new(POOL).join(name)).unwrap_or_default();
    // Parse the number as u32, so that the size in MiB cannot overflow.
    text.trim().parse::<u32>().unwrap_or(0).into()
}
