//! A private descriptor table, from which virtiofsd reads chains that the guest cannot change.
//!
//! virtiofsd 1.14 takes a `DescriptorChain` of virtio-queue. virtiofsd walks the chain once to create a `Reader`, and
//! once more to create a `Writer` (descriptor_utils.rs). Each walk reads the descriptors from the memory to which the
//! chain refers. If this memory were guest memory, a vCPU could change the descriptors after the VMM has checked the
//! chain.
//!
//! The VMM must check the chain for two reasons. `Server::read()`, `readdir()` and `readdirplus()` (server.rs) panic if
//! the chain has fewer than 16 writable bytes. readv(2) and writev(2) fail if the chain has more than [`MAX_SEGMENTS`]
//! descriptors.

use std::io;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT as _, QueueT as _};
use virtiofsd::descriptor_utils::{Error, Reader, Writer};
use vm_memory::{ByteValued as _, Bytes as _, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion as _};

use crate::guest_memory::GuestMemory;
use crate::virtio::queue::{Chain, MAX_SEGMENTS};

/// Size of `struct virtq_desc`, in bytes (virtio 1.2, 2.7.5).
const DESCRIPTOR: usize = 16;
/// Address of the available ring in the private memory. The ring follows the table, which starts at 0.
const AVAIL_RING: usize = MAX_SEGMENTS * DESCRIPTOR;
/// Size of the private memory, in bytes. The available ring has three fields of 2 bytes, and an index of 2 bytes for
/// each descriptor.
const SIZE: usize = AVAIL_RING + 6 + MAX_SEGMENTS * 2;
/// Offset of `idx` in `struct virtq_avail`.
const AVAIL_INDEX: usize = 2;

/// A descriptor table in private memory.
pub struct DescriptorTable {
    memory: Arc<GuestMemoryMmap<()>>,
    /// The chain that starts at the table's first descriptor.
    chain: DescriptorChain<Arc<GuestMemoryMmap<()>>>,
}

impl DescriptorTable {
    /// Creates a table. Fails if the private memory cannot be mapped.
    pub fn new() -> io::Result<Self> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), SIZE)]).map_err(io::Error::other)?;
        let memory = Arc::new(memory);
        // virtio-queue creates a chain only from an entry of an available ring. Therefore, the ring gets one entry. The
        // entry is 0, which is the index of the table's first descriptor.
        memory.write_obj(1_u16.to_le(), GuestAddress((AVAIL_RING + AVAIL_INDEX) as u64)).map_err(io::Error::other)?;
        let mut queue = Queue::new(u16::try_from(MAX_SEGMENTS).map_err(io::Error::other)?).map_err(io::Error::other)?;
        queue.try_set_desc_table_address(GuestAddress(0)).map_err(io::Error::other)?;
        queue.try_set_avail_ring_address(GuestAddress(AVAIL_RING as u64)).map_err(io::Error::other)?;
        queue.set_ready(true);
        let chain = queue.iter(Arc::clone(&memory)).map_err(io::Error::other)?.next();
        Ok(Self { memory, chain: chain.ok_or(io::ErrorKind::InvalidData)? })
    }

    /// Returns virtiofsd's reader and writer for a chain. The reader and the writer use the buffers that `chain`
    /// stores, and do not read the guest's descriptors again.
    pub fn open<'m>(&mut self, memory: &'m GuestMemory, chain: &Chain<'m>) -> Result<(Reader<'m>, Writer<'m>), Error> {
        let (readable, writable) = (chain.readable.as_slice(), chain.writable.as_slice());
        let count = readable.len() + writable.len();
        if count > MAX_SEGMENTS {
            return Err(Error::InvalidChain);
        }
        let parts = readable.iter().map(|part| (part, 0));
        let parts = parts.chain(writable.iter().map(|part| (part, (VRING_DESC_F_WRITE & 0xffff) as u16)));
        let mut table = Vec::with_capacity(count * DESCRIPTOR);
        for (next, (part, write)) in (1_u16..).zip(parts) {
            let address = guest_address(memory, part).ok_or(Error::FindMemoryRegion)?;
            let length = u32::try_from(part.iov_len).map_err(|_| Error::DescriptorChainOverflow)?;
            let more = if usize::from(next) < count { (VRING_DESC_F_NEXT & 0xffff) as u16 } else { 0 };
            table.extend_from_slice(Descriptor::new(address, length, write | more, next).as_slice());
        }
        self.memory.write_slice(&table, GuestAddress(0)).map_err(Error::GuestMemoryError)?;
        Ok((Reader::new(memory, self.chain.clone())?, Writer::new(memory, self.chain.clone())?))
    }
}

