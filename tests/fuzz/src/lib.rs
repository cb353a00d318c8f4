//! What the targets of virtio devices share: a driver that does whatever the fuzzer says.

pub mod jail;

use arbitrary::Arbitrary;
use husk_vmm::virtio::device::VirtioDevice;
use husk_vmm::virtio::testing::Bench;

/// Steps that are taken of one input; more only makes it slower.
const MOST_STEPS: usize = 64;
/// Bytes of one writable buffer at most.
const MOST_WRITABLE: usize = 64 * 1024;

/// What a driver may do to a queue.
#[derive(Arbitrary, Debug)]
pub enum Step {
    /// Write a descriptor.
    Describe {
        /// Which queue, modulo their number.
        queue: u8,
        /// Which descriptor, modulo 16.
        index: u8,
        /// Guest address.
        address: Address,
        /// Length.
        len: u32,
        /// NEXT, WRITE, INDIRECT and what does not exist.
        flags: u8,
        /// The next descriptor.
        next: u16,
    },
    /// Make a descriptor available, whatever it says.
    Offer {
        /// Which queue, modulo their number.
        queue: u8,
        /// The head of the chain.
        head: u16,
    },
    /// Make a well-formed chain available.
    Chain {
        /// Which queue, modulo their number.
        queue: u8,
        /// What the device reads.
        readable: Vec<Vec<u8>>,
        /// Lengths of what it writes.
        writable: Vec<u16>,
    },
    /// Claim that so many chains are available.
    Index {
        /// Which queue, modulo their number.
        queue: u8,
        /// The index.
        index: u16,
    },
    /// Write to the configuration space.
    Configure {
        /// Where.
        offset: u16,
        /// What.
        bytes: Vec<u8>,
    },
    /// Reset the device and activate it again.
    Reset,
}

/// An address that is often in guest memory.
#[derive(Arbitrary, Debug)]
pub enum Address {
    /// Within the first 4 GiB, of which the start is memory.
    Low(u32),
    /// Anywhere.
    Any(u64),
}

impl Address {
    fn get(&self) -> u64 {
        match self {
            // 144 MiB are memory.
            Address::Low(address) => u64::from(*address) % (150 << 20),
            Address::Any(address) => *address,
        }
    }
}

/// Takes the steps, one turn of the device's loop after each.
pub fn drive<D: VirtioDevice>(bench: &mut Bench<D>, steps: &[Step], activate: fn(&mut Bench<D>)) {
    for step in steps.iter().take(MOST_STEPS) {
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

/// Adds a chain if it is one and there is room for it.
pub fn chain<D: VirtioDevice>(bench: &mut Bench<D>, queue: usize, readable: &[Vec<u8>], writable: &[u16]) -> bool {
    let count = readable.len() + writable.len();
    if count == 0 || count > bench.queues[queue].room() {
        return false;
    }
    let readable: Vec<&[u8]> = readable.iter().map(|bytes| &bytes[..bytes.len().min(MOST_WRITABLE)]).collect();
    let writable: Vec<usize> = writable.iter().map(|&len| usize::from(len)).collect();
    bench.queues[queue].add(&readable, &writable);
    true
}

/// A file in memory of this length.
pub fn memory_file(len: u64) -> std::fs::File {
    use std::os::fd::FromRawFd;
    // SAFETY: the name is a string with its end; the new descriptor is nobody else's.
    let file = unsafe {
        let fd = libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0, "memfd_create");
        std::fs::File::from_raw_fd(fd)
    };
    file.set_len(len).expect("a length");
    file
}
