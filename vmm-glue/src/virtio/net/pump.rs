//! Moves frames between a tap and a queue pair. One call moves a limited number of frames, so that the device loop can
//! also serve other devices.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Instant;

use super::load::Load;
use super::{MAX_PACKET, NUM_BUFFERS_OFFSET, VNET_HEADER_LEN};
use crate::guest_memory::GuestMemory;
use crate::virtio::device::Interrupt;
use crate::virtio::queue::{Chain, Iov, MAX_SEGMENTS, QueueFault, Virtqueue, iovec_count, log_guest_fault};
use crate::virtio::rate_limit::{Direction, Throttle};

/// Length of an Ethernet header up to the end of the source address, in bytes.
const MAC_ADDRESSES_LEN: usize = 12;
/// Length of an Ethernet header in bytes. This is also the minimum length of a frame.
const ETHERNET_HEADER_LEN: usize = 14;

/// Rules for all frames of an interface.
pub struct FrameRules {
    /// The only source MAC address that the guest may use.
    pub mac: [u8; 6],
    /// Whether a received frame may span several buffers.
    pub mergeable: bool,
    /// Maximum length of header and frame from the tap, in bytes.
    pub max_len: usize,
}

/// A queue pair.
pub struct QueuePair {
    pub rx: Virtqueue,
    pub tx: Virtqueue,
    /// Whether there may be frames to transmit. These frames may be waiting for the rate limit.
    pub tx_waiting: bool,
    /// Whether the receive queue must be served, because there may be frames or new buffers.
    pub rx_waiting: bool,
}

impl QueuePair {
    pub fn new(rx: Virtqueue, tx: Virtqueue) -> Self {
        Self { rx, tx, tx_waiting: false, rx_waiting: false }
    }

    /// Marks both queues for serving.
    pub fn mark_waiting(&mut self) {
        self.tx_waiting = true;
        self.rx_waiting = true;
    }

    /// Serves both queues for one turn. Returns true if another turn is needed.
    pub fn pump(
        &mut self,
        memory: &GuestMemory,
        interrupt: &dyn Interrupt,
        tap: &File,
        rules: &FrameRules,
        load: &mut Load,
        throttle: &mut Throttle,
    ) -> Result<bool, QueueFault> {
        let mut more = false;
        let mut frames = 0;
        if self.tx_waiting {
            more |= self.transmit(memory, tap, rules.mac, throttle, &mut frames)?;
        }
        if self.rx_waiting {
            more |= self.receive(memory, tap, rules, throttle, &mut frames)?;
        }
        if frames > 0 {
            load.add(frames, Instant::now());
        }
        self.tx.flush(memory, interrupt)?;
        self.rx.flush(memory, interrupt)?;
        Ok(more)
    }

