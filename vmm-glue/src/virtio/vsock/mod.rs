//! virtio-vsock (virtio 1.2, 5.10): connections from the host to ports in the guest. The client on the host has a
//! socket for each connection.
//!
//! Each connection has a pair of AF_UNIX stream sockets. The client makes the pair, keeps one end, and gives the device
//! the other end. The device moves data between its end and guest memory without an intermediate copy. The device
//! buffers data from the guest only when the socket is full. The buffer never holds more data than the credit that the
//! device has granted to the guest. On the host, a connection has neither a socket file nor an abstract socket name.

mod connection;
mod packet;
mod pump;
mod socket;
#[cfg(test)]
mod tests;
mod window;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use self::connection::{Connection, NextPacket};
use self::packet::Header;
use self::window::WindowPool;
use super::activation::{self, OpenedActivation};
use super::device::{ActivateError, Activation, Interrupt, VirtioDevice};
use super::queue::{QueueFault, TIMER_TOKEN, Virtqueue, WAKE_TOKEN, WakeEvent, read_config_bytes};
use super::rate_limit::Throttle;
use super::saved::{ActiveState, DeviceValues, SaveError};
use crate::config::RateLimit;
use crate::guest_memory::GuestMemory;

pub use self::connection::Reply;

const RX: u32 = 0;
const TX: u32 = 1;
const EVENT: u32 = 2;
/// Maximum sizes of the receive, transmit and event queue. Linux fills the whole receive queue with buffers, which take
/// 8 KiB of guest memory each. Linux also posts 8 event buffers.
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];
/// Maximum number of connections, including connection attempts that wait for the driver.
const MAX_CONNECTIONS: usize = 1024;
/// Maximum number of RST packets that wait for a receive buffer. While so many RST packets wait, the device takes no
/// packets from the guest.
const MAX_RESET_PACKETS: usize = 64;
/// Range of the host's ports. A connection's host port is also the connection's event token. Therefore, the range
/// excludes the tokens of the queues, [`WAKE_TOKEN`] and [`TIMER_TOKEN`].
const PORTS: std::ops::Range<u32> = 0x4000_0000..0xffff_0000;

/// The vsock device.
pub struct Vsock {
    guest_cid: u64,
    wake: WakeEvent,
    active: Option<Active>,
    /// Connection attempts that wait for the driver: the guest's port, the device's socket, and the callback.
    pending: VecDeque<(u32, OwnedFd, Reply)>,
    connections: HashMap<u32, Connection>,
    windows: WindowPool,
    /// Connections that need a receive buffer, in the order of their turns.
    ready: VecDeque<u32>,
    /// Connections whose watched events may have changed in this iteration of the device loop.
    changed: Vec<u32>,
    /// RST packets that wait for a receive buffer and do not belong to a connection in `connections`.
    reset_packets: VecDeque<Header>,
    /// Whether the transmit queue may contain packets from the guest. The rate limit may delay these packets.
    tx_waiting: bool,
    throttle: Throttle,
    /// Connections that a thread other than the device loop may have ended. The device keeps these connections until
    /// the device loop has unregistered their sockets.
    stale: Vec<Connection>,
    next_port: u32,
}

struct Active {
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn Interrupt>,
    rx: Virtqueue,
    tx: Virtqueue,
    event: Virtqueue,
}

impl Vsock {
    /// Creates a device for a guest with this CID. `rate_limit` applies to each direction separately.
    pub fn new(guest_cid: u64, rate_limit: RateLimit) -> io::Result<Self> {
        Ok(Self {
            throttle: Throttle::new(rate_limit, rate_limit)?,
            guest_cid,
            wake: WakeEvent::new()?,
            active: None,
            pending: VecDeque::new(),
            connections: HashMap::new(),
            windows: WindowPool::default(),
            ready: VecDeque::new(),
            changed: Vec::new(),
            reset_packets: VecDeque::new(),
            tx_waiting: false,
            stale: Vec::new(),
            next_port: PORTS.start,
        })
    }

    /// Connects to a port in the guest. `socket` is one end of a pair of stream sockets, whose other end the client
    /// has. `reply` is called while the device is locked: with `Ok` if the guest accepts, and with `ConnectionRefused`
    /// if it refuses. If the driver is not ready, the connection attempt waits until the driver is ready.
    pub fn connect(&mut self, port: u32, socket: OwnedFd, reply: Reply) {
        if self.connections.len() + self.pending.len() >= MAX_CONNECTIONS && !self.evict() {
            return reply(Err(io::Error::other(format!(
                "failed to open a vsock connection: {MAX_CONNECTIONS} connections already exist"
            ))));
        }
        self.pending.push_back((port, socket, reply));
        self.wake.wake();
    }

    /// Returns the number of connections.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Removes a connection that only waits for the guest's answer to SHUTDOWN. Returns true if there was such a
    /// connection.
    ///
    /// The device removes the connection before the device sends RST. Otherwise, a guest that offers no receive buffers
    /// could make the number of connections grow without bound.
    fn evict(&mut self) -> bool {
        let orphan = self.connections.iter().find(|(_, connection)| connection.is_orphan()).map(|(&port, _)| port);
        let Some(mut connection) = orphan.and_then(|port| self.connections.remove(&port)) else { return false };
        if connection.queued
            && let Some(port) = orphan
        {
            self.ready.retain(|&ready| ready != port);
        }
        connection.reset();
        // If too many RST packets are waiting, the device omits the RST of this connection. When the guest next sends a
        // packet of the connection, the device answers this packet with RST.
        if self.reset_packets.len() < MAX_RESET_PACKETS
            && let NextPacket::Control(reset) = connection.next()
        {
            self.reset_packets.push_back(reset);
        }
        self.stale.push(connection);
        true
    }

