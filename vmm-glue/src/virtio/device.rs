//! The interface between a virtio device and its transport. A device does not know its transport.

use std::sync::{Arc, Mutex, MutexGuard};

use event_manager::MutEventSubscriber;
use husk_base::sync;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::saved::{ActiveState, DeviceValues, SaveError};
use crate::guest_memory::GuestMemory;

/// A virtqueue that the driver has set up. The queue's configuration cannot change after DRIVER_OK.
pub struct ActiveQueue {
    /// The queue's addresses, size and indices.
    pub queue: Queue,
    /// The eventfd that KVM signals when the driver notifies this queue.
    pub notify: EventFd,
}

/// The queues, features and memory that a device gets when the driver sets DRIVER_OK.
pub struct Activation {
    /// Guest memory.
    pub memory: GuestMemory,
    /// Feature bits that the driver has acknowledged, a subset of the offered bits.
    pub features: u64,
    /// One queue for each entry of [`VirtioDevice::queue_sizes`], in the same order.
    pub queues: Vec<ActiveQueue>,
    /// Interrupts the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// A device's interrupts.
pub trait Interrupt: Send + Sync {
    /// Interrupts the driver because buffers of the queue were used.
    fn queue(&self, index: u16) -> std::io::Result<()>;
    /// Returns an eventfd through which vhost in the host's kernel interrupts the driver when vhost has used buffers.
    ///
    /// The transport does not learn which interrupts came from vhost. Therefore, from this call until the device's
    /// reset, every interrupt reports that buffers may have been used. After each interrupt, the driver has to check
    /// its queues.
    fn share_irq(&self) -> std::io::Result<EventFd>;
    /// Interrupts the driver because the configuration space changed.
    fn config(&self) -> std::io::Result<()>;
    /// Requests a reset from the driver, because the device has failed. For example, the driver may have broken a
    /// queue. Sets DEVICE_NEEDS_RESET if the transport supports this status bit.
    fn needs_reset(&self) -> std::io::Result<()> {
        self.config()
    }
}

/// Error from activating a device. After this error, the transport sets DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// A queue is missing, not ready or invalid.
    #[error("queue {0} is missing, not ready or invalid")]
    Queue(usize),
    /// A host resource could not be prepared.
    #[error("failed to set up {0}")]
    Host(&'static str, #[source] std::io::Error),
}

/// A closure to call when a device has become idle after a reset. If threads of the device are still serving requests,
/// the thread that ends its request last calls the closure.
pub type OnIdle = Box<dyn FnOnce() + Send>;

/// A device, shared by the device loop and the transport.
pub type SharedDevice = Arc<Mutex<dyn VirtioDevice>>;

/// Locks a device.
pub fn lock(device: &SharedDevice) -> MutexGuard<'_, dyn VirtioDevice + 'static> {
    sync::lock(device)
}

/// A virtio device.
///
/// A mutex protects the device. vCPU threads lock the mutex for configuration accesses only. The VMM's single device
/// loop activates, resets, pauses and resumes the device, and serves its events. Therefore, a vCPU thread needs none of
/// the system calls that a device makes.
///
/// `init` of [`MutEventSubscriber`] runs once, when the device is plugged in. If the device loop serves the device's
/// queues, `init` must register an eventfd of the device, and `activate` must write to this eventfd. The device
/// registers its queue events when it serves this eventfd, because `activate` cannot change the set of events.
pub trait VirtioDevice: MutEventSubscriber + Send {
    /// Returns the device ID of the virtio specification, section 5.
    fn device_type(&self) -> u32;
    /// Returns the maximum size of each queue. Sizes are powers of two.
    fn queue_sizes(&self) -> &[u16];
    /// Returns the offered feature bits, including VIRTIO_F_VERSION_1.
    fn features(&self) -> u64;
    /// Reads from the configuration space. Bytes beyond its end are zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes to the configuration space. Writes to read-only fields or beyond the end are ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// Starts to serve the queues.
    ///
    /// # Errors
    /// [`ActivateError`]. After an error, the device is still inactive.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;
    /// Stops serving and drops all queues. The device is then in the same state as after power-on, except that the
    /// device's own threads may still be serving requests that they took before (see [`VirtioDevice::when_idle`]).
    /// Does not wait for these threads, because the device loop must go on serving the other devices. Called when the
    /// driver resets the device, or has broken a queue.
    fn reset(&mut self);
    /// Returns the state of an active device that is paused. By default, a device cannot be saved.
    ///
    /// # Errors
    /// [`SaveError`].
    fn save(&self) -> Result<ActiveState, SaveError> {
        Err(SaveError::Type(self.device_type()))
    }
    /// Sets the values of a saved device, before the device is activated.
    fn restore(&mut self, _values: DeviceValues) {}
    /// Calls `idle` when all requests of earlier activations have ended. The caller must have called
    /// [`VirtioDevice::reset`], and must not call [`VirtioDevice::activate`] before `idle` has been called.
    fn when_idle(&mut self, idle: OnIdle) {
        idle();
    }
    /// Pauses the device's own threads. Returns when all these threads are idle. The threads stay idle until
    /// [`VirtioDevice::resume`]. Called when the vCPUs have been paused, just before the device loop pauses.
    fn pause(&mut self) {}
    /// Resumes the device's own threads.
    fn resume(&mut self) {}
}
