//! virtio-entropy (virtio 1.2, 5.4): random bytes from the host, with a rate limit that keeps the host's cost
//! negligible.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{EventOps, Events, MutEventSubscriber};
use husk_base::entropy;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::activation::{self, OpenedActivation};
use super::device::{ActivateError, Activation, Interrupt, VirtioDevice};
use super::queue::{Iov, QueueFault, Virtqueue, WAKE_TOKEN, WakeEvent};
use crate::guest_memory::GuestMemory;

/// Maximum size of the queue. A small queue is sufficient, because Linux has at most one request in flight.
const QUEUE_SIZES: [u16; 1] = [8];
const QUEUE: u32 = 0;
const TIMER: u32 = 1;
/// Maximum number of bytes that one request gets. The driver sends another request for the remaining bytes.
const MAX_REQUEST: usize = 4096;
/// Number of bytes that a guest may read without a pause.
const BURST: usize = 64 * 1024;
/// Rate limit after the burst, in bytes per second. This is sufficient, because a seed has only 32 bytes.
const RATE: usize = 64 * 1024;
/// Time for which the device serves no requests after it has reached the rate limit.
const PAUSE: Duration = Duration::from_millis(100);

/// The entropy device.
pub struct Rng {
    wake: WakeEvent,
    timer: TimerFd,
    timer_registered: bool,
    active: Option<Active>,
    /// Number of bytes that the rate limit allows now.
    tokens: usize,
    refilled: Instant,
}

struct Active {
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn Interrupt>,
    queue: Virtqueue,
}

impl Rng {
    /// Creates the device.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            wake: WakeEvent::new()?,
            timer: TimerFd::new().map_err(|error| io::Error::from_raw_os_error(error.errno()))?,
            timer_registered: false,
            active: None,
            tokens: BURST,
            refilled: Instant::now(),
        })
    }

    fn refill(&mut self) {
        let elapsed = usize::try_from(self.refilled.elapsed().as_millis()).unwrap_or(usize::MAX);
        let refill = elapsed.saturating_mul(RATE) / 1000;
        if refill > 0 {
            self.tokens = self.tokens.saturating_add(refill).min(BURST);
            self.refilled = Instant::now();
        }
    }

    fn serve(&mut self) -> Result<(), QueueFault> {
        self.refill();
        let Some(active) = &mut self.active else { return Ok(()) };
        let memory = Arc::clone(&active.memory);
        let mut rounds = 0..active.queue.size() * 2;
        let mut more = true;
        while self.tokens > 0 && rounds.next().is_some() {
            if let Some(mut chain) = active.queue.pop(&memory)? {
                chain.writable.truncate(MAX_REQUEST.min(self.tokens));
                let written = fill(&chain.writable);
                self.tokens -= written;
                // `written` is at most MAX_REQUEST.
                active.queue.push(&memory, chain.head, written as u32)?;
            } else if !active.queue.enable_notification(&memory)? {
                more = false;
                break;
            }
        }
        if more {
            // Serve the remaining requests after the pause.
            if let Err(error) = self.timer.reset(PAUSE, None) {
                log::error!("virtio-rng: failed to set the timer: {error}");
            }
        }
        active.queue.flush(&memory, &*active.interrupt)
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
        self.timer_registered = ops.add(Events::with_data(&self.timer, TIMER, EventSet::IN)).is_ok();
        if !self.timer_registered {
            log::error!("virtio-rng: failed to register the timer");
        }
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
            _ => {
                // This event arrives only when the timer has expired. Therefore, the call does not block.
                let _ = self.timer.wait();
            }
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
}

#[cfg(test)]
mod tests {
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
        while total < BURST + RATE / 4 {
            bench.queues[0].add(&[], &[100_000]);
            bench.run_until(|queues| match queues[0].poll() {
                Some((_, bytes)) => {
                    assert!(!bytes.is_empty() && bytes.len() <= MAX_REQUEST);
                    total += bytes.len();
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
