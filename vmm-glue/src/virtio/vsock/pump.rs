//! Moves packets between the queues and the connections. One call moves a limited number of packets, so that the device
//! loop can also serve other devices.

use std::sync::Arc;

use super::connection::NextPacket;
use super::packet::{HEADER_LEN, HEADER_SIZE, HOST_CID, Header, MAX_PAYLOAD, Op, TYPE_STREAM};
use super::{MAX_RESET_PACKETS, Vsock};
use crate::guest_memory::GuestMemory;
use crate::virtio::queue::{Chain, Iov, QueueFault, log_guest_fault};
use crate::virtio::rate_limit::Direction;

impl Vsock {
    /// Takes packets from the guest, passes packets to the guest, and interrupts the guest at most once per queue.
    pub(super) fn pump(&mut self) -> Result<(), QueueFault> {
        let Some(active) = &self.active else { return Ok(()) };
        let memory = Arc::clone(&active.memory);
        let interrupt = Arc::clone(&active.interrupt);
        self.throttle.begin_turn();
        let more = self.tx_waiting && self.pump_tx(&memory)?;
        self.pump_rx(&memory)?;
        self.throttle.end_turn();
        if more && self.reset_packets.len() < MAX_RESET_PACKETS {
            // Either there are more packets than one call may take, or `reset_packets` was full and has space again.
            self.wake.wake();
        }
        if let Some(active) = &mut self.active {
            active.tx.flush(&memory, &*interrupt)?;
            active.rx.flush(&memory, &*interrupt)?;
        }
        Ok(())
    }

    /// Takes packets from the guest. Returns true if there may be more packets. Clears `tx_waiting` if the guest has no
    /// more packets. If the rate limit does not admit a packet, returns false and leaves `tx_waiting` set.
    fn pump_tx(&mut self, memory: &GuestMemory) -> Result<bool, QueueFault> {
        let Some(active) = &mut self.active else { return Ok(false) };
        active.tx.disable_notification(memory)?;
        for _ in 0..active.tx.size() {
            if self.reset_packets.len() >= MAX_RESET_PACKETS {
                return Ok(true);
            }
            let Some(active) = &mut self.active else { return Ok(false) };
            match active.tx.pop(memory)? {
                Some(Chain { head, readable, .. }) => {
                    if !self.throttle.admit(Direction::Transmit, readable.len().saturating_sub(HEADER_LEN)) {
                        active.tx.undo_pop();
                        return Ok(false);
                    }
                    self.receive_packet(readable);
                    if let Some(active) = &mut self.active {
                        active.tx.push(memory, head, 0)?;
                    }
                }
                None if active.tx.enable_notification(memory)? => {}
                None => {
                    self.tx_waiting = false;
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Handles one packet from the guest.
    fn receive_packet(&mut self, mut packet: Iov<'_>) {
        let header = match packet.take::<HEADER_LEN>() {
            Ok(bytes) => Header::parse(&bytes),
            Err(fault) => return log_guest_fault(1, &fault),
        };
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return log_guest_fault(1, &"dropped a vsock packet with a wrong CID");
        }
        let connection =
            self.connections.get_mut(&header.dst_port).filter(|connection| connection.guest_port() == header.src_port);
        match connection {
            Some(connection) if header.kind == TYPE_STREAM => {
                let length = header.len as usize;
                if header.len > MAX_PAYLOAD || length > packet.len() || (length != 0 && header.op != Op::ReadWrite) {
                    log_guest_fault(1, &"the vsock packet has an invalid length");
                    connection.reset();
                } else {
                    packet.truncate(length);
                    connection.receive(&header, packet);
                }
                self.mark_changed(header.dst_port);
            }
            // Refuse the packet with RST, because the packet belongs to no stream connection. Do not answer an RST
            // packet.
            _ if header.op != Op::Reset => self.reset_packets.push_back(header.reset()),
            _ => {}
        }
    }

    fn pump_rx(&mut self, memory: &GuestMemory) -> Result<(), QueueFault> {
        let Some(active) = &mut self.active else { return Ok(()) };
        // A chain that was popped, but that contains no packet yet.
        let mut buffer: Option<Chain<'_>> = None;
        let mut admitted = true;
        for _ in 0..u32::from(active.rx.size()) * 2 {
            if self.reset_packets.is_empty() && self.ready.is_empty() {
                break;
            }
            admitted = self.throttle.admit_up_to(Direction::Receive, MAX_PAYLOAD as usize);
            if !admitted {
                break;
            }
            let Some(chain) = (match buffer.take() {
                Some(chain) => Some(chain),
                None => active.rx.pop(memory)?,
            }) else {
                if active.rx.enable_notification(memory)? {
                    continue;
                }
                // The driver will send a notification when there are buffers again.
                return Ok(());
            };
            if chain.writable.len() <= HEADER_LEN {
                log_guest_fault(0, &"the vsock receive buffer is too small");
                active.rx.push(memory, chain.head, 0)?;
                continue;
            }
            let header = match self.reset_packets.pop_front() {
                Some(header) => Some(header),
                None => {
                    let Some(port) = self.ready.pop_front() else {
                        buffer = Some(chain);
                        continue;
                    };
                    let Some(connection) = self.connections.get_mut(&port) else {
                        buffer = Some(chain);
                        continue;
                    };
                    connection.queued = false;
                    let header = match connection.next() {
                        NextPacket::Control(header) => Some(header),
                        NextPacket::Data(credit) => {
                            let mut payload = chain.writable.clone();
                            payload.skip(HEADER_LEN);
                            payload.truncate(credit.min(MAX_PAYLOAD as usize));
                            connection.read(&payload)
                        }
                        NextPacket::Nothing => None,
                    };
                    if connection.wants_to_send() {
                        connection.queued = true;
                        self.ready.push_back(port);
                    }
                    self.changed.push(port);
                    header
                }
            };
            match header {
                Some(header) => {
                    self.throttle.charge(Direction::Receive, header.len as usize);
                    chain.writable.copy_from(&header.to_bytes());
                    // Header and payload together have less than 2^32 bytes, because they are in one chain.
                    active.rx.push(memory, chain.head, HEADER_SIZE.saturating_add(header.len))?;
                }
                None => buffer = Some(chain),
            }
        }
        if buffer.is_some() {
            active.rx.undo_pop();
        }
        if admitted && (!self.ready.is_empty() || !self.reset_packets.is_empty()) {
            self.wake.wake();
        }
        Ok(())
    }
}
