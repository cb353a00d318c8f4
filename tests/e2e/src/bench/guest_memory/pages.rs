//! Pages of guest memory that the host holds, from /proc/PID/pagemap of the VMM.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::elf::Kernel;

const PAGE: u64 = 4096;
/// Bits of an entry of pagemap (Linux, Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
const SHARED: u64 = 1 << 61;

/// The memory of a VMM's guest.
pub struct Guest {
    pagemap: File,
    /// Address of the guest's RAM in the VMM.
    base: u64,
}

impl Guest {
    /// Finds the RAM of a VMM's guest, which runs `kernel`.
    ///
    /// # Panics
    /// If no mapping of guest memory has the kernel.
    pub fn find(vmm: i32, kernel: &Kernel) -> Self {
        let memory = File::open(format!("/proc/{vmm}/mem")).unwrap();
        let (address, banner) = kernel.banner();
        let has_kernel = |base: &u64| {
            let mut found = vec![0; banner.len()];
            memory.read_exact_at(&mut found, base + address).is_ok() && found == banner
        };
        let smaps = fs::read_to_string(format!("/proc/{vmm}/smaps")).unwrap();
        let base = starts(&smaps).into_iter().find(has_kernel);
        let base = base.unwrap_or_else(|| panic!("no mapping of the VMM {vmm} has the guest's kernel:\n{smaps}"));
        Self { pagemap: File::open(format!("/proc/{vmm}/pagemap")).unwrap(), base }
    }

    /// Returns the numbers of anonymous and of shared pages that the host holds for a range of guest-physical addresses.
    pub fn held(&self, range: Range<u64>) -> (u64, u64) {
        let (first, last) = ((self.base + range.start) / PAGE, (self.base + range.end) / PAGE);
        let mut entries = vec![0; usize::try_from((last - first) * 8).unwrap()];
        self.pagemap.read_exact_at(&mut entries, first * 8).unwrap();
        let entries = entries.chunks_exact(8).map(|entry| u64::from_le_bytes(entry.try_into().unwrap()));
        entries.filter(|entry| entry & PRESENT != 0).fold((0, 0), |(anonymous, shared), entry| {
            if entry & SHARED == 0 { (anonymous + 1, shared) } else { (anonymous, shared + 1) }
        })
    }
}

/// Returns the start addresses of the mappings for guest memory, which are excluded from core dumps (`dd` in `VmFlags`).
fn starts(smaps: &str) -> Vec<u64> {
    let (mut starts, mut current) = (Vec::new(), 0);
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        if let Some((start, _)) = first.split_once('-')
            && let Ok(start) = u64::from_str_radix(start, 16)
        {
            current = start;
        } else if let Some(flags) = line.strip_prefix("VmFlags:")
            && flags.split_whitespace().any(|flag| flag == "dd")
        {
            starts.push(current);
        }
    }
    starts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_of_guest_memory_are_found() {
        let smaps = "1000-3000 rw-p 0 00:00 0\nRss: 0 kB\nVmFlags: rd wr dd\n\
                     3000-5000 rw-p 0 00:05 7 /memory\nVmFlags: rd wr dd nh\n\
                     7000-8000 r-xp 0 08:01 3 /usr/local/bin/x\nVmFlags: rd ex\n";
        assert_eq!(starts(smaps), [0x1000, 0x3000]);
    }
}
