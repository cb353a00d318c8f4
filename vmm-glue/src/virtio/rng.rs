//! virtio-entropy (virtio 1.2, 5.4): random bytes from the host, with a rate limit that keeps the host's cost
//! negligible.

use std::io;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use husk_base::entropy;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::activation::{self, OpenedActivation};
use super::device::{ActivateError, Activation, Interrupt, VirtioDevice};
use super::queue::{Iov, QueueFault, TIMER_TOKEN, Virtqueue, WAKE_TOKEN, WakeEvent};
use super::rate_limit::{Direction, Throttle};
use super::saved::{ActiveState, DeviceValues, SaveError};
use crate::config::{Rate, RateLimit};
use crate::guest_memory::GuestMemory;

/// Maximum size of the queue. A small queue is sufficient, because Linux has at most one request in flight.
const QUEUE_SIZES: [u16; 1] = [8];
const QUEUE: u32 = 0;
/// Maximum number of bytes that one request gets. The driver sends another request for the remaining bytes.
const MAX_REQUEST: usize = 4096;
/// Rate limit of the device. The rate of bytes is sufficient, because a seed has only 32 bytes. The rate of operations
/// limits requests that have no space for bytes.
const RATE_LIMIT: RateLimit = RateLimit {
    bytes: Some(Rate { per_second: 64 << 10, burst: 64 << 10 }),
    operations: Some(Rate { per_second: 1024, burst: 1024 }),
};

/// The entropy device.
pub struct Rng {
    wake: WakeEvent,
    throttle: Throttle,
    active: Option<Active>,
}

struct Active {
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn Interrupt>,
    queue: Virtqueue,
}

impl Rng {
    /// Creates the device.
    pub fn new() -> io::Result<Self> {
        Ok(Self { wake: WakeEvent::new()?, throttle: Throttle::new(RATE_LIMIT, RateLimit::default())?, active: None })
    }

    fn serve(&mut self) -> Result<(), QueueFault> {
        let Self { wake, throttle, active: Some(Active { memory, interrupt, queue }) } = self else { return Ok(()) };
        throttle.begin_turn();
        let mut more = true;
        for _ in 0..queue.size() * 2 {
            if let Some(mut chain) = queue.pop(memory)? {
                chain.writable.truncate(MAX_REQUEST);
                if !throttle.admit(Direction::Receive, chain.writable.len()) {
                    queue.undo_pop();
                    more = false;
                    break;
                }
                let written = fill(&chain.writable);
                // `written` is at most MAX_REQUEST.
                queue.push(memory, chain.head, u32::try_from(written).unwrap_or(u32::MAX))?;
            } else if !queue.enable_notification(memory)? {
                more = false;
                break;
            }
        }
        throttle.end_turn();
        if more {
            wake.wake();
        }
        queue.flush(memory, &**interrupt)
    }
}

/// Writes random bytes to guest memory. Returns the number of bytes written.
fn fill(buffer: &Iov<'_>) -> usize {
    let mut bytes = [0_u8; MAX_REQUEST];
    let count = bytes.len().min(buffer.len());
    let Some(bytes) = bytes.get_mut(..count) else { return 0 };
    match entropy::fill(bytes) {
        Ok(()) => buffer.copy_from(bytes),
        // The host's entropy pool has not been initialized yet. The driver will request the bytes again.
        Err(_) => 0,
    }
}

impl MutEventSubscriber for Rng {
    fn init(&mut self, ops: &mut EventOps) {
        self.wake.init(ops);
        self.throttle.init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            WAKE_TOKEN => {
                self.wake.serve(ops);
                if let Some(active) = &mut self.active {
                    WakeEvent::register(ops, &mut active.queue);
                }
            }
            QUEUE => {
                if let Some(active) = &self.active {
                    active.queue.clear_notification();
                }
            }
            TIMER_TOKEN => self.throttle.clear_timer(),
            _ => {}
        }
        if let Err(fault) = self.serve() {
            let interrupt = self.active.as_ref().map(|active| Arc::clone(&active.interrupt));
            activation::stop_broken_device(self, "virtio-rng", &fault, interrupt);
        }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let OpenedActivation { memory, interrupt, queues: [queue], .. } = activation::open_queues(activation)?;
        self.active = Some(Active { memory, interrupt, queue });
        self.wake.wake();
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            self.wake.retire(active.queue);
        }
    }

    fn save(&self) -> Result<ActiveState, SaveError> {
        let queue = self.active.as_ref().and_then(|active| active.queue.state());
        let queues = vec![queue.ok_or(SaveError::Busy(VIRTIO_ID_RNG))?];
        Ok(ActiveState { queues, values: DeviceValues::None })
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::virtio::testing::Bench;

    #[test]
    fn rate_is_limited_after_burst() {
        let mut bench = Bench::new(Rng::new().unwrap());
        bench.activate(0);
        bench.queues[0].add(&[], &[20, 12]);
        bench.run();
        let (_, bytes) = bench.queues[0].poll().unwrap();
        assert_eq!(bytes.len(), 32);
        assert_ne!(bytes, [0; 32]);
        let start = Instant::now();
        let mut total = 0;
        let bytes = RATE_LIMIT.bytes.unwrap();
        while total < bytes.burst + bytes.per_second / 4 {
            bench.queues[0].add(&[], &[100_000]);
            bench.run_until(|queues| match queues[0].poll() {
                Some((_, bytes)) => {
                    assert!(!bytes.is_empty() && bytes.len() <= MAX_REQUEST);
                    total += bytes.len() as u64;
                    true
                }
                None => false,
            });
        }
        assert!(start.elapsed() > Duration::from_millis(150));
    }

    #[test]
    fn chain_without_writable_part_gets_no_bytes_even_after_reset() {
        let mut bench = Bench::new(Rng::new().unwrap());
        for _ in 0..3 {
            bench.activate(0);
            bench.queues[0].add(&[b"not for reading"], &[]);
            bench.run();
            assert_eq!(bench.queues[0].poll().unwrap().1, b"");
            bench.lock().reset();
            bench.run();
        }
    }
}
