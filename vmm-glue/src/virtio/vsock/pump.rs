//! Packets between the queues and the connections: one turn's worth, then the rest after others had theirs.

use std::sync::Arc;

use super::connection::Next;
use super::packet::{HEADER_LEN, HOST_CID, Header, MAX_PAYLOAD, Op, TYPE_STREAM};
use super::{MAX_STRAYS, Vsock};
use crate::virtio::device::GuestMemory;
use crate::virtio::queue::{Chain, Iov, QueueFault, guest_fault};

impl Vsock {
    /// Takes what the guest sent, gives it what there is, and interrupts it once per queue.
    pub(super) fn pump(&mut self) -> Result<(), QueueFault> {
        let Some(active) = &self.active else { return Ok(()) };
        let memory = Arc::clone(&active.memory);
        let interrupt = Arc::clone(&active.interrupt);
        if self.tx_waiting {
            self.pump_tx(&memory)?;
        }
        self.pump_rx(&memory)?;
        if self.tx_waiting && self.strays.len() < MAX_STRAYS {
            // More than one turn's worth, or refusals that had to wait are on their way.
            self.wake.wake();
        }
        if let Some(active) = &mut self.active {
            active.tx.flush(&memory, &*interrupt)?;
            active.rx.flush(&memory, &*interrupt)?;
        }
        Ok(())
    }

    fn pump_tx(&mut self, memory: &GuestMemory) -> Result<(), QueueFault> {
        let Some(active) = &mut self.active else { return Ok(()) };
        active.tx.ignore(memory)?;
        for _ in 0..active.tx.size() {
            if self.strays.len() >= MAX_STRAYS {
                return Ok(());
            }
            let Some(active) = &mut self.active else { return Ok(()) };
            match active.tx.pop(memory)? {
                Some(Chain { head, readable, .. }) => {
                    self.take(readable);
                    if let Some(active) = &mut self.active {
                        active.tx.push(memory, head, 0)?;
                    }
                }
                None if active.tx.listen(memory)? => {}
                None => {
                    self.tx_waiting = false;
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// One packet from the guest.
    fn take(&mut self, mut packet: Iov<'_>) {
        let header = match packet.take::<HEADER_LEN>() {
            Ok(bytes) => Header::parse(&bytes),
            Err(fault) => return guest_fault(1, &fault),
        };
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return guest_fault(1, &"vsock packet with addresses not its own");
        }
        let connection =
            self.connections.get_mut(&header.dst_port).filter(|connection| connection.guest_port() == header.src_port);
        match connection {
            Some(connection) if header.kind == TYPE_STREAM => {
                let length = header.len as usize;
                if header.len > MAX_PAYLOAD || length > packet.len() || (length != 0 && header.op != Op::ReadWrite) {
                    guest_fault(1, &"vsock packet with a wrong length");
                    connection.reset();
                } else {
                    packet.truncate(length);
                    connection.receive(&header, packet);
                }
                self.touch(header.dst_port);
            }
            // Nobody listens on the host. A refusal is not refused.
            _ if header.op != Op::Reset => self.strays.push_back(header.reset()),
            _ => {}
        }
    }

    fn pump_rx(&mut self, memory: &GuestMemory) -> Result<(), QueueFault> {
        let Some(active) = &mut self.active else { return Ok(()) };
        // A chain taken and not yet used.
        let mut buffer: Option<Chain<'_>> = None;
        for _ in 0..u32::from(active.rx.size()) * 2 {
            if self.strays.is_empty() && self.ready.is_empty() {
                break;
            }
            let Some(chain) = (match buffer.take() {
                Some(chain) => Some(chain),
                None => active.rx.pop(memory)?,
            }) else {
                if active.rx.listen(memory)? {
                    continue;
                }
                // The driver will tell when there are buffers again.
                return Ok(());
            };
            if chain.writable.len() <= HEADER_LEN {
                guest_fault(0, &"vsock receive buffer too small");
                active.rx.push(memory, chain.head, 0)?;
                continue;
            }
            let header = match self.strays.pop_front() {
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
                        Next::Control(header) => Some(header),
                        Next::Data(credit) => {
                            let mut payload = chain.writable.clone();
                            payload.skip(HEADER_LEN);
                            payload.truncate(credit);
                            connection.read(&payload)
                        }
                        Next::Nothing => None,
                    };
                    if connection.wants_to_send() {
                        connection.queued = true;
                        self.ready.push_back(port);
                    }
                    self.touched.push(port);
                    header
                }
            };
            match header {
                Some(header) => {
                    chain.writable.copy_from(&header.to_bytes());
                    // A payload is less than 2^32 bytes, with its header as well: both are in one chain.
                    active.rx.push(memory, chain.head, (HEADER_LEN as u32).saturating_add(header.len))?;
                }
                None => buffer = Some(chain),
            }
        }
        if buffer.is_some() {
            active.rx.undo_pop();
        }
        if !self.ready.is_empty() || !self.strays.is_empty() {
            self.wake.wake();
        }
        Ok(())
    }
}
