//! A virtio driver whose actions the fuzzer chooses. The targets for virtio devices share this driver.

use arbitrary::Arbitrary;
use husk_vmm::virtio::device::VirtioDevice;
use husk_vmm::virtio::testing::Bench;
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Maximum number of steps that are taken from one input. More steps only make fuzzing slower.
const MAX_STEPS: usize = 64;
/// Maximum length of one device-readable buffer, in bytes.
const MAX_BUFFER_LEN: usize = 64 * 1024;

/// An action of the driver.
#[derive(Arbitrary, Debug)]
pub enum Step {
    /// Write a descriptor.
    Describe {
        /// Queue index, modulo the number of queues.
        queue: u8,
        /// Descriptor index, modulo 16.
        index: u8,
        /// Guest address.
        address: Address,
        /// Length of the buffer in bytes.
        len: u32,
        /// Descriptor flags: NEXT, WRITE, INDIRECT and undefined flags.
        flags: u8,
        /// Index of the next descriptor.
        next: u16,
    },
    /// Make a chain available to the device. The chain may be invalid.
    Offer {
        /// Queue index, modulo the number of queues.
        queue: u8,
        /// Index of the chain's first descriptor.
        head: u16,
    },
    /// Make a well-formed chain available to the device.
    Chain {
        /// Queue index, modulo the number of queues.
        queue: u8,
        /// Device-readable buffers.
        readable: Vec<Vec<u8>>,
        /// Lengths of the device-writable buffers.
        writable: Vec<u16>,
    },
    /// Set the index of the available ring, without adding chains to the ring.
    Index {
        /// Queue index, modulo the number of queues.
        queue: u8,
        /// The new index.
        index: u16,
    },
    /// Write to the configuration space, then read the same range.
    Configure {
        /// Offset in the configuration space.
        offset: u16,
        /// Bytes to write.
        bytes: Vec<u8>,
    },
    /// Reset the device and activate it again.
    Reset,
}

/// A guest-physical address, inside or outside of guest memory.
#[derive(Arbitrary, Debug)]
pub enum Address {
    /// An address modulo 150 MiB. Guest memory has 144 MiB. Therefore, most of these addresses are in guest memory.
    Low(u32),
    /// Any address.
    Any(u64),
}

impl Address {
    fn get(&self) -> u64 {
        match self {
            Address::Low(address) => u64::from(*address) % (150 << 20),
            Address::Any(address) => *address,
        }
    }
}

/// Executes the steps, and runs the device loop after each step. After the last step, resets the device.
pub fn drive<D: VirtioDevice>(bench: &mut Bench<D>, steps: &[Step], activate: fn(&mut Bench<D>)) {
    for step in steps.iter().take(MAX_STEPS) {
        take(bench, step, activate);
        bench.run();
    }
    bench.lock().reset();
    bench.run();
}

fn take<D: VirtioDevice>(bench: &mut Bench<D>, step: &Step, activate: fn(&mut Bench<D>)) {
    let count = bench.queues.len();
    let at = |queue: &u8| usize::from(*queue) % count;
    match step {
        Step::Describe { queue, index, address, len, flags, next } => {
            bench.queues[at(queue)].write_descriptor(
                u16::from(index % 16),
                address.get(),
                *len,
                u16::from(*flags),
                *next,
            );
        }
        Step::Offer { queue, head } => bench.queues[at(queue)].offer(*head),
        Step::Chain { queue, readable, writable } => drop(chain(bench, at(queue), readable, writable)),
        Step::Index { queue, index } => bench.queues[at(queue)].set_avail_index(*index),
        Step::Configure { offset, bytes } => {
            let mut device = bench.lock();
            device.write_config(u64::from(*offset), bytes);
            device.read_config(u64::from(*offset), &mut vec![0; bytes.len()]);
        }
        Step::Reset => {
            bench.lock().reset();
            activate(bench);
        }
    }
}

/// Adds a chain to a queue. If the chain is empty, or the queue has too few free descriptors, adds nothing and returns
/// `false`.
pub fn chain<D: VirtioDevice>(bench: &mut Bench<D>, queue: usize, readable: &[Vec<u8>], writable: &[u16]) -> bool {
    let count = readable.len() + writable.len();
    if count == 0 || count > bench.queues[queue].free_descriptors() {
        return false;
    }
    let readable: Vec<&[u8]> = readable.iter().map(|bytes| &bytes[..bytes.len().min(MAX_BUFFER_LEN)]).collect();
    let writable: Vec<usize> = writable.iter().map(|&len| usize::from(len)).collect();
    bench.queues[queue].add(&readable, &writable);
    true
}

/// Creates a memfd with a length of `len` bytes.
pub fn memory_file(len: u64) -> std::fs::File {
    let file = memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC).expect("create a memfd");
    let file = std::fs::File::from(file);
    file.set_len(len).expect("set the file length");
    file
}
