//! The virtio-mmio slots: fixed places on the bus, some with a device from the start, some to be filled later, and
//! emptied again.

use std::io;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use kvm_ioctls::{IoEventAddress, VmFd};
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_NET};
use vmm_sys_util::eventfd::EventFd;

use super::device::GuestMemory;
use super::mmio::{self, SharedDevice, Transport, TransportError};
use crate::arch::layout;

/// Why a device could not be plugged in.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// Every slot is taken.
    #[error("every slot for disks and interfaces that come later is taken")]
    Full,
    /// The transport could not be made.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// No more descriptors.
    #[error("cannot create an eventfd")]
    EventFd(#[source] io::Error),
    /// KVM refused an eventfd.
    #[error("KVM refused an eventfd of the device")]
    Kvm(#[source] kvm_ioctls::Error),
    /// There is nothing in the slot that can be taken out.
    #[error("slot {0} has no device that can be taken out")]
    Fixed(u32),
}

/// A place on the bus. vCPUs hold it for as long as one access takes.
type Slot = RwLock<Option<Transport>>;

/// All slots of one machine.
pub struct Slots {
    vm: Arc<VmFd>,
    memory: GuestMemory,
    slots: Vec<Slot>,
    /// The first that is kept for memory.
    kept: usize,
}

/// For whom a slot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Whatever there is at the start, disks and interfaces.
    Any,
    /// Memory, for which slots are kept that nothing else gets.
    Memory,
}

impl Slots {
    /// Empty slots: `open` of them for anything, as far as there is room, and `kept` for memory.
    pub fn new(vm: Arc<VmFd>, memory: GuestMemory, open: usize, kept: usize) -> Self {
        let (open, all) = divide(open, kept);
        Self { vm, memory, slots: (0..all).map(|_| Slot::default()).collect(), kept: open }
    }

    /// Plugs a device into the first free slot of its purpose and returns its number. One thread at a time plugs.
    pub fn plug(&self, device: SharedDevice, purpose: Purpose) -> Result<u32, PlugError> {
        let range = match purpose {
            Purpose::Any => 0..self.kept,
            Purpose::Memory => self.kept..self.slots.len(),
        };
        let mut all = (0u32..).zip(&self.slots).skip(range.start).take(range.len());
        let (number, slot) = all.find(|(_, slot)| read(slot).is_none()).ok_or(PlugError::Full)?;
        let irq = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(PlugError::EventFd)?;
        let transport = Transport::new(device, self.memory.clone(), irq)?;
        self.vm.register_irqfd(transport.irq_fd(), layout::slot_gsi(number)).map_err(PlugError::Kvm)?;
        let address = IoEventAddress::Mmio(layout::slot_address(number) + mmio::NOTIFY_OFFSET);
        for (queue, notify) in (0u32..).zip(transport.notify_fds()) {
            self.vm.register_ioevent(notify, &address, queue).map_err(PlugError::Kvm)?;
        }
        *write(slot) = Some(transport);
        Ok(number)
    }

    /// Takes a disk or an interface out of its slot. The guest finds the slot empty from here on, and KVM tells nobody
    /// of its notifications; the device is in the state in which the guest left it.
    pub fn unplug(&self, number: u32) -> Result<SharedDevice, PlugError> {
        let fixed = || PlugError::Fixed(number);
        let slot = self.slots.get(number as usize).ok_or_else(fixed)?;
        let is_loose = |transport: &mut Transport| matches!(transport.device_type(), VIRTIO_ID_NET | VIRTIO_ID_BLOCK);
        let transport = write(slot).take_if(is_loose).ok_or_else(fixed)?;
        let address = IoEventAddress::Mmio(layout::slot_address(number) + mmio::NOTIFY_OFFSET);
        for (queue, notify) in (0u32..).zip(transport.notify_fds()) {
            self.vm.unregister_ioevent(notify, &address, queue).map_err(PlugError::Kvm)?;
        }
        self.vm.unregister_irqfd(transport.irq_fd(), layout::slot_gsi(number)).map_err(PlugError::Kvm)?;
        Ok(transport.device().clone())
    }

    /// Where the interface with this address is.
    pub fn find_net(&self, mac: [u8; 6]) -> Option<u32> {
        let is_it = |transport: &Transport| {
            let mut has = [0; 6];
            mmio::lock(transport.device()).read_config(0, &mut has);
            transport.device_type() == VIRTIO_ID_NET && has == mac
        };
        (0u32..).zip(&self.slots).find(|(_, slot)| read(slot).as_ref().is_some_and(is_it)).map(|(number, _)| number)
    }

    /// Every device plugged in.
    pub fn devices(&self) -> impl Iterator<Item = SharedDevice> {
        self.slots.iter().filter_map(|slot| read(slot).as_ref().map(|transport| transport.device().clone()))
    }

    /// The guest reads from the slots' address range; addresses of no slot read as all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((slot, offset)) => match &*read(slot) {
                Some(transport) => transport.read(offset, data),
                None => mmio::read_empty(offset, data),
            },
            None => data.fill(0xff),
        }
    }

    /// The guest writes to the slots' address range.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((slot, offset)) = self.find(address)
            && let Some(transport) = &*read(slot)
        {
            transport.write(offset, data);
        }
    }

    /// How many slots there are, empty ones included.
    pub fn count(&self) -> u32 {
        self.slots.len() as u32
    }

    fn find(&self, address: u64) -> Option<(&Slot, u64)> {
        let offset = address.checked_sub(layout::MMIO)?;
        let slot = self.slots.get(usize::try_from(offset / layout::MMIO_SLOT).ok()?)?;
        Some((slot, offset % layout::MMIO_SLOT))
    }
}

fn read(slot: &Slot) -> RwLockReadGuard<'_, Option<Transport>> {
    slot.read().unwrap_or_else(PoisonError::into_inner)
}

fn write(slot: &Slot) -> RwLockWriteGuard<'_, Option<Transport>> {
    slot.write().unwrap_or_else(PoisonError::into_inner)
}

/// How many slots are for anything, and how many there are.
fn divide(open: usize, kept: usize) -> (usize, usize) {
    let kept = kept.min(layout::MAX_SLOTS);
    let open = open.min(layout::MAX_SLOTS - kept);
    (open, open + kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_for_memory_is_not_given_away() {
        assert_eq!(divide(9, 2), (9, 11));
        assert_eq!(divide(17, 2), (16, 18));
        assert_eq!(divide(5, 0), (5, 5));
        assert_eq!(divide(5, 30), (0, 18));
    }
}