    /// Sends frames from the guest to the tap. Returns true if there may be more frames. Clears `tx_waiting` if the
    /// guest has no more frames. If the rate limit does not admit a frame, returns false and leaves `tx_waiting` set.
    fn transmit(
        &mut self,
        memory: &GuestMemory,
        tap: &File,
        mac: [u8; 6],
        throttle: &mut Throttle,
        frames: &mut u32,
    ) -> Result<bool, QueueFault> {
        self.tx.disable_notification(memory)?;
        let mut parts = Vec::new();
        for _ in 0..self.tx.size() {
            if let Some(chain) = self.tx.pop(memory)? {
                let head = chain.head;
                if !throttle.admit(Direction::Transmit, chain.readable.len().saturating_sub(VNET_HEADER_LEN)) {
                    self.tx.undo_pop();
                    return Ok(false);
                }
                send(tap, mac, chain.readable, &mut parts);
                self.tx.push(memory, head, 0)?;
                *frames += 1;
            } else if !self.tx.enable_notification(memory)? {
                self.tx_waiting = false;
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Receives frames from the tap for the guest. Returns true if there may be more frames. Clears `rx_waiting` if the
    /// tap has no frames. If the guest has no buffers, or the rate limit admits no frame, returns false and leaves
    /// `rx_waiting` set.
    fn receive(
        &mut self,
        memory: &GuestMemory,
        tap: &File,
        rules: &FrameRules,
        throttle: &mut Throttle,
        frames: &mut u32,
    ) -> Result<bool, QueueFault> {
        self.rx.disable_notification(memory)?;
        // Chains that have been popped, but have not been returned yet.
        let mut buffers: VecDeque<Chain<'_>> = VecDeque::new();
        let mut parts: Vec<libc::iovec> = Vec::new();
        let mut more = true;
        for _ in 0..self.rx.size() {
            // Until a frame is admitted, it waits in the tap's queue.
            if !throttle.admit_up_to(Direction::Receive, rules.max_len) {
                more = false;
                break;
            }
            let mut capacity: usize = buffers.iter().map(|chain| chain.writable.len()).sum();
            while capacity < rules.max_len && (rules.mergeable || buffers.is_empty()) {
                match self.rx.pop_any(memory)? {
                    Some(chain) if chain.writable.len() < VNET_HEADER_LEN => {
                        // Append this chain to `buffers`, because it must be returned after the earlier chains in
                        // `buffers`.
                        log_guest_fault(0, &"the receive buffer is too small");
                        buffers.push_back(chain);
                        break;
                    }
                    Some(chain) => {
                        capacity += chain.writable.len();
                        buffers.push_back(chain);
                    }
                    None => break,
                }
            }
            if let Some(position) = buffers.iter().position(|chain| chain.writable.len() < VNET_HEADER_LEN) {
                // Return this chain unused, and also the chains before it. The chains must be returned in order, even
                // if the driver breaks the rules.
                for chain in buffers.drain(..=position) {
                    self.rx.push(memory, chain.head, 0)?;
                }
                continue;
            }
            if buffers.is_empty() {
                if self.rx.enable_notification(memory)? {
                    continue;
                }
                more = false;
                break;
            }
            parts.clear();
            parts.extend(buffers.iter().flat_map(|chain| chain.writable.as_slice()).take(MAX_SEGMENTS));
            // SAFETY: the buffers are checked guest memory that the device may write. The memory stays mapped during
            // the call. `take` limits the number of buffers to IOV_MAX.
            let result = unsafe { libc::readv(tap.as_raw_fd(), parts.as_ptr(), iovec_count(&parts)) };
            match usize::try_from(result) {
                Ok(count) => {
                    *frames += 1;
                    throttle.charge(Direction::Receive, count.saturating_sub(VNET_HEADER_LEN));
                    let taken = fill(&buffers, count);
                    if let Some(first) = buffers.front() {
                        let mut header = first.writable.clone();
                        header.skip(NUM_BUFFERS_OFFSET);
                        // `taken` is at most the queue's size, which fits into 16 bits.
                        header.copy_from(&u16::try_from(taken).unwrap_or(u16::MAX).to_le_bytes());
                    }
                    let mut remaining = count;
                    for chain in buffers.drain(..taken) {
                        let used = remaining.min(chain.writable.len());
                        remaining -= used;
                        // The sum of `used` is at most MAX_PACKET, which fits into 32 bits.
                        self.rx.push(memory, chain.head, u32::try_from(used).unwrap_or(u32::MAX))?;
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
                        // Either a frame was too long and is lost, or the tap is down. In both cases, the device only
                        // has to wait for the next frame.
                        _ => {
                            log::debug!("virtio-net: failed to read from the tap: {error}");
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

/// Returns the number of buffers that a frame of `count` bytes uses, which is at least 1.
fn fill(buffers: &VecDeque<Chain<'_>>, count: usize) -> usize {
    let mut remaining = count;
    let mut taken = 0;
    for chain in buffers {
        taken += 1;
        remaining = remaining.saturating_sub(chain.writable.len());
        if remaining == 0 {
            break;
        }
    }
    taken
}

/// Sends one frame to the tap, or drops it.
fn send(tap: &File, mac: [u8; 6], mut packet: Iov<'_>, parts: &mut Vec<libc::iovec>) {
    if packet.len() > MAX_PACKET || packet.len() < VNET_HEADER_LEN + ETHERNET_HEADER_LEN {
        return log_guest_fault(1, &"the frame's length is invalid");
    }
    // Copy the header, so that the guest cannot change it after the check.
    let Ok(mut start) = packet.take::<{ VNET_HEADER_LEN + MAC_ADDRESSES_LEN }>() else { return };
    if start.get(VNET_HEADER_LEN + 6..) != Some(&mac) {
        return log_guest_fault(1, &"dropped a frame whose source MAC address is not the interface's");
    }
    parts.clear();
    parts.push(libc::iovec { iov_base: start.as_mut_ptr().cast(), iov_len: start.len() });
    parts.extend(packet.as_slice());
    // SAFETY: the buffers are `start`, which outlives the call, and checked guest memory, which stays mapped. writev
    // only reads the buffers. If there is one buffer more than IOV_MAX, the call fails.
    if unsafe { libc::writev(tap.as_raw_fd(), parts.as_ptr(), iovec_count(parts)) } < 0 {
        // Drop the frame, because a network device may lose frames. The call fails if the guest's header is invalid,
        // the interface is down, or the interface's queue is full.
        log::debug!("virtio-net: failed to write to the tap: {}", io::Error::last_os_error());
    }
}
