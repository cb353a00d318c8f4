//! virtio-net (virtio 1.2, 5.1): a network interface with a tap as its backend.
//!
//! Frames are moved between the tap and guest memory without a copy. Checksums and segmentation are offloaded.
//! Therefore, frames can be larger than the MTU and have incomplete checksums. The device loop moves the frames while
//! there are few frames. If the device has vhost-net, and there are many frames, vhost-net in the host's kernel moves
//! them until the next reset. With several vCPUs, the device has several queue pairs. Each pair has its own queue of
//! the tap and its own vhost-net.

mod active;
mod control;
mod load;
mod offload;
mod pump;
#[cfg(test)]
mod rate_limit_tests;
mod tap;
mod tap_queue;
#[cfg(test)]
mod tests;
mod vhost;

use std::fs::File;
use std::io;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use husk_base::error::chain;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_queue::QueueT;
use vmm_sys_util::epoll::EventSet;

use self::active::{Active, DataPath};
use self::load::Load;
use self::offload::Offload;
use self::pump::{FrameRules, QueuePair};
use self::tap_queue::{FAULT_TOKEN, TAP_TOKEN, TapQueue, set_active_queues, switch_active_pairs};
use self::vhost::VhostError;
use super::activation;
use super::device::{ActivateError, Activation, VirtioDevice};
use super::queue::{QueueFault, TIMER_TOKEN, Virtqueue, WAKE_TOKEN, WakeEvent, read_config_bytes};
use super::rate_limit::Throttle;
use crate::config::RateLimit;

pub use self::offload::{OfferError, RequestVhost};
pub use self::tap::flags as tap_flags;

/// Maximum number of queue pairs. Each pair needs buffers in guest and host and, with vhost-net, a thread in the host's
/// kernel. More pairs would not help, because virtio-mmio has one interrupt for all pairs, and eight vCPUs already keep
/// this interrupt busy.
pub const MAX_QUEUE_PAIRS: usize = 8;

/// Maximum size of a queue for frames, and of the control queue.
const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
/// Length of `struct virtio_net_hdr_v1` in bytes. This header precedes each frame.
const VNET_HEADER_LEN: usize = 12;
/// Offset of `num_buffers` in `struct virtio_net_hdr_v1`.
const NUM_BUFFERS_OFFSET: usize = 10;
/// Length of an Ethernet header with a VLAN tag, in bytes.
const VLAN_ETHERNET_HEADER_LEN: usize = 18;
/// Maximum length of a header with its frame, in bytes. With segmentation offload, the longest frame contains an IP
/// packet of 64 KiB.
const MAX_PACKET: usize = VNET_HEADER_LEN + VLAN_ETHERNET_HEADER_LEN + 65_536;

/// The host's side of an interface.
pub struct Backend {
    /// Open fds of `/dev/net/tun`, one for each queue pair. There are 1 to [`MAX_QUEUE_PAIRS`] fds. They are attached
    /// with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR. If there are several fds, they are attached to the same interface with
    /// IFF_MULTI_QUEUE.
    pub taps: Vec<File>,
    /// Requests vhost-net when there are many frames. `None` if vhost-net must not move frames. vhost-net does not
    /// check the source MAC of frames from the guest. Therefore, with vhost-net, the host must do MAC anti-spoofing.
    pub vhost: Option<RequestVhost>,
}

/// The network device.
pub struct Net {
    wake: WakeEvent,
    tap_queues: Vec<TapQueue>,
    queue_sizes: Vec<u16>,
    mac: [u8; 6],
    mtu: u16,
    /// Whether the tap's queues can be attached and detached.
    switchable: bool,
    offload: Offload,
    active: Option<Active>,
    throttle: Throttle,
}

