//! Memory to be plugged in while the machine runs: a reserved address range that costs nothing until a part of it is
//! made accessible, and that is as unusable to the guest as no memory at all where it is not.

use std::io;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion, GuestRegionMmap, GuestUsize};

use super::MemoryError;
use crate::arch::layout;
use crate::virtio::device::GuestMemory;

/// One region of guest memory.
pub type Region = GuestRegionMmap<BitmapMmapRegion>;

/// Linux adds memory by blocks of this size (`MIN_MEMORY_BLOCK_SIZE`, arch/x86/mm/init_64.c) …
const BLOCK: u64 = 128 << 20;
/// … and of up to this, `MAX_BLOCK_SIZE`, where it began with so much RAM.
const LARGE_BLOCK: u64 = 2 << 30;
const LARGE_FROM: u64 = 64 << 30;
/// KVM learns of the range a part at a time, since it keeps tables of what it knows of: parts are this large …
const PART: u64 = 1 << 30;
/// … or larger, so that there are never more than this many.
const MOST_PARTS: u64 = 256;
/// KVM's number of the first part; those below are RAM's.
const FIRST_SLOT: u32 = 16;
/// The host's huge pages that a range can be made of, in bytes.
pub const HUGE_PAGE: u64 = 2 << 20;

/// What a range's memory is, once it is plugged in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Pages as they come.
    Ordinary,
    /// Huge pages of the host's pool (hugetlb), which it counts apart from other memory.
    Huge,
}

impl Backing {
    fn first_slot(self) -> u32 {
        match self {
            Self::Ordinary => FIRST_SLOT,
            Self::Huge => FIRST_SLOT + MOST_PARTS as u32,
        }
    }
}

/// What the guest's kernel adds memory by, at most; the range begins and ends at a multiple.
fn unit(ram: u64) -> u64 {
    if ram < LARGE_FROM { BLOCK } else { LARGE_BLOCK }
}

/// Where memory can be plugged in: start and length, for a machine that has `ram` bytes and may get `most`.
pub fn range(ram: u64, most: u64) -> Option<(u64, u64)> {
    let end = layout::ram(ram).last().map_or(0, |(start, len)| start + len);
    let start = end.max(layout::HOLE_END).next_multiple_of(unit(ram));
    let len = most.checked_sub(ram).filter(|&len| len > 0)?.checked_next_multiple_of(unit(ram))?;
    start.checked_add(len)?;
    Some((start, len))
}

/// Where huge pages can be plugged in, behind all other memory, `end` being the end of that; none of none.
pub fn huge_range(ram: u64, end: u64, bytes: u64) -> Option<(u64, u64)> {
    let start = end.max(layout::HOLE_END).checked_next_multiple_of(unit(ram))?;
    let len = Some(bytes).filter(|&bytes| bytes > 0)?.checked_next_multiple_of(unit(ram))?;
    start.checked_add(len)?;
    Some((start, len))
}

/// Reserves the range's addresses, and adds them to the memory that devices see.
///
/// # Errors
/// [`MemoryError`].
pub fn reserve(
    memory: &GuestMemory,
    (start, len): (u64, u64),
    backing: Backing,
) -> Result<(GuestMemory, Hotplug), MemoryError> {
    let size = usize::try_from(len).map_err(|_| MemoryError::Size)?;
    let builder = MmapRegionBuilder::new(size).with_mmap_prot(libc::PROT_NONE);
    let builder = match backing {
        Backing::Ordinary => builder.with_mmap_flags(NOTHING),
        // The flag says what is to come, for who asks `is_huge`.
        Backing::Huge => {
            let pointer = address_space(size)?.cast();
            // SAFETY: the mapping is our own, so long, and nobody unmaps it: it is guest memory until the process ends.
            unsafe { builder.with_mmap_flags(NOTHING | libc::MAP_HUGETLB).with_raw_mmap_pointer(pointer) }
        }
    };
    let mapping = builder.build().map_err(|error| MemoryError::Reserve(io::Error::other(error)))?;
    let region = Arc::new(Region::new(mapping, GuestAddress(start)).ok_or(MemoryError::Size)?);
    let unit = unit(memory.iter().map(GuestMemoryRegion::len).sum());
    let hotplug = Hotplug { region: region.clone(), unit, part: part(len), given: 0, backing };
    for advice in [libc::MADV_NOHUGEPAGE, libc::MADV_DONTDUMP] {
        // As for RAM; a kernel without huge pages has nothing to be advised of.
        let _ = hotplug.advise(0, len, advice);
    }
    let memory = memory.insert_region(region).map_err(|error| MemoryError::Reserve(io::Error::other(error)))?;
    Ok((memory, hotplug))
}

