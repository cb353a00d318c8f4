//! virtio-vsock (virtio 1.2, 5.10): streams from the host to ports of the guest, handed out as sockets.
//!
//! Each connection has a pair of AF_UNIX stream sockets, one end of which the asker gets once the guest has accepted.
//! Data goes between the other end and guest memory without a copy in between; only when that socket is full does the
//! device hold bytes itself, as many as the credit it gave. There are no files and no names on the host.

mod connection;
mod packet;
mod pump;
mod socket;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use self::connection::Connection;
pub use self::connection::Reply;
use self::packet::Header;
use super::activation::{self, Opened};
use super::device::{ActivateError, Activation, GuestMemory, Interrupt, VirtioDevice};
use super::queue::{QueueFault, Vq, WAKE, Wake, read_config_bytes};

const RX: u32 = 0;
const TX: u32 = 1;
const EVENT: u32 = 2;
/// Receive, transmit, event. Linux fills the whole receive queue with buffers of 8 KiB of its memory each, and posts 8
/// event buffers.
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];
/// Connections at once, those that wait for the driver included.
const MAX_CONNECTIONS: usize = 1024;
/// Refusals that wait for a receive buffer; the guest's packets wait when there are more.
const MAX_STRAYS: usize = 64;
/// Ports of the host's ends; each is also the event token of its connection, apart from those of queues and [`WAKE`].
const PORTS: std::ops::Range<u32> = 0x4000_0000..0xffff_0000;

/// The device.
pub struct Vsock {
    guest_cid: u64,
    wake: Wake,
    active: Option<Active>,
    pending: VecDeque<(u32, Reply)>,
    connections: HashMap<u32, Connection>,
    /// Connections that want a receive buffer, in turn.
    ready: VecDeque<u32>,
    /// Connections whose interest in events may have changed in this turn.
    touched: Vec<u32>,
    /// Refusals of packets that belong to no connection.
    strays: VecDeque<Header>,
    /// There may be packets from the guest.
    tx_waiting: bool,
    /// Of an earlier activation, until the loop has unregistered their sockets.
    stale: Vec<Connection>,
    next_port: u32,
}

struct Active {
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn Interrupt>,
    rx: Vq,
    tx: Vq,
    event: Vq,
}

impl Vsock {
    /// A device with the guest's address.
    pub fn new(guest_cid: u64) -> io::Result<Self> {
        Ok(Self {
            guest_cid,
            wake: Wake::new()?,
            active: None,
            pending: VecDeque::new(),
            connections: HashMap::new(),
            ready: VecDeque::new(),
            touched: Vec::new(),
            strays: VecDeque::new(),
            tx_waiting: false,
            stale: Vec::new(),
            next_port: PORTS.start,
        })
    }

    /// Connects to a port of the guest. `reply` is called on the device loop, with the device locked: with a connected
    /// stream socket when the guest has accepted, with `ConnectionRefused` when it has not. What is asked before the
    /// driver is there waits for it.
    pub fn connect(&mut self, port: u32, reply: Reply) {
        if self.connections.len() + self.pending.len() >= MAX_CONNECTIONS && !self.evict() {
            return reply(Err(io::Error::other("too many vsock connections")));
        }
        self.pending.push_back((port, reply));
        self.wake.wake();
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Ends a connection that only the guest still holds; true when there was one.
    fn evict(&mut self) -> bool {
        let Some((&port, connection)) = self.connections.iter_mut().find(|(_, connection)| connection.is_orphan())
        else {
            return false;
        };
        connection.reset();
        self.touch(port);
        true
    }

    fn start_pending(&mut self) {
        if self.active.is_none() {
            return;
        }
        while let Some((port, reply)) = self.pending.pop_front() {
            let pair = match socket::pair() {
                Ok(pair) => pair,
                Err(error) => {
                    reply(Err(error));
                    continue;
                }
            };
            let local = self.free_port();
            self.connections.insert(local, Connection::connect(self.guest_cid, local, port, pair, reply));
            self.touch(local);
        }
    }

    /// There are far fewer connections than ports, so one is found at once.
    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = if port + 1 < PORTS.end { port + 1 } else { PORTS.start };
            if !self.connections.contains_key(&port) {
                return port;
            }
        }
    }

    /// A connection changed: it may want to send, and its interest in events may be another.
    fn touch(&mut self, port: u32) {
        if let Some(connection) = self.connections.get_mut(&port) {
            if !connection.queued && connection.wants_to_send() {
                connection.queued = true;
                self.ready.push_back(port);
            }
            self.touched.push(port);
        }
    }

    /// Moves packets both ways, then settles what epoll watches.
    fn turn(&mut self, ops: &mut EventOps) {
        if let Err(fault) = self.pump() {
            self.fail(&fault);
        }
        for port in std::mem::take(&mut self.touched) {
            self.settle(port, ops);
        }
    }

    fn settle(&mut self, port: u32, ops: &mut EventOps) {
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
            Err(error) => log::error!("vsock: cannot watch a socket: {error}"),
        }
        if dead {
            self.connections.remove(&port);
        }
    }

    fn fail(&mut self, fault: &QueueFault) {
        let interrupt = self.active.as_ref().map(|active| Arc::clone(&active.interrupt));
        activation::stop(self, "virtio-vsock", fault, interrupt);
    }
}

impl MutEventSubscriber for Vsock {
    fn init(&mut self, ops: &mut EventOps) {
        self.wake.init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            WAKE => {
                self.wake.serve(ops);
                for connection in self.stale.drain(..) {
                    if connection.watched.is_some()
                        && let Err(error) = ops.remove(Events::empty(connection.socket()))
                    {
                        log::warn!("vsock: cannot unregister a socket: {error}");
                    }
                }
                if let Some(active) = &mut self.active {
                    for queue in [&mut active.rx, &mut active.tx, &mut active.event] {
                        Wake::register(ops, queue);
                    }
                }
                self.tx_waiting = true;
                self.start_pending();
            }
            queue @ (RX | TX | EVENT) => {
                if let Some(active) = &mut self.active {
                    match queue {
                        RX => active.rx.notified(),
                        TX => {
                            active.tx.notified();
                            self.tx_waiting = true;
                        }
                        _ => active.event.notified(),
                    }
                }
            }
            port => {
                if let Some(connection) = self.connections.get_mut(&port) {
                    connection.socket_event(events.event_set());
                    self.touch(port);
                }
            }
        }
        self.turn(ops);
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
        let Opened { memory, interrupt, queues: [rx, tx, event], .. } = activation::open(activation)?;
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
        self.touched.clear();
        self.strays.clear();
        self.wake.wake();
    }
}
