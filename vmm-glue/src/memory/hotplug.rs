//! Address range for hot-plugged memory. The range is reserved at boot. The range does not use memory until
//! [`HotplugRange::open`] makes a part accessible. For the guest, an inaccessible part is like addresses without
//! memory.

use std::io;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion, GuestUsize};

use super::MemoryError;
use crate::arch::layout;
use crate::guest_memory::{GuestMemory, Region};

/// Size of the blocks in which Linux adds memory (`MIN_MEMORY_BLOCK_SIZE`, arch/x86/mm/init_64.c).
const MEMORY_BLOCK: u64 = 128 << 20;
/// Maximum block size (`MAX_BLOCK_SIZE`), which Linux may use if it started with at least [`LARGE_MEMORY_BLOCK_FROM`]
/// of RAM.
const LARGE_MEMORY_BLOCK: u64 = 2 << 30;
const LARGE_MEMORY_BLOCK_FROM: u64 = 64 << 30;
/// Minimum size of a part. Parts of the range are registered with KVM one at a time, because KVM keeps tables for all
/// registered memory.
const MIN_PART: u64 = 1 << 30;
/// Maximum number of parts. In a large range, the parts are larger than [`MIN_PART`].
const MAX_PARTS: u32 = 256;
/// KVM memory slot of the first part. The slots below belong to RAM.
const FIRST_SLOT: u32 = 16;
/// Size of the host's huge pages that can back a range, in bytes.
pub const HUGE_PAGE: u64 = 2 << 20;

/// The kind of host pages that back the range's plugged memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Ordinary pages.
    Ordinary,
    /// Huge pages from the host's hugetlb pool, which the host accounts separately.
    Huge,
}

impl Backing {
    fn first_slot(self) -> u32 {
        match self {
            Self::Ordinary => FIRST_SLOT,
            Self::Huge => FIRST_SLOT + MAX_PARTS,
        }
    }
}

/// Returns the largest block size that the guest's kernel may use. The range starts and ends at a multiple of this
/// size.
fn block_size(ram: u64) -> u64 {
    if ram < LARGE_MEMORY_BLOCK_FROM { MEMORY_BLOCK } else { LARGE_MEMORY_BLOCK }
}

/// Returns the start and the length of the range for hot-plugged memory. The VM has `ram` bytes at boot and may grow to
/// `max` bytes. Returns `None` if the VM may not grow, or if the range does not fit into the address space.
pub fn range(ram: u64, max: u64) -> Option<(u64, u64)> {
    let end = layout::ram(ram).last().map_or(0, |(start, len)| start + len);
    let start = end.max(layout::HOLE_END).next_multiple_of(block_size(ram));
    let len = max.checked_sub(ram).filter(|&len| len > 0)?.checked_next_multiple_of(block_size(ram))?;
    start.checked_add(len)?;
    Some((start, len))
}

/// Returns the start and the length of the range for hot-plugged huge pages. The range is after `end`, the end of all
/// other memory. Returns `None` if `bytes` is 0, or if the range does not fit into the address space.
pub fn huge_range(ram: u64, end: u64, bytes: u64) -> Option<(u64, u64)> {
    let start = end.max(layout::HOLE_END).checked_next_multiple_of(block_size(ram))?;
    let len = Some(bytes).filter(|&bytes| bytes > 0)?.checked_next_multiple_of(block_size(ram))?;
    start.checked_add(len)?;
    Some((start, len))
}

