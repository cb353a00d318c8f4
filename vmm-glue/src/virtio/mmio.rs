//! The virtio-mmio transport, version 2: registers, interrupt and notifications of one device.
//!
//! See Virtual I/O Device (VIRTIO) 1.2, section 4.2 "Virtio Over MMIO". Every write comes from the guest, which is not
//! trusted. Therefore, the transport ignores writes that the protocol does not allow in the current state. The queue
//! configuration cannot change after DRIVER_OK.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use husk_base::error::chain;
use husk_base::sync;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES, VIRTIO_MMIO_DEVICE_FEATURES_SEL,
    VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK,
    VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH,
    VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS,
    VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::device::{ActivateError, Activation, ActiveQueue, Interrupt, SharedDevice, lock};
use super::loop_handle::LoopHandle;
use super::mmio_interrupt::MmioInterrupt;
use super::saved::{DeviceValues, RestoreError, SaveError, SavedDevice, SavedQueue};
use crate::guest_memory::GuestMemory;

/// Offset of the register that a driver writes to notify a queue. KVM turns the write into an eventfd signal.
pub const NOTIFY_OFFSET: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// "virt" in little-endian byte order.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "HUSK" in little-endian byte order.
const VENDOR: u32 = 0x4b53_5548;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
/// The values of the status register that a saved device can have.
const STATUSES: [u32; 5] = {
    const DRIVER: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
    const FEATURES: u32 = DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
    [0, VIRTIO_CONFIG_S_ACKNOWLEDGE, DRIVER, FEATURES, FEATURES | VIRTIO_CONFIG_S_DRIVER_OK]
};

