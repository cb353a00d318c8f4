//! Maps memory of a restored VM, before and while its devices are created.
//!
//! Without this, each page costs an exit from the guest when it is first accessed. KVM_PRE_FAULT_MEMORY (Linux 6.11,
//! `kvm_vcpu_pre_fault_memory()` in virt/kvm/kvm_main.c) maps pages as a read by the guest does. It copies no page, so
//! that the VMs of a template still share them. Pages that the guest will write anyway are copied before, so that they
//! are mapped for writing.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use husk_base::error::chain;
use kvm_bindings::kvm_pre_fault_memory;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

use super::touched::{Range, Touched};
use crate::guest_memory::GuestMemory;
use crate::jail::{Kind, confine};
use crate::memory::populate;

/// Maximum number of bytes that are mapped by one ioctl. Meanwhile, KVM cannot change its tables of devices and of memory
/// (`synchronize_srcu_expedited()` in `kvm_io_bus_register_dev()`).
const CHUNK: usize = 128 << 10;

/// `_IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory)` of include/uapi/linux/kvm.h.
const KVM_PRE_FAULT_MEMORY: u64 = 0xc040_aed5;

/// A thread that maps memory. Dropping it waits for its end.
pub struct Prefault {
    thread: Option<JoinHandle<()>>,
    /// Keeps the fd open until the thread has ended, because the thread's filter does not allow close(2).
    _vcpu: Option<Arc<OwnedFd>>,
}

impl Prefault {
    /// Starts the thread. It copies the pages that the guest will write, and maps them and those that the guest will
    /// read. Best effort: what is missing is mapped when the guest accesses it. `vcpu` must have been restored, because
    /// KVM drops what is mapped when the vCPU's CPUID is set.
    pub fn start(memory: &GuestMemory, vcpu: &VcpuFd, touched: &Touched) -> Self {
        // SAFETY: `vcpu` keeps its fd open during the call.
        let vcpu = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) }.try_clone_to_owned().map(Arc::new);
        let (memory, touched) = (memory.clone(), touched.clone());
        let started = vcpu.and_then(|vcpu| {
            let owner = Arc::clone(&vcpu);
            let prefault = move || match confine(Kind::Prefault) {
                Ok(()) => prefault(&memory, &vcpu, &touched),
                Err(error) => log::warn!("{}", chain(&error)),
            };
            let thread = std::thread::Builder::new().name("prefault".into()).spawn(prefault)?;
            Ok(Self { thread: Some(thread), _vcpu: Some(owner) })
        });
        started.unwrap_or_else(|error| {
            log::warn!("failed to start the thread that maps the memory of the saved VM: {error}");
            Self { thread: None, _vcpu: None }
        })
    }
}

impl Drop for Prefault {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::warn!("the thread that maps the memory of the saved VM panicked");
        }
    }
}

fn prefault(memory: &GuestMemory, vcpu: &OwnedFd, touched: &Touched) {
    for range in &touched.written {
        if let Err(error) = populate(memory, range.address, range.len) {
            log::debug!("failed to copy {} bytes at guest address {:#x}: {error}", range.len, range.address);
        }
    }
    for Range { address, len } in touched.all() {
        for offset in (0..len).step_by(CHUNK) {
            let range = Range { address: address.saturating_add(offset), len: (CHUNK as u64).min(len - offset) };
            if let Err(error) = map(vcpu, range) {
                // KVM before Linux 6.11 does not know the ioctl.
                return log::debug!("failed to map memory of the saved VM in KVM: {error}");
            }
        }
    }
}

fn map(vcpu: &OwnedFd, range: Range) -> io::Result<()> {
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
