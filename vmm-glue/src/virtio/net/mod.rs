//! virtio-net (virtio 1.2, 5.1): a network interface behind a tap.
//!
//! Frames go between the tap and guest memory without a copy in between, with checksums and segmentation left to
//! whoever needs them last. The device loop carries them until there are many; then, where the device was given
//! vhost-net, the host's kernel does, until the next reset. With several processors there are several pairs of queues,
//! each with a queue of the tap's and a vhost-net of its own.

mod active;
mod control;
mod load;
mod pump;
mod tap;
#[cfg(test)]
mod tests;
mod vhost;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
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
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::active::{Active, Carrier};
use self::load::Load;
use self::pump::{Lane, Rules};
use self::vhost::VhostError;
use super::activation;
use super::device::{ActivateError, Activation, VirtioDevice};
use super::queue::{QueueFault, Vq, WAKE, Wake, chain_of_causes, read_config_bytes};

pub use self::tap::flags as tap_flags;

/// Most pairs of queues. Each costs buffers in guest and host and, with vhost-net, a thread in the host's kernel; and
/// they have one interrupt between them, as virtio-mmio has it, which eight processors keep busy.
pub const MOST_PAIRS: usize = 8;

/// Tokens of events: those of queues are their indices, and these have the pair's number in the lower half.
const TAP: u32 = 1 << 16;
const FAULT: u32 = 2 << 16;
/// Entries of a queue of frames, and of the control queue.
const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 64;
/// Bytes of `struct virtio_net_hdr_v1`, before each frame.
const HEADER: usize = 12;
/// Where `num_buffers` is in it.
const NUM_BUFFERS_AT: usize = 10;
/// Ethernet header with a VLAN tag.
const ETHERNET: usize = 18;
/// Header and longest frame with segmentation offload: an IP packet of 64 KiB.
const LONGEST: usize = HEADER + ETHERNET + 65_536;

/// The host's ends of an interface.
#[derive(Debug)]
pub struct Backend {
    /// Open `/dev/net/tun`, one for each pair of queues, 1 to [`MOST_PAIRS`]: attached with IFF_TAP, IFF_NO_PI and
    /// IFF_VNET_HDR; where there are several, with IFF_MULTI_QUEUE to one interface.
    pub taps: Vec<File>,
    /// `/dev/vhost-net`, with O_PATH: it is opened when there is much to carry. What comes from the guest is not looked at
    /// then: the host has to drop frames from an address that is not the guest's.
    pub vhost: Option<File>,
}

/// The device.
pub struct Net {
    wake: Wake,
    ports: Vec<Port>,
    queue_sizes: Vec<u16>,
    mac: [u8; 6],
    mtu: u16,
    /// Whether the taps are queues that can be taken into use and out of it.
    switchable: bool,
    /// Where the kernel may carry the frames; not once it refused.
    vhost: Option<File>,
    active: Option<Active>,
}

/// The host's end of a pair of queues.
struct Port {
    tap: File,
    /// What epoll watches the tap for.
    watched: EventSet,
    registered: bool,
    /// Whether frames to the guest may go to this queue of the tap's.
    attached: bool,
    /// vhost-net once it is open, and what it signals when the guest breaks a queue.
    vhost: Option<(File, EventFd)>,
}