/// Reserves the range's addresses, and adds the range to the memory that devices access.
pub fn reserve(
    memory: &GuestMemory,
    (start, len): (u64, u64),
    backing: Backing,
) -> Result<(GuestMemory, HotplugRange), MemoryError> {
    let size = usize::try_from(len).map_err(|_| MemoryError::Size)?;
    let builder = MmapRegionBuilder::new(size).with_mmap_prot(libc::PROT_NONE);
    let builder = match backing {
        Backing::Ordinary => builder.with_mmap_flags(RESERVE_FLAGS),
        // MAP_HUGETLB does not change this mapping. The flag only tells `is_huge` that this range will
        // consist of huge pages.
        Backing::Huge => {
            let pointer = reserve_addresses(size)?.cast();
            // SAFETY: `pointer` points to a mapping of `size` bytes that nothing else uses. The mapping is never
            // unmapped, because it is guest memory until the process ends.
            unsafe { builder.with_mmap_flags(RESERVE_FLAGS | libc::MAP_HUGETLB).with_raw_mmap_pointer(pointer) }
        }
    };
    let mapping = builder.build().map_err(|error| MemoryError::Reserve(io::Error::other(error)))?;
    let region = Arc::new(Region::new(mapping, GuestAddress(start)).ok_or(MemoryError::Size)?);
    let block_size = block_size(memory.iter().map(GuestMemoryRegion::len).sum());
    let hotplug =
        HotplugRange { region: region.clone(), block_size, part_size: part_size(len), registered: 0, backing };
    for advice in [libc::MADV_NOHUGEPAGE, libc::MADV_DONTDUMP] {
        // Give the same advice as for RAM. Best effort: a kernel without transparent huge pages does not need the
        // advice.
        let _ = hotplug.advise(0, len, advice);
    }
    let memory = memory.insert_region(region).map_err(|error| MemoryError::Reserve(io::Error::other(error)))?;
    Ok((memory, hotplug))
}

/// Returns whether a region of guest memory is backed by huge pages.
pub fn is_huge(region: &Region) -> bool {
    region.flags() & libc::MAP_HUGETLB != 0
}

/// Flags of a mapping that only reserves addresses.
const RESERVE_FLAGS: libc::c_int = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;

/// Reserves `size` bytes of address space, aligned to huge pages, because a huge page needs an aligned address.
fn reserve_addresses(size: usize) -> Result<*mut libc::c_void, MemoryError> {
    let spare = usize::try_from(HUGE_PAGE).map_err(|_| MemoryError::Size)?;
    let total = size.checked_add(spare).ok_or(MemoryError::Size)?;
    // SAFETY: without MAP_FIXED, the kernel chooses unused addresses. Therefore, no existing mapping changes.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), total, libc::PROT_NONE, RESERVE_FLAGS, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(MemoryError::Reserve(io::Error::last_os_error()));
    }
    let misaligned = start.addr().next_multiple_of(spare) - start.addr();
    let aligned = start.wrapping_byte_add(misaligned);
    for (rest, len) in [(start, misaligned), (aligned.wrapping_byte_add(size), spare - misaligned)] {
        // Best effort: a piece that cannot be unmapped stays reserved, but does not use memory.
        // SAFETY: both pieces lie within the mapping made above and outside the returned addresses. Nothing uses these
        // pieces.
        let _ = len == 0 || unsafe { libc::munmap(rest, len) } == 0;
    }
    Ok(aligned)
}

/// Returns the size of the parts that are registered with KVM.
fn part_size(len: u64) -> u64 {
    len.div_ceil(MAX_PARTS.into()).next_multiple_of(MIN_PART)
}

/// The reserved range.
#[derive(Debug)]
pub struct HotplugRange {
    region: Arc<Region>,
    block_size: u64,
    part_size: u64,
    /// Number of bytes from the start of the range that are registered with KVM.
    registered: u64,
    backing: Backing,
}

impl HotplugRange {
    /// Returns the guest-physical start address.
    pub fn start(&self) -> u64 {
        self.region.start_addr().0
    }

    /// Returns the length in bytes.
    pub fn len(&self) -> GuestUsize {
        self.region.len()
    }

    /// Returns the size of the usable region that the guest needs to plug `bytes`. The region begins at the range's
    /// start. The guest's kernel adds whole blocks. The result includes one additional block, in case the kernel cannot
    /// fill some blocks completely.
    pub fn extent(&self, bytes: u64) -> u64 {
        match bytes {
            0 => 0,
            _ => bytes
                .saturating_add(self.block_size)
                .checked_next_multiple_of(self.block_size)
                .unwrap_or(u64::MAX)
                .min(self.len()),
        }
    }

