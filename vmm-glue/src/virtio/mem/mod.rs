//! virtio-mem (virtio 1.2, 5.15): memory that is plugged into the running guest and unplugged from it.
//!
//! The VMM sets a requested size. To reach this size, the driver plugs blocks one by one, or unplugs blocks that it can
//! free. A block that is not plugged is inaccessible. If a guest accesses such a block, through a vCPU or through a
//! queue, the VM ends.

use std::io;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;

use self::request::{Answer, Blocks, REQUEST_LEN, Request, State};
use super::activation::{self, OpenedActivation};
use super::device::{ActivateError, Activation, Interrupt, VirtioDevice};
use super::queue::{Chain, QueueFault, Virtqueue, WAKE_TOKEN, WakeEvent, log_guest_fault, read_config_bytes};
use crate::guest_memory::GuestMemory;
use crate::memory::hotplug::HotplugRange;

mod request;

/// Maximum size of the queue. A small queue is sufficient, because Linux has at most one request in flight.
const QUEUE_SIZES: [u16; 1] = [8];
/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE. A driver that acknowledges this feature does not read unplugged memory. The
/// dump code of old kernels would read such memory.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
/// Size of a block in bytes. This is the smallest size that Linux can plug on x86-64.
pub const BLOCK: u64 = 2 << 20;

/// Called with the number of plugged bytes, when the guest has reached the requested size or when another size is
/// requested.
pub type OnSizeReached = Box<dyn FnOnce(u64) + Send>;

/// The memory device.
pub struct Mem {
    wake: WakeEvent,
    range: HotplugRange,
    blocks: Blocks,
    /// The requested size: the number of bytes that the guest should have plugged.
    requested: u64,
    /// Size in bytes of the usable region, in which the guest may plug blocks.
    usable: u64,
    on_size_reached: Option<OnSizeReached>,
    /// Whether the requested size changed while the device was inactive. If so, the activation interrupts the driver,
    /// because the driver may have read the previous size: the driver reads the size as soon as it has set DRIVER_OK,
    /// and the device becomes active a little later.
    changed_while_inactive: bool,
    active: Option<Active>,
}

struct Active {
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn Interrupt>,
    queue: Virtqueue,
}

impl Mem {
    /// Creates a device with no plugged blocks and a requested size of 0.
    ///
    /// # Errors
    /// The error of eventfd(2), together with the range. The caller has to keep the range, because a range can be
    /// reserved only once.
    pub fn new(range: HotplugRange) -> Result<Self, (HotplugRange, io::Error)> {
        let wake = match WakeEvent::new() {
            Ok(wake) => wake,
            Err(error) => return Err((range, error)),
        };
        let blocks = Blocks::new(range.len() / BLOCK);
        let (on_size_reached, changed_while_inactive) = (None, false);
        Ok(Self { wake, range, blocks, requested: 0, usable: 0, on_size_reached, changed_while_inactive, active: None })
    }

    /// Returns the range, so that it can be registered with KVM before [`Mem::request`].
    pub fn range(&mut self) -> &mut HotplugRange {
        &mut self.range
    }

    /// Returns how many bytes from the start of the range must be registered with KVM before `bytes` are requested.
    pub fn extent(&self, bytes: u64) -> u64 {
        self.range.extent(bytes.saturating_add(BLOCK))
    }

    /// Requests that the guest plugs or unplugs blocks until `bytes` are plugged, rounded up to whole blocks. `reached`
    /// is called when this size is reached, or when another size is requested.
    pub fn request(&mut self, bytes: u64, reached: OnSizeReached) -> io::Result<()> {
        self.requested = bytes.min(self.range.len()).next_multiple_of(BLOCK);
        // The usable region does not shrink here, because blocks up to its end may be plugged.
        self.usable = self.usable.max(self.range.extent(self.requested));
        let plugged = self.plugged();
        if let Some(previous) = self.on_size_reached.replace(reached) {
            previous(plugged);
        }
        self.report_if_reached();
        match &self.active {
            Some(active) => active.interrupt.config()?,
            None => self.changed_while_inactive = true,
        }
        Ok(())
    }

    /// Returns the number of plugged bytes.
    pub fn plugged(&self) -> u64 {
        self.blocks.plugged() * BLOCK
    }

    fn report_if_reached(&mut self) {
        if self.plugged() == self.requested
            && let Some(reached) = self.on_size_reached.take()
        {
            reached(self.requested);
        }
    }

    fn serve(&mut self) -> Result<(), QueueFault> {
        let Some(mut active) = self.active.take() else { return Ok(()) };
        let result = self.serve_queue(&mut active);
        self.active = Some(active);
        self.report_if_reached();
        result
    }

