//! Frames between a tap and a pair of queues: one turn's worth, then the rest after others had theirs.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Instant;

use super::load::Load;
use super::{HEADER, LONGEST, NUM_BUFFERS_AT};
use crate::virtio::device::{GuestMemory, Interrupt};
use crate::virtio::queue::{Chain, Iov, MAX_SEGMENTS, QueueFault, Vq, guest_fault};

/// Ethernet header up to the end of the source address.
const ADDRESSES: usize = 12;
/// An Ethernet header.
const SHORTEST: usize = 14;

/// What holds for all frames of an interface.
pub struct Rules {
    /// The only address the guest may send from.
    pub mac: [u8; 6],
    /// Whether a frame may take several buffers.
    pub mergeable: bool,
    /// Bytes of header and frame that may come from the tap.
    pub longest: usize,
}

/// A pair of queues.
pub struct Lane {
    pub rx: Vq,
    pub tx: Vq,
    /// There may be frames from the guest, or to it.
    pub tx_waiting: bool,
    pub rx_waiting: bool,
}

impl Lane {
    pub fn new(rx: Vq, tx: Vq) -> Self {
        Self { rx, tx, tx_waiting: false, rx_waiting: false }
    }

    /// There may be something to do both ways.
    pub fn wait(&mut self) {
        self.tx_waiting = true;
        self.rx_waiting = true;
    }

    /// One turn; true when there is more to do for another.
    pub fn pump(
        &mut self,
        memory: &GuestMemory,
        interrupt: &dyn Interrupt,
        tap: &File,
        rules: &Rules,
        load: &mut Load,
    ) -> Result<bool, QueueFault> {
        let mut again = false;
        let mut frames = 0;
        if self.tx_waiting {
            self.tx_waiting = self.transmit(memory, tap, rules.mac, &mut frames)?;
            again |= self.tx_waiting;
        }
        if self.rx_waiting {
            again |= self.receive(memory, tap, rules, &mut frames)?;
        }
        if frames > 0 {
            load.add(frames, Instant::now());
        }
        self.tx.flush(memory, interrupt)?;
        self.rx.flush(memory, interrupt)?;
        Ok(again)
    }

    /// From the guest; true when there may be more.
    fn transmit(
        &mut self,
        memory: &GuestMemory,
        tap: &File,
        mac: [u8; 6],
        frames: &mut u32,
    ) -> Result<bool, QueueFault> {
        self.tx.ignore(memory)?;
        let mut parts = Vec::new();
        for _ in 0..self.tx.size() {
            if let Some(chain) = self.tx.pop(memory)? {
                let head = chain.head;
                send(tap, mac, chain.readable, &mut parts);
                self.tx.push(memory, head, 0)?;
                *frames += 1;
            } else if !self.tx.listen(memory)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// To the guest; true when there may be more. What is waited for is left in `rx_waiting`: buffers while it is set,
    /// else frames.
    fn receive(
        &mut self,
        memory: &GuestMemory,
        tap: &File,
        rules: &Rules,
        frames: &mut u32,
    ) -> Result<bool, QueueFault> {
        self.rx.ignore(memory)?;
        // Chains taken and not yet used.
        let mut buffers: VecDeque<Chain<'_>> = VecDeque::new();
        let mut parts: Vec<libc::iovec> = Vec::new();
        let mut more = true;
        for _ in 0..self.rx.size() {
            let mut room: usize = buffers.iter().map(|chain| chain.writable.len()).sum();
            while room < rules.longest && (rules.mergeable || buffers.is_empty()) {
                match self.rx.pop_any(memory)? {
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
                    self.rx.push(memory, chain.head, 0)?;
                }
                continue;
            }
            if buffers.is_empty() {
                if self.rx.listen(memory)? {
                    continue;
                }
                more = false;
                break;
            }
            parts.clear();
            parts.extend(buffers.iter().flat_map(|chain| chain.writable.as_slice()).take(MAX_SEGMENTS));
            // SAFETY: the parts are guest memory the driver gave for writing, alive through the call.
            let result = unsafe { libc::readv(tap.as_raw_fd(), parts.as_ptr(), parts.len() as libc::c_int) };
            match usize::try_from(result) {
                Ok(count) => {
                    *frames += 1;
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
                        self.rx.push(memory, chain.head, used as u32)?;
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
            self.rx.undo_pop();
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
fn send(tap: &File, mac: [u8; 6], mut packet: Iov<'_>, parts: &mut Vec<libc::iovec>) {
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
