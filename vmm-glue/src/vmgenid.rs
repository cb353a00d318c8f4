//! The virtual machine generation id: 128 random bits in guest memory that change when a machine is cloned, and an
//! interrupt that says so. Linux reseeds its random number generator then (drivers/virt/vmgenid.c).

use std::io;

use kvm_ioctls::VmFd;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::layout;
use crate::virtio::device::GuestMemory;

/// The generation id of one machine.
pub struct VmGenId(EventFd);

impl VmGenId {
    /// Connects its interrupt.
    ///
    /// # Errors
    /// Those of eventfd and KVM_IRQFD.
    pub fn new(vm: &VmFd) -> io::Result<Self> {
        let irq = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        vm.register_irqfd(&irq, layout::VMGENID_GSI).map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        Ok(Self(irq))
    }

    /// Gives the machine a new id. The guest must not run between this and [`Self::notify`].
    ///
    /// # Errors
    /// When there is no entropy or no memory at its place.
    pub fn renew(&self, memory: &GuestMemory) -> io::Result<()> {
        let mut id = [0; layout::VMGENID_LEN as usize];
        fill_random(&mut id)?;
        memory.write_slice(&id, GuestAddress(layout::VMGENID)).map_err(io::Error::other)
    }

    /// Tells a guest that had another id.
    ///
    /// # Errors
    /// The error of writing to KVM's irqfd.
    pub fn notify(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Fills up to 256 bytes from the host's random number generator.
///
/// # Errors
/// That of `getrandom`.
pub fn fill_random(buffer: &mut [u8]) -> io::Result<()> {
    // SAFETY: the buffer is ours and as long as said; requests up to 256 bytes are filled whole.
    let got = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    if usize::try_from(got) == Ok(buffer.len()) { Ok(()) } else { Err(io::Error::last_os_error()) }
}
