//! Virtqueue operations for all devices: popping descriptor chains of bounded length, returning chains, and
//! notifications.

#[path = "queue_polling.rs"]
mod polling;

use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, Events};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemory as _, VolatileSlice};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{ActivateError, ActiveQueue, Interrupt};
use crate::guest_memory::GuestMemory;

/// Maximum number of segments in a chain, which is the limit of one readv or writev (IOV_MAX).
pub const MAX_SEGMENTS: usize = 1024;

/// Event token of a device's own eventfd. Queue events have the queue's index as token.
pub const WAKE_TOKEN: u32 = u32::MAX;
/// Event token of the timer of a device with a rate limit.
pub const TIMER_TOKEN: u32 = u32::MAX - 1;

/// A fault that breaks the whole queue and not only one chain. After this fault, the device stops until the driver
/// resets the device.
#[derive(Debug, thiserror::Error)]
pub enum QueueFault {
    /// The rings cannot be accessed, or their indices are invalid.
    #[error("failed to access the rings of queue {0}")]
    Ring(u16, #[source] virtio_queue::Error),
    /// The driver has made more chains available than the queue has descriptors, so that a chain is available twice.
    #[error("queue {0} has more chains in flight than descriptors")]
    TooManyChains(u16),
    /// The driver could not be interrupted.
    #[error("failed to interrupt the driver for queue {0}")]
    Interrupt(u16, #[source] io::Error),
}

/// Reason why a chain is invalid. An invalid chain is returned unused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainFault {
    /// The chain has more than [`MAX_SEGMENTS`] descriptors.
    #[error("the chain has more than {MAX_SEGMENTS} segments")]
    TooLong,
    /// A descriptor points outside of guest memory.
    #[error("a descriptor points outside of guest memory")]
    Address,
    /// A readable descriptor follows a writable descriptor, which virtio 1.2, 2.7.4.2 forbids.
    #[error("a readable descriptor follows a writable descriptor")]
    Order,
    /// The chain is too short for its required content.
    #[error("the chain is too short")]
    Short,
}

/// The readable or the writable buffers of a chain, as an I/O vector for system calls. The vector points to guest
/// memory that lives for `'m`.
#[derive(Debug, Clone)]
pub struct Iov<'m> {
    parts: Vec<libc::iovec>,
    first: usize,
    len: usize,
    memory: PhantomData<&'m GuestMemory>,
}

impl<'m> Iov<'m> {
    fn new() -> Self {
        Self { parts: Vec::new(), first: 0, len: 0, memory: PhantomData }
    }

    fn push(&mut self, memory: &'m GuestMemory, descriptor: &Descriptor, write: bool) -> Result<(), ChainFault> {
        let length = descriptor.len() as usize;
        if length == 0 {
            return Ok(());
        }
        let slice = memory.get_slice(descriptor.addr(), length).map_err(|_| ChainFault::Address)?;
        if write {
            // Mark the range as dirty before the device writes to it, because vm-memory does not notice the write.
            // Devices write with system calls on plain addresses.
            slice.bitmap().mark_dirty(0, length);
        }
        self.parts.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: length });
        // The sum is less than 2^32, as the iterator of virtio-queue ensures.
        self.len += length;
        Ok(())
    }

    /// Returns the number of bytes that have not been consumed.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether all bytes have been consumed.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the vector for a system call, with at most [`MAX_SEGMENTS`] elements.
    pub fn as_slice(&self) -> &[libc::iovec] {
        self.parts.get(self.first..).unwrap_or_default()
    }

    /// Drops the first `count` bytes, or all bytes if the vector has fewer.
    pub fn skip(&mut self, count: usize) {
        let mut left = count.min(self.len);
        self.len -= left;
        while let Some(part) = self.parts.get_mut(self.first) {
            if left < part.iov_len {
                part.iov_base = part.iov_base.wrapping_byte_add(left);
                part.iov_len -= left;
                return;
            }
            left -= part.iov_len;
            self.first += 1;
        }
    }

    /// Drops everything after the first `count` bytes.
    pub fn truncate(&mut self, count: usize) {
        if count >= self.len {
            return;
        }
        self.len = count;
        let mut left = count;
        for index in self.first..self.parts.len() {
            if let Some(part) = self.parts.get_mut(index)
                && left <= part.iov_len
            {
                part.iov_len = left;
                self.parts.truncate(if left == 0 { index } else { index + 1 });
                return;
            }
            left -= self.parts.get(index).map_or(0, |part| part.iov_len);
        }
    }

    fn slices(&self) -> impl Iterator<Item = VolatileSlice<'m>> + '_ {
        self.as_slice().iter().map(|part| {
            // SAFETY: `push` takes each buffer from a slice that guest memory has checked, and `skip` and `truncate`
            // only shrink buffers. The borrow of `'m` keeps guest memory mapped.
            unsafe { VolatileSlice::new(part.iov_base.cast(), part.iov_len) }
        })
    }

    /// Copies from the start of the vector to `buffer`. Does not consume the bytes. Returns the number of bytes copied.
    pub fn copy_to(&self, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.slices() {
            let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) else { break };
            done += slice.copy_to(rest);
        }
        done
    }

    /// Copies `buffer` to the start of the vector. Does not consume the space. Returns the number of bytes copied.
    pub fn copy_from(&self, buffer: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.slices() {
            let Some(rest) = buffer.get(done..).filter(|rest| !rest.is_empty()) else { break };
            let count = rest.len().min(slice.len());
            slice.copy_from(rest.get(..count).unwrap_or_default());
            done += count;
        }
        done
    }

    /// Reads exactly `N` bytes and consumes them.
    pub fn take<const N: usize>(&mut self) -> Result<[u8; N], ChainFault> {
        let mut bytes = [0; N];
        if self.copy_to(&mut bytes) < N {
            return Err(ChainFault::Short);
        }
        self.skip(N);
        Ok(bytes)
    }
}