/// Error from attaching a device to a transport.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The device has a queue of an invalid size.
    #[error("invalid queue size: must be a power of two")]
    QueueSize(#[source] virtio_queue::Error),
    /// An eventfd could not be created.
    #[error("failed to create an eventfd for the notifications of a queue")]
    EventFd(#[source] io::Error),
}

/// A device with its registers.
pub struct Transport {
    device: SharedDevice,
    device_type: u32,
    memory: GuestMemory,
    notify: Vec<EventFd>,
    device_loop: LoopHandle,
    state: Arc<State>,
}

/// The part of a transport that a thread of the device needs to complete a reset. This part does not own the device.
/// Otherwise, a thread of the device could drop the device. Dropping a device joins the device's threads, and a thread
/// must not join itself.
struct State {
    interrupt: Arc<MmioInterrupt>,
    registers: Mutex<Registers>,
    /// Signals that a reset is complete.
    reset_complete: Condvar,
}

/// The registers of the driver, and the state of resets.
struct Registers {
    status: u32,
    device_features: u64,
    device_features_sel: u32,
    driver_features: u64,
    driver_features_sel: u32,
    queue_sel: u32,
    queues: Vec<Queue>,
    /// Whether a reset of the active device has been requested, and is not complete.
    resetting: bool,
    /// Number of complete resets of the active device.
    resets: u64,
}

impl Transport {
    /// Attaches `device` to a new transport. `irq` interrupts the guest. `device_loop` activates and resets the device.
    pub fn new(
        device: SharedDevice,
        memory: GuestMemory,
        irq: EventFd,
        device_loop: LoopHandle,
    ) -> Result<Self, TransportError> {
        let (device_type, device_features, queues) = {
            let device = lock(&device);
            let queues = device.queue_sizes().iter().map(|&size| Queue::new(size)).collect::<Result<Vec<_>, _>>();
            (device.device_type(), device.features(), queues.map_err(TransportError::QueueSize)?)
        };
        let notify = queues
            .iter()
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))
            .collect::<Result<Vec<_>, _>>()
            .map_err(TransportError::EventFd)?;
        Ok(Self {
            device,
            device_type,
            memory,
            notify,
            device_loop,
            state: Arc::new(State {
                interrupt: Arc::new(MmioInterrupt::new(irq)),
                registers: Mutex::new(Registers {
                    status: 0,
                    device_features,
                    device_features_sel: 0,
                    driver_features: 0,
                    driver_features_sel: 0,
                    queue_sel: 0,
                    queues,
                    resetting: false,
                    resets: 0,
                }),
                reset_complete: Condvar::new(),
            }),
        })
    }

    /// Returns the eventfds of the queues. KVM must signal a queue's eventfd when the driver writes the queue's number
    /// to [`NOTIFY_OFFSET`].
    pub fn notify_fds(&self) -> &[EventFd] {
        &self.notify
    }

    /// Returns the device's ID from section 5 of the virtio specification.
    pub fn device_type(&self) -> u32 {
        self.device_type
    }

    /// Returns the device.
    pub fn device(&self) -> &SharedDevice {
        &self.device
    }

    /// Returns the eventfd that interrupts the guest.
    pub fn irq_fd(&self) -> &EventFd {
        self.state.interrupt.irq()
    }

    /// Serves a read by the driver.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(config) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            lock(&self.device).read_config(config, data);
        } else if let (Ok(register), Ok(data)) = (u32::try_from(offset), <&mut [u8; 4]>::try_from(data)) {
            *data = self.read_register(register).to_le_bytes();
        }
    }

    /// Serves a write by the driver. A write that resets the device returns when the reset is complete.
    pub fn write(self: &Arc<Self>, offset: u64, data: &[u8]) {
        if let Some(config) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            let status = self.registers().status | self.state.interrupt.status();
            if status & VIRTIO_CONFIG_S_DRIVER != 0 && status & (VIRTIO_CONFIG_S_FAILED | NEEDS_RESET) == 0 {
                lock(&self.device).write_config(config, data);
            }
        } else if let (Ok(register), Ok(data)) = (u32::try_from(offset), <[u8; 4]>::try_from(data)) {
            self.write_register(register, u32::from_le_bytes(data));
        }
    }

    fn read_register(&self, register: u32) -> u32 {
        match register {
            // Read these two registers without a lock, because the driver reads them at every interrupt.
            VIRTIO_MMIO_INTERRUPT_STATUS => self.state.interrupt.causes(),
            VIRTIO_MMIO_CONFIG_GENERATION => self.state.interrupt.generation(),
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device_type,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            // All ones in length and base mean that the device does not have the selected shared memory region.
            VIRTIO_MMIO_SHM_LEN_LOW..=VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_STATUS => self.registers().status | self.state.interrupt.status(),
            _ => self.registers().read(register),
        }
    }

    fn write_register(self: &Arc<Self>, register: u32, value: u32) {
        match register {
            VIRTIO_MMIO_INTERRUPT_ACK => {
                self.state.interrupt.acknowledge(value);
            }
            // KVM consumes a write whose value is a queue's number. Other values must have no effect.
            VIRTIO_MMIO_QUEUE_NOTIFY => {}
            VIRTIO_MMIO_STATUS => self.write_status(value),
            _ => self.registers().write(register, value),
        }
    }

    fn write_status(self: &Arc<Self>, value: u32) {
        let mut registers = self.registers();
        if value == 0 {
            self.reset(registers);
        } else if registers.advance(value) {
            self.run(Self::activate);
        }
    }

    /// Resets the device. Returns when the reset is complete.
    fn reset(self: &Arc<Self>, mut registers: MutexGuard<'_, Registers>) {
        if registers.status & VIRTIO_CONFIG_S_DRIVER_OK == 0 {
            registers.reset();
            return self.state.interrupt.reset();
        }
        // If several vCPUs write 0, only the first write starts the reset. All these vCPUs wait for the reset.
        registers.resetting = registers.resetting || self.run(Self::start_reset);
        let before = registers.resets;
        while registers.resetting && registers.resets == before {
            registers = sync::wait(&self.state.reset_complete, registers);
        }
    }

    /// Runs `job` on the device loop, after all earlier jobs. The caller must hold the lock of the registers, so that
    /// the jobs run in the order of the writes. Returns false if the device loop has ended.
    ///
    /// At most two jobs wait: the status allows one activation and then one reset, and nothing more before the reset is
    /// complete.
    fn run(self: &Arc<Self>, job: fn(&Arc<Self>)) -> bool {
        let transport = Arc::clone(self);
        let result = self.device_loop.run(move || job(&transport));
        if let Err(error) = &result {
            log::error!("virtio device of type {}: failed to call the device loop: {error}", self.device_type);
        }
        result.is_ok()
    }

    /// Activates the device. Runs on the device loop.
    fn activate(self: &Arc<Self>) {
        let activated = self.activation().and_then(|activation| lock(&self.device).activate(activation));
        if let Err(error) = activated {
            log::warn!("failed to activate virtio device of type {}: {}", self.device_type, chain(&error));
            if let Err(error) = self.state.interrupt.needs_reset() {
                log::warn!("failed to interrupt the driver of virtio device of type {}: {error}", self.device_type);
            }
        }
    }

    /// Returns the device's [`Activation`]. The features and queues are those at DRIVER_OK, because the driver cannot
    /// change them after DRIVER_OK.
    fn activation(&self) -> Result<Activation, ActivateError> {
        let registers = self.registers();
        let mut queues = Vec::with_capacity(registers.queues.len());
        for (index, (queue, notify)) in registers.queues.iter().zip(&self.notify).enumerate() {
            // A ready queue must lie completely in guest memory. The device decides whether it accepts queues that are
            // not ready.
            if queue.ready() && !queue.is_valid(&self.memory) {
                return Err(ActivateError::Queue(index));
            }
            // A restored queue goes on at its position.
            let active = Queue::try_from(queue.state()).map_err(|_| ActivateError::Queue(index))?;
            let notify = notify.try_clone().map_err(|error| ActivateError::Host("a queue's notification", error))?;
            queues.push(ActiveQueue { queue: active, notify });
        }
        Ok(Activation {
            memory: self.memory.clone(),
            features: registers.driver_features,
            queues,
            interrupt: self.state.interrupt.clone(),
        })
    }

    /// Resets the device. Runs on the device loop.
    fn start_reset(self: &Arc<Self>) {
        let state = Arc::clone(&self.state);
        let mut device = lock(&self.device);
        device.reset();
        device.when_idle(Box::new(move || state.complete_reset()));
    }

    /// Returns the state of the device and of this transport. The device must be paused, and no vCPU may run.
    ///
    /// # Errors
    /// [`SaveError`].
    pub fn save(&self) -> Result<SavedDevice, SaveError> {
        let registers = self.registers();
        let failed = VIRTIO_CONFIG_S_FAILED | NEEDS_RESET;
        if registers.resetting || (registers.status | self.state.interrupt.status()) & failed != 0 {
            return Err(SaveError::Reset(self.device_type));
        }
        let mut states: Vec<QueueState> = registers.queues.iter().map(Queue::state).collect();
        let mut values = DeviceValues::None;
        if registers.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            let active = lock(&self.device).save()?;
            values = active.values;
            for (state, active) in states.iter_mut().zip(active.queues) {
                *state = active;
            }
        }
        Ok(SavedDevice {
            device_type: self.device_type,
            status: registers.status,
            driver_features: registers.driver_features,
            selectors: [registers.device_features_sel, registers.driver_features_sel, registers.queue_sel],
            queues: states.into_iter().map(SavedQueue::from).collect(),
            causes: self.state.interrupt.causes(),
            generation: self.state.interrupt.generation(),
            values,
        })
    }

    /// Sets the state of a new device and of this transport. Activates the device if it was active, and interrupts the
    /// driver once: the interrupt of the saved VM may not have reached the guest.
    ///
    /// # Errors
    /// [`RestoreError`]. The VM must not run after an error.
    pub fn restore(self: &Arc<Self>, saved: &SavedDevice) -> Result<(), RestoreError> {
        let device_type = self.device_type;
        if saved.device_type != device_type {
            return Err(RestoreError::Type { saved: saved.device_type, device: device_type });
        }
        let mut registers = self.registers();
        let is_valid = STATUSES.contains(&saved.status) && saved.driver_features & !registers.device_features == 0;
        if !is_valid {
            return Err(RestoreError::Features(device_type));
        }
        let queues = registers.queues.iter().zip(&saved.queues).map(|(queue, saved)| saved.queue(queue.max_size()));
        let queues = queues.collect::<Option<Vec<_>>>().filter(|_| registers.queues.len() == saved.queues.len());
        registers.queues = queues.ok_or(RestoreError::Queues(device_type))?;
        registers.status = saved.status;
        registers.driver_features = saved.driver_features;
        [registers.device_features_sel, registers.driver_features_sel, registers.queue_sel] = saved.selectors;
        let is_active = saved.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        drop(registers);
        self.state.interrupt.restore(saved.causes, saved.generation);
        lock(&self.device).restore(saved.values);
        if is_active && !self.run(Self::activate_restored) {
            return Err(RestoreError::Loop(device_type));
        }
        Ok(())
    }

    /// Activates a restored device, and interrupts its driver.
    fn activate_restored(self: &Arc<Self>) {
        self.activate();
        if let Err(error) = self.state.interrupt.queue(0) {
            log::warn!("failed to interrupt the driver of virtio device of type {}: {error}", self.device_type);
        }
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        sync::lock(&self.state.registers)
    }
}

