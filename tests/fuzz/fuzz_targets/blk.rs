//! Fuzzes virtio-blk with requests. The device has to complete each well-formed request.
#![no_main]

use husk_fuzz::{chain, memory_file};
use husk_vmm::config::RateLimit;
use husk_vmm::virtio::blk::Blk;
use husk_vmm::virtio::device::VirtioDevice;
use husk_vmm::virtio::testing::Bench;
use libfuzzer_sys::fuzz_target;

#[derive(arbitrary::Arbitrary, Debug)]
struct Input {
    read_only: bool,
    /// The device-readable buffers of each request, and the lengths of its device-writable buffers.
    requests: Vec<(Vec<Vec<u8>>, Vec<u16>)>,
    /// Arbitrary descriptors. After the requests, each is made available as the head of a chain.
    descriptors: Vec<(u8, u64, u32, u8, u16)>,
}

fuzz_target!(|input: Input| {
    let blk = Blk::new(memory_file(64 * 512), input.read_only, "serial", RateLimit::default());
    let mut bench = Bench::new(blk.expect("create the device"));
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
});