    /// Always returns false, because a range is never empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Registers at least the first `bytes` with KVM. Registered parts are never unregistered. This is safe, because
    /// the guest cannot use a part that is inaccessible.
    ///
    /// # Errors
    /// [`MemoryError::Region`]. Parts that were registered before stay registered.
    pub fn register(&mut self, vm: &VmFd, bytes: u64) -> Result<(), MemoryError> {
        while self.registered < bytes.min(self.len()) {
            let region = kvm_userspace_memory_region {
                slot: u32::try_from(self.registered / self.part_size).map_err(|_| MemoryError::Size)?
                    + self.backing.first_slot(),
                flags: 0,
                guest_phys_addr: self.start() + self.registered,
                memory_size: self.part_size.min(self.len() - self.registered),
                userspace_addr: self.region.as_ptr() as u64 + self.registered,
            };
            // SAFETY: the host address range lies within the region's mapping, which is not unmapped before the process
            // ends.
            unsafe { vm.set_user_memory_region(region) }.map_err(MemoryError::Region)?;
            self.registered += region.memory_size;
        }
        Ok(())
    }

    /// Makes a part accessible to the guest. The part reads as zeroes. In a range of huge pages, the part must consist
    /// of whole huge pages.
    ///
    /// # Errors
    /// For ordinary pages, the error of mprotect. This call fails if the mapping has too many parts with different
    /// protection, or if the host's overcommit limit is reached. For huge pages, the error of mmap or madvise. These
    /// calls fail if the host has too few huge pages. After an error, the part is inaccessible.
    pub fn open(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.backing {
            Backing::Ordinary => self.protect(offset, len, libc::PROT_READ | libc::PROT_WRITE),
            Backing::Huge => {
                let (start, size) = self.checked_range(offset, len)?;
                let protection = libc::PROT_READ | libc::PROT_WRITE;
                replace(start, size, protection, libc::MAP_HUGETLB | libc::MAP_HUGE_2MB)?;
                // Populate the part at once. Otherwise, if the host had no huge page when the guest touches the part,
                // the VMM would get SIGBUS. Linux before 5.14 cannot populate and returns EINVAL. But mmap has reserved
                // the pages, so that a page can be missing only if the cgroup's limit is reached.
                let populated = self.advise(offset, len, libc::MADV_POPULATE_WRITE);
                match populated.as_ref().map_err(io::Error::raw_os_error) {
                    Ok(()) | Err(Some(libc::EINVAL)) => Ok(()),
                    Err(_) => replace(start, size, libc::PROT_NONE, libc::MAP_NORESERVE).and(populated),
                }
            }
        }
    }

    /// Makes a part inaccessible and gives its memory back to the host. From then on, the guest's accesses to the part
    /// fail.
    ///
    /// # Errors
    /// The error of mmap, mprotect or madvise. After an error, the part may be inaccessible or still accessible.
    pub fn close(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.backing {
            Backing::Ordinary => {
                self.protect(offset, len, libc::PROT_NONE)?;
                self.advise(offset, len, libc::MADV_DONTNEED)
            }
            Backing::Huge => {
                let (start, size) = self.checked_range(offset, len)?;
                replace(start, size, libc::PROT_NONE, libc::MAP_NORESERVE)
            }
        }
    }

