//! Fuzzes virtio-net with descriptor chains on the receive and transmit queues, and with commands on the control queue.
//! Socket pairs replace the queues of the tap.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use husk_vmm::virtio::net::{Backend, Net};
use husk_vmm::virtio::testing::Bench;

use crate::driver::{Step, drive};
use crate::input::input;

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let Some(input) = input::<(Vec<Vec<u8>>, Vec<Step>, bool)>(bytes) else { return };
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
}