/// Whether a region of guest memory is one of huge pages.
pub fn is_huge(region: &Region) -> bool {
    region.flags() & libc::MAP_HUGETLB != 0
}

/// Addresses that nothing is behind.
const NOTHING: libc::c_int = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;

/// Maps so many bytes of nothing, aligned to huge pages: they can be mapped nowhere else.
fn address_space(size: usize) -> Result<*mut libc::c_void, MemoryError> {
    let spare = HUGE_PAGE as usize;
    let whole = size.checked_add(spare).ok_or(MemoryError::Size)?;
    // SAFETY: a new mapping where the kernel likes, which touches none that there is.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), whole, libc::PROT_NONE, NOTHING, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(MemoryError::Reserve(io::Error::last_os_error()));
    }
    let before = start.addr().next_multiple_of(spare) - start.addr();
    let aligned = start.wrapping_byte_add(before);
    for (rest, len) in [(start, before), (aligned.wrapping_byte_add(size), spare - before)] {
        // What cannot be unmapped stays, and costs nothing.
        // SAFETY: the ends of the mapping made above, which nobody knows of yet.
        let _ = len == 0 || unsafe { libc::munmap(rest, len) } == 0;
    }
    Ok(aligned)
}

/// The size of the parts that KVM is told of.
fn part(len: u64) -> u64 {
    len.div_ceil(MOST_PARTS).next_multiple_of(PART)
}

/// The reserved range.
#[derive(Debug)]
pub struct Hotplug {
    region: Arc<Region>,
    unit: u64,
    part: u64,
    /// Bytes from the start that KVM knows of.
    given: u64,
    backing: Backing,
}

impl Hotplug {
    /// Guest-physical address.
    pub fn start(&self) -> u64 {
        self.region.start_addr().0
    }

    /// Bytes.
    pub fn len(&self) -> GuestUsize {
        self.region.len()
    }

    /// How much of it, from its start, has to be usable for so many bytes to find a place: whole blocks of the guest's
    /// kernel, and one more for when it has some that it cannot fill.
    pub fn extent(&self, bytes: u64) -> u64 {
        match bytes {
            0 => 0,
            _ => {
                bytes.saturating_add(self.unit).checked_next_multiple_of(self.unit).unwrap_or(u64::MAX).min(self.len())
            }
        }
    }

    /// Whether there is nothing of it: never.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Has KVM know of at least the first `bytes`. It forgets nothing again: what is not accessible stays so.
    ///
    /// # Errors
    /// [`MemoryError::Region`]; what it knew before, it knows.
    pub fn give_to(&mut self, vm: &VmFd, bytes: u64) -> Result<(), MemoryError> {
        while self.given < bytes.min(self.len()) {
            let region = kvm_userspace_memory_region {
                slot: u32::try_from(self.given / self.part).map_err(|_| MemoryError::Size)? + self.backing.first_slot(),
                flags: 0,
                guest_phys_addr: self.start() + self.given,
                memory_size: self.part.min(self.len() - self.given),
                userspace_addr: self.region.as_ptr() as u64 + self.given,
            };
            // SAFETY: as with RAM: the mapping lives as long as the process, and this part lies within it.
            unsafe { vm.set_user_memory_region(region) }.map_err(MemoryError::Region)?;
            self.given += region.memory_size;
        }
        Ok(())
    }

    /// Makes a part, of whole huge pages, usable by the guest; it reads as zeroes.
    ///
    /// # Errors
    /// Those of mprotect: too many parts of different kinds, or too much memory for a host that counts it. Of huge
    /// pages, those of mmap and madvise: there are not so many. The part is unusable then.
    pub fn open(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.backing {
            Backing::Ordinary => self.protect(offset, len, libc::PROT_READ | libc::PROT_WRITE),
            Backing::Huge => {
                let (start, size) = self.within(offset, len)?;
                let protection = libc::PROT_READ | libc::PROT_WRITE;
                replace(start, size, protection, libc::MAP_HUGETLB | libc::MAP_HUGE_2MB)?;
                // At once: a page that is not there when the guest touches it would be a bus error of ours. (Linux 5.14;
                // an older kernel has reserved the pages, and can only be stopped by its control group's limit.)
                let populated = self.advise(offset, len, libc::MADV_POPULATE_WRITE);
                match populated.as_ref().map_err(io::Error::raw_os_error) {
                    Ok(()) | Err(Some(libc::EINVAL)) => Ok(()),
                    Err(_) => replace(start, size, libc::PROT_NONE, libc::MAP_NORESERVE).and(populated),
                }
            }
        }
    }