impl State {
    /// Lets the driver see that the reset is complete. Runs on the device loop or on a thread of the device.
    fn complete_reset(&self) {
        let mut registers = sync::lock(&self.registers);
        registers.reset();
        self.interrupt.reset();
        registers.resetting = false;
        registers.resets = registers.resets.wrapping_add(1);
        self.reset_complete.notify_all();
    }
}

impl Registers {
    fn read(&self, register: u32) -> u32 {
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.device_features, self.device_features_sel),
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.queue().map_or(0, |queue| u32::from(queue.max_size())),
            VIRTIO_MMIO_QUEUE_READY => self.queue().map_or(0, |queue| u32::from(queue.ready())),
            _ => 0,
        }
    }

    fn write(&mut self, register: u32, value: u32) {
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES if self.negotiating() => {
                let value = u64::from(value);
                match self.driver_features_sel {
                    0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
                    1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
                    _ => {}
                }
            }
            VIRTIO_MMIO_QUEUE_READY if self.configuring() => {
                if let Some(queue) = self.queue_mut() {
                    queue.set_ready(value == 1);
                }
            }
            _ if self.configuring() => {
                if let Some(queue) = self.queue_mut().filter(|queue| !queue.ready()) {
                    configure(queue, register, value);
                }
            }
            _ => {}
        }
    }

    /// Returns whether the driver may negotiate features: DRIVER is set, and FEATURES_OK is not set.
    fn negotiating(&self) -> bool {
        self.status == VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER
    }

    /// Returns whether the driver may configure queues: FEATURES_OK is set, and DRIVER_OK is not set.
    fn configuring(&self) -> bool {
        self.status == VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK
    }

    /// Advances the status by one step (section 3.1.1). Returns whether the device must be activated.
    fn advance(&mut self, value: u32) -> bool {
        let current = self.status;
        if value & current != current || self.status & VIRTIO_CONFIG_S_FAILED != 0 || self.resetting {
            return false; // The driver must not remove bits. After FAILED or during a reset, it must not add bits.
        }
        match value & !current & !NEEDS_RESET {
            0 => {}
            VIRTIO_CONFIG_S_FAILED => self.status |= VIRTIO_CONFIG_S_FAILED,
            VIRTIO_CONFIG_S_ACKNOWLEDGE if current == 0 => self.status |= VIRTIO_CONFIG_S_ACKNOWLEDGE,
            VIRTIO_CONFIG_S_DRIVER if current == VIRTIO_CONFIG_S_ACKNOWLEDGE => self.status |= VIRTIO_CONFIG_S_DRIVER,
            VIRTIO_CONFIG_S_FEATURES_OK if self.negotiating() => {
                let version_1 = self.driver_features >> VIRTIO_F_VERSION_1 & 1 == 1;
                if version_1 && self.driver_features & !self.device_features == 0 {
                    self.status |= VIRTIO_CONFIG_S_FEATURES_OK;
                }
            }
            VIRTIO_CONFIG_S_DRIVER_OK if self.configuring() => {
                self.status |= VIRTIO_CONFIG_S_DRIVER_OK;
                return true;
            }
            step => log::debug!("virtio status {:#x}: ignored new bits {step:#x}, which are out of order", self.status),
        }
        false
    }

    fn reset(&mut self) {
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
        self.queues.iter_mut().for_each(QueueT::reset);
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    fn queue_mut(&mut self) -> Option<&mut Queue> {
        self.queues.get_mut(usize::try_from(self.queue_sel).ok()?)
    }
}

/// Writes one register of a queue. The setters ignore values that are misaligned or too large.
fn configure(queue: &mut Queue, register: u32, value: u32) {
    match register {
        VIRTIO_MMIO_QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
        VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
        VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
        VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail_ring_address(Some(value), None),
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_avail_ring_address(None, Some(value)),
        VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(Some(value), None),
        VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_used_ring_address(None, Some(value)),
        _ => {}
    }
}

/// Returns the 32-bit half of `value` that a selector register selects.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => (value & 0xffff_ffff) as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

/// Serves a read from an empty slot. The slot reads as a transport without a device, which has device ID 0 (section
/// 4.2.2).
pub fn read_empty(offset: u64, data: &mut [u8]) {
    data.fill(0);
    if let (Ok(register), Ok(data)) = (u32::try_from(offset), <&mut [u8; 4]>::try_from(data)) {
        *data = match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            _ => 0,
        }
        .to_le_bytes();
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
