//! The file with a saved VM's memory, and its mapping.
//!
//! The file contains only parts of guest memory that are not zero, one after the other. A sparse file with all of guest
//! memory would grow: when a VM reads a hole of a file on tmpfs, the kernel allocates the page in the file
//! (`shmem_get_folio_gfp()` in mm/shmem.c).
//!
//! A VM maps each part with MAP_PRIVATE over its anonymous memory. What the VM writes, it gets as a copy of its own. The
//! other pages are the file's, and all VMs of the template share them.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use serde::{Deserialize, Serialize};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion, WriteVolatile};

use crate::guest_memory::GuestMemory;

/// Size of a page.
const PAGE: u64 = 4096;
/// Number of bytes that are searched at once.
const CHUNK: u64 = 1 << 20;
/// Two parts become one if fewer zero bytes are between them.
const GAP: u64 = 64 << 10;
/// Maximum number of parts. Each is a mapping of the VMM, and KVM looks up mappings at each fault.
const MAX_EXTENTS: usize = 128;

/// A part of guest memory in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Guest-physical address. A multiple of 4096.
    pub address: u64,
    /// Length in bytes. A multiple of 4096.
    pub len: u64,
    /// Offset in the file. A multiple of 4096.
    pub offset: u64,
}

/// Identifies the file with the memory that belongs to a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    inode: u64,
    len: u64,
}

impl FileId {
    /// Returns the id of a file.
    ///
    /// # Errors
    /// The error of reading the file's attributes.
    pub fn of(file: &File) -> io::Result<Self> {
        file.metadata().map(|metadata| Self { inode: metadata.ino(), len: metadata.len() })
    }
}

