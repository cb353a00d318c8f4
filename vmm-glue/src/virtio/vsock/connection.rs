//! One vsock connection: its socket, the credit in both directions, and the packets that the connection has to send.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;

use nix::sys::socket::Shutdown;
use vmm_sys_util::epoll::EventSet;

use super::packet::{HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::socket;
use super::window::{Window, WindowPool};
use crate::virtio::queue::Iov;

/// A callback that gets the result of a connection attempt.
pub type Reply = Box<dyn FnOnce(io::Result<()>) + Send>;

/// State of a connection.
enum State {
    /// The device has sent REQUEST or is about to send REQUEST.
    Connecting { reply: Reply },
    /// The guest has accepted the connection.
    Open,
    /// The device sends no more data to the guest, but may still send RST. The device still delivers the buffered data
    /// from the guest to the client.
    Draining,
    /// The connection can be removed.
    Dead,
}

/// Control packets that wait for a receive buffer. If several events request the same kind of packet, the device sends
/// one packet of this kind.
#[derive(Default)]
struct Pending {
    request: bool,
    reset: bool,
    credit_update: bool,
    credit_request: bool,
    shutdown: bool,
}

/// What the connection does with the guest's next receive buffer.
pub enum NextPacket {
    /// Send this packet.
    Control(Header),
    /// Read up to this many bytes from the socket into the receive buffer.
    Data(usize),
    /// There is nothing to send.
    Nothing,
}

/// A connection.
pub struct Connection {
    guest_cid: u64,
    local_port: u32,
    guest_port: u32,
    socket: OwnedFd,
    state: State,
    pending: Pending,
    // State of the direction from host to guest.
    sent: u32,
    guest_buf_alloc: u32,
    guest_fwd_cnt: u32,
    credit_requested: bool,
    /// Whether the socket may have data to read. While this flag is set, epoll does not watch the socket for data. A
    /// read that finds no data clears the flag.
    readable: bool,
    /// Whether the device reads no more from the socket: the stream has ended, a read has failed, or the guest receives
    /// no more data.
    read_eof: bool,
    /// Whether the client's end of the socket pair is closed, or the socket has an error.
    hung_up: bool,
    // State of the direction from guest to host.
    received: u32,
    forwarded: u32,
    reported_forwarded: u32,
    /// Data that the socket did not accept. The buffer uses memory only while a slow client keeps the socket full.
    buffered: VecDeque<u8>,
    /// The maximum number of received bytes that are not delivered. This is also the guest's maximum credit.
    window: Window,
    /// Whether the client no longer reads the data that the guest sends.
    reader_gone: bool,
    /// Whether the device has shut down the socket's write direction, because the guest sends no more data.
    write_shut_down: bool,
    /// The directions that the guest has shut down.
    guest_shutdown: u32,
    /// The directions that the host has shut down.
    host_shutdown: u32,
    /// The events that epoll watches. `None` if the socket is not registered.
    pub watched: Option<EventSet>,
    /// Whether the connection is in the device's list of connections that need a receive buffer.
    pub queued: bool,
}

impl Connection {
    /// Creates a connection from the host to the guest. The connection's REQUEST is pending.
    pub fn connect(
        guest_cid: u64,
        local_port: u32,
        guest_port: u32,
        socket: OwnedFd,
        windows: &WindowPool,
        reply: Reply,
    ) -> Self {
        let window = windows.window(&socket);
        Self {
            guest_cid,
            local_port,
            guest_port,
            socket,
            state: State::Connecting { reply },
            pending: Pending { request: true, ..Pending::default() },
            sent: 0,
            guest_buf_alloc: 0,
            guest_fwd_cnt: 0,
            credit_requested: false,
            readable: false,
            read_eof: false,
            hung_up: false,
            received: 0,
            forwarded: 0,
            reported_forwarded: 0,
            buffered: VecDeque::new(),
            window,
            reader_gone: false,
            write_shut_down: false,
            guest_shutdown: 0,
            host_shutdown: 0,
            watched: None,
            queued: false,
        }
    }

    /// Returns the guest's port.
    pub fn guest_port(&self) -> u32 {
        self.guest_port
    }

    /// Returns the device's end of the socket pair.
    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Returns whether the connection can be removed.
    pub fn is_dead(&self) -> bool {
        matches!(self.state, State::Dead)
    }

    /// Returns whether the connection only waits for the guest's answer to SHUTDOWN. In this state, the client has
    /// closed its end, and the device has read all data from the client.
    pub fn is_orphan(&self) -> bool {
        self.hung_up && self.read_eof
    }

    /// Aborts the connection because the device is reset. Reports `error` if the guest has not accepted the connection
    /// yet. Does not send RST. The caller closes the socket by dropping the connection.
    pub fn abort(&mut self, error: io::ErrorKind) {
        if let State::Connecting { reply } = std::mem::replace(&mut self.state, State::Dead) {
            reply(Err(error.into()));
        }
    }

    /// Ends the connection with an RST packet to the guest, and drops the buffered data. Reports `ConnectionReset` if
    /// the guest has not accepted the connection yet.
    pub fn reset(&mut self) {
        if let State::Connecting { reply } = std::mem::replace(&mut self.state, State::Draining) {
            reply(Err(io::ErrorKind::ConnectionReset.into()));
        }
        self.buffered = VecDeque::new();
        self.pending = Pending { reset: true, ..Pending::default() };
    }

    /// Handles a packet from the guest. `payload` has the length from the header.
    pub fn receive(&mut self, header: &Header, payload: Iov<'_>) {
        if matches!(self.state, State::Dead) || self.pending.reset {
            return;
        }
        self.guest_buf_alloc = header.buf_alloc;
        self.guest_fwd_cnt = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_requested = false;
        }
        match header.op {
            Op::Response => self.accepted(),
            Op::Reset => self.refused(),
            _ if matches!(self.state, State::Connecting { .. }) => self.reset(),
            Op::Shutdown => self.guest_shut_down(header.flags),
            Op::ReadWrite => self.data(payload),
            Op::CreditRequest => self.pending.credit_update = true,
            Op::CreditUpdate => {}
            Op::Request | Op::Unknown(_) => self.reset(),
        }
    }

    fn accepted(&mut self) {
        match std::mem::replace(&mut self.state, State::Open) {
            State::Connecting { reply } if !self.pending.request => reply(Ok(())),
            State::Connecting { reply } => {
                // The guest has sent RESPONSE before the device has sent REQUEST.
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
            State::Connecting { reply } => {
                self.state = State::Dead;
                reply(Err(io::ErrorKind::ConnectionRefused.into()));
            }
            State::Dead => self.state = State::Dead,
            State::Open | State::Draining => {
                // Still deliver the data that the guest has sent before RST. Linux sends RST if the device does not
                // answer a SHUTDOWN within some seconds. The device answers late if the client reads slowly.
                self.pending = Pending::default();
                self.guest_shutdown = SHUTDOWN_BOTH;
                self.finish_writing();
            }
        }
    }

    fn guest_shut_down(&mut self, flags: u32) {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if flags & SHUTDOWN_RECEIVE != 0 && !self.read_eof {
            // Make the client's writes fail, as on any stream socket whose peer has shut down its read direction.
            socket::shutdown(&self.socket, Shutdown::Read);
            self.read_eof = true;
            self.readable = false;
        }
        self.finish_writing();
    }

    fn data(&mut self, mut payload: Iov<'_>) {
        let Ok(length) = u32::try_from(payload.len()) else { return self.reset() };
        let in_use = self.received.wrapping_sub(self.forwarded);
        if self.guest_shutdown & SHUTDOWN_SEND != 0 || length > self.window.size().saturating_sub(in_use) {
            // The guest has sent data after it shut down its send direction, or has sent more data than its credit.
            return self.reset();
        }
        self.received = self.received.wrapping_add(length);
        if self.buffered.is_empty() && !self.reader_gone {
            while !payload.is_empty() {
                match socket::send(&self.socket, payload.as_slice()) {
                    Ok(count) => {
                        payload.skip(count);
                        self.delivered(count);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(_) => {
                        self.stop_receiving();
                        break;
                    }
                }
            }
        }
        if self.reader_gone {
            self.forward(payload.len());
        } else if !payload.is_empty() {
            let mut rest = vec![0; payload.len()];
            payload.copy_to(&mut rest);
            if self.buffered.is_empty() {
                self.buffered = rest.into();
            } else {
                self.buffered.extend(rest);
            }
        }
    }

    /// Records that the device has delivered or dropped `count` bytes from the guest. Requests a credit update if many
    /// such bytes have not been reported to the guest.
    fn forward(&mut self, count: usize) {
        // `count` fits in a u32, because the received bytes that are neither delivered nor dropped fit in the window.
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        self.forwarded = self.forwarded.wrapping_add(count);
        if self.forwarded.wrapping_sub(self.reported_forwarded) >= self.window.size() / 4 {
            self.pending.credit_update = true;
        }
    }

    /// Records that the device has delivered `count` bytes from the guest to the socket. Only then, the window may
    /// grow.
    fn delivered(&mut self, count: usize) {
        self.window.delivered(u32::try_from(count).unwrap_or(u32::MAX));
        self.forward(count);
    }

    /// Handles a socket that accepts no more data. Tells the guest to stop sending, and drops the buffered data. After
    /// this call, the connection also drops all data that the guest still sends.
    fn stop_receiving(&mut self) {
        self.reader_gone = true;
        let dropped = std::mem::take(&mut self.buffered).len();
        self.forward(dropped);
        self.shut_down(SHUTDOWN_RECEIVE);
        self.finish_writing();
    }

    /// Tells the guest that the host has shut down the directions in `flags`. Does nothing if the guest has already
    /// been told, or if the connection is not open.
    fn shut_down(&mut self, flags: u32) {
        if matches!(self.state, State::Open) && self.host_shutdown & flags != flags {
            self.host_shutdown |= flags;
            self.pending.shutdown = true;
        }
    }

    /// Shuts down the socket in the directions that the guest has shut down. Does nothing while the buffer contains
    /// data from the guest.
    fn finish_writing(&mut self) {
        if !self.buffered.is_empty() {
            return;
        }
        if self.guest_shutdown & SHUTDOWN_SEND != 0 && !self.write_shut_down {
            self.write_shut_down = true;
            socket::shutdown(&self.socket, Shutdown::Write);
        }
        if self.guest_shutdown == SHUTDOWN_BOTH {
            // If unread data stayed in the socket, the client would see an error instead of the end of the stream.
            socket::discard_unread(&self.socket);
            match self.state {
                // RST confirms that both directions are closed (virtio 1.2, 5.10.6.5).
                State::Open => {
                    self.state = State::Draining;
                    self.pending = Pending { reset: true, ..Pending::default() };
                }
                State::Draining if !self.pending.reset => self.state = State::Dead,
                _ => {}
            }
        }
    }

    /// Handles an event of the socket.
    pub fn socket_event(&mut self, set: EventSet) {
        if set.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            self.hung_up = true;
        }
        if set.intersects(EventSet::IN | EventSet::HANG_UP | EventSet::READ_HANG_UP | EventSet::ERROR) && !self.read_eof
        {
            self.readable = true;
        }
        if set.intersects(EventSet::OUT | EventSet::HANG_UP | EventSet::ERROR) && !self.buffered.is_empty() {
            self.write_buffered();
        }
        if self.hung_up && self.read_eof && !self.reader_gone {
            // The client shut down its write direction earlier, and has now closed its end.
            self.stop_receiving();
        }
    }

    fn write_buffered(&mut self) {
        while !self.buffered.is_empty() {
            let (front, back) = self.buffered.as_slices();
            let parts = [socket::iovec(front), socket::iovec(back)];
            match socket::send(&self.socket, &parts) {
                Ok(count) => {
                    self.buffered.drain(..count.min(self.buffered.len()));
                    self.delivered(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.stop_receiving(),
            }
        }
        // Free the memory of the buffer. The connection needs the buffer again only when the socket is full again.
        self.buffered = VecDeque::new();
        self.finish_writing();
    }

    /// Returns the number of bytes for which the guest has buffer space.
    fn credit(&self) -> u32 {
        self.guest_buf_alloc.saturating_sub(self.sent.wrapping_sub(self.guest_fwd_cnt))
    }

    /// Returns whether the connection needs a receive buffer.
    pub fn wants_to_send(&self) -> bool {
        if self.is_dead() {
            return false;
        }
        let pending = &self.pending;
        pending.request
            || pending.reset
            || pending.credit_update
            || pending.shutdown
            || pending.credit_request
            || self.wants_to_read()
    }

    fn wants_to_read(&self) -> bool {
        matches!(self.state, State::Open) && self.readable && (self.credit() > 0 || !self.credit_requested)
    }

    /// Returns what the connection does with the guest's next receive buffer.
    pub fn next(&mut self) -> NextPacket {
        let pending = &mut self.pending;
        if std::mem::take(&mut pending.reset) {
            let header = self.header(Op::Reset);
            self.state = State::Dead;
            return NextPacket::Control(header);
        }
        if std::mem::take(&mut pending.request) {
            return NextPacket::Control(self.header(Op::Request));
        }
        if std::mem::take(&mut pending.credit_update) {
            if self.buffered.is_empty() {
                self.window.grow(&self.socket);
            }
            return NextPacket::Control(self.header(Op::CreditUpdate));
        }
        // The flags contain SEND only after the device has read all data from the socket. Therefore, this packet does
        // not overtake data.
        if std::mem::take(&mut self.pending.shutdown) {
            return NextPacket::Control(Header { flags: self.host_shutdown, ..self.header(Op::Shutdown) });
        }
        if matches!(self.state, State::Open) && self.readable {
            match self.credit() {
                0 if !self.credit_requested => self.pending.credit_request = true,
                0 => {}
                credit => return NextPacket::Data(credit as usize),
            }
        }
        if std::mem::take(&mut self.pending.credit_request) {
            self.credit_requested = true;
            return NextPacket::Control(self.header(Op::CreditRequest));
        }
        NextPacket::Nothing
    }

    /// Reads from the socket into the guest's buffer. Returns the packet's header if there was data.
    pub fn read(&mut self, buffer: &Iov<'_>) -> Option<Header> {
        match socket::receive(&self.socket, buffer.as_slice()) {
            Ok(0) => {}
            Ok(count) => {
                // `count` is at most the credit, which is a u32.
                let count = u32::try_from(count).unwrap_or(u32::MAX);
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
        self.read_eof = true;
        self.shut_down(if self.hung_up { SHUTDOWN_BOTH } else { SHUTDOWN_SEND });
        None
    }

    fn header(&mut self, op: Op) -> Header {
        self.reported_forwarded = self.forwarded;
        // Every packet contains the current credit. Therefore, no separate CREDIT_UPDATE is necessary.
        self.pending.credit_update = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.local_port,
            dst_port: self.guest_port,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: self.window.size(),
            fwd_cnt: self.forwarded,
        }
    }

    /// Returns the events that epoll should watch, or `None` if the socket should not be registered. epoll always
    /// reports a socket whose other end is closed. Therefore, such a socket is registered only while the device waits
    /// to read from or write to the socket.
    pub fn interest(&self) -> Option<EventSet> {
        if matches!(self.state, State::Connecting { .. } | State::Dead) {
            return None;
        }
        let mut set = EventSet::empty();
        if matches!(self.state, State::Open) && !self.readable && !self.read_eof {
            set |= EventSet::IN;
        }
        if !self.buffered.is_empty() {
            set |= EventSet::OUT;
        }
        (!set.is_empty() || !self.hung_up).then_some(set)
    }
}
