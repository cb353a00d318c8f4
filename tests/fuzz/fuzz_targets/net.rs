//! Fuzzes virtio-net with descriptor chains on the receive and transmit queues, and with commands on the control queue.
//! Socket pairs replace the queues of the tap.
#![no_main]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use husk_fuzz::{Step, drive};
use husk_vmm::virtio::net::{Backend, Net};
use husk_vmm::virtio::testing::Bench;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (Vec<Vec<u8>>, Vec<Step>, bool)| {
    let (frames, steps, several) = input;
    let (taps, wires): (Vec<_>, Vec<_>) = (0..if several { 2 } else { 1 })
        .map(|_| {
            let (tap, wire) = UnixDatagram::pair().expect("create a socket pair");
            wire.set_nonblocking(true).expect("set non-blocking mode");
            (File::from(OwnedFd::from(tap)), wire)
        })
        .unzip();
    let device = Net::new(Backend { taps, vhost: None }, [2, 0, 0, 1, 2, 3], 1500).expect("create the device");
    let mut bench = Bench::new(device);
    let activate = |bench: &mut Bench<Net>| bench.activate_with_socket(0);
    activate(&mut bench);
    // A tap never delivers a frame that is shorter than the tap's header (virtio_net_hdr).
    for (frame, wire) in frames.iter().filter(|frame| frame.len() >= 12).take(8).zip(wires.iter().cycle()) {
        let _ = wire.send(frame);
    }
    drive(&mut bench, &steps, activate);
});
