//! Fuzzes virtio-blk with requests. The device has to complete each well-formed request.

use husk_vmm::config::RateLimit;
use husk_vmm::virtio::blk::Blk;
use husk_vmm::virtio::device::VirtioDevice;
use husk_vmm::virtio::testing::Bench;

use crate::driver::{chain, memory_file};
use crate::input::input;

#[derive(arbitrary::Arbitrary, Debug)]
struct Input {
    read_only: bool,
    /// For each request, the device-readable buffers and the lengths of the device-writable buffers.
    requests: Vec<(Vec<Vec<u8>>, Vec<u16>)>,
    /// Arbitrary descriptors. After the requests, each of these descriptors is made available as the head of a chain.
    descriptors: Vec<(u8, u64, u32, u8, u16)>,
}

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let Some(input) = input::<Input>(bytes) else { return };
    let mut bench = Bench::new(
        Blk::new(memory_file(64 * 512), input.read_only, "serial", RateLimit::default()).expect("create the device"),
    );
    bench.activate(0);
    for (readable, writable) in input.requests.iter().take(16) {
        if chain(&mut bench, 0, readable, writable) {
            bench.run_until(|queues| queues[0].poll().is_some());
        }
    }
    for (index, address, len, flags, next) in input.descriptors.iter().take(16) {
        bench.queues[0].write_descriptor(u16::from(index % 16), address % (100 << 20), *len, u16::from(*flags), *next);
        bench.queues[0].offer(u16::from(index % 16));
    }
    bench.lock().reset();
}