impl Net {
    /// Creates an interface with as many queue pairs as there are taps.
    ///
    /// # Errors
    /// The error of making a tap non-blocking or of creating an eventfd. [`io::ErrorKind::InvalidInput`] if the number
    /// of taps is invalid.
    pub fn new(backend: Backend, mac: [u8; 6], mtu: u16) -> io::Result<Self> {
        let pairs = backend.taps.len();
        if !(1..=MAX_QUEUE_PAIRS).contains(&pairs) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("invalid number of queue pairs: {pairs}, must be 1 to {MAX_QUEUE_PAIRS}"),
            ));
        }
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * pairs];
        if pairs > 1 {
            queue_sizes.push(CONTROL_QUEUE_SIZE);
        }
        let tap_queues = backend.taps.into_iter().map(TapQueue::new).collect::<io::Result<Vec<_>>>()?;
        let switchable = tap_queues.iter().all(|tap_queue| tap_flags(&tap_queue.tap) & libc::IFF_MULTI_QUEUE != 0);
        Ok(Self {
            wake: WakeEvent::new()?,
            tap_queues,
            queue_sizes,
            mac,
            mtu,
            switchable,
            offload: backend.vhost.map_or(Offload::Never, Offload::Possible),
            active: None,
            throttle: Throttle::default(),
        })
    }

    /// Limits the rates of the frames that the guest receives and transmits.
    ///
    /// # Errors
    /// If the timer of the limits cannot be created.
    pub fn limit_rates(&mut self, receive: RateLimit, transmit: RateLimit) -> io::Result<()> {
        self.throttle = Throttle::new(receive, transmit)?;
        Ok(())
    }

    /// Takes over the queues.
    pub(super) fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, features, queues, interrupt } = activation;
        let has = |bit: u32| features & 1 << bit != 0;
        // Without VIRTIO_NET_F_MQ, the control queue is the third queue (virtio 1.2, 5.1.2).
        let pairs = if has(VIRTIO_NET_F_MQ) { self.tap_queues.len() } else { 1 };
        let mut open = Vec::with_capacity(queues.len());
        for (index, queue) in (0u16..).zip(queues) {
            let ready = queue.queue.ready();
            if !ready && index < 2 {
                return Err(ActivateError::Queue(index.into()));
            }
            open.push(ready.then(|| Virtqueue::new(queue, index, &memory, features)).transpose()?);
        }
        let control = open.get_mut(2 * pairs).and_then(Option::take).filter(|_| has(VIRTIO_NET_F_CTRL_VQ));
        let mut open = open.into_iter();
        let pair = |_| Some(QueuePair::new(open.next()??, open.next()??));
        let queue_pairs: Vec<QueuePair> = (0..pairs).map_while(pair).collect();
        if queue_pairs.is_empty() {
            return Err(ActivateError::Queue(0));
        }
        // Only the first pair is active until the driver activates more pairs (virtio 1.2, 5.1.5).
        set_active_queues(&mut self.tap_queues, self.switchable, 1)
            .map_err(|error| ActivateError::Host("the queues of the tap", error))?;
        let segmented = has(VIRTIO_NET_F_GUEST_TSO4) || has(VIRTIO_NET_F_GUEST_TSO6);
        let max_len =
            if segmented { MAX_PACKET } else { VNET_HEADER_LEN + VLAN_ETHERNET_HEADER_LEN + usize::from(self.mtu) };
        self.active = Some(Active {
            memory: Arc::new(memory),
            interrupt,
            queue_pairs,
            active_pairs: 1,
            control,
            control_waiting: true,
            rules: FrameRules { mac: self.mac, mergeable: has(VIRTIO_NET_F_MRG_RXBUF), max_len },
            load: Load::default(),
            features,
            data_path: DataPath::DeviceLoop,
        });
        self.wake.wake();
        Ok(())
    }

    /// Returns whether this interface has the MAC address `mac` and waits for the open files of vhost-net.
    pub fn waits_for_vhost(&self, mac: [u8; 6]) -> bool {
        self.mac == mac && matches!(self.offload, Offload::Requested)
    }

    /// Takes the open files of `/dev/vhost-net` that the interface has requested, one for each queue pair.
    ///
    /// # Errors
    /// [`OfferError`]. After an error, the device loop continues to move the frames.
    pub fn offer_vhost(&mut self, files: Vec<File>) -> Result<(), OfferError> {
        self.offload.offer(files, self.tap_queues.len())?;
        self.wake.wake();
        Ok(())
    }

    /// Requests vhost-net if there are many frames, and starts vhost-net once its open files have arrived. If vhost-net
    /// fails to start, the device loop continues to move the frames.
    fn switch_to_vhost(&mut self, ops: &mut EventOps) {
        let Some(active) = self.active.as_mut() else { return };
        if active.data_path != DataPath::DeviceLoop || !active.load.is_high() {
            return;
        }
        self.offload.request();
        let files = match std::mem::replace(&mut self.offload, Offload::Never) {
            Offload::Received(files) => files,
            Offload::Ready => Vec::new(),
            other => return self.offload = other,
        };
        // Between two turns of the device loop, all popped chains have been returned. Therefore, vhost-net can start at
        // the queues' current indices.
        for pair in &mut active.queue_pairs {
            WakeEvent::unregister(ops, &mut pair.rx);
            WakeEvent::unregister(ops, &mut pair.tx);
        }
        let mut queues = (0..).zip(files).zip(&mut self.tap_queues);
        let set = queues.try_for_each(|((index, file), tap_queue)| tap_queue.set_vhost(file, index, ops));
        match set.map_err(VhostError::Fault).and_then(|()| active.start_vhost(&self.tap_queues)) {
            Ok(()) => {
                active.data_path = DataPath::Vhost;
                self.offload = Offload::Ready;
                log::debug!("virtio-net: vhost-net moves the frames from now on");
            }
            Err(error) => {
                log::warn!(
                    "virtio-net: the VMM continues to move the frames, because it failed to start vhost-net: {}",
                    chain(&error)
                );
                self.tap_queues.iter_mut().for_each(|tap_queue| tap_queue.close_vhost(ops));
                active.register(ops);
                self.wake.wake();
            }
        }
    }

    /// Makes epoll watch only the taps from which frames can be received.
    fn update_interest(&mut self, ops: &mut EventOps) {
        let active = self.active.as_ref().filter(|active| active.data_path == DataPath::DeviceLoop);
        for ((index, tap_queue), token) in self.tap_queues.iter_mut().enumerate().zip(TAP_TOKEN..) {
            let pair =
                active.filter(|active| index < active.active_pairs).and_then(|active| active.queue_pairs.get(index));
            let wanted = if pair.is_some_and(|pair| !pair.rx_waiting) { EventSet::IN } else { EventSet::empty() };
            if tap_queue.registered && wanted != tap_queue.watched {
                match ops.modify(Events::with_data(&tap_queue.tap, token, wanted)) {
                    Ok(()) => tap_queue.watched = wanted,
                    Err(error) => log::error!("virtio-net: failed to watch the tap: {error}"),
                }
            }
        }
    }

    /// Handles an event. After an error, the caller must stop the device until the driver resets it.
    fn handle_event(&mut self, events: Events, ops: &mut EventOps) -> Result<(), VhostError> {
        let token = events.data();
        let index = (token & 0xffff) as usize;
        match token {
            WAKE_TOKEN => {
                self.wake.serve(ops);
                if let Some(active) = &mut self.active {
                    active.register(ops);
                }
            }
            TIMER_TOKEN => self.throttle.clear_timer(),
            TAP_TOKEN.. if token & FAULT_TOKEN != 0 => {
                let Some((_, fault)) = self.tap_queues.get(index).and_then(|tap_queue| tap_queue.vhost.as_ref()) else {
                    return Ok(());
                };
                let _ = fault.read();
                let active = self.active.as_ref().filter(|active| active.data_path != DataPath::DeviceLoop);
                // Ignore a fault of a pair that was just deactivated. vhost-net reports a fault if it cannot send a
                // frame of this pair, because the pair's queue of the tap is detached. The guest did nothing wrong.
                if active.is_some_and(|active| index < active.active_pairs) {
                    return Err(VhostError::Broken(index));
                }
            }
            TAP_TOKEN.. => {
                let Some(tap_queue) = self.tap_queues.get_mut(index) else { return Ok(()) };
                if !events.event_set().contains(EventSet::IN) {
                    // The interface was deleted on the host. No more events will come from the tap.
                    log::warn!("virtio-net: the tap was deleted");
                    if ops.remove(Events::empty(&tap_queue.tap)).is_ok() {
                        tap_queue.registered = false;
                    }
                } else if let Some(pair) = self.active.as_mut().and_then(|active| active.queue_pairs.get_mut(index)) {
                    pair.rx_waiting = true;
                }
            }
            _ => {
                if let Some(active) = &mut self.active {
                    active.notified(token);
                }
            }
        }
        Ok(())
    }

    fn pump(&mut self) -> Result<(), QueueFault> {
        let Self { active: Some(active), tap_queues, switchable, wake, throttle, .. } = self else { return Ok(()) };
        let memory = Arc::clone(&active.memory);
        let interrupt = Arc::clone(&active.interrupt);
        let mut more = false;
        if let Some(control) = active.control.as_mut().filter(|_| active.control_waiting) {
            let (queue_pairs, active_pairs) = (&mut active.queue_pairs, &mut active.active_pairs);
            active.control_waiting = control::serve(control, &memory, |pairs| {
                let pairs = usize::from(pairs);
                let possible = (1..=queue_pairs.len()).contains(&pairs);
                let done = possible && switch_active_pairs(tap_queues, *switchable, *active_pairs, pairs);
                if done {
                    *active_pairs = pairs;
                    queue_pairs.iter_mut().for_each(QueuePair::mark_waiting);
                }
                done
            })?;
            control.flush(&memory, &*interrupt)?;
            more |= active.control_waiting;
        }
        if active.data_path == DataPath::DeviceLoop {
            throttle.begin_turn();
            for (pair, tap_queue) in active.queue_pairs.iter_mut().zip(tap_queues).take(active.active_pairs) {
                more |= pair.pump(&memory, &*interrupt, &tap_queue.tap, &active.rules, &mut active.load, throttle)?;
            }
            throttle.end_turn();
        }
        if more {
            wake.wake();
        }
        Ok(())
    }

    fn stop(&mut self, fault: &dyn std::error::Error) {
        let interrupt = self.active.as_ref().map(|active| Arc::clone(&active.interrupt));
        activation::stop_broken_device(self, "virtio-net", fault, interrupt);
    }
}

