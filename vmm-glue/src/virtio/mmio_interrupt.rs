//! The interrupt line of the virtio-mmio transport (virtio 1.2, 4.2.2).

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

use super::device::Interrupt;

/// The device's single interrupt line, with two possible causes.
pub struct MmioInterrupt {
    status: AtomicU32,
    generation: AtomicU32,
    /// Whether the device has failed, so that the driver sees DEVICE_NEEDS_RESET. This flag is not one of the
    /// transport's registers, because a device sets the flag through [`Interrupt`], without the lock of the registers.
    needs_reset: AtomicBool,
    /// Whether vhost also writes to `irq`, after it has used buffers (see [`Interrupt::share_irq`]).
    shared: AtomicBool,
    irq: EventFd,
}

impl Interrupt for MmioInterrupt {
    fn queue(&self, _index: u16) -> io::Result<()> {
        self.status.fetch_or(VIRTIO_MMIO_INT_VRING, Ordering::SeqCst);
        self.irq.write(1)
    }

    fn share_irq(&self) -> io::Result<EventFd> {
        let irq = self.irq.try_clone()?;
        self.shared.store(true, Ordering::SeqCst);
        Ok(irq)
    }

    fn config(&self) -> io::Result<()> {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.status.fetch_or(VIRTIO_MMIO_INT_CONFIG, Ordering::SeqCst);
        self.irq.write(1)
    }

    fn needs_reset(&self) -> io::Result<()> {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.config()
    }
}

impl MmioInterrupt {
    /// Returns an interrupt line that signals `irq`.
    pub fn new(irq: EventFd) -> Self {
        Self {
            status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            shared: AtomicBool::new(false),
            irq,
        }
    }

    /// Returns the eventfd that interrupts the guest.
    pub fn irq(&self) -> &EventFd {
        &self.irq
    }

    /// Returns the number of changes of the configuration space.
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Sets the causes and the number of changes, for a saved device.
    pub fn restore(&self, causes: u32, generation: u32) {
        self.status.store(causes, Ordering::SeqCst);
        self.generation.store(generation, Ordering::SeqCst);
    }

    /// Clears the causes that the driver has handled.
    pub fn acknowledge(&self, causes: u32) {
        self.status.fetch_and(!causes, Ordering::SeqCst);
    }

    /// Returns the status bits that the device adds to the driver's status bits.
    pub fn status(&self) -> u32 {
        if self.needs_reset.load(Ordering::SeqCst) { VIRTIO_CONFIG_S_NEEDS_RESET } else { 0 }
    }

    /// Returns the causes of an interrupt. If vhost shares the eventfd, the VRING bit is always set, because vhost
    /// cannot set this bit. Without the VRING bit, Linux's driver does not look at its queues (`vm_interrupt` in
    /// drivers/virtio/virtio_mmio.c).
    pub fn causes(&self) -> u32 {
        let shared = if self.shared.load(Ordering::SeqCst) { VIRTIO_MMIO_INT_VRING } else { 0 };
        self.status.load(Ordering::SeqCst) | shared
    }

    /// Removes all causes and the failure. Keeps the number of changes of the configuration space.
    pub fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
        self.shared.store(false, Ordering::SeqCst);
    }
}
