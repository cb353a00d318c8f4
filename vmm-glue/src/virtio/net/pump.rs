//! Frames between tap and queues: one turn's worth, then the rest after others had theirs.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::{HEADER, LONGEST, NUM_BUFFERS_AT, Net};
use crate::virtio::device::GuestMemory;
use crate::virtio::queue::{Chain, Iov, MAX_SEGMENTS, QueueFault, guest_fault};

/// Ethernet header up to the end of the source address.
const ADDRESSES: usize = 12;
/// An Ethernet header.
const SHORTEST: usize = 14;

impl Net {
    pub(super) fn pump(&mut self) -> Result<(), QueueFault> {
        let Some(active) = &self.active else { return Ok(()) };
        let memory = Arc::clone(&active.memory);
        let interrupt = Arc::clone(&active.interrupt);
        let mut again = false;
        if self.tx_waiting {
            self.tx_waiting = self.transmit(&memory)?;
            again |= self.tx_waiting;
        }
        if self.rx_waiting {
            again |= self.receive(&memory)?;
        }
        if again {
            self.wake.wake();
        }
        if let Some(active) = &mut self.active {
            active.tx.flush(&memory, &*interrupt)?;
            active.rx.flush(&memory, &*interrupt)?;
        }
        Ok(())
    }

    /// From the guest; true when there may be more.
    fn transmit(&mut self, memory: &GuestMemory) -> Result<bool, QueueFault> {
        let Some(active) = &mut self.active else { return Ok(false) };
        active.tx.ignore(memory)?;
        let mut parts = Vec::new();
        for _ in 0..active.tx.size() {
            if let Some(chain) = active.tx.pop(memory)? {
                let head = chain.head;
                send(&self.tap, self.mac, chain.readable, &mut parts);
                active.tx.push(memory, head, 0)?;
            } else if !active.tx.listen(memory)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// To the guest; true when there may be more. What is waited for is left in `rx_waiting`: buffers while it is set,
    /// else frames.
    fn receive(&mut self, memory: &GuestMemory) -> Result<bool, QueueFault> {
        let Some(active) = &mut self.active else { return Ok(false) };
        active.rx.ignore(memory)?;
        // Chains taken and not yet used.
        let mut buffers: VecDeque<Chain<'_>> = VecDeque::new();
        let mut parts: Vec<libc::iovec> = Vec::new();
        let mut more = true;
        for _ in 0..active.rx.size() {
            let mut room: usize = buffers.iter().map(|chain| chain.writable.len()).sum();
            while room < active.longest && (active.mergeable || buffers.is_empty()) {
                match active.rx.pop_any(memory)? {
                    Some(chain) if chain.writable.len() < HEADER => {
                        // Giving it back out of turn would put those held out of step.
                        guest_fault(0, &"receive buffer too small");
                        buffers.push_back(chain);
                        break;
                    }
                    Some(chain) => {
                        room += chain.writable.len();
                        buffers.push_back(chain);
                    }
                    None => break,
                }
            }
            if let Some(position) = buffers.iter().position(|chain| chain.writable.len() < HEADER) {
                // Those before it go unused with it: rings are not reordered for a driver that breaks the rules.
                for chain in buffers.drain(..=position) {
                    active.rx.push(memory, chain.head, 0)?;
                }
                continue;
            }
            if buffers.is_empty() {
                if active.rx.listen(memory)? {
                    continue;
                }
                more = false;
                break;
            }
            parts.clear();
            parts.extend(buffers.iter().flat_map(|chain| chain.writable.as_slice()).take(MAX_SEGMENTS));
            // SAFETY: the parts are guest memory the driver gave for writing, alive through the call.
            let result = unsafe { libc::readv(self.tap.as_raw_fd(), parts.as_ptr(), parts.len() as libc::c_int) };
            match usize::try_from(result) {
                Ok(count) => {
                    let taken = fill(&buffers, count);
                    if let Some(first) = buffers.front() {
                        let mut header = first.writable.clone();
                        header.skip(NUM_BUFFERS_AT);
                        // At most the queue's size.
                        header.copy_from(&(taken as u16).to_le_bytes());
                    }
                    let mut left = count;
                    for chain in buffers.drain(..taken) {
                        let used = left.min(chain.writable.len());
                        left -= used;
                        // At most LONGEST in all.
                        active.rx.push(memory, chain.head, used as u32)?;
                    }
                }
                Err(_) => {
                    let error = io::Error::last_os_error();
                    match error.kind() {
                        io::ErrorKind::Interrupted => {}
                        io::ErrorKind::WouldBlock => {
                            self.rx_waiting = false;
                            more = false;
                            break;
                        }
                        // A frame that did not fit, which is lost, or a tap that is down: there is nothing to do about
                        // either but to wait for the next.
                        _ => {
                            log::debug!("virtio-net: reading the tap: {error}");
                            self.rx_waiting = false;
                            more = false;
                            break;
                        }
                    }
                }
            }
        }
        for _ in &buffers {
            active.rx.undo_pop();
        }
        Ok(more)
    }
}

/// How many of the buffers a frame of so many bytes takes, at least one.
fn fill(buffers: &VecDeque<Chain<'_>>, count: usize) -> usize {
    let mut left = count;
    let mut taken = 0;
    for chain in buffers {
        taken += 1;
        left = left.saturating_sub(chain.writable.len());
        if left == 0 {
            break;
        }
    }
    taken
}

/// One frame to the tap, or nowhere.
fn send(tap: &std::fs::File, mac: [u8; 6], mut packet: Iov<'_>, parts: &mut Vec<libc::iovec>) {
    if packet.len() > LONGEST || packet.len() < HEADER + SHORTEST {
        return guest_fault(1, &"frame of an impossible length");
    }
    // Copied, so that what is checked is what is sent.
    let Ok(mut start) = packet.take::<{ HEADER + ADDRESSES }>() else { return };
    if start.get(HEADER + 6..) != Some(&mac) {
        return guest_fault(1, &"frame from an address not its own");
    }
    parts.clear();
    parts.push(libc::iovec { iov_base: start.as_mut_ptr().cast(), iov_len: start.len() });
    parts.extend(packet.as_slice());
    // SAFETY: the parts are our copy and guest memory, alive through the call, which only reads them. One part too many
    // is an error like any other.
    if unsafe { libc::writev(tap.as_raw_fd(), parts.as_ptr(), parts.len() as libc::c_int) } < 0 {
        // A frame may get lost: the guest's header makes no sense, the interface is down or its queue full.
        log::debug!("virtio-net: writing the tap: {}", io::Error::last_os_error());
    }
}
