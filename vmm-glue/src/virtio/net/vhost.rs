//! vhost-net: the host's kernel moves frames between a queue pair and a tap, without the VMM.
//!
//! The kernel accesses guest memory through the VMM's mappings. This module checks that the rings lie within these
//! mappings. The kernel itself checks the descriptors against the same mappings.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use crate::guest_memory::GuestMemory;
use crate::virtio::queue::Virtqueue;

/// The features that concern the queues. vhost-net gets these features if the driver has acknowledged them. The set
/// contains no offloads, because the tap does the offloads. The tap also handles the virtio-net header, because
/// VHOST_NET_F_VIRTIO_NET_HDR is never set.
const QUEUE_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// Reason why the kernel does not serve the queues.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// An ioctl failed.
    #[error("vhost-net ioctl {0} failed")]
    Refused(&'static str, #[source] vhost::Error),
    /// vhost-net lacks features that the driver has acknowledged.
    #[error("vhost-net lacks features {0:#x}, which the driver has acknowledged")]
    Features(u64),
    /// A ring does not lie within one region of memory.
    #[error("a ring of queue {0} does not lie within one region of guest memory")]
    Ring(u16),
    /// vhost-net has reported a broken queue.
    #[error("vhost-net reported a broken queue in queue pair {0}")]
    Broken(usize),
    /// The eventfd for faults could not be created or watched.
    #[error("failed to set up the eventfd for faults of vhost-net")]
    Fault(#[source] std::io::Error),
    /// The eventfd that interrupts the guest could not be shared.
    #[error("failed to get the interrupt eventfd for vhost-net")]
    Interrupt(#[source] std::io::Error),
}

/// An open `/dev/vhost-net`, and the guest memory that vhost-net may access.
struct Device<'a> {
    file: &'a File,
    memory: &'a GuestMemory,
}

impl AsRawFd for Device<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl<'a> VhostKernBackend for Device<'a> {
    type AS = &'a GuestMemory;

    fn mem(&self) -> &Self::AS {
        &self.memory
    }

    // The check of the `vhost` crate is wrong in two cases. It rejects a ring at the very end of memory, and accepts a
    // ring that spans two regions. Two regions that are adjacent in guest memory need not be adjacent in the VMM's
    // memory. If such a ring were accepted, the kernel could write beyond a mapping.
    fn is_valid(&self, ring: &VringConfigData) -> bool {
        let size = usize::from(ring.queue_size);
        // For the lengths, see virtio 1.2, 2.7.
        [(ring.desc_table_addr, 16 * size), (ring.avail_ring_addr, 6 + 2 * size), (ring.used_ring_addr, 6 + 8 * size)]
            .into_iter()
            .all(|(address, length)| self.memory.get_slice(GuestAddress(address), length).is_ok())
    }
}

impl Device<'_> {
    /// Attaches a ring to the tap, or detaches the ring if `tap` is `None`.
    fn set_backend(&self, index: u32, tap: Option<&File>) -> Result<(), VhostError> {
        let backend = vhost_vring_file { index, fd: tap.map_or(-1, AsRawFd::as_raw_fd) };
        // SAFETY: VHOST_NET_SET_BACKEND reads a `vhost_vring_file`, to which the argument is a valid reference.
        match unsafe { ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &backend) } {
            0.. => Ok(()),
            _ => {
                let error = vhost::Error::IoctlError(std::io::Error::last_os_error());
                Err(VhostError::Refused("VHOST_NET_SET_BACKEND", error))
            }
        }
    }

    fn ring(&self, index: usize, queue: &Virtqueue, call: &EventFd, fault: &EventFd) -> Result<(), VhostError> {
        let ring = queue.ring();
        let config = VringConfigData {
            queue_max_size: ring.max_size(),
            queue_size: ring.size(),
            flags: 0,
            desc_table_addr: ring.desc_table(),
            used_ring_addr: ring.used_ring(),
            avail_ring_addr: ring.avail_ring(),
            log_addr: None,
        };
        if !self.is_valid(&config) {
            return Err(VhostError::Ring(queue.index()));
        }
        self.set_vring_num(index, ring.size()).map_err(refused("VHOST_SET_VRING_NUM"))?;
        self.set_vring_addr(index, &config).map_err(refused("VHOST_SET_VRING_ADDR"))?;
        self.set_vring_base(index, ring.next_avail()).map_err(refused("VHOST_SET_VRING_BASE"))?;
        self.set_vring_call(index, call).map_err(refused("VHOST_SET_VRING_CALL"))?;
        self.set_vring_err(index, fault).map_err(refused("VHOST_SET_VRING_ERR"))?;
        self.set_vring_kick(index, queue.notify_eventfd()).map_err(refused("VHOST_SET_VRING_KICK"))
    }

    fn set_up(
        &self,
        features: u64,
        queues: [&Virtqueue; 2],
        call: &EventFd,
        fault: &EventFd,
        tap: &File,
    ) -> Result<(), VhostError> {
        let supported = self.get_features().map_err(refused("VHOST_GET_FEATURES"))?;
        let wanted = features & QUEUE_FEATURES;
        if wanted & !supported != 0 {
            return Err(VhostError::Features(wanted & !supported));
        }
        self.set_owner().map_err(refused("VHOST_SET_OWNER"))?;
        self.set_features(wanted).map_err(refused("VHOST_SET_FEATURES"))?;
        // Pass the whole memory, including blocks that are not plugged. The kernel uses the VMM's mappings, in which
        // these blocks are inaccessible.
        let regions: Vec<_> = self
            .memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                ..VhostUserMemoryRegionInfo::default()
            })
            .collect();
        self.set_mem_table(&regions).map_err(refused("VHOST_SET_MEM_TABLE"))?;
        for (index, queue) in queues.into_iter().enumerate() {
            self.ring(index, queue, call, fault)?;
        }
        self.attach(queues, tap)
    }

    /// Attaches both rings to the tap.
    fn attach(&self, queues: [&Virtqueue; 2], tap: &File) -> Result<(), VhostError> {
        for (index, queue) in (0..).zip(queues) {
            self.set_backend(index, Some(tap))?;
            // vhost-net ignores notifications while it has no backend. Therefore, signal a notification now.
            if let Err(error) = queue.notify_eventfd().write(1) {
                log::error!("virtio-net: failed to notify vhost-net: {error}");
            }
        }
        Ok(())
    }
}