/// A descriptor chain that was popped from a queue.
#[derive(Debug)]
pub struct Chain<'m> {
    /// Index of the first descriptor. This index identifies the chain when the chain is returned.
    pub head: u16,
    /// Buffers that the driver has written.
    pub readable: Iov<'m>,
    /// Buffers that the device may write.
    pub writable: Iov<'m>,
}

impl<'m> Chain<'m> {
    fn collect(memory: &'m GuestMemory, chain: DescriptorChain<&'m GuestMemory>) -> (u16, Result<Self, ChainFault>) {
        let head = chain.head_index();
        let mut this = Self { head, readable: Iov::new(), writable: Iov::new() };
        let mut writing = false;
        for (count, descriptor) in chain.enumerate() {
            if count >= MAX_SEGMENTS {
                return (head, Err(ChainFault::TooLong));
            }
            let part = if descriptor.is_write_only() {
                writing = true;
                this.writable.push(memory, &descriptor, true)
            } else if writing {
                Err(ChainFault::Order)
            } else {
                this.readable.push(memory, &descriptor, false)
            };
            if let Err(fault) = part {
                return (head, Err(fault));
            }
        }
        (head, Ok(this))
    }
}

/// A chain that a device keeps for later. The value keeps guest memory mapped.
#[derive(Debug)]
pub struct HeldChain {
    head: u16,
    readable: Vec<libc::iovec>,
    writable: Vec<libc::iovec>,
    /// Keeps the addresses mapped.
    _memory: Arc<GuestMemory>,
}

// SAFETY: the vectors contain addresses in guest memory, and any thread may access guest memory. `_memory` keeps the
// addresses mapped.
unsafe impl Send for HeldChain {}

impl HeldChain {
    /// Keeps a chain. No bytes of the chain may have been consumed.
    ///
    /// # Safety
    /// The chain must be a chain of `memory`.
    pub unsafe fn new(chain: Chain<'_>, memory: Arc<GuestMemory>) -> Self {
        Self { head: chain.head, readable: chain.readable.parts, writable: chain.writable.parts, _memory: memory }
    }

    /// Returns the chain. The chain has the buffers that were checked when the chain was popped.
    pub fn chain(&self) -> Chain<'_> {
        let iov = |parts: &Vec<libc::iovec>| Iov {
            parts: parts.clone(),
            first: 0,
            len: parts.iter().map(|part| part.iov_len).sum(),
            memory: PhantomData,
        };
        Chain { head: self.head, readable: iov(&self.readable), writable: iov(&self.writable) }
    }
}

