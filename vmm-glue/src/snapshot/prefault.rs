//! Maps memory of a restored VM before its vCPUs run.
//!
//! Without this, each page costs an exit from the guest when it is first accessed. KVM_PRE_FAULT_MEMORY (Linux 6.11,
//! `kvm_vcpu_pre_fault_memory()` in virt/kvm/kvm_main.c) maps pages as a read by the guest does. It copies no page, so
//! that the VMs of a template still share them. Pages that the guest will write anyway are copied before, so that they
//! are mapped for writing.

use std::io;

use kvm_bindings::kvm_pre_fault_memory;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

use super::memory::Extent;
use super::written::Range;
use crate::guest_memory::GuestMemory;
use crate::memory::populate;

/// `_IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory)` of include/uapi/linux/kvm.h.
const KVM_PRE_FAULT_MEMORY: u64 = 0xc040_aed5;

/// Copies the pages that the guest will write, and maps them and the parts of the template. Best effort: what is missing
/// is mapped when the guest accesses it.
pub fn prefault(memory: &GuestMemory, vcpu: &VcpuFd, extents: &[Extent], written: &[Range]) {
    for range in written {
        if let Err(error) = populate(memory, range.address, range.len) {
            log::debug!("failed to copy {} bytes at guest address {:#x}: {error}", range.len, range.address);
        }
    }
    let parts = extents.iter().map(|extent| Range { address: extent.address, len: extent.len });
    for range in parts.chain(written.iter().copied()) {
        if let Err(error) = map(vcpu, range) {
            // KVM before Linux 6.11 does not know the ioctl.
            return log::debug!("failed to map memory of the saved VM in KVM: {error}");
        }
    }
}

fn map(vcpu: &VcpuFd, range: Range) -> io::Result<()> {
    let mut range = kvm_pre_fault_memory { gpa: range.address, size: range.len, ..Default::default() };
    while range.size > 0 {
        // SAFETY: KVM reads and writes only `range`.
        if unsafe { ioctl_with_mut_ref(vcpu, KVM_PRE_FAULT_MEMORY, &mut range) } != 0 {
            let error = io::Error::last_os_error();
            // If a signal interrupts the call, KVM has updated `range`.
            if ![Some(libc::EINTR), Some(libc::EAGAIN)].contains(&error.raw_os_error()) {
                return Err(error);
            }
        }
    }
    Ok(())
}