fn refused(step: &'static str) -> impl FnOnce(vhost::Error) -> VhostError {
    move |error| VhostError::Refused(step, error)
}

/// Makes the kernel serve the receive and the transmit queue from their current indices, with the features that the
/// driver has acknowledged. The kernel interrupts the guest through `call`, and signals `fault` when the guest breaks a
/// queue.
///
/// # Errors
/// [`VhostError`]. After an error, the kernel serves no queue.
pub fn start(
    file: &File,
    tap: &File,
    memory: &GuestMemory,
    features: u64,
    queues: [&Virtqueue; 2],
    call: &EventFd,
    fault: &EventFd,
) -> Result<(), VhostError> {
    // Clear faults of an earlier activation.
    let _ = fault.read();
    let result = Device { file, memory }.set_up(features, queues, call, fault, tap);
    if result.is_err() {
        stop(file, memory);
    }
    result
}

/// Stops vhost-net. When this function returns, the thread of vhost-net has ended.
pub fn stop(file: &File, memory: &GuestMemory) {
    // This call fails if `set_up` failed before VHOST_SET_OWNER.
    if let Err(error) = (Device { file, memory }).reset_owner() {
        log::debug!("virtio-net: ioctl VHOST_RESET_OWNER failed: {error}");
    }
}

/// Pauses vhost-net, and stores its indices in the queues. When this function returns, vhost-net has returned all
/// chains that it has popped.
///
/// # Errors
/// [`VhostError`]. After an error, vhost-net may still be serving the queues.
pub fn pause(file: &File, memory: &GuestMemory, queues: [&mut Virtqueue; 2]) -> Result<(), VhostError> {
    let device = Device { file, memory };
    for (index, queue) in (0u8..).zip(queues) {
        device.set_backend(index.into(), None)?;
        let base = device.get_vring_base(index.into()).map_err(refused("VHOST_GET_VRING_BASE"))?;
        // The mask keeps the whole index, because the index of a split ring has 16 bits.
        queue.set_served_until((base & 0xffff) as u16);
    }
    Ok(())
}

/// Resumes vhost-net from the queues' current indices.
pub fn resume(file: &File, tap: &File, memory: &GuestMemory, queues: [&Virtqueue; 2]) -> Result<(), VhostError> {
    let device = Device { file, memory };
    for (index, queue) in queues.into_iter().enumerate() {
        let base = queue.ring().next_avail();
        device.set_vring_base(index, base).map_err(refused("VHOST_SET_VRING_BASE"))?;
    }
    device.attach(queues, tap)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ring_must_lie_within_one_region() {
        // The two regions are adjacent in guest memory.
        let ranges = [(GuestAddress(0), 0x10000), (GuestAddress(0x10000), 0x10000)];
        let memory = GuestMemory::from_ranges(&ranges).unwrap();
        let file = File::open("/dev/null").unwrap();
        let device = Device { file: &file, memory: &memory };
        let valid = |desc_table_addr, avail_ring_addr, used_ring_addr| {
            let queue_size = 256;
            let addresses = VringConfigData { desc_table_addr, avail_ring_addr, used_ring_addr, ..Default::default() };
            device.is_valid(&VringConfigData { queue_max_size: queue_size, queue_size, ..addresses })
        };
        assert!(valid(0, 0x2000, 0x3000));
        // In each line, the valid ring ends exactly at the end of a region. Each invalid ring goes beyond the end of
        // the region in which the ring begins.
        assert!(valid(0xf000, 0x2000, 0x3000) && !valid(0xf010, 0x2000, 0x3000));
        assert!(valid(0, 0xfdfa, 0x3000) && !valid(0, 0xfdfc, 0x3000));
        assert!(valid(0, 0x2000, 0x1f7fa) && !valid(0, 0x2000, 0xfffc) && !valid(0, 0x2000, 0x1f7fc));
        assert!(!valid(u64::MAX - 8, 0x2000, 0x3000));
    }
}
