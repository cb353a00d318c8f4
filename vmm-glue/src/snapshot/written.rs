//! The pages that a guest has written since a point in time, as KVM records them.
//!
//! The process that makes a template lets the guest do what each guest of the template will do first. What the guest
//! writes meanwhile, those guests will write again.

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemory as _, GuestMemoryRegion};

use crate::arch::layout;
use crate::guest_memory::GuestMemory;

/// Size of a page.
const PAGE: u64 = 4096;
/// Number of pages that a word of the bitmap stands for.
const WORD: u64 = 64;
/// Maximum number of ranges. Each takes some ten bytes in the file with the state.
pub const MAX_RANGES: usize = 1 << 14;

/// A range of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// Guest-physical address. A multiple of 4096.
    pub address: u64,
    /// Length in bytes. A multiple of 4096.
    pub len: u64,
}

/// Error of a KVM ioctl.
#[derive(Debug, thiserror::Error)]
#[error("ioctl {0} failed")]
pub struct LogError(&'static str, #[source] kvm_ioctls::Error);

/// Makes KVM record which pages of the memory at boot are written from now on. `bytes` is the size of this memory. Its
/// regions are KVM's first memory slots ([`crate::memory::register`]).
///
/// # Errors
/// [`LogError`].
pub fn begin(vm: &VmFd, memory: &GuestMemory, bytes: u64) -> Result<(), LogError> {
    for (slot, region) in (0u32..).zip(regions(memory, bytes)) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: KVM_MEM_LOG_DIRTY_PAGES,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the slot has been registered with the same addresses, and only its flags change.
        unsafe { vm.set_user_memory_region(region) }.map_err(|error| LogError("KVM_SET_USER_MEMORY_REGION", error))?;
    }
    Ok(())
}

/// Returns the pages that were written since [`begin`], at most [`MAX_RANGES`] ranges in the order of their addresses.
///
/// # Errors
/// [`LogError`].
pub fn end(vm: &VmFd, memory: &GuestMemory, bytes: u64) -> Result<Vec<Range>, LogError> {
    let mut ranges = Vec::new();
    for (slot, region) in (0u32..).zip(regions(memory, bytes)) {
        let len = usize::try_from(region.len()).unwrap_or(usize::MAX);
        let bitmap = vm.get_dirty_log(slot, len).map_err(|error| LogError("KVM_GET_DIRTY_LOG", error))?;
        add(region.start_addr().0, &bitmap, &mut ranges);
    }
    ranges.truncate(MAX_RANGES);
    Ok(ranges)
}

fn regions(memory: &GuestMemory, bytes: u64) -> impl Iterator<Item = &crate::guest_memory::Region> {
    memory.iter().take(layout::ram(bytes).len())
}

/// Adds the pages of a bitmap whose first bit stands for the page at `start`.
fn add(start: u64, bitmap: &[u64], ranges: &mut Vec<Range>) {
    for (first, word) in (0u64..).step_by(64).zip(bitmap) {
        for bit in (0..WORD).filter(|bit| word >> bit & 1 == 1) {
            let address = start + (first + bit) * PAGE;
            match ranges.last_mut() {
                Some(last) if last.address + last.len == address => last.len += PAGE,
                _ => ranges.push(Range { address, len: PAGE }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_become_ranges() {
        let mut ranges = Vec::new();
        add(0, &[0b1011, 0, 1 << 63, 1], &mut ranges);
        add(4 << 30, &[1], &mut ranges);
        let expected = [(0, 2), (3, 1), (191, 2), (1 << 20, 1)]
            .map(|(page, count)| Range { address: page * PAGE, len: count * PAGE });
        assert_eq!(ranges, expected);
    }
}
