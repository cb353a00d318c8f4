//! What every device does with its queues: taking bounded chains, giving them back, notifying, and being told.

use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use event_manager::{EventOps, Events};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemory as _, VolatileSlice};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{ActivateError, ActiveQueue, GuestMemory, Interrupt};

/// Segments of one chain that a device looks at: what one readv or writev takes (IOV_MAX).
pub const MAX_SEGMENTS: usize = 1024;

/// The token of a device's own event; queues have their index.
pub const WAKE: u32 = u32::MAX;

/// The driver broke the rules of a queue as such (not of one buffer): the device stops until it is reset.
#[derive(Debug, thiserror::Error)]
pub enum QueueFault {
    /// The rings cannot be read or written, or their indices make no sense.
    #[error("queue {0} is broken")]
    Ring(u16, #[source] virtio_queue::Error),
    /// The driver could not be interrupted.
    #[error("cannot interrupt for queue {0}")]
    Interrupt(u16, #[source] io::Error),
}

/// What is wrong with one chain. The chain is given back unused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainFault {
    /// More than [`MAX_SEGMENTS`] descriptors.
    #[error("chain of more than {MAX_SEGMENTS} segments")]
    TooLong,
    /// A descriptor points outside the guest's memory.
    #[error("descriptor outside of memory")]
    Address,
    /// A readable descriptor follows a writable one (virtio 1.2, 2.7.4.2 forbids it).
    #[error("readable descriptor after a writable one")]
    Order,
    /// Too short for what must be in it.
    #[error("chain too short")]
    Short,
}

/// One direction of a chain as the I/O vector of a system call, over guest memory that lives as long as `'m`.
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
            // Marked early: what the device writes goes through system calls on plain addresses.
            slice.bitmap().mark_dirty(0, length);
        }
        self.parts.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: length });
        // Sums to less than 2^32, which virtio-queue's iterator sees to.
        self.len += length;
        Ok(())
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The vector for a system call; at most [`MAX_SEGMENTS`] elements.
    pub fn as_slice(&self) -> &[libc::iovec] {
        self.parts.get(self.first..).unwrap_or_default()
    }

    /// Leaves out the first `count` bytes, or all there are.
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

    /// Leaves out everything after the first `count` bytes.
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
            // SAFETY: the parts come from slices that guest memory checked, it outlives 'm, and skip and truncate
            // only shrink them.
            unsafe { VolatileSlice::new(part.iov_base.cast(), part.iov_len) }
        })
    }

    /// Copies out of guest memory from the start, consuming nothing; returns how much there was.
    pub fn copy_to(&self, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.slices() {
            let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) else { break };
            done += slice.copy_to(rest);
        }
        done
    }

    /// Copies into guest memory at the start, consuming nothing; returns how much fitted.
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

/// A chain taken from a queue.
#[derive(Debug)]
pub struct Chain<'m> {
    /// To give it back by.
    pub head: u16,
    /// What the driver wrote for the device.
    pub readable: Iov<'m>,
    /// What the device may write.
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

/// A chain checked and collected, and as the queue has it.
pub type Taken<'m> = (Chain<'m>, DescriptorChain<&'m GuestMemory>);

/// A queue in use.
pub struct Vq {
    queue: virtio_queue::Queue,
    notify: EventFd,
    index: u16,
    registered: bool,
    signal: bool,
}

impl Vq {
    /// Takes a queue over, with the features the driver acknowledged.
    ///
    /// # Errors
    /// [`ActivateError::Queue`] when its rings are not in guest memory.
    pub fn new(active: ActiveQueue, index: u16, memory: &GuestMemory, features: u64) -> Result<Self, ActivateError> {
        let ActiveQueue { mut queue, notify } = active;
        if !queue.is_valid(memory) {
            return Err(ActivateError::Queue(index.into()));
        }
        queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        Ok(Self { queue, notify, index, registered: false, signal: false })
    }