    fn serve_queue(&mut self, active: &mut Active) -> Result<(), QueueFault> {
        let memory = Arc::clone(&active.memory);
        let mut more = true;
        for _ in 0..active.queue.size() {
            if let Some(chain) = active.queue.pop(&memory)? {
                let written = self.answer(&chain);
                active.queue.push(&memory, chain.head, written)?;
            } else if !active.queue.enable_notification(&memory)? {
                more = false;
                break;
            }
        }
        if more {
            self.wake.wake();
        }
        active.queue.flush(&memory, &*active.interrupt)
    }

    /// Serves the request of one chain. Returns the length of the response.
    fn answer(&mut self, chain: &Chain<'_>) -> u32 {
        let request = chain.readable.clone().take::<REQUEST_LEN>().ok().and_then(|bytes| Request::parse(&bytes));
        let answer = match request {
            Some(request) => self.execute(request),
            None => Answer::Error,
        };
        if answer == Answer::Error {
            log_guest_fault(0, &"invalid virtio-mem request");
        }
        let bytes = answer.encode();
        if chain.writable.len() < bytes.len() {
            return 0;
        }
        u32::try_from(chain.writable.copy_from(&bytes)).unwrap_or(u32::MAX)
    }

    fn execute(&mut self, request: Request) -> Answer {
        let find = |address, count| Blocks::find(address, count, self.range.start(), self.usable);
        match request {
            Request::Plug { address, count } => match find(address, count) {
                Some(range) if self.blocks.state(range.clone()) == State::Unplugged => {
                    let bytes = (range.end - range.start) * BLOCK;
                    if self.plugged() + bytes > self.requested {
                        return Answer::Nack;
                    }
                    match self.range.open(range.start * BLOCK, bytes) {
                        Ok(()) => {
                            self.blocks.set(range, true);
                            Answer::Ack
                        }
                        Err(error) => {
                            log::warn!("virtio-mem: failed to plug {bytes} bytes: {error}");
                            Answer::Busy
                        }
                    }
                }
                _ => Answer::Error,
            },
            Request::Unplug { address, count } => match find(address, count) {
                Some(range) if self.blocks.state(range.clone()) == State::Plugged => self.unplug(range),
                _ => Answer::Error,
            },
            Request::UnplugAll => match self.unplug(0..self.usable / BLOCK) {
                Answer::Ack => {
                    // Section 5.15.6.2: the usable region can shrink if no block is plugged.
                    self.usable = self.range.extent(self.requested);
                    Answer::Ack
                }
                other => other,
            },
            Request::State { address, count } => match find(address, count) {
                Some(range) => Answer::State(self.blocks.state(range)),
                None => Answer::Error,
            },
        }
    }

    fn unplug(&mut self, range: std::ops::Range<u64>) -> Answer {
        match self.range.close(range.start * BLOCK, (range.end - range.start) * BLOCK) {
            Ok(()) => {
                self.blocks.set(range, false);
                Answer::Ack
            }
            Err(error) => {
                log::warn!("virtio-mem: failed to unplug memory: {error}");
                Answer::Busy
            }
        }
    }
}

impl MutEventSubscriber for Mem {
    fn init(&mut self, ops: &mut EventOps) {
        self.wake.init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.data() == WAKE_TOKEN {
            self.wake.serve(ops);
            if let Some(active) = &mut self.active {
                WakeEvent::register(ops, &mut active.queue);
            }
        } else if let Some(active) = &self.active {
            active.queue.clear_notification();
        }
        if let Err(fault) = self.serve() {
            let interrupt = self.active.as_ref().map(|active| Arc::clone(&active.interrupt));
            activation::stop_broken_device(self, "virtio-mem", &fault, interrupt);
        }
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE | 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    /// Returns the fields of `struct virtio_mem_config` (5.15.4): block size, node and padding, start and length of the
    /// region, size of the usable region, plugged size, and requested size.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let words = [BLOCK, 0, self.range.start(), self.range.len(), self.usable, self.plugged(), self.requested];
        let config: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let OpenedActivation { memory, interrupt, queues: [queue], .. } = activation::open_queues(activation)?;
        if self.changed_while_inactive {
            interrupt.config().map_err(|error| ActivateError::Host("the interrupt for the requested size", error))?;
            self.changed_while_inactive = false;
        }
        self.active = Some(Active { memory, interrupt, queue });
        self.wake.wake();
        Ok(())
    }

    /// Plugged blocks stay plugged, because the guest may be using them (5.15.6.2).
    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            self.wake.retire(active.queue);
        }
    }
}

#[cfg(test)]
mod tests;