/// Error from saving or mapping memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryStateError {
    /// Guest memory could not be accessed.
    #[error("failed to access guest memory at {0:#x}")]
    Access(u64, #[source] vm_memory::GuestMemoryError),
    /// The file could not be written.
    #[error("failed to write the memory of a saved VM")]
    Write(#[source] io::Error),
    /// A part is not in guest memory, is not in the file, overlaps another, or is not aligned.
    #[error("invalid part of a saved VM's memory: {len:#x} bytes at {address:#x}")]
    Extent {
        /// Guest-physical address of the part.
        address: u64,
        /// Length of the part.
        len: u64,
    },
    /// There are too many parts.
    #[error("a saved VM's memory has {0} parts, and at most {MAX_EXTENTS} are allowed")]
    TooMany(usize),
    /// A part could not be mapped.
    #[error("failed to map a part of a saved VM's memory")]
    Map(#[source] io::Error),
}

/// Writes the parts of guest memory that are not zero to an empty file. Returns the parts. No vCPU and no device may run.
/// Only the first `len` bytes of guest memory are saved: the memory at boot. A VM with plugged memory cannot be saved.
///
/// # Errors
/// [`MemoryStateError::Access`] or [`MemoryStateError::Write`].
pub fn save(memory: &GuestMemory, len: u64, file: &mut File) -> Result<Vec<Extent>, MemoryStateError> {
    let mut used = Vec::new();
    let mut left = len;
    for region in memory.iter() {
        let start = region.start_addr().0;
        let end = start + region.len().min(left);
        left -= end - start;
        let mut address = start;
        while address < end {
            let len = CHUNK.min(end - address);
            find_used(memory, address, len, &mut used)?;
            address += len;
        }
    }
    let mut extents = Vec::with_capacity(MAX_EXTENTS);
    let mut offset = 0;
    for (address, len) in merge(used) {
        let slice = slice(memory, address, len)?;
        file.write_all_volatile(&slice).map_err(|error| MemoryStateError::Write(io::Error::other(error)))?;
        extents.push(Extent { address, len, offset });
        offset += len;
    }
    Ok(extents)
}

/// Maps the parts of a file over guest memory, which must be anonymous. The file must have been opened for reading.
///
/// # Errors
/// [`MemoryStateError`]. The memory must not be used after an error.
pub fn map(memory: &GuestMemory, extents: &[Extent], file: &File) -> Result<(), MemoryStateError> {
    let file_len = file.metadata().map_err(MemoryStateError::Map)?.len();
    check(extents, file_len)?;
    for extent in extents {
        let slice = slice(memory, extent.address, extent.len)?;
        let invalid = || MemoryStateError::Extent { address: extent.address, len: extent.len };
        let offset = libc::off_t::try_from(extent.offset).map_err(|_| invalid())?;
        let guard = slice.ptr_guard_mut();
        // SAFETY: `slice` has checked that the range lies within one mapping of guest memory, which `memory` keeps
        // mapped. Nothing borrows from guest memory, because no vCPU and no device exists yet. The address and the
        // length are multiples of the page size, because `check` has checked it, and mappings of guest memory begin at a
        // page.
        let mapped = unsafe {
            libc::mmap(
                guard.as_ptr().cast(),
                slice.len(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(MemoryStateError::Map(io::Error::last_os_error()));
        }
        // A core dump of the VMM must not contain the guest's memory, as for anonymous memory.
        // SAFETY: as above. This advice does not change the memory's content.
        if unsafe { libc::madvise(mapped, slice.len(), libc::MADV_DONTDUMP) } != 0 {
            return Err(MemoryStateError::Map(io::Error::last_os_error()));
        }
    }
    Ok(())
}

/// Checks the parts: each is aligned, within the file, and after the parts before it.
fn check(extents: &[Extent], file_len: u64) -> Result<(), MemoryStateError> {
    if extents.len() > MAX_EXTENTS {
        return Err(MemoryStateError::TooMany(extents.len()));
    }
    let mut ends = (0, 0);
    for &Extent { address, len, offset } in extents {
        let next = (address.checked_add(len), offset.checked_add(len));
        let is_aligned = [address, len, offset].iter().all(|number| number.is_multiple_of(PAGE)) && len > 0;
        match next {
            (Some(end), Some(end_in_file))
                if is_aligned && address >= ends.0 && offset >= ends.1 && end_in_file <= file_len =>
            {
                ends = (end, end_in_file);
            }
            _ => return Err(MemoryStateError::Extent { address, len }),
        }
    }
    Ok(())
}

/// Adds the parts of a range that are not zero to `used`.
fn find_used(memory: &GuestMemory, address: u64, len: u64, used: &mut Vec<(u64, u64)>) -> Result<(), MemoryStateError> {
    let mut bytes = [0u8; 4096];
    // mincore(2) would not tell pages that have never been written from pages that have been swapped out.
    for page in 0..len.div_ceil(PAGE) {
        let at = address + page * PAGE;
        let len = PAGE.min(address + len - at);
        slice(memory, at, len)?.copy_to(&mut bytes[..]);
        if bytes.iter().all(|&byte| byte == 0) {
            continue;
        }
        match used.last_mut() {
            Some((start, known)) if *start + *known == at => *known += PAGE,
            _ => used.push((at, PAGE)),
        }
    }
    Ok(())
}

/// Joins parts that are close to each other, until there are few enough.
fn merge(used: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    let mut gap = GAP;
    let mut parts = used;
    loop {
        let mut merged: Vec<(u64, u64)> = Vec::with_capacity(parts.len());
        for (address, len) in parts {
            match merged.last_mut() {
                Some((start, known)) if address - (*start + *known) < gap => *known = address + len - *start,
                _ => merged.push((address, len)),
            }
        }
        if merged.len() <= MAX_EXTENTS {
            return merged;
        }
        parts = merged;
        gap *= 2;
    }
}

fn slice<'a>(
    memory: &'a GuestMemory,
    address: u64,
    len: u64,
) -> Result<vm_memory::VolatileSlice<'a, vm_memory::bitmap::BS<'a, Bitmap>>, MemoryStateError> {
    let len = usize::try_from(len).map_err(|_| MemoryStateError::Extent { address, len })?;
    memory.get_slice(GuestAddress(address), len).map_err(|error| MemoryStateError::Access(address, error))
}

/// The bitmap of a region of guest memory.
type Bitmap = <crate::guest_memory::Region as GuestMemoryRegion>::B;

#[cfg(test)]
mod tests {
    use std::io::Seek;

    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;

    const LEN: usize = 32 << 20;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), LEN), (GuestAddress(1 << 32), LEN)]).unwrap()
    }

    fn saved(memory: &GuestMemory) -> (File, Vec<Extent>) {
        let mut file = tempfile::tempfile().unwrap();
        let extents = save(memory, 2 * LEN as u64, &mut file).unwrap();
        file.rewind().unwrap();
        (file, extents)
    }

    #[test]
    fn mapped_memory_has_the_saved_content_and_does_not_change_the_file() {
        let first = memory();
        for (address, value) in [(0x1000, 1u64), (0x3008, 2), (20 << 20, 3), (1 << 32, 4), ((1 << 32) + 0x1f_fff8, 5)] {
            first.write_obj(value, GuestAddress(address)).unwrap();
        }
        let (file, extents) = saved(&first);
        let len = file.metadata().unwrap().len();
        // The first two pages are close to each other.
        assert_eq!((extents.len(), len), (4, 3 * PAGE + 3 * PAGE));
        let second = memory();
        second.write_obj(9u64, GuestAddress(0x1000)).unwrap();
        map(&second, &extents, &file).unwrap();
        for (address, value) in [(0x1000, 1u64), (0x3008, 2), (20 << 20, 3), (1 << 32, 4), (0x2000, 0), (0x5000, 0)] {
            assert_eq!(second.read_obj::<u64>(GuestAddress(address)).unwrap(), value, "{address:#x}");
        }
        second.write_obj(7u64, GuestAddress(0x1000)).unwrap();
        let third = memory();
        map(&third, &extents, &file).unwrap();
        assert_eq!(third.read_obj::<u64>(GuestAddress(0x1000)).unwrap(), 1);
    }

    #[test]
    fn unused_memory_is_not_saved() {
        let (file, extents) = saved(&memory());
        assert_eq!((file.metadata().unwrap().len(), extents), (0, Vec::new()));
    }

    #[test]
    fn memory_beyond_that_of_the_boot_is_not_saved() {
        let memory = memory();
        memory.write_obj(1u8, GuestAddress((1 << 32) + 0x1000)).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        assert_eq!(save(&memory, LEN as u64 + 0x1000, &mut file).unwrap(), []);
        assert_eq!(save(&memory, LEN as u64 + 0x2000, &mut file).unwrap().len(), 1);
    }

    #[test]
    fn number_of_parts_is_limited() {
        let memory = memory();
        for part in 0..LEN as u64 / (128 << 10) {
            memory.write_obj(1u8, GuestAddress(part * (128 << 10))).unwrap();
        }
        let (_, extents) = saved(&memory);
        assert!(extents.len() <= MAX_EXTENTS && !extents.is_empty(), "{} parts", extents.len());
    }

    #[test]
    fn invalid_parts_are_refused() {
        let (file, _) = {
            let memory = memory();
            memory.write_slice(&[1; 0x4000], GuestAddress(0)).unwrap();
            saved(&memory)
        };
        let part = |address, len, offset| Extent { address, len, offset };
        let memory = memory();
        map(&memory, &[part(0, 0x2000, 0), part(0x2000, 0x2000, 0x2000)], &file).unwrap();
        for invalid in [
            vec![part(0x800, 0x1000, 0)],
            vec![part(0, 0x800, 0)],
            vec![part(0, 0x1000, 0x800)],
            vec![part(0, 0, 0)],
            vec![part(0, 0x5000, 0)],
            vec![part(0, 0x1000, 0x4000)],
            vec![part(u64::MAX - 0xfff, 0x1000, 0)],
            vec![part(0, 0x2000, 0), part(0x1000, 0x1000, 0x2000)],
            vec![part(0, 0x2000, 0), part(0x2000, 0x1000, 0x1000)],
            vec![part(LEN as u64, 0x1000, 0)],
            vec![part(LEN as u64 - 0x1000, 0x2000, 0)],
        ] {
            assert!(map(&memory, &invalid, &file).is_err(), "{invalid:?}");
        }
        let many: Vec<_> = (0..=MAX_EXTENTS as u64).map(|at| part(at * PAGE, PAGE, at * PAGE)).collect();
        assert!(matches!(map(&memory, &many, &file), Err(MemoryStateError::TooMany(_))));
    }

    proptest! {
        #[test]
        fn merged_parts_cover_all_parts(starts in proptest::collection::btree_set(0u64..1 << 20, 0..1000)) {
            let used: Vec<_> = starts.iter().map(|start| (start * PAGE, PAGE)).collect();
            let merged = merge(used.clone());
            prop_assert!(merged.len() <= MAX_EXTENTS);
            prop_assert!(merged.windows(2).all(|pair| pair[0].0 + pair[0].1 < pair[1].0));
            for (address, len) in used {
                prop_assert!(merged.iter().any(|part| part.0 <= address && address + len <= part.0 + part.1));
            }
        }
    }
}
