//! The driver's side of a device, for tests: queues in guest memory, an event loop and counters of interrupts.

pub mod fuse;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use event_manager::{EventManager, SubscriberOps};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{ActivateError, Activation, ActiveQueue, Interrupt, VirtioDevice};
use super::net::Net;
use crate::guest_memory::GuestMemory;

/// Size of guest memory in bytes. Guest memory starts at address 0. Each queue of a test has one part of guest memory.
const MEMORY: u64 = 6 * PART;
const PART: u64 = 24 << 20;
/// Size of a buffer in bytes. Each descriptor has its own buffer.
const BUFFER: u64 = 128 << 10;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Counts interrupts.
#[derive(Default)]
pub struct Irq {
    pub queues: [AtomicU64; 6],
    pub shared_irqs: AtomicU64,
    pub config: AtomicU64,
    pub needs_reset: AtomicU64,
}

impl Interrupt for Irq {
    fn queue(&self, index: u16) -> io::Result<()> {
        self.queues[usize::from(index)].fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn share_irq(&self) -> io::Result<EventFd> {
        self.shared_irqs.fetch_add(1, Ordering::SeqCst);
        EventFd::new(EFD_NONBLOCK)
    }

    fn config(&self) -> io::Result<()> {
        self.config.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn needs_reset(&self) -> io::Result<()> {
        self.needs_reset.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// A chain in flight: its descriptors, the number of readable descriptors, and the length of each descriptor's buffer.
type InFlightChain = (Vec<u16>, usize, Vec<u32>);

/// The driver's side of one queue.
pub struct Driver {
    memory: GuestMemory,
    base: u64,
    size: u16,
    free: Vec<u16>,
    /// Chains in flight, by head.
    chains: Vec<Option<InFlightChain>>,
    avail: u16,
    used: u16,
    notify: EventFd,
    event_idx: bool,
}

impl Driver {
    fn desc(&self, index: u16) -> GuestAddress {
        GuestAddress(self.base + u64::from(index) * 16)
    }

    fn avail_ring(&self) -> u64 {
        self.base + 0x4000
    }

    fn used_ring(&self) -> u64 {
        self.base + 0x8000
    }

    pub fn buffer(&self, index: u16) -> u64 {
        self.base + 0x10000 + u64::from(index) * BUFFER
    }

    fn new(memory: &GuestMemory, index: u16, size: u16) -> Self {
        let size = size.min(128);
        Self {
            memory: memory.clone(),
            base: u64::from(index) * PART,
            size,
            free: (0..size).rev().collect(),
            chains: (0..size).map(|_| None).collect(),
            avail: 0,
            used: 0,
            notify: EventFd::new(EFD_NONBLOCK).unwrap(),
            event_idx: false,
        }
    }

    fn active(&mut self, features: u64) -> ActiveQueue {
        self.event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        self.memory.write_slice(&[0; 0xc000], GuestAddress(self.base)).unwrap();
        (self.avail, self.used) = (0, 0);
        self.free = (0..self.size).rev().collect();
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.base)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.avail_ring())).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.used_ring())).unwrap();
        queue.set_ready(true);
        ActiveQueue { queue, notify: self.notify.try_clone().unwrap() }
    }

    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    pub fn write_descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = self.desc(index);
        self.memory.write_obj(address, at).unwrap();
        self.memory.write_obj(len, GuestAddress(at.0 + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at.0 + 14)).unwrap();
    }

    /// Writes the descriptor index `head` to the available ring and notifies the device. The descriptor may have any
    /// content.
    pub fn offer(&mut self, head: u16) {
        let slot = self.avail_ring() + 4 + u64::from(self.avail % self.size) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.memory.store(self.avail, GuestAddress(self.avail_ring() + 2), Ordering::SeqCst).unwrap();
        self.notify.write(1).unwrap();
    }

    pub fn set_avail_index(&mut self, index: u16) {
        self.memory.store(index, GuestAddress(self.avail_ring() + 2), Ordering::SeqCst).unwrap();
        self.notify.write(1).unwrap();
    }

    /// Makes a chain available. Its device-readable buffers precede its device-writable buffers.
    pub fn add(&mut self, readable: &[&[u8]], writable: &[usize]) -> u16 {
        let count = readable.len() + writable.len();
        let indices: Vec<u16> = (0..count).map(|_| self.free.pop().unwrap()).collect();
        let mut lengths = Vec::new();
        for (at, &index) in indices.iter().enumerate() {
            let address = self.buffer(index);
            let (len, mut flags) = match readable.get(at) {
                Some(bytes) => {
                    self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
                    (bytes.len(), 0)
                }
                None => (writable[at - readable.len()], WRITE),
            };
            let next = indices.get(at + 1).copied();
            flags |= if next.is_some() { NEXT } else { 0 };
            lengths.push(len as u32);
            self.write_descriptor(index, address, len as u32, flags, next.unwrap_or(0));
        }
        let head = indices[0];
        self.chains[usize::from(head)] = Some((indices, readable.len(), lengths));
        self.offer(head);
        head
    }

    /// Returns the head and the written bytes of the next chain that the device has returned.
    pub fn poll(&mut self) -> Option<(u16, Vec<u8>)> {
        let index: u16 = self.memory.load(GuestAddress(self.used_ring() + 2), Ordering::SeqCst).unwrap();
        if index == self.used {
            return None;
        }
        let slot = self.used_ring() + 4 + u64::from(self.used % self.size) * 8;
        let head = self.memory.read_obj::<u32>(GuestAddress(slot)).unwrap() as u16;
        let len = self.memory.read_obj::<u32>(GuestAddress(slot + 4)).unwrap();
        self.used = self.used.wrapping_add(1);
        if self.event_idx {
            let used_event = self.avail_ring() + 4 + u64::from(self.size) * 2;
            self.memory.store(self.used, GuestAddress(used_event), Ordering::SeqCst).unwrap();
        }
        let mut bytes = Vec::new();
        if let Some((indices, readable, lengths)) = self.chains[usize::from(head)].take() {
            let mut left = len;
            for (&index, &length) in indices.iter().zip(&lengths).skip(readable) {
                let count = left.min(length);
                let mut part = vec![0; count as usize];
                self.memory.read_slice(&mut part, GuestAddress(self.buffer(index))).unwrap();
                bytes.extend(part);
                left -= count;
            }
            assert_eq!(left, 0, "the device reports more written bytes than the chain has writable bytes");
            self.free.extend(indices);
        }
        Some((head, bytes))
    }
}