    fn start_pending(&mut self) {
        if self.active.is_none() {
            return;
        }
        while let Some((port, socket, reply)) = self.pending.pop_front() {
            let local = self.free_port();
            let connection = Connection::connect(self.guest_cid, local, port, socket, &self.windows, reply);
            self.connections.insert(local, connection);
            self.mark_changed(local);
        }
    }

    /// Returns an unused port. The loop is short, because there are far fewer connections than ports.
    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = if port + 1 < PORTS.end { port + 1 } else { PORTS.start };
            if !self.connections.contains_key(&port) {
                return port;
            }
        }
    }

    /// Records that a connection has changed. The connection may now have packets to send, and epoll may have to watch
    /// other events of the connection's socket.
    fn mark_changed(&mut self, port: u32) {
        if let Some(connection) = self.connections.get_mut(&port) {
            if !connection.queued && connection.wants_to_send() {
                connection.queued = true;
                self.ready.push_back(port);
            }
            self.changed.push(port);
        }
    }

    /// Moves packets in both directions, and then updates the events that epoll watches.
    fn serve(&mut self, ops: &mut EventOps) {
        if let Err(fault) = self.pump() {
            self.fail(&fault);
        }
        for port in std::mem::take(&mut self.changed) {
            self.update_interest(port, ops);
        }
    }

    fn update_interest(&mut self, port: u32, ops: &mut EventOps) {
        let Some(connection) = self.connections.get_mut(&port) else { return };
        let dead = connection.is_dead();
        let wanted = if dead { None } else { connection.interest() };
        let fd = connection.socket().as_raw_fd();
        let result = match (connection.watched, wanted) {
            (before, after) if before == after => Ok(()),
            (None, Some(set)) => ops.add(Events::with_data_raw(fd, port, set)),
            (Some(_), Some(set)) => ops.modify(Events::with_data_raw(fd, port, set)),
            (Some(_), None) => ops.remove(Events::empty_raw(fd)),
            (None, None) => Ok(()),
        };
        match result {
            Ok(()) => connection.watched = wanted,
            Err(error) => log::error!("vsock: failed to watch a socket: {error}"),
        }
        if dead && self.connections.remove(&port).is_some_and(|connection| connection.queued) {
            // Without receive buffers, `ready` would grow with each connection that the guest refuses.
            self.ready.retain(|&ready| ready != port);
        }
    }

    fn fail(&mut self, fault: &QueueFault) {
        let interrupt = self.active.as_ref().map(|active| Arc::clone(&active.interrupt));
        activation::stop_broken_device(self, "virtio-vsock", fault, interrupt);
    }
}

impl MutEventSubscriber for Vsock {
    fn init(&mut self, ops: &mut EventOps) {
        self.wake.init(ops);
        self.throttle.init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            WAKE_TOKEN => {
                self.wake.serve(ops);
                for connection in self.stale.drain(..) {
                    if connection.watched.is_some()
                        && let Err(error) = ops.remove(Events::empty(connection.socket()))
                    {
                        log::warn!("vsock: failed to unregister a socket: {error}");
                    }
                }
                if let Some(active) = &mut self.active {
                    for queue in [&mut active.rx, &mut active.tx, &mut active.event] {
                        WakeEvent::register(ops, queue);
                    }
                }
                self.tx_waiting = true;
                self.start_pending();
            }
            TIMER_TOKEN => self.throttle.clear_timer(),
            queue @ (RX | TX | EVENT) => {
                if let Some(active) = &mut self.active {
                    match queue {
                        RX => active.rx.clear_notification(),
                        TX => {
                            active.tx.clear_notification();
                            self.tx_waiting = true;
                        }
                        _ => active.event.clear_notification(),
                    }
                }
            }
            port => {
                if let Some(connection) = self.connections.get_mut(&port) {
                    connection.socket_event(events.event_set());
                    self.mark_changed(port);
                }
            }
        }
        self.serve(ops);
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let OpenedActivation { memory, interrupt, queues: [rx, tx, event], .. } = activation::open_queues(activation)?;
        self.active = Some(Active { memory, interrupt, rx, tx, event });
        self.wake.wake();
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(Active { rx, tx, event, .. }) = self.active.take() {
            for queue in [rx, tx, event] {
                self.wake.retire(queue);
            }
        }
        for (_, mut connection) in self.connections.drain() {
            connection.abort(io::ErrorKind::ConnectionReset);
            self.stale.push(connection);
        }
        self.ready.clear();
        self.changed.clear();
        self.reset_packets.clear();
        self.wake.wake();
    }

    fn save(&self) -> Result<ActiveState, SaveError> {
        let is_idle = self.connections.is_empty() && self.pending.is_empty() && self.reset_packets.is_empty();
        let queues = self.active.as_ref().filter(|_| is_idle).map(|Active { rx, tx, event, .. }| [rx, tx, event]);
        let states = queues.and_then(|queues| queues.into_iter().map(Virtqueue::state).collect::<Option<Vec<_>>>());
        let queues = states.ok_or(SaveError::Busy(VIRTIO_ID_VSOCK))?;
        Ok(ActiveState { queues, values: DeviceValues::Vsock { next_port: self.next_port } })
    }

    fn restore(&mut self, values: DeviceValues) {
        if let DeviceValues::Vsock { next_port } = values
            && PORTS.contains(&next_port)
        {
            self.next_port = next_port;
        }
    }
}
