//! The host's side of a queue pair: a queue of the tap, and vhost-net.

use std::fs::File;
use std::io;

use event_manager::{EventOps, Events};
use husk_base::sys::fd::set_nonblocking;
use husk_base::sys::interface::set_queue_attached;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Event tokens of the taps and of vhost-net's faults. The lower half of a token is the pair's index. The token of a
/// queue is the queue's index.
pub const TAP_TOKEN: u32 = 1 << 16;
pub const FAULT_TOKEN: u32 = 2 << 16;

/// The host's side of a queue pair.
pub struct TapQueue {
    /// The open device.
    pub tap: File,
    /// The events for which epoll watches the tap.
    pub watched: EventSet,
    /// Whether epoll watches the tap.
    pub registered: bool,
    /// Whether this queue of the tap is attached, so that it may receive frames for the guest.
    pub attached: bool,
    /// vhost-net, if it is open, and the eventfd that vhost-net signals when the guest breaks a queue.
    pub vhost: Option<(File, EventFd)>,
}

impl TapQueue {
    /// Makes the tap non-blocking.
    pub fn new(tap: File) -> io::Result<Self> {
        set_nonblocking(&tap)?;
        Ok(Self { tap, watched: EventSet::empty(), registered: false, attached: true, vhost: None })
    }

    /// Registers the tap with epoll, at first for no event.
    pub fn init(&mut self, index: u32, ops: &mut EventOps) {
        match ops.add(Events::with_data(&self.tap, TAP_TOKEN | index, EventSet::empty())) {
            Ok(()) => self.registered = true,
            Err(error) => log::error!("virtio-net: failed to register the tap: {error}"),
        }
    }

    /// Takes the open file of vhost-net for this queue pair, and watches for faults of vhost-net.
    pub fn set_vhost(&mut self, file: File, index: u32, ops: &mut EventOps) -> io::Result<()> {
        let fault = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        ops.add(Events::with_data(&fault, FAULT_TOKEN | index, EventSet::IN)).map_err(io::Error::other)?;
        self.vhost = Some((file, fault));
        Ok(())
    }

    /// Closes vhost-net.
    pub fn close_vhost(&mut self, ops: &mut EventOps) {
        if let Some((_, fault)) = self.vhost.take()
            && let Err(error) = ops.remove(Events::empty(&fault))
        {
            log::warn!("virtio-net: failed to unregister vhost-net from the device loop: {error}");
        }
    }
}

/// Attaches the first `count` queues of the tap, and detaches the other queues.
pub fn set_active_queues(tap_queues: &mut [TapQueue], switchable: bool, count: usize) -> io::Result<()> {
    for (index, tap_queue) in tap_queues.iter_mut().enumerate() {
        let wanted = index < count;
        if switchable && tap_queue.attached != wanted {
            set_queue_attached(&tap_queue.tap, wanted)?;
            tap_queue.attached = wanted;
        }
    }
    Ok(())
}

/// Changes the number of active queue pairs from `before` to `count`. Returns whether the change succeeded.
pub fn switch_active_pairs(tap_queues: &mut [TapQueue], switchable: bool, before: usize, count: usize) -> bool {
    let switched = set_active_queues(tap_queues, switchable, count);
    if let Err(error) = &switched {
        log::warn!("virtio-net: failed to change the number of attached queues of the tap to {count}: {error}");
        // Best effort: attach the same queues as before the change.
        let _ = set_active_queues(tap_queues, switchable, before);
    }
    switched.is_ok()
}
