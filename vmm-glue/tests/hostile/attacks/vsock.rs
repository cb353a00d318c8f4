//! Attacks with packets of virtio-vsock.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use husk_vmm::client::Vmm;
use husk_vmm::control::Call;

use super::{Attack, VSOCK, vsock_packet};
use crate::guest::{Desc, Device, Guest, Queue, WRITE, register};
use crate::machine::{Host, send};

/// Port to which the host connects.
const PORT: u32 = 9;
/// Host port of the first connection that the host opens (`PORTS` in vmm-glue/src/virtio/vsock/mod.rs).
const HOST_PORT: u32 = 0x4000_0000;
const STREAM: u16 = 1;

// VIRTIO_VSOCK_OP_*
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const READ_WRITE: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

pub fn attacks() -> Vec<Attack> {
    let waiting = Host { before: Some(|vmm| (0..40).for_each(|_| start_to_connect(vmm))), ..Host::default() };
    let connected = Host { during: Some(connect_and_write), ..Host::default() };
    vec![
        Attack::on(VSOCK, "packets of every type and operation", |guest, device| {
            let packets = every_packet(1, 2, &[]);
            transmit(guest, device, true, &packets);
        }),
        Attack::on(VSOCK, "packets with lies about lengths and CIDs", |guest, device| {
            let mut packets = Vec::new();
            for length in [1, 65_536, 65_537, u32::MAX] {
                packets.extend([0, 1, 100].map(|real| vsock_packet(STREAM, READ_WRITE, 1, 2, length, &vec![7; real])));
            }
            let valid = vsock_packet(STREAM, 1, 1, 2, 0, &[]);
            packets.extend((1..44).map(|len| valid[..len].to_vec()));
            for (at, cid) in [(0, 0u64), (0, 2), (0, u64::MAX), (8, 3), (8, 1), (8, u64::MAX)] {
                let mut packet = valid.clone();
                packet[at..at + 8].copy_from_slice(&cid.to_le_bytes());
                packets.push(packet);
            }
            transmit(guest, device, true, &packets);
        }),
        Attack::on(VSOCK, "flood of 25600 connection requests", |guest, device| {
            let mut queues = guest.start(device);
            receive(guest, device, &mut queues[0]);
            let queue = &mut queues[1];
            guest.request(queue, 0, &(device.request)().0, 0);
            (1..queue.size).for_each(|_| guest.offer(queue, 0));
            let queue = *queue;
            let rx = queues[0];
            let notify = device.register(register::QUEUE_NOTIFY);
            guest.repeat(200, |code| {
                code.add16(queue.avail + 2, queue.size);
                code.store32(notify, 1);
                code.wait_equal16(queue.avail + 2, queue.used + 2);
                code.wait_equal16(rx.avail + 2, rx.used + 2);
                code.add16(rx.avail + 2, rx.size);
                code.store32(notify, 0);
            });
        }),
        Attack::on(VSOCK, "connection requests without a receive buffer", |guest, device| {
            let mut queues = guest.start(device);
            let queue = &mut queues[1];
            guest.request(queue, 0, &(device.request)().0, 0);
            (1..queue.size).for_each(|_| guest.offer(queue, 0));
            let queue = *queue;
            guest.publish(device, &queue);
            guest.settle(device, &queue);
        }),
        Attack::on(VSOCK, "connections of the host that the guest never answers", |guest, device| {
            let mut queues = guest.start(device);
            receive(guest, device, &mut queues[0]);
            guest.wait16(queues[0].used + 2, 0);
        })
        .with_host(waiting),
        Attack::on(VSOCK, "lies about credit", |guest, device| {
            let credit = |op, buf_alloc: u32, fwd_cnt: u32| {
                let mut packet = vsock_packet(STREAM, op, PORT, HOST_PORT, 0, &[]);
                packet[36..40].copy_from_slice(&buf_alloc.to_le_bytes());
                packet[40..44].copy_from_slice(&fwd_cnt.to_le_bytes());
                packet
            };
            let mut packets = vec![credit(RESPONSE, 0, 0)];
            for buf_alloc in [0, 1, 1 << 20, u32::MAX] {
                for fwd_cnt in [0, 1, 0x8000_0000, u32::MAX, 5] {
                    packets.push(credit(CREDIT_UPDATE, buf_alloc, fwd_cnt));
                    packets.push(credit(CREDIT_REQUEST, buf_alloc, fwd_cnt));
                }
            }
            // This data exceeds the credit that the device has granted.
            let data = vsock_packet(STREAM, READ_WRITE, PORT, HOST_PORT, 65_536, &vec![7; 65_536]);
            packets.extend(vec![data; 20]);
            packets.push(credit(CREDIT_UPDATE, u32::MAX, u32::MAX));
            answer(guest, device, &packets);
        })
        .with_host(connected),
        Attack::on(VSOCK, "packets of every kind in a connection", |guest, device| {
            let mut packets = vec![vsock_packet(STREAM, RESPONSE, PORT, HOST_PORT, 0, &[])];
            packets
                .extend(every_packet(PORT, HOST_PORT, b"data").into_iter().filter(|packet| packet[30] != RESET as u8));
            answer(guest, device, &packets);
        })
        .with_host(connected),
        Attack::on(VSOCK, "data after a shutdown and after a reset", |guest, device| {
            let packet = |op| vsock_packet(STREAM, op, PORT, HOST_PORT, 0, &[]);
            let data = || vsock_packet(STREAM, READ_WRITE, PORT, HOST_PORT, 4, b"data");
            let mut shutdown = packet(SHUTDOWN);
            shutdown[32..36].copy_from_slice(&u32::MAX.to_le_bytes());
            let packets =
                [packet(RESPONSE), data(), shutdown.clone(), data(), packet(RESPONSE), shutdown, packet(RESET), data()];
            answer(guest, device, &packets);
        })
        .with_host(connected),
    ]
}

