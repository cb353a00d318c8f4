//! vhost-net: the host's kernel carries frames between a pair of queues and a tap, and no frame passes the VMM.
//!
//! The kernel reads and writes the guest's memory by the VMM's mappings: what it is told of the queues is checked here
//! to lie in them. Descriptors it checks by itself, against the same table of memory.

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

use crate::virtio::device::GuestMemory;
use crate::virtio::queue::Vq;

/// What of the driver's features concerns the queues. Offloads are between the driver and the tap, and the header too:
/// VHOST_NET_F_VIRTIO_NET_HDR is never set, so the kernel leaves it to the tap.
const CONCERNS_QUEUES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// Why the kernel does not serve the queues.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// It refused.
    #[error("vhost-net: {0} failed")]
    Refused(&'static str, #[source] vhost::Error),
    /// It cannot do what the driver has been promised.
    #[error("vhost-net lacks features {0:#x}")]
    Features(u64),
    /// A ring is not in one piece of memory.
    #[error("vhost-net: queue {0} lies across regions of memory")]
    Ring(u16),
    /// It said so while it served.
    #[error("vhost-net: a queue of pair {0} is broken")]
    Broken(usize),
    /// It cannot be opened: the module may be missing.
    #[error("cannot open /dev/vhost-net")]
    Open(#[source] std::io::Error),
    /// Its interrupts have no way to the guest.
    #[error("vhost-net: cannot have the interrupt")]
    Interrupt(#[source] std::io::Error),
}

/// An open `/dev/vhost-net`, with the memory that it is told of.
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

    // The crate's own check refuses a ring at the very end of memory and lets one pass that lies across two regions,
    // which are neighbours for the guest and not for the VMM: the kernel would write beyond the mapping.
    fn is_valid(&self, ring: &VringConfigData) -> bool {
        let size = usize::from(ring.queue_size);
        // virtio 1.2, 2.7
        [(ring.desc_table_addr, 16 * size), (ring.avail_ring_addr, 6 + 2 * size), (ring.used_ring_addr, 6 + 8 * size)]
            .into_iter()
            .all(|(address, length)| self.memory.get_slice(GuestAddress(address), length).is_ok())
    }
}

impl Device<'_> {
    /// Attaches a ring to the tap, or to nothing.
    fn set_backend(&self, index: u32, tap: Option<&File>) -> Result<(), VhostError> {
        let backend = vhost_vring_file { index, fd: tap.map_or(-1, AsRawFd::as_raw_fd) };
        // SAFETY: the ioctl reads the structure it is pointed to.
        match unsafe { ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &backend) } {
            0.. => Ok(()),
            _ => {
                let error = vhost::Error::IoctlError(std::io::Error::last_os_error());
                Err(VhostError::Refused("VHOST_NET_SET_BACKEND", error))
            }
        }
    }

    fn ring(&self, index: usize, queue: &Vq, call: &EventFd, fault: &EventFd) -> Result<(), VhostError> {
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
        self.set_vring_kick(index, queue.notify_event()).map_err(refused("VHOST_SET_VRING_KICK"))
    }

    fn set_up(
        &self,
        features: u64,
        queues: [&Vq; 2],
        call: &EventFd,
        fault: &EventFd,
        tap: &File,
    ) -> Result<(), VhostError> {
        let able = self.get_features().map_err(refused("VHOST_GET_FEATURES"))?;
        let wanted = features & CONCERNS_QUEUES;
        if wanted & !able != 0 {
            return Err(VhostError::Features(wanted & !able));
        }
        self.set_owner().map_err(refused("VHOST_SET_OWNER"))?;
        self.set_features(wanted).map_err(refused("VHOST_SET_FEATURES"))?;
        // All of it, what is not plugged in too: that is not accessible, to the kernel either.
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
    fn attach(&self, queues: [&Vq; 2], tap: &File) -> Result<(), VhostError> {
        for (index, queue) in (0..).zip(queues) {
            self.set_backend(index, Some(tap))?;
            // A notification that came while there was no backend was taken for nothing.
            if let Err(error) = queue.notify_event().write(1) {
                log::error!("virtio-net: cannot notify vhost-net: {error}");
            }
        }
        Ok(())
    }
}

fn refused(step: &'static str) -> impl FnOnce(vhost::Error) -> VhostError {
    move |error| VhostError::Refused(step, error)
}

/// Has the kernel serve the pair of queues (receive, transmit) from where they are, with the features the driver
/// acknowledged. It interrupts by `call`, and tells by `fault` that the guest broke a queue.
///
/// # Errors
/// [`VhostError`]; the kernel serves nothing then.
pub fn start(
    file: &File,
    tap: &File,
    memory: &GuestMemory,
    features: u64,
    queues: [&Vq; 2],
    call: &EventFd,
    fault: &EventFd,
) -> Result<(), VhostError> {
    // Faults of another time.
    let _ = fault.read();
    let result = Device { file, memory }.set_up(features, queues, call, fault, tap);
    if result.is_err() {
        stop(file, memory);
    }
    result
}

/// Stops the kernel's work for good: its thread is gone when this returns.
pub fn stop(file: &File, memory: &GuestMemory) {
    // Fails where the set-up failed before there was an owner.
    if let Err(error) = (Device { file, memory }).reset_owner() {
        log::debug!("virtio-net: VHOST_RESET_OWNER: {error}");
    }
}

/// Has the kernel stand still, and notes in the queues where it did: all chains that it took are given back.
///
/// # Errors
/// [`VhostError`]; it may serve on.
pub fn pause(file: &File, memory: &GuestMemory, queues: [&mut Vq; 2]) -> Result<(), VhostError> {
    let device = Device { file, memory };
    for (index, queue) in (0u8..).zip(queues) {
        device.set_backend(index.into(), None)?;
        let base = device.get_vring_base(index.into()).map_err(refused("VHOST_GET_VRING_BASE"))?;
        // A split ring's index, of 16 bits.
        queue.taken_until(base as u16);
    }
    Ok(())
}

/// Has it go on from where the queues are.
pub fn resume(file: &File, tap: &File, memory: &GuestMemory, queues: [&Vq; 2]) -> Result<(), VhostError> {
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
    fn rings_lie_in_one_piece_of_memory() {
        // Two regions that are neighbours to the guest.
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
        // At the very end, and one entry further.
        assert!(valid(0xf000, 0x2000, 0x3000) && !valid(0xf010, 0x2000, 0x3000));
        assert!(valid(0, 0xfdfa, 0x3000) && !valid(0, 0xfdfc, 0x3000));
        assert!(valid(0, 0x2000, 0x1f7fa) && !valid(0, 0x2000, 0xfffc) && !valid(0, 0x2000, 0x1f7fc));
        assert!(!valid(u64::MAX - 8, 0x2000, 0x3000));
    }
}
