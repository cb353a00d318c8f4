//! The virtio-mmio slots, which are fixed address ranges. Some slots hold a device from boot on. The other slots are
//! for hot-plugged devices.

use std::io;
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use husk_base::sync;
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_NET};
use vmm_sys_util::eventfd::EventFd;

use super::device::{self, SharedDevice};
use super::loop_handle::LoopHandle;
use super::mmio::{self, Transport, TransportError};
use super::saved::{RestoreError, SaveError, SavedDevice};
use super::slot_eventfds::{self, Registry};
use crate::arch::layout;
use crate::guest_memory::GuestMemory;

/// Error from plugging a device into a slot, or unplugging it from its slot.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// No slot is free.
    #[error("failed to plug in the device: all slots for disks and interfaces are in use")]
    Full,
    /// The device's transport could not be created.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The eventfd for the device's interrupt could not be created.
    #[error("failed to create the eventfd for the device's interrupt")]
    EventFd(#[source] io::Error),
    /// KVM refused to register an irqfd or an ioeventfd.
    #[error("failed to register the device's eventfds with KVM")]
    Register(#[source] kvm_ioctls::Error),
    /// KVM refused to unregister an irqfd or an ioeventfd.
    #[error("failed to unregister the device's eventfds from KVM")]
    Unregister(#[source] kvm_ioctls::Error),
    /// The slot has no device that can be hot-unplugged.
    #[error("failed to hot-unplug the device in slot {0}: the slot has no disk or interface")]
    NotRemovable(u32),
}

/// Why the saved devices do not fit the slots.
#[derive(Debug, thiserror::Error)]
pub enum RestoreSlotError {
    /// A device could not be restored.
    #[error("failed to restore the device in slot {0}")]
    Device(usize, #[source] RestoreError),
    /// A slot has a device only in the saved VM, or only in this one.
    #[error("slot {0} has a device only in one of the saved VM and this VM")]
    Slot(usize),
}

/// One slot. vCPUs hold the read lock during an access.
type Slot = RwLock<Option<Arc<Transport>>>;

/// All slots of a VM.
pub struct Slots {
    kvm: Arc<dyn Registry + Send + Sync>,
    memory: GuestMemory,
    device_loop: LoopHandle,
    slots: Vec<Slot>,
    /// Number of the first slot that is reserved for memory devices.
    first_memory_slot: usize,
}

/// A device that was removed from its slot.
pub struct Unplugged {
    /// The device.
    pub device: SharedDevice,
    /// Whether KVM has unregistered the slot's eventfds.
    pub unregistered: Result<(), PlugError>,
}

/// The kind of devices that a slot is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Boot devices, and hot-plugged disks and interfaces.
    Any,
    /// Memory devices, for which slots are reserved.
    Memory,
}

impl Slots {
    /// Creates empty slots: `device_slots` for [`Purpose::Any`], and `memory_slots` for memory devices. If a VM cannot
    /// have so many slots, creates fewer slots for [`Purpose::Any`].
    pub fn new(
        kvm: Arc<dyn Registry + Send + Sync>,
        memory: GuestMemory,
        device_loop: LoopHandle,
        device_slots: usize,
        memory_slots: usize,
    ) -> Self {
        let (device_slots, all) = divide(device_slots, memory_slots);
        let slots = (0..all).map(|_| Slot::default()).collect();
        Self { kvm, memory, device_loop, slots, first_memory_slot: device_slots }
    }

    /// Plugs a device into the first free slot for its purpose and returns the slot's number. No two threads may call
    /// this function at the same time.
    pub fn plug(&self, device: SharedDevice, purpose: Purpose) -> Result<u32, PlugError> {
        let range = match purpose {
            Purpose::Any => 0..self.first_memory_slot,
            Purpose::Memory => self.first_memory_slot..self.slots.len(),
        };
        let mut all = (0u32..).zip(&self.slots).skip(range.start).take(range.len());
        let (number, slot) = all.find(|(_, slot)| read(slot).is_none()).ok_or(PlugError::Full)?;
        let irq = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(PlugError::EventFd)?;
        let transport = Transport::new(device, self.memory.clone(), irq, self.device_loop.clone())?;
        slot_eventfds::register(&*self.kvm, number, transport.irq_fd(), transport.notify_fds())
            .map_err(PlugError::Register)?;
        *write(slot) = Some(Arc::new(transport));
        Ok(number)
    }

    /// Removes a disk or an interface from its slot. From then on, the guest finds the slot empty and KVM signals no
    /// notifications. The device stays in the state in which the guest left it.
    ///
    /// # Errors
    /// [`PlugError::NotRemovable`]. An error of KVM is part of the returned [`Unplugged`] instead, because the slot is
    /// empty after such an error too.
    pub fn unplug(&self, number: u32) -> Result<Unplugged, PlugError> {
        let not_removable = || PlugError::NotRemovable(number);
        let slot = self.slots.get(number as usize).ok_or_else(not_removable)?;
        let can_unplug =
            |transport: &mut Arc<Transport>| matches!(transport.device_type(), VIRTIO_ID_NET | VIRTIO_ID_BLOCK);
        let transport = write(slot).take_if(can_unplug).ok_or_else(not_removable)?;
        let unregistered = slot_eventfds::unregister(&*self.kvm, number, transport.irq_fd(), transport.notify_fds());
        Ok(Unplugged { device: transport.device().clone(), unregistered: unregistered.map_err(PlugError::Unregister) })
    }

    /// Returns the slot of the interface with this MAC address, or `None` if no interface has this address.
    pub fn find_net(&self, mac: [u8; 6]) -> Option<u32> {
        let matches_mac = |transport: &Arc<Transport>| {
            let mut device_mac = [0; 6];
            device::lock(transport.device()).read_config(0, &mut device_mac);
            transport.device_type() == VIRTIO_ID_NET && device_mac == mac
        };
        (0u32..)
            .zip(&self.slots)
            .find(|(_, slot)| read(slot).as_ref().is_some_and(matches_mac))
            .map(|(number, _)| number)
    }

    /// Returns the state of the device in each slot. The devices must be paused, and no vCPU may run.
    ///
    /// # Errors
    /// The number of a slot, and why its device cannot be saved.
    pub fn save(&self) -> Result<Vec<Option<SavedDevice>>, (usize, SaveError)> {
        let save = |(number, slot): (usize, &Slot)| {
            read(slot).as_ref().map(|transport| transport.save().map_err(|error| (number, error))).transpose()
        };
        self.slots.iter().enumerate().map(save).collect()
    }

    /// Sets the state of the device in each slot. The slots must have the devices of the saved VM.
    ///
    /// # Errors
    /// [`RestoreSlotError`].
    pub fn restore(&self, saved: &[Option<SavedDevice>]) -> Result<(), RestoreSlotError> {
        for number in 0..self.slots.len().max(saved.len()) {
            let transport = self.slots.get(number).and_then(|slot| read(slot).clone());
            match (transport, saved.get(number).and_then(Option::as_ref)) {
                (Some(transport), Some(saved)) => {
                    transport.restore(saved).map_err(|error| RestoreSlotError::Device(number, error))?;
                }
                (None, None) => {}
                _ => return Err(RestoreSlotError::Slot(number)),
            }
        }
        Ok(())
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
        u32::try_from(self.slots.len()).unwrap_or(u32::MAX)
    }

    fn find(&self, address: u64) -> Option<(&Slot, u64)> {
        let offset = address.checked_sub(layout::MMIO)?;
        let slot = self.slots.get(usize::try_from(offset / layout::MMIO_SLOT).ok()?)?;
        Some((slot, offset % layout::MMIO_SLOT))
    }
}

fn read(slot: &Slot) -> RwLockReadGuard<'_, Option<Arc<Transport>>> {
    sync::read(slot)
}

fn write(slot: &Slot) -> RwLockWriteGuard<'_, Option<Arc<Transport>>> {
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
