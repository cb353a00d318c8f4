//! The virtio-mmio slots: fixed address ranges. Some hold a device from boot on, others hold hot-plugged devices.

use std::io;
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use husk_base::sync;
use kvm_ioctls::VmFd;
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_NET};
use vmm_sys_util::eventfd::EventFd;

use super::mmio::{self, SharedDevice, Transport, TransportError};
use super::slot_eventfds;
use crate::arch::layout;
use crate::guest_memory::GuestMemory;

/// Error of plugging a device into a slot, or unplugging it from its slot.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// No slot is free.
    #[error("failed to plug in the device: all slots for disks and interfaces are in use")]
    Full,
    /// The device's transport could not be created.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// An eventfd could not be created.
    #[error("failed to create an eventfd")]
    EventFd(#[source] io::Error),
    /// KVM refused an irqfd or an ioeventfd.
    #[error("failed to register the device's eventfds with KVM")]
    Kvm(#[source] kvm_ioctls::Error),
    /// The slot has no device that can be hot-unplugged.
    #[error("failed to hot-unplug the device in slot {0}: the slot has no disk or interface")]
    NotRemovable(u32),
}

/// One slot. vCPUs hold the read lock during an access.
type Slot = RwLock<Option<Transport>>;

/// All slots of a VM.
pub struct Slots {
    vm: Arc<VmFd>,
    memory: GuestMemory,
    slots: Vec<Slot>,
    /// Number of the first slot that is reserved for memory devices.
    first_memory_slot: usize,
}

/// The kind of devices for which a slot can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Boot devices, and hot-plugged disks and interfaces.
    Any,
    /// Memory devices, for which slots are reserved.
    Memory,
}

impl Slots {
    /// Creates empty slots: `device_slots` for any device, and `memory_slots` for memory devices. If the VM does not
    /// have this number of slots, the number of slots for any device is reduced.
    pub fn new(vm: Arc<VmFd>, memory: GuestMemory, device_slots: usize, memory_slots: usize) -> Self {
        let (device_slots, all) = divide(device_slots, memory_slots);
        Self { vm, memory, slots: (0..all).map(|_| Slot::default()).collect(), first_memory_slot: device_slots }
    }

    /// Plugs a device into the first free slot for its purpose and returns the slot's number. Callers must not run
    /// concurrently.
    pub fn plug(&self, device: SharedDevice, purpose: Purpose) -> Result<u32, PlugError> {
        let range = match purpose {
            Purpose::Any => 0..self.first_memory_slot,
            Purpose::Memory => self.first_memory_slot..self.slots.len(),
        };
        let mut all = (0u32..).zip(&self.slots).skip(range.start).take(range.len());
        let (number, slot) = all.find(|(_, slot)| read(slot).is_none()).ok_or(PlugError::Full)?;
        let irq = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(PlugError::EventFd)?;
        let transport = Transport::new(device, self.memory.clone(), irq)?;
        slot_eventfds::register(&*self.vm, number, transport.irq_fd(), transport.notify_fds())
            .map_err(PlugError::Kvm)?;
        *write(slot) = Some(transport);
        Ok(number)
    }

    /// Removes a disk or an interface from its slot. After that, the guest finds the slot empty, and KVM does not
    /// signal notifications. The device stays in the state in which the guest left it.
    pub fn unplug(&self, number: u32) -> Result<SharedDevice, PlugError> {
        let not_removable = || PlugError::NotRemovable(number);
        let slot = self.slots.get(number as usize).ok_or_else(not_removable)?;
        let can_unplug = |transport: &mut Transport| matches!(transport.device_type(), VIRTIO_ID_NET | VIRTIO_ID_BLOCK);
        let transport = write(slot).take_if(can_unplug).ok_or_else(not_removable)?;
        slot_eventfds::unregister(&*self.vm, number, transport.irq_fd(), transport.notify_fds())
            .map_err(PlugError::Kvm)?;
        Ok(transport.device().clone())
    }

    /// Returns the slot of the interface with this MAC address, or `None`.
    pub fn find_net(&self, mac: [u8; 6]) -> Option<u32> {
        let matches_mac = |transport: &Transport| {
            let mut device_mac = [0; 6];
            mmio::lock(transport.device()).read_config(0, &mut device_mac);
            transport.device_type() == VIRTIO_ID_NET && device_mac == mac
        };
        (0u32..)
            .zip(&self.slots)
            .find(|(_, slot)| read(slot).as_ref().is_some_and(matches_mac))
            .map(|(number, _)| number)
    }

    /// Returns all plugged devices.
    pub fn devices(&self) -> impl Iterator<Item = SharedDevice> {
        self.slots.iter().filter_map(|slot| read(slot).as_ref().map(|transport| transport.device().clone()))
    }

    /// Serves a read from the slots' address range. Addresses without a slot read as all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((slot, offset)) => match &*read(slot) {
                Some(transport) => transport.read(offset, data),
                None => mmio::read_empty(offset, data),
            },
            None => data.fill(0xff),
        }
    }

    /// Serves a write to the slots' address range.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((slot, offset)) = self.find(address)
            && let Some(transport) = &*read(slot)
        {
            transport.write(offset, data);
        }
    }

    /// Returns the number of slots, including empty ones.
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
    sync::read(slot)
}

fn write(slot: &Slot) -> RwLockWriteGuard<'_, Option<Transport>> {
    sync::write(slot)
}

/// Returns the number of slots for any device, and the number of all slots.
fn divide(device_slots: usize, memory_slots: usize) -> (usize, usize) {
    let memory_slots = memory_slots.min(layout::MAX_SLOTS);
    let device_slots = device_slots.min(layout::MAX_SLOTS - memory_slots);
    (device_slots, device_slots + memory_slots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_for_memory_devices_stay_reserved() {
        assert_eq!(divide(9, 2), (9, 11));
        assert_eq!(divide(17, 2), (16, 18));
        assert_eq!(divide(5, 0), (5, 5));
        assert_eq!(divide(5, 30), (0, 18));
    }
}
