//! Descriptor chains of virtio-net both ways; a pair of sockets is in the tap's place.
#![no_main]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use husk_fuzz::{Step, drive};
use husk_vmm::virtio::net::Net;
use husk_vmm::virtio::testing::Bench;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (Vec<Vec<u8>>, Vec<Step>)| {
    let (frames, steps) = input;
    let (tap, wire) = UnixDatagram::pair().expect("a pair of sockets");
    wire.set_nonblocking(true).expect("a mode");
    let device = Net::new(File::from(OwnedFd::from(tap)), [2, 0, 0, 1, 2, 3], 1500).expect("a device");
    let mut bench = Bench::new(device);
    let activate = |bench: &mut Bench<Net>| bench.activate_on_a_socket(0);
    activate(&mut bench);
    // A tap gives no frame shorter than its own header.
    for frame in frames.iter().filter(|frame| frame.len() >= 12).take(8) {
        let _ = wire.send(frame);
    }
    drive(&mut bench, &steps, activate);
});
