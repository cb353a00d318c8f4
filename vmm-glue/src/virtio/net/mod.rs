//! virtio-net (virtio 1.2, 5.1): a network interface behind a tap.
//!
//! Frames go between the tap and guest memory without a copy in between, with checksums and segmentation left to
//! whoever needs them last.

mod pump;
mod tap;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use vmm_sys_util::epoll::EventSet;

use super::activation::{self, Opened};
use super::device::{ActivateError, Activation, GuestMemory, Interrupt, VirtioDevice};
use super::queue::{Vq, WAKE, Wake, read_config_bytes};

const RX: u32 = 0;
const TX: u32 = 1;
const TAP: u32 = 2;
/// Receive and transmit.
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// Bytes of `struct virtio_net_hdr_v1`, before each frame.
const HEADER: usize = 12;
/// Where `num_buffers` is in it.
const NUM_BUFFERS_AT: usize = 10;
/// Ethernet header with a VLAN tag.
const ETHERNET: usize = 18;
/// Header and longest frame with segmentation offload: an IP packet of 64 KiB.
const LONGEST: usize = HEADER + ETHERNET + 65_536;

/// The device.
pub struct Net {
    wake: Wake,
    tap: File,
    /// What epoll watches the tap for.
    watched: EventSet,
    registered: bool,
    mac: [u8; 6],
    mtu: u16,
    active: Option<Active>,
    /// There may be frames from the guest, or to it.
    tx_waiting: bool,
    rx_waiting: bool,
}

struct Active {
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn Interrupt>,
    rx: Vq,
    tx: Vq,
    mergeable: bool,
    /// Bytes of header and frame that may come from the tap.
    longest: usize,
}

impl Net {
    /// An interface. The tap is an open `/dev/net/tun`, attached with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR.
    ///
    /// # Errors
    /// The error of making the tap non-blocking or of eventfd.
    pub fn new(tap: File, mac: [u8; 6], mtu: u16) -> io::Result<Self> {
        tap::set_nonblocking(&tap)?;
        Ok(Self {
            wake: Wake::new()?,
            tap,
            watched: EventSet::empty(),
            registered: false,
            mac,
            mtu,
            active: None,
            tx_waiting: false,
            rx_waiting: false,
        })
    }

    /// Takes the queues over.
    pub(super) fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Opened { memory, features, interrupt, queues: [rx, tx] } = activation::open(activation)?;
        let segmented = features & (1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6) != 0;
        let longest = if segmented { LONGEST } else { HEADER + ETHERNET + usize::from(self.mtu) };
        let mergeable = features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        self.active = Some(Active { memory, interrupt, rx, tx, mergeable, longest });
        self.wake.wake();
        Ok(())
    }

    /// Watches the tap while frames are wanted, and not while there is nowhere to put them.
    fn settle(&mut self, ops: &mut EventOps) {
        let wanted = if self.active.is_some() && !self.rx_waiting { EventSet::IN } else { EventSet::empty() };
        if self.registered && wanted != self.watched {
            match ops.modify(Events::with_data(&self.tap, TAP, wanted)) {
                Ok(()) => self.watched = wanted,
                Err(error) => log::error!("virtio-net: cannot watch the tap: {error}"),
            }
        }
    }
}

impl MutEventSubscriber for Net {
    fn init(&mut self, ops: &mut EventOps) {
        self.wake.init(ops);
        match ops.add(Events::with_data(&self.tap, TAP, EventSet::empty())) {
            Ok(()) => self.registered = true,
            Err(error) => log::error!("virtio-net: cannot register the tap: {error}"),
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            WAKE => {
                self.wake.serve(ops);
                if let Some(active) = &mut self.active {
                    Wake::register(ops, &mut active.rx);
                    Wake::register(ops, &mut active.tx);
                }
                self.tx_waiting = true;
                self.rx_waiting = true;
            }
            RX => {
                if let Some(active) = &self.active {
                    active.rx.notified();
                }
                self.rx_waiting = true;
            }
            TX => {
                if let Some(active) = &self.active {
                    active.tx.notified();
                }
                self.tx_waiting = true;
            }
            _ if !events.event_set().contains(EventSet::IN) => {
                // The interface was deleted under us; that is all the tap will ever say.
                log::warn!("virtio-net: the tap is gone");
                if ops.remove(Events::empty(&self.tap)).is_ok() {
                    self.registered = false;
                }
            }
            _ => self.rx_waiting = true,
        }
        if let Err(fault) = self.pump() {
            let interrupt = self.active.as_ref().map(|active| Arc::clone(&active.interrupt));
            activation::stop(self, "virtio-net", &fault, interrupt);
        }
        self.settle(ops);
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
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
        .into_iter()
        .fold(0, |features, bit| features | 1 << bit)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_net_config: mac, status, max_virtqueue_pairs (not offered), mtu.
        let mut config = self.mac.to_vec();
        config.extend((VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        config.extend([0; 2]);
        config.extend(self.mtu.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let has = |bit: u32| activation.features & 1 << bit != 0;
        tap::set_offload(
            &self.tap,
            HEADER,
            has(VIRTIO_NET_F_GUEST_CSUM),
            has(VIRTIO_NET_F_GUEST_TSO4),
            has(VIRTIO_NET_F_GUEST_TSO6),
        )
        .map_err(|error| ActivateError::Host("the tap's offloads", error))?;
        self.start(activation)
    }

    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            self.wake.retire(active.rx);
            self.wake.retire(active.tx);
        }
    }
}
