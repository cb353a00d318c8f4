//! One vsock connection: its socket, its credit both ways, and what it still has to tell the guest.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;

use vmm_sys_util::epoll::EventSet;

use super::packet::{HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::socket;
use crate::virtio::queue::Iov;

/// Bytes from the guest that a connection holds while the socket is full: the credit the guest gets. It is used, and
/// memory spent, only while whoever has the other end does not read.
pub const BUF_ALLOC: u32 = 256 * 1024;

/// Told how a connection attempt ended.
pub type Reply = Box<dyn FnOnce(io::Result<OwnedFd>) + Send>;

/// Where a connection stands.
enum State {
    /// REQUEST sent or about to be: the peer's end waits here for the guest's word.
    Connecting { peer: OwnedFd, reply: Reply },
    /// The guest accepted.
    Open,
    /// Nothing more goes to the guest; what it sent before is still being delivered.
    Draining,
    /// To be forgotten.
    Dead,
}

/// Control packets waiting for a buffer. Each is sent once, however often it became due.
#[derive(Default)]
struct Due {
    request: bool,
    reset: bool,
    credit_update: bool,
    credit_request: bool,
    shutdown: bool,
}

/// What the connection wants to do with a receive buffer of the guest.
pub enum Next {
    /// Send this packet.
    Control(Header),
    /// Read from the socket up to so many bytes.
    Data(usize),
    /// Nothing now.
    Nothing,
}

/// One connection.
pub struct Connection {
    guest_cid: u64,
    local_port: u32,
    guest_port: u32,
    socket: OwnedFd,
    state: State,
    due: Due,
    // Host to guest.
    sent: u32,
    guest_buf_alloc: u32,
    guest_fwd_cnt: u32,
    credit_asked: bool,
    /// The socket may have something to read: not watched for it until a read says otherwise.
    readable: bool,
    /// All was read that will ever come from the socket.
    read_end: bool,
    /// The other end of the socket is gone altogether.
    hung_up: bool,
    // Guest to host.
    received: u32,
    forwarded: u32,
    told_forwarded: u32,
    held: VecDeque<u8>,
    /// Nobody will read what the guest sends.
    write_end: bool,
    /// The socket was told that the guest sends no more.
    write_shut: bool,
    /// What the guest said it stopped, and what it was told that we stopped.
    guest_shutdown: u32,
    own_shutdown: u32,
    /// What epoll watches; nothing when the socket is not registered.
    pub watched: Option<EventSet>,
    /// In the device's list of those that want to send.
    pub queued: bool,
}

impl Connection {
    /// A connection from the host, REQUEST due.
    pub fn connect(guest_cid: u64, local_port: u32, guest_port: u32, pair: (OwnedFd, OwnedFd), reply: Reply) -> Self {
        let (socket, peer) = pair;
        Self {
            guest_cid,
            local_port,
            guest_port,
            socket,
            state: State::Connecting { peer, reply },
            due: Due { request: true, ..Due::default() },
            sent: 0,
            guest_buf_alloc: 0,
            guest_fwd_cnt: 0,
            credit_asked: false,
            readable: false,
            read_end: false,
            hung_up: false,
            received: 0,
            forwarded: 0,
            told_forwarded: 0,
            held: VecDeque::new(),
            write_end: false,
            write_shut: false,
            guest_shutdown: 0,
            own_shutdown: 0,
            watched: None,
            queued: false,
        }
    }

    /// The guest's port.
    pub fn guest_port(&self) -> u32 {
        self.guest_port
    }

    /// The host's end of the connection.
    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Whether it may be forgotten.
    pub fn is_dead(&self) -> bool {
        matches!(self.state, State::Dead)
    }

    /// Whether both ends of the host are gone, so that only the guest's word is awaited.
    pub fn is_orphan(&self) -> bool {
        self.hung_up && self.read_end
    }

    /// The device is reset, or the connection cannot be: whoever waits is told, sockets close.
    pub fn abort(&mut self, error: io::ErrorKind) {
        if let State::Connecting { reply, .. } = std::mem::replace(&mut self.state, State::Dead) {
            reply(Err(error.into()));
        }
    }

    /// Ends with a RST to the guest.
    pub fn reset(&mut self) {
        if let State::Connecting { reply, .. } = std::mem::replace(&mut self.state, State::Draining) {
            reply(Err(io::ErrorKind::ConnectionReset.into()));
        }
        self.held = VecDeque::new();
        self.due = Due { reset: true, ..Due::default() };
    }

    /// A packet came from the guest; `payload` has exactly the header's length.
    pub fn receive(&mut self, header: &Header, payload: Iov<'_>) {
        if matches!(self.state, State::Dead) || self.due.reset {
            return;
        }
        self.guest_buf_alloc = header.buf_alloc;
        self.guest_fwd_cnt = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_asked = false;
        }
        match header.op {
            Op::Response => self.accepted(),
            Op::Reset => self.refused(),
            _ if matches!(self.state, State::Connecting { .. }) => self.reset(),
            Op::Shutdown => self.guest_stopped(header.flags),
            Op::ReadWrite => self.data(payload),
            Op::CreditRequest => self.due.credit_update = true,
            Op::CreditUpdate => {}
            Op::Request | Op::Unknown(_) => self.reset(),
        }
    }

    fn accepted(&mut self) {
        match std::mem::replace(&mut self.state, State::Open) {
            State::Connecting { peer, reply } if !self.due.request => reply(Ok(peer)),
            State::Connecting { reply, .. } => {
                // An answer to a question not yet asked.
                reply(Err(io::ErrorKind::InvalidData.into()));
                self.state = State::Draining;
                self.reset();
            }
            other => {
                self.state = other;
                self.reset();
            }
        }
    }

    fn refused(&mut self) {
        match std::mem::replace(&mut self.state, State::Draining) {
            State::Connecting { reply, .. } => {
                self.state = State::Dead;
                reply(Err(io::ErrorKind::ConnectionRefused.into()));
            }
            State::Dead => self.state = State::Dead,
            State::Open | State::Draining => {
                // What the guest sent is delivered all the same: Linux sends RST some seconds after a close that was
                // not answered, and it was not because somebody here reads slowly.
                self.due = Due::default();
                self.guest_shutdown = SHUTDOWN_BOTH;
                self.finish_writing();
            }
        }
    }

    fn guest_stopped(&mut self, flags: u32) {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if flags & SHUTDOWN_RECEIVE != 0 && !self.read_end {
            // Makes the peer's writes fail, as they would with any stream socket.
            socket::shutdown(&self.socket, libc::SHUT_RD);
            self.read_end = true;
            self.readable = false;
        }
        self.finish_writing();
    }

    fn data(&mut self, mut payload: Iov<'_>) {
        let Ok(length) = u32::try_from(payload.len()) else { return self.reset() };
        let in_use = self.received.wrapping_sub(self.forwarded);
        if self.guest_shutdown & SHUTDOWN_SEND != 0 || length > BUF_ALLOC.saturating_sub(in_use) {
            // Data after the end, or more than it had credit for.
            return self.reset();
        }
        self.received = self.received.wrapping_add(length);
        if self.held.is_empty() && !self.write_end {
            while !payload.is_empty() {
                match socket::send(&self.socket, payload.as_slice()) {
                    Ok(count) => {
                        payload.skip(count);
                        self.forward(count);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(_) => {
                        self.nobody_reads();
                        break;
                    }
                }
            }
        }
        if self.write_end {
            self.forward(payload.len());
        } else if !payload.is_empty() {
            let mut rest = vec![0; payload.len()];
            payload.copy_to(&mut rest);
            if self.held.is_empty() {
                self.held = rest.into();
            } else {
                self.held.extend(rest);
            }
        }
    }

    /// So many bytes left our buffer.
    fn forward(&mut self, count: usize) {
        // Bounded by what was received, which is counted modulo 2^32 as well.
        self.forwarded = self.forwarded.wrapping_add(count as u32);
        if self.forwarded.wrapping_sub(self.told_forwarded) >= BUF_ALLOC / 4 {
            self.due.credit_update = true;
        }
    }

    /// The socket does not take data any more: the guest is told, and what it sends is dropped.
    fn nobody_reads(&mut self) {
        self.write_end = true;
        let held = std::mem::take(&mut self.held).len();
        self.forward(held);
        self.stop(SHUTDOWN_RECEIVE);
        self.finish_writing();
    }

    /// Tells the guest that we stopped a direction, once.
    fn stop(&mut self, flags: u32) {
        if matches!(self.state, State::Open) && self.own_shutdown & flags != flags {
            self.own_shutdown |= flags;
            self.due.shutdown = true;
        }
    }

    /// Once all that the guest sent is delivered, ends what the guest has ended.
    fn finish_writing(&mut self) {
        if !self.held.is_empty() {
            return;
        }
        if self.guest_shutdown & SHUTDOWN_SEND != 0 && !self.write_shut {
            self.write_shut = true;
            socket::shutdown(&self.socket, libc::SHUT_WR);
        }
        if self.guest_shutdown == SHUTDOWN_BOTH {
            // Unread data would make the peer see an error where the stream just ended.
            socket::discard_unread(&self.socket);
            match self.state {
                // Both ways are closed: RST says that we know (virtio 1.2, 5.10.6.5).
                State::Open => {
                    self.state = State::Draining;
                    self.due = Due { reset: true, ..Due::default() };
                }
                State::Draining if !self.due.reset => self.state = State::Dead,
                _ => {}
            }
        }
    }

    /// The socket has something to say.
    pub fn socket_event(&mut self, set: EventSet) {
        if set.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            self.hung_up = true;
        }
        if set.intersects(EventSet::IN | EventSet::HANG_UP | EventSet::READ_HANG_UP | EventSet::ERROR) && !self.read_end
        {
            self.readable = true;
        }
        if set.intersects(EventSet::OUT | EventSet::HANG_UP | EventSet::ERROR) && !self.held.is_empty() {
            self.write_held();
        }
        if self.hung_up && self.read_end && !self.write_end {
            // It had half closed before, and is gone now.
            self.nobody_reads();
        }
    }

    fn write_held(&mut self) {
        while !self.held.is_empty() {
            let (front, back) = self.held.as_slices();
            let parts = [socket::iovec(front), socket::iovec(back)];
            match socket::send(&self.socket, &parts) {
                Ok(count) => {
                    self.held.drain(..count.min(self.held.len()));
                    self.forward(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.nobody_reads(),
            }
        }
        // The memory is needed again only when the socket is full again.
        self.held = VecDeque::new();
        self.finish_writing();
    }

    /// Bytes the guest has room for.
    fn credit(&self) -> u32 {
        self.guest_buf_alloc.saturating_sub(self.sent.wrapping_sub(self.guest_fwd_cnt))
    }

    /// Whether it wants a receive buffer.
    pub fn wants_to_send(&self) -> bool {
        if self.is_dead() {
            return false;
        }
        let due = &self.due;
        due.request || due.reset || due.credit_update || due.shutdown || due.credit_request || self.wants_to_read()
    }

    fn wants_to_read(&self) -> bool {
        matches!(self.state, State::Open) && self.readable && (self.credit() > 0 || !self.credit_asked)
    }

    /// What it would do with a receive buffer now.
    pub fn next(&mut self) -> Next {
        let due = &mut self.due;
        if std::mem::take(&mut due.reset) {
            let header = self.header(Op::Reset);
            self.state = State::Dead;
            return Next::Control(header);
        }
        if std::mem::take(&mut due.request) {
            return Next::Control(self.header(Op::Request));
        }
        if std::mem::take(&mut due.credit_update) {
            return Next::Control(self.header(Op::CreditUpdate));
        }
        // SEND is among the flags only after all was read, so this overtakes no data.
        if std::mem::take(&mut self.due.shutdown) {
            return Next::Control(Header { flags: self.own_shutdown, ..self.header(Op::Shutdown) });
        }
        if matches!(self.state, State::Open) && self.readable {
            match self.credit() {
                0 if !self.credit_asked => self.due.credit_request = true,
                0 => {}
                credit => return Next::Data(credit as usize),
            }
        }
        if std::mem::take(&mut self.due.credit_request) {
            self.credit_asked = true;
            return Next::Control(self.header(Op::CreditRequest));
        }
        Next::Nothing
    }

    /// Reads from the socket into the guest's buffer; the packet's header when something came.
    pub fn read(&mut self, buffer: &Iov<'_>) -> Option<Header> {
        match socket::receive(&self.socket, buffer.as_slice()) {
            Ok(0) => {}
            Ok(count) => {
                // At most the credit, a u32.
                let count = count as u32;
                self.sent = self.sent.wrapping_add(count);
                return Some(Header { len: count, ..self.header(Op::ReadWrite) });
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                return None;
            }
            Err(_) => self.hung_up = true,
        }
        self.readable = false;
        self.read_end = true;
        self.stop(if self.hung_up { SHUTDOWN_BOTH } else { SHUTDOWN_SEND });
        None
    }

    fn header(&mut self, op: Op) -> Header {
        self.told_forwarded = self.forwarded;
        // Any packet carries our credit.
        self.due.credit_update = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.local_port,
            dst_port: self.guest_port,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.forwarded,
        }
    }

    /// What epoll should watch; `None` when the socket should not be registered at all. A socket whose other end is
    /// gone reports that for ever, so it is registered only while something can be done about it.
    pub fn interest(&self) -> Option<EventSet> {
        if matches!(self.state, State::Connecting { .. } | State::Dead) {
            return None;
        }
        let mut set = EventSet::empty();
        if matches!(self.state, State::Open) && !self.readable && !self.read_end {
            set |= EventSet::IN;
        }
        if !self.held.is_empty() {
            set |= EventSet::OUT;
        }
        (!set.is_empty() || !self.hung_up).then_some(set)
    }
}
