//! The pages that a guest reads and writes in a period, as the kernel's page tables of the VMM show them.
//!
//! The process that makes a template lets the guest do what each guest of the template will do first. What the guest
//! touches meanwhile, those guests will touch again.
//!
//! For the period, the guest's memory becomes a private mapping of a file with its content, as in a guest of the
//! template. No page is mapped at first. When the guest reads a page, the kernel maps the file's page and up to 15 pages
//! around it (`do_fault_around()` in mm/memory.c). When the guest writes a page, the kernel maps an anonymous copy.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemory as _, GuestMemoryRegion};

use super::memory::{self, MemoryStateError};
use crate::arch::layout;
use crate::guest_memory::{GuestMemory, Region};
use crate::memory::{MemoryError, drop_zeros};

/// Size of a page.
const PAGE: u64 = 4096;
/// Number of entries of a pagemap that are read at once.
const ENTRIES: usize = 4096;
/// Maximum number of ranges of each kind. Each takes some ten bytes in the file with the state.
pub const MAX_RANGES: usize = 1 << 14;

/// Bits of an entry of a pagemap (Documentation/admin-guide/mm/pagemap.rst): the page is mapped, it is in swap, it is a
/// file's page.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

/// A range of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// Guest-physical address. A multiple of 4096.
    pub address: u64,
    /// Length in bytes. A multiple of 4096.
    pub len: u64,
}

/// Pages that were touched, in the order of their addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Touched {
    /// Pages that were only read, or are next to such pages.
    pub read: Vec<Range>,
    /// Pages that were written.
    pub written: Vec<Range>,
}

/// Why touched pages could not be recorded.
#[derive(Debug, thiserror::Error)]
pub enum TouchedError {
    /// The memory could not be saved or mapped.
    #[error(transparent)]
    Content(#[from] MemoryStateError),
    /// Pages that contain zeros could not be given back.
    #[error(transparent)]
    Zeros(#[from] MemoryError),
    /// The process's page tables could not be read.
    #[error("failed to read the VMM's pagemap")]
    Pagemap(#[source] io::Error),
}

/// Begins a period. Copies the first `bytes` bytes of guest memory to `file`, which must be empty, and maps the file over
/// guest memory. No vCPU and no device may run.
///
/// # Errors
/// [`TouchedError`]. The memory must not be used after an error.
pub fn begin(memory: &GuestMemory, bytes: u64, mut file: File) -> Result<(), TouchedError> {
    let extents = memory::save(memory, bytes, &mut file)?;
    let mut used = extents.iter().map(|extent| (extent.address, extent.address + extent.len)).peekable();
    for region in regions(memory, bytes) {
        let (mut at, end) = (region.start_addr().0, region.start_addr().0 + region.len());
        while let Some((start, next)) = used.next_if(|(start, _)| *start < end) {
            drop_zeros(memory, at, start - at)?;
            at = next;
        }
        drop_zeros(memory, at, end - at)?;
    }
    Ok(memory::map(memory, &extents, &file)?)
}

/// Returns the pages that were touched since [`begin`]. `pagemap` is `/proc/PID/pagemap` of this process.
///
/// # Errors
/// [`TouchedError::Pagemap`].
pub fn end(memory: &GuestMemory, bytes: u64, pagemap: &File) -> Result<Touched, TouchedError> {
    let mut touched = Touched::default();
    for region in regions(memory, bytes) {
        let (start, pages) = (region.start_addr().0, region.len() / PAGE);
        let first = region.as_ptr() as u64 / PAGE;
        let mut buffer = [0; ENTRIES * 8];
        for page in (0..pages).step_by(ENTRIES) {
            let count = usize::try_from(pages - page).unwrap_or(ENTRIES).min(ENTRIES);
            let bytes = buffer.get_mut(..count * 8).unwrap_or_default();
            pagemap.read_exact_at(bytes, (first + page) * 8).map_err(TouchedError::Pagemap)?;
            let (entries, _) = bytes.as_chunks();
            touched.add(start + page * PAGE, entries.iter().map(|entry| u64::from_ne_bytes(*entry)));
        }
    }
    touched.read.truncate(MAX_RANGES);
    touched.written.truncate(MAX_RANGES);
    Ok(touched)
}

impl Touched {
    /// Adds the pages of a pagemap's entries. The first entry is that of the page at `start`.
    fn add(&mut self, start: u64, entries: impl Iterator<Item = u64>) {
        for (address, entry) in (start..).step_by(4096).zip(entries) {
            let ranges = match (entry & (PRESENT | SWAPPED), entry & OF_FILE) {
                (0, _) => continue,
                (PRESENT, OF_FILE) => &mut self.read,
                _ => &mut self.written,
            };
            match ranges.last_mut() {
                Some(last) if last.address + last.len == address => last.len += PAGE,
                _ => ranges.push(Range { address, len: PAGE }),
            }
        }
    }

    /// Returns all ranges in the order of their addresses. Adjacent ranges are joined.
    pub fn all(&self) -> Vec<Range> {
        let mut all: Vec<Range> = self.read.iter().chain(&self.written).copied().collect();
        all.sort_unstable_by_key(|range| range.address);
        all.dedup_by(|next, last| {
            let joins = last.address.checked_add(last.len) == Some(next.address);
            if joins {
                last.len = last.len.saturating_add(next.len);
            }
            joins
        });
        all
    }
}

fn regions(memory: &GuestMemory, bytes: u64) -> impl Iterator<Item = &Region> {
    memory.iter().take(layout::ram(bytes).len())
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const LEN: u64 = 16 << 20;

    #[test]
    fn entries_become_ranges() {
        let mut touched = Touched::default();
        let (read, written) = (PRESENT | OF_FILE, PRESENT);
        touched.add(0, [read, read, 0, written, SWAPPED, read, OF_FILE].into_iter());
        touched.add(7 * PAGE, [read].into_iter());
        let range = |page, count| Range { address: page * PAGE, len: count * PAGE };
        assert_eq!(touched.read, [range(0, 2), range(5, 1), range(7, 1)]);
        assert_eq!(touched.written, [range(3, 2)]);
        assert_eq!(touched.all(), [range(0, 2), range(3, 3), range(7, 1)]);
    }

    #[test]
    fn touched_pages_are_found_and_memory_keeps_its_content() {
        let memory = crate::memory::map(LEN).unwrap();
        let (first, last) = (1 << 20, 9 << 20);
        for address in (first..first + (1 << 20)).chain(last..last + (1 << 20)).step_by(4096) {
            memory.write_obj(address, GuestAddress(address)).unwrap();
        }
        begin(&memory, LEN, tempfile::tempfile().unwrap()).unwrap();
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        assert_eq!(end(&memory, LEN, &pagemap).unwrap(), Touched::default());
        assert_eq!(memory.read_obj::<u64>(GuestAddress(first)).unwrap(), first);
        memory.write_obj(1u8, GuestAddress(last + 2 * PAGE)).unwrap();
        memory.write_obj(1u8, GuestAddress(LEN - PAGE)).unwrap();
        let touched = end(&memory, LEN, &pagemap).unwrap();
        let range = |address| Range { address, len: PAGE };
        assert_eq!(touched.written, [range(last + 2 * PAGE), range(LEN - PAGE)]);
        let contains = |address| touched.read.iter().any(|r| (r.address..r.address + r.len).contains(&address));
        assert!(contains(first) && !contains(last), "{touched:?}");
        assert_eq!(memory.read_obj::<u64>(GuestAddress(last + PAGE)).unwrap(), last + PAGE);
    }
}