impl Net {
    /// An interface with as many pairs of queues as there are taps.
    ///
    /// # Errors
    /// The error of making a tap non-blocking or of eventfd; [`io::ErrorKind::InvalidInput`] for their number.
    pub fn new(backend: Backend, mac: [u8; 6], mtu: u16) -> io::Result<Self> {
        let pairs = backend.taps.len();
        if !(1..=MOST_PAIRS).contains(&pairs) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{pairs} pairs of queues")));
        }
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * pairs];
        if pairs > 1 {
            queue_sizes.push(CONTROL_SIZE);
        }
        let ports = backend.taps.into_iter().map(Port::new).collect::<io::Result<Vec<_>>>()?;
        let switchable = ports.iter().all(|port| tap_flags(&port.tap) & libc::IFF_MULTI_QUEUE != 0);
        Ok(Self { wake: Wake::new()?, ports, queue_sizes, mac, mtu, switchable, vhost: backend.vhost, active: None })
    }

    /// Takes the queues over.
    pub(super) fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, features, queues, interrupt } = activation;
        let has = |bit: u32| features & 1 << bit != 0;
        // Without VIRTIO_NET_F_MQ the control queue is the third (virtio 1.2, 5.1.2).
        let pairs = if has(VIRTIO_NET_F_MQ) { self.ports.len() } else { 1 };
        let mut open = Vec::with_capacity(queues.len());
        for (index, queue) in (0u16..).zip(queues) {
            let ready = queue.queue.ready();
            if !ready && index < 2 {
                return Err(ActivateError::Queue(index.into()));
            }
            open.push(ready.then(|| Vq::new(queue, index, &memory, features)).transpose()?);
        }
        let control = open.get_mut(2 * pairs).and_then(Option::take).filter(|_| has(VIRTIO_NET_F_CTRL_VQ));
        let mut open = open.into_iter();
        let lane = |_| Some(Lane::new(open.next()??, open.next()??));
        let lanes: Vec<Lane> = (0..pairs).map_while(lane).collect();
        if lanes.is_empty() {
            return Err(ActivateError::Queue(0));
        }
        // The first pair until the driver says otherwise (virtio 1.2, 5.1.5).
        switch(&mut self.ports, self.switchable, 1).map_err(|error| ActivateError::Host("the tap's queues", error))?;
        let segmented = has(VIRTIO_NET_F_GUEST_TSO4) || has(VIRTIO_NET_F_GUEST_TSO6);
        let longest = if segmented { LONGEST } else { HEADER + ETHERNET + usize::from(self.mtu) };
        self.active = Some(Active {
            memory: Arc::new(memory),
            interrupt,
            lanes,
            in_use: 1,
            control,
            control_waiting: true,
            rules: Rules { mac: self.mac, mergeable: has(VIRTIO_NET_F_MRG_RXBUF), longest },
            load: Load::default(),
            features,
            carrier: Carrier::Loop,
        });
        self.wake.wake();
        Ok(())
    }

    /// Has the kernel carry the frames once there are many, where it can; the loop goes on otherwise.
    fn hand_over(&mut self, ops: &mut EventOps) {
        let (Some(active), Some(vhost)) = (self.active.as_mut(), self.vhost.as_ref()) else { return };
        if active.carrier != Carrier::Loop || !active.load.is_high() {
            return;
        }
        // Nothing is taken from a queue between two turns of the loop: it is the kernel's from where it stands.
        for lane in &mut active.lanes {
            Wake::unregister(ops, &mut lane.rx);
            Wake::unregister(ops, &mut lane.tx);
        }
        let opened = (0..).zip(&mut self.ports).try_for_each(|(index, port)| port.open(vhost, index, ops));
        match opened.map_err(VhostError::Open).and_then(|()| active.start_vhost(&self.ports)) {
            Ok(()) => {
                active.carrier = Carrier::Kernel;
                log::debug!("virtio-net: the kernel carries the frames");
            }
            Err(error) => {
                log::warn!("virtio-net: the VMM goes on to carry the frames: {}", chain_of_causes(&error));
                self.vhost = None;
                active.register(ops);
                self.wake.wake();
            }
        }
    }

    /// Watches the taps while frames are wanted, and not while there is nowhere to put them.
    fn settle(&mut self, ops: &mut EventOps) {
        let active = self.active.as_ref().filter(|active| active.carrier == Carrier::Loop);
        for (index, port) in self.ports.iter_mut().enumerate() {
            let lane = active.filter(|active| index < active.in_use).and_then(|active| active.lanes.get(index));
            let wanted = if lane.is_some_and(|lane| !lane.rx_waiting) { EventSet::IN } else { EventSet::empty() };
            if port.registered && wanted != port.watched {
                match ops.modify(Events::with_data(&port.tap, TAP | index as u32, wanted)) {
                    Ok(()) => port.watched = wanted,
                    Err(error) => log::error!("virtio-net: cannot watch the tap: {error}"),
                }
            }
        }
    }

    /// Takes note of an event; an error is the end of the device's work until it is reset.
    fn note(&mut self, events: Events, ops: &mut EventOps) -> Result<(), VhostError> {
        let token = events.data();
        let index = (token & 0xffff) as usize;
        match token {
            WAKE => {
                self.wake.serve(ops);
                if let Some(active) = &mut self.active {
                    active.register(ops);
                }
            }
            TAP.. if token & FAULT != 0 => {
                let Some((_, fault)) = self.ports.get(index).and_then(|port| port.vhost.as_ref()) else {
                    return Ok(());
                };
                let _ = fault.read();
                let active = self.active.as_ref().filter(|active| active.carrier != Carrier::Loop);
                // A frame sent by a pair that was just given up has nowhere to go, and is no fault.
                if active.is_some_and(|active| index < active.in_use) {
                    return Err(VhostError::Broken(index));
                }
            }
            TAP.. => {
                let Some(port) = self.ports.get_mut(index) else { return Ok(()) };
                if !events.event_set().contains(EventSet::IN) {
                    // The interface was deleted under us; that is all the tap will ever say.
                    log::warn!("virtio-net: the tap is gone");
                    if ops.remove(Events::empty(&port.tap)).is_ok() {
                        port.registered = false;
                    }
                } else if let Some(lane) = self.active.as_mut().and_then(|active| active.lanes.get_mut(index)) {
                    lane.rx_waiting = true;
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
        let Self { active: Some(active), ports, switchable, wake, .. } = self else { return Ok(()) };
        let memory = Arc::clone(&active.memory);
        let interrupt = Arc::clone(&active.interrupt);
        let mut again = false;
        if let Some(control) = active.control.as_mut().filter(|_| active.control_waiting) {
            let (lanes, in_use) = (&mut active.lanes, &mut active.in_use);
            active.control_waiting = control::serve(control, &memory, |pairs| {
                let pairs = usize::from(pairs);
                let possible = (1..=lanes.len()).contains(&pairs);
                let done = possible && use_pairs(ports, *switchable, *in_use, pairs);
                if done {
                    *in_use = pairs;
                    lanes.iter_mut().for_each(Lane::wait);
                }
                done
            })?;
            control.flush(&memory, &*interrupt)?;
            again |= active.control_waiting;
        }
        if active.carrier == Carrier::Loop {
            for (lane, port) in active.lanes.iter_mut().zip(ports).take(active.in_use) {
                again |= lane.pump(&memory, &*interrupt, &port.tap, &active.rules, &mut active.load)?;
            }
        }
        if again {
            wake.wake();
        }
        Ok(())
    }

    fn stop(&mut self, fault: &dyn std::error::Error) {
        let interrupt = self.active.as_ref().map(|active| Arc::clone(&active.interrupt));
        activation::stop(self, "virtio-net", fault, interrupt);
    }
}

impl Port {
    fn new(tap: File) -> io::Result<Self> {
        tap::set_nonblocking(&tap)?;
        Ok(Self { tap, watched: EventSet::empty(), registered: false, attached: true, vhost: None })
    }

    fn init(&mut self, index: u32, ops: &mut EventOps) {
        match ops.add(Events::with_data(&self.tap, TAP | index, EventSet::empty())) {
            Ok(()) => self.registered = true,
            Err(error) => log::error!("virtio-net: cannot register the tap: {error}"),
        }
    }

    /// Opens vhost-net, once.
    fn open(&mut self, vhost: &File, index: u32, ops: &mut EventOps) -> io::Result<()> {
        if self.vhost.is_none() {
            let file = File::options().read(true).write(true).open(format!("/proc/self/fd/{}", vhost.as_raw_fd()))?;
            let fault = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
            ops.add(Events::with_data(&fault, FAULT | index, EventSet::IN)).map_err(io::Error::other)?;
            self.vhost = Some((file, fault));
        }
        Ok(())
    }
}

/// Takes the first `count` queues of the tap into use and no others.
fn switch(ports: &mut [Port], switchable: bool, count: usize) -> io::Result<()> {
    for (index, port) in ports.iter_mut().enumerate() {
        let wanted = index < count;
        if switchable && port.attached != wanted {
            tap::set_queue(&port.tap, wanted)?;
            port.attached = wanted;
        }
    }
    Ok(())
}

/// Has the driver use so many pairs instead of `before`; whether it can.
fn use_pairs(ports: &mut [Port], switchable: bool, before: usize, count: usize) -> bool {
    let switched = switch(ports, switchable, count);
    if let Err(error) = &switched {
        log::warn!("virtio-net: cannot use {count} queues of the tap: {error}");
        // Those it used, it used before.
        let _ = switch(ports, switchable, before);
    }
    switched.is_ok()
}

impl MutEventSubscriber for Net {
    fn init(&mut self, ops: &mut EventOps) {
        self.wake.init(ops);
        for (index, port) in (0..).zip(&mut self.ports) {
            port.init(index, ops);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if let Err(fault) = self.note(events, ops) {
            self.stop(&fault);
        }
        match self.pump() {
            Ok(()) => self.hand_over(ops),
            Err(fault) => self.stop(&fault),
        }
        self.settle(ops);
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
        let several: &[u32] = if self.ports.len() > 1 { &[VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ] } else { &[] };
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
        // struct virtio_net_config: mac, status, max_virtqueue_pairs, mtu.
        let mut config = self.mac.to_vec();
        config.extend((VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        // Means nothing where it is not offered; never more than MOST_PAIRS.
        let pairs = if self.ports.len() > 1 { self.ports.len() as u16 } else { 0 };
        config.extend(pairs.to_le_bytes());
        config.extend(self.mtu.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let has = |bit: u32| activation.features & 1 << bit != 0;
        // What one queue of a tap is told holds for all.
        if let Some(port) = self.ports.first() {
            tap::set_offload(
                &port.tap,
                HEADER,
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
        if active.carrier != Carrier::Loop {
            active.stop_vhost(&self.ports);
        }
        for lane in active.lanes {
            self.wake.retire(lane.rx);
            self.wake.retire(lane.tx);
        }
        if let Some(control) = active.control {
            self.wake.retire(control);
        }
    }

    fn quiesce(&mut self) {
        if let Some(active) = self.active.as_mut().filter(|active| active.carrier == Carrier::Kernel) {
            active.pause_vhost(&self.ports);
        }
    }

    fn resume(&mut self) {
        if let Some(active) = self.active.as_mut().filter(|active| active.carrier == Carrier::KernelPaused)
            && let Err(fault) = active.resume_vhost(&self.ports)
        {
            self.stop(&fault);
        }
    }
}
