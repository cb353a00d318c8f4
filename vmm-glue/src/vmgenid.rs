//! The VM Generation ID: 128 random bits in guest memory that change when a VM is cloned. An interrupt notifies the
//! guest of the change. Linux then reseeds its random number generator (drivers/virt/vmgenid.c).

use std::io;

use husk_base::entropy;
use kvm_ioctls::VmFd;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::layout;
use crate::guest_memory::GuestMemory;

/// The VM Generation ID of one VM.
pub struct VmGenId(EventFd);

impl VmGenId {
    /// Creates an eventfd for the interrupt of the VM Generation ID, and registers it with KVM as an irqfd.
    pub fn new(vm: &VmFd) -> io::Result<Self> {
        let irq = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        vm.register_irqfd(&irq, layout::VMGENID_GSI).map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        Ok(Self(irq))
    }

    /// Writes a new id. The guest must not run between this call and [`Self::notify`].
    ///
    /// # Errors
    /// The call fails if the host has no entropy, or if there is no guest memory at the id's address.
    pub fn renew(&self, memory: &GuestMemory) -> io::Result<()> {
        let id: [u8; layout::VMGENID_LEN] = entropy::bytes()?;
        memory.write_slice(&id, GuestAddress(layout::VMGENID)).map_err(io::Error::other)
    }

    /// Tells the guest that the id has changed.
    pub fn notify(&self) -> io::Result<()> {
        self.0.write(1)
    }
}
