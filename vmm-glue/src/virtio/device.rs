//! The contract between a virtio device and its transport; a device knows nothing of the transport.

use std::sync::Arc;

use event_manager::MutEventSubscriber;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

/// Guest memory as every device sees it (the type virtiofsd's readers and writers take).
pub type GuestMemory = vm_memory::GuestMemoryMmap<BitmapMmapRegion>;

/// One virtqueue, set up by the driver and frozen since DRIVER_OK.
pub struct ActiveQueue {
    /// Addresses, size and indices.
    pub queue: Queue,
    /// Signalled by KVM when the driver notifies this queue.
    pub notify: EventFd,
}

/// What a device gets when the driver sets DRIVER_OK.
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// Feature bits that the driver acknowledged, a subset of those offered.
    pub features: u64,
    /// The queues, as many as [`VirtioDevice::queue_sizes`] has.
    pub queues: Vec<ActiveQueue>,
    /// How the device interrupts the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Raises the device's interrupts.
pub trait Interrupt: Send + Sync {
    /// Buffers of the queue were used.
    fn queue(&self, index: u16) -> std::io::Result<()>;
    /// Somebody outside the VMM, vhost in the host's kernel, interrupts by writing to this eventfd when it has used
    /// buffers of a queue. Nobody tells the transport which of its interrupts were these: from this call until the
    /// device's reset the driver is told with each that buffers may have been used, which costs it a look.
    fn hand_over(&self) -> std::io::Result<EventFd>;
    /// The configuration space changed.
    fn config(&self) -> std::io::Result<()>;
    /// The driver broke the rules of its queues: the device has stopped, and sets DEVICE_NEEDS_RESET if it can.
    fn needs_reset(&self) -> std::io::Result<()> {
        self.config()
    }
}

/// Why a device could not be activated; the transport then sets DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// A queue is missing, not ready or not valid.
    #[error("queue {0} is not usable")]
    Queue(usize),
    /// A host resource could not be prepared.
    #[error("cannot prepare {0}")]
    Host(&'static str, #[source] std::io::Error),
}

/// A virtio device.
///
/// The device sits behind a mutex, on the VMM's one device loop: vCPU threads lock it for configuration accesses and
/// activation, the loop locks it to serve events. `init` of [`MutEventSubscriber`] runs once, when the device is
/// plugged in, and registers at least an eventfd of the device's own, which `activate` writes to: queue events are
/// registered when that event is served, because only the loop may change the set of events.
pub trait VirtioDevice: MutEventSubscriber + Send {
    /// Device ID of the virtio specification, section 5.
    fn device_type(&self) -> u32;
    /// Maximum size of each queue, powers of two.
    fn queue_sizes(&self) -> &[u16];
    /// Feature bits offered, VIRTIO_F_VERSION_1 among them.
    fn features(&self) -> u64;
    /// Reads the configuration space; bytes beyond its end are zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes the configuration space; what is read-only or beyond the end is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// Starts serving.
    ///
    /// # Errors
    /// [`ActivateError`]; the device stays inactive.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;
    /// Stops serving and forgets all queues, as after power-on. Called on device reset by the driver.
    fn reset(&mut self);
    /// Returns when no thread of the device's own serves a request, and none will until [`VirtioDevice::resume`]. For
    /// a pause of the machine, after its vCPUs; the device loop stands still by itself.
    fn quiesce(&mut self) {}
    /// Serves again.
    fn resume(&mut self) {}
}