/// A queue of an active device.
pub struct Virtqueue {
    queue: virtio_queue::Queue,
    notify: EventFd,
    index: u16,
    /// Number of chains that were popped and not returned. Devices hold chains, and a hostile driver can make the same
    /// chain available again and again.
    in_flight: u16,
    registered: bool,
    signal: bool,
}

impl Virtqueue {
    /// Takes over a queue, with the features that the driver has acknowledged.
    ///
    /// # Errors
    /// [`ActivateError::Queue`] if the rings of the queue are not in guest memory.
    pub fn new(active: ActiveQueue, index: u16, memory: &GuestMemory, features: u64) -> Result<Self, ActivateError> {
        let ActiveQueue { mut queue, notify } = active;
        if !queue.is_valid(memory) {
            return Err(ActivateError::Queue(index.into()));
        }
        queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        Ok(Self { queue, notify, index, in_flight: 0, registered: false, signal: false })
    }

    fn pop_raw<'m>(&mut self, memory: &'m GuestMemory) -> Result<Option<DescriptorChain<&'m GuestMemory>>, QueueFault> {
        let (index, full) = (self.index, self.in_flight >= self.queue.size());
        let chain = self.queue.iter(memory).map_err(|error| QueueFault::Ring(index, error))?.next();
        if chain.is_some() {
            if full {
                return Err(QueueFault::TooManyChains(index));
            }
            self.in_flight += 1;
        }
        Ok(chain)
    }

    /// Pops the next valid chain. Invalid chains before it are returned unused. Returns `None` if there are no more
    /// chains, or after as many invalid chains as the queue has entries.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemory) -> Result<Option<Chain<'m>>, QueueFault> {
        for _ in 0..self.queue.size() {
            let Some(raw) = self.pop_raw(memory)? else { return Ok(None) };
            match Chain::collect(memory, raw) {
                (_, Ok(chain)) => return Ok(Some(chain)),
                (head, Err(fault)) => {
                    log_guest_fault(self.index, &fault);
                    self.push(memory, head, 0)?;
                }
            }
        }
        Ok(None)
    }

    /// Pops the next chain, or returns `None` if there is no chain. An invalid chain is also popped, but without
    /// buffers, because the callers of this function hold several chains and must return them in order.
    pub fn pop_any<'m>(&mut self, memory: &'m GuestMemory) -> Result<Option<Chain<'m>>, QueueFault> {
        Ok(self.pop_raw(memory)?.map(|raw| match Chain::collect(memory, raw) {
            (_, Ok(chain)) => chain,
            (head, Err(fault)) => {
                log_guest_fault(self.index, &fault);
                Chain { head, readable: Iov::new(), writable: Iov::new() }
            }
        }))
    }

    /// Undoes the last pop. After that pop, the caller must not have popped or returned another chain.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// Returns a chain to the driver, after `len` bytes were written to the chain.
    pub fn push(&mut self, memory: &GuestMemory, head: u16, len: u32) -> Result<(), QueueFault> {
        self.signal = true;
        self.in_flight = self.in_flight.saturating_sub(1);
        self.queue.add_used(memory, head, len).map_err(|error| QueueFault::Ring(self.index, error))
    }

    /// Interrupts the driver once for all returned chains, if the driver has requested an interrupt.
    pub fn flush(&mut self, memory: &GuestMemory, interrupt: &dyn Interrupt) -> Result<(), QueueFault> {
        if std::mem::take(&mut self.signal)
            && self.queue.needs_notification(memory).map_err(|error| QueueFault::Ring(self.index, error))?
        {
            interrupt.queue(self.index).map_err(|error| QueueFault::Interrupt(self.index, error))?;
        }
        Ok(())
    }

    /// Enables the driver's notifications for new chains. Returns true if there are already new chains.
    pub fn enable_notification(&mut self, memory: &GuestMemory) -> Result<bool, QueueFault> {
        self.queue.enable_notification(memory).map_err(|error| QueueFault::Ring(self.index, error))
    }

    /// Disables the driver's notifications for new chains.
    pub fn disable_notification(&mut self, memory: &GuestMemory) -> Result<(), QueueFault> {
        self.queue.disable_notification(memory).map_err(|error| QueueFault::Ring(self.index, error))
    }

    /// Returns the queue's addresses, size and indices.
    pub fn ring(&self) -> &virtio_queue::Queue {
        &self.queue
    }

    /// Returns the queue's index among the device's queues.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Returns the state of the queue, or `None` if the device holds chains of it.
    pub fn state(&self) -> Option<virtio_queue::QueueState> {
        (self.in_flight == 0).then(|| self.queue.state())
    }

    /// Updates the indices after vhost has served the queue: all chains up to `index` were popped and returned.
    pub fn set_served_until(&mut self, index: u16) {
        self.queue.set_next_avail(index);
        self.queue.set_next_used(index);
        self.in_flight = 0;
    }

    /// Returns the queue's size. Devices derive from this size how many chains they serve in one turn.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Clears the queue's notification.
    pub fn clear_notification(&self) {
        // This call fails with EAGAIN if the notification has already been cleared.
        let _ = self.notify.read();
    }

    /// Returns the queue's notification eventfd, for vhost and for threads other than the device loop.
    pub fn notify_eventfd(&self) -> &EventFd {
        &self.notify
    }
}