    /// Takes a part from the guest and gives its memory back to the host. The guest's accesses fail from then on.
    ///
    /// # Errors
    /// Those of mprotect and madvise; the part may be unusable already then.
    pub fn close(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.backing {
            Backing::Ordinary => {
                self.protect(offset, len, libc::PROT_NONE)?;
                self.advise(offset, len, libc::MADV_DONTNEED)
            }
            Backing::Huge => {
                let (start, size) = self.within(offset, len)?;
                replace(start, size, libc::PROT_NONE, libc::MAP_NORESERVE)
            }
        }
    }

    fn protect(&self, offset: u64, len: u64, protection: libc::c_int) -> io::Result<()> {
        let (start, len) = self.within(offset, len)?;
        // SAFETY: the range lies within this mapping, which is used through volatile accesses and system calls only.
        match unsafe { libc::mprotect(start, len, protection) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn advise(&self, offset: u64, len: u64, advice: libc::c_int) -> io::Result<()> {
        let (start, len) = self.within(offset, len)?;
        // SAFETY: as above; nobody relies on what guest memory holds.
        match unsafe { libc::madvise(start, len, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Address and length of a part, checked.
    fn within(&self, offset: u64, len: u64) -> io::Result<(*mut libc::c_void, usize)> {
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.len());
        match (fits, usize::try_from(offset), usize::try_from(len)) {
            (true, Ok(offset), Ok(len)) => Ok((self.region.as_ptr().wrapping_add(offset).cast(), len)),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

/// Maps something else over a part of a reserved range.
fn replace(start: *mut libc::c_void, len: usize, protection: libc::c_int, kind: libc::c_int) -> io::Result<()> {
    let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_FIXED | kind;
    // SAFETY: the part lies within a mapping that is guest memory, used through volatile accesses and system calls only.
    match unsafe { libc::mmap(start, len, protection, flags, -1, 0) } {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn the_range_is_above_ram_and_devices() {
        assert_eq!(range(64 << 20, 64 << 20), None);
        assert_eq!(range(64 << 20, 128 << 20), Some((4 << 30, 128 << 20)));
        assert_eq!(range(5 << 30, 8 << 30), Some((6 << 30, 3 << 30)));
        assert_eq!(range((5 << 30) + (1 << 20), 6 << 30), Some(((6 << 30) + (128 << 20), 1 << 30)));
        assert_eq!(range(64 << 20, u64::MAX), None);
        assert_eq!(range(70 << 30, 71 << 30), Some((72 << 30, 2 << 30)));
    }

    #[test]
    fn huge_pages_are_behind_everything() {
        assert_eq!(huge_range(64 << 20, 64 << 20, 0), None);
        assert_eq!(huge_range(64 << 20, 64 << 20, 2 << 20), Some((4 << 30, 128 << 20)));
        assert_eq!(huge_range(64 << 20, 5 << 30, 256 << 20), Some((5 << 30, 256 << 20)));
        assert_eq!(huge_range(64 << 20, 64 << 20, u64::MAX), None);
    }

    #[test]
    fn huge_pages_that_the_host_does_not_have_cannot_be_opened() {
        let ram = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let pages = 1u64 << 20;
        let (_, hotplug) = reserve(&ram, (4 << 30, pages * HUGE_PAGE), Backing::Huge).unwrap();
        assert!((hotplug.region.as_ptr() as u64).is_multiple_of(HUGE_PAGE));
        // Two TiB of them nobody has.
        assert_eq!(hotplug.open(0, pages * HUGE_PAGE).unwrap_err().raw_os_error(), Some(libc::ENOMEM));
        hotplug.close(0, pages * HUGE_PAGE).unwrap();
    }

    #[test]
    fn kvm_never_sees_too_many_parts() {
        for gib in [1u64, 6, 255, 257, 1000, 64 << 10] {
            let len = gib << 30;
            assert!(len.div_ceil(part(len)) <= MOST_PARTS && part(len).is_multiple_of(PART), "{gib}");
        }
    }

    #[test]
    fn only_what_is_open_can_be_used() {
        let ram = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let (memory, hotplug) = reserve(&ram, (4 << 30, 128 << 20), Backing::Ordinary).unwrap();
        assert_eq!(memory.num_regions(), 2);
        // A system call tells by EFAULT what the processor would fault on.
        let usable = |offset: u64| {
            let slice = memory.get_slice(GuestAddress((4 << 30) + offset), 16).unwrap();
            let (_from, to) = io::pipe().unwrap();
            // SAFETY: write reads from the range, or fails.
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
        assert_eq!(bytes, [0; 4], "what was given back is gone");
        assert!(hotplug.open(127 << 20, 2 << 20).is_err());
        assert!(hotplug.close(u64::MAX, 2).is_err());
    }
}