impl MutEventSubscriber for Net {
    fn init(&mut self, ops: &mut EventOps) {
        self.wake.init(ops);
        self.throttle.init(ops);
        for (index, tap_queue) in (0..).zip(&mut self.tap_queues) {
            tap_queue.init(index, ops);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if let Err(fault) = self.handle_event(events, ops) {
            self.stop(&fault);
        }
        match self.pump() {
            Ok(()) => self.switch_to_vhost(ops),
            Err(fault) => self.stop(&fault),
        }
        self.update_interest(ops);
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let several: &[u32] = if self.tap_queues.len() > 1 { &[VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ] } else { &[] };
        [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
        ]
        .iter()
        .chain(several)
        .fold(0, |features, bit| features | 1 << bit)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // The fields of struct virtio_net_config are mac, status, max_virtqueue_pairs and mtu.
        let mut config = self.mac.to_vec();
        config.extend(((VIRTIO_NET_S_LINK_UP & 0xffff) as u16).to_le_bytes());
        // The number of pairs has no meaning if VIRTIO_NET_F_MQ is not offered. The number fits into 16 bits, because
        // there are at most MAX_QUEUE_PAIRS pairs.
        let pairs = u16::try_from(self.tap_queues.len()).unwrap_or(u16::MAX);
        let pairs = if pairs > 1 { pairs } else { 0 };
        config.extend(pairs.to_le_bytes());
        config.extend(self.mtu.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let has = |bit: u32| activation.features & 1 << bit != 0;
        // Set the offloads on the first queue only, because they apply to all queues of the tap.
        if let Some(tap_queue) = self.tap_queues.first() {
            tap::set_offload(
                &tap_queue.tap,
                VNET_HEADER_LEN,
                has(VIRTIO_NET_F_GUEST_CSUM),
                has(VIRTIO_NET_F_GUEST_TSO4),
                has(VIRTIO_NET_F_GUEST_TSO6),
            )
            .map_err(|error| ActivateError::Host("the tap's offloads", error))?;
        }
        self.start(activation)
    }

    fn reset(&mut self) {
        let Some(mut active) = self.active.take() else { return };
        if active.data_path != DataPath::DeviceLoop {
            active.stop_vhost(&self.tap_queues);
        }
        for pair in active.queue_pairs {
            self.wake.retire(pair.rx);
            self.wake.retire(pair.tx);
        }
        if let Some(control) = active.control {
            self.wake.retire(control);
        }
    }

    fn pause(&mut self) {
        if let Some(active) = self.active.as_mut().filter(|active| active.data_path == DataPath::Vhost) {
            active.pause_vhost(&self.tap_queues);
        }
    }

    fn resume(&mut self) {
        if let Some(active) = self.active.as_mut().filter(|active| active.data_path == DataPath::VhostPaused)
            && let Err(fault) = active.resume_vhost(&self.tap_queues)
        {
            self.stop(&fault);
        }
    }
}