/// A device's own eventfd, and the registration of queue events, which only the device loop may change.
pub struct WakeEvent {
    event: EventFd,
    stale: Vec<EventFd>,
}

impl WakeEvent {
    /// Creates the eventfd.
    pub fn new() -> io::Result<Self> {
        Ok(Self { event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?, stale: Vec::new() })
    }

    /// Registers the eventfd with token [`WAKE_TOKEN`]. A device's `init` must call this function.
    pub fn init(&self, ops: &mut EventOps) {
        add(ops, &self.event, WAKE_TOKEN, EventSet::IN);
    }

    /// Makes the device loop serve the eventfd.
    pub fn wake(&self) {
        if let Err(error) = self.event.write(1) {
            log::error!("failed to wake the device loop: {error}");
        }
    }

    /// Returns another handle to the eventfd, for a thread of the device.
    pub fn try_clone(&self) -> io::Result<EventFd> {
        self.event.try_clone()
    }

    /// Takes a queue out of use. Any thread may call this function. If the queue's eventfd is registered, the eventfd
    /// stays open until the device loop has unregistered the eventfd. If the eventfd were closed earlier, a new file
    /// could get the registered fd number.
    pub fn retire(&mut self, queue: Virtqueue) {
        if queue.registered {
            self.stale.push(queue.notify);
        }
        self.wake();
    }

    /// Serves the eventfd by unregistering the retired queues.
    pub fn serve(&mut self, ops: &mut EventOps) {
        let _ = self.event.read();
        for event in self.stale.drain(..) {
            if let Err(error) = ops.remove(Events::empty(&event)) {
                log::warn!("failed to unregister a queue from the device loop: {error}");
            }
        }
    }

    /// Unregisters a queue. Must be called on the device loop.
    pub fn unregister(ops: &mut EventOps, queue: &mut Virtqueue) {
        if std::mem::take(&mut queue.registered)
            && let Err(error) = ops.remove(Events::empty(&queue.notify))
        {
            log::warn!("failed to unregister a queue from the device loop: {error}");
        }
    }

    /// Registers a queue with its index as token, if the queue is not registered. Must be called on the device loop.
    pub fn register(ops: &mut EventOps, queue: &mut Virtqueue) {
        if !queue.registered {
            queue.registered = add(ops, &queue.notify, queue.index.into(), EventSet::IN);
        }
    }
}

fn add<T: AsRawFd>(ops: &mut EventOps, source: &T, token: u32, set: EventSet) -> bool {
    let added = ops.add(Events::with_data(source, token, set));
    if let Err(error) = &added {
        log::error!("failed to register an event with the device loop: {error}");
    }
    added.is_ok()
}

/// Reads from a configuration space. Bytes beyond its end are zero.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Some(rest) = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)) else { return };
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}

/// Logs a guest's fault. The process's log limits the rate of such lines.
pub fn log_guest_fault(queue: u16, fault: &dyn std::fmt::Display) {
    log::warn!("guest fault on queue {queue}: {fault}");
}

/// Logs that the host failed to serve a guest's request. The process's log limits the rate of such lines.
pub fn log_host_failure(failure: &dyn std::fmt::Display) {
    log::warn!("{failure}");
}

/// Returns the number of buffers as readv(2) and writev(2) expect it. These calls refuse more than IOV_MAX buffers.
pub fn iovec_count(parts: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(parts.len()).unwrap_or(libc::c_int::MAX)
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
