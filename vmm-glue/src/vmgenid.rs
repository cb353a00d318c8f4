//! The VM Generation ID: 128 random bits in guest memory that change when a VM is cloned. An interrupt tells the guest
//! of the change. Linux then reseeds its random number generator (drivers/virt/vmgenid.c).

use std::io;

use kvm_ioctls::VmFd;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::layout;
use crate::virtio::device::GuestMemory;

/// The VM Generation ID of one VM.
pub struct VmGenId(EventFd);

impl VmGenId {
    /// Connects its interrupt to KVM.
    pub fn new(vm: &VmFd) -> io::Result<Self> {
        let irq = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        vm.register_irqfd(&irq, layout::VMGENID_GSI).map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        Ok(Self(irq))
    }

    /// Writes a new id. The guest must not run between this call and [`Self::notify`].
    ///
    /// # Errors
    /// If the host has no entropy, or if there is no guest memory at the id's address.
    pub fn renew(&self, memory: &GuestMemory) -> io::Result<()> {
        let mut id = [0; layout::VMGENID_LEN as usize];
        fill_random(&mut id)?;
        memory.write_slice(&id, GuestAddress(layout::VMGENID)).map_err(io::Error::other)
    }

    /// Tells the guest that the id has changed.
    pub fn notify(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Fills a buffer of at most 256 bytes from the host's random number generator.
pub fn fill_random(buffer: &mut [u8]) -> io::Result<()> {
    // SAFETY: pointer and length are those of one mutable slice. getrandom(2) fills requests of at most 256 bytes
    // completely.
    let filled = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    if usize::try_from(filled) == Ok(buffer.len()) { Ok(()) } else { Err(io::Error::last_os_error()) }
}