/// Sends a request to connect, and closes the client's socket.
fn start_to_connect(vmm: &mut Vmm) {
    let (_client, socket) = UnixStream::pair().expect("create a socket pair");
    send(vmm, Call::Connect { port: PORT }, &[socket.as_fd()]);
}

/// Connects to the guest, and sends as much data as the connection accepts. A thread then reads until the
/// connection ends.
fn connect_and_write(vmm: &mut Vmm) {
    let mut stream = vmm.connect(PORT).expect("connect to the guest");
    stream.set_nonblocking(true).expect("make the socket non-blocking");
    // The guest may reset the connection at any time.
    while let Ok(1..) = stream.write(&[7; 65_536]) {}
    std::thread::spawn(move || {
        let _ = stream.set_nonblocking(false);
        let mut buffer = [0; 4096];
        while let Ok(1..) = stream.read(&mut buffer) {}
    });
}

/// Returns a packet of each type and operation.
fn every_packet(src_port: u32, dst_port: u32, payload: &[u8]) -> Vec<Vec<u8>> {
    let kinds = [0, STREAM, 2, 3, u16::MAX];
    let ops = || (0..12).chain([255, 256, u16::MAX]);
    let packet = |kind, op| vsock_packet(kind, op, src_port, dst_port, payload.len() as u32, payload);
    kinds.into_iter().flat_map(|kind| ops().map(move |op| packet(kind, op))).collect()
}

/// Gives the device receive buffers.
fn receive(guest: &mut Guest, device: &Device, queue: &mut Queue) {
    for at in 0..queue.size {
        let addr = guest.allocate(4096);
        guest.describe(queue, at, Desc { addr, len: 4096, flags: WRITE, next: 0 });
        guest.offer(queue, at);
    }
    let queue = *queue;
    guest.publish(device, &queue);
}

/// Sends packets. The device drops or answers each packet.
fn transmit(guest: &mut Guest, device: &Device, buffers: bool, packets: &[Vec<u8>]) {
    let mut queues = guest.start(device);
    if buffers {
        receive(guest, device, &mut queues[0]);
    }
    let requests: Vec<_> = packets.iter().map(|packet| (packet.clone(), 0)).collect();
    guest.serve(device, &mut queues[1], &requests);
}

/// Waits for the host's connection request, and then sends packets.
fn answer(guest: &mut Guest, device: &Device, packets: &[Vec<u8>]) {
    let mut queues = guest.start(device);
    receive(guest, device, &mut queues[0]);
    guest.wait16(queues[0].used + 2, 0);
    let requests: Vec<_> = packets.iter().map(|packet| (packet.clone(), 0)).collect();
    guest.serve(device, &mut queues[1], &requests);
}