/// Returns a queue with `size` descriptors and no features, without a device. Guest memory ends after the buffers of
/// the descriptors.
#[cfg(test)]
pub fn queue_without_device(size: u16) -> (GuestMemory, Driver, super::queue::Virtqueue) {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10000 + usize::from(size) * BUFFER as usize)]).unwrap();
    let mut driver = Driver::new(&memory, 0, size);
    let queue = super::queue::Virtqueue::new(driver.active(0), 0, &memory, 0).unwrap();
    (memory, driver, queue)
}

/// A device on an event loop, with its driver's queues.
pub struct Bench<D: VirtioDevice> {
    pub device: Arc<Mutex<D>>,
    pub memory: GuestMemory,
    pub irq: Arc<Irq>,
    pub queues: Vec<Driver>,
    manager: EventManager<Arc<Mutex<D>>>,
}

impl<D: VirtioDevice> Bench<D> {
    /// Creates an event loop with the device, which is not activated.
    pub fn new(device: D) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let queues = (0..).zip(device.queue_sizes()).map(|(index, &size)| Driver::new(&memory, index, size)).collect();
        let device = Arc::new(Mutex::new(device));
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(Arc::clone(&device));
        Self { device, memory, irq: Arc::default(), queues, manager }
    }

    /// Activates the device with new queues and all features except `without`.
    pub fn activate(&mut self, without: u64) {
        self.activate_by(without, D::activate);
    }

    fn activate_by(&mut self, without: u64, by: impl FnOnce(&mut D, Activation) -> Result<(), ActivateError>) {
        let mut device = self.device.lock().unwrap();
        let features = device.features() & !without;
        let queues = self.queues.iter_mut().map(|queue| queue.active(features)).collect();
        let interrupt = Arc::clone(&self.irq) as Arc<dyn Interrupt>;
        by(&mut device, Activation { memory: self.memory.clone(), features, queues, interrupt }).unwrap();
        drop(device);
        self.run();
    }

    pub fn lock(&self) -> MutexGuard<'_, D> {
        self.device.lock().unwrap()
    }

    /// Runs the event loop until no events are left.
    pub fn run(&mut self) {
        for _ in 0..10_000 {
            if self.manager.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the event loop still has events after 10000 iterations");
    }

    /// Runs the event loop until a condition is true, for devices with their own threads.
    pub fn run_until(&mut self, mut done: impl FnMut(&mut [Driver]) -> bool) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while !done(&mut self.queues) {
            assert!(std::time::Instant::now() < deadline, "timed out while waiting for the device");
            self.manager.run_with_timeout(0).unwrap();
            std::thread::yield_now();
        }
    }
}

impl Bench<Net> {
    /// Activates an interface that has a socket instead of a tap. Unlike [`Bench::activate`], this function sets no
    /// offloads, because a socket has no offloads.
    pub fn activate_with_socket(&mut self, without: u64) {
        self.activate_by(without, Net::start);
    }
}
