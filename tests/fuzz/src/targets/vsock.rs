//! Fuzzes virtio-vsock with guest packets, while the host connects, writes, reads and closes.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;

use husk_vmm::config::RateLimit;
use husk_vmm::virtio::testing::Bench;
use husk_vmm::virtio::vsock::Vsock;

use crate::driver::{Step, chain, drive};
use crate::input::input;

const CID: u64 = 3;
/// The guest's port, and the first host port that the device allocates.
const PORTS: (u32, u32) = (1024, 0x4000_0000);

#[derive(arbitrary::Arbitrary, Debug)]
enum Action {
    /// A packet of the open connection.
    Packet {
        op: u8,
        flags: u32,
        buf_alloc: u32,
        fwd_cnt: u32,
        len: Option<u32>,
        data: Vec<u8>,
    },
    /// Arbitrary bytes on the transmit queue.
    Raw(Vec<Vec<u8>>),
    /// Adds this number of empty buffers, modulo 16, to the receive queue.
    Buffers(u8),
    Write(u16),
    Read(u16),
    Close,
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Input {
    actions: Vec<Action>,
    steps: Vec<Step>,
}

/// Encodes a `struct virtio_vsock_hdr` (virtio 1.2, 5.10.6) from the guest to the host.
fn header(op: u8, flags: u32, buf_alloc: u32, fwd_cnt: u32, len: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(44);
    bytes.extend(CID.to_le_bytes());
    bytes.extend(2_u64.to_le_bytes());
    bytes.extend(PORTS.0.to_le_bytes());
    bytes.extend(PORTS.1.to_le_bytes());
    bytes.extend(len.to_le_bytes());
    bytes.extend(1_u16.to_le_bytes());
    bytes.extend(u16::from(op % 9).to_le_bytes());
    for word in [flags, buf_alloc, fwd_cnt] {
        bytes.extend(word.to_le_bytes());
    }
    bytes
}

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let Some(input) = input::<Input>(bytes) else { return };
    let mut bench = Bench::new(Vsock::new(CID, RateLimit::default()).expect("create the device"));
    bench.activate(0);
    let (sender, receiver) = channel();
    let (ours, theirs) = UnixStream::pair().expect("create a socket pair");
    ours.set_nonblocking(true).expect("set non-blocking mode");
    let reply = move |result: std::io::Result<()>| drop(sender.send(result.map(|()| ours)));
    bench.lock().connect(PORTS.0, theirs.into(), Box::new(reply));
    let mut stream: Option<UnixStream> = None;
    for action in input.actions.iter().take(64) {
        // Free the descriptors of completed chains, so that new chains can use these descriptors.
        while bench.queues[1].poll().is_some() {}
        while bench.queues[0].poll().is_some() {}
        match action {
            Action::Packet { op, flags, buf_alloc, fwd_cnt, len, data } => {
                let len = len.unwrap_or(data.len() as u32);
                let header = header(*op, *flags, *buf_alloc, *fwd_cnt, len);
                chain(&mut bench, 1, &[header, data.clone()], &[]);
            }
            Action::Raw(parts) => drop(chain(&mut bench, 1, parts, &[])),
            Action::Buffers(count) => {
                for _ in 0..count % 16 {
                    chain(&mut bench, 0, &[], &[4096]);
                }
            }
            Action::Write(len) => drop(stream.as_mut().map(|stream| stream.write(&vec![1; usize::from(*len)]))),
            Action::Read(len) => drop(stream.as_mut().map(|stream| stream.read(&mut vec![0; usize::from(*len)]))),
            Action::Close => stream = None,
        }
        bench.run();
        if let Ok(Ok(socket)) = receiver.try_recv() {
            stream = Some(socket);
        }
    }
    drive(&mut bench, &input.steps, |bench| bench.activate(0));
}
