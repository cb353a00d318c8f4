//! Hot-plugs and hot-unplugs the devices of a built VM. Each device is in a slot, and the device loop serves it.

use std::collections::HashMap;
use std::sync::Arc;

use event_manager::SubscriberId;

use super::{SaveError, VmError};
use crate::event_loop::EventLoop;
use crate::virtio::device::SharedDevice;
use crate::virtio::saved::SavedDevice;
use crate::virtio::slots::{Purpose, Slots, Unplugged};

/// The slots and the device loop.
pub(crate) struct Devices {
    slots: Arc<Slots>,
    event_loop: EventLoop,
    /// The device loop's ids of hot-plugged devices, by slot.
    hotplugged: HashMap<u32, SubscriberId>,
}

impl Devices {
    /// Takes over the boot devices. The n-th boot device of the loop has to be in slot n.
    pub(crate) fn new(slots: Arc<Slots>, event_loop: EventLoop) -> Self {
        Self { slots, event_loop, hotplugged: HashMap::new() }
    }

    /// Resumes the devices' own threads and then the device loop.
    pub(super) fn resume(&mut self) {
        self.event_loop.resume();
    }

    /// Stops the devices' own threads and the device loop. Returns when all of them have stopped. The vCPUs must have
    /// stopped before, because a vCPU that resets a device waits for the device loop.
    pub(super) fn pause(&mut self) -> Result<(), VmError> {
        Ok(self.event_loop.pause(self.slots.devices().collect())?)
    }

    /// Hot-plugs a device into a free slot for `purpose` and returns the slot's number.
    pub(super) fn attach(&mut self, device: SharedDevice, purpose: Purpose) -> Result<u32, VmError> {
        self.reject_paused()?;
        // Add the device to the device loop first, because the guest may find the device as soon as it is in its slot.
        let id = self.event_loop.add(device.clone())?;
        match self.slots.plug(device, purpose) {
            Ok(slot) => {
                self.hotplugged.insert(slot, id);
                Ok(slot)
            }
            Err(error) => {
                // Removing the device from the loop closes its fds. Otherwise the VMM would keep a disk of the node
                // open although the VM does not have that disk.
                let _ = self.event_loop.remove(id);
                Err(error.into())
            }
        }
    }

    /// Hot-unplugs a disk or an interface: frees its slot and closes its fds.
    ///
    /// # Errors
    /// [`VmError`]. After an error of KVM or of the device loop, the slot is empty nevertheless.
    pub(super) fn detach(&mut self, slot: u32) -> Result<(), VmError> {
        self.reject_paused()?;
        // Empty the slot first, so that no vCPU can activate the device again after the reset.
        let Unplugged { device, unregistered } = self.slots.unplug(slot)?;
        let removed = match self.hotplugged.remove(&slot) {
            Some(id) => self.event_loop.remove(id),
            None => self.event_loop.remove_boot_device(slot),
        };
        // Dropping the device ends its threads, and waits for the requests that they are serving.
        drop(device);
        unregistered?;
        Ok(removed?)
    }

    /// Returns the state of the device in each slot. The device loop must be paused.
    ///
    /// # Errors
    /// [`SaveError::Device`].
    pub(super) fn save(&self) -> Result<Vec<Option<SavedDevice>>, SaveError> {
        self.slots.save().map_err(|(slot, error)| SaveError::Device(slot, error))
    }

    /// Returns the slot of the interface with this MAC address, or `None` if no interface has this address.
    pub(super) fn find_net(&self, mac: [u8; 6]) -> Option<u32> {
        self.slots.find_net(mac)
    }