    fn protect(&self, offset: u64, len: u64, protection: libc::c_int) -> io::Result<()> {
        let (start, len) = self.checked_range(offset, len)?;
        // SAFETY: the range lies within this mapping, as `checked_range` has checked. No Rust reference depends on the
        // protection, because guest memory is only accessed through volatile accesses and system calls.
        match unsafe { libc::mprotect(start, len, protection) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn advise(&self, offset: u64, len: u64, advice: libc::c_int) -> io::Result<()> {
        let (start, len) = self.checked_range(offset, len)?;
        // SAFETY: the range lies within this mapping, as `checked_range` has checked. No Rust reference points to guest
        // memory, and no code relies on the memory's content.
        match unsafe { libc::madvise(start, len, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Returns the address and the length of a part, if the part lies within the range.
    fn checked_range(&self, offset: u64, len: u64) -> io::Result<(*mut libc::c_void, usize)> {
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.len());
        match (fits, usize::try_from(offset), usize::try_from(len)) {
            (true, Ok(offset), Ok(len)) => Ok((self.region.as_ptr().wrapping_add(offset).cast(), len)),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

/// Replaces the mapping of a part of a reserved range.
fn replace(start: *mut libc::c_void, len: usize, protection: libc::c_int, kind: libc::c_int) -> io::Result<()> {
    let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_FIXED | kind;
    // SAFETY: callers pass a part that `checked_range` has checked. Therefore, MAP_FIXED replaces only guest memory,
    // which is only accessed through volatile accesses and system calls.
    match unsafe { libc::mmap(start, len, protection, flags, -1, 0) } {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn range_is_above_ram_and_devices() {
        assert_eq!(range(64 << 20, 64 << 20), None);
        assert_eq!(range(64 << 20, 128 << 20), Some((4 << 30, 128 << 20)));
        assert_eq!(range(5 << 30, 8 << 30), Some((6 << 30, 3 << 30)));
        assert_eq!(range((5 << 30) + (1 << 20), 6 << 30), Some(((6 << 30) + (128 << 20), 1 << 30)));
        assert_eq!(range(64 << 20, u64::MAX), None);
        assert_eq!(range(70 << 30, 71 << 30), Some((72 << 30, 2 << 30)));
    }

    #[test]
    fn huge_range_is_after_all_other_memory() {
        assert_eq!(huge_range(64 << 20, 64 << 20, 0), None);
        assert_eq!(huge_range(64 << 20, 64 << 20, 2 << 20), Some((4 << 30, 128 << 20)));
        assert_eq!(huge_range(64 << 20, 5 << 30, 256 << 20), Some((5 << 30, 256 << 20)));
        assert_eq!(huge_range(64 << 20, 64 << 20, u64::MAX), None);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no mmap(PROT_NONE)")]
    fn open_fails_if_host_has_too_few_huge_pages() {
        let ram = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let pages = 1u64 << 20;
        let (_, hotplug) = reserve(&ram, (4 << 30, pages * HUGE_PAGE), Backing::Huge).unwrap();
        assert!((hotplug.region.as_ptr() as u64).is_multiple_of(HUGE_PAGE));
        // No host has 2 TiB of huge pages.
        assert_eq!(hotplug.open(0, pages * HUGE_PAGE).unwrap_err().raw_os_error(), Some(libc::ENOMEM));
        hotplug.close(0, pages * HUGE_PAGE).unwrap();
    }

    #[test]
    fn number_of_parts_is_limited() {
        for gib in [1u64, 6, 255, 257, 1000, 64 << 10] {
            let len = gib << 30;
            let number = len.div_ceil(part_size(len));
            assert!(number <= MAX_PARTS.into() && part_size(len).is_multiple_of(MIN_PART), "wrong parts for {gib} GiB");
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no mmap(PROT_NONE)")]
    fn only_open_parts_are_accessible() {
        let ram = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let (memory, hotplug) = reserve(&ram, (4 << 30, 128 << 20), Backing::Ordinary).unwrap();
        assert_eq!(memory.num_regions(), 2);
        // Use a system call, which returns EFAULT for an inaccessible part. An access by the CPU would fault.
        let usable = |offset: u64| {
            let slice = memory.get_slice(GuestAddress((4 << 30) + offset), 16).unwrap();
            let (_from, to) = io::pipe().unwrap();
            // SAFETY: the range lies within a mapping of `memory`. If the range is not readable, write
            // fails with EFAULT.
            unsafe { libc::write(to.as_raw_fd(), slice.ptr_guard().as_ptr().cast(), 16) == 16 }
        };
        assert!(!usable(2 << 20));
        hotplug.open(2 << 20, 2 << 20).unwrap();
        let slice = memory.get_slice(GuestAddress((4 << 30) + (2 << 20)), 4).unwrap();
        slice.copy_from(&[1u8, 2, 3, 4]);
        assert!(usable(2 << 20) && !usable(0) && !usable(4 << 20));
        hotplug.close(2 << 20, 2 << 20).unwrap();
        assert!(!usable(2 << 20));
        hotplug.open(2 << 20, 2 << 20).unwrap();
        let mut bytes = [9u8; 4];
        slice.copy_to(&mut bytes);
        assert_eq!(bytes, [0; 4], "memory that was closed and opened again must read as zeroes");
        assert!(hotplug.open(127 << 20, 2 << 20).is_err());
        assert!(hotplug.close(u64::MAX, 2).is_err());
    }
}