    fn pop_raw<'m>(&mut self, memory: &'m GuestMemory) -> Result<Option<DescriptorChain<&'m GuestMemory>>, QueueFault> {
        let index = self.index;
        Ok(self.queue.iter(memory).map_err(|error| QueueFault::Ring(index, error))?.next())
    }

    /// The next good chain. Bad ones are given back unused, and one call passes at most a queue's worth of them.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemory) -> Result<Option<Chain<'m>>, QueueFault> {
        Ok(self.pop_with_raw(memory)?.map(|(chain, _)| chain))
    }

    /// The next chain, of which nothing is left when it is bad: for who holds several and so gives back in order.
    pub fn pop_any<'m>(&mut self, memory: &'m GuestMemory) -> Result<Option<Chain<'m>>, QueueFault> {
        Ok(self.pop_raw(memory)?.map(|raw| match Chain::collect(memory, raw) {
            (_, Ok(chain)) => chain,
            (head, Err(fault)) => {
                guest_fault(self.index, &fault);
                Chain { head, readable: Iov::new(), writable: Iov::new() }
            }
        }))
    }

    /// Like [`Vq::pop`], and with it the chain as `virtio-queue` knows it.
    pub fn pop_with_raw<'m>(&mut self, memory: &'m GuestMemory) -> Result<Option<Taken<'m>>, QueueFault> {
        for _ in 0..self.queue.size() {
            let Some(raw) = self.pop_raw(memory)? else { return Ok(None) };
            match Chain::collect(memory, raw.clone()) {
                (_, Ok(chain)) => return Ok(Some((chain, raw))),
                (head, Err(fault)) => {
                    guest_fault(self.index, &fault);
                    self.push(memory, head, 0)?;
                }
            }
        }
        Ok(None)
    }

    /// Puts back the chain taken last; nothing else was taken or given back since.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back with `len` bytes written.
    pub fn push(&mut self, memory: &GuestMemory, head: u16, len: u32) -> Result<(), QueueFault> {
        self.signal = true;
        self.queue.add_used(memory, head, len).map_err(|error| QueueFault::Ring(self.index, error))
    }

    /// Interrupts the driver once for all that was given back, if it wants that.
    pub fn flush(&mut self, memory: &GuestMemory, interrupt: &dyn Interrupt) -> Result<(), QueueFault> {
        if std::mem::take(&mut self.signal)
            && self.queue.needs_notification(memory).map_err(|error| QueueFault::Ring(self.index, error))?
        {
            interrupt.queue(self.index).map_err(|error| QueueFault::Interrupt(self.index, error))?;
        }
        Ok(())
    }

    /// Asks to be told of new chains; true when there are some already.
    pub fn listen(&mut self, memory: &GuestMemory) -> Result<bool, QueueFault> {
        self.queue.enable_notification(memory).map_err(|error| QueueFault::Ring(self.index, error))
    }

    /// Asks not to be told of new chains.
    pub fn ignore(&mut self, memory: &GuestMemory) -> Result<(), QueueFault> {
        self.queue.disable_notification(memory).map_err(|error| QueueFault::Ring(self.index, error))
    }

    /// Its addresses, size and indices.
    pub fn ring(&self) -> &virtio_queue::Queue {
        &self.queue
    }

    /// Which of the device's queues it is.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Somebody else has taken chains, up to this index; all of them were given back.
    pub fn taken_until(&mut self, index: u16) {
        self.queue.set_next_avail(index);
        self.queue.set_next_used(index);
    }

    /// How many chains are worth serving in one turn.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Clears the notification.
    pub fn notified(&self) {
        // Would block at worst: somebody else cleared it.
        let _ = self.notify.read();
    }

    /// The queue's notification, for who waits by other means than the device loop.
    pub fn notify_event(&self) -> &EventFd {
        &self.notify
    }
}

/// A device's own event, and the bookkeeping of queue events that only the device loop may do.
pub struct Wake {
    event: EventFd,
    stale: Vec<EventFd>,
}

impl Wake {
    /// Makes the event.
    pub fn new() -> io::Result<Self> {
        Ok(Self { event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?, stale: Vec::new() })
    }

    /// Registers the event, with token [`WAKE`]: a device's `init`.
    pub fn init(&self, ops: &mut EventOps) {
        add(ops, &self.event, WAKE, EventSet::IN);
    }

    /// Makes the loop serve the event.
    pub fn wake(&self) {
        if let Err(error) = self.event.write(1) {
            log::error!("cannot wake the device loop: {error}");
        }
    }

    /// Another handle on the event, for a thread of the device's.
    pub fn handle(&self) -> io::Result<EventFd> {
        self.event.try_clone()
    }

    /// Takes a queue out of use, off the loop: its event stays open until the loop has unregistered it, so that its
    /// number is not another's meanwhile.
    pub fn retire(&mut self, queue: Vq) {
        if queue.registered {
            self.stale.push(queue.notify);
        }
        self.wake();
    }

    /// Serves the event: forgets retired queues.
    pub fn serve(&mut self, ops: &mut EventOps) {
        let _ = self.event.read();
        for event in self.stale.drain(..) {
            if let Err(error) = ops.remove(Events::empty(&event)) {
                log::warn!("cannot unregister a queue: {error}");
            }
        }
    }

    /// Unregisters a queue, on the loop.
    pub fn unregister(ops: &mut EventOps, queue: &mut Vq) {
        if std::mem::take(&mut queue.registered)
            && let Err(error) = ops.remove(Events::empty(&queue.notify))
        {
            log::warn!("cannot unregister a queue: {error}");
        }
    }

    /// Registers a queue that is not yet, with its index as token.
    pub fn register(ops: &mut EventOps, queue: &mut Vq) {
        if !queue.registered {
            queue.registered = add(ops, &queue.notify, queue.index.into(), EventSet::IN);
        }
    }
}

fn add<T: AsRawFd>(ops: &mut EventOps, source: &T, token: u32, set: EventSet) -> bool {
    let added = ops.add(Events::with_data(source, token, set));
    if let Err(error) = &added {
        log::error!("cannot register an event: {error}");
    }
    added.is_ok()
}

/// Copies out of a configuration space; what is beyond its end reads as zero.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Some(rest) = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)) else { return };
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}

/// Logs what a guest did wrong, a few times a second at most for the whole process: a guest can do wrong very often.
pub fn guest_fault(queue: u16, fault: &dyn std::fmt::Display) {
    static WINDOW: AtomicU64 = AtomicU64::new(0);
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    const PER_SECOND: u64 = 5;
    let elapsed: Duration = START.get_or_init(Instant::now).elapsed();
    // Second in the upper half, messages of that second in the lower.
    let second = elapsed.as_secs() << 32;
    let before = WINDOW
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |window| {
            Some(if window & !0xffff_ffff == second { window.saturating_add(1) } else { second | 1 })
        })
        .unwrap_or(0);
    if before & !0xffff_ffff != second || before & 0xffff_ffff < PER_SECOND {
        log::warn!("guest fault on queue {queue}: {fault}");
    }
}

/// An error with all its causes, for a log line.
pub fn chain_of_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