/// Returns the guest-physical address of a buffer.
pub fn guest_address(memory: &GuestMemory, part: &libc::iovec) -> Option<u64> {
    memory.iter().find_map(|region| {
        let offset = part.iov_base.addr().checked_sub(region.as_ptr().addr())?;
        (offset < region.size()).then(|| region.start_addr().0 + offset as u64)
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::virtio::device::ActiveQueue;
    use crate::virtio::queue::Virtqueue;

    /// Returns the address of a descriptor's buffer. The buffer has one byte, and is in one of the two memory regions.
    fn buffer(index: u16) -> GuestAddress {
        let region = if index.is_multiple_of(3) { 0x8000 } else { 0x10_0000 };
        GuestAddress(region + u64::from(index) * 2)
    }

    #[test]
    fn guest_cannot_change_a_chain_after_the_device_has_popped_it() {
        const COUNT: u16 = if cfg!(miri) { 64 } else { MAX_SEGMENTS as u16 };
        const READABLE: u16 = COUNT / 2 - 12;
        let ranges = [(GuestAddress(0), 0x1_0000), (GuestAddress(0x10_0000), 0x4000)];
        let memory = GuestMemory::from_ranges(&ranges).unwrap();
        for index in 0..COUNT {
            let write = if index < READABLE { 0 } else { (VRING_DESC_F_WRITE & 0xffff) as u16 };
            let more = if index < COUNT - 1 { (VRING_DESC_F_NEXT & 0xffff) as u16 } else { 0 };
            let descriptor = Descriptor::new(buffer(index).0, 1, write | more, index + 1);
            memory.write_obj(descriptor, GuestAddress(u64::from(index) * 16)).unwrap();
            memory.write_obj(index as u8, buffer(index)).unwrap();
        }
        memory.write_obj(1_u16, GuestAddress(0x4002)).unwrap();
        let mut queue = Queue::new(COUNT).unwrap();
        queue.try_set_desc_table_address(GuestAddress(0)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(0x4000)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(0x5000)).unwrap();
        queue.set_ready(true);
        let mut queue = Virtqueue::new(ActiveQueue { queue, notify: EventFd::new(0).unwrap() }, 0, &memory, 0).unwrap();
        let chain = queue.pop(&memory).unwrap().unwrap();

        // The guest clears its descriptor table after the device has popped the chain.
        memory.write_slice(&[0; COUNT as usize * DESCRIPTOR], GuestAddress(0)).unwrap();
        let mut table = DescriptorTable::new().unwrap();
        for _ in 0..2 {
            let (mut reader, mut writer) = table.open(&memory, &chain).unwrap();
            assert_eq!(reader.available_bytes(), usize::from(READABLE));
            assert_eq!(writer.available_bytes(), usize::from(COUNT - READABLE));
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).unwrap();
            assert_eq!(bytes, (0..READABLE).map(|index| index as u8).collect::<Vec<_>>());
            writer.write_all(&(READABLE..COUNT).map(|index| !index as u8).collect::<Vec<_>>()).unwrap();
            assert!(writer.write_all(&[0]).is_err());
        }
        for index in 0..COUNT {
            let byte: u8 = memory.read_obj(buffer(index)).unwrap();
            assert_eq!(byte, if index < READABLE { index as u8 } else { !index as u8 });
        }
    }
}
