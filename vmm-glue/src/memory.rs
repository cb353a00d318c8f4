//! Guest memory: anonymous, private, not reserved, and small pages except where everything is used anyway.

pub mod hotplug;

use std::io;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion};

use crate::arch::layout;
use crate::virtio::device::GuestMemory;

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is no size.
    #[error("guest memory size does not fit this machine")]
    Size,
    /// The mapping failed.
    #[error("cannot map guest memory")]
    Map(#[source] vm_memory::mmap::FromRangesError),
    /// The addresses of memory to be plugged in could not be reserved.
    #[error("cannot reserve the addresses of memory to be plugged in")]
    Reserve(#[source] io::Error),
    /// The advice failed.
    #[error("cannot advise on guest memory")]
    Advise(#[source] io::Error),
    /// No thread could be started.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// KVM refused the memory.
    #[error("KVM_SET_USER_MEMORY_REGION failed")]
    Region(#[source] kvm_ioctls::Error),
}

/// Maps the guest's memory.
///
/// Huge pages are off at first: a guest touches a page here and a page there, and each would bring 2 MiB with it that
/// an idle pod never uses (measured: 5 MiB more after the boot of a small guest, and no faster). [`prefault`] turns
/// them on where the boot fills memory densely.
///
/// # Errors
/// [`MemoryError`].
pub fn map(bytes: u64) -> Result<GuestMemory, MemoryError> {
    let mut ranges = Vec::with_capacity(2);
    for (start, len) in layout::ram(bytes) {
        ranges.push((GuestAddress(start), usize::try_from(len).map_err(|_| MemoryError::Size)?));
    }
    // MAP_ANONYMOUS, MAP_PRIVATE and MAP_NORESERVE are what vm-memory uses without a file.
    let memory = GuestMemory::from_ranges(&ranges).map_err(MemoryError::Map)?;
    for (start, len) in ranges {
        advise(&memory, start.0, len, libc::MADV_NOHUGEPAGE)?;
        advise(&memory, start.0, len, libc::MADV_DONTDUMP)?;
    }
    Ok(memory)
}

/// Has the kernel back these ranges (start, end) by huge pages, one fault for 2 MiB instead of 512, and brings them in
/// from a thread of its own: zeroing them takes longer than most of what the boot does meanwhile, and host processors
/// idle while the guest's first one works. Who comes to a page first just faults it in.
///
/// # Errors
/// [`MemoryError::Advise`], [`MemoryError::Thread`].
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
        for (start, len) in ranges {
            // Linux before 5.14 does not know this advice; then the first access does it.
            if let Err(error) = advise(&memory, start, len, libc::MADV_POPULATE_WRITE) {
                log::debug!("cannot fault in {len} bytes at {start:#x}: {error}");
            }
        }
    };
    std::thread::Builder::new().name("prefault".into()).spawn(populate).map_err(MemoryError::Thread)?;
    Ok(())
}

fn advise(memory: &GuestMemory, start: u64, len: usize, advice: libc::c_int) -> Result<(), MemoryError> {
    let slice = memory.get_slice(GuestAddress(start), len).map_err(|_| MemoryError::Size)?;
    let pointer = slice.ptr_guard_mut();
    // SAFETY: the range lies within one mapping of ours, as get_slice has checked; none of the advices used changes
    // what is in it.
    let result = unsafe { libc::madvise(pointer.as_ptr().cast(), len, advice) };
    let error = io::Error::last_os_error();
    // A host kernel without transparent huge pages answers EINVAL: then there is nothing to advise.
    if result != 0 && error.raw_os_error() != Some(libc::EINVAL) {
        return Err(MemoryError::Advise(error));
    }
    Ok(())
}

/// Gives the memory to the virtual machine.
///
/// # Errors
/// [`MemoryError::Region`].
pub fn give_to(vm: &VmFd, memory: &GuestMemory) -> Result<(), MemoryError> {
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the mapping lives as long as the process: it belongs to the GuestMemory that the machine holds, and
        // the process ends before the machine is dropped.
        unsafe { vm.set_user_memory_region(region) }.map_err(MemoryError::Region)?;
    }
    Ok(())
}
