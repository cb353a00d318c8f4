//! Maps guest memory. The mapping is anonymous, private and without reserved swap space. The mapping consists of small
//! pages, except where the boot fills memory densely.

pub mod hotplug;

use std::io;

use husk_base::error::chain;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion};

use crate::arch::layout;
use crate::guest_memory::GuestMemory;
use crate::jail::{Kind, confine};

/// Error from setting up guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size does not fit into the address space.
    #[error("invalid size of guest memory: it does not fit into the address space")]
    Size,
    /// mmap failed.
    #[error("failed to map guest memory")]
    Map(#[source] vm_memory::mmap::FromRangesError),
    /// The addresses of hot-plugged memory could not be reserved.
    #[error("failed to reserve addresses for hot-plugged memory")]
    Reserve(#[source] io::Error),
    /// madvise failed.
    #[error("failed to call madvise on guest memory")]
    Advise(#[source] io::Error),
    /// The thread that faults in memory could not be started.
    #[error("failed to start the prefault thread")]
    Thread(#[source] io::Error),
    /// KVM refused the memory region.
    #[error("ioctl KVM_SET_USER_MEMORY_REGION failed")]
    Region(#[source] kvm_ioctls::Error),
}

/// Maps the guest's memory.
///
/// Huge pages are off at first. A guest touches scattered pages. With huge pages, each touched page would occupy 2 MiB,
/// and an idle pod never uses most of this memory. With huge pages everywhere, a small guest took 5 MiB more memory
/// after its boot, and did not boot faster. [`prefault`] turns huge pages on where the boot fills memory densely.
pub fn map(bytes: u64) -> Result<GuestMemory, MemoryError> {
    let mut ranges = Vec::with_capacity(2);
    for (start, len) in layout::ram(bytes) {
        ranges.push((GuestAddress(start), usize::try_from(len).map_err(|_| MemoryError::Size)?));
    }
    // Without a file, vm-memory maps with MAP_ANONYMOUS, MAP_PRIVATE and MAP_NORESERVE.
    let memory = GuestMemory::from_ranges(&ranges).map_err(MemoryError::Map)?;
    for (start, len) in ranges {
        advise(&memory, start.0, len, libc::MADV_NOHUGEPAGE)?;
        advise(&memory, start.0, len, libc::MADV_DONTDUMP)?;
    }
    Ok(memory)
}

/// Makes the host's kernel back these ranges (start, end) with huge pages. With huge pages, 2 MiB need one page fault
/// instead of 512.
///
/// A separate thread faults the ranges in, because zeroing the ranges takes longer than most steps of the boot. The
/// thread can run on another host CPU while the guest's first vCPU works. If a page is accessed before the thread
/// reaches the page, the access faults the page in.
pub fn prefault(memory: &GuestMemory, ranges: &[(u64, u64)]) -> Result<(), MemoryError> {
    const HUGE: u64 = 2 << 20;
    let end_of = |start| memory.find_region(GuestAddress(start)).map(|r| r.start_addr().0.saturating_add(r.len()));
    let ranges: Vec<(u64, usize)> = ranges
        .iter()
        .filter_map(|&(start, end)| {
            let start = start.next_multiple_of(HUGE);
            let end = end.min(end_of(start)?).next_multiple_of(HUGE).min(end_of(start)? / HUGE * HUGE);
            Some((start, usize::try_from(end.checked_sub(start)?).ok()?)).filter(|&(_, len)| len > 0)
        })
        .collect();
    for &(start, len) in &ranges {
        advise(memory, start, len, libc::MADV_HUGEPAGE)?;
    }
    let memory = memory.clone();
    let populate = move || {
        if let Err(error) = confine(Kind::Prefault) {
            return log::warn!("{}", chain(&error));
        }
        for (start, len) in ranges {
            // Linux before 5.14 does not have this advice. There, the first access to a page faults the page in.
            if let Err(error) = advise(&memory, start, len, libc::MADV_POPULATE_WRITE) {
                log::debug!("failed to fault in {len} bytes at guest address {start:#x}: {error}");
            }
        }
    };
    std::thread::Builder::new().name("prefault".into()).spawn(populate).map_err(MemoryError::Thread)?;
    Ok(())
}

/// Gives the guest pages of its own for a range: copies those of a file, and allocates the others.
///
/// # Errors
/// [`MemoryError`]. Linux before 5.14 does not have this advice, and the call does nothing there.
pub fn populate(memory: &GuestMemory, start: u64, len: u64) -> Result<(), MemoryError> {
    advise(memory, start, usize::try_from(len).map_err(|_| MemoryError::Size)?, libc::MADV_POPULATE_WRITE)
}

/// Gives back pages of a range that contains only zeros, and turns huge pages off there.
///
/// # Errors
/// [`MemoryError`].
pub fn drop_zeros(memory: &GuestMemory, start: u64, len: u64) -> Result<(), MemoryError> {
    let len = usize::try_from(len).map_err(|_| MemoryError::Size)?;
    if len == 0 {
        return Ok(());
    }
    advise(memory, start, len, libc::MADV_NOHUGEPAGE)?;
    advise(memory, start, len, libc::MADV_DONTNEED)
}

fn advise(memory: &GuestMemory, start: u64, len: usize, advice: libc::c_int) -> Result<(), MemoryError> {
    let slice = memory.get_slice(GuestAddress(start), len).map_err(|_| MemoryError::Size)?;
    let pointer = slice.ptr_guard_mut();
    // SAFETY: `get_slice` has checked that the range lies within one mapping, which `memory` keeps mapped during the
    // call. No advice that the callers use changes the memory's content: MADV_DONTNEED is used for zeros in anonymous
    // memory.
    let result = unsafe { libc::madvise(pointer.as_ptr().cast(), len, advice) };
    let error = io::Error::last_os_error();
    // A host kernel without transparent huge pages returns EINVAL. Such a kernel does not need the advice.
    if result != 0 && error.raw_os_error() != Some(libc::EINVAL) {
        return Err(MemoryError::Advise(error));
    }
    Ok(())
}

/// Registers guest memory with KVM.
pub fn register(vm: &VmFd, memory: &GuestMemory) -> Result<(), MemoryError> {
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the host address range is a valid mapping for as long as KVM uses it. The `Vm` holds the
        // `GuestMemory`, and the process ends before the `Vm` is dropped.
        unsafe { vm.set_user_memory_region(region) }.map_err(MemoryError::Region)?;
    }
    Ok(())
}