    /// Returns an error if the device loop is paused, because a paused device loop cannot add or remove devices.
    pub(super) fn reject_paused(&self) -> Result<(), VmError> {
        if self.event_loop.is_paused() { Err(VmError::Paused) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use event_manager::{EventOps, Events, MutEventSubscriber};
    use kvm_ioctls::IoEventAddress;
    use virtio_bindings::virtio_config::{
        VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK,
        VIRTIO_F_VERSION_1,
    };
    use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
    use virtio_bindings::virtio_mmio::{
        VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_STATUS,
    };
    use vm_memory::GuestAddress;
    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::arch::layout;
    use crate::control::wire;
    use crate::event_loop::PreparedLoop;
    use crate::guest_memory::GuestMemory;
    use crate::reporter::Reporter;
    use crate::virtio::device::{ActivateError, Activation, VirtioDevice};
    use crate::virtio::loop_handle::LoopHandle;
    use crate::virtio::slot_eventfds::Registry;
    use crate::virtio::slots::PlugError;

    /// Registers and unregisters nothing. Each field is the result of the calls whose names begin with the field's
    /// name.
    struct FakeKvm {
        register: Result<(), i32>,
        unregister: Result<(), i32>,
    }

    impl Registry for FakeKvm {
        fn register_irqfd(&self, _: &EventFd, _: u32) -> Result<(), kvm_ioctls::Error> {
            self.register.map_err(kvm_ioctls::Error::new)
        }

        fn unregister_irqfd(&self, _: &EventFd, _: u32) -> Result<(), kvm_ioctls::Error> {
            self.unregister.map_err(kvm_ioctls::Error::new)
        }

        fn register_ioevent(&self, _: &EventFd, _: &IoEventAddress, _: u32) -> Result<(), kvm_ioctls::Error> {
            self.register.map_err(kvm_ioctls::Error::new)
        }

        fn unregister_ioevent(&self, _: &EventFd, _: &IoEventAddress, _: u32) -> Result<(), kvm_ioctls::Error> {
            self.unregister.map_err(kvm_ioctls::Error::new)
        }
    }

    #[derive(Default)]
    struct Disk {
        activations: usize,
        active: bool,
    }

    impl MutEventSubscriber for Disk {
        fn process(&mut self, _: Events, _: &mut EventOps<'_>) {}
        fn init(&mut self, _: &mut EventOps<'_>) {}
    }

    impl VirtioDevice for Disk {
        fn device_type(&self) -> u32 {
            VIRTIO_ID_BLOCK
        }
        fn queue_sizes(&self) -> &[u16] {
            &[16]
        }
        fn features(&self) -> u64 {
            1 << VIRTIO_F_VERSION_1
        }
        fn read_config(&self, _: u64, _: &mut [u8]) {}
        fn write_config(&mut self, _: u64, _: &[u8]) {}
        fn activate(&mut self, _: Activation) -> Result<(), ActivateError> {
            self.activations += 1;
            self.active = true;
            Ok(())
        }
        fn reset(&mut self) {
            self.active = false;
        }
    }

    fn devices(kvm: FakeKvm) -> Devices {
        devices_and_loop(kvm).0
    }

    fn devices_and_loop(kvm: FakeKvm) -> (Devices, LoopHandle) {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let reporter = Reporter::new(wire::pair().unwrap().0);
        let device_loop = PreparedLoop::new().unwrap();
        let handle = device_loop.handle();
        let slots = Slots::new(Arc::new(kvm), memory, handle.clone(), 1, 0);
        (Devices::new(Arc::new(slots), device_loop.start(Vec::new(), Arc::new(reporter)).unwrap()), handle)
    }

    /// Writes a register of a slot, as a vCPU does.
    fn write(slots: &Slots, slot: u32, register: u32, value: u32) {
        slots.write(layout::slot_address(slot) + u64::from(register), &value.to_le_bytes());
    }

    #[test]
    fn detach_drops_the_device_if_kvm_fails_to_unregister_its_eventfds() {
        let mut devices = devices(FakeKvm { register: Ok(()), unregister: Err(libc::EIO) });
        let disk = Arc::new(Mutex::new(Disk::default()));
        let slot = devices.attach(disk.clone(), Purpose::Any).unwrap();
        assert!(matches!(devices.detach(slot), Err(VmError::Plug(PlugError::Unregister(_)))));
        assert_eq!(Arc::strong_count(&disk), 1);
        assert!(matches!(devices.detach(slot), Err(VmError::Plug(PlugError::NotRemovable(_)))));
        assert_eq!(devices.attach(disk, Purpose::Any).unwrap(), slot);
    }

    #[test]
    fn detach_resets_device_whose_activation_is_pending() {
        let (mut devices, device_loop) = devices_and_loop(FakeKvm { register: Ok(()), unregister: Ok(()) });
        let disk = Arc::new(Mutex::new(Disk::default()));
        let slot = devices.attach(disk.clone(), Purpose::Any).unwrap();
        let (go_on, wait) = std::sync::mpsc::channel::<()>();
        device_loop.run(move || wait.recv().unwrap_or_default()).unwrap();
        let mut status = 0;
        for bit in [VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER] {
            status |= bit;
            write(&devices.slots, slot, VIRTIO_MMIO_STATUS, status);
        }
        write(&devices.slots, slot, VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        write(&devices.slots, slot, VIRTIO_MMIO_DRIVER_FEATURES, 1 << (VIRTIO_F_VERSION_1 - 32));
        for bit in [VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_DRIVER_OK] {
            status |= bit;
            write(&devices.slots, slot, VIRTIO_MMIO_STATUS, status);
        }
        assert_eq!(disk.lock().unwrap().activations, 0);
        let slots = devices.slots.clone();
        let waker = std::thread::spawn(move || {
            // Let the device loop continue only after the slot is empty.
            while slots.devices().count() > 0 {
                std::thread::yield_now();
            }
            drop(go_on);
        });
        devices.detach(slot).unwrap();
        waker.join().unwrap();
        let disk = disk.lock().unwrap();
        assert_eq!((disk.activations, disk.active), (1, false));
    }

    #[test]
    fn failed_attach_drops_the_device() {
        let mut devices = devices(FakeKvm { register: Err(libc::EIO), unregister: Ok(()) });
        let disk = Arc::new(Mutex::new(Disk::default()));
        assert!(matches!(devices.attach(disk.clone(), Purpose::Any), Err(VmError::Plug(PlugError::Register(_)))));
        assert_eq!(Arc::strong_count(&disk), 1);
    }
}
