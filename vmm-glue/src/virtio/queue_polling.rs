//! How a device polls a queue instead of waiting for a notification.

use std::sync::atomic::Ordering;

use virtio_queue::QueueT as _;
use vm_memory::{Bytes as _, GuestAddress};

use super::{QueueFault, Virtqueue};
use crate::guest_memory::GuestMemory;

impl Virtqueue {
    /// Disables the notifications until [`Self::enable_notification`] is called again, even if they were enabled.
    pub fn suppress_notification(&mut self, memory: &GuestMemory) -> Result<(), QueueFault> {
        self.disable_notification(memory)?;
        let state = self.queue.state();
        if !state.event_idx_enabled {
            return Ok(());
        }
        // The driver notifies when its index passes `avail_event`, which follows the used ring (virtio 1.2, 2.7.8). The
        // index is already beyond this value.
        let offset = 4 + 8 * u64::from(state.size);
        let passed = state.next_avail.wrapping_sub(1).to_le();
        let stored = memory.store(passed, GuestAddress(state.used_ring.wrapping_add(offset)), Ordering::Relaxed);
        stored.map_err(|error| QueueFault::Ring(self.index, virtio_queue::Error::GuestMemory(error)))
    }

    /// Returns whether the driver has added chains that were not popped.
    pub fn has_chains(&self, memory: &GuestMemory) -> bool {
        self.queue.avail_idx(memory, Ordering::Acquire).map_or(true, |index| index.0 != self.queue.next_avail())
    }
}

#[cfg(test)]
mod tests {
    use crate::virtio::testing::queue_without_device;

    #[test]
    fn chains_are_found_without_a_notification() {
        let (memory, mut driver, mut queue) = queue_without_device(4);
        for _ in 0..6 {
            assert!(!queue.has_chains(&memory));
            queue.suppress_notification(&memory).unwrap();
            driver.add(&[b"request"], &[]);
            assert!(queue.has_chains(&memory));
            let head = queue.pop(&memory).unwrap().unwrap().head;
            queue.push(&memory, head, 0).unwrap();
            assert!(driver.poll().is_some());
            assert!(!queue.enable_notification(&memory).unwrap());
        }
    }
}
